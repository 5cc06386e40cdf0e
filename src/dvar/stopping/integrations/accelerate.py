"""accelerate: the first process judges, and every process hears the same verdict at the same step."""

from __future__ import annotations

from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, from_first_rank
from dvar.stopping.verdict import Verdict

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, broadcast_object_list
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[accelerate]'", name=error.name) from None


def judged_together(accelerator: Accelerator, watch: StopMonitor, step: int) -> Verdict:
    """The verdict of `watch` at `step`, the same on every process; each must call it, after each update.

    The main process alone measures, records and judges, the others wait for it.  `step` counts updates, so under
    gradient accumulation it grows where `accelerator.sync_gradients` is true.  The loss that is probed must run through
    the model itself, `accelerator.unwrap_model(model)`: the wrapper would wait for the other processes.

    Raises: RefusedInput when the model lies in parts on several processes (FSDP, Megatron-LM, DeepSpeed's third stage),
    since one of them cannot run it alone; else as `StopMonitor`, on every process.
    """
    kind = accelerator.distributed_type
    parted = kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if parted or (kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3):
        raise RefusedInput(
            f"one process measures alone, which needs the whole model there, got {kind.value}: "
            "measure the loss on all processes, then record it with a watch that has no probe"
        )
    return from_first_rank(lambda: watch(step), accelerator.is_main_process, broadcast)


def broadcast(value: Any) -> Any:
    """What the main process gave, on every process."""
    return broadcast_object_list([value])[0]
