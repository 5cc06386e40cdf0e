"""Schemas of the JSON files in a run's folder."""

from __future__ import annotations

from dvar.training.run_layout import TRACE

RUN_CONFIG = {
    "method?": str,
    "pretrained_model_name_or_path": str,
    "placeholder_token": (str, None),
    "output_dir": str,
    "rule?": str,
    "window": int,
    "threshold": float,
    "max_train_steps": int,
    "versions?": {str: str},
}
"""What a report needs of config.json; the rest is checked as the settings of its method."""
RESULT = {
    "verdict": dict,
    "steps": int,
    "exported_step": int,
    "best_step?": int,
    "seconds": {str: float},
    "weights": [str],
    "best_weights?": [str],
    "base_sha256?": str,
    "family?": str,
}
SAMPLE_PROMPT_ROWS = [{"prompt": str, "seed": int}]
INITIALIZERS = [{"word": str, "initializer_token": str, "best?": {str: float}, "worst?": {str: float}}]
MANIFEST_DIGESTS = {"tensors.safetensors": str, "facts.json": str, TRACE: str}
CHECKPOINT_FACTS = {
    "config": {"initializer_token": (str, None)},
    "pictures": str,
    "base": str,
    "class_images?": str,
    "best_step": int,
    "optimizer": {"plain": dict, "groups": [dict]},
    "scaler": dict,
}
