"""Measure the minutes to a saved result and its quality: ``python benchmarks/time_to_quality.py``."""

# `dvar train` runs as a user starts it, start-up, samples and export included, in three variants: to the cap without a
# probe; stopped by DVAR with the held batch evaluated after every step, as in the paper; stopped by DVAR at the
# preset's cadence.  Images of each result on the same fresh seeds are scored by a CLIP that conditions no model.

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dvar import mini
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import preset_settings
from dvar.diffusion.sampling import sample
from dvar.recordings.image_metrics import Clip, similarity
from dvar.runs.load_model import load_personalised_backbone, load_result

DVAR = Path(sys.executable).with_name("dvar")
FRESH = range(1_000, 1_016)


def list_flags(method: str) -> dict[str, list[str]]:
    """Return the flags by variant; a probe at a ninth of the cap costs next to nothing."""
    cap = preset_settings("mini", method)["max_train_steps"]
    never = ["--threshold", "1e-9", "--window", str(cap - 1), "--probe_every", str(cap // 9)]
    return {"to the cap": never, "DVAR at every step": ["--probe_every", "1"], "DVAR": []}


def train_and_score(method: str, concept: str, flags: list[str], folder: Path) -> dict[str, Any]:
    settings = [
        part for name, value in mini.training_settings(method, concept).items() for part in (f"--{name}", value)
    ]
    command = [DVAR, "train", method, *settings, "--output_dir", folder, *flags]
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    _, result = load_result(folder)
    parts = {name: round(value, 1) for name, value in result["seconds"].items()}
    return {"minutes": seconds / 60, "steps": result["steps"], "clip": measure_similarity(folder), "seconds": parts}


def measure_similarity(folder: Path) -> float:
    """Return the mean cosine of all pairs of a concept's images and images generated on fresh seeds."""
    config, _ = load_result(folder)
    prompts = [f"a photo of {config.subject}"] * len(FRESH)
    images = sample(
        load_personalised_backbone(folder), prompts, FRESH, size=config.resolution, steps=config.num_inference_steps,
        guidance=config.guidance_scale,
    )  # fmt: skip
    clip = Clip.scoring()
    references = [Image.open(path) for path in sorted((folder / "references").glob("*.png"))]
    return float(similarity(clip.embed_images(images), clip.embed_images(references)).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", nargs="+", choices=list(PAPER_METHODS), default=list(PAPER_METHODS))
    parser.add_argument("--concepts", nargs="+", default=mini.TUNING[:1])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in arguments.method:
        for concept in arguments.concepts:
            for variant, flags in list_flags(method).items():
                with tempfile.TemporaryDirectory() as folder:
                    row = {"method": method, "concept": concept, "way": variant}
                    row |= train_and_score(method, concept, flags, Path(folder) / "run")
                rows.append(row)
                print(
                    f"{method:<18}{concept:<20}{variant:<20}{row['minutes']:6.2f} min{row['steps']:6d} steps"
                    f"  CLIP {row['clip']:.3f}  {row['seconds']}",
                    flush=True,
                )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
