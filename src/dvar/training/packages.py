"""The optional packages that a config needs."""

from __future__ import annotations

import importlib.util

from dvar.config.training import TrainingConfig

_OPTIMIZERS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def problems(config: TrainingConfig) -> list[str]:
    """Return which packages of the optimizer, the quantised base and the tracker are not installed."""
    return [
        *optimizer_problems(config.optimizer),
        *quantize_problems(config.quantize),
        *tracker_problems(config.report_to),
    ]


def quantize_problems(kind: str) -> list[str]:
    """Return what is missing for a quantised base."""
    return [] if kind == "no" else _missing_package(f"quantize {kind}", "bitsandbytes")


def optimizer_problems(name: str) -> list[str]:
    """Return what is missing for an optimizer."""
    package = _OPTIMIZERS.get(name)
    return [] if package is None else _missing_package(f"optimizer {name}", package)


def tracker_problems(name: str) -> list[str]:
    """Return what is missing for a tracker, whose package has its name."""
    return [] if name == "none" else _missing_package(f"report_to {name}", name)


def _missing_package(what: str, package: str) -> list[str]:
    """Return the problem of a package that is not installed, if it is not."""
    if importlib.util.find_spec(package):
        return []
    return [f"{what} needs the package {package}, which is not installed: pip install {package}"]
