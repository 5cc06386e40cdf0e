"""Stage 6: what the stages made, under ``src/dvar/mini/``, in the formats of diffusers and transformers, in float16.

``python -m pretraining.ship`` writes ``model/``, ``judges/`` and ``recipe.json``; ``--concepts`` the pictures of the
held-out subjects instead, and ``--flow`` the second model, ``flow/``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from dvar import mini
from dvar.mini.world.concepts import held_out, reference_scenes
from dvar.mini.world.scene import SIZE, render
from pretraining import clip, flow, recogniser, unet
from pretraining.latents import load_latents
from pretraining.training import WORK, load_average
from pretraining.words import load_tokenizer

ROOT = Path(mini.__file__).parent
MADE_OF = ("autoencoder", "clip", "unet", "vision", "judge", "recogniser")
MADE_OF_FLOW = ("flow",)


def save_judges(folder: Path) -> None:
    """The CLIP that scores, what the pipeline lacks of the one that conditions, and the recogniser."""
    vocabulary = len(load_tokenizer())
    clip.load("judge", vocabulary).half().save_pretrained(folder / "clip")
    # Pixels as `pretraining.pictures.as_tensor` makes them, of pictures of any size.
    half, side = [0.5] * 3, {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=half, image_std=half, resample=3
    )
    processor.save_pretrained(folder / "clip")
    whole = clip.load("vision", vocabulary).half()
    whole.config.save_pretrained(folder / "clip-conditioner")
    rest = {key: value.contiguous() for key, value in whole.state_dict().items() if not key.startswith("text_model.")}
    save_file(rest, folder / "clip-conditioner" / "all-but-text.safetensors")
    state = load_average("recogniser", recogniser.build()).half().state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "recogniser.safetensors")


def save_concepts(folder: Path) -> None:
    """Each held-out subject: a folder of three to five pictures, and beside it its noun and its parameters as JSON."""
    for name, subject in held_out().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        scenes = reference_scenes(name)
        for i, scene in enumerate(scenes):
            Image.fromarray(render(subject, scene)).save(folder / name / f"{i:02d}.png", optimize=True)
        record = {"noun": subject.noun, "places": [scene.place for scene in scenes], "subject": asdict(subject)}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def save_vocabulary(folder: Path) -> None:
    """The files of the tokenizer that programs on transformers 4 read: its vocabulary and its merges."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]) + "\n")
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """A pipeline in float16, which programs on transformers 4 load too."""
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        save_vocabulary(tokenizer)
    # transformers loads a text encoder in the type its config names, diffusers all else in float32: they must agree.
    for config in folder.glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def save_flow(folder: Path) -> None:
    """The second model."""
    tokenizer = load_tokenizer()
    model = load_average("flow", flow.Flow(len(tokenizer)))
    save_pipeline(flow.pipeline(model, flow.load_vae(load_latents()["moments"]), tokenizer), folder)


def save_recipe(path: Path, stages: tuple[str, ...] = MADE_OF) -> None:
    """Stage by stage: steps, seed, learning rate, a hash of the data, versions; of the other model, what was there."""
    before = json.loads(path.read_text()) if path.exists() else {}
    made = {stage: json.loads((WORK / stage / "stage.json").read_text()) for stage in stages}
    recipe = {stage: made.get(stage, before.get(stage)) for stage in (*MADE_OF, *MADE_OF_FLOW)}
    path.write_text(json.dumps({stage: record for stage, record in recipe.items() if record}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--concepts", action="store_true")
    part.add_argument("--flow", action="store_true")
    parser.add_argument("--to", type=Path, default=ROOT)
    chosen = parser.parse_args()
    if chosen.concepts:
        save_concepts(chosen.to / "concepts")
        return
    if chosen.flow:
        save_flow(chosen.to / "flow")
        save_recipe(chosen.to / "recipe.json", MADE_OF_FLOW)
        return
    (chosen.to / "judges").mkdir(parents=True, exist_ok=True)
    save_judges(chosen.to / "judges")
    save_pipeline(unet.pipeline(load_average("unet", unet.build())), chosen.to / "model")
    save_recipe(chosen.to / "recipe.json")


if __name__ == "__main__":
    main()
