"""Does the bundled model support the science?  Train past every stop on the tuning concepts, and look at the way.

``python -m pretraining.science train --method textual-inversion --learning_rates 1e-2`` trains to the cap, DVAR kept
from stopping, and scores pictures at steps spread over the run, or with ``--shares 1`` at the cap alone.  A run that
is there is not made again, but gets the pictures it lacks; ``score`` reads kept pictures anew, when the judges have
changed.  ``compare`` shows what settings are chosen by: the recogniser at the cap, nothing else.  ``freeze`` writes
what was chosen to ``frozen.json``, as hashes, and ``judge``, which comes after, says for which methods rules may be
ranked, and with three seeds keeps it in ``src/dvar/mini/gate.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from dvar import mini
from dvar.analysis.eligibility import MIN_RUNS, Eligibility
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import TABLE, configure, preset_settings
from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS
from dvar.diffusion.sampling import sample
from dvar.mini import recogniser
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.concepts import held_out, reference_scenes
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS, PATTERNS, render, sample_scene, sample_subject
from dvar.runs.load_model import load_personalised_backbone
from dvar.stopping.trace import Trace
from dvar.training.personalise import personalise
from pretraining.evaluate import ROOT, folder_hash, percent, picture_features, text_features
from pretraining.pictures import as_tensor
from pretraining.training import WORK

RUNS = WORK / "science"
FROZEN = Path(__file__).with_name("frozen.json")
"""What `frozen` returned when it was frozen, and under "recorded" the weights of mini in ``docs/traces.npz``."""
GATES = ROOT / "gate.json"
PARTS = {"mini": ("model", "judges"), "mini-flow": ("flow",)}
"""The folders that each base model is made of."""
CADENCE, PROBE_EVERY = 25, 5
SHARES = (0.0, 0.02, 0.05, 0.1, 0.17, 0.25, 0.35, 0.5, 0.75, 1.0)
"""Parts of the cap at which pictures are drawn and scored, rounded to checkpoints."""
AT_THE_CAP = (
    *(("plain", key) for key in ("identity", "class", "main colour", "pattern")),
    *(("placed", key) for key in ("identity", "class", "place")),
)
"""The scores that settings are chosen by, both of the recogniser: the subject, and the places it was not seen in."""
PLAIN, PLACED = 8, ("beach", "snow", "night", "forest", "table", "street", "desert", "blue wall")
DISTRACTORS = 99
WATCHED = (
    *("window", "threshold", "probe_every", "eval_timesteps"),
    *("validation_steps", "num_validation_images", "checkpointing_steps"),
)
"""Settings by which a run is judged and shown; they move nothing that is trained."""


@dataclass(frozen=True)
class Trial:
    method: str
    concept: str
    rate: float
    seed: int
    cap: int
    base: str = BUNDLED_MODEL
    model: Path | None = None
    """The folder of a pipeline, in place of the one that ships under the name of the base."""

    @property
    def folder(self) -> Path:
        runs = RUNS / (self.base if self.model is None else self.model.parent.name)
        return runs / f"{self.method}-{self.concept}-{self.rate:g}-{self.seed}-{self.cap}"


@cache
def judges() -> tuple[recogniser.Recogniser, CLIPModel, CLIPTokenizer]:
    """The recogniser, the CLIP that scores, and its tokenizer."""
    scorer = CLIPModel.from_pretrained(ROOT / "judges" / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(mini.path() / "tokenizer")
    return recogniser.load(ROOT / "judges" / "recogniser.safetensors"), scorer, tokenizer


def score(pixels: np.ndarray, concept: str, placed: bool) -> dict[str, float]:
    """Both judges on uint8 pictures [n, 64, 64, 3] meant to show a concept, one in each of `PLACED` if ``placed``.

    ``identity``: the recogniser's mean probability that it is this subject rather than another of its class, over
    `DISTRACTORS` others; ``first``: how often it comes before all of them, in percent; ``class``, ``main colour``,
    ``pattern``, ``place``: read right, in percent; ``clip image``: mean cosine with the concept's own pictures, all
    pairs; ``clip text``: mean cosine with what was asked, the class noun for the new word.
    """
    judge, scorer, tokenizer = judges()
    subject = held_out()[concept]
    rng = np.random.default_rng([7, list(held_out()).index(concept)])
    others = np.stack([sample_subject(rng, subject.noun).vector() for _ in range(DISTRACTORS)])
    own, answer = torch.from_numpy(subject.vector()).float(), list(CLASSES).index(subject.noun)
    with torch.no_grad():
        reading = judge(as_tensor(pixels))
    identity = reading.identity(own, torch.from_numpy(others).float(), answer)
    every = torch.cat([own[None], torch.from_numpy(others).float()])
    features = picture_features(scorer, pixels)
    references = np.stack([render(subject, scene) for scene in reference_scenes(concept)])
    plain = f"a photo of a {subject.noun}"
    asked = [f"{plain} {PLACES[place].words}" for place in PLACED] if placed else [plain] * len(pixels)
    scores = {
        "identity": float(identity.mean()),
        "first": percent(reading.surprise(every, answer).argmin(1) == 0),
        "class": percent(reading.best("class") == answer),
        "main colour": percent(reading.best("main colour") == list(COLOURS).index(subject.colours[0])),
        "pattern": percent(reading.best("pattern") == PATTERNS.index(subject.pattern)),
        "clip image": float((features @ picture_features(scorer, references).T).mean()),
        "clip text": float((features * text_features(scorer, tokenizer, asked)).sum(1).mean()),
    }
    if placed:
        places = torch.tensor([list(PLACES).index(place) for place in PLACED])
        scores["place"] = percent(reading.best("place") == places)
    return scores


@cache
def ceiling(concept: str) -> dict[str, float]:
    """What fresh renderings of the very subject score; for ``clip image`` that is the references' own likeness."""
    rng = np.random.default_rng(11)
    pixels = np.stack([render(held_out()[concept], sample_scene(rng, style="photo")) for _ in range(64)])
    scores = score(pixels, concept, placed=False)
    features = picture_features(
        judges()[1], np.stack([render(held_out()[concept], scene) for scene in reference_scenes(concept)])
    )
    n = len(features)
    among = float(((features @ features.T).sum() - n) / (n * (n - 1)))
    return scores | {"clip image among references": among}


def train(trial: Trial, shares: Sequence[float] = SHARES) -> None:
    """Train to the cap and draw pictures at these parts of it, what is there already excepted; then score them all."""
    run = trial.folder
    given = mini.training_settings(trial.method, trial.concept) | {
        "output_dir": run,
        "learning_rate": trial.rate,
        "seed": trial.seed,
        "pretrained_model_name_or_path": trial.model or trial.base,
        "preset": trial.base,
    }
    config = replace(
        configure(given, PAPER_METHODS[trial.method]),
        max_train_steps=trial.cap,
        probe_every=PROBE_EVERY,
        window=100,
        threshold=1e-9,  # DVAR is kept from stopping
        validation_steps=10**6,
        num_validation_images=1,
        checkpointing_steps=CADENCE,
    )
    if not (run / "result.json").exists():
        personalise(replace(config, overwrite=True))
    plain = f"a photo of {config.subject}"
    prompts = [plain] * PLAIN + [f"{plain} {PLACES[place].words}" for place in PLACED]
    for step in sorted({CADENCE * round(share * trial.cap / CADENCE) for share in shares}):
        pictures = run / f"pictures-{step:06d}.npy"
        if pictures.exists():
            continue
        drawn = sample(
            load_personalised_backbone(run, step=step),
            prompts,
            range(len(prompts)),
            size=64,
            steps=25,
            guidance=config.guidance_scale,
        )
        np.save(pictures, np.stack([np.asarray(picture) for picture in drawn]))
    rescore(trial)


def rescore(trial: Trial) -> None:
    """Score the pictures that a run kept, with the judges of today."""
    rows = []
    for path in sorted(trial.folder.glob("pictures-*.npy")):
        pixels, step = np.load(path), int(path.stem.removeprefix("pictures-"))
        plain, placed = score(pixels[:PLAIN], trial.concept, False), score(pixels[PLAIN:], trial.concept, True)
        rows.append({"step": step, "plain": plain, "placed": placed})
    (trial.folder / "scores.json").write_text(json.dumps({"cap": trial.cap, "scores": rows}, indent=1) + "\n")


def gate(runs: Sequence[Path]) -> Eligibility:
    """Whether rules may be ranked on a method: the gain in identity over runs of several concepts and seeds."""
    records = [json.loads((run / "scores.json").read_text()) for run in runs]
    traces = [Trace.read(run / "trace.jsonl") for run in runs]
    return Eligibility.from_scores(
        records[0]["cap"],
        [row["step"] for row in records[0]["scores"]],
        [[row["plain"]["identity"] for row in record["scores"]] for record in records],
        [trace.values for trace in traces],
        [_concept(run) for run in runs],
        float(np.mean([ceiling(_concept(run))["identity"] for run in runs])),
        [norms for trace in traces if len(norms := trace.metric("grad_norm")[1])],
    )


def keep(base: str, method: str, found: Eligibility) -> None:
    """Write the gate of a method beside the models, for the laboratory."""
    whole = json.loads(GATES.read_text()) if GATES.exists() else {}
    of_base, digest = whole.get(base, {}), folder_hash(parts=PARTS[base])
    gates = (of_base["gates"] if of_base.get("sha256") == digest else {}) | {method: asdict(found)}
    of_base = {"sha256": digest, "gates": {known: gates[known] for known in PAPER_METHODS if known in gates}}
    GATES.write_text(json.dumps(whole | {base: of_base}, indent=1) + "\n")


def _concept(run: Path) -> str:
    return next(name for name in mini.TUNING if f"-{name}-" in run.name)


def curve(runs: Sequence[Path], part: str, key: str) -> list[float]:
    """The mean over runs of one score at each scored step."""
    records = [json.loads((run / "scores.json").read_text())["scores"] for run in runs]
    return [float(np.mean([row[part][key] for row in rows])) for rows in zip(*records, strict=True)]


def frozen() -> dict[str, dict[str, str]]:
    """What may not change of a base model that ships once a concept of the laboratory has been run, each part by its
    sha256: the weights (and with them the vocabulary), and how each method trains on it.  When it is judged and shown
    may."""
    parts: dict[str, dict[str, str]] = {}
    for base in BUNDLED_MODELS:
        if (ROOT / PARTS[base][0]).exists():
            parts[base] = {"weights": folder_hash(parts=PARTS[base])}
            for method in sorted({row.method for row in TABLE if row.name == base}, key=[*PAPER_METHODS].index):
                chosen = {key: value for key, value in preset_settings(base, method).items() if key not in WATCHED}
                parts[base][method] = sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
    return parts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("train", "score", "compare", "freeze", "judge"))
    parser.add_argument("--base", default=BUNDLED_MODEL, choices=BUNDLED_MODELS)
    parser.add_argument("--method", default="textual-inversion")
    parser.add_argument("--learning_rates", type=float, nargs="+", help="the preset's by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--concepts", nargs="+", default=mini.TUNING)
    parser.add_argument("--steps", type=int, help="the cap, the preset's by default")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the cap, at which to score")
    parser.add_argument("--model", type=Path, help="a folder NAME/model, in place of what ships; runs go to NAME")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.action == "freeze":
        recorded = json.loads(FROZEN.read_text())["recorded"]
        FROZEN.write_text(json.dumps(frozen() | {"recorded": recorded}, indent=1) + "\n")
        print(FROZEN.read_text(), end="")
        return
    preset = preset_settings(chosen.base, chosen.method)
    steps = chosen.steps or preset["max_train_steps"]
    for rate in chosen.learning_rates or [preset["learning_rate"]]:
        trials = [
            Trial(chosen.method, name, rate, seed, steps, chosen.base, chosen.model)
            for seed in chosen.seeds
            for name in chosen.concepts
        ]
        if chosen.action == "train":
            for trial in trials:
                train(trial, chosen.shares)
                print(trial.folder.name, (trial.folder / "scores.json").read_text()[-700:], flush=True)
            continue
        whole = [trial for trial in trials if (trial.folder / "scores.json").exists()]
        if chosen.action == "score":
            for trial in whole:
                rescore(trial)
            continue
        runs = [trial.folder for trial in whole]
        if not runs:
            print(
                f"{chosen.base}, {chosen.method}, learning rate {rate:g}, cap {steps}: no run was scored, train first"
            )
            continue
        if chosen.action == "compare":
            shown = {f"{part} {key}": curve(runs, part, key)[-1] for part, key in AT_THE_CAP}
            print(f"{rate:g}: {len(runs)} runs;", ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
            continue
        print(f"== {chosen.base}, {chosen.method}, learning rate {rate:g}: {len(runs)} runs")
        found = gate(runs)
        print(
            {name: round(value, 3) for name, value in asdict(found).items()},
            *[*found.failures, *found.roughness] or ["passes"],
            sep="; ",
        )
        frozen_run = rate == preset["learning_rate"] and steps == preset["max_train_steps"] and chosen.model is None
        if frozen_run and found.runs >= MIN_RUNS:
            keep(chosen.base, chosen.method, found)
        for part, keys in (("plain", ("identity", "first", "class", "clip image")), ("placed", ("place", "clip text"))):
            for key in keys:
                print(f"{part:7s}{key:12s}", *(f"{value:8.3f}" for value in curve(runs, part, key)))


if __name__ == "__main__":
    main()
