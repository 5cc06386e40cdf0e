"""The public file of traces: the same runs, in one small file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from fake_record import write_fake_record
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.recordings import archive_file
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import read_traces, write_traces
from dvar.recordings.recorded_run import RescoredRun


@pytest.fixture
def archive(tmp_path: Path) -> RecordingArchive:
    write_fake_record(tmp_path / "records", cap=120, learned=15.0, noise=0.01)
    write_fake_record(tmp_path / "records", concept="purple_cat", cap=120)
    return RecordingArchive.open(tmp_path / "records")


def test_what_is_written_is_read(archive: RecordingArchive, tmp_path: Path) -> None:
    back = read_traces(write_traces(archive, tmp_path / "traces.npz"))
    assert [run.name for run in back] == [run.name for run in archive]
    for run, copy in zip(archive, back, strict=True):
        assert (run.cap, run.header, run.trace.header) == (copy.cap, copy.header, copy.trace.header)
        for name in ("eval", "stratified", "paired", "unseen", "drift", "train_loss", "grad_norm", "token_norm"):
            (steps, values), (same, near) = run.series(name), copy.series(name)
            np.testing.assert_array_equal(steps, same)
            exact = name in ("eval", "stratified", "paired", "unseen")
            np.testing.assert_allclose(values, near, rtol=1e-6 if exact else 2**-13, atol=1e-6 if exact else 0)
        np.testing.assert_allclose(
            run.scores("train", "clip_image")[1], copy.scores("train", "clip_image")[1], rtol=2**-13
        )
    assert back.unit_seconds("textual-inversion") == pytest.approx(archive.unit_seconds("textual-inversion"))
    assert back.tuning_concepts == archive.tuning_concepts


def test_rescored_steps_are_in_the_file(archive: RecordingArchive, tmp_path: Path) -> None:
    name = archive.runs[1].name
    values = np.random.default_rng(0).random((2, 8))
    rescored = RescoredRun(
        np.array([3, 70]), {("train", "clip_image"): values, ("validation", "clip_text"): values / 2}
    )
    back = read_traces(write_traces(replace(archive, rescored={name: rescored}), tmp_path / "traces.npz"))
    assert back.rescored.keys() == {name}
    stored = back.rescored[name]
    assert stored.steps.tolist() == [3, 70]
    assert stored.image_scores.keys() == rescored.image_scores.keys()
    np.testing.assert_allclose(stored.image_scores["validation", "clip_text"], values / 2, rtol=2**-13)
    assert stored.mean(70, "train", "clip_image") == pytest.approx(values[1].mean(), rel=2**-13)
    assert back.runs[1].image_scores.keys() == archive.runs[1].image_scores.keys()


def test_runs_that_broke_are_named_in_the_file(archive: RecordingArchive, tmp_path: Path) -> None:
    broken = {"textual-inversion/red_mug/7": "the loss is not finite at step 12"}
    back = read_traces(write_traces(replace(archive, unreadable=broken), tmp_path / "traces.npz"))
    assert back.unreadable == broken


@given(arrays(np.float32, st.integers(1, 20)))
def test_numbers_are_rounded_to_the_nearest_of_13_bits_and_once(values: NDArray[np.float32]) -> None:
    rounded = archive_file._round(values)
    finite = np.isfinite(values) & np.isfinite(rounded)  # the largest of all floats round to infinity
    near, normal = rounded[finite].astype(np.float64), values[finite].astype(np.float64)
    tiny = float(np.finfo(np.float32).tiny)
    assert (np.abs(near - normal) <= 2.0**-13 * np.maximum(np.abs(normal), tiny)).all()
    assert not (rounded.view(np.uint32)[np.isfinite(values)] & 0x7FF).any()
    np.testing.assert_array_equal(archive_file._round(rounded), rounded)
    np.testing.assert_array_equal(rounded[~np.isfinite(values)], values[~np.isfinite(values)])


def test_a_file_of_the_earlier_format_is_read_and_one_of_a_later_refused(
    archive: RecordingArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(write_traces(archive, tmp_path / "traces.npz")) as file:
        content = dict(file)
    index = json.loads(content["index"].tobytes())
    for name in content:
        if name.endswith("/steps"):
            content[name] = content[name].cumsum()
    for version in (1, 3):
        index["dvar_traces"] = version
        content["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        np.savez(tmp_path / f"format-{version}.npz", **content)
    for run, copy in zip(archive, read_traces(tmp_path / "format-1.npz"), strict=True):
        np.testing.assert_array_equal(run.series("train_loss")[0], copy.series("train_loss")[0])
    with pytest.raises(RefusedInput, match=r"format 3 is of another version of dvar"):
        read_traces(tmp_path / "format-3.npz")


def test_losses_that_were_float32_come_back_bit_for_bit(tmp_path: Path) -> None:
    archive = RecordingArchive.open(write_fake_record(tmp_path / "records", cap=20).parents[2])
    once = read_traces(write_traces(archive, tmp_path / "one.npz"))
    twice = read_traces(write_traces(once, tmp_path / "two.npz"))
    for run, copy in zip(once, twice, strict=True):
        np.testing.assert_array_equal(run.series("eval")[1], copy.series("eval")[1])


def test_no_path_of_the_recording_machine_is_in_the_file(archive: RecordingArchive, tmp_path: Path) -> None:
    for run in archive:
        assert isinstance(run.config, dict)
        run.config.update(output_dir="/home/someone/runs", instance_data_dir="/home/someone/pictures")
    back = read_traces(write_traces(archive, tmp_path / "traces.npz"))
    assert all("someone" not in str(run.config) for run in back)


def test_a_file_that_would_be_too_large_is_refused(
    archive: RecordingArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_file, "MAX_BYTES", 1000)
    with pytest.raises(RefusedInput, match="must fit in 1000 bytes, got"):
        write_traces(archive, tmp_path / "traces.npz")
    assert not list(tmp_path.glob("traces*"))


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(RefusedInput, match="is not a file of traces"):
        read_traces(path)


def rewrite(source: Path, target: Path, name: str, content: bytes) -> Path:
    """Copy an archive with one member replaced."""
    with ZipFile(source) as old, ZipFile(target, "w", ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return target


def test_arrays_that_inflate_beyond_their_headers_are_refused_before_they_are_read(
    archive: RecordingArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_traces(archive, tmp_path / "traces.npz")
    with ZipFile(path) as content:
        array = content.read("0/eval.npy")
    promise = array[:10] + array[10:].replace(b"'shape': (121, 8), }         ", b"'shape': (121000000, 8), }   ", 1)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the file was read"))
    assert promise != array
    for number, damaged in enumerate((promise, array + bytes(4_000_000), array[:-8])):
        with pytest.raises(
            RefusedInput, match=r"is not a file of traces \(0/eval.npy has another size than its header"
        ):
            read_traces(rewrite(path, tmp_path / f"{number}.npz", "0/eval.npy", damaged))
    monkeypatch.setattr(archive_file, "MAX_INFLATED", 1000)
    with pytest.raises(RefusedInput, match="its arrays have more than 1000 bytes"):
        read_traces(path)


@pytest.mark.parametrize(("place", "value"), [(6, 139), (8, 1), (10, 12), (10, 14), (10, 99)])
def test_an_archive_with_flipped_bits_is_refused(
    place: int, value: int, archive: RecordingArchive, tmp_path: Path
) -> None:
    """The bytes of the first entry of the central directory: version needed, flags (encrypted), compression."""
    path = write_traces(archive, tmp_path / "traces.npz")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = value
    path.write_bytes(content)
    with pytest.raises(RefusedInput, match=r"traces\.npz is not a file of traces"):
        read_traces(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"no archive"])
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "traces.npz").write_bytes(content)
    with pytest.raises(RefusedInput, match=r"traces\.npz is not a file of traces"):
        read_traces(tmp_path / "traces.npz")
