"""The contracts of rules and of log formats: test suites to subclass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvar.errors import RefusedInput
from dvar.logs.formats import LogFormat, find_log, recognise_format
from dvar.logs.reader import read_log
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rule import Rule
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    pass

CURVES: Mapping[str, Callable[[int], float]] = {
    "line": lambda step: 1 - step / 1000,
    "exponential": lambda step: 0.5 + math.exp(-step / 30),
    "noise": lambda step: 0.5 + 0.01 * math.sin(step * step),
    "spike": lambda step: 9.0 if step == 7 else 1 - step / 1000,
    "rise": lambda step: 0.5 + step / 1000,
    "late start": lambda step: 0.5 + math.exp(-max(0, step - 60) / 20),
    "nan": lambda step: math.nan if step == 51 else 0.5 + math.exp(-step / 30),
    "constant": lambda step: 0.5,
}
"""The curves on which a rule is tested, by name: from a step to a value."""

# TensorBoard keeps values in float32, so these are.
LOGGED_CURVE = {step: float(np.float32(0.1 + 0.01 * math.exp(-step / 40))) for step in range(0, 400, 2)}
"""The curve with which a log format is tested: a loss by step."""


class RuleContract:
    """The tests that every stopping rule passes.

    Subclass it in a test module, and pytest runs it::

        class TestMyRule(RuleContract):
            rule = MyRule(window=40)

    A window of about 40 steps fits: the traces have 60 records, one every 3 steps.
    """

    rule: Rule
    """The rule to test."""
    metric: str = LOSS
    """The metric that it reads; the loss is constant if it is another one."""

    def record_step(self, trace: Trace, step: int, curve: Callable[[int], float]) -> None:
        """Append the record of a step to a trace, with the curve as the metric that the rule reads."""
        values = {LOSS: 0.5, self.metric: curve(step)}
        trace.record(step, values.pop(LOSS), **values)

    def judge_curve(self, curve: Callable[[int], float]) -> tuple[Trace, list[Verdict]]:
        """Return the trace of a curve, and the verdict after each of its records."""
        trace, verdicts = Trace(), []
        for step in range(0, 180, 3):
            self.record_step(trace, step, curve)
            verdicts.append(self.rule(trace))
        return trace, verdicts

    def test_an_empty_trace_does_not_stop(self) -> None:
        assert not self.rule(Trace()).stop

    def test_the_trace_is_its_only_state(self) -> None:
        """Check that calling twice, or on a replayed or resumed trace, gives the verdicts of the live run."""
        for name, curve in CURVES.items():
            trace, verdicts = self.judge_curve(curve)
            assert self.rule(trace) == verdicts[-1], name
            assert [self.rule(trace.cut(step)) for step in range(0, 180, 30)] == verdicts[::10], name
            assert len(trace) == len(verdicts), name

    def test_a_verdict_is_about_a_step_and_says_so(self) -> None:
        for name, curve in CURVES.items():
            for index, verdict in enumerate(self.judge_curve(curve)[1]):
                assert 0 <= verdict.step <= 3 * index, name
                answer = "stop" if verdict.stop else "go on"
                assert str(verdict).startswith(f"{answer} at step {verdict.step}: "), name
                assert "\n" not in str(verdict), name
                assert all(isinstance(value, int | float) for value in verdict.metrics.values()), name

    def test_it_does_not_stop_while_it_runs_or_warms_up(self) -> None:
        for name, curve in CURVES.items():
            for verdict in self.judge_curve(curve)[1]:
                assert not (verdict.stop and verdict.reason in (Reason.RUNNING, Reason.WARMING_UP)), name

    def test_a_metric_that_is_not_finite_is_never_stabilised(self) -> None:
        _, verdicts = self.judge_curve(CURVES["nan"])
        assert all(verdict.reason is not Reason.STABILISED for verdict in verdicts[51 // 3 :])

    def test_a_verdict_survives_json(self) -> None:
        for name, curve in CURVES.items():
            verdict = self.judge_curve(curve)[1][-1]
            restored = Verdict.from_json(verdict.to_json())
            assert (str(restored), restored.diagnoses) == (str(verdict), verdict.diagnoses), name

    def test_it_is_a_value(self) -> None:
        """Check that a rule has a hash and cannot be changed, as a frozen dataclass."""
        assert hash(self.rule) == hash(self.rule)
        try:
            self.rule.window = 3  # type: ignore[attr-defined]
        except AttributeError:
            return
        raise AssertionError(f"{self.rule!r} can be changed: make it a frozen dataclass")


class LogFormatContract:
    """The tests that every log format passes, once it is registered.

    Subclass it in a test module, and pytest runs it::

        class TestMyFormat(LogFormatContract):
            log_format = MY_FORMAT

            def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
                ...  # writes the curve as the program of this format does, and returns the file or the folder
    """

    log_format: LogFormat
    """The format to test."""

    def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
        """Write a log with ``curve``, a loss by step, and return its file or folder.

        The name of the loss says that it is on fixed inputs, such as "val_loss". Other curves may be beside it.
        """
        raise NotImplementedError("a subclass writes a log of its format")

    def test_it_recognises_its_log_and_no_format_before_it_does(self, tmp_path: Path) -> None:
        path = find_log(self.write_log(tmp_path, LOGGED_CURVE))
        assert self.log_format.recognises(path)
        assert recognise_format(path) is self.log_format, "register the format, and make it more specific"

    def test_it_recognises_no_foreign_file(self, tmp_path: Path) -> None:
        for content in (b"", b"PK\x03\x04 an archive", b"\x89PNG\r\n\x1a\n", b"a line of text\n"):
            path = tmp_path / "foreign.bin"
            path.write_bytes(content)
            assert not self.log_format.recognises(path), content

    def test_its_points_are_steps_names_and_values(self, tmp_path: Path) -> None:
        points = list(self.log_format.read_points(find_log(self.write_log(tmp_path, LOGGED_CURVE)), None))
        assert points
        for step, name, value in points:
            assert step is None or isinstance(step, int)
            assert isinstance(name, str)
            assert isinstance(value, float | str)

    def test_the_curve_is_read_as_it_was_recorded(self, tmp_path: Path) -> None:
        trace = read_log(self.write_log(tmp_path, LOGGED_CURVE))
        assert dict(zip(trace.steps.tolist(), trace.values.tolist(), strict=True)) == LOGGED_CURVE

    def test_reading_changes_nothing(self, tmp_path: Path) -> None:
        log = self.write_log(tmp_path, LOGGED_CURVE)
        content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert read_log(log).records == read_log(log).records
        assert {path: path.read_bytes() for path in content} == content

    def test_it_is_found_in_a_folder_by_its_names(self, tmp_path: Path) -> None:
        log = self.write_log(tmp_path, LOGGED_CURVE)
        for name in self.log_format.file_names:
            name = name.replace("*", "1")  # a pattern
            folder = tmp_path / f"folder of {name.replace('/', ' and ')}"
            (folder / name).parent.mkdir(parents=True)
            shutil.copyfile(find_log(log), folder / name)
            assert read_log(folder).records == read_log(log).records

    def test_a_column_of_steps_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        log, message = self.write_log(tmp_path, LOGGED_CURVE), ""
        try:
            read_log(log, step="no such column")
        except RefusedInput as error:
            message = str(error)
        assert "no such column" in message
