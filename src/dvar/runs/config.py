"""Settings of `dvar replay`, with their help, ranges and checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvar.config.fields import COUNT, NOT_NEGATIVE, POSITIVE, Config, faults, setting
from dvar.config.training import TrainingConfig

RuleName = Literal["dvar", "paper", "ema", "hall", "trend", "plateau", "all"]


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Config):
    """Every setting of ``dvar replay``.

    Source: window and threshold are Textual Inversion's; Appendix E gives no threshold for its rules, and none for a
    plateau of the loss: those defaults are ours, for a loss that falls by a few per cent in all.
    """

    rule: tuple[RuleName, ...] = setting(
        ("dvar",), "A rule to replay; give it again for another. 'paper' is DVAR as published.", section="Rules"
    )
    window: int = setting(TrainingConfig.window, "Steps over which a rule looks back.")
    threshold: float = setting(TrainingConfig.threshold, "DVAR's alpha: stop when recent / whole variance is below it.")
    ema_threshold: float = setting(1e-3, "Share by which the moving average changes over the window.", POSITIVE)
    hall_threshold: float = setting(1e-2, "Share of its maximum over which the loss ranges in the window.", POSITIVE)
    trend_threshold: float = setting(1e-6, "Slope a step, as a share of the first loss.", POSITIVE)
    patience: int = setting(TrainingConfig.window, "Steps that a plateau may last.", COUNT)
    min_delta: float = setting(0.0, "Fall of the loss that ends a plateau.", NOT_NEGATIVE)

    metric: str | None = setting(
        None, "Curve in the log; by default the one loss on fixed inputs, if there is just one.", section="The log"
    )
    step_column: str | None = setting(None, "Column of steps in a table; found by its name by default.")
    output: str | None = setting(None, "Picture of the replay to write: a file that ends in .svg or .html.")


def replay_problems(config: ReplayConfig) -> list[str]:
    """Everything wrong with these settings by themselves; the rules' own are the rules' to judge."""
    problems = [said for _, said in faults(config)]
    if config.output and Path(config.output).suffix not in (".svg", ".html"):
        problems.append(f"output must end in .svg or .html, got {config.output!r}: name a picture or a page")
    return problems
