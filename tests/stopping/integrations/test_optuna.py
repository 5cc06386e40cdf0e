"""The pruner in a real study."""

from __future__ import annotations

import math

import optuna
import pytest

from dvar import Dvar, Reason, RefusedInput
from dvar.stopping.integrations.optuna import DvarPruner, build_trace
from dvar.stopping.rules import Plateau

STOP = Dvar(window=20, threshold=0.2)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def report_losses(trial: optuna.Trial) -> float:
    pace = trial.suggest_categorical("pace", [6.0, 12.0])
    for step in range(300):
        loss = math.exp(-step / pace)
        trial.report(loss, step)
        if trial.should_prune():
            break
    return loss


def test_each_trial_stops_by_its_own_reports_and_is_complete() -> None:
    search = {"pace": [6.0, 12.0]}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(search), pruner=DvarPruner(STOP))
    study.optimize(report_losses, n_trials=2)
    trials = study.trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2
    lasts = {trial.params["pace"]: trial.last_step for trial in trials}
    assert 20 < lasts[6.0] < lasts[12.0] < 299
    for trial in trials:
        verdict = STOP(build_trace(trial))
        assert (verdict.stop, verdict.step, verdict.reason) == (True, trial.last_step, Reason.STABILISED)
        assert not STOP(build_trace(trial).cut(trial.last_step - 1)).stop


def test_reports_in_any_order_are_a_trace() -> None:
    study = optuna.create_study(pruner=DvarPruner(STOP))
    trial = study.ask()
    for step in (3, 1, 2):
        trial.report(1.0 / step, step)
    assert build_trace(study.trials[0]).values.tolist() == [1.0, 1 / 2, 1 / 3]


def test_a_value_that_is_not_finite_is_no_convergence() -> None:
    study = optuna.create_study(pruner=DvarPruner(STOP))
    trial = study.ask()
    for step in range(60):
        trial.report(math.nan if step == 3 else 1.0, step)
        assert not trial.should_prune()
    assert STOP(build_trace(study.trials[0])).reason is Reason.NON_FINITE


def test_a_rule_that_reads_what_no_trial_reports_is_refused() -> None:
    trial = optuna.create_study(pruner=DvarPruner(Plateau("clip_image", patience=2))).ask()
    trial.report(1.0, 0)
    trial.report(1.0, 2)
    with pytest.raises(RefusedInput, match="Plateau reads 'clip_image', which no record up to step 2 holds"):
        trial.should_prune()
