"""The command that adds dvar to the checkout of another trainer: `dvar integrate`."""

from __future__ import annotations

from pathlib import Path


def integrate(tool: str, path: Path, /) -> int:
    """Add dvar to a trainer: write the few files that it needs, and say what to put into its config.

    Parameters
    ----------
    tool
        ai-toolkit, simpletuner, onetrainer, sd-scripts, musubi-tuner, diffsynth, or one of an installed package.
    path
        Folder of the tool's checkout.
    """
    from dvar.stopping.integrations.trainers.tools import TOOLS, integrate

    new_files = integrate(tool, path)
    for file in new_files:
        print(f"wrote     {file}")
    if TOOLS[tool].files and not new_files:
        print("wrote     nothing: all files are there already")
    for step in TOOLS[tool].steps:
        print(f"          {step}")
    return 0
