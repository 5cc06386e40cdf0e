"""Metrics of images: cases computed by hand, and the same numbers from an independent library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessorPil, ViTModel

from dvar import mini
from dvar.diffusion.clip import Clip
from dvar.errors import ModelError, RefusedInput
from dvar.recordings.image_metrics import Dino, Judge, Scorer, similarity
from dvar.testing import tiny_clip, tiny_concept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip.load(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tiny_concept(tmp_path_factory.mktemp("concept"), images=5)
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def test_pairings_worked_out_by_hand() -> None:
    # Against (1, 0) and (0, 2): the angles of (3, 0), (0, 1) and (1, 1) are 0 and 90, 90 and 0, 45 and 45 degrees.
    of = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    to = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(similarity(of, to), torch.tensor([0.5, 0.5, 0.5**0.5]))
    torch.testing.assert_close(similarity(of, to, "row by row"), torch.tensor([1.0, 1.0, 0.5**0.5]))


def test_similarity_is_torchmetrics_cosine() -> None:
    random = torch.Generator().manual_seed(0)
    of, to = torch.randn(7, 16, generator=random), torch.randn(3, 16, generator=random)
    every = pairwise_cosine_similarity(of, to)
    torch.testing.assert_close(similarity(of, to), every.mean(dim=1))
    torch.testing.assert_close(similarity(of, to, "row by row"), every[torch.arange(7), torch.arange(7) % 3])


def test_text_scores_are_torchmetrics_clip_score(clip: Clip, images: list[Image.Image]) -> None:
    texts = ["a photo of a mug", "a red mug", "a dog in the snow", "a cat at night", "one chair"]
    # torchmetrics 1.9 asks for bare features, which transformers 5 wraps.
    model: SimpleNamespace = SimpleNamespace(
        config=clip.model.config,
        to=lambda device: model,
        get_image_features=lambda pixels: clip.model.get_image_features(pixel_values=pixels).pooler_output,
        get_text_features=lambda ids, mask: clip.model.get_text_features(ids, mask).pooler_output,
    )
    processor = CLIPProcessor(clip.processor, clip.tokenizer)
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    scores = Scorer(clip, images[:1])(images, texts)["clip_text"]
    for tensor, text, score in zip(tensors, texts, scores, strict=True):
        expected = clip_score(tensor, text, model_name_or_path=lambda: (model, processor))
        assert max(100 * score, 0) == pytest.approx(float(expected), abs=1e-3)


def test_an_image_is_most_similar_to_itself(clip: Clip, images: list[Image.Image]) -> None:
    scores = Scorer(clip, images, pairing="row by row")(images, ["a mug"] * 5)
    assert scores["clip_image"] == pytest.approx([1.0] * 5, abs=1e-5)
    assert max(Scorer(clip, images)(images, ["a mug"] * 5)["clip_image"]) < 1 - 1e-4


def test_the_vectors_of_references_are_computed_once(
    clip: Clip, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    embed = Clip.embed_images

    def count(self: Clip, images: list[Image.Image]) -> torch.Tensor:
        counts.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Clip, "embed_images", count)
    scorer = Scorer(clip, images)
    for _ in range(3):
        scorer(images[:2], ["a mug"] * 2)
    assert counts == [5, 2, 2, 2]


def test_pixels_are_those_of_the_processor_whatever_else_is_in_the_batch(clip: Clip, images: list[Image.Image]) -> None:
    large = [image.resize((90, 70)) for image in images]
    together = clip.embed_images(large)
    torch.testing.assert_close(together, torch.cat([clip.embed_images([image]) for image in large]))
    pixels = clip.processor(large, return_tensors="pt").pixel_values
    expected = clip.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(together, torch.nn.functional.normalize(expected, dim=1))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


def test_dino_reads_the_class_token(tmp_path: Path, clip: Clip, images: list[Image.Image]) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **small), add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    dino = Dino.load(tmp_path)
    pixels = dino.processor(images, return_tensors="pt").pixel_values
    first = dino.model(pixel_values=pixels).last_hidden_state[:, 0]
    scores = Scorer(clip, images[:2], dino=dino)(images, ["a mug"] * 5)
    torch.testing.assert_close(torch.tensor(scores["dino"]), pairwise_cosine_similarity(first, first[:2]).mean(dim=1))
    assert Scorer(clip, images, dino=dino).names == {"clip": "clip", "dino": tmp_path.name}


def tiny_dino(folder: Path, *, image_size: int = 32, crop: int = 32) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    with torch.random.fork_rng():
        Dinov2Model(Dinov2Config(image_size=image_size, **sizes)).eval().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": crop, "width": crop}).save_pretrained(folder)
    return folder


def test_a_dino_may_read_images_of_another_size_than_it_was_trained_at(tmp_path: Path) -> None:
    dino = Dino.load(tiny_dino(tmp_path / "dino", image_size=56, crop=28))
    assert dino.embed_images([Image.new("RGB", (40, 50), "red")]).shape == (1, 16)
    with pytest.raises(ModelError, match="squares of whole patches of 4 pixels, got 30x30: complete the folder"):
        Dino.load(tiny_dino(tmp_path / "other", crop=30))


def test_the_weights_of_a_dino_are_never_a_pickle(tmp_path: Path) -> None:
    folder = tiny_dino(tmp_path / "dino")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load as a DINO"):
        Dino.load(folder)


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


def test_a_clip_that_does_not_fit_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="does not load as a CLIP"):
        Clip.load(tmp_path)
    with pytest.raises(ModelError, match=r"must be of type clip, .* is of type clip_text_model"):
        Clip.load(tiny_model / "text_encoder")
    crops = tiny_clip(tmp_path / "crops")
    edit_json(
        crops, "preprocessor_config.json", lambda settings: settings.update(crop_size={"height": 16, "width": 16})
    )
    with pytest.raises(ModelError, match="its processor makes 16x16, it reads 32"):
        Clip.load(crops)
    words = tiny_clip(tmp_path / "words", vocabulary=["mug"])
    with pytest.raises(ModelError, match=r"its tokenizer has [0-9]+ words, its text model reads"):
        Clip.load(words, tokenizer=tiny_model / "tokenizer")
    (crops / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="does not load as a CLIP"):
        Clip.load(crops)


def test_a_wrong_pairing_and_missing_references_are_refused(clip: Clip, images: list[Image.Image]) -> None:
    with pytest.raises(RefusedInput, match="pairing must be one of all pairs, row by row, got 'zip'"):
        Scorer(clip, images, pairing="zip")  # type: ignore[arg-type]
    with pytest.raises(RefusedInput, match="there must be a reference"):
        Scorer(clip, [])
    with pytest.raises(RefusedInput, match="knows the bundled concepts alone, got 'mug'"):
        Judge("mug")


def test_the_bundled_judges_know_a_bundled_concept() -> None:
    name = "black_cat"
    images = [Image.open(path) for path in sorted(mini.concepts()[name].glob("*.png"))]
    places = json.loads(mini.concepts()[name].with_suffix(".json").read_text())["places"]
    others = [Image.open(path) for path in sorted(mini.concepts()["brown_boot"].glob("*.png"))]
    scorer = Scorer(Clip.scoring(), images, judge=Judge(name))
    own = scorer(images, ["a photo of a cat"] * len(images), places)
    foreign = scorer(others, ["a photo of a cat"] * len(others))
    assert min(own["identity"]) > 0.9
    for head in ("class", "main colour", "pattern", "place"):
        assert np.mean(own[head]) > 0.7
    assert max(foreign["class"]) == 0
    assert "place" not in foreign
    assert np.mean(own["clip_image"]) > np.mean(foreign["clip_image"]) + 0.1
    assert np.mean(own["clip_text"]) > np.mean(foreign["clip_text"]) + 0.1


def test_the_bundled_clip_s_processor_makes_the_pixels_it_was_trained_on() -> None:
    image = Image.open(next(iter(sorted(mini.concepts()["black_cat"].glob("*.png"))))).convert("RGB")
    pixels = Clip.scoring().processor([image], return_tensors="pt").pixel_values
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)
