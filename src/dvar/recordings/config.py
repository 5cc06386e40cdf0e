"""Settings of `dvar record`, with their help, ranges and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvar.config.fields import COUNT, POSITIVE, SEED, Config, Range, invalid_fields, setting
from dvar.config.methods import PAPER_METHODS
from dvar.config.training import BUNDLED_MODEL
from dvar.files import writing_problem

Panel = Literal["shift", "main", "flow", "images", "batch", "rank", "word", "more", "all"]
"""Parts of the panel: learning rates; all methods; the second base model; then one setting each; more concepts."""
_FIXED_BY_PANEL = (
    *("methods", "concepts", "first", "seeds", "model", "concepts_dir", "config"),
    *("preset", "quick", "clip", "dino", "lpips", "pairing"),
)


@dataclass(frozen=True, kw_only=True)
class RecordConfig(Config):
    """Every setting of ``dvar record``; `dvar.recordings.spec.plan_recordings` turns it into recordings."""

    methods: tuple[str, ...] = setting(tuple(PAPER_METHODS), "Methods by name.", section="What is recorded")
    concepts: tuple[str, ...] | None = setting(None, "Concepts by name; by default all but the tuning concepts.")
    first: int | None = setting(None, "Record only the first so many of these concepts.", COUNT)
    seeds: tuple[int, ...] = setting((0,), "Seeds of the runs.")
    model: str = setting(BUNDLED_MODEL, "A hub id, a diffusers folder, or a bundled model: 'mini' or 'mini-flow'.")
    concepts_dir: str | None = setting(
        None, "Folder of concepts, each a folder of images with NAME.json beside it; by default the bundled concepts."
    )
    panel: Panel | None = setting(
        None,
        "Record a part of the panel that compares stopping rules, or 'all' of it; docs/protocol.md describes it.",
    )
    config: str | None = setting(None, "TOML file of settings of the method, where one method is recorded.")

    preset: Literal["quick", "cpu", "panel", "full"] = setting(
        "cpu", "How much is measured.", section="What is measured"
    )
    quick: bool = setting(False, "The same as --preset quick.")
    clip: str | None = setting(None, "Folder or hub id of the CLIP that scores; by default the bundled one.")
    dino: str | None = setting(None, "Folder or hub id of a DINO that scores too.")
    lpips: str | None = setting(None, "File of an LPIPS that measures the diversity of samples.")
    pairing: Literal["all pairs", "row by row"] = setting(
        "all pairs", "Compare an image with all references, or with the one in its row."
    )

    records: str = setting("records", "Folder of all recorded runs.", section="Where and how")
    skip_recorded: tuple[str, ...] | None = setting(
        None,
        "Records elsewhere, as dvar reproduce reads them: a run that is there is not recorded again. May be repeated.",
    )
    workers: int | None = setting(
        None, "Runs at once; by default one for each GPU, or else for each core.", Range(1, most=1024)
    )
    ray: str | None = setting(
        None, "Record on a Ray cluster: 'auto' for the one of this machine, or else a new one; or HOST:PORT."
    )
    gpus_per_worker: float | None = setting(
        None, "On Ray: GPUs of each run, or a share of one; by default 1 where the cluster has any.", POSITIVE
    )
    estimate: bool = setting(False, "Only list what is recorded and what is missing, and estimate how long it takes.")

    @property
    def protocol(self) -> str:
        """The name of the protocol that is recorded."""
        return "quick" if self.quick else self.preset


def record_problems(config: RecordConfig) -> list[str]:
    """Return everything wrong with these settings by themselves, one line each.

    `dvar.recordings.spec.RecordingSpec.validate` looks up methods and concepts.
    """
    problems = [message for _, message in invalid_fields(config)]
    if not problems:
        problems += [f"seeds must be {SEED.requirement(seed)}, got {seed}" for seed in config.seeds if seed not in SEED]
    if config.config and len(config.methods) > 1:
        problems.append(f"settings are of one method, got {', '.join(config.methods)}: name one before --config")
    if not problems and not config.estimate and (problem := writing_problem(config.records, folder=True)):
        problems.append(f"records must be a folder that can be written, and {problem}: name another")
    if config.panel:
        defaults = RecordConfig()
        problems += [
            f"--panel fixes {name}, got {getattr(config, name)!r}: drop it"
            for name in _FIXED_BY_PANEL
            if getattr(config, name) != getattr(defaults, name)
        ]
    return problems
