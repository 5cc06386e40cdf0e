"""Recorded runs, read back as values."""

# A recorded run is a run folder, RECORDS/<method>/<concept>/<seed>/, that was trained past every stop; with settings
# that are not the preset's it is <seed>,<setting>=<value>/ (`dvar.recordings.setting`).  Beside what every run writes
# it holds scores.json and, written last, done.json with the SHA-256 of both series:
#
# - trace.jsonl: for each step "eval" (the held batch of the paper), "train_loss", "grad_norm" and "seconds" by part; at
#   sparser cadences "stratified", "fresh", "frozen" and "unseen" (lists, one loss for each sample), "drift",
#   "stable_rank" and "token_norm"; at scored steps "images" (`dvar.recordings.image_change`).  The header has
#   "timesteps" for "eval" and "series": name -> {"every", "timesteps" of a held batch}; the timesteps of fresh draws
#   are in the same step record, as "fresh_timesteps".
# - scores.json: {"header": what scored how, and the "setting", "protocol" and "base" model of the run, "rows":
#   [{"step", "train": {metric: [one for each image]}, "validation": the same, "seconds"}]}.
# - rounds.json, optional: {"header": {"hashes": those of done.json}, "rows": as in scores.json, each with its "round"}:
#   further images of the same prompts at every scored step, generated afterwards from other seeds.
# - rescored.json, optional: {"header": {"hashes": those of done.json, "seeds"}, "rows": as in scores.json, of the steps
#   that some strategy keeps, from seeds that no strategy has seen} (`dvar.recordings.rescore`).
# - seconds.json, in RECORDS itself and optional: method -> {unit: median seconds on an idle machine}; units as in
#   `RecordedRun.unit_seconds`, and "start_up", everything before the first step with
#   `START_UP_CLASS_IMAGES`.  A sweep measures them first.

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.files import read_content, read_json
from dvar.recordings.setting import Setting, split_folder_name
from dvar.stopping.trace import LOSS, RELATIVE_LOSS, Trace
from dvar.training.run_layout import CONFIG, TRACE

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
Part = Literal["train", "validation"]
DONE_SCHEMA = {"hashes?": {str: str}, "threads?": int}
ImageScores = Mapping[tuple[str, str], Floats]
"""(part, metric) to the score of each image, [steps, images]."""

Half = Literal[0, 1]
CHOOSE: Half = 0
REPORT: Half = 1
"""Images are numbered so that even and odd ones are halves with the same prompts and different seeds.  What chooses a
step by its images looks at `CHOOSE`; results are reported on `REPORT`, so no strategy gains from its luck."""

SCORE = "clip_image"
"""The score of training images that quality is made of: Train CLIP image, as in the paper."""
IMAGES = 8
"""Images of a sample by which CLIP-s and Baseline decide.  Source: Section 4.2."""
SECONDS, SCORES, DONE, FAILED = "seconds.json", "scores.json", "done.json", "failed.json"
ROUNDS, RESCORED = "rounds.json", "rescored.json"
PAIRED = "paired"
"""The series ``fresh`` minus ``frozen``: the same draws seen by both models."""
MEAN_SERIES = ("stratified", PAIRED, "unseen")
"""Series that a rule may read by their means, beside ``eval``."""


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A finished recording, read back.

    Attributes:
        header: How the images were scored: pairing, judges, prompts, seeds, sampling steps, guidance, references; and
            under which "setting", by which "protocol" and on which "base" model the run was recorded.
        scored_steps: The steps whose images were scored, [n].
        image_scores: The scores of these images, round by round.
        scoring_seconds: Seconds that generating the images of a scored step took, [n].
        folder: Where the run is; None for a run from an archive file.
        threads: CPU threads that it was computed with.
        variant: What its name has after the seed; empty under the preset's settings.
    """

    method: str
    concept: str
    seed: int
    config: Mapping[str, Any]
    trace: Trace
    header: Mapping[str, Any]
    scored_steps: Steps
    image_scores: ImageScores
    scoring_seconds: Floats
    folder: Path | None = None
    threads: int = 1
    variant: str = ""

    @classmethod
    def open(cls, folder: str | Path) -> RecordedRun:
        """Return the recorded run in a folder named ``<method>/<concept>/<seed>``, or ``<seed>,<setting>=<value>``.

        Raises:
            RefusedInput: The recording is unfinished or damaged; every problem is named.
            TraceError: Its trace is damaged.
        """
        folder = Path(folder)
        method, concept, name = folder.parts[-3:]
        done = read_recorded_json(folder / DONE, DONE_SCHEMA)
        hashes = done.get("hashes", {})
        problems = [
            f"{folder / name} is not what was recorded (its SHA-256 differs from done.json): record the run again"
            for name in (TRACE, SCORES)
            if hashes.get(name) != file_digest(folder / name)
        ]
        if problems:
            raise RefusedInput(problems)
        try:
            seed, variant = split_folder_name(name)
        except ValueError as error:
            raise RefusedInput([f"{folder} must be named by a seed, such as 0, got {name!r}: rename it"]) from error
        scores = read_recorded_json(folder / SCORES)
        header, rows = _merge_rounds(scores["header"], scores["rows"], read_rounds(folder))
        return cls(
            method=method,
            concept=concept,
            seed=seed,
            config=read_recorded_json(folder / CONFIG),
            trace=Trace.read(folder / TRACE),
            header=header,
            scored_steps=np.array([row["step"] for row in rows], np.int64),
            image_scores=_image_scores(rows),
            scoring_seconds=np.array([row["seconds"] for row in rows], np.float64),
            folder=folder,
            threads=int(done.get("threads", 1)),
            variant=variant,
        )

    @property
    def cap(self) -> int:
        """The last recorded step: a strategy that would train on is censored here."""
        return self.trace.last_step

    @property
    def name(self) -> str:
        """Method, concept and seed in one word, with the settings that are not the preset's."""
        return f"{self.method}/{self.concept}/{self.seed}{self.variant}"

    @property
    def setting(self) -> Setting:
        """The settings that differ from the preset's, by name; empty for a run from before headers said so."""
        setting: Setting = self.header.get("setting", {})
        return setting

    @property
    def image_count(self) -> int:
        """Images of each part at a scored step."""
        return _count_images(self.image_scores)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of both training and validation images, sorted."""
        metrics: dict[str, set[str]] = {"train": set(), "validation": set()}
        for part, metric in self.image_scores:
            metrics[part].add(metric)
        return tuple(sorted(metrics["train"] & metrics["validation"]))

    def scores(self, part: Part, metric: str, half: Half | None = None) -> tuple[Steps, Floats]:
        """Return the scores of training or validation images.

        Args:
            half: The half of the images to return; by default all of them. A single image counts for both halves.

        Returns:
            Steps [n] and scores [n, images].

        Raises:
            RefusedInput: The images were not scored by this metric; the message names those there are.
        """
        if (part, metric) not in self.image_scores:
            available = ", ".join(f"{part} {metric}" for part, metric in sorted(self.image_scores))
            raise RefusedInput([f"{self.name} has no score {part} {metric}: it has {available}"])
        values = self.image_scores[part, metric]
        if half is not None and values.shape[1] > 1:
            values = values[:, half::2]
        return self.scored_steps, values

    def series(self, name: str) -> tuple[Steps, Floats]:
        """Return a series of the trace, or ``paired``, which is ``fresh`` minus ``frozen``.

        Returns:
            Steps [n] and values [n, samples]; a plain number counts as one sample.

        Raises:
            RefusedInput: The series was not recorded; the message names those there are.
        """
        if name == PAIRED:
            (steps, fresh), (_, frozen) = self.series("fresh"), self.series("frozen")
            return steps, fresh - frozen
        if name not in self._series:
            raise RefusedInput([f"{self.name} has no series {name!r}: it has {', '.join(sorted(self._series))}"])
        return self._series[name]

    def has_series(self, name: str) -> bool:
        """Return whether `series` knows this name."""
        return {"fresh", "frozen"} <= set(self._series) if name == PAIRED else name in self._series

    def count_samples(self, name: str, last_step: int) -> int:
        """Return the samples of a series up to ``last_step``; of ``paired``, those through both models."""
        if name == PAIRED:
            return self.count_samples("fresh", last_step) + self.count_samples("frozen", last_step)
        steps, values = self.series(name)
        return int((steps <= last_step).sum()) * int(values.shape[1])

    @property
    def sample_size(self) -> int:
        """Images of a sample by which a strategy decides: `IMAGES`, or the half that chooses where it is smaller."""
        return min(IMAGES, int(self.scores("train", SCORE, CHOOSE)[1].shape[1]))

    def sample_scores(self, every: int) -> tuple[Steps, Floats]:
        """Return what a strategy sees that generates `IMAGES` images every ``every`` steps, or as nearly as scored.

        Returns:
            Steps [n] and, for each, the mean `SCORE` of `sample_size` images of the half that chooses [n].
        """
        steps, values = self.scores("train", SCORE, CHOOSE)
        indices, due = [], 0
        for index, step in enumerate(steps):
            if step >= due:
                indices.append(index)
                due = (int(step) // every + 1) * every
        return steps[indices], values[indices, :IMAGES].mean(axis=1)

    def replay(self, metrics: Set[str], every: int | None = None) -> Iterator[Trace]:
        """Yield one trace that grows as it did in training, the same object each time.

        Args:
            metrics: What rules read: `LOSS`, `RELATIVE_LOSS`, `MEAN_SERIES` and `SCORE`. The trace holds no other.
            every: Steps between two samples of images, as for `sample_scores`; None for no `SCORE`.
        """
        values: dict[str, dict[int, float]] = {}
        for name in sorted(metrics & set(MEAN_SERIES)):
            steps, samples = self.series(name)
            values[name] = dict(zip(steps.tolist(), samples.mean(axis=1).tolist(), strict=True))
        if every and SCORE in metrics:
            steps, scores = self.sample_scores(every)
            values[SCORE] = dict(zip(steps.tolist(), scores.tolist(), strict=True))
        losses: dict[int, list[float]] = {}
        if metrics & {LOSS, RELATIVE_LOSS} and self.has_series(LOSS):
            losses = dict(zip(*(array.tolist() for array in self.series(LOSS)), strict=True))
        trace = Trace({"timesteps": self.trace.header.get("timesteps")})
        for row in self.trace.records:
            step = row["step"]
            trace.record(step, losses.get(step), **{name: of.get(step) for name, of in values.items()})
            yield trace

    @property
    def unit_seconds(self) -> dict[str, float]:
        """Median seconds of each unit of work in this run.

        "train" is one update, "forward" one held sample through the probe, "picture" one scored image.
        """
        units = {"train": self._median_seconds("train")}
        probe = self._median_seconds("eval") or self._median_seconds("probe")
        if self.has_series(LOSS):
            units["forward"] = probe / max(self.series(LOSS)[1].shape[1], 1)
        metric = next(iter(sorted({metric for _, metric in self.image_scores})), "")  # every image has it once
        images = sum(values.shape[1] for (_, name), values in self.image_scores.items() if name == metric)
        if images and len(self.scoring_seconds):
            units["picture"] = float(np.median(self.scoring_seconds)) / images
        return {unit: seconds for unit, seconds in units.items() if seconds > 0}

    def _median_seconds(self, part: str) -> float:
        seconds = self.trace.metric(f"seconds.{part}")[1]
        seconds = seconds[seconds > 0]
        return float(np.median(seconds)) if len(seconds) else 0.0

    @cached_property
    def _series(self) -> dict[str, tuple[Steps, Floats]]:
        lists: dict[str, tuple[list[int], list[Any]]] = {}
        for row in self.trace.records:
            for name, value in row.items():
                if name == "step" or isinstance(value, Mapping):
                    continue
                steps, values = lists.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value if isinstance(value, Sequence) else [value])
        return {
            name: (np.array(steps, np.int64), np.array(values, np.float64)) for name, (steps, values) in lists.items()
        }


@dataclass(frozen=True, eq=False)
class RescoredRun:
    """Steps of a recorded run whose images were generated and scored again, from seeds that no strategy has seen."""

    steps: Steps
    image_scores: ImageScores

    @classmethod
    def open(cls, folder: Path) -> RescoredRun | None:
        """Return the rescored steps in a recorded run's folder; None if there are none, or none of this very run."""
        try:
            content = read_recorded_json(folder / RESCORED)
            if content["header"]["hashes"] != read_recorded_json(folder / DONE)["hashes"]:
                return None
            rows = sorted(content["rows"], key=lambda row: row["step"])
            return cls(np.array([row["step"] for row in rows], np.int64), _image_scores(rows))
        except (RefusedInput, KeyError, TypeError, ValueError):
            return None

    @property
    def image_count(self) -> int:
        """Images of each part at a step."""
        return _count_images(self.image_scores)

    def mean(self, step: int, part: str, metric: str) -> float:
        """Return the mean score of a rescored step; nan if its images were not scored by this metric."""
        values = self.image_scores.get((part, metric))
        return float("nan") if values is None else float(values[self.steps == step].mean())


def read_rounds(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the further rounds of images in a recorded run's folder, by step and round.

    Returns:
        An empty dict where rounds.json is missing or damaged, or belongs to another run.
    """
    try:
        content = read_recorded_json(folder / ROUNDS)
        if content["header"]["hashes"] != read_recorded_json(folder / DONE)["hashes"]:
            return {}
        return {(row["step"], row["round"]): row for row in content["rows"]}
    except (RefusedInput, KeyError, TypeError):
        return {}


def read_failure(folder: Path) -> str:
    """Return why the recording in a folder failed; empty if it did not."""
    path = folder / FAILED
    return str(read_recorded_json(path).get("reason", "")) if path.exists() else ""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as done.json holds it; empty if there is no such file."""
    return hashlib.sha256(read_content(path)).hexdigest() if path.exists() else ""


def _count_images(scores: ImageScores) -> int:
    return min((values.shape[1] for values in scores.values()), default=0)


def _merge_rounds(
    header: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    rounds: Mapping[tuple[int, int], Mapping[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the rows in order of steps, with the images of each round that every step has."""
    rows, count = sorted(rows, key=lambda row: row["step"]), 1
    while rows and all((row["step"], count) in rounds for row in rows):
        count += 1
    merged = []
    for row in rows:
        parts = [row, *(rounds[row["step"], number] for number in range(1, count))]
        merged_row: dict[str, Any] = {"step": row["step"], "seconds": sum(part["seconds"] for part in parts)}
        for kind in ("train", "validation"):
            metrics = [name for name in row.get(kind, ()) if all(name in part[kind] for part in parts)]
            merged_row[kind] = {name: [value for part in parts for value in part[kind][name]] for name in metrics}
        merged.append(merged_row)
    prompts = {name: list(value) * count for name, value in header.items() if name.endswith(("_prompts", "_texts"))}
    if seeds := header.get("seeds"):
        prompts["seeds"] = [number * len(seeds) + seed for number in range(count) for seed in seeds]
    return {**header, **prompts}, merged


def _image_scores(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Floats]:
    """Return the scores by part and metric; a metric that some row lacks is left out, as its curve would have gaps."""
    metrics = [{(part, metric) for part in ("train", "validation") for metric in row.get(part, ())} for row in rows]
    common = sorted(set.intersection(*metrics)) if metrics else []
    return {(part, metric): np.array([row[part][metric] for row in rows], np.float64) for part, metric in common}


def read_recorded_json(path: Path, schema: Any = dict) -> dict[str, Any]:
    """Return what a JSON file of a recording holds.

    Args:
        path: The file.
        schema: What the content must look like, as for `dvar.files.read_json`.

    Raises:
        RefusedInput: The file is missing or damaged.
    """
    try:
        content: dict[str, Any] = read_json(path, schema)
        return content
    except OSError as error:
        raise RefusedInput([f"{path} is missing: the run was not recorded to its end, record it again"]) from error
    except ValueError as error:
        raise RefusedInput([f"{path} must be JSON, and is not ({error}): record the run again"]) from error
