"""The rule "octave", which judges a run by what the last doubling of its steps brought."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.stopping.diagnosis import Reason, diagnose
from dvar.stopping.rule import (
    format_rule,
    is_number,
    is_whole_number,
    judge_non_finite,
    raise_problems,
    read_curve,
)
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict

MIN_OCTAVE_RECORDS = 4
"""Records in the last octave without which no line is fitted through it."""
FIRST_STEP = 64
"""The earliest stop of this rule."""


@dataclass(frozen=True, repr=False)
class Octave:
    """Stop once the held samples agree that the last doubling of the steps brought less than ``share`` of the gain.

    The gain of a held sample is the share of its first loss by which it has fallen, x_i(t) = 1 - l_i(t) / l_i(0), where
    t counts the steps since the first record. G_i is the mean of x_i over the records in (t / sqrt(2), t], s_i the
    slope of the least-squares line through x_i on log2(t) over (t / 2, t], and sigma the residual standard deviation of
    the samples' mean about its line there. With e_i = share * G_i - s_i the rule stops when

    - t >= ``first_step`` and the last octave holds 4 records,
    - mean(G) > ``noise`` * sigma, so that noise alone does not stop, and
    - mean(e) > ``agreement`` * sd(e) over the samples.

    Nothing in it is a number of steps but ``first_step``: a run that learns four times as slowly stops four times as
    late. It reads records at any spacing; spaced by a constant factor, every octave holds as many.

    Args:
        share: Inside (0, 1).
        agreement: In standard deviations over the held samples, 0 or more.
        noise: In standard deviations of a record, 0 or more.
        first_step: The earliest stop, at least 4.
        metric: The metric to read; the losses of all held samples, by default. Any other is one number per record.

    Raises:
        RefusedInput: A setting is out of its range; on a call, a first loss is not positive, or the metric is missing
            or not a single number.

    Source: none; settings chosen on recorded runs of Textual Inversion, DreamBooth-LoRA and Custom Diffusion.
    """

    share: float = 0.45
    agreement: float = 0.6
    noise: float = 4.0
    first_step: int = FIRST_STEP
    metric: str = LOSS

    def __post_init__(self) -> None:
        problems = []
        if not is_number(self.share) or not 0 < self.share < 1:
            problems.append(
                f"share must lie between 0 and 1, both excluded, got {self.share!r}: it is the part of the gain that "
                "the last doubling of the steps may bring, such as 0.45"
            )
        for name in ("agreement", "noise"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                problems.append(f"{name} must be a finite number, 0 or more, got {value!r}")
        if not is_whole_number(self.first_step) or self.first_step < MIN_OCTAVE_RECORDS:
            problems.append(
                f"first_step must be a whole number of steps, {MIN_OCTAVE_RECORDS} or more, got {self.first_step!r}"
            )
        raise_problems(problems)

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        curve = read_curve(self, trace, self.metric, self.first_step)
        metrics: dict[str, float] = {"window": self.first_step, "seen": 0, "records": 0}
        if not len(curve):
            return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(self), metrics)
        if not math.isfinite(curve.spread):
            return judge_non_finite(self, curve, metrics, ())
        samples = trace.samples[-len(curve) :] if self.metric == LOSS else curve.values[:, None]
        if not (samples[0] > 0).all():
            lowest = int(np.argmin(samples[0]))
            raise RefusedInput(
                f"Octave divides by the first losses, and that of sample {lowest} is {samples[0, lowest]:.6g}: "
                "use Dvar or Trend for a loss that is not positive, such as a paired one"
            )
        elapsed = curve.steps - curve.steps[0]
        last = elapsed > curve.span / 2
        metrics |= {"seen": curve.span, "records": int(last.sum())}
        step = int(curve.steps[-1])
        if curve.span < self.first_step or metrics["records"] < MIN_OCTAVE_RECORDS:
            metrics["records_needed"] = MIN_OCTAVE_RECORDS
            return Verdict(False, Reason.WARMING_UP, step, repr(self), metrics)
        gains = 1 - samples / samples[0]
        recent = gains[elapsed > curve.span / math.sqrt(2)].mean(axis=0)
        slopes, sigma = _fit_lines(np.log2(elapsed[last]), gains[last])
        doubts = self.share * recent - slopes
        metrics |= {
            "share": self.share,
            "threshold": self.share,
            "gain": float(recent.mean()),
            "octave_gain": float(slopes.mean()),
            "noise": sigma,
            "noise_multiple": self.noise,
            "doubt": float(doubts.mean()),
            "disagreement": float(doubts.std()),
            "agreement": self.agreement,
        }
        if metrics["gain"] > 0:
            metrics["ratio"] = metrics["octave_gain"] / metrics["gain"]
        holds = metrics["gain"] > self.noise * sigma and metrics["doubt"] > self.agreement * metrics["disagreement"]
        reason = Reason.STABILISED if holds else Reason.RUNNING
        # What casts doubt on convergence is shown beside a stop and prevents none: on a logarithmic scale of steps a
        # loss that still falls may have brought nearly all it will.
        window = max(2, math.ceil(curve.span / 2))
        return Verdict(holds, reason, step, repr(self), metrics, lambda: diagnose(curve, window))


def _fit_lines(octaves: NDArray[np.float64], gains: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the slope of each sample's least-squares line, [B], and the residual standard deviation of their mean.

    Args:
        octaves: log2 of the steps, [n].
        gains: [n, B].
    """
    centred = octaves - octaves.mean()
    slopes = centred @ gains / (centred @ centred)
    mean = gains.mean(axis=1)
    residuals = mean - mean.mean() - centred * slopes.mean()
    return slopes, math.sqrt(float(residuals @ residuals) / (len(octaves) - 2))
