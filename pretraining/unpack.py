"""The inverse of `pretraining.ship`: lays what ships out as stages that ended, so that training can go on from it.

``python -m pretraining.unpack`` writes ``work/<stage>/`` for every stage that is not there.  What ships is the moving
average, in float16: the weights themselves, the optimiser's moments and the tutors of the CLIPs are gone.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from dvar.mini import recogniser
from pretraining.clip import WIDTHS, Tutored
from pretraining.evaluate import ROOT, conditioner
from pretraining.ship import MADE_OF
from pretraining.training import WORK


def shipped(pipe: StableDiffusionPipeline, root: Path) -> dict[str, nn.Module]:
    """Return the model of each stage of `MADE_OF` with the weights of ``pipe`` and of the judges in ``root``."""
    torch.manual_seed(0)  # of the tutors
    conditioning = Tutored(WIDTHS["clip"], len(pipe.tokenizer))
    conditioning.clip = conditioner(pipe.text_encoder, root)
    judge = Tutored(WIDTHS["judge"], len(pipe.tokenizer))
    judge.clip = CLIPModel.from_pretrained(root / "judges" / "clip", dtype=torch.float32)
    reader = recogniser.load(root / "judges" / "recogniser.safetensors")
    return {
        "autoencoder": pipe.vae, "unet": pipe.unet,
        "clip": conditioning, "vision": conditioning, "judge": judge, "recogniser": reader,
    }  # fmt: skip


def unpack(root: Path, work: Path) -> list[str]:
    """Write the tokenizer and each stage that ``work`` lacks as they stand in ``root``.

    Returns:
        The names of the stages written.
    """
    pipe = StableDiffusionPipeline.from_pretrained(root / "model", safety_checker=None)
    if not (work / "tokenizer").exists():
        pipe.tokenizer.save_pretrained(work / "tokenizer")
    models, recipe = shipped(pipe, root), json.loads((root / "recipe.json").read_text())
    missing = [name for name in MADE_OF if not (work / name / "state.safetensors").exists()]
    for name in missing:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"step": torch.tensor(recipe[name]["reached"])}
        for key, value in models[name].named_parameters():
            tensors |= {f"{part}.{key}": value.detach().float().clone() for part in ("weight", "average")}
        save_file(tensors, folder / "state.part")
        (folder / "stage.json").write_text(json.dumps(recipe[name], indent=1) + "\n")
        os.replace(folder / "state.part", folder / "state.safetensors")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, default=ROOT, help="where `ship` put what is unpacked")
    print(*unpack(parser.parse_args().root, WORK))


if __name__ == "__main__":
    main()
