"""The probe of `process_batch`, with the signatures of sd-scripts and of musubi-tuner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvar import RefusedInput
from dvar.stopping.integrations.trainers.network_trainers import probe_process_batch


class SdScriptsTrainer:
    """A stand-in of sd-scripts' trainer: it draws noise, and writes into a list of the batch, as the real one does."""

    def process_batch(
        self, batch: dict[str, Any], text_encoders: list[nn.Module], unet: nn.Module, is_train: bool = True
    ) -> Tensor:
        assert not is_train
        outputs = batch["text_encoder_outputs_list"]
        outputs[0] = text_encoders[0](outputs[0])
        noisy = batch["latents"] + torch.randn_like(batch["latents"])
        loss: Tensor = (unet(nn.functional.dropout(noisy, 0.1, unet.training)) - outputs[0]).square().mean()
        return loss


def process_musubi_batch(
    transformer: nn.Module, batch: dict[str, Tensor], latents: Tensor, noise: Tensor
) -> tuple[Tensor, dict[str, float]]:
    level = torch.rand(())
    loss = (transformer(latents * (1 - level) + noise * level) - (noise - latents)).square().mean()
    return loss, {"loss": float(loss)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_sd_scripts_own_loss_is_measured_on_held_batches_and_disturbs_nothing() -> None:
    encoder, unet = nn.Linear(4, 4), nn.Linear(4, 4)
    held: list[dict[str, Any]] = [
        {"batch": {"latents": torch.randn(2, 4), "text_encoder_outputs_list": [torch.randn(2, 4)]}} for _ in range(3)
    ]
    copies = [[output.clone() for output in part["batch"]["text_encoder_outputs_list"]] for part in held]
    arguments = {"text_encoders": [encoder], "unet": unet, "is_train": False}
    probe = probe_process_batch(SdScriptsTrainer().process_batch, held, arguments)
    state = torch.get_rng_state()
    first = probe()
    assert first.shape == (3,)
    assert torch.equal(probe(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet.training
    assert unet.weight.grad is None
    for part, outputs in zip(held, copies, strict=True):
        assert torch.equal(part["batch"]["text_encoder_outputs_list"][0], outputs[0])
    with torch.no_grad():
        encoder.weight.add_(0.1)  # what is trained is seen, whichever network it is in
    assert not torch.equal(probe(), first)


def test_musubi_tuners_loss_is_the_first_of_a_pair() -> None:
    transformer = nn.Linear(4, 4)
    held = [{"batch": {}, "latents": torch.randn(2, 4), "noise": torch.randn(2, 4)} for _ in range(2)]
    probe = probe_process_batch(process_musubi_batch, held, {"transformer": transformer})
    assert torch.equal(probe(), probe())
    assert len(probe()) == 2


def test_no_batch_and_no_module_are_refused() -> None:
    with pytest.raises(RefusedInput, match="a probe needs a batch to hold, got none"):
        probe_process_batch(process_musubi_batch, [], {"transformer": nn.Linear(4, 4)})
    with pytest.raises(RefusedInput, match="must know the modules that its loss runs through"):
        probe_process_batch(print, [{"batch": {}}], {})
