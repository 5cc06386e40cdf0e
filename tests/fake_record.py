"""Fake recorded runs, made without a model: the quality rises as 1 - exp(-step / learned)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvar.recordings.setting import format_variant
from dvar.stopping.trace import Trace

TIMESTEPS = (981, 37, 411, 266, 702, 843, 130, 555)
START, GAIN = 0.5, 0.3


def space_scored_steps(cap: int, count: int = 40) -> list[int]:
    """Return step 0, the cap, and log-spaced steps between."""
    return sorted({0, *np.rint(np.geomspace(4, cap, count - 1)).astype(int).tolist()})


def compute_oracle_step(learned: float, share: float = 0.9) -> float:
    """Return where 1 - exp(-step / learned) reaches ``share``, for a run long enough that its plateau is 1."""
    return -learned * float(np.log(1 - share))


def write_fake_record(
    root: Path,
    method: str = "textual-inversion",
    concept: str = "red_mug",
    seed: int = 0,
    *,
    cap: int = 600,
    learned: float = 60.0,
    noise: float = 0.0,
    jitter: float = 1e-4,
    decline: float = 0.0,
    memorised: float | None = None,
    images: int = 8,
    every: int = 5,
    seconds: float = 0.2,
    setting: Mapping[str, Mapping[str, Any]] | None = None,
    header: Mapping[str, Any] | None = None,
) -> Path:
    """Write a finished recording under ``root`` and return its folder.

    The score of a training image is START + GAIN (1 - exp(-step / learned)), minus ``decline`` for each step after half
    of the cap, with noise of its own; L_det falls by 2 % with the same time constant.

    Args:
        noise: Standard deviation of the score of an image.
        memorised: The step from which on validation images obey their prompts ever less, and the loss on unseen
            renderings rises; without it they hardly do, and the loss falls as on the held batch.
        jitter: Relative standard deviation of a loss.
        images: Images of each part at a scored step.
        every: Steps between two values of the sparser series.
        seconds: Seconds of an update.
        setting: What differs from the preset.
        header: Further values of the header.
    """
    random = np.random.default_rng([seed, *(method + concept).encode()])
    folder = root / method / concept / f"{seed}{format_variant(setting or {})}"
    folder.mkdir(parents=True, exist_ok=True)
    _generate_trace(random, cap, learned, memorised, jitter, every, seconds).write(folder / "trace.jsonl")
    scores = _generate_scores(random, cap, learned, memorised, noise, decline, images)
    scores["header"] |= {**({"setting": setting} if setting else {}), **(header or {})}
    _write_json(folder / "scores.json", scores)
    config = {"method": method, "preset": "mini", "max_train_steps": cap, "seed": seed, "train_batch_size": 4}
    config |= {"pretrained_model_name_or_path": "mini", "num_inference_steps": 25, "eval_batch_size": 8}
    _write_json(folder / "config.json", config)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("trace.jsonl", "scores.json")}
    _write_json(folder / "done.json", {"hashes": sums, "versions": {"dvar": "0.1.0"}})
    return folder


def write_fake_sheets(folder: Path, steps: Iterable[int], count: int = 4, side: int = 16) -> None:
    """Write plain images of some scored steps, which grow lighter with the step, and a reference."""
    (folder / "pictures").mkdir(exist_ok=True)
    for place, step in enumerate(steps):
        sheet = Image.new("RGB", (side * count, 2 * side), (40 * place, 80, 120))
        sheet.save(folder / "pictures" / f"step-{step:06d}.png")
    (folder / "references").mkdir(exist_ok=True)
    Image.new("RGB", (side, side), "white").save(folder / "references" / "00.png")


def _generate_trace(
    random: np.random.Generator,
    cap: int,
    learned: float,
    memorised: float | None,
    jitter: float,
    every: int,
    seconds: float,
) -> Trace:
    level, held = 0.2 + 3.0 * np.exp(-np.array(TIMESTEPS) / 200), np.sort(random.integers(0, 1000, 32))
    series = {
        "stratified": {"every": every, "timesteps": held.tolist()},
        **{name: {"every": every} for name in ("fresh", "frozen", "unseen", "drift", "token_norm")},
    }
    trace = Trace({"timesteps": list(TIMESTEPS), "series": series})
    for step in range(cap + 1):
        gain = 1 - np.exp(-step / learned)
        fall = 1 - 0.02 * gain
        more: dict[str, Any] = {"seconds": {"train": seconds * bool(step), "eval": seconds / 2, "other": 0.01}}
        if step:
            more |= {"train_loss": 0.06 * random.gamma(2.0), "grad_norm": random.gamma(3.0)}
        if step % every == 0:
            timesteps = random.integers(0, 1000, 8)
            frozen = (0.2 + 3.0 * np.exp(-timesteps / 200)) * random.uniform(0.5, 1.5, 8)
            more |= {"fresh": (frozen * fall).tolist(), "frozen": frozen.tolist()}
            more |= {"fresh_timesteps": timesteps.tolist()}
            spread = 1 + jitter * random.standard_normal(32)
            more["stratified"] = ((0.2 + 3.0 * np.exp(-held / 200)) * fall * spread).tolist()
            rise = 1 + 0.02 * _octaves_past(step, memorised)
            more["unseen"] = (level * fall * rise * (1 + jitter * random.standard_normal(8))).tolist()
            more |= {"drift": 1e-3 * gain, "token_norm": 0.4 + 0.2 * gain}
        trace.record(step, level * fall * (1 + jitter * random.standard_normal(len(level))), **more)
    return trace


def _generate_scores(
    random: np.random.Generator,
    cap: int,
    learned: float,
    memorised: float | None,
    noise: float,
    decline: float,
    images: int,
) -> dict[str, Any]:
    rows = []
    for step in space_scored_steps(cap):
        gain = 1 - np.exp(-step / learned)
        decrease = decline * max(0, step - cap / 2)
        obedience = 0.26 - 0.03 * gain - 0.02 * step / cap
        if memorised is not None:
            obedience = 0.26 - 0.02 * _octaves_past(step, memorised)
        curves = {
            ("train", "clip_image"): START + GAIN * gain - decrease,
            ("train", "clip_text"): 0.20 + 0.01 * gain,
            ("validation", "clip_image"): 0.48 + 0.22 * gain - decrease,
            ("validation", "clip_text"): obedience,
        }
        row: dict[str, Any] = {"step": step, "train": {}, "validation": {}, "seconds": 0.5 * 2 * images}
        for (part, metric), value in curves.items():
            row[part][metric] = (value + noise * random.standard_normal(images)).tolist()
        rows.append(row)
    header = {
        "pairing": "all pairs",
        "judges": {"clip": "the bundled scorer"},
        "train_prompts": ["a photo of <thing>"],
        "validation_prompts": ["a photo of <thing> on the beach"],
        "seeds": list(range(images)),
        "sampling_steps": 25,
        "guidance": 5.0,
        "references": 4,
    }
    return {"header": header, "rows": rows}


def _octaves_past(step: int, memorised: float | None) -> float:
    return 0.0 if memorised is None else max(0.0, float(np.log2(max(step, 1) / memorised)))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
