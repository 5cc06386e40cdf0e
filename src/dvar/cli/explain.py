"""Errors that are the user's to mend, as messages and an exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError, UnknownOptionError
from cyclopts.exceptions import UnusedCliTokensError

from dvar.cli.console import FAILED, REFUSED
from dvar.errors import CheckpointError, DvarError, ModelError, RefusedInput, TraceError, first_line, nearest
from dvar.extras import install_command
from dvar.schema import is_encodable

_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room, then run the command again",
    (errno.EACCES, errno.EPERM, errno.EROFS): "change its permissions, or name another",
    (errno.ENAMETOOLONG,): "give it a shorter name",
    (errno.EMFILE, errno.ENFILE): "allow more open files, as ulimit -n does",
    (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV): "repair the disk, or name another",
}
_SHOWN = 200  # characters of a path
_OF_INPUT = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENXIO),
)
"""Errors of a path that the user has named, rather than of the machine."""


def token_problems(tokens: Sequence[str]) -> list[str]:
    """Return what is wrong with the words of a command line: bytes that are no UTF-8 cannot be written into any file.

    The words behind the script of `dvar launch` are its own.
    """
    words = tokens[: tokens.index("--")] if tokens[:1] == ["launch"] and "--" in tokens else tokens
    return [
        f"arguments are text in UTF-8, got {word!a}: rename the file, or correct the word"
        for word in words
        if not is_encodable(word)
    ]


def explain_error(error: Exception, tokens: Sequence[str]) -> tuple[Sequence[str], int]:
    """Return the messages and the exit status for an error that is the user's to mend.

    Args:
        error: The error.
        tokens: The words of the command line.

    Raises:
        Exception: The error itself, where it is a fault of `dvar`.
    """
    command = _name_command(tokens)
    match error:
        case UnknownOptionError():
            flags = [name for argument in error.argument_collection for name in argument.names]
            flag = error.token.keyword or error.token.value
            near = nearest(flag.lstrip("-"), [name.lstrip("-") for name in flags])
            remedy = f"the nearest known one is --{near}" if near else f"{_program(command)} --help lists them all"
            return [f"unknown flag {flag}: {remedy}"], REFUSED
        case UnusedCliTokensError():
            words = " ".join(map(repr, error.unused_tokens or ()))
            remedy = "a flag is switched off by --no_NAME, and a text with spaces stands in quotes"
            return [f"{_program(command)} has no use for {words}: {remedy}"], REFUSED
        case CycloptsError():
            return [" ".join(str(error).split())], REFUSED
        case RefusedInput():
            return [_join_lines(problem) for problem in error.problems], REFUSED
        case CheckpointError() | ModelError() | TraceError():
            return [_join_lines(str(error))], REFUSED
        case DvarError():
            return [_join_lines(str(error))], FAILED
        case ModuleNotFoundError() if str(error.name).partition(".")[0] != "dvar":
            return [f"this command needs {error.name}: {install_command(str(error.name))}"], FAILED
        case OSError():
            return _explain_system_error(error, command)
        case RecursionError():
            return [f"{command} was given a file that nests too deeply: restore it"], REFUSED
        case MemoryError():
            return [f"the memory does not suffice for {command}: end other programs, or ask for less"], FAILED
        case UnicodeError():
            return [f"{command} met text that is not UTF-8 ({first_line(error)}): save it as UTF-8"], REFUSED
        case RuntimeError() if "home directory" in str(error):
            return ["~NAME stands for the home of a user, and there is no such user: write the path out"], REFUSED
        case RuntimeError() if "Symlink loop" in str(error):  # of pathlib before Python 3.13
            return [
                f"{command} was given a link that leads back to itself ({first_line(error)}): name another"
            ], REFUSED
    if _is_instance(error, "sqlite3", "Error"):
        message = f"{command} cannot use a database of SQLite ({first_line(error)})"
        return [f"{message}: make room, close other programs that use it, or restore it"], FAILED
    if _is_instance(error, "_csv", "Error"):
        return [f"{command} was given a table that is not CSV ({first_line(error)}): save it as CSV again"], REFUSED
    if _is_instance(error, "zipfile", "BadZipFile"):
        return [f"{command} was given a damaged archive ({first_line(error)}): restore it"], REFUSED
    raise error


def _explain_system_error(error: OSError, command: str) -> tuple[list[str], int]:
    reason = error.strerror or first_line(error)
    remedy = next((text for numbers, text in _REMEDIES.items() if error.errno in numbers), "check it, then try again")
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    message = f"{command} cannot read or write {_show_path(named)}: {reason}" if named else f"{command}: {reason}"
    return [f"{_join_lines(message)}; {remedy}"], REFUSED if error.errno in _OF_INPUT else FAILED


def _show_path(path: str) -> str:
    """Return a path as a message shows it: cut where it is very long, escaped where a terminal could not show it."""
    cut = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
    return cut if cut.isprintable() else ascii(cut)


def _name_command(tokens: Sequence[str]) -> str:
    words = list(tokens[: 2 if tokens[:1] in (["train"], ["survey"]) else 1])
    return " ".join(word for word in words if not word.startswith("-")) or "dvar"


def _program(command: str) -> str:
    """Return a command as it is typed."""
    return command if command == "dvar" else f"dvar {command}"


def _join_lines(message: str) -> str:
    """Return a message as one line."""
    return " ".join(message.splitlines())


def _is_instance(error: Exception, module: str, name: str) -> bool:
    """Return whether an error is of a class of a module that is loaded, without loading it."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)
