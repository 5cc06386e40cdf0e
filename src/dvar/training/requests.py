"""What a training loop asks for while it runs, and how it is answered."""

# A loop that computed its losses itself could not share a forward pass with another. So it is a generator that yields
# requests, and goes on once they are answered: by one run alone, or for many runs at once.

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

Outcome = TypeVar("Outcome")


@dataclass
class GradientRequest:
    """A request for the gradient of an update by some of its samples, added to that of the parameters.

    Attributes:
        step: The step.
        first: The first sample.
        count: The number of samples.
        objective: Returns the number whose gradient it is, from the losses of these samples.
        losses: The answer: the losses without their graph, float32 [count].
    """

    step: int
    first: int
    count: int
    objective: Callable[[Tensor], Tensor]
    losses: Tensor = field(init=False)


@dataclass
class HeldRequest:
    """A request for the losses of the held samples.

    Attributes:
        losses: The answer, float32 [B] on the CPU.
    """

    losses: Tensor = field(init=False)


Request = GradientRequest | HeldRequest


def answer_requests(
    items: Generator[Any, None, Outcome], answer: Callable[[Any], None]
) -> Generator[Any, None, Outcome]:
    """Yield what a loop yields beside its requests, which are answered; return what it returns.

    Args:
        items: The loop.
        answer: Answers a request; an exception of it is raised where the loop asked.
    """
    error: Exception | None = None
    with closing(items):
        while True:
            try:
                item = items.throw(error) if error else next(items)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            error = None
            if not isinstance(item, Request):
                yield item
                continue
            try:
                answer(item)
            except Exception as failure:
                error = failure


def outcome_of(items: Generator[Any, None, Outcome], answer: Callable[[Any], None]) -> Outcome:
    """Return what a loop returns that yields nothing but requests, which are answered as by `answer_requests`."""
    answered = answer_requests(items, answer)
    try:
        while True:
            next(answered)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
