"""The contract of a method of personalisation: a test suite to subclass."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dvar.stopping.trace import Trace
from dvar.testing.tiny_models import tiny_concept, tiny_pipeline

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    from dvar.config.training import TrainingConfig
    from dvar.training.loop import StepRecord


def assert_only_the_method_moves(config: TrainingConfig, model: Path) -> None:
    """Assert that the method of ``config`` leaves the model at ``model`` as it is, and that only its parameters train.

    Raises:
        AssertionError: Building the method changes the model's loss, or an update moves what is not the method's.
    """
    import torch

    from dvar.diffusion.backbone import load_backbone
    from dvar.diffusion.objective import Draws, denoising_loss
    from dvar.training.methods.registry import build_method

    backbone = load_backbone(model, device="cpu")
    noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = backbone.tokenize(["a photo of mug", "a dark cat"])
    draws = Draws(torch.cat([noise[0], noise[0]], dim=1), noise[1], noise[2], torch.tensor([500, 20]), ids)
    base_losses = denoising_loss(backbone.predict, draws, backbone.schedule)
    method = build_method(config, backbone)
    assert torch.equal(denoising_loss(backbone.predict, draws, backbone.schedule), base_losses), "the model changed"

    draws = replace(draws, input_ids=backbone.tokenize([method.expand(config.plain_prompt), "a dark cat"]))
    trained = {id(weight) for weight in method.parameters}
    assert len(trained) == len(method.parameters), "a parameter is listed twice"
    weights = [pair for network in backbone.modules for pair in network.named_parameters()]
    before = {name: weight.detach().clone() for name, weight in weights}
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # LoRA's first factors have a gradient once the second ones are no longer zero
        optimizer.zero_grad()
        torch.autograd.backward(denoising_loss(backbone.predict, draws, backbone.schedule).mean())
        optimizer.step()
    for name, weight in weights:
        assert torch.equal(weight, before[name]) == (id(weight) not in trained), name
        assert (weight.grad is None) == (id(weight) not in trained), name
    assert {id(weight) for _, weight in weights} >= trained, "a parameter belongs to no network"


class _Stopped(Exception):
    """A run was stopped by its test."""


class MethodContract:
    """Tests that every method of personalisation passes: subclass it in a test module and set ``config``.

        class TestMine(MethodContract):
            config = MineConfig(learning_rate=0.05)

    Attributes:
        config: A config of the method, valid but for the model and the folders, with a learning rate at which ten
            steps move the weights.
    """

    config: TrainingConfig

    def short_config(self, folder: Path) -> TrainingConfig:
        """Return ``config`` for a run of ten steps on the tiny model, in ``folder``."""
        return replace(
            self.config,
            pretrained_model_name_or_path=str(tiny_pipeline(folder / "model")),
            instance_data_dir=str(tiny_concept(folder / "images")),
            resolution=32,
            max_train_steps=10,
            window=8,
            threshold=1e-9,
            validation_steps=5,
            num_validation_images=1,
            num_inference_steps=2,
            checkpointing_steps=4,
            output_dir=str(folder / "run"),
        )

    def test_it_is_registered_under_its_name(self) -> None:
        """Find the method in the registry by the name in its config."""
        from dvar.training.methods.registry import METHODS

        assert METHODS.find(self.config.method).config_type is type(self.config)

    def test_its_config_survives_json(self) -> None:
        """Restore the config from what config.json and checkpoints hold."""
        from dvar.training.methods.registry import config_from_dict

        assert config_from_dict(json.loads(json.dumps(self.config.to_dict()))) == self.config

    def test_its_config_has_no_problems(self, tmp_path: Path) -> None:
        """Accept the config in the checks that all methods share."""
        from dvar.config.training import problems

        assert problems(self.short_config(tmp_path)) == []

    def test_what_is_trained_moves_and_nothing_else_does(self, tmp_path: Path) -> None:
        """Leave the model as it is when the method is built, and move only its parameters in an update."""
        assert_only_the_method_moves(self.config, tiny_pipeline(tmp_path))

    def test_loading_a_state_restores_it(self, tmp_path: Path) -> None:
        """Take over with `load` what ``state`` returned, a copy."""
        import torch

        from dvar.diffusion.backbone import load_backbone
        from dvar.training.methods.registry import build_method

        method = build_method(self.config, load_backbone(tiny_pipeline(tmp_path), device="cpu"))
        state = method.state
        with torch.no_grad():
            for weight in method.parameters:
                weight.add_(1.0)
        assert any(not torch.equal(tensor, state[name]) for name, tensor in method.state.items())
        method.load(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in method.state.items())

    def test_its_files_are_float32_and_stock_diffusers_reads_them(self, tmp_path: Path) -> None:
        """Export weight files of a kind for which the model card has a line of code."""
        import torch

        from dvar.diffusion.backbone import load_backbone
        from dvar.training.loading_code import load_lines
        from dvar.training.methods.registry import build_method
        from dvar.training.weight_files import split_by_token

        method = build_method(self.config, load_backbone(tiny_pipeline(tmp_path), device="cpu"))
        files = split_by_token(method.files(method.state))
        assert len(load_lines(files)) >= len(files) > 0
        assert all(tensor.dtype == torch.float32 for tensors in files.values() for tensor in tensors.values())

    def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(self, tmp_path: Path) -> None:
        """Depend on the seed alone in training, and keep everything in a checkpoint."""
        import torch
        from safetensors.torch import load_file

        from dvar.training.personalise import personalise
        from dvar.training.run_layout import TRACE

        config = self.short_config(tmp_path)
        uninterrupted = personalise(replace(config, output_dir=str(tmp_path / "whole")))

        def stop(step: StepRecord) -> None:
            if step.step == 6:
                raise _Stopped

        with suppress(_Stopped):
            personalise(config, [stop])
        resumed = personalise(replace(config, resume_from_checkpoint="latest"))
        assert uninterrupted.steps == resumed.steps == 10
        traces = [Trace.read(result.folder / TRACE).values.tolist() for result in (uninterrupted, resumed)]
        assert traces[0] == traces[1]
        for path, other_path in zip(uninterrupted.weights, resumed.weights, strict=True):
            tensors, others = load_file(path), load_file(other_path)
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
