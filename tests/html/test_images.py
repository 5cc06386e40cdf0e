"""Images embedded in HTML pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from dvar.html.images import PIXEL_ART_SIDE, SHRUNK_SIDE, embed_image


def decode_image(markup: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(markup.split("base64,")[1].split('"')[0])))


def test_a_small_image_is_embedded_pixel_by_pixel(tmp_path: Path) -> None:
    image = Image.effect_noise((PIXEL_ART_SIDE, 32), 60).convert("RGB")
    image.save(tmp_path / "small.png")
    markup = embed_image(tmp_path / "small.png", 'a "mug"')
    assert 'alt="a &#34;mug&#34;"' in markup
    assert 'class="pixels"' in markup
    assert decode_image(markup).tobytes() == image.tobytes()


def test_a_large_image_is_shrunk(tmp_path: Path) -> None:
    Image.effect_noise((512, 256), 60).save(tmp_path / "large.png")
    markup = embed_image(tmp_path / "large.png", "a mug")
    assert "pixels" not in markup
    assert decode_image(markup).size == (SHRUNK_SIDE, SHRUNK_SIDE // 2)


def test_a_file_that_is_no_image_leaves_an_empty_frame(tmp_path: Path) -> None:
    (tmp_path / "<b>.png").write_bytes(b"no image")
    markup = embed_image(tmp_path / "<b>.png", "a mug")
    assert markup == '<span class="none" title="&lt;b&gt;.png cannot be read"></span>'
