"""Scripts and settings that are refused, in one line, before the script trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Answer, dvar
from launched_script import NEVER, launch, write_script

from dvar.launch.check import check_folder

LOADER = "train_dataloader = load_images(args)"
IMPORTS = "import tiny\n    from torch.utils.data import DataLoader, IterableDataset\n"


def assert_refused(answer: Answer, *parts: str) -> None:
    """Assert that a launch ended with one line which has these parts."""
    assert answer.status == 2, answer
    (line,) = answer.err.splitlines()
    assert line.startswith("dvar: ")
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ([("accelerator.backward(loss)", "loss.sum()")], ("got none in script.py", "call a StopMonitor")),
        ([("accelerator.backward(loss)", "loss.backward()")], ("got 'loss.backward()'", "without accelerate")),
        (
            [("accelerator.backward(loss)", "accelerator.backward(loss); accelerator.backward(loss)")],
            ("script.py: one backward call", "got 2 in the loop"),
        ),
        ([("def main", "def main(")], ("is not Python", "check its path")),
    ],
)
def test_a_script_without_a_fitting_loop_is_refused_before_it_starts(
    changes: list[tuple[str, str]], parts: tuple[str, ...], tmp_path: Path
) -> None:
    script = write_script(tmp_path, *changes)
    script.write_text("open('started', 'w')\n" + script.read_text(encoding="utf-8"), encoding="utf-8")
    assert_refused(launch(script, tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_script_that_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "endless.py").symlink_to("/dev/zero")
    for words in ([], ["--dvar_off"], ["--check"]):
        answer = dvar("launch", *words, tmp_path / "endless.py")
        assert_refused(answer, "endless.py cannot be", "a device")
    (check,) = check_folder(tmp_path)
    assert "a device" in check.problem


def test_a_folder_is_checked_without_what_is_installed_in_it(tmp_path: Path) -> None:
    for name in ("own", ".hidden", "env", "lib/site-packages"):
        (tmp_path / name).mkdir(parents=True)
        write_script(tmp_path / name)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    assert [check.name for check in check_folder(tmp_path)] == ["own/script.py"]
    assert [check.name for check in check_folder(tmp_path / "lib" / "site-packages")] == ["script.py"]


@pytest.mark.parametrize("source", ["x = " + "-" * 100_000 + "1", "x" + ".a" * 20_000])
def test_a_script_that_is_nested_too_deeply_is_a_line_and_does_not_end_the_check(source: str, tmp_path: Path) -> None:
    (tmp_path / "deep.py").write_text(f"{source}\nloss.backward()\n")
    write_script(tmp_path)
    deep, fits = check_folder(tmp_path)
    assert "nested too deeply" in deep.problem
    assert fits.fits


@pytest.mark.parametrize(
    ("changes", "flags", "parts"),
    [
        (
            [
                (
                    LOADER,
                    f"{IMPORTS}    class Stream(IterableDataset):\n"
                    "        def __iter__(self): return iter(tiny.Images(8))\n"
                    "    train_dataloader = DataLoader(Stream(), batch_size=2)",
                )
            ],
            (),
            ("the iterable dataset Stream", "without streaming"),
        ),
        ([], ("--dvar_held", "11"), ("at most the 10 samples", "got 11", "hold fewer")),
        ([("enumerate(train_dataloader)", "enumerate(list(train_dataloader))")], (), ("a loop over list",)),
    ],
)
def test_a_dataset_that_cannot_be_held_is_refused_before_the_first_update(
    changes: list[tuple[str, str]], flags: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_refused(launch(write_script(tmp_path, *changes), tmp_path / "out", flags=(*NEVER, *flags)), *parts)
    assert not list((tmp_path / "out").glob("*"))


def test_a_dataset_that_no_other_process_can_get_is_copied_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")

    monkeypatch.setattr("dvar.launch.held._draw_in_worker", fail)
    assert launch("plain.py", tmp_path / "copied").status == 0
    locked = f"import threading; {LOADER}; train_dataloader.dataset.lock = threading.Lock()"
    answer = launch(write_script(tmp_path, (LOADER, locked)), tmp_path / "out")
    assert_refused(answer, "cannot pickle '_thread.lock' object", "define the dataset at the top of a module")


def test_a_trace_of_another_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    assert launch("plain.py", tmp_path / "out").status == 0
    trace = tmp_path / "out" / "trace.jsonl"
    content = trace.read_bytes()
    answer = launch("validation.py", tmp_path / "other", flags=(*NEVER, "--dvar_trace", trace))
    assert_refused(answer, "of another run (script 'plain.py' instead of 'validation.py')", "name another file")
    answer = launch("plain.py", tmp_path / "other", flags=(*NEVER, "--dvar_trace", trace, "--dvar_held", "4"))
    assert_refused(answer, "(held 8 instead of 4)")
    assert trace.read_bytes() == content


def test_a_file_that_is_no_trace_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert_refused(launch("plain.py", tmp_path / "out", flags=("--dvar_trace", notes)), "must be a trace or a new file")
    assert notes.read_text() == "mine"


def test_a_trace_of_the_same_script_is_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        answer = launch("plain.py", tmp_path / "out")
    assert answer.status == 0
    assert "dvar: a run begins and " in answer.err
    assert (tmp_path / "out" / "trace.jsonl.cut-0").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--dvar_evry", "3"), ("unknown flag --dvar_evry", "--dvar_every")),
        (("--dvar_every", "0"), ("dvar_every must be at least 1, got 0",)),
        (("--dvar_every", "100"), ("holds fewer than 8 evaluations",)),
        (("--dvar_window", "3"), ("window must be a whole number of steps, 8 or more, got 3",)),
        (("--dvar_threshold", "1.5"), ("threshold must lie between 0 and 1",)),
        (("--dvar_rule", "dvr"), ("dvar_rule 'dvr' is not known", "the nearest is dvar")),
        (("--dvar_report", "page.txt"), ("dvar_report must end in .html",)),
        (("--dvar_trace", "{here}/file/trace.jsonl"), ("gives no access", "name a file elsewhere")),
        (("--dvar_trace", "{here}"), ("must be a file, got the folder",)),
        (("--dvar_config", "{here}/none.toml"), ("settings file", "none.toml")),
        (("--dvar_config", "{here}/unknown.toml"), ("unknown setting 'dvar_evry'", "dvar_every")),
    ],
)
def test_settings_are_refused_before_the_script_is_read(
    flags: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "unknown.toml").write_text("dvar_evry = 3")
    words = tuple(flag.format(here=tmp_path) for flag in flags)
    assert_refused(launch(tmp_path / "missing.py", tmp_path / "out", flags=words), *parts)


def test_a_folder_without_access_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert_refused(launch("plain.py", tmp_path / "out"), "cannot be written, because", "gives no access")


def test_a_missing_script_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(launch(tmp_path / "none.py", tmp_path), "none.py cannot be read: No such file or directory")
    assert_refused(launch(tmp_path, tmp_path / "out"), "got the folder", "add --check")


def test_flags_of_ours_behind_the_script_are_refused(tmp_path: Path) -> None:
    answer = launch("plain.py", tmp_path / "out", "--dvar-every", "3")
    assert_refused(answer, "flags of dvar stand before the script, got --dvar-every after it")
