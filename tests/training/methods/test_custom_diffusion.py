"""Custom Diffusion: weights, prior preservation, rescaling, several concepts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import dvar.training.run
from dvar.config.methods import CustomDiffusionConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.objective import Draws, denoising_loss
from dvar.errors import CheckpointError, RefusedInput
from dvar.stopping.trace import Trace
from dvar.testing import tiny_concept
from dvar.training.dataset import read_concept
from dvar.training.methods.custom_diffusion import CustomDiffusion
from dvar.training.personalise import personalise, prepare
from dvar.training.run_layout import ATTENTION, EMBEDS


@pytest.fixture
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(tiny_model, device="cpu")


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> CustomDiffusionConfig:
    return CustomDiffusionConfig(
        pretrained_model_name_or_path=str(tiny_model),
        instance_data_dir=str(tiny_images),
        class_noun="mug",
        num_class_images=3,
        resolution=32,
        max_train_steps=9,
        window=8,
        validation_steps=100,
        num_validation_images=1,
        num_inference_steps=2,
        output_dir=str(tmp_path / "run"),
    )


@pytest.mark.parametrize(
    ("part", "suffixes"),
    [
        ("crossattn_kv", {"to_k.weight", "to_v.weight"}),
        ("crossattn", {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}),
    ],
)
def test_the_named_part_of_every_cross_attention_is_learned(backbone: Backbone, part: str, suffixes: set[str]) -> None:
    base = {name: weight.clone() for name, weight in backbone.denoiser.state_dict().items()}
    layers = [name for name, _ in backbone.denoiser.named_modules() if name.endswith(".attn2")]
    method = CustomDiffusion(backbone, {"<new1>": "ktn"}, part=part)
    assert set(method.weights) == {f"{name}.{suffix}" for name in layers for suffix in suffixes}
    assert set(method.weights) <= set(base)
    for name, weight in method.weights.items():
        assert torch.equal(weight, base[name])
        assert weight.requires_grad
        assert backbone.denoiser.get_parameter(name) is weight
    assert backbone.denoiser.state_dict().keys() == base.keys()


def test_files_hold_weights_by_the_unets_names_and_vectors(backbone: Backbone) -> None:
    method = CustomDiffusion(backbone, {"<new1>": "ktn"}, 2)
    files = method.files(method.state)
    assert files.keys() == {ATTENTION, EMBEDS}
    assert files[EMBEDS]["<new1>"].shape == (2, 32)
    missing, unexpected = backbone.denoiser.load_state_dict(files[ATTENTION], strict=False)
    assert not unexpected
    assert not set(missing) & set(method.weights)


def test_the_learned_state_can_be_saved_and_restored(backbone: Backbone, tiny_model: Path) -> None:
    method = CustomDiffusion(backbone, {"<new1>": "ktn"})
    with torch.no_grad():
        for weight in method.parameters:
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    state = method.state
    restored = CustomDiffusion(load_backbone(tiny_model, device="cpu"), {"<new1>": "cat"})
    restored.load(state)
    assert all(torch.equal(restored.state[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        for weight in method.parameters:
            weight.zero_()
    assert all(tensor.any() for tensor in state.values()), "a state is a copy"


@pytest.mark.parametrize("projection", ["to_k", "to_v"])
def test_no_gradient_passes_through_the_first_position_of_keys_and_values(backbone: Backbone, projection: str) -> None:
    method = CustomDiffusion(backbone, {"<new1>": "ktn"})
    name = next(name for name in method.weights if projection in name).removesuffix(".weight")
    layer, hidden = backbone.denoiser.get_submodule(name), torch.randn(2, 5, 32, requires_grad=True)
    output = layer(hidden)
    torch.testing.assert_close(output, hidden @ layer.weight.T)
    output.square().sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[:, 0].any()
    assert hidden.grad[:, 1:].all()


def test_only_the_learned_weights_are_float32_in_half_precision(tiny_model: Path) -> None:
    backbone = load_backbone(tiny_model, device="cpu", mixed_precision="bf16")
    method = CustomDiffusion(backbone, {"<new1>": "ktn"})
    learned_ids = {id(weight) for weight in method.parameters}
    assert {weight.dtype for weight in method.parameters} == {torch.float32}
    assert {part.dtype for part in backbone.denoiser.parameters() if id(part) not in learned_ids} == {torch.bfloat16}


def test_captions_contain_the_placeholder_token_and_the_class(config: CustomDiffusionConfig) -> None:
    assert config.caption_templates == ("photo of a <new1> mug",)
    assert replace(config, instance_prompt="my <new1> mug").caption_templates == ("my <new1> mug",)


# Prior preservation


def measure_losses(config: CustomDiffusionConfig) -> tuple[float, list[float]]:
    """Return the training loss of the first update and the held losses before it."""
    trace = Trace.read(personalise(config).folder / "trace.jsonl")
    return trace.records[1]["train_loss"], trace.records[0]["eval"]


def test_the_prior_adds_the_weighted_loss_on_class_images_to_training_only(
    config: CustomDiffusionConfig, tmp_path: Path
) -> None:
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        losses[weight] = measure_losses(
            replace(config, prior_loss_weight=weight, output_dir=str(tmp_path / f"{weight:g}"))
        )
    prior = losses[1.0][0] - losses[0.0][0]
    assert prior > 0
    assert losses[3.0][0] == pytest.approx(losses[0.0][0] + 3 * prior, rel=1e-5)
    assert losses[0.0][1] == losses[1.0][1] == losses[3.0][1]
    assert not (tmp_path / "0" / "class_images").exists()


def test_class_images_have_draws_of_their_own(config: CustomDiffusionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance image and the class image that it is paired with share neither noise nor timestep."""
    run, _ = prepare(config)
    joined: list[Draws] = []

    def remember(draws: Draws) -> Tensor:
        joined.append(draws)
        return torch.zeros(len(draws.timesteps))

    monkeypatch.setattr(run, "losses", remember)
    run.training_losses(1, 0, 8)
    (draws,) = joined
    for name in ("noise", "vae_noise", "timesteps"):
        instance, of_class = getattr(draws, name).chunk(2)
        same = (instance == of_class).flatten(1).all(dim=1) if instance.dim() > 1 else instance == of_class
        assert same.float().mean() < 0.5, name


def test_class_images_are_generated_once_by_the_base_model(config: CustomDiffusionConfig) -> None:
    folder = personalise(config).folder / "class_images"
    images = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(images) == ["00.png", "01.png", "02.png"]
    assert len(set(images.values())) == 3
    with Image.open(folder / "00.png") as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))
    read_again = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    personalise(replace(config, resume_from_checkpoint="latest", max_train_steps=10, extend=True))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == read_again, "a resumed run reads them"


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_run_is_not_resumed_with_other_class_images(config: CustomDiffusionConfig, change: str) -> None:
    folder = personalise(config).folder / "class_images"
    images = {path.name: path.read_bytes() for path in folder.iterdir()}
    if change == "replaced":
        Image.new("RGB", (32, 32)).save(folder / "01.png")
    else:
        (folder / "01.png").unlink()
    resumed = replace(config, resume_from_checkpoint="latest", max_train_steps=10, extend=True)
    with pytest.raises(CheckpointError, match=r"was made with other class images .* remove \S+class_images"):
        personalise(resumed)
    assert (folder.parent / "result.json").exists(), "a refused resume leaves the finished run as it was"
    shutil.rmtree(folder)
    personalise(resumed)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == images, "they are generated as before"
    (folder / "01.png").unlink()
    personalise(replace(config, overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == images, "another run generates its own"


def test_class_images_of_a_folder_replace_generated_ones(config: CustomDiffusionConfig, tmp_path: Path) -> None:
    class_images = tiny_concept(tmp_path / "mugs", images=2)
    settings = replace(config, class_data_dir=str(class_images))
    assert [len(class_set.images) for class_set in read_concept(settings).classes] == [2]
    assert not (personalise(settings).folder / "class_images").exists()


def test_an_invalid_folder_of_class_images_is_refused(config: CustomDiffusionConfig, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="class_data_dir must be a folder with class images"):
        read_concept(replace(config, class_data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "mugs").mkdir()
    with pytest.raises(RefusedInput, match="holds no images"):
        read_concept(replace(config, class_data_dir=str(tmp_path / "mugs")))
    (tmp_path / "mugs" / "notes.pdf").write_bytes(b"%PDF")
    with pytest.raises(RefusedInput, match=r"class_data_dir: notes\.pdf is not an image"):
        read_concept(replace(config, class_data_dir=str(tmp_path / "mugs")))


# Rescaling and its mask


def test_training_is_masked_and_the_held_batch_is_augmented_without_a_mask(
    config: CustomDiffusionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Draws] = []

    def record_draws(predict: Any, draws: Draws, schedule: Any) -> Any:
        calls.append(draws)
        return denoising_loss(predict, draws, schedule)

    monkeypatch.setattr(dvar.training.run, "denoising_loss", record_draws)
    personalise(replace(config, train_batch_size=3))
    held_draws = [draws for draws in calls if draws.mask is None]
    masks = [draws.mask for draws in calls if draws.mask is not None]
    assert len(held_draws) == 10
    assert len(masks) == 9
    for part in (slice(3), slice(3, 6)):  # of the concept, of its class
        assert len({tuple(draws.timesteps[part].tolist()) for draws in calls if draws.mask is not None}) == 9
    assert len({draws.input_ids.shape[0] for draws in held_draws}) == 1
    assert len({tuple(ids.tolist()) for ids in held_draws[0].input_ids}) > 1, "captions state the scale of an image"
    assert all(mask[3:].all() for mask in masks), "class images are not rescaled"
    assert any(not mask[:3].all() for mask in masks)


def test_without_rescaling_there_is_one_caption_and_no_mask(
    config: CustomDiffusionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Draws] = []

    def record_draws(predict: Any, draws: Draws, schedule: Any) -> Tensor:
        calls.append(draws)
        return denoising_loss(predict, draws, schedule)

    monkeypatch.setattr(dvar.training.run, "denoising_loss", record_draws)
    personalise(replace(config, random_rescale=False, prior_loss_weight=0.0))
    assert all(draws.mask is None for draws in calls)
    assert len({tuple(ids.tolist()) for draws in calls for ids in draws.input_ids}) == 1


# Several concepts


@pytest.fixture
def several_concepts(config: CustomDiffusionConfig) -> CustomDiffusionConfig:
    return replace(
        config,
        placeholder_token="<new1>+<new2>",
        initializer_token="ktn+pll",
        instance_data_dir=None,
        class_noun=None,
        validation_prompt="a <new1> mug and a <new2> cat",
    )


def write_concepts_list(config: CustomDiffusionConfig, path: Path, *entries: Any) -> CustomDiffusionConfig:
    path.write_text(json.dumps(entries))
    return replace(config, concepts_list=str(path))


def test_several_concepts_are_read_with_their_images_captions_and_classes(
    several_concepts: CustomDiffusionConfig, tiny_images: Path, tmp_path: Path
) -> None:
    cats = tiny_concept(tmp_path / "cats", images=2)
    (cats / "01.txt").write_text("<new2> asleep")
    mugs, mug = str(tiny_images), {"instance_prompt": "photo of a <new1> mug", "class_prompt": "mug"}
    cat = {"instance_prompt": "photo of a <new2> cat", "class_prompt": "cat", "class_data_dir": mugs}
    config = write_concepts_list(
        several_concepts,
        tmp_path / "list.json",
        {**mug, "instance_data_dir": mugs},
        {**cat, "instance_data_dir": str(cats)},
    )
    concept = read_concept(config)
    assert len(concept.images) == len(set(concept.names)) == 6
    texts = [concept.texts(index) for index in range(6)]
    assert texts == [("photo of a <new1> mug",)] * 4 + [("photo of a <new2> cat",), ("<new2> asleep",)]
    assert concept.placeholder_tokens == ("<new1>", "<new2>")
    assert [(class_set.prompt, len(class_set.images)) for class_set in concept.classes] == [("mug", 0), ("cat", 4)]
    assert read_concept(replace(config, prior_loss_weight=0.0)).classes == ()


GOOD = {"instance_prompt": "a <new1> <new2>", "class_prompt": "mug", "instance_data_dir": "{images}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must be a list of one or more objects"),
        ("[]", "must be a list of one or more objects"),
        ("[3]", "must be a list of one or more objects"),
        ([{**GOOD, "class_promt": "x"}], "concept 1: unknown key 'class_promt': the nearest is class_prompt"),
        ([{**GOOD, "class_prompt": None}], "concept 1: class_prompt must be text, got None"),
        ([GOOD, {**GOOD, "instance_prompt": 3}], "concept 2: instance_prompt must be text, got 3"),
        (
            [{**GOOD, "instance_prompt": "a mug"}],
            "must contain one of the placeholder tokens <new1>, <new2>, got 'a mug'",
        ),
        ([{**GOOD, "instance_prompt": "a <new1>"}], "has no instance_prompt with <new2>"),
        ([{**GOOD, "instance_data_dir": "nowhere"}], "concept 1: instance_data_dir must be a folder with images"),
        ([{**GOOD, "class_data_dir": "nowhere"}], "concept 1: class_data_dir must be a folder"),
        ([{**GOOD, "class_data_dir": 7}], "concept 1: class_data_dir must be text, got 7"),
    ],
)
def test_an_invalid_concepts_list_is_the_only_problem_reported(
    several_concepts: CustomDiffusionConfig, tiny_images: Path, tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content).replace("{images}", str(tiny_images)))
    with pytest.raises(RefusedInput) as error:
        read_concept(replace(several_concepts, concepts_list=str(path)))
    (problem,) = error.value.problems
    assert message in problem


def test_a_missing_concepts_list_is_refused(several_concepts: CustomDiffusionConfig, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"nowhere\.json: No such file or directory; check the path"):
        read_concept(replace(several_concepts, concepts_list=str(tmp_path / "nowhere.json")))


def test_each_placeholder_token_has_its_own_initializer_and_prompts_are_expanded(backbone: Backbone) -> None:
    table = backbone.text_encoder.get_input_embeddings().weight.detach().clone()
    vocabulary = backbone.tokenizer.get_vocab()
    method = CustomDiffusion(backbone, {"<new1>": "mug", "<new2>": "cat"}, 2)
    assert method.expand("<new1> and <new2>") == "<new1> <new1>_1 and <new2> <new2>_1"
    ids = backbone.tokenize([method.expand("<new1> and <new2>")])
    with torch.no_grad():
        for index, token in enumerate(method.tokens):
            assert torch.equal(token.rows, table[vocabulary[("mug", "cat")[index] + "</w>"]].repeat(2, 1))
            token.rows.fill_(index + 1.0)
    vectors = backbone.text_encoder.get_input_embeddings()(ids)[0]
    assert vectors[1:6, 0].tolist() == [1, 1, vectors[3, 0], 2, 2]
    assert torch.equal(vectors[3], table[vocabulary["and</w>"]])
    files = method.files(method.state)
    assert [*files] == [EMBEDS, ATTENTION]
    assert [*files[EMBEDS]] == ["<new1>", "<new2>"]
