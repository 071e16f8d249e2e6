"""Files and folders that are full, torn, foreign, packed or from the future: a sentence, and nothing lost."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from oms_core import cache, captions, images, layouts
from oms_core.__main__ import STOPPED, main
from oms_core.assemble import png
from oms_core.convert import convert
from oms_core.decode import decode
from oms_core.errors import InputError
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.plain_text import UNSHOWN, csv_of, visible
from oms_core.training import loop
from oms_core.training.recipes import RECIPES
from oms_core.uploads import received
from oms_core.writing import replace_file, whole_folder, write_file

ROOT = Path(__file__).resolve().parent.parent
A, B, C = (png(np.full((8, 8), shade, np.uint8)) for shade in (10, 20, 30))
MB = 2**20


def refusal(work: Callable[[], object]) -> str:
    """The one sentence by which something is refused, which takes no memory to speak of."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        work()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert "\n" not in str(refused.value)
    return str(refused.value)


# The cache works or is absent


def a_file(folder: Path) -> None:
    folder.write_text("")


def a_dangling_link(folder: Path) -> None:
    folder.symlink_to("/nonexistent/folder")


def a_loop(folder: Path) -> None:
    folder.symlink_to(folder)


def a_file_below(folder: Path) -> None:
    folder.mkdir()
    (folder / cache.FORMAT).write_text("")


def use_cache() -> None:
    """Everything that is asked of a cache."""
    content, rows = {"a": 1}, pd.DataFrame({"image": ["x"], "caption": ["y"]})
    entry = cache.Entry(cache.key_of(content), cache.COUNTED, 1)
    assert cache.counted(content, lambda: rows).equals(rows)
    assert cache.begun(entry.key, cache.COUNTED) == 0
    entry.read(0)
    assert not entry.write(0, rows)
    entry.finish(content)
    cache.read_finished(entry.folder, entry.key)
    cache.set_aside(entry.folder, "it is damaged")
    cache.add_notes(entry.key, rows)
    assert [*cache.read_notes(entry.key, set())] == []
    assert captions.said(Path(os.path.realpath(cache.home())), entry.key) == {}
    assert not cache.is_counted(content)
    cache.forget(content)


@pytest.mark.parametrize("place", [a_file, a_dangling_link, a_loop, a_file_below])
def test_without_a_usable_folder_nothing_is_kept_and_one_warning_says_so(
    cache_folder: Path, caplog: pytest.LogCaptureFixture, place: Callable[[Path], None]
) -> None:
    place(cache_folder)
    use_cache()
    said = [record.getMessage() for record in caplog.records if "damaged" not in record.getMessage()]
    assert len(said) == 1
    assert f"Results are not kept: {cache_folder} cannot be read or written" in said[0]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("calls", [("listdir",), ("mkdir",), ("listdir", "scandir", "mkdir", "open", "stat", "link")])
def test_whatever_a_foreign_folder_refuses_is_one_warning(
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: int,
    calls: tuple[str, ...],
) -> None:
    def refusing(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *rest: object, **options: object) -> object:
            if str(path).startswith(str(cache_folder)):
                raise OSError(error, os.strerror(error), str(path))
            return real(path, *rest, **options)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    content, rows = {"a": 1}, pd.DataFrame({"image": ["x"]})
    for _ in range(2):
        assert cache.counted(content, lambda: rows).equals(rows)
        cache.begun(cache.key_of(content), cache.COUNTED)
        [*cache.read_notes(cache.key_of(content), set())]
    assert sum("Results are not kept" in record.getMessage() for record in caplog.records) == 1


def test_a_command_works_without_a_cache(
    cache_folder: Path, pipeline: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_file(cache_folder)
    arguments = ["score", "--model", str(pipeline), "--images", str(pictures), "--attack", "NA,PIA", "--json"]
    assert main(arguments) == 0
    without = json.loads(capsys.readouterr().out)
    cache_folder.unlink()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == without


# A file is whole or as it was


def failing(patch: pytest.MonkeyPatch, fail_at: int, error: int) -> list[str]:
    """Have the n-th call that reaches the disk fail; the names of those that failed."""
    calls, failed = itertools.count(1), []

    def step(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if next(calls) == fail_at:
                failed.append(name)
                raise OSError(error, os.strerror(error))
            return real(*arguments, **options)

        return call

    class Disk(io.FileIO):
        def write(self, data: bytes) -> int:
            return step("write", super().write)(data[: max(1, len(data) // 2)])

    def opening(path: object, mode: str = "r", *rest: object, **options: object) -> object:
        if mode != "xb":
            return real_open(path, mode, *rest, **options)
        return io.BufferedWriter(step("open", Disk)(path, "xb"), 16)

    real_open = open
    patch.setattr("builtins.open", opening)
    for name in ("fsync", "replace", "chmod", "rename", "mkdir"):
        patch.setattr(os, name, step(name, getattr(os, name)))
    return failed


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("old", [b"old" * 50, None])
def test_whichever_call_fails_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, error: int, old: bytes | None
) -> None:
    path, new, seen = tmp_path / "figure.html", b"new" * 100, set()
    for fail_at in itertools.count(1):
        if old:
            path.write_bytes(old)
        with pytest.MonkeyPatch.context() as patch:
            failed = failing(patch, fail_at, error)
            try:
                write_file(path, new)
                said = ""
            except InputError as sentence:
                said = str(sentence)
        refused = f"{path} cannot be written ({os.strerror(error)}); choose another place with --out."
        assert said == refused or failed in ([], ["fsync"])  # of the folder's names, when the file is whole already
        left = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
        assert left == {path.name: old if said else new} if old or not said else left == {}
        path.unlink(missing_ok=True)
        seen |= {*failed}
        if not failed:
            break
    assert seen >= {"open", "write", "fsync", "replace"}


@pytest.mark.parametrize("old", [True, False])
def test_whichever_call_fails_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "deep" / "model"
    for fail_at in itertools.count(1):
        if old:
            path.mkdir(parents=True)
            (path / "a").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            failed = failing(patch, fail_at, errno.ENOSPC)
            try:
                with whole_folder(path) as made:
                    (made / "a").write_text("new")
                refused = False
            except OSError:
                refused = True
        left = {str(one.relative_to(tmp_path)): one.is_file() and one.read_text() for one in tmp_path.rglob("*")}
        whole = {"deep": False, "deep/model": False}
        assert left == (
            (whole | {"deep/model/a": "old"} if old else {}) if refused else whole | {"deep/model/a": "new"}
        )
        for one in sorted(tmp_path.rglob("*"), reverse=True):
            one.rmdir() if one.is_dir() else one.unlink()
        if not failed:
            break
    assert fail_at > 4


def test_a_link_is_followed_and_the_rights_of_a_file_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    replace_file(tmp_path / ("n" * 250), b"a long name")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to a folder": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_never_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out.csv"
    NO_FILES[name](path)
    before = path.lstat()
    assert "it is there and is not a file" in refusal(lambda: write_file(path, b"new"))
    assert path.lstat().st_ino == before.st_ino


def test_a_write_protected_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.csv").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "it is write-protected" in refusal(lambda: write_file(tmp_path / "out.csv", b"new"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def commands(model: Path, pictures: Path, out: Path) -> dict[str, list[str]]:
    of = ["--model", str(model), "--images", str(pictures)]
    return {
        "figure": ["figure", "D1", *of, "--out", str(out / "f.html")],
        "csv": ["score", *of, "--attack", "NA", "--out", str(out / "s.csv")],
        "parquet": ["score", *of, "--attack", "NA", "--out", str(out / "s.parquet")],
    }


@pytest.mark.parametrize("name", ["figure", "csv", "parquet"])
def test_on_a_full_disk_a_command_leaves_the_good_file_and_one_sentence(
    tmp_path: Path, pipeline: Path, pictures: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = commands(pipeline, pictures, out)[name]
    assert main(command) == 0
    (file,) = out.iterdir()
    good = file.read_bytes()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == f"{file} cannot be written (No space left on device); choose another place with --out."
    assert [one.read_bytes() for one in out.iterdir()] == [good]


# What is packed is measured before it is unpacked


ONE = torch.zeros(1)


def uvit(width: int, tokens: int, blocks: int = 2) -> dict[str, torch.Tensor]:
    """A U-ViT whose tensors are one number, seen as many."""
    shapes = {"pos_embed": ONE.expand(1, tokens, width), "patch_embed.proj.weight": ONE.expand(width, 1, 2, 2)}
    return shapes | {f"in_blocks.{k}.x": ONE for k in range(blocks)}


def deep_uvit() -> dict[str, torch.Tensor]:
    patches = {"pos_embed": torch.zeros(1, 17, 64), "patch_embed.proj.weight": torch.zeros(64, 1, 2, 2)}
    return patches | {f"in_blocks.{k}.x": torch.zeros(1) for k in range(5000)}


def one_memory() -> dict[str, torch.Tensor]:
    """Many tensors that are one."""
    weight = torch.zeros(256, 256)
    patches = {"pos_embed": torch.zeros(1, 17, 64), "patch_embed.proj.weight": torch.zeros(64, 1, 2, 2)}
    return patches | {f"in_blocks.0.{k}": weight for k in range(1000)}


def ddpm(**changes: torch.Tensor) -> dict[str, object]:
    state = {"head.weight": torch.zeros(32, 1, 3, 3), "downblocks.0.block1.2.weight": torch.zeros(32, 32, 3, 3)}
    return {"ema_model": state | {name.replace("__", "."): value for name, value in changes.items()}, "x_T": ONE}


BOMBS: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "a width of one number": (lambda: uvit(12_000, 17), "'pos_embed' is no tensor that it holds"),
    "a greater width": (lambda: uvit(10**6, 17), "'pos_embed' is no tensor that it holds"),
    "tokens without end": (lambda: uvit(64, 10**10), "'pos_embed' is no tensor that it holds"),
    "tensors without numbers": (lambda: uvit(64, 17) | {"pos_embed": torch.zeros(1, 0, 10**9)}, "is no tensor"),
    "tensors without memory": (lambda: uvit(64, 17) | {"pos_embed": torch.zeros(1, 17, 64, device="meta")}, "is no te"),
    "sparse tensors": (lambda: uvit(64, 17) | {"in_blocks.0.x": torch.zeros(9, 9).to_sparse()}, "is no tensor"),
    "no tensors": (lambda: deep_uvit() | {"in_blocks.0.x": 1}, "'in_blocks.0.x' is no tensor that it holds"),
    "numbers for names": (lambda: deep_uvit() | {7: ONE}, "'7' is no tensor that it holds"),
    "one memory for all": (one_memory, "its tensors are larger than the file"),
    "blocks without end": (deep_uvit, "it has 10000 blocks, at most 200 are supported"),
    "a block of a great number": (lambda: ddpm(downblocks__999999999__x=ONE), "at most 200 are supported"),
    "a picture of one number": (lambda: ddpm() | {"x_T": ONE.expand(10**6, 10**6)}, "'x_T' is no tensor"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_checkpoint_that_is_larger_than_its_file_is_refused(tmp_path: Path, name: str) -> None:
    content, expected = BOMBS[name]
    torch.save(content(), tmp_path / "x.pt")
    assert expected in refusal(lambda: convert(tmp_path / "x.pt", tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == ["x.pt"]


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.zeros(1)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, bytes(512 * MB) if name.endswith("data/0") else plain.read(name))
    said = refusal(lambda: convert(tmp_path / "x.pt", tmp_path / "out"))
    assert "x.pt is packed, and unpacks to more than it is; load it in torch and save it again" in said


def packed_split(path: Path, count: int) -> Path:
    """A split whose arrays are said to have so many numbers, all zero."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in images.SPLIT:
            with archive.open(f"{name}.npy", "w") as file:
                file.write(header.getvalue())
                for _ in range(count // MB):
                    file.write(bytes(8 * MB))
    return path


def lying_split(path: Path) -> Path:
    """A split whose headers promise more than there is."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in images.SPLIT:
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(80))
    return path


@pytest.mark.parametrize("make", [lambda path: packed_split(path, 64 * MB), lying_split])
def test_a_split_that_unpacks_to_more_than_a_set_could_have_is_refused(
    tmp_path: Path, pictures: Path, make: Callable[[Path], Path]
) -> None:
    name = f"{make(tmp_path / 's.npz')}@{pictures}"
    assert "holds no mia_train_idxs and mia_eval_idxs that can be read" in refusal(lambda: open_images(Location(name)))


def packed_groups(path: Path) -> None:
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())]), compression="zstd", use_dictionary=False) as file:
        file.write_table(pa.table({"image": pa.array([bytes(MB)] * 300)}))


def rows_of_nothing(path: Path) -> None:
    pq.write_table(pa.table({"image": pa.nulls(10**7, pa.binary())}), path)


def endless_text(path: Path) -> None:
    pq.write_table(pa.table({"image": [A] * 1000, "text": ["x" * MB] * 1000}), path, compression="zstd")


PACKED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a row group": (packed_groups, "unpacks to 300 MB in one row group, from 0 MB; write it in smaller row groups"),
    "rows": (rows_of_nothing, "holds 10,000,000 pictures, at most 2,000,000 are supported"),
    "a text": (endless_text, "holds a text of more than 64 kB beside a picture"),
}


@pytest.mark.parametrize("name", PACKED)
def test_parquet_that_unpacks_to_more_than_memory_should_hold_is_refused(tmp_path: Path, name: str) -> None:
    write, expected = PACKED[name]
    write(tmp_path / "x.parquet")
    assert expected in refusal(lambda: open_images(Location(tmp_path / "x.parquet")))


def test_a_picture_that_is_stored_once_and_named_in_many_rows_is_once_in_memory(tmp_path: Path) -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8))
    rows = {"image": [{"bytes": noise, "path": "a"}] * 2000, "text": [["a", "b"], [], None, ["c"]] * 500}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = images.located(Location(tmp_path / "x.parquet"))
    assert found.read(1999) == noise
    assert [one.caption for one in found.listed[:4]] == ["a", "", "", "c"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def sparse_cifar(folder: Path) -> None:
    with (folder / "train.bin").open("wb") as file:
        file.truncate(3074 * 3 * 10**6)


def small_parts(folder: Path) -> None:
    (folder / "caption.json").write_bytes(b"[" + b"[]," * 10**7 + b"[]]")


def long_caption(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"x" * MB)


def many_columns(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(b"," * 10**7 + b"\na.png,1\n")


def open_quote(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(b'file_name,member,text\na.png,1,"x\nb.png,0,y\n')


LARGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "CIFAR": (sparse_cifar, "holds 3,000,000 pictures, at most 2,000,000 are supported"),
    "captions": (small_parts, "caption.json in "),
    "a caption": (long_caption, "holds no caption that can be read: the file is larger than 64 kB"),
    "columns": (many_columns, "has no column 'file_name'"),
    "a quote that never ends": (open_quote, "cannot be read as CSV"),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_describes_pictures_is_bounded(tmp_path: Path, name: str) -> None:
    write, expected = LARGE[name]
    (tmp_path / "a.png").write_bytes(A)
    write(tmp_path)
    assert expected in refusal(lambda: open_images(Location(tmp_path)))


def test_a_zip_with_an_endless_list_of_entries_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.png", A)
    assert len(open_images(Location(tmp_path / "x.zip"))) == 1
    assert "is no complete zip archive" in refusal(lambda: layouts.Zip(tmp_path / "x.zip", longest=1000).files)


# Two entries of one name


def doubled(*entries: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_every_entry_of_a_name_is_taken_from_an_upload() -> None:
    sent = doubled(("a.png", A), ("a.png (2)", C), ("a.png", B))
    found = received([("x.zip", sent)])
    kept = {row.file: decode(found.read(row.Index))[0].tobytes() for row in found.table.itertuples()}
    assert {*kept} > {"a.png", "a.png (2)"}
    assert sorted(kept.values()) == sorted(decode(data)[0].tobytes() for data in (A, B, C))
    assert found.rejected.empty


def test_an_entry_without_a_name_is_taken() -> None:
    sent = doubled(("name.png", A), ("b/", b"")).replace(b"name.png", b"\0ame.png")  # a name ends at a zero byte
    assert [*received([("x.zip", sent)]).table.file] == ["unnamed"]


@pytest.mark.parametrize("name", ["member/a.png", "metadata.csv", "caption.json"])
def test_a_set_with_two_entries_of_a_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.zip").write_bytes(doubled((name, A), ("b.png", C), (name, B)))
    assert f"holds two entries called {name!r}" in refusal(lambda: open_images(Location(tmp_path / "x.zip")))


# A training goes on from what it wrote, or says that it cannot


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], loop.Training]:
    """A small training in a folder of its own; two epochs are done and saved one by one."""
    monkeypatch.setitem(
        RECIPES,
        "small",
        replace(RECIPES["ddpm-digits"], network={"blocks": (8, 8)}, epochs=3, snapshots=(3,), batch=300),
    )
    first = loop.Training("small", tmp_path / "work")
    for _ in range(2):
        first.losses.append(first.epoch())
        first.save()
    return lambda: loop.Training("small", tmp_path / "work")


def weights(one: loop.Training) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in one.parameters)


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "a flipped bit": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "an end that is missing": lambda data, at: data[:at],
    "something else": lambda data, at: b"x" * at,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_never_gives_other_weights(
    training: Callable[[], loop.Training], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole, before, fresh = training(), training(), weights(training())
    whole.resume()
    good, kept = whole.checkpoint.read_bytes(), whole.previous.read_bytes()
    before.checkpoint.write_bytes(kept)
    before.resume()
    assert (len(whole.losses), len(before.losses)) == (2, 1)
    for at in range(0, len(good), len(good) // 12):
        whole.checkpoint.write_bytes(DAMAGES[damage](good, at))
        caplog.clear()
        again = training()
        again.resume()
        assert weights(again) == weights(before) != fresh
        assert "is damaged; the training goes on from the checkpoint before it" in caplog.text
        again.previous.write_bytes(DAMAGES[damage](kept, at))
        refused = training()
        assert refusal(refused.resume) == f"{refused.checkpoint} is damaged; delete it to train from the start."
        assert weights(refused) == fresh
        again.previous.write_bytes(kept)
    again.losses.append(again.epoch())
    again.save()  # over the damaged one, which is not kept as the one before
    assert again.previous.read_bytes() == kept
    assert weights(again) == weights(whole)


def test_a_snapshot_that_changes_while_a_training_is_interrupted_is_noticed(
    training: Callable[[], loop.Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Training, "write_card", lambda *_: None)
    folder = training().run(tmp_path / "models")
    assert training().run(tmp_path / "models") == folder
    weights_file = next((folder / "epoch-0003").rglob("*.safetensors"))
    weights_file.write_bytes(DAMAGES["a flipped bit"](weights_file.read_bytes(), 5000))
    assert "epoch-0003 is damaged; restore it, or delete" in refusal(lambda: training().run(tmp_path / "models"))


def test_a_full_disk_leaves_the_checkpoint_and_no_half_snapshot(
    training: Callable[[], loop.Training], tmp_path: Path
) -> None:
    good = training().checkpoint.read_bytes()
    one = training()
    one.resume()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "small.pt cannot be written" in refusal(one.save)
        assert "small cannot be written" in refusal(lambda: training().run(tmp_path / "models"))
    assert one.checkpoint.read_bytes() == good
    assert sorted(path.name for path in one.checkpoint.parent.iterdir()) == ["small.previous.pt", "small.pt"]
    assert not (tmp_path / "models").exists()


# Text from outside is text


NAME = "\x1b]0;TITLE\x07\x1b[2J\x1b[31mred\nnext\u202e\x9b\u2028.png"


def unshown(text: str) -> set[str]:
    return {one for one in text if one != "\n" and unicodedata.category(one).startswith(UNSHOWN)}


def test_names_cannot_move_the_cursor_nor_begin_a_line(
    tmp_path: Path, pipeline: Path, save_pictures: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pictures(tmp_path / "\x1b[31mset", 8, 8)
    (folder / "member" / NAME).write_text("x")
    (folder / "member" / NAME.replace(".png", "2.png")).write_bytes(A)
    of = ["--model", str(pipeline), "--images", str(folder), "--attack", "NA"]
    for command in (
        ["images", str(folder)],
        ["score", *of],
        ["verdict", *of, "--reference", str(folder)],
        ["evaluate", *of],
        ["images", f"{folder}/\x1b[2J"],
        ["convert", "\x1b[2J\n", "--to", "\x1b"],
        ["list", "attacks", "--json"],
        ["images", str(folder), "--json"],
    ):
        main(command)
        said = capsys.readouterr()
        assert not unshown(said.out + said.err)
        assert not any(line.startswith("next") for line in (said.out + said.err).splitlines())
    with pytest.raises(SystemExit):
        main(["images", "a", "\x1b[2J"])
    assert not unshown(capsys.readouterr().err)


def test_visible_keeps_what_shows() -> None:
    for text in ("", "a b.png", "héllo 数字 😀", "a\tb"):
        assert visible(text) == text.replace("\t", "\N{REPLACEMENT CHARACTER}")


def test_no_csv_holds_a_formula(tmp_path: Path, pipeline: Path, pictures: Path) -> None:
    names = ["=1+1", "+1", "-1", "@x", "plain", "é", "x\r=1", "x\n=1", "\t=1"]
    rows = pd.read_csv(io.StringIO(csv_of(pd.DataFrame({"=file": names, "score": -0.5}))), keep_default_na=False)
    assert list(rows["'=file"]) == [f"'{name}" for name in names[:4]] + [visible(name) for name in names[4:]]
    assert (rows.score == -0.5).all()
    assert main(commands(pipeline, pictures, tmp_path)["csv"]) == 0
    assert main(commands(pipeline, pictures, tmp_path)["parquet"]) == 0
    kept, written = pd.read_parquet(tmp_path / "s.parquet"), pd.read_csv(tmp_path / "s.csv")
    assert (written.score.astype(np.float32) == kept.score).all()
    assert list(written.image) == list(kept.image)


# Ctrl-C


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "importtime", "-m", "oms_core", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("module", ["oms_core.errors", "numpy", "pandas", "oms_core.run", "torch._C", "diffusers"])
def test_ctrl_c_is_answered_in_a_sentence_while_modules_are_imported(module: str) -> None:
    process = started("score", "--attack", "NA", "--seed", "5")
    for line in process.stderr:  # a line for each module that has been imported
        if line.split("|")[-1].strip() in (module, f"{module}.utils"):
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait(60) == 130
    assert "".join(rest).strip() == STOPPED.strip()


# Files from the future


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pictures that were looked at."""
    seen: list[int] = []
    original = images.look_through
    monkeypatch.setattr(
        images, "look_through", lambda read, count: original(lambda k: seen.append(k) or read(k), count)
    )
    return seen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A clock that a test sets, in ns before the file system's."""
    behind = [0]
    real = time.time_ns
    monkeypatch.setattr(images.time, "time_ns", lambda: real() - behind[0])
    for function in (images.remembered, images.first_seen):
        function.cache_clear()
    yield behind
    for function in (images.remembered, images.first_seen):
        function.cache_clear()


DAY, SECOND = 86_400 * 10**9, 10**9


def another_process() -> None:
    images.remembered.cache_clear()
    images.first_seen.cache_clear()


@pytest.mark.parametrize("between", [lambda: None, another_process])
def test_a_set_from_the_future_is_read_until_it_has_been_seen_for_a_tick_and_once_more(
    tmp_path: Path, save_pictures: Callable[..., Path], looked: list[int], clock: list[int], between: Callable
) -> None:
    folder = Location(save_pictures(tmp_path / "set", 8, 8))
    clock[0] = DAY
    counts = []
    for ahead in (0, 0, 3, 3, 100):  # seconds after it was first seen
        clock[0] = DAY - ahead * SECOND
        between()
        open_images(folder)
        counts.append(len(looked))
    assert counts == [12, 24, 36, 36, 36]


def test_a_set_that_was_known_stays_known_when_the_clock_is_set_back(
    tmp_path: Path, save_pictures: Callable[..., Path], looked: list[int], clock: list[int]
) -> None:
    folder = Location(save_pictures(tmp_path / "set", 8, 8))
    clock[0] = -10 * SECOND  # ten seconds later
    open_images(folder)
    clock[0] = DAY
    another_process()
    open_images(folder)
    assert len(looked) == 12


def test_a_change_within_a_tick_is_noticed_whatever_the_clock_says(
    tmp_path: Path, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(A)
    now = time.time_ns()
    for behind in (0, 3600 * SECOND, DAY):
        clock[0] = behind
        monkeypatch.setattr(images, "stamps", lambda path, behind=behind: (layouts.Stamp(path, 0, behind, now),))
        for data in (A, B, C):
            (tmp_path / "a.png").write_bytes(data)
            assert [*open_images(Location(tmp_path)).table.image] == [images.sha256(data)]
