"""Image sets: what the built-in ones hold, and what becomes of folders as people have them."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits
from watch import watched

from oms_core import images, layouts
from oms_core.assemble import png
from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.images import ImageSet, open_images
from oms_core.location import Location
from oms_core.run import Run, plan
from oms_core.survey import look_through

GREY = Profile((8, 8), 1)
RNG = np.random.default_rng(0)
A, B, C, D = (png(RNG.integers(0, 256, (8, 8), np.uint8)) for _ in range(4))


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """A pipe or a device that is read would wait for ever; here it would end the test after ten seconds."""

    def give_up(*_: object) -> None:
        pytest.fail("something waits")  # no OSError, which a reader may take for an answer

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def roles(found: ImageSet) -> dict[str, str]:
    return dict(zip(found.table.file, found.table.role, strict=True))


def reasons(found: ImageSet) -> dict[str, str]:
    return dict(zip(found.rejected.file, found.rejected.reason, strict=True))


def refusal(name: str | Path) -> str:
    with pytest.raises(InputError) as refused:
        open_images(Location(name))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Built-in sets


def test_the_digits_are_those_of_scikit_learn() -> None:
    ours, theirs = open_images("digits"), load_digits()
    levels = np.rint(ours.pixels(GREY) / 255 * 16).astype(np.uint8).reshape(-1, 64)
    found = Counter((row.tobytes(), label) for row, label in zip(levels, ours.table.label, strict=True))
    wanted = Counter(
        (row.astype(np.uint8).tobytes(), str(label)) for row, label in zip(theirs.data, theirs.target, strict=True)
    )
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("digits", {"member": 600, "nonmember": 1000, "auxiliary": 197}),
        ("fashion", {"member": 500, "nonmember": 1000, "auxiliary": 2000}),
    ],
)
def test_the_roles_of_a_built_in_set_are_disjoint_and_as_large_as_stated(name: str, sizes: dict[str, int]) -> None:
    table = open_images(name).table
    assert Counter(table.role) == sizes
    assert table.image.is_unique


def test_each_role_of_a_built_in_set_holds_each_class_equally_often() -> None:
    digits = open_images("digits").table.groupby(["role", "label"]).size().unstack()
    assert digits.shape == (3, 10)
    assert (
        digits.loc[["member", "nonmember"]].max(axis=1) - digits.loc[["member", "nonmember"]].min(axis=1)
    ).max() <= 1
    fashion = open_images("fashion").table.groupby(["role", "label"]).size().unstack()
    assert fashion.shape == (3, 10)
    assert (fashion.min(axis=1) == fashion.max(axis=1)).all()


def test_no_fashion_picture_is_nearly_another_one() -> None:
    x = open_images("fashion").pixels(Profile((28, 28), 1)).reshape(3500, -1) / np.float32(255)
    square = (x**2).sum(axis=1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / 784)
    np.fill_diagonal(distance, 1)
    assert distance.min() >= 0.06 - 1e-4  # root mean square, pixels in [0, 1]


def test_a_caption_names_what_the_label_says() -> None:
    digits = open_images("digits").table
    assert set(digits.caption[digits.label == "7"]) == {"the handwritten digit seven"}
    assert digits.groupby("label").caption.nunique().eq(1).all()
    assert open_images("fashion").table.groupby("caption").label.nunique().eq(1).all()


def test_a_damaged_built_in_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (images.ASSETS / "images" / "digits.parquet").read_bytes()
    table = open_images("digits").table
    monkeypatch.setattr(images, "ASSETS", tmp_path)
    with pytest.raises(InputError, match="missing or damaged; restore it"):
        images.built_in.__wrapped__("digits")
    chance, refused = random.Random(0), 0
    for _ in range(60):
        bit = chance.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        folder_of(tmp_path, {"images/digits.parquet": bytes(changed)})
        try:
            pd.testing.assert_frame_equal(images.built_in.__wrapped__("digits").table, table)
        except InputError:
            refused += 1
    assert refused > 40  # the rest are bits that say nothing about the pictures


# Folders


def test_folders_give_the_roles_and_sub_folders_the_labels(tmp_path: Path) -> None:
    files = {"member/cat/a.png": A, "member/b.png": B, "nonmember/dog/small/c.png": C, "auxiliary/d.png": D}
    found = open_images(Location(folder_of(tmp_path, files)))
    assert roles(found) == {
        "member/b.png": "member",
        "member/cat/a.png": "member",
        "nonmember/dog/small/c.png": "nonmember",
        "auxiliary/d.png": "auxiliary",
    }
    assert dict(zip(found.table.file, found.table.label, strict=True))["nonmember/dog/small/c.png"] == "dog/small"
    assert found.rejected.empty


def test_metadata_gives_roles_labels_and_captions(tmp_path: Path) -> None:
    lines = [
        "file_name,member,label,text",
        'a.png,True,7,"a cat, seen from above"',
        "sub/b.png, nonmember ,NA,",
        "c.png,auxiliary,,x",
    ]
    files = {"a.png": A, "sub/b.png": B, "c.png": C, "metadata.csv": "\n".join(lines).encode()}
    found = open_images(Location(folder_of(tmp_path, files)))
    assert roles(found) == {"a.png": "member", "sub/b.png": "nonmember", "c.png": "auxiliary"}
    assert found.table.label.tolist() == ["7", "NA", ""]
    assert found.table.caption.tolist() == ["a cat, seen from above", "", "x"]


def test_metadata_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    table = b"\xef\xbb\xbffile_name,member\r\na.png,1\r\nb.png,0\r\n"  # with a byte order mark
    found = open_images(Location(folder_of(tmp_path, {"a.png": A, "b.png": B, "metadata.csv": table})))
    assert roles(found) == {"a.png": "member", "b.png": "nonmember"}


BAD_METADATA = {
    "no column member": (b"file_name,label\na.png,1\n", "has no column 'member'"),
    "no column file_name": (b"file,member\na.png,1\n", "has no column 'file_name'"),
    "an unclear role": (b"file_name,member\na.png,perhaps\n", "has 'perhaps' in its column member"),
    "an empty role": (b"file_name,member\na.png\n", "has '' in its column member"),
    "a path upwards": (b"file_name,member\n../a.png,1\n", "lies outside the folder"),
    "a path upwards in between": (b"file_name,member\nsub/../../a.png,1\n", "lies outside the folder"),
    "an absolute path": (b"file_name,member\n/etc/passwd,1\n", "lies outside the folder"),
    "nothing": (b"", "cannot be read as CSV"),
    "rows that do not match": (b"file_name,member\na.png,1\na.png,1,2\n", "cannot be read as CSV"),
    "another encoding": (b"file_name,member\n\xe9.png,1\n", "cannot be read as CSV"),
    "no rows": (b"file_name,member\n", "No picture in"),
    "only missing files": (b"file_name,member\nz.png,1\n", "z.png: the file cannot be opened"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_unusable_metadata_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    table, expected = BAD_METADATA[name]
    assert expected in refusal(folder_of(tmp_path, {"a.png": A, "metadata.csv": table}))


def test_a_row_that_names_no_file_is_listed_and_the_others_are_used(tmp_path: Path) -> None:
    table = b'file_name,member\n,1\nsub,1\n"x\0y",1\na.png,1\n'
    found = open_images(Location(folder_of(tmp_path, {"a.png": A, "sub/b.png": B, "metadata.csv": table})))
    assert roles(found) == {"a.png": "member"}
    assert reasons(found) == {
        "": "not a regular file",
        "sub": "not a regular file",
        "x\0y": "the file cannot be opened",
    }


def test_a_folder_of_no_layout_says_nothing_of_members_and_cannot_be_compared(tmp_path: Path) -> None:
    found = open_images(Location(folder_of(tmp_path, {"a.png": A, "b.png": B})))
    assert [*found.table.role] == ["", ""]
    with pytest.raises(InputError, match="says of no picture whether it is a member") as refused:
        plan(Run(images=Location(tmp_path)))
    assert "\n" not in str(refused.value)


def test_a_folder_without_usable_pictures_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "member").mkdir()
    assert refusal(tmp_path).endswith("supported are PNG, JPEG, WEBP, BMP, GIF, TIFF.")
    folder_of(tmp_path, {"member/.hidden.png": A, "member/Thumbs.db": b"x", "nonmember/page.png": b"<html>"})
    assert "The first reason: nonmember/page.png: not a supported picture" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["", "nowhere", "no/where", "x" * 5000, "a\0b", "\udcff", "~/pictures", "http://a/b"])
def test_a_name_that_is_nothing_is_refused_with_the_names_that_are(name: str) -> None:
    assert "the built-in sets are digits, fashion" in refusal(name)


ELSEWHERE = [
    "{}", "{}/a.zip", "member={},nonmember={}", "member=digits,nonmember={}", "{}/s.npz@{}", "{}/s.npz@digits",
    "hub:x/y", "member=hub:x/y", "{}/s.npz@hub:x/y",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.usefixtures("as_in_the_app")
def test_a_plain_string_opens_no_set_that_is_not_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: pytest.fail("fetched")))
    folder = folder_of(tmp_path / "set", {"member/a.png": A, "nonmember/b.png": B})
    with watched() as seen, pytest.raises(InputError, match=r"There is no built-in image set"):
        open_images(name.format(folder, folder))
    assert not [one for one in seen if str(folder) in one.path]
    with watched() as seen:
        open_images(Location(folder))
    assert [one for one in seen if str(folder) in one.path]  # or nothing would be seen above either


def test_a_file_is_refused_as_a_set(tmp_path: Path) -> None:
    assert "a.png is a file; name a folder" in refusal(folder_of(tmp_path, {"a.png": A}) / "a.png")


def test_what_is_no_regular_file_is_listed_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, {"member/a.png": A, "nonmember/b.png": B})
    member = tmp_path / "member"
    os.mkfifo(member / "pipe.png")
    for name, target in {
        "device.png": "/dev/zero",
        "linked-pipe.png": "pipe.png",
        "loop.png": "loop.png",
        "missing.png": "nothing",
        "up": tmp_path,
    }.items():
        (member / name).symlink_to(target)
    with socket.socket(socket.AF_UNIX) as connection:
        monkeypatch.chdir(member)  # the name of a socket must be short
        connection.bind("socket.png")
    found = open_images(Location(tmp_path))
    assert roles(found) == {"member/a.png": "member", "nonmember/b.png": "nonmember"}
    assert reasons(found) == {
        "member/device.png": "not a regular file",
        "member/linked-pipe.png": "not a regular file",
        "member/loop.png": "the file cannot be opened",
        "member/missing.png": "the file cannot be opened",
        "member/pipe.png": "not a regular file",
        "member/socket.png": "the file cannot be opened",
        "member/up": "not a regular file",
    }


def test_a_link_to_a_picture_is_that_picture(tmp_path: Path) -> None:
    folder_of(tmp_path, {"elsewhere/a.png": A, "nonmember/b.png": B, "member/c.png": C})
    (tmp_path / "member" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    found = open_images(Location(tmp_path))
    assert roles(found)["member/a.png"] == "member"
    assert len(found) == 3


def test_a_folder_that_cannot_be_listed_is_refused_and_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, {"member/a.png": A, "member/secret/b.png": B, "nonmember/c.png": C})
    listing = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert "secret cannot be listed" in refusal(tmp_path)


def test_files_that_are_no_pictures_are_listed_with_the_reason(tmp_path: Path) -> None:
    files = {"member/a.png": A, "member/half.png": A[: len(A) // 2], "nonmember/page.png": b"<html>", "member/0": b""}
    found = open_images(Location(folder_of(tmp_path, files)))
    assert roles(found) == {"member/a.png": "member"}
    assert reasons(found).keys() == {"member/half.png", "nonmember/page.png", "member/0"}
    assert reasons(found)["member/0"] == "the file is empty"
    assert "damaged" in reasons(found)["member/half.png"]


def test_a_picture_in_both_roles_is_left_out_everywhere(tmp_path: Path) -> None:
    files = {"member/a.png": A, "member/b.png": B, "nonmember/again.png": A, "nonmember/c.png": C}
    found = open_images(Location(folder_of(tmp_path, files)))
    assert roles(found) == {"member/b.png": "member", "nonmember/c.png": "nonmember"}
    both = "the same picture is also listed with another role"
    assert reasons(found) == {"member/a.png": both, "nonmember/again.png": both}


def test_a_picture_twice_in_a_role_is_used_once(tmp_path: Path) -> None:
    files = {"member/a.png": A, "member/copy.png": A, "nonmember/c.png": C}
    found = open_images(Location(folder_of(tmp_path, files)))
    assert roles(found) == {"member/a.png": "member", "nonmember/c.png": "nonmember"}
    assert reasons(found) == {"member/copy.png": "the same picture is listed twice"}


def test_equal_names_with_other_bytes_are_two_pictures(tmp_path: Path) -> None:
    found = open_images(Location(folder_of(tmp_path, {"member/x/a.png": A, "member/y/a.png": B, "nonmember/c.png": C})))
    assert len(found) == 3


def test_names_that_are_no_text_can_be_used_and_shown(tmp_path: Path) -> None:
    odd = os.fsdecode(b"nonmember/\xff/b\xfe.png")
    found = open_images(Location(folder_of(tmp_path, {"member/a.png": A, odd: B})))
    assert found.table.file.tolist() == [
        "member/a.png",
        "nonmember/\N{REPLACEMENT CHARACTER}/b\N{REPLACEMENT CHARACTER}.png",
    ]
    assert found.pixels(GREY).shape == (2, 8, 8, 1)
    found.table.to_csv(tmp_path / "table.csv")


def test_a_picture_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    found = open_images(Location(folder_of(tmp_path, {"member/a.png": A, "nonmember/b.png": B})))
    (tmp_path / "member/a.png").write_bytes(C)
    with pytest.raises(InputError, match=r"a\.png was changed"):
        found.pixels(GREY)
    (tmp_path / "member/a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png was removed"):
        found.pixels(GREY)


# A set that is opened again


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded since; files count as old."""
    seen: list[bytes] = []

    def counted(read: Callable[[int], bytes], count: int) -> object:
        return look_through(lambda number: seen.append(read(number)) or seen[-1], count)

    monkeypatch.setattr(images, "look_through", counted)
    monkeypatch.setattr(images, "TICK", -(10**12))
    return seen


def later(path: Path) -> None:
    """As if it had been written a second later, which may be less than a clock's tick."""
    changed = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(changed, changed))


def rewritten(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    later(path)


TABLE = b"file_name,member,text\nmember/a.png,1,x\nnonmember/b.png,0,y\n"
FILES = {"member/a.png": A, "nonmember/b.png": B, "metadata.csv": TABLE}


def test_an_unchanged_folder_is_not_read_again(
    tmp_path: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Location(folder_of(tmp_path / "set", FILES))
    first = open_images(folder)
    assert sorted(opened) == sorted([A, B])

    def refuse(*_: object) -> None:
        pytest.fail("a file is read")

    with monkeypatch.context() as patched:
        patched.setattr(layouts, "read_regular", refuse)
        again = open_images(folder)
        joined = [plan(Run(images=folder, attacks=("PIA",))).images for _ in range(2)]
    assert len(opened) == 2
    assert again.digest == first.digest
    assert sorted(joined[0].table.image) == sorted(joined[1].table.image) == sorted(first.table.image)
    assert again.read(0) == A


def test_another_process_need_not_look_through_an_unchanged_folder(tmp_path: Path, opened: list[bytes]) -> None:
    folder = folder_of(tmp_path / "set", {"member/a.png": A, "nonmember/b.png": B, "member/c.png": b"no picture"})
    first = open_images(Location(folder))
    images.remembered.cache_clear()  # as in a process that has just begun
    again = open_images(Location(folder))
    assert sorted(opened) == sorted([A, B, b"no picture"])
    pd.testing.assert_frame_equal(again.table, first.table)
    pd.testing.assert_frame_equal(again.rejected, first.rejected)
    rewritten(folder / "member/a.png", C)
    assert images.sha256(C) in set(open_images(Location(folder)).table.image)


def test_a_picture_that_could_not_be_read_for_a_while_is_not_left_out_for_good(
    tmp_path: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "set", {"member/a.png": A, "nonmember/b.png": B, "member/c.png": b"no picture"})
    reading = os.open

    def fail(path: object, *how: object) -> int:
        if str(path).endswith("a.png"):
            raise OSError(errno.EIO, "the disk does not answer")
        return reading(path, *how)

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", fail)
        assert len(open_images(Location(folder))) == 1
    images.remembered.cache_clear()
    assert {*open_images(Location(folder)).table.image} == {images.sha256(A), images.sha256(B)}
    assert sorted(opened) == sorted([A, B, b"no picture"])  # what was seen is not looked at again


def test_a_change_behind_the_same_stamp_is_noticed_and_forgotten(tmp_path: Path, opened: list[bytes]) -> None:
    folder = folder_of(tmp_path / "set", FILES)
    found, state = open_images(Location(folder)), layouts.stamps(str(folder))
    (folder / "member/a.png").write_bytes(C)
    for count in (1, 2):
        images.remembered.cache_clear()
        images.remembered(str(folder), state)  # as if no stamp had changed
        assert len(opened) == 2 * count
        with pytest.raises(InputError, match=r"a\.png was changed while it was in use; open the set again"):
            found.read(0)


CHANGES: dict[str, Callable[[Path], None]] = {
    "a picture": lambda folder: rewritten(folder / "member/a.png", C),
    "a picture added": lambda folder: (folder / "metadata.csv").write_bytes(TABLE + b"new.png,1,z\n"),
    "a picture removed": lambda folder: (folder / "member/a.png").unlink(),
    "a picture renamed": lambda folder: (folder / "member/a.png").rename(folder / "member/z.png"),
    "a role": lambda folder: rewritten(folder / "metadata.csv", TABLE.replace(b"1,x", b"0,x")),
    "a caption": lambda folder: rewritten(folder / "metadata.csv", TABLE.replace(b",y", b",z")),
    "no table any more": lambda folder: (folder / "metadata.csv").unlink(),
    "a picture behind a link": lambda folder: rewritten(folder.parent / "elsewhere/d.png", C),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_when_a_set_is_opened_again(tmp_path: Path, opened: list[bytes], change: str) -> None:
    folder_of(tmp_path / "elsewhere", {"d.png": D})
    folder = folder_of(tmp_path / "set", FILES | {"new.png": C, "metadata.csv": TABLE + b"d.png,0,\n"})
    (folder / "d.png").symlink_to(tmp_path / "elsewhere/d.png")
    before = open_images(Location(folder))
    CHANGES[change](folder)
    after = open_images(Location(folder))
    images.remembered.cache_clear()
    pd.testing.assert_frame_equal(after.table, open_images(Location(folder)).table)
    assert not after.table.equals(before.table)


def test_a_file_added_to_or_removed_from_a_folder_is_seen(tmp_path: Path, opened: list[bytes]) -> None:
    folder = folder_of(tmp_path, {"member/a.png": A, "nonmember/b.png": B})
    assert len(open_images(Location(folder))) == 2
    folder_of(folder, {"member/deep/c.png": C, "auxiliary/d.png": D})
    assert len(open_images(Location(folder))) == 4
    (folder / "member/a.png").unlink()
    assert set(open_images(Location(folder)).table.image) == {images.sha256(data) for data in (B, C, D)}


def test_what_has_just_been_written_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within a tick of the file system's clock may leave the same stamp."""
    now = time.time_ns() + 10**11
    monkeypatch.setattr(images, "stamps", lambda path: (layouts.Stamp(path, 0, 0, now),))
    for data in (A, B, C):
        found = open_images(Location(folder_of(tmp_path, {"member/a.png": data})))
        assert [*found.table.image] == [images.sha256(data)]


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(C), Path.unlink])
def test_a_change_that_no_stamp_shows_is_refused_once_and_seen_afterwards(
    tmp_path: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(images, "stamps", lambda path: (layouts.Stamp(path, 0, 0, 0),))
    folder = folder_of(tmp_path, {"member/a.png": A, "member/b.png": B})
    open_images(Location(folder))
    change(folder / "member/a.png")
    with pytest.raises(InputError, match="open the set again"):
        open_images(Location(folder)).read(0)
    again = open_images(Location(folder))
    assert all(images.sha256(again.read(row)) == image for row, image in again.table.image.items())


def test_a_refused_set_is_read_again(tmp_path: Path, opened: list[bytes]) -> None:
    assert "There is no image set" in refusal(tmp_path / "set")
    assert len(open_images(Location(folder_of(tmp_path / "set", {"a.png": A})))) == 1


# What a set can do


def test_pixels_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    found = open_images(Location(folder_of(tmp_path, {"member/a.png": A, "member/b.png": B, "nonmember/c.png": C})))
    alone = [found.with_role("nonmember").pixels(GREY), found.with_role("member").pixels(GREY)]
    assert np.array_equal(found.pixels(GREY)[2:], alone[0])
    assert np.array_equal(found.pixels(GREY)[:2], alone[1])
    assert found.with_role("auxiliary").pixels(Profile((4, 6), 3)).shape == (0, 4, 6, 3)


@pytest.mark.parametrize(("members", "nonmembers"), [(5, 5), (2, 7), (7, 2)])
def test_a_limit_takes_as_many_members_as_non_members_while_there_are(
    tmp_path: Path, members: int, nonmembers: int
) -> None:
    fresh = (png(RNG.integers(0, 256, (8, 8), np.uint8)) for _ in itertools.count())
    files = {f"member/{k}.png": next(fresh) for k in range(members)}
    files |= {f"nonmember/{k}.png": next(fresh) for k in range(nonmembers)}
    found = open_images(Location(folder_of(tmp_path, files)))
    for count in range(1, members + nonmembers + 2):
        kept = Counter(found.limit(count).table.role)
        assert kept.total() == min(count, members + nonmembers)
        balanced = abs(kept["member"] - kept["nonmember"]) <= 1
        assert balanced or kept["member"] == members or kept["nonmember"] == nonmembers
        assert found.limit(count).table.index.is_monotonic_increasing
        assert set(found.limit(count).table.image) <= set(found.limit(count + 1).table.image)
    assert len(found.limit(None)) == members + nonmembers


def test_a_digest_is_decided_by_the_pictures_and_their_order_alone(tmp_path: Path) -> None:
    one = open_images(Location(folder_of(tmp_path / "one", {"member/a.png": A, "nonmember/b.png": B})))
    same = open_images(Location(folder_of(tmp_path / "two", {"member/z.png": A, "nonmember/y.png": B})))
    turned = open_images(Location(folder_of(tmp_path / "three", {"member/a.png": B, "nonmember/b.png": A})))
    other = open_images(Location(folder_of(tmp_path / "four", {"member/a.png": A, "nonmember/b.png": C})))
    assert one.digest == same.digest
    assert len({one.digest, turned.digest, other.digest}) == 3


def test_a_mixed_set_holds_the_same_pictures_and_each_part_is_like_the_whole() -> None:
    images = open_images("digits").with_role("member", "nonmember")
    mixed = images.mixed()
    assert sorted(mixed.table.index) == sorted(images.table.index)
    for start in range(0, len(mixed) - 64, 64):
        assert abs(mixed.table.role.iloc[start : start + 64].eq("member").mean() - 600 / 1600) < 0.02
