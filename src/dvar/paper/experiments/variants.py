"""The paper's first version: which word the placeholder token starts from, and SAM instead of AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.stop_quality import LearningCurve, MeanInterval, mean_over_concepts, reported_score
from dvar.files import read_json
from dvar.html.tables import Column
from dvar.paper.extra_runs import ExtraRuns
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    format_estimate,
    format_mean_sd,
)
from dvar.paper.style import COLOURS, axes
from dvar.recordings.concepts import laboratory_concepts
from dvar.recordings.recorded_run import REPORT, Part, RecordedRun
from dvar.recordings.spec import RecordingSpec
from dvar.training.run_layout import INITIALIZER

Variants = Mapping[str, Mapping[str, Any]]
"""The settings that each variant changes, by its name."""
CLASS_NOUN = "class noun"
INITIALIZERS: Variants = MappingProxyType(
    {
        CLASS_NOUN: {},
        "random word": {"initializer": "random"},
        "best word by CLIP": {"initializer": "clip"},
        "worst word by CLIP": {"initializer": "clip-worst"},
    }
)
OPTIMIZERS: Variants = MappingProxyType(
    {"AdamW": {}, "SAM": {"optimizer": "sam", "learning_rate": 0.3, "max_grad_norm": 0.05}}
)
"""SAM's updates are proportional to the gradient, which is small: with AdamW's learning rate it would not move. Its
rate gives first updates as long as AdamW's, and rare large gradients are clipped."""
CONCEPTS = {True: 1, False: 3}
"""By whether the runs are small."""
SCORES: tuple[tuple[str, Part, str], ...] = (
    ("Train CLIP img", "train", "clip_image"),
    ("Val CLIP txt", "validation", "clip_text"),
    ("Identity", "train", "identity"),
)
_EQUAL_WITHIN = 0.02
_AS_GOOD = ("random word", "best word by CLIP")
"""The words that the paper's first version found to end as well as the class noun; its number for the worst is lost."""


@dataclass(frozen=True)
class VariantSummary:
    """The measurements of the runs of one variant; lists hold a value for each run.

    Args:
        name: Name of the variant.
        words: The words that the placeholder tokens start from.
        first: Train CLIP image of the untouched model.
        last: Scores at the last step, by title.
        oracle: Steps with 90 % of the gain.
        stops: Steps at which DVAR stops.
        censored: Number of runs that DVAR would stop only after their recording ends.
    """

    name: str
    words: list[str]
    first: list[float]
    last: Mapping[str, list[float]]
    oracle: list[float]
    stops: list[int]
    censored: int

    @property
    def data(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "variant": self.name,
            "words": self.words,
            "first": self.first,
            "oracle": self.oracle,
            "stop": self.stops,
            "censored": self.censored,
            **self.last,
        }


def compare_initializers(extra_runs: ExtraRuns) -> ExperimentResult:
    """Compare the four ways to choose the initializer token."""
    runs = _record_variants(extra_runs, INITIALIZERS)
    claims = [_compare_word(name, runs[name], runs[CLASS_NOUN]) for name in INITIALIZERS if name != CLASS_NOUN]
    finding = f"By Train CLIP image at the last step, where {_EQUAL_WITHIN} less counts as equal. {' '.join(claims)}"
    return _compare_variants(runs, finding, "Class noun: the word for the concept's class, given by hand.")


def compare_optimizers(extra_runs: ExtraRuns) -> ExperimentResult:
    """Compare AdamW and SAM."""
    runs = _record_variants(extra_runs, OPTIMIZERS)
    difference, detail = _compare_ends(runs["SAM"], runs["AdamW"])
    finding = compare_with_paper(
        difference,
        "SAM ends with the higher Train CLIP image",
        "SAM ends with the lower Train CLIP image",
        detail,
    )
    settings = OPTIMIZERS["SAM"]
    details = (
        f"SAM: radius 0.05 over SGD with momentum 0.9, learning rate {settings['learning_rate']}, gradients clipped at "
        f"norm {settings['max_grad_norm']}; not tuned further."
    )
    return _compare_variants(runs, finding, details)


def variant_recordings(extra_runs: ExtraRuns, variants: Variants) -> list[RecordingSpec]:
    """Return the recordings of all variants, in order."""
    return [spec for specs in plan_variants(extra_runs, variants).values() for spec in specs]


def plan_variants(extra_runs: ExtraRuns, variants: Variants) -> dict[str, list[RecordingSpec]]:
    """Return the recordings of each variant.

    The variant without changes is the same run in every experiment, and may be among the recorded runs already.
    """
    concepts = laboratory_concepts(extra_runs.concepts)[: CONCEPTS[extra_runs.quick]]
    return {
        name: [
            extra_runs.reuse_recorded(
                extra_runs.recording_spec(f"variants/{_folder_name(name, changes)}", concept, **changes)
            )
            for concept in concepts
        ]
        for name, changes in variants.items()
    }


def _folder_name(name: str, changes: Mapping[str, Any]) -> str:
    return name.lower().replace(" ", "-") if changes else "usual"


def _record_variants(extra_runs: ExtraRuns, variants: Variants) -> dict[str, list[RecordedRun]]:
    plan = plan_variants(extra_runs, variants)
    runs = iter(extra_runs.record([spec for specs in plan.values() for spec in specs]))
    return {name: [next(runs) for _ in specs] for name, specs in plan.items()}


def _compare_word(name: str, runs: Sequence[RecordedRun], usual: Sequence[RecordedRun]) -> str:
    """Say whether another initializer token ends as well as the class noun, where it is another word."""
    equal = sum(_initializer_word(run) == _initializer_word(other) for run, other in zip(runs, usual, strict=True))
    if equal == len(runs):
        return f"The {name} is the class noun itself on every concept here, so that nothing is compared."
    difference, detail = _compare_ends(runs, usual)
    if name not in _AS_GOOD:
        return f"The {name} ends at {detail}."
    mean, low, high = (value + _EQUAL_WITHIN for value in (difference.mean, difference.low, difference.high))
    if equal:
        detail += f"; on {equal} of {len(runs)} concepts it is the same word"
    return compare_with_paper(
        MeanInterval(mean, low, high, difference.concepts),
        f"the {name} ends as well as the class noun",
        f"the {name} does not end as well as the class noun",
        detail,
    )


def _compare_ends(runs: Sequence[RecordedRun], others: Sequence[RecordedRun]) -> tuple[MeanInterval, str]:
    """Return the difference of Train CLIP image at the last step, paired by concept, and it with both means as text."""
    ends, other_ends = ([reported_score(run, run.cap, "train", "clip_image") for run in of] for of in (runs, others))
    difference = mean_over_concepts(runs, np.subtract(ends, other_ends).tolist())
    means = f"{np.mean(ends):.3f} against {np.mean(other_ends):.3f}"
    return difference, f"{means}; paired by concept {format_estimate(difference, 3)}"


def _compare_variants(runs: Mapping[str, Sequence[RecordedRun]], finding: str, details: str) -> ExperimentResult:
    provenance = Provenance.of([run for of_variant in runs.values() for run in of_variant])
    description = f"Textual Inversion. {details} {provenance} The runs differ in nothing else."
    return ExperimentResult((finding,), (_table_of_variants(runs, description),), (_plot_variants(runs, description),))


def _table_of_variants(runs: Mapping[str, Sequence[RecordedRun]], description: str) -> Table:
    every = [run for of_variant in runs.values() for run in of_variant]
    scores = [
        (name, part, metric) for name, part, metric in SCORES if all((part, metric) in r.image_scores for r in every)
    ]
    summaries = [_summarise_variant(name, of_variant, scores) for name, of_variant in runs.items()]
    columns = (
        Column[VariantSummary]("Variant", "name"),
        Column[VariantSummary]("Starts from", "words", ", ".join),
        Column[VariantSummary]("Train CLIP img, first", "first", format_mean_sd),
        *(_last_column(title) for title, *_ in scores),
        Column[VariantSummary]("90 % of the gain at step", "oracle", partial(format_mean_sd, digits=0)),
        Column[VariantSummary]("DVAR stops at", lambda row: row, _format_stops),
    )
    caption = (
        f"{description} Mean ± standard deviation over concepts; first and last are the untouched model and the last "
        "recorded step. DVAR has the paper's preset, scaled in time."
    )
    return build_table("variants", caption, columns, summaries, data=[summary.data for summary in summaries])


def _last_column(title: str) -> Column[VariantSummary]:
    return Column(f"{title}, last", lambda row: row.last[title], format_mean_sd)


def _summarise_variant(
    name: str, runs: Sequence[RecordedRun], scores: Sequence[tuple[str, Part, str]]
) -> VariantSummary:
    results = [strategies.evaluate_strategy(strategies.paper_dvar_strategy(run, scaled=True), run) for run in runs]
    return VariantSummary(
        name,
        words=[_initializer_word(run) for run in runs],
        first=[reported_score(run, 0, "train", "clip_image") for run in runs],
        last={title: [reported_score(run, run.cap, part, metric) for run in runs] for title, part, metric in scores},
        oracle=[LearningCurve.of_run(run).step_at() for run in runs],
        stops=[result.stop for result in results],
        censored=sum(result.censored for result in results),
    )


def _format_stops(row: VariantSummary) -> str:
    return format_mean_sd(row.stops, 0) + (f" ({row.censored} had not stopped)" if row.censored else "")


def _plot_variants(runs: Mapping[str, Sequence[RecordedRun]], description: str) -> Plot:
    concepts = list(dict.fromkeys(run.concept for of_variant in runs.values() for run in of_variant))
    figure, panels = axes(2, len(concepts), width=max(6.5, 3.6 * len(concepts)), height=1.9, sharex="col")
    data = []
    for (name, of_variant), colour in zip(runs.items(), COLOURS, strict=False):
        for run in of_variant:
            column = concepts.index(run.concept)
            scored, values = run.scores("train", "clip_image", REPORT)
            steps, losses = run.series("eval")
            change = 100 * (losses.mean(axis=1) / losses[0].mean() - 1)
            panels[0][column].plot(
                scored, values.mean(axis=1), "o-", color=colour, markersize=3, linewidth=1.2, label=name
            )
            panels[1][column].plot(steps, change, color=colour, linewidth=1)
            panels[0][column].set_title(run.concept.replace("_", " "))
            data.append({"variant": name, "record": run.name, "step": steps, "L_det, %": change})
    panels[0][0].set_ylabel("Train CLIP image")
    panels[1][0].set_ylabel(r"$L_{det}$, %")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    caption = f"{description} At the bottom, the change of L_det since each run's first step, in percent."
    return Plot("variants", caption, figure, data)


def _initializer_word(run: RecordedRun) -> str:
    """Return the word that the placeholder token started from, whether it was given, drawn or chosen by CLIP."""
    path = run.folder / INITIALIZER if run.folder else Path(INITIALIZER)
    if path.exists():
        return str(read_json(path)[0]["initializer_token"])
    return str(run.config.get("initializer_token") or "–")
