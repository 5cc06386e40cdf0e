"""The command line: parse, call, print."""

# Whatever is slow to import is imported by the command that needs it.

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownOptionError

from dvar.cli.batch import batch
from dvar.cli.console import FAILED, INTERRUPTED, READER_GONE, REFUSED, discard_output, print_message, print_messages
from dvar.cli.help_pages import format_terms
from dvar.cli.integrate import integrate
from dvar.cli.laboratory import record, reproduce
from dvar.cli.launch import launch, mark_script
from dvar.cli.logs import replay
from dvar.cli.runs import export, generate, report
from dvar.cli.survey import build_survey_app
from dvar.cli.train import build_train_app, concepts, demo
from dvar.errors import CheckpointError, DvarError, ModelError, RefusedInput, TraceError, nearest
from dvar.extras import install_command
from dvar.paper.registry import EXPERIMENTS


def build_app(tokens: Sequence[str]) -> App:
    """Return the app of `dvar`, for a command line of these words."""
    # Plain text, because reading help as Markdown costs 40 ms of the 100 that help takes.
    app = App(
        name="dvar",
        help="Know when a text-to-image fine-tune is done.",
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    app.command(build_train_app(tokens))
    app.command(build_survey_app())
    for command in (batch, launch, integrate, generate, export, report, replay, record, demo, concepts):
        app.command(command)
    app.command(reproduce, help_epilogue=_format_experiments() if "reproduce" in tokens else None)
    return app


def _format_experiments() -> str:
    return format_terms({name: experiment.summary for name, experiment in EXPERIMENTS.items()})


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Returns:
        0; 1 for a failure, 2 for refused input, 130 when interrupted, 141 when the reader of standard output is gone.
    """
    words = mark_script(sys.argv[1:] if tokens is None else list(tokens))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            status = build_app(words)(words, exit_on_error=False, print_error=False) or 0
            sys.stdout.flush()  # a broken pipe shows here, not at the end of the interpreter
        except (CycloptsError, DvarError, ModuleNotFoundError) as error:
            messages, status = explain_error(error)
            print_messages(messages)
        except BrokenPipeError:
            discard_output()
            status = READER_GONE
        except KeyboardInterrupt:
            print_message("interrupted")
            status = INTERRUPTED
    return status


def explain_error(error: CycloptsError | DvarError | ModuleNotFoundError) -> tuple[Sequence[str], int]:
    """Return the messages and the exit status for an error that is the user's to mend.

    Raises:
        ModuleNotFoundError: A module of `dvar` itself is missing.
    """
    match error:
        case UnknownOptionError():
            flags = [name for argument in error.argument_collection for name in argument.names]
            flag = error.token.keyword or error.token.value
            return [f"unknown flag {flag}: the nearest known one is {nearest(flag, flags)}"], REFUSED
        case CycloptsError():
            return [" ".join(str(error).split())], REFUSED
        case RefusedInput():
            return error.problems, REFUSED
        case CheckpointError() | ModelError() | TraceError():
            return str(error).splitlines(), REFUSED
        case ModuleNotFoundError():
            module = str(error.name)
            if module.partition(".")[0] == "dvar":
                raise error
            return [f"this command needs {module}: {install_command(module)}"], FAILED
    return str(error).splitlines(), FAILED
