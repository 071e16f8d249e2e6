"""Results on disk: never a wrong one, never half a one, whatever happens to the files or the process."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from oms_core import cache
from oms_core.cache import Entry, Variant, key_of, read_finished, variants

CONTENT = {"model": "a", "t": 100, "norms": [2, 4]}
KEY = key_of(CONTENT)
VARIANT = Variant("cpu", "float32", 8, 3)
SHARDS = 2


def table(shard: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(shard)
    columns = {f"d({i},{j}) p={p}": rng.random(20, np.float32) for p in (2, 4) for i, j in ((0, 1), (0, 2), (1, 2))}
    return pd.DataFrame({"image": [rng.bytes(32).hex() for _ in range(20)], **columns})


def written() -> Entry:
    """A finished entry of two shards."""
    entry = Entry(KEY, VARIANT, SHARDS)
    assert all(entry.write(shard, table(shard)) for shard in range(SHARDS))
    entry.finish(CONTENT)
    return entry


def part(entry: Entry, shard: int = 0) -> Path:
    return cache.part(entry.folder, shard)


def both() -> pd.DataFrame:
    return pd.concat([table(0), table(1)], ignore_index=True)


def set_aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".bad-"))


def partial(folder: Path) -> list[str]:
    """Names of what is neither a whole part, a manifest, nor set aside."""
    known = re.compile(r"part-\d{6}\.parquet|manifest\.json|\.bad-.*")
    return [path.name for path in folder.iterdir() if not known.fullmatch(path.name)] if folder.is_dir() else []


# What is kept


def test_what_is_written_is_read_back() -> None:
    entry = written()
    for shard in range(SHARDS):
        pd.testing.assert_frame_equal(entry.read(shard), table(shard))
    assert list(variants(KEY)) == [(VARIANT, entry.folder)]
    pd.testing.assert_frame_equal(read_finished(entry.folder, KEY), both())


def test_bytes_and_whole_numbers_are_read_back_as_well() -> None:
    rows = pd.DataFrame({"n": range(3), "eps": [b"\0\xff", b"", b"abc"], "alpha": 0.5})
    entry = Entry(KEY, VARIANT, 1)
    assert entry.write(0, rows)
    pd.testing.assert_frame_equal(entry.read(0), rows)


def test_a_part_is_an_ordinary_parquet_file() -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(part(written())), table())


def test_an_unfinished_result_is_not_found_but_goes_on() -> None:
    entry = Entry(KEY, VARIANT, SHARDS)
    entry.write(0, table(0))
    entry.finish(CONTENT)
    assert list(variants(KEY)) == []
    pd.testing.assert_frame_equal(entry.read(0), table(0))
    assert entry.read(1) is None


def test_the_first_writer_wins() -> None:
    entry = Entry(KEY, VARIANT, 1)
    entry.write(0, table(0))
    assert entry.write(0, table(1))
    pd.testing.assert_frame_equal(entry.read(0), table(0))


def test_a_key_is_decided_by_content_and_not_by_the_order_of_its_names() -> None:
    assert key_of(dict(reversed(CONTENT.items()))) == KEY
    others = [CONTENT | {"t": 101}, CONTENT | {"norms": [4, 2]}, CONTENT | {"more": None}, {**CONTENT, "model": "b"}]
    assert len({KEY, *map(key_of, others)}) == 5


def test_the_name_of_a_variant_says_what_it_is() -> None:
    assert Variant.parse(str(VARIANT)) == VARIANT
    for name in ("", "manifest.json", ".bad-x", "cpu-float32-b8", "cpu-float32-bx-n3", "a-b-c-d-e"):
        assert Variant.parse(name) is None


def test_the_variant_of_the_fewest_steps_is_found_first() -> None:
    for steps in (10, 2, 5):
        entry = Entry(KEY, Variant("cpu", "float32", 8, steps), 1)
        entry.write(0, table())
        entry.finish(CONTENT)
    assert [variant.steps for variant, _ in variants(KEY)] == [2, 5, 10]


def test_a_result_is_for_its_owner_alone() -> None:
    assert written().folder.stat().st_mode & 0o077 == 0


def test_the_clock_does_not_matter() -> None:
    entry = written()
    for place, path in enumerate((*entry.folder.iterdir(), entry.folder)):
        os.utime(path, (place * 10**9, place * 10**9))  # 1970, 2001, 2033, ...
    pd.testing.assert_frame_equal(read_finished(entry.folder, KEY), both())


# Damage


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_flipped_bit_never_gives_a_wrong_table() -> None:
    entry = written()
    whole = {path: path.read_bytes() for path in entry.folder.iterdir()}
    chance = random.Random(0)
    for _ in range(100):
        victim = chance.choice(sorted(whole))
        victim.write_bytes(flipped(whole[victim], chance.randrange(8 * len(whole[victim]))))
        assert read_finished(entry.folder, KEY) is None
        assert not (entry.folder / "manifest.json").exists()
        assert list(variants(KEY)) == []
        shutil.rmtree(entry.folder)
        entry.folder.mkdir()
        for path, data in whole.items():
            path.write_bytes(data)
        pd.testing.assert_frame_equal(read_finished(entry.folder, KEY), both())


def test_a_flipped_bit_is_cured_by_computing_again() -> None:
    entry = written()
    for path in (part(entry, 0), part(entry, 1), entry.folder / "manifest.json"):
        path.write_bytes(flipped(path.read_bytes(), 4 * path.stat().st_size))
        assert read_finished(entry.folder, KEY) is None
        assert [name for name in set_aside(entry.folder) if path.name in name]
        pd.testing.assert_frame_equal(read_finished(written().folder, KEY), both())


def test_a_flipped_bit_in_an_unfinished_result_never_gives_a_wrong_table() -> None:
    entry = Entry(KEY, VARIANT, SHARDS)
    entry.write(0, table())
    whole = part(entry).read_bytes()
    footer = 8 * (len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"))  # names and kinds: no checksum of parquet's
    chance = random.Random(0)
    bits = [*chance.sample(range(footer), 50), *chance.sample(range(footer, 8 * len(whole)), 500)]
    refused = 0
    for bit in bits:
        part(entry).write_bytes(flipped(whole, bit))
        found = entry.read(0)
        if found is None:
            assert not part(entry).exists()
            refused += 1
        else:
            pd.testing.assert_frame_equal(found, table())
    assert len(set_aside(entry.folder)) == refused > 100


def other_key(path: Path) -> None:
    entry = Entry(key_of({}), VARIANT, 1)
    entry.write(0, table())
    shutil.copy(part(entry), path)


def other_shard(path: Path) -> None:
    shutil.copy(path.with_name("part-000001.parquet"), path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a table of another program": lambda path: table().to_parquet(path),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a part of another result": other_key,
    "another part": other_shard,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_stands_in_place_of_a_part_is_set_aside_and_computed_again(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = written()
    DAMAGE[name](part(entry))
    assert entry.read(0) is None
    assert "is damaged and is computed again" in caplog.text
    assert [bad for bad in set_aside(entry.folder) if "part-000000" in bad]
    pd.testing.assert_frame_equal(entry.read(1), table(1))
    assert entry.write(0, table(0))
    pd.testing.assert_frame_equal(entry.read(0), table(0))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_finished_result_with_a_damaged_part_is_not_used(name: str) -> None:
    entry = written()
    DAMAGE[name](part(entry))
    assert read_finished(entry.folder, KEY) is None
    assert list(variants(KEY)) == []


def test_what_cannot_be_read_for_a_while_is_found_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = written()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    for place, name in ((cache, "file_digest"), (pq, "read_table")):
        with monkeypatch.context() as broken:
            broken.setattr(place, name, fail)
            assert read_finished(entry.folder, KEY) is None
        assert set_aside(entry.folder) == []
    pd.testing.assert_frame_equal(read_finished(entry.folder, KEY), both())


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{}",
        "[]",
        "null",
        '"text"',
        "[" * 100_000,
        json.dumps({"content": CONTENT, "parts": {}}),
        json.dumps({"content": CONTENT, "parts": ["part-000000.parquet"]}),
        json.dumps({"content": CONTENT, "parts": {"part-000000.parquet": None}}),
        json.dumps({"content": CONTENT, "parts": {"../../../../etc/passwd": "0"}}),
        json.dumps({"content": CONTENT | {"t": 101}, "parts": {}}),
    ],
    ids=lambda text: text[:60],
)
def test_a_manifest_that_says_something_else_is_not_believed(manifest: str) -> None:
    entry = written()
    (entry.folder / "manifest.json").write_text(manifest)
    assert read_finished(entry.folder, KEY) is None
    assert list(variants(KEY)) == []


def test_whole_parts_under_the_manifest_of_another_question_are_not_believed() -> None:
    entry = written()
    manifest = json.loads((entry.folder / "manifest.json").read_bytes())
    manifest["content"]["t"] += 1
    (entry.folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_finished(entry.folder, KEY) is None


def test_what_is_shipped_is_found_and_never_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = written()
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    shutil.move(cache.home(), tmp_path / "shipped")
    ((_, folder),) = variants(KEY)
    pd.testing.assert_frame_equal(read_finished(folder, KEY), both())
    (folder / "part-000000.parquet").write_bytes(b"")
    before = sorted(folder.iterdir())
    assert read_finished(folder, KEY) is None
    assert sorted(folder.iterdir()) == before
    assert written().folder == entry.folder  # computed again, it is kept here and found first
    assert [path for _, path in variants(KEY)] == [entry.folder, folder]


def test_every_shipped_result_is_whole() -> None:
    manifests = list(cache.SHIPPED.rglob("manifest.json"))
    assert manifests
    for manifest in manifests:
        assert read_finished(manifest.parent, manifest.parent.parent.name) is not None


# A place that cannot be written


def test_without_a_place_to_write_results_are_only_not_kept(
    cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_folder.write_text("a file where the folder should be")
    entry = Entry(KEY, VARIANT, 1)
    assert entry.read(0) is None
    assert not entry.write(0, table())
    entry.finish(CONTENT)
    assert list(variants(KEY)) == []
    assert read_finished(entry.folder, KEY) is None
    assert "Results are not kept" in caplog.text


def test_a_cache_that_is_deleted_in_between_is_built_anew() -> None:
    entry = Entry(KEY, VARIANT, SHARDS)
    entry.write(0, table(0))
    shutil.rmtree(cache.home())
    assert entry.write(1, table(1))
    entry.finish(CONTENT)
    assert list(variants(KEY)) == []
    assert entry.read(0) is None


Step = Callable[[str], None]


def watched(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `step` called before each thing that publishing does to the disk, and in the middle of writing."""

    def stepping(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            step(name)
            return real(*arguments, **options)

        return call

    for name in ("mkdir", "open", "fsync", "link", "replace", "unlink"):
        monkeypatch.setattr(os, name, stepping(name, getattr(os, name)))
    write = pq.write_table

    def write_in_two(rows: object, path: Path, **options: object) -> None:
        write(rows, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        step("write")
        path.write_bytes(whole)

    monkeypatch.setattr(pq, "write_table", write_in_two)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_whichever_call_fails_nothing_wrong_is_left(error: int) -> None:
    for fail_at in itertools.count(1):
        calls = itertools.count(1)
        failed = []

        def fail(name: str, calls: Iterator[int] = calls, fail_at: int = fail_at, failed: list[str] = failed) -> None:
            if next(calls) == fail_at:
                failed.append(name)
                raise OSError(error, os.strerror(error))

        entry = Entry(KEY, VARIANT, 1)
        with pytest.MonkeyPatch.context() as patch:
            watched(fail, patch)
            kept = entry.write(0, table())
            entry.finish(CONTENT)
        if not failed:
            break
        found = entry.read(0)
        assert found is None or found.equals(table())
        assert found is not None or not kept
        assert set_aside(entry.folder) == [] if entry.folder.is_dir() else not kept
        assert failed == ["unlink"] or partial(entry.folder) == []
        assert entry.write(0, table())
        entry.finish(CONTENT)
        pd.testing.assert_frame_equal(read_finished(entry.folder, KEY), table())
        shutil.rmtree(cache.home())
    assert fail_at > 8  # mkdir, write, open, fsync, link, unlink, open, fsync, ...


def in_child(work: Callable[[], object]) -> int:
    """Run something in a forked process and return how that ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_dies_anywhere_leaves_no_part_of_a_part() -> None:
    entry = Entry(KEY, VARIANT, 1)
    for die_at in itertools.count(1):

        def write_and_die(die_at: int = die_at) -> None:
            calls = itertools.count(1)
            patch = pytest.MonkeyPatch()
            watched(lambda name: os._exit(9) if next(calls) == die_at else None, patch)
            entry.write(0, table())
            entry.finish(CONTENT)

        code = ended(in_child(write_and_die))
        assert code in (0, 9)
        found = entry.read(0)
        assert found is None or found.equals(table())
        for _, folder in variants(KEY):
            assert read_finished(folder, KEY).equals(table())
        if code == 0:
            break
        assert not entry.folder.is_dir() or set_aside(entry.folder) == []
        assert all(name.startswith(".") for name in partial(entry.folder))  # hidden, also from `ls` and a glob
        assert entry.write(0, table())  # what the dead process left behind is in nobody's way
        shutil.rmtree(cache.home())
    assert die_at > 8


def test_processes_that_write_one_key_together_leave_one_whole_result() -> None:
    shards = 15
    start = os.pipe()

    def write_all() -> None:
        os.read(start[0], 1)
        entry = Entry(KEY, VARIANT, shards)
        for shard in range(shards):
            assert entry.write(shard, table(shard))
        entry.finish(CONTENT)

    children = [in_child(write_all) for _ in range(3)]
    os.write(start[1], b"go!")
    entry = Entry(KEY, VARIANT, shards)
    seen, deadline = 0, time.monotonic() + 30
    while seen < shards and time.monotonic() < deadline:  # a reader beside the writers sees a whole part or none
        found = entry.read(seen)
        if found is not None:
            pd.testing.assert_frame_equal(found, table(seen))
            seen += 1
    assert [ended(child) for child in children] == [0, 0, 0]
    assert len(read_finished(entry.folder, KEY)) == 20 * shards
    assert set_aside(entry.folder) == partial(entry.folder) == []
    for end in start:
        os.close(end)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "oms_core.cache")
