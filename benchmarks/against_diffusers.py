"""Compare training with diffusers' own scripts: ``python benchmarks/against_diffusers.py CHECKOUT``."""

# Both sides are whole programs on the bundled model with the same batch, images and optimizer, in one thread. Processor
# seconds of two lengths give the cost of a step (the slope) and what a run costs beside its steps (the rest); programs
# take turns. Ours probes 8 held samples at every 12th step, never stops, and writes a sample image before and after
# training; theirs writes none, so ours is drawn in one sampling step.

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from dvar import Trace, mini

SCRIPTS = {
    "textual-inversion": "textual_inversion/textual_inversion.py",
    "dreambooth-lora": "dreambooth/train_dreambooth_lora.py",
    "custom-diffusion": "custom_diffusion/train_custom_diffusion.py",
}
CONCEPT, NOUN, PROBE_EVERY = "red_striped_mug", "mug", 12
# Runs a script where PyTorch has no torchvision, with what the scripts use of it. The libraries are imported before, so
# that they know of none.
RUNNER = """
import random, runpy, sys
from enum import Enum
from types import ModuleType
import numpy, torch
from PIL import Image, ImageOps
from diffusers import StableDiffusionPipeline
from transformers import AutoTokenizer, CLIPTextModel, PretrainedConfig

transforms = ModuleType("torchvision.transforms")
package = ModuleType("torchvision")
package.transforms = transforms

class InterpolationMode(Enum):
    NEAREST, BILINEAR, BICUBIC, LANCZOS = 0, 2, 3, 1

def Compose(parts):
    def apply(image):
        for part in parts:
            image = part(image)
        return image
    return apply

def Resize(size, interpolation=InterpolationMode.BILINEAR):
    def apply(image):
        scale = size / min(image.size)
        return image.resize([round(scale * side) for side in image.size], Image.Resampling(interpolation.value))
    return apply

def CenterCrop(size):
    return lambda image: ImageOps.fit(image, (size, size))

def RandomHorizontalFlip(p=0.5):
    return lambda image: ImageOps.mirror(image) if random.random() < p else image

def ToTensor():
    return lambda image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255

def Normalize(mean, deviation):
    return lambda tensor: (tensor - mean[0]) / deviation[0]

RandomCrop = CenterCrop
for part in (InterpolationMode, Compose, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize):
    setattr(transforms, part.__name__, part)
transforms.RandomCrop = RandomCrop
sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def build_commands(checkout: Path, method: str, steps: int, python: list[str]) -> dict[str, list[str]]:
    """Return the command of each program, for a run of so many steps."""
    images, classes = mini.concepts()[CONCEPT], mini.concepts()["green_checked_boot"]
    shared = [
        *("--instance_data_dir", str(images), "--resolution", "64", "--train_batch_size", "4", "--seed", "0"),
        *("--pretrained_model_name_or_path", str(mini.path()), "--max_train_steps", str(steps)),
        *("--learning_rate", "5e-4", "--checkpointing_steps", "100000"),
    ]
    theirs, ours = [*shared, "--lr_warmup_steps", "0", "--lr_scheduler", "constant"], list(shared)
    ours += ["--preset", "mini", "--num_validation_images", "1", "--validation_steps", "100000"]
    ours += ["--num_inference_steps", "1"]
    prior = ["--class_data_dir", str(classes), "--num_class_images", "4"]
    if method == "textual-inversion":
        theirs[0] = "--train_data_dir"
        theirs += ["--learnable_property", "object", "--placeholder_token", "<thing>", "--initializer_token", NOUN]
        ours += ["--placeholder_token", "<thing>", "--initializer_token", NOUN]
    elif method == "dreambooth-lora":
        theirs += ["--instance_prompt", f"a photo of sks {NOUN}", "--rank", "4"]
        ours += ["--instance_prompt", f"a photo of sks {NOUN}", "--rank", "4"]
    else:
        theirs += ["--instance_prompt", f"photo of a <thing> {NOUN}", "--modifier_token", "<thing>", *prior]
        theirs += ["--initializer_token", NOUN, "--with_prior_preservation", "--class_prompt", NOUN, "--noaug"]
        ours += ["--placeholder_token", "<thing>", "--initializer_token", NOUN, "--class_noun", NOUN, *prior]
    dvar = [str(Path(sys.executable).with_name("dvar")), "train", method, *ours]
    rule = ["--probe_every", str(PROBE_EVERY), "--window", str(8 * PROBE_EVERY), "--threshold", "1e-9"]
    return {
        "diffusers": [*python, str(checkout / "examples" / SCRIPTS[method]), *theirs],
        "dvar": [*dvar, *rule],
    }


def measure_seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Return the processor seconds of a program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--output_dir", str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure_probe_share(run: Path) -> float:
    """Return the probe's share of the seconds of a run's updates and probes."""
    seconds = [row["seconds"] for row in Trace.read(run / "trace.jsonl").records[1:]]
    probe = sum(row["probe"] for row in seconds)
    return float(probe / (probe + sum(row["train"] for row in seconds)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers")
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 300))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=tuple(SCRIPTS), default=tuple(SCRIPTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    short, long = options.lengths
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        has_torchvision = importlib.util.find_spec("torchvision") is not None
        (root / "runner.py").write_text(RUNNER)
        python = [sys.executable] if has_torchvision else [sys.executable, str(root / "runner.py")]
        for method in options.methods:
            seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
            for turn in range(options.rounds):
                for steps in (short, long):
                    for program, command in build_commands(options.checkout, method, steps, python).items():
                        folder = root / f"{method}-{turn}-{steps}-{program}"
                        seconds[program, steps].append(measure_seconds(command, folder, environment))
            costs = {}
            for program in ("diffusers", "dvar"):
                first, last = (statistics.median(seconds[program, steps]) for steps in (short, long))
                slope = (last - first) / (long - short)
                costs[program] = {"step": slope, "beside": first - short * slope}
            share = measure_probe_share(root / f"{method}-0-{long}-dvar")
            costs["dvar, without the probe"] = {"step": costs["dvar"]["step"] * (1 - share)}
            theirs = costs["diffusers"]["step"]
            for program, cost in costs.items():
                rows.append({"method": method, "program": program, **cost, "speed": theirs / cost["step"]})
                speed = f"{1000 * cost['step']:7.0f} ms a step{theirs / cost['step']:7.2f} x"
                beside = f"{cost['beside']:8.1f} s beside the steps" if "beside" in cost else ""
                print(f"{method:<20}{program:<25}{speed}{beside}", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"diffusers": version("diffusers"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
