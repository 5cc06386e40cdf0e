"""Scripts of every structure, launched: training is that of the plain script, bit for bit, and a stop leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched_script import NEVER, SCRIPTS, SOON, find_differences, launch, read_state, read_trace

OFF = ("--dvar_off",)
STRUCTURES = [path.name for path in sorted(SCRIPTS.glob("*.py")) if path.stem not in ("tiny", "trainer")]
CASES = [
    *((name, ()) for name in STRUCTURES),
    *((name, ("--gradient_accumulation_steps", "2")) for name in ("plain.py", "text_encoder.py", "other_counter.py")),
    ("plain.py", ("--samples", "3", "--train_batch_size", "1")),
    ("plain.py", ("--samples", "48", "--num_workers", "2")),
    ("plain.py", ("--num_train_epochs", "3", "--max_train_steps", "1000")),
    ("cached_latents.py", ("--samples", "9", "--train_batch_size", "4")),
]


@pytest.mark.parametrize(
    ("script", "arguments"), CASES, ids=lambda part: part if isinstance(part, str) else "-".join(part)
)
def test_training_is_that_of_the_plain_script(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    for folder, flags in (("off", OFF), ("on", NEVER)):
        assert launch(script, tmp_path / folder, *arguments, flags=flags).status == 0
    assert find_differences(read_state(tmp_path / "off"), read_state(tmp_path / "on")) == []
    assert not (tmp_path / "off" / "trace.jsonl").exists()
    trace = read_trace(tmp_path / "on")
    assert len(trace) >= 7
    assert set(trace.steps.tolist()) <= set(range(0, 26, 2))
    assert trace.values.std() > 0


@pytest.mark.parametrize("script", STRUCTURES)
def test_a_stop_leaves_the_script_as_its_own_cap_would(script: str, tmp_path: Path) -> None:
    answer = launch(script, tmp_path / "stopped", flags=SOON)
    assert answer.status == 0
    step = read_trace(tmp_path / "stopped").last_step
    assert f"dvar: stop at step {step}: " in answer.err
    assert 8 <= step < 24
    launch(script, tmp_path / "capped", "--max_train_steps", step, flags=OFF)
    assert find_differences(read_state(tmp_path / "stopped"), read_state(tmp_path / "capped")) == []
