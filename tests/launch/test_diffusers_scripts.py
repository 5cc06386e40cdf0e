"""The training scripts of diffusers, unmodified, from the checkout that `DVAR_DIFFUSERS_EXAMPLES` names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from command_line import Answer, dvar
from launched_script import NEVER, SOON, fresh_process, read_trace
from safetensors.torch import load_file

EXAMPLES = os.environ.get("DVAR_DIFFUSERS_EXAMPLES")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES, reason="DVAR_DIFFUSERS_EXAMPLES is not set to `examples` of a checkout"),
    pytest.mark.filterwarnings("ignore"),  # those of the scripts
]
OFF = ("--dvar_off",)
STEPS = 12
PROMPT = ("--instance_prompt", "a photo of ktn mug")
CLASS = (
    "--with_prior_preservation",
    "--class_data_dir",
    "{images}",
    "--class_prompt",
    "a mug",
    "--num_class_images",
    "4",
)
INSTANCES = ("--instance_data_dir", "{images}", *PROMPT)
SCRIPTS = {
    "textual_inversion/textual_inversion.py": (
        "sd",
        *("--train_data_dir", "{images}", "--learnable_property", "object", "--repeats", "5"),
        *("--placeholder_token", "<ball>", "--initializer_token", "mug", "--learning_rate", "0.01"),
    ),
    "textual_inversion/textual_inversion_sdxl.py": (
        "sdxl",
        *("--train_data_dir", "{images}", "--learnable_property", "object", "--repeats", "5"),
        *("--placeholder_token", "<ball>", "--initializer_token", "mug", "--learning_rate", "0.01"),
    ),
    "dreambooth/train_dreambooth_lora.py": ("sd", *INSTANCES, *CLASS),
    "dreambooth/train_dreambooth.py": ("sd", *INSTANCES, "--train_text_encoder"),
    "dreambooth/train_dreambooth_lora_sdxl.py": ("sdxl", *INSTANCES, "--gradient_accumulation_steps", "2"),
    "dreambooth/train_dreambooth_lora_sd3.py": ("sd3", *INSTANCES, "--cache_latents"),
    "dreambooth/train_dreambooth_lora_flux.py": ("flux", *INSTANCES, "--cache_latents", "--train_text_encoder"),
    "dreambooth/train_dreambooth_lora_flux2_klein.py": (
        "klein",
        *(*INSTANCES, "--cache_latents", "--text_encoder_out_layers", "9", "18", "27"),
    ),
    "dreambooth/train_dreambooth_lora_z_image.py": ("z_image", *INSTANCES, "--cache_latents"),
    "dreambooth/train_dreambooth_lora_qwen_image.py": ("qwen_image", *INSTANCES, "--cache_latents"),
    "custom_diffusion/train_custom_diffusion.py": (
        "sd",
        *("--instance_data_dir", "{images}", "--instance_prompt", "a photo of <new1> mug", "--no_safe_serialization"),
        *("--modifier_token", "<new1>", "--initializer_token", "mug", "--freeze_model", "crossattn_kv"),
    ),
    "text_to_image/train_text_to_image_lora.py": (
        "sd",
        *("--train_data_dir", "{captioned}", "--cache_dir", "{cache}", "--rank", "2"),
        *("--gradient_accumulation_steps", "2"),
    ),
}
"""The scripts, each with its base model and the arguments that it needs beside those that all have."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of tiny models, of images, and of images with captions."""
    from dvar.testing import (
        tiny_concept,
        tiny_flux_pipeline,
        tiny_klein_pipeline,
        tiny_pipeline,
        tiny_qwen_image_pipeline,
        tiny_sd3_pipeline,
        tiny_xl_pipeline,
        tiny_z_image_pipeline,
    )

    folder = tmp_path_factory.mktemp("diffusers")
    captions = [{"file_name": f"{index:02d}.png", "text": "a photo of a mug"} for index in range(4)]
    captioned = tiny_concept(folder / "captioned")
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)), encoding="utf-8")
    return {
        "sd": tiny_pipeline(folder / "sd"),
        "sdxl": tiny_xl_pipeline(folder / "sdxl"),
        "sd3": tiny_sd3_pipeline(folder / "sd3", t5=True),
        "flux": tiny_flux_pipeline(folder / "flux"),
        "klein": tiny_klein_pipeline(folder / "klein"),
        "z_image": tiny_z_image_pipeline(folder / "z_image"),
        "qwen_image": tiny_qwen_image_pipeline(folder / "qwen_image"),
        "images": tiny_concept(folder / "images"),
        "captioned": captioned,
        "cache": folder / "cache",
    }


def launch(script: str, places: dict[str, Path], output: Path, flags: tuple[str, ...], steps: int = STEPS) -> Answer:
    """Launch a script of the checkout for some steps, with a checkpoint at the last one."""
    model, *rest = SCRIPTS[script]
    arguments = [
        *("--pretrained_model_name_or_path", str(places[model]), "--resolution", "32", "--train_batch_size", "1"),
        *("--seed", "0", "--max_train_steps", str(steps), "--checkpointing_steps", str(steps)),
        *("--output_dir", str(output)),
        *(word.format(**places) if word.startswith("{") else word for word in rest),
    ]
    with fresh_process():
        return dvar("launch", *flags, Path(str(EXAMPLES)) / script, *arguments)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a run, without the logs and what dvar writes."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    skipped = ("logs", "trace.jsonl", "report.html")
    return {name: read_content(path) for name, path in files.items() if not name.startswith(skipped)}


def read_content(path: Path) -> bytes:
    """Return the bytes of a file; of weights those of the tensors, because the order of their metadata is random."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors = sorted(load_file(path).items())
    return b"".join(name.encode() + weight.flatten().view(torch.uint8).numpy().tobytes() for name, weight in tensors)


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_is_that_of_the_plain_script_and_a_stop_saves(
    script: str, places: dict[str, Path], tmp_path: Path
) -> None:
    for folder, flags in (("off", OFF), ("on", NEVER)):
        answer = launch(script, places, tmp_path / folder / "run", flags)  # model cards have the name of their folder
        assert answer.status == 0, answer.err
        assert "switched off" not in answer.err
    plain, measured = read_files(tmp_path / "off" / "run"), read_files(tmp_path / "on" / "run")
    assert [name for name in plain if plain[name] != measured.get(name)] == []
    assert any("optimizer" in name for name in plain)
    assert any("random_states" in name for name in plain)
    assert read_trace(tmp_path / "on" / "run").values.std() > 0

    answer = launch(script, places, tmp_path / "stopped", SOON, steps=60)
    assert answer.status == 0, answer.err
    assert "dvar: stop at step " in answer.err
    saved = {name.rpartition("/")[2] for name in read_files(tmp_path / "stopped")}
    assert saved >= {name.rpartition("/")[2] for name in plain if "checkpoint" not in name}
