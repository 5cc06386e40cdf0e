"""A base model sharded by FSDP: the run of one process, what is refused, and the weights that each process holds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_training import SOURCE, assert_same_run, flags, start_processes, train_on, wait_for
from PIL import Image
from two_processes import work_on_two

from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.testing import tiny_sd3_pipeline
from dvar.training.shard_fit import is_sharded, problems

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
SHORT: dict[str, Any] = {"max_train_steps": 10, "validation_steps": 5, "window": 8, "threshold": 0.3}

SHARE = """
import json, sys
from pathlib import Path
import torch
from dvar.config.methods import DreamBoothLoraConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.sampling import rehearse, sample
from dvar.training.methods.registry import build_method
from dvar.training.processes import launched_processes
from dvar.training.sharding import shard_backbone

folder, model, device = Path(sys.argv[1]), sys.argv[1] + "/model", sys.argv[2]
config = DreamBoothLoraConfig(instance_prompt="a photo of a mug", rank=2)

def count_bytes(networks):
    local = [w.to_local() if hasattr(w, "to_local") else w for n in networks for w in n.parameters()]
    return sum(part.numel() * part.element_size() for part in local)

def measure(backbone, method):
    noise = torch.Generator().manual_seed(1)
    side = backbone.denoiser.config.sample_size
    noisy = torch.randn(2, backbone.denoiser.config.in_channels, side, side, generator=noise).to(backbone.device)
    ids = backbone.tokenize(["a mug", "a photo of a cat"]).to(backbone.device)
    backbone.prepare_training(ids)
    with torch.no_grad():
        for weight in method.parameters:
            weight.fill_(0.01)
    loss = backbone.predict(noisy, torch.tensor([100.0, 500.0], device=backbone.device), ids).float().square().mean()
    loss.backward()
    options = {"size": 32, "steps": 2}
    image = sample(backbone, ["a mug"], [0], **options)[0]
    backbone.release_encoders(lambda: rehearse(backbone, ["a cup"], size=32, guidance=7.5), images=True)
    assert not any(w.device.type != "meta" for t in backbone.towers for w in t.encoder.parameters())
    after = sample(backbone, ["a cup"], [0], **options)[0]
    return {
        "loss": loss.item(),
        "gradients": [weight.grad.norm().item() for weight in method.parameters],
        "images": [list(image.tobytes()), list(after.tobytes())],
    }

with launched_processes() as processes:
    facts = {}
    for name in ("whole", "sharded"):
        backbone = load_backbone(model, device=device, offload=name == "sharded", mixed_precision=sys.argv[3])
        method = build_method(config, backbone)
        if name == "sharded":
            backbone = shard_backbone(backbone, processes)
        towers = [tower.encoder for tower in backbone.towers if tower.embeds_key is None]
        facts[name] = {"denoiser": count_bytes([backbone.denoiser]), "towers": count_bytes(towers)}
        facts[name]["learned"] = sum(weight.numel() * weight.element_size() for weight in method.parameters)
        facts[name] |= measure(backbone, method)
    (folder / f"outcome-{processes.rank}.json").write_text(json.dumps(facts))
"""


def assert_same_files(first: Path, second: Path) -> None:
    """Assert that two runs left files of the same names, and equal images."""
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (first, second)]
    assert names[0] == names[1]
    images = [name for name in names[0] if name.endswith(".png")]
    assert any(name.startswith("samples/") for name in images)
    for name in images:
        ours, theirs = (
            torch.frombuffer(bytearray(Image.open(folder / name).tobytes()), dtype=torch.uint8).int()
            for folder in (first, second)
        )
        assert (ours - theirs).abs().max() <= 1, name


@pytest.mark.slow
def test_the_command_of_the_documentation_trains_the_run_of_one(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    text = (SOURCE.parent / "docs" / "guides" / "run-many.md").read_text()
    (line,) = re.findall(r"^(accelerate launch --use_fsdp .*) dreambooth-lora", text, re.MULTILINE)
    options = line.replace("_processes 4", "_processes 2").split()[2:]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    settings = {
        **SHORT,
        "placeholder_token": "<thing>",
        "threshold": 0.7,
        "use_dora": True,
        "gradient_checkpointing": True,
    }
    command = [*launcher, *options, "dreambooth-lora", *flags(tiny_model, tiny_images, tmp_path / "2", **settings)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("weights ") == 2  # one process speaks for both
    ((_, output, _),) = train_on(1, flags(tiny_model, tiny_images, tmp_path / "1", **settings), "dreambooth-lora")
    verdicts = [re.sub(r"[\d.]+ %", "", words.splitlines()[0]) for words in (ended.stdout, output)]
    assert verdicts[0] == verdicts[1]
    assert_same_run(tmp_path / "1", tmp_path / "2", atol=1e-4)
    assert_same_files(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_what_changes_the_network_itself_and_generates_images_of_the_class(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "class_noun": "mug", "num_class_images": 2, "keep": "best", "learning_rate": 1e-3}
    for count, environment in ((1, {}), (2, FSDP)):
        words = flags(tiny_model, tiny_images, tmp_path / str(count), **settings)
        outputs = train_on(count, words, "custom-diffusion", environment)
        assert [status for status, _, _ in outputs] == [0] * count, outputs
    assert_same_run(tmp_path / "1", tmp_path / "2")
    assert_same_files(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_a_sharded_run_that_loses_a_process_ends_and_resumes_on_one(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_train_steps": 30, "threshold": 1e-9, "validation_steps": 15}
    words = flags(tiny_model, tiny_images, tmp_path / "lost", **settings)
    processes = start_processes(words, 2, environment=FSDP)
    wait_for(tmp_path / "lost" / "checkpoint-4" / "manifest.json", processes[0])
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert time.monotonic() - killed < 60
    assert processes[0].returncode == 1
    assert "has ended or hangs: see what it printed, then go on with --resume_from_checkpoint latest" in errors
    assert "Traceback" not in errors
    ((status, _, error),) = train_on(1, [*words, "--resume_from_checkpoint", "latest"])
    assert status == 0, error
    train_on(1, flags(tiny_model, tiny_images, tmp_path / "alone", **settings))
    assert_same_run(tmp_path / "alone", tmp_path / "lost")


@pytest.mark.slow
def test_each_process_holds_half_of_what_is_frozen(tmp_path: Path) -> None:
    tiny_sd3_pipeline(tmp_path / "model", t5=True)
    assert_half(tmp_path, "cpu", "no", tolerance=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_gpu_holds_half_of_what_is_frozen(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    tiny_sd3_pipeline(tmp_path / "model", t5=True)
    assert_half(tmp_path, "cuda", precision, tolerance=1e-4 if precision == "no" else 1e-2)


def assert_half(folder: Path, device: str, precision: str, tolerance: float) -> None:
    """Assert that the model in ``folder`` gives the same whole and sharded, and how its weights are spread."""
    outcomes, levels = work_on_two(SHARE, folder, device, precision), 1 if device == "cpu" else 8
    for outcome in outcomes:
        whole, sharded = outcome["whole"], outcome["sharded"]
        assert sharded["loss"] == pytest.approx(whole["loss"], rel=tolerance)
        assert sharded["gradients"] == pytest.approx(whole["gradients"], rel=100 * tolerance, abs=tolerance)
        for ours, theirs in zip(sharded["images"], whole["images"], strict=True):
            assert max(abs(left - right) for left, right in zip(ours, theirs, strict=True)) <= levels
        for part, learned in (("denoiser", whole["learned"]), ("towers", 0)):
            assert 0 < sharded[part] - learned < 0.55 * (whole[part] - learned)  # a weight is split by its rows


def test_what_cannot_be_sharded_is_refused_by_name_and_all_at_once() -> None:
    config = TextualInversionConfig()
    launched = {**FSDP, "WORLD_SIZE": "2"}
    assert problems({}, config) == problems(launched, config) == problems({**FSDP, "WORLD_SIZE": "1"}, config) == []
    assert is_sharded(launched)
    assert not is_sharded({"WORLD_SIZE": "2"})
    wrong = {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "full_shard", "FSDP_OFFLOAD_PARAMS": "true"}
    wrong["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    lora = DreamBoothLoraConfig(quantize="nf4", compile=True, offload=True)
    refused = problems({**launched, **wrong}, lora)
    for part in (
        "got version 1: launch with --fsdp_version 2",
        "got full_shard: launch with --fsdp_reshard_after_forward true",
        "got fsdp_offload_params true",
        "got fsdp_activation_checkpointing true: drop it and train with --gradient_checkpointing",
        "got compile True",
        "got quantize nf4",
        "got offload True",
    ):
        assert sum(part in problem for problem in refused) == 1, part
    assert len(refused) == 7
    (refused_deepspeed,) = problems({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, config)
    assert "got DeepSpeed: launch with --use_fsdp" in refused_deepspeed
