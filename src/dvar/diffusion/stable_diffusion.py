"""The backbone of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dvar.config.training import Sampler
from dvar.diffusion.devices import best_device
from dvar.diffusion.loading import loading_errors
from dvar.diffusion.objective import Schedule
from dvar.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a Stable Diffusion 1.x or 2.x, frozen and in eval mode, on one device.

    Attributes:
        tokenizer: Turns prompts into token ids.
        text_encoder: Turns token ids into the condition of the U-Net.
        vae: The autoencoder.
        unet: The denoising network.
        scheduler: The model's own scheduler.
        precision: The arithmetic of the U-Net and the text encoder; weights other than the U-Net's stay in float32.
        digest: The SHA-256 of the networks' weights, as they were loaded, and of the noise schedule. It depends neither
            on the device nor on the precision, nor on what is learned later.
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
    ) -> StableDiffusion:
        """Return the model in a diffusers folder or behind a hub id.

        Args:
            name: The folder or hub id.
            device: The device; by default a GPU where there is one.
            mixed_precision: "bf16" or "fp16" keeps the U-Net's weights in that precision and computes under autocast.
            gradient_checkpointing: Recompute the U-Net's activations in the backward pass.
            attention_slicing: Compute the U-Net's attention in slices.
            compile: Compile the U-Net at its first call.

        Raises:
            ModelError: It cannot be loaded, or is no Stable Diffusion.
        """
        with loading_errors(name, "Stable Diffusion model"):
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
        """The device of the model."""
        weight: nn.Parameter = next(self.unet.parameters())
        return weight.device  # what diffusers' own `device` does takes a millisecond

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
        """Return a stock pipeline of the same networks, with the model's own scheduler or the named one."""
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
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB images, float32 [n, 2C, h, w] on the CPU: means, then log-variances.

        Images are encoded in float32 and one at a time, so that neither precision nor batch changes their moments.
        """
        return torch.cat([self.vae.encode(self._pixels(image)).latent_dist.parameters.cpu() for image in images])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts``, int64 [n, L], cut or padded to the `length` L."""
        ids: Tensor = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids

    @property
    def length(self) -> int:
        """The tokens of an encoded prompt, with its start and its end."""
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    def predict(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Return the U-Net's prediction, [B, C, h, w].

        Args:
            noisy: Noisy latents, [B, C, h, w].
            timesteps: Their timesteps, int64 [B].
            input_ids: Their captions, int64 [B, L].
        """
        with self.autocast():
            condition = self.text_encoder(input_ids)[0]
            prediction: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=condition).sample
        return prediction

    def autocast(self) -> torch.autocast:
        """Return the scope in which the networks compute in ``precision``; float32 leaves it without effect."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return the pixels of an image in [-1, 1], float32 [1, 3, H, W] on the model's device."""
        values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
        return (values / 127.5 - 1).unsqueeze(0).to(self.device)


def _digest(networks: Sequence[nn.Module], noise: Tensor) -> str:
    """Return the SHA-256 of the networks' weights and of the noise schedule."""
    digest = sha256(noise.float().numpy().tobytes())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
