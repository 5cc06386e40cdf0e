"""A judge that never conditions anything: reads class, place, colour, pattern and the subject's parameters off a
picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

HEADS = {"class": 25, "main colour": 11, "pattern": 4, "place": 14}
"""What is recognised, and how many answers there are; the answers are numbered as in `dvar.mini.world`."""
PARAMETERS = 16
"""Length of `Subject.vector`."""


@dataclass(frozen=True)
class Reading:
    """Logits [n, answers] for each head, and the estimated parameter vectors [n, 16]."""

    logits: dict[str, Tensor]
    parameters: Tensor

    def best(self, head: str) -> Tensor:
        """int64 [n]: the most likely answer."""
        return self.logits[head].argmax(dim=1)


class Recogniser(nn.Module):
    """Four convolutional stages on float pictures [n, 3, 64, 64] in [-1, 1]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 6 * width]
        stages: list[nn.Module] = []
        for before, out in zip([3, *widths], widths, strict=False):
            stages += [nn.Conv2d(before, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU()]
            stages += [nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU()]
        self.features = nn.Sequential(*stages, nn.Flatten())
        self.mixed = nn.Sequential(nn.Linear(widths[-1] * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(256, answers) for name, answers in HEADS.items()})
        self.parameter_head = nn.Linear(256, PARAMETERS)

    def forward(self, pictures: Tensor) -> Reading:
        hidden = self.mixed(self.features(pictures))
        logits = {name: self.heads[name.replace(" ", "_")](hidden) for name in HEADS}
        return Reading(logits, self.parameter_head(hidden))


def load(path: Path) -> Recogniser:
    """The shipped recogniser, frozen, in eval mode, in float32."""
    model = Recogniser()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
