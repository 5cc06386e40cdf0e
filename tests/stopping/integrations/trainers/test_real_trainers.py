"""The seams of the adapters in the checkouts of the trainers themselves, where an environment variable names one."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dvar.stopping.integrations.trainers.tools import TOOLS, integrate


def find_checkout(tool: str) -> Path:
    variable = f"DVAR_{tool.upper().replace('-', '_')}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout of {TOOLS[tool].title}")
    return Path(os.environ[variable])


def find_methods(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def check_order(code: str, *parts: str) -> None:
    """Check that each part is in the code, after the one before it."""
    position = 0
    for part in parts:
        position = code.find(part, position) + 1
        assert position, part


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_checkout_is_known_by_its_marker(tool: str) -> None:
    checkout = find_checkout(tool)
    assert (checkout / TOOLS[tool].marker).is_file()
    for step in TOOLS[tool].steps:
        for script in re.findall(r"[\w/]+\.py", step):
            assert (checkout / script).is_file() or script in {Path(path).as_posix() for path in TOOLS[tool].files}


def test_ai_toolkit_validates_before_the_step_ends() -> None:
    checkout = find_checkout("ai-toolkit")
    methods = find_methods(checkout / "jobs/process/BaseSDTrainProcess.py")
    assert {"hook_before_train_loop", "save", "done_hook"} <= set(methods)
    assert "self.additional_logs['val/loss'] = " in ast.unparse(methods["validate"])
    run = ast.unparse(methods["run"])
    check_order(run, "self.hook_before_train_loop()", "self.hook_train_loop(", "self.validate()")
    check_order(run, "self.validate()", "self.step_num = step + 1", "self.end_step_hook()", "self.save()")
    check_order(run, "self.end_step_hook()", "self.logger.finish()", "self.accelerator.end_training()")
    extension = ast.unparse(find_methods(checkout / "toolkit/extension.py")["get_all_extensions"])
    assert "AI_TOOLKIT_EXTENSIONS" in extension
    assert (checkout / "extensions_built_in/sd_trainer/DiffusionTrainer.py").is_file()


def test_simpletuner_loads_the_tracker_by_its_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_checkout("simpletuner") / TOOLS["simpletuner"].marker
    loader = find_methods(source)["_load_custom_tracker"]
    trainer = tmp_path / TOOLS["simpletuner"].marker
    trainer.parent.mkdir(parents=True)
    trainer.touch()
    integrate("simpletuner", tmp_path)
    accelerate = pytest.importorskip("accelerate.tracking")
    settings = SimpleNamespace(output_dir=str(tmp_path), max_train_steps=9)
    state = ModuleType("simpletuner.helpers.training.state_tracker")
    vars(state)["StateTracker"] = SimpleNamespace(get_args=lambda: settings)
    for name in ("simpletuner", "simpletuner.helpers", "simpletuner.helpers.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, state.__name__, state)
    names: dict[str, Any] = {
        "GeneralTracker": accelerate.GeneralTracker,
        "Path": Path,
        "importlib": importlib,
        "inspect": inspect,
        "re": re,
        "sys": sys,
        "__file__": str(trainer),
        "Optional": object,
        "Dict": dict,
    }
    loader.returns = None
    for argument in loader.args.args:
        argument.annotation = None
    exec(compile(ast.Module([loader], []), str(source), "exec"), names)
    tracker = names["_load_custom_tracker"](None, "dvar_tracker", "run", None)
    tracker.log({"train_loss": 0.5}, step=1)
    tracker.log({"loss/val/mug": 0.5}, step=5)
    assert tracker.stop.judge.verdict.step == 5


def test_simpletuner_logs_its_evaluation_before_it_compares_the_cap() -> None:
    source = (find_checkout("simpletuner") / TOOLS["simpletuner"].marker).read_text(encoding="utf-8")
    check_order(
        source,
        "wandb_logs.update(tracker_table)",
        "self.accelerator.log(",
        'if self.state["global_step"] >= self.config.max_train_steps',
    )
    assert "StateTracker.set_args(self.config)" in source


def test_onetrainer_validates_then_reports_progress_then_looks_for_a_stop() -> None:
    checkout = find_checkout("onetrainer")
    methods = find_methods(checkout / TOOLS["onetrainer"].marker)
    check_order(
        ast.unparse(methods["train"]),
        "self.__validate(train_progress)",
        "train_progress.next_step(",
        "self.callbacks.on_update_train_progress(train_progress, ",
        "if self.commands.get_stop_command():",
    )
    assert "loss/validation_step/" in ast.unparse(methods["__validate"])
    assert "def main()" in (checkout / "scripts/train.py").read_text(encoding="utf-8")
    assert "gradient_accumulation_steps" in ast.unparse(methods["train"])


@pytest.mark.parametrize(
    ("tool", "path", "names"),
    [
        ("sd-scripts", "train_network.py", {"batch", "is_train", "text_encoders", "unet", "network", "vae"}),
        ("musubi-tuner", "src/musubi_tuner/training/trainer_base.py", {"batch", "latents", "noise", "transformer"}),
    ],
)
def test_process_batch_has_the_arguments_that_are_held(tool: str, path: str, names: set[str]) -> None:
    method = find_methods(find_checkout(tool) / path)["process_batch"]
    assert names <= {argument.arg for argument in method.args.args}
