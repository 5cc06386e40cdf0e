"""The command line: parse, call, print.  Whatever is slow to import is imported by the command that needs it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence

from cyclopts import App, CycloptsError, UnknownOptionError

from dvar.cli.laboratory import record, reproduce
from dvar.cli.options import FAILED, INTERRUPTED, REFUSED, say
from dvar.cli.runs import export, generate, replay, report
from dvar.cli.survey import survey
from dvar.cli.train import concepts, demo, train
from dvar.errors import CheckpointError, DvarError, ModelError, RefusedInput, TraceError, nearest
from dvar.paper.config import EXPERIMENTS

# Plain text, because reading help as Markdown costs 40 ms of the 100 that help takes.
app = App(
    name="dvar",
    help="Know when a text-to-image fine-tune is done.",
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(train)
app.command(survey)
for command in (generate, export, report, replay, record, demo, concepts):
    app.command(command)
app.command(reproduce, help_epilogue="\n".join(f"{name:<10}{title}" for name, title in EXPERIMENTS.items()))


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for refused input, 1 for a failure, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return app(tokens, exit_on_error=False, print_error=False) or 0
        except UnknownOptionError as error:
            known = [name for argument in error.argument_collection for name in argument.names]
            flag = error.token.keyword or error.token.value
            return _fail(REFUSED, [f"unknown flag {flag}: the nearest known one is {nearest(flag, known)}"])
        except CycloptsError as error:
            return _fail(REFUSED, [" ".join(str(error).split())])
        except RefusedInput as error:
            return _fail(REFUSED, error.problems)
        except (CheckpointError, ModelError, TraceError) as error:
            return _fail(REFUSED, str(error).splitlines())
        except DvarError as error:
            return _fail(FAILED, str(error).splitlines())
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "dvar":
                raise
            extra = "survey" if error.name in ("starlette", "uvicorn", "jinja2", "itsdangerous") else "train"
            return _fail(FAILED, [f"this command needs {error.name}: pip install 'dvar[{extra}]'"])
        except KeyboardInterrupt:
            return _fail(INTERRUPTED, ["interrupted"])


def _fail(status: int, lines: Iterable[str]) -> int:
    for line in lines:
        say(line)
    return status
