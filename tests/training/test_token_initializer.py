"""The initializer token: set by hand, drawn at random, or chosen by a CLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dvar.config.methods import CustomDiffusionConfig, TextualInversionConfig
from dvar.config.training import problems
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.clip import Clip
from dvar.errors import ModelError, RefusedInput
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import tiny_tokenizer
from dvar.training.checkpoint import latest_checkpoint
from dvar.training.dataset import read_concept
from dvar.training.personalise import personalise
from dvar.training.placeholder_tokens import token_id
from dvar.training.preflight import preflight
from dvar.training.token_initializer import (
    LISTED,
    SENTENCES,
    choose_initializer_tokens,
    describe_initializers,
    list_words,
    score_words,
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in transformers' format."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), tiny_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text, "initializer_factor": 5.0},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, clip_folder: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        pretrained_model_name_or_path=str(tiny_model),
        instance_data_dir=str(tiny_images),
        initializer="clip",
        clip_model=str(clip_folder),
        resolution=32,
        max_train_steps=9,
        window=8,
        threshold=1e-9,
        num_validation_images=1,
        num_inference_steps=1,
        checkpointing_steps=4,
        output_dir=str(tmp_path / "run"),
    )


def test_vectors_are_those_of_the_model_with_unit_length(clip_folder: Path, tiny_images: Path) -> None:
    clip = Clip.load(clip_folder, device="cpu")
    texts = ["a photo of mug", "a dark cat", "mug " * 90]
    text_vectors = clip.embed_texts(texts)
    assert text_vectors.shape == (3, 16)
    torch.testing.assert_close(text_vectors.norm(dim=1), torch.ones(3))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = clip.tokenizer(texts[:1], return_tensors="pt")
    expected = model.get_text_features(**ids).pooler_output
    torch.testing.assert_close(text_vectors[:1], expected / expected.norm())
    images = [Image.open(path).convert("RGB") for path in sorted(tiny_images.iterdir())]
    image_vectors = clip.embed_images(images)
    expected = model.get_image_features(clip.processor(images, return_tensors="pt").pixel_values).pooler_output
    torch.testing.assert_close(image_vectors, expected / expected.norm(dim=1, keepdim=True))


def test_a_folder_without_a_clip_raises_a_model_error(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="does not load as a CLIP"):
        Clip.load(tiny_model / "unet", device="cpu")


def test_the_vocabulary_lists_every_entry_by_a_unique_name(tiny_model: Path) -> None:
    tokenizer = load_backbone(tiny_model, device="cpu").tokenizer
    names = list_words(tokenizer)
    assert len(set(names)) == len(names)
    ids = [token_id(tokenizer, name) or 0 for name in names]
    assert ids == sorted(set(ids))
    unlisted = {entry for entry, token in tokenizer.get_vocab().items() if token not in ids}
    special_tokens = {*tokenizer.all_special_tokens}
    assert special_tokens < unlisted
    for entry in unlisted - special_tokens:
        assert "+" in entry or token_id(tokenizer, entry) in ids
    assert {"mug", "cat", "th"} <= set(names)


def test_a_word_scores_the_mean_cosine_over_sentences_and_images(clip_folder: Path, tiny_images: Path) -> None:
    clip = Clip.load(clip_folder, device="cpu")
    images = [Image.open(path).convert("RGB") for path in sorted(tiny_images.iterdir())[:3]]
    nouns, sentences = ["mug", "cat"], ["a photo of {}", "a dark {}"]
    scores = score_words(clip, nouns, sentences, images)
    for noun, score in zip(nouns, scores, strict=True):
        pairs = clip.embed_texts([sentence.format(noun) for sentence in sentences]) @ clip.embed_images(images).T
        assert float(score) == pytest.approx(float(pairs.mean()), abs=1e-6)


def test_the_best_word_is_chosen_and_the_best_and_worst_are_recorded(config: TextualInversionConfig) -> None:
    backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
    concept = read_concept(config)
    result = choose_initializer_tokens(config, concept, backbone)
    (record,) = json.loads((Path(config.output_dir) / "initializer.json").read_text())
    assert record["word"] == "<thing>"
    assert result == replace(config, initializer_token=record["initializer_token"])
    assert len(record["sentences"]) == len(set(record["sentences"])) == SENTENCES
    names = list_words(backbone.tokenizer)
    clip = Clip.load(str(config.clip_model), device="cpu")
    texts = [name.removesuffix("</w>") for name in names]
    scores = dict(zip(names, score_words(clip, texts, record["sentences"], concept.images).tolist(), strict=True))
    ranking = sorted(scores.values(), reverse=True)
    assert list(record["best"].values()) == pytest.approx(ranking[:LISTED])
    assert list(record["worst"].values()) == pytest.approx(ranking[-LISTED:])
    assert all(scores[name] == pytest.approx(score) for name, score in {**record["best"], **record["worst"]}.items())
    assert record["initializer_token"] == next(iter(record["best"]))
    (sentence,) = describe_initializers(Path(config.output_dir))
    assert sentence.startswith(
        f"<thing> from {record['initializer_token']}, by CLIP the best word with {ranking[0]:.3f}"
    )
    assert sentence.endswith(f"with {ranking[-1]:.3f}")


def test_the_worst_word_can_be_the_initializer(config: TextualInversionConfig) -> None:
    backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
    concept = read_concept(config)
    best = choose_initializer_tokens(config, concept, backbone).initializer_token
    worst = choose_initializer_tokens(replace(config, initializer="clip-worst"), concept, backbone).initializer_token
    (record,) = json.loads((Path(config.output_dir) / "initializer.json").read_text())
    assert record["initializer_token"] == worst == list(record["worst"])[-1]
    assert next(iter(record["best"])) == best != worst
    (sentence,) = describe_initializers(Path(config.output_dir))
    lowest, highest = min(record["worst"].values()), max(record["best"].values())
    assert sentence == (
        f"<thing> from {worst}, by CLIP the worst word with {lowest:.3f}; the best is {best} with {highest:.3f}"
    )
    assert not problems(replace(config, initializer="clip-worst"))
    with_neither = problems(replace(config, initializer="clip-worst", clip_model=None))
    assert with_neither == [
        "clip_model is missing: initializer clip-worst needs the folder or hub id of a CLIP, such as "
        "openai/clip-vit-base-patch32"
    ]


def test_a_random_word_is_keyed_by_the_seed(config: TextualInversionConfig) -> None:
    random_config = replace(config, initializer="random", clip_model=None)
    backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
    concept = read_concept(random_config)
    tokens: list[str | None] = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(len(tokens))
        tokens.append(choose_initializer_tokens(replace(random_config, seed=seed), concept, backbone).initializer_token)
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 3
    assert describe_initializers(Path(random_config.output_dir)) == [f"<thing> from {tokens[-1]}"]
    assert all(token_id(backbone.tokenizer, str(token)) is not None for token in tokens)


def test_a_manual_initializer_is_unchanged(config: TextualInversionConfig) -> None:
    manual = replace(config, initializer="manual", clip_model=None, initializer_token="mug")
    backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
    assert choose_initializer_tokens(manual, read_concept(manual), backbone) == manual
    assert not Path(config.output_dir).exists()
    assert describe_initializers(Path(config.output_dir)) == []


def test_each_initializer_is_found_from_the_images_of_its_concept(
    config: TextualInversionConfig, tiny_images: Path, tmp_path: Path
) -> None:
    blue = tmp_path / "plain"
    blue.mkdir()
    Image.new("RGB", (32, 32), (0, 0, 255)).save(blue / "0.png")
    concepts = [
        {"instance_prompt": "a <new1>", "instance_data_dir": str(tiny_images)},
        {"instance_prompt": "a <new2>", "instance_data_dir": str(blue)},
    ]
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    several = CustomDiffusionConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        placeholder_token="<new1>+<new2>",
        initializer="clip",
        clip_model=config.clip_model,
        concepts_list=str(tmp_path / "list.json"),
        prior_loss_weight=0.0,
        validation_prompt="<new1>",
        resolution=32,
        output_dir=config.output_dir,
    )
    backbone = load_backbone(config.pretrained_model_name_or_path, device="cpu")
    concept = read_concept(several)
    choose_initializer_tokens(several, concept, backbone)
    records = json.loads((Path(config.output_dir) / "initializer.json").read_text())
    clip = Clip.load(str(config.clip_model), device="cpu")
    for record, images in zip(records, (concept.images[:4], concept.images[4:]), strict=True):
        name, score = next(iter(record["best"].items()))
        expected = score_words(clip, [name.removesuffix("</w>")], record["sentences"], images)
        assert score == pytest.approx(float(expected))


class Killed(BaseException):
    """The process dies here."""


def test_a_resumed_run_keeps_its_initializer(config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(step: Any) -> None:
        if step.step == 6:
            raise Killed

    with pytest.raises(Killed):
        personalise(config, [kill])
    folder = Path(config.output_dir)
    token = json.loads((folder / "initializer.json").read_text())[0]["initializer_token"]
    assert latest_checkpoint(folder).facts["config"]["initializer_token"] == token
    monkeypatch.setattr(Clip, "load", lambda *_, **__: pytest.fail("the initializer is known already"))
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert json.loads((folder / "config.json").read_text())["initializer_token"] == token
    assert token in (folder / "README.md").read_text()
    assert load_personalised_backbone(folder, device="cpu").tokenizer.convert_tokens_to_ids("<thing>") > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_model": None}, "clip_model is missing: initializer clip needs the folder or hub id of a CLIP"),
        ({"clip_model": "/nowhere/clip"}, "clip_model /nowhere/clip is neither a folder here nor a hub id"),
        ({"initializer_token": "mug"}, "initializer_token is for initializer manual, got 'mug' with clip"),
        ({"initializer": "random"}, "clip_model is for initializer clip"),
        ({"initializer": "best"}, "initializer must be one of manual, random, clip, clip-worst, got 'best'"),
    ],
)
def test_an_invalid_initializer_is_refused_before_a_model_loads(
    config: TextualInversionConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedInput) as error:
        preflight(replace(config, **changes), None)
    assert any(message in problem for problem in error.value.problems)


def test_a_folder_without_a_clip_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="holds no config"):
        preflight(replace(config, clip_model=str(tmp_path)), None)


@pytest.mark.slow
def test_the_bundled_models_own_clip_finds_the_noun_of_a_bundled_concept() -> None:
    from dvar import mini
    from dvar.config.templates import TEMPLATES

    backbone = load_backbone(mini.path(), device="cpu")
    clip = Clip.bundled(backbone)
    for name in ("brown_boot", "blue_dog", "black_cat"):
        images = [Image.open(path).convert("RGB") for path in sorted(mini.concepts()[name].glob("*.png"))]
        nouns = ["boot", "dog", "cat", "mug", "owl", "car", "house", "fish"]
        scores = score_words(clip, nouns, TEMPLATES["object"][:4], images)
        assert nouns[int(scores.argmax())] == mini.noun(name)
