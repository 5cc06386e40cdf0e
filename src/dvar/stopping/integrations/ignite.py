"""Ignite: a handler for its training `Engine`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dvar.stopping.monitor import StopMonitor, from_first_rank
from dvar.stopping.verdict import Verdict

try:
    import ignite.distributed as idist
    from ignite.engine import Engine, Events
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ignite]'", name=error.name) from None


class DvarHandler:
    """Asks `watch` before the first update and after each, and terminates the engine it is attached to.

    `verdict` is the newest one.  `updates` gives the updates an engine has made: its iterations, unless gradients are
    accumulated, as over four batches with `updates=lambda engine: engine.state.iteration // 4`.
    """

    def __init__(
        self, watch: StopMonitor, updates: Callable[[Engine], int] = lambda engine: int(engine.state.iteration)
    ) -> None:
        self._watch, self._updates, self.verdict = watch, updates, watch.verdict

    def attach(self, engine: Engine) -> None:
        """Make `engine`, which trains, ask."""
        engine.add_event_handler(Events.STARTED, self._ask, self._watch.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._ask, self._watch)

    def _ask(self, engine: Engine, ask: Callable[[int], Verdict]) -> None:
        self.verdict = from_first_rank(lambda: ask(self._updates(engine)), idist.get_rank() == 0, _broadcast)
        if self.verdict.stop:
            engine.terminate()


def _broadcast(value: Any) -> Any:
    return json.loads(str(idist.broadcast(json.dumps(value), safe_mode=True)))
