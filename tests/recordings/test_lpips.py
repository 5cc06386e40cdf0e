"""LPIPS on weights that are random or chosen, so that distances are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dvar.diffusion.clip import Clip
from dvar.errors import ModelError
from dvar.recordings.image_metrics import Scorer
from dvar.recordings.lpips import Lpips

CHANNELS = (3, 64, 192, 384, 256, 256)
NAMES = ("net.slice1.0", "net.slice2.3", "net.slice3.6", "net.slice4.8", "net.slice5.10")
KERNELS = (11, 5, 3, 3, 3)


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for number, (name, size) in enumerate(zip(NAMES, KERNELS, strict=True)):
        shape = (CHANNELS[number + 1], CHANNELS[number], size, size)
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * size * size) ** 0.5
        weights[f"{name}.bias"] = torch.zeros(shape[0])
        weights[f"lins.{number}.model.1.weight"] = torch.rand((1, shape[0], 1, 1), generator=generator)
    return weights


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]


def test_a_distance_is_symmetric_and_0_for_equal_images(file: Path, images: list[Image.Image]) -> None:
    lpips = Lpips.load(file)
    first, second = images[:2], images[2:]
    forth, back = lpips.distances(first, second), lpips.distances(second, first)
    torch.testing.assert_close(forth, back)
    assert (forth > 0).all()
    assert not lpips.distances(first, first).any()
    near = [Image.blend(image, other, 0.1) for image, other in zip(first, second, strict=True)]
    assert (lpips.distances(first, near) < forth).all()


def test_a_distance_by_hand(images: list[Image.Image]) -> None:
    """With one weighted channel in the first layer alone, the distance is the mean square of its difference."""
    weights = {name.replace("lins.", "lin"): of for name, of in random_weights().items()}
    for number in range(5):
        weights[f"lin{number}.model.1.weight"].zero_()
    weights["lin0.model.1.weight"][0, 3] = 2.0
    lpips = Lpips("by hand", weights)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    units = []
    for image in images[:2]:
        pixels = (torch.from_numpy(np.array(image)).float() / 127.5 - 1 - shift) / scale
        layer = torch.nn.functional.conv2d(pixels.permute(2, 0, 1)[None], weights["net.slice1.0.weight"], None, 4, 2)
        units.append(layer.relu() / (layer.relu().norm(dim=1, keepdim=True) + 1e-10))
    expected = 2 * (units[0][0, 3] - units[1][0, 3]).square().mean()
    assert float(lpips.distances(images[:1], images[1:2])) == pytest.approx(float(expected), rel=1e-5)


def test_diversity_is_the_mean_distance_to_the_others_of_a_text(file: Path, images: list[Image.Image]) -> None:
    lpips = Lpips.load(file)
    diversity = lpips.diversity(images, ["a cat", "a dog", "a cat", "a cat"])
    assert diversity is None, "one image of a text has no other"
    diversity = lpips.diversity([*images[:3], images[0], images[0]], ["a cat", "a cat", "a cat", "a dog", "a dog"])
    assert diversity is not None
    (there, back) = (
        lpips.distances([images[0]] * 2, [images[1], images[2]]),
        lpips.distances(images[1:2], images[2:3]),
    )
    assert diversity.tolist() == pytest.approx(
        [
            float(there.mean()),
            float(there[0] + back[0]) / 2,
            float(there[1] + back[0]) / 2,
            0.0,
            0.0,
        ]
    )


def test_a_scorer_adds_the_diversity_of_its_images(file: Path, images: list[Image.Image]) -> None:
    scorer = Scorer(Clip.scoring(), images[:1], lpips=Lpips.load(file))
    assert scorer.names["lpips"] == "lpips.safetensors"
    scores = scorer(images, ["a cat", "a cat", "a dog", "a dog"])
    assert len(scores["diversity"]) == 4
    assert scores["diversity"][0] == scores["diversity"][1] > 0
    assert "diversity" not in scorer(images, ["a cat", "a dog", "a mug", "a boot"])


def test_another_file_is_refused(file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    with pytest.raises(ModelError, match="does not load as a safetensors file"):
        Lpips.load(torn)
    with pytest.raises(ModelError, match="does not load as a safetensors file"):
        Lpips.load(tmp_path / "none.safetensors")
    weights = random_weights()
    del weights["net.slice3.6.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ModelError, match=r"is no LPIPS by AlexNet, it lacks net\.slice3\.6\.bias"):
        Lpips.load(tmp_path / "less.safetensors")
