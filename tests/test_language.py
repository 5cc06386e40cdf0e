"""The language of the source and its tests: plain docstrings, names from the glossary, no dialect."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dvar

PACKAGE = Path(dvar.__file__).parent
TESTS = Path(__file__).parent
# The integrations with training frameworks give their callbacks one name, so that code changes its import alone.
SHARED_CLASS_NAMES = {"DvarCallback"}

VARIABLES = {
    *("told", "found", "said", "kept", "made", "drawn", "shown", "asked", "wanted", "given", "known", "alone", "anew"),
    *("one", "well", "tell", "wrong_here"),
}
FUNCTIONS = {"make", "standing", "lacking", "alone", "_alone", "_make", "_read", "_table", "_told"}
# A function does something, so its docstring does not begin like the description of a thing.
NOT_IMPERATIVE = {
    "The",
    "A",
    "An",
    "This",
    "What",
    "Whether",
    "How",
    "Who",
    "Where",
    "Everything",
    "Every",
    "All",
    "Of",
}
# A class or a property is a thing, so its docstring does not begin with a clause.
NOT_A_NOUN = {"What", "How", "Who", "Where", "Why", "Says", "Tells"}
SECTIONS = ("Args", "Returns", "Yields", "Raises")
PHRASES = (
    (re.compile(r"\bpictures?\b", re.IGNORECASE), "image"),
    (re.compile(r"\b(is|are|was|were|been) (never |not )?told\b"), "receives, or is reported"),
)
# What the name of a test does not say; what is told is reported, and a package is neither a room nor a wing.
TEST_WORDS = {"told", "picture", "pictures", "room", "rooms", "wing", "wings", "door", "doors", "anew"}

Check = Callable[[str, ast.Module, str], Iterator[str]]  # of a module's name, tree and source
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def check_module_docstring(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    text = ast.get_docstring(tree)
    if text is None:
        yield "line 1: the module needs a docstring"
    elif "\n" in text and name != "__init__":  # `help(dvar)` shows how to begin
        yield "line 1: a module docstring is one line; move the rest into a comment or a class"
    else:
        yield from (f"line 1: {problem}" for problem in first_line_problems(text))


def check_docstrings(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for node in public_definitions(tree):
        text = ast.get_docstring(node)
        if text is None:
            continue
        first_word = text.split()[0]
        if is_thing(node):
            if first_word in NOT_A_NOUN:
                yield f"line {node.lineno}: the docstring of {node.name} begins with {first_word!r}, not with a noun"
        elif first_word in NOT_IMPERATIVE:
            yield f"line {node.lineno}: the docstring of {node.name} begins with {first_word!r}, not with a verb"
        yield from (f"line {node.lineno}: {node.name}: {problem}" for problem in first_line_problems(text))
        for section in SECTIONS:
            if re.search(rf"^ *{section}: *\S", text, re.MULTILINE):
                yield f"line {node.lineno}: {node.name}: {section!r} stands on a line of its own, over its entries"


def check_names(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, Definition) and node.name in FUNCTIONS:
            yield f"line {node.lineno}: {node.name} does not say what it does: use a verb and an object"
    for line, name in identifiers(tree):
        if "picture" in name.lower():
            yield f"line {line}: {name} says picture: use image"
    yield from check_variables(name, tree, source)


def check_variables(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for line, variable in variables(tree):
        if variable in VARIABLES:
            yield f"line {line}: {variable} is not a noun of the domain"


def check_test_names(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (words := TEST_WORDS & {*node.name.split("_")}):
            yield f"line {node.lineno}: {node.name} says {', '.join(sorted(words))}"


def check_phrases(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for line, text in prose(tree, source):
        for pattern, remedy in PHRASES:
            if match := pattern.search(without_code(text)):
                yield f"line {line}: {match[0]!r}: use {remedy}"


CHECKS: tuple[Check, ...] = (check_module_docstring, check_docstrings, check_names, check_phrases)
TEST_CHECKS: tuple[Check, ...] = (check_module_docstring, check_variables, check_test_names)


def first_line_problems(text: str) -> Iterator[str]:
    first_line = text.splitlines()[0]
    if not (first_line[0].isupper() or first_line[0] in "`*0123456789"):
        yield f"the docstring begins with a small letter: {first_line[:40]!r}"
    if not first_line.endswith("."):
        yield f"the first line of the docstring ends without a period: {first_line[-40:]!r}"


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield the public functions and classes of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                members = (member for member in node.body if isinstance(member, Definition))
                yield from (member for member in members if not member.name.startswith("_"))


def is_thing(node: Definition) -> bool:
    decorators = [] if isinstance(node, ast.ClassDef) else [ast.unparse(item) for item in node.decorator_list]
    return isinstance(node, ast.ClassDef) or any(item.endswith("property") for item in decorators)


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node.lineno, node.name
    yield from variables(tree)


def variables(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the names that are assigned to, and the parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def prose(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def without_code(text: str) -> str:
    """Return the text without what is quoted: names on disk and in addresses keep their spelling."""
    return re.sub(r"``.*?``|`.*?`|\"[^\"\n]*\"", "", text)


def find_problems(folder: Path, checks: tuple[Check, ...] = CHECKS) -> list[str]:
    problems = []
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        problems += [f"{name}, {problem}" for check in checks for problem in check(name, tree, source)]
    return problems


def find_duplicate_classes(package: Path) -> list[str]:
    trees = [ast.parse(path.read_bytes()) for path in package.rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in names.items() if count > 1)


def test_the_source_is_in_plain_language() -> None:
    assert find_problems(PACKAGE) == []


def test_the_tests_are_in_plain_language() -> None:
    assert find_problems(TESTS, TEST_CHECKS) == []


def test_class_names_are_unique_in_the_package() -> None:
    assert set(find_duplicate_classes(PACKAGE)) == SHARED_CLASS_NAMES


# --- planted offenders: each check must be able to fail -------------------------------------------------------------

CLEAN = '''"""Losses of a run."""

# A comment about the image in "pictures" and in ``picture.png``.

class Loss:
    """A loss at one step."""

    @property
    def finite(self) -> bool:
        """Whether the loss is a finite number."""


def read_loss(path):
    """Return the loss in a file.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged.
    """
    loss = 1
    return loss
'''


def test_a_clean_module_has_no_problems(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text(CLEAN)
    assert find_problems(tmp_path) == []


@pytest.mark.parametrize(
    ("clean", "offence"),
    [
        ('"""Losses of a run."""', ""),
        ('"""Losses of a run."""', '"""Losses of a run.\n\nAnd more.\n"""'),
        ('"""Losses of a run."""', '"""losses of a run."""'),
        ('"""Losses of a run."""', '"""Losses of a run"""'),
        ("A loss at one step.", "What a step lost."),
        ("Whether the loss is", "How the loss is"),
        ("Return the loss", "The loss"),
        ("Return the loss", "return the loss"),
        ("in a file.\n", "in a file\n"),
        ("Raises:\n        ValueError: The file", "Raises: ValueError when the file"),
        ("loss = 1", "found = 1"),
        ("loss = 1", "for told in ():\n        pass"),
        ("loss = 1", "with open(path) as kept:\n        pass"),
        ("def read_loss(path)", "def read_loss(given)"),
        ("def read_loss(path)", "def read_loss(picture_path)"),
        ("class Loss", "class PictureLoss"),
        ("def read_loss", "def _read"),
        ("def read_loss", "def make"),
        ("# A comment", "# A picture"),
        ("Return the loss", "Return the picture"),
        ("# A comment", "# Nothing is told"),
    ],
)
def test_an_offence_is_found(tmp_path: Path, clean: str, offence: str) -> None:
    assert clean in CLEAN
    (tmp_path / "losses.py").write_text(CLEAN.replace(clean, offence, 1))
    assert find_problems(tmp_path)


@pytest.mark.parametrize(
    ("clean", "offence"),
    [
        ('"""Losses of a run."""', ""),
        ("loss = 1", "shown = 1"),
        ("loss = 1", "for asked, wanted in ():\n        pass"),
        ("def read_loss(path)", "def read_loss(given)"),
        ("def read_loss", "def test_a_loss_is_told"),
        ("def read_loss", "def test_pictures_have_a_loss"),
        ("def read_loss", "def test_no_room_has_a_loss"),
    ],
)
def test_an_offence_in_a_test_is_found(tmp_path: Path, clean: str, offence: str) -> None:
    assert clean in CLEAN
    path = tmp_path / "test_losses.py"
    path.write_text(CLEAN)
    assert find_problems(tmp_path, TEST_CHECKS) == []
    path.write_text(CLEAN.replace(clean, offence, 1))
    assert find_problems(tmp_path, TEST_CHECKS)


def test_two_classes_of_one_name_are_found(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(CLEAN)
    assert find_duplicate_classes(tmp_path) == ["Loss"]
