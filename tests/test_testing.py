"""The test helpers for other packages: contracts that can fail, and the tiny pipeline."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from dvar import Reason, Rule, Trace, Verdict
from dvar.logs.formats import LOG_FORMATS, LogFormat
from dvar.testing import WORDS, LogFormatContract, RuleContract, tiny_concept, tiny_pipeline, tiny_tokenizer

# --- contracts ------------------------------------------------------------------------------------------------------


def run_contract(suite: RuleContract | LogFormatContract, *arguments: object) -> set[str]:
    """Return the names of the tests of a contract that fail."""
    names = set()
    for test in dir(suite):
        if test.startswith("test_"):
            try:
                getattr(suite, test)(*arguments)
            except Exception:
                names.add(test)
    return names


@dataclass(eq=False)
class CountingRule:
    """A rule that counts its calls, and stops at every other one."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, trace: Trace) -> Verdict:
        self.calls.append(1)
        return Verdict(len(self.calls) % 2 == 0, Reason.CAP, trace.last_step, "Counting()", {"max_steps": 40})


@dataclass(frozen=True)
class HastyRule:
    """A rule that stops at once, says that it warms up, and calls the future stabilised."""

    def __call__(self, trace: Trace) -> Verdict:
        reason = Reason.STABILISED if len(trace) > 20 else Reason.WARMING_UP
        return Verdict(True, reason, trace.last_step + 1, "Hasty()", {"window": "8"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (CountingRule(), {"test_the_trace_is_its_only_state", "test_it_is_a_value"}),
        (
            HastyRule(),
            {
                "test_an_empty_trace_does_not_stop",
                "test_a_verdict_is_about_a_step_and_says_so",
                "test_it_does_not_stop_while_it_runs_or_warms_up",
                "test_a_metric_that_is_not_finite_is_never_stabilised",
            },
        ),
    ],
)
def test_a_rule_that_breaks_the_contract_fails_it(rule: Rule, expected: set[str]) -> None:
    suite = RuleContract()
    suite.rule = rule
    assert run_contract(suite) >= expected


@pytest.mark.filterwarnings("ignore:val_loss takes only")
def test_a_format_that_breaks_the_contract_fails_it(tmp_path: Path) -> None:
    class Suite(LogFormatContract):
        log_format = LogFormat("anything", lambda path: True, lambda path, step: iter([(0.5, 1, None)]))  # type: ignore[list-item]

        def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
            path = folder / "log.csv"
            path.write_text("step,val_loss\n" + "".join(f"{step},{value:.3f}\n" for step, value in curve.items()))
            return path

    expected = {
        "test_it_recognises_its_log_and_no_format_before_it_does",
        "test_it_recognises_no_foreign_file",
        "test_its_points_are_steps_names_and_values",
        "test_the_curve_is_read_as_it_was_recorded",
    }
    assert run_contract(Suite(), tmp_path) >= expected
    assert Suite.log_format not in LOG_FORMATS.values()


def test_the_contracts_import_no_model_library_and_no_pytest() -> None:
    program = (
        "import sys, dvar.testing; print(*{'torch', 'diffusers', 'transformers', 'PIL', 'pytest'} & {*sys.modules})"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "\n"


# --- the tiny pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64])
def test_stock_diffusers_loads_it_and_its_images_follow_the_prompt(tmp_path: Path, resolution: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline(tmp_path / "model", resolution=resolution), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipeline(["a red mug", "a dark cat"], generator=seeds, num_inference_steps=2).images
    assert [image.size for image in images] == [(resolution, resolution)] * 2
    assert not np.array_equal(*images)


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    digests = []
    for name, seed in (("first", 0), ("repeat", 0), ("reseeded", 1)):
        folder = tiny_pipeline(tmp_path / name, seed=seed)
        weights = sorted(folder.rglob("*.safetensors"))
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in weights])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_each_word_is_one_token_and_any_text_can_be_encoded() -> None:
    tokenizer = tiny_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    for text in ("mugs", "naïve 東京 <x>", "a1b2"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) > 1


def test_the_images_of_a_concept_differ(tmp_path: Path) -> None:
    folder = tiny_concept(tmp_path / "ball", images=5, size=48)
    images = [Image.open(path) for path in sorted(folder.iterdir())]
    assert [(image.size, image.mode) for image in images] == [((48, 48), "RGB")] * 5
    assert len({image.tobytes() for image in images}) == 5
