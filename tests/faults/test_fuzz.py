"""Random commands on damaged files: each is refused in a line or done, and none ends in a traceback."""

# A failure prints the case, as arguments and damage that can be repeated. The seeds are the numbers of the tests.

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from command_line import Answer, dvar
from damage import KINDS, Damage, Workspace, list_entries
from fake_record import write_fake_record
from fake_run import generate_trace, write_run
from fake_survey import build_small_survey
from hypothesis import HealthCheck, Phase, given, seed, settings
from short_run import short_run

from dvar.config.training import TrainingConfig
from dvar.errors import ModelError
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import write_traces
from dvar.stopping.trace import Trace
from dvar.training.personalise import personalise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes"),
]

CASES = 200
SECONDS = 8.0  # of the processor, for the largest of them; a usual case takes a tenth of one
SECONDS_AT_MOST = 60.0  # of a clock, on a machine that does other work too
STATUSES = {0, 1, 2, 130}

TRAINING = (
    *("--pretrained_model_name_or_path", "model", "--instance_data_dir", "images", "--initializer_token", "mug"),
    *("--resolution", "32", "--output_dir", "new"),
)
COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("report", "run"), ("run",)),
    (("report", "run", "--output", "page.html"), ("run",)),
    (("report", "trained"), ("trained",)),
    (("report", "launched"), ("launched",)),
    (("replay", "run"), ("run",)),
    (("replay", "run/trace.jsonl", "--rule", "all", "--output", "replay.svg"), ("run",)),
    (("replay", "log.csv", "--window", "20"), ("log.csv",)),
    (("replay", "log.jsonl", "--metric", "eval_loss", "--window", "20"), ("log.jsonl",)),
    (("replay", "run-mug.wandb", "--window", "8"), ("run-mug.wandb",)),
    (("train", "textual-inversion", *TRAINING), ("images", "model")),
    (("train", "textual-inversion", "--config", "settings.toml"), ("settings.toml", "images")),
    (("train", "dreambooth-lora", *TRAINING, "--placeholder_token", "<thing>"), ("images", "model")),
    (("train", "custom-diffusion", *TRAINING, "--class_noun", "mug"), ("images", "model")),
    (("train", "textual-inversion", "--config", "trained.toml", "--resume_from_checkpoint", "latest"), ("trained",)),
    (("train", "textual-inversion", *TRAINING[:-1], "trained", "--overwrite"), ("trained",)),
    (
        (
            *("train", "custom-diffusion", "--concepts_list", "list.json", "--placeholder_token", "<a>+<b>"),
            *("--initializer_token", "mug+mug", "--validation_prompt", "<a> mug", "--output_dir", "new"),
            *("--pretrained_model_name_or_path", "model", "--resolution", "32"),
        ),
        ("list.json", "images"),
    ),
    (("demo",), ()),
    (("concepts",), ()),
    (("concepts", "concepts"), ("concepts",)),
    (("generate", "trained", "--prompt", "a photo of <thing>"), ("trained",)),
    (("export", "trained", "--merged", "merged"), ("trained",)),
    (("export", "trained", "--kohya", "lora.safetensors"), ("trained",)),
    (("export", "trained", "--embedding", "thing.safetensors"), ("trained",)),
    (("batch", "jobs.toml", "--output_dir", "batch"), ("jobs.toml", "images", "model")),
    (("batch", "jobs.csv", "--config", "shared.toml", "--json"), ("jobs.csv", "shared.toml", "images")),
    (("batch", "concepts", "--config", "shared.toml", "--pack", "2"), ("concepts", "shared.toml")),
    (("record", "--estimate", "--records", "records", "--concepts_dir", "concepts"), ("concepts", "records")),
    (("reproduce", "rules", "--records", "records", "--output_dir", "laboratory"), ("records",)),
    (("reproduce", "rules", "--records", "traces.npz", "--output_dir", "laboratory"), ("traces.npz",)),
    (("survey", "build", "stopped", "full", "--output_dir", "other", "--no_generate"), ("stopped", "full")),
    (("survey", "serve", "survey", "--port", "0"), ("survey",)),
    (
        (
            *("survey", "export", "survey", "--question", "customization", "--images_url", "https://a.example/p"),
            *("--output", "tasks.csv"),
        ),
        ("survey",),
    ),
    (("survey", "import", "survey", "answers.csv"), ("survey", "answers.csv")),
    (("survey", "forget", "survey", "1"), ("survey",)),
    (("survey", "score", "survey", "--resamples", "100"), ("survey",)),
    (("launch", "--check", "script.py"), ("script.py",)),
    (("integrate", "sd-scripts", "images"), ()),
)
"""Commands that are valid in the workspace, with the files and folders that they read."""
FLAGS = (
    *(
        "--seed",
        "--num_vectors",
        "--rank",
        "--resolution",
        "--train_batch_size",
        "--learning_rate",
        "--max_train_steps",
    ),
    *("--window", "--threshold", "--output", "--output_dir", "--config", "--preset", "--placeholder_token", "--metric"),
    *(
        "--instance_data_dir",
        "--class_data_dir",
        "--concepts_list",
        "--num_images",
        "--num_inference_steps",
        "--prompt",
    ),
    *("--guidance_scale", "--records", "--seeds", "--first", "--workers", "--concepts_dir", "--model", "--clip_model"),
    *("--port", "--host", "--public_url", "--secret_file", "--images_url", "--resamples", "--confidence", "--scenes"),
    *("--stop_file", "--step_column", "--rule", "--resume_from_checkpoint", "--validation_prompt", "--nonsense"),
    *("--merged", "--kohya", "--embedding", "--step", "--method", "--checkpoints", "--pack", "--threads", "--retries"),
    *("--password_file", "--models_dir", *(f"--{setting.name}" for setting in fields(TrainingConfig))),
)
VALUES = (
    *("", " ", "0", "-1", "1", "7", "1.5", "1_000", "1e3", "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 400, "0x10"),
    *(
        "true",
        "null",
        "[]",
        "{}",
        "{0}",
        "%s",
        "a\0b",
        "a\udcffb",
        "a\nb",
        "\x1b[2J",
        "é",
        "🙂",
        "<thing>",
        "mug",
        "all",
    ),
    *("x" * 300, "x" * 5000, "../..", ".", "/", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/new"),
    *(
        "~nobody-of-this-name/x",
        "pipe",
        "loop",
        "model",
        "images",
        "images/00.png",
        "run",
        "list.json",
        "nowhere/x.html",
    ),
    *(
        "http://a:b@c.example",
        "https://c.example:99999",
        "javascript:alert(1)",
        "latest",
        "checkpoint-4",
        "--",
        "-",
        "-h",
    ),
)


@dataclass(frozen=True)
class Case:
    """A command line, and what happened to its files before."""

    words: tuple[str, ...]
    damages: tuple[Damage, ...] = field(default=())


def mutate_words(words: tuple[str, ...], random: random.Random) -> tuple[str, ...]:
    """Return a command line with a word or a flag changed, doubled, dropped or added."""
    changed, place = list(words), random.randrange(len(words))
    match random.choice(("value", "value", "flag", "flag", "drop", "double")):
        case "value":
            changed[place] = random.choice(VALUES)
        case "flag":
            changed += [random.choice(FLAGS), random.choice(VALUES)]
        case "drop":
            del changed[place]
        case "double":
            changed.insert(place, changed[place])
    return tuple(changed)


def draw_case(random: random.Random, files: list[str]) -> Case:
    """Return a random case; ``files`` are all those that can be damaged."""
    words, reads = random.choice(COMMANDS)
    near = [name for name in files if name.split("/")[0] in reads or name in reads]
    damages = []
    for _ in range(random.choice((0, 1, 1, 1, 2)) if near else 0):
        name = random.choice(near)
        kind = "json" if name.endswith((".json", ".jsonl")) and random.random() < 0.6 else random.choice(list(KINDS))
        damages.append(Damage(name, kind, random.randrange(2**32)))
    for _ in range(random.choice((0, 1, 1, 2) if damages else (1, 1, 2, 3))):
        words = mutate_words(words, random) if words else words
    return Case(
        words, tuple(damages) if len({damage.path for damage in damages}) == len(damages) else tuple(damages[:1])
    )


def refuse_to_load(*_: Any, **__: Any) -> Any:
    raise ModelError("the model does not load: this test needs none")


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_images, folder / "images")
    for name in ("mug", "cat"):
        shutil.copytree(tiny_images, folder / "concepts" / name)
        (folder / "concepts" / f"{name}.json").write_text('{"noun": "mug", "prompts": ["{} in the snow"]}')
    write_run(folder / "run", generate_trace(steps=60), sampled_every=30, images=2, side=16)
    trace = Trace({"launch": {"script": "train.py", "rule": "dvar", "settings": {"window": 20, "threshold": 0.15}}})
    for record in generate_trace(steps=40).records:
        trace.record(record["step"], record["eval"])
    (folder / "launched").mkdir()
    trace.write(folder / "launched" / "trace.jsonl")
    config = short_run(tiny_model, tiny_images, folder / "trained")
    personalise(config)
    values = {name: value for name, value in asdict(config).items() if value is not None}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (folder / "trained.toml").write_text("\n".join(lines) + "\n")
    for concept in ("red_mug", "blue_cup"):
        write_fake_record(folder / "records", concept=concept, cap=60, every=10, images=2)
    write_traces(RecordingArchive.open(folder / "records"), folder / "traces.npz")
    build_small_survey(folder)
    rows = "\n".join(f"{step},{0.5 + 0.4 / (1 + step)}" for step in range(60))
    (folder / "log.csv").write_text(f"step,eval_loss\n{rows}\n")
    (folder / "log.jsonl").write_text(
        "\n".join(f'{{"step": {step}, "eval_loss": {0.5 + 0.4 / (1 + step)}}}' for step in range(60)) + "\n"
    )
    shutil.copy(Path(__file__).parents[1] / "logs" / "samples" / "run-mug.wandb", folder)
    pairs = [
        f'{{"instance_prompt": "a <{word}> mug", "instance_data_dir": "images", "class_prompt": "a mug"}}'
        for word in "ab"
    ]
    (folder / "list.json").write_text(f"[{', '.join(pairs)}]")
    names = dict(zip(TRAINING[::2], TRAINING[1::2], strict=True))
    (folder / "settings.toml").write_text(
        "".join(f'{name[2:]} = "{value}"\n' for name, value in names.items() if name != "--resolution")
        + "resolution = 32\n"
    )
    shared = {"pretrained_model_name_or_path": "model", "initializer_token": "mug", "resolution": 32}
    lines = [f"{name} = {json.dumps(value)}" for name, value in shared.items()]
    (folder / "shared.toml").write_text("\n".join(lines) + "\n")
    jobs = [f'[[job]]\nid = "{name}"\ninstance_data_dir = "images"' for name in ("one", "two")]
    (folder / "jobs.toml").write_text("\n".join((*lines, *jobs)) + "\n")
    (folder / "jobs.csv").write_text("id,instance_data_dir,seed\none,images,1\ntwo,images,2\n")
    (folder / "answers.csv").write_text("ticket,worker,answer\nabc,ann,left\n")
    script = "loader, accelerator, loss = [], None, None\nfor batch in loader:\n    accelerator.backward(loss)\n"
    (folder / "script.py").write_text(script)
    return Workspace(folder)


@pytest.fixture(scope="module")
def run_case(workspace: Workspace) -> Iterator[Callable[[Case], Answer]]:
    """Run a case in the workspace, with stubs for what would load a model or serve for ever."""
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.personalise", "runs.load_model", "runs.export"):
            patch.setattr(f"dvar.{module}.load_backbone", refuse_to_load)
        patch.setattr("uvicorn.Server.run", lambda *_, **__: None)
        patch.setattr("dvar.paper.reproduce._make_result", refuse_to_load)
        patch.setattr("dvar.jobs.batch.Batch.events", refuse_to_load)
        os.chdir(workspace.folder)
        os.mkfifo("pipe")
        os.symlink("loop", "loop")
        workspace.entries = list_entries(workspace.folder)
        yield lambda case: _run(case, workspace)
        os.chdir(here)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an error in a scope that takes longer, such as one that waits for a pipe which nobody writes to."""

    def fail(*_: Any) -> None:
        raise AssertionError("it did not end")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(case: Case, workspace: Workspace) -> Answer:
    for damage in case.damages:
        damage.apply(workspace.folder)
    before, start = list_entries(workspace.folder), time.process_time()
    with warnings.catch_warnings(), time_limit(SECONDS_AT_MOST):
        warnings.simplefilter("default")
        answer = dvar(*case.words)
    assert time.process_time() - start < SECONDS, "it took too long"
    assert answer.status in STATUSES, f"status {answer.status}"
    lines = answer.err.splitlines()
    odd = [line for line in lines if not line.startswith(("dvar: ", "warning: "))]
    assert not odd, f"a message is one line: {odd[0][:300]}"
    if answer.status:
        assert answer.out or any(line.startswith("dvar: ") for line in lines), "nothing was printed"
    if answer.status == 2:
        after = list_entries(workspace.folder)
        changes = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        assert not changes, f"refused, and yet changed: {changes[:4]}"
    return answer


@pytest.mark.parametrize("number", range(10))
def test_random_commands_on_damaged_files_end_in_a_line_each(
    number: int, workspace: Workspace, run_case: Callable[[Case], Answer]
) -> None:
    files = [name for name in workspace.files if not name.startswith("model/tokenizer")]
    statuses: list[int] = []

    @seed(number)
    @settings(
        max_examples=CASES,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def check(key: int) -> None:
        case = draw_case(random.Random(key), files)
        try:
            statuses.append(run_case(case).status)
        except BaseException as error:
            error.add_note(f"seed {number}, case {case}")
            raise
        finally:
            workspace.restore()

    check()
    assert len(statuses) >= CASES
    assert statuses.count(2) > CASES // 2, "most cases are refused"


def test_the_commands_are_valid_as_they_are(run_case: Callable[[Case], Answer], workspace: Workspace) -> None:
    for words, _ in COMMANDS:
        answer = run_case(Case(words))
        workspace.restore()
        stubbed = "this test needs none" in answer.err
        expected = words[0] in ("integrate",) or words[1:2] in (("import",), ("forget",)) or "--kohya" in words
        assert answer.status == 0 or stubbed or expected, f"{words}: {answer.err}"
