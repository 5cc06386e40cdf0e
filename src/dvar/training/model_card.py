"""The model card of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.files import read_content, write_atomically
from dvar.stopping.verdict import Verdict
from dvar.training.loading_code import STABLE_DIFFUSION, generate_line, import_lines, load_lines
from dvar.training.pipeline_code import load_pipeline_code, pipeline_import_lines
from dvar.training.run_layout import EMBEDS, MODEL_CARD
from dvar.training.weight_files import is_on_hub, public_model_name

_OWN_FIELDS = ("rank", "lora_alpha", "lora_targets", "lora_plus_ratio", "class_noun", "instance_prompt", "freeze_model")


def write_model_card(
    folder: Path,
    config: TrainingConfig,
    verdict: Verdict,
    samples: Sequence[Path],
    weights: Sequence[str] = (EMBEDS,),
    family: str = STABLE_DIFFUSION,
) -> None:
    """Write README.md: what was learned, how to load it, why training stopped, the settings, the last sample images.

    Args:
        folder: The folder of the run.
        config: Its config.
        verdict: Its last verdict.
        samples: The paths of the sample images to show.
        weights: The names of the weight files beside the card.
        family: The family of the base model, by its `Backbone.title`.
    """
    card = _CARD.format(**_facts(folder, config, verdict, samples, weights, family))
    write_atomically(folder / MODEL_CARD, card.encode())


def _facts(
    folder: Path,
    config: TrainingConfig,
    verdict: Verdict,
    samples: Sequence[Path],
    weights: Sequence[str],
    family: str,
) -> dict[str, str]:
    """Return what the card says, by placeholder of the template."""
    name = config.pretrained_model_name_or_path
    # A card travels: it must not tell where its writer keeps a model.
    public_name, licence = public_model_name(config), _licence(name)
    bundled = name in BUNDLED_MODELS
    model = f"`{name}`, bundled with dvar" if bundled else f"`{public_name}`"
    settings = {
        "first word": config.initializer_token,
        "vectors": config.num_vectors,
        "resolution": config.resolution,
        "batch": config.train_batch_size * config.gradient_accumulation_steps,
        "learning rate": f"{config.learning_rate:g}",
        "seed": config.seed,
        **{name.replace("_", " "): getattr(config, name, None) for name in _OWN_FIELDS},
        "prior loss weight": config.effective_prior_weight or None,
    }
    prompt = config.sample_prompt
    return {
        "head": (f"base_model: {name}\n" * is_on_hub(name))
        + (f"license: {licence}\n" if licence else "")
        + f"instance_prompt: {json.dumps(config.plain_prompt, ensure_ascii=False)}\n",
        "model": model,
        "licence": f"{licence}, that of the base model" if licence else f"that of the base model, {model}",
        "source": load_pipeline_code(config, public=True),
        "tags": "".join(f"\n- {tag}" for tag in config.tags),
        "title": config.title,
        "imports": "\n".join([*pipeline_import_lines(config), *import_lines(weights, family)]),
        "loads": "\n".join(load_lines(weights, ".", config.placeholder_token, family)),
        "subject": config.subject,
        "learned": config.learned[:1].upper() + config.learned[1:],
        "kind": config.kind,
        "generates": generate_line(config, prompt, family),
        "verdict": verdict.sentence,
        "settings": "\n".join(
            f"| {key} | {str(value).replace('|', chr(92) + '|')} |"
            for key, value in settings.items()
            if value is not None
        ),
        "samples": " ".join(f"![{prompt}]({path.relative_to(folder).as_posix()})" for path in samples),
    }


def _licence(name: str) -> str | None:
    """Return the licence that a base model's own card names, where the card is at hand."""
    if name in BUNDLED_MODELS:
        return "apache-2.0"
    card = Path(name).expanduser() / MODEL_CARD
    parts = read_content(card).decode(errors="replace").split("---") if card.is_file() else []
    match = re.search(r"^license: *([\w.-]+)$", parts[1], re.MULTILINE) if len(parts) > 2 else None
    return match[1] if match else None


_CARD = """---
{head}library_name: diffusers
tags:
- text-to-image
- diffusers
- diffusers-training{tags}
---

# {subject}

{learned} for one {kind}, by {title} on {model}. Write `{subject}` in a prompt.

{samples}

```python
{imports}

pipeline = {source}
{loads}
{generates}
```

How training ended: {verdict}.

Licence: {licence}; its terms apply to what was learned from it.

| setting | value |
|---|---|
{settings}
"""
