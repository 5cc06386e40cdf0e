"""Know when a text-to-image fine-tune is done.

    trace, stop = dvar.Trace(), dvar.Dvar(window=310, threshold=0.15)
    ...
    trace.record(step, losses_on_a_fixed_batch)
    if (verdict := stop(trace)).stop:
        break

These names are all there is to import from here.  The stopper's need numpy alone and are loaded with the package; the
others need torch and are loaded when first used.
"""

import importlib as _importlib
import typing as _typing

from dvar._version import __version__
from dvar.errors import DvarError, RefusedInput
from dvar.stopping.diagnosis import Reason
from dvar.stopping.monitor import StopMonitor
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

if _typing.TYPE_CHECKING:
    from dvar.config.training import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
    from dvar.diffusion.backbone import Backbone
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
    "personalise",
    "write_report",
]

_ROOMS = {
    "Backbone": "dvar.diffusion.backbone",
    "CustomDiffusionConfig": "dvar.config.training",
    "DreamBoothLoraConfig": "dvar.config.training",
    "Probe": "dvar.stopping.probe",
    "TextualInversionConfig": "dvar.config.training",
    "personalise": "dvar.training.personalise",
    "write_report": "dvar.runs.report",
}


def __dir__() -> list[str]:
    return list(__all__)


if not _typing.TYPE_CHECKING:  # or a type checker would believe in any name

    def __getattr__(name: str) -> object:
        if name not in _ROOMS:
            raise AttributeError(f"module 'dvar' has no attribute {name!r}")
        try:
            return getattr(_importlib.import_module(_ROOMS[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"dvar.{name} needs {error.name}: pip install 'dvar[train]'", name=error.name) from error
