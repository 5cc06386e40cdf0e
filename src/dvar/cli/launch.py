"""The command `dvar launch`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from dvar.cli.console import REFUSED, print_message
from dvar.cli.options import raise_problems, with_flags_of
from dvar.config.fields import read_settings
from dvar.errors import first_line
from dvar.launch.config import LaunchConfig, launch_problems

if TYPE_CHECKING:
    from dvar.launch.check import ScriptCheck
    from dvar.launch.session import LaunchSession

WIDE = 1000  # of a table that is written into a file or a pipe: one line for each script

PLAIN_SHOW_WARNING = warnings.showwarning
"""How Python shows the warnings of a script; the command line shows its own as one line."""

ConfigFile = Annotated[
    Path | None, Parameter(name="--dvar_config", help="TOML file of these settings, named as the flags.", group="Run")
]


def mark_script(tokens: Sequence[str]) -> list[str]:
    """Return the words of `dvar launch` with ``--`` before the script: everything behind it is the script's own."""
    hints = get_type_hints(LaunchConfig)
    with_value = {f"--{item.name}" for item in fields(LaunchConfig) if hints[item.name] is not bool} | {"--dvar_config"}
    words, place = list(tokens), 1
    if words[:1] != ["launch"]:
        return words
    while place < len(words) and words[place].startswith("-") and words[place] != "--":
        place += 2 if words[place].replace("-", "_").replace("__", "--", 1) in with_value else 1
    return words if words[place : place + 1] in ([], ["--"]) else [*words[:place], "--", *words[place:]]


@with_flags_of(LaunchConfig)
def launch(script: Path, /, *arguments: str, dvar_config: ConfigFile = None, **flags: Any) -> int:
    """Run a training script that uses accelerate, unchanged, and end it when the concept is learned.

    The script computes its own loss on held samples of its own dataset; L_det is recorded and judged, and a stop ends
    the loop, so that the script saves as usual. Training is bit for bit that of the plain script. All flags stand
    before the script; with accelerate: accelerate launch -m dvar launch SCRIPT ARGUMENTS.

    Parameters
    ----------
    script
        The training script; with --check also a folder of scripts.
    arguments
        The script's own arguments.
    """
    settings = read_settings(dvar_config, LaunchConfig) if dvar_config else {}
    config = LaunchConfig(**{**settings, **flags})
    raise_problems([*launch_problems(config), *_argument_problems(arguments)])
    if config.check:
        return _check(script)
    from dvar.launch.runner import run_script
    from dvar.launch.script import TrainingScript, script_problems
    from dvar.launch.session import LaunchSession

    source = TrainingScript.read(script)
    raise_problems([] if config.dvar_off else script_problems(source))
    session = None if config.dvar_off else LaunchSession(config, script, {}, print_message)
    warnings.showwarning = PLAIN_SHOW_WARNING
    try:
        return run_script(str(script), arguments, session)
    finally:
        if session:
            _print_result(session)


def _argument_problems(arguments: Sequence[str]) -> list[str]:
    """Return which flags of ours stand among those of the script."""
    ours = [word for word in arguments if word.replace("_", "-").startswith("--dvar-")]
    return [f"flags of dvar stand before the script, got {word} after it: move it to the front" for word in ours]


def _check(path: Path) -> int:
    """Print whether scripts can be measured, and return the exit status."""
    from dvar.launch.check import check_folder, check_script

    if not path.is_dir():
        row = check_script(path)
        print(row.sentence)
        return 0 if row.fits else REFUSED
    if checks := list(check_folder(path)):
        _print_checks(checks)
    else:
        print("no script here has accelerator.backward(loss) in a loop")
    return 0


def _print_checks(checks: Iterable[ScriptCheck]) -> None:
    """Print a table of scripts; wide lines where it goes into a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("script", "loop", "loss", "answer"):
        table.add_column(title, overflow="fold")
    for row in checks:
        table.add_row(row.name, row.loop, row.loss, row.problem or "can be measured")
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def _print_result(session: LaunchSession) -> None:
    """Print how a script ended, write the report, and print where everything is."""
    result = session.finish()
    if result is None:
        return
    from dvar.runs.launch_report import write_launch_report

    print_message(result.verdict.sentence)
    print_message(f"trace     {result.trace}")
    if result.best:
        print_message(f"best      {result.best}")
    try:
        config, launch = session.config, session.config.header(session.script.name)["launch"]
        output = Path(config.dvar_report) if config.dvar_report else None
        print_message(f"report    {write_launch_report(result.trace, output, launch)}")
    except Exception as error:  # what the script has trained matters more
        print_message(f"no report could be written: {first_line(error)}")
