"""The studio as a server: its folder, its address and its end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server
from socket import socket as Socket

from dvar.errors import RefusedInput
from dvar.files import writing_problem
from dvar.studio.config import LOOPBACK, StudioConfig, read_password


def serve_studio(root: str | Path, config: StudioConfig, notify: Callable[[str], None] = print) -> None:
    """Serve the studio of a folder of runs until interrupted; runs in training and in the queue go on.

    Args:
        root: The folder of the runs; it is made where it does not exist.
        config: Address, port, password and base models.
        notify: Called with the address, once the server listens.

    Raises:
        RefusedInput: The folder cannot be written, or the port is taken.
    """
    root = Path(root).expanduser().resolve()
    if problem := writing_problem(root, folder=True):
        raise RefusedInput([f"the runs need a folder that can be written, and {problem}: name another"])
    with _listen(config.host, config.port) as socket, tempfile.TemporaryDirectory(prefix="dvar-studio-") as uploads:
        # Gradio reads this when it is imported: uploads and downloads are here and nowhere else, and end with us.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import uvicorn

        from dvar.studio.app import build_app
        from dvar.studio.new_run import list_models
        from dvar.studio.pages import Studio
        from dvar.studio.queue import ensure_runner

        root.mkdir(parents=True, exist_ok=True)
        models = list_models(Path(config.models_dir).expanduser() if config.models_dir else None)
        is_local = config.host in LOOPBACK
        hosts = LOOPBACK if is_local else ()
        password = read_password(config.password_file) if config.password_file else None
        app = build_app(Studio(root, models), hosts, password)
        ensure_runner(root)
        host = f"[{config.host}]" if ":" in config.host else config.host
        notify(f"studio    http://{host}:{socket.getsockname()[1]}/")
        notify(f"runs      {root}")
        settings = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False)
        uvicorn.Server(settings).run(sockets=[socket])


def _listen(host: str, port: int) -> Socket:
    """Return a socket that listens.

    Raises:
        RefusedInput: The port is taken, or the host is not one of this machine.
    """
    try:
        return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedInput([f"{host}, port {port} cannot be listened on ({reason}): choose another --port"]) from error
