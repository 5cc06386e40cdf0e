"""Integration with accelerate: a verdict that is the same on every process."""

from __future__ import annotations

from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, broadcast_verdict
from dvar.stopping.verdict import Verdict

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, broadcast_object_list
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[accelerate]'", name=error.name) from None


def judge_together(accelerator: Accelerator, monitor: StopMonitor, step: int) -> Verdict:
    """Return the verdict of ``monitor`` at ``step``; every process must call this after each update.

    Only the main process measures, records and judges; the others wait for it.

    Args:
        accelerator: The accelerator of the training loop.
        monitor: The monitor. The loss of its probe must run through the model itself,
            ``accelerator.unwrap_model(model)``: the wrapper would wait for the other processes.
        step: Number of updates. Under gradient accumulation it grows where ``accelerator.sync_gradients`` is true.

    Returns:
        The same verdict on every process.

    Raises:
        RefusedInput: The model is sharded over several processes (FSDP, Megatron-LM, DeepSpeed stage 3), so that one
            process cannot run it alone. Else as `StopMonitor`, on every process.
    """
    kind = accelerator.distributed_type
    sharded = kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if sharded or (kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3):
        raise RefusedInput(
            f"one process measures alone, which needs the whole model there, got {kind.value}: "
            "measure the loss on all processes, then record it with a monitor that has no probe"
        )
    return broadcast_verdict(lambda: monitor(step), accelerator.is_main_process, broadcast_object)


def broadcast_object(value: Any) -> Any:
    """Return on every process the value that the main process passed."""
    return broadcast_object_list([value])[0]
