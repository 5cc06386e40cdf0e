"""What the pages of the studio share: the library they show, and how a refusal is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from dvar.errors import DvarError, RefusedInput
from dvar.studio.views import show_message

T = TypeVar("T")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""How events are bound that show no progress of their own; none has a place in a public interface."""


@dataclass(frozen=True)
class Studio:
    """The library and the base models that the pages work on.

    Attributes:
        root: The folder of the library.
        models: The base models that can be chosen: the path of each by its name in the form.
    """

    root: Path
    models: Mapping[str, str]


def answer(action: Callable[[], T]) -> tuple[T | None, str]:
    """Return what an action returns and an empty message, or None and its refusal as HTML."""
    try:
        return action(), ""
    except DvarError as error:
        return None, show_message(str(error), "alert")


def uploaded_files(paths: object) -> list[Path]:
    """Return files that the browser has sent. A path of any other place, which a forged request may name, is refused.

    Raises:
        RefusedInput: A file is none that was uploaded.
    """
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder()).resolve()
    names = paths if isinstance(paths, list) else [paths] if paths else []
    files = [Path(str(name)).resolve() for name in names]
    if any(folder not in file.parents for file in files):
        raise RefusedInput(["a file must have been uploaded here: drop it on the page"])
    return files


def heading(text: str, lead: str) -> gr.HTML:
    """Return the heading of a page with the line under it."""
    return gr.HTML(f'<div class="dvar"><h1>{text}</h1><p class="soft">{lead}</p></div>')
