"""Choose the bundled model's preset: train to the cap on the four tuning concepts, and judge the pictures drawn there.

``python -m pretraining.tune --learning_rates 0.005 0.01 0.03 --steps 600`` prints and appends one line a run to
``work/tune.jsonl``, and the means.  No loss, no curve and no stop is looked at: DVAR is kept from stopping, and only
the recogniser's reading at the cap counts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dvar import mini
from dvar.diffusion.sampling import sample
from dvar.mini import recogniser
from dvar.mini.world.captions import facts
from dvar.mini.world.concepts import held_out
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import sample_scene, sample_subject
from dvar.trainer.presets import configure
from dvar.trainer.run import personalise, personalised
from pretraining.training import WORK

ASKED = ("beach", "snow", "night", "forest")


def score(run: Path, name: str, judge: recogniser.Recogniser, each: int) -> dict[str, float]:
    """Percentages of pictures read as the subject's class, colour and pattern, as nearer to it than to a random
    subject of its class, and (asked for a place) as that place; ``distance`` is the mean in parameter space."""
    subject = held_out()[name]
    config = json.loads((run / "config.json").read_text())
    word, rng = config["placeholder_token"], np.random.default_rng(0)
    truth = facts(subject, sample_scene(rng, style="photo"))
    others = torch.from_numpy(np.stack([sample_subject(rng, subject.noun).vector() for _ in range(200)])).float()
    own = torch.from_numpy(subject.vector()).float()
    prompts = [f"a photo of {word}"] * each + [
        f"a photo of {word} {PLACES[place].words}" for place in ASKED for _ in range(each // 2)
    ]
    pictures = sample(
        personalised(run), prompts, range(len(prompts)), size=64, steps=25, guidance=config["guidance_scale"]
    )
    x = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        reading = judge(x)
    distance = (reading.parameters - own).norm(dim=1)
    nearer = (torch.cdist(reading.parameters, others) > distance[:, None]).float().mean(dim=1)
    places = torch.tensor([list(PLACES).index(place) for place in ASKED for _ in range(each // 2)])
    columns = {"class": 0, "main colour": 1, "pattern": 2}
    right = {head: 100 * float((reading.best(head) == int(truth[i])).float().mean()) for head, i in columns.items()}
    placed = 100 * float((reading.best("place")[each:] == places).float().mean())
    return right | {"place": placed, "identity": 100 * float(nearer.mean()), "distance": float(distance.mean())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.005, 0.01, 0.03])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concepts", nargs="+", default=mini.TUNING)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    judge = recogniser.load(mini.path().parent / "judges" / "recogniser.safetensors")
    for rate in chosen.learning_rates:
        rows = []
        for name in chosen.concepts:
            run = WORK / "tune" / f"{name}-{rate}-{chosen.steps}"
            config = configure(
                {
                    "instance_data_dir": mini.concepts()[name],
                    "initializer_token": mini.noun(name),
                    "output_dir": run,
                    "overwrite": True,
                }
            )
            config = replace(
                config,
                learning_rate=rate,
                max_train_steps=chosen.steps,
                threshold=1e-9,
                window=50,
                train_batch_size=chosen.batch,
                probe_every=5,
                validation_steps=10**6,
                num_validation_images=1,
                checkpointing_steps=10**6,
            )
            result = personalise(config)
            row = score(run, name, judge, chosen.each)
            rows.append(row)
            line = {
                "concept": name,
                "learning_rate": rate,
                "steps": chosen.steps,
                "batch": chosen.batch,
                "seconds": sum(result.seconds.values()),
            }
            with (WORK / "tune.jsonl").open("a") as log:
                log.write(json.dumps(line | row) + "\n")
        means = {key: round(float(np.mean([row[key] for row in rows])), 2) for key in rows[0]}
        print(f"learning rate {rate}, batch {chosen.batch}, {chosen.steps} steps: {means}", flush=True)


if __name__ == "__main__":
    main()
