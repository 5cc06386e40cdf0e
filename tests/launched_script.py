"""Scripts launched within the test's process, and the state that they leave."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from command_line import Answer, dvar

from dvar.stopping.trace import Trace

SCRIPTS = Path(__file__).parent / "launch" / "scripts"
NEVER = ("--dvar_every", "2", "--dvar_window", "20", "--dvar_threshold", "1e-9")
"""Flags with which the rule never stops a short script."""
SOON = ("--dvar_every", "1", "--dvar_window", "8", "--dvar_rule", "paper", "--dvar_threshold", "0.9")
"""Flags with which the rule soon stops a short script."""


@contextmanager
def fresh_process() -> Iterator[None]:
    """Undo what a process that has run a script keeps: its modules, its generators, the state of accelerate."""
    before = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and (SCRIPTS in Path(file).parents or name in ("tiny", "trainer")):
                    del sys.modules[name]
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def launch(script: Path | str, output_dir: Path, *arguments: object, flags: tuple[object, ...] = NEVER) -> Answer:
    """Launch a script of `SCRIPTS`, or any other, with an output folder."""
    with fresh_process():
        return dvar("launch", *flags, SCRIPTS / script, "--output_dir", output_dir, *arguments)


def write_script(folder: Path, *changes: tuple[str, str]) -> Path:
    """Write the plain script with changes, and the module that it imports beside it."""
    source = (SCRIPTS / "plain.py").read_text(encoding="utf-8")
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    (folder / "tiny.py").write_bytes((SCRIPTS / "tiny.py").read_bytes())
    path = folder / "script.py"
    path.write_text(source, encoding="utf-8")
    return path


def read_state(output_dir: Path, process: int = 0) -> dict[str, Any]:
    """Return what a script left at its end."""
    state: dict[str, Any] = torch.load(output_dir / f"final-{process}.pt", weights_only=False)
    return state


def find_differences(state: Any, other: Any, place: str = "") -> list[str]:
    """Return where two states are not bit for bit the same."""
    if isinstance(state, dict):
        if state.keys() != other.keys():
            return [f"{place}: {sorted(map(str, state))} and {sorted(map(str, other))}"]
        return [problem for key in state for problem in find_differences(state[key], other[key], f"{place}.{key}")]
    if isinstance(state, list | tuple):
        if len(state) != len(other):
            return [f"{place}: {len(state)} and {len(other)} entries"]
        pairs = enumerate(zip(state, other, strict=True))
        return [problem for index, pair in pairs for problem in find_differences(*pair, f"{place}[{index}]")]
    if hasattr(state, "shape"):
        same = bool(torch.equal(torch.as_tensor(state), torch.as_tensor(other)))
    else:
        same = state == other
    return [] if same else [f"{place}: {state!r} and {other!r}"]


def read_trace(output_dir: Path) -> Trace:
    """Return the trace of a launched script."""
    return Trace.read(output_dir / "trace.jsonl")
