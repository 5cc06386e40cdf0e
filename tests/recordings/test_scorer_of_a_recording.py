"""What scores the images of a recording, when they are generated and when they are rescored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dvar.recordings import rescore, score_samples


def test_references_are_upright_and_on_white_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upright, cut_out = tmp_path / "phone.jpg", tmp_path / "cut_out.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored sideways
    Image.new("RGB", (60, 40), "red").save(upright, exif=exif)
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(cut_out)
    with Image.open(cut_out) as image:
        image.putpixel((0, 0), (255, 0, 0, 255))
        image.save(cut_out)
    monkeypatch.setattr(score_samples, "Scorer", lambda clip, references, **settings: references)
    monkeypatch.setattr("dvar.recordings.score_samples.Clip.scoring", lambda: None)
    spec: Any = SimpleNamespace(
        reference_paths=lambda concept: [upright, cut_out],
        **dict.fromkeys(("clip", "dino", "lpips", "bundled")),
        pairing="all",
    )
    references: Any = score_samples.load_scorer(spec, SimpleNamespace())  # type: ignore[arg-type]
    first, second = references
    assert first.size == (40, 60)
    assert second.getpixel((20, 20)) == (255, 255, 255)


def test_a_run_is_rescored_by_all_that_scored_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = {"clip": "clip", "dino": "dino", "pairing": "all", "lpips": "lpips.safetensors"}
    monkeypatch.setattr(rescore, "read_conditions", lambda folder: {"judged": judged})
    config = SimpleNamespace(
        method="textual-inversion", pretrained_model_name_or_path="mini", instance_data_dir=str(tmp_path / "mug")
    )
    spec = rescore._spec_of(tmp_path / "mug" / "0", SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert {name: getattr(spec, name) for name in judged} == judged
