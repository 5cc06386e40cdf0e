"""The examples for a loop of one's own run, each against the real library."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dvar import Reason, Trace, Verdict

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "add-it-to-your-loop.md"
SHARED = "The code that all examples share"
OURS = re.compile(r"dvar|monitor|probe|stop|verdict|judge|Dvar", re.IGNORECASE)


def read_examples(page: Path) -> dict[str, str]:
    """Return the Python block of each section that has one, by its heading."""
    sections = re.split(r"^## (.+)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    blocks = {name: re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) for name, text in _pairs(sections)}
    assert all(len(texts) <= 1 for texts in blocks.values())
    return {name: texts[0] for name, texts in blocks.items() if texts}


def _pairs(parts: list[str]) -> Any:
    return zip(parts[::2], parts[1::2], strict=True)


SECTIONS = read_examples(PAGE)
HOSTS = [name for name in SECTIONS if name != SHARED]


@pytest.fixture
def ray_on_one_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.getfixturevalue("section") != "Ray Tune":
        yield
        return
    request.getfixturevalue("one_ray")
    import ray

    # Ray starts its workers with a niceness of 15: on a busy machine the trial would never begin.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
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
def test_an_integration_takes_ten_lines_at_most(section: str) -> None:
    """Count the lines for dvar, without those of `SHARED` that build the monitor."""
    ours = [line for line in SECTIONS[section].splitlines() if OURS.search(line)]
    assert len(ours) <= 10


def test_every_integration_has_its_section() -> None:
    imported = {
        node.module
        for text in SECTIONS.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dvar.stopping.integrations.")
    }
    modules = (ROOT / "src" / "dvar" / "stopping" / "integrations").glob("[!_]*.py")
    assert imported == {f"dvar.stopping.integrations.{path.stem}" for path in modules}


def test_the_excerpts_on_the_page_are_in_the_programs() -> None:
    """Each excerpt is in the programs that its section names; `test_example_scripts.py` runs these."""
    excerpts = 0
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        programs = [
            (ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"\[`(examples/\w+\.py)`\]", section)
        ]
        for excerpt in re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S):
            assert programs
            assert [program for program in programs if excerpt not in program] == []
            excerpts += 1
    assert excerpts == 1


def test_every_program_is_on_the_page() -> None:
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"\[`examples/(\w+\.py)`\]", PAGE.read_text(encoding="utf-8"))) == programs


def test_the_loop_in_the_readme_is_that_of_the_example() -> None:
    (loop,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    program = (ROOT / "examples" / "drop_in.py").read_text(encoding="utf-8")
    lines = [line.partition("  #")[0] for line in loop.splitlines()]
    assert [line for line in lines if line.strip() != "..." and line not in program.splitlines()] == []
