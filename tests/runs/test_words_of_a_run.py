"""The words that a run learned: asked for in prompts, and handed on beside an exported LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.errors import RefusedInput
from dvar.runs import export
from dvar.runs.generate import find_missing_word
from dvar.training.loading_code import has_embedding


def test_a_prompt_without_the_learned_word_is_warned_of() -> None:
    config = TextualInversionConfig(placeholder_token="<my-mug>")
    assert find_missing_word(config, "a photo of <my-mug> on the beach") == ""
    problem = find_missing_word(config, "a photo of my mug on the beach")
    assert problem.startswith("the prompt has no <my-mug>, by which this run's concept is called: ")
    assert problem.endswith("put it in, as in 'a photo of <my-mug>'")


def test_a_run_without_a_word_has_none_to_miss() -> None:
    config = DreamBoothLoraConfig(placeholder_token=None, instance_prompt="a photo of sks mug")
    assert find_missing_word(config, "a beach") == ""


WORD, TWO, LORA = "learned_embeds.safetensors", "learned_clip_embeds.safetensors", "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("config", "family", "weights", "expected"),
    [
        (TextualInversionConfig(), "Stable Diffusion", [WORD], True),
        (TextualInversionConfig(), "Stable Diffusion XL", [TWO], True),
        (DreamBoothLoraConfig(placeholder_token="<it>"), "FLUX.1", [LORA, WORD], True),
        (DreamBoothLoraConfig(instance_prompt="a mug"), "FLUX.1", [LORA], False),
        (TextualInversionConfig(), "Latent Diffusion", [WORD], False),
        (CustomDiffusionConfig(), "Stable Diffusion", [WORD, "pytorch_custom_diffusion_weights.safetensors"], False),
        (
            TextualInversionConfig(),
            "Stable Diffusion",
            ["learned_embeds.a.safetensors", "learned_embeds.b.safetensors"],
            False,
        ),
    ],
)
def test_a_word_that_other_programs_can_use_is_exported(
    config: Any, family: str, weights: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_result", lambda run: (config, {"weights": weights, "family": family}))
    assert has_embedding(config.method, {"weights": weights, "family": family}) == expected
    problems = export.embedding_problems(tmp_path, tmp_path / "my-mug.safetensors")
    assert bool(problems) != expected
    assert all(
        "--embedding needs one new word that other programs can use by itself" in problem for problem in problems
    )


def test_the_embedding_has_the_layout_that_other_programs_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TextualInversionConfig(placeholder_token="<my-mug>", num_vectors=2)
    vectors = torch.randn(2, 768)
    save_file({"<my-mug>": vectors}, tmp_path / WORD)
    result: dict[str, Any] = {"weights": [WORD], "family": "Stable Diffusion"}
    monkeypatch.setattr(export, "load_result", lambda run: (config, result))
    monkeypatch.setattr(export, "load_weights", lambda run, names: [load_file(run / name) for name in names])
    file = export.write_embedding(tmp_path, tmp_path / "out" / "my-mug.safetensors")
    ((name, tensor),) = load_file(file).items()
    assert name == "emb_params"
    assert tensor.equal(vectors)
    assert export.describe_embedding(tmp_path, "my-mug") == [
        "ComfyUI: embedding:my-mug",
        "AUTOMATIC1111 and Forge: my-mug",
        "InvokeAI: <my-mug>",
    ]
    result |= {"weights": [TWO], "family": "Stable Diffusion 3"}
    both = {"clip_l": vectors, "clip_g": torch.randn(2, 1280)}
    save_file(both, tmp_path / TWO)
    written = load_file(export.write_embedding(tmp_path, tmp_path / "out" / "mug.safetensors"))
    assert {name: written[name].equal(part) for name, part in both.items()} == {"clip_l": True, "clip_g": True}
    (line,) = export.describe_embedding(tmp_path, "mug")
    assert line == "ComfyUI: embedding:mug in the text for CLIP, <my-mug> in that for T5"
    with pytest.raises(RefusedInput) as refused:
        export.write_embedding(tmp_path, tmp_path / "<my-mug>.bin")
    assert [problem.split(", got")[0] for problem in refused.value.problems] == [
        "--embedding must name a .safetensors file",
        "--embedding is what prompts call the word, in letters, digits, '.', '_' and '-'",
    ]
