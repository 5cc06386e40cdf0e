"""Two points and a line to be put through them: the same update at every step, so every host must stop alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dvar import Dvar, Probe, StopMonitor, Trace

X, Y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0]])
RATE, STOP, CAP = 0.1, Dvar(window=20, threshold=0.2), 200


def network() -> nn.Linear:
    """The untouched model, with dropout's flag to be found again."""
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    return net.train()


def losses_of(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss of each of the points, by whatever module."""
    return lambda held: (net(held) - Y).square().mean(dim=1)


def build_monitor(net: nn.Module, path: Path, every: int = 1) -> StopMonitor:
    return StopMonitor(STOP, Probe(losses_of(net), X, [net]), path, every=every)


@functools.cache
def expected() -> Trace:
    """The trace of the plain loop, up to its stop."""
    net, trace = network(), Trace()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    probe = Probe(losses_of(net), X, [net])
    for step in range(CAP):
        trace.record(step, probe())
        if STOP(trace).stop:
            break
        optimizer.zero_grad()
        losses_of(net)(X).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return trace


def assert_as_expected(trace: Trace) -> None:
    """To the step, and as near in the values as another order of the same sums allows."""
    assert trace.steps.tolist() == expected().steps.tolist()
    torch.testing.assert_close(torch.tensor(trace.samples), torch.tensor(expected().samples), rtol=1e-5, atol=1e-9)
