"""Many runs in one forward pass: each is the run that it would be alone, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_runs import LOSS, assert_equal_runs, load_weights, read_records
from safetensors.torch import load_file
from torch import Tensor

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.diffusion.objective import Draws
from dvar.errors import OutOfResources, RefusedInput
from dvar.jobs.base_models import BaseModels
from dvar.locks import lock_folder
from dvar.stopping.diagnosis import Reason
from dvar.stopping.trace import Trace
from dvar.testing import (
    tiny_concept,
    tiny_flux_pipeline,
    tiny_ldm_pipeline,
    tiny_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
)
from dvar.training.checkpoint import Checkpoint
from dvar.training.loop import StepRecord
from dvar.training.low_rank import adapters_of
from dvar.training.methods.registry import build_method
from dvar.training.pack import End, Pack, personalise_many
from dvar.training.pack_fit import problems
from dvar.training.personalise import load_base_model, personalise
from dvar.training.run import TrainingResult, TrainingRun
from dvar.training.run_layout import EMBEDS, checkpoint_name

CAP = 9


@pytest.fixture(scope="module")
def load() -> BaseModels:
    return BaseModels()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns a folder of so many images of one subject."""
    folder = tmp_path_factory.mktemp("concepts")
    return lambda count: tiny_concept(folder / str(count), images=count)


@pytest.fixture
def make(tiny_model: Path, images: Callable[[int], Path], tmp_path: Path) -> Callable[..., TrainingConfig]:
    """Returns the config of a run in a folder of this name."""

    def make_config(name: str, method: str = "textual-inversion", count: int = 3, **changes: Any) -> TrainingConfig:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_model),
            "instance_data_dir": str(images(count)),
            "resolution": 32,
            "max_train_steps": CAP,
            "window": 8,
            "threshold": 1e-9,
            "validation_steps": 5,
            "num_validation_images": 1,
            "num_inference_steps": 1,
            "checkpointing_steps": 4,
            "eval_batch_size": 4,
            "output_dir": str(tmp_path / name),
        }
        if method == "textual-inversion":
            return TextualInversionConfig(**{**settings, "initializer_token": "mug", **changes})
        prompt = {} if "placeholder_token" in changes else {"instance_prompt": "a photo of white dog"}
        return DreamBoothLoraConfig(**{**settings, **prompt, "learning_rate": 0.01, **changes})

    return make_config


def run_packed(configs: Sequence[TrainingConfig], size: int, load: BaseModels) -> dict[str, End]:
    """Return the ends of runs of one pack by the names of their folders, in the order in which they ended."""
    return {Path(folder).name: end for folder, end in personalise_many(configs, size, load=load)}


def run_alone(config: TrainingConfig, load: BaseModels) -> Path:
    return personalise(replace(config, output_dir=f"{config.output_dir}-alone"), load=load).folder


DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "textual-inversion": [
        {"count": 4, "max_train_steps": 10},
        {"count": 3, "seed": 5, "learning_rate": 0.1, "train_batch_size": 3},
        {"count": 2, "seed": 2, "num_vectors": 2, "max_train_steps": 16, "window": 15, "probe_every": 2},
    ],
    "dreambooth-lora": [
        {"count": 4, "max_train_steps": 10},
        {"count": 3, "seed": 5, "rank": 2, "lora_targets": "attention+gates", "train_batch_size": 3},
        {"count": 2, "seed": 2, "placeholder_token": "<thing>", "initializer_token": "mug", "lora_alpha": 8},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", DIFFERENT)
@pytest.mark.parametrize("size", [2, 3])
def test_packed_runs_are_the_runs_alone(
    method: str, size: int, make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    configs = [make(f"run-{number}", method, **changes) for number, changes in enumerate(DIFFERENT[method])]
    ends = run_packed(configs, size, load)
    assert len(ends) == 3  # of two places, the third run takes the one that is free first
    for config in configs:
        end = ends[Path(config.output_dir).name]
        assert isinstance(end, TrainingResult)
        assert (end.steps, end.verdict.reason) == (config.max_train_steps, Reason.CAP)
        assert_equal_runs(end.folder, run_alone(config, load))


@pytest.mark.slow
def test_methods_optimizers_priors_and_accumulation_share_passes_too(
    make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 2}
    configs = [
        make("plain", gradient_accumulation_steps=2, snr_gamma=5.0, max_grad_norm=0.1),
        make("sam", "dreambooth-lora", optimizer="sam", **prior, train_text_encoder=True),
        make("prodigy", "dreambooth-lora", optimizer="prodigy", learning_rate=1.0, caption_dropout=0.5),
    ]
    run_packed(configs, 3, load)
    for config in configs:
        assert_equal_runs(Path(config.output_dir), run_alone(config, load))


@pytest.mark.slow
def test_a_word_that_is_frozen_on_the_way_is_frozen_in_a_pack_for_its_own_run_only(
    make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    word = {"placeholder_token": "<thing>", "initializer_token": "mug", "max_train_steps": 20}
    configs = [
        make("pivotal", "dreambooth-lora", train_text_encoder_ti=True, **word),
        make("word", "dreambooth-lora", **word),
    ]
    run_packed(configs, 2, load)
    for config in configs:
        assert_equal_runs(Path(config.output_dir), run_alone(config, load))
    ends = [load_file(Path(config.output_dir) / EMBEDS)["<thing>"] for config in configs]
    before = [Checkpoint.read(Path(config.output_dir) / checkpoint_name(12)).state["<thing>"] for config in configs]
    assert [torch.equal(*pair) for pair in zip(before, ends, strict=True)] == [True, False]


@pytest.mark.slow
def test_neither_order_nor_number_of_places_matters_and_one_place_is_bit_for_bit_alone(
    make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    def configs(name: str) -> list[TrainingConfig]:
        return [make(f"{name}-{number}", seed=number, max_train_steps=CAP + number) for number in range(3)]

    for name, size in (("one", 1), ("two", 2), ("three", 3)):
        run_packed(configs(name), size, load)
    run_packed(configs("back")[::-1], 2, load)
    for number, config in enumerate(configs("one")):
        reference, packed = run_alone(config, load), Path(config.output_dir)
        assert read_records(packed) == read_records(reference)
        for key, weight in load_weights(packed).items():
            assert torch.equal(weight, load_weights(reference)[key])
        for name in ("two", "three", "back"):
            assert_equal_runs(packed.with_name(f"{name}-{number}"), reference)


@pytest.mark.slow
def test_each_run_stops_by_its_own_rule(make: Callable[..., TrainingConfig], load: BaseModels) -> None:
    configs = [make("early", threshold=0.9, max_train_steps=40), make("late", seed=1)]
    ends = run_packed(configs, 2, load)
    early = ends["early"]
    assert isinstance(early, TrainingResult)
    assert early.verdict.reason is Reason.STABILISED
    assert_equal_runs(early.folder, run_alone(configs[0], load))
    assert Trace.read(early.folder / "trace.jsonl").last_step == early.steps < 40


def test_updates_and_held_batches_share_passes(
    make: Callable[..., TrainingConfig], load: BaseModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    denoise = StableDiffusion.denoise

    def counting(base: StableDiffusion, noisy: Tensor, *rest: Any) -> Tensor:
        rows.append(len(noisy))
        return denoise(base, noisy, *rest)

    monkeypatch.setattr(StableDiffusion, "denoise", counting)
    run_packed([make("first"), make("second", "dreambooth-lora", train_batch_size=3)], 2, load)
    assert rows == [8, *[5, 8] * CAP]


def broken_draws(name: str, at_step: int, break_them: Callable[[Draws], Draws]) -> Callable[..., tuple[Draws, ...]]:
    """Return `TrainingRun.training_draws` that break those of one run at a step."""
    draw = TrainingRun.training_draws

    def draw_or_break(run: TrainingRun, step: int, first: int, count: int) -> tuple[Draws, ...]:
        draws = draw(run, step, first, count)
        return tuple(map(break_them, draws)) if (run.folder.name, step) == (name, at_step) else draws

    return draw_or_break


def fill_with_nan(draws: Draws) -> Draws:
    return replace(draws, moments=draws.moments * np.nan)


def fail_to_read(draws: Draws) -> Draws:
    raise OSError(5, "Input/output error", "image.png")


@pytest.mark.slow
@pytest.mark.parametrize("method", DIFFERENT)
def test_a_run_that_breaks_leaves_the_others_as_they_are(
    method: str, make: Callable[..., TrainingConfig], load: BaseModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("whole", "nan", "unread")
    for name in names:
        with monkeypatch.context() as patches:
            if name != "whole":
                break_them = fill_with_nan if name == "nan" else fail_to_read
                patches.setattr(TrainingRun, "training_draws", broken_draws(f"{name}-bad", 6, break_them))
            ends = run_packed([make(f"{name}-bad", method, seed=1), make(f"{name}-good", method)], 2, load)
            good, bad = ends[f"{name}-good"], ends[f"{name}-bad"]
            assert isinstance(good, TrainingResult)
            if name == "nan":
                assert isinstance(bad, TrainingResult)
                assert (bad.verdict.reason, bad.steps) == (Reason.NON_FINITE, 6)
            if name == "unread":
                assert isinstance(bad, OutOfResources)
    config = make("whole-good", method)
    reference = run_alone(config, load)
    whole, nan, unread = (read_records(Path(config.output_dir).with_name(f"{name}-good")) for name in names)
    # Until the break all passes are of the same samples, and in that of the break, one of them is not a number.
    assert nan[:6] == unread[:6] == whole[:6]
    updates = [{key: records[6][key] for key in ("train_loss", "grad_norm", "lr")} for records in (nan, whole)]
    assert updates[0] == updates[1]
    for name in names:  # afterwards the passes have fewer samples
        assert_equal_runs(reference.with_name(f"{name}-good"), reference)


def sibling(config: TrainingConfig, name: str, other: str) -> Path:
    folder = Path(config.output_dir)
    return folder.with_name(folder.name.replace(name, other))


def has_reached(steps: list[StepRecord]) -> bool:
    return any(step.step == 5 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("method", DIFFERENT)
def test_a_packed_run_resumes_bit_for_bit_in_the_same_pack_and_also_alone(
    method: str, make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    def configs(name: str, **changes: Any) -> list[TrainingConfig]:
        return [make(f"{name}-{number}", method, seed=number, **changes) for number in range(2)]

    run_packed(configs("whole"), 2, load)
    for name in ("packed", "alone"):
        reached: list[StepRecord] = []
        pack = Pack(load, partial(has_reached, reached))
        for config in configs(name):
            pack.add(config.output_dir, config, [reached.append])
        ends: dict[str, End] = {}
        while pack:
            ends |= pack.advance()
        for end in ends.values():
            assert isinstance(end, TrainingResult)
            assert (end.verdict.reason, end.weights) == (Reason.INTERRUPTED, ())
    resumed = configs("packed", resume_from_checkpoint="latest")
    run_packed(resumed, 2, load)
    for config in resumed:
        whole = sibling(config, "packed", "whole")
        assert read_records(Path(config.output_dir)) == read_records(whole)
        for key, weight in load_weights(whole).items():
            assert torch.equal(weight, load_weights(Path(config.output_dir))[key])
    for config in configs("alone", resume_from_checkpoint="latest"):
        personalise(config, load=load)
        whole = sibling(config, "alone", "whole")
        np.testing.assert_allclose(
            Trace.read(Path(config.output_dir) / "trace.jsonl").values,
            Trace.read(whole / "trace.jsonl").values,
            rtol=LOSS,
        )


def test_one_run_can_be_cancelled_and_the_others_go_on(make: Callable[..., TrainingConfig], load: BaseModels) -> None:
    pack, ends = Pack(load), dict[str, End]()
    for name in ("first", "second"):
        pack.add(name, make(name), [lambda step: pack.cancel("first") if step.step == 3 else None])
    while pack:
        ends |= pack.advance()
    steps = {name: (end.steps, end.verdict.reason) for name, end in ends.items() if isinstance(end, TrainingResult)}
    assert steps["second"] == (CAP, Reason.CAP)
    assert steps["first"][1] is Reason.INTERRUPTED
    assert steps["first"][0] < CAP


@pytest.mark.slow
def test_memory_that_runs_out_in_a_shared_pass_ends_each_run_with_what_to_do(
    make: Callable[..., TrainingConfig], load: BaseModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = StableDiffusion.denoise

    def denoise_few(base: StableDiffusion, noisy: Tensor, *rest: Any) -> Tensor:
        if len(noisy) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(base, noisy, *rest)

    monkeypatch.setattr(StableDiffusion, "denoise", denoise_few)
    for end in run_packed([make("first"), make("second")], 2, load).values():
        assert isinstance(end, OutOfResources)
        assert "try a smaller --pack" in str(end)
    with lock_folder(Path(make("first").output_dir)):  # which no run has kept
        pass


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "which LoRA alone may change, and use_dora scales its weights: train it without --pack"),
    ({"compile": True}, "which cannot be copied with compile True: drop it, or train it without --pack"),
    ({"quantize": "nf4"}, "which cannot be copied with quantize nf4: drop it, or train it without --pack"),
    ({"offload": True}, "which cannot be copied with offload True: drop it, or train it without --pack"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_share_a_pass_is_refused_by_name(
    changes: dict[str, Any], message: str, make: Callable[..., TrainingConfig], load: BaseModels
) -> None:
    config = make("run", "dreambooth-lora", **changes)
    with pytest.raises(RefusedInput, match=message):
        personalise_many([make("other"), config], 2, load=load)
    with pytest.raises(RefusedInput, match=message):
        Pack(load).add("run", config)
    assert not Path(config.output_dir).exists()


def test_a_pack_needs_a_place_and_one_base_model(make: Callable[..., TrainingConfig], load: BaseModels) -> None:
    with pytest.raises(RefusedInput, match="a pack must have at least one run, got 0: give another size"):
        personalise_many([make("run")], 0, load=load)
    pack = Pack(load)
    pack.add("run", make("run"))
    other = make("other", mixed_precision="bf16")
    assert not pack.fits(other)
    with pytest.raises(RefusedInput, match="one base model, precision and arithmetic, got others: add it later"):
        pack.add("other", other)
    pack.close()
    assert pack.fits(other)


def test_a_method_that_changes_more_of_the_network_than_by_lora_is_refused(
    make: Callable[..., TrainingConfig], tiny_model: Path
) -> None:
    config = CustomDiffusionConfig(class_noun="mug")
    assert "custom-diffusion trains its weights" in problems(config)[0]
    backbone = load_base_model(make("run"))
    build_method(config, backbone)
    with pytest.raises(RefusedInput, match=r"and here .*attn2.to_k.weight is trained or random"):
        adapters_of(backbone.denoiser)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "checkpointed": tiny_pipeline,
    "xl": tiny_xl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "ldm": tiny_ldm_pipeline,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_checkpointed_activations(
    family: str, make: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    model, load = FAMILIES[family](tmp_path / "model"), BaseModels()
    # AdamW's first step is as long for a gradient that is zero but for rounding, in either direction, as for any other.
    settings = {
        "pretrained_model_name_or_path": str(model),
        "gradient_checkpointing": family == "checkpointed",
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-3,
    }
    configs = [make(f"run-{seed}", "dreambooth-lora", seed=seed, **settings) for seed in range(2)]
    if family == "ldm":  # whose text encoder drops out at random while its word is learned
        configs = [make(f"run-{seed}", seed=seed, **settings) for seed in range(2)]
    run_packed(configs, 2, load)
    for config in configs:
        assert_equal_runs(Path(config.output_dir), run_alone(config, load))
