"""All recorded runs in one compact file, so that a stopping rule can be tried without a GPU, and its reader.

    shelf = read_traces("traces.npz")
    for record in shelf:
        steps, losses = record.series("eval")            # [n], [n, samples]
        steps, scores = record.scores("train", "clip_image")
        way = Way("mine", MyRule())                      # any function of a dvar.Trace that returns a Verdict
        print(record.name, ways.read(way, record).stop)

The file is NumPy's own format without pickles: for each run its series, their steps and the scores of every picture,
those of rescored checkpoints too, and one JSON text with what describes them.  Losses on held draws were computed in
float32 and are kept so, bit for bit; all else is rounded to float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dvar.errors import RefusedInput
from dvar.recordings.archive import RecordedRun, RecordingArchive, RescoredRun
from dvar.stopping.trace import Trace

FORMAT = 1
LIMIT = 20_000_000
"""Bytes that the public file may have."""
_INDEX = "index"
_KEPT = ("eval", "stratified", "fresh", "frozen", "unseen", "drift", "train_loss", "grad_norm", "token_norm")


def write_traces(shelf: RecordingArchive, path: str | Path) -> Path:
    """Write every record of a shelf into one file and return its path.

    Raises: RefusedInput when it would be larger than `LIMIT`, naming its size; nothing is then left behind.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    index: dict[str, Any] = {
        "dvar_traces": FORMAT,
        "tuning": list(shelf.tuning),
        "seconds": _units(shelf),
        "records": [],
    }
    for number, record in enumerate(shelf):
        described, held = _packed(record, shelf.rescored.get(record.name))
        index["records"].append(described)
        arrays |= {f"{number}/{name}": values for name, values in held.items()}
    arrays[_INDEX] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    if (size := part.stat().st_size) > LIMIT:
        part.unlink()
        problem = f"the traces must fit in {LIMIT} bytes, got {size}: record sparser series, or fewer runs"
        raise RefusedInput([problem])
    part.replace(path)
    return path


def read_traces(path: str | Path) -> RecordingArchive:
    """Return the records of a file that `write_traces` made.

    Raises: RefusedInput when it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            index = json.loads(held[_INDEX].tobytes())
            read = [_unpacked(number, one, held) for number, one in enumerate(index["records"])]
    except (OSError, ValueError, KeyError) as error:
        raise RefusedInput(
            [f"{path} is no file of traces ({error}): name one that dvar reproduce traces made"]
        ) from error
    return RecordingArchive(
        tuple(record for record, _ in read),
        tuning=tuple(index["tuning"]),
        seconds=index["seconds"],
        rescored={record.name: anew for record, anew in read if anew},
    )


def _packed(record: RecordedRun, anew: RescoredRun | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    held: dict[str, np.ndarray] = {}
    for name in _KEPT:
        if record.has(name):
            steps, values = record.series(name)
            held[f"{name}/steps"], held[name] = steps.astype(np.int32), values.astype(np.float32)
    held["scored"] = record.scored_steps.astype(np.int32)
    held["scoring"] = record.scoring_seconds.astype(np.float32)
    for (part, metric), values in record.pictures.items():
        held[f"scores/{part}/{metric}"] = values.astype(np.float32)
    if anew:
        held["rescored"] = anew.steps.astype(np.int32)
        held |= {f"rescored/{'/'.join(which)}": values.astype(np.float32) for which, values in anew.pictures.items()}
    described = {
        "method": record.method,
        "concept": record.concept,
        "seed": record.seed,
        "config": {
            name: value for name, value in record.config.items() if not str(name).endswith(("_dir", "versions"))
        },
        "header": dict(record.header),
        "trace": record.trace.header,
        "cap": record.cap,
        "names": list(held),
    }
    return described, held


def _unpacked(
    number: int, described: Mapping[str, Any], held: Mapping[str, np.ndarray]
) -> tuple[RecordedRun, RescoredRun | None]:
    arrays = {name: held[f"{number}/{name}"] for name in described["names"]}
    trace = Trace(described["trace"])
    for step, row in _rows(arrays, described["cap"]):
        trace.record(step, row.pop("eval", None), **row)
    record = RecordedRun(
        method=described["method"],
        concept=described["concept"],
        seed=described["seed"],
        config=described["config"],
        trace=trace,
        header=described["header"],
        scored_steps=arrays["scored"].astype(np.int64),
        pictures=_pictures(arrays, "scores"),
        scoring_seconds=arrays["scoring"].astype(np.float64),
    )
    if "rescored" not in arrays:
        return record, None
    return record, RescoredRun(arrays["rescored"].astype(np.int64), _pictures(arrays, "rescored"))


def _pictures(arrays: Mapping[str, np.ndarray], kind: str) -> dict[tuple[str, str], np.ndarray]:
    """The scores of pictures by (part, metric)."""
    found = {tuple(name.split("/")): values for name, values in arrays.items()}
    return {(of[1], of[2]): values.astype(np.float64) for of, values in found.items() if of[0] == kind and of[1:]}


def _rows(arrays: Mapping[str, np.ndarray], cap: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a trace, step by step, from its series."""
    rows: dict[int, dict[str, Any]] = {cap: {}}
    for name in _KEPT:
        if name not in arrays:
            continue
        single = arrays[name].shape[1] == 1 and name != "eval"
        values = arrays[name][:, 0] if single else arrays[name]
        for step, value in zip(arrays[f"{name}/steps"].tolist(), values.astype(np.float64), strict=True):
            rows.setdefault(step, {})[name] = float(value) if single else value
    yield from sorted(rows.items())


def _units(shelf: RecordingArchive) -> dict[str, dict[str, float]]:
    return {method: shelf.units(method) for method in sorted({record.method for record in shelf})}
