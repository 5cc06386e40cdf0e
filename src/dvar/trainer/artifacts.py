"""What a run leaves for others: the learned vectors in the file stock diffusers loads, a model card, the result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dvar.config import BUNDLED_MODEL, TextualInversionConfig
from dvar.errors import NonFiniteLoss
from dvar.stopper.verdict import Verdict

EMBEDS = "learned_embeds.safetensors"
RESULT = "result.json"


def write_embeds(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a method's ``state``, {token: [num_vectors, dim] float32}, for diffusers' `load_textual_inversion`.

    Raises: NonFiniteLoss when a vector is not finite; then nothing is written.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"the vectors of {name} are not finite and are not exported: lower the learning rate")
    write_whole(path, save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"}))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a reader meets whole or not at all, and that is on the disk when this returns."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_model_card(folder: Path, config: TextualInversionConfig, verdict: Verdict, pictures: list[Path]) -> None:
    """Write README.md: what was learned, how to load it, why training stopped, settings, the last sample pictures."""
    write_whole(folder / "README.md", _CARD.format(**_facts(folder, config, verdict, pictures)).encode())


def _facts(folder: Path, config: TextualInversionConfig, verdict: Verdict, pictures: list[Path]) -> dict[str, str]:
    name = config.pretrained_model_name_or_path
    on_hub = name != BUNDLED_MODEL and not Path(name).expanduser().exists()
    # A card travels: it must not tell where its writer keeps a model.
    public = name if on_hub else Path(name).name
    settings = {
        "first word": config.initializer_token,
        "vectors": config.num_vectors,
        "resolution": config.resolution,
        "batch": config.train_batch_size * config.gradient_accumulation_steps,
        "learning rate": f"{config.learning_rate:g}",
        "seed": config.seed,
    }
    return {
        "base": f"base_model: {name}\n" if on_hub else "",
        "model": "the model bundled with dvar" if name == BUNDLED_MODEL else f"`{public}`",
        "loaded": "str(dvar.mini.path())" if name == BUNDLED_MODEL else f'"{public}"',
        "imports": "import dvar.mini\n" if name == BUNDLED_MODEL else "",
        "word": config.placeholder_token,
        "kind": config.learnable_property,
        "prompt": config.sample_prompt,
        "verdict": verdict.sentence,
        "settings": "\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        "pictures": " ".join(f"![{config.sample_prompt}]({path.relative_to(folder).as_posix()})" for path in pictures),
    }


_CARD = """---
{base}library_name: diffusers
tags:
- text-to-image
- diffusers
- diffusers-training
- textual_inversion
---

# {word}

A word for one {kind}, learned by Textual Inversion on {model}. Write `{word}` in a prompt.

{pictures}

```python
{imports}from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({loaded})
pipeline.load_textual_inversion(".", weight_name="learned_embeds.safetensors")
pipeline("{prompt}").images[0].save("picture.png")
```

How training ended: {verdict}.

| setting | value |
|---|---|
{settings}
"""
