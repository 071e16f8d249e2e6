"""The one function through which every picture passes, from file bytes to the pixels a model sees."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from oms_core.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 2, 16_384, 20
BAND = 256  # rows that are laid on white at once
MAX_SCANS = 100  # of a progressive JPEG: each is decoded over all pixels, so a small file could take hours
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
DEEP_GREY_MODES = ("I;16", "I;16B", "I;16L")
ORIENTATION, BITS, PHOTOMETRIC, BLACK_IS_ZERO = 0x0112, 0x0102, 0x0106, 1  # tags of EXIF and TIFF


@dataclass(frozen=True)
class Profile:
    """What a model needs of a picture; part of every cache key.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey, ITU-R 601 luma) or 3 (RGB).

    The picture is turned as its EXIF says, laid on white where transparent, its shorter side brought to
    `size` (bicubic, antialiased) and the longer one cropped around the centre.
    """

    size: tuple[int, int]
    channels: int


def decode(data: bytes) -> tuple[Image.Image, list[str]]:
    """Open a picture in bounded memory; its format is judged by content, never by name.

    Returns:
        The picture in mode L or RGB, and a note for each thing that was changed on the way.

    Raises:
        InputError: not one still picture of a supported format within the limits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"not a supported picture, or damaged at its start; use {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"the picture has more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # the decoders raise many kinds for damaged files, TypeError and KeyError among them
        raise InputError("the picture is damaged or incomplete") from error


def _decode(data: bytes) -> tuple[Image.Image, list[str]]:
    if not data:
        raise InputError("the file is empty")
    if len(data) > MAX_BYTES:
        raise InputError(f"the file is larger than {MAX_BYTES >> 20} MB")
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(*picture.size)
    check_pixels(picture)
    if picture.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:  # the marker before each scan
        raise InputError(f"a JPEG of more than {MAX_SCANS} scans; save it again")
    notes = [check_frames(picture), orientation(picture)]  # before `load`, which turns a TIFF
    if picture.format == "PNG" and b"IEND" not in data:
        notes.append("the end of the file is missing, but no pixel is")
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    for change in (scale_to_8_bit, lay_on_white, to_grey_or_rgb):
        picture, note = change(picture)
        notes.append(note)
    return picture, [note for note in notes if note]


def check_size(width: int, height: int) -> None:
    """Refuse, before anything is decoded, what is too small, too large or too narrow."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} x {height} is more than {MAX_PIXELS // 10**6} million pixels")
    short, long = sorted((width, height))
    if short < MIN_SIDE or long > MAX_SIDE or long > MAX_ASPECT * short:
        raise InputError(
            f"{width} x {height} is outside the limits of {MIN_SIDE} to {MAX_SIDE} pixels a side "
            f"and {MAX_ASPECT} : 1 in shape"
        )


def check_pixels(picture: Image.Image) -> None:
    """Refuse kinds of pixels that would be read wrongly."""
    kind, tags = picture.mode, getattr(picture, "tag_v2", {})
    deep = kind in DEEP_GREY_MODES
    if deep and (tags.get(BITS, (16,)), tags.get(PHOTOMETRIC, BLACK_IS_ZERO)) != ((16,), BLACK_IS_ZERO):
        kind = "12-bit or inverted grey"
    elif (deep and "transparency" in picture.info) or deep_colour_key(picture):
        kind = "16 bits with a transparent colour"
    elif deep or kind in PLAIN_MODES:
        return
    raise InputError(f"pixels of the kind {kind} are not supported; save it as 8-bit grey or RGB")


def deep_colour_key(picture: Image.Image) -> bool:
    """Whether the transparent colour of an RGB picture was given in 16 bits, where it fits no 8-bit pixel."""
    colour = picture.info.get("transparency")
    return picture.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255


def check_frames(picture: Image.Image) -> str:
    """One frame is needed; of a GIF, or of a photo with a preview behind it (MPO), the first is taken and said.

    The frames are not counted: a large file may hold millions.
    """
    if not getattr(picture, "is_animated", False):
        return ""
    if picture.format in ("GIF", "MPO"):
        return "the first of several frames is used"
    raise InputError("several frames in one file; a still picture is needed")


def orientation(picture: Image.Image) -> str:
    turned = picture.getexif().get(ORIENTATION) in range(2, 9)
    return "turned upright as its EXIF says" if turned else ""


def scale_to_8_bit(picture: Image.Image) -> tuple[Image.Image, str]:
    if picture.mode not in DEEP_GREY_MODES:
        return picture, ""
    grey = np.rint(np.asarray(picture, dtype=np.float32) / 257).astype(np.uint8)
    return Image.fromarray(grey), "16-bit grey scaled to 8 bits"


def lay_on_white(picture: Image.Image) -> tuple[Image.Image, str]:
    if not picture.has_transparency_data:
        return picture, ""
    whole, note = Image.new("RGB", picture.size), ""
    for top in range(0, picture.height, BAND):  # in memory a large picture stands only twice
        rgba = picture.crop((0, top, picture.width, min(top + BAND, picture.height))).convert("RGBA")
        if rgba.getextrema()[3][0] < 255:
            note = "transparent pixels laid on white"
        white = Image.new("RGBA", rgba.size, "white")
        whole.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return whole, note


def to_grey_or_rgb(picture: Image.Image) -> tuple[Image.Image, str]:
    if picture.mode in ("L", "RGB"):
        return picture, ""
    if picture.mode == "1":
        return picture.convert("L"), ""
    note = "CMYK converted to RGB without a colour profile" if picture.mode == "CMYK" else ""
    return picture.convert("RGB"), note


def fit(picture: Image.Image, profile: Profile) -> tuple[np.ndarray, list[str]]:
    """Bring a picture into the shape that a model needs.

    Returns:
        (H, W, C) uint8, and a note for each thing that was changed.
    """
    notes = []
    mode = {1: "L", 3: "RGB"}[profile.channels]
    if picture.mode != mode:
        notes.append("colours converted to grey" if mode == "L" else "grey repeated in three channels")
        picture = picture.convert(mode)
    height, width = profile.size
    if picture.size != (width, height):
        notes.append(f"{picture.width} x {picture.height} resized to {width} x {height}")
        if picture.width * height != picture.height * width:
            notes[-1] += ", its longer side cropped"
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height, width, profile.channels), notes


def pixels(data: bytes, profile: Profile) -> np.ndarray:
    """From file bytes to the (H, W, C) uint8 pixels that a model with this profile sees.

    Raises:
        InputError: see `decode`.
    """
    return fit(decode(data)[0], profile)[0]
