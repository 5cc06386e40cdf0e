"""Where tasks run: on this machine, or on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvar.cluster.local import list_slots
from dvar.cluster.shared import start_places
from dvar.cluster.task import Worker
from dvar.errors import RefusedInput


@dataclass(frozen=True)
class Places:
    """The workers of a pool, and where they run. Ray is imported where it is asked for, and nowhere else.

    Attributes:
        workers: Number of workers; by default one for each GPU, or else for each core, of the machine or the cluster.
        threads: CPU threads of each.
        ray: The address of a Ray cluster, as `dvar.cluster.ray_connection.connect` takes it; None for this machine.
        gpus: GPUs of each worker on Ray, or the share of one; by default 1 where the cluster has any.
        pack: Tasks that each worker runs at once; more than one need a program that uses
            `dvar.cluster.program.serve_team`.
    """

    workers: int | None = None
    threads: int = 1
    ray: str | None = None
    gpus: float | None = None
    pack: int = 1

    @property
    def count(self) -> int:
        """The number of workers; of a cluster, once `problems` has connected to it, as it is now."""
        if self.ray is None:
            return len(list_slots(self.workers, self.threads))
        from dvar.cluster import ray_workers

        return self.workers or ray_workers.count_places(self.threads, self.gpus)

    def problems(self, shared: Path | None = None, paths: Collection[Path] = ()) -> list[str]:
        """Return what keeps tasks from running here, having connected to the cluster, if there is one.

        Args:
            shared: A folder that every worker must see; it is made.
            paths: Further folders and files that every worker must see.
        """
        if self.ray is None:
            return []
        from dvar.cluster import ray_connection, ray_workers

        try:
            ray_connection.connect(self.ray, self._workers_here, self.threads)
        except RefusedInput as refused:
            return list(refused.problems)
        if shared:
            shared.mkdir(parents=True, exist_ok=True)
        return ray_workers.node_problems(shared, paths)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Be connected to the cluster, if there is one, for a scope, at whose end a connection of `problems` is closed.

        Raises:
            RefusedInput: The cluster cannot be joined.
        """
        if self.ray is None:
            yield
            return
        from dvar.cluster import ray_connection

        with ray_connection.connected(self.ray, self._workers_here, self.threads):
            yield

    def disconnect(self) -> None:
        """Close the connection of `problems`, unless a scope of `connected` uses it."""
        if self.ray is not None and (connection := sys.modules.get("dvar.cluster.ray_connection")):
            connection.disconnect()

    @property
    def _workers_here(self) -> int:
        """The workers of a cluster that is started on this machine."""
        return self.workers or len(list_slots(None, self.threads))

    def start(self, most: int) -> list[Worker]:
        """Return the workers, one for each task that runs at once, but no more than ``most``, once connected."""
        if self.ray is None:
            slots = list_slots(self.workers, self.threads)[:most]
            places = [start_places(f"worker-{number + 1}", self.pack, slot) for number, slot in enumerate(slots)]
        else:
            from dvar.cluster import ray_workers

            places = ray_workers.start_workers(min(self.count, most), self.threads, self.gpus, self.pack)
        # One place of each worker first, so that few tasks are spread over all workers.
        return [place for row in zip(*places, strict=True) for place in row][:most]
