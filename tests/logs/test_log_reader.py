"""Every format of a log, as its own tool writes it, and the logs that are refused."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState

from dvar import Dvar, RefusedInput, Trace
from dvar.logs.formats import LOG_FORMATS, LogFormat, find_log, list_formats
from dvar.logs.reader import RANDOM_TIMESTEPS, read_log
from dvar.logs.wandb_file import split_records
from dvar.stopping.trace import TraceFile
from dvar.testing import LOGGED_CURVE, LogFormatContract

Write = Callable[[Path, Mapping[int, float]], Path]
SAMPLES = Path(__file__).parent / "samples"


CURVE = LOGGED_CURVE
STEPS = range(0, 400, 2)


def loss(step: int) -> float:
    return float(np.float32(0.1 + 0.01 * math.exp(-step / 40)))  # as in `CURVE`


@pytest.fixture(autouse=True)
def _no_warning_unless_expected() -> Iterable[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


# --- writers --------------------------------------------------------------------------------------------------------


def write_trace(folder: Path, curve: Mapping[int, float]) -> Path:
    with TraceFile(folder / "trace.jsonl", {"method": "textual-inversion"}) as file:
        trace = Trace()
        for step, value in curve.items():
            file.append(trace.record(step, value, train_loss=0.5, seconds={"train": 1.0}))
    return folder / "trace.jsonl"


def write_table(
    folder: Path, rows: Iterable[Mapping[str, object]], delimiter: str = ",", encoding: str = "utf-8"
) -> Path:
    rows = list(rows)
    path = folder / "metrics.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_plain_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    return write_table(folder, ({"step": step, "val_loss": value, "lr": 1e-3} for step, value in curve.items()))


def write_spreadsheet_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write a table as a spreadsheet does: semicolons, and a byte order mark before the first name."""
    return write_table(folder, ({"step": f"{step}", "eval": value} for step, value in curve.items()), ";", "utf-8-sig")


def write_lightning_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write a table as Lightning's CSVLogger does: rows of training and of validation, the others' cells empty."""
    rows: list[dict[str, object]] = []
    for step, value in curve.items():
        rows += [{"epoch": 0, "step": step, "train_loss": 0.5}, {"epoch": 0, "step": step, "val_loss": value}]
    return write_table(folder, rows)


def write_wandb_history_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write `run.history().to_csv()` of a run that logs its own step: an unnamed index, and W&B's own columns."""
    rows: list[dict[str, object]] = []
    for number, (step, value) in enumerate(curve.items()):
        rows.append({"": 2 * number, "_step": 2 * number, "_runtime": 0.1 * number, "loss": 0.5, "global_step": step})
        rows.append({"": 2 * number + 1, "_step": 2 * number + 1, "_runtime": 0.1 * number})
        rows[-1] |= {"global_step": float(step), "eval/loss": value}
    return write_table(folder, rows)


def write_wandb_chart_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write what the button on a chart saves."""
    name = "mug-3 - L_det"
    return write_table(
        folder,
        ({"Step": step, name: value, f"{name}__MIN": value, f"{name}__MAX": value} for step, value in curve.items()),
    )


def write_wandb_scan_json(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write `json.dump(list(run.scan_history()))`."""
    path = folder / "history.json"
    path.write_text(json.dumps([{"_step": step, "_runtime": 1.5, "L_det": value} for step, value in curve.items()]))
    return path


def write_wandb_frame_json(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write `run.history().to_json()`: an object of columns."""
    columns: dict[str, dict[str, float]] = {"_step": {f"{row}": step for row, step in enumerate(curve)}}
    columns["L_det"] = {f"{row}": value for row, value in enumerate(curve.values())}
    path = folder / "history.json"
    path.write_text(json.dumps(columns))
    return path


def write_simpletuner(folder: Path, curve: Mapping[int, float]) -> Path:
    with (folder / "training_metrics.jsonl").open("w") as file:
        for step, value in curve.items():
            for metrics in ({"train_loss": 0.5, "learning_rate": 1e-4}, {"loss/val": value}):
                line = {"schema_version": 1, "timestamp": "2026-08-20T10:00:00+00:00", "step": step, "metrics": metrics}
                file.write(json.dumps(line, separators=(",", ":"), sort_keys=True) + "\n")
    return folder


def write_ai_toolkit(folder: Path, curve: Mapping[int, float | None]) -> Path:
    database = sqlite3.connect(folder / "loss_log.db")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE steps (step INTEGER PRIMARY KEY, wall_time REAL NOT NULL)")
    database.execute("CREATE TABLE metric_keys (key TEXT PRIMARY KEY, first_seen_step INTEGER, last_seen_step INTEGER)")
    database.execute(
        "CREATE TABLE metrics (step INTEGER NOT NULL, key TEXT NOT NULL, value_real REAL, value_text TEXT, "
        "PRIMARY KEY (step, key), FOREIGN KEY (step) REFERENCES steps(step) ON DELETE CASCADE)"
    )
    for step, value in curve.items():
        database.execute("INSERT INTO steps VALUES (?, ?)", (step, 1.0 * step))
        database.execute("INSERT INTO metrics VALUES (?, 'loss/validation', ?, NULL)", (step, value))
        database.execute("INSERT INTO metrics VALUES (?, 'loss/loss', 0.5, NULL)", (step,))
        database.execute("INSERT INTO metrics VALUES (?, 'note', NULL, 'sampled')", (step,))
    database.commit()
    database.close()
    return folder


def write_tensorboard(folder: Path, curve: Mapping[int, float], name: str = "L_det", new_style: bool = False) -> Path:
    with SummaryWriter(str(folder / "logs")) as writer:
        for step, value in curve.items():
            writer.add_scalar(name, value, step, new_style=new_style)
            writer.add_scalar("train_loss", 0.5, step, new_style=new_style)
        writer.add_text("note", "a mug")
    return folder


def write_tensorboard_tensors(folder: Path, curve: Mapping[int, float]) -> Path:
    return write_tensorboard(folder, curve, new_style=True)


def write_accelerate_tensorboard(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write as diffusers' and kohya's scripts do: with accelerate, which adds a folder of its settings."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("network_train", config={"learning_rate": 1e-3})
    for step, value in curve.items():
        accelerator.log({"loss/current": 0.5, "loss/validation/step_current": value}, step=step)
    accelerator.end_training()
    return folder


def write_long_csv(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write as DiffSynth's `CSVLogger` does: a line for each value."""
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "key", "value"], lineterminator="\n")
        writer.writeheader()
        for step, value in curve.items():
            writer.writerow({"step": step, "key": "loss", "value": 0.5})
            writer.writerow({"step": step, "key": "loss/val", "value": value})
    return folder


def write_trainer_state(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write as transformers' `Trainer` does in each checkpoint: training and evaluation in records of their own."""
    state = TrainerState(best_model_checkpoint="run/checkpoint-100", global_step=max(curve))
    for step, value in curve.items():
        state.log_history += [{"loss": 0.5, "step": step}, {"eval_loss": value, "eval_runtime": 1.5, "step": step}]
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def write_checkpoints(folder: Path, curve: Mapping[int, float]) -> Path:
    """Write an output folder of transformers that holds two checkpoints, the second with the whole history."""
    for name, steps in (("checkpoint-200", list(curve)[:100]), ("checkpoint-1000", list(curve))):
        (folder / name).mkdir()
        write_trainer_state(folder / name, {step: curve[step] for step in steps})
    os.utime(folder / "checkpoint-200" / "trainer_state.json", ns=(0, 0))
    return folder


def write_trackio(folder: Path, curve: Mapping[int, float], runs: Iterable[str] = ("mug-3",)) -> Path:
    with closing(sqlite3.connect(folder / "mug.db")) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, "
            "timestamp TEXT NOT NULL, run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL)"
        )
        for number, run in enumerate(runs):
            for step, value in curve.items():
                metrics = json.dumps({"train_loss": 0.5, "val_loss": value if math.isfinite(value) else "NaN"})
                row = (f"id-{number}", "2026-08-20T10:00:00+00:00", run, step, metrics.encode())
                database.execute(
                    "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)", row
                )
        database.commit()
    return folder / "mug.db"


def write_mlflow_database(folder: Path, curve: Mapping[int, float], runs: Iterable[str] = ("mug-3",)) -> Path:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (run_uuid VARCHAR(32) NOT NULL, name VARCHAR(250))")
        database.execute(
            "CREATE TABLE metrics (key VARCHAR(250) NOT NULL, value FLOAT NOT NULL, timestamp BIGINT NOT NULL, "
            "run_uuid VARCHAR(32) NOT NULL, step BIGINT DEFAULT '0' NOT NULL, is_nan BOOLEAN DEFAULT '0' NOT NULL)"
        )
        for number, run in enumerate(runs):
            database.execute("INSERT INTO runs VALUES (?, ?)", (f"id-{number}", run))
            for step, value in curve.items():
                for name, loss in (("train_loss", 0.5), ("val/loss", value)):
                    finite = math.isfinite(loss)
                    row = (name, loss if finite else 0.0, 1_795_913_182_774 + step, f"id-{number}", step, not finite)
                    database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
        database.commit()
    return folder


def write_mlflow_files(folder: Path, curve: Mapping[int, float], run: str = "79eb") -> Path:
    run_folder = folder / "mlruns" / "0" / run
    (run_folder / "metrics" / "val").mkdir(parents=True)
    (run_folder / "meta.yaml").write_text(f"run_id: {run}\nrun_name: mug-3\n")
    (folder / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    for name, values in (("train_loss", dict.fromkeys(curve, 0.5)), ("val/loss", curve)):
        lines = (f"{1_795_913_182_774 + step} {value} {step}\n" for step, value in values.items())
        (run_folder / "metrics" / name).write_text("".join(lines))
    return folder / "mlruns"


def encode_field(number: int, content: bytes | int) -> bytes:
    """Return a field of a Protocol Buffers message."""
    if isinstance(content, int):
        return encode_varint(number << 3) + encode_varint(content)
    return encode_varint(number << 3 | 2) + encode_varint(len(content)) + content


def encode_varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + encode_varint(value >> 7)


def encode_history(step: int, values: Mapping[str, object]) -> bytes:
    items = (
        encode_field(1, encode_field(2, name.encode()) + encode_field(16, json.dumps(value).encode()))
        for name, value in values.items()
    )
    return encode_field(1, step) + encode_field(2, b"".join(items) + encode_field(2, encode_field(1, step)))


def encode_records(records: Iterable[bytes]) -> bytes:
    """Return a file of W&B: records in blocks of 32 KiB, those that do not fit in a block in parts."""
    content = b":W&B\xe1\xbe\0"
    for record in records:
        first = True
        while first or record:
            space = 32768 - len(content) % 32768
            if space < 7:
                content += bytes(space)
                space = 32768
            part, record = record[: space - 7], record[space - 7 :]
            kind = (1 if first else 4) if not record else (2 if first else 3)
            content += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
    return content


def write_wandb_file(folder: Path, curve: Mapping[int, float]) -> Path:
    records = [encode_field(1, 1) + encode_field(17, b"\x0a\x03mug")]  # the run itself
    records += [encode_history(step, {"train/loss": 0.5, "val/loss": value}) for step, value in curve.items()]
    (folder / "run-nrwnfbnx.wandb").write_bytes(encode_records(records))
    return folder


WRITERS: dict[str, tuple[Write, ...]] = {
    "trace": (write_trace,),
    "csv": (
        write_plain_csv,
        write_spreadsheet_csv,
        write_lightning_csv,
        write_wandb_history_csv,
        write_wandb_chart_csv,
    ),
    "json": (write_wandb_scan_json, write_wandb_frame_json, write_simpletuner),
    "ai-toolkit": (write_ai_toolkit,),
    "tensorboard": (write_tensorboard, write_tensorboard_tensors, write_accelerate_tensorboard),
    "long-csv": (write_long_csv,),
    "trainer-state": (write_trainer_state, write_checkpoints),
    "trackio": (write_trackio,),
    "mlflow-database": (write_mlflow_database,),
    "mlflow-files": (write_mlflow_files,),
    "wandb": (write_wandb_file,),
}


# --- what is read ---------------------------------------------------------------------------------------------------


class TestEveryFormat(LogFormatContract):
    write: Write

    @pytest.fixture(
        autouse=True,
        params=[(name, write) for name, writers in WRITERS.items() for write in writers],
        ids=lambda param: param[1].__name__,
    )
    def _format(self, request: pytest.FixtureRequest) -> None:
        name, self.write = request.param
        self.log_format = LOG_FORMATS[name]

    def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
        return self.write(folder, curve)

    def test_a_rule_judges_it_as_the_live_run(self, tmp_path: Path) -> None:
        live = Trace()
        for step, value in CURVE.items():
            live.record(step, value)
        assert Dvar(100, 0.15)(read_log(self.write_log(tmp_path, CURVE))) == Dvar(100, 0.15)(live)


def test_the_writers_cover_every_format() -> None:
    assert set(WRITERS) == set(LOG_FORMATS)


def read_pipes(path: Path, step_column: str | None) -> Iterator[tuple[int, str, float]]:
    for line in path.read_text().splitlines()[1:]:
        step, value = line.split("|")
        yield int(step), "val_loss", float(value)


PIPES = LogFormat("a format of another package", lambda path: path.suffix == ".pipes", read_pipes)


class TestAFormatOfAnotherPackage(LogFormatContract):
    log_format = PIPES

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LOG_FORMATS, "_items", dict(LOG_FORMATS))
        LOG_FORMATS.register("pipes", PIPES)

    def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
        path = folder / "run.pipes"
        path.write_text("step, loss\n" + "".join(f"{step}|{value!r}\n" for step, value in curve.items()))
        return path

    def test_it_is_asked_before_the_general_formats(self, tmp_path: Path) -> None:
        path = self.write_log(tmp_path, CURVE)
        assert LOG_FORMATS["csv"].recognises(path)
        assert read_log(path).header["log"] == {"format": PIPES.title, "file": "run.pipes", "metric": "val_loss"}


def test_a_run_folder_of_ours_is_read_by_its_trace(tmp_path: Path) -> None:
    write_trace(tmp_path, CURVE)
    assert len(read_log(tmp_path)) == len(CURVE)


def test_the_samples_of_an_own_trace_are_kept_and_its_other_metrics_can_be_asked_for(tmp_path: Path) -> None:
    trace = Trace()
    for step in range(20):
        trace.record(step, [2.0, 4.0 - step / 10], clip_image=0.5 + step / 100)
    trace.write(tmp_path / "trace.jsonl")
    assert read_log(tmp_path).samples.shape == (20, 2)
    relative = read_log(tmp_path, "eval/first")
    assert relative.values.tolist() == trace.metric("eval/first")[1].tolist()
    assert read_log(tmp_path, "clip_image").values[-1] == 0.69
    with pytest.raises(RefusedInput, match=r"holds no 'clip_imgae': name one of clip_image, eval, eval/first"):
        read_log(tmp_path, "clip_imgae")


def test_a_value_that_was_not_finite_is_read_as_such(tmp_path: Path) -> None:
    curve = {**CURVE, 12: math.nan, 20: math.inf}
    writers = (write_trace, write_plain_csv, write_wandb_scan_json, write_simpletuner, write_tensorboard)
    for write in (*writers, write_long_csv, write_mlflow_files, write_wandb_file):
        folder = tmp_path / write.__name__
        folder.mkdir()
        values = read_log(write(folder, curve)).values
        assert math.isnan(values[6])
        assert values[10] == math.inf


def test_sqlite_keeps_null_in_the_place_of_a_nan(tmp_path: Path) -> None:
    assert math.isnan(read_log(write_ai_toolkit(tmp_path, {**CURVE, 12: math.nan})).values[6])


def test_a_database_marks_what_it_cannot_hold(tmp_path: Path) -> None:
    for write in (write_trackio, write_mlflow_database):
        assert math.isnan(read_log(write(tmp_path, {**CURVE, 12: math.nan})).values[6])


def test_a_file_of_wandb_itself_is_read() -> None:
    trace = read_log(SAMPLES / "run-mug.wandb")  # W&B 0.31, 120 records over two blocks
    assert trace.steps.tolist() == list(range(0, 240, 2))
    assert trace.values.tolist() == [0.1 + 0.01 * math.exp(-step / 40) for step in range(0, 240, 2)]


@given(st.lists(st.binary(max_size=70_000), max_size=8))
def test_the_records_of_a_wandb_file_are_whole_at_any_size(records: list[bytes]) -> None:
    assert list(split_records(encode_records(records), Path("run.wandb"))) == records


def test_a_wandb_file_that_ends_within_a_record_is_read_up_to_it(tmp_path: Path) -> None:
    path = find_log(write_wandb_file(tmp_path, CURVE))
    content = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(content[:-cut])
        with pytest.warns(UserWarning, match="the last line is incomplete"):
            assert read_log(path).steps.tolist() == list(CURVE)[:-1]


@pytest.mark.parametrize(
    "content",
    [
        encode_records([b""]).replace(b"\1", b"\x09"),  # a kind of part that does not exist
        encode_records([b"\x0f"]),  # an encoding that does not exist
        encode_records([b"\xff\xff"]),  # a number that does not end
        encode_records([encode_field(2, encode_field(1, encode_field(1, b"\xff")))]),  # a name that is no text
        encode_records([encode_field(2, encode_field(1, encode_field(1, b"loss") + encode_field(16, b"{")))]),
        encode_records([encode_field(2, 7)]),  # a number in the place of the history, a step, an item, a name, a value
        encode_records([encode_field(2, encode_field(2, 7))]),
        encode_records([encode_field(2, encode_field(1, 7))]),
        encode_records([encode_field(2, encode_field(1, encode_field(1, 7)))]),
        encode_records([encode_field(2, encode_field(1, encode_field(1, b"loss") + encode_field(16, 7)))]),
    ],
)
def test_a_damaged_wandb_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run-1.wandb").write_bytes(content)
    with pytest.raises(RefusedInput, match=r"is damaged \(.*\): export the run's history from W&B"):
        read_log(tmp_path)


def test_a_wandb_cell_of_text_is_a_number_where_it_says_one(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text('[{"_step": 0, "L_det": 0.5}, {"_step": 1, "L_det": "NaN"}, {"_step": 2, "L_det": "-Infinity"}]')
    values = read_log(path).values
    assert math.isnan(values[1])
    assert values[2] == -math.inf


# --- which curve ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "train_loss", "loss/current", "train/loss", "loss/loss", "Loss"])
def test_a_loss_with_random_timesteps_is_refused_and_warned_of(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path, ({"step": step, name: loss(step), "lr": 1e-3} for step in STEPS))
    with pytest.raises(RefusedInput, match="its variance says nothing about convergence") as refused:
        read_log(path)
    assert f"only {name}: " in str(refused.value)
    assert "--metric" in str(refused.value)
    with pytest.warns(UserWarning, match=RANDOM_TIMESTEPS):
        assert read_log(path, name).values[0] == loss(0)


def test_the_training_loss_of_an_own_trace_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=RANDOM_TIMESTEPS):
        read_log(write_trace(tmp_path, CURVE), "train_loss")


@pytest.mark.parametrize(
    "name",
    [
        "eval",
        "L_det",
        "val_loss",
        "valLoss",
        "eval/loss",
        "validation loss",
        "loss/validation",
        "stable_loss",
        "test/mse",
    ],
)
def test_a_loss_on_fixed_inputs_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    others: dict[str, object] = {
        "loss": 0.5,
        "eval_runtime": 3.0,
        "loss/validation/step_divergence": 0.1,
        "val_accuracy": 0.9,
    }
    others |= {"val_loss_std": 0.1, "eval_loss_note": "good"}  # no loss, and no number anywhere
    trace = read_log(write_table(tmp_path, ({"step": step, name: loss(step), **others} for step in STEPS)))
    assert trace.header["log"]["metric"] == name


def test_several_candidates_are_listed_and_one_is_chosen_by_name(tmp_path: Path) -> None:
    path = write_table(
        tmp_path, ({"step": step, "val_loss": loss(step), "eval/loss": 2.0, "loss": 3.0} for step in STEPS)
    )
    with pytest.raises(
        RefusedInput, match=r"2 losses on fixed inputs: choose one with --metric, of val_loss, eval/loss"
    ):
        read_log(path)
    assert read_log(path, "eval/loss").values[0] == 2.0


def test_the_refusal_of_a_misspelt_metric_names_the_nearest_first(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"holds no 'val_los': name one of val_loss, lr"):
        read_log(write_plain_csv(tmp_path, CURVE), "val_los")


def test_curves_of_several_runs_are_distinguished_by_the_name_of_the_run(tmp_path: Path) -> None:
    path = write_table(tmp_path, ({"Step": step, "a - L_det": loss(step), "b - L_det": 2.0} for step in STEPS))
    with pytest.raises(RefusedInput, match="2 losses on fixed inputs"):
        read_log(path)
    with pytest.raises(RefusedInput, match=r"holds several 'L_det': name one of a - L_det, b - L_det"):
        read_log(path, "L_det")
    assert read_log(path, "b - L_det").values[0] == 2.0


@pytest.mark.parametrize(
    ("pooled", "others"),
    [
        ("loss/val/pooled", ("loss/val/mug", "loss/val/dog")),  # SimpleTuner
        ("loss/validation_step/total_average", ("loss/validation_step/mug", "loss/validation_step/dog")),  # OneTrainer
        ("val_loss_mean", ("val_loss_mug", "val_loss_dog")),
    ],
)
def test_of_several_candidates_the_one_over_all_is_preferred_and_the_others_are_named(
    tmp_path: Path, pooled: str, others: tuple[str, ...]
) -> None:
    rows = [{"step": step, **dict.fromkeys(others, 2.0), pooled: loss(step)} for step in STEPS]
    trace = read_log(write_table(tmp_path, rows))
    assert trace.header["log"]["metric"] == pooled
    assert trace.header["log"]["preferred_to"] == list(others)
    assert trace.values[0] == loss(0)
    doubled = [{**row, pooled.replace("loss", "mse"): 2.0} for row in rows]
    with pytest.raises(RefusedInput, match="4 losses on fixed inputs: choose one"):
        read_log(write_table(tmp_path, doubled))


@pytest.mark.parametrize("write", [write_trackio, write_mlflow_database])
def test_the_runs_of_one_database_are_distinguished_by_name(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path, CURVE, ("mug-3", "dog-1"))
    with pytest.raises(RefusedInput, match="2 losses on fixed inputs: choose one with --metric, of mug-3 - val"):
        read_log(path)
    (tmp_path / "twins").mkdir()
    twins = write(tmp_path / "twins", CURVE, ("mug-3", "mug-3"))
    with pytest.raises(RefusedInput, match="2 losses on fixed inputs: choose one with --metric, of id-0 - val"):
        read_log(twins)
    name = "val_loss" if write is write_trackio else "val/loss"
    assert read_log(path, f"dog-1 - {name}").steps.tolist() == list(CURVE)


def test_trackio_counts_calls_where_the_trainer_counts_updates(tmp_path: Path) -> None:
    path = write_trackio(tmp_path, {})
    with closing(sqlite3.connect(path)) as database:
        for call, step in enumerate(STEPS):
            text = json.dumps({"eval/loss": loss(step), "train/global_step": step})
            row = ("id", "2026-08-20", "mug-3", call, text)
            database.execute(
                "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)", row
            )
        database.commit()
    assert read_log(path).steps.tolist() == list(STEPS)


def test_several_runs_of_mlflow_are_refused_with_their_folders(tmp_path: Path) -> None:
    for run in ("a1", "b2"):
        log = write_mlflow_files(tmp_path, CURVE, run)
    with pytest.raises(RefusedInput, match=r"holds 2 runs of MLflow: name the folder of one, of .*a1, .*b2"):
        read_log(log)
    assert len(read_log(log / "0" / "b2")) == len(CURVE)


def test_kohyas_faulty_average_is_warned_of(tmp_path: Path) -> None:
    log = write_tensorboard(tmp_path, CURVE, "loss/validation/step_average")
    with pytest.warns(UserWarning, match="overwrite only a part of this average"):
        read_log(log)


def test_kohyas_average_by_epochs_is_warned_of(tmp_path: Path) -> None:
    log = write_tensorboard(tmp_path, CURVE, "loss/validation/epoch_average")
    with pytest.warns(UserWarning, match="count its steps in epochs in TensorBoard: give windows in epochs"):
        read_log(log)


def test_a_fault_is_reported_where_a_curve_must_be_chosen(tmp_path: Path) -> None:
    names = ("loss/validation/step_average", "loss/validation/step_current")
    path = write_table(tmp_path, ({"step": step, **dict.fromkeys(names, loss(step))} for step in STEPS))
    with pytest.raises(RefusedInput, match=r"step_average \(kohya's scripts overwrite .*\), loss/validation/step_curr"):
        read_log(path)


def test_a_rounded_curve_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"takes only \d+ values in 200 records: it was rounded"):
        read_log(write_plain_csv(tmp_path, {step: round(value, 3) for step, value in CURVE.items()}))
    read_log(write_plain_csv(tmp_path, dict.fromkeys(CURVE, 0.5)))  # never changing is another matter: "no change"


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_read_as_its_last_attempt(tmp_path: Path) -> None:
    rows = [{"step": step, "val_loss": 9.0} for step in range(60)]
    rows += [{"step": step, "val_loss": loss(step)} for step in range(40, 50)]
    with pytest.warns(UserWarning, match="resumed from step 40; what was recorded before from there on is left out"):
        trace = read_log(write_table(tmp_path, rows))
    assert trace.steps.tolist() == list(range(50))
    assert trace.values[39:41].tolist() == [9.0, loss(40)]


def sort_first(folder: Path) -> None:
    """Rename the one event file in a folder so that it is before any other: two of one second may be in any order."""
    (first,) = folder.iterdir()
    first.rename(first.with_name(first.name.replace("events.out.tfevents.", "events.out.tfevents.0")))


def test_a_resumed_tensorboard_run_is_the_same(tmp_path: Path) -> None:
    write_tensorboard(tmp_path, dict.fromkeys(range(60), 9.0))
    sort_first(tmp_path / "logs")
    write_tensorboard(tmp_path, {step: loss(step) for step in range(40, 50)})
    with pytest.warns(UserWarning, match="resumed from step 40"):
        trace = read_log(tmp_path)
    assert trace.steps.tolist() == list(range(50))


def test_what_a_tensorboard_writer_purges_is_reported_as_for_every_other_format(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path), filename_suffix=".0") as writer:
        for step in range(60):
            writer.add_scalar("L_det", 9.0, step)
    sort_first(tmp_path)
    with SummaryWriter(str(tmp_path), purge_step=40, filename_suffix=".1") as writer:
        for step in range(40, 50):
            writer.add_scalar("L_det", loss(step), step)
    with pytest.warns(UserWarning, match="resumed from step 40; what was recorded before from there on is left out"):
        assert read_log(tmp_path).steps.tolist() == list(range(50))


def test_steps_in_no_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"go back 199 times: sort the log by its steps"):
        read_log(write_plain_csv(tmp_path, dict(reversed(CURVE.items()))))


def test_one_step_with_two_values_is_refused_and_with_one_value_twice_is_not(tmp_path: Path) -> None:
    rows = [{"step": 0, "val_loss": 0.5}, {"step": 0, "val_loss": 0.5}, {"step": 1, "val_loss": 0.4}]
    assert read_log(write_table(tmp_path, rows)).steps.tolist() == [0, 1]
    with pytest.raises(RefusedInput, match=r"val_loss at step 1 has two values, 0.4 and 0.3: average them"):
        read_log(write_table(tmp_path, [*rows, {"step": 1, "val_loss": 0.3}]))


def test_a_run_that_repeats_its_last_record_was_resumed(tmp_path: Path) -> None:
    """Evaluations at every 50 steps, a checkpoint at 500, and the next attempt evaluates 550 once more."""
    rows = [
        {"step": step, "train_loss": 1.0, **({"val_loss": 1 / (1 + step)} if step % 50 == 0 else {})}
        for step in range(560)
    ]
    again = [
        {"step": step, "train_loss": 1.0, **({"val_loss": 0.25} if step % 50 == 0 else {})} for step in range(501, 601)
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows + again))
    with pytest.warns(UserWarning, match="val_loss: resumed from step 550"):
        trace = read_log(log)
    assert trace.steps.tolist() == list(range(0, 601, 50))
    assert trace.values[-2:].tolist() == [0.25, 0.25]
    log.write_text('{"step": 1, "val_loss": 0.4}\n{"step": 1, "val_loss": 0.40001}\n{"step": 2, "val_loss": 0.3}\n')
    with pytest.warns(UserWarning, match="val_loss: resumed from step 1"):
        assert read_log(log).values.tolist() == [0.40001, 0.3]


def test_a_run_may_be_resumed_many_times(tmp_path: Path) -> None:
    rows = [step for attempt in range(20) for step in range(attempt * 10, attempt * 10 + 15)]
    log = tmp_path / "log.csv"
    log.write_text("step,val_loss\n" + "".join(f"{step},{1 / (1 + step)!r}\n" for step in rows))
    with pytest.warns(UserWarning, match="resumed from step 10, 20"):
        assert read_log(log).steps.tolist() == list(range(205))


def test_another_metric_of_a_trace_is_judged_from_where_the_run_is(tmp_path: Path) -> None:
    trace = Trace({"judged_from": 500, "reading": "as it is"})
    for step in range(3):
        trace.record(step, eval=[1.0, 2.0], val_loss=0.5)
    trace.write(tmp_path / "trace.jsonl")
    assert read_log(tmp_path, "val_loss").header["judged_from"] == 500


def test_the_newest_state_of_a_trainer_is_read(tmp_path: Path) -> None:
    for place, (name, steps) in enumerate({".": 100, "checkpoint-500": 500}.items()):
        history = [{"step": step, "eval_loss": 1.0} for step in range(0, steps + 1, 50)]
        file = tmp_path / name / "trainer_state.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"log_history": history}))
        os.utime(file, (place, place))
    assert read_log(tmp_path).last_step == 500


def test_the_metrics_of_lightning_are_found_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "version_0" / "metrics.csv"
    file.parent.mkdir()
    file.write_text("epoch,step,val_loss\n0,0,0.5\n1,10,0.4\n")
    assert read_log(tmp_path).values.tolist() == [0.5, 0.4]


def test_a_concept_that_is_called_total_is_no_loss_over_all(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss/validation_step/total eclipse,loss/validation_step/b\n0,1,2\n")
    with pytest.raises(RefusedInput, match="holds 2 losses on fixed inputs"):
        read_log(log)
    log.write_text("step,loss/validation_step/total_average,loss/validation_step/b\n0,1,2\n")
    assert read_log(log).values.tolist() == [1.0]


def test_a_step_logged_twice_as_nan_is_no_contradiction(tmp_path: Path) -> None:
    rows = [{"step": 0, "val_loss": 0.5}, {"step": 1, "val_loss": math.nan}, {"step": 1, "val_loss": math.nan}]
    assert read_log(write_table(tmp_path, rows)).steps.tolist() == [0, 1]


def test_the_column_of_steps_can_be_named(tmp_path: Path) -> None:
    path = write_table(tmp_path, ({"updates": step, "val_loss": loss(step)} for step in STEPS))
    with pytest.raises(RefusedInput, match=r"none of the columns global_step, .* of updates, val_loss"):
        read_log(path)
    assert read_log(path, step="updates").steps.tolist() == list(STEPS)
    with pytest.raises(RefusedInput, match=r"has no column 'update': name the column of steps, of updates, val_loss"):
        read_log(path, step="update")
    with pytest.raises(RefusedInput, match="counts its steps itself"):
        read_log(write_ai_toolkit(tmp_path, CURVE), step="updates")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": "1.5", "val_loss": 0.4}, "a step must be a whole number of updates, got '1.5' under step"),
        ({"step": "two", "val_loss": 0.4}, "a step must be a whole number of updates, got 'two' under step"),
        ({"step": "", "val_loss": 0.4}, "val_loss is recorded without a step"),
        ({"step": 1, "val_loss": "0,4"}, "val_loss at step 1 must be a number, got '0,4'"),
        ({"step": "inf", "val_loss": 0.4}, "a step must be a whole number of updates"),
    ],
)
def test_a_bad_cell_is_refused_by_name(tmp_path: Path, row: Mapping[str, object], message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        read_log(write_table(tmp_path, [{"step": 0, "val_loss": 0.5}, row]))


def test_a_table_of_tabs_and_json_of_columns_or_of_one_record_are_read(tmp_path: Path) -> None:
    assert len(read_log(write_table(tmp_path, ({"step": step, "eval": loss(step)} for step in STEPS), "\t"))) == len(
        CURVE
    )
    columns = {"step": list(CURVE), "val_loss": list(CURVE.values()), "val_loss_done": [True] * len(CURVE)}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    assert read_log(tmp_path / "columns.json").values.tolist() == list(CURVE.values())
    (tmp_path / "one.json").write_text('{"step": 3, "val_loss": 0.5}')
    assert read_log(tmp_path / "one.json").steps.tolist() == [3]


# --- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"hello\nworld\n", b"\x00,\x01\n"])
def test_the_refusal_of_an_unknown_format_names_the_known_ones(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.bin"
    path.write_bytes(content)
    with pytest.raises(RefusedInput) as refused:
        read_log(path)
    assert all(log_format.title in str(refused.value) for log_format in list_formats())
    assert "\n" not in str(refused.value)


def test_a_missing_log_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="does not exist: check the path"):
        read_log(tmp_path / "nothing")
    with pytest.raises(RefusedInput, match="in no known format"):
        read_log(tmp_path)


def test_a_torn_last_line_is_dropped_with_a_warning_and_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write_simpletuner(tmp_path, CURVE) / "training_metrics.jsonl"
    content = path.read_text()
    path.write_text(content[:-20])
    with pytest.warns(UserWarning, match="the last line is incomplete"):
        assert len(read_log(path)) == len(CURVE) - 1
    path.write_text(content.replace('"step":2,', '"step":', 1))
    with pytest.raises(RefusedInput, match=r"line 3 is not JSON .*: restore the file"):
        read_log(path)
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(RefusedInput, match=r"line 2 must be a JSON object, got '\[1\]'"):
        read_log(path)


@pytest.mark.parametrize("line", ["1,0,4", "1,0.4,0.5,0.6", "1"])
def test_a_table_whose_lines_are_not_as_long_as_its_names_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"step,val_loss\n0,0.5\n{line}\n2,0.3\n")
    with pytest.raises(RefusedInput, match=r"log\.csv, line 3 has a different number of cells than the header: fix it"):
        read_log(path)


def test_a_table_torn_at_its_last_line_is_read_up_to_it_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,val_loss,lr\n0,0.5,1\n1,0.4,1,\n2,0.3")
    with pytest.warns(UserWarning, match="the last line is incomplete, as after a crash, and is dropped"):
        assert read_log(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_beyond_the_largest_float_is_infinite(tmp_path: Path, sign: int) -> None:
    rows = [{"step": step, "eval_loss": value} for step, value in enumerate((0.5, sign * 10**400))]
    (tmp_path / "log.json").write_text(json.dumps(rows))
    assert read_log(tmp_path / "log.json").values.tolist() == [0.5, sign * math.inf]


def test_a_header_with_a_carriage_return_within_ends_there(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"step,eval_loss\r0,0.5\r1,0.4\n")
    assert read_log(tmp_path / "log.csv").values.tolist() == [0.5, 0.4]


def test_json_that_holds_no_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text("[1, 2, 3]")
    with pytest.raises(RefusedInput, match=r"must hold records, got '\[1, 2, 3\]'"):
        read_log(tmp_path / "log.json")


def test_another_database_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "other.db")
    database.execute("CREATE TABLE people (name TEXT)")
    database.close()
    with pytest.raises(RefusedInput, match=r"must hold ai-toolkit's table of metrics, .*no such table: metrics"):
        read_log(tmp_path / "other.db")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\0" + 500 * b"x")
    with pytest.raises(RefusedInput, match="must hold ai-toolkit's table of metrics"):
        read_log(tmp_path / "damaged.db")


def test_a_database_without_its_newest_part_is_refused_by_the_name_of_that_file(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "loss_log.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE metrics (step INTEGER, key TEXT, value_real REAL, value_text TEXT)")
        database.executemany("INSERT INTO metrics VALUES (?, 'val/loss', ?, NULL)", CURVE.items())
        database.commit()
        assert len(read_log(tmp_path)) == len(CURVE)  # while the trainer still has it open
        (tmp_path / "copy").mkdir()
        shutil.copyfile(tmp_path / "loss_log.db", tmp_path / "copy" / "loss_log.db")
        with pytest.raises(
            RefusedInput, match=r"was copied without loss_log\.db-wal, which holds its newest records .*: copy that"
        ):
            read_log(tmp_path / "copy")
        shutil.copyfile(tmp_path / "loss_log.db-wal", tmp_path / "copy" / "loss_log.db-wal")
        assert len(read_log(tmp_path / "copy")) == len(CURVE)


def test_reading_a_database_creates_no_file(tmp_path: Path) -> None:
    log = write_ai_toolkit(tmp_path, CURVE)
    assert len(read_log(log)) == len(CURVE)
    assert [path.name for path in tmp_path.iterdir()] == ["loss_log.db"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", '{"log_history": [{"step": 1,', "is not whole JSON .*: wait for the checkpoint"),
        ("trainer_state.json", '{"log_history": 3}', "must hold records, got '3'"),
        ("loss.csv", "step,key,value\n1,val_loss,abc\n", "val_loss at step 1 must be a number, got 'abc'|holds none"),
        ("loss.csv", "when,key,value\n1,val_loss,0.5\n", "none of the columns global_step"),
        ("mlruns/0/a/metrics/val_loss", "1 2\n", "line 1 must be \"timestamp value step\", got '1 2': restore"),
    ],
)
def test_a_damaged_log_is_refused_by_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    if "mlruns" in name:
        (tmp_path / "mlruns" / "0" / "a" / "meta.yaml").write_text("run_id: a\n")
    with pytest.raises(RefusedInput, match=message):
        read_log(tmp_path / "mlruns" if "mlruns" in name else tmp_path)


def test_a_damaged_record_of_trackio_is_refused_by_its_step(tmp_path: Path) -> None:
    path = write_trackio(tmp_path, CURVE)
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE metrics SET metrics = '{' WHERE step = 4")
        database.commit()
    with pytest.raises(RefusedInput, match=r"the record of step 4 is not JSON \(.*\): restore it"):
        read_log(path)


def test_a_live_table_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,val_loss\n0,0.5\n1,0.45\n2,0.4")
    assert read_log(tmp_path / "log.csv").values.tolist() == [0.5, 0.45, 0.4]
    assert read_log(tmp_path / "log.csv", live=True).values.tolist() == [0.5, 0.45]
    (tmp_path / "log.csv").write_text("step,val_loss\n0,0.5\n1,0.45\n2")
    assert read_log(tmp_path / "log.csv", live=True).values.tolist() == [0.5]  # and no warning
    write_trace(tmp_path, CURVE)
    with (tmp_path / "trace.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert len(read_log(tmp_path, live=True)) == len(CURVE)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("step,val_loss,note\n1,2,\xe9\n".encode("latin-1"))
    with pytest.raises(RefusedInput, match="cannot be read as text"):
        read_log(tmp_path / "log.csv")


def test_event_files_of_several_runs_are_refused_with_their_folders(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_tensorboard(tmp_path / run, CURVE)
    with pytest.raises(RefusedInput, match=r"of 2 runs: name the folder of one, of .*a/logs, .*b/logs"):
        read_log(tmp_path)
    assert len(read_log(tmp_path / "b")) == len(CURVE)


def test_without_tensorboard_its_files_are_refused_by_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_tensorboard(tmp_path, CURVE)
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(RefusedInput, match=r"event files need tensorboard: pip install 'dvar\[tensorboard\]'$"):
        read_log(log)


def test_reading_a_table_loads_neither_torch_nor_tensorboard(tmp_path: Path) -> None:
    path = write_plain_csv(tmp_path, CURVE)
    program = f"import sys; from dvar.logs.reader import read_log; read_log({str(path)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "tensorboard", "pandas"}.isdisjoint(done.stdout.split())


def test_a_number_is_what_other_programs_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for text, message in {
        "step,L_det\n1,0.5\n2,1_900\n": "L_det at step 2 must be a number, got '1_900'",
        "step,L_det\n1,0.5\n2_0,0.4\n": "a step must be a whole number of updates, got '2_0' under step",
        "step,loss,loss\n1,0.5,0.6\n2,0.4,0.3\n": "has several columns 'loss': rename or remove all but one",
    }.items():
        path.write_text(text)
        with pytest.raises(RefusedInput, match=message):
            read_log(path)


@pytest.mark.parametrize("write", [write_ai_toolkit, write_mlflow_database])
def test_a_database_with_half_a_step_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    folder = write(tmp_path, CURVE)
    (path,) = folder.glob("*.db")
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE metrics SET step = 4.5 WHERE step = 4")
        database.commit()
    with pytest.raises(RefusedInput, match=r"a step must be a whole number of updates, got 4\.5 under step"):
        read_log(folder)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_event_file_is_warned_of(tmp_path: Path, damage: str) -> None:
    folder = write_tensorboard(tmp_path, CURVE)
    (path,) = folder.rglob("*tfevents*")
    content = bytearray(path.read_bytes())
    whole = len(read_log(folder))
    if damage == "cut":
        del content[3 * len(content) // 4 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="ends within a record or is damaged there; what follows was not read"):
        assert 0 < len(read_log(folder)) < whole
