"""Recorded runs, read back as values: what was measured along a run, and how good its pictures were on the way.

A recorded run is a run folder, ``RECORDS/<method>/<concept>/<seed>/``, that was trained past every way to stop.  Beside
what every run leaves it holds ``scores.json`` and, written last, ``done.json`` with the SHA-256 of both series:

- ``trace.jsonl``: per step ``eval`` (the paper's held draws), ``train_loss``, ``grad_norm`` and ``seconds`` by part; at
  sparser cadences ``stratified``, ``fresh``, ``frozen`` and ``unseen`` (lists, one loss a sample), ``drift`` and
  ``token_norm``.  The header has ``timesteps`` for ``eval`` and ``series``: name -> {"every", "timesteps" where held};
  the timesteps of fresh draws stand beside them in a record, as ``fresh_timesteps``.
- ``scores.json``: {"header": what scored how, "rows": [{"step", "train": {metric: [one per picture]}, "validation":
  the same, "seconds"}]}.
- ``rounds.json``, optional: {"header": {"hashes": those of done.json}, "rows": as in scores.json, each with its
  "round"}: further pictures of the same prompts at every scored step, drawn afterwards, on other seeds.
- ``rescored.json``, optional: {"header": {"hashes": those of done.json, "seeds"}, "rows": as in scores.json, of the
  steps that some way kept, on seeds that chose nothing} (`dvar.recordings.rescore`).
- ``seconds.json``, in RECORDS itself and optional: method -> {unit: median seconds on an idle machine}; units as in
  `RecordedRun.seconds`, and ``start_up``, all before the first step.  A sweep measures them before its first run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput, TraceError
from dvar.mini import TUNING
from dvar.stopping.trace import Trace

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
Part = Literal["train", "validation"]
SECONDS, SCORES, DONE = "seconds.json", "scores.json", "done.json"
ROUNDS, RESCORED = "rounds.json", "rescored.json"
HELD = "eval"
PAIRED = "paired"
"""The series ``fresh`` minus ``frozen``: the same draws seen by both models."""


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """One recorded run.

    ``header`` says how its pictures were scored: pairing, judges, prompts, seeds, sampling steps, guidance, references.
    ``pictures`` maps (part, metric) to the score of each picture, [scored steps, pictures], round by round.
    """

    method: str
    concept: str
    seed: int
    config: Mapping[str, Any]
    trace: Trace
    header: Mapping[str, Any]
    scored_steps: Steps
    pictures: Mapping[tuple[str, str], Floats]
    scoring_seconds: Floats
    folder: Path | None = None
    threads: int = 1

    @classmethod
    def open(cls, folder: str | Path) -> RecordedRun:
        """Return the recorded run in a folder named ``<method>/<concept>/<seed>``.

        Raises: RefusedInput when it is unfinished or damaged, all that is wrong at once; TraceError when its trace is.
        """
        folder = Path(folder)
        method, concept, seed = folder.parts[-3:]
        done = _json(folder / DONE)
        hashes = done.get("hashes", {})
        problems = [
            f"{folder / name} is not what was recorded (its SHA-256 differs from done.json): record the run again"
            for name in ("trace.jsonl", SCORES)
            if hashes.get(name) != digest(folder / name)
        ]
        if problems:
            raise RefusedInput(problems)
        scores = _json(folder / SCORES)
        header, rows = _with_rounds(scores["header"], scores["rows"], rounds(folder))
        return cls(
            method=method,
            concept=concept,
            seed=int(seed),
            config=_json(folder / "config.json"),
            trace=Trace.read(folder / "trace.jsonl"),
            header=header,
            scored_steps=np.array([row["step"] for row in rows], np.int64),
            pictures=_pictures(rows),
            scoring_seconds=np.array([row["seconds"] for row in rows], np.float64),
            folder=folder,
            threads=int(done.get("threads", 1)),
        )

    @property
    def cap(self) -> int:
        """The last recorded step: a way that would go further is censored here."""
        return self.trace.last_step

    @property
    def name(self) -> str:
        """Method, concept and seed in one word."""
        return f"{self.method}/{self.concept}/{self.seed}"

    @property
    def count(self) -> int:
        """Pictures of each kind at a scored step."""
        return _count(self.pictures)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What was scored on both kinds of pictures, sorted."""
        of = {part: {metric for there, metric in self.pictures if there == part} for part in ("train", "validation")}
        return tuple(sorted(of["train"] & of["validation"]))

    def scores(self, part: Part, metric: str) -> tuple[Steps, Floats]:
        """Steps [n] and scores [n, pictures] of the training or the validation pictures.

        Raises: RefusedInput naming what was scored when this was not.
        """
        if (part, metric) not in self.pictures:
            known = ", ".join(f"{there} {name}" for there, name in sorted(self.pictures))
            raise RefusedInput([f"{self.name} has no score {part} {metric}: it has {known}"])
        return self.scored_steps, self.pictures[part, metric]

    def series(self, name: str) -> tuple[Steps, Floats]:
        """Steps [n] and values [n, samples] of a series of the trace; a plain number counts as one sample.

        ``paired`` is ``fresh`` minus ``frozen``.

        Raises: RefusedInput naming what was recorded when this was not.
        """
        if name == PAIRED:
            (steps, fresh), (_, frozen) = self.series("fresh"), self.series("frozen")
            return steps, fresh - frozen
        if name not in self._series:
            known = ", ".join(sorted(self._series))
            raise RefusedInput([f"{self.name} has no series {name!r}: it has {known}"])
        return self._series[name]

    def has(self, name: str) -> bool:
        """Whether `series` would return this one."""
        return {"fresh", "frozen"} <= set(self._series) if name == PAIRED else name in self._series

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds of each unit of work in this run, by name.

        ``train``: one update; ``forward``: one held sample through the probe; ``picture``: one scored picture.
        """
        units = {"train": self._median("train")}
        probed = self._median("eval") or self._median("probe")
        if self.has(HELD):
            units["forward"] = probed / max(self.series(HELD)[1].shape[1], 1)
        drawn = sum(values.shape[1] for (_, metric), values in self.pictures.items() if metric == self._counted)
        if drawn and len(self.scoring_seconds):
            units["picture"] = float(np.median(self.scoring_seconds)) / drawn
        return {unit: value for unit, value in units.items() if value > 0}

    @property
    def _counted(self) -> str:
        """A metric that every picture has: each counts once."""
        return next(iter(sorted({metric for _, metric in self.pictures})), "")

    def _median(self, part: str) -> float:
        values = self.trace.metric(f"seconds.{part}")[1]
        values = values[values > 0]
        return float(np.median(values)) if len(values) else 0.0

    @cached_property
    def _series(self) -> dict[str, tuple[Steps, Floats]]:
        found: dict[str, tuple[list[int], list[Any]]] = {}
        for row in self.trace.records:
            for name, value in row.items():
                if name == "step" or isinstance(value, Mapping):
                    continue
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value if isinstance(value, Sequence) else [value])
        return {
            name: (np.array(steps, np.int64), np.array(values, np.float64)) for name, (steps, values) in found.items()
        }


@dataclass(frozen=True, eq=False)
class RescoredRun:
    """Some steps of a record drawn and scored anew, on seeds that chose nothing: as `RecordedRun.pictures`."""

    steps: Steps
    pictures: Mapping[tuple[str, str], Floats]

    @classmethod
    def open(cls, folder: Path) -> RescoredRun | None:
        """Return what a recorded run's folder holds of it; None where that is nothing, damaged, or of another run."""
        try:
            found = _json(folder / RESCORED)
            if found["header"]["hashes"] != _json(folder / DONE)["hashes"]:
                return None
            rows = sorted(found["rows"], key=lambda row: row["step"])
            return cls(np.array([row["step"] for row in rows], np.int64), _pictures(rows))
        except (RefusedInput, KeyError, TypeError, ValueError):
            return None

    @property
    def count(self) -> int:
        """Pictures of each kind at a step."""
        return _count(self.pictures)

    def mean(self, step: int, part: str, metric: str) -> float:
        """The mean over the pictures of a step that is there; nan where that score is not."""
        values = self.pictures.get((part, metric))
        return float("nan") if values is None else float(values[self.steps == step].mean())


@dataclass(frozen=True, eq=False)
class RecordingArchive:
    """All recorded runs of a folder: those that can be read, and for each other one the reason why not.

    ``tuning`` names the concepts that settings are chosen on, and that no table counts.  ``seconds`` are unit seconds
    by method, measured apart; ``rescored`` what was scored anew, by `RecordedRun.name`.
    """

    records: tuple[RecordedRun, ...]
    lost: Mapping[str, str] = field(default_factory=dict)
    tuning: tuple[str, ...] = TUNING
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rescored: Mapping[str, RescoredRun] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | Path, tuning: tuple[str, ...] = TUNING) -> RecordingArchive:
        """Return what stands in ``root``; a run that cannot be read is named among `lost` with its reason.

        Raises: RefusedInput when no run can be read at all.
        """
        root = Path(root)
        records, lost = [], {}
        for folder in sorted(path.parent for path in root.glob("*/*/*/config.json")):
            name = "/".join(folder.parts[-3:])
            try:
                records.append(RecordedRun.open(folder))
            except (RefusedInput, TraceError) as error:
                lost[name] = _reason(folder) or str(error).splitlines()[0].removeprefix(f"{folder}/")
        if not records:
            raise RefusedInput(
                [
                    f"there are no recorded runs in {root}, <method>/<concept>/<seed>/done.json each: "
                    "record some, or name another --records"
                ]
            )
        seconds = root / SECONDS
        units = _json(seconds) if seconds.exists() else {}
        return cls(tuple(records), lost, tuning, units, rescored(records))

    @classmethod
    def joined(cls, shelves: Sequence[RecordingArchive]) -> RecordingArchive:
        """Return one shelf with the runs of all; what several have, a run or a method's seconds, is the first's."""
        first = {record.name: (record, shelf) for shelf in reversed(shelves) for record in shelf}
        return cls(
            records=tuple(first[name][0] for name in sorted(first)),
            lost={name: why for shelf in shelves for name, why in shelf.lost.items() if name not in first},
            tuning=tuple(dict.fromkeys(name for shelf in shelves for name in shelf.tuning)),
            seconds={method: of for shelf in reversed(shelves) for method, of in shelf.seconds.items()},
            rescored={name: of.rescored[name] for name, (_, of) in sorted(first.items()) if name in of.rescored},
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have a record outside the tuning concepts, in the paper's order."""
        order = ("textual-inversion", "dreambooth-lora", "custom-diffusion")
        there = {record.method for record in self.records if record.concept not in self.tuning}
        return tuple(method for method in order if method in there) + tuple(sorted(there.difference(order)))

    def of(self, method: str) -> tuple[RecordedRun, ...]:
        """The records of a method that tables count."""
        return tuple(r for r in self.records if r.method == method and r.concept not in self.tuning)

    def for_tuning(self, method: str) -> tuple[RecordedRun, ...]:
        """The records of a method that settings are chosen on."""
        return tuple(r for r in self.records if r.method == method and r.concept in self.tuning)

    def examples(self, method: str, count: int) -> tuple[RecordedRun, ...]:
        """The first `count` concepts of a method by name, one record each, so that none is picked for its looks.

        Raises: RefusedInput when the method has no record.
        """
        first = {record.concept: record for record in reversed(self.of(method))}
        if not first:
            raise RefusedInput([f"there is no record of {method}: record one, or name another --records"])
        return tuple(first[name] for name in sorted(first))[:count]

    def units(self, method: str) -> dict[str, float]:
        """Seconds of each unit of work of a method: those measured apart, else the medians over its records."""
        of = [record.seconds for record in self.records if record.method == method]
        names = {name for units in of for name in units}
        medians = {name: float(np.median([units[name] for units in of if name in units])) for name in sorted(names)}
        return medians | dict(self.seconds.get(method, {}))

    def __iter__(self) -> Iterator[RecordedRun]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def rescored(records: Iterable[RecordedRun]) -> dict[str, RescoredRun]:
    """Return by name what the folders of these records hold that was scored anew."""
    found = {record.name: RescoredRun.open(record.folder) for record in records if record.folder}
    return {name: one for name, one in found.items() if one}


def rounds(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return by step and round what a recorded run's folder holds of further pictures; nothing where that is damaged,
    or of another run.
    """
    try:
        found = _json(folder / ROUNDS)
        if found["header"]["hashes"] != _json(folder / DONE)["hashes"]:
            return {}
        return {(row["step"], row["round"]): row for row in found["rows"]}
    except (RefusedInput, KeyError, TypeError):
        return {}


def digest(path: Path) -> str:
    """The SHA-256 of a file as done.json holds it; empty for a file that is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _count(pictures: Mapping[tuple[str, str], Floats]) -> int:
    return min((values.shape[1] for values in pictures.values()), default=0)


def _with_rounds(
    header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], more: Mapping[tuple[int, int], Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the rows, from the first step to the last, with the pictures of every round that no step lacks."""
    rows, count = sorted(rows, key=lambda row: row["step"]), 1
    while rows and all((row["step"], count) in more for row in rows):
        count += 1
    found = []
    for row in rows:
        of = [row, *(more[row["step"], number] for number in range(1, count))]
        merged: dict[str, Any] = {"step": row["step"], "seconds": sum(one["seconds"] for one in of)}
        for part in ("train", "validation"):
            known = [name for name in row.get(part, ()) if all(name in one[part] for one in of)]
            merged[part] = {name: [value for one in of for value in one[part][name]] for name in known}
        found.append(merged)
    listed = {name: list(value) * count for name, value in header.items() if name.endswith(("_prompts", "_texts"))}
    if seeds := header.get("seeds"):
        listed["seeds"] = [number * len(seeds) + seed for number in range(count) for seed in seeds]
    return {**header, **listed}, found


def _pictures(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Floats]:
    """Scores by part and metric; a metric that some row lacks is left out, since its curve would have holes."""
    kinds = [{(part, metric) for part in ("train", "validation") for metric in row.get(part, ())} for row in rows]
    whole = sorted(set.intersection(*kinds)) if kinds else []
    return {(part, metric): np.array([row[part][metric] for row in rows], np.float64) for part, metric in whole}


def _reason(folder: Path) -> str:
    """What the recorder said of a run that failed."""
    failed = folder / "failed.json"
    return str(_json(failed).get("reason", "")) if failed.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RefusedInput([f"{path} is missing: the run was not recorded to its end, record it again"]) from error
    except ValueError as error:
        raise RefusedInput([f"{path} must be JSON, and is not ({error}): record the run again"]) from error
