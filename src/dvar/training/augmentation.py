"""What training draws from: pictures and their captions, encoded once, or shown at another size each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.objective import Choose, Encoded, Example
from dvar.training.placeholder_tokens import FAR, NEAR

_GREY = (128, 128, 128)  # the middle of the range, which the autoencoder reads as nearly 0


def encoded(
    pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]], backbone: Backbone, *, mirrored: bool
) -> Encoded:
    """Return what training draws from, encoded once: pictures, where ``mirrored`` their mirror images too, and the
    captions of each.
    """
    views = [pictures, [ImageOps.mirror(picture) for picture in pictures]][: 1 + mirrored]
    return Encoded(
        torch.stack([backbone.encode(view) for view in views], dim=1), [backbone.tokenize(texts) for texts in captions]
    )


def rescaled(
    pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]], backbone: Backbone, *, mirrored: bool
) -> Rescaled:
    """Return what training draws from when each picture is shown at another size each time."""
    words = ("", *FAR, *NEAR)
    ids = [{begin: backbone.tokenize([begin + text for text in texts]) for begin in words} for texts in captions]
    return Rescaled(tuple(pictures), ids, backbone, mirrored)


@dataclass(frozen=True)
class Rescaled:
    """Square pictures that are shown at a random size, encoded when they are drawn, and captions that say so.

    ``captions``: for each picture, by the words that a caption begins with, an int64 tensor [captions, L].

    Source: the method's own augmentation, in its released code.
    """

    pictures: Sequence[Image.Image]
    captions: Sequence[Mapping[str, Tensor]]
    backbone: Backbone
    mirrored: bool

    def example(self, choose: Choose) -> Example:
        """Return a picture at some size under one of its captions, with a mask of where it is."""
        index = choose("picture", len(self.pictures))
        picture = self.pictures[index]
        if self.mirrored and choose("view", 2):
            picture = ImageOps.mirror(picture)
        shown, words, (left, top, side) = rescale(picture, choose)
        moments, captions = self.backbone.encode([shown])[0], self.captions[index][words]
        mask, cell = torch.zeros(1, *moments.shape[1:]), picture.width // moments.shape[-1]
        mask[:, _inner(top, side, picture.width, cell), _inner(left, side, picture.width, cell)] = 1
        return Example(moments, captions[choose("caption", len(captions))], mask)


def rescale(picture: Image.Image, choose: Choose) -> tuple[Image.Image, str, tuple[int, int, int]]:
    """Return a square picture as it is shown, what its caption then begins with, and where it is: left, top, side.

    Two times in three its new side is even between a third of the old one and all of it, else between 1.2 and 1.4 of
    it.  Under 0.6 it stands anywhere on grey; above 1 a part of the old size is cut from anywhere; between them it is
    shown as it is.  Where there is no grey, left and top are 0 and the side is the old one.
    """
    size, steps = picture.width, 10_000
    low, high = ((1 / 3, 1.0), (1.2, 1.4))[choose("enlarged", 3) == 2]
    side = round(size * (low + (high - low) * choose("scale", steps + 1) / steps))
    if 0.6 * size <= side <= size:
        return picture, "", (0, 0, size)
    left, top = choose("left", abs(size - side) + 1), choose("top", abs(size - side) + 1)
    scaled = picture.resize((side, side), Image.Resampling.BICUBIC)
    if side > size:
        return scaled.crop((left, top, left + size, top + size)), NEAR[choose("words", len(NEAR))], (0, 0, size)
    shown = Image.new("RGB", picture.size, _GREY)
    shown.paste(scaled, (left, top))
    return shown, FAR[choose("words", len(FAR))], (left, top, side)


def _inner(start: int, side: int, size: int, cell: int) -> slice:
    """The latent cells along one axis that a picture fills, without those where it meets grey; one at the least."""
    first, last = start // cell, -(-(start + side) // cell)
    inner = slice(first + (start > 0), last - (start + side < size))
    return inner if inner.start < inner.stop else slice(first, last)
