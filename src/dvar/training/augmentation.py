"""Examples that training draws from: images and captions, encoded once or at a random size each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.objective import Bucketed, Choose, Encoded, Example
from dvar.training.placeholder_tokens import FAR, NEAR

_GREY = (128, 128, 128)  # the middle of the range, which the autoencoder reads as nearly 0


def encode_examples(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    backbone: Backbone,
    *,
    mirrored: bool,
    repeats: Sequence[int] = (),
) -> Encoded | Bucketed:
    """Return examples that are encoded once, those of several sizes in buckets.

    Args:
        images: RGB images.
        captions: The captions of each image.
        backbone: The model that encodes them.
        mirrored: Include the mirror image of each.
        repeats: How often each image counts; once if empty.
    """
    sizes = dict.fromkeys(image.size for image in images)
    buckets = []
    for size in sizes:
        places = [place for place, image in enumerate(images) if image.size == size]
        own = [images[place] for place in places]
        views = [own, [ImageOps.mirror(image) for image in own]][: 1 + mirrored]
        buckets.append(
            Encoded(
                torch.stack([backbone.encode(view) for view in views], dim=1),
                [backbone.tokenize(captions[place]) for place in places],
                _order([repeats[place] for place in places] if repeats else ()),
            )
        )
    return buckets[0] if len(buckets) == 1 else Bucketed(buckets)


def _order(repeats: Sequence[int]) -> list[int]:
    """Return each index as often as it counts."""
    return [index for index, count in enumerate(repeats) for _ in range(count)]


def encode_rescaled_examples(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    backbone: Backbone,
    *,
    mirrored: bool,
    repeats: Sequence[int] = (),
) -> RescaledExamples:
    """Return examples whose images are shown at a random size each time; the arguments are `encode_examples`'s."""
    prefixes = ("", *FAR, *NEAR)
    ids = [{prefix: backbone.tokenize([prefix + text for text in texts]) for prefix in prefixes} for texts in captions]
    return RescaledExamples(tuple(images), ids, backbone, mirrored, _order(repeats))


@dataclass(frozen=True)
class RescaledExamples:
    """Square images that are shown at a random size and encoded when they are drawn, with captions that say so.

    Attributes:
        images: RGB squares of one size.
        captions: For each image, by the prefix of the caption, an int64 tensor [captions, L].
        backbone: The model that encodes them.
        mirrored: Whether the mirror image of each is shown too.
        order: The images from which one is drawn, each as often as it counts; each once if empty.

    Source: The augmentation of Custom Diffusion, in its released code.
    """

    images: Sequence[Image.Image]
    captions: Sequence[Mapping[str, Tensor]]
    backbone: Backbone
    mirrored: bool
    order: Sequence[int] = ()

    def example(self, choose: Choose) -> Example:
        """Return an image at some size under one of its captions, with a mask of where it is."""
        place = choose("picture", len(self.order) or len(self.images))
        index = self.order[place] if self.order else place
        image = self.images[index]
        if self.mirrored and choose("view", 2):
            image = ImageOps.mirror(image)
        scaled, prefix, (left, top, side) = rescale(image, choose)
        moments, captions = self.backbone.encode([scaled])[0], self.captions[index][prefix]
        mask, cell = torch.zeros(1, *moments.shape[1:]), image.width // moments.shape[-1]
        mask[:, _inner_cells(top, side, image.width, cell), _inner_cells(left, side, image.width, cell)] = 1
        return Example(moments, captions[choose("caption", len(captions))], mask)

    @property
    def all_captions(self) -> Tensor:
        """The captions of all images, with every prefix, int64 [n, L]."""
        return torch.cat([ids for captions in self.captions for ids in captions.values()])


def rescale(image: Image.Image, choose: Choose) -> tuple[Image.Image, str, tuple[int, int, int]]:
    """Return a square image at a random size, the prefix of its caption, and where it is: left, top, side.

    Two times in three the new side is uniform between a third of the old one and all of it, else between 1.2 and 1.4
    of it. Under 0.6 the image stands anywhere on grey; above 1 a part of the old size is cut from anywhere; between
    them it is left as it is. Where there is no grey, left and top are 0 and the side is the old one.
    """
    size, levels = image.width, 10_000
    low, high = ((1 / 3, 1.0), (1.2, 1.4))[choose("enlarged", 3) == 2]
    side = round(size * (low + (high - low) * choose("scale", levels + 1) / levels))
    if 0.6 * size <= side <= size:
        return image, "", (0, 0, size)
    left, top = choose("left", abs(size - side) + 1), choose("top", abs(size - side) + 1)
    scaled = image.resize((side, side), Image.Resampling.BICUBIC)
    if side > size:
        return scaled.crop((left, top, left + size, top + size)), NEAR[choose("words", len(NEAR))], (0, 0, size)
    canvas = Image.new("RGB", image.size, _GREY)
    canvas.paste(scaled, (left, top))
    return canvas, FAR[choose("words", len(FAR))], (left, top, side)


def _inner_cells(start: int, side: int, size: int, cell: int) -> slice:
    """Return the latent cells along one axis that an image fills, without those where it meets grey; at least one."""
    first, last = start // cell, -(-(start + side) // cell)
    inner = slice(first + (start > 0), last - (start + side < size))
    return inner if inner.start < inner.stop else slice(first, last)
