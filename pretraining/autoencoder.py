"""Stage 1: the autoencoder.  L1 on pixels and on their gradients, the subject's region weighted threefold, and a
small KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from pretraining.pictures import Pictures, draw_pictures
from pretraining.training import Training, arguments


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def as_tensor(pictures: Pictures, device: str) -> torch.Tensor:
    """float32 [n, 3, 64, 64] in [-1, 1]."""
    pixels = torch.from_numpy(pictures.pixels).to(device)
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def psnr(squared_error: torch.Tensor) -> torch.Tensor:
    """Decibels for pixels in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error)


def main() -> None:
    chosen = arguments(steps=20_000, batch=8)
    vae = build()
    training = Training("autoencoder", vae, steps=chosen.steps, lr=1.5e-3, device=chosen.device)
    for step in training:
        pictures = draw_pictures(1000 + chosen.seed, step, chosen.batch)
        x = as_tensor(pictures, chosen.device)
        mask = torch.from_numpy(pictures.masks()).to(chosen.device)[:, None]
        with torch.autocast(chosen.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        y = y.float()
        pixel = ((1 + 2 * mask) * (y - x).abs()).mean()
        gradient = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = pixel + gradient + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        training.update(loss)
        if training.step % 100 == 0:
            error = (y.detach() - x) ** 2
            inside = (error * mask).sum() / (3 * mask.sum())
            training.log(
                loss=loss,
                psnr=psnr(error.mean()),
                psnr_object=psnr(inside),
                latent_std=posterior.mean.std(),
                noise=posterior.std.mean(),
            )


if __name__ == "__main__":
    main()
