"""The contract of a family of base models: test suites to subclass."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    from torch import Tensor

    from dvar.diffusion.backbones.stock import StockBackbone
    from dvar.diffusion.objective import Draws

PROMPTS = ["a photo of mug", "a dark cat"]
RESOLUTION = 32
_Stepped = namedtuple("_Stepped", "prev_sample")  # what pipelines read of a scheduler's step, by name or by place


class BackboneContract:
    """Tests that every family of base models passes against stock diffusers.

    Subclass it in a test module, and pytest runs it::

        class TestMine(BackboneContract):
            pipeline = "MyPipeline"
            save_pipeline = staticmethod(save_tiny_pipeline)  # (folder) -> folder

    Attributes:
        pipeline: The class of its pipelines.
        save_pipeline: Saves a tiny one with random weights to a folder, and returns the folder.
        absent: Arguments with which stock diffusers loads it, such as ``text_encoder_3=None``.
        guidance: Arguments with which the stock pipeline is guided with weight 4.
        no_guidance: Arguments with which it is not guided.
        frames: Whether its autoencoder is one of videos.
    """

    pipeline: str
    save_pipeline: Callable[[Path], Path]
    absent: ClassVar[Mapping[str, Any]] = {}
    guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 4.0}
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    frames: bool = False

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, h, w] as the stock pipeline holds them while it denoises."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """Return what `pack` returned as it was."""
        return latents

    def folder(self, tmp_path_factory: Any) -> Path:
        """Return the folder of the tiny pipeline, saved once a session."""
        folder: Path = tmp_path_factory.getbasetemp() / f"tiny-{type(self).__name__}"
        return folder if folder.exists() else self.save_pipeline(folder)

    def load(self, folder: Path) -> StockBackbone:
        """Return the backbone in ``folder``, on the CPU."""
        from dvar.diffusion.backbone import load_backbone

        backbone: Any = load_backbone(folder, device="cpu")
        return backbone  # type: ignore[no-any-return]

    def load_stock(self, folder: Path) -> Any:
        """Return the stock pipeline in ``folder``."""
        import diffusers

        from dvar.diffusion.loading import quiet_libraries

        with quiet_libraries():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **self.absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draws(self, backbone: StockBackbone) -> Draws:
        """Return draws of two samples."""
        import torch

        from dvar.diffusion.objective import Draws

        generator = torch.Generator().manual_seed(0)
        (moments,) = backbone.encode([_image()])
        channels, height, width = moments.shape
        noise = torch.randn(2, 2, channels // 2, height, width, generator=generator)
        timesteps = torch.tensor([500, 20])
        return Draws(torch.stack([moments, moments]), noise[0], noise[1], timesteps, backbone.tokenize(PROMPTS))

    def test_it_is_registered_by_its_pipeline(self, tmp_path_factory: Any) -> None:
        """Find the family by what model_index.json says, and have its tokenizer without the model."""
        from dvar.diffusion.backbone import load_tokenizer
        from dvar.diffusion.families import BACKBONES
        from dvar.diffusion.model_files import model_problems
        from dvar.diffusion.tokens import read_index

        folder = self.folder(tmp_path_factory)
        assert read_index(folder)["_class_name"] == self.pipeline
        assert self.pipeline in BACKBONES
        assert model_problems(str(folder)) == []
        tokens = load_tokenizer(folder).encode("a photo of mug", add_special_tokens=False)
        assert tokens == self.load(folder).tokenizer.encode("a photo of mug", add_special_tokens=False)

    def test_it_is_frozen_and_every_weight_is_in_its_digest(self, tmp_path_factory: Any) -> None:
        """Load the same weights twice, and then a changed one."""
        import torch

        folder = self.folder(tmp_path_factory)
        backbone = self.load(folder)
        for network in backbone.modules:
            assert not any(weight.requires_grad for weight in network.parameters())
            assert not any(part.training for part in network.modules())
        assert len(backbone.modules) == 2 + len(backbone.towers)
        assert self.load(folder).digest == backbone.digest
        with torch.no_grad():
            next(reversed(list(backbone.denoiser.parameters()))).add_(1.0)
        changed = folder.with_name(f"{folder.name}-changed")
        backbone.pipeline().save_pretrained(changed)
        assert self.load(changed).digest != backbone.digest

    def test_images_and_prompts_have_their_shapes(self, tmp_path_factory: Any) -> None:
        """Encode images to moments [n, 2C, h, w], prompts to ids [n, L], and predict [B, C, h, w]."""
        import torch

        backbone = self.load(self.folder(tmp_path_factory))
        moments = backbone.encode([_image(), _image(1), _image(2)])
        assert (moments.dtype, moments.device.type, moments.ndim) == (torch.float32, "cpu", 4)
        assert torch.equal(moments[1:2], backbone.encode([_image(1)])), "moments depend on the batch"
        assert not torch.equal(moments[0], moments[1])
        ids = backbone.tokenize(PROMPTS)
        assert ids.dtype == torch.int64
        assert ids.shape == (2, sum(tower.length for tower in backbone.towers))
        assert torch.equal(ids[:1], backbone.tokenize(PROMPTS[:1])), "ids depend on the batch"
        assert backbone.tokenize(["mug " * 900]).shape == ids[:1].shape
        noisy = moments[:2].chunk(2, dim=1)[0]
        with torch.no_grad():
            prediction = backbone.predict(noisy, backbone.schedule.times[[500, 20]], ids)
        assert prediction.shape == noisy.shape
        assert torch.isfinite(prediction).all()

    def test_the_prompt_of_every_text_encoder_matters(self, tmp_path_factory: Any) -> None:
        """Change one token of each text encoder's prompt alone."""
        import torch

        backbone = self.load(self.folder(tmp_path_factory))
        draws = self.draws(backbone)
        noisy, times, ids = draws.noise[:1], backbone.schedule.times[[500]], draws.input_ids[:1]
        first = 0
        with torch.no_grad():
            base = backbone.predict(noisy, times, ids)
            for tower in backbone.towers:
                changed, words = ids.clone(), backbone.tokenize(["a photo of cat"])
                part = slice(first, first + tower.length)
                changed[:, part] = words[:, part]
                assert not torch.equal(changed, ids)
                assert not torch.equal(backbone.predict(noisy, times, changed), base), tower.name
                first += tower.length

    def test_an_image_is_the_stock_pipelines_bit_for_bit(self, tmp_path_factory: Any) -> None:
        """Generate with two prompts at guidance, so that the condition of every text encoder is in it."""
        import torch

        from dvar.diffusion.sampling import sample

        folder = self.folder(tmp_path_factory)
        ours = sample(self.load(folder), PROMPTS, [3, 4], size=RESOLUTION, steps=3, guidance=4.0)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        size = {"height": RESOLUTION, "width": RESOLUTION}
        theirs = self.load_stock(folder)(
            prompt=list(PROMPTS), generator=generators, num_inference_steps=3, **size, **self._of_batch(2)
        ).images
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
        assert ours[0].tobytes() != ours[1].tobytes()

    def test_the_prediction_is_what_the_stock_pipeline_takes_a_step_by(self, tmp_path_factory: Any) -> None:
        """Record a step of the stock scheduler, and send the same latents, time and prompt through the backbone."""
        import torch

        folder = self.folder(tmp_path_factory)
        backbone, stock = self.load(folder), self.load_stock(folder)
        self._use_plain_scheduler(backbone, stock)
        calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def step(prediction: Tensor, time: Tensor, sample: Tensor, **options: Any) -> Any:
            calls.append((prediction, time, sample))
            return _Stepped(sample)

        stock.scheduler.step = _with_signature_of(stock.scheduler.step, step)
        prompt = "a photo of mug on the beach"
        self._generate(stock, prompt)
        prediction, time, sample = calls[1]
        noisy = self.unpack(sample)
        assert torch.equal(self.pack(noisy), sample)
        with torch.no_grad():
            ours = backbone.predict(noisy, time.reshape(1), backbone.tokenize([prompt]))
        torch.testing.assert_close(ours, self.unpack(prediction), rtol=1e-4, atol=1e-5)

    def test_the_scale_of_latents_is_that_with_which_the_stock_pipeline_decodes(self, tmp_path_factory: Any) -> None:
        """Put the latents of an image in place of what the stock pipeline has denoised."""
        import numpy as np
        import torch

        from dvar.diffusion.objective import latents_of

        folder = self.folder(tmp_path_factory)
        backbone, stock = self.load(folder), self.load_stock(folder)
        self._use_plain_scheduler(backbone, stock)
        draws = self.draws(backbone)
        silent = torch.zeros_like(draws.vae_noise)
        schedule = backbone.schedule
        latents = latents_of(_replaced(draws, vae_noise=silent), schedule.scaling_factor, schedule.shift_factor)[:1]

        def step(prediction: Tensor, time: Tensor, sample: Tensor, **options: Any) -> Any:
            return _Stepped(self.pack(latents))

        stock.scheduler.step = _with_signature_of(stock.scheduler.step, step)
        image = np.asarray(self._generate(stock, "a photo of mug"), dtype=np.int64)
        pixels = torch.from_numpy(np.array(_image(), dtype=np.float32)).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
        with torch.no_grad():
            mean = backbone.vae.encode(pixels.unsqueeze(2) if self.frames else pixels).latent_dist.mean
            decoded = backbone.vae.decode(mean).sample
        decoded = ((decoded[:, :, 0] if self.frames else decoded)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
        assert np.abs(image - (255 * decoded).round().numpy().astype(np.int64)).max() <= 1

    def test_the_gradient_of_the_objective_is_the_one_by_hand(self, tmp_path_factory: Any) -> None:
        """Compare it, by LoRA's matrices, with that of the mean of (prediction - target)^2 written out."""
        import diffusers
        import torch

        from dvar.diffusion.objective import denoising_loss
        from dvar.training.methods.dreambooth_lora import DreamBoothLora

        backbone = self.load(self.folder(tmp_path_factory))
        method = DreamBoothLora(backbone, seed=1)
        with torch.no_grad():
            for index, matrix in enumerate(method.parameters):  # the second factors are zero at first
                matrix.add_(0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(index)))
        draws, schedule = self.draws(backbone), backbone.schedule
        losses = denoising_loss(backbone.predict, draws, schedule)
        gradients = torch.autograd.grad(losses.mean(), method.parameters, allow_unused=True)

        mean, log_variance = draws.moments.chunk(2, dim=1)
        posterior = mean + (0.5 * log_variance).exp() * draws.vae_noise
        latents = (posterior - schedule.shift_factor) * schedule.scaling_factor
        if schedule.prediction_type == "flow":
            sigmas = type(backbone.scheduler).from_config(backbone.scheduler.config).sigmas.sort().values
            sigma = sigmas[draws.timesteps].reshape(-1, 1, 1, 1)
            noisy, times = (1 - sigma) * latents + sigma * draws.noise, 1000 * sigma.flatten()
            target = draws.noise - latents
        else:
            ddpm = diffusers.DDPMScheduler.from_config(backbone.scheduler.config)
            noisy, times = ddpm.add_noise(latents, draws.noise, draws.timesteps), draws.timesteps
            target = draws.noise
        prediction = backbone.predict(noisy, times, draws.input_ids)
        by_hand = torch.autograd.grad(
            prediction, method.parameters, 2 * (prediction - target).detach() / target.numel(), allow_unused=True
        )
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 0
        for gradient, expected in zip(gradients, by_hand, strict=True):
            assert (gradient is None) == (expected is None)
            if gradient is not None and expected is not None:
                torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)

    def test_its_pipeline_has_the_options_of_the_model(self, tmp_path_factory: Any) -> None:
        """Turn round each yes or no that model_index.json may say beside its parts, such as whether it is distilled."""
        backbone = self.load(self.folder(tmp_path_factory))
        stock = backbone.stock
        flipped = {name: not value for name, value in stock.config.items() if isinstance(value, bool)}
        stock.register_to_config(**flipped)
        pipeline = backbone.pipeline()
        for name in flipped.keys() - backbone.options.keys():
            assert pipeline.config[name] == flipped[name], name

    def test_prompts_that_are_read_once_change_no_loss_and_no_image(self, tmp_path_factory: Any) -> None:
        """Compare both bit for bit before and after the encoders are given up; a prompt's states ignore its batch."""
        import torch

        from dvar.diffusion.objective import denoising_loss
        from dvar.diffusion.sampling import rehearse, sample

        folder = self.folder(tmp_path_factory)
        backbone, thrifty = self.load(folder), self.load(folder)
        draws = self.draws(backbone)
        size: dict[str, Any] = {"size": RESOLUTION, "guidance": 4.0}
        thrifty.prepare_training(draws.input_ids)
        thrifty.release_encoders(lambda: rehearse(thrifty, PROMPTS, **size), images=True)
        encoders = [next(tower.encoder.parameters()).is_meta for tower in thrifty.towers]
        assert encoders == [hasattr(type(thrifty.stock), "encode_prompt")] * len(encoders)
        assert not list(thrifty.vae.encoder.parameters())
        with torch.no_grad():
            losses = [denoising_loss(each.predict, draws, each.schedule) for each in (backbone, thrifty)]
            single = denoising_loss(thrifty.predict, _first_of(draws), thrifty.schedule)
        assert torch.equal(losses[0], losses[1])
        torch.testing.assert_close(single, losses[0][:1], rtol=1e-4, atol=1e-6)
        images = [sample(each, PROMPTS, [3, 4], steps=2, **size) for each in (backbone, thrifty)]
        assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]

    def _generate(self, stock: Any, prompt: str) -> Any:
        """Return the image that ``stock`` generates in two steps without guidance."""
        size = {"height": RESOLUTION, "width": RESOLUTION}
        return stock(prompt=prompt, num_inference_steps=2, **size, **self.no_guidance).images[0]

    def _use_plain_scheduler(self, backbone: StockBackbone, stock: Any) -> None:
        """Give a pipeline of diffusion a scheduler that passes latents on as they are."""
        import diffusers

        if backbone.schedule.prediction_type != "flow":
            stock.scheduler = diffusers.DDIMScheduler.from_config(stock.scheduler.config)

    def _of_batch(self, count: int) -> dict[str, Any]:
        """Return ``guidance``, its texts repeated for each prompt."""
        return {name: [value] * count if isinstance(value, str) else value for name, value in self.guidance.items()}


def _image(number: int = 0) -> Any:
    """Return an image of smooth colours."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:RESOLUTION, 0:RESOLUTION] * (255 / RESOLUTION)
    pixels = np.stack([rows, columns, np.full_like(rows, 60.0 * number)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def _replaced(draws: Draws, **changes: Tensor) -> Draws:
    from dataclasses import replace

    return replace(draws, **changes)


def _first_of(draws: Draws) -> Draws:
    """Return the first of these draws."""
    from dataclasses import fields

    parts = {item.name: part[:1] for item in fields(draws) if (part := getattr(draws, item.name)) is not None}
    return _replaced(draws, **parts)


def _with_signature_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, which says that it takes what ``original`` takes: pipelines read it."""
    function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return function
