"""The command line, from a person's words to what they see: flags, precedence, refusals, and a whole run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from PIL import Image, ImageChops

from dvar import mini
from dvar.cli.main import main
from dvar.config.training import (
    CONFIGS,
    AnyConfig,
    CustomDiffusionConfig,
    DreamBoothLoraConfig,
    TextualInversionConfig,
    settings_problems,
)
from dvar.errors import DvarError, ModelError, NonFiniteLoss, RefusedInput
from dvar.runs.config import ReplayConfig
from dvar.testing import tiny_concept, tiny_pipeline

TRAIN = ("train", "textual-inversion")
HINTS = get_type_hints(TextualInversionConfig)


@dataclass(frozen=True)
class Told:
    """What a command answered."""

    status: int
    out: str
    err: str


def dvar(*words: str | Path) -> Told:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Told(status, out.getvalue(), err.getvalue())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TextualInversionConfig]:
    """The settings that commands would have trained with; each ends in a failure instead."""
    seen: list[TextualInversionConfig] = []

    def personalise(config: TextualInversionConfig, consumers: Sequence[Any], **_: Any) -> None:
        seen.append(config)
        raise DvarError("not in this test")

    monkeypatch.setattr("dvar.training.dataset.read_concept", lambda *_: None)
    monkeypatch.setattr("dvar.training.personalise.personalise", personalise)
    return seen


# Flags


def value_for(name: str) -> tuple[str, Any]:
    """A flag's value other than its default, as written and as meant."""
    hint, default = HINTS[name], getattr(TextualInversionConfig(), name)
    if get_origin(hint) is Literal:
        other = next(choice for choice in get_args(hint) if choice != default)
        return other, other
    if name == "preset":
        return "paper", "paper"
    if float in (hint, *get_args(hint)):
        return "0.625", 0.625
    return ("72", 72) if int in (hint, *get_args(hint)) else ("words", "words")


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is not bool])
@pytest.mark.parametrize("hyphens", [False, True])
def test_every_setting_is_a_flag_in_both_spellings(
    asked: list[TextualInversionConfig], name: str, hyphens: bool
) -> None:
    written, meant = value_for(name)
    told = dvar(*TRAIN, f"--{name.replace('_', '-') if hyphens else name}", written)
    assert (told.status, told.err.splitlines()[-1]) == (1, "dvar: not in this test")
    assert getattr(asked[0], name) == meant


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is bool])
@pytest.mark.parametrize("off", [False, True])
def test_a_switch_can_be_turned_on_and_off(asked: list[TextualInversionConfig], name: str, off: bool) -> None:
    dvar(*TRAIN, f"--{'no-' * off}{name}")
    dvar(*TRAIN, f"--{'no-' * off}{name.replace('_', '-')}")
    assert [getattr(config, name) for config in asked] == [not off, not off]


def test_the_flags_of_diffusers_script_are_all_there() -> None:
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
def test_the_folder_of_pictures_has_two_names(asked: list[TextualInversionConfig], flag: str) -> None:
    dvar(*TRAIN, flag, "here")
    assert asked[0].instance_data_dir == "here"


def test_a_flag_overrides_the_file_and_the_file_the_preset(asked: list[TextualInversionConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('learning-rate = 0.5\nseed = 5\ntrain_data_dir = "pictures"\n', encoding="utf-8")
    dvar(*TRAIN, "--config", path, "--seed", "7")
    config = asked[0]
    assert (config.seed, config.learning_rate, config.instance_data_dir) == (7, 0.5, "pictures")
    assert (config.preset, config.resolution) == ("mini", 64)
    assert config.adam_beta1 == TextualInversionConfig().adam_beta1


def test_every_method_has_its_command_its_flags_and_its_preset(asked: list[AnyConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rank = 8\n", encoding="utf-8")
    dvar("train", "dreambooth-lora", "--config", path, "--instance-prompt", "a photo of sks dog")
    dvar("train", "custom-diffusion", "--modifier_token", "<m>", "--class_noun", "mug", "--freeze_model", "crossattn")
    lora, custom = asked
    assert isinstance(lora, DreamBoothLoraConfig)
    assert (lora.rank, lora.placeholder_token, lora.instance_prompt) == (8, None, "a photo of sks dog")
    assert isinstance(custom, CustomDiffusionConfig)
    assert (custom.placeholder_token, custom.class_noun, custom.freeze_model) == ("<m>", "mug", "crossattn")
    assert [(config.preset, config.resolution) for config in asked] == [("mini", 64)] * 2


@pytest.mark.parametrize("method", CONFIGS)
def test_the_help_of_every_method_shows_its_own_flags(method: str) -> None:
    told = dvar("train", method, "--help")
    text = " ".join(told.out.replace("│", " ").split())
    assert told.status == 0
    # Longer names are broken over two lines.
    assert all(f"--{item.name[:24]}" in text for item in fields(CONFIGS[method]))
    titles = ["Model and pictures", "Training", "Stopping", "Sample pictures", "The run"]
    assert [text.count(f" {title} ─") for title in titles] == [1] * len(titles)


def test_a_file_may_name_the_preset_and_a_flag_another(asked: list[TextualInversionConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "paper"\n', encoding="utf-8")
    dvar(*TRAIN, "--config", path)
    dvar(*TRAIN, "--config", path, "--preset", "mini")
    assert [config.window for config in asked] == [310, 200]


# Refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*TRAIN, "--learnin_rate", "1"], "unknown flag --learnin_rate: the nearest known one is --learning_rate"),
        ([*TRAIN, "--learnin-rate=1"], "unknown flag --learnin-rate"),
        ([*TRAIN, "--snr_gamma", "5"], "unknown flag --snr_gamma: the nearest known one is --"),
        ([*TRAIN, "--learning_rate", "fast"], "--learning_rate"),
        ([*TRAIN, "--learning_rate"], "--learning_rate requires an argument"),
        ([*TRAIN, "--lr_scheduler", "wavy"], "constant_with_warmup"),
        ([*TRAIN, "--seed", "1", "--seed", "2"], "--seed specified multiple times"),
        ([*TRAIN, "--train_data_dir", "a", "--instance_data_dir", "b"], "specified multiple times"),
        ([*TRAIN, "pictures"], "pictures"),
        ([*TRAIN, "--config", "nowhere.toml"], "settings file nowhere.toml"),
        ([*TRAIN, "--preset", "papr"], "preset must be one of lean, mini, paper, got 'papr': try paper"),
        (["train", "dreambooth"], "dreambooth-lora"),
        (["train", "textual-inversion", "--rank", "4"], "unknown flag --rank"),
        (["train", "custom-diffusion", "--class_nown", "mug"], "the nearest known one is --class_noun"),
        (["train", "dreambooth-lora", "--preset", "papr"], "must be one of lean, mini, paper, got 'papr': try paper"),
        (["generat"], 'Did you mean "generate"?'),
        (["generate"], "RUN"),
        (["generate", "run"], "--prompt"),
        (["generate", "run", "--prompt", "x", "--num_images", "0"], "--num_images"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["demo", "--concept", "red_mugg"], "concept 'red_mugg' is not bundled, the nearest is"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words: list[str], said: str) -> None:
    told = dvar(*words)
    assert told.status == 2
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("dvar: ")
    assert said in told.err


def test_every_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("widow = 3\nlearnin_rate = 1\n", encoding="utf-8")
    told = dvar(*TRAIN, "--config", path)
    assert told.status == 2
    assert [line.rsplit(" ", 1)[-1] for line in told.err.splitlines()] == ["window", "learning_rate"]


def test_every_problem_of_a_run_is_a_line_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_pipeline(tmp_path / "model")
    monkeypatch.setattr("dvar.diffusion.backbone.Backbone.load", lambda *_, **__: pytest.fail("a model was loaded"))
    pictures = tiny_concept(tmp_path / "pictures")
    (pictures / "notes.pdf").write_bytes(b"%PDF")
    told = dvar(
        *TRAIN,
        *("--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--resolution", "32"),
        *("--initializer_token", "red mug", "--placeholder_token", "vase", "--threshold", "1.5"),
    )
    assert told.status == 2
    lines = [line.split()[1] for line in told.err.splitlines() if not line.startswith("dvar: loading")]
    assert lines == ["threshold", "notes.pdf", "placeholder_token", "initializer_token"]


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (RefusedInput(["first", "second"]), 2, ["dvar: first", "dvar: second"]),
        (ModelError("no model"), 2, ["dvar: no model"]),
        (NonFiniteLoss("lost"), 1, ["dvar: lost"]),
        (KeyboardInterrupt(), 130, ["dvar: interrupted"]),
    ],
)
def test_a_failure_has_its_own_status_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, lines: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dvar.runs.report.write_report", fail)
    told = dvar("report", "run")
    assert (told.status, told.err.splitlines()) == (status, lines)


# What needs no run


def test_help_is_there_and_loads_nothing_slow() -> None:
    code = "import sys; from dvar.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "generate", "report", "demo", "concepts"):
        assert command in done.stdout
    slow = {"torch", "PIL", "diffusers", "transformers", "matplotlib", "rich.live", "dvar.training.personalise"}
    assert not slow & set(done.stderr.split())


def test_the_help_of_a_command_shows_each_flag_with_its_default() -> None:
    told = dvar(*TRAIN, "--help")
    assert told.status == 0
    text = " ".join(told.out.replace("│", " ").split())
    for part in ("--train_data_dir", "--no-center_crop", "[default: 310]", "Sample pictures", "fp16"):
        assert part in text


def test_the_version_is_the_packages() -> None:
    import dvar as package

    assert dvar("--version").out.strip() == package.__version__


def test_the_bundled_concepts_are_listed_with_their_nouns() -> None:
    lines = dvar("concepts").out.splitlines()
    assert [line.split()[0] for line in lines] == list(mini.concepts())
    assert all(line.split()[1] == mini.noun(line.split()[0]) for line in lines)


def test_the_demo_takes_a_bundled_concept_and_may_replace_its_own_folder(asked: list[TextualInversionConfig]) -> None:
    name = list(mini.concepts())[1]
    dvar("demo")
    dvar("demo", "--concept", name, "--output_dir", "elsewhere")
    dvar("demo", "--resume_from_checkpoint", "latest")
    default, chosen, resumed = asked
    assert [settings_problems(config) for config in asked] == [[]] * 3
    assert (resumed.resume_from_checkpoint, resumed.overwrite) == ("latest", False)
    assert resumed.output_dir == default.output_dir
    assert default.overwrite
    assert not chosen.overwrite
    assert (chosen.instance_data_dir, chosen.initializer_token) == (str(mini.concepts()[name]), mini.noun(name))
    assert (chosen.output_dir, chosen.preset) == ("elsewhere", "mini")


# A whole run


@dataclass(frozen=True)
class Trained:
    folder: Path
    told: Told
    words: tuple[str, ...]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("cli")
    pictures = tiny_concept(place / "pictures")
    (pictures / "00.txt").write_text("a photo of my <thing>", encoding="utf-8")
    words = (
        *(*TRAIN, "--pretrained-model-name-or-path", str(tiny_pipeline(place / "model"))),
        *("--train_data_dir", str(pictures), "--initializer_token", "mug", "--output_dir", str(place / "my run")),
        *("--resolution", "32", "--max_train_steps", "12", "--window", "8", "--probe_every", "1"),
        *(
            "--checkpointing_steps",
            "6",
            "--validation_steps",
            "12",
            "--num_validation_images",
            "1",
            "--num_inference_steps",
            "2",
        ),
    )
    return Trained(place / "my run", dvar(*words), words)


def test_a_run_ends_with_its_verdict_and_says_where_to_look(trained: Trained) -> None:
    assert trained.told.status == 0, trained.told.err
    lines = trained.told.out.splitlines()
    saved = json.loads((trained.folder / "result.json").read_text(encoding="utf-8"))
    assert lines[0] == saved["verdict"]["sentence"]
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {found['reason']}: {found['sentence']}" for found in saved["verdict"]["diagnoses"]
    ]
    assert lines[-3:] == [
        f"report    {trained.folder / 'report.html'}",
        f"weights   {trained.folder / 'learned_embeds.safetensors'}",
        f"next      dvar generate '{trained.folder}' --prompt 'a photo of <thing> on the beach'",
    ]
    assert (trained.folder / "report.html").is_file()
    assert (trained.folder / "learned_embeds.safetensors").is_file()


def test_a_run_into_a_log_leaves_plain_lines(trained: Trained) -> None:
    before, lines = trained.told.err.splitlines()[:2], trained.told.err.splitlines()[2:]
    assert [line[:14] for line in before] == ["dvar: loading ", "dvar: about 2."], "what it loads, and how much memory"
    assert all(line.startswith("step") for line in lines)
    assert "\x1b" not in trained.told.err
    assert lines[0].startswith("step  0/12  L_det ")


def test_a_second_run_never_overwrites_the_first(trained: Trained) -> None:
    before = (trained.folder / "result.json").read_bytes()
    told = dvar(*trained.words)
    assert told.status == 2
    assert "holds another run" in told.err
    assert (trained.folder / "result.json").read_bytes() == before


def test_generate_draws_the_learned_word_and_never_overwrites(trained: Trained, tmp_path: Path) -> None:
    words = [
        "generate",
        trained.folder,
        "--num_images",
        "2",
        "--num_inference_steps",
        "2",
        "--output",
        tmp_path / "out",
    ]
    told = dvar(*words, "--prompt", "a photo of <thing>", "--seed", "3")
    assert told.status == 0, told.err
    first = [Path(line) for line in told.out.splitlines()]
    assert first == [tmp_path / "out" / "00.png", tmp_path / "out" / "01.png"]
    again = [Path(line) for line in dvar(*words, "--prompt", "a photo of <thing>", "--seed", "4").out.splitlines()]
    assert again == [tmp_path / "out" / "02.png", tmp_path / "out" / "03.png"]
    # The second picture of seed 3 is the first of seed 4, and the seeds differ.
    assert first[1].read_bytes() == again[0].read_bytes()
    assert first[0].read_bytes() != first[1].read_bytes()
    other = Path(dvar(*words, "--prompt", "a photo of mug", "--seed", "3").out.splitlines()[0])
    with Image.open(first[0]) as learned, Image.open(other) as plain:
        assert learned.size == (32, 32)
        assert ImageChops.difference(learned, plain).getbbox() is not None


def test_generate_goes_into_the_run_by_default_with_its_settings(trained: Trained) -> None:
    told = dvar("generate", trained.folder, "--prompt", "<thing>", "--num_images", "1")
    assert told.out.splitlines() == [str(trained.folder / "generated" / "00.png")]


def test_generate_draws_by_another_scheduler_and_lists_it(trained: Trained, tmp_path: Path) -> None:
    words = ["generate", trained.folder, "--prompt", "<thing>", "--num_images", "1", "--output", tmp_path]
    assert dvar(*words).status == 0
    assert dvar(*words, "--scheduler", "DPMSolverMultistepScheduler").status == 0
    assert (tmp_path / "00.png").read_bytes() != (tmp_path / "01.png").read_bytes()
    listed = [json.loads(line) for line in (tmp_path / "drawings.jsonl").read_text().splitlines()]
    assert [item["scheduler"] for item in listed] == ["model", "DPMSolverMultistepScheduler"]
    assert "DPMSolverMultistepScheduler" in dvar(*words, "--scheduler", "dpm").err


# --- replay ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    rows = [f"{step},{0.04 + 0.01 * math.exp(-step / 100)!r},0.5" for step in range(700)]
    path.write_text("\n".join(["step,val_loss,loss", *rows]))
    return path


def test_replay_tells_in_a_table_when_each_rule_would_have_stopped_and_why(log: Path, tmp_path: Path) -> None:
    told = dvar("replay", log, "--rule", "dvar", "--rule", "ema", "--window", "310", "--threshold", "0.15")
    assert told.status == 0
    assert told.err == ""
    lines = [line.split(None, 2) for line in told.out.splitlines()]
    assert lines[0][:2] == ["rule", "stops"]
    assert lines[1][:2] == ["dvar", "406"]
    assert lines[1][2].startswith("stop at step 406: variance of the last 310 steps is ")
    assert lines[2][:2] == ["ema", "–"]
    assert len(lines) == 3


def test_replay_writes_its_picture(log: Path, tmp_path: Path) -> None:
    told = dvar("replay", log, "--output", tmp_path / "replay.svg")
    assert told.out.splitlines()[-1] == f"picture   {tmp_path / 'replay.svg'}"
    assert (tmp_path / "replay.svg").read_text().startswith("<svg")


def test_replay_warns_of_a_training_loss_and_refuses_wrong_words(log: Path) -> None:
    told = dvar("replay", log, "--metric", "loss")
    assert told.status == 0
    assert told.err.startswith("warning: loss: this is a training loss with random timesteps")
    told = dvar("replay", log, "--rule", "dvra")
    assert told.status == 2
    assert "dvra" in told.err
    told = dvar("replay", log, "--window", "3", "--threshold", "2", "--rule", "all")
    assert told.status == 2
    assert [line.partition(" must")[0] for line in told.err.splitlines()] == ["dvar: window", "dvar: threshold"]
    told = dvar("replay", log.with_name("nothing.csv"))
    assert (told.status, told.out) == (2, "")
    assert "does not exist" in told.err


def test_every_setting_of_a_replay_is_a_flag_in_its_help() -> None:
    told = dvar("replay", "--help").out
    assert all(f"--{item.name} " in told for item in fields(ReplayConfig))


def test_replay_of_a_table_needs_no_extra(log: Path) -> None:
    """In an interpreter where every package of the extras is missing; training then names the extra."""
    hidden = ("torch", "diffusers", "transformers", "accelerate", "peft", "PIL", "safetensors", "tensorboard")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden})); from dvar.cli.main import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run([*words, "replay", log, "--rule", "all"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*words, "demo", "--output_dir", log.parent / "run"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dvar: this command needs ")
    assert done.stderr.splitlines()[-1].endswith(": pip install 'dvar[train]'")


def test_report_writes_the_page_again(trained: Trained) -> None:
    (trained.folder / "report.html").unlink()
    told = dvar("report", trained.folder)
    assert (told.status, told.out.strip()) == (0, str(trained.folder / "report.html"))
    assert (trained.folder / "report.html").is_file()


def test_export_writes_what_is_asked_for_and_refuses_what_is_not_there(trained: Trained, tmp_path: Path) -> None:
    told = dvar("export", trained.folder, "--merged", tmp_path / "whole")
    assert (told.status, told.out.strip()) == (0, str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model_index.json").is_file()
    told = dvar("export", trained.folder)
    assert (told.status, told.err) == (2, "dvar: export needs --merged or --kohya, got neither: name what to write\n")
    told = dvar("export", trained.folder, "--kohya", tmp_path / "lora.safetensors")
    assert told.status == 2
    assert "is of textual-inversion" in told.err
    assert not (tmp_path / "lora.safetensors").exists()


def test_record_refuses_what_it_cannot_record_before_long_work(tmp_path: Path) -> None:
    told = dvar("record", "textual-inversion", "--concepts", "blak_cat", "red_mugg", "--records", tmp_path)
    assert told.status == 2
    assert "there is no concept 'blak_cat', the nearest is black_cat" in told.err
    assert "there is no concept 'red_mugg'" in told.err
    told = dvar("record", "textual", "--first", "1", "--records", tmp_path)
    assert told.status == 2
    assert "method must be one of textual-inversion, dreambooth-lora, custom-diffusion, got 'textual'" in told.err
    told = dvar("record", "--config", tmp_path / "settings.toml", "--records", tmp_path)
    assert (told.status, told.err) == (2, "dvar: settings are of one method: name it before --config\n")
    assert not list(tmp_path.iterdir())
