"""Fixtures that all tests share: a tiny model, images to train it on, a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes is no property of the code: the machine may do other work.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Stable Diffusion of resolution 32."""
    from dvar.testing import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four images of one subject, 64 pixels a side."""
    from dvar.testing import tiny_concept

    return tiny_concept(tmp_path_factory.mktemp("tiny") / "images")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run that DVAR stopped, with samples."""
    from fake_run import generate_trace, write_run

    return write_run(tmp_path / "run", generate_trace())


@pytest.fixture
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Wait until no other process of these tests uses Ray: two clusters on one machine end each other's drivers."""
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path_factory.getbasetemp().parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
