"""Sizes by aspect ratio, repeats, prompts from a file, and runs that are pushed to the hub."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dvar.config.buckets import list_buckets, nearest_bucket
from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig
from dvar.diffusion.objective import Bucketed, Encoded, draw
from dvar.errors import ModelError, RefusedInput
from dvar.runs.export import push_finished_run
from dvar.testing import (
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_image_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from dvar.training import sample_prompts
from dvar.training.dataset import read_concept
from dvar.training.personalise import personalise, prepare
from dvar.training.preflight import preflight
from dvar.training.run import TrainingRun
from dvar.training.sample_prompts import SamplePrompt, read_sample_prompts

BUCKETS = "32,32;16,64;64,16"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of which one is wide and one is high."""
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate([(64, 64), (70, 64), (128, 32), (32, 128)]):
        Image.effect_mandelbrot(size, (-2, -1.5, 1 + index / 10, 1.5), 50).save(folder / f"{index}.png")
    return folder


def config_of(images: Path, folder: Path, model: Path | None = None, **changes: Any) -> DreamBoothLoraConfig:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model) if model else "mini",
        "instance_data_dir": str(images),
        "instance_prompt": "a photo of mug",
        "resolution": 32,
        "max_train_steps": 9,
        "window": 8,
        "threshold": 1e-9,
        "eval_batch_size": 8,
        "validation_steps": 9,
        "num_inference_steps": 2,
        "num_validation_images": 1,
        "output_dir": str(folder),
    }
    return DreamBoothLoraConfig(**{**shared, **changes})


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_automatic_sizes_have_no_more_pixels_than_the_square(resolution: int) -> None:
    sizes = list_buckets("auto", resolution)
    assert (resolution, resolution) in sizes
    assert len(sizes) >= 7
    for height, width in sizes:
        assert resolution * resolution / 2 < height * width <= resolution * resolution
        assert height % 64 == width % 64 == 0
        assert (width, height) in sizes
        assert max(height / width, width / height) <= 2
    assert nearest_bucket((3000, 4000), sizes)[0] < nearest_bucket((3000, 4000), sizes)[1]
    assert nearest_bucket((10, 10), sizes) == (resolution, resolution)


def test_images_have_the_size_that_is_most_like_theirs(images: Path, tmp_path: Path) -> None:
    concept = read_concept(config_of(images, tmp_path, aspect_ratio_buckets=BUCKETS))
    assert [image.size for image in concept.images] == [(32, 32), (32, 32), (64, 16), (16, 64)]
    assert {image.size for image in read_concept(config_of(images, tmp_path)).images} == {(32, 32)}


def test_a_batch_has_one_size_and_every_image_is_as_likely() -> None:
    def encoded(count: int, side: int) -> Encoded:
        moments = torch.arange(count).reshape(-1, 1, 1, 1, 1).float().expand(count, 1, 8, side, 8)
        return Encoded(moments, [torch.full([1, 4], index) for index in range(count)])

    examples = Bucketed([encoded(3, 8), encoded(1, 4)])
    counts: Counter[tuple[int, int]] = Counter()
    for step in range(400):
        draws = draw(examples, timesteps=10, seed=1, stream="train", step=step, count=4)
        parts = [draw(examples, timesteps=10, seed=1, stream="train", step=step, first=i, count=2) for i in (0, 2)]
        assert torch.equal(torch.cat([part.noise for part in parts]), draws.noise)
        for row in draws.moments:
            counts[row.shape[1], int(row[0, 0, 0])] += 1
    assert counts.keys() == {(8, 0), (8, 1), (8, 2), (4, 0)}
    assert all(abs(count / 1600 - 1 / 4) < 0.07 for count in counts.values())


def test_a_run_with_sizes_trains_on_all_of_them_and_resumes_as_the_whole(
    images: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(images, tmp_path / "run", tiny_model, aspect_ratio_buckets=BUCKETS, checkpointing_steps=4)
    run = prepare(config)[0]
    assert isinstance(run, TrainingRun)
    assert sum(len(part.timesteps) for part in run.draw_held(8)) == 8
    assert len({part.noise.shape[2:] for part in run.draw_held(24)}) == 3
    shapes = {run.draw(run.examples, "train", step, 0, 2).noise.shape[2:] for step in range(40)}
    assert shapes == {(8, 8), (4, 16), (16, 4)}
    shutil.rmtree(tmp_path / "run")
    whole = personalise(config)
    trace = (tmp_path / "run" / "trace.jsonl").read_text().splitlines()
    values = [json.loads(line)["eval"] for line in trace[1:]]
    assert all(len(row) == 8 for row in values)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8", ignore_errors=True)
    resumed = personalise(DreamBoothLoraConfig(**{**vars(config), "resume_from_checkpoint": "latest"}))
    again = (tmp_path / "run" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["eval"] for line in again[1:]] == values
    assert whole.steps == resumed.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aspect_ratio_buckets": "wide"}, "aspect_ratio_buckets must be auto, or sizes such as 512,768;768,512, got"),
        ({"aspect_ratio_buckets": "36,64"}, "aspect_ratio_buckets must have sides that are multiples of 8, up to 8192"),
        ({"aspect_ratio_buckets": "32,32;0,64"}, "up to 8192, got 0,64: correct it"),
        ({"aspect_ratio_buckets": "32,99999992"}, "up to 8192, got 32,99999992: correct it"),
        ({"sample_prompts": "nowhere.txt"}, "sample_prompts nowhere.txt cannot be read (No such file"),
        ({"hub_model_id": "me/mug"}, "hub_model_id is for push_to_hub, got 'me/mug' without it: add the flag or drop"),
        ({"push_to_hub": True}, "push_to_hub needs an account on the hub, and no token is here: hf auth login"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], message: str, images: Path, tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RefusedInput) as caught:
        preflight(config_of(images, tmp_path / "run", tiny_model, **changes))
    (problem,) = caught.value.problems
    assert message in problem


def test_sizes_of_a_family_are_multiples_of_its_own(images: Path, tmp_path: Path) -> None:
    model = tiny_flux_pipeline(tmp_path / "model")
    config = config_of(images, tmp_path / "run", model, aspect_ratio_buckets="32,32;24,40")
    with pytest.raises(RefusedInput, match=r"aspect_ratio_buckets must have multiples of 16 on a FLUX.1, got 24,40"):
        preflight(config)


def test_sizes_and_rescaling_exclude_each_other(images: Path) -> None:
    config = CustomDiffusionConfig(instance_data_dir=str(images), class_noun="mug", aspect_ratio_buckets="auto")
    with pytest.raises(RefusedInput, match="random_rescale rescales squares: add --no_random_rescale"):
        preflight(config, None)


# --- repeats --------------------------------------------------------------------------------------------------------


def test_an_image_counts_as_often_as_its_line_or_its_folder_says(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("3_mug", "1_cup"):
        (folder / name).mkdir(parents=True)
        shutil.copy(images / "0.png", folder / name)
    (folder / "3_mug" / "0.txt").write_text("a red mug")
    (folder / "1_cup" / "metadata.jsonl").write_text('{"file_name": "0.png", "repeats": 5}')
    concept = read_concept(config_of(folder, tmp_path))
    assert dict(zip(concept.names, concept.repeats, strict=True)) == {"1_cup/0.png": 5, "3_mug/0.png": 3}
    assert concept.captions == (None, "a red mug")


def test_repeats_change_how_often_an_image_is_drawn_and_nothing_else(
    images: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "repeats": 7}')
    run = prepare(config_of(folder, tmp_path / "run", tiny_model))[0]
    moments = [run.draw(run.examples, "train", step, 0, 1).moments[0] for step in range(200)]
    assert isinstance(run.examples, Encoded)
    often = sum(any(torch.equal(part, view) for view in run.examples.moments[1]) for part in moments)
    assert abs(often / 200 - 0.7) < 0.1


@pytest.mark.parametrize("repeats", ["0", "1.5", '"two"', "true"])
def test_repeats_that_are_no_count_are_refused(repeats: str, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "1.png", "repeats": {repeats}}}')
    with pytest.raises(RefusedInput, match=r"line 1, must have repeats that are a whole number from 1, got|must be {"):
        read_concept(config_of(folder, tmp_path))


# --- prompts from a file --------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_read_as_kohyas_scripts_do(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# ours\na red mug\n\na mug on grass --n blurry, dark --d 7\n")
    prompts = read_sample_prompts(config_of(images, tmp_path, sample_prompts=str(file)))
    assert prompts == (SamplePrompt("a red mug"), SamplePrompt("a mug on grass", "blurry, dark", 7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts: write one a line"),
        ("--n dark", "line 1, has no prompt before its options: write it first"),
        ("a mug --w 512", "line 1, has an option --w: only --n (negative prompt) and --d (seed) are read, drop it"),
        *(
            (f"a mug --d {seed}", f"line 1, has a seed '{seed}' that is not a whole number from 0 to {2**63 - 1}")
            for seed in ("one", "-1", "²", str(2**63), "9" * 5000)
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_refused(text: str, message: str, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(RefusedInput) as caught:
        read_sample_prompts(config_of(images, tmp_path, sample_prompts=str(file)))
    assert message in caught.value.problems[0]


def test_samples_follow_the_file_and_a_negative_prompt_changes_its_image(
    images: Path, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red mug --d 3\na red mug --d 3 --n dark cat\n")
    run = personalise(config_of(images, tmp_path / "run", tiny_model, sample_prompts=str(file))).folder
    rows = json.loads((run / "samples" / "prompts.json").read_text())
    assert [row["seed"] for row in rows] == [3, 3]
    assert [row.get("negative_prompt") for row in rows] == [None, "dark cat"]
    first, second = (path.read_bytes() for path in sorted((run / "samples" / "step-000009").glob("*.png")))
    assert first != second


def test_negative_prompts_are_refused_where_no_pipeline_reads_them(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a mug --n dark\n")
    model = tiny_flux_pipeline(tmp_path / "model")
    with pytest.raises(
        RefusedInput, match=r"sample_prompts has negative prompts, and the pipeline of FLUX.1 reads none"
    ):
        preflight(config_of(images, tmp_path / "run", model, sample_prompts=str(file)))


@pytest.mark.parametrize(
    ("save", "title", "least", "unused", "used"),
    [
        (tiny_pipeline, "Stable Diffusion 1.x or 2.x", 1, 1.0, 1.5),
        (tiny_xl_pipeline, "Stable Diffusion XL", 1, 0.0, 1.5),
        (tiny_qwen_image_pipeline, "Qwen-Image", 1, 1.0, 1.5),
        (tiny_z_image_pipeline, "Z-Image", 0, 0.0, 0.5),
    ],
)
def test_negative_prompts_are_refused_where_the_guidance_leaves_them_unused(
    save: Callable[..., Path], title: str, least: int, unused: float, used: float, images: Path, tmp_path: Path
) -> None:
    file, model = tmp_path / "prompts.txt", save(tmp_path / "model")
    file.write_text("a mug --n dark\n")

    def find_problems(guidance: float) -> list[str]:
        changes = {"sample_prompts": str(file), "guidance_scale": guidance}
        return sample_prompts.problems(config_of(images, tmp_path / "run", model, **changes))

    assert find_problems(unused) == [
        f"negative prompts in sample_prompts need a guidance_scale above {least} on a {title}, got {unused:g}: "
        "drop --n, or raise it"
    ]
    assert find_problems(used) == []
    file.write_text("a mug\n")
    assert find_problems(unused) == []


# --- the hub --------------------------------------------------------------------------------------------------------


class Hub:
    """A hub that notes what it is sent, or refuses it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.refuses = False

    def create_repo(self, name: str, exist_ok: bool) -> Any:
        if self.refuses:
            raise OSError("403: not yours")
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)


def test_a_finished_run_is_pushed_without_the_images_it_learned_from(
    images: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    config = config_of(images, tmp_path / "run", tiny_model, push_to_hub=True, hub_model_id="mug")
    folder = personalise(config).folder
    (call,) = hub.calls
    assert (call["repo_id"], call["folder_path"]) == ("me/mug", folder)
    names = ["README.md", "pytorch_lora_weights.safetensors", "samples/step-000009/*.png"]
    assert call["allow_patterns"] == names
    assert str(tmp_path) not in (folder / "README.md").read_text()
    hub.refuses = True
    with pytest.raises(
        ModelError, match=r"is complete, and was not pushed to me/mug \(403: not yours\): try again with"
    ):
        push_finished_run(folder, "me/mug")
    (folder / names[1]).write_bytes(b"torn")
    with pytest.raises(RefusedInput, match="lacks its weights or they are damaged"):
        push_finished_run(folder, "me/mug")
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="is complete, and was not pushed to mug"):
        assert personalise(config).weights
    assert (folder / "result.json").exists()
