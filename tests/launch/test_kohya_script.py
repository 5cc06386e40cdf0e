"""The script train_network.py of kohya, unmodified, from the checkout that `DVAR_SD_SCRIPTS` names."""

# It wants versions of its own: `DVAR_SD_SCRIPTS_PYTHON` names a Python that has them. Its U-Net has the size of Stable
# Diffusion in constants of a module, which a line before the launch makes small.

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_script import NEVER, SOON, read_trace
from safetensors.torch import load_file

CHECKOUT = os.environ.get("DVAR_SD_SCRIPTS")
PYTHON = os.environ.get("DVAR_SD_SCRIPTS_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="DVAR_SD_SCRIPTS is not set to a checkout of sd-scripts"),
]
CHANNELS = (32, 32, 64, 64)
STARTER = f"""
import sys
sys.path.insert(0, {CHECKOUT!r})
import library.original_unet as unet
unet.BLOCK_OUT_CHANNELS = {CHANNELS}
unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = {CHANNELS[0]}, {4 * CHANNELS[0]}
del sys.path[0]
from dvar.cli.main import main
sys.argv[0] = "dvar"
sys.exit(main())
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a tiny Stable Diffusion in its own layout, of its tokenizer, and of images."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from dvar.testing import tiny_concept, tiny_pipeline
    from pretraining.ship import save_vocabulary

    folder = tmp_path_factory.mktemp("kohya")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline(folder / "whole"), safety_checker=None)
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=CHANNELS,
        cross_attention_dim=pipeline.text_encoder.config.hidden_size,
        attention_head_dim=4,
    )
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    tokenizer = folder / "tokenizers" / "openai_clip-vit-large-patch14"
    pipeline.tokenizer.save_pretrained(tokenizer)
    save_vocabulary(tokenizer)
    (folder / "images").mkdir()
    tiny_concept(folder / "images" / "2_ktn mug")
    return {name: folder / name for name in ("model", "tokenizers", "images")}


def launch(places: dict[str, Path], output: Path, flags: tuple[str, ...], steps: int) -> str:
    """Launch the script for some steps, with its whole state at the end, and return what it printed to standard
    error."""
    arguments = {
        "pretrained_model_name_or_path": places["model"],
        "tokenizer_cache_dir": places["tokenizers"],
        "train_data_dir": places["images"],
        "output_dir": output,
        "network_module": "networks.lora",
        "network_dim": 2,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": steps,
        "learning_rate": 1e-3,
        "seed": 0,
        "save_model_as": "safetensors",
        "mixed_precision": "no",
        "max_data_loader_n_workers": 0,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    finished = subprocess.run(
        [PYTHON, "-c", STARTER, "launch", *flags, f"{CHECKOUT}/train_network.py", *words, "--save_state_on_train_end"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors that a run saved, by file and name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {f"{path.relative_to(folder)}: {name}": tensor for name, tensor in load_file(path).items()}
    return tensors


def test_training_is_that_of_the_plain_script_and_a_stop_saves(places: dict[str, Path], tmp_path: Path) -> None:
    launch(places, tmp_path / "off", ("--dvar_off",), 12)
    errors = launch(places, tmp_path / "on", NEVER, 12)
    assert "switched off" not in errors
    plain, measured = (read_tensors(tmp_path / folder) for folder in ("off", "on"))
    assert plain.keys() == measured.keys()
    assert any("lora_up" in name for name in plain)
    assert [name for name in plain if not torch.equal(plain[name], measured[name])] == []
    assert read_trace(tmp_path / "on").values.std() > 0

    errors = launch(places, tmp_path / "stopped", SOON, 60)
    assert "dvar: stop at step " in errors
    assert read_tensors(tmp_path / "stopped").keys() >= {name for name in plain if "state" not in name}
