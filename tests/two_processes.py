"""Two gloo processes that run the same words of Python."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def run_on_two(words: Sequence[str]) -> list[str]:
    """Run ``python WORDS`` on two processes and return what each printed to standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS / 'stopping' / 'integrations'}", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1"} | ({} if "ACCELERATE_USE_CPU" in os.environ else {"ACCELERATE_USE_CPU": "true"})
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], f"{codes}: " + "\n".join(errors)
    return errors


def work_on_two(worker: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return what the code of a worker wrote to outcome-0.json and outcome-1.json in ``folder``, its first argument."""
    run_on_two(["-c", worker, str(folder), *arguments])
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(2)]
