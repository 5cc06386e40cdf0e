"""The command line: parse, call, print."""

# Whatever is slow to import is imported by the command that needs it.

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import MutableMapping, Sequence

from cyclopts import App

from dvar.cli.batch import batch
from dvar.cli.console import (
    INTERRUPTED,
    READER_GONE,
    REFUSED,
    discard_output,
    flush_output,
    prepare_streams,
    print_message,
    print_messages,
    show_warning,
)
from dvar.cli.demo import demo
from dvar.cli.explain import explain_error, token_problems
from dvar.cli.help_pages import format_terms
from dvar.cli.integrate import integrate
from dvar.cli.laboratory import record, reproduce
from dvar.cli.launch import launch, mark_script
from dvar.cli.logs import replay
from dvar.cli.runs import export, generate, report
from dvar.cli.studio import studio
from dvar.cli.survey import build_survey_app
from dvar.cli.train import build_train_app, concepts
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
    for command in (batch, launch, integrate, generate, export, report, replay, studio, record, demo, concepts):
        app.command(command)
    app.command(reproduce, help_epilogue=_format_experiments() if "reproduce" in tokens else None)
    return app


def _format_experiments() -> str:
    return format_terms({name: experiment.summary for name, experiment in EXPERIMENTS.items()})


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads wait for one another only briefly, unless the user has set how they wait.

    By default they wait for some milliseconds without giving up their core. Where another program takes one of two
    cores, each of many waits in a step then lasts until the other program's turn is over, and two threads train several
    times more slowly than one. PyTorch reads the setting when it is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "20000"


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Returns:
        0; 1 for a failure, 2 for refused input, 130 when interrupted, 141 when the reader of standard output is gone.
    """
    share_cores(os.environ)
    prepare_streams()
    words = mark_script(sys.argv[1:] if tokens is None else list(tokens))
    if problems := token_problems(words):
        print_messages(problems)
        return REFUSED
    # What it prints, when PEFT imports it on some CPUs, is that an optional kernel cannot be downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            status = build_app(words)(words, exit_on_error=False, print_error=False) or 0
            sys.stdout.flush()  # a broken pipe shows here, not at the end of the interpreter
        except BrokenPipeError:
            discard_output()
            status = READER_GONE
        except Exception as error:
            messages, status = explain_error(error, words)
            print_messages(messages)
            flush_output()
        except KeyboardInterrupt:
            print_message("interrupted")
            status = INTERRUPTED
    return status
