"""The contract of training a family of base models: a test suite to subclass."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dvar.testing.backbone_contract import RESOLUTION, BackboneContract
from dvar.testing.model_card import run_model_card
from dvar.testing.tiny_models import tiny_concept

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    from torch import Tensor

    from dvar.config.training import TrainingConfig
    from dvar.training.loop import StepRecord

EMBEDS, CLIP_EMBEDS = "learned_embeds.safetensors", "learned_clip_embeds.safetensors"
LORA, ATTENTION = "pytorch_lora_weights.safetensors", "custom_diffusion_weights.safetensors"
NO_UNET = "custom-diffusion trains the cross-attention of a U-Net"
NO_WORD = "placeholder_token cannot be learned on a"


class _Halted(Exception):
    """A run was stopped by its test."""


class FamilyTrainingContract:
    """Tests that training passes on every family.

    Subclass it in a test module with what each method leaves::

        @pytest.mark.slow
        class TestTrainingOfMine(FamilyTrainingContract):
            family = TestMine  # a BackboneContract
            files = {"lora": {LORA}, "dora": {LORA}}
            refusals = {"textual-inversion": "reason", "dreambooth-lora": "reason", "custom-diffusion": "reason"}

    Attributes:
        family: The contract of the backbone.
        files: The files that a run of each method leaves, by the names of `configs`.
        refusals: What the message must say of each method that the family cannot learn by.
        lora: The name of the method whose run is resumed, and trained without its probe.
    """

    family: type[BackboneContract]
    files: ClassVar[Mapping[str, set[str]]]
    refusals: ClassVar[Mapping[str, str]] = {}
    lora: ClassVar[str] = "dreambooth-lora"

    def configs(self, tmp_path_factory: Any, output: Path) -> dict[str, TrainingConfig]:
        """Return the config of a short run of each method, by its name; "lora" and "dora" learn no word."""
        from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig

        images = tmp_path_factory.getbasetemp() / "family-images"
        shared: dict[str, Any] = {
            "pretrained_model_name_or_path": str(self.family().folder(tmp_path_factory)),
            "instance_data_dir": str(images if images.exists() else tiny_concept(images)),
            "resolution": RESOLUTION,
            "learning_rate": 5e-2,
            "train_batch_size": 1,
            "eval_batch_size": 2,
            "max_train_steps": 9,
            "window": 8,
            "threshold": 1e-9,
            "validation_steps": 9,
            "checkpointing_steps": 4,
            "num_validation_images": 1,
            "num_inference_steps": 2,
            "output_dir": str(output),
        }
        word: dict[str, Any] = {"placeholder_token": "<thing>", "initializer_token": "mug"}
        return {
            # Of FLUX.1, CLIP alone learns the word, and nine small steps of its pooled state hardly show in an image.
            "textual-inversion": TextualInversionConfig(**{**shared, **word, "learning_rate": 0.5}),
            "dreambooth-lora": DreamBoothLoraConfig(**shared, **word),
            "lora": DreamBoothLoraConfig(**shared, instance_prompt="a photo of mug"),
            "dora": DreamBoothLoraConfig(**shared, instance_prompt="a photo of mug", use_dora=True),
            "custom-diffusion": CustomDiffusionConfig(**shared, **word, class_noun="mug", num_class_images=1),
        }

    def test_each_method_trains_or_is_refused(self, tmp_path_factory: Any, tmp_path: Path) -> None:
        """Refuse in one line, with the reason, whatever method leaves no files."""
        from dvar.errors import RefusedInput
        from dvar.training.personalise import personalise

        configs = self.configs(tmp_path_factory, tmp_path / "run")
        assert {*self.files, *self.refusals} == configs.keys()
        for name, reason in self.refusals.items():
            problems: tuple[str, ...] = ()
            try:
                personalise(configs[name])
            except RefusedInput as error:
                problems = tuple(error.problems)
            assert len(problems) == 1, name
            assert re.search(reason, problems[0]), name
            assert "\n" not in problems[0], name
        assert not (tmp_path / "run").exists()

    def test_stock_diffusers_loads_what_is_learned_and_generates_the_same_image(
        self, tmp_path_factory: Any, tmp_path: Path
    ) -> None:
        """Run the code of the model cards, of the run and merged, and compare images, each within 1 of 255."""
        import numpy as np
        from safetensors.torch import load_file

        from dvar.diffusion.sampling import sample
        from dvar.runs.export import write_merged_pipeline
        from dvar.runs.load_model import load_personalised_backbone
        from dvar.training.personalise import personalise

        family = self.family()
        folder = family.folder(tmp_path_factory)
        for name, expected in self.files.items():
            config = self.configs(tmp_path_factory, tmp_path / name)[name]
            run = personalise(config).folder
            names = {path.name for path in run.glob("*.safetensors") if "-steps-" not in path.name}
            assert names == expected, name
            assert name != "dora" or any("lora_magnitude_vector" in key for key in load_file(run / LORA)), name
            prompt = "a photo of mug" if config.placeholder_token is None else "a photo of <thing>"
            backbone = load_personalised_backbone(run, device="cpu")
            (ours,) = sample(backbone, [prompt], [5], size=RESOLUTION, steps=2, guidance=4.0)
            base = self._generate(family.load_stock(folder), "a photo of mug")
            theirs = self._generate(run_model_card(run, folder, size=RESOLUTION), prompt)
            assert np.abs(theirs - np.asarray(ours, dtype=np.int64)).max() <= 1, name
            self._check_sample(run, backbone, config)
            assert np.abs(theirs - base).max() > 1, name
            merged = run_model_card(write_merged_pipeline(run, tmp_path / f"{name}-merged"), size=RESOLUTION)
            assert np.abs(self._generate(merged, prompt) - theirs).max() <= 1, name

    def _check_sample(self, run: Path, backbone: Any, config: TrainingConfig) -> None:
        """Compare the run's own sample, for which its encoders were given up, with one of the whole model."""
        import numpy as np
        from PIL import Image

        from dvar.diffusion.sampling import sample

        with Image.open(run / "samples" / "step-000009" / "00.png") as opened:
            written = np.asarray(opened, dtype=np.int64)
        settings: dict[str, Any] = {"size": RESOLUTION, "steps": 2, "guidance": config.guidance_scale}
        (image,) = sample(backbone, [config.sample_prompt], [config.seed], **settings)
        assert np.array_equal(written, np.asarray(image, dtype=np.int64))

    def test_probing_changes_nothing_and_a_resumed_run_is_the_whole_one(
        self, tmp_path_factory: Any, tmp_path: Path
    ) -> None:
        """Compare weights bit for bit: of a whole run, of one without any probe or sample, and of one resumed."""
        from dataclasses import replace

        import torch
        from safetensors.torch import load_file

        from dvar.stopping.trace import Trace
        from dvar.training.personalise import personalise

        config = self.configs(tmp_path_factory, tmp_path / "resumed")[self.lora]
        whole = personalise(replace(config, validation_steps=3, output_dir=str(tmp_path / "whole")))

        def stop(step: StepRecord) -> None:
            if step.step == 6:
                raise _Halted

        with suppress(_Halted):
            personalise(config, [stop])
        resumed = personalise(replace(config, resume_from_checkpoint="latest"))
        traces = [Trace.read(run.folder / "trace.jsonl").values.tolist() for run in (whole, resumed)]
        assert traces[0] == traces[1]
        of_resumed = {path.name: load_file(path) for path in resumed.weights}
        for files in (of_resumed, self._train_without_probe(config)):
            assert {path.name for path in whole.weights} == files.keys()
            for path in whole.weights:
                tensors, others = load_file(path), files[path.name]
                assert tensors.keys() == others.keys()
                assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), path.name

    def _train_without_probe(self, config: TrainingConfig) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the weight files, by name, of a run that makes its updates and nothing else."""
        from dvar.diffusion.backbone import load_backbone
        from dvar.training.dataset import read_concept
        from dvar.training.methods.registry import build_method
        from dvar.training.run import TrainingRun
        from dvar.training.weight_files import split_by_token

        backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
        concept, method = read_concept(config), build_method(config, backbone)
        run = TrainingRun(Path(config.output_dir), config, concept, (), backbone, method)
        for step in range(1, config.max_train_steps + 1):
            assert run.learner.update(run.training_losses, step).taken
        return split_by_token(method.files(method.state))

    def _generate(self, pipeline: Any, prompt: str) -> Any:
        """Return the pixels of the image that a stock pipeline generates, int64."""
        import numpy as np
        import torch

        generator = torch.Generator().manual_seed(5)
        size = {"height": RESOLUTION, "width": RESOLUTION}
        image = pipeline(
            prompt=prompt, num_inference_steps=2, generator=generator, **size, **self.family.guidance
        ).images[0]
        return np.asarray(image, dtype=np.int64)
