"""Every block of code on a page runs, or is listed with the reason why not."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from batch_tables import tiny_settings, write_toml
from command_line import dvar
from fake_run import generate_trace, write_run
from fake_survey import write_rival_runs
from page_blocks import DOCS, ELSEWHERE, NOT_RUN, PROSE, Block, find_reason, list_pages, read_blocks

import dvar as package

ROOT = DOCS.parent
BLOCKS = [block for page in list_pages() for block in read_blocks(page)]
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny_pipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "tiny_xl_pipeline",
}
"""Models that a page names, and the tiny one of `dvar.testing` that stands for each."""
SHORT = {
    "train": [
        *("--resolution", "32", "--max_train_steps", "12", "--window", "8", "--probe_every", "1"),
        *("--validation_steps", "12", "--num_validation_images", "1", "--num_inference_steps", "2", "--overwrite"),
    ],
    "generate": ["--num_inference_steps", "2"],
    "batch": ["--config", "short.toml"],
    "survey build": ["--no-generate"],
}
"""What is added to a command that does not say how long it trains, so that it takes seconds."""


def write_images(folder: Path) -> None:
    from dvar.testing import tiny_concept

    tiny_concept(folder / "my_mug")


def write_finished_run(folder: Path) -> None:
    write_run(folder / "runs" / "my-mug", generate_trace())


def write_log(folder: Path) -> None:
    trace = generate_trace()
    rows = zip(trace.steps.tolist(), trace.values.tolist(), strict=True)
    text = "step,val_loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in rows)
    (folder / "metrics.csv").write_text(text, encoding="utf-8")


def write_survey_runs(folder: Path) -> None:
    stopped, full = write_rival_runs(folder / "runs")
    stopped.rename(folder / "runs" / "mug-stopped")
    full.rename(folder / "runs" / "mug-full")


def write_jobs(folder: Path) -> dict[str, Any]:
    """Write jobs as a file and as a folder of concepts, and return the tables of another one."""
    from dvar.testing import tiny_concept, tiny_pipeline

    settings = tiny_settings(tiny_pipeline(folder / "model"))
    write_toml(folder / SHORT["batch"][1], settings, [])
    for name in ("first", "second"):
        tiny_concept(folder / "concepts" / name)
        (folder / "concepts" / f"{name}.json").write_text('{"noun": "mug"}', encoding="utf-8")
    tables = [
        {"id": name, "instance_data_dir": str(folder / "concepts" / "first"), "initializer_token": "mug", **settings}
        for name in ("third", "fourth")
    ]
    write_toml(folder / "jobs.toml", {}, tables[:1])
    return {"dvar": package, "tables": tables[1:]}


def write_concepts(folder: Path) -> None:
    """Write a folder of one concept, as `dvar concepts` checks it."""
    from dvar.testing import tiny_concept

    tiny_concept(folder / "concepts" / "red_teapot")
    (folder / "concepts" / "red_teapot.json").write_text('{"noun": "teapot"}', encoding="utf-8")


PREPARE: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "guides/train-your-images.md": write_images,
    "guides/read-a-report.md": write_finished_run,
    "concepts/when-a-constant-is-enough.md": write_finished_run,
    "guides/replay-a-log.md": write_log,
    "guides/survey.md": write_survey_runs,
    "guides/run-many.md": write_jobs,
    "paper-concepts.md": write_concepts,
}
"""What writes the files that a page speaks of into the folder of its blocks, and returns the names that it uses."""


FAST = {"concepts/verdicts.md", "concepts/when-a-constant-is-enough.md", "guides/write-a-rule.md"}
FAST |= {"guides/read-a-report.md", "guides/replay-a-log.md", "guides/survey.md", "paper-concepts.md"}
"""Pages whose blocks all run within seconds."""


def is_run(block: Block) -> bool:
    """Return whether anything in the block runs here."""
    code = block.commands if block.language == "bash" else [block.text] if block.language in ("python", "py") else []
    return any(find_reason(text) is None for text in code) and not block.snippets and block.page not in ELSEWHERE


def list_run_pages() -> list[Any]:
    pages = dict.fromkeys(block.page for block in BLOCKS if is_run(block))
    return [pytest.param(page, marks=[] if page in FAST else [pytest.mark.slow]) for page in pages]


@pytest.mark.parametrize("page", list_run_pages())
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # a dataclass looks up its own module
    if page in PREPARE:
        module.__dict__.update(PREPARE[page](tmp_path) or {})
    blocks = [block for block in BLOCKS if block.page == page]
    write_named_files(blocks, tmp_path)
    for block in filter(is_run, blocks):
        if block.language == "bash":
            for command in block.commands:
                if find_reason(command) is None:
                    run_command(command, tmp_path)
        else:
            exec(compile(block.text, f"{page}, line {block.line}", "exec"), module.__dict__)


def write_named_files(blocks: list[Block], folder: Path) -> None:
    """Write the settings file that a page shows and its commands read."""
    settings = [block for block in blocks if block.language == "toml" and not block.snippets]
    for command in (command for block in blocks if block.language == "bash" for command in block.commands):
        words = shlex.split(command, comments=True)
        if "--config" in words:
            (block,) = settings
            (folder / words[words.index("--config") + 1]).write_text(with_tiny_models(block.text, folder))


def run_command(command: str, folder: Path) -> None:
    words = shlex.split(with_tiny_models(command, folder), comments=True)
    assert words[0] == "dvar", f"{command}: run it here, or list it in page_blocks.NOT_RUN with the reason"
    short = next((flags for start, flags in SHORT.items() if words[1 : 1 + len(start.split())] == start.split()), [])
    if "--max_train_steps" in words:  # it is short already
        short = []
    for flag in (flag for flag in short if flag.startswith("--") and flag in words):  # the page's value takes long
        place = words.index(flag)
        del words[place : place + 2]
    answer = dvar(*words[1:], *short)
    assert answer.status == 0, f"{command}\n{answer.err}"


def with_tiny_models(text: str, folder: Path) -> str:
    """Return a command with tiny models, which are built once for a page, and paths of the repository."""
    from dvar import testing

    for name, builder in MODELS.items():
        if name in text:
            model = folder / builder
            text = text.replace(name, str(model if model.exists() else getattr(testing, builder)(model)))
    return text.replace("src/dvar/mini/", f"{ROOT}/src/dvar/mini/").replace("docs/traces.npz", f"{DOCS}/traces.npz")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_says_its_language(block: Block) -> None:
    assert block.language in ("python", "py", "bash", "toml", "yaml", PROSE), f"{block.page}, line {block.line}"


def test_a_snippet_is_a_program_that_another_test_runs() -> None:
    snippets = {snippet for block in BLOCKS for snippet in block.snippets}
    programs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.*")}
    assert snippets == programs  # test_example_scripts.py and test_cluster_examples.py run or check them all


def test_every_reason_is_needed() -> None:
    code = [command for block in BLOCKS if block.language == "bash" for command in block.commands]
    code += [block.text for block in BLOCKS if block.language in ("python", "py")]
    assert {reason for text in code if (reason := find_reason(text))} == {*NOT_RUN}


def test_a_command_that_nobody_runs_or_excuses_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"list it in page_blocks\.NOT_RUN"):
        run_command("rm -rf nothing", tmp_path)
    with pytest.raises(AssertionError, match="nowhere"):
        run_command("dvar report nowhere", tmp_path)


def test_the_folders_that_are_prepared_belong_to_pages() -> None:
    assert {*PREPARE, *FAST, *ELSEWHERE} <= {*list_pages()}
