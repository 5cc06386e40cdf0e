from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import fake_trace, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run that DVAR stopped, with samples."""
    return write_run(tmp_path / "run", fake_trace())
