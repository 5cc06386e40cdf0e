"""The additions to a training loop that let held batches pass through it, made in memory."""

# Of
#
#     for epoch in range(epochs):
#         for step, batch in enumerate(train_dataloader):
#             ...
#             accelerator.backward(loss)
#             ...
#         save(model)
#
# becomes
#
#     for epoch in range(epochs):
#         for step, batch in __dvar__.batches("train.py:7", True, (train_dataloader,), lambda: global_step, ...):
#             try:
#                 ...
#                 if __dvar__.measuring:
#                     __dvar__.take(loss)
#                     continue
#                 accelerator.backward(loss)
#                 __dvar__.count()
#                 ...
#             except:
#                 if not __dvar__.absorb():
#                     raise
#         if __dvar__.idle("train.py:7"):
#             break
#         save(model)
#         if __dvar__.stopped("train.py:7"):
#             break
#
# Nothing after `backward` sees a held batch, and an error on one does not end the script. A stop leaves all loops as
# the script's own last step does: what it does at the end of an epoch, such as saving, happens once, and no further
# epoch begins. Where it leaves the outer loop itself under a condition (`if global_step >= max_train_steps: break`),
# the stop leaves there. `next(other_batches)` before `backward` becomes `__dvar__.next("9:16", other_batches)`.

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from dvar.launch.loops import Loop, TrainingLoop, enumerated, find_training_loops

NAME = "__dvar__"
"""The name under which an instrumented module finds the session."""

S = TypeVar("S", bound=ast.stmt)


def compile_instrumented(source: bytes, path: Path) -> tuple[CodeType, list[TrainingLoop]]:
    """Return the code of a module with the additions, and the loops that have them.

    Lines and names in tracebacks stay those of the file.

    Raises:
        SyntaxError: The source is not Python.
    """
    tree = ast.parse(source, str(path))
    loops = [loop for loop in find_training_loops(tree, path) if not loop.problem]
    tree = _Instrument(loops).visit(tree)
    return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True), loops


class _Instrument(ast.NodeTransformer):
    """The additions to the training loops and to the loops around them."""

    def __init__(self, loops: Sequence[TrainingLoop]) -> None:
        self._loops = {loop.node: loop for loop in loops}
        self._calls = {loop.call: loop for loop in loops}
        self._iterators = {call for loop in loops for call in loop.iterators}
        self._around = 0
        self._inside: list[TrainingLoop] = []

    def visit_FunctionDef(self, node: S) -> S:
        around, self._around = self._around, 0
        self.generic_visit(node)
        self._around = around
        return node

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_For(self, node: Loop) -> Any:
        before, exits = len(self._inside), [part for part in node.body if _leaves_loop(part)]
        self._around += 1
        self.generic_visit(node)
        self._around -= 1
        if inside := self._inside[before:]:
            _leave_when_stopped(node.body, inside, exits)
        if not self._around:
            del self._inside[before:]
        if loop := self._loops.get(node):
            assert isinstance(node, ast.For)
            node.iter = _call_batches(loop, node)
            node.body = [_absorb_errors(node.body)]
            if self._around:
                self._inside.append(loop)
                return [node, _parse(f"if {NAME}.idle({loop.key!r}):\n    break", node)]
        return node

    visit_While = visit_For

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if node in self._iterators:
            place = f"{node.lineno}:{node.col_offset}"
            node.args.insert(0, ast.copy_location(ast.Constant(place), node))
            node.func = ast.copy_location(ast.Attribute(ast.Name(NAME, ast.Load()), "next", ast.Load()), node)
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        self.generic_visit(node)
        if node not in self._calls:
            return node
        loss = self._calls[node].loss
        take = _parse(f"if {NAME}.measuring:\n    {NAME}.take({loss})\n    continue", node)
        return [take, node, _parse(f"{NAME}.count()", node)]


def _call_batches(loop: TrainingLoop, node: ast.For) -> ast.expr:
    """Return the call that takes the place of what a loop iterates over."""
    # What is read from the script goes through functions: reading its frame would keep its tensors alive.
    call = _parse(
        f"{NAME}.batches({loop.key!r}, {enumerated(node) is not None}, (), "
        f"lambda: {loop.counter or None}, lambda: {loop.accelerator}, lambda: args)",
        node.iter,
    )
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    counted = enumerated(node)
    arguments = [*counted.args, *(item.value for item in counted.keywords)] if counted else [node.iter]
    call.value.args[2] = ast.copy_location(ast.Tuple(arguments, ast.Load()), node.iter)
    return call.value


def _absorb_errors(body: list[ast.stmt]) -> ast.stmt:
    """Return the body of a loop inside a scope in which an error on a held batch does not end the script."""
    scope = _parse(f"try:\n    pass\nexcept:\n    if not {NAME}.absorb():\n        raise", body[0])
    assert isinstance(scope, ast.Try)
    scope.body = body
    return scope


def _leave_when_stopped(body: list[ast.stmt], inside: Sequence[TrainingLoop], exits: Sequence[ast.stmt]) -> None:
    """Add to the body of a loop that a stop of a training loop in it leaves it too.

    Args:
        body: The body.
        inside: The training loops in it.
        exits: The script's own statements in it that leave the loop: a stop leaves at the first of them behind the
            training loops, or else at the end.
    """
    nodes = {loop.node for loop in inside}
    last = max((place for place, part in enumerate(body) if not nodes.isdisjoint(ast.walk(part))), default=-1)
    places = (place for place, part in enumerate(body) if place > last and part in exits)
    condition = " or ".join(f"{NAME}.stopped({loop.key!r})" for loop in inside)
    body.insert(next(places, len(body)), _parse(f"if {condition}:\n    break", body[-1]))


def _leaves_loop(statement: ast.stmt) -> bool:
    """Return whether a statement leaves the loop that it stands in under a condition."""
    return isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Break | ast.Return)


def _parse(source: str, place: ast.AST) -> ast.stmt:
    """Return a statement that has the line of ``place`` in tracebacks."""
    statement = ast.parse(source).body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, place)
    return statement
