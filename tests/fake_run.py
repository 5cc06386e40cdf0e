"""The folder of a run, written without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

TIMESTEPS = (981, 37, 411, 266, 702, 843, 130, 555)
CONFIG: dict[str, Any] = {
    "pretrained_model_name_or_path": "mini",
    "instance_data_dir": "images/mug",
    "placeholder_token": "<thing>",
    "initializer_token": "mug",
    "num_vectors": 1,
    "max_train_steps": 1000,
    "seed": 0,
    "probe_every": 1,
    "window": 160,
    "threshold": 0.15,
    "validation_prompt": None,
    "output_dir": "runs/mug",
    "versions": {"dvar": "0.1.0", "torch": "2.13.0"},
}


def falling_loss(step: int) -> float:
    """Return a loss that falls exponentially by 1.5 %, with a time constant of 70 steps."""
    return 0.0426 * (1 + 0.015 * math.exp(-step / 70))


def generate_trace(
    loss: Callable[[int], float] = falling_loss,
    steps: int = 1000,
    probe_every: int = 1,
    seed: int = 0,
    rule: Rule | None = None,
) -> Trace:
    """Return the trace of a run whose L_det follows ``loss`` until ``rule`` stops it or its steps end.

    The rule is that of `CONFIG` by default.
    """
    rng = np.random.default_rng(seed)
    level = np.array([0.2 + 3.0 * np.exp(-timestep / 200) for timestep in TIMESTEPS])
    trace, rule = Trace({"timesteps": list(TIMESTEPS)}), rule or _build_rule()
    for step in range(steps + 1):
        probed = step % probe_every == 0
        jitter = 1 + 2e-4 * rng.standard_normal(len(TIMESTEPS))
        trained = {"train_loss": 0.06 * rng.gamma(2.0), "grad_norm": rng.gamma(3.0), "lr": 1e-2} if step else {}
        seconds = {"train": 0.21 * bool(step), "probe": 0.12 * probed, "other": 0.01}
        trace.record(step, loss(step) * level / level.mean() * jitter if probed else None, seconds=seconds, **trained)
        if rule(trace).stop:
            break
    return trace


def write_run(
    folder: Path,
    trace: Trace,
    *,
    finished: bool = True,
    verdict: Verdict | None = None,
    sampled_every: int = 60,
    images: int = 4,
    side: int = 64,
    prompt: str = "a photo of <thing>",
    weights: Sequence[str] = ("learned_embeds.safetensors",),
    best_weights: Sequence[str] | None = None,
    **settings: Any,
) -> Path:
    """Write the folder of a run with this trace; ``settings`` replace those of `CONFIG`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", CONFIG | settings)
    trace.write(folder / "trace.jsonl")
    _write_noise(folder / "references", images, side, seed=1)
    for step in {*range(0, trace.last_step, sampled_every), trace.last_step} if sampled_every else ():
        _write_noise(folder / "samples" / f"step-{step:06d}", images, side, seed=step)
        _write_json(folder / "samples" / "prompts.json", [{"prompt": prompt, "seed": seed} for seed in range(images)])
    if finished:
        names = {"weights": list(weights), "best_weights": list(best_weights or weights)}
        _write_json(folder / "result.json", _format_result(trace, verdict or _build_rule()(trace)) | names)
    return folder


def _build_rule() -> AnyOf:
    return AnyOf((Dvar(CONFIG["window"], CONFIG["threshold"]), FixedSteps(CONFIG["max_train_steps"])))


def _format_result(trace: Trace, verdict: Verdict) -> dict[str, Any]:
    seconds = {kind: float(trace.metric(f"seconds.{kind}")[1].sum()) for kind in ("train", "probe", "other")}
    best = int(trace.steps[int(np.nanargmin(trace.values))])
    return {
        "verdict": verdict.to_json(),
        "steps": trace.last_step,
        "seconds": seconds,
        "best_step": best,
        "exported_step": best if verdict.reason is Reason.NON_FINITE else trace.last_step,
        "stopped": verdict.stop,
        "placeholder": "<thing>",
    }


def _write_noise(folder: Path, count: int, side: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png", compress_level=1)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
