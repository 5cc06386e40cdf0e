"""What a run leaves for others: what was learned in files that stock diffusers loads, a model card, the result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dvar import __version__
from dvar.config import BUNDLED_MODEL, AnyConfig, prior_weight, sample_prompt
from dvar.errors import NonFiniteLoss
from dvar.stopper.verdict import Verdict
from dvar.trainer.loading import EMBEDS, imports, loads, of_word

RESULT = "result.json"
_OWN = ("rank", "lora_alpha", "lora_targets", "class_noun", "instance_prompt", "freeze_model")


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` as safetensors, with ``metadata`` beside the format's name.

    Raises: NonFiniteLoss when one of them is not finite; then nothing is written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"the values of {name} are not finite and are not exported: lower the learning rate")
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(kept, metadata={"format": "pt", **(metadata or {})}))


def provenance(config: AnyConfig, base: str, step: int) -> dict[str, str]:
    """Return what every weight file says of itself: its maker, its method, its base model by name and by ``base``, the
    digest of what is in it, and its step.
    """
    return {
        "dvar": __version__,
        "method": config.method,
        "base_model": public_name(config),
        "base_sha256": base,
        "step": str(step),
    }


def public_name(config: AnyConfig) -> str:
    """Return the base model's name for others: a hub id as it is, of a folder the last part alone."""
    name = config.pretrained_model_name_or_path
    return name if _on_hub(name) else Path(name).name


def by_word(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Return ``files``, file name to what is in it, with each of several new words in a file of its own.

    Stock diffusers reads one word from a file.  A single word stays in `EMBEDS`.
    """
    words = files.get(EMBEDS, {})
    if len(words) < 2:
        return dict(files)
    apart: dict[str, Mapping[str, Tensor]] = {}
    for word, vectors in words.items():
        name = of_word(word)
        apart[of_word(f"{word}_{len(apart)}") if name in apart else name] = {word: vectors}
    return {**apart, **{name: tensors for name, tensors in files.items() if name != EMBEDS}}


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
    # A card travels: it must not tell where its writer keeps a model.
    public, licence = public_name(config), _licence(name)
    model = "the model bundled with dvar" if name == BUNDLED_MODEL else f"`{public}`"
    settings = {
        "first word": config.initializer_token,
        "vectors": config.num_vectors,
        "resolution": config.resolution,
        "batch": config.train_batch_size * config.gradient_accumulation_steps,
        "learning rate": f"{config.learning_rate:g}",
        "seed": config.seed,
        **{name.replace("_", " "): getattr(config, name) for name in _OWN if hasattr(config, name)},
        "prior loss weight": prior_weight(config) or None,
    }
    prompt = sample_prompt(config)
    return {
        "head": (f"base_model: {name}\n" * _on_hub(name)) + (f"license: {licence}\n" if licence else ""),
        "model": model,
        "licence": f"{licence}, that of the base model" if licence else f"that of the base model, {model}",
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


def _on_hub(name: str) -> bool:
    return name != BUNDLED_MODEL and not Path(name).expanduser().exists()


def _licence(name: str) -> str | None:
    """The licence that a base model's own card names, where the card is at hand."""
    if name == BUNDLED_MODEL:
        return "apache-2.0"
    card = Path(name).expanduser() / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("---") if card.is_file() else []
    found = re.search(r"^license: *([\w.-]+)$", head[1], re.MULTILINE) if len(head) > 2 else None
    return found[1] if found else None


_CARD = """---
{head}library_name: diffusers
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

Licence: {licence}; its terms hold for what was learned from it.

| setting | value |
|---|---|
{settings}
"""
