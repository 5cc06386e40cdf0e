"""The images, captions and settings of a run: what is accepted, how it is read, and every refusal."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image

from dvar.config.methods import CustomDiffusionConfig, TextualInversionConfig
from dvar.config.templates import TEMPLATES
from dvar.errors import ModelError, RefusedInput
from dvar.testing import tiny_tokenizer
from dvar.training import rule
from dvar.training.dataset import Concept, read_concept, read_image
from dvar.training.preflight import preflight

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (80, 80), (80 * index, 0, 0)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        instance_data_dir=str(image_folder),
        initializer_token="mug",
        resolution=64,
        output_dir=str(tmp_path / "run"),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def find_problems(
    config: TextualInversionConfig, load_tokenizer: Callable[[Any], Any] | None = None
) -> tuple[str, ...]:
    with pytest.raises(RefusedInput) as error:
        preflight(config, load_tokenizer)
    return error.value.problems


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# Accepted folders


def test_a_valid_folder_becomes_a_concept(config: TextualInversionConfig, tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = preflight(config, lambda name: tokenizer)
    assert isinstance(concept, Concept)
    assert concept.names == ("00.png", "01.png", "02.png")
    assert concept.captions == (None, None, None)
    assert concept.placeholder_tokens == ("<thing>",)
    assert [image.getpixel((9, 9)) for image in concept.images] == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert {(image.mode, image.size) for image in concept.images} == {("RGB", (64, 64))}


def test_hidden_and_system_files_are_ignored(config: TextualInversionConfig, image_folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (image_folder / name).write_bytes(b"not an image")
    (image_folder / ".cache").mkdir()
    assert len(read_concept(config).images) == 3


def test_a_single_image_is_accepted_with_a_warning(config: TextualInversionConfig, image_folder: Path) -> None:
    for name in ("01.png", "02.png"):
        (image_folder / name).unlink()
    with pytest.warns(UserWarning, match="one image only"):
        assert len(read_concept(config).images) == 1


def test_an_image_without_a_caption_has_every_template(config: TextualInversionConfig) -> None:
    texts = read_concept(config).texts(0)
    assert len(texts) == len(TEMPLATES["object"])
    assert all("<thing>" in text for text in texts)
    assert read_concept(replace(config, learnable_property="style")).texts(0)[0] == "a picture in the style of <thing>"


@pytest.mark.parametrize(("kind", "count"), [("object", 27), ("style", 12)])
def test_templates_are_distinct_and_contain_the_placeholder_once(kind: str, count: int) -> None:
    templates = TEMPLATES[kind]
    assert len(set(templates)) == len(templates) == count
    assert all(template.count("{}") == template.count("{") == 1 for template in templates)


def test_captions_are_read_from_files_of_the_same_name(config: TextualInversionConfig, image_folder: Path) -> None:
    (image_folder / "00.txt").write_text("\ufeffa photo of <thing> at night\n", encoding="utf-8")
    concept = read_concept(config)
    assert concept.captions == ("a photo of <thing> at night", None, None)
    assert concept.texts(0) == ("a photo of <thing> at night",)
    assert len(concept.texts(1)) > 1


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_captions_are_read_from_metadata(config: TextualInversionConfig, image_folder: Path, key: str) -> None:
    rows = [{"file_name": f"0{index}.png", key: f"<thing> number {index}"} for index in (2, 0)]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert read_concept(config).captions == ("<thing> number 0", None, "<thing> number 2")


# Reading an image


def save_image(folder: Path, image: Image.Image, name: str = "image.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_transparency_is_composed_on_white(tmp_path: Path) -> None:
    source = Image.new("RGBA", (64, 64), (*RED, 255))
    source.paste((0, 0, 0, 0), (32, 0, 64, 64))
    image = read_image(save_image(tmp_path, source), 64)
    assert (image.getpixel((8, 32)), image.getpixel((56, 32))) == (RED, WHITE)


def test_grey_with_transparency_is_composed_on_white(tmp_path: Path) -> None:
    clear = Image.new("LA", (64, 64), (0, 0))
    clear.putpixel((0, 0), (0, 255))
    assert read_image(save_image(tmp_path, clear), 64).getpixel((9, 9)) == WHITE
    # 50 grey under an alpha of 51 / 255 = 0.2 on white: 0.2 * 50 + 0.8 * 255 = 214.
    image = read_image(save_image(tmp_path, Image.new("LA", (64, 64), (50, 51))), 64)
    assert image.getpixel((9, 9)) == (214, 214, 214)


def test_a_palette_with_a_transparent_entry_is_composed_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (32, 0, 64, 64))
    opaque = read_image(save_image(tmp_path, palette), 64)
    assert (opaque.getpixel((8, 32)), opaque.getpixel((56, 32))) == (RED, BLUE)
    transparent = read_image(save_image(tmp_path, palette, transparency=0), 64)
    assert (transparent.getpixel((8, 32)), transparent.getpixel((56, 32))) == (RED, WHITE)


@pytest.mark.parametrize(("grey", "level"), [(0, 0), (257 * 100, 100), (30000, 116), (65535, 255)])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path, grey: int, level: int) -> None:
    # Eight bits of 255 are sixteen of 65535, so a level is 257: 30000 / 257 = 116.7.
    image = read_image(save_image(tmp_path, Image.fromarray(np.full((64, 64), grey, np.uint16))), 64)
    assert image.getpixel((9, 9)) == (level, level, level)


@pytest.mark.parametrize(("value", "level"), [(0.0, 0), (0.2, 51), (0.5, 128), (1.0, 255)])
def test_grey_from_0_to_1_keeps_its_brightness(tmp_path: Path, value: float, level: int) -> None:
    pixels = np.full((64, 64), value, np.float32)
    assert read_image(save_image(tmp_path, Image.fromarray(pixels), "image.tiff"), 64).getpixel((9, 9)) == (level,) * 3


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((64, 64), -1, np.int32), "has values from -1 to -1, and only those from 0 to 65535 are understood"),
        (np.full((64, 64), 65536, np.int32), "has values from 65536 to 65536"),
        (np.full((64, 64), 1.5, np.float32), "has values from 1.5 to 1.5, and only those from 0 to 1 are understood"),
        (np.full((64, 64), np.nan, np.float32), "has values from nan to nan"),
        (np.zeros((64, 64, 4), np.uint8), "is fully transparent"),
    ],
)
def test_values_that_could_mean_anything_are_refused(tmp_path: Path, pixels: Any, message: str) -> None:
    path = save_image(tmp_path, Image.fromarray(pixels), "image.tiff")
    with pytest.raises(RefusedInput, match=f"{message}.*: save it as PNG or JPEG with 8 bits, or move it away"):
        read_image(path, 64)


@pytest.mark.parametrize("suffix", ["eps", "pdf", "ico", "tga"])
def test_formats_that_photographs_do_not_come_in_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = save_image(tmp_path, Image.new("RGB", (64, 64)), f"image.{suffix}")
    with pytest.raises(RefusedInput, match="is not an image that can be read"):
        read_image(path, 64)
    with pytest.raises(RefusedInput, match="is not an image that can be read"):
        read_image(path.rename(tmp_path / "renamed.png"), 64)


reads_its_ycbcr = pytest.mark.skipif(
    Version(PIL.__version__) < Version("13"), reason="Pillow reads the TIFF of YCbCr that it writes from 13 on"
)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", pytest.param("YCbCr", marks=reads_its_ycbcr), "RGB"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = read_image(save_image(tmp_path, Image.new("RGB", (64, 64), WHITE).convert(mode), "image.tiff"), 64)
    assert (image.mode, image.getpixel((9, 9))) == ("RGB", WHITE)


@pytest.mark.parametrize("name", ["image.mpo", "image.gif", "image.tiff"])
def test_the_first_of_several_frames_is_used(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    image = read_image(save_image(tmp_path, frames[0], name, save_all=True, append_images=frames[1:]), 64)
    np.testing.assert_allclose(np.asarray(image)[9, 9], RED, atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # A lossless file that holds an asymmetric image, rotated: applying its tag must restore the image.
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    inverses = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF's number of a turn -> Pillow's of its inverse
    rotated = upright.transpose(Image.Transpose(inverses[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(save_image(tmp_path, rotated, exif=exif), 64)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_an_image_is_center_cropped_or_squeezed(tmp_path: Path) -> None:
    source = Image.new("RGB", (256, 64), BLUE)
    source.paste(RED, (96, 0, 160, 64))
    path = save_image(tmp_path, source)
    assert read_image(path, 64).getcolors() == [(64 * 64, RED)]
    image = read_image(path, 64, crop=False)
    assert (image.getpixel((4, 32)), image.getpixel((32, 32)), image.getpixel((60, 32))) == (BLUE, RED, BLUE)


def test_the_settings_choose_between_cropping_and_squeezing(config: TextualInversionConfig, image_folder: Path) -> None:
    wide = Image.new("RGB", (256, 64), BLUE)
    wide.paste(RED, (96, 0, 160, 64))
    wide.save(image_folder / "00.png")
    assert read_concept(config).images[0].getpixel((0, 0)) == RED
    assert read_concept(replace(config, center_crop=False)).images[0].getpixel((0, 0)) == BLUE


def test_enlarging_an_image_raises_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"image\.png is 40x50 pixels and is enlarged to 64"):
        assert read_image(save_image(tmp_path, Image.new("RGB", (40, 50))), 64).size == (64, 64)


# Refused files, one at a time


def add_pdf(folder: Path) -> None:
    (folder / "notes.pdf").write_bytes(b"%PDF-1.7 and so on")


def add_truncated_jpeg(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    content = encode_jpeg(Image.fromarray(noise))
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])


def add_broken_png(folder: Path) -> None:
    content = bytearray((folder / "00.png").read_bytes())
    content[45] ^= 0xFF
    (folder / "broken.png").write_bytes(content)


def add_small_image(folder: Path) -> None:
    Image.new("RGB", (200, 31)).save(folder / "small.png")


def add_decompression_bomb(folder: Path) -> None:
    # A header that claims 20000 x 20000: over Pillow's bound of twice 89 million pixels.
    content = bytearray((folder / "00.png").read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "bomb.png").write_bytes(content)


def add_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def add_caption_without_image(folder: Path) -> None:
    (folder / "09.txt").write_text("a photo of <thing>", encoding="utf-8")


def write_caption_without_placeholder(folder: Path) -> None:
    (folder / "00.txt").write_text("a photo of a mug", encoding="utf-8")


def write_latin1_caption(folder: Path) -> None:
    (folder / "00.txt").write_bytes("a caf\xe9 photo of <thing>".encode("latin-1"))


def write_metadata_of_missing_image(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "07.png", "text": "<thing>"}', encoding="utf-8")


def write_incomplete_metadata(folder: Path) -> None:
    lines = '{"file_name": "00.png", "text": "<thing>"}\n{"file_name": "01.png"}'
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def write_invalid_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("file_name,text", encoding="utf-8")


def write_metadata_as_lists(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('["00.png", "<thing>"]', encoding="utf-8")


def write_two_captions(folder: Path) -> None:
    (folder / "00.txt").write_text("a photo of <thing>", encoding="utf-8")
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "my <thing>"}', encoding="utf-8")


BAD_FILES = [
    (add_pdf, "notes.pdf is not an image that can be read"),
    (add_truncated_jpeg, "cut.jpg is damaged"),
    (add_broken_png, "broken.png is damaged"),
    (add_small_image, "small.png must be 32 pixels or more on its shorter side at resolution 64, got 200x31 pixels"),
    (add_decompression_bomb, "bomb.png has far too many pixels"),
    (add_folder, "more is a folder"),
    (add_caption_without_image, "09.txt is the caption of no image"),
    (write_caption_without_placeholder, "00.txt must contain the placeholder token <thing>"),
    (write_latin1_caption, "00.txt cannot be read as UTF-8"),
    (write_metadata_of_missing_image, "metadata.jsonl, line 1, names '07.png', which is not in the folder"),
    (write_incomplete_metadata, 'metadata.jsonl, line 2, must be {"file_name": ..., "text": ...}'),
    (write_invalid_metadata, "metadata.jsonl, line 1, must be"),
    (write_metadata_as_lists, "metadata.jsonl, line 1, must be"),
    (write_two_captions, "is a second caption of 00.png"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FILES, ids=[damage.__name__ for damage, _ in BAD_FILES])
def test_a_bad_file_is_refused_by_name(
    config: TextualInversionConfig, image_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(image_folder)
    (problem,) = find_problems(config)
    assert message in problem
    assert "\n" not in problem


def test_several_bad_files_are_all_named(config: TextualInversionConfig, image_folder: Path) -> None:
    damages = [
        add_pdf,
        add_truncated_jpeg,
        add_small_image,
        add_folder,
        add_caption_without_image,
        write_metadata_of_missing_image,
    ]
    for damage in damages:
        damage(image_folder)
    problems = find_problems(config)
    assert len(problems) == len(damages)
    for name in ("notes.pdf", "cut.jpg", "small.png", "more", "09.txt", "07.png"):
        assert any(name in problem for problem in problems), name


def test_a_missing_folder_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    (problem,) = find_problems(replace(config, instance_data_dir=str(tmp_path / "nowhere")))
    assert "nowhere does not exist" in problem


def test_a_file_for_a_folder_is_refused(config: TextualInversionConfig, image_folder: Path) -> None:
    (problem,) = find_problems(replace(config, instance_data_dir=str(image_folder / "00.png")))
    assert "00.png is a file" in problem


def test_an_empty_folder_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    (problem,) = find_problems(replace(config, instance_data_dir=str(tmp_path / "empty")))
    assert "holds no images" in problem


# The rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 500, "max_train_steps": 500}, "window must be smaller than the cap"),
        ({"window": 4}, "window must be a whole number of steps, 8 or more, got 4"),
        ({"threshold": 0.0}, "threshold must lie between 0 and 1"),
        ({"threshold": 1.0}, "threshold must lie between 0 and 1"),
        ({"threshold": -0.15}, "threshold must lie between 0 and 1"),
        ({"threshold": float("nan")}, "threshold must lie between 0 and 1"),
        ({"window": 310, "probe_every": 100}, "fewer than 8 evaluations"),
    ],
)
def test_a_rule_that_cannot_stop_the_run_is_refused(
    config: TextualInversionConfig, changes: dict[str, Any], message: str
) -> None:
    (problem,) = rule.problems(replace(config, **changes))
    assert message in problem
    if changes.get("threshold") == changes.get("threshold"):
        assert find_problems(replace(config, **changes)) == (problem,)


def test_an_ill_formed_rule_setting_is_reported_once(config: TextualInversionConfig) -> None:
    assert find_problems(replace(config, window="wide")) == ("window must be a whole number, got 'wide'",)  # type: ignore[arg-type]


# Tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder_token": "mug"}, "the model already knows mug: try '<my-mug>'"),
        ({"placeholder_token": "ktn"}, "the model already knows ktn"),
        ({"placeholder_token": "a"}, "the model already knows a:"),
        ({"initializer_token": "mugs"}, "initializer_token must be one token, got 'mugs', which is"),
        ({"initializer_token": "red mug"}, "which is 2: red mug; try mug"),
        ({"initializer_token": "zqxj"}, "which is 4: z q x j; try a more common word for the kind of thing it is"),
        ({"initializer_token": "mugs"}, "try mug"),
        ({"initializer_token": "vaze"}, "try vase"),
        ({"validation_prompt": "a " * 75 + "<thing>"}, "text of validation_prompt must be at most 77 tokens, got 78"),
    ],
)
def test_an_invalid_token_is_refused(
    config: TextualInversionConfig, tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    (problem,) = find_problems(replace(config, **changes), lambda name: tokenizer)
    assert message in problem


def test_a_tokenizer_that_does_not_load_is_reported_with_the_other_problems(config: TextualInversionConfig) -> None:
    def fail(config: TextualInversionConfig) -> Any:
        raise ModelError(f"{config.pretrained_model_name_or_path} does not load")

    assert find_problems(replace(config, resolution=60), fail) == (
        "resolution must be a multiple of 8, got 60: try 64",
        "mini does not load",
    )


# All problems together


def test_all_problems_are_reported_at_once(config: TextualInversionConfig, image_folder: Path, tokenizer: Any) -> None:
    add_pdf(image_folder)
    add_truncated_jpeg(image_folder)
    write_caption_without_placeholder(image_folder)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "result.json").touch()
    invalid_config = replace(
        config, num_vectors=0, window=9000, placeholder_token="vase", initializer_token="coffee mug"
    )
    (image_folder / "00.txt").write_text("a photo of a cup", encoding="utf-8")
    problems = find_problems(invalid_config, lambda name: tokenizer)
    assert [problem.split()[0] for problem in problems] == [
        "num_vectors",
        "window",
        "output_dir",
        "cut.jpg",
        "notes.pdf",
        "00.txt",
        "placeholder_token",
        "initializer_token",
    ]


def test_the_tokenizer_is_not_loaded_from_a_folder_that_is_no_model(
    config: TextualInversionConfig, image_folder: Path
) -> None:
    invalid_config = replace(config, pretrained_model_name_or_path=str(image_folder))
    (problem,) = find_problems(invalid_config, lambda name: pytest.fail("loaded"))
    assert "is no diffusers pipeline" in problem


def test_caption_length_includes_the_prefix_added_by_rescaling(config: TextualInversionConfig, tokenizer: Any) -> None:
    # "photo of a <new1> mug" and its ends are 7 tokens; "a far away", spelled out, and each red add more.
    plain = CustomDiffusionConfig(
        instance_data_dir=config.instance_data_dir,
        class_noun="mug",
        resolution=64,
        output_dir=config.output_dir,
        instance_prompt="photo of a <new1> mug" + " red" * 70,
        validation_prompt="<new1> mug",
    )
    with pytest.raises(RefusedInput, match="the text of instance_prompt must be at most 77 tokens, got 8"):
        preflight(plain, lambda name: tokenizer)
    assert preflight(replace(plain, random_rescale=False), lambda name: tokenizer).templates
    with pytest.raises(RefusedInput, match="the text of class_prompt must be at most 77 tokens"):
        preflight(replace(plain, random_rescale=False, class_noun="mug " * 80), lambda name: tokenizer)
