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

from dvar.errors import DvarError, RefusedInput
from dvar.stopper.rules import AnyOf, Criterion, Dvar, FixedSteps
from dvar.stopper.trace import Trace
from dvar.stopper.verdict import Reason, Verdict
from dvar.stopper.watch import Watch

if _typing.TYPE_CHECKING:
    from dvar.config import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
    from dvar.diffusion.backbone import Backbone
    from dvar.laboratory.report import write_report
    from dvar.stopper.probe import Probe
    from dvar.trainer.run import personalise

__version__ = "0.1.0"

__all__ = [
    "AnyOf",
    "Backbone",
    "Criterion",
    "CustomDiffusionConfig",
    "DreamBoothLoraConfig",
    "Dvar",
    "DvarError",
    "FixedSteps",
    "Probe",
    "Reason",
    "RefusedInput",
    "TextualInversionConfig",
    "Trace",
    "Verdict",
    "Watch",
    "__version__",
    "personalise",
    "write_report",
]

_ROOMS = {
    "Backbone": "dvar.diffusion.backbone",
    "CustomDiffusionConfig": "dvar.config",
    "DreamBoothLoraConfig": "dvar.config",
    "Probe": "dvar.stopper.probe",
    "TextualInversionConfig": "dvar.config",
    "personalise": "dvar.trainer.run",
    "write_report": "dvar.laboratory.report",
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
