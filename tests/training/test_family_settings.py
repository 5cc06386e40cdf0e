"""What a family of base models takes by default in place of the paper's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dvar.cli import train
from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.presets import configure, configure_to_cap
from dvar.diffusion.families import BACKBONES
from dvar.errors import RefusedInput
from dvar.jobs.config import BatchConfig
from dvar.jobs.read_jobs import read_jobs
from dvar.studio.new_run import preset_numbers
from dvar.training import preflight
from dvar.training.family_fit import family_settings

DOCS = Path(__file__).parents[2] / "docs"


def write_index(folder: Path, pipeline: str, **more: Any) -> Path:
    """Write the only file of a model by which its family is known."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **more}))
    return folder


def settings(model: Path, **values: Any) -> DreamBoothLoraConfig:
    values = {"pretrained_model_name_or_path": str(model), **values}
    return configure(values, DreamBoothLoraConfig, family_settings)


@pytest.mark.parametrize("pipeline", BACKBONES)
def test_preset_lean_has_what_the_family_takes(pipeline: str, tmp_path: Path) -> None:
    family = BACKBONES[pipeline]
    config = settings(write_index(tmp_path / "model", pipeline))
    plain = configure({"pretrained_model_name_or_path": "owner/model"}, DreamBoothLoraConfig)
    expected = {**plain.to_dict(), **family.settings, **family.lora_settings}
    expected["pretrained_model_name_or_path"] = str(tmp_path / "model")
    assert config.to_dict() == expected
    inversion = configure(
        {"pretrained_model_name_or_path": str(tmp_path / "model")}, TextualInversionConfig, family_settings
    )
    assert inversion.learning_rate == 1e-2
    assert inversion.guidance_scale == family.settings.get("guidance_scale", 7.5)


def test_settings_of_ones_own_and_other_presets_come_first(tmp_path: Path) -> None:
    model = write_index(tmp_path / "model", "FluxPipeline")
    assert settings(model, guidance_scale=2.0, learning_rate=3e-3).guidance_scale == 2.0
    assert settings(model, learning_rate=3e-3).learning_rate == 3e-3
    assert settings(model, preset="lean").guidance_scale == 3.5
    assert settings(model, preset="paper").guidance_scale == 6.0
    smoke = settings(model, preset="smoke")
    assert (smoke.guidance_scale, smoke.num_inference_steps, smoke.learning_rate) == (3.5, 5, 1e-4)


@pytest.mark.parametrize(
    ("name", "pipeline", "more", "expected"),
    [
        ("FLUX.1-schnell", "FluxPipeline", {}, (4, 0.0)),
        ("FLUX.1-dev", "FluxPipeline", {}, (28, 3.5)),
        ("Z-Image-Turbo", "ZImagePipeline", {}, (8, 0.0)),
        ("sdxl-turbo", "StableDiffusionXLPipeline", {}, (4, 0.0)),
        ("klein", "Flux2KleinPipeline", {"is_distilled": True}, (4, 0.0)),
        ("klein", "Flux2KleinPipeline", {"is_distilled": False}, (50, 4.0)),
    ],
)
def test_a_distilled_model_has_few_steps_and_no_guidance(
    name: str, pipeline: str, more: dict[str, Any], expected: tuple[int, float], tmp_path: Path
) -> None:
    config = settings(write_index(tmp_path / name, pipeline, **more))
    assert (config.num_inference_steps, config.guidance_scale) == expected


def test_a_model_that_is_not_at_hand_has_those_of_lean(tmp_path: Path) -> None:
    assert settings(tmp_path / "nothing").guidance_scale == 6.0
    assert settings(write_index(tmp_path / "model", "OtherPipeline")).guidance_scale == 6.0


def test_a_low_cap_scales_them_no_less(tmp_path: Path) -> None:
    model = write_index(tmp_path / "model", "FluxPipeline")
    values = {"pretrained_model_name_or_path": str(model), "max_train_steps": 100}
    config, scaled = configure_to_cap(values, DreamBoothLoraConfig, family_settings)
    assert "window 63 instead of 440" in scaled
    assert config.guidance_scale == 3.5


def test_the_command_the_batch_and_the_studio_ask_for_them(
    tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_index(tmp_path / "model", "FluxPipeline")
    values = {"pretrained_model_name_or_path": str(model), "instance_data_dir": str(tiny_images)}
    values |= {"instance_prompt": "a mug", "output_dir": str(tmp_path / "run")}
    seen: list[Any] = []

    def refuse(config: Any) -> None:
        seen.append(config)
        raise RefusedInput(["enough"])

    monkeypatch.setattr(preflight, "preflight", refuse)
    with pytest.raises(RefusedInput, match="enough"):
        train.run_training(values, DreamBoothLoraConfig)
    table = {**values, "id": "it", "method": "dreambooth-lora"}
    del table["output_dir"]
    (job,) = read_jobs([table], BatchConfig(output_dir=str(tmp_path / "out")))
    assert [config.learning_rate for config in (*seen, job.config)] == [1e-4, 1e-4]
    assert preset_numbers("dreambooth-lora", "FLUX", {"FLUX": str(model)})["learning_rate"] == 1e-4


def test_the_page_on_base_models_names_them() -> None:
    def describe(values: Any) -> str:
        return ", ".join(f"`{name}` {_describe_value(value)}" for name, value in values.items()) or "–"

    page = (DOCS / "reference" / "base-models.md").read_text(encoding="utf-8")
    for family in BACKBONES.values():
        cells = (family.title, describe(family.settings), describe(family.lora_settings), f"{family.few_steps}")
        assert f"| {' | '.join(cells)} |" in page
        assert family.learns_no_token in page


def _describe_value(value: Any) -> str:
    return "yes" if value is True else value if isinstance(value, str) else f"{value:g}"
