"""Settings of `dvar reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dvar.config.fields import Config, setting
from dvar.config.training import BUNDLED_MODEL

SMALL = "quick"
"""Folder of small recorded runs, inside that of whole ones."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(Config):
    """Every setting of ``dvar reproduce``."""

    names: tuple[str, ...] = setting(("all",), "Which experiments, or all.")
    records: tuple[str, ...] = setting(
        ("records",),
        "Folder of recorded runs, a file of traces, or a folder of such files; may be repeated. A run that is in "
        "several is read from the first.",
        section="Records and report",
    )
    output_dir: str = setting("runs/laboratory", "Folder for data, figures and report.html.")
    quick: bool = setting(
        False, "Make a small report soon: record only what is needed where there are no recorded runs, and train less."
    )
    model: str = setting(BUNDLED_MODEL, "Base model of the runs that an experiment trains itself.")
    ray: str | None = setting(
        None, "Record on a Ray cluster: 'auto' for the one of this machine, or else a new one; or HOST:PORT."
    )
    concepts_dir: str | None = setting(None, "Folder of concepts for those runs; the bundled concepts by default.")

    @property
    def records_folder(self) -> Path | None:
        """Return the folder that runs are recorded in: the first of ``records`` that holds no traces, if any."""
        folder = next((Path(named) for named in self.records if not _is_of_traces(Path(named))), None)
        return folder / SMALL if folder and self.quick else folder

    @property
    def sources(self) -> tuple[Path, ...]:
        """Return where recorded runs are read: as named, or with ``quick`` in "quick" where the first holds none."""
        named = tuple(map(Path, self.records))
        recorded = any(_is_of_traces(path) or any(path.glob("*/*/*/config.json")) for path in named)
        return named if recorded or not self.quick else (named[0] / SMALL,)


def _is_of_traces(path: Path) -> bool:
    """Return whether a path is a file of traces, or a folder with such files."""
    return path.is_file() or any(path.glob("*.npz"))
