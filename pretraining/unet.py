"""Stage 4: the U-Net.  Predicts the noise in latents, conditioned on the frozen text encoder; one caption in ten is
empty.

Two weights on the plain objective, which leave the best prediction at every cell and timestep what it is, let
shapes be learned sooner: the subject's cells weigh threefold, and timesteps min(SNR, c) / SNR (Hang et al. 2023)
times min(1 / alpha_bar, 10), the weight that predicting v would give them, so that high noise, where shape is
decided, counts.  After the first quarter c goes from 2 to 8: shapes are known by then, and low noise is where detail is
decided.

``--bound`` bounds the logits of every attention head after each step, over the draws of that step
(`pretraining.attention`), without which they grow until attention is hard.  ``--name further`` begins where the U-Net
ended, at its own ``--learning_rate``.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from transformers import CLIPTextModel

from dvar.mini.world.classes import CLASSES
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS
from dvar.stopping.probe import draw_stratified_timesteps
from pretraining import autoencoder, clip
from pretraining.attention import bound_heads, peaks, watched
from pretraining.latents import draw_examples, load_latents, scaling_factor
from pretraining.pictures import as_tensor, captions_for, draw_pictures
from pretraining.training import GRID_EVERY_STEPS, Training, arguments, averages, load_average, rank, share, together
from pretraining.words import load_tokenizer

SNR_CAPS = 2.0, 8.0
DETAIL_FROM = 0.25
"""The share of the steps after which the second of these caps holds."""
V_CAP = 10.0
HELD = 999_000
"""The stream of images that no stage trains on."""
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build(channels: int = autoencoder.CHANNELS) -> UNet2DConditionModel:
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=down,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=clip.WIDTHS["clip"],
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def prepare(name: str, start: str | None = None) -> UNet2DConditionModel:
    """Return the model that a name stands for, before its training; ``further`` begins where ``unet`` ended, and with
    ``start`` every tensor that has its shape in that stage begins as the stage's average."""
    if name == "further":
        channels = averages("unet")["conv_in.weight"].shape[1]
        return load_average("unet", build(channels)).requires_grad_(True).train()
    unet = build()
    if start:
        state = unet.state_dict()
        known = {key: value for key, value in averages(start).items() if value.shape == state[key].shape}
        print(f"{len(known)} of {len(state)} tensors begin as those of {start}", flush=True)
        unet.load_state_dict(state | known)
    return unet


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(**NOISE, clip_sample=False)


def pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A U-Net with all that it needs to draw: what ships."""
    tokenizer = load_tokenizer()
    whole = clip.load("clip", len(tokenizer))
    text_encoder = CLIPTextModel(whole.config.text_config)
    text_encoder.load_state_dict(whole.text_model.state_dict())
    vae = load_average("autoencoder", autoencoder.build())
    vae.register_to_config(scaling_factor=scaling_factor(load_latents()["moments"]))
    # SD1.5 ships PNDM; here it breaks subjects up under guidance of 7.5, which DDIM does not.
    sampler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass(frozen=True)
class Held:
    """Noisy latents of images that training never saw, with their noise, timesteps and text."""

    noisy: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: list[str]
    condition: torch.Tensor

    @torch.no_grad()
    def predict(self, unet: UNet2DConditionModel) -> torch.Tensor:
        return unet(self.noisy, self.timesteps, self.condition).sample

    def error(self, unet: UNet2DConditionModel) -> float:
        """Return the mean squared error of the predicted noise."""
        return float((self.predict(unet) - self.noise).square().mean())


@torch.no_grad()
def held_draws(pipe: StableDiffusionPipeline, count: int, index: int = 3) -> Held:
    """Return ``count`` held draws for a pipeline in float32, always the same, one timestep from each of as many equal
    parts of the schedule."""
    rng, generator = np.random.default_rng([HELD, index]), torch.Generator().manual_seed(HELD + index)
    pictures = draw_pictures(HELD, index, count)
    captions, _ = captions_for(pictures.facts, rng)
    ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    posterior = pipe.vae.encode(as_tensor(pictures.pixels)).latent_dist
    latents = pipe.vae.config.scaling_factor * posterior.sample(generator)
    noise = torch.randn(latents.shape, generator=generator)
    steps = len(pipe.scheduler.alphas_cumprod)
    timesteps = ((torch.arange(count) + torch.rand(count, generator=generator)) * steps / count).long()
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    return Held(noisy, noise, timesteps, captions, pipe.text_encoder(input_ids=ids).last_hidden_state)


def sheet(pipe: StableDiffusionPipeline) -> list[np.ndarray]:
    """Every class in some colour and place, five rows of five, drawn in 20 steps from fixed noise."""
    colours, places = list(COLOURS), list(PLACES.values())
    prompts = [
        f"a photo of a {colours[i % len(colours)]} {noun} {places[i % len(places)].words}"
        for i, noun in enumerate(CLASSES)
    ]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    drawn = pipe(prompts, num_inference_steps=20, generator=generators, height=64, width=64, output_type="np").images
    return list((drawn * 255).round().astype(np.uint8).reshape(5, 5, 64, 64, 3))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bound", type=float, help="of the attention logits, after each step")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--begin_from", help="a stage of another U-Net, whose tensors it begins with where they fit")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    chosen = arguments(steps=12_000, batch=64, parser=parser)
    name = chosen.name or "unet"
    device = chosen.device
    tokenizer = load_tokenizer()
    text = clip.load("clip", len(tokenizer)).text_model.to(device)
    data = load_latents()
    scale = scaling_factor(data["moments"])
    alphas = scheduler().alphas_cumprod.to(device)
    unet = prepare(name, chosen.begin_from)
    if device == "cpu":
        unet.set_attn_processor(
            AttnProcessor()
        )  # the fused kernel's backward is slow on CPUs at 64 tokens: 30 % of a step
    seen = sha256(data["moments"].numpy().tobytes() + data["facts"].numpy().tobytes()).hexdigest()
    training = Training(
        name,
        unet,
        chosen,
        lr=chosen.learning_rate,
        data=seen,
        decay=0.999,
        optimizer=chosen.optimizer,
        attention_bound=chosen.bound,
        begun_from=chosen.begin_from,
    )
    seen_peaks: dict[Attention, torch.Tensor] = {}

    def look(_: str, module: Attention, logits: torch.Tensor) -> None:
        seen_peaks[module] = peaks(logits)

    drawing = pipeline(unet).to(device)
    drawing.set_progress_bar_config(disable=True)
    for step in training:
        index, count = share(step, chosen.batch)
        examples = draw_examples(data, scale, count, np.random.default_rng([5000 + chosen.seed, index]))
        latents, noise, region = (each.to(device) for each in (examples.latents, examples.noise, examples.region))
        ids = tokenizer(examples.captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        t = draw_stratified_timesteps(count, len(alphas), examples.generator).to(device)
        level = alphas[t][:, None, None, None]
        noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                condition = text(input_ids=ids).last_hidden_state
            with watched(unet, look) if chosen.bound else nullcontext():
                predicted = unet(noisy, t, condition).sample
        squared = (predicted.float() - noise) ** 2
        snr = level / (1 - level)
        weight = snr.clamp(max=SNR_CAPS[step >= DETAIL_FROM * chosen.steps]) / snr * (1 / level).clamp(max=V_CAP)
        loss = (squared * region * weight).mean()
        training.update(loss)
        together(list(seen_peaks.values()), dist.ReduceOp.MAX)
        bounded = sum(bound_heads(module, peak, chosen.bound) for module, peak in seen_peaks.items())
        if training.step % 50 == 0:
            plain = squared.detach().mean(dim=(1, 2, 3))
            training.log(loss=loss, mse=plain.mean(), mse_high=plain[t > 600].mean(), bounded=bounded)
        if training.step % GRID_EVERY_STEPS == 0 and rank() == 0:
            with training.averaged(), torch.autocast(device, torch.bfloat16):
                training.grid(sheet(drawing))


if __name__ == "__main__":
    main()
