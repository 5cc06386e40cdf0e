"""The properties of every method: complete runs on the tiny model, over a table of methods."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
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
    "lora-without-token": DreamBoothLoraConfig(
        instance_prompt="a photo of white dog", learning_rate=0.05, threshold=1e-9
    ),
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
    "two-concepts": CustomDiffusionConfig(
        placeholder_token="<thing>+<other>",
        initializer_token="mug+cat",
        learning_rate=0.05,
        num_class_images=2,
        max_grad_norm=None,
        concepts_list="concepts.json",
        validation_prompt="a photo of <thing> mug and <other> cat",
        num_vectors=2,
    ),
}
PRIOR = {"lora-with-prior", "custom-diffusion", "two-concepts"}
FILES = {
    "lora-with-prior": {LORA},
    "two-concepts": {"learned_embeds.thing.safetensors", "learned_embeds.other.safetensors", ATTENTION},
    "textual-inversion": {EMBEDS},
    "dreambooth-lora": {EMBEDS, LORA},
    "lora-without-token": {LORA},
    "custom-diffusion": {EMBEDS, ATTENTION},
}


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str, tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TrainingConfig:
    return build_config(name, tiny_model, tiny_images, tmp_path / "run")


def build_config(name: str, model: Path, images: Path, folder: Path) -> TrainingConfig:
    config = METHODS[name]
    if isinstance(config, CustomDiffusionConfig) and config.concepts_list:
        config = replace(
            config, concepts_list=str(write_concepts_list(images, folder.with_name(f"{folder.name}.json")))
        )
    else:
        config = replace(config, instance_data_dir=str(images))
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


def write_concepts_list(images: Path, path: Path) -> Path:
    """Write a list of two concepts that share their images and the class images of the first."""
    mug = {"instance_prompt": "photo of a <thing> mug", "class_prompt": "mug", "class_data_dir": str(images)}
    cat = {"instance_prompt": "photo of a <other> cat", "class_prompt": "cat"}
    path.write_text(json.dumps([{**concept, "instance_data_dir": str(images)} for concept in (mug, cat)]))
    return path


@pytest.fixture(scope="module")
def reference_runs(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs by method, each trained on first use."""
    folder = tmp_path_factory.mktemp("reference")

    class ReferenceRuns(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            result = personalise(build_config(name, tiny_model, tiny_images, folder / name))
            assert result.verdict.reason is Reason.CAP
            self[name] = result.folder
            return result.folder

    return ReferenceRuns()


def load_weights(folder: Path, kind: str = "weights") -> dict[str, Tensor]:
    names = json.loads((folder / "result.json").read_text())[kind]
    return {key: part for name in names for key, part in load_file(folder / name).items()}


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without their seconds."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_run(folder: Path, other_folder: Path) -> None:
    for kind in ("weights", "best_weights"):
        weights, other_weights = load_weights(folder, kind), load_weights(other_folder, kind)
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert load_records(folder) == load_records(other_folder)
    images = sorted(path for name in ("samples", "class_images*") for path in folder.glob(f"{name}/**/*.png"))
    assert images
    assert all(path.read_bytes() == (other_folder / path.relative_to(folder)).read_bytes() for path in images)
    results = [json.loads((path / "result.json").read_text()) for path in (folder, other_folder)]
    assert {**results[0], "seconds": 0, "memory": 0} == {**results[1], "seconds": 0, "memory": 0}


class Killed(BaseException):
    """The process ends here: nothing after it is carried out."""


def kill_at(number: int) -> Callable[[StepRecord], None]:
    def kill(step: StepRecord) -> None:
        if step.step == number:
            raise Killed

    return kill


kill = kill_at(6)


def test_a_run_writes_its_weights_and_card_and_can_be_reported(name: str, reference_runs: dict[str, Path]) -> None:
    folder = reference_runs[name]
    saved_config = json.loads((folder / "config.json").read_text())
    assert saved_config["method"] == METHODS[name].method
    assert Trace.read(folder / "trace.jsonl").header["method"] == METHODS[name].method
    best = json.loads((folder / "result.json").read_text())["best_step"]
    names = FILES[name] | {at_step(file, best) for file in FILES[name] if best != CAP}
    assert {path.name for path in folder.glob("*.safetensors")} == names
    assert bool([*folder.glob("class_images*")]) == (name in PRIOR)
    for key, tensor in load_weights(folder).items():
        assert tensor.dtype == torch.float32, key
    card = (folder / "README.md").read_text()
    assert all(line in card for line in load_lines(FILES[name]))
    assert METHODS[name].title in card
    assert str(folder) not in card
    report = write_report(folder).read_text()
    assert METHODS[name].title in report
    for file in FILES[name]:
        assert file in report


def test_only_the_weights_of_the_method_change(config: TrainingConfig, tiny_model: Path) -> None:
    assert_only_the_method_moves(config, tiny_model)


def test_training_starts_at_the_base_model(reference_runs: dict[str, Path]) -> None:
    """Training starts at the base model: the first L_det of runs with one caption in common is the same."""
    folders = [reference_runs[name] for name in ("textual-inversion", "dreambooth-lora")]
    assert torch.equal(*(Checkpoint.read(folder / "checkpoint-0").state["<thing>"] for folder in folders))
    assert load_records(folders[0])[0]["eval"] == load_records(folders[1])[0]["eval"]


def test_runs_of_one_seed_are_equal_and_of_two_seeds_differ(
    name: str, config: TrainingConfig, reference_runs: dict[str, Path]
) -> None:
    torch.manual_seed(123)
    assert_same_run(reference_runs[name], personalise(config).folder)
    reseeded = personalise(replace(config, seed=1, overwrite=True, max_train_steps=9)).folder
    assert any(
        not torch.equal(part, load_weights(reference_runs[name])[key]) for key, part in load_weights(reseeded).items()
    )


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step == 6 else pytest.mark.slow) for step in range(CAP + 1)]
)
def test_a_run_killed_at_any_step_resumes_bit_for_bit(
    name: str, config: TrainingConfig, reference_runs: dict[str, Path], step: int
) -> None:
    with pytest.raises(Killed):
        personalise(config, [kill_at(step)])
    folder = Path(config.output_dir)
    assert latest_checkpoint(folder).step == (CAP if step == CAP else step // 4 * 4)
    assert not (folder / "result.json").exists()
    result = personalise(replace(config, resume_from_checkpoint="latest"))
    assert_same_run(reference_runs[name], folder)
    assert {path.name for path in result.weights} == FILES[name]


def test_a_checkpoint_of_another_method_is_refused_with_the_difference(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    with_token, without_token = (
        build_config(name, tiny_model, tiny_images, tmp_path) for name in ("dreambooth-lora", "lora-without-token")
    )
    with pytest.raises(Killed):
        personalise(with_token, [kill])
    with pytest.raises(CheckpointError, match="placeholder_token was '<thing>' and is None"):
        personalise(replace(without_token, resume_from_checkpoint="latest"))
    custom = build_config("custom-diffusion", tiny_model, tiny_images, tmp_path)
    with pytest.raises(CheckpointError, match="method was 'dreambooth-lora' and is 'custom-diffusion'"):
        personalise(replace(custom, resume_from_checkpoint="latest"))


def generate_image(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray[Any, Any]:
    seed = [torch.Generator().manual_seed(5)]
    return np.asarray(pipeline(prompt, generator=seed, height=32, width=32, num_inference_steps=2).images[0], dtype=int)


def test_a_stock_pipeline_loads_a_run_and_generates_the_same_image(
    name: str, reference_runs: dict[str, Path], tiny_model: Path
) -> None:
    folder, prompt = reference_runs[name], "a photo of white dog" if name.startswith("lora") else PROMPT
    pipeline = load_stock_pipeline(tiny_model)
    base = generate_image(pipeline, prompt)
    initial = generate_image(pipeline, prompt.replace("<thing>", "mug"))
    for line in load_lines(FILES[name], str(folder)):
        exec(line, {"pipeline": pipeline, "load_file": load_file})  # as the model card and the report print it
    actual = generate_image(pipeline, prompt)
    (expected,) = sample(load_personalised_backbone(folder, device="cpu"), [prompt], [5], size=32, steps=2)
    assert max_difference(expected, actual) <= 1
    assert max_difference(actual, base) > 1
    assert max_difference(actual, initial) > 1
    if name != "textual-inversion":  # the U-Net itself changed, whatever the prompt says
        assert (
            max_difference(
                generate_image(pipeline, "a dark cat"), generate_image(load_stock_pipeline(tiny_model), "a dark cat")
            )
            > 1
        )


def load_stock_pipeline(model: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def max_difference(first: Any, second: Any) -> int:
    """Return the largest difference of two images in any pixel and channel, of 255."""
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def test_a_merged_pipeline_generates_the_same_image(
    name: str, reference_runs: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    prompt = "a photo of white dog" if name.startswith("lora") else PROMPT
    merged = load_stock_pipeline(write_merged_pipeline(reference_runs[name], tmp_path / "merged"))
    (expected,) = sample(
        load_personalised_backbone(reference_runs[name], device="cpu"), [prompt], [5], size=32, steps=2
    )
    assert max_difference(generate_image(merged, prompt), expected) <= 1
    assert max_difference(generate_image(merged, prompt), generate_image(load_stock_pipeline(tiny_model), prompt)) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(tiny_model.parent) not in card
    assert "no safety checker" in card
    with pytest.raises(RefusedInput, match="exists already"):
        write_merged_pipeline(reference_runs[name], tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "alpha"), [("lora-without-token", None), ("lora-without-token", 3), ("lora-with-prior", None)]
)
def test_stock_diffusers_generates_the_same_image_from_a_kohya_file(
    tiny_model: Path, tiny_images: Path, reference_runs: dict[str, Path], tmp_path: Path, name: str, alpha: int | None
) -> None:
    folder, prompt = reference_runs[name], "a photo of white dog"
    if alpha:
        changes: dict[str, Any] = {"lora_alpha": alpha}
        scaled = replace(build_config(name, tiny_model, tiny_images, tmp_path / "run"), **changes)
        folder = personalise(replace(scaled, max_train_steps=9, validation_steps=100)).folder
    path = write_kohya_lora(folder, tmp_path / "kohya.safetensors")
    tensors, matrices = load_file(path), load_file(folder / LORA)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    lora_layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert len(tensors) == len(matrices) * 3 // 2
    assert {key.split("_")[0] for key in tensors} == {"lora"}
    assert torch.equal(tensors[f"{layer}.lora_down.weight"], matrices[f"{lora_layer}.lora_A.weight"])
    assert torch.equal(tensors[f"{layer}.lora_up.weight"], matrices[f"{lora_layer}.lora_B.weight"])
    assert tensors[f"{layer}.alpha"].shape == ()
    assert float(tensors[f"{layer}.alpha"]) == (alpha or 4)
    if name == "lora-with-prior":  # which adapts the feed-forward gates and the text encoder too
        for key in (
            layer.replace("attn1_to_out_0", "ff_net_0_proj"),
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ):
            assert {f"{key}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= tensors.keys()
    pipeline = load_stock_pipeline(tiny_model)
    before = generate_image(pipeline, prompt)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    (expected,) = sample(load_personalised_backbone(folder, device="cpu"), [prompt], [5], size=32, steps=2)
    assert max_difference(generate_image(pipeline, prompt), expected) <= 1
    assert max_difference(generate_image(pipeline, prompt), before) > 1


def test_a_kohya_file_needs_a_lora_and_a_new_path(reference_runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"needs the LoRA of a dreambooth-lora run, and .* is of textual-inversion"):
        write_kohya_lora(reference_runs["textual-inversion"], tmp_path / "kohya.safetensors")
    (tmp_path / "taken.ckpt").write_text("mine")
    with pytest.raises(RefusedInput) as error:
        write_kohya_lora(reference_runs["lora-without-token"], tmp_path / "taken.ckpt")
    assert len(error.value.problems) == 2
    assert (tmp_path / "taken.ckpt").read_text() == "mine"


def test_identical_runs_leave_identical_files(
    name: str, config: TrainingConfig, reference_runs: dict[str, Path]
) -> None:
    """All but what was measured with a clock, which stands under names of its own."""

    def read(folder: Path) -> dict[str, Any]:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
        return {path.relative_to(folder).as_posix(): read_content(path) for path in paths}

    def read_content(path: Path) -> Any:
        if path.suffix == ".jsonl":
            return [drop_times(json.loads(line)) for line in path.read_text().splitlines()]
        return drop_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    def drop_times(value: Any) -> Any:
        if isinstance(value, list):
            return [drop_times(item) for item in value]
        dropped = ("seconds", "memory", "output_dir", "concepts_list")
        if isinstance(value, dict):
            return {key: drop_times(item) for key, item in value.items() if key not in dropped}
        return value

    first, second = read(reference_runs[name]), read(personalise(config).folder)
    assert second.keys() <= first.keys(), "other tests write into the first"
    assert [path for path in second if first[path] != second[path]] == []


@pytest.mark.parametrize("damage", ["not finite", "other shape", "other names", "none listed", "elsewhere"])
def test_damaged_weights_are_exported_in_no_form(damage: str, reference_runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(reference_runs["lora-without-token"], tmp_path / "run"))
    with safe_open(run / LORA, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(run / LORA)
    key = sorted(tensors)[0]
    result = json.loads((run / "result.json").read_text())
    if damage == "not finite":
        tensors[key][0, 0] = torch.nan
    elif damage == "other shape":
        tensors[key] = tensors[key][:, 1:].contiguous()
    elif damage == "other names":
        tensors = {f"text_encoder.{name}": tensor for name, tensor in tensors.items()}
    else:
        result["weights"] = [] if damage == "none listed" else [f"../run/{LORA}"]
    save_file(tensors, run / LORA, metadata)
    (run / "result.json").write_text(json.dumps(result))
    exports: list[Callable[[], object]] = [lambda: write_merged_pipeline(run, tmp_path / "merged")]
    if damage != "other shape":  # kohya's file has the shapes of the run's, whatever the base model is
        exports.append(lambda: write_kohya_lora(run, tmp_path / "kohya.safetensors"))
    exports.append(lambda: load_personalised_backbone(run, device="cpu"))
    for export in exports:
        with pytest.raises(RefusedInput, match=r"train again|restore"):
            export()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_weight_file_states_the_digest_of_its_base(
    name: str, reference_runs: dict[str, Path], tiny_model: Path
) -> None:
    digest = load_backbone(tiny_model, device="cpu", mixed_precision="bf16").digest
    for path in reference_runs[name].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["base_sha256"] == digest
        assert (metadata["base_model"], metadata["method"]) == (tiny_model.name, METHODS[name].method)
        assert path.stem.endswith(f"-steps-{metadata['step']}") or int(metadata["step"]) == CAP
    other_base = tiny_pipeline(reference_runs[name].parent / "other-base", seed=1)
    assert load_backbone(other_base, device="cpu").digest != digest


def test_a_changed_base_raises_a_warning(name: str, reference_runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(reference_runs[name], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_model_name_or_path"] = str(tiny_pipeline(tmp_path / "other", seed=1))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="is not what .* was trained on"):
        load_personalised_backbone(folder, device="cpu")


def test_each_placeholder_token_has_a_file_that_stock_diffusers_loads(tmp_path: Path, tiny_model: Path) -> None:
    vectors = {token: torch.randn(2, 32) for token in ("<new1>", "<new2>", "[new2]")}
    files = split_by_token({EMBEDS: vectors, ATTENTION: {"weight": torch.ones(1)}})
    assert list(files)[:2] == ["learned_embeds.new1.safetensors", "learned_embeds.new2.safetensors"]
    assert len(files) == 4
    assert split_by_token({EMBEDS: {"<one>": vectors["<new1>"]}}).keys() == {EMBEDS}
    vector_files = {name: tensors for name, tensors in files.items() if name != ATTENTION}
    for name, tensors in vector_files.items():
        write_weights(tmp_path / name, tensors)
    pipeline = load_stock_pipeline(tiny_model)
    for line in load_lines(vector_files, str(tmp_path)):
        exec(line, {"pipeline": pipeline})
    table = pipeline.text_encoder.get_input_embeddings().weight
    for token, token_rows in vectors.items():
        assert torch.equal(table[pipeline.tokenizer.convert_tokens_to_ids(token)], token_rows[0])


def test_the_model_of_an_earlier_step_is_that_of_its_checkpoint(name: str, reference_runs: dict[str, Path]) -> None:
    backbone = load_personalised_backbone(reference_runs[name], step=8, device="cpu")
    state = Checkpoint.read(reference_runs[name] / "checkpoint-8").state
    weights = {**backbone.denoiser.state_dict(), **backbone.text_encoder.state_dict()}
    for key, tensor in state.items():
        weight_name = key.removeprefix("unet.").removeprefix("text_encoder.text_model.")
        weight_name = weight_name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        if not key.startswith("<"):
            assert torch.equal(weights[weight_name], tensor)
    if "<thing>" in state:
        embeddings = backbone.text_encoder.get_input_embeddings()
        vectors = [embeddings.table.rows, embeddings.rows] if name == "two-concepts" else [embeddings.rows]
        assert all(
            torch.equal(part, state[token]) for part, token in zip(vectors, ("<thing>", "<other>"), strict=False)
        )
    with pytest.raises(CheckpointError):
        load_personalised_backbone(reference_runs[name], step=7)


def test_a_run_without_its_weights_is_refused(
    config: TrainingConfig, name: str, reference_runs: dict[str, Path]
) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    for file in ("config.json", "result.json"):
        (folder / file).write_bytes((reference_runs[name] / file).read_bytes())
    with pytest.raises(RefusedInput, match="lacks its weights"):
        load_personalised_backbone(folder, device="cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fp16 on a CPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_and_resumes(config: TrainingConfig, precision: Any) -> None:
    half_config = replace(
        config,
        mixed_precision=precision,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
    )
    folder = personalise(half_config).folder
    assert {part.dtype for part in load_weights(folder).values()} == {torch.float32}
    values = Trace.read(folder / "trace.jsonl").values
    assert len(set(values.tolist())) > CAP // 2
    with pytest.raises(Killed):
        personalise(replace(half_config, overwrite=True), [kill])
    personalise(replace(half_config, resume_from_checkpoint="latest"))
    assert np.array_equal(Trace.read(folder / "trace.jsonl").values, values)


@pytest.mark.slow
def test_the_code_of_the_card_runs(name: str, reference_runs: dict[str, Path], tiny_model: Path) -> None:
    card = (reference_runs[name] / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace(tiny_model.name, str(tiny_model))
    subprocess.run([sys.executable, "-c", code], cwd=reference_runs[name], check=True)
    with Image.open(reference_runs[name] / "image.png") as image:
        assert image.size == (32, 32)


def test_a_run_writes_no_pickle(name: str, reference_runs: dict[str, Path]) -> None:
    suffixes = {path.suffix for path in reference_runs[name].rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png", ".md", ".html"}
    for file in FILES[name]:
        with safe_open(reference_runs[name] / file, "pt") as weights:
            assert weights.metadata()["format"] == "pt"


def test_all_settings_of_every_method_are_saved(name: str, reference_runs: dict[str, Path]) -> None:
    saved_config = json.loads((reference_runs[name] / "config.json").read_text())
    assert {"dvar", "torch"} <= saved_config.pop("versions").keys()
    assert saved_config.keys() == METHODS[name].to_dict().keys()


class TestTextualInversionContract(MethodContract):
    config = METHODS["textual-inversion"]


class TestDreamBoothLoraContract(MethodContract):
    config = METHODS["dreambooth-lora"]


class TestCustomDiffusionContract(MethodContract):
    config = METHODS["custom-diffusion"]
