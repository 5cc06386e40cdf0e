"""The command `dvar batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvar.cli.console import FAILED, print_message
from dvar.cli.options import raise_problems, with_flags_of
from dvar.jobs.config import BatchConfig, batch_problems


@with_flags_of(BatchConfig)
def batch(jobs: Path, /, **flags: Any) -> int:
    """Train many concepts, several at once, on this machine or on a Ray cluster.

    Jobs that are done are not trained again, so the same command continues after an interruption. A job that fails
    is tried again from its last checkpoint; the others go on.

    Parameters
    ----------
    jobs
        TOML file with a table [[job]] for each job, CSV file with a line for each, or folder of folders of images.
    """
    config = BatchConfig(**flags)
    raise_problems(batch_problems(config))
    from dvar.errors import name_some
    from dvar.jobs.batch import Batch
    from dvar.jobs.progress import show_batch
    from dvar.jobs.status import format_summary

    opened = Batch(jobs, config)
    missing = len(opened.missing)
    print_message(f"{len(opened.jobs)} jobs, {missing} of them to train, in {config.output_dir}")
    for sentence in dict.fromkeys(job.scaled for job in opened.missing if job.scaled):
        ids = [job.id for job in opened.missing if job.scaled == sentence]
        print_message(f"job {name_some(ids)}: {sentence}")
    try:
        with show_batch(missing, as_json=config.json) as progress:
            for event in opened.events(every=1.0):
                progress(event)
    finally:
        summary = opened.summary()
        for line in format_summary(summary):
            print_message(line)
    return FAILED if summary["done"] < summary["jobs"] else 0
