"""Runs that are recorded elsewhere, on another machine or earlier, and that a sweep leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dvar.errors import RefusedInput, name_some
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import open_records
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.setting import LOCATIONS, MONITORING
from dvar.recordings.spec import RecordingSpec
from dvar.training.personalise import load_base_model


def find_recorded(specs: Sequence[RecordingSpec], sources: Iterable[str]) -> dict[str, RecordedRun]:
    """Return the recordings among ``specs`` that are somewhere else, by `RecordingSpec.name_in_records`.

    Args:
        sources: Folders of recorded runs or files of traces, as `open_records` reads them.

    Raises:
        RefusedInput: A source cannot be read, or has one of these runs under other settings, by another protocol, or on
            other weights. Such runs could not be used together.
    """
    sources = list(sources)
    runs = {run.name: run for run in RecordingArchive.join([open_records(source) for source in sources])}
    same = [spec for spec in specs if spec.name_in_records in runs]
    by_model = {spec.model: spec for spec in same}
    digests = {model: load_base_model(spec.config).digest for model, spec in by_model.items()}
    others: dict[str, list[str]] = {}
    for spec in same:
        for difference in _list_differences(spec, runs[spec.name_in_records], digests):
            others.setdefault(difference, []).append(spec.name_in_records)
    if others:
        remedy = "name other records, or record these too"
        raise RefusedInput(
            f"{' and '.join(sources)} must hold the same recordings, got another {difference} in {name_some(names)}: "
            f"{remedy}"
            for difference, names in others.items()
        )
    return {spec.name_in_records: runs[spec.name_in_records] for spec in same}


def _list_differences(spec: RecordingSpec, run: RecordedRun, digests: Mapping[str, str]) -> list[str]:
    """Return what of a recorded run is not as it would be recorded."""
    protocol = {"name": spec.protocol, "version": PROTOCOLS[spec.protocol].version}
    settings = {
        name: (run.config.get(name, value), value)
        for name, value in spec.config.to_dict().items()
        if name not in LOCATIONS + MONITORING
    }
    compared = {
        **settings,
        "protocol": (run.header.get("protocol"), protocol),
        "base model": (run.header.get("base"), digests[spec.model]),
        "pairing of images": (run.header.get("pairing"), spec.pairing),
    }
    return [name for name, (recorded, expected) in compared.items() if recorded != expected]
