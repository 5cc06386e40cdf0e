"""What every method promises, whichever it is: whole runs on the tiny model, over a table of methods."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dvar.config.training import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig, TrainingConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.sampling import sample
from dvar.errors import CheckpointError, RefusedInput
from dvar.runs.export import write_kohya_lora, write_merged_pipeline
from dvar.runs.load_model import load_personalised_backbone
from dvar.runs.report import write_report
from dvar.stopping.diagnosis import Reason
from dvar.stopping.trace import Trace
from dvar.testing import MethodContract, assert_only_the_method_moves, tiny_pipeline
from dvar.training.checkpoint import Checkpoint, latest_checkpoint
from dvar.training.loading_code import load_lines
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise
from dvar.training.run_layout import ATTENTION, EMBEDS, LORA, at_step
from dvar.training.weight_files import split_by_token, write_weights

CAP = 10
PROMPT = "a photo of <thing> on the beach"

METHODS: dict[str, TrainingConfig] = {
    "textual-inversion": TextualInversionConfig(initializer_token="mug", learning_rate=0.5),
    "dreambooth-lora": DreamBoothLoraConfig(
        placeholder_token="<thing>", initializer_token="mug", learning_rate=0.05, threshold=1e-9
    ),
    "lora-alone": DreamBoothLoraConfig(instance_prompt="a photo of white dog", learning_rate=0.05, threshold=1e-9),
    "lora-with-prior": DreamBoothLoraConfig(
        instance_prompt="a photo of white dog",
        with_prior_preservation=True,
        class_prompt="a photo of dog",
        num_class_images=2,
        train_text_encoder=True,
        lora_targets="attention+gates",
        learning_rate=0.05,
        gradient_accumulation_steps=2,
    ),
    "custom-diffusion": CustomDiffusionConfig(
        placeholder_token="<thing>",
        class_noun="mug",
        learning_rate=0.05,
        num_class_images=2,
        max_grad_norm=None,
        gradient_accumulation_steps=2,
    ),
    "two-subjects": CustomDiffusionConfig(
        placeholder_token="<thing>+<other>",
        initializer_token="mug+cat",
        learning_rate=0.05,
        num_class_images=2,
        max_grad_norm=None,
        concepts_list="both.json",
        validation_prompt="a photo of <thing> mug and <other> cat",
        num_vectors=2,
    ),
}
PRIOR = {"lora-with-prior", "custom-diffusion", "two-subjects"}
FILES = {
    "lora-with-prior": {LORA},
    "two-subjects": {"learned_embeds.thing.safetensors", "learned_embeds.other.safetensors", ATTENTION},
    "textual-inversion": {EMBEDS},
    "dreambooth-lora": {EMBEDS, LORA},
    "lora-alone": {LORA},
    "custom-diffusion": {EMBEDS, ATTENTION},
}


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str, tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TrainingConfig:
    return settings(name, tiny_model, tiny_images, tmp_path / "run")


def settings(name: str, model: Path, pictures: Path, folder: Path) -> TrainingConfig:
    config = METHODS[name]
    if isinstance(config, CustomDiffusionConfig) and config.concepts_list:
        config = replace(config, concepts_list=str(both(pictures, folder.with_name(f"{folder.name}.json"))))
    else:
        config = replace(config, instance_data_dir=str(pictures))
    return replace(
        config,
        pretrained_model_name_or_path=str(model),
        resolution=32,
        max_train_steps=CAP,
        window=8,
        threshold=1e-9,
        validation_steps=5,
        num_validation_images=1,
        num_inference_steps=2,
        checkpointing_steps=4,
        output_dir=str(folder),
    )


def both(pictures: Path, path: Path) -> Path:
    """A list of two subjects, who share their pictures and the pictures of the first one's class."""
    first = {"instance_prompt": "photo of a <thing> mug", "class_prompt": "mug", "class_data_dir": str(pictures)}
    second = {"instance_prompt": "photo of a <other> cat", "class_prompt": "cat"}
    path.write_text(json.dumps([{**each, "instance_data_dir": str(pictures)} for each in (first, second)]))
    return path


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each method, made when it is first asked for."""
    place = tmp_path_factory.mktemp("straight")

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            result = personalise(settings(name, tiny_model, tiny_images, place / name))
            assert result.verdict.reason is Reason.CAP
            self[name] = result.folder
            return result.folder

    return Made()


def weights(folder: Path, kind: str = "weights") -> dict[str, Tensor]:
    names = json.loads((folder / "result.json").read_text())[kind]
    return {key: part for name in names for key, part in load_file(folder / name).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, every field but the seconds."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    for kind in ("weights", "best_weights"):
        first, second = weights(one, kind), weights(other, kind)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert rows(one) == rows(other)
    pictures = sorted(path for name in ("samples", "class_images*") for path in one.glob(f"{name}/**/*.png"))
    assert pictures
    assert all(path.read_bytes() == (other / path.relative_to(one)).read_bytes() for path in pictures)
    ends = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert {**ends[0], "seconds": 0, "memory": 0} == {**ends[1], "seconds": 0, "memory": 0}


class Killed(BaseException):
    """The process dies here: nothing after it is carried out."""


def killed_at(number: int) -> Callable[[StepRecord], None]:
    def kill(step: StepRecord) -> None:
        if step.step == number:
            raise Killed

    return kill


kill = killed_at(6)


def test_a_run_leaves_its_weights_its_card_and_a_report(name: str, straight: dict[str, Path]) -> None:
    folder = straight[name]
    kept = json.loads((folder / "config.json").read_text())
    assert kept["method"] == METHODS[name].method
    assert Trace.read(folder / "trace.jsonl").header["method"] == METHODS[name].method
    best = json.loads((folder / "result.json").read_text())["best_step"]
    names = FILES[name] | {at_step(file, best) for file in FILES[name] if best != CAP}
    assert {path.name for path in folder.glob("*.safetensors")} == names
    assert bool([*folder.glob("class_images*")]) == (name in PRIOR)
    for key, tensor in weights(folder).items():
        assert tensor.dtype == torch.float32, key
    card = (folder / "README.md").read_text()
    assert all(line in card for line in load_lines(FILES[name]))
    assert METHODS[name].title in card
    assert str(folder) not in card
    report = write_report(folder).read_text()
    assert METHODS[name].title in report
    for file in FILES[name]:
        assert file in report


def test_what_is_trained_moves_and_nothing_else_does(config: TrainingConfig, tiny_model: Path) -> None:
    assert_only_the_method_moves(config, tiny_model)


def test_the_untouched_model_is_the_base_whatever_is_to_be_learned(straight: dict[str, Path]) -> None:
    """Training starts at the base model: the first L_det of runs with one caption in common is the same."""
    folders = [straight[name] for name in ("textual-inversion", "dreambooth-lora")]
    assert torch.equal(*(Checkpoint.read(folder / "checkpoint-0").state["<thing>"] for folder in folders))
    assert rows(folders[0])[0]["eval"] == rows(folders[1])[0]["eval"]


def test_one_seed_gives_one_run_and_another_seed_another(
    name: str, config: TrainingConfig, straight: dict[str, Path]
) -> None:
    torch.manual_seed(123)
    assert_same_run(straight[name], personalise(config).folder)
    other = personalise(replace(config, seed=1, overwrite=True, max_train_steps=9)).folder
    assert any(not torch.equal(part, weights(straight[name])[key]) for key, part in weights(other).items())


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step == 6 else pytest.mark.slow) for step in range(CAP + 1)]
)
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(
    name: str, config: TrainingConfig, straight: dict[str, Path], step: int
) -> None:
    with pytest.raises(Killed):
        personalise(config, [killed_at(step)])
    folder = Path(config.output_dir)
    assert latest_checkpoint(folder).step == (CAP if step == CAP else step // 4 * 4)
    assert not (folder / "result.json").exists()
    result = personalise(replace(config, resume_from_checkpoint="latest"))
    assert_same_run(straight[name], folder)
    assert {path.name for path in result.weights} == FILES[name]


def test_a_checkpoint_of_another_method_is_refused_with_the_difference(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    first, second = (settings(name, tiny_model, tiny_images, tmp_path) for name in ("dreambooth-lora", "lora-alone"))
    with pytest.raises(Killed):
        personalise(first, [kill])
    with pytest.raises(CheckpointError, match="placeholder_token was '<thing>' and is None"):
        personalise(replace(second, resume_from_checkpoint="latest"))
    custom = settings("custom-diffusion", tiny_model, tiny_images, tmp_path)
    with pytest.raises(CheckpointError, match="method was 'dreambooth-lora' and is 'custom-diffusion'"):
        personalise(replace(custom, resume_from_checkpoint="latest"))


def picture(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray[Any, Any]:
    seed = [torch.Generator().manual_seed(5)]
    return np.asarray(pipeline(prompt, generator=seed, height=32, width=32, num_inference_steps=2).images[0], dtype=int)


def test_a_stock_pipeline_loads_it_and_draws_our_picture(
    name: str, straight: dict[str, Path], tiny_model: Path
) -> None:
    folder, prompt = straight[name], "a photo of white dog" if name.startswith("lora") else PROMPT
    loaded = stock(tiny_model)
    base = picture(loaded, prompt)
    initial = picture(loaded, prompt.replace("<thing>", "mug"))
    for line in load_lines(FILES[name], str(folder)):
        exec(line, {"pipeline": loaded, "load_file": load_file})  # as the model card and the report print it
    learned = picture(loaded, prompt)
    (ours,) = sample(load_personalised_backbone(folder, device="cpu"), [prompt], [5], size=32, steps=2)
    assert furthest(ours, learned) <= 1
    assert furthest(learned, base) > 1
    assert furthest(learned, initial) > 1
    if name != "textual-inversion":  # the U-Net itself changed, whatever the prompt says
        assert furthest(picture(loaded, "a dark cat"), picture(stock(tiny_model), "a dark cat")) > 1


def stock(model: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def furthest(one: Any, other: Any) -> int:
    """The largest difference of two pictures in any pixel and channel, of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_a_merged_pipeline_draws_our_picture_by_itself(
    name: str, straight: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    prompt = "a photo of white dog" if name.startswith("lora") else PROMPT
    merged = stock(write_merged_pipeline(straight[name], tmp_path / "merged"))
    (ours,) = sample(load_personalised_backbone(straight[name], device="cpu"), [prompt], [5], size=32, steps=2)
    assert furthest(picture(merged, prompt), ours) <= 1
    assert furthest(picture(merged, prompt), picture(stock(tiny_model), prompt)) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert str(tiny_model.parent) not in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(RefusedInput, match="exists already"):
        write_merged_pipeline(straight[name], tmp_path / "merged")


@pytest.mark.parametrize(("name", "alpha"), [("lora-alone", None), ("lora-alone", 3), ("lora-with-prior", None)])
def test_a_kohya_file_read_by_stock_diffusers_draws_our_picture(
    tiny_model: Path, tiny_images: Path, straight: dict[str, Path], tmp_path: Path, name: str, alpha: int | None
) -> None:
    folder, prompt = straight[name], "a photo of white dog"
    if alpha:
        given: dict[str, Any] = {"lora_alpha": alpha}
        scaled = replace(settings(name, tiny_model, tiny_images, tmp_path / "run"), **given)
        folder = personalise(replace(scaled, max_train_steps=9, validation_steps=100)).folder
    path = write_kohya_lora(folder, tmp_path / "kohya.safetensors")
    kept, matrices = load_file(path), load_file(folder / LORA)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    own = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert len(kept) == len(matrices) * 3 // 2
    assert {key.split("_")[0] for key in kept} == {"lora"}
    assert torch.equal(kept[f"{layer}.lora_down.weight"], matrices[f"{own}.lora_A.weight"])
    assert torch.equal(kept[f"{layer}.lora_up.weight"], matrices[f"{own}.lora_B.weight"])
    assert kept[f"{layer}.alpha"].shape == ()
    assert float(kept[f"{layer}.alpha"]) == (alpha or 4)
    if name == "lora-with-prior":  # which adapts the feed-forward gates and the text encoder too
        for key in (
            layer.replace("attn1_to_out_0", "ff_net_0_proj"),
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ):
            assert {f"{key}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= kept.keys()
    other = stock(tiny_model)
    before = picture(other, prompt)
    other.load_lora_weights(str(tmp_path), weight_name=path.name)
    (ours,) = sample(load_personalised_backbone(folder, device="cpu"), [prompt], [5], size=32, steps=2)
    assert furthest(picture(other, prompt), ours) <= 1
    assert furthest(picture(other, prompt), before) > 1


def test_a_kohya_file_is_of_a_lora_and_new(straight: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"needs the LoRA of a dreambooth-lora run, and .* is of textual-inversion"):
        write_kohya_lora(straight["textual-inversion"], tmp_path / "kohya.safetensors")
    (tmp_path / "taken.ckpt").write_text("mine")
    with pytest.raises(RefusedInput) as told:
        write_kohya_lora(straight["lora-alone"], tmp_path / "taken.ckpt")
    assert len(told.value.problems) == 2
    assert (tmp_path / "taken.ckpt").read_text() == "mine"


def test_every_weight_file_names_its_base_by_what_is_in_it(
    name: str, straight: dict[str, Path], tiny_model: Path
) -> None:
    digest = load_backbone(tiny_model, device="cpu", mixed_precision="bf16").digest
    for path in straight[name].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            told = file.metadata()
        assert told["base_sha256"] == digest
        assert (told["base_model"], told["method"]) == (tiny_model.name, METHODS[name].method)
        assert path.stem.endswith(f"-steps-{told['step']}") or int(told["step"]) == CAP
    other = tiny_pipeline(straight[name].parent / "other-base", seed=1)
    assert load_backbone(other, device="cpu").digest != digest


def test_a_changed_base_is_told(name: str, straight: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(straight[name], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_model_name_or_path"] = str(tiny_pipeline(tmp_path / "other", seed=1))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="is not what .* was trained on"):
        load_personalised_backbone(folder, device="cpu")


def test_several_words_have_a_file_each_that_stock_diffusers_loads(tmp_path: Path, tiny_model: Path) -> None:
    vectors = {word: torch.randn(2, 32) for word in ("<new1>", "<new2>", "[new2]")}
    files = split_by_token({EMBEDS: vectors, ATTENTION: {"weight": torch.ones(1)}})
    assert list(files)[:2] == ["learned_embeds.new1.safetensors", "learned_embeds.new2.safetensors"]
    assert len(files) == 4
    assert split_by_token({EMBEDS: {"<one>": vectors["<new1>"]}}).keys() == {EMBEDS}
    words = {name: tensors for name, tensors in files.items() if name != ATTENTION}
    for name, tensors in words.items():
        write_weights(tmp_path / name, tensors)
    pipeline = stock(tiny_model)
    for line in load_lines(words, str(tmp_path)):
        exec(line, {"pipeline": pipeline})
    table = pipeline.text_encoder.get_input_embeddings().weight
    for word, rows in vectors.items():
        assert torch.equal(table[pipeline.tokenizer.convert_tokens_to_ids(word)], rows[0])


def test_the_model_of_an_earlier_step_is_its_checkpoints(name: str, straight: dict[str, Path]) -> None:
    backbone = load_personalised_backbone(straight[name], step=8, device="cpu")
    kept = Checkpoint.read(straight[name] / "checkpoint-8").state
    now = {**backbone.unet.state_dict(), **backbone.text_encoder.state_dict()}
    for key, tensor in kept.items():
        own = key.removeprefix("unet.").removeprefix("text_encoder.text_model.")
        own = own.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        if not key.startswith("<"):
            assert torch.equal(now[own], tensor)
    if "<thing>" in kept:
        learned = backbone.text_encoder.get_input_embeddings()
        rows = [learned.table.rows, learned.rows] if name == "two-subjects" else [learned.rows]
        assert all(torch.equal(part, kept[word]) for part, word in zip(rows, ("<thing>", "<other>"), strict=False))
    with pytest.raises(CheckpointError):
        load_personalised_backbone(straight[name], step=7)


def test_a_run_whose_weights_are_gone_is_refused(config: TrainingConfig, name: str, straight: dict[str, Path]) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    for file in ("config.json", "result.json"):
        (folder / file).write_bytes((straight[name] / file).read_bytes())
    with pytest.raises(RefusedInput, match="lacks its weights"):
        load_personalised_backbone(folder, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_and_resumes(config: TrainingConfig, precision: Any) -> None:
    half = replace(
        config,
        mixed_precision=precision,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
    )
    folder = personalise(half).folder
    assert {part.dtype for part in weights(folder).values()} == {torch.float32}
    values = Trace.read(folder / "trace.jsonl").values
    assert len(set(values.tolist())) > CAP // 2
    with pytest.raises(Killed):
        personalise(replace(half, overwrite=True), [kill])
    personalise(replace(half, resume_from_checkpoint="latest"))
    assert np.array_equal(Trace.read(folder / "trace.jsonl").values, values)


@pytest.mark.slow
def test_the_code_of_the_card_runs(name: str, straight: dict[str, Path], tiny_model: Path) -> None:
    card = (straight[name] / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace(tiny_model.name, str(tiny_model))
    subprocess.run([sys.executable, "-c", code], cwd=straight[name], check=True)
    with Image.open(straight[name] / "image.png") as drawn:
        assert drawn.size == (32, 32)


def test_nothing_that_a_run_leaves_is_a_pickle(name: str, straight: dict[str, Path]) -> None:
    left = {path.suffix for path in straight[name].rglob("*") if path.is_file()}
    assert left <= {".safetensors", ".json", ".jsonl", ".png", ".md", ".html"}
    for file in FILES[name]:
        with safe_open(straight[name] / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"


def test_settings_of_every_method_are_written_whole(name: str, straight: dict[str, Path]) -> None:
    kept = json.loads((straight[name] / "config.json").read_text())
    assert {"dvar", "torch"} <= kept.pop("versions").keys()
    assert kept.keys() == METHODS[name].to_dict().keys()


class TestTextualInversionContract(MethodContract):
    config = METHODS["textual-inversion"]


class TestDreamBoothLoraContract(MethodContract):
    config = METHODS["dreambooth-lora"]


class TestCustomDiffusionContract(MethodContract):
    config = METHODS["custom-diffusion"]
