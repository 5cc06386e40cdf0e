"""Stage 1: the autoencoder.  L1 on pixels and on their gradients, the subject's region weighted threefold, and a
small KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from pretraining.pictures import as_tensor, draw_pictures, fingerprint
from pretraining.training import GRID_EVERY_STEPS, Training, arguments, share

CHANNELS = 8
LEAST_NOISE = 0.1
"""Standard deviation of the noise that the decoder must bear, latents having about 3: what a U-Net gives it is not
exact."""


def build(channels: int = CHANNELS) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def psnr(squared_error: torch.Tensor) -> torch.Tensor:
    """Decibels for pixels in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error)


def main() -> None:
    chosen = arguments(steps=4_000, batch=16)
    vae, stream = build(), 1000 + chosen.seed
    training = Training(
        chosen.name or "autoencoder", vae, chosen, lr=1.5e-3, data=fingerprint(stream), optimizer="muon"
    )
    for step in training:
        index, count = share(step, chosen.batch)
        pictures = draw_pictures(stream, index, count)
        torch.manual_seed(stream + 1000 * index)
        x = as_tensor(pictures.pixels, chosen.device)
        mask = torch.from_numpy(pictures.masks()).to(chosen.device)[:, None]
        with torch.autocast(chosen.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(
                posterior.mean + posterior.std.clamp(min=LEAST_NOISE) * torch.randn_like(posterior.mean)
            ).sample
        y = y.float()
        error = y - x
        gradient = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = ((1 + 2 * mask) * error.abs()).mean() + gradient
        loss = loss + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        training.update(loss)
        if training.step % 50 == 0:
            squared = error.detach() ** 2
            training.log(
                loss=loss,
                psnr=psnr(squared.mean()),
                psnr_object=psnr((squared * mask).sum() / (3 * mask.sum())),
                latent_std=posterior.mean.std(),
                noise=posterior.std.mean(),
            )
        if training.step % GRID_EVERY_STEPS == 0:
            again = ((y.detach().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            training.grid([pictures.pixels, again])


if __name__ == "__main__":
    main()
