"""Stage 8: the pictures of ``docs/bundled-models.md``, from the shipped folder and the logs of the stages.

``python -m pretraining.gallery`` draws the world, what the autoencoder gives back, what the model draws for the prompts
of `pretraining.evaluate` and which of them the recogniser reads as something else, what was learned of the tuning
concepts, and the curves.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from dvar import mini
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import preset_settings
from dvar.mini import recogniser
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.concepts import held_out
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import PATTERNS, render, sample_scene, sample_subject
from dvar.mini.world.styles import STYLES
from pretraining import science
from pretraining.evaluate import UNSEEN, draw, prompts, truths
from pretraining.flow import fold
from pretraining.pictures import as_tensor, draw_pictures
from pretraining.training import WORK

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(mini.__file__).parent
DOCS = Path(__file__).parents[1] / "docs" / "bundled-models"
SIDE, GAP, LINE = 104, 6, 13
PLAIN = "a photo of "
"""How every prompt begins."""
INK, MUTED, PAPER = (40, 40, 46), (120, 120, 128), (255, 255, 255)


def page(
    rows: Sequence[Sequence[tuple[np.ndarray, str]]], path: Path, heads: Sequence[str] = (), side: int = SIDE
) -> None:
    """Rows of (uint8 picture, what stands below it) on white paper, with a word over each column."""
    font = ImageFont.load_default(size=11)
    wide = max(1, side // 6)
    lines = max((len(textwrap.wrap(says, wide)) for row in rows for _, says in row), default=0)
    high, top = side + GAP + LINE * lines + (2 if lines else 0), GAP + (LINE + 4 if heads else 0)
    sheet = Image.new("RGB", (GAP + (side + GAP) * max(map(len, rows)), top + high * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((GAP + column * (side + GAP) + side / 2, GAP), head, INK, font, anchor="mt")
    for down, row in enumerate(rows):
        for across, (pixels, says) in enumerate(row):
            x, y = GAP + across * (side + GAP), top + down * high
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (x, y))
            for i, line in enumerate(textwrap.wrap(says, wide)):
                pen.text((x + side / 2, y + side + 2 + i * LINE), line, MUTED, font, anchor="mt")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88, method=6)


def hundred_subjects() -> None:
    """Four subjects of each class, somewhere."""
    rng = np.random.default_rng(8)
    shown = [
        (render(sample_subject(rng, noun), sample_scene(rng, style="photo"), size=2 * SIDE), noun if i == 0 else "")
        for noun in CLASSES
        for i in range(4)
    ]
    rows = [shown[4 * at : 4 * at + 12] for at in range(0, len(CLASSES), 3)]
    page(rows, DOCS / "subjects.webp", side=88)


def ten_contexts() -> None:
    """The same subject in ten places, ten times."""
    rng = np.random.default_rng(9)
    places = list(PLACES)[:10]
    nouns = [str(noun) for noun in rng.choice(list(CLASSES), 10, replace=False)]
    rows = []
    for noun in nouns:
        subject = sample_subject(rng, noun)
        scenes = [sample_scene(rng, place=place, style="photo") for place in places]
        rows.append([(render(subject, scene, size=2 * SIDE), "") for scene in scenes])
    page(rows, DOCS / "contexts.webp", heads=places)


def styles() -> None:
    """One subject and one place in each style."""
    rng = np.random.default_rng(10)
    rows = []
    for noun in ("robot", "owl"):
        subject, detail = sample_subject(rng, noun), int(rng.integers(2**31))
        scenes = [sample_scene(np.random.default_rng(detail), place="beach", style=style) for style in STYLES]
        rows.append([(render(subject, scene), "") for scene in scenes])
    page(rows, DOCS / "styles.webp", heads=list(STYLES))


def reconstructions(vae: torch.nn.Module) -> None:
    """Unseen pictures above, what the autoencoder gives back below."""
    pixels = draw_pictures(UNSEEN, 2, 10, style="photo").pixels
    with torch.no_grad():
        x = as_tensor(pixels)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    again = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    page([[(p, "") for p in pixels], [(p, "") for p in again]], DOCS / "reconstructions.webp")


def prompted(pixels: np.ndarray, texts: Sequence[str], path: Path) -> None:
    """The first fifty images, each over what of its prompt differs from the others."""
    cells = [(image, text.removeprefix(PLAIN)) for image, text in zip(pixels[:50], texts[:50], strict=True)]
    page([cells[at : at + 10] for at in range(0, 50, 10)], path)


def drawn(pipe: StableDiffusionPipeline, judge: recogniser.Recogniser, n: int) -> None:
    """The first prompts of `evaluate` as they come, not chosen; and the first of all that are read as another class or
    pattern."""
    texts, facts = prompts(n)
    pixels, wanted = draw(pipe, texts), truths(facts)
    with torch.no_grad():
        reading = judge(as_tensor(pixels))
    prompted(pixels, texts, DOCS / "prompts.webp")
    missed = []
    for i, text in enumerate(texts):
        read = [(list(CLASSES), "class"), (list(PATTERNS), "pattern")]
        wrong = [names[int(reading.best(h)[i])] for names, h in read if reading.best(h)[i] != wanted[h][i]]
        if wrong:
            missed.append((pixels[i], f"{text.removeprefix(PLAIN)}: read as {', '.join(wrong)}"))
    page([missed[at : at + 10] for at in range(0, min(20, len(missed)), 10)], DOCS / "misses.webp")


def drawn_by_flow() -> None:
    """The first prompts of `evaluate` as the second model draws them, not chosen."""
    pipe = StableDiffusion3Pipeline.from_pretrained(mini.path("mini-flow"), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    texts, _ = prompts(200)
    prompted(draw(fold(pipe), texts[:50]), texts, DOCS / "prompts-flow.webp")


def held_out_page() -> None:
    """All 60 concepts, the first picture of each, by name."""
    shown = [
        (np.asarray(Image.open(folder / "00.png")), name.replace("_", " ")) for name, folder in mini.concepts().items()
    ]
    assert len(shown) == len(held_out())
    page([shown[at : at + 12] for at in range(0, len(shown), 12)], DOCS / "concepts.webp", side=80)


def learned() -> None:
    """For each method, what it learned of four tuning concepts at its cap, where `pretraining.science` trained it: one
    of the concept's own pictures, three plain prompts, five places it was never seen in."""
    for method in PAPER_METHODS:
        preset = preset_settings("mini", method)
        rows = []
        for concept in mini.TUNING[:4]:
            trial = science.Trial(method, concept, preset["learning_rate"], 0, preset["max_train_steps"])
            path = trial.folder / f"pictures-{trial.cap:06d}.npy"
            if path.exists():
                pixels = np.load(path)
                own = np.asarray(Image.open(mini.concepts()[concept] / "00.png"))
                shown = [own, *pixels[:3], *pixels[science.PLAIN : science.PLAIN + 5]]
                rows.append([(each, concept.replace("_", " ") if i == 0 else "") for i, each in enumerate(shown)])
        if rows:
            heads = ("its own", "plain", "", "", *science.PLACED[:5])
            page(rows, DOCS / f"learned-{method}.webp", heads)


CURVES = (
    ("autoencoder", ("psnr", "psnr_object"), "reconstruction, dB"),
    ("unet", ("mse", "mse_high"), "U-Net, squared error of the noise"),
    ("flow", ("mse", "mse_high"), "mini-flow, squared error of the velocity"),
    ("vision", ("class", "main colour", "pattern"), "conditioning CLIP, read off pictures"),
    ("judge", ("class", "main colour", "pattern"), "scoring CLIP, read off pictures"),
    ("recogniser", ("class", "main colour", "pattern"), "recogniser, right"),
)


def curves() -> None:
    """What each stage of which ``work/`` has a log says about its own batches, smoothed over a twentieth of it."""
    logged = [curve for curve in CURVES if (WORK / curve[0] / "log.jsonl").exists()]
    if not logged:
        return
    figure, panels = plt.subplots(1, len(logged), figsize=(2.6 * len(logged), 2.8), layout="constrained", squeeze=False)
    for panel, (stage, keys, title) in zip(panels.flat, logged, strict=True):
        rows = [json.loads(line) for line in (WORK / stage / "log.jsonl").read_text().splitlines()]
        rows = list({row["step"]: row for row in rows}.values())  # what a restart did again counts once
        steps = np.array([row["step"] for row in rows])
        for key in keys:
            values = np.array([row[key] for row in rows])
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            line = panel.plot(steps, values, alpha=0.25, linewidth=0.8)
            panel.plot(steps[width - 1 :], smooth, color=line[0].get_color(), label=key.replace("_", ", "))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
        panel.set_yscale("log" if stage in ("unet", "flow") else "linear")
    DOCS.mkdir(parents=True, exist_ok=True)
    figure.savefig(DOCS / "curves.svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world", action="store_true", help="only what needs no weights")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    hundred_subjects()
    ten_contexts()
    styles()
    if chosen.world:
        return
    pipe = StableDiffusionPipeline.from_pretrained(mini.path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    reconstructions(pipe.vae)
    drawn_by_flow()
    drawn(pipe, recogniser.load(ROOT / "judges" / "recogniser.safetensors"), 200)
    held_out_page()
    learned()
    curves()


if __name__ == "__main__":
    main()
