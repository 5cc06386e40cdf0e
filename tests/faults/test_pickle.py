"""A malicious pickle is refused and never executed wherever weights are read."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import short_run

from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.clip import Clip
from dvar.errors import CheckpointError, ModelError, RefusedInput
from dvar.runs.export import write_kohya_lora, write_merged_pipeline
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import tiny_clip
from dvar.training.checkpoint import MANIFEST, TENSORS, Checkpoint
from dvar.training.personalise import personalise
from dvar.training.run_layout import LORA


class MaliciousPickle:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The path of a file that exists once a pickle was executed."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(MaliciousPickle(path)))
    assert path.exists(), "the pickle creates the file"
    path.unlink()
    return path


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("unet", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]),
        ("vae", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]),
        ("text_encoder", ["pytorch_model.bin", "model.safetensors"]),
    ],
)
def test_a_pickled_model_is_refused(
    tmp_path: Path, tiny_model: Path, marker: Path, part: str, names: list[str], write: Any
) -> None:
    for name in names:
        model = shutil.copytree(tiny_model, tmp_path / name / "model")
        for weights in (model / part).glob("*.safetensors"):
            weights.unlink()
        with (model / part / name).open("wb") as file:
            write(MaliciousPickle(marker), file)
        with pytest.raises(ModelError):
            load_backbone(model, device="cpu")
        assert not marker.exists()


def test_a_model_with_custom_code_is_refused(tmp_path: Path, tiny_model: Path, marker: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Evil"]}))
    (model / "unet" / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    )
    with pytest.raises(ModelError):
        load_backbone(model, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickled_lora_is_not_exported(
    tmp_path: Path, tiny_model: Path, tiny_images: Path, marker: Path, write: Any
) -> None:
    settings = short_run(tiny_model, tiny_images, tmp_path / "run")
    shared = {
        name: value for name, value in asdict(settings).items() if name not in ("initializer_token", "output_dir")
    }
    config = DreamBoothLoraConfig(
        **shared | {"placeholder_token": None}, instance_prompt="a dog", output_dir=settings.output_dir
    )
    folder = personalise(config).folder
    with (folder / LORA).open("wb") as file:
        write(MaliciousPickle(marker), file)
    for export in (write_merged_pipeline, write_kohya_lora):
        with pytest.raises(RefusedInput, match="damaged"):
            export(folder, tmp_path / "export.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickled_clip_is_refused(tmp_path: Path, marker: Path, name: str, write: Any) -> None:
    folder = tiny_clip(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        write(MaliciousPickle(marker), file)
    with pytest.raises(ModelError):
        Clip.load(folder)
    assert not marker.exists()


def test_pickled_weights_and_checkpoints_are_refused(
    config: TextualInversionConfig, tmp_path: Path, marker: Path
) -> None:
    folder = personalise(replace(config, num_validation_images=1)).folder
    content, checkpoint = pickle.dumps(MaliciousPickle(marker)), folder / "checkpoint-9"
    (folder / "learned_embeds.safetensors").write_bytes(content)
    with pytest.raises(RefusedInput, match="damaged"):
        load_personalised_backbone(folder, device="cpu")
    with pytest.raises(RefusedInput, match="damaged"):
        write_merged_pipeline(folder, tmp_path / "merged")
    (checkpoint / TENSORS).write_bytes(content)
    digests = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**digests, TENSORS: sha256(content).hexdigest()}))
    with pytest.raises(CheckpointError, match="checkpoint-9 is not a checkpoint of dvar"):
        Checkpoint.read(checkpoint)
    assert not marker.exists()
