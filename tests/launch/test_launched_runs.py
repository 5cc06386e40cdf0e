"""Launched scripts as a whole: resume, the best weights, trackers, the report, settings from a file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from command_line import dvar
from launched_script import NEVER, SCRIPTS, SOON, find_differences, launch, read_state, read_trace, write_script
from safetensors.torch import load_file

from dvar.launch.keep_best import BestWeights

RISING = ("optimizer.step()", "optimizer.step(); [p.data.mul_(1.0 + (global_step > 12)) for p in model.parameters()]")
"""A change with which the loss of the plain script rises after step 12."""


def test_a_resumed_script_continues_the_trace_as_if_it_had_not_ended(tmp_path: Path) -> None:
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    answer = launch("resume.py", tmp_path / "whole", "--checkpointing_steps", "12")
    assert answer.status == 0
    whole = read_trace(tmp_path / "whole")
    for folder, flags in (("off", ("--dvar_off",)), ("on", NEVER)):
        (tmp_path / folder).mkdir()
        shutil.copyfile(tmp_path / "whole" / "trace.jsonl", tmp_path / folder / "trace.jsonl")
        assert launch("resume.py", tmp_path / folder, "--resume_from_checkpoint", checkpoint, flags=flags).status == 0
    assert find_differences(read_state(tmp_path / "off"), read_state(tmp_path / "on")) == []
    resumed = read_trace(tmp_path / "on")
    assert resumed.steps.tolist() == whole.steps.tolist() == list(range(0, 24, 2))
    assert resumed.samples[:7].tolist() == whole.samples[:7].tolist()
    assert (tmp_path / "on" / "trace.jsonl.cut-12").exists()


def test_a_script_that_is_resumed_after_its_stop_ends_without_an_epoch(tmp_path: Path) -> None:
    mean = (
        "\n        if global_step >=",
        "\n        train_loss = sum(losses) / len(losses)\n        if global_step >=",
    )
    script = write_script(tmp_path, mean)
    assert launch(script, tmp_path / "out", flags=SOON).status == 0
    step = read_trace(tmp_path / "out").last_step
    script = write_script(tmp_path, mean, ("global_step = 0", f"global_step = {step}"))
    answer = launch(script, tmp_path / "out", flags=SOON)
    assert (answer.status, f"dvar: stop at step {step}: " in answer.err) == (0, True)
    assert read_state(tmp_path / "out")["losses"] == []


def test_the_losses_of_the_held_samples_are_those_of_the_script_on_them(tmp_path: Path) -> None:
    script = write_script(tmp_path, ("loss = compute_loss(model, ", "loss = (lambda model, x: x.mean())(model, "))
    script.write_text(
        script.read_text().replace(
            "accelerator.backward(loss)",
            "loss = loss + 0 * sum(p.sum() for p in model.parameters()); accelerator.backward(loss)",
        )
    )
    assert launch(script, tmp_path / "out").status == 0
    samples = read_trace(tmp_path / "out").samples
    assert (samples == samples[0]).all(), "a held sample is fixed, with its augmentation"
    assert len(set(samples[0].tolist())) == 8


def test_the_prior_loss_has_no_part_in_what_is_measured(tmp_path: Path) -> None:
    for weight in ("1", "1000"):
        assert launch("prior_preservation.py", tmp_path / weight, "--prior_loss_weight", weight).status == 0
        assert read_state(tmp_path / weight)["weight"] == float(weight)
    first, other = (read_trace(tmp_path / weight).samples[0].tolist() for weight in ("1", "1000"))
    assert first == other


def test_a_second_loop_is_left_alone(tmp_path: Path) -> None:
    script = write_script(tmp_path)
    source = script.read_text(encoding="utf-8")
    second = (
        "    for batch in train_dataloader:\n        accelerator.backward(compute_loss(model, batch['pixels']))\n"
        "        losses.append('second')\n"
    )
    script.write_text(
        source.replace("    accelerator.wait_for_everyone()\n", f"{second}    accelerator.wait_for_everyone()\n")
    )
    soon = ("--dvar_every", "1", "--dvar_window", "8", "--dvar_rule", "paper", "--dvar_threshold", "0.9")
    assert launch(script, tmp_path / "out", flags=soon).status == 0
    assert read_state(tmp_path / "out")["losses"][-5:] == ["second"] * 5


def test_the_best_weights_are_saved_beside_the_last(tmp_path: Path) -> None:
    script = write_script(tmp_path, RISING)
    flags = ("--dvar_every", "1", "--dvar_window", "20", "--dvar_threshold", "1e-9", "--dvar_keep_best")
    for folder, choice in (("off", ("--dvar_off",)), ("on", flags)):
        assert launch(script, tmp_path / folder, flags=choice).status == 0
    assert find_differences(read_state(tmp_path / "off"), read_state(tmp_path / "on")) == []
    trace = read_trace(tmp_path / "on")
    best = int(trace.steps[trace.values.argmin()])
    assert 0 < best < 23
    saved = tmp_path / "on" / "dvar-best"
    assert json.loads((saved / "step.json").read_text()) == {"step": best, "L_det": float(trace.values.min())}
    launch(script, tmp_path / "capped", "--max_train_steps", best, flags=("--dvar_off",))
    weights = load_file(saved / "weights.safetensors")
    (model,) = read_state(tmp_path / "capped")["models"]
    assert weights.keys() == model.keys()
    assert all(torch.equal(weights[name], model[name]) for name in model)
    answer = launch(script, tmp_path / "on", flags=flags)
    assert (answer.status, "which exists: move it away" in answer.err) == (2, True)


class Weights:
    """What an accelerator holds of one model with one weight."""

    is_main_process = True

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self._models, self._optimizers = [self.model], [torch.optim.SGD(self.model.parameters())]
        self._save_model_state_pre_hook: dict[str, object] = {}

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


@pytest.mark.parametrize(
    ("saved", "copied"),
    [
        (None, {3, 4}),  # the part before was killed, and its best weights are lost
        ('{"step": 1, "L_det": 0.4}', {4}),
        ('{"step": 1, "L_det": 0.2}', set()),
        ('{"step": 1, "L_det": NaN}', {3, 4}),
    ],
)
def test_a_resumed_script_keeps_what_is_better_than_the_weights_that_were_saved(
    saved: str | None, copied: set[int], tmp_path: Path
) -> None:
    if saved:
        (tmp_path / "dvar-best").mkdir()
        (tmp_path / "dvar-best" / "step.json").write_text(saved)
    best = BestWeights(Weights(), tmp_path, resumed=True)
    steps = set()
    for step, value in enumerate((math.nan, -math.inf, 0.5, 0.3), 1):
        best.consider(step, value)
        steps.add(best.step)
    assert steps - {None} == copied
    assert best.save() == (tmp_path / "dvar-best" if copied else None)


def test_the_best_weights_are_written_by_the_scripts_own_hook(tmp_path: Path) -> None:
    hook = (
        "    def save_hook(models, weights, folder):\n        from pathlib import Path\n"
        "        Path(folder, 'own.pt').write_bytes(b'x'); weights.pop()\n"
        "    accelerator.register_save_state_pre_hook(save_hook)\n    losses = []\n"
    )
    script = write_script(tmp_path, ("    losses = []\n", hook))
    assert launch(script, tmp_path / "out", flags=(*NEVER, "--dvar_keep_best")).status == 0
    assert {path.name for path in (tmp_path / "out" / "dvar-best").iterdir()} == {"own.pt", "step.json"}


def test_scalars_go_to_the_scripts_own_tracker(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert launch("plain.py", tmp_path / "out", "--report_to", "tensorboard").status == 0
    events = EventAccumulator(str(tmp_path / "out" / "plain"))
    events.Reload()
    trace = read_trace(tmp_path / "out")
    logged = {event.step: event.value for event in events.Scalars("dvar/L_det")}
    assert list(logged) == trace.steps.tolist()
    assert list(logged.values()) == pytest.approx(trace.values.tolist())
    assert len(events.Scalars("train_loss")) == 24


def test_a_report_is_written_and_dvar_report_writes_it_again(tmp_path: Path) -> None:
    answer = launch("plain.py", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    assert f"dvar: report    {page}" in answer.err
    assert "plain.py" in page.read_text(encoding="utf-8")
    content = page.read_bytes()
    page.unlink()
    again = dvar("report", tmp_path / "out")
    assert (again.status, again.out.strip()) == (0, str(page))
    assert page.read_bytes() == content


def test_nothing_but_the_named_files_is_written(tmp_path: Path) -> None:
    trace, report = tmp_path / "mine" / "curve.jsonl", tmp_path / "mine" / "page.html"
    launch("plain.py", tmp_path / "out", flags=(*NEVER, "--dvar_trace", trace, "--dvar_report", report))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["mine/curve.jsonl", "mine/page.html", "out/final-0.pt"]


def test_settings_come_from_a_file_and_a_flag_overrides_it(tmp_path: Path) -> None:
    settings = tmp_path / "dvar.toml"
    settings.write_text("dvar_every = 3\ndvar_window = 24\ndvar_held = 4\n")
    assert launch("plain.py", tmp_path / "out", flags=("--dvar-config", settings, "--dvar-held=5")).status == 0
    trace = read_trace(tmp_path / "out")
    assert trace.steps.tolist() == list(range(0, 24, 3))
    assert trace.samples.shape[1] == 5


def test_what_is_measured_is_reported_before_training(tmp_path: Path) -> None:
    line = launch("plain.py", tmp_path / "out").err.splitlines()[0]
    assert line.startswith("dvar: plain.py: the loop of line ")
    for part in (
        "over 10 samples of Images",
        "with the loss of line ",
        "L_det on 8 held samples every 2 steps",
        "Dvar(",
    ):
        assert part in line


def test_a_check_runs_nothing_and_says_what_fits(tmp_path: Path) -> None:
    answer = dvar("launch", "--check", SCRIPTS / "plain.py")
    assert answer.status == 0
    assert answer.out.startswith("plain.py: can be measured; loop ")
    assert dvar("launch", "--check", SCRIPTS / "other_counter.py").out.startswith("other_counter.py: can be measured; ")
    script = write_script(tmp_path, ("accelerator.backward(loss)", "loss.backward()"))
    answer = dvar("launch", "--check", script)
    assert answer.status == 2
    assert answer.out.startswith("script.py: the loss is taken from accelerator.backward(loss), got 'loss.backward()'")
    (tmp_path / "empty").mkdir()
    answer = dvar("launch", "--check", tmp_path / "empty")
    assert answer.out == "no script here has accelerator.backward(loss) in a loop\n"
    table = dvar("launch", "--check", SCRIPTS).out.splitlines()
    assert [line.split()[0] for line in table] == [
        "script",
        *sorted(path.name for path in SCRIPTS.glob("*.py") if ".backward(" in path.read_text()),
    ]
    assert sum("can be measured" in line for line in table) == len(table) - 1
