"""Workers that are actors of a Ray cluster."""

# An actor supervises a process of its node, as a pool does on this machine: the process loads the base model once, may
# crash without the actor, and ends by itself when the actor is gone.  Ray brings the actor back, here or on another
# node, and the pool lets the task go on from its last checkpoint.

from __future__ import annotations

import os
import platform
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dvar._version import __version__
from dvar.cluster.shared import start_places
from dvar.cluster.task import ENDS, Report, Worker, WorkerTask, failure
from dvar.errors import RefusedInput, first_line
from dvar.files import read_text

try:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ray]'", name=error.name) from None

CONNECT_SECONDS, NODE_SECONDS = 5.0, 60.0
"""Seconds to wait for an address, and for a node to say what it has."""
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


def connect(address: str, workers: int, threads: int) -> None:
    """Connect to a Ray cluster.

    Args:
        address: "auto" for the cluster that this machine is a part of or that RAY_ADDRESS names and, where there is
            none, one that is started here; or HOST:PORT.
        workers: Workers of a cluster that is started here.
        threads: CPUs of each.

    Raises:
        RefusedInput: There is no cluster at this address, or it cannot be joined.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    address = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if address.startswith("ray://"):
        rule = f"ray must be an address HOST:PORT that this machine is a node of, got {address}"
        raise RefusedInput([f"{rule}: submit the command with `ray job submit --address http://HOST:8265`"])
    try:
        if named := _last_address() if address == "auto" else address:
            _knock(named)
        with _signals_stay():
            ray.init(address=address, **options)
    except (ConnectionError, TimeoutError) as error:
        if address != "auto":
            raise RefusedInput([_refusal(address, error)]) from error
        with _signals_stay():
            ray.init(address="local", num_cpus=workers * threads, include_dashboard=False, **options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise RefusedInput([_refusal(address, error)]) from error


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


def node_problems(shared: Path | None) -> list[str]:
    """Return what keeps the nodes of the connected cluster from running tasks of this version.

    Args:
        shared: A folder that every node must see, which exists here.
    """
    token = shared / f".{secrets.token_hex(8)}.seen" if shared else None
    if token:
        token.write_text("")
    try:
        return [problem for node in _list_nodes() for problem in _problems_of_node(node, token)]
    finally:
        if token:
            token.unlink()


def _list_nodes() -> list[dict[str, Any]]:
    """Return the living nodes that can run something."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _problems_of_node(node: Mapping[str, Any], token: Path | None) -> Iterator[str]:
    name = f"node {node['NodeManagerAddress']}"
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    inspect = ray.remote(_inspector()).options(num_cpus=0, scheduling_strategy=place, max_retries=0)
    try:
        facts = ray.get(inspect.remote(COMPARED, str(token or "")), timeout=NODE_SECONDS)
    except (RayError, TimeoutError) as error:
        yield f"every node must answer, and {name} does not ({_shortened(error)}): repair it or take it away"
        return
    if difference := format_differences(installed_versions(), facts["versions"]):
        yield f"every node must have the versions of this machine, and {name} has {difference}: install the same"
    if token and not facts["sees"]:
        yield f"every node must see output_dir, and {name} does not see {token.parent}: name a shared folder or a URL"


def _inspector() -> Callable[[tuple[str, ...], str], dict[str, Any]]:
    """Return the function that says what a node has; nested, so that Ray carries it to nodes without dvar."""

    def inspect(packages: tuple[str, ...], token: str) -> dict[str, Any]:
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
        return {"versions": versions, "sees": os.path.exists(token)}

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


@contextmanager
def _signals_stay() -> Iterator[None]:
    """Leave SIGTERM as it was before a scope: Ray ends the process by it at once, and the runs could not save."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    yield
    if main:
        signal.signal(signal.SIGTERM, before)


def _last_address() -> str:
    """Return the address of the cluster that was started last on this machine, if Ray's note of it is there.

    A cluster whose machine or processes died leaves its note behind.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return read_text(Path(folder) / "ray" / "ray_current_cluster").strip()
    except (OSError, ValueError):
        return ""


def _knock(address: str) -> None:
    """Raise an OSError or a ValueError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), CONNECT_SECONDS):
        pass


def _refusal(address: str, error: Exception) -> str:
    return f"ray must be 'auto' or the address of a running cluster, got {address} ({first_line(error)}): check it"


def _shortened(error: Exception) -> str:
    """Return what Ray says last about an error: the cause, after the names of actor and node."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
