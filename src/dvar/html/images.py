"""Images inside pages, as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from dvar.files import regular_file

PIXEL_ART_SIDE = 128  # images up to this side are shown pixel by pixel, larger ones are shrunk and smoothed
SHRUNK_SIDE = 224


def embed_image(path: Path, alt: str) -> Markup:
    """Return the image as an element that holds its bytes; an empty frame when the file cannot be read."""
    try:
        with Image.open(regular_file(path)) as file:
            image = file.convert("RGB")
    except Exception:  # decoders raise whatever a damaged file makes them meet
        return Markup('<span class="none" title="{} cannot be read"></span>').format(path.name)
    content = io.BytesIO()
    if max(image.size) <= PIXEL_ART_SIDE:
        image.save(content, "png", optimize=True)
        template = Markup('<img src="data:image/png;base64,{}" alt="{}" class="pixels">')
    else:
        image.thumbnail((SHRUNK_SIDE, SHRUNK_SIDE), Image.Resampling.LANCZOS)
        image.save(content, "jpeg", quality=82)
        template = Markup('<img src="data:image/jpeg;base64,{}" alt="{}">')
    return template.format(base64.b64encode(content.getvalue()).decode(), alt)
