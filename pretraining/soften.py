"""Stage 7: the shipped U-Net, softened.  Bounds the logits of every attention head by a rescaling of its queries and
keys, without training.

``python -m pretraining.soften`` rewrites ``src/dvar/mini/model/unet``; with ``--to`` it writes a whole pipeline
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from dvar import mini
from pretraining.attention import BOUND, bound_heads, hardness, peaks, watched
from pretraining.unet import Held, held_draws

DRAWS = 128


@torch.no_grad()
def soften(unet: UNet2DConditionModel, draws: Held, bound: float = BOUND) -> int:
    """Bound every attention head of ``unet`` over ``draws``, in place.

    One forward pass does it: each module is rescaled before it runs, so those after it see what it will give from then
    on, and another pass over the same draws finds nothing left to bound.

    Returns:
        How many heads were rescaled.
    """
    rescaled = 0

    def look(name: str, module: Attention, logits: Tensor) -> None:
        nonlocal rescaled
        rescaled += bound_heads(module, peaks(logits), bound)

    with watched(unet, look):
        draws.predict(unet)
    return rescaled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=mini.path(), help="a pipeline's folder")
    parser.add_argument("--to", type=Path, default=None, help="where the softened pipeline goes, if not there")
    parser.add_argument("--bound", type=float, default=BOUND)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    pipe = StableDiffusionPipeline.from_pretrained(chosen.model, safety_checker=None)
    draws = held_draws(pipe, DRAWS)

    def report(when: str) -> None:
        hardest = max(hardness(pipe.unet, lambda: draws.predict(pipe.unet)).values())
        print(json.dumps({"when": when, "hardest": round(hardest, 4), "mse": round(draws.error(pipe.unet), 5)}))

    report("before")
    rescaled = soften(pipe.unet, draws, chosen.bound)
    report(f"{rescaled} heads rescaled")
    target = chosen.to or chosen.model
    if target != chosen.model:
        shutil.copytree(chosen.model, target, dirs_exist_ok=True)
    pipe.unet.half().save_pretrained(target / "unet")
    config = target / "unet" / "config.json"  # which would name the folder that it was loaded from
    settings = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    recipe = target.parent / "recipe.json"
    if recipe.exists():
        made = json.loads(recipe.read_text())
        made["unet"]["softened_to"] = chosen.bound
        recipe.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
