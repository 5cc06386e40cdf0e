"""All recorded runs as one file of traces."""

from __future__ import annotations

from pathlib import Path

from dvar.paper.result import ExperimentResult
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import write_traces

TRACES = "traces.npz"


def write_traces_file(archive: RecordingArchive, folder: str | Path) -> ExperimentResult:
    """Write the file of traces into ``folder`` and return a description of it."""
    path = write_traces(archive, Path(folder) / TRACES)
    size = path.stat().st_size / 1e6
    description = (
        f"{path.name} ({size:.1f} MB) holds {len(archive)} recorded runs: every series of the loss, sample by sample, "
        "and the scores of every image. dvar.recordings.archive_file.read_traces reads it. "
        f"dvar reproduce rules --records {path.name} ranks the rules of this library on it, and any other rule can be "
        "tried on it: a rule is a function of a trace."
    )
    return ExperimentResult((description,))
