"""The door of a run: what is let in, how it is read, and every refusal, alone and in company."""

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
import pytest
from PIL import Image

from dvar.config.templates import TEMPLATES
from dvar.config.training import CustomDiffusionConfig, TextualInversionConfig
from dvar.errors import ModelError, RefusedInput
from dvar.testing import tiny_tokenizer
from dvar.training import rule
from dvar.training.dataset import Concept, read_concept, read_image
from dvar.training.preflight import preflight

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (80, 80), (80 * index, 0, 0)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        instance_data_dir=str(pictures),
        initializer_token="mug",
        resolution=64,
        output_dir=str(tmp_path / "run"),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def refusals(config: TextualInversionConfig, load_tokenizer: Callable[[str], Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(RefusedInput) as refused:
        preflight(config, load_tokenizer)
    return refused.value.problems


def jpeg(picture: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **how)
    return buffer.getvalue()


# What is let in


def test_a_good_folder_becomes_a_concept(config: TextualInversionConfig, tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = preflight(config, lambda name: tokenizer)
    assert isinstance(concept, Concept)
    assert concept.names == ("00.png", "01.png", "02.png")
    assert concept.captions == (None, None, None)
    assert concept.placeholder_tokens == ("<thing>",)
    assert [picture.getpixel((9, 9)) for picture in concept.images] == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert {(picture.mode, picture.size) for picture in concept.images} == {("RGB", (64, 64))}


def test_hidden_files_and_what_systems_leave_are_passed_over(config: TextualInversionConfig, pictures: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "concept.json"):
        (pictures / name).write_bytes(b"not a picture")
    (pictures / ".cache").mkdir()
    assert len(read_concept(config).images) == 3


def test_one_picture_is_taken_with_a_warning(config: TextualInversionConfig, pictures: Path) -> None:
    for name in ("01.png", "02.png"):
        (pictures / name).unlink()
    with pytest.warns(UserWarning, match="one image only"):
        assert len(read_concept(config).images) == 1


def test_without_captions_a_picture_has_every_template(config: TextualInversionConfig) -> None:
    texts = read_concept(config).texts(0)
    assert len(texts) == len(TEMPLATES["object"])
    assert all("<thing>" in text for text in texts)
    assert read_concept(replace(config, learnable_property="style")).texts(0)[0] == "a picture in the style of <thing>"


@pytest.mark.parametrize(("kind", "least"), [("object", 27), ("style", 12)])
def test_templates_are_distinct_sentences_with_one_place_for_the_word(kind: str, least: int) -> None:
    templates = TEMPLATES[kind]
    assert len(set(templates)) == len(templates) == least
    assert all(template.count("{}") == template.count("{") == 1 for template in templates)


def test_captions_are_read_from_files_of_the_same_name(config: TextualInversionConfig, pictures: Path) -> None:
    (pictures / "00.txt").write_text("\ufeffa photo of <thing> at night\n", encoding="utf-8")
    concept = read_concept(config)
    assert concept.captions == ("a photo of <thing> at night", None, None)
    assert concept.texts(0) == ("a photo of <thing> at night",)
    assert len(concept.texts(1)) > 1


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_captions_are_read_from_metadata(config: TextualInversionConfig, pictures: Path, key: str) -> None:
    rows = [{"file_name": f"0{index}.png", key: f"<thing> number {index}"} for index in (2, 0)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert read_concept(config).captions == ("<thing> number 0", None, "<thing> number 2")


# How a picture is read


def saved(folder: Path, picture: Image.Image, name: str = "picture.png", **how: Any) -> Path:
    picture.save(folder / name, **how)
    return folder / name


def test_transparency_is_composed_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (64, 64), (*RED, 255))
    half.paste((0, 0, 0, 0), (32, 0, 64, 64))
    read = read_image(saved(tmp_path, half), 64)
    assert (read.getpixel((8, 32)), read.getpixel((56, 32))) == (RED, WHITE)


def test_grey_with_transparency_is_composed_on_white(tmp_path: Path) -> None:
    assert read_image(saved(tmp_path, Image.new("LA", (64, 64), (0, 0))), 64).getpixel((9, 9)) == WHITE
    # 50 grey under an alpha of 51 / 255 = 0.2 on white: 0.2 * 50 + 0.8 * 255 = 214.
    read = read_image(saved(tmp_path, Image.new("LA", (64, 64), (50, 51))), 64)
    assert read.getpixel((9, 9)) == (214, 214, 214)


def test_a_palette_with_a_transparent_entry_is_composed_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (32, 0, 64, 64))
    plain = read_image(saved(tmp_path, palette), 64)
    assert (plain.getpixel((8, 32)), plain.getpixel((56, 32))) == (RED, BLUE)
    clear = read_image(saved(tmp_path, palette, transparency=0), 64)
    assert (clear.getpixel((8, 32)), clear.getpixel((56, 32))) == (RED, WHITE)


@pytest.mark.parametrize(("grey", "seen"), [(0, 0), (257 * 100, 100), (30000, 116), (65535, 255)])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path, grey: int, seen: int) -> None:
    # Eight bits of 255 are sixteen of 65535, so a level is 257: 30000 / 257 = 116.7.
    read = read_image(saved(tmp_path, Image.fromarray(np.full((64, 64), grey, np.uint16))), 64)
    assert read.getpixel((9, 9)) == (seen, seen, seen)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    read = read_image(saved(tmp_path, Image.new("RGB", (64, 64), WHITE).convert(mode), "picture.tiff"), 64)
    assert (read.mode, read.getpixel((9, 9))) == ("RGB", WHITE)


@pytest.mark.parametrize("name", ["picture.mpo", "picture.gif", "picture.tiff"])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    read = read_image(saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:]), 64)
    np.testing.assert_allclose(np.asarray(read)[9, 9], RED, atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    # A lossless file that holds an asymmetric picture turned away: undoing its tag must give the picture back.
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    away = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF's number of a turn -> Pillow's of its inverse
    stored = upright.transpose(Image.Transpose(away[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_image(saved(tmp_path, stored, exif=exif), 64)
    assert np.array_equal(np.asarray(read), np.asarray(upright))


def test_the_middle_square_is_cropped_or_the_whole_is_squeezed(tmp_path: Path) -> None:
    wide = Image.new("RGB", (256, 64), BLUE)
    wide.paste(RED, (96, 0, 160, 64))
    path = saved(tmp_path, wide)
    assert read_image(path, 64).getcolors() == [(64 * 64, RED)]
    squeezed = read_image(path, 64, crop=False)
    assert (squeezed.getpixel((4, 32)), squeezed.getpixel((32, 32)), squeezed.getpixel((60, 32))) == (BLUE, RED, BLUE)


def test_the_settings_choose_between_cropping_and_squeezing(config: TextualInversionConfig, pictures: Path) -> None:
    wide = Image.new("RGB", (256, 64), BLUE)
    wide.paste(RED, (96, 0, 160, 64))
    wide.save(pictures / "00.png")
    assert read_concept(config).images[0].getpixel((0, 0)) == RED
    assert read_concept(replace(config, center_crop=False)).images[0].getpixel((0, 0)) == BLUE


def test_a_picture_that_must_be_enlarged_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"picture\.png is 40x50 pixels and is enlarged to 64"):
        assert read_image(saved(tmp_path, Image.new("RGB", (40, 50))), 64).size == (64, 64)


# Refused files, each alone


def not_a_picture(folder: Path) -> None:
    (folder / "notes.pdf").write_bytes(b"%PDF-1.7 and so on")


def truncated(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    whole = jpeg(Image.fromarray(noise))
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])


def broken_png(folder: Path) -> None:
    whole = bytearray((folder / "00.png").read_bytes())
    whole[45] ^= 0xFF
    (folder / "broken.png").write_bytes(whole)


def too_small(folder: Path) -> None:
    Image.new("RGB", (200, 31)).save(folder / "small.png")


def bomb(folder: Path) -> None:
    # A header that claims 20000 x 20000: over Pillow's bound of twice 89 million pixels.
    whole = bytearray((folder / "00.png").read_bytes())
    whole[16:24] = struct.pack(">II", 20000, 20000)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    (folder / "bomb.png").write_bytes(whole)


def a_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def lonely_caption(folder: Path) -> None:
    (folder / "09.txt").write_text("a photo of <thing>", encoding="utf-8")


def caption_without_the_word(folder: Path) -> None:
    (folder / "00.txt").write_text("a photo of a mug", encoding="utf-8")


def caption_in_another_encoding(folder: Path) -> None:
    (folder / "00.txt").write_bytes("a caf\xe9 photo of <thing>".encode("latin-1"))


def metadata_of_a_missing_picture(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "07.png", "text": "<thing>"}', encoding="utf-8")


def metadata_without_captions(folder: Path) -> None:
    lines = '{"file_name": "00.png", "text": "<thing>"}\n{"file_name": "01.png"}'
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def metadata_that_is_no_json(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("file_name,text", encoding="utf-8")


def metadata_that_is_a_list(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('["00.png", "<thing>"]', encoding="utf-8")


def two_captions(folder: Path) -> None:
    (folder / "00.txt").write_text("a photo of <thing>", encoding="utf-8")
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "my <thing>"}', encoding="utf-8")


BAD_FILES = [
    (not_a_picture, "notes.pdf is not an image that can be read"),
    (truncated, "cut.jpg is damaged"),
    (broken_png, "broken.png is damaged"),
    (too_small, "small.png must be 32 pixels or more on its shorter side at resolution 64, got 200x31 pixels"),
    (bomb, "bomb.png has far too many pixels"),
    (a_folder, "more is a folder"),
    (lonely_caption, "09.txt is the caption of no image"),
    (caption_without_the_word, "00.txt must contain the placeholder token <thing>"),
    (caption_in_another_encoding, "00.txt cannot be read as UTF-8"),
    (metadata_of_a_missing_picture, "metadata.jsonl, line 1, names '07.png', which is not in the folder"),
    (metadata_without_captions, 'metadata.jsonl, line 2, must be {"file_name": ..., "text": ...}'),
    (metadata_that_is_no_json, "metadata.jsonl, line 1, must be"),
    (metadata_that_is_a_list, "metadata.jsonl, line 1, must be"),
    (two_captions, "is a second caption of 00.png"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_FILES, ids=[spoil.__name__ for spoil, _ in BAD_FILES])
def test_a_bad_file_is_refused_by_name(
    config: TextualInversionConfig, pictures: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(pictures)
    (problem,) = refusals(config)
    assert said in problem
    assert "\n" not in problem


def test_several_bad_files_are_all_named(config: TextualInversionConfig, pictures: Path) -> None:
    spoilers = [not_a_picture, truncated, too_small, a_folder, lonely_caption, metadata_of_a_missing_picture]
    for spoil in spoilers:
        spoil(pictures)
    problems = refusals(config)
    assert len(problems) == len(spoilers)
    for name in ("notes.pdf", "cut.jpg", "small.png", "more", "09.txt", "07.png"):
        assert any(name in problem for problem in problems), name


def test_a_missing_folder_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    (problem,) = refusals(replace(config, instance_data_dir=str(tmp_path / "nowhere")))
    assert "nowhere does not exist" in problem


def test_a_file_for_a_folder_is_refused(config: TextualInversionConfig, pictures: Path) -> None:
    (problem,) = refusals(replace(config, instance_data_dir=str(pictures / "00.png")))
    assert "00.png is a file" in problem


def test_an_empty_folder_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    (problem,) = refusals(replace(config, instance_data_dir=str(tmp_path / "empty")))
    assert "holds no images" in problem


# The rule


@pytest.mark.parametrize(
    ("changed", "said"),
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
    config: TextualInversionConfig, changed: dict[str, Any], said: str
) -> None:
    (problem,) = rule.problems(replace(config, **changed))
    assert said in problem
    if changed.get("threshold") == changed.get("threshold"):
        assert refusals(replace(config, **changed)) == (problem,)


def test_an_ill_formed_rule_setting_is_told_once(config: TextualInversionConfig) -> None:
    assert refusals(replace(config, window="wide")) == ("window must be a whole number, got 'wide'",)  # type: ignore[arg-type]


# The words


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"placeholder_token": "mug"}, "the model already knows mug: try '<my-mug>'"),
        ({"placeholder_token": "ktn"}, "the model already knows ktn"),
        ({"placeholder_token": "a"}, "the model already knows a:"),
        ({"initializer_token": "mugs"}, "initializer_token must be one token, got 'mugs', which is"),
        ({"initializer_token": "red mug"}, "which is 2: red mug; try mug"),
        ({"initializer_token": "mugs"}, "try mug"),
        ({"initializer_token": "vaze"}, "try vase"),
        ({"validation_prompt": "a " * 75 + "<thing>"}, "text of validation_prompt must be at most 77 tokens, got 78"),
    ],
)
def test_a_word_that_does_not_fit_is_refused(
    config: TextualInversionConfig, tokenizer: Any, changed: dict[str, Any], said: str
) -> None:
    (problem,) = refusals(replace(config, **changed), lambda name: tokenizer)
    assert said in problem


def test_a_tokenizer_that_does_not_load_is_one_problem_among_the_others(config: TextualInversionConfig) -> None:
    def fail(name: str) -> Any:
        raise ModelError(f"{name} does not load")

    assert refusals(replace(config, resolution=60), fail) == (
        "resolution must be a multiple of 8, got 60: try 64",
        "mini does not load",
    )


# All at once


def test_everything_wrong_is_told_at_once(config: TextualInversionConfig, pictures: Path, tokenizer: Any) -> None:
    not_a_picture(pictures)
    truncated(pictures)
    caption_without_the_word(pictures)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "result.json").touch()
    bad = replace(config, num_vectors=0, window=9000, placeholder_token="vase", initializer_token="coffee mug")
    (pictures / "00.txt").write_text("a photo of a cup", encoding="utf-8")
    problems = refusals(bad, lambda name: tokenizer)
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
    config: TextualInversionConfig, pictures: Path
) -> None:
    bad = replace(config, pretrained_model_name_or_path=str(pictures))
    (problem,) = refusals(bad, lambda name: pytest.fail("loaded"))
    assert "is no diffusers pipeline" in problem


def test_captions_are_measured_with_what_rescaling_puts_before_them(
    config: TextualInversionConfig, tokenizer: Any
) -> None:
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
