"""The blocks of code on the pages of the documentation, and which of them no test runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
PROSE = "text"
"""The language of a block that is no code: an output, a list of files, what a file holds."""
GENERATED = ("reference/commands.md", "notebooks/")
"""Pages that `make docs` writes: usage lines, and notebooks, which test_notebooks.py runs."""

# What no test runs as it stands, by how the line or the block begins, with the reason. The test that does nearly the
# same is named where there is one.
NOT_RUN = {
    # installation
    "make ": "it sets up an environment, from the network",
    "pip install ": "it needs the network",
    "python -m pip install ": "it needs the network",
    "python -m venv ": "it sets up an environment, from the network",
    'python -c "import lpips': "it needs foreign weights; tests/recordings/test_lpips.py reads such a file",
    "ruff check": "it checks this repository, tests among them",
    # hours or days
    "python -m pretraining": "it trains for hours; tests/pretraining/ runs each stage briefly",
    "python benchmarks/": "it measures for minutes or hours; tests/test_benchmarks.py runs the benchmarks briefly",
    "dvar record --panel all --estimate": "it measures this machine for minutes; tests/recordings/test_panel_plan.py",
    "dvar record --panel all  ": "it records for days; tests/recordings/test_panel_plan.py",
    "dvar record --panel all --skip_recorded": "it records for days; tests/recordings/test_elsewhere.py",
    "dvar reproduce panel": "it needs the recorded panel; tests/paper/test_panel_page.py",
    "dvar reproduce table1 --records docs/traces.npz": "it takes minutes; tests/paper/test_experiments.py",
    "dvar reproduce rules --records": "it tunes every rule for minutes; tests/paper/test_experiments.py",
    "dvar reproduce traces --records records": "it needs recorded runs; tests/recordings/test_archive_file.py",
    "dvar reproduce all --records records": "it needs recorded runs; tests/paper/test_reproduce.py",
    "dvar record textual-inversion --model": "it needs foreign judges; tests/recordings/test_record_config.py",
    "dvar train textual-inversion --preset v1": "it needs OpenAI's CLIP; tests/training/test_token_initializer.py",
    # a cluster, several processes or GPUs
    "dvar batch jobs.csv --ray auto": "it needs a Ray cluster; tests/cluster/test_ray_workers.py",
    "dvar batch jobs.toml --pack 4": "tests/jobs/test_batch_pack.py",
    "accelerate launch ": "it needs several processes; tests/training/test_processes.py and tests/launch/ start them",
    "torchrun ": "it needs several processes; tests/training/test_processes.py starts them",
    # somebody else's program
    "dvar launch train_dreambooth_lora_sdxl.py": "a foreign script and model; tests/launch/test_diffusers_scripts.py",
    "dvar launch --check train_network.py": "a foreign script; tests/launch/test_kohya_script.py",
    "dvar integrate ": "it writes into a foreign checkout; tests/stopping/integrations/trainers/",
    "dvar replay output/mug/loss_log.db --follow": "it follows a program that trains; tests/runs/test_follow.py",
    "from dvar.stopping.integrations.trainers": "it stands in sd-scripts' own loop; test_network_trainers.py has it",
    "if monitor(global_step).stop:": "it stands in sd-scripts' own loop; test_network_trainers.py has it",
    "from dvar.testing import RuleContract\n\n\nclass TestMyRule": "the rule is the reader's; tests/test_testing.py",
    # people
    "dvar survey serve survey": "it serves until it is interrupted; tests/survey/test_survey_browser.py",
    "dvar studio runs/": "it serves until it is interrupted; tests/studio/test_studio_browser.py",
    "dvar survey import survey answers.csv": "it needs people's answers; tests/survey/test_survey_scoring.py",
}
ELSEWHERE = {
    "guides/add-it-to-your-loop.md": "test_add_it_to_your_loop.py, each framework by itself",
}
"""Pages whose Python blocks another test runs."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page, relative to docs/.
        line: The line of its fence.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def snippets(self) -> list[str]:
        """The files of the repository that the block consists of."""
        return re.findall(r'^--8<-- "(.+)"$', self.text, re.MULTILINE)

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell, one for each, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def list_pages() -> list[str]:
    """Return the pages that somebody has written, relative to docs/, with the one that the site shows of the root."""
    pages = (path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md")))
    return [*(page for page in pages if not page.startswith(GENERATED)), "../CONTRIBUTING.md"]


def read_blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page, in its order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = match["indent"]
        lines = (line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        yield Block(page, text.count("\n", 0, match.start()) + 1, match["language"], "".join(lines))


def find_reason(code: str) -> str | None:
    """Return the beginning, in `NOT_RUN`, of a command or block that no test runs; None if it is run."""
    return next((start for start in NOT_RUN if f"{code}  ".startswith(start)), None)
