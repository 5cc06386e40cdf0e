"""The training loops of a script, found in its source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Loop = ast.For | ast.While
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


@dataclass(frozen=True)
class TrainingLoop:
    """A loop with a backward pass in it.

    Attributes:
        path: The file.
        line: The line on which the loop begins.
        iterable: Source of what it iterates over; the condition of a `while`.
        loss_line: The line of the backward call.
        loss: Source of the loss.
        accelerator: Source of the object whose `backward` is called.
        counter: Source of the variable that counts updates; empty where none is found.
        by_position: Whether a cache is read at the position of the batch, as in ``latents_cache[step]``.
        iterators: The calls of `next` before the backward pass: batches of other dataloaders.
        problem: Why held batches cannot pass through it, with the remedy; empty where they can.
        node: The loop in the tree.
        call: The statement of the backward call in the tree.
    """

    path: Path
    line: int
    iterable: str
    loss_line: int
    loss: str
    accelerator: str
    counter: str
    by_position: bool
    problem: str
    iterators: tuple[ast.Call, ...] = field(repr=False, compare=False)
    node: Loop = field(repr=False, compare=False)
    call: ast.Expr | None = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """The name of the loop: its file and line."""
        return f"{self.path}:{self.line}"


def find_training_loops(tree: ast.AST, path: Path) -> list[TrainingLoop]:
    """Return the loops with a backward pass in a module, in the order of the file."""
    calls: dict[Loop, list[tuple[ast.Call, ast.Expr | None]]] = {}
    for loop, call, statement in _iter_backward_calls(tree, None):
        calls.setdefault(loop, []).append((call, statement))
    loops = [_describe(loop, calls[loop], path) for loop in calls]
    return sorted(loops, key=lambda loop: loop.line)


def enumerated(loop: Loop) -> ast.Call | None:
    """Return the call of `enumerate` that a loop iterates over; None where it iterates over something else."""
    if isinstance(loop, ast.For) and isinstance(call := loop.iter, ast.Call):
        plain = isinstance(call.func, ast.Name) and call.func.id == "enumerate"
        if plain and 1 <= len(call.args) <= 2 and not any(isinstance(item, ast.Starred) for item in call.args):
            return call
    return None


def _iter_backward_calls(node: ast.AST, loop: Loop | None) -> Iterator[tuple[Loop, ast.Call, ast.Expr | None]]:
    """Yield each backward call inside a loop, with the innermost loop and the statement that it is, if it is one."""
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Attribute)
            and child.func.attr == "backward"
            and loop
        ):
            yield loop, child, node if isinstance(node, ast.Expr) else None
        inner = child if isinstance(child, ast.For | ast.While) else None if isinstance(child, Scope) else loop
        yield from _iter_backward_calls(child, inner)


def _describe(loop: Loop, calls: list[tuple[ast.Call, ast.Expr | None]], path: Path) -> TrainingLoop:
    call, statement = calls[0]
    assert isinstance(call.func, ast.Attribute)
    receiver = ast.unparse(call.func.value)
    return TrainingLoop(
        path=path,
        line=loop.lineno,
        iterable=ast.unparse(loop.iter if isinstance(loop, ast.For) else loop.test),
        loss_line=call.lineno,
        loss=ast.unparse(call.args[0]) if call.args else receiver,
        accelerator=receiver,
        counter=_find_counter(loop),
        by_position=_reads_by_position(loop),
        iterators=tuple(_iter_next_calls(loop, call.lineno)),
        problem=next(_loop_problems(loop, [call.lineno for call, _ in calls], call, statement, receiver), ""),
        node=loop,
        call=statement,
    )


def _loop_problems(
    loop: Loop, lines: list[int], call: ast.Call, statement: ast.Expr | None, receiver: str
) -> Iterator[str]:
    """Yield what keeps held batches from passing through a loop, the gravest first."""
    where = f"line {loop.lineno}"
    if len(lines) > 1:
        yield (
            f"one backward call gives the loss that is measured, got {len(lines)} in the loop of {where} "
            f"(lines {', '.join(map(str, lines))}): call a StopMonitor in the script instead"
        )
    if not call.args or "accelerator" not in receiver.lower():
        yield (
            f"the loss is taken from accelerator.backward(loss), got {ast.unparse(call)!r} in line {call.lineno}: "
            "a script without accelerate calls a StopMonitor itself"
        )
    if not isinstance(loop, ast.For) or _is_range(loop.iter):
        source = ast.unparse(loop.iter) if isinstance(loop, ast.For) else f"while {ast.unparse(loop.test)}"
        yield (
            f"the innermost loop around backward must iterate over a dataloader, got {source!r} in {where}: "
            "call a StopMonitor in the script instead"
        )
    if statement is None:
        yield (
            f"backward must be a statement of its own, got it inside another in line {call.lineno}: "
            "call a StopMonitor in the script instead"
        )


def _is_range(iterable: ast.expr) -> bool:
    """Return whether a loop counts: `range(n)`, also inside `tqdm(...)`."""
    if not isinstance(iterable, ast.Call):
        return False
    return (isinstance(iterable.func, ast.Name) and iterable.func.id == "range") or any(map(_is_range, iterable.args))


def _find_counter(loop: Loop) -> str:
    """Return the variable or attribute that the loop raises by 1 at each update, by its name."""
    targets = [
        node.target
        for node in ast.walk(loop)
        if isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.Add)
        and isinstance(node.value, ast.Constant)
        and node.value.value == 1
        and isinstance(node.target, ast.Name | ast.Attribute | ast.Subscript)
    ]
    names = [ast.unparse(target) for target in targets]
    for word in ("global_step", "step", "update", "iter"):
        for name in names:
            if word in name.lower():
                return name
    return ""


def _iter_next_calls(loop: Loop, end: int) -> Iterator[ast.Call]:
    """Yield the calls of `next` with one argument in a loop before line ``end``."""
    for node in ast.walk(loop):
        match node:
            case ast.Call(func=ast.Name("next"), args=[ast.Name() | ast.Attribute() | ast.Subscript()]):
                if node.lineno < end:
                    yield node


def _reads_by_position(loop: Loop) -> bool:
    """Return whether something is subscripted by the number that `enumerate` gives a batch."""
    if enumerated(loop) is None or not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Tuple):
        return False
    position = loop.target.elts[0]
    if not isinstance(position, ast.Name):
        return False
    slices = (node.slice for node in ast.walk(loop) if isinstance(node, ast.Subscript))
    return any(isinstance(name, ast.Name) and name.id == position.id for part in slices for name in ast.walk(part))
