"""Stage 8: measure the shipped folder against its bars and write the figures beside it.

``python -m pretraining.evaluate`` reads ``src/dvar/mini/`` (or ``--root``) only, not ``work/``, draws everything it
needs from fixed seeds, and writes ``figures.json`` and ``README.md`` there; ``--flow`` measures the second model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from dvar import mini
from dvar.mini import recogniser
from dvar.mini.world.captions import FACTS
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.concepts import held_out
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS, PATTERNS, SIZE, render, sample_scene, sample_subject
from pretraining.attention import hard_share, hardness
from pretraining.autoencoder import psnr
from pretraining.details import ACCENT, accent_prompts, cmmd, estimates, nearest_colours, proportion_prompts, rise
from pretraining.flow import fold
from pretraining.pictures import as_tensor, captions_for, draw_pictures
from pretraining.unet import held_draws

ROOT = Path(mini.__file__).parent
CARD = Path(__file__).with_name("model_card.md")  # what stands above the figures
UNSEEN = 999_000
HARD_QUERIES = "hard queries, "
ASKED = ("class", "main colour", "pattern", "place")
BARS = {
    "reconstruction, dB": 27, "reconstruction inside the subject, dB": 27,
    "class, %": 98, "place, %": 95, "main colour, %": 85, "pattern, %": 85,
    "prompted class, %": 99, "prompted place, %": 99, "prompted main colour, %": 97, "prompted pattern, %": 94,
    "prompted accent, %": 92, "proportion moves as asked, % (chance 50)": 60,
    "same subject nearer, % of triples": 90,
}  # fmt: skip
FLOW_BARS = {"prompted class, %": 97, "prompted place, %": 97, "prompted main colour, %": 92, "prompted pattern, %": 85}
"""Those of the second model, where they differ."""
Figures = dict[str, dict[str, float]]
SAMPLING_STEPS, GUIDANCE = 25, 5.0
"""Of every image that is measured."""
MOST_CMMD = 0.153
"""Half of what the first model had, 0.306."""
MET = {None: "", True: "yes", False: "**no**"}
LIMITS = {"one image of 25 steps, s": 1.0, "CMMD": MOST_CMMD}
MOST_HARD = 10
"""The limit of the hard queries of each attention module of the U-Net, in percent."""


def verdict(name: str, value: float, bars: dict[str, int] = BARS) -> tuple[str, bool] | None:
    """Return the bar of a figure as the page shows it, and whether ``value`` meets it; None where there is none."""
    if name in bars:
        return f"≥ {bars[name]}", value >= bars[name]
    limit = MOST_HARD if name.startswith(HARD_QUERIES) else LIMITS.get(name)
    return None if limit is None else (f"≤ {limit}", value <= limit)


def attention(pipe: StableDiffusionPipeline, count: int = 128) -> dict[str, dict[str, float]]:
    """Return the percentage of queries that give one key nearly all of their weight, for each attention module of the
    U-Net and each layer of the text encoder, on draws that `pretraining.soften` does not see."""
    draws = held_draws(pipe, count, index=4)
    shares = hardness(pipe.unet, lambda: draws.predict(pipe.unet))
    pipe.text_encoder.set_attn_implementation("eager")  # no other returns its weights
    with torch.no_grad():
        ids = pipe.tokenizer(draws.captions, padding="max_length", return_tensors="pt").input_ids
        weights = pipe.text_encoder(input_ids=ids, output_attentions=True).attentions
    return {
        "the U-Net's attention": {f"{HARD_QUERIES}{layer(name)}, %": 100 * share for name, share in shares.items()}
        | {"squared error of the noise, held draws, %": 100 * draws.error(pipe.unet)},
        # The first query has but one key to look at.
        "the text encoder's attention": {
            f"hard, layer {i}, %": 100 * hard_share(each[:, :, 1:]) for i, each in enumerate(weights)
        },
    }


def layer(name: str) -> str:
    """Return the short name of an attention module of the U-Net, such as "down 2.0 self"."""
    blocks, kind = name.split(".attentions."), {"attn1": "self", "attn2": "cross"}
    block = blocks[0].replace("_blocks.", " ").replace("_block", "")
    return f"{block}.{blocks[1].split('.')[0]} {kind[name.split('.')[-1]]}"


def reconstruction(vae: torch.nn.Module, n: int = 256) -> dict[str, float]:
    pictures = draw_pictures(UNSEEN, 0, n)
    x, mask = as_tensor(pictures.pixels), torch.from_numpy(pictures.masks())[:, None]
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(32)]).clamp(-1, 1)
    error = (y - x) ** 2
    inside = (error * mask).sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3)))
    return {
        "reconstruction, dB": float(psnr(error.mean(dim=(1, 2, 3))).mean()),
        "reconstruction inside the subject, dB": float(psnr(inside).mean()),
    }


def picture_features(model: CLIPModel, pixels: np.ndarray) -> torch.Tensor:
    """Unit vectors [n, d] of uint8 pictures [n, 64, 64, 3]."""
    x = as_tensor(pixels)
    with torch.no_grad():
        features = torch.cat([model.get_image_features(pixel_values=part).pooler_output for part in x.split(64)])
    return torch.nn.functional.normalize(features, dim=1)


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        features = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(features, dim=1)


def truths(facts: np.ndarray) -> dict[str, torch.Tensor]:
    """The numbers of the right answers, int64 [n] each, of facts [n, 15]."""
    return {name: torch.from_numpy(facts[:, FACTS.index(name)]).long() for name in ASKED}


def zero_shot(
    model: CLIPModel, tokenizer: CLIPTokenizer, pixels: np.ndarray, truth: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Each picture asked with the words for one fact, all else unsaid (colour and pattern beside the true class):
    percentages right."""
    features, nouns = picture_features(model, pixels), list(CLASSES)

    def right(texts: list[str], answer: torch.Tensor) -> float:
        return percent((features @ text_features(model, tokenizer, texts).T).argmax(1) == answer)

    def right_of_class(words: list[str], answer: torch.Tensor) -> float:
        table = torch.stack(
            [text_features(model, tokenizer, [f"a photo of a {word} {noun}" for word in words]) for noun in nouns]
        )
        return percent(torch.einsum("nd,nad->na", features, table[truth["class"]]).argmax(1) == answer)

    return {
        "class": right([f"a photo of a {noun}" for noun in nouns], truth["class"]),
        "place": right([f"a photo {place.words}" for place in PLACES.values()], truth["place"]),
        "main colour": right_of_class(list(COLOURS), truth["main colour"]),
        "pattern": right_of_class(list(PATTERNS), truth["pattern"]),
    }


def recognised(judge: recogniser.Recogniser, pixels: np.ndarray, truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """What the recogniser reads, percentages right."""
    with torch.no_grad():
        reading = judge(as_tensor(pixels))
    return {name: percent(reading.best(name) == truth[name]) for name in ASKED}


def percent(right: torch.Tensor) -> float:
    return 100 * float(right.float().mean())


def triples(model: CLIPModel, n: int = 400) -> float:
    """Percentage in which two pictures of one held-out subject are nearer than a picture of another subject of its
    class."""
    rng = np.random.default_rng(UNSEEN)
    names = list(held_out())
    pixels = []
    for i in range(n):
        subject = held_out()[names[i % len(names)]]
        first, second = (str(name) for name in rng.choice(list(PLACES), 2, replace=False))
        other = sample_subject(rng, subject.noun)
        scenes = [sample_scene(rng, place=place, style="photo") for place in (first, second, second)]
        pixels += [render(s, c) for s, c in zip((subject, subject, other), scenes, strict=True)]
    a, b, c = picture_features(model, np.stack(pixels)).view(n, 3, -1).unbind(1)
    return 100 * float(((a * b).sum(1) > (a * c).sum(1)).float().mean())


def knows_subjects(judge: recogniser.Recogniser, distractors: int = 99, n: int = 520) -> dict[str, float]:
    """Fresh renderings of the held-out subjects: how often each is read as itself among others of its class, and
    the error of its parameters (root of the mean square; guessing the mean gives 0.29)."""
    rng = np.random.default_rng(UNSEEN + 2)
    found, errors = [], []
    for subject in held_out().values():
        pixels = np.stack([render(subject, sample_scene(rng, style="photo")) for _ in range(n // len(held_out()))])
        own = torch.from_numpy(subject.vector()).float()
        others = np.stack([sample_subject(rng, subject.noun).vector() for _ in range(distractors)])
        answer = list(CLASSES).index(subject.noun)
        with torch.no_grad():
            reading = judge(as_tensor(pixels))
        found.append(reading.surprise(torch.cat([own[None], torch.from_numpy(others).float()]), answer).argmin(1) == 0)
        errors.append((reading.means[:, answer] - own) ** 2)
    return {
        f"own subject among {distractors + 1} of its class, %": percent(torch.cat(found)),
        "error of its parameters, %": 100 * float(torch.cat(errors).mean().sqrt()),
    }


def prompts(n: int) -> tuple[list[str], np.ndarray]:
    """Colour + pattern + class + place; and the facts asked for, [n, 15], -1 where nothing is."""
    rng = np.random.default_rng(UNSEEN + 1)
    asked, wanted = [], np.full((n, len(FACTS)), -1)
    for i in range(n):
        noun, place = i % len(CLASSES), int(rng.integers(len(PLACES)))
        colour, pattern = int(rng.integers(len(COLOURS))), int(rng.integers(len(PATTERNS)))
        words = (
            f"{list(COLOURS)[colour]} {PATTERNS[pattern]} {list(CLASSES)[noun]} {list(PLACES.values())[place].words}"
        )
        asked.append(f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words}")
        wanted[i, [FACTS.index(name) for name in ASKED]] = noun, colour, pattern, place
    return asked, wanted


def draw(
    pipe: DiffusionPipeline,
    texts: list[str],
    steps: int = SAMPLING_STEPS,
    guidance: float = GUIDANCE,
    batch: int = 25,
) -> np.ndarray:
    pictures = []
    for at in range(0, len(texts), batch):
        part = texts[at : at + batch]
        generators = [torch.Generator().manual_seed(UNSEEN + at + i) for i in range(len(part))]
        made = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            height=SIZE,
            width=SIZE,
        )
        pictures.append((made.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def details(pipe: DiffusionPipeline, judge: recogniser.Recogniser, n: int) -> dict[str, float]:
    """Return how often the accent is read as asked, of n prompts and of renderings, and whether proportions follow."""
    texts, nouns, accents = accent_prompts(n, UNSEEN)
    read = nearest_colours(estimates(judge, draw(pipe, texts), nouns)[:, ACCENT])
    pictures = draw_pictures(UNSEEN, 5, 500, style="photo")
    shown = torch.from_numpy(pictures.facts).long()
    seen = nearest_colours(
        estimates(judge, pictures.pixels, shown[:, FACTS.index("class")])[:, ACCENT],
    )
    low, high, nouns, numbers = proportion_prompts(n, UNSEEN)
    return {
        "prompted accent, %": percent(read == accents),
        "accent of renderings, %": percent(seen == shown[:, FACTS.index("accent colour")]),
        **rise(*(estimates(judge, draw(pipe, each), nouns) for each in (low, high)), numbers),
    }


def sheet(pixels: np.ndarray, path: Path) -> None:
    rows = [np.concatenate(list(pixels[at : at + 25]), axis=1) for at in range(0, len(pixels), 25)]
    Image.fromarray(np.concatenate(rows)).save(path)


DERIVED = ("vocab.json", "merges.txt")  # from tokenizer.json, by `ship.save_vocabulary`


def folder_hash(root: Path = ROOT, parts: tuple[str, ...] = ("model", "judges")) -> str:
    """sha256 over the names and bytes of the shipped weights, without the derived files."""
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in (root / part).rglob("*")):
        if path.is_file() and path.name not in DERIVED:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def conditioner(text_encoder: CLIPTextModel, root: Path) -> CLIPModel:
    """The CLIP whose text tower conditions the U-Net, whole again."""
    folder = root / "judges" / "clip-conditioner"
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    state = {key: value.float() for key, value in load_file(folder / "all-but-text.safetensors").items()}
    model.load_state_dict(state | {f"text_model.{key}": value for key, value in text_encoder.state_dict().items()})
    return model


def measure(n_prompts: int, grid: Path | None, root: Path = ROOT) -> Figures:
    """The first model, its judges included."""
    pipe = StableDiffusionPipeline.from_pretrained(root / "model", safety_checker=None)
    judge, scorer = load_judges(root)
    pictures = draw_pictures(UNSEEN, 1, 1000, style="photo")
    shown = truths(pictures.facts)
    figures: Figures = {"autoencoder": reconstruction(pipe.vae)}
    for title, model in {
        "the CLIP that conditions": conditioner(pipe.text_encoder, root).eval(),
        "the CLIP that scores": scorer,
    }.items():
        right = zero_shot(model, pipe.tokenizer, pictures.pixels, shown)
        figures[title] = {f"{name}, %": value for name, value in right.items()}
        figures[title]["same subject nearer, % of triples"] = triples(model)
    right = recognised(judge, pictures.pixels, shown)
    figures["the recogniser"] = {f"recogniser: {name}, %": value for name, value in right.items()}
    figures["the recogniser"] |= knows_subjects(judge)
    figures |= attention(pipe)
    return figures | measure_pictures(pipe, judge, scorer, n_prompts, grid)


def measure_flow(n_prompts: int, grid: Path | None, root: Path = ROOT) -> Figures:
    """The second model, which shares the autoencoder and the judges of the first."""
    stock, folded = (
        StableDiffusion3Pipeline.from_pretrained(root / "flow", text_encoder_3=None, tokenizer_3=None) for _ in range(2)
    )
    return measure_pictures(fold(folded), *load_judges(root), n_prompts, grid, timed=stock)


def load_judges(root: Path) -> tuple[recogniser.Recogniser, CLIPModel]:
    """The recogniser and the CLIP that scores."""
    scorer = CLIPModel.from_pretrained(root / "judges" / "clip", dtype=torch.float32).eval()
    return recogniser.load(root / "judges" / "recogniser.safetensors"), scorer


def measure_pictures(
    pipe: DiffusionPipeline,
    judge: recogniser.Recogniser,
    scorer: CLIPModel,
    n_prompts: int,
    grid: Path | None,
    timed: DiffusionPipeline | None = None,
) -> Figures:
    """What a model draws, and how fast; ``timed`` is what to take the time of, if not the pipeline that draws."""
    pipe.set_progress_bar_config(disable=True)
    texts, facts = prompts(n_prompts)
    pixels, wanted = draw(pipe, texts), truths(facts)
    if grid is not None:
        sheet(pixels, grid)
    figures: Figures = {
        "pictures, read by the recogniser": {
            f"prompted {name}, %": value for name, value in recognised(judge, pixels, wanted).items()
        },
        "pictures, read by the CLIP that scores": {
            f"{name} as prompted, %": value for name, value in zero_shot(scorer, pipe.tokenizer, pixels, wanted).items()
        },
        "details, read by the recogniser": details(pipe, judge, n_prompts // 2),
    }
    pictures = draw_pictures(UNSEEN, 1, 1000, style="photo")
    captions, _ = captions_for(pictures.facts, np.random.default_rng(UNSEEN))
    generated, rendered = (picture_features(scorer, each) for each in (draw(pipe, captions), pictures.pixels))
    figures["1,000 captions, generated against rendered"] = {"CMMD": cmmd(generated, rendered)}
    figures["speed, two threads, best of three"] = {
        "one image of 25 steps, s": min(seconds(timed or pipe) for _ in range(3))
    }
    return figures


def seconds(pipe: DiffusionPipeline) -> float:
    """What one image takes."""
    pipe.set_progress_bar_config(disable=True)
    began, size = time.perf_counter(), {"height": SIZE, "width": SIZE}
    pipe("a photo of a mug", num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE, output_type="np", **size)
    return time.perf_counter() - began


def table(figures: Figures, bars: dict[str, int] = BARS) -> list[str]:
    """Every figure, its bar and whether it is met, as lines."""
    lines = ["| part | figure | measured | bar | met |", "|---|---|---:|---:|---|"]
    for part, values in figures.items():
        for name, value in values.items():
            bar, met = verdict(name, value, bars) or ("", None)
            lines.append(f"| {part} | {name} | {value:.{1 if value >= 1 else 2}f} | {bar} | {MET[met]} |")
    return lines


def page(record: dict[str, Any], recipe: dict[str, dict[str, Any]]) -> str:
    """The README beside the weights, a model card: the figures of each model, and what the weights were made of.

    Args:
        record: What ``figures.json`` has: "sha256" and "figures", and the same of the second model under "flow".
        recipe: What ``recipe.json`` has.
    """
    lines = [
        *CARD.read_text(encoding="utf-8").splitlines(),
        *table(record["figures"]),
        "",
        "Command: `python -m pretraining.evaluate`  ",
        f"sha256 of the weights: `{record['sha256']}`",
    ]
    if flow := record.get("flow"):
        lines += ["", "mini-flow, in `flow/`, loads into `StableDiffusion3Pipeline`:", ""]
        lines += table(flow["figures"], BARS | FLOW_BARS)
        lines += [
            "",
            "Command: `python -m pretraining.evaluate --flow`  ",
            f"sha256 of the weights: `{flow['sha256']}`",
        ]
    lines += ["", "| stage | steps of pictures | seed | data, sha256 |", "|---|---:|---:|---|"]
    for stage, made in recipe.items():
        lines.append(f"| {stage} | {made['reached']:,} × {made['batch']} | {made['seed']} | `{made['data'][:16]}` |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flow", action="store_true", help="measure the second model")
    parser.add_argument("--grid", type=Path, default=None, help="also save the prompted pictures as one PNG")
    parser.add_argument("--root", type=Path, default=ROOT, help="where `ship` put what is measured")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    path = chosen.root / "figures.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if chosen.flow:
        figures = measure_flow(chosen.prompts, chosen.grid, chosen.root)
        record["flow"] = {"sha256": folder_hash(chosen.root, ("flow",)), "figures": figures}
    else:
        figures = measure(chosen.prompts, chosen.grid, chosen.root)
        record |= {"sha256": folder_hash(chosen.root), "figures": figures}
    path.write_text(json.dumps(record, indent=1) + "\n")
    recipe = json.loads((chosen.root / "recipe.json").read_text())
    (chosen.root / "README.md").write_text(page(record, recipe))
    print((chosen.root / "README.md").read_text())


if __name__ == "__main__":
    main()
