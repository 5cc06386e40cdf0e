"""The pages that are written by a script say what the code says today, and their examples run."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dvar
from dvar import Dvar, Reason, Trace
from dvar.recordings.archive_file import read_traces

DOCS = Path(__file__).parents[1] / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def verdicts() -> ModuleType:
    return script("verdicts")


def test_the_page_of_verdicts_and_its_pictures_are_current(verdicts: ModuleType) -> None:
    pages = verdicts.pages()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: make docs"
    assert set((DOCS / "verdicts").iterdir()) == {path for path in pages if path.suffix == ".svg"}


def test_the_page_of_performance_and_its_picture_are_current() -> None:
    performance = script("performance")
    for path, text in performance.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: make docs"


def test_a_step_of_nothing_but_networks_leaves_nothing_to_gain() -> None:
    parts = {"data": 0.0, "encode": 0.0, "text": 1.0, "U-Net forward": 2.0, "backward": 3.0, "optimizer": 0.0}
    assert script("performance").ceiling({"parts": {"plain": parts}}) == 1
    assert script("performance").ceiling({"parts": {"plain": parts | {"encode": 3.0}}}) == 1.5


def test_every_reason_has_its_curve(verdicts: ModuleType) -> None:
    assert {case.reason for case in verdicts.CASES} == set(Reason)
    assert len(verdicts.CASES) == len(Reason)


def test_the_pictures_are_whole(verdicts: ModuleType) -> None:
    for path in (DOCS / "verdicts").iterdir():
        ElementTree.parse(path)


def test_a_curve_that_is_judged_otherwise_is_told(verdicts: ModuleType) -> None:
    wrong = verdicts.Case(Reason.RISING, lambda step: 1.0 - 1e-4 * step, "", "")
    with pytest.raises(AssertionError, match="'rising' is judged 'still falling'"):
        verdicts.judged(wrong)


def test_the_example_of_stop_on_runs_and_means_what_the_page_says() -> None:
    page = (DOCS / "verdicts.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(ast.parse(example), "verdicts.md", "exec"), names)
    straight, flat = Trace(), Trace()
    for step in range(1001):
        straight.record(step, 1.0 - 1e-4 * step)
        flat.record(step, 1.0)
    stops = {name: names[name](straight).stop for name in ("patient", "eager", "guarded", "published")}
    assert stops == {"patient": False, "eager": True, "guarded": False, "published": True}
    assert names["guarded"](flat).stop
    assert not Dvar(310, 0.15)(flat).stop


def test_the_example_of_a_rule_of_one_s_own_judges_every_public_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = str(DOCS / "traces.npz")
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "traces.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "own.py").write_text(example.replace("docs/traces.npz", traces), encoding="utf-8")
    runpy.run_path(str(tmp_path / "own.py"))
    shown, shelf = capsys.readouterr().out.splitlines(), read_traces(traces)
    counted = [record.name for record in shelf if record.concept not in shelf.tuning]
    assert [line.split()[0] for line in shown] == counted
    assert all(re.search(r" stops at +\d+, keeps -?\d", line) for line in shown)


def test_the_reference_is_current_and_holds_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert script("reference").page() == text, "reference.md is old: make docs"
    assert all(f"### dvar.{name}\n" in text for name in dvar.__all__ if name != "__version__")
