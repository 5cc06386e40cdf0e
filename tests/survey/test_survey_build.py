"""Building a survey: who is compared with whom, what is asked, and what a picture must not tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_survey import drawn_run, rival_runs, small_survey
from PIL import Image

from dvar.cli.main import main
from dvar.errors import RefusedInput
from dvar.runs.generate import GENERATED, LIST, drawings
from dvar.runs.run_folder import RunFolder
from dvar.survey.build import build
from dvar.survey.config import SurveyBuildConfig, survey_problems
from dvar.survey.survey import PICTURES, QUESTIONS, Survey, controls, key

ROOT = Path(__file__).parents[2]


def settings(place: Path, **given: object) -> SurveyBuildConfig:
    return SurveyBuildConfig(output_dir=str(place / "survey"), draw=False, **given)  # type: ignore[arg-type]


def test_pictures_of_equal_prompt_and_seed_are_pairs_and_what_training_saw_asks_about_likeness(tmp_path: Path) -> None:
    _, survey = small_survey(tmp_path)
    asked = {question: survey.of(question, "pair") for question in QUESTIONS}
    assert [(task.prompt, task.seed) for task in asked["reconstruction"]] == [
        ("a photo of {}", 0),
        ("a photo of {}", 1),
    ]
    assert len(asked["customization"]) == 6
    assert {task.prompt for task in asked["customization"]} >= {"a photo of {} on the beach"}
    assert all(task.method == "textual-inversion" and task.concept == "mug" for task in survey.tasks)
    assert len({task.id for task in survey.tasks}) == len(survey.tasks)


def test_the_run_named_first_is_the_candidate_and_its_picture_the_first(tmp_path: Path) -> None:
    ours, theirs = rival_runs(tmp_path)
    for runs, output in (((ours, theirs), "one"), ((theirs, ours), "two")):
        build(runs, replace(settings(tmp_path), output_dir=str(tmp_path / output)))
    one, two = Survey.open(tmp_path / "one"), Survey.open(tmp_path / "two")
    assert [(task.first, task.second) for task in one.of("customization", "pair")] == [
        (task.second, task.first) for task in two.of("customization", "pair")
    ]
    task = one.of("reconstruction", "pair")[0]
    with Image.open(tmp_path / "one" / PICTURES / f"{task.first}.png") as kept:
        source = next(d.path for d in drawings(RunFolder.open(ours)) if d.seed == task.seed)
        with Image.open(source) as original:
            enlarged = original.convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
            assert np.array_equal(np.asarray(kept), np.asarray(enlarged))


def test_a_survey_is_read_back_as_it_was_built_and_built_again_alike(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    assert Survey.open(folder) == survey
    build([tmp_path / "stopped", tmp_path / "full"], settings(tmp_path / "again", control_every=3))
    again = tmp_path / "again" / "survey"
    assert (again / "survey.json").read_bytes() == (folder / "survey.json").read_bytes()
    assert sorted(path.name for path in (again / PICTURES).iterdir()) == [f"{name}.png" for name in survey.pictures]


def test_a_picture_tells_neither_its_source_nor_its_way(tmp_path: Path) -> None:
    stopped, full = drawn_run(tmp_path / "stopped", 1), drawn_run(tmp_path / "full", 2, side=96)
    for path in stopped.rglob("*.png"):
        with Image.open(path) as picture:
            picture.save(path, exif=b"Exif\0\0stopped", comment="stopped")
    survey = build((stopped, full), settings(tmp_path))
    for name in survey.pictures:
        path = tmp_path / "survey" / PICTURES / f"{name}.png"
        assert b"stopped" not in path.read_bytes()
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert not picture.info
            assert picture.size == (256, 256), "both sides of a pair have one size"


def test_controls_and_training_have_answers_that_anyone_sees(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    for question, wanted in (("reconstruction", 1), ("customization", 3)):
        checks = survey.of(question, "control")  # type: ignore[arg-type]
        assert len(checks) == wanted
        assert all(task.expected == "first" for task in checks)
        assert len({task.prompt for task in checks}) == wanted, "spread over the pairs"
        for task in checks:
            assert _seams(_pixels(folder, task.first)) < 2 < _seams(_pixels(folder, task.second)), "whole, in pieces"
        lessons = survey.of(question, "training")  # type: ignore[arg-type]
        assert [task.expected for task in lessons] == ["first", "equal"]
        assert lessons[1].first == lessons[1].second
        assert all(task.lesson for task in lessons)


def test_a_control_is_told_apart_by_no_name_and_no_count_of_pixels(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    checks = [task for question in QUESTIONS for task in survey.of(question, "control")]
    shown = Counter(name for task in survey.tasks for name in {task.first, task.second, *task.references})
    for task in checks:
        assert shown[task.first] == shown[task.second] == 1, "in no other task, and none of its own references"
        whole, broken = (_pixels(folder, name) for name in (task.first, task.second))
        assert whole.shape == broken.shape
        assert not np.array_equal(np.sort(whole, axis=None), np.sort(broken, axis=None)), "not the same pixels, moved"
        for pixels in (whole, broken):
            assert np.array_equal(pixels, pixels[::4, ::4].repeat(4, axis=0).repeat(4, axis=1)), "enlarged as all are"


def test_every_picture_is_as_long_as_any_other_and_a_whole_png(tmp_path: Path) -> None:
    runs = [drawn_run(tmp_path / name, seed, side=side) for seed, (name, side) in enumerate((("a", 64), ("b", 200)))]
    build(runs, settings(tmp_path))
    paths = list((tmp_path / "survey" / PICTURES).iterdir())
    assert len({path.stat().st_size for path in paths}) == 1
    for path in paths:
        with Image.open(path) as picture:
            picture.verify()  # reads every chunk and its sum


def test_a_control_of_large_pictures_is_as_large(tmp_path: Path) -> None:
    runs = [drawn_run(tmp_path / name, seed, side=160) for seed, name in enumerate(("stopped", "full"))]
    (task, *_) = build(runs, settings(tmp_path)).of("customization", "control")
    for name in (task.first, task.second):
        assert _pixels(tmp_path / "survey", name).shape == (160, 160, 3)


def _seams(pixels: np.ndarray, tile: int = 64) -> float:
    """How much larger the steps between neighbours are where four tiles a side meet than on the whole."""
    steps = np.abs(np.diff(pixels.astype(float), axis=1)).mean(axis=(0, 2))
    return float(steps[tile - 1 :: tile].mean() / steps[3::4].mean())


def _pixels(folder: Path, name: str) -> np.ndarray:
    with Image.open(folder / PICTURES / f"{name}.png") as picture:
        return np.asarray(picture)


def test_two_concepts_give_a_training_task_with_another_object(tmp_path: Path) -> None:
    runs = [*rival_runs(tmp_path / "a"), *rival_runs(tmp_path / "b", references=3)]
    survey = build(runs, settings(tmp_path))
    assert [task.expected for task in survey.of("reconstruction", "training")] == ["first", "equal", "first"]
    assert {task.concept for task in survey.tasks} > {"mug"}, "two folders of one name are two concepts"
    assert len({task.concept for task in survey.tasks}) == 2
    assert len(survey.runs) == 2


def test_the_order_of_many_runs_does_not_matter_but_for_who_comes_first(tmp_path: Path) -> None:
    a, b = rival_runs(tmp_path / "a"), rival_runs(tmp_path / "b", references=3)
    one = build([a[0], a[1], b[0], b[1]], replace(settings(tmp_path), output_dir=str(tmp_path / "1")))
    two = build([a[0], b[0], a[1], b[1]], replace(settings(tmp_path), output_dir=str(tmp_path / "2")))
    assert one == two


def test_pictures_drawn_another_way_or_by_an_earlier_training_are_no_pair(tmp_path: Path) -> None:
    ours, theirs = rival_runs(tmp_path)
    listed = theirs / GENERATED / LIST
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    rows[0]["guidance_scale"] += 1
    rows[1]["num_inference_steps"] += 1
    rows[2]["result"] = "another training"
    listed.write_text("\n".join(json.dumps(row) for row in rows))
    assert len(build((ours, theirs), settings(tmp_path)).of("customization", "pair")) == 3


@pytest.mark.parametrize("candidate", [0, 1])
def test_a_prompt_that_one_rival_trained_on_asks_about_likeness(tmp_path: Path, candidate: int) -> None:
    said = "a painting in the style of {}"
    runs = [
        drawn_run(tmp_path / kind, seed, learnable_property=kind, scenes=("by night",))
        for seed, kind in enumerate(("object", "style"))
    ]
    for run in runs:
        listed = run / GENERATED / LIST
        listed.write_text(listed.read_text().replace("a photo of <thing> by night", said.format("<thing>")))
    survey = build([runs[candidate], runs[1 - candidate]], settings(tmp_path))
    assert {task.prompt for task in survey.of("reconstruction", "pair")} >= {said}
    assert not survey.of("customization", "pair")


def test_what_cannot_be_compared_is_refused_all_at_once(tmp_path: Path) -> None:
    ours, theirs = rival_runs(tmp_path)
    (theirs / "result.json").unlink()
    bare = drawn_run(tmp_path / "bare", 3, references=0)
    with pytest.raises(RefusedInput) as refused:
        build((ours, theirs, bare), settings(tmp_path))
    assert len(refused.value.problems) == 3
    assert not (tmp_path / "survey").exists()


def test_an_output_folder_in_use_is_kept(tmp_path: Path) -> None:
    folder, _ = small_survey(tmp_path)
    before = (folder / "survey.json").read_bytes()
    with pytest.raises(RefusedInput, match="holds files already"):
        build((tmp_path / "stopped", tmp_path / "full"), settings(tmp_path, seed=5))
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
def test_a_damaged_survey_is_refused(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    folder, _ = small_survey(tmp_path)
    damage(folder)
    with pytest.raises(RefusedInput):
        Survey.open(folder)


def test_missing_pictures_are_drawn_by_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [drawn_run(tmp_path / name, seed, scenes=()) for seed, name in enumerate(("stopped", "full"))]
    (tmp_path / "scenes.txt").write_text("on the moon\n\nby the sea\n")
    asked = []
    personalised = SimpleNamespace(personalised=lambda folder: folder)
    monkeypatch.setitem(sys.modules, "dvar.runs.load_model", personalised)

    def sample(folder: Path, prompts: list[str], seeds: list[int], **_: object) -> list[Image.Image]:
        asked.append((folder.name, list(prompts), list(seeds)))
        return [
            Image.new("RGB", (64, 64), (len(prompt), seed, len(folder.name)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    monkeypatch.setitem(sys.modules, "dvar.diffusion.sampling", SimpleNamespace(sample=sample))
    config = replace(settings(tmp_path), draw=True, scenes=str(tmp_path / "scenes.txt"), pictures_per_prompt=3)
    survey = build(runs, config)
    assert [name for name, _, _ in asked] == ["stopped", "full"]
    assert asked[0][1:] == asked[1][1:]
    # The samples have seeds 0 and 1 of the plain prompt already.
    assert list(zip(*asked[0][1:], strict=True)) == [
        ("a photo of <thing>", 2),
        *((f"a photo of <thing> {scene}", seed) for scene in ("on the moon", "by the sea") for seed in range(3)),
    ]
    assert [len(survey.of(question, "pair")) for question in QUESTIONS] == [3, 6]
    asked.clear()
    build(runs, replace(config, output_dir=str(tmp_path / "second")))
    assert not asked, "what was drawn is there"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_make_survey_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def trains() -> list[str]:
        told = subprocess.run(["make", "-n", "survey"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return re.findall(r"dvar train .* (--\w+)(?: latest)?$", told.replace("\\\n", " "), re.MULTILINE)

    assert trains() == ["--overwrite", "--overwrite"]
    (tmp_path / "runs/survey-full/checkpoint-50").mkdir(parents=True)
    assert sorted(trains()) == ["--overwrite", "--resume_from_checkpoint"]
    for name in ("stopped", "full"):
        (tmp_path / f"runs/survey-{name}").mkdir(exist_ok=True)
        (tmp_path / f"runs/survey-{name}/result.json").touch()
    assert trains() == []


def test_keys_are_the_same_on_every_machine() -> None:
    # The first eight bytes of BLAKE2b-64 of "7\0side\0abc", by the reference implementation in hashlib.
    assert key(7, "side", "abc") == key(7, "side", "abc") != key(7, "sid", "eabc")
    assert 0 <= key(0) < 2**64


def test_controls_are_one_task_in_every_so_many() -> None:
    assert [controls(pairs, 6) for pairs in (0, 1, 5, 10, 40)] == [0, 1, 1, 2, 8]


def test_settings_are_checked() -> None:
    assert survey_problems(SurveyBuildConfig()) == []
    wrong = SurveyBuildConfig(overlap=0, control_every=1, candidate="x", baseline="x")
    assert [said.split()[0] for said in survey_problems(wrong)] == ["overlap", "control_every", "candidate"]


def test_the_command_builds_and_tells_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder) for folder in rival_runs(tmp_path)]
    output = str(tmp_path / "asked")
    assert main(["survey", "build", *runs, "--no-draw", "--output-dir", output, "--candidate", "early"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"compares  textual-inversion, mug: {runs[0]} (early) against {runs[1]} (baseline)"
    assert told[1:3] == ["asks      2 pairs about reconstruction", "asks      6 pairs about customization"]
    assert told[-1] == f"next      dvar survey serve {output}"
    assert Survey.open(output).candidate == "early"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build"], ["a survey compares two runs of one concept, got none: name them"]),
        (["build", "nowhere"], ["a run folder holds config.json, nowhere does not"]),
        (["build", "nowhere", "--overlap", "0"], ["overlap must be at least 1, got 0"]),
        (["build", "nowhere", "--overlp", "0"], ["unknown flag --overlp: the nearest known one is --overlap"]),
        (["serve", "nowhere"], ["a survey's folder holds survey.json, nowhere does not"]),
        (["serve", "nowhere", "--host", "0.0.0.0"], ["public_url is missing", "secret_file is missing"]),
        (["score", "nowhere"], ["a survey's folder holds survey.json, nowhere does not"]),
        (["import", "nowhere", "answers.csv"], ["a survey's folder holds survey.json, nowhere does not"]),
    ],
)
def test_wrong_words_are_refused_in_a_line_each(
    words: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["survey", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(f"dvar: {start}") for line, start in zip(lines, said, strict=True))
    assert not list(tmp_path.iterdir())
