"""The words that a run learned: asked for in prompts, and handed on beside an exported LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.runs import export
from dvar.runs.generate import find_missing_word


def test_a_prompt_without_the_learned_word_is_warned_of() -> None:
    config = TextualInversionConfig(placeholder_token="<my-mug>")
    assert find_missing_word(config, "a photo of <my-mug> on the beach") == ""
    problem = find_missing_word(config, "a photo of my mug on the beach")
    assert problem.startswith("the prompt has no <my-mug>, by which this run's concept is called: ")
    assert problem.endswith("put it in, as in 'a photo of <my-mug>'")


def test_a_run_without_a_word_has_none_to_miss() -> None:
    config = DreamBoothLoraConfig(placeholder_token=None, instance_prompt="a photo of sks mug")
    assert find_missing_word(config, "a beach") == ""


@pytest.mark.parametrize("embeddings", [[], ["learned_embeds.safetensors"], ["learned_clip_embeds.safetensors"]])
def test_an_export_names_the_embeddings_beside_the_lora(
    embeddings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"weights": ["pytorch_lora_weights.safetensors", *embeddings]}
    monkeypatch.setattr(export, "load_result", lambda run: (None, weights))
    assert export.list_embeddings(tmp_path) == [tmp_path / name for name in embeddings]
