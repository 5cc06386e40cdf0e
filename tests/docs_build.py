"""The programs of docs/build, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load_script(name: str) -> ModuleType:
    """Return the program docs/build/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_build_{name}", DOCS / "build" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks up its own module
    spec.loader.exec_module(module)
    return module
