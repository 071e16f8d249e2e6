"""Where image sets may lie: folders, zips, parquet, CIFAR, the hub and splits, and what damage does to each."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oms_core import images, layouts, rows
from oms_core.assemble import png
from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.images import ImageSet, inspection, open_images
from oms_core.location import Location
from oms_core.run import Run, plan

RNG = np.random.default_rng(1)
PIXELS = RNG.integers(0, 256, (12, 8, 8), np.uint8)
PNGS = [png(picture) for picture in PIXELS]
A, B, C, D = PNGS[:4]
GREY = Profile((8, 8), 1)


def folder_of(root: Path, files: dict[str, bytes | str]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def zip_of(path: Path, files: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def column(found: ImageSet, name: str) -> dict[str, str]:
    return dict(zip(found.table.file, found.table[name], strict=True))


def reasons(found: ImageSet) -> dict[str, str]:
    return dict(zip(found.rejected.file, found.rejected.reason, strict=True))


def refusal(name: str | Path) -> str:
    with pytest.raises(InputError) as refused:
        open_images(Location(name))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Layouts, each in a folder and in a zip

COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {"image_id": 7, "caption": "first"},
        {"image_id": 8, "caption": " other "},
        {"image_id": 7, "caption": "second"},
    ],
}
LAYOUTS: dict[str, tuple[dict[str, bytes | str], list[tuple[str, str, str, str]]]] = {
    "metadata": (
        {"x/a.png": A, "b.png": B, "metadata.csv": "file_name,member,label,text\nx/a.png,1,7,a cat\nb.png,no,,\n"},
        [("x/a.png", "member", "7", "a cat"), ("b.png", "nonmember", "", "")],
    ),
    "role folders": (
        {"member/cat/a.png": A, "nonmember/images/b.png": B, "auxiliary/c.png": C},
        [
            ("member/cat/a.png", "member", "cat", ""),
            ("nonmember/images/b.png", "nonmember", "", ""),
            ("auxiliary/c.png", "auxiliary", "", ""),
        ],
    ),
    "LFW": (
        {f"lfw/{name}/{name}_{k:04d}.jpg": PNGS[2 * n + k] for n, name in enumerate("PQRS") for k in range(2)},
        [
            (f"lfw/{name}/{name}_{k:04d}.jpg", "member" if name in "PQ" else "nonmember", name, "")
            for name in "PQRS"
            for k in range(2)
        ],
    ),
    "plain": (
        {"b.png": B, "a.v1./a.png": A, "README.md": "x"},
        [("a.v1./a.png", "", "a.v1.", ""), ("b.png", "", "", "")],
    ),
    "captions by file": (
        {"member/a.png": A, "nonmember/b.png": B, "caption.json": '{"member/a.png": ["one", "two"]}'},
        [("member/a.png", "member", "", "one"), ("nonmember/b.png", "nonmember", "", "")],
    ),
    "captions in each role": (
        {
            **{"member/images/a.png": A, "nonmember/deep/down/a.png": B},
            **{"member/caption.json": '{"a.png": "one"}', "nonmember/caption.json": '{"a.png": "two"}'},
        },
        [("member/images/a.png", "member", "", "one"), ("nonmember/deep/down/a.png", "nonmember", "deep/down", "two")],
    ),
    "captions in a list": (
        {
            "a.png": A,
            "b.png": B,
            "captions.json": '[{"image": "a.png", "caption": 5}, {"file": "b.png", "caption": ""}]',
        },
        [("a.png", "", "", "5"), ("b.png", "", "", "")],
    ),
    "COCO": (
        {"val2017/a.png": A, "val2017/b.png": B, "annotations/captions_val2017.json": json.dumps(COCO)},
        [("val2017/a.png", "", "val2017", "first"), ("val2017/b.png", "", "val2017", "other")],
    ),
    "COCO in roles": (
        {"member/a.png": A, "nonmember/b.png": B, "captions_val.json": json.dumps(COCO)},
        [("member/a.png", "member", "", "first"), ("nonmember/b.png", "nonmember", "", "other")],
    ),
    "img2dataset": (
        {
            **{"00000/000.png": A, "00000/000.txt": " a dog\n", "00000/000.json": "{}", "00000/001.png": B},
            **{"00000.parquet": b"of addresses, not pictures", "00000_stats.json": "{}"},
        },
        [("00000/000.png", "", "00000", "a dog"), ("00000/001.png", "", "00000", "")],
    ),
    "the system's own files": (
        {"member/a.png": A, "nonmember/b.png": B, "member/.DS_Store": "x", "__MACOSX/member/._a.png": "x"},
        [("member/a.png", "member", "", ""), ("nonmember/b.png", "nonmember", "", "")],
    ),
}


@pytest.mark.parametrize("place", ["folder", "zip"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_role_label_and_caption_in_a_folder_as_in_a_zip(tmp_path: Path, name: str, place: str) -> None:
    files, expected = LAYOUTS[name]
    where = folder_of(tmp_path / "set", files) if place == "folder" else zip_of(tmp_path / "set.ZIP", files)
    found = open_images(Location(where))
    assert [*found.table[["file", "role", "label", "caption"]].itertuples(index=False, name=None)] == expected
    assert found.rejected.empty
    assert [found.read(row) for row in found.table.index] == [files[file] for file, *_ in expected]


def test_a_set_of_unknown_roles_opens_but_cannot_be_attacked(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"a.png": A})
    with pytest.raises(InputError, match=r"says of no picture whether it is a member.*SPLIT\.npz@SET"):
        plan(Run(images=Location(folder)))


BAD_CAPTIONS = {
    "no JSON": "{",
    "a number": "7",
    "a word": '"abc"',
    "a list of words": '["abc"]',
    "no name": '[{"caption": "x"}]',
    "no caption": '[{"file": "a.png"}]',
    "an empty list of captions": '{"a.png": []}',
    "an unknown picture": '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
    "annotations alone": '{"annotations": [{"image_id": 1, "caption": "x"}]}',
    "too deep": "[" * 200_000,
    "no text": b"\xff\xfe\xff",
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_unusable_captions_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, {"a.png": A, "caption.json": BAD_CAPTIONS[name]})
    assert "caption.json in" in refusal(folder)


def test_a_caption_that_is_no_regular_file_is_refused_and_one_that_is_no_text_is_shown(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.png": A, "b.png": B, "a.txt": b"\xff!", "caption.json": '{"b.png": "\\ud800?"}'})
    assert column(open_images(Location(folder)), "caption") == {"a.png": "\ufffd!", "b.png": "\ufffd?"}
    os.mkfifo(folder / "b.txt")
    assert "b.txt in" in refusal(folder)


def test_captions_may_be_larger_than_a_picture_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = json.dumps({"a.png": " ".join(str(k) for k in range(1000))})
    monkeypatch.setattr(layouts.Zip.read, "__defaults__", (len(words) - 1,))
    monkeypatch.setattr(layouts.Folder.read, "__defaults__", (len(words) - 1,))
    for where in (zip_of(tmp_path / "x.zip", {"a.png": A, "caption.json": words}), tmp_path / "x"):
        folder_of(tmp_path / "x", {"a.png": A, "caption.json": words})
        assert open_images(Location(where)).table.caption.iloc[0].endswith("999")


# Zips


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


REJECTED: dict[str, tuple[str | zipfile.ZipInfo, bytes, str]] = {
    "upwards": ("../up.png", B, "points out of the archive"),
    "upwards in between": ("x/../../up.png", B, "points out of the archive"),
    "absolute": ("/tmp/up.png", B, "points out of the archive"),
    "a backslash": ("..\\up.png", B, "points out of the archive"),
    "a drive": ("C:up.png", B, "points out of the archive"),
    "a link": (link("link.png"), b"/etc/passwd", "a link"),
    "a bomb": ("bomb.bmp", b"BM" + bytes(2**20), "more than 200 times"),
    "a zip": ("inner.zip", packed({"a.png": B}), "not a supported picture"),
    "nothing": ("empty.png", b"", "the file is empty"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_hazard_in_a_zip_is_listed_with_its_reason_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entry, data, reason = REJECTED[name]
    file = entry if isinstance(entry, str) else entry.filename
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", A)
        archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    before = sorted(tmp_path.parent.rglob("*"))
    found = open_images(Location("x.zip"))
    assert column(found, "role") == {"a.png": ""}
    assert reasons(found).keys() == {file}
    assert reason in reasons(found)[file]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_an_encrypted_entry_is_listed_with_its_reason(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"a.png": A, "b.png": B})
    data = bytearray(path.read_bytes())
    local, central = data.rindex(b"PK\3\4"), data.rindex(b"PK\1\2")
    data[local + 6] |= 1
    data[central + 8] |= 1
    path.write_bytes(data)
    found = open_images(Location(path))
    assert reasons(found) == {"b.png": "it is encrypted"}
    assert [*found.table.file] == ["a.png"]


def test_an_entry_that_claims_to_be_small_is_not_read_beyond_its_claim(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"a.png": A, "b.png": B})
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\1\2") + 24, 10)  # its size unpacked
    path.write_bytes(data)
    assert reasons(open_images(Location(path))) == {"b.png": "the entry is damaged"}


def test_a_zip_of_too_many_or_too_large_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(tmp_path / "x.zip", {"a.png": A, "b.png": B, "c.png": C})
    monkeypatch.setattr(layouts, "MAX_ENTRIES", 2)
    assert "holds more than 2 files; unpack it" in refusal(path)
    monkeypatch.setattr(layouts, "MAX_ENTRIES", 3)
    monkeypatch.setattr(layouts.Zip.read, "__defaults__", (20,))
    assert "larger than" in refusal(path)


def test_a_name_twice_in_a_zip_is_refused_as_either_could_be_meant(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("a.png", A)
            archive.writestr("a.png", B)
    assert "holds two entries called 'a.png'; pack it again with one of each" in refusal(tmp_path / "x.zip")


def test_metadata_in_a_zip_may_name_what_is_not_there(tmp_path: Path) -> None:
    table = 'file_name,member\na.png,1\nz.png,0\n"x\0y",0\n'
    found = open_images(Location(zip_of(tmp_path / "x.zip", {"a.png": A, "metadata.csv": table})))
    assert column(found, "role") == {"a.png": "member"}
    assert reasons(found) == {"z.png": "it is not in the archive", "x\0y": "it is not in the archive"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused_or_lists_what_is_damaged(tmp_path: Path, method: int) -> None:
    files = {"member/a.png": A, "nonmember/b.png": B, "member/a.txt": "words"}
    whole = zip_of(tmp_path / "whole.zip", files, method).read_bytes()
    chance = random.Random(method)
    flips = [(at, bytes([whole[at] ^ 1 << chance.randrange(8)])) for at in chance.sample(range(len(whole)), 150)]
    cases = [whole[:at] + new + whole[at + 1 :] for at, new in flips]
    cases += [whole[: chance.randrange(len(whole))] for _ in range(20)]
    for case in cases:
        (tmp_path / "x.zip").write_bytes(case)
        try:
            found = open_images(Location(tmp_path / "x.zip"))
        except InputError:
            continue
        assert {found.read(row) for row in found.table.index} <= {A, B}


def test_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    whole = zip_of(tmp_path / "x.zip", {"a.png": A}).read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.zip").write_bytes(whole[:length])
        assert "no complete zip archive" in refusal(tmp_path / "x.zip")


@pytest.mark.parametrize("kind", ["zip", "parquet", "png"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / f"x.{kind}")
    assert "is a file; name a folder" in refusal(tmp_path / f"x.{kind}")
    assert "No picture" in refusal(tmp_path)


# Parquet

SHAPES: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "bytes": ("image", lambda data: data),
    "the hub's": ("img", lambda data: {"bytes": data, "path": "x.png"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parquet_read_in_any_order_is_what_was_written(tmp_path: Path, name: str) -> None:
    key, cell = SHAPES[name]
    said = {"member": [k % 2 == 0 for k in range(12)], "label": [*range(12)], "text": [f"w{k}" for k in range(12)]}
    table = pa.table({key: [cell(data) for data in PNGS]} | said)
    for part, start in (("a", 0), ("b", 7)):
        pq.write_table(table.slice(start, 7), tmp_path / f"{part}.parquet", row_group_size=3)
    found = open_images(Location(tmp_path))
    assert [*found.table.file[6:8]] == ["a-000006", "b-000000"]
    assert [*found.table.role] == ["member", "nonmember"] * 6
    assert [*found.table.label] == [str(k) for k in range(12)]
    assert [*found.table.caption] == [f"w{k}" for k in range(12)]
    order = RNG.permutation(12)
    assert [found.read(row) for row in order] == [PNGS[row] for row in order]
    alone = open_images(Location(tmp_path / "b.parquet"))
    assert np.array_equal(alone.pixels(GREY)[..., 0], PIXELS[7:])


def test_only_the_row_groups_in_use_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"png": PNGS}), tmp_path / "x.parquet", row_group_size=2)
    found, read = rows.parquet([tmp_path / "x.parquet"]), []
    original = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **more: Any) -> pa.Table:
        read.append(group)
        return original(file, group, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert read == []
    assert [found.read(k) for k in (0, 10, 1, 11, 0, 10)] == [PNGS[k] for k in (0, 10, 1, 11, 0, 10)]
    assert read == [0, 5]
    found.read(5), found.read(0)
    assert read == [0, 5, 2, 0]


def test_several_threads_read_the_same_pictures(tmp_path: Path) -> None:
    pq.write_table(pa.table({"png": PNGS}), tmp_path / "x.parquet", row_group_size=1)
    found = open_images(Location(tmp_path / "x.parquet"))
    order = [*np.random.default_rng(0).integers(0, len(PNGS), 300).tolist()]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(found.read, order)] == [PNGS[row] for row in order]


def test_parquet_without_words_or_with_gaps_opens(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [A, None, b"no picture"]}), tmp_path / "x.parquet")
    found = open_images(Location(tmp_path / "x.parquet"))
    assert [*found.table[["role", "label", "caption"]].itertuples(index=False, name=None)] == [("", "", "")]
    assert reasons(found)["x-000001"] == "the row holds no picture"
    gaps = {"image": [A, B, C], "role": ["auxiliary", None, ""], "caption": [["one", "two"], [], None]}
    pq.write_table(pa.table(gaps), tmp_path / "x.parquet")
    found = open_images(Location(tmp_path / "x.parquet"))
    assert [*found.table.role] == ["auxiliary", "", ""]
    assert [*found.table.caption] == ["one", "", ""]


BAD_PARQUET = {
    "no pictures": (pa.table({"url": ["x"]}), "has no column of pictures"),
    "an unclear role": (pa.table({"image": [A], "member": ["perhaps"]}), "has 'perhaps' in its column member"),
    "no rows": (pa.table({"image": pa.array([], pa.binary())}), "No picture in"),
    "numbers": (pa.table({"image": [1, 2]}), "the row holds no picture"),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_unusable_parquet_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    table, expected = BAD_PARQUET[name]
    pq.write_table(table, tmp_path / "x.parquet")
    assert expected in refusal(tmp_path / "x.parquet")


def test_damaged_parquet_is_refused_or_lists_what_is_damaged(tmp_path: Path) -> None:
    table = pa.table({"image": PNGS[:4], "text": ["w"] * 4, "member": [True, False] * 2})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2, write_page_checksum=True)
    whole = (tmp_path / "x.parquet").read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(80):
        at = chance.randrange(len(whole))
        changed = whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        (tmp_path / "x.parquet").write_bytes(chance.choice([changed, whole[:at]]))
        try:
            found = open_images(Location(tmp_path / "x.parquet"))
        except InputError:
            refused += 1
            continue
        assert {found.read(row) for row in found.table.index} <= {*PNGS[:4]}
    assert refused > 40


# CIFAR

COLOURS = RNG.integers(0, 256, (15, 32, 32, 3), np.uint8)


def cifar_of(root: Path, labels: int = 1) -> Path:
    """CIFAR-10 as five files of three pictures, or CIFAR-100 as one: colour planes after the labels."""
    rows = [
        bytes([k % 10 + 100 * n for n in range(labels)]) + x.transpose(2, 0, 1).tobytes() for k, x in enumerate(COLOURS)
    ]
    if labels == 2:
        return folder_of(root, {"train.bin": b"".join(rows), "test.bin": b"not read"})
    batches = {f"data_batch_{n + 1}.bin": b"".join(rows[3 * n : 3 * n + 3]) for n in range(5)}
    return folder_of(root, batches | {"test_batch.bin": b"not read"})


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_comes_in_training_order_with_labels_and_exact_pixels(tmp_path: Path, labels: int) -> None:
    found = open_images(Location(cifar_of(tmp_path, labels)))
    assert [*found.table.label] == [str(k % 10 + 100 * (labels - 1)) for k in range(15)]
    assert set(found.table.role) == {""}
    assert np.array_equal(found.pixels(Profile((32, 32), 3)), COLOURS)


@pytest.mark.parametrize("change", ["missing", "empty", "cut"])
def test_cifar_that_is_not_whole_is_refused(tmp_path: Path, change: str) -> None:
    file = cifar_of(tmp_path) / "data_batch_3.bin"
    whole = file.read_bytes()
    file.unlink()
    if change != "missing":
        file.write_bytes(whole[:-1] if change == "cut" else b"")
    assert "data_batch_3.bin is missing or not whole; unpack" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_1", "train"])
def test_pickled_cifar_is_refused_and_the_binary_version_named(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, {name: b"\x80\x04cos\nsystem\n(S'exit'\ntR.", "meta": b""})
    assert "use the binary version" in refusal(tmp_path)


# The hub

NONE = np.array([], int)


class Table(list):
    """What is used of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        return [*self[0]]

    def remove_columns(self, names: list[str]) -> Table:
        return Table({name: cell for name, cell in row.items() if name not in names} for row in self)

    def cast_column(self, name: str, kind: str) -> Table:
        assert kind == "bytes"
        return Table(row | {name: {"bytes": row[name], "path": None}} for row in self)


def pretend(monkeypatch: pytest.MonkeyPatch, splits: dict[tuple[str, str], Table]) -> None:
    """Put a library `datasets` in place that knows these splits."""

    def load_dataset(name: str, split: str) -> Table:
        return splits[name, split]

    def image(decode: bool) -> str:
        assert decode is False
        return "bytes"

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, Image=image))


def test_a_data_set_of_the_hub_opens_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Table({"img": data, "fine_label": k, "text": [f"w{k}"]} for k, data in enumerate(PNGS[:3]))
    test = Table([{"image": D, "caption": None, "member": True}, {"image": None, "caption": "x", "member": False}])
    pretend(monkeypatch, {("o/n", "train"): train, ("o/n", "test"): test, ("o/n", "bare"): Table([{"png": A}])})
    found = open_images(Location("hub:o/n"))
    assert [found.read(row) for row in (2, 0, 1)] == [C, A, B]
    assert [*found.table.label] == ["0", "1", "2"]
    assert [*found.table.caption] == ["w0", "w1", "w2"]
    found = open_images(Location("hub:o/n:test"))
    assert [*found.table[["role", "caption"]].itertuples(index=False, name=None)] == [("member", "")]
    assert reasons(found) == {"n-000001": "the row holds no picture"}
    assert len(open_images(Location("hub:o/n:bare"))) == 1


def test_what_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {("o/n", "train"): Table([{"url": "x"}])})
    assert "o/n has no column of pictures" in refusal("hub:o/n")
    assert "o/n cannot be fetched; check its name" in refusal("hub:o/n:nowhere")
    assert "cannot be fetched; check its name" in refusal("hub:")


def test_a_data_set_of_the_hub_is_asked_for_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "TICK", -(10**12))  # all files count as old
    split = split_of(tmp_path / "s.npz", **named([0], NONE))
    for data in (A, B):
        pretend(monkeypatch, {("o/n", "train"): Table([{"png": data}])})
        for name in ("hub:o/n", "member=hub:o/n", f"{split}@hub:o/n"):
            assert open_images(Location(name)).read(0) == data


def test_without_the_library_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hub:o/n")


# Splits


def split_of(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def named(members: Any, others: Any, **more: Any) -> dict[str, Any]:
    return {"mia_train_idxs": members, "mia_eval_idxs": others} | more


def test_a_split_gives_roles_by_the_place_in_the_data_set(tmp_path: Path) -> None:
    cifar = cifar_of(tmp_path / "cifar")
    split = split_of(tmp_path / "s.npz", **named(np.array([14, 0]), np.array([[3], [5]]), ratio=0.5))
    found = open_images(Location(f"{split}@{cifar}"))
    members, others = (found.with_role(role).pixels(Profile((32, 32), 3)) for role in ("member", "nonmember"))
    assert np.array_equal(members, COLOURS[[0, 14]])
    assert np.array_equal(others, COLOURS[[3, 5]])
    assert found.table.role.eq("").sum() == 11
    assert len(plan(Run(images=Location(f"{split}@{cifar}"), attacks=("PIA",))).images) == 4


def test_places_stay_right_where_a_picture_is_unusable_or_doubled(tmp_path: Path) -> None:
    cells = [A, b"no picture", B, A, C, C, D]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    split = split_of(tmp_path / "s.npz", **named([0, 1, 2, 4, 5], [3, 6]))
    found = open_images(Location(f"{split}@{tmp_path / 'x.parquet'}"))
    assert {found.read(row): found.table.role[row] for row in found.table.index} == {
        B: "member",
        C: "member",
        D: "nonmember",
    }
    assert reasons(found) == {
        "x-000000": "the same picture is also listed with another role",
        "x-000001": reasons(found)["x-000001"],
        "x-000003": "the same picture is also listed with another role",
        "x-000005": "the same picture is listed twice",
    }


def test_a_split_of_a_built_in_set_holds_its_pictures(tmp_path: Path) -> None:
    digits = open_images("digits")
    split = split_of(tmp_path / "s.npz", **named([1796], [5]))
    found = open_images(Location(f"{split}@digits"))
    assert [*found.with_role("member", "nonmember").table.image] == [*digits.table.image.iloc[[5, 1796]]]


BAD_SPLITS: dict[str, tuple[dict[str, Any], str]] = {
    "pickles": (named(np.array([0, None]), [1]), "can be read"),
    "a missing array": ({"mia_train_idxs": [0]}, "can be read"),
    "too large": (named([0], [2]), "names pictures outside"),
    "negative": (named([0], [-1]), "names pictures outside"),
    "larger than any": (named(np.array([2**63], np.uint64), [1]), "names pictures outside"),
    "in both": (named([0, 1], [1]), "names a picture twice"),
    "twice in one": (named([0, 0], [1]), "names a picture twice"),
    "floats": (named([0.0], [1]), "not whole numbers"),
    "truths": (named([True, False], [1]), "not whole numbers"),
    "words": (named(["0"], [1]), "not whole numbers"),
}


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_an_unusable_split_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    arrays, expected = BAD_SPLITS[name]
    folder = folder_of(tmp_path / "set", {"a.png": A, "b.png": B})
    assert expected in refusal(f"{split_of(tmp_path / 's.npz', **arrays)}@{folder}")


@pytest.mark.parametrize("data", [None, b"", b"PK\3\4", b"x" * 99, "npy"])
def test_a_file_that_is_no_split_is_refused(tmp_path: Path, data: bytes | str | None) -> None:
    if data == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.arange(3))
        data = buffer.getvalue()
    if data is not None:
        (tmp_path / "s.npz").write_bytes(data)
    folder = folder_of(tmp_path / "set", {"a.png": A})
    assert "s.npz holds no mia_train_idxs and mia_eval_idxs that can be read" in refusal(
        f"{tmp_path / 's.npz'}@{folder}"
    )


# Sets joined


def test_joined_sets_take_the_role_they_are_given_and_drop_what_stands_in_both(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", {"a.png": A, "b.png": B, "bad.png": b"x"})
    two = zip_of(tmp_path / "two.zip", {"member/again.png": A, "member/c.png": C})
    found = open_images(Location(f"member={one}, nonmember={two}"))
    assert column(found, "role") == {"b.png": "member", "member/c.png": "nonmember"}
    both = "the same picture is also listed with another role"
    assert reasons(found) == {"bad.png": reasons(found)["bad.png"], "a.png": both, "member/again.png": both}
    assert [*found.table.index] == [0, 1]
    assert [found.read(row) for row in (0, 1)] == [B, C]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("member={},member={}", "at most once"),
        ("member={},other={}", "at most once"),
        ("member={},", "at most once"),
        ("member={},nonmember={}", "also listed with another role"),
        ("member={},nonmember=", "There is no image set"),
        ("member=", "There is no image set"),
    ],
)
def test_an_unusable_join_is_refused_in_one_sentence(tmp_path: Path, name: str, expected: str) -> None:
    folder = folder_of(tmp_path / "set", {"a.png": A})
    assert expected in refusal(name.format(folder, folder))


def test_a_set_is_described_with_counts_sizes_roles_and_reasons(tmp_path: Path) -> None:
    colour = png(RNG.integers(0, 256, (9, 8, 3), np.uint8))
    files = {"member/a.png": A, "nonmember/b.png": colour, "nonmember/c.png": b"<html>"}
    said = inspection(open_images(Location(folder_of(tmp_path, files))))
    assert said["roles"] == {"member": 1, "nonmember": 1}
    assert said["sizes"] == {"8 x 8 grey": 1, "9 x 8 colour": 1}
    assert [*said["rejected"].values()] == [["nonmember/c.png"]]


# While a set is in use


FILLER = RNG.bytes(2**20)  # more than a reader keeps


def in_folder(root: Path, data: bytes) -> Location:
    return Location(folder_of(root / "set", {"a.png": data, "z.png": C}))


def in_zip(root: Path, data: bytes) -> Location:
    return Location(zip_of(root / "x.zip", {"a.png": data, "filler.md": FILLER, "z.png": C}, zipfile.ZIP_STORED))


def in_parquet(root: Path, data: bytes) -> Location:
    pq.write_table(pa.table({"image": [data, C, D]}), root / "x.parquet", row_group_size=1)
    return Location(root / "x.parquet")


@pytest.mark.parametrize("make", [in_folder, in_zip, in_parquet])
def test_a_picture_that_changes_while_it_is_in_use_is_refused(tmp_path: Path, make: Callable[..., Location]) -> None:
    name = make(tmp_path, A)
    found = open_images(name)
    assert [found.read(row) for row in found.table.index][:2] == [A, C]
    make(tmp_path, B)
    with pytest.raises(InputError, match=r"was (changed|removed) while it was in use.*open the set again") as refused:
        found.read(0)
    assert "\n" not in str(refused.value)
    assert open_images(name).read(0) == B


# A set that is opened again


def of_cifar(root: Path, data: bytes) -> Location:
    return Location(folder_of(root / "cifar", {"train.bin": data.ljust(2 * 3074, b"0")[: 2 * 3074]}))


def of_split(root: Path, data: bytes) -> Location:
    return Location(f"{split_of(root / 's.npz', **named([0], [1]))}@{in_zip(root, data)}")


def of_both(root: Path, data: bytes) -> Location:
    return Location(f"member={in_folder(root, data)},nonmember={in_parquet(root, D)}")


@pytest.mark.parametrize("make", [in_folder, in_zip, in_parquet, of_cifar, of_split, of_both])
def test_a_set_is_read_again_only_when_its_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Location]
) -> None:
    read, original = [], images.look_through
    monkeypatch.setattr(
        images, "look_through", lambda each, count: original(lambda number: read.append(number) or each(number), count)
    )
    monkeypatch.setattr(images, "TICK", -(10**12))  # all files count as old
    name = make(tmp_path, A)
    first, seen = open_images(name), len(read)
    assert open_images(name).table.equals(first.table)
    assert len(read) == seen
    make(tmp_path, B)
    later(tmp_path)
    assert open_images(name).table.image[0] != first.table.image[0]
    assert len(read) > seen


def later(folder: Path, files: str = "*") -> None:
    """As if these had been written a second later, which may be less than a clock's tick."""
    for path in filter(Path.is_file, folder.rglob(files)):
        changed = path.stat().st_mtime_ns + 10**9
        os.utime(path, ns=(changed, changed))


@pytest.mark.parametrize("indices", [named([1], [0]), named([0], NONE)])
def test_another_split_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indices: dict[str, Any]) -> None:
    monkeypatch.setattr(images, "TICK", -(10**12))
    name = of_split(tmp_path, A)
    before = open_images(name)
    split_of(tmp_path / "s.npz", **indices)
    later(tmp_path, "s.npz")
    assert [*open_images(name).table.role] != [*before.table.role]


# Memory

SCORE = """
import resource, sys
from oms_core.compute import score
from oms_core.location import Location
from oms_core.run import Run
model, images = map(Location, sys.argv[1:])
rows = score(Run(model=model, images=images, attacks=("PIA",), steps=1, batch=64, device="cpu"))
print(len(rows["PIA"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def quick_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path, pipeline: Path) -> None:
    peaks = {}
    for count in (1_000, 5_000):
        pictures = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        files = (f"{role}/{k}.png" for k in itertools.count() for role in ("member", "nonmember"))
        folder = folder_of(tmp_path / str(count), {next(files): quick_png(x) for x in pictures})
        command = [sys.executable, "-c", SCORE, str(pipeline), str(folder)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
        assert int(said[0]) == count
        peaks[count] = int(said[1]) / 1024  # MB
    assert peaks[5_000] < peaks[1_000] + 75
