"""Settings of `dvar reproduce`, with their help, ranges and checks."""

from __future__ import annotations

from dataclasses import dataclass

from dvar.config.fields import Config, setting
from dvar.config.training import BUNDLED_MODEL
from dvar.errors import nearest

EXPERIMENTS: dict[str, str] = {
    "table1": "Table 1: ways to end a run, their scores, steps and minutes",
    "agreement": "True runs beside what was read off for them; runs them again",
    "rules": "Every stopping rule, ranked on recorded runs",
    "figure1": "Figure 1: the same loss, noisy and fixed",
    "figure2": "Figure 2: convergence of Textual Inversion",
    "figure4": "Figure 4: scores along training, and where each way stops",
    "figure5": "Figure 5: which randomness hides convergence; trains a run of its own",
    "figure6": "Figure 6: convergence of Custom Diffusion",
    "figure7": "Figure 7: convergence of DreamBooth-LoRA",
    "figure8": "Figure 8: smaller held batches",
    "figure9": "Figure 9: larger training batches; trains runs of its own",
    "figure11": "Figure 11: other criteria",
    "figure12": "Figure 12: pictures where DVAR and Baseline end, side by side",
    "figure14": "Figure 14: convergence on more concepts",
    "table2": "Table 2: which way people prefer, of simulated people",
    "table3": "Table 3: timesteps and scores",
    "initial": "First version of the paper: the initial word; records runs of its own",
    "sam": "First version of the paper: SAM in place of AdamW; records runs of its own",
    "traces": "All recorded runs as one file, to try rules on",
}
"""What `dvar reproduce` can make, each by its name, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(Config):
    """Every setting of ``dvar reproduce``."""

    names: tuple[str, ...] = setting(("all",), "Which experiments, or all.")
    records: tuple[str, ...] = setting(
        ("records",),
        "Folder of recorded runs, or a file of traces; give it again for another. The first that has a run is read.",
        section="Records and report",
    )
    output_dir: str = setting("runs/laboratory", "Folder for data, figures and report.html.")
    quick: bool = setting(False, "Small and soon: records the little it needs, where there are none, and trains less.")
    model: str = setting(BUNDLED_MODEL, "Base model of runs that an experiment trains itself.")
    concepts_dir: str | None = setting(None, "Folder of concepts for those runs; the bundled ones without.")

    @property
    def experiments(self) -> list[str]:
        """The names of what is asked for, each once, "all" being every one."""
        return list(EXPERIMENTS if "all" in self.names else dict.fromkeys(self.names))


def reproduce_problems(config: ReproduceConfig) -> list[str]:
    """Everything wrong with these settings by themselves, a line each; empty when in order."""
    known = ["all", *EXPERIMENTS]
    return [
        f"there is no experiment {name!r}: the nearest is {nearest(name, known)}, and 'all' makes every one"
        for name in config.names
        if name not in known
    ]
