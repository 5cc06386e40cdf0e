"""Where the time of a step goes, and how it compares: ``python benchmarks/step.py [--model FOLDER] [--method ...]``.

Two loops take turns in one process, each on its own copy of the model: the plain loop of `benchmarks/reference.py`,
which reads the held batch after every step, and `dvar train`'s own.  Both have the same batch, precision, threads,
captions and attention kernel.  Prints the milliseconds of each part and three ratios; ``--output`` keeps them as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from reference import Reference

from dvar import mini
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL, CONFIGS, AnyConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.tokens import model_path
from dvar.training.personalise import prepared

PARTS = ("data", "encode", "text", "U-Net forward", "backward", "optimizer", "other", "probe")


class Clock:
    """Seconds by part; a part inside another counts for the inner one alone."""

    def __init__(self, device: torch.device) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._device, self._inside = device, 0.0

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began, outside, self._inside = self.now(), self._inside, 0.0
        yield
        whole = self.now() - began
        self.spent[part] += whole - self._inside
        self._inside = outside + whole

    def timed(self, owner: object, name: str, part: str) -> None:
        """Have every call of ``owner.name`` count for ``part``."""
        call = getattr(owner, name)

        def counted(*args: object, **settings: object) -> object:
            with self(part):
                return call(*args, **settings)

        setattr(owner, name, counted)


def watched(clock: Clock, backbone: Backbone, optimizer: torch.optim.Optimizer) -> None:
    clock.timed(backbone.vae, "encode", "encode")
    clock.timed(backbone.text_encoder, "forward", "text")
    clock.timed(backbone.unet, "forward", "U-Net forward")
    clock.timed(optimizer, "step", "optimizer")


@contextmanager
def backward_timed(clock: Clock) -> Iterator[None]:
    call = torch.Tensor.backward
    clock.timed(torch.Tensor, "backward", "backward")
    try:
        yield
    finally:
        torch.Tensor.backward = call


def settings_of(method: str, chosen: argparse.Namespace, folder: str) -> AnyConfig:
    given = mini.given(method, mini.TUNING[0]) | {
        "output_dir": folder,
        "pretrained_model_name_or_path": chosen.model,
        "mixed_precision": chosen.mixed_precision,
    }
    given |= {"instance_data_dir": chosen.pictures} if chosen.pictures else {}
    given |= {"resolution": chosen.resolution} if chosen.resolution else {}
    given |= {"num_class_images": 8, "random_rescale": False} if method == "custom-diffusion" else {}
    config = configure(given, method)
    return replace(config, threshold=1e-9, max_train_steps=100_000, checkpointing_steps=100_000)


def compared(method: str, chosen: argparse.Namespace) -> dict[str, object]:
    """Median milliseconds by loop and part, and of whole steps, for one method."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings_of(method, chosen, folder)
        job, _ = prepared(config)
        job.open(None)
        captions = [text for index in range(len(job.concept.pictures)) for text in job.concept.texts(index)]
        classes = next(Path(folder).glob("class_*"), None)
        plain = Reference(config, Backbone.load(model_path(chosen.model), mixed_precision=chosen.mixed_precision),
                          captions, classes)  # fmt: skip
        ours = job.steps(lambda: False)
        cadence = config.probe_every
        for _ in range(cadence + 1):
            next(ours)
        plain.step(), plain.probe()
        clocks = {name: Clock(job.backbone.device) for name in ("plain", "dvar")}
        whole: dict[str, list[float]] = defaultdict(list)
        for _ in range(chosen.rounds):  # whole steps first: the clocks below wait for the device
            whole["plain"] += _each(plain.step, cadence, clocks["plain"])
            whole["plain probe"] += _each(plain.probe, 2, clocks["plain"])
            began = clocks["dvar"].now()
            probes = sum(next(ours).seconds["probe"] for _ in range(cadence))
            spent = clocks["dvar"].now() - began
            whole["dvar loop"].append(spent / cadence)
            whole["dvar"].append((spent - probes) / cadence)
            whole["dvar probe"].append(probes)
        watched(clocks["plain"], plain.backbone, plain.optimizer)
        watched(clocks["dvar"], job.backbone, job.learner.optimizer)
        clocks["plain"].timed(plain.data, "_next_data", "data")
        clocks["dvar"].timed(job, "drawn", "data")
        for _ in range(chosen.rounds):
            for name, turn in (("plain", plain.step), ("dvar", lambda: job.learner.update(job.training_losses, 1))):
                with backward_timed(clocks[name]):
                    for _ in range(4):
                        with clocks[name]("other"):
                            turn()
        times = {name: 1000 * statistics.median(values) for name, values in whole.items()}
        parts = {
            name: {part: 1000 * clock.spent[part] / (4 * chosen.rounds) for part in PARTS[:-1]}
            for name, clock in clocks.items()
        }
        return {"cadence": cadence, "whole": times, "parts": parts}


def _each(turn: Callable[[], object], count: int, clock: Clock) -> list[float]:
    taken = []
    for _ in range(count):
        began = clock.now()
        turn()
        taken.append(clock.now() - began)
    return taken


def ratios(found: dict) -> dict[str, float]:
    """Step against step without probes; whole loop against the plain one that probes every step; the probe's share."""
    whole = found["whole"]
    return {
        "step": whole["plain"] / whole["dvar"],
        "loop": (whole["plain"] + whole["plain probe"]) / whole["dvar loop"],
        "probe share": 1 - whole["dvar"] / whole["dvar loop"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=BUNDLED_MODEL, help="a diffusers folder; the bundled model by default")
    parser.add_argument("--pictures", help="a folder of pictures; a bundled concept's by default")
    parser.add_argument("--method", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--resolution", type=int, help="the preset's by default")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns that each loop takes")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    told = {"device": device, "torch": torch.__version__, "machine": platform.machine(), "model": chosen.model,
            "mixed_precision": chosen.mixed_precision, "methods": {}}  # fmt: skip
    for method in chosen.method:
        found = compared(method, chosen)
        found["ratios"] = ratios(found)
        told["methods"][method] = found
        print(f"\n{method} on {device}, milliseconds a step")
        for part in PARTS[:-1]:
            print(f"  {part:<14}" + "".join(f"{found['parts'][name][part]:9.1f}" for name in ("plain", "dvar")))
        print(f"  {'a probe':<14}{found['whole']['plain probe']:9.1f}{found['whole']['dvar probe']:9.1f}")
        print(f"  {'a step':<14}{found['whole']['plain']:9.1f}{found['whole']['dvar']:9.1f}")
        print(f"  probe off: {found['ratios']['step']:.2f} x; probe {found['ratios']['probe share']:.1%} of the time")
        print(f"  plain probing every step, dvar every {found['cadence']}: {found['ratios']['loop']:.2f} x")
    if chosen.output:
        chosen.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
