"""Fixtures of the tests of batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dvar.testing import tiny_concept


@pytest.fixture(scope="session")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three folders of images and their nouns: a mug, a ball and an image that cannot be read."""
    folder = tmp_path_factory.mktemp("concepts")
    for name in ("ball", "mug"):
        tiny_concept(folder / name)
    shutil.copytree(folder / "mug", folder / "torn")
    next((folder / "torn").iterdir()).write_bytes(b"no image")
    for name in ("ball", "mug", "torn"):
        (folder / f"{name}.json").write_text('{"noun": "mug"}')
    return folder
