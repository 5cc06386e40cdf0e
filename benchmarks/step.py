"""Where the time of a Textual Inversion step on the bundled model goes: ``python benchmarks/step.py [--steps 40]``.

Prints the best round's median time of an update and of a probe of eight held inputs, with the fused attention of
PyTorch and with plain matrix products, all in one run; the last column is the ratio to the first line.
"""

import argparse
import statistics
import tempfile

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from dvar import mini
from dvar.diffusion.backbone import Backbone
from dvar.trainer import run
from dvar.trainer.presets import configure

ATTENTION = {"fused attention": AttnProcessor2_0, "plain attention": AttnProcessor}


def medians(processor: type, steps: int) -> tuple[float, float]:
    """Median seconds of an update and of a probe."""
    load, seen = Backbone.load, []

    def with_processor(*args: object, **settings: object) -> Backbone:
        backbone = load(*args, **settings)
        backbone.unet.set_attn_processor(processor())
        return backbone

    with tempfile.TemporaryDirectory() as folder:
        config = configure(
            {
                "instance_data_dir": mini.concepts()[mini.TUNING[0]],
                "initializer_token": mini.noun(mini.TUNING[0]),
                "output_dir": folder,
                "max_train_steps": steps,
                "window": steps - 1,
                "num_validation_images": 1,
                "num_inference_steps": 2,
            }
        )
        run.Backbone.load = with_processor
        try:
            run.personalise(config, [lambda step: seen.append(step.seconds)])
        finally:
            run.Backbone.load = load
    return statistics.median(s["train"] for s in seen[3:]), statistics.median(s["probe"] for s in seen[3:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="the variants take turns, so that a slow minute hits all")
    chosen = parser.parse_args()
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(chosen.rounds):
        for name, processor in ATTENTION.items():
            for part, seconds in zip(("update", "probe"), medians(processor, chosen.steps), strict=True):
                taken.setdefault((name, part), []).append(seconds)
    base = min(next(iter(taken.values())))
    for (name, part), times in taken.items():
        print(f"{name:<18}{part:<8}{1000 * min(times):7.1f} ms{min(times) / base:7.2f} x")


if __name__ == "__main__":
    main()
