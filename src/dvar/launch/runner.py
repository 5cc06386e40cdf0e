"""A script run as Python runs it, with its training loops instrumented."""

from __future__ import annotations

import contextlib
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from dvar.errors import RefusedInput
from dvar.files import read_content
from dvar.launch.instrument import NAME, compile_instrumented
from dvar.launch.script import is_own_module
from dvar.launch.session import LaunchSession

FAILED = 1


def run_script(script: str, arguments: Sequence[str], session: LaunchSession | None) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` does, and return its exit status.

    Args:
        script: The script, as its user wrote it.
        arguments: Its arguments.
        session: The session that its training loops call; None for the plain script.

    Raises:
        RefusedInput: The session refuses what the script trains on, before its first update.
        KeyboardInterrupt: The user interrupts it.
    """
    path = Path(script)
    code: CodeType
    if session is None:
        code = compile(read_content(path), str(path), "exec", dont_inherit=True)
    else:
        code, loops = compile_instrumented(read_content(path), path)
        session.loops.update({loop.key: loop for loop in loops})
    with _as_main_program(script, arguments, session) as main:
        try:
            exec(code, vars(main))
        except SystemExit as error:
            return _exit_status(error.code)
        except RefusedInput as error:
            if session is not None and _is_ours(error.__traceback__):
                raise
            _print_traceback(error)
            return FAILED
        except Exception as error:
            _print_traceback(error)
            return FAILED
    return 0


@contextlib.contextmanager
def _as_main_program(script: str, arguments: Sequence[str], session: LaunchSession | None) -> Iterator[ModuleType]:
    """Yield the module ``__main__`` of the script; arguments and search path are then those of the script."""
    path = Path(script)
    main = types.ModuleType("__main__")
    vars(main).update(
        __file__=str(path.absolute()), __builtins__=__builtins__, __loader__=SourceFileLoader("__main__", str(path))
    )
    saved_main, saved_arguments, saved_path = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(path.resolve().parent)
    finder = _OwnModules(session) if session else None
    if finder:
        vars(main)[NAME] = session
        sys.meta_path.insert(0, finder)
    try:
        yield main
    finally:
        if finder:
            sys.meta_path.remove(finder)
        sys.modules["__main__"], sys.argv, sys.path[:] = saved_main, saved_arguments, saved_path


class _OwnModules(MetaPathFinder):
    """A finder of the script's own modules that have a training loop; all others are found as ever."""

    def __init__(self, session: LaunchSession) -> None:
        self._session = session

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader or not spec.origin:
            return None
        file = Path(spec.origin)
        if not is_own_module(file) or b".backward(" not in read_content(file):
            return None
        spec.loader = _Instrumenting(name, spec.origin, self._session)
        return spec


class _Instrumenting(SourceFileLoader):
    """The loader of a module with training loops."""

    def __init__(self, name: str, path: str, session: LaunchSession) -> None:
        super().__init__(name, path)
        self._session = session

    def get_code(self, name: str) -> CodeType:
        code, loops = compile_instrumented(self.get_data(self.path), Path(self.path))
        self._session.loops.update({loop.key: loop for loop in loops})
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[NAME] = self._session
        super().exec_module(module)


def _exit_status(code: Any) -> int:
    """Return the exit status for what a script gave to `sys.exit`, and print it where it is a message."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return FAILED


def _is_ours(trace: TracebackType | None) -> bool:
    """Return whether an exception was raised by the session, and not by dvar as the script itself uses it."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return any(Path(name).parent == Path(__file__).parent for name in frames[1:])


def _print_traceback(error: Exception) -> None:
    """Print the traceback of an error in the script, as Python does, without our own frames."""
    trace = error.__traceback__
    trace = trace.tb_next if trace else None
    sys.excepthook(type(error), error.with_traceback(trace), trace)
