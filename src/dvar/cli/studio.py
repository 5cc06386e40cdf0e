"""The command `dvar studio`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dvar.cli.options import raise_problems, with_flags_of
from dvar.studio.config import StudioConfig, problems


@with_flags_of(StudioConfig)
def studio(runs: Path = Path("runs"), /, **flags: Any) -> int:
    """Prepare, watch and use runs in a browser, until interrupted; what is training goes on.

    Parameters
    ----------
    runs
        Folder of the runs; those that were started in a shell show up too.
    """
    config = StudioConfig(**flags)
    raise_problems(problems(config))
    if find_spec("gradio") is None:
        raise ModuleNotFoundError(name="gradio")
    from dvar.studio.server import serve_studio

    serve_studio(runs, config, lambda line: print(line, flush=True))
    return 0
