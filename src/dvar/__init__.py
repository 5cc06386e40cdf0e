"""Know when a text-to-image fine-tune is done.

    trace, stop = dvar.Trace(), dvar.Dvar(window=310, threshold=0.15)
    ...
    trace.record(step, losses_on_a_fixed_batch)
    if (verdict := stop(trace)).stop:
        break

These names are the whole public interface. Those of the stopper need numpy alone and are loaded with the package; the
others need torch and are loaded when first used.
"""

import typing as _typing

from dvar._version import __version__
from dvar.errors import DvarError, RefusedInput
from dvar.extras import install_command as _install_command
from dvar.stopping.diagnosis import Reason
from dvar.stopping.monitor import StopMonitor
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

if _typing.TYPE_CHECKING:
    from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
    from dvar.diffusion.backbone import Backbone, load_backbone
    from dvar.jobs.batch import batch
    from dvar.runs.report import write_report
    from dvar.stopping.probe import Probe
    from dvar.training.personalise import personalise

__all__ = [
    "AnyOf",
    "Backbone",
    "CustomDiffusionConfig",
    "DreamBoothLoraConfig",
    "Dvar",
    "DvarError",
    "FixedSteps",
    "Probe",
    "Reason",
    "RefusedInput",
    "Rule",
    "StopMonitor",
    "TextualInversionConfig",
    "Trace",
    "Verdict",
    "__version__",
    "batch",
    "load_backbone",
    "personalise",
    "write_report",
]


def __dir__() -> list[str]:
    return list(__all__)


if not _typing.TYPE_CHECKING:  # or a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'dvar' has no attribute {name!r}")
        try:
            return _load(name)
        except ModuleNotFoundError as error:
            message = f"dvar.{name} needs {error.name}: {_install_command(str(error.name))}"
            raise ImportError(message, name=error.name) from error

    def _load(name: str) -> object:
        match name:
            case "Backbone":
                from dvar.diffusion.backbone import Backbone as value
            case "CustomDiffusionConfig":
                from dvar.config.methods import CustomDiffusionConfig as value
            case "DreamBoothLoraConfig":
                from dvar.config.methods import DreamBoothLoraConfig as value
            case "Probe":
                from dvar.stopping.probe import Probe as value
            case "TextualInversionConfig":
                from dvar.config.methods import TextualInversionConfig as value
            case "batch":
                from dvar.jobs.batch import batch as value
            case "load_backbone":
                from dvar.diffusion.backbone import load_backbone as value
            case "personalise":
                from dvar.training.personalise import personalise as value
            case "write_report":
                from dvar.runs.report import write_report as value
        return value
