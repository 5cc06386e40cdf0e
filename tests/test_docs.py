"""Every example in the documentation is run, as it stands, against the real library."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dvar import Reason, Trace, Verdict

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add-it-to-your-trainer.md"
SHARED = "The lines that all hosts share"
OURS = re.compile(r"dvar|watch|probe|stop|verdict|judged|Dvar", re.IGNORECASE)


def examples(page: Path) -> dict[str, str]:
    """The Python block of each section that has one, by its heading."""
    sections = re.split(r"^## (.+)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    blocks = {name: re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) for name, text in _pairs(sections)}
    assert all(len(found) <= 1 for found in blocks.values())
    return {name: found[0] for name, found in blocks.items() if found}


def _pairs(parts: list[str]) -> Any:
    return zip(parts[::2], parts[1::2], strict=True)


SECTIONS = examples(PAGE)
HOSTS = [name for name in SECTIONS if name != SHARED]


@pytest.fixture
def ray_on_one_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.getfixturevalue("section") != "Ray Tune":
        yield
        return
    import ray

    # Ray starts its workers with a niceness of 15: on a busy machine the trial would never begin.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=[pytest.mark.slow] if name == "Ray Tune" else []) for name in HOSTS]
)
def test_an_example_runs_and_stops_by_itself(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_on_one_core: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    names: dict[str, Any] = {"__name__": "example"}
    monkeypatch.setitem(sys.modules, "example", None)
    for part in (SHARED, section):
        exec(compile(SECTIONS[part], f"{PAGE.name}: {part}", "exec"), names)
    verdict = names["verdict"]
    assert isinstance(verdict, Verdict)
    assert (verdict.stop, verdict.reason) == (True, Reason.STABILISED)
    assert 60 < verdict.step < 1000
    traces = [Trace.read(path) for path in tmp_path.glob("*/trace.jsonl")]
    assert [names["stop"](trace) for trace in traces] == ([verdict] if section not in ("Ray Tune", "Optuna") else [])


@pytest.mark.parametrize("section", HOSTS)
def test_a_host_takes_ten_lines_at_most(section: str) -> None:
    """The lines that are there for dvar, the few of `SHARED` that build the watch apart."""
    ours = [line for line in SECTIONS[section].splitlines() if OURS.search(line)]
    assert len(ours) <= 10


def test_every_integration_has_its_section() -> None:
    shown = {
        node.module
        for text in SECTIONS.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dvar.stopping.integrations.")
    }
    there = (ROOT / "src" / "dvar" / "stopping" / "integrations").glob("[!_]*.py")
    assert shown == {f"dvar.stopping.integrations.{path.stem}" for path in there}


def test_what_the_page_shows_of_the_whole_programs_is_in_them() -> None:
    """Each piece is in the programs that its section names; these are run by `test_example_scripts.py`."""
    shown = 0
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        programs = [
            (PAGE.parent / path).read_text(encoding="utf-8") for path in re.findall(r"\]\((.*?\.py)\)", section)
        ]
        for piece in re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S):
            assert programs
            assert [program for program in programs if piece not in program] == []
            shown += 1
    assert shown == 2


def test_every_program_is_on_the_page() -> None:
    there = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"\(\.\./examples/(.*?\.py)\)", PAGE.read_text(encoding="utf-8"))) == there


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
