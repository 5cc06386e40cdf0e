"""Integration with Ignite: a handler of its training `Engine`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dvar.stopping.monitor import StopMonitor, broadcast_verdict
from dvar.stopping.verdict import Verdict

try:
    import ignite.distributed as idist
    from ignite.engine import Engine, Events
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ignite]'", name=error.name) from None


class DvarHandler:
    """A handler that judges before the first update and after each, and terminates the engine at a stop.

    The attribute ``verdict`` is the newest one.

    Args:
        monitor: The monitor.
        updates: Returns the number of updates that an engine has made, by default its iterations. With gradients
            accumulated over four batches: ``lambda engine: engine.state.iteration // 4``.
    """

    def __init__(
        self, monitor: StopMonitor, updates: Callable[[Engine], int] = lambda engine: int(engine.state.iteration)
    ) -> None:
        self._monitor, self._updates, self.verdict = monitor, updates, monitor.verdict

    def attach(self, engine: Engine) -> None:
        """Attach the handler to the engine that trains."""
        engine.add_event_handler(Events.STARTED, self._judge, self._monitor.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._judge, self._monitor)

    def _judge(self, engine: Engine, judge: Callable[[int], Verdict]) -> None:
        self.verdict = broadcast_verdict(lambda: judge(self._updates(engine)), idist.get_rank() == 0, _broadcast)
        if self.verdict.stop:
            engine.terminate()


def _broadcast(value: Any) -> Any:
    return json.loads(str(idist.broadcast(json.dumps(value), safe_mode=True)))
