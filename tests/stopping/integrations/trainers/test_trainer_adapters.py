"""Adapters of trainers, each in a stand-in with the calls of the real loop in their real order."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dvar import Dvar, RefusedInput, Trace
from dvar.stopping.integrations.trainers.ai_toolkit import build_trainer
from dvar.stopping.integrations.trainers.held_loss import METRIC, HeldLossJudge, count_processes, pool_losses
from dvar.stopping.integrations.trainers.onetrainer import watch_trainers
from dvar.stopping.integrations.trainers.simpletuner import LoggedLossStop
from dvar.stopping.integrations.trainers.tools import TOOLS, Tool, integrate

WINDOW, EVERY, CAP = 60, 5, 400


def held_loss(updates: int) -> float:
    return 0.1 + 0.01 * math.exp(-updates / 20)


def find_stop(steps: range) -> int:
    """Return the step at which the rule stops when the loss is measured at ``steps``."""
    trace, rule = Trace(), Dvar(WINDOW, 0.15)
    for step in steps:
        trace.record(step, held_loss(step))
        if rule(trace).stop:
            return step
    raise AssertionError("the rule does not stop")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVAR_WINDOW", f"{WINDOW}")


# --- the judge ------------------------------------------------------------------------------------------------------


def test_the_judge_stops_where_the_rule_does_says_so_once_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = HeldLossJudge(tmp_path, WINDOW)
    judge.begin(0)
    steps = range(5, CAP, EVERY)
    answers = {step: judge(step, held_loss(step)) for step in steps if step < 60}
    again = HeldLossJudge(tmp_path, WINDOW)
    again.begin(55)
    answers |= {step: again(step, held_loss(step)) for step in steps if step >= 60}
    assert next(step for step, stop in answers.items() if stop) == find_stop(steps)
    assert capsys.readouterr().out == f"dvar: {again.verdict}\n"
    assert list(Trace.read(tmp_path / "trace.jsonl").metric(METRIC)[0]) == [*range(5, find_stop(steps) + 1, EVERY)]


def test_a_step_that_is_measured_twice_counts_once(tmp_path: Path) -> None:
    judge = HeldLossJudge(tmp_path, WINDOW)
    judge.begin(0)
    assert not judge(5, 0.5)
    assert not judge(5, 0.4)
    assert not judge(4, 0.3)
    assert Trace.read(tmp_path / "trace.jsonl").metric(METRIC)[1].tolist() == [0.5]


def test_a_fault_switches_the_judge_off_and_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_text("no trace")
    judge = HeldLossJudge(tmp_path, WINDOW)
    judge.begin(5)
    assert [judge(step, held_loss(step)) for step in range(5, CAP, EVERY)] == [False] * len(range(5, CAP, EVERY))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("dvar: ")
    assert line.endswith("training goes on without a stopping rule")
    assert (tmp_path / "trace.jsonl").read_text() == "no trace"


def test_one_of_several_processes_only_says_that_it_would_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = HeldLossJudge(tmp_path, WINDOW, may_stop=False)
    judge.begin(0)
    assert not any(judge(step, held_loss(step)) for step in range(5, CAP, EVERY))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "dvar: several processes train, and this one cannot stop them all: stop them by hand"
    ]


def test_processes_that_a_trainer_starts_itself_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneTrainer starts them without torchrun, and tells its group alone how many there are."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert count_processes() == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert count_processes() == 2


def test_settings_out_of_range_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="window must be a whole number of steps, 8 or more, got 3"):
        HeldLossJudge(tmp_path, 3)


def test_settings_of_the_environment_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVAR_THRESHOLD", "15 %")
    with pytest.raises(RefusedInput, match="DVAR_THRESHOLD must be numbers, got '60' and '15 %': correct or unset"):
        LoggedLossStop(SimpleNamespace(output_dir=str(tmp_path), max_train_steps=CAP))


def test_several_losses_are_pooled() -> None:
    assert pool_losses(0.5) == 0.5
    assert pool_losses({"loss/val/a": 1.0, "loss/val/b": 2.0}) == 1.5
    assert pool_losses({"loss/val/a": 1.0, "loss/val/pooled": 1.2, "loss/val/b": 2.0}) == 1.2
    assert pool_losses({"loss/validation_step/a": 1.0, "loss/validation_step/total_average": 1.3}) == 1.3


# --- ai-toolkit -----------------------------------------------------------------------------------------------------


class DiffusionTrainer:
    """A stand-in of ai-toolkit's trainer: the loop of BaseSDTrainProcess.run without a model."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], processes: int = 1) -> None:
        self.save_root, self.settings, self.calls = str(folder), settings, list[str]()
        self.accelerator = SimpleNamespace(
            num_processes=processes, is_main_process=True, end_training=lambda: self.calls.append("end_training")
        )
        self.logger = SimpleNamespace(finish=lambda: self.calls.append("finish"))
        self.progress_bar = SimpleNamespace(close=lambda: self.calls.append("close"))
        validation = SimpleNamespace(validate_every_n_steps=EVERY)
        self.train_config = SimpleNamespace(validation_config=validation, gradient_accumulation_steps=1)
        self.additional_logs: dict[str, float] = {}
        self.step_num = self.start_step = self.updates = 0

    def get_conf(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def hook_before_train_loop(self) -> None: ...

    def end_step_hook(self) -> None: ...

    def save(self, step: int | None = None) -> None:
        self.calls.append("save")

    def done_hook(self) -> None:
        self.calls.append("done")

    def validate(self) -> None:
        self.additional_logs["val/loss"] = held_loss(self.updates)

    def run(self) -> None:
        self.hook_before_train_loop()
        for step in range(self.step_num, CAP):
            self.step_num = step
            self.updates += 1
            if step == self.start_step or step % EVERY == 0:
                self.validate()
            self.additional_logs = {}
            self.step_num = step + 1
            self.end_step_hook()
        self.calls.append("cap")


def test_ai_toolkit_ends_at_the_stop_with_what_follows_its_loop(tmp_path: Path) -> None:
    trainer = build_trainer(DiffusionTrainer)(tmp_path, {"dvar.window": WINDOW})
    trainer.run()
    assert trainer.calls == ["close", "save", "finish", "end_training", "done"]
    assert trainer.step_num == trainer.updates == find_stop(range(1, CAP, EVERY))


def test_ai_toolkit_counts_updates_where_it_accumulates_gradients(tmp_path: Path) -> None:
    """It counts its steps by batches."""
    trainer = build_trainer(DiffusionTrainer)(tmp_path, {"dvar.window": WINDOW})
    trainer.train_config.gradient_accumulation_steps = 2
    trainer.hook_before_train_loop()
    for trainer.step_num in range(1, 10, 2):
        trainer.validate()
    assert [record["step"] for record in Trace.read(tmp_path / "trace.jsonl").records] == [1, 2, 3, 4, 5]


def test_only_the_main_process_of_ai_toolkit_keeps_the_trace(tmp_path: Path) -> None:
    for is_main in (True, False):  # the other comes later, to the same folder
        trainer = build_trainer(DiffusionTrainer)(tmp_path, {"dvar.window": WINDOW}, processes=2)
        trainer.accelerator.is_main_process = is_main
        trainer.hook_before_train_loop()
        trainer.validate()
    assert [path.name for path in tmp_path.iterdir()] == ["trace.jsonl"]
    assert len(Trace.read(tmp_path / "trace.jsonl")) == 1


def test_ai_toolkit_goes_on_to_its_cap_where_nothing_may_or_can_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = build_trainer(DiffusionTrainer)(tmp_path / "a", {"dvar.window": WINDOW}, processes=2)
    several.run()
    blind = build_trainer(DiffusionTrainer)(tmp_path / "b", {})
    blind.train_config.validation_config = None
    blind.validate = lambda: None
    blind.run()
    assert several.calls == blind.calls == ["cap"]
    assert "has no train.validation_config, so there is no loss to judge: add one" in capsys.readouterr().out


# --- SimpleTuner ----------------------------------------------------------------------------------------------------


def train_simpletuner(settings: Any, log: Callable[[Mapping[str, Any], int], None], start: int = 0) -> int:
    """Train as SimpleTuner's loop does, and return the steps made."""
    step = start
    while step < settings.max_train_steps:
        step += 1
        values: dict[str, Any] = {"train_loss": 0.5}
        if step % EVERY == 0:
            values |= {"loss/val/mug": 2.0, "loss/val/pooled": held_loss(step), "chart/loss/val/mug": object()}
        log(values, step)
    return step


def test_simpletuner_ends_at_the_stop_as_at_its_cap_and_resumes(tmp_path: Path) -> None:
    settings = SimpleNamespace(output_dir=str(tmp_path), max_train_steps=42)
    assert train_simpletuner(settings, LoggedLossStop(settings).log) == 42
    settings.max_train_steps = CAP
    assert train_simpletuner(settings, LoggedLossStop(settings).log, start=42) == find_stop(range(5, CAP, EVERY))


def test_simpletuner_on_several_processes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = SimpleNamespace(output_dir=str(tmp_path), max_train_steps=CAP)
    assert train_simpletuner(settings, LoggedLossStop(settings).log) == CAP


# --- OneTrainer -----------------------------------------------------------------------------------------------------


class GenericTrainer:
    """A stand-in of OneTrainer's trainer: its loop over batches, without a model."""

    def __init__(self, folder: Path, accumulation: int = 1) -> None:
        self.config = SimpleNamespace(workspace_dir=str(folder), gradient_accumulation_steps=accumulation)
        self.model = SimpleNamespace(train_progress=SimpleNamespace(global_step=0))
        self.scalars: list[str] = []
        self.stopped, self.reports = False, 0
        self.tensorboard = SimpleNamespace(add_scalar=lambda tag, value, step: self.scalars.append(tag))
        self.callbacks = SimpleNamespace(on_update_train_progress=self.count_report)
        self.commands = SimpleNamespace(stop=lambda: setattr(self, "stopped", True))

    def count_report(self, progress: Any, epoch_length: int, epochs: int) -> None:
        self.reports += 1

    def start(self) -> None:
        self.model.train_progress.global_step = 0

    def train(self) -> None:
        progress, accumulation = self.model.train_progress, self.config.gradient_accumulation_steps
        while progress.global_step < CAP * accumulation:
            self.tensorboard.add_scalar("loss/train_step", 0.5, progress.global_step)
            updates = (progress.global_step + 1) // accumulation
            if updates % EVERY == 0:
                for name in ("mug", "dog"):
                    self.tensorboard.add_scalar(
                        f"loss/validation_step/{name}", held_loss(updates), progress.global_step
                    )
            progress.global_step += 1
            self.callbacks.on_update_train_progress(progress, 10, 100)
            if self.stopped:
                return


@pytest.mark.parametrize("accumulation", [1, 2])
def test_onetrainer_is_stopped_as_by_its_button_at_the_update(tmp_path: Path, accumulation: int) -> None:
    class Watched(GenericTrainer): ...

    watch_trainers(Watched)
    trainer = Watched(tmp_path, accumulation)
    trainer.start()
    trainer.train()
    first = EVERY if accumulation == 1 else 0
    assert trainer.model.train_progress.global_step // accumulation == find_stop(range(first, CAP, EVERY))
    assert trainer.stopped
    assert trainer.reports == trainer.model.train_progress.global_step
    assert "loss/validation_step/mug" in trainer.scalars


# --- dvar integrate -------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(TOOLS))
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    marker = tmp_path / TOOLS[request.param].marker
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text("# of the tool\n")
    return request.param, tmp_path


def test_a_tool_gets_its_files_once_and_nothing_else_changes(checkout: tuple[str, Path]) -> None:
    name, folder = checkout
    tool = TOOLS[name]
    assert integrate(name, folder) == [folder / path for path in tool.files]
    assert integrate(name, folder) == []
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {tool.marker, *tool.files}
    assert (folder / tool.marker).read_text() == "# of the tool\n"
    assert tool.files or tool.steps


def test_what_is_no_checkout_no_tool_or_would_be_overwritten_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedInput, match="there is no tool 'onetrainr': the nearest is onetrainer"):
        integrate("onetrainr", tmp_path)
    with pytest.raises(RefusedInput, match=r"is no checkout of SimpleTuner, it lacks simpletuner/helpers/training/"):
        integrate("simpletuner", tmp_path)
    monkeypatch.setattr(TOOLS, "_items", dict(TOOLS))
    TOOLS.register("own", Tool("Own", "own.py", {"own.py": "new", "other.py": "new"}))
    (tmp_path / "own.py").write_text("old")
    with pytest.raises(RefusedInput, match=r"own\.py exists with another content: move it away, or keep it"):
        integrate("own", tmp_path)
    assert not (tmp_path / "other.py").exists()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Return a function that puts a stand-in of another program's module in place, with these attributes."""

    def add(name: str, **attributes: Any) -> ModuleType:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:end])) or ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), module)
        vars(module).update(attributes)
        return module

    return add


def write_file(name: str, folder: Path) -> Path:
    (path,) = TOOLS[name].files
    (folder / "file.py").write_text(TOOLS[name].files[path])
    return folder / "file.py"


def test_the_extension_of_ai_toolkit_is_a_trainer(tmp_path: Path, modules: Callable[..., ModuleType]) -> None:
    modules("toolkit.extension", Extension=object)
    modules("extensions_built_in.sd_trainer.DiffusionTrainer", DiffusionTrainer=DiffusionTrainer)
    (extension,) = runpy.run_path(str(write_file("ai-toolkit", tmp_path)))["AI_TOOLKIT_EXTENSIONS"]
    assert extension.uid == "dvar_trainer"
    assert issubclass(extension.get_process(), DiffusionTrainer)


def test_the_tracker_of_simpletuner_stops(tmp_path: Path, modules: Callable[..., ModuleType]) -> None:
    settings = SimpleNamespace(output_dir=str(tmp_path), max_train_steps=CAP)
    modules("accelerate.tracking", GeneralTracker=type("GeneralTracker", (), {}))
    tracker_state = SimpleNamespace(get_args=lambda: settings)
    modules("simpletuner.helpers.training.state_tracker", StateTracker=tracker_state)
    tracker = runpy.run_path(str(write_file("simpletuner", tmp_path)))["DvarTracker"]("run", logging_dir=None)
    assert tracker.tracker is tracker
    tracker.store_init_configuration({})
    stop = train_simpletuner(settings, lambda values, step: tracker.log(values, step=step))
    assert stop == find_stop(range(5, CAP, EVERY))


def test_the_starter_of_onetrainer_trains_with_the_rule(tmp_path: Path, modules: Callable[..., ModuleType]) -> None:
    class Watched(GenericTrainer): ...

    trainer = Watched(tmp_path)

    def main() -> None:
        trainer.start()
        trainer.train()

    modules("util.import_util", script_imports=lambda: None)
    modules("train", main=main)
    modules("modules.trainer.GenericTrainer", GenericTrainer=Watched)
    runpy.run_path(str(write_file("onetrainer", tmp_path)), run_name="__main__")
    assert trainer.stopped
