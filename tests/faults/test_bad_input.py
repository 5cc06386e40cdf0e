"""Invalid input: one line with the remedy, exit status 2, nothing written, and no torch imported."""

# The table is run by one fresh process, which has never imported torch; a part of it again by a process for each case.

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TI, LORA, CUSTOM = ("train", "textual-inversion"), ("train", "dreambooth-lora"), ("train", "custom-diffusion")


@dataclass(frozen=True)
class Case:
    """The arguments of a command, the message it must print, and the damage done before to a copy of valid folders.

    ``{folder}`` in them is the folder with all of these; arguments without a ``method`` are a complete command.
    """

    message: str
    arguments: tuple[str, ...]
    damage: Callable[[Path], object] = lambda folder: None
    method: tuple[str, ...] | None = TI
    environment: tuple[tuple[str, str], ...] = ()


def setting(name: str, value: object, message: str, method: tuple[str, ...] = TI) -> Case:
    return Case(message, (f"--{name}", str(value)), method=method)


def file(path: str, content: bytes | None, message: str, *arguments: str) -> Case:
    """Return a case whose file at ``path`` holds this content, or is missing."""

    def damage(folder: Path) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)

    return Case(message, arguments, damage)


def truncated_file(path: str, message: str) -> Case:
    return Case(message, (), lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-40]))


def missing_folder(path: str, message: str) -> Case:
    return Case(message, (), lambda folder: shutil.rmtree(folder / path))


def changed(path: str, message: str, **values: object) -> Case:
    """Return a case in which the JSON file at ``path`` holds other values."""

    def damage(folder: Path) -> None:
        (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | values))

    return Case(message, (), damage)


def remove_three_images(folder: Path) -> None:
    for index in (1, 2, 3):
        (folder / "images" / f"0{index}.png").unlink()


NUMBERS = [
    *[setting(name, "0", f"{name} must be at least 1, got 0") for name in ("num_vectors", "train_batch_size")],
    setting("eval_batch_size", 0, "eval_batch_size must be at least 1, got 0"),
    setting("probe_every", 0, "probe_every must be at least 1, got 0"),
    setting("num_vectors", 1_000_000, "num_vectors must be at most 75, got 1000000"),
    setting("train_batch_size", 10**9, "train_batch_size must be at most 65536, got 1000000000"),
    setting("num_validation_images", 10**9, "num_validation_images must be at most 100000, got"),
    *[
        setting(name, "-3", f"{name} must be at least 1, got -3")
        for name in ("validation_steps", "checkpointing_steps")
    ],
    setting("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be at least 1, got 0"),
    setting("num_validation_images", 0, "num_validation_images must be at least 1, got 0"),
    setting("num_inference_steps", 0, "num_inference_steps must be at least 1, got 0"),
    setting("max_train_steps", 0, "max_train_steps must be at least 1, got 0"),
    setting("checkpoints_total_limit", 0, "checkpoints_total_limit must be at least 1, got 0"),
    setting("resolution", 100, "resolution must be a multiple of 8, got 100: try 96"),
    Case(
        "00.png must be 512 pixels or more on its shorter side at resolution 1024, got 64x64",
        ("--resolution", "1024"),
        remove_three_images,
    ),
    setting("learning_rate", 0, "learning_rate must be above 0, got 0.0"),
    setting("learning_rate", -1, "learning_rate must be above 0, got -1.0"),
    setting("learning_rate", "nan", "learning_rate must be above 0 and finite, got nan"),
    setting("learning_rate", "inf", "learning_rate must be above 0 and finite, got inf"),
    setting("adam_beta1", 1, "adam_beta1 must be at least 0 and below 1, got 1.0"),
    setting("adam_beta2", -0.1, "adam_beta2 must be at least 0 and below 1, got -0.1"),
    setting("adam_weight_decay", -1, "adam_weight_decay must be at least 0, got -1.0"),
    setting("adam_epsilon", 0, "adam_epsilon must be above 0, got 0.0"),
    setting("max_grad_norm", 0, "max_grad_norm must be above 0, got 0.0"),
    setting("seed", -1, "seed must be at least 0, got -1"),
    setting("guidance_scale", -1, "guidance_scale must be at least 0, got -1.0"),
    setting("guidance_scale", "inf", "guidance_scale must be at least 0 and finite, got inf"),
    setting("seed", 2**63, "seed must be at most 9223372036854775807, got 9223372036854775808"),
    setting("num_inference_steps", 1001, "num_inference_steps must be at most 1000, got 1001"),
    setting("threshold", 0, "threshold"),
    setting("threshold", 1.5, "threshold"),
    setting("threshold", "nan", "threshold"),
    setting("window", 0, "window"),
    setting("window", -5, "window"),
    setting("window", 6100, "window must be smaller than the cap on steps"),
    setting("probe_every", 100, "holds fewer than 8 evaluations when one is made every 100 steps"),
    setting("lr_warmup_steps", 5, "lr_warmup_steps must be 0 when lr_scheduler is constant, got 5"),
    setting("lr_warmup_steps", -5, "lr_warmup_steps must be at least 0, got -5"),
    Case("lr_warmup_steps must be below max_train_steps", ("--lr_warmup_steps", "9999", "--lr_scheduler", "linear")),
    setting("rank", 0, "rank must be at least 1, got 0", LORA),
    setting("rank", 100_000, "rank must be at most 4096, got 100000", LORA),
    setting("lora_alpha", 0, "lora_alpha must be at least 1, got 0", LORA),
    setting("num_class_images", 0, "num_class_images must be at least 1, got 0", CUSTOM),
    setting("prior_loss_weight", -1, "prior_loss_weight must be", CUSTOM),
]
TOML = ("--config", "{folder}/run.toml")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TENSORS = "diffusion_pytorch_model.safetensors"
RESUME = "--resume_from_checkpoint"
VALUES = [
    setting("learning_rate", "fast", "learning_rate"),
    setting("max_train_steps", "many", "max_train_steps"),
    setting("max_train_steps", "1_900", "--max_train_steps: must be a whole number, got 1_900"),
    setting("max_train_steps", "15e-1", "--max_train_steps: must be a whole number, got 15e-1"),
    setting("max_train_steps", "0x1f", "--max_train_steps: must be a whole number, got 0x1f"),
    setting("max_train_steps", "9" * 5000, f"--max_train_steps: must be a number, got {'9' * 30}..."),
    setting("learning_rate", "1_0", "--learning_rate: must be a number, got 1_0"),
    Case("--first: must be a whole number, got 1.9", ("record", "--first", "1.9"), method=None),
    Case("must be a whole number, got 1.5", ("record", "--seeds", "0", "1.5"), method=None),
    Case("seeds must be at most", ("record", "--seeds", str(2**63)), method=None),
    Case("must be a whole number, got 1.5", ("survey", "forget", "{folder}/empty", "1.5"), method=None),
    setting("max_train_steps", 1.5, "--max_train_steps: must be a whole number, got 1.5"),
    setting("checkpoints_total_limit", 2.0, "--checkpoints_total_limit: must be a whole number, got 2.0"),
    Case(
        "--num_images: must be a whole number, got 1.5",
        ("generate", "{folder}/out", "--prompt", "<thing>", "--num_images", "1.5"),
        method=None,
    ),
    setting("mixed_precision", "fp8", "mixed_precision"),
    setting("lr_scheduler", "wavy", "constant_with_warmup"),
    setting("report_to", "paper", "report_to"),
    setting("keep", "first", "last,best"),
    setting("best_by", "luck", "l_det"),
    Case("clip_model is missing: best_by clip needs", ("--best_by", "clip", "--validation_steps", "100")),
    setting("clip_model", "owner/name", "clip_model is for initializer clip or best_by clip, got"),
    Case(
        "validation_steps must be at most the window (310) where best_by is clip",
        ("--best_by", "clip", "--clip_model", "openai/clip-vit-base-patch32"),
    ),
    Case(
        "clip_model {folder}/nowhere is neither a folder here nor a hub id",
        ("--best_by", "clip", "--clip_model", "{folder}/nowhere", "--validation_steps", "100"),
    ),
    setting("preset", "papr", "preset must be one of lean, mini, mini-flow, paper, smoke, v1, got 'papr': try paper"),
    setting("freeze_model", "all", "crossattn_kv", CUSTOM),
    setting("learnable_property", "mood", "object"),
    setting("learnin_rate", 1, "unknown flag --learnin_rate: the nearest known one is --learning_rate"),
    setting("rank", 4, "unknown flag --rank"),
    Case("has no use for 'false': a flag is switched off by --no_NAME", ("--random_flip", "false")),
    setting("class_noun", "mug", "unknown flag --class_noun"),
    Case("requires an argument", ("--seed",)),
    Case("--config", ("--config", "{folder}/nowhere.toml")),
    file(
        "run.toml",
        b"widow = 3",
        "unknown setting 'widow': the nearest known one is window",
        "--config",
        "{folder}/run.toml",
    ),
    file("run.toml", b"seed = ", "is not valid TOML", *TOML),
    file("run.toml", b"\xff\xfe", "is not valid TOML", *TOML),
    file("run.toml", b'seed = "one"', "seed must be a whole number, got 'one'", *TOML),
    file("run.toml", b"center_crop = 3", "center_crop must be true or false, got 3", *TOML),
    Case("extend needs a resume_from_checkpoint", ("--extend",)),
    file("out/checkpoint-0/facts.json", b"", "exclude each other", "--overwrite", RESUME, "latest"),
]
TOKENS = [
    setting("placeholder_token", "two words", "placeholder_token must be one word without spaces, got 'two words'"),
    setting("placeholder_token", "", "placeholder_token must be one word without spaces, got ''"),
    setting("placeholder_token", "mug", "placeholder_token must be a new word, and the model already knows mug"),
    setting("initializer_token", "red mug", "initializer_token must be one token, got 'red mug', which is 2"),
    setting("initializer_token", "xylophone", "initializer_token must be one token, got 'xylophone'"),
    setting("initializer_token", "", "initializer_token is missing"),
    setting("validation_prompt", "a mug", "validation_prompt must contain the placeholder token <thing>"),
    setting("validation_prompt", "<thing> " + "mug " * 90, "must be at most 77 tokens"),
    setting("instance_prompt", "a photo of a mug", "instance_prompt must contain the placeholder token <thing>", LORA),
    setting("class_noun", " ", "class_noun is missing", CUSTOM),
    setting(
        "instance_prompt", "a photo of a mug", "instance_prompt must contain the placeholder token <thing>", CUSTOM
    ),
]
IMAGES = [
    setting("instance_data_dir", "{folder}/nowhere", "does not exist: check the path"),
    setting("instance_data_dir", "{folder}/images/00.png", "is a file: check the path"),
    setting("instance_data_dir", "{folder}/empty", "holds no images: put three to five there"),
    setting("class_data_dir", "{folder}/nowhere", "class_data_dir must be a folder with class images", CUSTOM),
    setting("class_data_dir", "{folder}/empty", "class_data_dir {folder}/empty holds no images", CUSTOM),
    file("images/notes.pdf", b"%PDF-1.4", "notes.pdf is not an image that can be read"),
    file("images/empty.png", b"", "empty.png is not an image that can be read"),
    file("images/text.png", b"no image", "text.png is not an image that can be read"),
    file("images/deep/00.png", b"", "deep is a folder: images are read from one flat folder"),
    file(
        "images/00.txt",
        b"a photo of a mug",
        "00.txt must contain the placeholder token <thing> where the concept is named",
    ),
    file("images/00.txt", b"", "00.txt must contain the placeholder token <thing>"),
    file("images/00.txt", b"\xff\xfe\xfa", "00.txt cannot be read as UTF-8 text"),
    file("images/00.txt", b"<thing> " + b"mug " * 90, "the text of 00.png must be at most 77 tokens"),
    file("images/77.txt", b"a photo of <thing>", "77.txt is the caption of no image"),
    file("images/metadata.jsonl", b"{", "metadata.jsonl, line 1, must be"),
    file("images/metadata.jsonl", b'{"file_name": "00.png"}', "metadata.jsonl, line 1, must be"),
    file("images/metadata.jsonl", b'{"file_name": "9.png", "text": "<thing>"}', "names '9.png', which is not in the"),
    file(
        "images/metadata.jsonl",
        b'{"file_name": "00.png", "text": "a mug"}',
        "must contain the placeholder token <thing>",
    ),
    truncated_file("images/00.png", "00.png is damaged"),
]
MODELS = [
    setting("pretrained_model_name_or_path", "{folder}/nowhere", "is neither a folder here nor a hub id"),
    setting("pretrained_model_name_or_path", "{folder}/modle", "did you mean {folder}/model?"),
    setting("pretrained_model_name_or_path", "{folder}/images", "is no diffusers pipeline, it lacks model_index.json"),
    setting(
        "pretrained_model_name_or_path",
        "{folder}/images/00.png",
        "is no .safetensors file, and others, which may be pickles",
    ),
    setting("pretrained_model_name_or_path", "stable-diffusion", "is neither a folder here nor a hub id"),
    *[missing_folder(f"model/{part}", f"it lacks {part}") for part in PARTS],
    file("model/model_index.json", None, "it lacks model_index.json"),
    file("model/model_index.json", b"{", "model_index.json cannot be read ("),
    file("model/model_index.json", b"[]", "model_index.json cannot be read ("),
    file("model/model_index.json", b"{}", "model_index.json cannot be read ("),
    file("model/model_index.json", b'{"_class_name": "KolorsPipeline"}', "is a KolorsPipeline: choose another"),
    *[file(f"model/{part}/config.json", None, f"{part}/config.json cannot be read") for part in ("unet", "vae")],
    *[file(f"model/{part}/config.json", b"{", f"{part}/config.json cannot be read") for part in ("unet", "vae")],
    *[
        changed("model/vae/config.json", "scaling_factor in vae/config.json must be", scaling_factor=value)
        for value in (0, -1, float("nan"), "1")
    ],
    file("model/text_encoder/config.json", b"\xff", "text_encoder/config.json cannot be read"),
    file("model/scheduler/scheduler_config.json", None, "scheduler/scheduler_config.json cannot be read"),
    file("model/scheduler/scheduler_config.json", b"no", "scheduler/scheduler_config.json cannot be read"),
    file("model/tokenizer/tokenizer.json", None, "tokenizer has neither tokenizer.json nor vocab.json"),
    file("model/tokenizer/tokenizer.json", b"{", "does not load as a Stable Diffusion model"),
    *[
        truncated_file(
            f"model/{part}/diffusion_pytorch_model.safetensors",
            f"{part}/diffusion_pytorch_model.safetensors is damaged",
        )
        for part in ("unet", "vae")
    ],
    truncated_file("model/text_encoder/model.safetensors", "text_encoder/model.safetensors is damaged"),
    file("model/unet/diffusion_pytorch_model.safetensors", None, "unet has no .safetensors weights: save"),
    file("model/vae/diffusion_pytorch_model.safetensors", b"", "vae/diffusion_pytorch_model.safetensors is damaged"),
    Case(
        "text_encoder has no .safetensors weights, only pytorch_model.bin, which is never read",
        (),
        lambda folder: (folder / "model/text_encoder/model.safetensors").rename(
            folder / "model/text_encoder/pytorch_model.bin"
        ),
    ),
]
RUNS = [
    setting("output_dir", "{folder}/images/00.png", "output_dir must be a folder that can be written, and"),
    setting("output_dir", "{folder}/images", "output_dir must not be the folder of the images"),
    file("out/result.json", b"{}", "holds another run, or files in its place (result.json): choose another"),
    file("out/trace.jsonl", b"", "holds another run, or files in its place (trace.jsonl): choose another"),
    setting("resume_from_checkpoint", "latest", "it holds no checkpoint: correct it or start afresh"),
    setting("resume_from_checkpoint", "checkpoint-7", "it holds no checkpoint: correct it or start afresh"),
    file(
        "out/checkpoint-4/facts.json",
        b"{}",
        "it holds checkpoint-4: correct",
        "--resume_from_checkpoint",
        "checkpoint-5",
    ),
    Case(
        "several processes need a launcher that sets RANK, MASTER_ADDR, MASTER_PORT, got WORLD_SIZE=2",
        (),
        environment=(("WORLD_SIZE", "2"),),
    ),
    Case("got OMPI_COMM_WORLD_SIZE=4", (), environment=(("OMPI_COMM_WORLD_SIZE", "4"),)),
    Case("{folder}/nowhere", ("report", "{folder}/nowhere"), method=None),
    Case("a run folder holds config.json, {folder}/images does not", ("report", "{folder}/images"), method=None),
    Case("export needs --step, --merged, --kohya, --embedding or", ("export", "{folder}/out"), method=None),
    Case("concept 'red_mugg' is not bundled", ("demo", "--concept", "red_mugg"), method=None),
    Case("--prompt", ("generate", "{folder}/out"), method=None),
    Case("generat", ("generat",), method=None),
]
SEVERAL = (
    *CUSTOM,
    *("--concepts_list", "{folder}/list.json", "--placeholder_token", "<a>+<b>", "--initializer_token", "mug+mug"),
    *("--validation_prompt", "<a> mug and <b> mug", "--resolution", "32"),
    *("--pretrained_model_name_or_path", "{folder}/model", "--output_dir", "{folder}/out"),
)
FIRST, SECOND = (
    {"instance_prompt": f"a {word} mug", "instance_data_dir": "{folder}/images", "class_prompt": "a mug"}
    for word in ("<a>", "<b>")
)


def concepts_list(content: object, message: str, *arguments: str) -> Case:
    """Return a case with a list of concepts of this content."""

    def damage(folder: Path) -> None:
        (folder / "list.json").write_text(json.dumps(content).replace("{folder}", str(folder)))

    return Case(message, (*SEVERAL, *arguments), damage, method=None)


LISTS = [
    Case("concepts_list {folder}/list.json: No such file or directory; check the path", SEVERAL, method=None),
    Case("is not JSON", SEVERAL, lambda folder: (folder / "list.json").write_text("[{"), method=None),
    Case("is not JSON", SEVERAL, lambda folder: (folder / "list.json").write_bytes(b"\xff"), method=None),
    concepts_list([], "must be a list of one or more objects: write one for each concept"),
    concepts_list(FIRST, "must be a list of one or more objects: write one for each concept"),
    concepts_list([FIRST, "<b>"], "must be a list of one or more objects: write one for each concept"),
    concepts_list([FIRST, {**SECOND, "class_promt": "a mug"}], "concept 2: unknown key 'class_promt': the nearest is"),
    concepts_list([FIRST, {**SECOND, "class_prompt": 3}], "concept 2: class_prompt must be text, got 3: give it"),
    concepts_list([{**FIRST, "instance_data_dir": " "}, SECOND], "concept 1: instance_data_dir must be text, got ' '"),
    concepts_list(
        [FIRST, {**SECOND, "instance_prompt": "a mug"}],
        "concept 2: instance_prompt must contain one of the placeholder tokens",
    ),
    concepts_list(
        [FIRST, FIRST], "has no instance_prompt with <b>: put each placeholder token into the prompt of its concept"
    ),
    concepts_list(
        [FIRST, {**SECOND, "instance_data_dir": "{folder}/nowhere"}], "concept 2: instance_data_dir must be a folder"
    ),
    concepts_list([FIRST, {**SECOND, "instance_data_dir": "{folder}/empty"}], "{folder}/empty holds no images"),
    concepts_list(
        [{**FIRST, "class_data_dir": "{folder}/nowhere"}, SECOND], "concept 1: class_data_dir must be a folder"
    ),
    concepts_list(
        [{**FIRST, "class_data_dir": "{folder}/empty"}, SECOND], "class_data_dir {folder}/empty holds no images"
    ),
    concepts_list(
        [{**FIRST, "class_prompt": "mug " * 90}, SECOND], "the text of concepts_list, concept 1: class_prompt must"
    ),
    concepts_list(
        [FIRST, SECOND], "class_noun is for one concept and concepts_list for several", "--class_noun", "mug"
    ),
]
TABLE = [*NUMBERS, *VALUES, *TOKENS, *IMAGES, *MODELS, *LISTS, *RUNS]


def build_arguments(case: Case, folder: Path) -> list[str]:
    """Return a complete command that is valid except for the case."""
    arguments = [argument.replace("{folder}", str(folder)) for argument in case.arguments]
    if case.method is None:
        return arguments
    settings = {
        "--pretrained_model_name_or_path": str(folder / "model"),
        "--instance_data_dir": str(folder / "images"),
        "--placeholder_token": "<thing>",
        "--initializer_token": "mug",
        "--resolution": "32",
        "--output_dir": str(folder / "out"),
        **({"--class_noun": "mug"} if case.method == CUSTOM else {}),
    }
    defaults = [argument for pair in settings.items() if pair[0] not in arguments for argument in pair]
    return [*case.method, *defaults, *arguments]


def measure_child_seconds() -> float:
    """Return the processor seconds of finished child processes, which other programs do not affect."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


RUNNER = """
import contextlib, io, json, os, sys
from dvar.cli.main import main
for line in sys.stdin:
    arguments, environment = json.loads(line)
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    for name in environment:
        del os.environ[name]
    print(json.dumps([status, out.getvalue(), err.getvalue(), "torch" in sys.modules]), flush=True)
"""


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    process.communicate()


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, tiny_images: Path) -> Path:
    """A folder with a model, images and an empty folder, to be damaged."""
    for name, source in (("model", tiny_model), ("images", tiny_images)):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def assert_refused(case: Case, folder: Path, status: int, out: str, err: str) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert status == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("dvar: ")
    assert case.message.replace("{folder}", str(folder)) in lines[0]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.message[:50])
def test_invalid_input_is_refused_in_one_line_before_torch_is_imported(
    case: Case, folder: Path, runner: subprocess.Popen[str]
) -> None:
    case.damage(folder)
    before = read_files(folder)
    assert runner.stdin
    assert runner.stdout
    runner.stdin.write(json.dumps([build_arguments(case, folder), dict(case.environment)]) + "\n")
    runner.stdin.flush()
    status, out, err, torch = json.loads(runner.stdout.readline())
    assert_refused(case, folder, status, out, err)
    assert read_files(folder) == before
    assert not torch


def test_the_table_has_a_hundred_cases() -> None:
    assert len(TABLE) >= 100


PROCESSES = [*NUMBERS[::8], *VALUES[::5], *IMAGES[::5], *MODELS[4::8], LISTS[1], *RUNS[7:13]]


@pytest.mark.slow
@pytest.mark.parametrize("case", PROCESSES, ids=lambda case: case.message[:50])
def test_a_process_prints_the_same(case: Case, folder: Path) -> None:
    case.damage(folder)
    before = read_files(folder)
    program = [sys.executable, "-c", "import sys; from dvar.cli.main import main; sys.exit(main())"]
    environment = {**os.environ, **dict(case.environment)}
    start = measure_child_seconds()
    process = subprocess.run(
        [*program, *build_arguments(case, folder)], capture_output=True, text=True, env=environment
    )
    assert measure_child_seconds() - start <= 3
    assert_refused(case, folder, process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr
    assert read_files(folder) == before


def change_prediction_type(folder: Path) -> None:
    path = folder / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))


def remove_vae_weights(folder: Path) -> None:
    (folder / "model" / "vae" / TENSORS).write_bytes((2).to_bytes(8, "little") + b"{}")


LATE = [
    Case("the model must predict epsilon or v_prediction, {folder}/model predicts sample", (), change_prediction_type),
    Case("{folder}/model lacks weights, ", (), remove_vae_weights),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", LATE, ids=lambda case: case.message[:50])
def test_a_problem_found_while_loading_the_model_is_reported_as_briefly(case: Case, folder: Path) -> None:
    case.damage(folder)
    before, start = read_files(folder), measure_child_seconds()
    libraries = "import dvar.training.personalise; from diffusers import StableDiffusionPipeline"
    subprocess.run([sys.executable, "-c", libraries], capture_output=True, check=True)
    imported = measure_child_seconds()
    program = [sys.executable, "-c", "import sys; from dvar.cli.main import main; sys.exit(main())"]
    process = subprocess.run([*program, *build_arguments(case, folder)], capture_output=True, text=True)
    # Relative to the import of its libraries in the same minute: other work on the machine slows both.
    assert measure_child_seconds() - imported <= 1.5 * (imported - start)
    loading, message = process.stderr.split("\n", 1)
    assert loading.startswith("dvar: loading for ")
    assert_refused(case, folder, process.returncode, process.stdout, message)
    assert read_files(folder) == before


def test_twenty_cases_run_in_a_process() -> None:
    assert len(PROCESSES) >= 20
