"""Base models behind a URL, copied once to each machine."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

from dvar.errors import FolderInUse, ModelError
from dvar.files import staged_folder
from dvar.jobs.store import open_url

CACHE, CACHE_VARIABLE = "~/.cache/dvar/models", "DVAR_MODEL_CACHE"
"""Folder of the copies, and the variable that names another; "~" stays in the settings of a run, for a home differs."""


def cached_model(url: str) -> str:
    """Return the folder of this machine's copy of a base model, made where there is none.

    It is named after a digest of the model's files, their sizes and what the file system says of their content, so a
    model that is replaced behind its URL is another one.

    Raises:
        ModelError: There is no model behind the URL.
        FolderInUse: Another process is copying it.
    """
    system, root = open_url(url)
    files = system.find(root, detail=True)
    if not any(path.endswith("model_index.json") for path in files):
        raise ModelError(f"a base model must be a diffusers folder, and {url} holds no model_index.json: check the URL")
    names = {path.removeprefix(root).lstrip("/"): path for path in files}
    marks = [(name, files[path].get("size"), str(system.checksum(path))) for name, path in sorted(names.items())]
    digest = sha256(json.dumps(marks).encode()).hexdigest()
    folder = f"{os.environ.get(CACHE_VARIABLE, CACHE)}/{digest[:32]}"
    copy = Path(folder).expanduser()
    if not copy.exists():
        with staged_folder(copy) as staged:
            if copy.exists():  # by another process, before this one held the lock
                raise FolderInUse([f"{copy} was copied meanwhile: use it"])
            for name, path in names.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                system.get_file(path, str(staged / name))
    return folder
