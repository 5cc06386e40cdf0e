"""Stage 5: the recogniser, trained on fresh renderings (held-out subjects not excepted: it judges, it does not draw).

The parameters are learned as independent Gaussians (negative log-likelihood), with the squared error beside it, which
keeps the means moving while the spreads are still wide.  Pictures are blurred or made noisy at random, so that what a
small diffusion model draws is read as a person would read it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dvar.mini.recogniser import RECOGNISED, Recogniser
from dvar.mini.world.captions import ANSWERS, FACTS, facts
from dvar.mini.world.scene import PARAMETERS, render, sample_scene, sample_subject
from pretraining.pictures import as_tensor, fingerprint
from pretraining.training import Training, arguments


def worn(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures are blurred by a factor up to two; all get noise of up to 0.1."""
    n = len(x)
    small = F.interpolate(F.interpolate(x, size=40, mode="bilinear", antialias=True), size=64, mode="bilinear")
    share = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    noise = 0.1 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return x + share.to(x) * (small - x) + noise.to(x)


def build() -> Recogniser:
    return Recogniser({name: ANSWERS[name] for name in RECOGNISED}, PARAMETERS)


def main() -> None:
    chosen = arguments(steps=12_000, batch=64)
    model = build()
    training = Training("recogniser", model, chosen, lr=1.5e-3, data=fingerprint(6000 + chosen.seed))
    for step in training:
        rng = np.random.default_rng([6000 + chosen.seed, step])
        generator = torch.Generator().manual_seed(step)
        subjects = [sample_subject(rng) for _ in range(chosen.batch)]
        scenes = [sample_scene(rng) for _ in subjects]
        pixels = np.stack([render(s, c) for s, c in zip(subjects, scenes, strict=True)])
        truth = (
            torch.from_numpy(np.stack([facts(s, c) for s, c in zip(subjects, scenes, strict=True)]))
            .long()
            .to(chosen.device)
        )
        vectors = torch.from_numpy(np.stack([s.vector() for s in subjects])).float().to(chosen.device)
        x = as_tensor(pixels, chosen.device)
        x = worn(x, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(chosen.device, torch.bfloat16):
            reading = model(x)
        losses = [F.cross_entropy(reading.logits[head].float(), truth[:, FACTS.index(head)]) for head in RECOGNISED]
        rows = torch.arange(chosen.batch, device=chosen.device), truth[:, FACTS.index("class")]
        error, spread = (reading.means[rows] - vectors) ** 2, reading.spreads[rows]
        surprise = (error / (2 * spread**2) + spread.log()).mean()
        loss = sum(losses) + 2 * surprise + 10 * error.mean()
        training.update(loss)
        if training.step % 100 == 0:
            right = {h: (reading.best(h) == truth[:, FACTS.index(h)]).float().mean() for h in RECOGNISED}
            training.log(loss=loss, error=error.mean().sqrt(), surprise=surprise, **right)


if __name__ == "__main__":
    main()
