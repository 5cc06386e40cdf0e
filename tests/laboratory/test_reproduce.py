"""``dvar reproduce`` from its words to its files and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_record import fake_record

from dvar.cli import main


def test_one_figure_is_made_from_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_record(tmp_path / "records", cap=60, learned=8.0)
    out = tmp_path / "out"
    assert main(["reproduce", "figure1", "--records", str(tmp_path / "records"), "--output_dir", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out / "report.html")
    assert "dvar: figure1: Figure 1" in told.err
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "figure1.json",
        *(f"figure1-convergence-textual-inversion.{kind}" for kind in ("svg", "png")),
    }


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "figure3"]) == 2
    assert "there is no experiment 'figure3': the nearest is figure" in capsys.readouterr().err


def test_without_records_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "all", "--records", str(tmp_path / "none"), "--output_dir", str(out)]) == 2
    assert f"there are no recorded runs in {tmp_path / 'none'}" in capsys.readouterr().err
    assert not out.exists()
