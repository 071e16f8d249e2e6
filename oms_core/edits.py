"""Small changes of a picture, to see how its search reacts."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from oms_core.decode import BAND, MAX_ASPECT, MIN_SIDE, decode
from oms_core.images import ImageSet

LARGEST = 2048  # pixels a side; a larger picture is made smaller before it is edited


@dataclass(frozen=True)
class Edit:
    """What to do to a picture, in this order.

    Attributes:
        crop: share of each side that is cut away, half of it at either end, 0 to 0.5.
        flip: mirror it from left to right.
        blur: radius of a Gaussian blur, in pixels.
        noise: standard deviation of Gaussian noise, in grey levels of 255.
        jpeg: quality of a JPEG that it is saved as and read from, 1 to 95; 0 leaves this out.
    """

    crop: float = 0.0
    flip: bool = False
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 0


def edited(picture: Image.Image, edit: Edit, seed: int = 0) -> Image.Image:
    """An edited copy of a picture in mode L or RGB; `seed` decides the noise."""
    if edit.crop:
        picture = crop(picture, edit.crop)
    if edit.flip:
        picture = ImageOps.mirror(picture)
    if edit.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(edit.blur))
    if edit.noise:
        picture = noisy(picture, edit.noise, seed)
    return through_jpeg(picture, edit.jpeg) if edit.jpeg else picture


def crop(picture: Image.Image, share: float) -> Image.Image:
    """The middle of a picture; never less than a picture must have."""
    sides = [max(MIN_SIDE, round(side * (1 - share))) for side in picture.size]
    sides = [min(side, MAX_ASPECT * min(sides)) for side in sides]
    left, top = ((side - kept) // 2 for side, kept in zip(picture.size, sides, strict=True))
    return picture.crop((left, top, left + sides[0], top + sides[1]))


def noisy(picture: Image.Image, deviation: float, seed: int) -> Image.Image:
    """The picture with Gaussian noise, rounded to grey levels and cut off at black and white."""
    random, values = np.random.default_rng(seed), np.array(picture)
    for top in range(0, len(values), BAND):
        band = values[top : top + BAND]
        band[:] = np.rint(np.clip(band + random.normal(0, deviation, band.shape), 0, 255))
    return Image.fromarray(values)


def through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())[0]


def reduced(picture: Image.Image) -> Image.Image:
    """The picture with no side above the largest, and still within the limits of shape."""
    scale = LARGEST / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize([min(LARGEST, math.ceil(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def with_edit(images: ImageSet, image: str, edit: Edit) -> ImageSet:
    """One picture of a set, edited now. It keeps its identity, so that its noise is the same and only it differs.

    Args:
        images: the set.
        image: SHA-256 of the picture's file.
        edit: what to do to it.
    """
    own = images.table[images.table.image == image]
    if edit == Edit():
        return replace(images, table=own)
    picture = reduced(decode(images.read(own.index[0]))[0])
    buffer = io.BytesIO()
    edited(picture, edit, seed=int(image[:8], 16)).save(buffer, "PNG", compress_level=1)
    return replace(images, table=own, read=lambda _: buffer.getvalue())
