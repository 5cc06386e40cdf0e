"""Runs the code of a model card as its reader would."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dvar.files import read_text


def run_model_card(folder: str | Path, *models: Path, size: int | None = None) -> Any:
    """Run the code of a model card in its folder, which generates an image, and return the pipeline that it loads.

    Args:
        folder: The folder of a run or of a merged pipeline.
        models: Folders and files that the card names by the last part of their paths.
        size: The side of the image in pixels; by default that of the pipeline, which is large for a tiny model.
    """
    from dvar.diffusion.loading import quiet_libraries

    card = read_text(Path(folder) / "README.md")
    code = card.split("```python\n")[1].split("```")[0]
    for model in models:
        code = code.replace(json.dumps(model.name), json.dumps(str(model)))
    if size:
        code = code.replace(", num_inference_steps=", f", height={size}, width={size}, num_inference_steps=")
    scope: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        with quiet_libraries():
            exec(code, scope)
        Path("image.png").unlink()
    finally:
        os.chdir(before)
    return scope["pipeline"]
