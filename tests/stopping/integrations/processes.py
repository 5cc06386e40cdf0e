"""Two gloo processes that run one worker."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_two(worker: str, folder: Path) -> list[dict[str, Any]]:
    """Return what a worker wrote to outcome-0.json and outcome-1.json in ``folder``, its only argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[3]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    shared |= {"PYTHONPATH": f"{root / 'src'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], f"{codes}: " + "\n".join(errors)
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(2)]
