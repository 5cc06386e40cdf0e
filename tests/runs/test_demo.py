"""The demo: training past the stop, and the page that compares."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from dvar import mini
from dvar.cli import demo as demo_command
from dvar.config.methods import TextualInversionConfig
from dvar.runs.demo import LONGER, PLACES, Demo, choose_new_places, train_past_stop, write_demo
from dvar.runs.run_folder import RunFolder
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        pretrained_model_name_or_path=str(tiny_model),
        instance_data_dir=str(tiny_images),
        initializer_token="mug",
        resolution=32,
        max_train_steps=100,
        window=8,
        threshold=0.999,
        validation_steps=5,
        num_validation_images=2,
        num_inference_steps=2,
        checkpointing_steps=20,
        output_dir=str(tmp_path / "run"),
    )


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run but those in the folder inside it."""
    files = (path for path in folder.rglob("*") if path.is_file() and LONGER not in path.parts)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_training_past_the_stop_is_what_a_run_without_a_stop_does(
    config: TextualInversionConfig, tmp_path: Path
) -> None:
    result = personalise(config)
    assert result.verdict.stop
    assert 8 <= result.steps < 20
    run, before, steps = RunFolder.open(result.folder), digest(result.folder), list[StepRecord]()
    longer = train_past_stop(run, [steps.append])
    assert [step.step for step in steps] == list(range(result.steps + 1, 2 * result.steps + 1))
    assert digest(result.folder) == before, "the run itself stays as it is"
    never = replace(config, threshold=1e-9, max_train_steps=2 * result.steps, output_dir=str(tmp_path / "never"))
    assert longer.trace.values.tolist() == RunFolder.open(personalise(never).folder).trace.values.tolist()

    likeness = {step: step / 100 for step in {*longer.samples, *run.samples}}
    demo = Demo(run, longer, likeness, dict(zip(("in the snow", "by the sea"), run.references, strict=False)))
    assert demo.stop in demo.steps
    assert demo.steps == sorted(likeness)
    page = write_demo(demo).read_text(encoding="utf-8")
    held, at_stop = longer.trace.values, longer.trace.values[longer.trace.steps <= result.steps][-1]
    change = f"{100 * (at_stop / held[0] - 1):+.2g} %".replace("-", "−")
    assert demo.findings["held loss"].startswith(f"{change} up to the stop")
    assert f'<th scope="col" class="stop">stop {result.steps}</th>' in page
    assert page.count("<img") == 2 * len(demo.steps) + len(run.references) + 2
    for sentence in demo.findings.values():
        assert sentence.partition(" ")[0] in page


def test_the_new_places_are_none_that_the_images_show() -> None:
    for name in mini.concepts():
        places = choose_new_places(name)
        assert len(places) == 4
        assert not {*places} & {PLACES.get(place) for place in mini.places(name)}


@pytest.mark.parametrize(
    ("load", "cores", "allowed", "threads"),
    [(0, 2, 2, 2), (50, 2, 2, 1), (100, 2, 2, 1), (25, 4, 4, 3), (0, 64, 64, 4), (0, 64, 1, 1), (98, 64, 64, 1)],
)
def test_the_demo_takes_the_cores_that_are_idle(
    load: float, cores: int, allowed: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: load)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    environment: dict[str, str] = {}
    demo_command.use_free_cores(environment)
    assert environment == {"OMP_NUM_THREADS": str(threads)}
    environment = {"OMP_NUM_THREADS": "7"}
    demo_command.use_free_cores(environment)
    assert environment == {"OMP_NUM_THREADS": "7"}
