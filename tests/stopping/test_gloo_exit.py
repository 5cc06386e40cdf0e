"""Two gloo processes that end right after a verdict, while a thread of gloo has not given back what it held."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from two_processes import run_on_two

# The threads run only where a core has nothing else to do, and both processes share one core: what happens now and
# then on a busy machine happens in most runs.
WORKER = """
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dvar import Verdict
from dvar.stopping.diagnosis import Reason
from dvar.stopping.monitor import broadcast_verdict

def broadcast(value):
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
dist.init_process_group("gloo")
net = nn.parallel.DistributedDataParallel(nn.Linear(8, 1))
for step in range(3):
    if step == 2:
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().startswith("pt_gloo"):
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    net(torch.ones(4, 8)).mean().backward()
    broadcast_verdict(lambda: Verdict(False, Reason.RUNNING, step, "", {}), dist.get_rank() == 0, broadcast)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not hasattr(os, "SCHED_IDLE"), reason="needs Linux, where threads are seen"
)
def test_processes_end_after_the_threads_of_gloo(tmp_path: Path) -> None:
    for _ in range(4):
        run_on_two(["-c", WORKER])
