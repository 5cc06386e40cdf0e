"""Settings of `dvar launch`, with their help and checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvar.config.fields import BATCH, COUNT, SEED, Config, invalid_fields, setting
from dvar.config.training import TrainingConfig
from dvar.errors import DvarError, RefusedInput, first_line, suggest
from dvar.stopping.rule import RULE_DEFAULTS, build_rule
from dvar.stopping.rules import MIN_RECORDS, RULES, Rule, schedule_problems
from dvar.stopping.trace import Trace

TRACE = "trace.jsonl"
"""Name of the trace in the output folder of a script."""
COMPARED = ("script", "held", "seed")
"""What must be the same for a trace to be continued: the losses are those of the same samples."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Config):
    """Every setting of ``dvar launch``.

    Source: window and threshold are those of Textual Inversion; eight held samples are the paper's.
    """

    dvar_every: int = setting(5, "Steps between two measurements of L_det.", COUNT, section="Stopping")
    dvar_rule: str = setting("dvar", "Rule that stops the script: dvar, octave, paper, ema, hall, trend or plateau.")
    dvar_window: int = setting(TrainingConfig.window, "Number of past steps that the rule uses.")
    dvar_threshold: float | None = setting(
        None, f"Threshold of the rule; that of DVAR, its alpha, is {TrainingConfig.threshold} by default."
    )
    dvar_held: int | None = setting(
        None,
        f"Held samples; {TrainingConfig.eval_batch_size} by default, where a small dataset gives some of them twice, "
        "with other noise.",
        BATCH,
    )
    dvar_seed: int = setting(0, "Seed of the held samples, their noise and their timesteps.", SEED)
    dvar_keep_best: bool = setting(
        False, "Save the weights of the step with the lowest L_det too, in the folder dvar-best beside the trace."
    )

    dvar_trace: str | None = setting(
        None, f"File of the trace; {TRACE} in the script's --output_dir by default.", section="Output"
    )
    dvar_report: str | None = setting(
        None, "Page with the curve and the verdict, a file that ends in .html; report.html beside the trace by default."
    )

    check: bool = setting(
        False, "Say whether the script can be measured, and do not run it; a folder gives a table.", section="Run"
    )
    dvar_off: bool = setting(False, "Run the plain script, for comparison.")

    @property
    def rule(self) -> Rule:
        """The rule that stops the script."""
        return build_rule(self.dvar_rule, self.rule_settings)

    @property
    def rule_settings(self) -> Mapping[str, Any]:
        """The settings of rules by name, as `build_rule` takes them."""
        settings = {**RULE_DEFAULTS, "window": self.dvar_window, "patience": self.dvar_window}
        settings["threshold"] = TrainingConfig.threshold
        if self.dvar_threshold is not None:
            settings |= {name: self.dvar_threshold for name in settings if name.endswith("threshold")}
        return settings

    @property
    def held(self) -> int:
        """The number of held samples."""
        return self.dvar_held or TrainingConfig.eval_batch_size

    def header(self, script: str) -> dict[str, Any]:
        """Return the header of the trace, for a script of this name."""
        taken = RULES[self.dvar_rule].settings
        settings = {name: value for name, value in self.rule_settings.items() if name in taken}
        held = dict(zip(COMPARED, (script, self.held, self.dvar_seed), strict=True))
        return {"launch": {**held, "every": self.dvar_every, "rule": self.dvar_rule, "settings": settings}}


def launch_problems(config: LaunchConfig) -> list[str]:
    """Return everything that is wrong with these settings, without the script they apply to."""
    invalid = dict(invalid_fields(config))
    messages = list(invalid.values())
    if config.dvar_rule not in RULES:
        messages.append(f"dvar_rule {config.dvar_rule!r} is not known: {suggest(config.dvar_rule, RULES)}")
    elif not {"dvar_rule", "dvar_window", "dvar_threshold"} & invalid.keys():
        try:
            rule = config.rule
        except RefusedInput as error:
            messages += error.problems
        else:
            window = getattr(rule, "window", MIN_RECORDS)
            if "dvar_every" not in invalid and "window" in RULES[config.dvar_rule].settings:
                messages += schedule_problems(window, config.dvar_every, sys.maxsize)
    if config.dvar_report and not config.dvar_report.endswith(".html"):
        messages.append(f"dvar_report must end in .html, got {config.dvar_report!r}: name a page")
    for name in ("dvar_trace", "dvar_report"):
        if path := getattr(config, name):
            messages += output_problems(name, Path(path))
    return messages


def output_problems(name: str, path: Path) -> list[str]:
    """Return why a file cannot be written."""
    if path.is_dir():
        return [f"{name} must be a file, got the folder {path}: name a file in it"]
    folder = next(
        folder for folder in (path if path.exists() else path.parent, *path.absolute().parents) if folder.exists()
    )
    if path.exists() and os.access(path, os.W_OK):
        return []
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return [f"{name} {path} cannot be written, because {folder} gives no access: name a file elsewhere"]
    return []


def trace_problems(path: Path, header: Mapping[str, Any]) -> list[str]:
    """Return why the trace at ``path``, if there is one, cannot be continued or set aside."""
    if not path.exists():
        return []
    try:
        recorded = Trace.read(path).header.get("launch", {})
    except (DvarError, OSError) as error:
        return [f"dvar_trace must be a trace or a new file, got {path} ({first_line(error)}): name another file"]
    differences = ", ".join(
        f"{name} {recorded.get(name)!r} instead of {header['launch'][name]!r}"
        for name in COMPARED
        if recorded.get(name) != header["launch"][name]
    )
    if differences:
        return [f"dvar_trace {path} is of another run ({differences}): name another file, or move it away"]
    return []
