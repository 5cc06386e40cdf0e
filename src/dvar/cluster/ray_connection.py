"""The connection of this process to a Ray cluster."""

# Ray has one connection for a process.  One that was made here is closed when nothing here uses it any more, so that
# the next batch may go to another cluster, and a cluster that was started here ends with it and leaves no process.

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput, first_line
from dvar.files import read_text

try:
    import ray
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ray]'", name=error.name) from None

CONNECT_SECONDS = 5.0
"""Seconds to wait for an address."""


@dataclass
class _Connection:
    """The last connection that was made here.

    Attributes:
        address: The address that was asked for.
        identity: What `_identify` returned of it; another one was made by somebody else.
        users: Scopes of `connected` that are open.
    """

    address: str = ""
    identity: str = ""
    users: int = 0


_connection = _Connection()


@contextmanager
def connected(address: str, workers: int, threads: int) -> Iterator[None]:
    """Connect as `connect` does, for a scope; the last of several scopes closes what was connected here.

    Raises:
        RefusedInput: As `connect`.
    """
    connect(address, workers, threads)
    _connection.users += 1
    try:
        yield
    finally:
        _connection.users -= 1
        disconnect()


def disconnect() -> None:
    """Close a connection that was made here, unless a scope of `connected` uses it."""
    if not _connection.users and ray.is_initialized() and _identify() == _connection.identity:
        with _signals_stay():
            ray.shutdown()


def connect(address: str, workers: int, threads: int) -> None:
    """Connect to a Ray cluster; a process that is connected stays so.

    Args:
        address: "auto" for the cluster that RAY_ADDRESS names, or that this process or machine is a part of, and, where
            there is none, one that is started here; or HOST:PORT.
        workers: Workers of a cluster that is started here.
        threads: CPUs of each.

    Raises:
        RefusedInput: There is no cluster at this address, or it cannot be joined, or this process is connected to
            another one.
    """
    address = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if ray.is_initialized():
        _validate_address(address)
        return
    _connect(address, workers, threads)
    _connection.address, _connection.identity = address, _identify() if ray.is_initialized() else ""


def _connect(address: str, workers: int, threads: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address.startswith("ray://"):
        rule = f"ray must be an address HOST:PORT that this machine is a node of, got {address}"
        remedy = "submit the command with `ray job submit --address http://HOST:8265` of ray[default]"
        raise RefusedInput([f"{rule}: {remedy}"])
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


def _validate_address(address: str) -> None:
    """Refuse an address of another cluster than the one that this process is connected to."""
    own = _connection.address if _identify() == _connection.identity else "auto"
    current = ray.get_runtime_context().gcs_address
    if address not in ("auto", own) and _resolve(address) != _resolve(current):
        rule = f"ray must be the cluster that this process is connected to, {current}, got {address}"
        raise RefusedInput([f"{rule}: end what runs there and call ray.shutdown(), or use another process"])


def _identify() -> str:
    """Return what tells the connection of this process from others."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def _resolve(address: str) -> tuple[str, str]:
    """Return the number of the machine and the port of HOST:PORT; of a name that nobody knows, the name."""
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return ray.util.get_node_ip_address() if host.startswith("127.") else host, port


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
