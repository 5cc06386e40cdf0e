"""The commands: flags, their precedence, refused input, and a whole run."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from command_line import Answer, dvar
from fake_run import generate_trace, write_run
from PIL import Image, ImageChops

from dvar import Reason, Verdict, __version__, mini
from dvar.cli.console import program_name
from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig, problems
from dvar.errors import DvarError
from dvar.logs.reader import read_log
from dvar.runs.follow import follow_log
from dvar.runs.generate import _save_new
from dvar.testing import tiny_concept, tiny_pipeline
from dvar.training.run import TrainingResult

TRAIN = ("train", "textual-inversion")
HINTS = {
    name: hint
    for name, hint in get_type_hints(TextualInversionConfig).items()
    if name in {field.name for field in fields(TextualInversionConfig)}
}


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[TextualInversionConfig]:
    """Collect the settings that commands would have trained with; each command fails instead."""
    collected: list[TextualInversionConfig] = []

    def personalise(config: TextualInversionConfig, consumers: Sequence[Any], **_: Any) -> None:
        collected.append(config)
        raise DvarError("not in this test")

    monkeypatch.setattr("dvar.training.preflight.preflight", lambda *_: None)
    monkeypatch.setattr("dvar.training.personalise.personalise", personalise)
    return collected


# Flags


def choose_value(name: str) -> tuple[str, Any]:
    """Return a value of a flag other than its default, as text and as a value."""
    hint, default = HINTS[name], getattr(TextualInversionConfig(), name)
    if get_origin(hint) is Literal:
        choice = next(choice for choice in get_args(hint) if choice != default)
        return choice, choice
    if name == "preset":
        return "paper", "paper"
    if float in (hint, *get_args(hint)):
        return "0.625", 0.625
    return ("72", 72) if int in (hint, *get_args(hint)) else ("words", "words")


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is not bool])
@pytest.mark.parametrize("hyphens", [False, True])
def test_every_setting_is_a_flag_in_both_spellings(
    configs: list[TextualInversionConfig], name: str, hyphens: bool
) -> None:
    text, value = choose_value(name)
    answer = dvar(*TRAIN, f"--{name.replace('_', '-') if hyphens else name}", text)
    assert (answer.status, answer.err.splitlines()[-1]) == (1, "dvar: not in this test")
    assert getattr(configs[0], name) == value


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is bool])
@pytest.mark.parametrize("off", [False, True])
def test_a_switch_can_be_turned_on_and_off(configs: list[TextualInversionConfig], name: str, off: bool) -> None:
    dvar(*TRAIN, f"--{'no_' * off}{name}")
    dvar(*TRAIN, f"--{'no-' * off}{name}")
    dvar(*TRAIN, f"--{'no-' * off}{name.replace('_', '-')}")
    assert [getattr(config, name) for config in configs] == [not off] * 3


def test_every_flag_of_the_diffusers_script_is_there() -> None:
    names = {item.name for item in fields(TextualInversionConfig)}
    assert names >= {
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "placeholder_token",
        "initializer_token",
        "learnable_property",
        "num_vectors",
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "learning_rate",
        "lr_scheduler",
        "max_train_steps",
        "seed",
        "mixed_precision",
        "validation_prompt",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "output_dir",
        "probe_every",
        "window",
        "threshold",
    }


@pytest.mark.parametrize("flag", ["--train_data_dir", "--train-data-dir", "--instance-data-dir"])
def test_the_folder_of_images_has_two_names(configs: list[TextualInversionConfig], flag: str) -> None:
    dvar(*TRAIN, flag, "here")
    assert configs[0].instance_data_dir == "here"


def test_a_flag_overrides_the_file_and_the_file_the_preset(
    configs: list[TextualInversionConfig], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('learning-rate = 0.5\nseed = 5\ntrain_data_dir = "images"\n', encoding="utf-8")
    dvar(*TRAIN, "--config", path, "--seed", "7")
    config = configs[0]
    assert (config.seed, config.learning_rate, config.instance_data_dir) == (7, 0.5, "images")
    assert (config.preset, config.resolution) == ("mini", 64)
    assert config.adam_beta1 == TextualInversionConfig().adam_beta1


def test_every_method_has_its_command_its_flags_and_its_preset(configs: list[TrainingConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rank = 8\n", encoding="utf-8")
    dvar("train", "dreambooth-lora", "--config", path, "--instance-prompt", "a photo of sks dog")
    dvar("train", "custom-diffusion", "--modifier_token", "<m>", "--class_noun", "mug", "--freeze_model", "crossattn")
    lora, custom = configs
    assert isinstance(lora, DreamBoothLoraConfig)
    assert (lora.rank, lora.placeholder_token, lora.instance_prompt) == (8, None, "a photo of sks dog")
    assert isinstance(custom, CustomDiffusionConfig)
    assert (custom.placeholder_token, custom.class_noun, custom.freeze_model) == ("<m>", "mug", "crossattn")
    assert [(config.preset, config.resolution) for config in configs] == [("mini", 64)] * 2


def test_a_file_may_name_the_preset_and_a_flag_another(configs: list[TextualInversionConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "paper"\n', encoding="utf-8")
    dvar(*TRAIN, "--config", path)
    dvar(*TRAIN, "--config", path, "--preset", "mini")
    assert [config.window for config in configs] == [310, 200]


# Refused input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--learnin_rate", "1"], "unknown flag --learnin_rate: the nearest known one is --learning_rate"),
        ([*TRAIN, "--learnin-rate=1"], "unknown flag --learnin-rate"),
        ([*TRAIN, "--snr_gama", "5"], "unknown flag --snr_gama: the nearest known one is --snr_gamma"),
        ([*TRAIN, "--learning_rate", "fast"], "--learning_rate"),
        ([*TRAIN, "--learning_rate"], "--learning_rate requires an argument"),
        ([*TRAIN, "--lr_scheduler", "wavy"], "constant_with_warmup"),
        ([*TRAIN, "--seed", "1", "--seed", "2"], "--seed specified multiple times"),
        ([*TRAIN, "--train_data_dir", "a", "--instance_data_dir", "b"], "specified multiple times"),
        ([*TRAIN, "images"], "images"),
        ([*TRAIN, "--config", "nowhere.toml"], "settings file nowhere.toml"),
        (
            [*TRAIN, "--preset", "papr"],
            "one of lean, mini, mini-flow, paper, smoke, v1, got 'papr': try paper",
        ),
        (["train", "dreambooth"], "dreambooth-lora"),
        (["train", "textual-inversion", "--rank", "4"], "unknown flag --rank"),
        (["train", "custom-diffusion", "--class_nown", "mug"], "the nearest known one is --class_noun"),
        (
            ["train", "dreambooth-lora", "--preset", "papr"],
            "mini, mini-flow, paper, smoke, got 'papr': try paper",
        ),
        (["generat"], 'Did you mean "generate"?'),
        (["generate"], "RUN"),
        (["generate", "run"], "--prompt"),
        (["generate", "run", "--prompt", "x", "--num_images", "0"], "num_images must be at least 1, got 0"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["demo", "--concept", "red_mugg"], "concept 'red_mugg' is not bundled: see dvar concepts"),
        (
            ["demo", "--concept", "blak_cat"],
            "concept 'blak_cat' is not bundled, the nearest is black_cat: see dvar con",
        ),
        (["demo", "--xyzzy", "1"], "unknown flag --xyzzy: dvar demo --help lists them all"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words: list[str], message: str) -> None:
    answer = dvar(*words)
    assert answer.status == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    assert answer.err.startswith("dvar: ")
    assert message in answer.err


def test_every_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("widow = 3\nlearnin_rate = 1\n", encoding="utf-8")
    answer = dvar(*TRAIN, "--config", path)
    assert answer.status == 2
    assert [line.rsplit(" ", 1)[-1] for line in answer.err.splitlines()] == ["window", "learning_rate"]


def test_every_problem_of_a_run_is_a_line_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_pipeline(tmp_path / "model")
    monkeypatch.setattr(
        "dvar.diffusion.backbones.stable_diffusion.StableDiffusion.load",
        lambda *_, **__: pytest.fail("a model was loaded"),
    )
    images = tiny_concept(tmp_path / "images")
    (images / "notes.pdf").write_bytes(b"%PDF")
    answer = dvar(
        *TRAIN,
        *("--pretrained_model_name_or_path", model, "--train_data_dir", images, "--resolution", "32"),
        *("--initializer_token", "red mug", "--placeholder_token", "vase", "--threshold", "1.5"),
    )
    assert answer.status == 2
    lines = [line.split()[1] for line in answer.err.splitlines() if not line.startswith("dvar: loading")]
    assert lines == ["threshold", "notes.pdf", "placeholder_token", "initializer_token"]


# Commands that need no run


def test_the_version_is_that_of_the_package() -> None:
    assert dvar("--version").out.strip() == __version__


def test_a_folder_of_concepts_is_checked(tmp_path: Path) -> None:
    for name in ("cat1", "red_teapot", "lone", "torn"):
        (tmp_path / name).mkdir()
        for number in range(1 if name == "lone" else 3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat1.json").write_text('{"noun": "cat", "prompts": ["{} in the snow"]}')
    (tmp_path / "red_teapot.json").write_text('{"noun": "tea pot", "prompts": ["in the snow"]}')
    (tmp_path / "torn.json").write_text('{"noun": "mug"}')
    (tmp_path / "torn" / "1.png").write_bytes(b"torn")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"
    (tmp_path / "torn" / "2.png").write_bytes(png)
    answer = dvar("concepts", tmp_path)
    lines = answer.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["cat1", "lone", "red_teapot", "torn"]
    assert lines[0].endswith("3 images, 1 prompts of its own")
    assert lines[4].startswith("the paper's, from DreamBooth: 1 of 30; not there: backpack, ")
    assert answer.status == 2
    for problem in (
        "lone.json must hold",
        "lone must hold at least 2 images, got 1",
        "must be one word, got 'tea pot'",
        "must be a list of texts with {} where the concept stands",
        f"{tmp_path / 'torn'}: 1.png is not an image that can be read",
        f"{tmp_path / 'torn'}: 2.png has far too many pixels",
    ):
        assert problem in answer.err
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "cat1", whole / "cat1")
    shutil.copy(tmp_path / "cat1.json", whole)
    assert dvar("concepts", whole).status == 0
    empty = dvar("concepts", tmp_path / "cat1")
    assert empty.status == 2
    assert "must hold a folder for each concept, got none" in empty.err


def test_the_bundled_concepts_are_listed_with_their_nouns() -> None:
    lines = dvar("concepts").out.splitlines()
    assert [line.split()[0] for line in lines] == list(mini.concepts())
    assert all(line.split()[1] == mini.noun(line.split()[0]) for line in lines)


def test_the_demo_takes_a_bundled_concept_and_may_replace_its_own_folder(configs: list[TextualInversionConfig]) -> None:
    name = list(mini.concepts())[1]
    dvar("demo")
    dvar("demo", "--concept", name, "--output_dir", "elsewhere")
    dvar("demo", "--resume_from_checkpoint", "latest")
    default, chosen, resumed = configs
    assert [problems(config) for config in configs] == [[]] * 3
    assert (resumed.resume_from_checkpoint, resumed.overwrite) == ("latest", False)
    assert resumed.output_dir == default.output_dir
    assert default.overwrite
    assert not chosen.overwrite
    assert (chosen.instance_data_dir, chosen.initializer_token) == (str(mini.concepts()[name]), mini.noun(name))
    assert (chosen.output_dir, chosen.preset) == ("elsewhere", "mini")


def test_an_interrupted_demo_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(True, Reason.INTERRUPTED, 40, "", {})
    result = TrainingResult(tmp_path, verdict, 40, 40, {})
    monkeypatch.setattr("dvar.training.preflight.preflight", lambda *_: None)
    monkeypatch.setattr("dvar.training.personalise.personalise", lambda *_, **__: result)
    for words in ((), ("--concept", "red_bird", "--output_dir", "my demo")):
        answer = dvar("demo", *words)
        command = shlex.join(["dvar", "demo", *words])
        assert answer.status == 130
        assert answer.out.splitlines()[-1] == f"next      {command} --resume_from_checkpoint latest"


@pytest.mark.parametrize(
    ("started", "path", "name"),
    [
        ("/venv/bin/dvar", "/venv/bin/dvar", "dvar"),
        (".venv/bin/dvar", None, ".venv/bin/dvar"),
        (".venv/bin/dvar", "/usr/bin/dvar", ".venv/bin/dvar"),
        ("/site-packages/dvar/__main__.py", None, "python -m dvar"),
        ("/bin/pytest", None, "dvar"),
        ("/site-packages/pytest/__main__.py", None, "dvar"),
    ],
)
def test_commands_to_type_start_as_this_one_did(
    started: str, path: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr("dvar.cli.console.shutil.which", lambda _: path)
    assert program_name() == name


# A whole run


@dataclass(frozen=True)
class Trained:
    folder: Path
    answer: Answer
    words: tuple[str, ...]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("cli")
    images = tiny_concept(folder / "images")
    (images / "00.txt").write_text("a photo of my <thing>", encoding="utf-8")
    words = (
        *(*TRAIN, "--pretrained-model-name-or-path", str(tiny_pipeline(folder / "model"))),
        *("--train_data_dir", str(images), "--initializer_token", "mug", "--output_dir", str(folder / "my run")),
        *("--resolution", "32", "--max_train_steps", "12", "--window", "8", "--probe_every", "1"),
        *("--checkpointing_steps", "6", "--validation_steps", "12"),
        *("--num_validation_images", "1", "--num_inference_steps", "2"),
    )
    return Trained(folder / "my run", dvar(*words), words)


def test_a_run_ends_with_its_verdict_and_where_to_look(trained: Trained) -> None:
    assert trained.answer.status == 0, trained.answer.err
    lines = trained.answer.out.splitlines()
    saved = json.loads((trained.folder / "result.json").read_text(encoding="utf-8"))
    assert lines[0] == saved["verdict"]["sentence"]
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {diagnosis['reason']}: {diagnosis['sentence']}" for diagnosis in saved["verdict"]["diagnoses"]
    ]
    assert lines[-3:] == [
        f"report    {trained.folder / 'report.html'}",
        f"weights   {trained.folder / 'learned_embeds.safetensors'}",
        f"next      dvar generate '{trained.folder}' --prompt 'a photo of <thing> on the beach'",
    ]
    assert (trained.folder / "report.html").is_file()
    assert (trained.folder / "learned_embeds.safetensors").is_file()


def test_a_run_prints_plain_lines_into_a_log(trained: Trained) -> None:
    loading, *lines = trained.answer.err.splitlines()
    assert loading.startswith("dvar: loading ")
    assert all(line.startswith("step") for line in lines)
    assert "\x1b" not in trained.answer.err
    assert lines[0].startswith("step  0/12  L_det ")


def test_a_second_run_never_overwrites_the_first(trained: Trained) -> None:
    before = (trained.folder / "result.json").read_bytes()
    answer = dvar(*trained.words)
    assert answer.status == 2
    assert "holds another run" in answer.err
    assert (trained.folder / "result.json").read_bytes() == before


def test_generate_shows_the_learned_word_and_never_overwrites(trained: Trained, tmp_path: Path) -> None:
    words = ["generate", trained.folder, "--num_images", "2", "--num_inference_steps", "2"]
    words += ["--output", tmp_path / "out"]
    answer = dvar(*words, "--prompt", "a photo of <thing>", "--seed", "3")
    assert answer.status == 0, answer.err
    first = [Path(line) for line in answer.out.splitlines()]
    assert first == [tmp_path / "out" / "00.png", tmp_path / "out" / "01.png"]
    again = [Path(line) for line in dvar(*words, "--prompt", "a photo of <thing>", "--seed", "4").out.splitlines()]
    assert again == [tmp_path / "out" / "02.png", tmp_path / "out" / "03.png"]
    # The second image of seed 3 is the first of seed 4, and the seeds differ.
    assert first[1].read_bytes() == again[0].read_bytes()
    assert first[0].read_bytes() != first[1].read_bytes()
    other = Path(dvar(*words, "--prompt", "a photo of mug", "--seed", "3").out.splitlines()[0])
    with Image.open(first[0]) as learned, Image.open(other) as plain:
        assert learned.size == (32, 32)
        assert ImageChops.difference(learned, plain).getbbox() is not None


def test_generate_writes_into_the_run_by_default_with_its_settings(trained: Trained) -> None:
    answer = dvar("generate", trained.folder, "--prompt", "<thing>", "--num_images", "1")
    assert answer.out.splitlines() == [str(trained.folder / "generated" / "00.png")]


def test_generate_samples_with_another_scheduler_and_lists_it(trained: Trained, tmp_path: Path) -> None:
    words = ["generate", trained.folder, "--prompt", "<thing>", "--num_images", "1", "--output", tmp_path]
    assert dvar(*words).status == 0
    assert dvar(*words, "--scheduler", "DPMSolverMultistepScheduler").status == 0
    assert (tmp_path / "00.png").read_bytes() != (tmp_path / "01.png").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert [record["scheduler"] for record in records] == ["model", "DPMSolverMultistepScheduler"]
    assert "DPMSolverMultistepScheduler" in dvar(*words, "--scheduler", "dpm").err


# Replay


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    rows = [f"{step},{0.04 + 0.01 * math.exp(-step / 100)!r},0.5" for step in range(700)]
    path.write_text("\n".join(["step,val_loss,loss", *rows]))
    return path


def test_replay_prints_when_each_rule_would_have_stopped_and_why(log: Path, tmp_path: Path) -> None:
    answer = dvar("replay", log, "--rule", "dvar", "--rule", "ema", "--window", "310", "--threshold", "0.15")
    assert answer.status == 0
    assert answer.err == ""
    lines = [line.split(None, 2) for line in answer.out.splitlines()]
    assert lines[0][:2] == ["rule", "stops"]
    assert lines[1][:2] == ["dvar", "406"]
    assert lines[1][2].startswith("stop at step 406: the variance of the last 310 steps is ")
    assert lines[2][:2] == ["ema", "–"]
    assert lines[3] == ["curve", "val_loss", "in metrics.csv"]
    assert len(lines) == 4


def test_replay_writes_its_figure(log: Path, tmp_path: Path) -> None:
    answer = dvar("replay", log, "--output", tmp_path / "replay.svg")
    assert answer.out.splitlines()[-1] == f"figure    {tmp_path / 'replay.svg'}"
    assert (tmp_path / "replay.svg").read_text().startswith("<svg")


@pytest.mark.filterwarnings("default")
def test_replay_warns_of_a_training_loss_and_refuses_wrong_input(log: Path) -> None:
    answer = dvar("replay", log, "--metric", "loss")
    assert answer.status == 0
    assert answer.err.startswith("warning: loss: this is a training loss with random timesteps")
    answer = dvar("replay", log, "--rule", "dvra")
    assert answer.status == 2
    assert "dvra" in answer.err
    answer = dvar("replay", log, "--window", "3", "--threshold", "2", "--rule", "all")
    assert answer.status == 2
    assert [line.partition(" must")[0] for line in answer.err.splitlines()] == ["dvar: window", "dvar: threshold"]
    answer = dvar("replay", log.with_name("nothing.csv"))
    assert (answer.status, answer.out) == (2, "")
    assert "does not exist" in answer.err


def test_replay_of_a_table_needs_no_extra(log: Path) -> None:
    """Hide every package of the extras from an interpreter: replay works, and training names its extra."""
    hidden = ("torch", "diffusers", "transformers", "accelerate", "peft", "PIL", "safetensors", "tensorboard")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden})); from dvar.cli.main import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", program]
    process = subprocess.run([*words, "replay", log, "--rule", "all"], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    process = subprocess.run([*words, "demo", "--output_dir", log.parent / "run"], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("dvar: this command needs ")
    assert process.stderr.splitlines()[-1].endswith(": pip install 'dvar[train]'")


@pytest.mark.filterwarnings("default")
def test_replay_names_the_curve_that_it_preferred_and_what_is_too_sparse(tmp_path: Path) -> None:
    rows = [{"step": step, "val/a": 1.0, "loss/val/mug": 2.0, "loss/val/pooled": 0.04} for step in range(0, 900, 100)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answer = dvar("replay", tmp_path / "log.jsonl")
    assert answer.err.startswith("warning: loss/val/pooled is recorded too seldom: a window of 310 steps holds fewer ")
    assert answer.out.splitlines()[-1] == "curve     loss/val/pooled in log.jsonl, rather than loss/val/mug"


def test_replay_judges_a_run_of_ours_by_its_own_settings_unless_others_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, generate_trace(), sampled_every=0)
    answer = dvar("replay", tmp_path)
    assert answer.err == "dvar: judged with this run's own settings: window 160, threshold 0.15\n"
    assert "of the last 160 steps" in answer.out
    assert "224 of 310 steps" in dvar("replay", tmp_path / "trace.jsonl", "--window", "310").out
    (tmp_path / "config.json").write_text('{"window": 3}')  # of another program
    assert "224 of 310 steps" in dvar("replay", tmp_path).out


@pytest.fixture
def growing(log: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log that another program writes: it has one record more at each look."""

    steps = itertools.count(700)

    def read_growing(*args: Any, **settings: Any) -> Any:
        trace = read_log(*args, **settings)
        with log.open("a") as file:
            file.write(f"\n{next(steps)},0.04,0.5")
        return trace

    monkeypatch.setattr("dvar.runs.follow.read_log", read_growing)
    return log


def test_a_followed_log_prints_verdicts_as_they_change_and_acts_once_it_stops(growing: Path, tmp_path: Path) -> None:
    command = "import os; open('command', 'w').write(os.environ['DVAR_STEP'] + ' ' + os.environ['DVAR_VERDICT'])"
    (tmp_path / "act.py").write_text(command)
    on_stop = f'cd "{tmp_path}" && "{sys.executable}" act.py'
    # A program that is started in the background ignores SIGINT, and so would its child.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); input()"
    trainer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    flags = ["--on_stop", on_stop, "--stop_file", tmp_path / "stop.json", "--pid", trainer.pid]
    flags += ["--poll_seconds", "0.01", "--output", tmp_path / "replay.svg"]
    answer = dvar("replay", growing, "--follow", *flags)
    assert answer.status == 0
    assert answer.err == (
        "dvar: the log holds a stop from before it was followed, which counts once there is a new record, at step 406\n"
    )
    assert b"KeyboardInterrupt" in trainer.communicate(timeout=60)[1]
    lines = answer.out.splitlines()
    assert lines[0] == "curve     val_loss in metrics.csv"
    assert lines[1] == "go on at step 0: warming up, 0 of 310 steps, 1 of the 8 records needed"
    assert [line.split(":")[0] for line in lines[2:7]] == [
        *(f"go on at step {step}" for step in (77, 154, 231, 308)),
        "go on at step 310",
    ]
    assert lines[-4].startswith("stop at step 406: the variance of the last 310 steps is ")
    assert lines[-3:] == [
        f"stop file {tmp_path / 'stop.json'}",
        f"process   {trainer.pid} is interrupted",
        f"figure    {tmp_path / 'replay.svg'}",
    ]
    assert (tmp_path / "command").read_text() == f"406 {lines[-4]}"
    assert json.loads((tmp_path / "stop.json").read_text())["step"] == 406


def test_a_command_that_fails_at_a_stop_is_reported(growing: Path) -> None:
    answer = dvar("replay", growing, "--follow", "--poll_seconds", "0.01", "--on_stop", "exit 3")
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == "dvar: on_stop ended with status 3: exit 3"


def test_a_stop_of_an_earlier_run_does_nothing(log: Path, tmp_path: Path) -> None:
    flags = ["--stop_file", tmp_path / "stop.json", "--poll_seconds", "0.01", "--idle_minutes", "0.001"]
    answer = dvar("replay", log, "--follow", *flags)
    assert answer.status == 0
    assert "there was no new record for 0.001 minutes: stop at step 406" in answer.out
    assert not (tmp_path / "stop.json").exists()


def test_a_followed_log_ends_with_a_verdict_when_its_program_does(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvar.runs.watched_process.WatchedProcess.is_running", lambda self: False)
    answer = dvar("replay", log, "--follow", "--threshold", "1e-9", "--pid", os.getpid())
    assert answer.status == 0
    assert answer.out.splitlines()[-1].startswith("the program that writes the log has ended: go on at step 699: the")
    missing = log.with_name("missing.csv")
    answer = dvar("replay", missing, "--follow", "--pid", os.getpid())
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.splitlines()[-1] == f"dvar: {missing} was never judged: the program that writes the log has ended"


def test_an_interrupted_follower_says_where_the_log_stands(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dvar.runs.follow.follow_log", partial(follow_log, wait=wait))
    answer = dvar("replay", log, "--follow", "--threshold", "1e-9")
    assert (answer.status, answer.err) == (130, "dvar: interrupted\n")
    assert answer.out.splitlines()[-1].startswith("the log is no longer followed: go on at step 698: the variance")


def test_a_process_that_cannot_be_interrupted_is_refused_before_anything_is_read(log: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    answer = dvar("replay", log, "--follow", "--pid", process.pid)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == f"dvar: pid must be a running process, and {process.pid} is none: start the training first\n"


def test_integrate_writes_the_files_of_a_tool_and_says_what_is_left_to_do(tmp_path: Path) -> None:
    answer = dvar("integrate", "onetrainer", tmp_path)
    problem = "is no checkout of OneTrainer, it lacks modules/trainer/GenericTrainer.py: name the folder that holds"
    assert (answer.status, answer.err) == (2, f"dvar: {tmp_path} {problem} that file\n")
    (tmp_path / "modules" / "trainer").mkdir(parents=True)
    (tmp_path / "modules" / "trainer" / "GenericTrainer.py").touch()
    answer = dvar("integrate", "onetrainer", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines()[0] == f"wrote     {tmp_path / 'scripts' / 'train_dvar.py'}"
    assert "  python scripts/train_dvar.py --config-path CONFIG.json" in answer.out
    assert dvar("integrate", "onetrainer", tmp_path).out.startswith("wrote     nothing: all files are there already\n")


def test_report_writes_the_page_again(trained: Trained) -> None:
    (trained.folder / "report.html").unlink()
    answer = dvar("report", trained.folder)
    assert (answer.status, answer.out.strip()) == (0, str(trained.folder / "report.html"))
    assert (trained.folder / "report.html").is_file()


def test_export_writes_what_is_requested_and_refuses_what_is_missing(trained: Trained, tmp_path: Path) -> None:
    answer = dvar("export", trained.folder, "--merged", tmp_path / "whole")
    assert (answer.status, answer.out.strip()) == (0, str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model_index.json").is_file()
    answer = dvar("export", trained.folder)
    assert (answer.status, answer.err) == (
        2,
        "dvar: export needs --step, --merged, --kohya, --embedding or --push_to_hub, got none: name what to write\n",
    )
    answer = dvar("export", trained.folder, "--kohya", tmp_path / "lora.safetensors")
    assert answer.status == 2
    assert "is of textual-inversion" in answer.err
    assert not (tmp_path / "lora.safetensors").exists()
    result = (trained.folder / "result.json").read_bytes()
    flags = ("--embedding", tmp_path / "mug.safetensors", "--merged", tmp_path / "whole", "--push_to_hub", "a/b/c")
    answer = dvar("export", trained.folder, "--step", "4", *flags)
    assert answer.status == 2
    assert "whole exists already" in answer.err
    assert "--push_to_hub must be an id such as owner/name, got 'a/b/c'" in answer.err
    assert (trained.folder / "result.json").read_bytes() == result, "refused, and yet changed"
    assert not (tmp_path / "mug.safetensors").exists()


def test_images_are_not_generated_for_a_folder_that_cannot_be_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvar.runs.load_model.load_personalised_backbone", lambda *_, **__: pytest.fail("it loaded"))
    run = shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("generated"))
    (run / "generated").touch()
    answer = dvar("generate", run, "--prompt", "a photo of <thing>")
    assert answer.status == 2
    assert f"images need a folder that can be written, and {run / 'generated'} is a file" in answer.err


def test_two_files_of_one_number_are_never_one(tmp_path: Path) -> None:
    """Two processes that find a number free at once get numbers of their own."""
    (tmp_path / "00.png").touch()
    for name in ("01.png", "02.png"):
        assert _save_new(Image.new("RGB", (8, 8)), tmp_path) == tmp_path / name
    assert not (tmp_path / "00.png").read_bytes()


def test_a_part_of_an_image_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_: Image.Image, file: IO[bytes], __: str) -> None:
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        _save_new(Image.new("RGB", (8, 8)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_record_refuses_bad_input_before_long_work(tmp_path: Path) -> None:
    answer = dvar("record", "textual-inversion", "--concepts", "blak_cat", "red_mugg", "--records", tmp_path)
    assert answer.status == 2
    assert "there is no concept 'blak_cat', the nearest is black_cat" in answer.err
    assert "there is no concept 'red_mugg'" in answer.err
    answer = dvar("record", "textual", "--first", "1", "--records", tmp_path)
    assert answer.status == 2
    assert "method must be one of textual-inversion, dreambooth-lora, custom-diffusion, got 'textual'" in answer.err
    answer = dvar("record", "--config", tmp_path / "settings.toml", "--records", tmp_path)
    assert answer.status == 2
    methods = "textual-inversion, dreambooth-lora, custom-diffusion"
    assert answer.err == f"dvar: settings are of one method, got {methods}: name one before --config\n"
    assert not list(tmp_path.iterdir())


def test_report_writes_the_page_to_the_requested_file(trained: Trained, tmp_path: Path) -> None:
    answer = dvar("report", trained.folder, "--output", tmp_path / "page.html")
    assert (answer.status, answer.out.strip()) == (0, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("ends", [">&-", "2>&-", ">&- 2>&-", ">out.txt"])
def test_closed_streams_and_narrow_encodings_do_not_end_a_command(ends: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,val_loss\n" + "".join(f"{step},{1 / (step + 1)}\n" for step in range(400)))
    words = f"{shlex.quote(sys.executable)} -m dvar replay log.csv --window 40 {ends}"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    process = subprocess.run(words, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
