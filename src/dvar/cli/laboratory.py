"""The commands `dvar record` and `dvar reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from dvar.cli.options import FAILED, say, with_flags_of
from dvar.config.fields import read_settings
from dvar.config.training import BUNDLED_MODEL, CONFIGS
from dvar.errors import RefusedInput
from dvar.paper.config import ReproduceConfig, reproduce_problems


@with_flags_of(ReproduceConfig)
def reproduce(names: tuple[str, ...], /, **given: Any) -> int:
    """Make tables and figures of the paper from recorded runs: their data, their pictures and a page.

    Parameters
    ----------
    names
        Which ones, as listed below, or "all" for a report of everything.
    """
    config = ReproduceConfig(names=names, **given)
    if problems := reproduce_problems(config):
        raise RefusedInput(problems)
    from dvar.paper.reproduce import reproduce as make

    print(make(config, say))
    return 0


def record(
    methods: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    /,
    *,
    concepts: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    first: PositiveInt | None = None,
    seeds: Annotated[list[NonNegativeInt], Parameter(consume_multiple=True)] | None = None,
    preset: Literal["quick", "cpu", "full"] = "cpu",
    quick: bool = False,
    records: Path = Path("records"),
    workers: PositiveInt | None = None,
    model: str = BUNDLED_MODEL,
    concepts_dir: Path | None = None,
    clip: str | None = None,
    dino: str | None = None,
    pairing: Literal["all pairs", "row by row"] = "all pairs",
    config: Path | None = None,
    estimate: bool = False,
) -> int:
    """Record runs for the laboratory: train past every stop, and measure on the way.

    What is there and whole is not made again, so the same command goes on after a kill.

    Parameters
    ----------
    methods
        Methods by name; all of them by default.
    concepts
        Concepts by name; all but the tuning ones by default.
    first
        Only so many of the concepts.
    seeds
        Seeds of the runs; 0 by default.
    preset
        How much is measured: quick, cpu or full.
    quick
        The same as --preset quick.
    records
        Folder of all records.
    workers
        Runs at once; one a GPU, or one a core, by default.
    model
        A hub id, a diffusers folder, or "mini", the bundled model.
    concepts_dir
        Folder of concepts, each a folder of pictures with a concept.json that says its class; else the bundled ones.
    clip
        Folder or hub id of the CLIP that scores; the bundled one by default.
    dino
        Folder or hub id of a DINO that scores too.
    pairing
        What a picture is held against: all references, or the one in its row.
    config
        TOML file of settings of the method, where one method is recorded.
    estimate
        Only tell how long it will take.
    """
    from dvar.recordings import sweep
    from dvar.recordings.concepts import laboratory_concepts
    from dvar.recordings.spec import RecordingSpec

    chosen = methods or list(CONFIGS)
    if config and len(chosen) > 1:
        raise RefusedInput(["settings are of one method: name it before --config"])
    given = read_settings(config, CONFIGS[chosen[0]]) if config and chosen[0] in CONFIGS else {}
    folder = str(concepts_dir) if concepts_dir else None
    base = RecordingSpec(
        *("", "", 0, str(records), "quick" if quick else preset, model, folder, clip, dino, pairing),
        settings=tuple(given.items()),
    )
    names = (concepts or laboratory_concepts(folder))[:first]
    runs = sweep.grid(base, chosen, names, seeds or [0])
    rows = sweep.recorded(runs, lambda line: print(line, flush=True), workers=workers, only_estimate=estimate)
    if estimate:
        return 0
    for line in sweep.table(rows):
        print(line)
    return FAILED if any(row.state != "done" for row in rows) else 0
