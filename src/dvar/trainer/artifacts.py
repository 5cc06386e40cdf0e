"""What a run leaves for others: what was learned in files that stock diffusers loads, a model card, the result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dvar.config import BUNDLED_MODEL, AnyConfig, sample_prompt
from dvar.errors import NonFiniteLoss
from dvar.stopper.verdict import Verdict
from dvar.trainer.loading import EMBEDS, imports, loads

RESULT = "result.json"
_OWN = ("rank", "lora_alpha", "class_noun", "instance_prompt", "prior_loss_weight", "freeze_model")


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` as safetensors, with ``metadata`` beside the format's name.

    Raises: NonFiniteLoss when one of them is not finite; then nothing is written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"the values of {name} are not finite and are not exported: lower the learning rate")
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(kept, metadata={"format": "pt", **(metadata or {})}))


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


def write_model_card(
    folder: Path, config: AnyConfig, verdict: Verdict, pictures: Sequence[Path], weights: Sequence[str] = (EMBEDS,)
) -> None:
    """Write README.md: what was learned, how to load it, why training stopped, settings, the last sample pictures.

    ``weights`` are the names of the weight files beside it.
    """
    write_whole(folder / "README.md", _CARD.format(**_facts(folder, config, verdict, pictures, weights)).encode())


def _facts(
    folder: Path, config: AnyConfig, verdict: Verdict, pictures: Sequence[Path], weights: Sequence[str]
) -> dict[str, str]:
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
        **{name.replace("_", " "): getattr(config, name) for name in _OWN if hasattr(config, name)},
    }
    prompt = sample_prompt(config)
    return {
        "base": f"base_model: {name}\n" if on_hub else "",
        "model": "the model bundled with dvar" if name == BUNDLED_MODEL else f"`{public}`",
        "loaded": "str(dvar.mini.path())" if name == BUNDLED_MODEL else f'"{public}"',
        "tags": "".join(f"\n- {tag}" for tag in config.tags),
        "title": config.title,
        "imports": "\n".join(["import dvar.mini"] * (name == BUNDLED_MODEL) + imports(weights)),
        "loads": "\n".join(loads(weights)),
        "subject": config.subject,
        "learned": config.learned[:1].upper() + config.learned[1:],
        "kind": config.kind,
        "prompt": prompt,
        "verdict": verdict.sentence,
        "settings": "\n".join(f"| {key} | {value} |" for key, value in settings.items() if value is not None),
        "pictures": " ".join(f"![{prompt}]({path.relative_to(folder).as_posix()})" for path in pictures),
    }


_CARD = """---
{base}library_name: diffusers
tags:
- text-to-image
- diffusers
- diffusers-training{tags}
---

# {subject}

{learned} for one {kind}, by {title} on {model}. Write `{subject}` in a prompt.

{pictures}

```python
{imports}

pipeline = StableDiffusionPipeline.from_pretrained({loaded})
{loads}
pipeline("{prompt}").images[0].save("picture.png")
```

How training ended: {verdict}.

| setting | value |
|---|---|
{settings}
"""
