"""A finished run, pushed to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from dvar.config.training import TrainingConfig
from dvar.errors import ModelError, first_line
from dvar.files import read_json
from dvar.training.run_layout import MODEL_CARD, RESULT, SAMPLES, step_name

_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def push_run(folder: Path, repository: str) -> str:
    """Upload the weight files, the model card and the sample images of a finished run; return its full id.

    Neither the images that it learned from nor paths of this machine are uploaded.

    Args:
        folder: The folder of the run.
        repository: The id on the hub, as owner/name or as a name of one's own; it is created if it is new.

    Raises:
        ModelError: The hub refuses it or cannot be reached; the run stays as it is.
    """
    from huggingface_hub import HfApi

    result = read_json(folder / RESULT)
    names = [MODEL_CARD, *result["weights"], f"{SAMPLES}/{step_name(result['exported_step'])}/*.png"]
    try:
        api = HfApi()
        full_name = api.create_repo(repository, exist_ok=True).repo_id
        api.upload_folder(repo_id=full_name, folder_path=folder, allow_patterns=names, commit_message="A run of dvar")
    except Exception as error:  # of whichever library makes its requests
        message = f"the run in {folder} is complete, and was not pushed to {repository} ({first_line(error)})"
        raise ModelError(f"{message}: try again with dvar export {folder} --push_to_hub {repository}") from error
    return str(full_name)


def problems(config: TrainingConfig) -> list[str]:
    """Return what keeps the run of ``config`` from being pushed, as far as is known before it."""
    if not config.push_to_hub:
        name = config.hub_model_id
        return [f"hub_model_id is for push_to_hub, got {name!r} without it: add the flag or drop it"] if name else []
    return repository_problems(repository_of(config), "hub_model_id")


def repository_problems(repository: str, name: str) -> list[str]:
    """Return what keeps anything from being pushed to ``repository``, which is called ``name`` in messages."""
    from huggingface_hub import get_token

    messages = []
    if not _ID.fullmatch(repository):
        messages.append(f"{name} must be an id such as owner/name, got {repository!r}: correct it")
    if not get_token():
        messages.append("push_to_hub needs an account on the hub, and no token is here: hf auth login")
    return messages


def repository_of(config: TrainingConfig) -> str:
    """Return the id to which the run of ``config`` is pushed: by default the name of its folder."""
    return config.hub_model_id or Path(config.output_dir).expanduser().resolve().name
