"""Frozen settings of replay, reproduce and survey, with their help, ranges and checks.  Pure, as `dvar.config` is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dvar.config import BUNDLED_MODEL, Settings
from dvar.settings import COUNT, NOT_NEGATIVE, POSITIVE, Config, Range, faults, nearest, setting

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The addresses under which a machine reaches itself alone."""

Rule = Literal["dvar", "paper", "ema", "hall", "trend", "plateau", "all"]


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Config):
    """Every setting of ``dvar replay``.

    Source: window and threshold are Textual Inversion's; Appendix E gives no threshold for its rules, and none for a
    plateau of the loss: those defaults are ours, for a loss that falls by a few per cent in all.
    """

    rule: tuple[Rule, ...] = setting(
        ("dvar",), "A rule to replay; give it again for another. 'paper' is DVAR as published.", section="Rules"
    )
    window: int = setting(Settings.window, "Steps over which a rule looks back.")
    threshold: float = setting(Settings.threshold, "DVAR's alpha: stop when recent / whole variance is below it.")
    ema_threshold: float = setting(1e-3, "Share by which the moving average changes over the window.", POSITIVE)
    hall_threshold: float = setting(1e-2, "Share of its maximum over which the loss ranges in the window.", POSITIVE)
    trend_threshold: float = setting(1e-6, "Slope a step, as a share of the first loss.", POSITIVE)
    patience: int = setting(Settings.window, "Steps that a plateau may last.", COUNT)
    min_delta: float = setting(0.0, "Fall of the loss that ends a plateau.", NOT_NEGATIVE)

    metric: str | None = setting(
        None, "Curve in the log; by default the one loss on fixed inputs, if there is just one.", section="The log"
    )
    step_column: str | None = setting(None, "Column of steps in a table; found by its name by default.")
    output: str | None = setting(None, "Picture of the replay to write: a file that ends in .svg or .html.")


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


@dataclass(frozen=True, kw_only=True)
class SurveyBuildConfig(Config):
    """Every setting of ``dvar survey build``.

    Source: Section 4.4 asks for 10 answers to each pair; the other numbers are ours.
    """

    output_dir: str = setting("survey", "Folder of the survey.", section="The survey")
    candidate: str = setting("DVAR", "What to call the run that is named first of two.")
    baseline: str = setting("baseline", "What to call the run that is named second.")
    overlap: int = setting(10, "People who are asked about each pair.", COUNT)
    per_person: int = setting(40, "Pairs that one person is asked about in each of the two surveys, at most.", COUNT)
    control_every: int = setting(6, "One task in this many is a control with an obvious answer.", Range(2))
    seed: int = setting(0, "Seed of orders and sides.", NOT_NEGATIVE)

    draw: bool = setting(
        True, "Draw what the runs have not drawn yet; otherwise pair what is there.", section="Pictures"
    )
    scenes: str | None = setting(
        None, "Text file of scenes, such as 'on the beach', one a line; eight of our own by default."
    )
    pictures_per_prompt: int = setting(2, "Pictures that each run draws of each prompt.", COUNT)


@dataclass(frozen=True, kw_only=True)
class SurveyServeConfig(Config):
    """Every setting of ``dvar survey serve``: by default this machine alone can reach it."""

    host: str = setting("127.0.0.1", "Address to listen on; another than this machine's own needs the two below.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", Range(0, 65536))
    public_url: str | None = setting(None, "Address that people open, such as https://survey.example.org.")
    secret_file: str | None = setting(
        None,
        "File with a secret of at least 32 characters that signs everything; by default one in the survey's folder.",
    )
    joins_per_hour: int = setting(
        30,
        "People whom one address may send within an hour, where there is a public_url; 0 lets nobody new in.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class SurveyScoreConfig(Config):
    """Every setting of ``dvar survey score``."""

    min_accuracy: float = setting(
        0.8, "Share of the controls that must be right for a person's votes to count.", NOT_NEGATIVE
    )
    confidence: float = setting(0.95, "Share of samples in which an interval holds the truth.", Range(0.5, 1))
    resamples: int = setting(2000, "Samples of people and concepts behind the clustered intervals.", Range(100))
    seed: int = setting(0, "Seed of those samples.", NOT_NEGATIVE)
    output: str | None = setting(None, "Page to write; score.html in the survey's folder by default.")


def replay_problems(config: ReplayConfig) -> list[str]:
    """Everything wrong with these settings by themselves; the rules' own are the rules' to judge."""
    problems = [said for _, said in faults(config)]
    if config.output and Path(config.output).suffix not in (".svg", ".html"):
        problems.append(f"output must end in .svg or .html, got {config.output!r}: name a picture or a page")
    return problems


def reproduce_problems(config: ReproduceConfig) -> list[str]:
    """Everything wrong with these settings by themselves, a line each; empty when in order."""
    known = ["all", *EXPERIMENTS]
    return [
        f"there is no experiment {name!r}: the nearest is {nearest(name, known)}, and 'all' makes every one"
        for name in config.names
        if name not in known
    ]


def survey_problems(config: SurveyBuildConfig | SurveyServeConfig | SurveyScoreConfig) -> list[str]:
    """Everything wrong with these settings by themselves, a line each; empty when in order."""
    problems = [said for _, said in faults(config)]
    match config:
        case SurveyBuildConfig():
            if config.candidate == config.baseline:
                said = f"candidate and baseline must have different names, got {config.candidate!r} twice"
                problems.append(f"{said}: rename one")
        case SurveyServeConfig():
            problems += _public_problems(config)
        case SurveyScoreConfig():
            if not problems and config.min_accuracy > 1:
                problems.append(f"min_accuracy must be at most 1, got {config.min_accuracy}: give a share")
    return problems


def _public_problems(config: SurveyServeConfig) -> Iterator[str]:
    if config.host not in LOOPBACK:
        for name, value in (("public_url", config.public_url), ("secret_file", config.secret_file)):
            if not value:
                yield f"{name} is missing: it is needed to listen on {config.host}, where others can reach it"
    url = urlsplit(config.public_url or "https://host")
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") or url.query or url.fragment:
        yield f"public_url must be like https://survey.example.org, got {config.public_url!r}: drop the rest"
