"""Tools for tests: contracts of rules, log formats and methods, and tiny random models with images."""

from dvar.testing.contracts import CURVES, LOGGED_CURVE, LogFormatContract, RuleContract
from dvar.testing.method_contract import MethodContract, assert_only_the_method_moves
from dvar.testing.tiny_models import (
    WORDS,
    tiny_clip,
    tiny_concept,
    tiny_pipeline,
    tiny_sd3_pipeline,
    tiny_tokenizer,
    tiny_xl_pipeline,
)

__all__ = [
    "CURVES",
    "LOGGED_CURVE",
    "WORDS",
    "LogFormatContract",
    "MethodContract",
    "RuleContract",
    "assert_only_the_method_moves",
    "tiny_clip",
    "tiny_concept",
    "tiny_pipeline",
    "tiny_sd3_pipeline",
    "tiny_tokenizer",
    "tiny_xl_pipeline",
]
