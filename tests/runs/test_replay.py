"""Rules replayed on a recorded curve: their verdicts, the figure and the page, and what is refused."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dvar import Dvar, RefusedInput, Trace
from dvar.launch.config import LaunchConfig
from dvar.runs.config import ReplayConfig, problems
from dvar.runs.replay import ReplayOutcome, compute_ratios, read_own_settings, replay_rule, replay_rules
from dvar.runs.replay_figure import plot_replay, write_replay
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rule import build_rule
from dvar.stopping.rules import RULES, FixedSteps, RuleEntry


def record_trace(steps: int = 900, level: float = 0.04) -> Trace:
    noise = np.random.default_rng(0).normal(0, 2e-5, steps + 1)
    trace = Trace({"log": {"format": "CSV", "metric": "val <loss>"}})
    for step in range(steps + 1):
        trace.record(step, level * (1 + 0.02 * math.exp(-step / 100)) + noise[step])
    return trace


ALL = ReplayConfig(rule=("all",))


def test_a_replay_stops_where_the_live_run_would_have() -> None:
    recorded = record_trace()
    for outcome in replay_rules(recorded, ALL):
        rule, live = build_rule(outcome.name, vars(ALL)), Trace()
        for row in recorded.records:
            live.record(**row)
            if (verdict := rule(live)).stop:
                break
        assert outcome.verdict == verdict
        assert outcome.stop == (verdict.step if verdict.stop else None)
        assert outcome.sentence == verdict.sentence


def test_the_rules_come_once_in_the_order_of_the_table() -> None:
    config = ReplayConfig(rule=("hall", "dvar", "hall"))
    assert [outcome.name for outcome in replay_rules(record_trace(), config)] == ["dvar", "hall"]
    assert [outcome.name for outcome in replay_rules(record_trace(), ALL)] == list(RULES)


def test_each_setting_reaches_its_rule() -> None:
    config = ReplayConfig(
        window=20, threshold=0.3, ema_threshold=0.5, hall_threshold=0.6, trend_threshold=0.7, patience=8, min_delta=0.9
    )
    assert [repr(build_rule(name, vars(config))) for name in RULES] == [
        "Dvar(window=20, threshold=0.3)",
        "Dvar(window=20, threshold=0.3, strict_paper=True)",
        "EmaPercentile(window=20, threshold=0.5)",
        "Hall(window=20, threshold=0.6)",
        "Trend(window=20, threshold=0.7, metric='eval/first')",
        "Plateau(metric='eval', patience=8, min_delta=0.9)",
        "Octave()",
    ]


def test_a_rule_of_another_package_is_replayed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RULES, "_items", dict(RULES))
    RULES.register("half", RuleEntry("stop after half a window", ("window",), lambda window: FixedSteps(window // 2)))
    config = ReplayConfig(rule=("half",), window=80)
    assert problems(config) == []
    (outcome,) = replay_rules(record_trace(), config)
    assert (outcome.name, outcome.stop) == ("half", 40)
    RULES.register("unfit", RuleEntry("takes what replay does not have", ("pace",), lambda pace: FixedSteps(pace)))
    with pytest.raises(RefusedInput, match="the rule 'unfit' takes a setting 'pace', got only rule, window, "):
        replay_rules(record_trace(), ReplayConfig(rule=("unfit",)))


def test_a_short_curve_says_how_much_is_missing() -> None:
    (outcome,) = replay_rules(record_trace(steps=50), ReplayConfig())
    assert outcome.stop is None
    assert outcome.sentence == "go on at step 50: warming up, 50 of 310 steps"


def test_a_rule_that_cannot_judge_a_curve_says_so_beside_those_that_can() -> None:
    trace = Trace()
    for step in range(500):
        trace.record(step, -1 + math.exp(-step / 50))
    outcomes = {outcome.name: outcome for outcome in replay_rules(trace, ALL)}
    assert outcomes["hall"].verdict is None
    assert "Hall divides by the level of the loss" in outcomes["hall"].sentence
    assert outcomes["dvar"].verdict is not None
    with pytest.raises(RefusedInput, match="Hall divides by the level"):
        replay_rules(trace, ReplayConfig(rule=("hall",)))
    assert "cannot judge" in plot_replay(trace, list(outcomes.values()), 310, 0.15)


def test_the_settings_of_all_rules_are_refused_at_once() -> None:
    with pytest.raises(RefusedInput) as refused:
        replay_rules(record_trace(), ReplayConfig(rule=("all",), window=3, threshold=2.0))
    assert [problem.partition(" must")[0] for problem in refused.value.problems] == ["window", "threshold"]


def test_ratios_are_the_rules_and_nan_while_it_has_none() -> None:
    trace = record_trace()
    ratios = compute_ratios(trace, Dvar(310, 0.15))
    assert np.isnan(ratios[:310]).all()
    expected = [verdict.metrics["ratio"] for verdict in replay_rule(trace, Dvar(310, 0.15))]
    np.testing.assert_array_equal(ratios[310:], expected[310:])


def test_a_launched_script_is_judged_by_the_settings_in_its_trace(tmp_path: Path) -> None:
    path, launch = tmp_path / "trace.jsonl", LaunchConfig(dvar_window=40, dvar_threshold=0.3)
    (tmp_path / "config.json").write_text('{"window": 3}', encoding="utf-8")  # of the model that the script saved
    Trace(launch.header("train.py")).write(path)
    expected = {"window": 40, "threshold": 0.3, "rule": ("dvar",)}
    assert read_own_settings(path) == read_own_settings(tmp_path) == expected
    Trace(LaunchConfig(dvar_rule="hall", dvar_window=40).header("train.py")).write(path)
    assert read_own_settings(path) == {"window": 40, "hall_threshold": 0.01, "rule": ("hall",)}
    Trace(LaunchConfig(dvar_rule="octave").header("train.py")).write(path)
    assert read_own_settings(path) == {"rule": ("octave",)}


@pytest.mark.parametrize(
    "line",
    [
        b'{"dvar_trace": 1}',
        b'{"launch": 3}',
        b'{"launch": {"rule": "dvar", "settings": {"window": "40"}}}',
        b'{"launch": {"rule": "dvar", "settings": {"pace": 3}}}',
        b"step,loss",
        b"\xff\x00",
    ],
)
def test_a_log_without_settings_of_a_rule_has_none_of_its_own(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read_own_settings(path) == {}
    path.write_bytes(line + b"\n")
    assert read_own_settings(path) == {}


# --- the figure -----------------------------------------------------------------------------------------------------


def _read_svg_texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_figure_names_the_curve_and_every_rule_with_its_stop() -> None:
    trace = record_trace()
    outcomes = replay_rules(trace, ALL)
    texts = _read_svg_texts(plot_replay(trace, outcomes, 310, 0.15))
    assert "val <loss>" in texts
    for outcome in outcomes:
        assert outcome.name in texts
        assert f"{outcome.stop or 'goes on'}, {outcome.verdict.reason.value}" in texts  # type: ignore[union-attr]


def test_the_stop_is_plotted_at_its_step() -> None:
    trace = record_trace()
    (outcome,) = replay_rules(trace, ReplayConfig())
    lines = re.findall(
        r'<line x1="([\d.]+)%" x2="\1%" y1="0" y2="100%" class="stop">', plot_replay(trace, [outcome], 310, 0.15)
    )
    assert outcome.stop
    at = 100 * outcome.stop / (900 * 1.03)
    assert [float(line) for line in lines] == pytest.approx([at, at], abs=0.01)  # across the loss and across the ratio


@pytest.mark.parametrize("values", [[math.nan] * 20, [1.0] * 20, [0.5], [math.inf, 1.0, 0.5]])
def test_any_curve_can_be_plotted(values: list[float]) -> None:
    trace = Trace()
    for step, value in enumerate(values):
        trace.record(step, value)
    outcomes = replay_rules(trace, ReplayConfig(rule=("all",), window=8, patience=8))
    assert _read_svg_texts(plot_replay(trace, outcomes, 8, 0.15))[0] == "L_det"


class _StrictParser(HTMLParser):
    """A parser that refuses scripts, references to other files and tags that do not nest."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        assert not {"href", "src", "onload"} & {name for name, _ in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_holds_the_figure_and_the_sentences_and_loads_nothing(tmp_path: Path) -> None:
    trace = record_trace()
    outcomes = replay_rules(trace, ALL)
    path = write_replay(tmp_path / "replay.html", "logs <& curves>", trace, outcomes, ALL)
    page = path.read_text()
    assert _StrictParser(page).open == []
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "logs &lt;&amp; curves&gt;" in page
    assert all(outcome.sentence in page for outcome in outcomes)
    assert plot_replay(trace, outcomes, 310, 0.15) in page


def test_writing_replaces_an_older_figure_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    trace, path = record_trace(), tmp_path / "replay.svg"
    path.write_text("old")
    write_replay(path, "a log", trace, [ReplayOutcome("dvar", None, "cannot")], ReplayConfig())
    ElementTree.fromstring(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RefusedInput, match="choose another place"):
        write_replay(tmp_path / "no" / "replay.svg", "a log", trace, [], ReplayConfig())


def test_a_loss_that_is_not_finite_is_marked() -> None:
    trace = record_trace(steps=400)
    trace.record(401, math.nan)
    (outcome,) = replay_rules(trace, ReplayConfig(threshold=1e-3))
    assert outcome.verdict is not None
    assert outcome.verdict.reason is Reason.NON_FINITE
    assert 'class="lost"' in plot_replay(trace, [outcome], 310, 1e-3)
