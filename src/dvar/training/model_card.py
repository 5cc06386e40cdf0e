"""What a run leaves for others: what was learned in files that stock diffusers loads, a model card, the result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dvar.config.training import BUNDLED_MODEL, AnyConfig, prior_weight, sample_prompt
from dvar.files import write_whole
from dvar.stopping.verdict import Verdict
from dvar.training.loading_code import imports, loads
from dvar.training.run_layout import EMBEDS
from dvar.training.weight_files import _on_hub, public_name

_OWN = ("rank", "lora_alpha", "lora_targets", "class_noun", "instance_prompt", "freeze_model")


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
