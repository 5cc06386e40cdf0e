"""The settings: their checks, messages, files and descriptions."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvar.config.fields import Range, canonical_settings, read_settings, replace_invalid_fields
from dvar.config.methods import PAPER_METHODS, CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig, problems
from dvar.errors import RefusedInput, nearest, suggest
from dvar.training.methods.registry import config_from_dict

VALID = TextualInversionConfig(instance_data_dir="images", initializer_token="mug")
LORA = DreamBoothLoraConfig(instance_data_dir="images", placeholder_token="<thing>", initializer_token="mug")
LORA_WITHOUT_TOKEN = DreamBoothLoraConfig(instance_data_dir="images", instance_prompt="a photo of sks dog")
LORA_PRIOR = replace(LORA_WITHOUT_TOKEN, with_prior_preservation=True, class_prompt="a photo of dog")
CUSTOM = CustomDiffusionConfig(instance_data_dir="images", class_noun="mug")
INVALID_ALPHA: dict[str, Any] = {"lora_alpha": 1.5}
INVALID_PART: dict[str, Any] = {"freeze_model": "all"}
SEVERAL = CustomDiffusionConfig(
    placeholder_token="<new1>+<new2>",
    initializer_token="ktn+pll",
    concepts_list="list.json",
    validation_prompt="a <new1> mug and a <new2> cat",
)


def test_valid_settings_have_no_problems() -> None:
    assert problems(VALID) == []
    assert replace_invalid_fields(VALID) == VALID


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": None}, "instance_data_dir is missing"),
        ({"initializer_token": None}, "initializer_token is missing"),
        ({"initializer_token": ""}, "initializer_token is missing"),
        ({"placeholder_token": "two words"}, "placeholder_token must be one word without spaces, got 'two words'"),
        ({"placeholder_token": ""}, "placeholder_token must be one word without spaces, got ''"),
        ({"validation_prompt": "a photo of a mug"}, "validation_prompt must contain the placeholder token <thing>"),
        ({"learnable_property": "mood"}, "learnable_property must be one of object, style, got 'mood'"),
        ({"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ({"num_vectors": 1.5}, "num_vectors must be a whole number, got 1.5"),
        ({"num_vectors": True}, "num_vectors must be a whole number, got True"),
        ({"resolution": 100}, "resolution must be a multiple of 8, got 100: try 96"),
        ({"resolution": 4}, "resolution must be at least 8, got 4"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0 and finite, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite, got inf"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"adam_beta2": 1}, "adam_beta2 must be at least 0 and below 1, got 1"),
        ({"center_crop": "yes"}, "center_crop must be true or false, got 'yes'"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be at least 1, got 0"),
        ({"checkpoints_total_limit": "all"}, "checkpoints_total_limit must be a whole number, got 'all'"),
        ({"lr_warmup_steps": 5}, "lr_warmup_steps must be 0 when lr_scheduler is constant, got 5"),
        ({"lr_warmup_steps": 9999, "lr_scheduler": "cosine"}, "lr_warmup_steps must be below max_train_steps (6100)"),
        ({"overwrite": True, "resume_from_checkpoint": "latest"}, "exclude each other"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, adamw8bit, sam, prodigy, got 'adam'"),
        ({"optimizer": "prodigy"}, "the rate that prodigy finds and is meant to be 1, got 0.01: add --learning_rate 1"),
        ({"sam_rho": 0.0}, "sam_rho must be above 0, got 0.0"),
        ({"report_to": "paper"}, "report_to must be one of none, tensorboard, wandb, got 'paper'"),
    ],
)
def test_an_invalid_setting_is_the_only_problem_reported(changes: dict[str, Any], message: str) -> None:
    (problem,) = problems(replace(VALID, **changes))
    assert message in problem
    assert "\n" not in problem


def test_all_problems_are_reported_at_once() -> None:
    config = TextualInversionConfig(num_vectors=0, resolution=100, lr_warmup_steps=5, learning_rate="fast")  # type: ignore[arg-type]
    names = sorted(problem.split()[0] for problem in problems(config))
    assert names == sorted(
        ["num_vectors", "learning_rate", "instance_data_dir", "initializer_token", "resolution", "lr_warmup_steps"]
    )


def test_an_ill_formed_setting_causes_no_problem_in_dependent_settings() -> None:
    # The default cap of 6100 stands in for the faulty one and would refuse this warm-up.
    config = replace(VALID, max_train_steps="many", lr_warmup_steps=7000, lr_scheduler="cosine")  # type: ignore[arg-type]
    assert problems(config) == ["max_train_steps must be a whole number, got 'many'"]
    assert replace_invalid_fields(config).max_train_steps == 6100


def test_every_setting_has_help_and_a_known_type() -> None:
    for config_class in PAPER_METHODS.values():
        for item in fields(config_class):
            assert item.metadata["help"].endswith(".")
        # An object fits no setting, so each reports a problem; a type without a message raises.
        objects: dict[str, Any] = {item.name: object() for item in fields(config_class)}
        assert len(problems(config_class(**objects))) == len(objects)


def test_the_sample_prompt_is_plain_by_default() -> None:
    assert VALID.sample_prompt == "a photo of <thing>"
    assert replace(VALID, learnable_property="style").sample_prompt == "a picture in the style of <thing>"
    assert replace(VALID, validation_prompt="<thing> at night").sample_prompt == "<thing> at night"
    assert LORA_WITHOUT_TOKEN.sample_prompt == "a photo of sks dog"
    assert LORA.sample_prompt == "a photo of <thing>"
    assert CUSTOM.sample_prompt == "photo of a <new1> mug"


@pytest.mark.parametrize(
    ("config", "subject", "learned"),
    [
        (VALID, "<thing>", "a new word"),
        (LORA, "<thing>", "a new word and a low-rank change of the denoising network's attention"),
        (LORA_WITHOUT_TOKEN, "a photo of sks dog", "a low-rank change of the denoising network's attention"),
        (
            replace(LORA_PRIOR, train_text_encoder=True),
            "a photo of sks dog",
            "a low-rank change of the denoising network's and the text encoder's attention",
        ),
        (CUSTOM, "<new1> mug", "a new word and new keys and values of cross-attention"),
        (replace(CUSTOM, freeze_model="crossattn"), "<new1> mug", "a new word and new cross-attention"),
        (SEVERAL, "<new1>, <new2>", "new words and new keys and values of cross-attention"),
    ],
)
def test_settings_describe_the_concept_and_what_is_learned(config: TrainingConfig, subject: str, learned: str) -> None:
    assert problems(config) == []
    assert (config.subject, config.learned) == (subject, learned)
    assert PAPER_METHODS[config.method] is type(config)


@pytest.mark.parametrize("config", [VALID, LORA, LORA_WITHOUT_TOKEN, LORA_PRIOR, CUSTOM, SEVERAL])
def test_settings_are_saved_as_plain_values_and_restored(config: TrainingConfig) -> None:
    values = json.loads(json.dumps({**config.to_dict(), "versions": {"dvar": "9"}, "of_another_version": 3}))
    assert config_from_dict(values) == config


def test_a_run_without_a_method_name_is_textual_inversion() -> None:
    assert config_from_dict({"placeholder_token": "<mug>"}) == TextualInversionConfig(placeholder_token="<mug>")
    with pytest.raises(RefusedInput, match="method 'hypernetwork'"):
        config_from_dict({"method": "hypernetwork"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(LORA, placeholder_token=None, initializer_token=None),
            "placeholder_token is missing: give a new word",
        ),
        (replace(LORA, initializer_token=None), "initializer_token is missing"),
        (replace(LORA, placeholder_token="two words"), "placeholder_token must be one word"),
        (
            replace(LORA, instance_prompt="a photo of sks dog"),
            "instance_prompt must contain the placeholder token <thing>",
        ),
        (replace(LORA_WITHOUT_TOKEN, initializer_token="dog"), "initializer_token needs a placeholder_token"),
        (replace(LORA_WITHOUT_TOKEN, num_vectors=2), "num_vectors must be 1 without a placeholder_token, got 2"),
        (replace(LORA, rank=0), "rank must be at least 1, got 0"),
        (replace(LORA, **INVALID_ALPHA), "lora_alpha must be a whole number, got 1.5"),
        (replace(CUSTOM, class_noun=None), "class_noun is missing"),
        (replace(CUSTOM, class_noun=" "), "class_noun is missing"),
        (
            replace(CUSTOM, instance_prompt="photo of a mug"),
            "instance_prompt must contain the placeholder token <new1>",
        ),
        (replace(CUSTOM, **INVALID_PART), "freeze_model must be one of crossattn_kv, crossattn, got 'all'"),
        (replace(CUSTOM, prior_loss_weight=-1.0), "prior_loss_weight must be at least 0, got -1.0"),
        (
            replace(CUSTOM, prior_loss_weight=0.0, class_data_dir="mugs"),
            "class_data_dir needs a prior_loss_weight above 0",
        ),
        (replace(LORA_PRIOR, class_prompt=None), "class_prompt is missing: with_prior_preservation needs"),
        (replace(LORA, class_prompt="a dog"), "class_prompt needs with_prior_preservation, got 'a dog' without it"),
        (replace(LORA, class_data_dir="dogs"), "class_data_dir needs with_prior_preservation, got 'dogs' without it"),
        (replace(LORA_PRIOR, prior_loss_weight=0.0), "prior_loss_weight must be above 0, got 0.0"),
        (replace(SEVERAL, class_noun="mug"), "class_noun is for one concept and concepts_list for several"),
        (replace(SEVERAL, instance_data_dir="x"), "instance_data_dir is for one concept and concepts_list for several"),
        (replace(SEVERAL, validation_prompt=None), "validation_prompt is missing: with a concepts_list"),
        (
            replace(SEVERAL, validation_prompt="a mug"),
            "validation_prompt must contain the placeholder token <new1> or <new2>",
        ),
        (replace(SEVERAL, initializer_token="ktn"), "initializer_token must give one word for each of <new1>+<new2>"),
        (replace(CUSTOM, initializer_token="ktn+pll"), "initializer_token must give one word for each of <new1>, got"),
        (replace(SEVERAL, placeholder_token="<new1>+"), "placeholder_token must be one word without spaces, got"),
        (
            replace(SEVERAL, placeholder_token="cat+cats", validation_prompt="cat"),
            "placeholder_token must join words of which none is part of another, got cat+cats",
        ),
        (
            replace(CUSTOM, placeholder_token="<new1>+<new2>", initializer_token="ktn+pll"),
            "placeholder_token must be one word without a concepts_list, got <new1>+<new2>",
        ),
        (replace(CUSTOM, max_grad_norm=0.0), "max_grad_norm must be above 0, got 0.0"),
        (replace(CUSTOM, validation_prompt="a mug"), "validation_prompt must contain the placeholder token <new1>"),
    ],
)
def test_an_invalid_setting_of_another_method_is_the_only_problem_reported(
    config: TrainingConfig, message: str
) -> None:
    (problem,) = problems(config)
    assert message in problem


def test_the_placeholder_token_of_custom_diffusion_has_its_diffusers_name() -> None:
    assert canonical_settings({"modifier-token": "<m>"}, CustomDiffusionConfig) == {"placeholder_token": "<m>"}
    with pytest.raises(RefusedInput, match="unknown setting 'modifier_token'"):
        canonical_settings({"modifier_token": "<m>"}, TextualInversionConfig)


@given(st.floats(), st.floats(allow_nan=False), st.floats(allow_nan=False), st.booleans())
def test_a_range_admits_only_finite_numbers_between_its_ends(
    value: float, low: float, high: float, above: bool
) -> None:
    if value in Range(low, high, above):
        assert low <= value < high
        assert not math.isinf(value) or value == low
        assert not (above and value == low)


def test_settings_accept_hyphens_and_aliases() -> None:
    assert canonical_settings({"learning-rate": 1, "train-data-dir": "x"}, TextualInversionConfig) == {
        "learning_rate": 1,
        "instance_data_dir": "x",
    }


def test_unknown_settings_are_named_with_the_nearest_known_one() -> None:
    with pytest.raises(RefusedInput) as error:
        canonical_settings({"learnin_rate": 1, "train_dir": 2, "seed": 3}, TextualInversionConfig)
    assert error.value.problems == (
        "unknown setting 'learnin_rate': the nearest known one is learning_rate",
        "unknown setting 'train_dir': the nearest known one is train_data_dir",
    )


def test_a_setting_given_with_its_alias_is_refused() -> None:
    with pytest.raises(RefusedInput, match="instance_data_dir is given twice"):
        canonical_settings({"instance_data_dir": "x", "train-data-dir": "y"}, TextualInversionConfig)


def test_a_word_is_suggested_only_where_it_is_near() -> None:
    assert nearest("learnin_rate", ["seed", "learning_rate"]) == "learning_rate"
    assert nearest("muug", ["mug", "rug"]) == "mug"
    assert [nearest("tabby", ["table"]), nearest("xyz", ["seed"]), nearest("xyz", [])] == ["", "", ""]
    assert suggest("sed", ["seed", "window"]) == "the nearest is seed"
    assert suggest("xyz", ["seed", "window"]) == "choose one of seed, window"
    with pytest.raises(RefusedInput, match="unknown setting 'xyz': none is like it, and --help lists them all"):
        canonical_settings({"xyz": 1}, TextualInversionConfig)


def test_a_settings_file_is_read_under_the_settings_own_names(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('train-data-dir = "images"\nlearning_rate = 5e-3\ncenter_crop = false\n', encoding="utf-8")
    assert read_settings(path, TextualInversionConfig) == {
        "instance_data_dir": "images",
        "learning_rate": 5e-3,
        "center_crop": False,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate 3", "is not valid TOML"),
        ("learnin_rate = 3", "unknown setting 'learnin_rate': the nearest known one is learning_rate"),
        ("[training]\nseed = 1", "unknown setting 'training'"),
    ],
)
def test_an_invalid_settings_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RefusedInput) as error:
        read_settings(path, TextualInversionConfig)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_settings_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"nowhere\.toml"):
        read_settings(tmp_path / "nowhere.toml", TextualInversionConfig)


def test_only_custom_diffusion_joins_placeholder_tokens_by_plus() -> None:
    assert SEVERAL.placeholder_tokens == ("<new1>", "<new2>")
    assert SEVERAL.initializer_tokens == ("ktn", "pll")
    assert CUSTOM.placeholder_tokens == ("<new1>",)
    assert replace(VALID, placeholder_token="c++").placeholder_tokens == ("c++",)
    assert LORA_WITHOUT_TOKEN.placeholder_tokens == ()


def test_only_a_run_with_class_images_has_a_prior() -> None:
    assert [config.effective_prior_weight for config in (VALID, LORA, LORA_WITHOUT_TOKEN, LORA_PRIOR, CUSTOM)] == [
        0,
        0,
        0,
        1,
        1,
    ]
    assert replace(CUSTOM, prior_loss_weight=0.0).effective_prior_weight == 0
