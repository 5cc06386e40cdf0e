"""transformers: a callback of its `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, from_first_rank
from dvar.stopping.verdict import Verdict

try:
    from accelerate.utils import parse_flag_from_env
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import is_deepspeed_zero3_enabled

    from dvar.stopping.integrations.accelerate import broadcast
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[transformers]'", name=error.name) from None


class DvarCallback(TrainerCallback):
    """Asks `watch` before the first update and after each, and stops the `Trainer` with it: on every process, at once.

    `verdict` is the newest one.  What survives a resume is the trace, so the Trainer's own
    `restore_callback_states_from_checkpoint` is not needed.  A run that is resumed after its stop may make one more
    update, since the Trainer looks for a wish to stop after a batch only.

    Raises: RefusedInput, as training begins, when the model lies in parts on several processes.
    """

    def __init__(self, watch: StopMonitor) -> None:
        self._watch, self.verdict = watch, watch.verdict

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled():
            raise RefusedInput(
                "one process measures alone, which needs the whole model there, got FSDP or DeepSpeed's third stage: "
                "train with data parallelism alone"
            )
        self._ask(self._watch.begin, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ask(self._watch, state, control)

    def _ask(self, ask: Callable[[int], Verdict], state: TrainerState, control: TrainerControl) -> None:
        self.verdict = from_first_rank(lambda: ask(state.global_step), state.is_world_process_zero, broadcast)
        control.should_training_stop |= self.verdict.stop
