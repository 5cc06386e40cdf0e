"""Minutes from the command to the saved result, and how good it is: ``python benchmarks/time_to_quality.py``.

`dvar train` runs as a user starts it, start-up, samples and export included, in three ways: to the cap without a probe;
stopped by DVAR reading the held batch after every step, as the paper does; stopped by DVAR as the preset reads it.
Each result draws the same fresh seeds, scored by the bundled CLIP that conditions nothing.
"""

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
from dvar.config.presets import preset_settings
from dvar.config.training import PAPER_METHODS
from dvar.diffusion.sampling import sample
from dvar.recordings.image_metrics import Clip, similarity
from dvar.runs.load_model import load_personalised_backbone, load_result

DVAR = Path(sys.executable).with_name("dvar")
FRESH = range(1_000, 1_016)


def ways(method: str) -> dict[str, list[str]]:
    """The flags of each way; a probe at an eighth of the cap is as good as none."""
    cap = preset_settings("mini", method)["max_train_steps"]
    never = ["--threshold", "1e-9", "--window", str(cap - 1), "--probe_every", str(cap // 9)]
    return {"to the cap": never, "DVAR at every step": ["--probe_every", "1"], "DVAR": []}


def trained(method: str, concept: str, flags: list[str], folder: Path) -> dict[str, Any]:
    settings = [
        part for name, value in mini.training_settings(method, concept).items() for part in (f"--{name}", value)
    ]
    command = [DVAR, "train", method, *settings, "--output_dir", folder, *flags]
    began = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    _, result = load_result(folder)
    parts = {name: round(value, 1) for name, value in result["seconds"].items()}
    return {"minutes": seconds / 60, "steps": result["steps"], "clip": score(folder), "seconds": parts}


def score(folder: Path) -> float:
    """How like the concept's pictures a run draws its word on fresh seeds: mean cosine of all pairs."""
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
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in chosen.method:
        for concept in chosen.concepts:
            for way, flags in ways(method).items():
                with tempfile.TemporaryDirectory() as folder:
                    row = {"method": method, "concept": concept, "way": way}
                    row |= trained(method, concept, flags, Path(folder) / "run")
                rows.append(row)
                print(
                    f"{method:<18}{concept:<20}{way:<20}{row['minutes']:6.2f} min{row['steps']:6d} steps"
                    f"  CLIP {row['clip']:.3f}  {row['seconds']}",
                    flush=True,
                )
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
