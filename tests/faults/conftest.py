"""Fixtures of the fault tests: a short run, its outcome without faults, a model that is loaded once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
from short_run import Outcome, short_run

from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.training.personalise import personalise


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TextualInversionConfig:
    return short_run(tiny_model, tiny_images, tmp_path / "run")


@pytest.fixture(scope="session")
def reference(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of a run without faults."""
    config = short_run(tiny_model, tiny_images, tmp_path_factory.mktemp("reference") / "run")
    return Outcome.of(personalise(config).folder)


@pytest.fixture
def cached_model(tiny_model: Path) -> Iterator[None]:
    """Replace loading the model by copying one that is loaded once."""
    backbone = load_backbone(tiny_model, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "load", lambda *_, **__: copy.deepcopy(backbone))
        yield
