"""Every picture passes one decoder: what it must refuse, what it must say, and that pixels mean what they meant."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from oms_core.decode import FORMATS, MAX_BYTES, MAX_SCANS, Profile, decode, fit, pixels
from oms_core.errors import InputError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 16, 3), np.uint8)
RGBA = RNG.integers(0, 256, (12, 16, 4), np.uint8)
DEEP = RNG.integers(0, 2**16, (12, 16), np.uint16)
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106


def saved(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, compressed: bytes, *extra: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG from its parts (PNG specification, section 11); colour 0 is grey, 2 is RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """250 MB of zeros, which is a PNG row as well as a text, compressed to a few hundred kB."""
    squeeze = zlib.compressobj(1)
    return b"".join(squeeze.compress(bytes(10**6)) for _ in range(250)) + squeeze.flush()


def with_flipped_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def frames(kind: str) -> bytes:
    still = Image.fromarray(RGB)
    return saved(still, kind, save_all=True, append_images=[still.rotate(90), still.rotate(180)])


def grey_tiff(picture: np.ndarray, photometric: int) -> bytes:
    """A grey TIFF whose tag says whether 0 is white (0) or black (1)."""
    data = bytearray(saved(picture, "TIFF"))
    entry = data.index(struct.pack("<HHI", PHOTOMETRIC, 3, 1))
    data[entry + 8] = photometric
    return bytes(data)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated: small, and slow without end."""
    data = saved(np.zeros((64, 64, 3), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]


PNG, JPEG = saved(RGB), saved(RGB, "JPEG")
IDAT = PNG.index(b"IDAT") + 4
SIZE, DAMAGED, UNSUPPORTED = "outside the limits", "damaged or incomplete", "not a supported picture"
ROW = zlib.compress(bytes(9) * 8)  # 8 x 8 black pixels

REFUSED = {
    "half a PNG": (PNG[: len(PNG) // 2], DAMAGED),
    "half a JPEG": (JPEG[: len(JPEG) // 2], DAMAGED),
    "a JPEG without its end": (JPEG[:-2], DAMAGED),
    "half a BMP": (saved(RGB, "BMP")[:300], DAMAGED),
    "half a GIF": (saved(RGB, "GIF")[:-100], DAMAGED),
    "half a WEBP": (saved(RGB, "WEBP")[:-100], DAMAGED),
    "half a TIFF": (saved(RGB, "TIFF")[:-100], DAMAGED),
    "PNG with a wrong checksum": (with_flipped_bit(PNG, 29), UNSUPPORTED),
    "PNG with a bit flipped in its data": (with_flipped_bit(PNG, IDAT + 40), DAMAGED),
    "header of 60000 x 60000 and no data": (raw_png(60_000, 60_000, b""), "million pixels"),
    "20000 x 1": (raw_png(20_000, 1, zlib.compress(bytes(20_001))), SIZE),
    "1 x 20000": (raw_png(1, 20_000, zlib.compress(bytes(40_000))), SIZE),
    "1 x 1": (raw_png(1, 1, zlib.compress(bytes(2))), SIZE),
    "narrower than 20 : 1": (saved(np.zeros((2, 41), np.uint8)), SIZE),
    "0 x 5": (raw_png(0, 5, zlib.compress(bytes(5))), UNSUPPORTED),
    "APNG": (frames("PNG"), "several frames"),
    "animated WEBP": (frames("WEBP"), "several frames"),
    "TIFF of several pages": (frames("TIFF"), "several frames"),
    "32-bit whole numbers": (saved(DEEP.astype(np.int32), "TIFF"), "kind I "),
    "floating point": (saved(DEEP.astype(np.float32), "TIFF"), "kind F "),
    "floating point without a number": (saved(np.full((8, 8), np.nan, np.float32), "TIFF"), "kind F "),
    "LAB": (saved(Image.fromarray(RGB).convert("LAB"), "TIFF"), "kind LAB"),
    "16-bit grey where 0 is white": (grey_tiff(DEEP, 0), "inverted grey"),
    "16-bit grey with a transparent level": (
        raw_png(8, 8, zlib.compress(bytes(17) * 8), chunk(b"tRNS", b"\0\0"), depth=16),
        "transparent colour",
    ),
    "16-bit RGB with a transparent colour": (
        raw_png(8, 8, zlib.compress(bytes(49) * 8), chunk(b"tRNS", struct.pack(">HHH", 0, 0, 999)), depth=16, colour=2),
        "transparent colour",
    ),
    "JPEG of endless scans": (many_scans(), "scans"),
    "EPS": (saved(RGB, "EPS"), UNSUPPORTED),
    "PPM": (saved(RGB, "PPM"), UNSUPPORTED),
    "ICO": (saved(RGB, "ICO"), UNSUPPORTED),
    "TGA": (saved(RGB, "TGA"), UNSUPPORTED),
    "PDF": (saved(RGB, "PDF"), UNSUPPORTED),
    "PSD": (b"8BPS\0\1" + bytes(100), UNSUPPORTED),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNSUPPORTED),
    "FITS": (b"SIMPLE  =                    T".ljust(2880), UNSUPPORTED),
    "HTML": (b"<!doctype html><script>alert(1)</script>", UNSUPPORTED),
    "ELF": (b"\x7fELF" + bytes(100), UNSUPPORTED),
    "ZIP": (b"PK\x05\x06" + bytes(18), UNSUPPORTED),
    "text": (b"hello", UNSUPPORTED),
    "nothing": (b"", "empty"),
    "more than the limit": (PNG + bytes(MAX_BYTES), "larger than 64 MB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_still_picture_of_sane_size_is_refused_in_one_sentence(name: str) -> None:
    data, expected = REFUSED[name]
    with pytest.raises(InputError) as refusal:
        decode(data)
    sentence = str(refusal.value)
    assert expected in sentence
    assert "\n" not in sentence
    assert len(sentence) < 200


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA"])
def test_formats_outside_the_list_are_refused_although_the_library_reads_them(kind: str) -> None:
    Image.open(io.BytesIO(saved(RGB, kind))).load()
    with pytest.raises(InputError, match=UNSUPPORTED):
        decode(saved(RGB, kind))


BOMBS = {
    "9000 x 9000 RGB": lambda: raw_png(9000, 9000, bomb(), colour=2),
    "15000 x 15000 in one bit": lambda: raw_png(15_000, 15_000, bomb(), depth=1),
    "header of 60000 x 60000": lambda: raw_png(60_000, 60_000, b""),
    "text of 250 MB": lambda: raw_png(8, 8, ROW, chunk(b"zTXt", b"key\0\0" + bomb())),
    "colour profile of 250 MB": lambda: raw_png(8, 8, ROW, chunk(b"iCCP", b"key\0\0" + bomb())),
    "250 MB behind 8 x 8 pixels": lambda: raw_png(8, 8, bomb()),
}
MEASURE = """
import resource, sys, time
from oms_core.decode import decode
from oms_core.errors import InputError
decode(open(sys.argv[1], "rb").read())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    started = time.process_time()
    data = open(path, "rb").read()
    try:
        picture, _ = decode(data)
        assert picture.size == (8, 8)
    except InputError:
        pass
    assert time.process_time() - started < 0.5, path
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(PNG)
    paths = [tmp_path / "plain.png"]
    for number, build in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(build())
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50  # MiB


def test_a_png_without_its_last_bytes_is_whole_and_the_loss_is_said() -> None:
    picture, notes = decode(PNG[:-12])
    assert np.array_equal(np.asarray(picture), RGB)
    assert notes == ["the end of the file is missing, but no pixel is"]


def test_data_behind_a_picture_changes_nothing() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("evil.py", "raise SystemExit")
    picture, notes = decode(PNG + archive.getvalue())
    assert np.array_equal(np.asarray(picture), RGB)
    assert notes == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_back_every_pixel(kind: str, options: dict) -> None:
    picture, notes = decode(saved(RGB, kind, **options))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), RGB)
    assert notes == []


def test_a_jpeg_comes_close() -> None:
    smooth = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (1, 32, 3))
    picture, _ = decode(saved(smooth, "JPEG", quality=95))
    assert np.abs(np.asarray(picture).astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_stays_grey(mode: str) -> None:
    grey = Image.fromarray(RGB).convert(mode)
    picture, notes = decode(saved(grey))
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), np.asarray(grey.convert("L")))
    assert notes == []


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_becomes_the_colours_that_it_means(kind: str) -> None:
    indices = RNG.integers(0, 4, (8, 8), np.uint8)
    colours = np.array([[1, 2, 3], [250, 0, 0], [0, 250, 0], [9, 8, 250]], np.uint8)
    palette = Image.fromarray(indices, "L").convert("P")
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    picture, _ = decode(saved(palette, kind))
    assert np.array_equal(np.asarray(picture), colours[indices])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_cut_off(kind: str) -> None:
    every_level = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    picture, notes = decode(saved(every_level, kind))
    assert picture.mode == "L"
    assert np.abs(np.asarray(picture) - every_level * (255 / 65_535)).max() <= 0.5
    assert notes == ["16-bit grey scaled to 8 bits"]


def on_white(rgba: np.ndarray) -> np.ndarray:
    opacity = rgba[..., 3:] / 255
    return rgba[..., :3] * opacity + 255 * (1 - opacity)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparency_is_laid_on_white(kind: str, options: dict) -> None:
    picture, notes = decode(saved(RGBA, kind, **options))
    assert np.abs(np.asarray(picture) - on_white(RGBA)).max() <= 1
    assert notes == ["transparent pixels laid on white"]


def test_transparent_grey_is_laid_on_white() -> None:
    picture, _ = decode(saved(Image.fromarray(RGBA).convert("LA")))
    grey = np.asarray(Image.fromarray(RGBA).convert("LA"))
    assert np.abs(np.asarray(picture) - on_white(grey[..., [0, 0, 0, 1]])).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(kind: str) -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (4, 0, 8, 8))
    picture, notes = decode(saved(palette, kind, transparency=0))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((7, 0)) == (40, 50, 60)
    assert notes == ["transparent pixels laid on white"]


def test_the_colour_under_full_transparency_is_not_seen() -> None:
    hidden = RGBA.copy()
    hidden[..., 3] = 0
    picture, notes = decode(saved(hidden))
    assert np.asarray(picture).min() == 255
    assert notes == ["transparent pixels laid on white"]


def test_an_opaque_alpha_channel_is_not_worth_a_word() -> None:
    opaque = RGBA.copy()
    opaque[..., 3] = 255
    picture, notes = decode(saved(opaque))
    assert np.array_equal(np.asarray(picture), RGBA[..., :3])
    assert notes == []


# EXIF 2.3, tag Orientation: which side of the upright picture the first row and the first column hold
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_once_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    picture, notes = decode(saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(np.asarray(picture), RGB)
    assert notes == (["turned upright as its EXIF says"] if orientation > 1 else [])


def test_an_orientation_that_does_not_exist_is_ignored() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    picture, notes = decode(saved(RGB, exif=exif))
    assert np.array_equal(np.asarray(picture), RGB)
    assert notes == []


def test_of_a_gif_the_first_frame_is_taken_and_said() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    picture, notes = decode(saved(first, "GIF", save_all=True, append_images=[second]))
    assert picture.getcolors() == [(64, (255, 0, 0))]
    assert notes == ["the first of several frames is used"]


def test_of_a_photo_with_a_preview_behind_it_the_photo_is_taken() -> None:
    photo, preview = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    picture, notes = decode(saved(photo, "MPO", save_all=True, append_images=[preview]))
    assert picture.size == (16, 16)
    assert np.abs(np.asarray(picture).astype(int) - [200, 0, 0]).max() <= 2
    assert notes == ["the first of several frames is used"]


def test_the_frames_of_a_gif_are_not_counted_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(self: GifImageFile) -> int:
        raise AssertionError("in a large file this takes long")

    monkeypatch.setattr(GifImageFile, "n_frames", property(count))
    _, notes = decode(frames("GIF"))
    assert notes == ["the first of several frames is used"]


def test_cmyk_is_converted_and_said() -> None:
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:, 4:, 0] = 255  # white on the left, cyan on the right
    picture, notes = decode(saved(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((7, 7)) == (0, 255, 255)
    assert notes == ["CMYK converted to RGB without a colour profile"]


def seeds() -> list[bytes]:
    """Small valid pictures of every format and kind of pixel."""
    rgb, grey, rgba = Image.fromarray(RGB), Image.fromarray(RGB).convert("L"), Image.fromarray(RGBA)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    tiffs = [saved(rgb, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    return [
        *(saved(rgba.convert(mode)) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        *(saved(DEEP), saved(rgb, exif=exif), saved(DEEP, "TIFF"), saved(rgba, "TIFF"), *tiffs),
        *(saved(rgb, "JPEG"), saved(rgb, "JPEG", progressive=True, exif=exif), saved(rgb.convert("CMYK"), "JPEG")),
        *(saved(rgb, "GIF"), frames("GIF"), saved(rgb, "BMP"), saved(grey, "BMP"), saved(rgba, "BMP")),
        *(saved(rgb, "WEBP"), saved(rgba, "WEBP", lossless=True)),
    ]


def mutant(data: bytes, chance: random.Random) -> bytes:
    """A picture with a few bits, bytes or stretches changed; half of the PNGs get their checksums mended."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        place = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place] = chance.choice((0, 1, 127, 128, 255))
            case 2:
                del data[place : place + chance.randrange(1, 16)]
            case 3:
                data[place:place] = chance.randbytes(chance.randrange(1, 8))
            case 4:
                data[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
        data = data or bytearray(b"\0")
    return mended(bytes(data)) if data[:4] == b"\x89PNG" and chance.random() < 0.5 else bytes(data)


def mended(png: bytes) -> bytes:
    parts, place = [png[:8]], 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if place + 12 + length > len(png):
            break
        parts.append(chunk(png[place + 4 : place + 8], png[place + 8 : place + 8 + length]))
        place += 12 + length
    return b"".join(parts) + png[place:]


def test_damage_of_any_kind_is_an_input_error_or_a_picture() -> None:
    chance, valid = random.Random(0), seeds()
    pictures = refusals = 0
    for _ in range(3000):
        try:
            shown = pixels(mutant(chance.choice(valid), chance), Profile((8, 8), 3))
        except InputError:
            refusals += 1
        else:
            assert (shown.shape, shown.dtype) == ((8, 8, 3), np.uint8)
            pictures += 1
    assert min(pictures, refusals) > 100  # both ways were tried


def test_the_seeds_of_the_fuzzing_are_whole_pictures_of_every_format() -> None:
    kinds = {Image.open(io.BytesIO(data)).format for data in seeds()}
    assert kinds == set(FORMATS)
    for data in seeds():
        decode(data)


def test_a_picture_of_the_right_kind_is_not_touched() -> None:
    for array, channels in ((RGB, 3), (RGB[..., 0], 1)):
        shown, notes = fit(Image.fromarray(array), Profile((12, 16), channels))
        assert np.array_equal(shown, array.reshape(12, 16, channels))
        assert notes == []


def test_colour_becomes_grey_by_its_luma() -> None:
    shown, notes = fit(Image.fromarray(RGB), Profile((12, 16), 1))
    assert np.abs(shown[..., 0] - RGB @ [0.299, 0.587, 0.114]).max() <= 0.6  # ITU-R 601, rounded
    assert notes == ["colours converted to grey"]


def test_grey_becomes_three_equal_channels() -> None:
    shown, notes = fit(Image.fromarray(RGB[..., 0]), Profile((12, 16), 3))
    assert np.array_equal(shown, np.repeat(RGB[..., :1], 3, axis=2))
    assert notes == ["grey repeated in three channels"]


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (24, 32), (33, 3)])
def test_a_plain_picture_stays_plain_at_every_size(size: tuple[int, int]) -> None:
    shown, _ = fit(Image.new("RGB", (16, 12), (3, 100, 250)), Profile(size, 3))
    assert shown.shape == (*size, 3)
    assert set(map(tuple, shown.reshape(-1, 3))) == {(3, 100, 250)}


def test_the_longer_side_is_cropped_around_the_centre() -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    for array in (wide, wide.T):
        shown, notes = fit(Image.fromarray(array), Profile((8, 8), 1))
        assert shown.min() == 255
        width, height = array.shape[::-1]
        assert notes == [f"{width} x {height} resized to 8 x 8, its longer side cropped"]


def test_making_smaller_averages() -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    shown, notes = fit(Image.fromarray(checkers.astype(np.uint8)), Profile((8, 8), 1))
    assert np.abs(shown.astype(float) - 127.5).max() < 3  # without antialiasing it would be 0 or 255
    assert notes == ["64 x 64 resized to 8 x 8"]


def test_the_limits_of_size_themselves_are_allowed() -> None:
    for shape in ((2, 2), (2, 40), (40, 2)):
        picture, _ = decode(saved(np.zeros(shape, np.uint8)))
        assert picture.size == shape[::-1]
