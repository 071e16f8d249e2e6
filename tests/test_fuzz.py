"""Damaged and forged uploads through the real upload path: a picture or an InputError, nothing else, ever.

The cases are drawn by Hypothesis in a process of its own, so that a crash or a leak of a decoder is seen. They are
the same each time; the environment variable OMS_FUZZ says how many there are.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from watch import look_here, watched

import oms_core.uploads
from oms_core.decode import FORMATS, Profile, decode
from oms_core.edits import Edit, edited, with_edit
from oms_core.errors import InputError
from oms_core.uploads import received

ROOT = Path(__file__).resolve().parent.parent
CASES = int(os.environ.get("OMS_FUZZ", "2000"))
MEMORY = 300  # MiB
PROFILES = (Profile((28, 28), 1), Profile((32, 32), 3))
EXTREMES = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def saved(picture: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def packed(files: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may come twice
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


@cache
def pictures() -> list[bytes]:
    """Small whole pictures in every format and way to store one."""
    random = np.random.default_rng(0)
    rgb, rgba = (random.integers(0, 256, (9, 13, channels), np.uint8) for channels in (3, 4))
    deep = random.integers(0, 2**16, (9, 13), np.uint16)
    grey, still = rgb[..., 0], Image.fromarray(rgb)
    several = {"save_all": True, "append_images": [still.rotate(90), still.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8)[..., None] * np.array([1, 2, 1], np.uint8)
    return [
        *(saved(picture, "PNG") for picture in (rgb, rgba, grey, deep, still.convert("P"), still.convert("1"))),
        *(saved(still.convert("LA"), "PNG"), saved(rgb, "PNG", exif=exif, dpi=(9, 9)), saved(still, "PNG", **several)),
        *(saved(smooth, "JPEG", progressive=progressive) for progressive in (False, True)),
        *(saved(rgb, "JPEG", exif=exif), saved(grey, "JPEG"), saved(still.convert("CMYK"), "JPEG")),
        *(saved(rgb, "WEBP"), saved(rgba, "WEBP", lossless=True), saved(still, "WEBP", **several)),
        *(saved(picture, "BMP") for picture in (rgb, rgba, grey, still.convert("P"), still.convert("1"))),
        *(saved(rgb, "GIF"), saved(still, "GIF", **several), saved(still.convert("P"), "GIF", transparency=0)),
        *(saved(picture, "TIFF") for picture in (rgb, rgba, grey, deep)),
        *(saved(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(saved(still.convert("1"), "TIFF", compression="group4"), saved(deep, "TIFF", compression="tiff_lzw")),
        saved(still, "TIFF", **several),
    ]


@cache
def seeds() -> list[bytes]:
    """The pictures, and zips of them."""
    some = [(f"{number}.png", data) for number, data in enumerate(pictures()[:4])]
    inner = packed(some[:2])
    return [
        *pictures(),
        packed(some, zipfile.ZIP_STORED),
        packed([("member/a.png", some[0][1]), ("a.txt", b"words"), ("__MACOSX/x", b"")]),
        packed([*some[:1], ("inner.zip", inner)], zipfile.ZIP_STORED),
        packed([]),
    ]


# Damage: each takes the data, a place in it (0 to 1), and a number and bytes to do it with

Damage = Callable[[bytearray, int, int, bytes], None]


def flip(data: bytearray, place: int, number: int, _: bytes) -> None:
    data[place] ^= 1 << number % 8


def overwrite(data: bytearray, place: int, number: int, new: bytes) -> None:
    data[place : place + len(new)] = new


def cut(data: bytearray, place: int, number: int, _: bytes) -> None:
    del data[place : place + 1 + number % 64]


def cut_off(data: bytearray, place: int, *_: object) -> None:
    del data[place:]


def insert(data: bytearray, place: int, number: int, new: bytes) -> None:
    data[place:place] = new * (1 + number % 50)


def repeat(data: bytearray, place: int, number: int, _: bytes) -> None:
    data[place:place] = bytes(data[place : place + 1 + number % 64]) * (1 + number % 20)


def resize(data: bytearray, place: int, number: int, new: bytes) -> None:
    """A number of two or four bytes, in either order, becomes an extreme one."""
    form = ("<H", ">H", "<I", ">I")[number % 4]
    value = EXTREMES[number // 4 % len(EXTREMES)] % 2 ** (8 * struct.calcsize(form))
    data[place : place + struct.calcsize(form)] = struct.pack(form, value)


def splice(data: bytearray, place: int, number: int, _: bytes) -> None:
    """From here on it goes on as another seed does."""
    other = seeds()[number % len(seeds())]
    data[place:] = other[min(place, number // 64 % (len(other) + 1)) :]


def swap(data: bytearray, place: int, number: int, _: bytes) -> None:
    """Two stretches change places."""
    length = 1 + number % 64
    first, second = bytes(data[place : place + length]), bytes(data[place + length : place + 2 * length])
    data[place : place + 2 * length] = second + first


DAMAGES: tuple[Damage, ...] = (flip, overwrite, cut, cut_off, insert, repeat, resize, splice, swap)


def mended(png: bytes) -> bytes:
    """A PNG with right checksums, so that damage reaches what lies behind them."""
    parts, place = [png[:8]], 8
    while place + 12 <= len(png) and place + 12 + (length := int.from_bytes(png[place : place + 4], "big")) <= len(png):
        body = png[place + 4 : place + 8 + length]
        parts.append(png[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts) + png[place:]


def damaged(seed: bytes, damages: list[tuple[Damage, float, int, bytes]], mend: bool) -> bytes:
    data = bytearray(seed)
    for damage, place, number, new in damages:
        if data:
            damage(data, min(int(place * len(data)), len(data) - 1), number, new)
    return mended(bytes(data)) if mend and data[:4] == b"\x89PNG" else bytes(data)


near_the_start = st.floats(0, 1).map(lambda share: share**3)  # where headers are
damages = st.tuples(
    st.sampled_from(DAMAGES), st.one_of(near_the_start, st.floats(0, 1)), st.integers(0, 2**16), st.binary(max_size=9)
)


def files_from(whole: Callable[[], list[bytes]]) -> st.SearchStrategy[bytes]:
    """Files of these kinds, most of them damaged."""
    return st.builds(damaged, st.sampled_from(whole()), st.lists(damages, max_size=5), st.booleans())


names = st.one_of(st.text(max_size=80), st.sampled_from(["a.png", "../../a.png", "/etc/passwd", "a\0.png", "=1+1"]))
zip_names = names.filter(lambda name: name.isprintable() and name)
zips = st.lists(st.tuples(zip_names, files_from(pictures)), max_size=3).map(packed)
uploads = st.lists(st.tuples(names, st.one_of(files_from(pictures), files_from(seeds), zips)), min_size=1, max_size=2)
edits = st.builds(
    Edit, st.floats(0, 0.5), st.booleans(), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from([0.0, 9.0, 200.0]),
    st.integers(0, 95),
)  # fmt: skip


def one_sentence(text: str) -> bool:
    assert text
    assert len(text.splitlines()) == 1
    return True


def upload(files: list[tuple[str, bytes]], edit: Edit) -> tuple[int, int]:
    """Hand something in and look at it as the pages do: how many pictures were taken, and how many turned away."""
    try:
        found = received(files)
    except InputError as error:
        one_sentence(str(error))
        return 0, 1
    for profile in PROFILES:
        pixels = found.pixels(profile)
        assert pixels.shape == (len(found), *profile.size, profile.channels)
        assert pixels.dtype == np.uint8
    row, name = found.table.index[0], found.table.image[0]
    picture, notes = decode(found.read(row))
    assert picture.mode in ("L", "RGB")
    assert all(map(one_sentence, notes))
    if picture.width * picture.height < 2**20:
        assert edited(picture, edit, 3).mode == picture.mode
    assert with_edit(found, name, edit).pixels(PROFILES[0]).shape == (1, 28, 28, 1)
    assert all(map(one_sentence, [*found.rejected.reason, *found.rejected.file, *found.table.file]))
    return len(found), len(found.rejected)


def run(cases: int) -> dict[str, float]:
    """So many cases in this process.

    Returns:
        Cases, pictures taken and files turned away, MiB by which the memory grew, seconds of the slowest case.
    """
    counts: Counter[str] = Counter()
    slowest = [0.0]

    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck],
        backend="hypothesis",
    )  # fmt: skip
    @given(uploads, edits)
    def holds(files: list[tuple[str, bytes]], edit: Edit) -> None:
        started = time.process_time()
        with watched() as seen:
            taken, refused = upload(files, edit)
        assert not [one for one in seen if one.writes]
        slowest[0] = max(slowest[0], time.process_time() - started)
        counts.update(cases=1, taken=taken, refused=refused, **{"cases with pictures": taken > 0})

    upload([(f"{number}", data) for number, data in enumerate(seeds())], Edit(0.1, True, 1.0, 1.0, 50))
    upload([("x.zip", packed([("a.png", pictures()[0])]))], Edit())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    holds()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return dict(counts) | {"grown": grown, "slowest": slowest[0]}


def test_the_seeds_are_whole_pictures_of_every_format() -> None:
    kinds = {Image.open(io.BytesIO(data)).format for data in pictures()}
    assert kinds == {*FORMATS}
    refused = []
    for data in pictures():
        try:
            decode(data)
        except InputError as error:
            refused.append(str(error))
    assert [*map(str.split, refused)] == [
        *map(str.split, ["several frames in one file; a still picture is needed"] * 3)
    ]


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_kind_of_damage_changes_something(damage: Damage) -> None:
    whole = pictures()[0]
    assert damaged(whole, [(damage, 0.3, 1000, b"new")], False) != whole


def test_damage_of_any_kind_is_a_picture_or_an_input_error_and_takes_little_memory() -> None:
    environment = os.environ | {"OMS_FUZZ": str(CASES), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cases"] >= CASES
    assert said["cases with pictures"] > said["cases"] / 10  # both ways were tried
    assert said["refused"] > said["cases"] / 10
    assert said["grown"] < MEMORY


if __name__ == "__main__":
    oms_core.uploads.look_through = look_here
    print(json.dumps(run(CASES)))
