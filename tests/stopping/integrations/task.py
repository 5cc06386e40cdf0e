"""A line fitted to two points: every framework makes the same updates, so all must stop at the same step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dvar import Dvar, Probe, StopMonitor, Trace

X, Y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0]])
RATE, STOP, CAP = 0.1, Dvar(window=20, threshold=0.2), 200


def build_network() -> nn.Linear:
    """Return the untrained model, in training mode."""
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    return net.train()


def build_loss(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the loss of each point."""
    return lambda held: (net(held) - Y).square().mean(dim=1)


def build_monitor(net: nn.Module, path: Path, every: int = 1) -> StopMonitor:
    return StopMonitor(STOP, Probe(build_loss(net), X, [net]), path, every=every)


@functools.cache
def record_expected_trace() -> Trace:
    """Return the trace of the plain loop, up to its stop."""
    net, trace = build_network(), Trace()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    probe = Probe(build_loss(net), X, [net])
    for step in range(CAP):
        trace.record(step, probe())
        if STOP(trace).stop:
            break
        optimizer.zero_grad()
        build_loss(net)(X).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return trace


def assert_as_expected(trace: Trace) -> None:
    """Check that the steps are equal, and the values as close as another order of the same sums allows."""
    assert trace.steps.tolist() == record_expected_trace().steps.tolist()
    torch.testing.assert_close(
        torch.tensor(trace.samples), torch.tensor(record_expected_trace().samples), rtol=1e-5, atol=1e-9
    )
