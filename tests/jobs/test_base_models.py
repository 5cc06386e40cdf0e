"""A base model that is loaded once for several runs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_tables import tiny_table
from safetensors.torch import load_file

from dvar.diffusion.backbone import Backbone
from dvar.jobs.base_models import BaseModels
from dvar.jobs.config import BatchConfig
from dvar.jobs.read_jobs import read_jobs
from dvar.training.personalise import load_base_model, personalise

METHODS: dict[str, dict[str, Any]] = {
    "textual-inversion": {},
    "dreambooth-lora": {"placeholder_token": "<thing>"},
    "custom-diffusion": {"num_class_images": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_copy_is_the_run_on_a_fresh_model(
    method: str, tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = {**tiny_table(tiny_model, concepts, "mug"), "method": method, **METHODS[method]}
    if method == "custom-diffusion":
        table["class_noun"] = table.pop("initializer_token")
    (job,) = read_jobs([table], BatchConfig(output_dir=str(tmp_path)))
    loaded = []

    def load(config: Any) -> Backbone:
        loaded.append(load_base_model(config))
        return loaded[-1]

    models = BaseModels(load)
    before = {
        name: weight.clone() for network in models(job.config).modules for name, weight in network.state_dict().items()
    }
    for name, loader in (("fresh", load_base_model), ("first", models), ("second", models)):
        personalise(replace(job.config, output_dir=str(tmp_path / name)), load=loader)
    assert len(loaded) == 1
    after = {name: weight for network in loaded[0].modules for name, weight in network.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = {path.name: load_file(path) for path in (tmp_path / "fresh").glob("*.safetensors")}
    for name in ("first", "second"):
        for file, tensors in fresh.items():
            copies = load_file(tmp_path / name / file)
            assert copies.keys() == tensors.keys()
            assert all(torch.equal(copies[key], tensors[key]) for key in tensors)


def test_copies_share_the_weights_and_nothing_else(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    (job,) = read_jobs([tiny_table(tiny_model, concepts, "mug")], BatchConfig(output_dir=str(tmp_path)))
    models = BaseModels()
    first, second = models(job.config), models(job.config)
    assert first.tokenizer is not second.tokenizer
    ours, theirs = (next(backbone.denoiser.parameters()) for backbone in (first, second))
    assert ours is not theirs
    assert ours.data_ptr() == theirs.data_ptr()
    other = models(replace(job.config, mixed_precision="bf16"))
    assert next(other.denoiser.parameters()).dtype == torch.bfloat16


def test_the_model_before_is_gone_when_the_next_one_loads(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a run, which holds a copy of it, is held by its own parts."""
    (job,) = read_jobs([tiny_table(tiny_model, concepts, "mug")], BatchConfig(output_dir=str(tmp_path)))
    alive: list[int] = []
    loaded: list[weakref.ref[Any]] = []

    def load(config: Any) -> Backbone:
        alive.append(sum(reference() is not None for reference in loaded))
        backbone = load_base_model(config)
        loaded.append(weakref.ref(next(backbone.denoiser.parameters()).untyped_storage()))
        return backbone

    models = BaseModels(load)
    gc.disable()
    try:
        run: dict[str, Any] = {"backbone": models(job.config)}
        run["probe"] = run
        del run
        models(replace(job.config, gradient_checkpointing=True))
    finally:
        gc.enable()
    assert alive == [0, 0]
