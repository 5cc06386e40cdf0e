"""The prompts of the sample images: one for all, or a file of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dvar.config.fields import SEED
from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput
from dvar.files import read_text
from dvar.training.family_fit import family_at_hand

_OPTION = re.compile(r"\s--(\w+)\s+")
_KNOWN = {"n": "negative_prompt", "d": "seed"}


@dataclass(frozen=True)
class SamplePrompt:
    """The texts and the seed of a sample image.

    Attributes:
        prompt: The prompt.
        negative: What guidance leads away from; the empty prompt if None.
        seed: The seed of its initial noise; by default that of the run.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None


def read_sample_prompts(config: TrainingConfig) -> tuple[SamplePrompt, ...]:
    """Return the prompts of ``config``: those of its file, or the only one.

    Raises:
        RefusedInput: The file cannot be read; all problems are named.
    """
    if not config.sample_prompts:
        return (SamplePrompt(config.sample_prompt),)
    file = Path(config.sample_prompts).expanduser()
    try:
        text = read_text(file, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RefusedInput([f"sample_prompts {file} cannot be read ({reason}): check the path"]) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    prompts, problems = [], []
    for number, line in lines:
        if line and not line.startswith("#"):
            try:
                prompts.append(_parse_line(line))
            except ValueError as error:
                problems.append(f"sample_prompts {file}, line {number}, {error}")
    if not prompts and not problems:
        problems.append(f"sample_prompts {file} holds no prompts: write one a line")
    if problems:
        raise RefusedInput(problems)
    return tuple(prompts)


def problems(config: TrainingConfig) -> list[str]:
    """Return what is wrong with the file of prompts, or with negative ones that the family or its guidance ignores."""
    try:
        prompts = read_sample_prompts(config)
    except RefusedInput as error:
        return list(error.problems)
    if not any(prompt.negative for prompt in prompts):
        return []
    family = family_at_hand(config)
    if family is None:
        return []
    if not family.reads_negatives:
        return [f"sample_prompts has negative prompts, and the pipeline of {family.title} reads none: drop --n"]
    least, guidance = family.guides_above, config.guidance_scale
    if guidance > least:
        return []
    rule = f"negative prompts in sample_prompts need a guidance_scale above {least:g} on a {family.title}"
    return [f"{rule}, got {guidance:g}: drop --n, or raise it"]


def _parse_line(line: str) -> SamplePrompt:
    """Return a line as kohya's scripts write it: the prompt, then --n and a negative one, or --d and a seed."""
    prompt, *parts = _OPTION.split(line)
    values = dict(zip(parts[::2], (value.strip() for value in parts[1::2]), strict=True))
    if not prompt.strip() or prompt.startswith("--"):
        raise ValueError("has no prompt before its options: write it first")
    if unknown := [name for name in values if name not in _KNOWN]:
        raise ValueError(f"has an option --{unknown[0]}: only --n (negative prompt) and --d (seed) are read, drop it")
    if "d" in values and not (re.fullmatch(r"\d{1,19}", values["d"]) and int(values["d"]) in SEED):
        raise ValueError(f"has a seed {values['d']!r} that is not a whole number from 0 to {SEED.most}: correct it")
    return SamplePrompt(prompt.strip(), values.get("n") or None, int(values["d"]) if "d" in values else None)
