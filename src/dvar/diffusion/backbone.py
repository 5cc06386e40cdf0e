"""The models of latent diffusion: the only room that knows how diffusers and transformers load and call them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from dvar.config.training import Sampler
from dvar.diffusion.objective import Schedule
from dvar.diffusion.tokens import check_make
from dvar.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """The parts of a Stable Diffusion 1.x or 2.x, frozen and in eval mode, on one device.

    ``precision`` is the arithmetic of the U-Net and the text encoder; weights other than the U-Net's stay in float32.
    ``digest`` names the base model by what is in it: the SHA-256 of its networks' weights, as they were loaded, and of
    its noise schedule.  It depends neither on the device nor on the precision, nor on what is learned later.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: Any
    precision: torch.dtype = torch.float32
    digest: str = ""

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        mixed_precision: str = "no",
        gradient_checkpointing: bool = False,
        attention_slicing: bool = False,
        compile: bool = False,
    ) -> Backbone:
        """Return the model in a diffusers folder or behind a hub id, on ``device`` (a GPU where there is one).

        ``mixed_precision`` "bf16" or "fp16" keeps the U-Net's weights in that precision and computes under autocast;
        ``compile`` compiles the U-Net at its first call.
        Raises: ModelError when it cannot be loaded or is no Stable Diffusion.
        """
        with _loading(name):
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                name,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                use_safetensors=True,
            )
            networks = (pipeline.text_encoder, pipeline.vae, pipeline.unet)
            for network in networks:
                network.to(torch.float32).requires_grad_(False).eval()
            for key in (key for network in networks for key, part in network.state_dict().items() if part.is_meta):
                raise ModelError(f"{name} lacks weights, {key} among them: copy the model again")
            digest = _digest(networks, pipeline.scheduler.alphas_cumprod)
            for network in networks:  # each weight in its precision at once: a GPU need not hold them all in float32
                precision = PRECISIONS[mixed_precision] if network is pipeline.unet else torch.float32
                network.to(device or best_device(), precision)
        if gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        if attention_slicing:
            pipeline.unet.set_attention_slice("auto")
        if compile:
            pipeline.unet.compile()
        if (kind := pipeline.scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model must predict epsilon or v_prediction, {name} predicts {kind}: choose another model"
            )
        return cls(
            pipeline.tokenizer,
            pipeline.text_encoder,
            pipeline.vae,
            pipeline.unet,
            pipeline.scheduler,
            PRECISIONS[mixed_precision],
            digest,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.unet.parameters()).device  # what diffusers' own `device` does takes a millisecond

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The networks: text encoder, U-Net, autoencoder."""
        return self.text_encoder, self.unet, self.vae

    @property
    def schedule(self) -> Schedule:
        """The noise the model was trained under: that of its own scheduler."""
        return Schedule(
            self.scheduler.alphas_cumprod.float().cpu(),
            self.scheduler.config.prediction_type,
            self.vae.config.scaling_factor,
        )

    def pipeline(self, scheduler: Sampler = "model") -> diffusers.StableDiffusionPipeline:
        """Return a stock pipeline of these very networks, with a scheduler of its own kind or of the named one."""
        sampler = type(self.scheduler) if scheduler == "model" else getattr(diffusers, scheduler)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=sampler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB pictures, float32 [n, 2C, h, w] on the CPU: means, then log-variances.

        In float32 and one picture at a time, so that neither the precision nor the company changes a picture's moments.
        """
        return torch.cat([self.vae.encode(self._pixels(picture)).latent_dist.parameters.cpu() for picture in pictures])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts``, int64 [n, L], cut or padded to the length L the text encoder reads."""
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    @property
    def length(self) -> int:
        """Tokens in an encoded prompt, the start and the end among them."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def predict(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Return the prediction [B, C, h, w] for noisy latents at ``timesteps`` under captions ``input_ids``."""
        with self.autocast():
            condition = self.text_encoder(input_ids)[0]
            return self.unet(noisy, timesteps, encoder_hidden_states=condition).sample

    def autocast(self) -> torch.autocast:
        """Return the scope in which the networks compute in ``precision``; float32 leaves it without effect."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _pixels(self, picture: Image.Image) -> Tensor:
        values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
        return (values / 127.5 - 1).unsqueeze(0).to(self.device)


def best_device() -> str:
    """Return "cuda" where there is such a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _digest(networks: Sequence[nn.Module], noise: Tensor) -> str:
    digest = sha256(noise.float().numpy().tobytes())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and notes off the terminal in a scope."""
    levels = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers.logging.set_verbosity(levels[1])
        transformers.logging.enable_progress_bar()
        diffusers.logging.enable_progress_bar()


@contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    """Be quiet while a Stable Diffusion loads; say in one line why it does not."""
    try:
        with quiet():
            check_make(name, diffusers.DiffusionPipeline.load_config(name)["_class_name"])
            yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name} does not load as a Stable Diffusion model: {said}") from error
