"""Settings of `dvar batch`, with their help, ranges and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvar.config.fields import NOT_NEGATIVE, POSITIVE, Config, Range, invalid_fields, setting
from dvar.config.methods import TextualInversionConfig

Checkpoints = Literal["none", "last", "all"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Config):
    """Every setting of ``dvar batch``."""

    method: str = setting(TextualInversionConfig.method, "Method of the jobs that name none.", section="Jobs")
    config: str | None = setting(None, "TOML file of settings for all jobs; those of the jobs themselves come first.")
    output_dir: str = setting(
        "runs/batch",
        "Folder of all runs, each in one named after its job; also a URL of fsspec, such as s3://BUCKET/A.",
    )
    checkpoints: Checkpoints = setting(
        "none", "Checkpoints that a finished run leaves; only 'all' keeps more than the last one while it trains."
    )

    workers: int | None = setting(
        None,
        "Workers at once; by default one for each GPU, or else for each core.",
        Range(1, most=1024),
        section="Where",
    )
    pack: int = setting(
        1, "Runs that each worker trains at once, in one forward pass of a frozen base model.", Range(1, most=1024)
    )
    threads: int = setting(1, "CPU threads of each worker.", Range(1, most=1024))
    ray: str | None = setting(
        None, "Run on a Ray cluster: 'auto' for the one of this machine, or else a new one; or HOST:PORT."
    )
    gpus_per_worker: float | None = setting(
        None, "On Ray: GPUs of each worker, or a share of one; by default 1 where the cluster has any.", POSITIVE
    )

    retries: int = setting(2, "How often a job may fail, without getting further, and be tried again.", NOT_NEGATIVE)
    preemptions: int = setting(
        20, "How often a job may lose its worker, without getting further, and be tried again.", NOT_NEGATIVE
    )
    json: bool = setting(False, "Print each event as a line of JSON instead of a table.", section="Progress")


def batch_problems(config: BatchConfig) -> list[str]:
    """Return everything wrong with these settings by themselves, one line each."""
    problems = [message for _, message in invalid_fields(config)]
    if config.gpus_per_worker is not None and config.ray is None:
        problems.append(f"gpus_per_worker is for --ray, got {config.gpus_per_worker:g} without: drop it")
    elif config.gpus_per_worker and config.gpus_per_worker > 1 and config.gpus_per_worker % 1:
        problems.append(f"gpus_per_worker above 1 must be whole, got {config.gpus_per_worker:g}: round it")
    if not config.output_dir.strip():
        problems.append(f"output_dir must name a folder, got {config.output_dir!r}: give one, such as runs/batch")
    return problems
