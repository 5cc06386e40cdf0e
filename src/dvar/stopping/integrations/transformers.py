"""Integration with transformers: a callback of its `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, broadcast_verdict
from dvar.stopping.verdict import Verdict

try:
    from accelerate.utils import parse_flag_from_env
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import is_deepspeed_zero3_enabled

    from dvar.stopping.integrations.accelerate import broadcast_object
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[transformers]'", name=error.name) from None


class DvarCallback(TrainerCallback):  # type: ignore[misc]  # untyped base
    """A callback that judges before the first update and after each, and stops the `Trainer` on every process at once.

    The attribute ``verdict`` is the newest one. The state that survives a resume is the trace, so the Trainer's
    ``restore_callback_states_from_checkpoint`` is not needed. A run that is resumed after its stop may make one more
    update, because the Trainer checks for a stop only after a batch.

    Args:
        monitor: The monitor.

    Raises:
        RefusedInput: As training begins: the model is sharded over several processes.
    """

    def __init__(self, monitor: StopMonitor) -> None:
        self._monitor, self.verdict = monitor, monitor.verdict

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs.get("model")
        by_transformers = getattr(model, "is_distributed_loading_by_transformers", False)
        split = by_transformers or (getattr(model, "tp_size", None) or 1) > 1
        if parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled() or split:
            kind = "a model that transformers has split" if split else "FSDP or DeepSpeed stage 3"
            raise RefusedInput(
                f"one process measures alone, which needs the whole model there, got {kind}: "
                "train with data parallelism only"
            )
        self._judge(self._monitor.begin, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._judge(self._monitor, state, control)

    def _judge(self, judge: Callable[[int], Verdict], state: TrainerState, control: TrainerControl) -> None:
        self.verdict = broadcast_verdict(
            lambda: judge(state.global_step), state.is_world_process_zero, broadcast_object
        )
        control.should_training_stop |= self.verdict.stop
