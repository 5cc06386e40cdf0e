"""The callback in a real `fit`, with Keras on PyTorch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from task import CAP, RATE, STOP, X, Y, assert_as_expected, record_expected_trace

from dvar import Dvar, Probe, StopMonitor, Trace
from dvar.stopping.integrations.keras import DvarCallback


def build_model(accumulate: int | None = None) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(RATE, gradient_accumulation_steps=accumulate), loss="mse")
    return model


def fit_model(net: keras.Model, monitor: StopMonitor, epochs: int, batches: int = 7, **more: Any) -> DvarCallback:
    callback = DvarCallback(monitor)
    x, y = np.tile(X.numpy(), (batches, 1)), np.tile(Y.numpy(), (batches, 1))
    net.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback], **more)
    return callback


def build_monitor(net: keras.Model, path: Path) -> StopMonitor:
    def losses(held: Any) -> Any:
        return (net(held, training=False) - Y).square().mean(dim=1)

    return StopMonitor(STOP, Probe(losses, X, [net]), path)


@pytest.mark.parametrize("accumulate", [None, 2])
def test_it_stops_fit_where_the_plain_loop_stops(tmp_path: Path, accumulate: int | None) -> None:
    net = build_model(accumulate)
    callback = fit_model(net, build_monitor(net, tmp_path / "trace.jsonl"), CAP)
    assert int(net.optimizer.iterations) == record_expected_trace().last_step
    assert record_expected_trace().last_step % 7  # in the midst of an epoch
    assert callback.verdict == STOP(Trace.read(tmp_path / "trace.jsonl"))
    assert callback.verdict.stop
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_a_saved_model_continues_with_its_trace(tmp_path: Path) -> None:
    net = build_model()
    fit_model(net, build_monitor(net, tmp_path / "trace.jsonl"), 1)
    net.save(tmp_path / "model.keras")
    fit_model(net, build_monitor(net, tmp_path / "trace.jsonl"), 1)  # lost with the process
    again = keras.saving.load_model(tmp_path / "model.keras")
    callback = fit_model(again, build_monitor(again, tmp_path / "trace.jsonl"), CAP)
    assert (int(again.optimizer.iterations), callback.verdict.stop) == (record_expected_trace().last_step, True)
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_the_trace_goes_on_where_keras_restores_the_run_after_it(tmp_path: Path) -> None:
    """BackupAndRestore, behind it in the list, restores weights and step in its own `on_train_begin`."""

    class Killed(keras.callbacks.Callback):  # type: ignore[misc]  # untyped base
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    for callbacks in ([Killed()], []):
        net = build_model()
        judge = DvarCallback(build_monitor(net, tmp_path / "trace.jsonl"))
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        x, y = np.tile(X.numpy(), (7, 1)), np.tile(Y.numpy(), (7, 1))
        with contextlib.suppress(KeyboardInterrupt):
            net.fit(x, y, batch_size=2, epochs=CAP, shuffle=False, verbose=0, callbacks=[judge, backup, *callbacks])
    assert judge.verdict.stop
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))
    assert [path.name for path in tmp_path.glob("trace*")] == ["trace.jsonl"]


def test_without_a_probe_it_records_what_an_epoch_ends_with(tmp_path: Path) -> None:
    net = build_model()
    rule = Dvar(window=20, threshold=0.2, metric="val_loss")
    data = (X.numpy(), Y.numpy())
    callback = fit_model(net, StopMonitor(rule, None, tmp_path / "trace.jsonl"), CAP, batches=2, validation_data=data)
    trace = Trace.read(tmp_path / "trace.jsonl")
    steps, values = trace.metric("val_loss")
    assert callback.verdict == rule(trace)
    assert callback.verdict.stop
    assert steps.tolist() == list(range(2, int(net.optimizer.iterations) + 1, 2))
    early = steps < len(record_expected_trace())
    assert values[early] == pytest.approx(record_expected_trace().values[steps[early]], rel=1e-5)
    assert set(trace.metric_names) == {"loss", "val_loss"}


def test_a_second_fit_begins_where_its_model_is_and_keeps_the_stop_request_of_another_callback(tmp_path: Path) -> None:
    net = build_model()
    callback = fit_model(net, build_monitor(net, tmp_path / "trace.jsonl"), 1)
    net.optimizer.iterations.assign(4)  # set back to a checkpoint
    net.stop_training = True
    callback.on_train_begin()
    assert Trace.read(tmp_path / "trace.jsonl").steps.tolist() == [0, 1, 2, 3, 4]
    assert net.stop_training
