"""The model card and the weight files of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.errors import NonFiniteLoss
from dvar.stopping.diagnosis import Reason
from dvar.stopping.verdict import Verdict
from dvar.training.model_card import write_model_card
from dvar.training.weight_files import write_weights

VERDICT = Verdict(True, Reason.CAP, 10, "FixedSteps(10)", {"max_steps": 10})


def test_the_file_holds_the_vectors_under_their_placeholder_token(tmp_path: Path) -> None:
    vectors = torch.arange(6.0).reshape(3, 2).T  # not contiguous, as a slice of a larger table may be
    write_weights(tmp_path / "learned_embeds.safetensors", {"<thing>": vectors})
    with safe_open(tmp_path / "learned_embeds.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("<thing>"), vectors)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_never_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(NonFiniteLoss, match="<thing>"):
        write_weights(tmp_path / "learned_embeds.safetensors", {"<thing>": torch.tensor([[1.0, value]])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "base", "loads"),
    [
        ("mini", None, "from_pretrained(str(dvar.mini.path()))\n"),
        (
            "mini-flow",
            None,
            'from_pretrained(str(dvar.mini.path("mini-flow")), text_encoder_3=None, tokenizer_3=None)\n',
        ),
        ("owner/model", "base_model: owner/model", 'from_pretrained("owner/model")'),
        ("/home/someone/models/sd15", None, 'from_pretrained("sd15")'),
    ],
)
def test_the_card_names_a_public_model_and_no_local_path(
    tmp_path: Path, model: str, base: str | None, loads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TextualInversionConfig(pretrained_model_name_or_path=model, initializer_token="mug")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: str(self).startswith("/home/someone") or exists(self))
    write_model_card(tmp_path, config, VERDICT, [tmp_path / "samples" / "step-000010" / "00.png"])
    card = (tmp_path / "README.md").read_text()
    head = card.split("---")[1]
    assert (base in head) if base else "base_model" not in head
    assert loads in card
    assert "/home" not in card
    assert "](samples/step-000010/00.png)" in card
    assert VERDICT.sentence in card


@pytest.mark.parametrize(
    ("head", "licence", "line"),
    [
        ("---\nlicense: creativeml-openrail-m\n---\n", "creativeml-openrail-m", "Licence: creativeml-openrail-m, that"),
        ("---\ntags: [x]\nlicense: mit\n---\n# model\n", "mit", "Licence: mit, that of the base model"),
        ("license: mit\n", None, "Licence: that of the base model, `base`"),
    ],
)
def test_the_card_states_the_licence_of_the_base_model_if_known(
    tmp_path: Path, head: str, licence: str | None, line: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(head)
    config = TextualInversionConfig(pretrained_model_name_or_path=str(tmp_path / "base"), initializer_token="mug")
    write_model_card(tmp_path, config, VERDICT, [])
    card = (tmp_path / "README.md").read_text()
    assert line in card
    assert (f"license: {licence}\n" in card.split("---")[1]) if licence else ("license" not in card.split("---")[1])


def test_the_card_of_the_bundled_model_states_its_licence(tmp_path: Path) -> None:
    write_model_card(tmp_path, TextualInversionConfig(initializer_token="mug"), VERDICT, [])
    assert "license: apache-2.0\n" in (tmp_path / "README.md").read_text().split("---")[1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DreamBoothLoraConfig(placeholder_token="<thing>"), False),
        (DreamBoothLoraConfig(placeholder_token="<thing>", with_prior_preservation=True, prior_loss_weight=0.5), True),
        (CustomDiffusionConfig(class_noun="mug"), True),
        (CustomDiffusionConfig(class_noun="mug", prior_loss_weight=0.0), False),
        (TextualInversionConfig(), False),
    ],
)
def test_the_card_states_the_prior_loss_weight_if_there_is_a_prior(
    tmp_path: Path, config: TrainingConfig, expected: bool
) -> None:
    write_model_card(tmp_path, config, VERDICT, [])
    assert ("| prior loss weight |" in (tmp_path / "README.md").read_text()) == expected


def test_whatever_a_prompt_holds_the_program_and_the_table_of_the_card_are_whole(tmp_path: Path) -> None:
    prompt = 'a "mug" | it\'s <thing>'
    config = DreamBoothLoraConfig(placeholder_token="<thing>", instance_prompt=prompt, validation_prompt=prompt)
    write_model_card(tmp_path, config, VERDICT, [])
    card = (tmp_path / "README.md").read_text()
    compile(card.split("```python")[1].split("```")[0], "card", "exec")
    rows = [line.replace("\\|", "") for line in card.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {3}
