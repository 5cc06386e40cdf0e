"""Every method on every family of base models: refused with a reason, or trained, resumed and loaded by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import families
import pytest

from dvar.testing import FamilyTrainingContract
from dvar.testing.family_contract import ATTENTION, CLIP_EMBEDS, EMBEDS, LORA, NO_UNET, NO_WORD

pytestmark = pytest.mark.slow


class TestStableDiffusion(FamilyTrainingContract):
    family = families.StableDiffusionFamily
    files: ClassVar[Mapping[str, set[str]]] = {
        "textual-inversion": {EMBEDS},
        "dreambooth-lora": {EMBEDS, LORA},
        "lora": {LORA},
        "dora": {LORA},
        "custom-diffusion": {EMBEDS, ATTENTION},
    }


class TestLatentDiffusion(FamilyTrainingContract):
    family = families.LatentDiffusionFamily
    files: ClassVar[Mapping[str, set[str]]] = TestStableDiffusion.files


class TestStableDiffusionXL(FamilyTrainingContract):
    family = families.StableDiffusionXLFamily
    files: ClassVar[Mapping[str, set[str]]] = {
        "textual-inversion": {CLIP_EMBEDS},
        "dreambooth-lora": {CLIP_EMBEDS, LORA},
        "lora": {LORA},
        "dora": {LORA},
        "custom-diffusion": {CLIP_EMBEDS, ATTENTION},
    }


class TestStableDiffusion3(FamilyTrainingContract):
    family = families.StableDiffusion3Family
    files: ClassVar[Mapping[str, set[str]]] = {
        "textual-inversion": {CLIP_EMBEDS},
        "dreambooth-lora": {CLIP_EMBEDS, LORA},
        "lora": {LORA},
        "dora": {LORA},
    }
    refusals: ClassVar[Mapping[str, str]] = {"custom-diffusion": NO_UNET}


class TestStableDiffusion3WithT5(TestStableDiffusion3):
    family = families.StableDiffusion3WithT5Family


class TestFlux(FamilyTrainingContract):
    family = families.FluxFamily
    files: ClassVar[Mapping[str, set[str]]] = {
        "textual-inversion": {EMBEDS},
        "dreambooth-lora": {EMBEDS, LORA},
        "lora": {LORA},
        "dora": {LORA},
    }
    refusals: ClassVar[Mapping[str, str]] = {"custom-diffusion": NO_UNET}


class TestFlux2Klein(FamilyTrainingContract):
    family = families.Flux2KleinFamily
    files: ClassVar[Mapping[str, set[str]]] = {"lora": {LORA}, "dora": {LORA}}
    refusals: ClassVar[Mapping[str, str]] = {
        "textual-inversion": NO_WORD,
        "dreambooth-lora": NO_WORD,
        "custom-diffusion": NO_UNET,
    }
    lora = "lora"


class TestZImage(FamilyTrainingContract):
    family = families.ZImageFamily
    files: ClassVar[Mapping[str, set[str]]] = TestFlux2Klein.files
    refusals: ClassVar[Mapping[str, str]] = TestFlux2Klein.refusals
    lora = "lora"


class TestQwenImage(FamilyTrainingContract):
    family = families.QwenImageFamily
    files: ClassVar[Mapping[str, set[str]]] = TestFlux2Klein.files
    refusals: ClassVar[Mapping[str, str]] = TestFlux2Klein.refusals
    lora = "lora"
