"""The folder of a run, read back as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput, TraceError, first_line
from dvar.files import read_json
from dvar.runs.replay import compute_ratios
from dvar.stopping.octave import FIRST_STEP, Octave
from dvar.stopping.rules import CONDITION_REASONS, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.training.methods.registry import config_from_dict
from dvar.training.rule import condition_of
from dvar.training.run_layout import CONFIG, REFERENCES, RESULT, SAMPLE_PROMPTS, SAMPLES, TRACE
from dvar.training.run_schemas import RESULT as RESULT_SCHEMA
from dvar.training.run_schemas import RUN_CONFIG, SAMPLE_PROMPT_ROWS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunFolder:
    """The files that a run, finished or not, has written into its folder.

    Attributes:
        folder: The folder.
        config: Settings as config.json holds them, with the versions of the software.
        trace: Everything measured so far.
        result: What result.json holds; None until the run has finished.
        references: Copies of instance images.
        samples: Step to its sample images, in the order of ``prompts``.
        prompts: "prompt" and "seed" of each sample image.
    """

    folder: Path
    config: Mapping[str, Any]
    trace: Trace
    result: Mapping[str, Any] | None
    references: tuple[Path, ...]
    samples: Mapping[int, tuple[Path, ...]]
    prompts: tuple[Mapping[str, Any], ...]

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Read the folder of a run. What an unfinished run has not written yet is empty or None.

        Raises:
            RefusedInput: The folder holds no run, or one of its JSON files is damaged.
            TraceError: The trace is damaged.
        """
        folder = Path(folder)
        config, trace = _read_json(folder / CONFIG, RUN_CONFIG), folder / TRACE
        if config is None:
            raise RefusedInput([f"a run folder holds {CONFIG}, {folder} does not: name the --output_dir of a run"])
        try:
            _read_rule(config)
        except RefusedInput as error:
            raise RefusedInput([f"{folder / CONFIG}: {problem}: restore it" for problem in error.problems]) from error
        return cls(
            folder=folder,
            config=config,
            trace=_read_trace(trace) if trace.exists() else Trace(),
            result=_read_json(folder / RESULT, RESULT_SCHEMA),
            references=_list_images(folder / REFERENCES),
            samples={
                int(path.name.removeprefix("step-")): _list_images(path)
                for path in sorted((folder / SAMPLES).glob("step-*"))
                if path.name.removeprefix("step-").isdecimal() and path.is_dir()
            },
            prompts=tuple(_read_json(folder / SAMPLES / SAMPLE_PROMPTS, SAMPLE_PROMPT_ROWS) or ()),
        )

    @cached_property
    def settings(self) -> TrainingConfig:
        """The settings as the config class of the run's method.

        Raises:
            RefusedInput: The method is unknown.
        """
        return config_from_dict(self.config)

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict that a finished run ended with, or that of its rule on the trace of an unfinished one.

        Raises:
            RefusedInput: Another version wrote result.json, with a verdict that this one cannot read.
        """
        if not self.result:
            return self._rule(self.trace)
        try:
            return Verdict.from_json(self.result["verdict"])
        except RefusedInput as error:
            remedy = f"use `dvar replay {self.folder}`, or move that file away and use `dvar report` again"
            raise RefusedInput(
                [f"{self.folder / RESULT}: {problem}: {remedy}" for problem in error.problems]
            ) from error

    @property
    def stopped_by_condition(self) -> bool:
        """Whether the condition of the stopping rule ended the run, rather than the cap, a fault or a person."""
        return self.verdict.stop and self.verdict.reason in CONDITION_REASONS

    @property
    def steps(self) -> int:
        """Updates made."""
        return int(self.result["steps"]) if self.result else self.trace.last_step

    @property
    def exported_step(self) -> int | None:
        """The step whose weights were exported; None until the run has finished."""
        return int(self.result["exported_step"]) if self.result else None

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind of work: "train", "probe" and "other"."""
        if self.result:
            return dict(self.result["seconds"])
        return {kind: float(self.trace.metric(f"seconds.{kind}")[1].sum()) for kind in ("train", "probe", "other")}

    @property
    def seconds_to_cap(self) -> float:
        """Seconds that training to the cap would have taken without the probe, at the pace of this run."""
        pace = (self.seconds["train"] + self.seconds["other"]) / max(self.steps, 1)
        return pace * int(self.config["max_train_steps"])

    @property
    def takes_window(self) -> bool:
        """Whether its rule looks at a window of steps, as DVAR does, and not at the last doubling of the steps."""
        return not isinstance(self._rule, Octave)

    @property
    def ready_step(self) -> int:
        """The step before which its rule cannot stop."""
        return self.trace.judged_from + (int(self.config["window"]) if self.takes_window else FIRST_STEP)

    def window_at(self, step: int) -> int:
        """Return the number of steps before ``step`` that its rule looks at there."""
        return int(self.config["window"]) if self.takes_window else (step - self.trace.judged_from) // 2

    @property
    def straight_line_step(self) -> float:
        """The step at which DVAR would stop a loss that falls in a straight line: window / sqrt(threshold).

        Counted from the step from which the rule judges.
        """
        return float(self.trace.judged_from + self.config["window"] / np.sqrt(self.config["threshold"]))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest finite L_det; None when there is none."""
        finite = np.isfinite(self.trace.values)
        if not finite.any():
            return None
        index = int(np.where(finite, self.trace.values, np.inf).argmin())
        return int(self.trace.steps[index]), float(self.trace.values[index])

    @cached_property
    def non_finite_steps(self) -> list[int]:
        """The steps at which the training loss or L_det was not finite."""
        steps, losses = self.trace.metric("train_loss")
        fixed_steps, fixed_losses = self.trace.steps, self.trace.values
        both = np.concatenate([steps[~np.isfinite(losses)], fixed_steps[~np.isfinite(fixed_losses)]])
        return [int(step) for step in np.unique(both)]

    @cached_property
    def ratios(self) -> Floats:
        """The ratio that its rule compares with a threshold, after each evaluation; nan where it had none."""
        return compute_ratios(self.trace, self._rule)

    @cached_property
    def _rule(self) -> Rule:
        return _read_rule(self.config)


def _read_rule(config: Mapping[str, Any]) -> Rule:
    """Return the rule that a run's settings name; DVAR where they name none, as those of earlier runs do."""
    return condition_of(config.get("rule", "dvar"), config["window"], config["threshold"])


def _read_trace(path: Path) -> Trace:
    trace = Trace.read(path)
    timesteps, width = trace.header.get("timesteps"), trace.samples.shape[1]
    if timesteps and len(trace.steps) and len(timesteps) != width:
        raise TraceError(f"{path} has {len(timesteps)} timesteps for {width} losses per record: restore the file")
    return trace


def _read_json(path: Path, schema: Any) -> Any:
    try:
        return read_json(path, schema) if path.exists() else None
    except (OSError, ValueError) as error:
        message = f"{path} must be the JSON that a run writes, and is not ({first_line(error)})"
        raise RefusedInput([f"{message}: restore it or train again"]) from error


def _list_images(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("[0-9]*.png")))
