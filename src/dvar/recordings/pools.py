"""Pools of workers that record runs or score them again."""

from __future__ import annotations

from dvar.cluster.places import Places
from dvar.cluster.pool import Pool

PREEMPTIONS = 20
"""How often a task may lose its node, without getting further, and go on elsewhere."""


def start_pool(places: Places, tasks: int) -> Pool:
    """Return a pool for so many tasks, which are tried again where a node of a cluster is lost."""
    return Pool(places.start(tasks), preemptions=PREEMPTIONS if places.ray else 0)
