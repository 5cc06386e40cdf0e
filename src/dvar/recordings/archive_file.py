"""Archives as one compact file, which makes stopping rules testable without a GPU."""

# The file is NumPy's own format without pickles: for each run its series, their steps and the scores of every image,
# those of rescored steps too, and one JSON text that describes them.  Losses on held draws were computed in float32 and
# are stored so, bit for bit; everything else is rounded to 13 bits, and steps are stored as differences: a run of 6,000
# steps then takes three quarters of the space.

from __future__ import annotations

import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput, first_line
from dvar.files import check_regular, parse_json, regular_file, staged_file
from dvar.recordings.archive import RUNS, RecordingArchive
from dvar.recordings.recorded_run import Floats, RecordedRun, RescoredRun
from dvar.schema import find_mismatch
from dvar.stopping.trace import Trace

FORMAT, WITHOUT_ROUNDING = 2, 1
"""The format of files, and the earlier one that is read too: steps as they are, and all numbers in float32."""
MAX_BYTES = 20_000_000
"""Size that the public file may have."""
SUFFIX = ".npz"
MAX_INFLATED = 50 * MAX_BYTES
"""Bytes that the arrays of such a file may have in all."""
_INDEX = "index"
# Bits of an archive that were flipped may ask for another kind of compression, a later version or a password, which
# zipfile refuses as a RuntimeError.
DAMAGE = (OSError, ValueError, KeyError, IndexError, EOFError, RuntimeError, BadZipFile, zlib.error, lzma.LZMAError)
_INDEX_SCHEMA = {
    "dvar_traces": int,
    "tuning": [str],
    "unreadable?": {str: str},
    "seconds": {str: {str: float}},
    "records": [
        {
            **dict.fromkeys(("method", "concept"), str),
            **dict.fromkeys(("seed", "cap"), int),
            **dict.fromkeys(("config", "header", "trace"), dict),
            "variant?": str,
            "names": [str],
        }
    ],
}
_SERIES = (
    "eval",
    "stratified",
    "fresh",
    "frozen",
    "unseen",
    "drift",
    "stable_rank",
    "images",
    "train_loss",
    "grad_norm",
    "token_norm",
)

_EXACT = frozenset(("eval", "stratified", "fresh", "frozen", "unseen"))
"""Series of losses on held draws, whose differences rules judge."""
_DROPPED_BITS = 11
"""Bits of a float32's 23 that are rounded away: a relative error of at most 2^-13, 0.012 %."""

Array = NDArray[Any]


def write_traces(archive: RecordingArchive, path: str | Path) -> Path:
    """Write every run of an archive into one file and return its path.

    Raises:
        RefusedInput: The file would be larger than `MAX_BYTES`; none is left behind.
    """
    path = Path(path)
    arrays: dict[str, Array] = {}
    methods = sorted({run.method for run in archive})
    index: dict[str, Any] = {
        "dvar_traces": FORMAT,
        "tuning": list(archive.tuning_concepts),
        "seconds": {method: archive.unit_seconds(method) for method in methods},
        "records": [],
        "unreadable": dict(archive.unreadable),
    }
    for number, run in enumerate(archive):
        description, run_arrays = _pack(run, archive.rescored.get(run.name))
        index["records"].append(description)
        arrays |= {f"{number}/{name}": values for name, values in run_arrays.items()}
    arrays[_INDEX] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged:
        with staged.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        if (size := staged.stat().st_size) > MAX_BYTES:
            staged.unlink()
            problem = f"the traces must fit in {MAX_BYTES} bytes, got {size}: record sparser series, or fewer runs"
            raise RefusedInput([problem])
    return path


def read_traces(path: str | Path) -> RecordingArchive:
    """Return the archive in a file that `write_traces` wrote.

    Raises:
        RefusedInput: It is not such a file.

    Example:
        >>> archive = read_traces("docs/traces.npz")
        >>> for run in archive:
        ...     steps, losses = run.series("eval")  # [n], [n, samples]
        ...     steps, scores = run.scores("train", "clip_image")  # [n], [n, images]
    """
    try:
        _check_sizes(Path(path))
        with np.load(regular_file(Path(path)), allow_pickle=False) as arrays:
            index = parse_json(arrays[_INDEX].tobytes())
            if mismatch := find_mismatch(index, _INDEX_SCHEMA):
                raise ValueError(mismatch)
            if (version := index["dvar_traces"]) not in (FORMAT, WITHOUT_ROUNDING):
                raise ValueError(f"format {version} is of another version of dvar")
            pairs = [
                _unpack(number, description, arrays, differences=version == FORMAT)
                for number, description in enumerate(index["records"])
            ]
    except DAMAGE as error:
        raise RefusedInput(
            [f"{path} is not a file of traces ({first_line(error)}): name one that dvar reproduce traces wrote"]
        ) from error
    return RecordingArchive(
        runs=tuple(run for run, _ in pairs),
        unreadable=index.get("unreadable", {}),
        tuning_concepts=tuple(index["tuning"]),
        measured_seconds=index["seconds"],
        rescored={run.name: rescored for run, rescored in pairs if rescored},
    )


def open_records(path: str | Path) -> RecordingArchive:
    """Return the archive at a path: a file of traces, or a folder of recorded runs, of such files, or of both.

    A run that is in several is that of the folder, or else of the first file by name.

    Raises:
        RefusedInput: It is none of these, or a file cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return read_traces(path)
    archives = [read_traces(file) for file in sorted(path.glob(f"*{SUFFIX}"))]
    if not archives or any(path.glob(RUNS)):
        archives.insert(0, RecordingArchive.open(path))
    return RecordingArchive.join(archives)


def _check_sizes(path: Path) -> None:
    """Raise a `ValueError` if an array of a file is not as large as it says, or all of them are far too large.

    A few bytes can inflate to any size, and an array's header can ask for any memory.
    """
    check_regular(path)
    with ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_INFLATED:
            raise ValueError(f"its arrays have more than {MAX_INFLATED} bytes")
        for member in members:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                if member.file_size - file.tell() != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{member.filename} has another size than its header says")


def _pack(run: RecordedRun, rescored: RescoredRun | None) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return a run's entry in the index and its arrays by name."""
    arrays: dict[str, Array] = {}
    for name in _SERIES:
        if run.has_series(name):
            steps, values = run.series(name)
            arrays[f"{name}/steps"] = np.diff(steps, prepend=0).astype(np.int32)
            arrays[name] = values.astype(np.float32) if name in _EXACT else _round(values)
    arrays["scored"] = run.scored_steps.astype(np.int32)
    arrays["scoring"] = run.scoring_seconds.astype(np.float32)
    for (part, metric), values in run.image_scores.items():
        arrays[f"scores/{part}/{metric}"] = _round(values)
    if rescored:
        arrays["rescored"] = rescored.steps.astype(np.int32)
        for (part, metric), values in rescored.image_scores.items():
            arrays[f"rescored/{part}/{metric}"] = _round(values)
    description = {
        "method": run.method,
        "concept": run.concept,
        "seed": run.seed,
        "variant": run.variant,
        "config": {name: value for name, value in run.config.items() if not str(name).endswith(("_dir", "versions"))},
        "header": dict(run.header),
        "trace": run.trace.header,
        "cap": run.cap,
        "names": list(arrays),
    }
    return description, arrays


def _round(values: Array) -> Array:
    """Return values as float32 whose last bits are zeros, which take no space in a compressed file."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32).astype(np.uint64) + (1 << _DROPPED_BITS - 1)
    rounded = (bits >> _DROPPED_BITS << _DROPPED_BITS).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(single), rounded, single)


def _unpack(
    number: int, description: Mapping[str, Any], archive_arrays: Mapping[str, Array], *, differences: bool
) -> tuple[RecordedRun, RescoredRun | None]:
    arrays = {name: archive_arrays[f"{number}/{name}"] for name in description["names"]}
    if differences:
        arrays |= {name: values.cumsum() for name, values in arrays.items() if name.endswith("/steps")}
    trace = Trace(description["trace"])
    for step, row in _step_records(arrays, description["cap"]):
        trace.record(step, row.pop("eval", None), **row)
    run = RecordedRun(
        method=description["method"],
        concept=description["concept"],
        seed=description["seed"],
        config=description["config"],
        trace=trace,
        header=description["header"],
        scored_steps=arrays["scored"].astype(np.int64),
        image_scores=_image_scores(arrays, "scores"),
        scoring_seconds=arrays["scoring"].astype(np.float64),
        variant=description.get("variant", ""),
    )
    if "rescored" not in arrays:
        return run, None
    return run, RescoredRun(arrays["rescored"].astype(np.int64), _image_scores(arrays, "rescored"))


def _image_scores(arrays: Mapping[str, Array], kind: str) -> dict[tuple[str, str], Floats]:
    """Return the scores of images by (part, metric), from arrays named kind/part/metric."""
    scores = {}
    for name, values in arrays.items():
        first, *rest = name.split("/")
        if first == kind and rest:
            scores[rest[0], rest[1]] = values.astype(np.float64)
    return scores


def _step_records(arrays: Mapping[str, Array], cap: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each step of a trace with its values, from the arrays of its series."""
    rows: dict[int, dict[str, Any]] = {cap: {}}
    for name in _SERIES:
        if name not in arrays:
            continue
        single = arrays[name].shape[1] == 1 and name != "eval"
        values = arrays[name][:, 0] if single else arrays[name]
        for step, value in zip(arrays[f"{name}/steps"].tolist(), values.astype(np.float64), strict=True):
            rows.setdefault(step, {})[name] = float(value) if single else value
    yield from sorted(rows.items())
