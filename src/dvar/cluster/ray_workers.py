"""Workers that are actors of a Ray cluster."""

# An actor supervises a process of its node, as a pool does on this machine: the process loads the base model once, may
# crash without the actor, and ends by itself when the actor is gone.  Ray brings the actor back, here or on another
# node, and the pool lets the task go on from its last checkpoint.

from __future__ import annotations

import os
import platform
import secrets
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dvar._version import __version__
from dvar.cluster.shared import start_places
from dvar.cluster.task import ENDS, Report, Worker, WorkerTask, failure
from dvar.errors import name_some

try:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ray]'", name=error.name) from None

NODE_SECONDS = 60.0
"""Seconds to wait for a node to say what it has."""
COMPARED = ("torch", "diffusers", "transformers", "peft")
"""Packages whose versions change the results of a run."""


class Supervisor:
    """The actor of one worker: a process on its node.

    Args:
        name: Its name, for people.
        folder: The folder that it runs in, where the node has it, so that relative paths mean the same everywhere.
        versions: What `installed_versions` returns on the machine of the driver.
        pack: Tasks that it runs at once.
    """

    def __init__(self, name: str, folder: str, versions: Mapping[str, str], pack: int = 1) -> None:
        self.difference = format_differences(versions, installed_versions())
        with suppress(OSError):  # one that this node does not have is no part of any path that it must see
            os.chdir(folder)
        self.places = start_places(name, pack)

    def ping(self) -> str:
        """Return the name of the node."""
        return platform.node()

    def run(self, place: int, task: Mapping[str, Any]) -> Iterator[Report]:
        """Run a task in one of its places and yield its reports."""
        if self.difference:  # a node that has joined since all of them were checked
            yield failure(f"node {platform.node()} has {self.difference}", retry=False)
        else:
            yield from self.places[place].run(WorkerTask(**{**task, "log": Path(task["log"])}))

    def cancel(self, place: int) -> None:
        """Ask the task that is running in one of its places to save and end."""
        self.places[place].cancel()


class RayWorker:
    """A worker somewhere on the cluster; it waits for a place, and for another one where its node is lost.

    Args:
        name: Its name, for people.
        actor: The `Supervisor` of its process, which other workers may share.
        place: The place of it that is this worker's.
    """

    def __init__(self, name: str, actor: Any, place: int = 0) -> None:
        self.name, self._actor, self._place = name, actor, place
        self._ping: Any = None

    def ready(self, seconds: float) -> bool:
        """Return whether it has a place and answers, after waiting so long at most."""
        self._ping = self._ping or self._actor.ping.remote()
        answered, _ = ray.wait([self._ping], timeout=seconds)
        if not answered:
            return False
        ping, self._ping = self._ping, None
        try:
            ray.get(ping)
        except RayError:  # it was lost since, and is coming back
            return False
        return True

    def run(self, task: WorkerTask) -> Iterator[Report]:
        """Run a task and yield its reports; the last one is of `ENDS`."""
        fields = {"name": task.name, "program": task.program, "argument": task.argument, "threads": task.threads}
        try:
            stream = self._actor.run.options(num_returns="streaming").remote(
                self._place, {**fields, "log": str(task.log)}
            )
            for reference in stream:
                report: Report = ray.get(reference)
                yield report
                if report["report"] in ENDS:
                    return
        except RayError as error:
            yield {"report": "interrupted", "reason": f"the worker was lost: {_shortened(error)}"}

    def cancel(self) -> None:
        """Ask the task that is running to save and end."""
        self._actor.cancel.remote(self._place)

    def close(self) -> None:
        """End the actor; its process ends with it."""
        with suppress(RayError):
            ray.kill(self._actor)

    def kill(self) -> None:
        """End the actor at once."""
        self.close()


def count_places(threads: int, gpus: float | None) -> int:
    """Return how many workers the connected cluster has places for now; at least 1, for it may grow."""
    resources, share = ray.cluster_resources(), _share(gpus)
    places = [int(resources.get("CPU", 0) // threads)]
    if share:
        places.append(int(resources.get("GPU", 0) / share + 1e-9))
    return max(1, min(places))


def start_workers(count: int, threads: int, gpus: float | None, pack: int = 1) -> list[list[Worker]]:
    """Return ``pack`` places of each worker of the connected cluster; those that it has no room for wait for it.

    Args:
        count: Number of workers.
        threads: CPUs that each needs.
        gpus: GPUs that each needs, or the share of one; by default 1 where the cluster has any.
        pack: Tasks that each runs at once.
    """
    if count > (places := count_places(threads, gpus)):
        warnings.warn(f"the cluster has places for {places} of {count} workers now: the others wait", stacklevel=2)
    return [_start_worker(f"ray-{number + 1}", threads, _share(gpus), pack) for number in range(count)]


def _start_worker(name: str, threads: int, gpus: float, pack: int) -> list[Worker]:
    options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": -1, "max_concurrency": pack + 2}
    actor = ray.remote(Supervisor).options(**options).remote(name, os.getcwd(), installed_versions(), pack)
    names = [name] if pack == 1 else [f"{name}.{place + 1}" for place in range(pack)]
    return [RayWorker(own, actor, place) for place, own in enumerate(names)]


def _share(gpus: float | None) -> float:
    """Return the GPUs of a worker: by default 1 where the cluster has any."""
    return float("GPU" in ray.cluster_resources()) if gpus is None else gpus


def node_problems(shared: Path | None, paths: Collection[Path] = ()) -> list[str]:
    """Return what keeps the nodes of the connected cluster from running tasks of this version.

    Args:
        shared: A folder that every node must see, which exists here.
        paths: Further folders and files that every node must see, which exist here.
    """
    token = shared / f".{secrets.token_hex(8)}.seen" if shared else None
    if token:
        token.write_text("")
    try:
        return [problem for node in _list_nodes() for problem in _problems_of_node(node, token, paths)]
    finally:
        if token:
            token.unlink()


def _list_nodes() -> list[dict[str, Any]]:
    """Return the living nodes that can run something."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _problems_of_node(node: Mapping[str, Any], token: Path | None, paths: Collection[Path]) -> Iterator[str]:
    name = f"node {node['NodeManagerAddress']}"
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    inspect = ray.remote(_inspector()).options(num_cpus=0, scheduling_strategy=place, max_retries=0)
    names = [str(path.absolute()) for path in ([token] if token else []) + sorted(paths)]
    try:
        facts = ray.get(inspect.remote(COMPARED, names), timeout=NODE_SECONDS)
    except (RayError, TimeoutError) as error:
        yield f"every node must answer, and {name} does not ({_shortened(error)}): repair it or take it away"
        return
    if difference := format_differences(installed_versions(), facts["versions"]):
        yield f"every node must have the versions of this machine, and {name} has {difference}: install the same"
    unseen: list[str] = facts["unseen"]
    if token and str(token.absolute()) in unseen:
        yield f"every node must see output_dir, and {name} does not see {token.parent}: name a shared folder or a URL"
        unseen.remove(str(token.absolute()))
    if unseen:
        rule = f"every node must see what the tasks read and write, and {name} does not see {name_some(unseen)}"
        yield f"{rule}: put it on a disk that all nodes share"


def _inspector() -> Callable[[tuple[str, ...], list[str]], dict[str, Any]]:
    """Return the function that says what a node has; nested, so that Ray carries it to nodes without dvar."""

    def inspect(packages: tuple[str, ...], paths: list[str]) -> dict[str, Any]:
        import os
        import platform
        from importlib.metadata import PackageNotFoundError, version

        versions: dict[str, str] = {"python": platform.python_version()}
        for name in packages:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = ""
        try:
            from dvar._version import __version__
        except ModuleNotFoundError:
            versions["dvar"] = ""
        else:
            versions["dvar"] = __version__
        return {"versions": versions, "unseen": [path for path in paths if not os.path.exists(path)]}

    return inspect


def installed_versions() -> dict[str, str]:
    """Return the versions of what changes the results of a run; "" for what is missing."""
    return {"python": platform.python_version(), "dvar": __version__, **{name: _version(name) for name in COMPARED}}


def format_differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return which versions of a node are others than ours; empty where none is."""
    others = [name for name in ours if theirs.get(name) != ours[name]]
    return "; ".join(f"{name} {theirs.get(name) or 'missing'}, not {ours[name]}" for name in others)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _shortened(error: Exception) -> str:
    """Return what Ray says last about an error: the cause, after the names of actor and node."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
