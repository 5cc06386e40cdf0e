"""The snapshot of all messages: a changed message is seen in review."""

# ``make snapshots`` writes it again.

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import dvar
from dvar import errors

SOURCE = Path(dvar.__file__).parent
SNAPSHOT = Path(__file__).parent / "snapshots" / "messages.txt"
REWRITE = "DVAR_REWRITE_SNAPSHOTS"

OURS = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, errors.DvarError)}
BUILT_IN = {"AttributeError", "ImportError", "KeyError", "RuntimeError", "TypeError", "ValueError"}
SPEAKERS = {*OURS, *BUILT_IN, "warn", "print_message", "print_messages", "_report_failure"}
"""What is called with a message: error classes, warnings and the messages of the command line."""
COLLECTORS = ("problems", "conflicts", "faults")
"""Words in the name of a function that returns or yields messages."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def collect_messages(source: Path) -> Iterator[str]:
    """Yield every message in the source, with its module before it; placeholders stand for values."""
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        yield from sorted({f"{module}: {text}" for text in collect_module_messages(ast.parse(path.read_bytes()))})


def collect_module_messages(tree: ast.Module) -> Iterator[str]:
    """Yield every message of a module."""
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, Function))):
        yield from (text for text in Scope(scope).texts() if is_message(text))


def is_message(text: str) -> bool:
    return " " in text.strip()


class Scope:
    """A function, or the module outside its functions, and the messages in it."""

    def __init__(self, scope: ast.AST) -> None:
        self.nodes = sorted(walk_scope(scope), key=lambda node: getattr(node, "lineno", 0))
        self.collects = isinstance(scope, Function) and any(word in scope.name for word in COLLECTORS)
        self.assignments: dict[str, list[ast.expr]] = {}
        self.resolved: set[ast.expr] = set()
        for node in self.nodes:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AugAssign(target=ast.Name(id=name), value=value)
                    | ast.NamedExpr(target=ast.Name(id=name), value=value)
                ):
                    self.assignments.setdefault(name, []).append(value)

    def texts(self) -> Iterator[str]:
        """Yield the texts of all messages."""
        expressions = list(self.expressions())
        for expression in expressions:
            yield from self.texts_of(expression)
        # Of a name that is assigned in several branches, only the last assignment before its use is resolved so far.
        names = {node.id for part in expressions for node in ast.walk(part) if isinstance(node, ast.Name)}
        for name in sorted(names & self.assignments.keys()):
            for value in self.assignments[name]:
                if value not in self.resolved:
                    yield from self.texts_of(value)

    def expressions(self) -> Iterator[ast.expr]:
        """Yield the expressions that hold messages."""
        for node in self.nodes:
            match node:
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in SPEAKERS:
                    yield from args
                case ast.Call(func=ast.Attribute(attr="append" | "extend"), args=args) if self.collects:
                    yield from args
                case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value) if self.collects:
                    yield value
                case ast.YieldFrom(value=value) | ast.AugAssign(value=value) if self.collects:
                    yield value

    def texts_of(self, expression: ast.AST) -> Iterator[str]:
        """Yield the texts in an expression; a name stands for what was assigned to it."""
        match expression:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield from self.joined(parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                yield from self.joined([left, right])
            case ast.Name() if value := self.last_assignment(expression):
                self.resolved.add(value)
                yield from self.texts_of(value)
            case ast.List() | ast.Tuple() | ast.Set() | ast.IfExp() | ast.BoolOp() | ast.Starred() | ast.Dict():
                for part in ast.iter_child_nodes(expression):
                    yield from self.texts_of(part)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.SetComp(elt=element):
                yield from self.texts_of(element)

    def last_assignment(self, use: ast.Name) -> ast.expr | None:
        """Return the last value that was assigned to a name before this use."""
        values = [value for value in self.assignments.get(use.id, []) if (value.end_lineno or 0) < use.lineno]
        return values[-1] if values else None

    def joined(self, parts: list[ast.expr]) -> Iterator[str]:
        """Yield the text of joined parts, once for each alternative within it."""
        choices = [""]
        for part in parts:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            inner = [text for text in self.texts_of(value) if is_message(text)]
            if isinstance(part, ast.Constant):
                inner = [str(part.value)]
            choices = [start + end for start in choices for end in inner or [format_placeholder(value)]]
        yield from choices


def walk_scope(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or module, without those of the functions in it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, Function):
            yield node
            yield from walk_scope(node)


def format_placeholder(value: ast.expr) -> str:
    return "{" + (ast.unparse(value) if isinstance(value, ast.Name | ast.Attribute) else "…") + "}"


def test_every_message_is_in_the_snapshot() -> None:
    messages = "".join(f"{line}\n" for line in collect_messages(SOURCE))
    if os.environ.get(REWRITE):
        SNAPSHOT.write_text(messages, encoding="utf-8", newline="\n")
    assert messages.splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines(), "make snapshots, and review it"


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("def f():\n    raise RefusedInput([f'a {b} c', 'no message'])", ["a {b} c", "no message"]),
        (
            "def f():\n    start = f'rule, got {x!r}'\n    raise ModelError(f'{start}: remedy {y()}')",
            ["rule, got {x}: remedy {…}"],
        ),
        ("def problems(c):\n    yield from [f'{name} must be {c.low}' for name in c]", ["{name} must be {c.low}"]),
        (
            "def problems(c):\n    found = []\n    found.append('one two')\n    found += ['three four']",
            ["one two", "three four"],
        ),
        ("def f():\n    warnings.warn('take care')\n    print('not a message')", ["take care"]),
        (
            "def problems(c):\n    t = f'{c} is one'\n    yield f'{t}: drop it'\n    t = 'two is two'\n    yield t",
            ["{c} is one: drop it", "two is two"],
        ),
        (
            "def f():\n    if x:\n        t = 'one way'\n    else:\n        t = 'another way'\n    raise ValueError(t)",
            ["another way", "one way"],
        ),
        ("class A:\n    def _conflicts(self):\n        yield {'name'}, 'both are given'", ["both are given"]),
    ],
)
def test_messages_are_collected(source: str, messages: list[str]) -> None:
    assert list(collect_module_messages(ast.parse(source))) == messages
