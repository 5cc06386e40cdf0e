"""The paper's first version: which word the new token starts from, and SAM in place of AdamW."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.stop_quality import REPORT, LearningCurve, half, score
from dvar.paper.extra_runs import ExtraRuns
from dvar.paper.result import ExperimentResult, Plot, Provenance, Table, compared, spread
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import Part, RecordedRun
from dvar.recordings.concepts import laboratory_concepts
from dvar.recordings.spec import RecordingSpec
from dvar.training.run_layout import INITIALIZER

USUAL = "class noun"
STARTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {USUAL: {}, "random word": {"initializer": "random"}, "best word by CLIP": {"initializer": "clip"}}
)
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"AdamW": {}, "SAM": {"optimizer": "sam", "learning_rate": 0.3, "max_grad_norm": 0.05}}
)
"""What each variant changes in the settings.  SAM steps by the gradient itself, which is small: at AdamW's rate it
would not move; the rate is one whose first steps are as long as AdamW's, and rare large gradients are cut."""
CONCEPTS = {True: 1, False: 3}
"""By whether the runs are to be small."""
SCORES: tuple[tuple[str, Part, str], ...] = (
    ("Train CLIP img", "train", "clip_image"),
    ("Val CLIP txt", "validation", "clip_text"),
    ("Identity", "train", "identity"),
)
_CLOSE = 0.02


def initial(bench: ExtraRuns) -> ExperimentResult:
    """The three ways to choose the first word."""
    found = _recorded(bench, STARTS)
    ends = {name: _mean(records, "train", "clip_image") for name, records in found.items()}
    claims = [
        compared(f"the {name} ends as well as the class noun ({ends[name]:.3f} against {ends[USUAL]:.3f})", close)
        for name, close in ((name, ends[name] > ends[USUAL] - _CLOSE) for name in STARTS if name != USUAL)
    ]
    said = f"By Train CLIP image at the last step, where {_CLOSE} less counts as equal. {' '.join(claims)}"
    heading = "First version of the paper: the initial word"
    return _exhibit("initial", heading, said, found, "Class noun: the word for the concept's class, given by hand.")


def sam(bench: ExtraRuns) -> ExperimentResult:
    """The two optimisers."""
    found = _recorded(bench, OPTIMIZERS)
    ends = {name: _mean(records, "train", "clip_image") for name, records in found.items()}
    claim = f"SAM ends with the higher Train CLIP image ({ends['SAM']:.3f}; AdamW {ends['AdamW']:.3f})"
    settings = OPTIMIZERS["SAM"]
    how = (
        f"SAM: radius 0.05 over SGD with momentum 0.9, learning rate {settings['learning_rate']}, gradients cut at "
        f"norm {settings['max_grad_norm']}; not tuned further."
    )
    said = compared(claim, ends["SAM"] > ends["AdamW"])
    return _exhibit("sam", "First version of the paper: SAM in place of AdamW", said, found, how)


def planned(bench: ExtraRuns, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, list[RecordingSpec]]:
    """The recordings of each variant; what changes nothing is the same run for all, and may be a record already."""
    concepts = laboratory_concepts(bench.concepts)[: CONCEPTS[bench.quick]]
    return {
        name: [
            bench.found(bench.planned(f"variants/{_place(name, changes)}", concept, **changes)) for concept in concepts
        ]
        for name, changes in variants.items()
    }


def _place(name: str, changes: Mapping[str, Any]) -> str:
    return name.lower().replace(" ", "-") if changes else "usual"


def _recorded(bench: ExtraRuns, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, list[RecordedRun]]:
    wanted = planned(bench, variants)
    records = iter(bench.recorded([one for of in wanted.values() for one in of]))
    return {name: [next(records) for _ in of] for name, of in wanted.items()}


def _exhibit(
    name: str, heading: str, said: str, found: Mapping[str, Sequence[RecordedRun]], how: str
) -> ExperimentResult:
    every = [record for records in found.values() for record in records]
    stated = f"Textual Inversion. {how} {Provenance.of(every)} The runs differ in nothing else."
    return ExperimentResult(name, heading, (said,), (_table(found, stated),), (_plot(found, stated),))


def _table(found: Mapping[str, Sequence[RecordedRun]], stated: str) -> Table:
    shown = [one for one in SCORES if all(one[1:] in r.pictures for records in found.values() for r in records)]
    lines, data = [], []
    for name, records in found.items():
        reached = [LearningCurve.of(record).reached() for record in records]
        stops = [strategies.read(strategies.paper_dvar(record, scaled=True), record) for record in records]
        ends = {label: [score(r, r.cap, part, metric) for r in records] for label, part, metric in shown}
        first = [score(record, 0, "train", "clip_image") for record in records]
        censored = sum(reading.censored for reading in stops)
        lines.append(
            (
                name,
                ", ".join(_word(record) for record in records),
                spread(first),
                *(spread(values) for values in ends.values()),
                spread(reached, 0),
                spread([reading.stop for reading in stops], 0) + (f" ({censored} had not stopped)" if censored else ""),
            )
        )
        data.append(
            {
                "variant": name,
                "words": [_word(record) for record in records],
                "first": first,
                "oracle": reached,
                "stop": [reading.stop for reading in stops],
                "censored": censored,
                **ends,
            }
        )
    columns = (
        "Variant",
        "Starts from",
        "Train CLIP img, first",
        *(f"{label}, last" for label, *_ in shown),
        "90 % of the gain at step",
        "DVAR stops at",
    )
    caption = (
        f"{stated} Mean ± standard deviation over concepts; first and last are the untouched model and the last "
        "recorded step. DVAR is by the paper's preset, scaled in time."
    )
    return Table("variants", caption, columns, tuple(lines), tuple(data))


def _plot(found: Mapping[str, Sequence[RecordedRun]], stated: str) -> Plot:
    concepts = list(dict.fromkeys(record.concept for records in found.values() for record in records))
    drawn, panels = axes(2, len(concepts), width=max(6.5, 3.6 * len(concepts)), height=1.9, sharex="col")
    data = []
    for (name, records), colour in zip(found.items(), COLOURS, strict=False):
        for record in records:
            column = concepts.index(record.concept)
            at, seen = half(record, "train", "clip_image", REPORT)
            steps, losses = record.series("eval")
            curve = 100 * (losses.mean(axis=1) / losses[0].mean() - 1)
            panels[0][column].plot(at, seen.mean(axis=1), "o-", color=colour, markersize=3, linewidth=1.2, label=name)
            panels[1][column].plot(steps, curve, color=colour, linewidth=1)
            panels[0][column].set_title(record.concept.replace("_", " "))
            data.append({"variant": name, "record": record.name, "step": steps, "L_det, %": curve})
    panels[0][0].set_ylabel("Train CLIP image")
    panels[1][0].set_ylabel(r"$L_{det}$, %")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    caption = f"{stated} Below, L_det in percent of each run's first value, less 100."
    return Plot("variants", caption, drawn, data)


def _word(record: RecordedRun) -> str:
    """The word that a run started from, as it was given, drawn or found."""
    chosen = record.folder / INITIALIZER if record.folder else Path(INITIALIZER)
    if chosen.exists():
        return str(json.loads(chosen.read_text(encoding="utf-8"))[0]["initializer_token"])
    return str(record.config.get("initializer_token") or "–")


def _mean(records: Sequence[RecordedRun], part: Part, metric: str) -> float:
    return float(np.mean([score(record, record.cap, part, metric) for record in records]))
