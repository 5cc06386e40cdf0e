"""A run directory, read back as one value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.config.training import AnyConfig, restored
from dvar.errors import RefusedInput
from dvar.runs.replay_figure import ratios
from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunFolder:
    """What a run left in its folder, finished or not.

    ``result`` is None until the run has finished. ``samples`` maps a step to its pictures, in the order of ``prompts``,
    whose items hold "prompt" and "seed".
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
        """Return the run in a folder. What an unfinished run has not written yet is empty or None.

        Raises: RefusedInput when the folder holds no run or one of its JSON files is damaged; TraceError when
        `trace.jsonl` is damaged.
        """
        folder = Path(folder)
        config, trace = _json(folder / "config.json"), folder / "trace.jsonl"
        if config is None:
            raise RefusedInput([f"a run folder holds config.json, {folder} does not: name the --output_dir of a run"])
        return cls(
            folder=folder,
            config=config,
            trace=Trace.read(trace) if trace.exists() else Trace(),
            result=_json(folder / "result.json"),
            references=_pictures(folder / "references"),
            samples={int(at.name.removeprefix("step-")): _pictures(at) for at in sorted(folder.glob("samples/step-*"))},
            prompts=tuple(_json(folder / "samples" / "prompts.json") or ()),
        )

    @cached_property
    def settings(self) -> AnyConfig:
        """The run's settings as the class of its method.

        Raises: RefusedInput when the method is not known here.
        """
        return restored(self.config)

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict a finished run ended with; of any other, the rule's verdict on its trace so far.

        Raises: RefusedInput when the result is of an older version, whose verdicts cannot be read any more.
        """
        if not self.result:
            return self._rule(self.trace)
        try:
            return Verdict.from_json(self.result["verdict"])
        except RefusedInput as error:
            raise RefusedInput(
                [
                    f"{self.folder / 'result.json'}: {problem}: `dvar replay {self.folder}` does, and with that file "
                    "moved away `dvar report` does too"
                    for problem in error.problems
                ]
            ) from error

    @property
    def steps(self) -> int:
        """Updates made, by the result or else by the last record."""
        if self.result:
            return int(self.result["steps"])
        return self.trace.last_step

    @property
    def exported_step(self) -> int | None:
        """The step whose weights were exported; None until the run has finished."""
        return int(self.result["exported_step"]) if self.result else None

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind of work ("train", "probe", "other"), by the result or else summed over the records."""
        if self.result:
            return dict(self.result["seconds"])
        return {kind: float(self.trace.metric(f"seconds.{kind}")[1].sum()) for kind in ("train", "probe", "other")}

    @property
    def seconds_to_cap(self) -> float:
        """Seconds that all steps to the cap would have taken without the probe, at this run's pace."""
        pace = (self.seconds["train"] + self.seconds["other"]) / max(self.steps, 1)
        return pace * int(self.config["max_train_steps"])

    @property
    def straight_line_step(self) -> float:
        """The step at which the rule would stop a loss that falls in a straight line: window / sqrt(threshold)."""
        return float(self.config["window"] / np.sqrt(self.config["threshold"]))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the least finite L_det; None when there is none."""
        finite = np.isfinite(self.trace.values)
        if not finite.any():
            return None
        at = int(np.where(finite, self.trace.values, np.inf).argmin())
        return int(self.trace.steps[at]), float(self.trace.values[at])

    @cached_property
    def ratios(self) -> Floats:
        """The rule's ratio after each evaluation, the rule replayed over the trace; nan where the rule had none."""
        return ratios(self.trace, self._rule)

    @property
    def _rule(self) -> Dvar:
        return Dvar(window=self.config["window"], threshold=self.config["threshold"])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise RefusedInput([f"{path} must be JSON, and is not ({error}): restore it or train again"]) from error


def _pictures(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("[0-9]*.png")))
