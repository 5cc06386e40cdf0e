"""One run of two processes: the samples, the verdict, the files; and a process that is lost."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launched_training import assert_same_run, flags, start_processes, train_on, wait_for

from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.testing import tiny_ldm_pipeline
from dvar.training.preflight import launcher_problems, process_problems
from dvar.training.processes import ALONE, Processes


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    outputs = {
        count: train_on(count, flags(tiny_model, tiny_images, tmp_path / str(count), threshold=0.5)) for count in (1, 2)
    }
    assert [status for status, _, _ in outputs[2]] == [0, 0], outputs[2]
    assert_same_run(tmp_path / "1", tmp_path / "2")
    verdicts = [outputs[count][0][1].splitlines()[0] for count in (1, 2)]
    assert [re.sub(r"\d+\.\d+ %", "", verdict) for verdict in verdicts] == [re.sub(r"\d+\.\d+ %", "", verdicts[0])] * 2
    assert outputs[2][1][1:] == ("", "")  # the main process speaks for both
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        for folder in (tmp_path / "1", tmp_path / "2")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_run_which_resumes_on_another_number(
    lost: int, tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    settings = {"max_train_steps": 60, "validation_steps": 50, "threshold": 1e-9}
    words = flags(tiny_model, tiny_images, tmp_path / "lost", **settings)
    processes = start_processes(words, 2)
    wait_for(tmp_path / "lost" / "checkpoint-4" / "manifest.json", processes[0])
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[1 - lost].communicate(timeout=60)
    processes[lost].communicate()
    assert time.monotonic() - killed < 60
    assert processes[1 - lost].returncode == 1
    assert "has ended or hangs: see what it printed, then go on with --resume_from_checkpoint latest" in errors
    assert "Traceback" not in errors
    ((status, _, error),) = train_on(1, [*words, "--resume_from_checkpoint", "latest"])
    assert status == 0, error
    train_on(1, flags(tiny_model, tiny_images, tmp_path / "alone", **settings))
    assert_same_run(tmp_path / "alone", tmp_path / "lost")


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_save_together_and_resume(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    words = flags(tiny_model, tiny_images, tmp_path / "run", max_train_steps=150, threshold=1e-9)
    processes = start_processes(words, 2)
    wait_for(tmp_path / "run" / "checkpoint-4" / "manifest.json", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    outputs_resumed = train_on(2, [*words, "--resume_from_checkpoint", "latest"])
    assert [status for status, _, _ in outputs_resumed] == [0, 0], outputs_resumed
    train_on(1, flags(tiny_model, tiny_images, tmp_path / "alone", max_train_steps=150, threshold=1e-9))
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize(
    ("samples", "at_once", "parts"),
    [
        (4, 2, [[(0, 2)], [(2, 4)]]),
        (4, 4, [[(0, 2)], [(2, 4)]]),
        (6, 2, [[(0, 2), (2, 3)], [(3, 5), (5, 6)]]),
    ],
)
def test_the_samples_of_a_step_are_shared_out(samples: int, at_once: int, parts: list[list[tuple[int, int]]]) -> None:
    shares = [Processes(rank, 2).share(samples, at_once) for rank in range(2)]
    assert [[(part.start, part.stop) for part in share] for share in shares] == parts
    assert [(part.start, part.stop) for part in ALONE.share(6, 2)] == [(0, 2), (2, 4), (4, 6)]


def test_the_others_do_what_the_main_process_calls_for() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    done: list[int] = []
    main, other = (Processes(rank, 2, store) for rank in range(2))
    main.call("update", step=1)
    main.call_for_pass("measure")  # of a base model that is whole: by the main process alone
    main.call("update", step=2)
    main.end_calls(checkpoint=None)
    main.call("update", step=3)
    main.end_calls(steps=3)
    works = {"update": lambda step: done.append(step)}
    assert other.serve(works) == {"checkpoint": None}
    assert done == [1, 2]
    assert other.serve(works) == {"steps": 3}
    assert done == [1, 2, 3]
    ALONE.call("update", step=4)  # nobody else is there


def test_dropout_that_several_processes_would_draw_otherwise_is_refused(tmp_path: Path) -> None:
    model = tiny_ldm_pipeline(tmp_path / "model")
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    word = TextualInversionConfig(pretrained_model_name_or_path=str(model), placeholder_token="<a>", train_batch_size=2)
    (problem,) = process_problems(launched, word)
    assert problem.endswith("would learn another one in several processes, got 2: start one")
    assert process_problems({}, word) == []
    without = DreamBoothLoraConfig(
        pretrained_model_name_or_path=str(model), placeholder_token=None, instance_prompt="a mug", train_batch_size=2
    )
    assert process_problems(launched, without) == []


def test_a_launch_that_cannot_work_is_refused() -> None:
    config = TextualInversionConfig(train_batch_size=2, gradient_accumulation_steps=3)
    launched = {"RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert process_problems({}, config) == process_problems({**launched, "WORLD_SIZE": "2"}, config) == []
    assert (
        "4 processes share the samples of a step evenly, and there are 6"
        in process_problems({**launched, "WORLD_SIZE": "4"}, config)[0]
    )
    assert "got WORLD_SIZE=2 without" in process_problems({"WORLD_SIZE": "2"}, config)[0]
    assert "got PMI_SIZE=2 without" in process_problems({**launched, "PMI_SIZE": "2"}, config)[0]
    assert launcher_problems({"WORLD_SIZE": "2"}, "dvar batch") == [
        "dvar batch starts processes itself, got WORLD_SIZE=2: start it without a launcher"
    ]
    assert launcher_problems({}, "dvar batch") == []
