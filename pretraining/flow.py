"""Stage 9: the second base model, a multimodal diffusion transformer trained by flow matching on the same latents.

It ships as a folder of ``StableDiffusion3Pipeline`` without T5.  Its first text tower is that of the CLIP that
conditions the U-Net; the second, a small one, is trained together with the transformer, so that what the first does not
tell apart can be learned too.

In place of what T5 would say, that pipeline passes 256 empty tokens.  They are equal and have no position, so they stay
equal in every block, and one of them can stand for all: `FoldedAttention`.
"""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pretraining import autoencoder, clip
from pretraining.latents import draw_examples, load_latents, scaling_factor
from pretraining.training import GRID_EVERY_STEPS, Training, arguments, load_average, rank, share
from pretraining.unet import sheet
from pretraining.words import LENGTH, load_tokenizer

WIDTH, HEADS, BLOCKS = 192, 6, 6
SECOND_WIDTH = 64
EMPTY_TOKENS = 256
"""What ``StableDiffusion3Pipeline`` passes in place of T5's hidden states, by default."""


class FoldedAttention:
    """Joint attention whose last context token stands for ``count`` equal ones: its logit rises by log(count)."""

    def __init__(self, count: int = EMPTY_TOKENS) -> None:
        self.rise = math.log(count)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the image's tokens [B, n, d] and the context's [B, m, d] become."""
        image, context = hidden_states, encoder_hidden_states

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        queries = [attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(context)))]
        keys = [attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(context)))]
        values = [heads(attn.to_v(image)), heads(attn.add_v_proj(context))]
        query, key, value = (torch.cat(parts, dim=2) for parts in (queries, keys, values))
        logits = query @ key.mT * key.shape[-1] ** -0.5
        bias = torch.zeros(key.shape[2], dtype=logits.dtype, device=logits.device)
        bias[-1] = self.rise
        mixed = ((logits + bias).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image, context = mixed.split([image.shape[1], context.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), context if attn.context_pre_only else attn.to_add_out(context)


class Flow(nn.Module):
    """What is trained: the transformer, and the second text tower."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width = clip.WIDTHS["clip"]
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=autoencoder.CHANNELS,
            out_channels=autoencoder.CHANNELS,
            num_layers=BLOCKS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=width + SECOND_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=clip.SHARED + SECOND_WIDTH,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        end = vocabulary - 1
        self.text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=SECOND_WIDTH,
                intermediate_size=4 * SECOND_WIDTH,
                num_attention_heads=2,
                num_hidden_layers=3,
                projection_dim=SECOND_WIDTH,
                max_position_embeddings=LENGTH,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )


def first_tower(vocabulary: int) -> CLIPTextModelWithProjection:
    """Return the text tower of the CLIP that conditions the U-Net, with its projection, frozen."""
    whole = clip.load("vision", vocabulary)
    tower = CLIPTextModelWithProjection(whole.config.text_config)
    tower.text_model.load_state_dict(whole.text_model.state_dict())
    tower.text_projection.load_state_dict(whole.text_projection.state_dict())
    return tower.eval().requires_grad_(False)


def condition(towers: tuple[nn.Module, nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the context tokens [B, L + 1, d] of a batch of captions, an empty token last, and their pooled states."""
    outputs = [tower(input_ids=ids, output_hidden_states=True) for tower in towers]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=1)
    return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1), pooled


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Return noise levels in (0, 1), one from each of ``count`` equally likely parts, [count].

    Source: Esser et al., Scaling Rectified Flow Transformers (2024), Section 3.1: logit-normal with mean 0 and
        deviation 1, the best of their comparison.
    """
    positions = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.special.ndtri(positions.clamp(1e-4, 1 - 1e-4)).sigmoid()


def pipeline(model: Flow, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """Return the model with all that it needs to generate: what ships."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=first_tower(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def fold(pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Let a pipeline compute one of its equal empty tokens in place of all: the same images but for rounding, and a
    forward pass of 97 tokens instead of 352."""

    def drop_empty(
        module: nn.Module, positional: tuple[()], named: dict[str, Tensor]
    ) -> tuple[tuple[()], dict[str, Tensor]]:
        return positional, named | {"encoder_hidden_states": named["encoder_hidden_states"][:, : 1 - EMPTY_TOKENS]}

    pipe.transformer.set_attn_processor(FoldedAttention())
    pipe.transformer.register_forward_pre_hook(drop_empty, with_kwargs=True)
    return pipe


def load_vae(moments: Tensor) -> AutoencoderKL:
    """Return the autoencoder with the scale of its latents, and the shift that this pipeline asks for."""
    vae = load_average("autoencoder", autoencoder.build())
    vae.register_to_config(scaling_factor=scaling_factor(moments), shift_factor=0.0)
    return vae


def main() -> None:
    chosen = arguments(steps=12_000, batch=64)
    device, tokenizer, data = chosen.device, load_tokenizer(), load_latents()
    vae = load_vae(data["moments"])
    model = Flow(len(tokenizer))
    seen = sha256(data["moments"].numpy().tobytes() + data["facts"].numpy().tobytes()).hexdigest()
    training = Training(chosen.name or "flow", model, chosen, lr=1e-3, data=seen, decay=0.999, optimizer="muon")
    drawing = pipeline(model, vae, tokenizer).to(device)
    drawing.set_progress_bar_config(disable=True)
    towers = drawing.text_encoder, model.text_encoder_2
    stock, folded = model.transformer.attn_processors, FoldedAttention()
    model.transformer.set_attn_processor(folded)
    transformer = torch.compile(model.transformer)
    for step in training:
        index, count = share(step, chosen.batch)
        rng = np.random.default_rng([6000 + chosen.seed, index])
        examples = draw_examples(data, vae.config.scaling_factor, count, rng)
        latents, noise, region = (each.to(device) for each in (examples.latents, examples.noise, examples.region))
        sigmas = sample_sigmas(count, examples.generator).to(device)
        ids = tokenizer(examples.captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        level = sigmas[:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            context, pooled = condition(towers, ids)
            predicted = transformer(
                hidden_states=(1 - level) * latents + level * noise,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=1000 * sigmas,
            ).sample
        squared = (predicted.float() - (noise - latents)) ** 2
        training.update((squared * region).mean())
        if training.step % 50 == 0:
            plain = squared.detach().mean(dim=(1, 2, 3))
            training.log(mse=plain.mean(), mse_high=plain[sigmas > 0.6].mean())
        if training.step % GRID_EVERY_STEPS == 0 and rank() == 0:
            model.transformer.set_attn_processor(dict(stock))
            with training.averaged(), torch.autocast(device, torch.bfloat16):
                training.grid(sheet(drawing))
            model.transformer.set_attn_processor(folded)


if __name__ == "__main__":
    main()
