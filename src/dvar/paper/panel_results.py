"""The results of the panel that its tables, sentences and summary are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dvar.analysis.panel import CHEAP_DRAWS, OCTAVE_CHEAP, STRATIFIED, PanelRuns, PanelStops, list_cheap_records
from dvar.analysis.panel_comparison import RATE_ENDS, Comparison, compare_registered, may_claim
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.panel import PRESET, STAGES, panel_concepts

MAIN = next(stage for stage in STAGES if stage.panel == "main")
RATES = ("rate × 1/4", "rate × 1/2", PRESET.title, "rate × 2", "rate × 4")


@dataclass(frozen=True)
class PanelResults:
    """Everything that the tables and sentences about a panel are made of.

    Args:
        archive: The recorded runs.
        panel: The panel among them.
        ends: The stops on the runs at both ends of the learning rates.
        comparisons: The comparisons of the protocol.
    """

    archive: RecordingArchive
    panel: PanelRuns
    ends: PanelStops
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(cls, archive: RecordingArchive) -> PanelResults:
        """Return the results of the panel in an archive.

        Raises:
            RefusedInput: As `PanelRuns.of` and `compare_registered`.
        """
        panel = PanelRuns.of(archive)
        ends, comparisons = compare_registered(panel)
        return cls(archive, panel, ends, tuple(comparisons))

    @cached_property
    def rates(self) -> PanelStops:
        """The stops on the runs of all learning rates, on the concepts that both ends were recorded on."""
        concepts = self.panel.list_concepts(RATE_ENDS)
        methods = {run.run.method for run in self.ends.runs}
        runs = [run for run in self.panel.select(RATES, methods) if run.run.concept in concepts]
        return PanelStops.of(self.panel, runs, concepts)

    @cached_property
    def presets(self) -> PanelStops:
        """The stops at the preset, on all concepts and methods."""
        return self._stops_of([PRESET.title])

    @cached_property
    def main(self) -> PanelStops | None:
        """The stops of the main panel, its concepts and methods at the preset; None until all of them are recorded."""
        concepts = panel_concepts()[: MAIN.concepts]
        runs = [run for run in self.panel.select([PRESET.title], MAIN.methods) if run.run.concept in concepts]
        recorded = {(run.run.method, run.run.concept) for run in runs}
        recorded |= {(run.method, run.concept) for run in self.panel.unlearned if not run.setting}
        if any((method, concept) not in recorded for method in MAIN.methods for concept in concepts):
            return None
        return PanelStops.of(self.panel, runs, concepts)

    @cached_property
    def others(self) -> dict[str, PanelStops]:
        """The stops on the runs of each other setting that was recorded, by its title."""
        titles = [variation.title for stage in STAGES for variation in stage.variations if variation.title not in RATES]
        recorded = {run.variation for run in self.panel.runs}
        return {title: self._stops_of([title]) for title in dict.fromkeys(titles) if title in recorded}

    def _stops_of(self, variations: Sequence[str]) -> PanelStops:
        return PanelStops.of(self.panel, self.panel.select(variations), self.panel.list_concepts(variations))

    @property
    def claims(self) -> list[bool]:
        """Whether the outcome of each comparison of the protocol may be claimed."""
        return may_claim(self.comparisons)

    def probe_share(self) -> float:
        """Return the share of a run's time that cheap octave's probes take, as a mean over the runs at the preset."""
        shares = []
        for run, stop in self.presets.stops[OCTAVE_CHEAP].items():
            units, steps = self.archive.unit_seconds(run.run.method), run.run.series(STRATIFIED)[0]
            probes = int((steps[list_cheap_records(steps)] <= stop.step).sum())
            probe = probes * CHEAP_DRAWS * units.get("forward", np.nan)
            shares.append(probe / (probe + stop.step * units.get("train", np.nan)))
        return float(np.mean(shares)) if shares else float("nan")
