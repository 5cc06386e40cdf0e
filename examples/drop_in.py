"""DVAR in a plain PyTorch loop: a small network learns to remove noise from points on a spiral, and stops by itself.

The training loss is mostly noise, as that of a diffusion model. The same loss on one held batch is a smooth curve.
Run ``python examples/drop_in.py``; it takes a few seconds.
"""

import torch
from torch import nn

import dvar

torch.manual_seed(0)


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw clean points, their noise and its level (0 to 1): everything that is random about a batch."""
    angle = 3 * torch.pi * torch.rand(count).sqrt()
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 6
    return points, torch.randn(count, 2), torch.rand(count, 1)


def losses(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the squared error of the predicted noise, one number per point."""
    points, noise, level = batch
    noisy = (1 - level).sqrt() * points + level.sqrt() * noise
    return (network(torch.cat([noisy, level], dim=1)) - noise).square().mean(dim=1)


network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

probe = dvar.Probe(losses, draw(64), modules=[network])
trace, stop = dvar.Trace(), dvar.Dvar(window=310, threshold=0.15)

for step in range(6100):
    trace.record(step, probe())
    if (verdict := stop(trace)).stop:
        break
    loss = losses(draw(8)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(verdict)
print(f"loss on the held batch: {trace.values[0]:.3f} before training, {trace.values[-1]:.3f} at the stop")
for diagnosis in verdict.diagnoses:
    print(diagnosis)
