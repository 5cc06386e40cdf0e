"""The help pages."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from command_line import dvar

from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import configure
from dvar.runs.config import ReplayConfig

COMMANDS = [
    *((name,) for name in ("batch", "concepts", "demo", "export", "generate", "integrate", "launch")),
    *((name,) for name in ("record", "replay", "report", "reproduce", "studio")),
    *(("train", method) for method in PAPER_METHODS),
    *(("survey", name) for name in ("build", "serve", "export", "import", "forget", "score")),
]


def read_help(*words: object) -> str:
    """Return a help page as one line, without its frames."""
    answer = dvar(*words, "--help")
    assert (answer.status, answer.err) == (0, "")
    return " ".join(answer.out.replace("│", " ").split())


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_every_command_is_listed() -> None:
    text = read_help()
    assert all(f" {command[0]} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_flags_are_spelled_with_underscores_and_lists_cannot_be_emptied(command: tuple[str, ...]) -> None:
    flags = set(re.findall(r"--[\w-]+", read_help(*command))) - {"--help"}
    assert [flag for flag in flags if "-" in flag[2:]] == []
    assert [flag for flag in flags if flag.startswith("--empty")] == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [80, 120])
def test_a_page_fits_the_terminal_and_breaks_no_flag(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    page = dvar(*command, "--help").out
    assert max(map(len, page.splitlines())) <= columns
    assert not re.search(r"\[(default|choices): *│", page)
    flags = set(re.findall(r"--\w+", page))
    monkeypatch.setenv("COLUMNS", "500")
    assert flags == set(re.findall(r"--\w+", dvar(*command, "--help").out))


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_the_page_of_a_method_shows_all_its_flags_in_sections(method: str) -> None:
    text = read_help("train", method)
    assert all(f" --{field.name} " in text for field in fields(PAPER_METHODS[method]))
    titles = re.findall(r"╭─ (\w[\w ]*) ─", text)
    assert titles == ["Data", "Model", "Method", "Objective", "Stopping", "Sampling", "Output", "Settings file"]


@pytest.mark.parametrize("method", PAPER_METHODS)
@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], "mini"),
        (["--preset", "paper"], "paper"),
        (["--preset=lean"], "lean"),
        (["--pretrained_model_name_or_path", "owner/model"], "lean"),
        (["--pretrained-model-name-or-path=owner/model", "--preset", "paper"], "paper"),
    ],
)
def test_the_page_of_a_method_shows_the_values_of_the_preset(method: str, words: list[str], preset: str) -> None:
    text = read_help("train", method, *words)
    values = configure({"preset": preset}, PAPER_METHODS[method])
    assert f"The values shown are those of preset '{preset}'." in text
    for name in ("resolution", "window", "probe_every", "max_train_steps", "learning_rate", "num_inference_steps"):
        assert read_default(text, name) == str(getattr(values, name))


def test_the_page_of_a_method_shows_the_values_of_a_settings_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "paper"\nwindow = 99\n', encoding="utf-8")
    text = read_help("train", "textual-inversion", "--config", tmp_path / "run.toml")
    assert [read_default(text, name) for name in ("window", "resolution")] == ["99", "512"]


def test_an_unknown_preset_is_refused_before_its_values_are_shown() -> None:
    answer = dvar("train", "textual-inversion", "--preset", "papr", "--help")
    assert (answer.status, answer.out) == (2, "")
    assert "got 'papr': try paper" in answer.err


def read_default(text: str, name: str) -> str:
    """Return the default of a flag on a help page."""
    match = re.search(rf" --{name} [^\[]*(?:\[choices: [^\]]*\] )?\[default: ([^\]]*)\]", text)
    assert match
    return match[1]


def test_a_switch_shows_how_to_turn_it_off_only_where_it_is_on() -> None:
    text = read_help("train", "textual-inversion", "--preset", "paper")
    assert "--center_crop --no_center_crop" in text
    assert "--gradient_checkpointing" in text
    assert "--no_gradient_checkpointing" not in text
    assert read_default(text, "seed") == "0"
    assert "[default: False]" not in text
    assert "[default: None]" not in text


def test_every_setting_of_a_replay_is_a_flag_on_its_page() -> None:
    text = read_help("replay")
    assert all(f"--{field.name} " in text for field in fields(ReplayConfig))


def test_help_loads_nothing_slow() -> None:
    code = "import sys; from dvar.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    process: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in process.stdout
    slow = {"torch", "PIL", "diffusers", "transformers", "matplotlib", "rich.live", "dvar.training.personalise"}
    assert not slow & set(process.stderr.split())
