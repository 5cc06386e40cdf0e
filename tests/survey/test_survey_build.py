"""Building a survey: which runs are compared, the questions, and what an image must not reveal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_survey import build_small_survey, write_rival_runs, write_run_with_images
from numpy.typing import NDArray
from PIL import Image

from dvar.cli.main import main
from dvar.errors import RefusedInput
from dvar.runs.generate import list_generated_images
from dvar.runs.run_folder import RunFolder
from dvar.survey.build import build_survey
from dvar.survey.config import SurveyBuildConfig, problems
from dvar.survey.survey import IMAGE_FOLDER, QUESTIONS, Question, Survey, count_controls, stable_hash
from dvar.training.run_layout import GENERATED, GENERATED_LIST

ROOT = Path(__file__).parents[2]
Pixels = NDArray[np.uint8]


def build_config(place: Path, **changes: Any) -> SurveyBuildConfig:
    return SurveyBuildConfig(output_dir=str(place / "survey"), generate=False, **changes)


def test_images_of_the_same_prompt_and_seed_are_pairs_and_trained_prompts_ask_about_likeness(tmp_path: Path) -> None:
    _, survey = build_small_survey(tmp_path)
    pairs = {question: survey.select(question, "pair") for question in QUESTIONS}
    assert [(task.prompt, task.seed) for task in pairs["reconstruction"]] == [
        ("a photo of {}", 0),
        ("a photo of {}", 1),
    ]
    assert len(pairs["customization"]) == 6
    assert {task.prompt for task in pairs["customization"]} >= {"a photo of {} on the beach"}
    assert all(task.method == "textual-inversion" and task.concept == "mug" for task in survey.tasks)
    assert len({task.id for task in survey.tasks}) == len(survey.tasks)


def test_the_run_named_first_is_the_candidate_and_its_image_the_first(tmp_path: Path) -> None:
    ours, theirs = write_rival_runs(tmp_path)
    for runs, output in (((ours, theirs), "one"), ((theirs, ours), "two")):
        build_survey(runs, replace(build_config(tmp_path), output_dir=str(tmp_path / output)))
    first, second = Survey.load(tmp_path / "one"), Survey.load(tmp_path / "two")
    assert [(task.first, task.second) for task in first.select("customization", "pair")] == [
        (task.second, task.first) for task in second.select("customization", "pair")
    ]
    task = first.select("reconstruction", "pair")[0]
    with Image.open(tmp_path / "one" / IMAGE_FOLDER / f"{task.first}.png") as image:
        source = next(d.path for d in list_generated_images(RunFolder.open(ours)) if d.seed == task.seed)
        with Image.open(source) as original:
            enlarged = original.convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
            assert np.array_equal(np.asarray(image), np.asarray(enlarged))


def test_a_survey_loads_as_it_was_built_and_is_built_the_same_again(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    assert Survey.load(folder) == survey
    build_survey([tmp_path / "stopped", tmp_path / "full"], build_config(tmp_path / "again", control_every=3))
    again = tmp_path / "again" / "survey"
    assert (again / "survey.json").read_bytes() == (folder / "survey.json").read_bytes()
    assert sorted(path.name for path in (again / IMAGE_FOLDER).iterdir()) == [
        f"{name}.png" for name in survey.image_ids
    ]


def test_an_image_reveals_neither_its_run_nor_its_settings(tmp_path: Path) -> None:
    stopped, full = write_run_with_images(tmp_path / "stopped", 1), write_run_with_images(tmp_path / "full", 2, side=96)
    for path in stopped.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path, exif=b"Exif\0\0stopped", comment="stopped")
    survey = build_survey((stopped, full), build_config(tmp_path))
    for name in survey.image_ids:
        path = tmp_path / "survey" / IMAGE_FOLDER / f"{name}.png"
        assert b"stopped" not in path.read_bytes()
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert not image.info
            assert image.size == (256, 256), "both sides of a pair have one size"


def test_controls_and_training_have_obvious_answers(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    counts: dict[Question, int] = {"reconstruction": 1, "customization": 3}
    for question, count in counts.items():
        checks = survey.select(question, "control")
        assert len(checks) == count
        assert all(task.expected == "first" for task in checks)
        assert len({task.prompt for task in checks}) == count, "spread over the pairs"
        for task in checks:
            assert (
                _measure_seams(_read_pixels(folder, task.first)) < 2 < _measure_seams(_read_pixels(folder, task.second))
            ), "intact, scrambled"
        lessons = survey.select(question, "training")
        assert [task.expected for task in lessons] == ["first", "equal"]
        assert lessons[1].first == lessons[1].second
        assert all(task.lesson for task in lessons)


def test_neither_a_name_nor_a_count_of_pixels_reveals_a_control(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    checks = [task for question in QUESTIONS for task in survey.select(question, "control")]
    uses = Counter(name for task in survey.tasks for name in {task.first, task.second, *task.references})
    for task in checks:
        assert uses[task.first] == uses[task.second] == 1, "in no other task, and not among its references"
        intact, scrambled = (_read_pixels(folder, name) for name in (task.first, task.second))
        assert intact.shape == scrambled.shape
        assert not np.array_equal(np.sort(intact, axis=None), np.sort(scrambled, axis=None)), (
            "not the same pixels, moved"
        )
        for pixels in (intact, scrambled):
            assert np.array_equal(pixels, pixels[::4, ::4].repeat(4, axis=0).repeat(4, axis=1)), (
                "enlarged like all images"
            )


def test_every_image_file_has_the_same_length_and_is_a_valid_png(tmp_path: Path) -> None:
    runs = [
        write_run_with_images(tmp_path / name, seed, side=side)
        for seed, (name, side) in enumerate((("a", 64), ("b", 200)))
    ]
    build_survey(runs, build_config(tmp_path))
    paths = list((tmp_path / "survey" / IMAGE_FOLDER).iterdir())
    assert len({path.stat().st_size for path in paths}) == 1
    for path in paths:
        with Image.open(path) as image:
            image.verify()  # reads every chunk and its checksum


def test_a_control_is_as_large_as_its_images(tmp_path: Path) -> None:
    runs = [write_run_with_images(tmp_path / name, seed, side=160) for seed, name in enumerate(("stopped", "full"))]
    (task, *_) = build_survey(runs, build_config(tmp_path)).select("customization", "control")
    for name in (task.first, task.second):
        assert _read_pixels(tmp_path / "survey", name).shape == (160, 160, 3)


def _measure_seams(pixels: Pixels, tile: int = 64) -> float:
    """Return how much larger the steps between neighbouring pixels are where tiles meet than elsewhere."""
    steps = np.abs(np.diff(pixels.astype(float), axis=1)).mean(axis=(0, 2))
    return float(steps[tile - 1 :: tile].mean() / steps[3::4].mean())


def _read_pixels(folder: Path, name: str) -> Pixels:
    with Image.open(folder / IMAGE_FOLDER / f"{name}.png") as image:
        return np.asarray(image)


def test_two_concepts_give_a_training_task_with_another_object(tmp_path: Path) -> None:
    runs = [*write_rival_runs(tmp_path / "a"), *write_rival_runs(tmp_path / "b", references=3)]
    survey = build_survey(runs, build_config(tmp_path))
    assert [task.expected for task in survey.select("reconstruction", "training")] == ["first", "equal", "first"]
    assert {task.concept for task in survey.tasks} > {"mug"}, "two folders of one name are two concepts"
    assert len({task.concept for task in survey.tasks}) == 2
    assert len(survey.runs) == 2


def test_the_order_of_runs_matters_only_within_a_pair(tmp_path: Path) -> None:
    a, b = write_rival_runs(tmp_path / "a"), write_rival_runs(tmp_path / "b", references=3)
    first = build_survey([a[0], a[1], b[0], b[1]], replace(build_config(tmp_path), output_dir=str(tmp_path / "1")))
    second = build_survey([a[0], b[0], a[1], b[1]], replace(build_config(tmp_path), output_dir=str(tmp_path / "2")))
    assert first == second


def test_images_of_other_settings_or_of_an_earlier_training_are_not_paired(tmp_path: Path) -> None:
    ours, theirs = write_rival_runs(tmp_path)
    listed = theirs / GENERATED / GENERATED_LIST
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    rows[0]["guidance_scale"] += 1
    rows[1]["num_inference_steps"] += 1
    rows[2]["result"] = "another training"
    listed.write_text("\n".join(json.dumps(row) for row in rows))
    assert len(build_survey((ours, theirs), build_config(tmp_path)).select("customization", "pair")) == 3


@pytest.mark.parametrize("candidate", [0, 1])
def test_a_prompt_that_either_run_trained_on_asks_about_likeness(tmp_path: Path, candidate: int) -> None:
    prompt = "a painting in the style of {}"
    runs = [
        write_run_with_images(tmp_path / kind, seed, learnable_property=kind, scenes=("by night",))
        for seed, kind in enumerate(("object", "style"))
    ]
    for run in runs:
        listed = run / GENERATED / GENERATED_LIST
        listed.write_text(listed.read_text().replace("a photo of <thing> by night", prompt.format("<thing>")))
    survey = build_survey([runs[candidate], runs[1 - candidate]], build_config(tmp_path))
    assert {task.prompt for task in survey.select("reconstruction", "pair")} >= {prompt}
    assert not survey.select("customization", "pair")


def test_all_runs_that_cannot_be_compared_are_refused_at_once(tmp_path: Path) -> None:
    ours, theirs = write_rival_runs(tmp_path)
    (theirs / "result.json").unlink()
    bare = write_run_with_images(tmp_path / "bare", 3, references=0)
    with pytest.raises(RefusedInput) as refused:
        build_survey((ours, theirs, bare), build_config(tmp_path))
    assert len(refused.value.problems) == 3
    assert not (tmp_path / "survey").exists()


def test_an_output_folder_in_use_is_refused_and_unchanged(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    before = (folder / "survey.json").read_bytes()
    with pytest.raises(RefusedInput, match="already holds files"):
        build_survey((tmp_path / "stopped", tmp_path / "full"), build_config(tmp_path, seed=5))
    assert (folder / "survey.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "survey.json").unlink(),
        lambda folder: (folder / "survey.json").write_text("{"),
        lambda folder: (folder / "survey.json").write_text("[]"),
        lambda folder: (folder / "survey.json").write_text('{"format": 99}'),
        lambda folder: next((folder / "pictures").iterdir()).unlink(),
    ],
)
def test_a_damaged_survey_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder, _ = build_small_survey(tmp_path)
    damage(folder)
    with pytest.raises(RefusedInput):
        Survey.load(folder)


def test_missing_images_are_generated_by_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run_with_images(tmp_path / name, seed, scenes=()) for seed, name in enumerate(("stopped", "full"))]
    (tmp_path / "scenes.txt").write_text("on the moon\n\nby the sea\n")
    calls = []
    personalised = SimpleNamespace(load_personalised_backbone=lambda folder: folder, loading_options=lambda *_: {})
    monkeypatch.setitem(sys.modules, "dvar.runs.load_model", personalised)

    def sample(folder: Path, prompts: list[str], seeds: list[int], **_: object) -> list[Image.Image]:
        calls.append((folder.name, list(prompts), list(seeds)))
        return [
            Image.new("RGB", (64, 64), (len(prompt), seed, len(folder.name)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    monkeypatch.setitem(sys.modules, "dvar.diffusion.sampling", SimpleNamespace(sample=sample))
    config = replace(build_config(tmp_path), generate=True, scenes=str(tmp_path / "scenes.txt"), images_per_prompt=3)
    survey = build_survey(runs, config)
    assert [name for name, _, _ in calls] == ["stopped", "full"]
    assert calls[0][1:] == calls[1][1:]
    # The samples have seeds 0 and 1 of the plain prompt already.
    assert list(zip(*calls[0][1:], strict=True)) == [
        ("a photo of <thing>", 2),
        *((f"a photo of <thing> {scene}", seed) for scene in ("on the moon", "by the sea") for seed in range(3)),
    ]
    assert [len(survey.select(question, "pair")) for question in QUESTIONS] == [3, 6]
    calls.clear()
    build_survey(runs, replace(config, output_dir=str(tmp_path / "second")))
    assert not calls, "nothing is generated twice"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_make_survey_continues_where_it_was_interrupted(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def training_flags() -> list[str]:
        output = subprocess.run(
            ["make", "-n", "survey"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        return re.findall(r"dvar train .* (--\w+)(?: latest)?$", output.replace("\\\n", " "), re.MULTILINE)

    assert training_flags() == ["--overwrite", "--overwrite"]
    (tmp_path / "runs/survey-full/checkpoint-50").mkdir(parents=True)
    assert sorted(training_flags()) == ["--overwrite", "--resume_from_checkpoint"]
    for name in ("stopped", "full"):
        (tmp_path / f"runs/survey-{name}").mkdir(exist_ok=True)
        (tmp_path / f"runs/survey-{name}/result.json").touch()
    assert training_flags() == []


def test_a_stable_hash_depends_on_its_parts_alone() -> None:
    assert stable_hash(7, "side", "abc") == stable_hash(7, "side", "abc") != stable_hash(7, "sid", "eabc")
    assert 0 <= stable_hash(0) < 2**64


def test_one_task_in_every_six_is_a_control() -> None:
    assert [count_controls(pairs, 6) for pairs in (0, 1, 5, 10, 40)] == [0, 1, 1, 2, 8]


def test_settings_are_checked() -> None:
    assert problems(SurveyBuildConfig()) == []
    wrong = SurveyBuildConfig(overlap=0, control_every=1, candidate="x", baseline="x")
    assert [line.split()[0] for line in problems(wrong)] == ["overlap", "control_every", "candidate"]


def test_the_command_builds_and_names_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder) for folder in write_rival_runs(tmp_path)]
    output = str(tmp_path / "asked")
    assert main(["survey", "build", *runs, "--no-generate", "--output-dir", output, "--candidate", "early"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"compares  textual-inversion, mug: {runs[0]} (early) against {runs[1]} (baseline)"
    assert lines[1:3] == ["asks      2 pairs about reconstruction", "asks      6 pairs about customization"]
    assert lines[-1] == f"next      dvar survey serve {output}"
    assert Survey.load(output).candidate == "early"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["build"], ["a survey compares two runs of one concept, got none: name them"]),
        (["build", "nowhere"], ["a run folder holds config.json, nowhere does not"]),
        (["build", "nowhere", "--overlap", "0"], ["overlap must be at least 1, got 0"]),
        (["build", "nowhere", "--overlp", "0"], ["unknown flag --overlp: the nearest known one is --overlap"]),
        (["serve", "nowhere"], ["a survey's folder holds survey.json, nowhere does not"]),
        (["serve", "nowhere", "--host", "0.0.0.0"], ["public_url is missing", "secret_file is missing"]),
        (["score", "nowhere", "--output", "votes.sqlite"], ["output must end in .html, got 'votes.sqlite'"]),
        (["score", "nowhere"], ["a survey's folder holds survey.json, nowhere does not"]),
        (["import", "nowhere", "answers.csv"], ["a survey's folder holds survey.json, nowhere does not"]),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_each(
    words: list[str],
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["survey", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    assert all(line.startswith(f"dvar: {start}") for line, start in zip(lines, messages, strict=True))
    assert not list(tmp_path.iterdir())


def test_both_runs_of_a_pair_get_images_sampled_as_the_candidate_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods differ in guidance, steps and prompts of their own, and only equal ones can be compared."""
    calls: dict[str, tuple[Sequence[str], dict[str, Any]]] = {}

    def record(run: RunFolder, prompts: Sequence[str], seeds: Sequence[int], **sampling: Any) -> None:
        calls[run.folder.name] = (sorted(set(prompts)), sampling)

    monkeypatch.setattr("dvar.survey.build.generate_images", record)
    runs = write_rival_runs(tmp_path)
    config = json.loads((runs[1] / "config.json").read_text())
    config |= {"guidance_scale": 2.5, "instance_prompt": None, "placeholder_token": "<other>"}
    (runs[1] / "config.json").write_text(json.dumps(config))
    (tmp_path / "scenes.txt").write_text("on a boat")
    settings = replace(build_config(tmp_path), generate=True, scenes=str(tmp_path / "scenes.txt"))
    with pytest.raises(RefusedInput):  # for nothing is generated here
        build_survey(runs, settings)
    candidate = RunFolder.open(runs[0]).settings
    plain = candidate.plain_prompt.replace(candidate.subject, "<other>")
    assert calls["full"][0] == [plain, f"{plain} on a boat"]
    assert {sampling["guidance_scale"] for _, sampling in calls.values()} == {candidate.guidance_scale}
