"""Benchmark the parts of a training step: ``python benchmarks/step.py [--model FOLDER] [--method ...]``."""

# Two loops take turns in one process, each on its own copy of the model: the plain loop of `benchmarks/reference.py`,
# which evaluates the held batch after every step, and that of `dvar train`. Both have the same batch, precision,
# threads, captions and attention kernel. The output is the milliseconds of each part and three ratios.

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
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL, TrainingConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.source import ModelSource
from dvar.training.personalise import prepare

PARTS = ("data", "encode", "text", "U-Net forward", "backward", "optimizer", "other", "probe")


class Clock:
    """Seconds by part; time in a nested part counts for the inner part only."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._inside = device, 0.0

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start, outside, self._inside = self.now(), self._inside, 0.0
        yield
        duration = self.now() - start
        self.seconds[part] += duration - self._inside
        self._inside = outside + duration

    def time_calls(self, owner: object, name: str, part: str) -> None:
        """Count every call of ``owner.name`` for ``part``."""
        call = getattr(owner, name)

        def counted(*args: object, **settings: object) -> object:
            with self(part):
                return call(*args, **settings)

        setattr(owner, name, counted)


def time_networks(clock: Clock, backbone: Backbone, optimizer: torch.optim.Optimizer) -> None:
    clock.time_calls(backbone.vae, "encode", "encode")
    clock.time_calls(backbone.text_encoder, "forward", "text")
    clock.time_calls(backbone.unet, "forward", "U-Net forward")
    clock.time_calls(optimizer, "step", "optimizer")


@contextmanager
def time_backward(clock: Clock) -> Iterator[None]:
    call = torch.autograd.backward  # which `Tensor.backward` calls too
    clock.time_calls(torch.autograd, "backward", "backward")
    try:
        yield
    finally:
        torch.autograd.backward = call


def build_config(method: str, arguments: argparse.Namespace, folder: str) -> TrainingConfig:
    settings = mini.training_settings(method, mini.TUNING[0]) | {
        "output_dir": folder,
        "pretrained_model_name_or_path": arguments.model,
        "mixed_precision": arguments.mixed_precision,
    }
    settings |= {"instance_data_dir": arguments.images} if arguments.images else {}
    settings |= {"resolution": arguments.resolution} if arguments.resolution else {}
    settings |= {"num_class_images": 8, "random_rescale": False} if method == "custom-diffusion" else {}
    config = configure(settings, PAPER_METHODS[method])
    return replace(config, threshold=1e-9, max_train_steps=100_000, checkpointing_steps=100_000)


def compare(method: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the median milliseconds by loop and part, and of complete steps, for one method."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(method, arguments, folder)
        run, _ = prepare(config)
        run.open(None)
        captions = [text for index in range(len(run.concept.images)) for text in run.concept.texts(index)]
        classes = next(Path(folder).glob("class_*"), None)
        plain = Reference(config, load_backbone(ModelSource.of(config), mixed_precision=arguments.mixed_precision),
                          captions, classes)  # fmt: skip
        steps = run.steps(lambda: False)
        cadence = config.probe_every
        for _ in range(cadence + 1):
            next(steps)
        plain.step(), plain.probe()
        clocks = {name: Clock(run.backbone.device) for name in ("plain", "dvar")}
        durations: dict[str, list[float]] = defaultdict(list)
        for _ in range(arguments.rounds):  # complete steps first: the clocks below wait for the device
            durations["plain"] += _time_each(plain.step, cadence, clocks["plain"])
            durations["plain probe"] += _time_each(plain.probe, 2, clocks["plain"])
            start = clocks["dvar"].now()
            probe_seconds = sum(next(steps).seconds["probe"] for _ in range(cadence))
            loop_seconds = clocks["dvar"].now() - start
            durations["dvar loop"].append(loop_seconds / cadence)
            durations["dvar"].append((loop_seconds - probe_seconds) / cadence)
            durations["dvar probe"].append(probe_seconds)
        time_networks(clocks["plain"], plain.backbone, plain.optimizer)
        time_networks(clocks["dvar"], run.backbone, run.learner.optimizer)
        clocks["plain"].time_calls(plain.data, "_next_data", "data")
        clocks["dvar"].time_calls(run, "draw", "data")
        for _ in range(arguments.rounds):
            for name, update in (("plain", plain.step), ("dvar", lambda: run.learner.update(run.training_losses, 1))):
                with time_backward(clocks[name]):
                    for _ in range(4):
                        with clocks[name]("other"):
                            update()
        whole_times = {name: 1000 * statistics.median(values) for name, values in durations.items()}
        parts = {
            name: {part: 1000 * clock.seconds[part] / (4 * arguments.rounds) for part in PARTS[:-1]}
            for name, clock in clocks.items()
        }
        return {"cadence": cadence, "whole": whole_times, "parts": parts}


def _time_each(call: Callable[[], object], count: int, clock: Clock) -> list[float]:
    seconds = []
    for _ in range(count):
        start = clock.now()
        call()
        seconds.append(clock.now() - start)
    return seconds


def compute_ratios(times: dict) -> dict[str, float]:
    """Return the ratios of steps without probes and of complete loops, and the probe's share of the time."""
    seconds = times["whole"]
    return {
        "step": seconds["plain"] / seconds["dvar"],
        "loop": (seconds["plain"] + seconds["plain probe"]) / seconds["dvar loop"],
        "probe share": 1 - seconds["dvar"] / seconds["dvar loop"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=BUNDLED_MODEL, help="a diffusers folder; the bundled model by default")
    parser.add_argument("--images", help="folder of images; those of a bundled concept by default")
    parser.add_argument("--method", nargs="+", choices=list(PAPER_METHODS), default=list(PAPER_METHODS))
    parser.add_argument("--resolution", type=int, help="the preset's by default")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns that each loop takes")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    results = {"device": device, "torch": torch.__version__, "machine": platform.machine(), "model": arguments.model,
            "mixed_precision": arguments.mixed_precision, "methods": {}}  # fmt: skip
    for method in arguments.method:
        times = compare(method, arguments)
        times["ratios"] = compute_ratios(times)
        results["methods"][method] = times
        print(f"\n{method} on {device}, milliseconds a step")
        for part in PARTS[:-1]:
            print(f"  {part:<14}" + "".join(f"{times['parts'][name][part]:9.1f}" for name in ("plain", "dvar")))
        print(f"  {'a probe':<14}{times['whole']['plain probe']:9.1f}{times['whole']['dvar probe']:9.1f}")
        print(f"  {'a step':<14}{times['whole']['plain']:9.1f}{times['whole']['dvar']:9.1f}")
        print(f"  probe off: {times['ratios']['step']:.2f} x; probe {times['ratios']['probe share']:.1%} of the time")
        print(f"  plain probing every step, dvar every {times['cadence']}: {times['ratios']['loop']:.2f} x")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
