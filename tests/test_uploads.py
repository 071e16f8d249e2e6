"""What a visitor hands in: what is taken, what is turned away with a sentence, and that nothing touches the disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from poison import ENDLESS, MARK, crashing_on
from watch import look_here, watched

from oms_core import edits, uploads
from oms_core.decode import BAND, MAX_ASPECT, MAX_BYTES, MAX_PIXELS, Profile, decode
from oms_core.edits import LARGEST, Edit, edited, with_edit
from oms_core.errors import InputError
from oms_core.images import ImageSet
from oms_core.survey import CRASHES
from oms_core.uploads import LONGEST_NAME, MOST, QUOTA, received

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 16, 3), np.uint8)
GREY = RNG.integers(0, 256, (12, 16), np.uint8)
ROOT = Path(__file__).resolve().parent.parent


def saved(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, compressed: bytes, *extra: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG from its parts; colour 0 is grey, 2 RGB, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """So many zeros, compressed."""
    squeeze = zlib.compressobj(1)
    return b"".join(squeeze.compress(bytes(10**6)) for _ in range(size // 10**6)) + squeeze.flush()


def packed(*files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data, method)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    still = Image.fromarray(RGB)
    return saved(still, kind, save_all=True, append_images=[still.rotate(90), still.rotate(180)])


def shown(found: ImageSet, row: int) -> int:
    """The grey level of a picture of one."""
    darkest, brightest = decode(found.read(row))[0].getextrema()
    assert darkest == brightest
    return darkest


def reasons(found: ImageSet) -> dict[str, str]:
    return dict(zip(found.rejected.file, found.rejected.reason, strict=True))


A, B, C = (saved(np.full((8, 8), level, np.uint8)) for level in (10, 20, 30))
PNG, JPEG = saved(RGB), saved(RGB, "JPEG")
SEVERAL, DAMAGED, NO_PICTURE = "several frames", "damaged or incomplete", "not a supported picture"
SIZE = "outside the limits"


# One table through the real path: what is turned away, with its sentence

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "half a PNG": (lambda: PNG[: len(PNG) // 2], DAMAGED),
    "half a JPEG": (lambda: JPEG[: len(JPEG) // 2], DAMAGED),
    "a PNG with a wrong checksum": (lambda: PNG[:29] + bytes([PNG[29] ^ 1]) + PNG[30:], NO_PICTURE),
    "15000 x 15000 in one bit": (lambda: raw_png(15_000, 15_000, zeros(29 * 10**6), depth=1), "million pixels"),
    "9000 x 9000": (lambda: raw_png(9000, 9000, zeros(244 * 10**6), colour=2), "million pixels"),
    "a header of 60000 x 60000 and no data": (lambda: raw_png(60_000, 60_000, b""), "million pixels"),
    "20000 x 1": (lambda: raw_png(20_000, 1, zlib.compress(bytes(20_001))), SIZE),
    "1 x 20000": (lambda: raw_png(1, 20_000, zlib.compress(bytes(40_000))), SIZE),
    "1 x 1": (lambda: raw_png(1, 1, zlib.compress(bytes(2))), SIZE),
    "0 x 5": (lambda: raw_png(0, 5, zlib.compress(bytes(5))), NO_PICTURE),
    "a text of 200 MB in a PNG": (
        lambda: raw_png(8, 8, zlib.compress(bytes(72)), chunk(b"zTXt", b"key\0\0" + zeros(200 * 10**6))),
        DAMAGED,
    ),
    "an APNG": (lambda: frames("PNG"), SEVERAL),
    "an animated WEBP": (lambda: frames("WEBP"), SEVERAL),
    "a TIFF of several pages": (lambda: frames("TIFF"), SEVERAL),
    "whole numbers of 32 bits": (lambda: saved(GREY.astype(np.int32), "TIFF"), "kind I "),
    "floating point without a number": (lambda: saved(np.full((8, 8), np.nan, np.float32), "TIFF"), "kind F "),
    "LAB": (lambda: saved(Image.fromarray(RGB).convert("LAB"), "TIFF"), "kind LAB"),
    "EPS": (lambda: saved(RGB, "EPS"), NO_PICTURE),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_PICTURE),
    "PSD": (lambda: b"8BPS\0\1" + bytes(100), NO_PICTURE),
    "PDF": (lambda: saved(RGB, "PDF"), NO_PICTURE),
    "HTML": (lambda: b"<!doctype html><script>alert(1)</script>", NO_PICTURE),
    "a program": (lambda: b"\x7fELF" + bytes(100), NO_PICTURE),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.", NO_PICTURE),
    "text": (lambda: b"hello", NO_PICTURE),
    "nothing": (lambda: b"", "the file is empty"),
    "more than the limit": (lambda: PNG + bytes(MAX_BYTES), "larger than 64 MB"),
    "an empty zip": (lambda: packed(), "holds no pictures"),
    "a zip of words": (lambda: packed(("read.me.txt", b"words"), ("table.csv", b"1,2")), "holds no pictures"),
    "a zip of what systems leave behind": (
        lambda: packed(("__MACOSX/._a.png", A), (".DS_Store", b"x"), ("Thumbs.db", b"x"), ("folder/", b"")),
        "holds no pictures",
    ),
    "half a zip": (lambda: packed(("z.png", C))[:80], "zip is damaged"),
    "what only begins like a zip": (lambda: b"PK\3\4" + bytes(100), "zip is damaged"),
    "a zip behind something else": (lambda: b"MZ" + packed(("z.png", C)), NO_PICTURE),
}


@cache
def built(name: str) -> bytes:
    return (REFUSED.get(name) or TAKEN[name])[0]()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_listed_with_one_sentence_beside_what_can(name: str) -> None:
    data, expected = built(name), REFUSED[name][1]
    found = received([("good.png", PNG), ("bad.png", data), ("good too.png", B)])
    assert [*found.table.file] == ["good.png", "good too.png"]
    assert reasons(found).keys() == {"bad.png"}
    sentence = reasons(found)["bad.png"]
    assert expected in sentence
    assert "\n" not in sentence
    assert len(sentence) < 200


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_one_sentence_where_it_comes_alone(name: str) -> None:
    data, expected = built(name), REFUSED[name][1]
    with pytest.raises(InputError, match="No picture in your upload can be used") as refusal:
        received([("bad.png", data)])
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="No picture in your upload"):
        received([])


# What is taken, with the pixels that it means


def on_white(rgba: np.ndarray) -> np.ndarray:
    opacity = rgba[..., 3:] / 255
    return rgba[..., :3] * opacity + 255 * (1 - opacity)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side (EXIF 2.3)
    return saved(np.ascontiguousarray(RGB[:, ::-1].swapaxes(0, 1)), exif=exif)


RGBA = RNG.integers(0, 256, (12, 16, 4), np.uint8)
HIDDEN = np.concatenate([RGB, np.zeros((12, 16, 1), np.uint8)], axis=2)
DEEP = RNG.integers(0, 2**16, (12, 16), np.uint16)
TAKEN: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "a PNG": (lambda: PNG, RGB),
    "a BMP": (lambda: saved(RGB, "BMP"), RGB),
    "a TIFF": (lambda: saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "a lossless WEBP": (lambda: saved(RGB, "WEBP", lossless=True), RGB),
    "a grey PNG": (lambda: saved(GREY), np.repeat(GREY[..., None], 3, axis=2)),
    "a PNG without its last bytes": (lambda: PNG[:-12], RGB),
    "a PNG with a zip behind it": (lambda: PNG + packed(("evil.py", b"raise SystemExit"), ("b.png", B)), RGB),
    "300 MB behind 8 x 8 pixels": (lambda: raw_png(8, 8, zeros(300 * 10**6)), np.zeros((8, 8, 3))),
    "16-bit grey": (lambda: saved(DEEP), np.repeat(DEEP[..., None] / 257, 3, axis=2)),
    "what is partly transparent": (lambda: saved(RGBA), on_white(RGBA)),
    "what is wholly transparent": (lambda: saved(HIDDEN), np.full((12, 16, 3), 255)),
    "what its EXIF turns": (turned, RGB),
    "the first frame of a GIF": (
        lambda: saved(Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        np.tile([255, 0, 0], (8, 8, 1)),
    ),
    "a picture at the bottom of a zip": (lambda: packed(("a/b/c.png", PNG)), RGB),
    "a picture stored in a zip": (lambda: packed(("c.png", PNG), method=zipfile.ZIP_STORED), RGB),
    "a picture in a zip beside its caption": (lambda: packed(("c.png", PNG), ("c.txt", b"words")), RGB),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("called", ["x.png", "x.zip", "x", "x.exe"])
def test_what_can_be_used_gives_its_pixels_whatever_it_is_called(name: str, called: str) -> None:
    data, expected = built(name), TAKEN[name][1]
    found = received([(called, data)])
    assert reasons(found) == {}
    (pixels,) = found.pixels(Profile(expected.shape[:2], 3))
    assert np.abs(pixels - expected.astype(float)).max() <= 1


@pytest.mark.parametrize("rows", [BAND - 1, BAND, BAND + 1, 3 * BAND])
def test_a_tall_picture_is_laid_on_white_from_top_to_bottom(rows: int) -> None:
    clear = np.concatenate([RNG.integers(0, 256, (rows, 50, 3), np.uint8), np.full((rows, 50, 1), 255, np.uint8)], 2)
    clear[-1, :, 3] = 0  # only the last row is transparent
    picture, notes = decode(saved(clear))
    assert np.array_equal(np.asarray(picture)[:-1], clear[:-1, :, :3])
    assert (np.asarray(picture)[-1] == 255).all()
    assert notes == ["transparent pixels laid on white"]


def test_files_and_zips_come_together_and_no_role_is_guessed() -> None:
    inside = packed(("member/c.png", C), ("nonmember/bad.png", b"x"), ("metadata.csv", b"file_name,member\nc.png,1\n"))
    found = received([("a.png", A), ("more.zip", inside), ("b.png", B)])
    assert [*found.table.file] == ["a.png", "member/c.png", "b.png"]
    assert [*found.table.image] == [hashlib.sha256(data).hexdigest() for data in (A, C, B)]
    assert {*found.table.role} == {""}
    assert [shown(found, row) for row in found.table.index] == [10, 30, 20]
    assert reasons(found).keys() == {"nonmember/bad.png"}


def test_equal_files_are_one_picture_and_are_listed() -> None:
    found = received([("a.png", A), ("again.png", A), ("in.zip", packed(("too.png", A)))])
    assert [*found.table.file] == ["a.png"]
    assert reasons(found) == dict.fromkeys(("again.png", "too.png"), "the same picture is listed twice")


def test_other_pictures_of_the_same_name_are_kept_under_names_of_their_own() -> None:
    twice = packed(("x.png", C), ("x.png (2)", saved(GREY)))
    found = received([("x.png", A), ("x.png", B), ("z.zip", twice)])
    assert len(found) == 4
    assert len({*found.table.file}) == 4
    assert [*found.table.file][:2] == ["x.png", "x.png (2)"]


@given(st.lists(st.text(max_size=70) | st.sampled_from(["x", "x (2)", "x (3)"]), max_size=12))
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
def test_every_name_can_be_shown_and_stands_once(given_names: list[str]) -> None:
    names: dict[str, int] = {}
    shown = [uploads.numbered(uploads.shown(name), names) for name in given_names]
    assert len({*shown}) == len(shown)
    for name in shown:
        assert name.isprintable() or {c for c in name if not c.isprintable()} <= {c for c in name if c.isspace()}
        assert name
        assert len(name.splitlines()) == 1
        assert len(name) <= LONGEST_NAME + len(" (12)")


NAMES = {
    "empty": ("", "unnamed"),
    "with NUL": ("a\0b.png", "a�b.png"),
    "on two lines": ("a\nb\r\u2028c.png", "a�b��c.png"),
    "written backwards": ("gnp.\u202egnp.exe", "gnp.�gnp.exe"),
    "half a character": ("a\udcffb.png", "a�b.png"),
    "a tag": ("<script>alert(1)</script>.png", "<script>alert(1)</script>.png"),
    "upwards": ("../../x.png", "../../x.png"),
    "a formula": ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
    "endless": ("n" * 3000, "n" * 63 + "…"),
    "endless and dangerous": ("\0" * 3000, "�" * 63 + "…"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_forged_name_is_only_shown(kind: str) -> None:
    name, expected = NAMES[kind]
    found = received([(name, A), (name, b"no picture")])
    assert [*found.table.file] == [expected]
    assert found.rejected.file[0].startswith(expected[:10])
    assert shown(found, 0) == 10
    with pytest.raises(InputError) as refusal:
        received([(name, b"no picture")])
    assert "\n" not in str(refusal.value)


# Limits


def test_pictures_beyond_the_most_are_left_out_with_a_sentence() -> None:
    each = [(f"{k}.png", saved(np.array([[k % 256, k // 256], [0, 1]], np.uint8))) for k in range(MOST + 3)]
    found = received(each)
    assert [*found.table.file] == [name for name, _ in each[:MOST]]
    assert reasons(found).keys() == {name for name, _ in each[MOST:]}
    found = received([each[0], ("all.zip", packed(*each[1:]))])
    assert len(found) == MOST
    assert reasons(found) == {"all.zip": f"more than {MOST} pictures; what comes after them is left out"}


def test_a_zip_of_very_many_bad_entries_is_a_short_list_of_reasons() -> None:
    found = received([("a.png", A), ("x.zip", packed(*((f"{k:05}.png", b"x") for k in range(15_000))))])
    assert [*found.table.file] == ["a.png"]
    assert len(found.rejected) == MOST


def test_a_visitor_has_a_quota_of_bytes_sent_and_of_bytes_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QUOTA >= MAX_BYTES
    monkeypatch.setattr(uploads, "QUOTA", len(A) + len(B) + 15)
    found = received([("a.png", A), ("b.png", B), ("c.png", C)])
    assert [*found.table.file] == ["a.png", "b.png"]
    assert "in all; use smaller pictures or fewer" in reasons(found)["c.png"]
    grown = A + bytes(2000)  # what stands behind a picture is ignored, but it is unpacked
    monkeypatch.setattr(uploads, "QUOTA", 2000)
    assert len(packed(("a.png", A), ("z.png", grown))) < 1000
    found = received([("x.zip", packed(("a.png", A), ("z.png", grown)))])
    assert [*found.table.file] == ["a.png"]
    assert "in all" in reasons(found)["x.zip"]


def test_pictures_that_take_too_long_are_left_out_and_the_others_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def later() -> float:
        now[0] += uploads.PATIENCE / 2.5
        return now[0]

    monkeypatch.setattr(uploads, "time", SimpleNamespace(monotonic=later))
    found = received([("a.png", A), ("b.png", B), ("c.png", C)])
    assert [*found.table.file] == ["a.png", "b.png"]
    assert "60 seconds were over before its turn came" in reasons(found)["c.png"]
    now[0] = 10.0**6
    assert [shown(found, row) for row in found.table.index] == [10, 20]


RECEIVE = """
import json, sys
from pathlib import Path
from oms_core.uploads import received
found = received([(name, Path(name).read_bytes()) for name in sys.argv[1:]])
print(json.dumps([[*found.table.file], dict(found.rejected.itertuples(index=False, name=None))]))
"""


def test_pictures_that_crash_or_occupy_the_decoder_hinder_neither_the_server_nor_their_neighbours(
    tmp_path: Path,
) -> None:
    files = {"a.png": A, "bad.png": B + MARK, "b.png": B, "endless.png": C + ENDLESS, "c.png": C}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", RECEIVE, *files], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env=os.environ | crashing_on(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["a.png", "b.png", "c.png"], {"bad.png": CRASHES, "endless.png": CRASHES}]


# Zips that mean harm


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


def changed(archive: bytes, *changes: tuple[int, int, str, int]) -> bytes:
    """The last entry of a zip with some fields changed: place in the local header, in the central one, form, value."""
    data = bytearray(archive)
    local, central = data.rindex(b"PK\3\4"), data.rindex(b"PK\1\2")
    for in_local, in_central, form, value in changes:
        if in_local >= 0:
            struct.pack_into(form, data, local + in_local, value)
        struct.pack_into(form, data, central + in_central, value)
    return bytes(data)


def liar(method: int, claimed: int, true: int) -> bytes:
    """A zip whose last entry claims to be smaller than it is."""
    archive = packed(("a.png", A), ("z.bmp", b"BM" + bytes(true)), method=method)
    central = archive.rindex(b"PK\1\2")
    squeezed = struct.unpack_from("<I", archive, central + 20)[0]
    return changed(archive, (22, 24, "<I", min(claimed, squeezed * 190)))


def directory(entry_name: bytes, count: int) -> bytes:
    """A zip of one picture whose list of entries names it very often."""
    one = packed(("a.png", A), method=zipfile.ZIP_STORED)
    central, end = one.rindex(b"PK\1\2"), one.rindex(b"PK\5\6")
    header = bytearray(one[central : central + 46])
    struct.pack_into("<H", header, 8, 0x800)  # its name is UTF-8
    struct.pack_into("<H", header, 28, len(entry_name))
    entries = (bytes(header) + entry_name) * count
    said = struct.pack("<HHII", min(count, 65_535), min(count, 65_535), len(entries), central)
    return one[:central] + entries + one[end : end + 8] + said + b"\0\0"


def overlapping(count: int) -> bytes:
    """Many entries that are all the same 60 MB in the zip."""
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    noise = RNG.bytes(310 * 1024)
    body = squeezed.compress(b"BM" + noise + bytes(60 * 2**20)) + squeezed.flush()
    size = 2 + len(noise) + 60 * 2**20
    local, central = bytearray(b"PK\3\4" + bytes(26)), bytearray(b"PK\1\2" + bytes(42))
    struct.pack_into("<HHHIIIIHH", local, 4, 20, 0, 8, 0, 0, len(body), size, 5, 0)
    struct.pack_into("<HHHHIIIIH", central, 4, 20, 20, 0, 8, 0, 0, len(body), size, 5)
    # all have the name a.bmp, so that each local header fits
    entries = (bytes(central) + b"a.bmp") * count
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(entries), 35 + len(body), 0)
    return bytes(local) + b"a.bmp" + body + entries + end


Z = ("z.png", C)
HOSTILE: dict[str, tuple[Callable[[], bytes], str, str]] = {  # what it is, the entry or the whole, its reason
    "upwards": (lambda: packed(Z, ("../up.png", B)), "../up.png", "points out of the archive"),
    "upwards in between": (lambda: packed(Z, ("x/../../up.png", B)), "x/../../up.png", "points out of the archive"),
    "absolute": (lambda: packed(Z, ("/tmp/up.png", B)), "/tmp/up.png", "points out of the archive"),
    "a backslash": (lambda: packed(Z, ("..\\up.png", B)), "..\\up.png", "points out of the archive"),
    "a drive": (lambda: packed(Z, ("C:up.png", B)), "C:up.png", "points out of the archive"),
    "a link": (lambda: packed(Z, (link("link.png"), b"/etc/passwd")), "link.png", "it is a link"),
    "a zip in a zip": (lambda: packed(Z, ("inner.zip", packed(("b.png", B)))), "inner.zip", NO_PICTURE),
    "nothing": (lambda: packed(Z, ("empty.png", b"")), "empty.png", "the file is empty"),
    "encrypted": (lambda: changed(packed(Z, ("b.png", B)), (6, 8, "<H", 1)), "b.png", "it is encrypted"),
    "bzip2": (lambda: liar(zipfile.ZIP_BZIP2, 2**25, 3 * 10**8), "z.bmp", "packed in an unusual way"),
    "lzma": (lambda: liar(zipfile.ZIP_LZMA, 2**25, 10**7), "z.bmp", "packed in an unusual way"),
    "an unknown packing": (
        lambda: changed(packed(Z, ("b.png", B)), (8, 10, "<H", 99)), "b.png", "packed in an unusual way"
    ),
    "a bomb": (lambda: packed(Z, ("bomb.bmp", b"BM" + bytes(50 * 10**6))), "bomb.bmp", "more than 200 times"),
    "a bomb that lies": (lambda: liar(zipfile.ZIP_DEFLATED, 2**26, 3 * 10**8), "z.bmp", "the entry is damaged"),
    "larger than a picture may be": (
        lambda: changed(packed(Z, ("b.png", B)), (22, 24, "<I", 2**31)), "b.png", "larger than 64 MB"
    ),
    "of which the same part is named 5,000 times": (lambda: overlapping(5000), "x.zip", "in all"),
    "with a million names": (lambda: directory(b"a.png", 1_200_000), "x.zip", "holds too many files"),
    "with endless names": (lambda: directory("😀".encode() * 16_000, 950), "x.zip", "holds too many files"),
    "with too many names": (lambda: directory(b"a.png", 21_000), "x.zip", "holds too many files"),
    "cut off": (lambda: packed(Z, ("b.png", B))[:-30], "x.zip", "zip is damaged"),
}  # fmt: skip


@pytest.fixture(scope="session")
def hostile() -> dict[str, bytes]:
    """Each of them once."""
    return {name: build() for name, (build, _, _) in HOSTILE.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_told_what_is_wrong_and_hinders_nobody_else(name: str, hostile: dict[str, bytes]) -> None:
    _, file, reason = HOSTILE[name]
    found = received([("good.png", PNG), ("x.zip", hostile[name])])
    assert found.table.file[0] == "good.png"
    assert reason in reasons(found)[file]
    assert {*found.table.image} <= {hashlib.sha256(data).hexdigest() for data in (PNG, A, C)}


def test_hostile_zips_and_names_open_no_file_and_write_none(
    hostile: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "look_through", look_here)
    names = [name for name, _ in NAMES.values()] + ["/etc/passwd", "/etc/hostname", "x.zip"]
    files = [(name, data) for name in names for data in (PNG, packed(("/etc/passwd", A), ("b.png", B)))]
    files += [(name, data) for name, data in hostile.items() if len(data) < 2**20]
    received(files).pixels(Profile((8, 8), 3))  # what is imported on the way is imported
    with watched() as seen:
        found = received(files)
        assert found.pixels(Profile((8, 8), 3)).any()
    own = [one for one in seen if one.thread == threading.get_ident()]
    assert own == []
    with watched() as seen, open(__file__):
        pass
    assert [one.path for one in seen] == [__file__]  # who opens a file is seen


MEASURE = """
import resource, sys
from oms_core.errors import InputError
from oms_core.uploads import received
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with open(sys.argv[1], "rb") as file:
    received([("plain.png", file.read())])
before = peak()
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        received([("x.zip", data)])
    except InputError:
        pass
    print(peak() - before)
"""


def peaks(folder: Path, files: list[bytes]) -> list[float]:
    """By how many MiB the memory of a process has grown at its peak, file by file."""
    for number, data in enumerate([PNG, *files]):
        (folder / str(number)).write_bytes(data)
    paths = [str(folder / str(number)) for number in range(len(files) + 1)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [*map(float, done.stdout.split())]


def test_hostile_zips_take_little_memory(tmp_path: Path, hostile: dict[str, bytes]) -> None:
    grown = dict(zip(hostile, peaks(tmp_path, [*hostile.values()]), strict=True))
    assert grown and max(grown.values()) <= 256, grown  # noqa: PT018


def test_the_largest_picture_stands_in_memory_no_more_than_twice(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    plain = saved(Image.new("RGB", (side, side), "teal"), compress_level=1)
    clear = saved(Image.new("RGBA", (side, side)), compress_level=1)
    twice = 2 * 4 * side * side / 2**20  # Pillow takes four bytes for each pixel in colour
    assert max(peaks(tmp_path, [plain, clear])) < twice + 50


# Edits of a picture

SMOOTH = np.tile(np.linspace(40, 215, 28).astype(np.uint8)[:, None, None], (1, 28, 3))
PICTURES = st.builds(
    lambda width, height, colour, seed: Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, *(3,) * colour), np.uint8)
    ),
    st.integers(2, 40), st.integers(2, 40), st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
EDITS = st.builds(
    Edit,
    crop=st.floats(0, 0.5),
    flip=st.booleans(),
    blur=st.floats(0, 10),
    noise=st.floats(0, 100),
    jpeg=st.integers(0, 95),
)
laws = settings(max_examples=80, derandomize=True, database=None, deadline=None)


@given(PICTURES)
@laws
def test_no_edit_changes_nothing_and_two_flips_are_none(picture: Image.Image) -> None:
    assert np.array_equal(edited(picture, Edit()), picture)
    flipped = edited(picture, Edit(flip=True))
    assert np.array_equal(flipped, np.asarray(picture)[:, ::-1])
    assert np.array_equal(edited(flipped, Edit(flip=True)), picture)


@given(PICTURES, EDITS, st.integers(0, 2**32))
@laws
def test_any_edit_of_any_picture_is_a_picture_of_its_kind_and_the_same_each_time(
    picture: Image.Image, edit: Edit, seed: int
) -> None:
    before = np.array(picture)
    after = edited(picture, edit, seed)
    assert after.mode == picture.mode
    assert np.array_equal(after, edited(picture, edit, seed))
    assert np.array_equal(picture, before)
    for kept, side in zip(after.size, picture.size, strict=True):
        assert 2 <= kept <= side
    if max(picture.size) <= MAX_ASPECT * min(picture.size):
        assert max(after.size) <= MAX_ASPECT * min(after.size)


@pytest.mark.parametrize(("size", "share", "kept"), [((28, 28), 0.5, (14, 14)), ((28, 20), 0.25, (21, 15))])
def test_a_crop_keeps_the_middle(size: tuple[int, int], share: float, kept: tuple[int, int]) -> None:
    width, height = size
    places = np.arange(width * height, dtype=np.uint32).reshape(height, width)
    picture = Image.fromarray((places % 251).astype(np.uint8))
    cut = edited(picture, Edit(crop=share))
    assert cut.size == kept
    top, left = (height - kept[1]) // 2, (width - kept[0]) // 2
    assert np.array_equal(cut, np.asarray(picture)[top : top + kept[1], left : left + kept[0]])
    assert abs((height - kept[1] - top) - top) <= 1  # as much is cut away on either side


@pytest.mark.parametrize(("size", "share"), [((60, 3), 0.25), ((3, 60), 0.25), ((41, 3), 0.5)])
def test_a_crop_of_a_narrow_picture_is_still_a_picture(size: tuple[int, int], share: float) -> None:
    narrow = saved(Image.new("L", size, 9))
    images = received([("narrow.png", narrow)])
    assert with_edit(images, images.table.image[0], Edit(crop=share)).pixels(Profile((8, 8), 1)).max() == 9


@pytest.mark.parametrize("deviation", [2.0, 10.0, 25.0])
@pytest.mark.parametrize("shape", [(1000, 300), (1000, 300, 3)])
def test_noise_has_the_deviation_that_was_asked_for(deviation: float, shape: tuple[int, ...]) -> None:
    grey = Image.fromarray(np.full(shape, 128, np.uint8))
    noise = np.asarray(edited(grey, Edit(noise=deviation), seed=3)).astype(float) - 128
    expected = (deviation**2 + 1 / 12) ** 0.5  # rounding to whole levels adds the variance of a uniform error
    assert noise.std() == pytest.approx(expected, rel=0.01)
    assert abs(noise.mean()) < 5 * deviation / noise.size**0.5
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / noise.size**0.5  # no stretch of the noise is repeated
    assert np.array_equal(edited(grey, Edit(noise=deviation), 3), edited(grey, Edit(noise=deviation), 3))
    assert not np.array_equal(edited(grey, Edit(noise=deviation), 3), edited(grey, Edit(noise=deviation), 4))


def test_noise_ends_at_black_and_white() -> None:
    white = np.asarray(edited(Image.new("L", (200, 200), 255), Edit(noise=20)))
    assert (white == 255).mean() == pytest.approx(0.5, abs=0.03)
    assert white.min() > 100  # what is too bright is white, and does not begin again at black


@pytest.mark.parametrize("radius", [0.5, 1.0, 3.0])
def test_blur_keeps_the_mean_and_takes_detail(radius: float) -> None:
    framed = np.full((60, 60), 128, np.uint8)  # what leaves the picture at its edge is what comes in there
    framed[20:40, 20:40] = RNG.integers(0, 256, (20, 20), np.uint8)
    blurred = np.asarray(edited(Image.fromarray(framed), Edit(blur=radius))).astype(float)
    assert blurred.mean() == pytest.approx(framed.mean(), abs=0.6)
    assert blurred.std() < framed.std()
    more = np.asarray(edited(Image.fromarray(framed), Edit(blur=2 * radius))).astype(float)
    assert more.std() < blurred.std()


@pytest.mark.parametrize("picture", [SMOOTH, SMOOTH[..., 0]], ids=["colour", "grey"])
def test_a_jpeg_of_high_quality_is_near_and_one_of_low_quality_is_further(picture: np.ndarray) -> None:
    errors = [
        np.abs(np.asarray(edited(Image.fromarray(picture), Edit(jpeg=quality))).astype(int) - picture).mean()
        for quality in (95, 40, 5)
    ]
    assert errors[0] <= 1.5
    assert errors == sorted(errors)
    assert errors[2] > 2 * errors[0]


def tiny_set() -> ImageSet:
    return received([("a.png", A), ("colour.png", PNG), ("grey.png", saved(GREY))])


def test_an_edited_picture_keeps_its_identity_and_the_others_are_untouched() -> None:
    images = tiny_set()
    table = images.table.copy()
    name = images.table.image[1]
    one = with_edit(images, name, Edit(flip=True))
    assert [*one.table.image] == [name]
    assert [*one.table.index] == [1]
    (pixels,) = one.pixels(Profile((12, 16), 3))
    assert np.array_equal(pixels, RGB[:, ::-1])
    pd.testing.assert_frame_equal(images.table, table)
    assert [np.asarray(decode(images.read(row))[0]).tolist() for row in images.table.index] == [
        np.full((8, 8), 10).tolist(), RGB.tolist(), GREY.tolist()
    ]  # fmt: skip
    assert np.array_equal(with_edit(images, name, Edit()).pixels(Profile((12, 16), 3))[0], RGB)
    assert np.array_equal(decode(with_edit(images, name, Edit()).read(1))[0], RGB)


def test_the_noise_of_an_edited_picture_belongs_to_the_picture() -> None:
    images = tiny_set()
    noisy = [with_edit(images, name, Edit(noise=9)).read(row) for row, name in images.table.image.items()]
    again = [with_edit(tiny_set(), name, Edit(noise=9)).read(row) for row, name in images.table.image.items()]
    assert noisy == again
    grey, colour = (np.asarray(decode(noisy[row])[0]).astype(int) for row in (2, 1))
    assert decode(noisy[2])[0].mode == "L"
    assert not np.array_equal(grey - GREY, (colour - RGB)[..., 0])


def test_an_edit_of_a_turned_picture_turns_it_once() -> None:
    images = received([("turned.png", turned())])
    (pixels,) = with_edit(images, images.table.image[0], Edit(flip=True)).pixels(Profile((12, 16), 3))
    assert np.array_equal(pixels, RGB[:, ::-1])


@pytest.mark.parametrize("size", [(5000, 250), (2100, 2000), (130, 2600)])
def test_a_large_picture_is_made_smaller_before_it_is_edited(size: tuple[int, int]) -> None:
    images = received([("large.png", saved(Image.new("L", size, 77), compress_level=1))])
    one = with_edit(images, images.table.image[0], Edit(flip=True))
    picture, _ = decode(one.read(0))
    assert max(picture.size) == LARGEST
    assert picture.getextrema() == (77, 77)
    width, height = size
    assert picture.width / picture.height == pytest.approx(width / height, rel=0.02)
    assert one.pixels(Profile((28, 28), 1)).min() == 77


def test_noise_is_the_same_drawn_at_once_or_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (70, 20, 3), np.uint8))
    drawn = []
    for band in (7, 64, 10_000):
        monkeypatch.setattr(edits, "BAND", band)
        drawn.append(np.asarray(edited(picture, Edit(noise=30), 5)))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
