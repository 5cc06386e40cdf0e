"""Benchmark the three methods at the size of Stable Diffusion 1.5: ``python benchmarks/sd15.py [--steps 50]``."""

# Builds a pipeline of that shape with random weights (its U-Net has 860 million), trains it by ``dvar train`` once for
# each method in a process of its own, and prints for each: steps a second, the share of that time which the evaluations
# of the held batch take, the measured peak of memory (of the tensors on a GPU, of the process on a CPU) and the seconds
# of the run.  The pipeline and the runs are deleted at the end.

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dvar.stopping.trace import Trace
from dvar.testing import tiny_concept, tiny_tokenizer

GIB = 2**30
METHODS = {
    "textual-inversion": (),
    "dreambooth-lora": ("--placeholder_token", "<thing>"),
    "custom-diffusion": ("--class_noun", "toy"),
}


def save_sd15_pipeline(folder: Path) -> Path:
    """Return ``folder``, into which a random pipeline of the shape of Stable Diffusion 1.5 was saved in half precision.

    Its tokenizer knows a few words only; the text encoder's table has all 49,408 rows.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(  # CLIP ViT-L/14
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # diffusers' own defaults are its shape
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


def measure_run(method: str, model: Path, root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Train once and return the figures."""
    folder, images = root / method, root / "images"
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": images,
        "initializer_token": "toy",
        "output_dir": folder,
        "resolution": arguments.resolution,
        "mixed_precision": arguments.mixed_precision,
        "train_batch_size": arguments.batch,
        "eval_batch_size": arguments.held,
        "max_train_steps": arguments.steps,
        "window": arguments.steps - 1,
        "threshold": 1e-9,
        "num_validation_images": 1,
        "num_inference_steps": arguments.sampling,
        **({"class_data_dir": root / "class"} if method == "custom-diffusion" else {}),
    }
    flags = [flag for name, value in settings.items() for flag in (f"--{name}", str(value))]
    program = [sys.executable, "-c", "import sys; from dvar.cli.main import main; sys.exit(main())", "train", method]
    start = time.perf_counter()
    subprocess.run([*program, *flags, *METHODS[method], *arguments.extra], check=True)
    elapsed = time.perf_counter() - start
    seconds = [record["seconds"] for record in Trace.read(folder / "trace.jsonl").records][2:]  # the first ones warm up
    step_seconds = [step["train"] + step["probe"] for step in seconds]
    memory = json.loads((folder / "result.json").read_text())["memory"]
    return {
        "steps/s": 1 / statistics.median(step_seconds),
        "probe share": sum(step["probe"] for step in seconds) / sum(step_seconds),
        "peak GiB": memory["peak"] / GIB,
        "whole s": elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What dvar train does not know goes to it: --gradient_checkpointing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--steps", type=int, default=50, help="at least 9, since the rule's window holds 8")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--mixed_precision", default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--held", type=int, default=8, help="inputs in the held batch")
    parser.add_argument("--sampling", type=int, default=50, help="denoising steps of the one sample at the end")
    parser.add_argument("--folder", help="where the pipeline goes meanwhile: 2 GB; the system's own by default")
    arguments, arguments.extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        model = save_sd15_pipeline(root / "model")
        for name in ("images", "class"):
            tiny_concept(root / name, size=arguments.resolution)
        results = {method: measure_run(method, model, root, arguments) for method in arguments.methods}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {arguments.resolution} px, {arguments.mixed_precision} {' '.join(arguments.extra)}")
    print("".ljust(20), *(name.rjust(13) for name in next(iter(results.values()))))
    for method, figures in results.items():
        print(method.ljust(20), *(f"{value:13.3f}" for value in figures.values()))


if __name__ == "__main__":
    main()
