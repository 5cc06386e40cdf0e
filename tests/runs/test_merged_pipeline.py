"""Whole pipelines of finished runs."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxPipeline

from dvar.config.methods import DreamBoothLoraConfig
from dvar.runs.export import write_merged_pipeline
from dvar.testing import tiny_flux_pipeline
from dvar.training.personalise import personalise
from dvar.training.run_layout import MODEL_CARD


def test_all_parts_that_a_lora_changes_are_merged(tiny_images: Path, tmp_path: Path) -> None:
    """By itself, diffusers adds a LoRA of FLUX to the transformer alone."""
    model = tiny_flux_pipeline(tmp_path / "model")
    config = DreamBoothLoraConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(tiny_images),
        instance_prompt="a photo of mug",
        output_dir=str(tmp_path / "run"),
        train_text_encoder=True,
        learning_rate=5e-2,
        resolution=32,
        train_batch_size=1,
        eval_batch_size=1,
        max_train_steps=9,
        window=8,
        threshold=1e-9,
        validation_steps=9,
        num_validation_images=1,
        num_inference_steps=1,
    )
    run = personalise(config).folder
    folders = (write_merged_pipeline(run, tmp_path / "merged"), model)
    merged, base = (FluxPipeline.from_pretrained(folder) for folder in folders)
    for part in ("transformer", "text_encoder"):
        before, after = getattr(base, part).state_dict(), getattr(merged, part).state_dict()
        assert any(not after[name].equal(before[name]) for name in before), part
    assert "safety checker" not in (folders[0] / MODEL_CARD).read_text(encoding="utf-8")
