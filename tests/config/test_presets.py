"""The table of presets, and the order in which settings override each other."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dvar.config.methods import PAPER_METHODS, TextualInversionConfig
from dvar.config.presets import STEP_SETTINGS, TABLE, configure, configure_to_cap, preset_settings
from dvar.config.training import problems
from dvar.errors import RefusedInput
from dvar.stopping.rules import MIN_RECORDS
from dvar.training import rule


def test_the_papers_settings_are_the_published_ones() -> None:
    # Section 3.3 (N, alpha), Section 4.2 (steps, samples), and the released Textual Inversion command.
    paper = preset_settings("paper")
    published = {
        "window": 310,
        "threshold": 0.15,
        "eval_batch_size": 8,
        "max_train_steps": 6100,
        "validation_steps": 500,
        "num_validation_images": 8,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_weight_decay": 1e-2,
        "resolution": 512,
        "guidance_scale": 7.5,
    }
    assert paper.items() >= published.items()


def test_the_first_version_s_settings_are_those_of_its_command() -> None:
    """Its variance ratio was 0.39 over 282 steps on a held batch of 4; the effective learning rate is 4 times 5e-3."""
    first = preset_settings("v1")
    published = {"window": 282, "threshold": 0.39, "eval_batch_size": 4, "train_batch_size": 4, "learning_rate": 2e-2}
    assert first.items() >= {**published, "num_inference_steps": 200, "max_train_steps": 6100}.items()
    changed = {name for name, value in preset_settings("paper").items() if first[name] != value}
    assert changed == {*published, "num_inference_steps"}
    config = configure(
        {"preset": "v1", "instance_data_dir": "images", "initializer_token": "mug"}, TextualInversionConfig
    )
    assert problems(config) == []
    with pytest.raises(RefusedInput, match="preset must be one of lean, mini, mini-flow, paper, smoke, got 'v1'"):
        preset_settings("v1", "dreambooth-lora")


def test_every_row_is_a_unique_setting_with_a_source() -> None:
    rows = [(row.name, row.method, row.setting) for row in TABLE]
    assert len(set(rows)) == len(rows)
    assert all(row.source for row in TABLE)
    assert all(row.setting in {item.name for item in fields(PAPER_METHODS[row.method])} for row in TABLE)


REQUIRED = {
    "textual-inversion": {"initializer_token": "mug"},
    "dreambooth-lora": {"placeholder_token": "<thing>", "initializer_token": "mug"},
    "custom-diffusion": {"class_noun": "mug"},
}


@pytest.mark.parametrize("method", PAPER_METHODS)
@pytest.mark.parametrize("name", ["paper", "lean", "mini", "smoke"])
def test_every_preset_is_valid(name: str, method: str) -> None:
    config = configure({"preset": name, "instance_data_dir": "images", **REQUIRED[method]}, PAPER_METHODS[method])
    assert isinstance(config, PAPER_METHODS[method])
    assert problems(config) == []
    assert rule.problems(config) == []
    assert config.preset == name
    assert {key: getattr(config, key) for key in preset_settings(name, method)} == preset_settings(name, method)


@pytest.mark.parametrize(
    ("method", "published"),
    [
        # Section 3.3 (N, alpha), Section 4.2 (steps, samples), and the released commands.
        (
            "dreambooth-lora",
            {"window": 440, "threshold": 0.4, "max_train_steps": 1000, "learning_rate": 1e-3, "rank": 4},
        ),
        (
            "custom-diffusion",
            {"window": 180, "threshold": 0.15, "max_train_steps": 500, "learning_rate": 4e-5, "prior_loss_weight": 1.0},
        ),
    ],
)
def test_the_papers_settings_of_the_other_methods(method: str, published: dict[str, float]) -> None:
    shared = {"validation_steps": 100, "train_batch_size": 2, "guidance_scale": 6.0, "eval_batch_size": 8}
    assert preset_settings("paper", method).items() >= {**published, **shared}.items()


def test_the_default_preset_is_mini_for_the_bundled_model_and_lean_for_others() -> None:
    assert configure({}, TextualInversionConfig).preset == "mini"
    assert configure({"pretrained_model_name_or_path": "owner/model"}, TextualInversionConfig).preset == "lean"
    assert (
        configure({"pretrained_model_name_or_path": "owner/model", "preset": "mini"}, TextualInversionConfig).resolution
        == 64
    )
    assert configure({"preset": "paper"}, TextualInversionConfig).resolution == 512


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_lean_differs_from_paper_only_in_its_cadence_timesteps_and_samples(method: str) -> None:
    paper, lean = preset_settings("paper", method), preset_settings("lean", method)
    samples = {"validation_steps", "num_validation_images"}
    assert {name for name in paper if lean[name] != paper[name]} == {"probe_every", "eval_timesteps", *samples}
    assert {preset_settings(name, method)["eval_timesteps"] for name in ("lean", "mini")} == {"stratified"}
    assert lean.keys() == paper.keys()
    assert paper["probe_every"] == 1
    assert lean["window"] // lean["probe_every"] >= 9


def test_mini_flow_has_presets_of_its_own_for_the_methods_that_it_can() -> None:
    flow = {"pretrained_model_name_or_path": "mini-flow"}
    presets = {method: configure(flow, config_type).preset for method, config_type in PAPER_METHODS.items()}
    assert presets == {"textual-inversion": "mini-flow", "dreambooth-lora": "mini-flow", "custom-diffusion": "lean"}
    settings = {"initializer_token": "mug", "instance_data_dir": "images"}
    assert problems(configure(flow | settings, TextualInversionConfig)) == []


def test_settings_override_the_preset_and_the_preset_overrides_defaults() -> None:
    config = configure({"learning-rate": 0.5, "train_data_dir": Path("images")}, TextualInversionConfig)
    assert (config.learning_rate, config.instance_data_dir) == (0.5, "images")
    settings = {**preset_settings("mini"), "preset": "mini", "learning_rate": 0.5, "instance_data_dir": "images"}
    assert config == replace(TextualInversionConfig(), **settings)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        RefusedInput, match="preset must be one of lean, mini, mini-flow, paper, smoke, v1, got 'papr': try paper"
    ):
        configure({"preset": "papr"}, TextualInversionConfig)


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(RefusedInput, match="nearest known one is window"):
        configure({"widow": 3}, TextualInversionConfig)


@pytest.mark.parametrize("method", PAPER_METHODS)
@pytest.mark.parametrize("name", ["paper", "lean", "mini"])
def test_a_low_cap_scales_the_steps_of_a_preset_and_leaves_what_was_given(name: str, method: str) -> None:
    """Half of the step that a straight line is stopped at, window / sqrt(threshold), halves each number of steps."""
    config_type, values = PAPER_METHODS[method], {"preset": name, "instance_data_dir": "images", **REQUIRED[method]}
    preset = configure(values, config_type)
    suited = math.ceil(preset.window / math.sqrt(preset.threshold))
    for cap in (MIN_RECORDS + 1, 60, suited // 2, suited - 1):
        config, sentence = configure_to_cap({**values, "max_train_steps": cap}, config_type)
        assert (problems(config), rule.problems(config)) == ([], [])
        for setting in STEP_SETTINGS:
            exact = getattr(preset, setting) * cap / suited
            assert getattr(config, setting) == max(MIN_RECORDS if setting == "window" else 1, math.floor(exact))
        assert f"preset {name} is meant for caps from {suited} steps on, and is scaled to {cap}: window " in sentence
        assert replace(config, **{setting: getattr(preset, setting) for setting in STEP_SETTINGS}) == replace(
            preset, max_train_steps=cap
        )
    own = {"window": 30, "checkpointing_steps": 50}
    config, sentence = configure_to_cap({**values, "max_train_steps": 60, **own}, config_type)
    assert (config.window, config.checkpointing_steps) == (30, 50)
    assert "window" not in sentence.partition(":")[2]
    for others in ({}, {"max_train_steps": suited}, {"max_train_steps": 60, **dict.fromkeys(STEP_SETTINGS, 9)}):
        settings = {**values, **others}
        assert configure_to_cap(settings, config_type) == (configure(settings, config_type), "")


def test_a_cap_that_is_no_number_is_left_to_the_checks() -> None:
    config, sentence = configure_to_cap(
        {"max_train_steps": "many", "instance_data_dir": "images"}, TextualInversionConfig
    )
    assert vars(config)["max_train_steps"] == "many"
    assert sentence == ""


def test_smoke_shortens_the_preset_of_the_model() -> None:
    for model, own in (("mini", "mini"), ("mini-flow", "mini-flow"), ("owner/model", "lean")):
        values = {"pretrained_model_name_or_path": model}
        smoke, whole = (configure({**values, "preset": name}, TextualInversionConfig) for name in ("smoke", own))
        assert smoke == replace(whole, **preset_settings("smoke"), preset="smoke")
        assert (smoke.max_train_steps, smoke.resolution) == (20, whole.resolution)
