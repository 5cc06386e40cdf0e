"""Every family against stock diffusers: the contract of base models."""

from __future__ import annotations

import families
import pytest


class TestStableDiffusion(families.StableDiffusionFamily):
    pass


class TestStableDiffusionXL(families.StableDiffusionXLFamily):
    pass


class TestStableDiffusion3(families.StableDiffusion3Family):
    pass


class TestFlux(families.FluxFamily):
    pass


@pytest.mark.slow
class TestLatentDiffusion(families.LatentDiffusionFamily):
    pass


@pytest.mark.slow
class TestStableDiffusion3WithT5(families.StableDiffusion3WithT5Family):
    pass


@pytest.mark.slow
class TestFluxWithoutGuidance(families.FluxWithoutGuidanceFamily):
    pass


@pytest.mark.slow
class TestFlux2Klein(families.Flux2KleinFamily):
    pass


@pytest.mark.slow
class TestZImage(families.ZImageFamily):
    pass


@pytest.mark.slow
class TestQwenImage(families.QwenImageFamily):
    pass
