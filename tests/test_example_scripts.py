"""What the documentation shows must run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_ends_with_a_verdict(example: Path) -> None:
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stop at step ")


def test_the_readme_shows_the_drop_in_use_as_the_example_has_it() -> None:
    """Compare the lines of the README's loop that use dvar with the example, word for word."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:trace, stop = |probe = dvar|    trace\.record|    if \(verdict).*$", readme, re.MULTILINE)
    example = (ROOT / "examples" / "drop_in.py").read_text(encoding="utf-8")
    assert len(lines) == 4
    assert [line for line in lines if line not in example] == []
