"""The commands `dvar record` and `dvar reproduce`."""

from __future__ import annotations

from typing import Any

from dvar.cli.console import FAILED, print_message
from dvar.cli.options import raise_problems, with_flags_of
from dvar.paper.config import ReproduceConfig
from dvar.paper.registry import reproduce_problems
from dvar.recordings.config import RecordConfig, record_problems


@with_flags_of(ReproduceConfig)
def reproduce(names: tuple[str, ...], /, **flags: Any) -> int:
    """Reproduce tables and figures of the paper from recorded runs, with their data and a page.

    Parameters
    ----------
    names
        Experiments, as listed below, or "all" for a report of everything.
    """
    config = ReproduceConfig(names=names, **flags)
    raise_problems(reproduce_problems(config))
    from dvar.paper.reproduce import reproduce

    print(reproduce(config, print_message))
    return 0


@with_flags_of(RecordConfig, several=("concepts", "seeds"))
def record(*methods: str, **flags: Any) -> int:
    """Record runs: train past every stop, and measure on the way.

    Runs that are complete are not recorded again, so the same command continues after an interruption.

    Parameters
    ----------
    methods
        Methods by name; all of them by default.
    """
    if methods:
        flags["methods"] = methods
    config = RecordConfig(**flags)
    raise_problems(record_problems(config))
    from dvar.cluster.places import Places
    from dvar.recordings import panel_plan, sweep
    from dvar.recordings.elsewhere import find_recorded
    from dvar.recordings.spec import plan_recordings

    plan = panel_plan.plan_panel(config) if config.panel else {}
    for line in panel_plan.describe_omissions(config) if config.panel else ():
        print(line)
    specs = [spec for stage in plan.values() for spec in stage] or plan_recordings(config)
    sources = config.skip_recorded or ()
    elsewhere = find_recorded(specs, sources) if sources else {}
    if elsewhere:
        print(f"{len(elsewhere)} of {len(specs)} runs are in {', '.join(sources)} and are left out")
    specs = [spec for spec in specs if spec.name_in_records not in elsewhere]
    if not specs:
        return 0
    rows = sweep.record_missing(
        specs,
        lambda line: print(line, flush=True),
        places=Places(config.workers, specs[0].threads, config.ray, config.gpus_per_worker),
        only_estimate=config.estimate,
        describe=lambda units: panel_plan.format_stages(plan, units, elsewhere),
    )
    if config.estimate and plan:
        return 0
    for line in sweep.format_statuses(rows):
        print(line)
    return FAILED if any(row.state != "done" for row in rows) and not config.estimate else 0
