"""The trace: order, views, JSON lines bit for bit, torn and damaged files, the growing file."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dvar import Trace
from dvar.errors import TraceError
from dvar.stopping.curve import Curve
from dvar.stopping.trace import TraceFile

HEADER = {"timesteps": [17, 512, 803], "method": "textual-inversion"}

rows = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.none() | st.lists(st.floats(), min_size=3, max_size=3),
        st.dictionaries(
            st.sampled_from(["train_loss", "grad_norm", "lr"]), st.floats() | st.integers(-(2**70), 2**70) | st.none()
        ),
    ),
    max_size=12,
)


def build_trace(records: list[Any]) -> Trace:
    trace, step = Trace(HEADER), -1
    for gap, losses, metrics in records:
        step += gap
        trace.record(step, losses, **metrics, seconds={"train": 0.1, "probe": math.inf})
    return trace


def format_lines(trace: Trace) -> list[str]:
    return [trace.line(index) for index in range(len(trace))]


def read_bits(values: np.ndarray[Any, Any]) -> bytes:
    """Return the bits of the floats, with every nan alike."""
    return b"".join(struct.pack("<d", value if value == value else math.nan) for value in values.ravel())


# --- in memory ------------------------------------------------------------------------------------------------------


def test_steps_values_and_samples_hold_the_records_with_an_evaluation() -> None:
    trace = Trace()
    trace.record(0, [1.0, 2.0, 6.0], train_loss=0.5)
    trace.record(1, train_loss=0.25, seconds={"train": 0.125, "probe": 0.5})
    trace.record(4, np.array([0.5, 0.5, 0.5], np.float32), train_loss=None)
    assert trace.steps.tolist() == [0, 4]
    assert trace.steps.dtype == np.int64
    assert trace.values.tolist() == [3.0, 0.5]
    assert trace.values.dtype == np.float64
    assert trace.samples.tolist() == [[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]]
    assert (len(trace), trace.last_step) == (3, 4)
    assert [column.tolist() for column in trace.metric("train_loss")] == [[0, 1], [0.5, 0.25]]
    assert [column.tolist() for column in trace.metric("seconds.probe")] == [[1], [0.5]]
    assert [column.tolist() for column in trace.metric("lr")] == [[], []]
    assert trace.records[2] == {"step": 4, "eval": [0.5, 0.5, 0.5]}


def test_an_empty_trace_is_empty() -> None:
    trace = Trace()
    assert (len(trace), trace.last_step, trace.records) == (0, 0, [])
    assert trace.steps.shape == trace.values.shape == (0,)
    assert trace.samples.shape == (0, 0)


def test_the_mean_over_samples_is_taken_in_float64() -> None:
    losses = np.array([0.1, 0.2, 0.4], np.float32)
    trace = Trace()
    trace.record(0, losses)
    assert trace.values[0] == losses.astype(np.float64).mean() != float(losses.mean())


def test_one_number_is_a_batch_of_one() -> None:
    trace = Trace()
    losses: list[Any] = [0.5, np.float32(0.25), np.array(0.125), torch.tensor(0.0625), 3]
    for step, value in enumerate(losses):
        trace.record(step, value)
    assert trace.samples.tolist() == [[0.5], [0.25], [0.125], [0.0625], [3.0]]


def test_a_tensor_may_still_hold_its_graph() -> None:
    trace = Trace()
    trace.record(0, torch.ones(2, requires_grad=True) * 3, train_loss=torch.tensor(0.5), norms=torch.ones(2))
    assert trace.records == [{"step": 0, "eval": [3.0, 3.0], "train_loss": 0.5, "norms": [1.0, 1.0]}]


def test_views_cannot_be_written_and_do_not_change_when_the_trace_grows() -> None:
    trace = Trace()
    for step in range(300):
        trace.record(step, [step, step + 1])
        if step == 50:
            early = (trace.steps, trace.values, trace.samples)
            copies = [view.copy() for view in early]
    for view, copy in zip(early, copies, strict=True):
        assert np.array_equal(view, copy)
        assert len(view) == 51
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    assert np.array_equal(trace.samples, np.stack([np.arange(300), np.arange(300) + 1], axis=1))
    assert np.shares_memory(trace.values, trace.values)


def test_what_a_caller_holds_is_not_the_trace_itself() -> None:
    trace = Trace(HEADER)
    row = trace.record(0, 0.5)
    row["step"] = trace.records[0]["step"] = trace.header["method"] = 7
    assert trace.records == [{"step": 0, "eval": [0.5]}]
    assert trace.header == {"dvar_trace": 1, **HEADER}


@pytest.mark.parametrize(
    ("step", "losses", "metrics", "message"),
    [
        (5, [0.1, 0.1], {}, "steps must grow, got 5 after 5"),
        (4, [0.1, 0.1], {}, "steps must grow, got 4 after 5"),
        (6.0, [0.1, 0.1], {}, "whole number of updates, got 6.0"),
        (2**63, [0.1, 0.1], {}, "counts updates from 0, got 9223372036854775808"),
        (6, [0.1, 0.1, 0.1], {}, "holds 2 losses per record, got 3"),
        (6, 0.1, {}, "holds 2 losses per record, got 1"),
        (6, [[0.1, 0.1]], {}, r"got the shape \(1, 2\)"),
        (6, [], {}, r"got the shape \(0,\)"),
        (6, ["0.1", "0.1"], {}, "float32 or wider"),
        (6, [True, False], {}, "float32 or wider, got bool"),
        (6, [[0.1], [0.1, 0.2]], {}, "float32 or wider"),
        (6, np.ones(2, np.float16), {}, "float32 or wider, got float16"),
        (6, torch.ones(2, dtype=torch.float16), {}, "float32 or wider, got float16"),
        (6, torch.ones(2, dtype=torch.bfloat16), {}, "float32 or wider"),
        (
            6,
            [0.1, 0.1],
            {"eval/first": 1.0},
            "'eval/first' is computed from the losses, got it as a metric: give it ano",
        ),
        (6, [0.1, 0.1], {"note": "good"}, "'note' must be made of numbers, got 'good'"),
        (6, [0.1, 0.1], {"seconds": {"train": object()}}, "'seconds' must be made of numbers"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_and_leaves_nothing(
    step: Any, losses: Any, metrics: dict[str, Any], message: str
) -> None:
    trace = Trace()
    trace.record(5, [0.1, 0.2])
    before = format_lines(trace)
    with pytest.raises(TraceError, match=message):
        trace.record(step, losses, **metrics)
    assert format_lines(trace) == before
    assert len(trace.steps) == len(trace.values) == len(trace.samples) == 1
    trace.record(6, [0.1, 0.1])


def test_a_first_step_below_zero_is_refused() -> None:
    with pytest.raises(TraceError, match="from 0, got -1"):
        Trace().record(-1, 0.1)


def test_a_metric_of_several_numbers_is_no_series() -> None:
    trace = Trace()
    trace.record(0, norms=[1.0, 2.0])
    with pytest.raises(TraceError, match="'norms' is not one number"):
        trace.metric("norms")


def test_a_metric_is_found_by_its_whole_name_and_inside_a_mapping() -> None:
    trace = Trace()
    metrics: dict[str, Any] = {"val.loss": 0.5, "seconds": {"probe": 0.25}}
    trace.record(0, **metrics)
    assert trace.metric_names == ["seconds.probe", "val.loss"]
    assert [trace.metric(name)[1].tolist() for name in trace.metric_names] == [[0.25], [0.5]]


@pytest.mark.parametrize("header", [{"a": math.nan}, {"a": object()}, {"dvar_trace": 2}])
def test_a_header_that_is_no_json_of_this_format_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(TraceError):
        Trace(header)


# --- on disk --------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows)
def test_a_trace_survives_its_file_to_the_last_bit(tmp_path: Path, records: list[Any]) -> None:
    trace, path = build_trace(records), tmp_path / "trace.jsonl"
    trace.write(path)
    again = Trace.read(path)
    assert again.header == trace.header
    assert format_lines(again) == format_lines(trace)
    for name in ("steps", "values", "samples"):
        assert getattr(again, name).shape == getattr(trace, name).shape
        assert read_bits(getattr(again, name)) == read_bits(getattr(trace, name))
    content = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows)
def test_every_line_is_json_that_any_reader_takes(tmp_path: Path, records: list[Any]) -> None:
    build_trace(records).write(tmp_path / "trace.jsonl")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    first, *others = (tmp_path / "trace.jsonl").read_text("ascii").splitlines()
    assert json.loads(first) == {"dvar_trace": 1, **HEADER}
    assert all("step" in json.loads(line, parse_constant=refuse) for line in others)


def test_non_finite_numbers_are_the_three_strings() -> None:
    trace = Trace()
    trace.record(0, [math.nan, math.inf, -math.inf], train_loss=np.float32("nan"))
    assert trace.line(0) == '{"step": 0, "eval": ["nan", "inf", "-inf"], "train_loss": "nan"}'


def test_a_last_line_torn_at_any_byte_is_dropped_with_a_warning(tmp_path: Path) -> None:
    trace, path = build_trace([(1, [0.1, math.nan, 3.0], {"lr": 1e-2})] * 3), tmp_path / "trace.jsonl"
    trace.write(path)
    content = path.read_bytes()
    start = len(content) - len(trace.line(2)) - 1
    for end in range(start + 1, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.warns(UserWarning, match="the last line is incomplete"):
            torn = Trace.read(path)
        assert format_lines(torn) == format_lines(trace)[:2]
    path.write_bytes(content[:-1])  # only the line break is missing
    assert format_lines(Trace.read(path)) == format_lines(trace)


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    build_trace([(1, [0.1, 0.2, 0.3], {})] * 3).write(path)
    header, first, *others = path.read_text("ascii").splitlines(keepends=True)
    for damaged in (
        first[:-9] + "\n",
        "\n",
        '["step"]\n',
        '{"eval": [0.1, 0.2, 0.3]}\n',
        '{"step": 7}\n',
        '{"step": "x"}\n',
    ):
        path.write_text("".join([header, damaged, *others]), "ascii")
        with pytest.raises(TraceError, match=r"trace\.jsonl, line [23]"):
            Trace.read(path)
    for no_header in ("", "{", first, '{"dvar_trace": 9}\n'):
        path.write_text(no_header, "ascii")
        with pytest.raises(TraceError, match="is no trace: its first line must be a header"):
            Trace.read(path)


def test_cut_keeps_the_records_up_to_a_step() -> None:
    trace = build_trace([(3, [0.1, 0.2, 0.3], {"lr": 0.5}), (3, None, {}), (3, [1.0, 2.0, 3.0], {})])
    assert trace.cut(5).header == trace.header
    assert format_lines(trace.cut(5)) == format_lines(trace)[:2] == format_lines(trace.cut(7))
    assert len(trace.cut(1)) == 0
    assert format_lines(trace.cut(99)) == format_lines(trace)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.jsonl"
    build_trace([(1, [0.1, 0.2, 0.3], {})]).write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        build_trace([(1, [0.1, 0.2, 0.3], {})] * 9).write(path)
    assert path.read_bytes() == before


def test_a_trace_file_grows_into_what_write_would_have_written(tmp_path: Path) -> None:
    trace = Trace(HEADER)
    with TraceFile(tmp_path / "grown.jsonl", HEADER) as file:
        for step in range(5):
            file.append(trace.record(step, [0.1, math.inf, 0.3], train_loss=0.5))
            assert format_lines(Trace.read(file.path)) == format_lines(trace)
        file.sync()
    trace.write(tmp_path / "written.jsonl")
    assert (tmp_path / "grown.jsonl").read_bytes() == (tmp_path / "written.jsonl").read_bytes()


@pytest.mark.parametrize("lost", [0, 1, 7])
def test_a_trace_file_is_continued_after_a_crash(tmp_path: Path, lost: int) -> None:
    path, trace = tmp_path / "trace.jsonl", build_trace([(1, [0.1, 0.2, 0.3], {"lr": 0.5})] * 3)
    trace.write(path)
    path.write_bytes(path.read_bytes()[: -lost or None])
    cut = trace.cut(1 if lost == 7 else 2)
    if lost == 7:
        with pytest.warns(UserWarning, match="the last line is incomplete"):
            file = TraceFile(path, HEADER)
    else:
        file = TraceFile(path)
    with file:
        file.append(cut.record(3, [0.4, 0.5, 0.6]))
    assert format_lines(Trace.read(path)) == format_lines(cut)


def test_a_trace_file_refuses_another_header_and_steps_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    build_trace([(4, [0.1, 0.2, 0.3], {})]).write(path)
    before = path.read_bytes()
    with pytest.raises(TraceError, match="has another header"):
        TraceFile(path, {"timesteps": []})
    with TraceFile(path, HEADER) as file, pytest.raises(TraceError, match="already holds step 3, got step 3"):
        file.append({"step": 3})
    assert path.read_bytes() == before
    with TraceFile(path) as file:
        file.append({"step": 4})
        with pytest.raises(TraceError, match="already holds step 4, got step 4"):
            file.append({"step": 4})
    assert Trace.read(path).last_step == 4


def test_an_appended_line_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    program = (
        "import os, sys; from dvar import Trace; from dvar.stopping.trace import TraceFile\n"
        "file, trace = TraceFile(sys.argv[1]), Trace()\n"
        "file.append(trace.record(0, [0.5, 0.25]))\n"
        "os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": find_source()})
    assert done.returncode == 9
    assert Trace.read(path).samples.tolist() == [[0.5, 0.25]]


def find_source() -> str:
    import dvar

    return str(Path(dvar.__file__).parents[1])


@pytest.mark.parametrize("follow", [0.0, 0.8])
def test_the_error_of_a_slope_is_the_scatter_of_slopes(follow: float) -> None:
    # With 0.8 of each value in the next one, an error that took them as independent would be a third of the truth.
    random, count = np.random.default_rng(0), 400
    slopes, errors = [], []
    for _ in range(300):
        noise = random.normal(size=count)
        for index in range(1, count):
            noise[index] += follow * noise[index - 1]
        curve = Curve(np.arange(count), noise, np.ones(count))
        slopes.append(curve.slope())
        errors.append(curve.slope_error(unit=1.0))
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.15)


def test_a_relative_loss_is_the_same_read_at_every_record_and_once_at_the_end() -> None:
    losses = np.random.default_rng(0).uniform(0.1, 2.0, (200, 7))
    live, late = Trace(), Trace()
    for step, row in enumerate(losses):
        live.record(step, row)
        late.record(step, row)
        live.metric("eval/first")
    assert live.metric("eval/first")[1].tolist() == late.metric("eval/first")[1].tolist()
    np.testing.assert_allclose(late.metric("eval/first")[1], (losses / losses[0]).mean(axis=1), rtol=1e-15)


def test_a_metric_read_at_every_record_is_read_once() -> None:
    trace = Trace()
    for step in range(5):
        trace.record(step, lr=float(step))
        for _ in range(2):
            assert [column.tolist() for column in trace.metric("lr")] == [[*range(step + 1)]] * 2


def test_residuals_that_alternate_make_no_error_smaller() -> None:
    # Their correlation is -1; uncorrected, the error is that of ordinary least squares with its n - 2.
    ages, noise = np.arange(10) - 4.5, np.tile([1.0, -1.0], 5)
    residuals = noise - ages * (noise @ ages) / (ages @ ages)
    plain = np.sqrt(residuals @ residuals / 8 / (ages @ ages))
    error = Curve(np.arange(10), 0.5 * np.arange(10) + noise, np.ones(10)).slope_error(unit=2.0)
    assert error == pytest.approx(plain, rel=1e-12)


def test_what_rules_derive_is_shared_until_the_next_record() -> None:
    trace = Trace()
    trace.record(0, 1.0)
    calls = []

    def count() -> int:
        calls.append(len(trace))
        return len(trace)

    assert [trace.derive("length", count) for _ in range(3)] == [1, 1, 1]
    trace.record(1, 0.5)
    assert trace.derive("length", count) == 2
    assert calls == [1, 2]


def test_rules_that_judge_one_record_read_one_curve() -> None:
    trace = Trace()
    for step in range(12):
        trace.record(step, 1.0 / (step + 1))
    curve = Curve.from_trace(trace)
    assert Curve.from_trace(trace) is curve
    assert Curve.from_trace(trace, first_step=1) is not curve
    assert curve.last(4) is curve.last(4)
    assert curve.last(4) is not curve.last(5)
    again = Curve(curve.steps, curve.values, curve.weights)
    for _ in range(2):  # computed, and read again
        assert curve.variance(1.0) == again.variance(1.0)
        assert curve.variance(2.0, 1) == again._variance(2.0, 1)
        assert (curve.slope(), curve.slope_error(1.0)) == (again._slope(), again._slope_error(1.0))
    trace.record(12, 0.01)
    assert len(Curve.from_trace(trace)) == 13
