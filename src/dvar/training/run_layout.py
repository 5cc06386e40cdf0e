"""The names of the files of a run."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDS = "learned_embeds.safetensors"
LORA = "pytorch_lora_weights.safetensors"
ATTENTION = "custom_diffusion_weights.safetensors"
WEIGHTS = (EMBEDS, LORA, ATTENTION)
"""By name: a new word's vectors; a low-rank change of the model; whole weights under the U-Net's own names."""


def at_step(name: str, step: int) -> str:
    """The name of a weight file that holds what was learned at ``step``, where that is not the last."""
    return f"{Path(name).stem}-steps-{step}{Path(name).suffix}"


def of_word(word: str) -> str:
    """The name of the file of one new word among several: learned_embeds.new1.safetensors of <new1>."""
    return f"{Path(EMBEDS).stem}.{re.sub(r'[^A-Za-z0-9_-]', '', word)}{Path(EMBEDS).suffix}"


def kind(name: str) -> str:
    """Which of `WEIGHTS` a file is that `at_step` or `of_word` named."""
    return next(known for known in WEIGHTS if name.startswith(Path(known).stem))


RESULT = "result.json"

CLASS_PICTURES, INITIALIZER = "class_pictures", "initializer.json"


# All that a run writes into its folder: unasked it goes into a folder without any, and replacing it removes no more.
WRITTEN = (
    *("config.json", "trace.jsonl", "trace.jsonl.*", "checkpoint-*", ".checkpoint-*"),
    *(f"{Path(name).stem}*.safetensors" for name in WEIGHTS),
    *(
        "references",
        "samples",
        f"{CLASS_PICTURES}*",
        f".{CLASS_PICTURES}*.part",
        "logs",
        INITIALIZER,
        "result.json",
        "report.html",
        "README.md",
    ),
)
