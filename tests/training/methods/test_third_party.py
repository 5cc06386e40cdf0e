"""A method of another package: registered, trained, exported and loaded like the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dvar.config.fields import setting
from dvar.config.presets import configure
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.errors import RefusedInput
from dvar.runs.load_model import load_personalised_backbone
from dvar.runs.report import write_report
from dvar.testing import MethodContract
from dvar.training.methods.registry import METHODS, MethodEntry, config_from_dict
from dvar.training.personalise import personalise
from dvar.training.run_layout import ATTENTION


@dataclass(frozen=True, kw_only=True)
class BiasConfig(TrainingConfig):
    method = "output-bias"
    title = "Output bias"

    placeholder_token: str | None = setting(None, "Not used.")
    instance_prompt: str | None = setting("a photo of white dog", "Caption of every image.", section="Data")
    learned = "the bias of the last layer"


class OutputBias:
    """The bias of the U-Net's last layer."""

    metadata: Mapping[str, str] = {}

    def __init__(self, backbone: Backbone) -> None:
        self.bias = nn.Parameter(backbone.denoiser.conv_out.bias.detach().clone())
        backbone.denoiser.conv_out.bias = self.bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.bias]

    @property
    def state(self) -> dict[str, Tensor]:
        return {"conv_out.bias": self.bias.detach().cpu().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.bias.copy_(state["conv_out.bias"])

    def expand(self, prompt: str) -> str:
        return prompt

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {ATTENTION: dict(state)}


METHODS.register(BiasConfig.method, MethodEntry(BiasConfig, lambda config, backbone: OutputBias(backbone)))


class TestOutputBiasContract(MethodContract):
    config = BiasConfig(learning_rate=0.05)


def test_a_run_of_a_third_party_method_is_loaded_with_its_weights(tmp_path: Path) -> None:
    result = personalise(TestOutputBiasContract().short_config(tmp_path))
    assert [path.name for path in result.weights] == [ATTENTION]
    base = load_backbone(tmp_path / "model", device="cpu").denoiser.conv_out.bias
    assert not torch.equal(load_personalised_backbone(result.folder, device="cpu").denoiser.conv_out.bias, base)
    assert "The bias of the last layer" in (result.folder / "README.md").read_text()
    assert "Output bias" in write_report(result.folder).read_text()


def test_a_third_party_method_has_no_presets() -> None:
    config = configure({"learning-rate": 0.5}, BiasConfig)
    assert (config.learning_rate, config.preset) == (0.5, None)
    with pytest.raises(RefusedInput, match="method output-bias has no presets, got preset 'mini': drop it"):
        configure({"preset": "mini"}, BiasConfig)


def test_a_method_that_is_not_registered_is_refused_with_the_nearest() -> None:
    with pytest.raises(RefusedInput, match="there is no method 'output-bais': the nearest is output-bias"):
        config_from_dict({"method": "output-bais"})
