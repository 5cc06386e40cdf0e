"""Tools for tests: contracts of rules, log formats, methods and base models, and tiny random models with images."""

from dvar.testing.backbone_contract import BackboneContract
from dvar.testing.contracts import CURVES, LOGGED_CURVE, LogFormatContract, RuleContract
from dvar.testing.family_contract import FamilyTrainingContract
from dvar.testing.method_contract import MethodContract, assert_only_the_method_moves
from dvar.testing.tiny_flow_models import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_qwen_image_pipeline,
    tiny_z_image_pipeline,
)
from dvar.testing.tiny_models import (
    tiny_clip,
    tiny_concept,
    tiny_ldm_pipeline,
    tiny_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
)
from dvar.testing.tiny_parts import WORDS, tiny_tokenizer

__all__ = [
    "CURVES",
    "LOGGED_CURVE",
    "WORDS",
    "BackboneContract",
    "FamilyTrainingContract",
    "LogFormatContract",
    "MethodContract",
    "RuleContract",
    "assert_only_the_method_moves",
    "tiny_clip",
    "tiny_concept",
    "tiny_flux_pipeline",
    "tiny_klein_pipeline",
    "tiny_ldm_pipeline",
    "tiny_pipeline",
    "tiny_qwen_image_pipeline",
    "tiny_sd3_pipeline",
    "tiny_tokenizer",
    "tiny_xl_pipeline",
    "tiny_z_image_pipeline",
]
