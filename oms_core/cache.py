"""Results on disk, found by what they were computed from.

An entry is a folder ``<key>/<variant>``: the key says what was asked (model, pictures, settings), the variant
how it was computed (device, precision, batch size, number of steps). It holds one parquet file per shard, each
written whole or not at all, and, once every shard is there, ``manifest.json`` with their SHA-256.

A folder that cannot be read or written, whatever the reason, is one warning; everything works without it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from oms_core.device import MODES
from oms_core.files import ASSETS
from oms_core.writing import beside, flush, flush_names, replace_file

log = logging.getLogger(__name__)
SHIPPED = ASSETS / "signals"
FORMAT = "v1"
STALE = QUIET = 3600.0  # seconds
TOLD: dict[Path, float] = {}  # when it was last said of a place that it cannot be used


def home() -> Path:
    """Where this machine keeps results: OMS_CACHE, or ``.cache`` beside the app."""
    return Path(os.environ.get("OMS_CACHE") or ASSETS.parent / ".cache")


def roots() -> list[Path]:
    """Where results are looked up: this machine's first, then what is shipped."""
    return [root / FORMAT for root in dict.fromkeys((home(), SHIPPED))]


def key_of(content: dict[str, Any]) -> str:
    """The key of what was asked: SHA-256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Variant:
    """How a result was computed. `steps` may be larger than what is asked: one pass gives every n up to it."""

    device: str
    dtype: str
    batch: int
    steps: int
    mode: str = MODES[0]

    def __str__(self) -> str:
        told = f"{self.device}-{self.dtype}-b{self.batch}-n{self.steps}"
        return told if self.mode == MODES[0] else f"{told}-{self.mode}"

    @classmethod
    def parse(cls, name: str) -> "Variant | None":
        """The variant that a folder's name says, None where it is something else."""
        try:
            device, dtype, batch, steps, *mode = name.split("-")
            return cls(device, dtype, int(batch.removeprefix("b")), int(steps.removeprefix("n")), *mode)
        except (ValueError, TypeError):
            return None


COUNTED = Variant("any", "float64", 0, 0)  # of figures, which depend on what they are counted from alone


def variants(key: str) -> Iterator[tuple[Variant, Path]]:
    """Every finished result of a key, the one with the fewest steps first."""
    for root in roots():
        folder = root / key[:2] / key
        found = [variant for name in names_in(folder) if (variant := Variant.parse(name))]
        for variant in sorted(found, key=lambda variant: (variant.steps, str(variant))):
            if os.path.isfile(folder / str(variant) / "manifest.json"):
                yield variant, folder / str(variant)


def begun(key: str, like: Variant) -> int:
    """The batch size of a result that was begun here like this one, so that it can be gone on with; 0 if none was."""
    folder = home() / FORMAT / key[:2] / key
    for name in names_in(folder):
        variant = Variant.parse(name)
        alike = variant and replace(like, batch=variant.batch) == variant
        if alike and any(part.startswith("part-") for part in names_in(folder / name)):
            return variant.batch
    return 0


def names_in(folder: Path) -> list[str]:
    """What a folder of the cache holds, sorted; nothing if it is not there or cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        pass
    except OSError as error:
        unusable(folder, error)
    return []


def unusable(path: Path, error: Exception) -> None:
    """Say that a cache cannot be read or written, but not again and again; work goes on without it."""
    place = SHIPPED if SHIPPED in path.parents else home()
    if time.monotonic() - TOLD.get(place, -QUIET) >= QUIET:
        TOLD[place] = time.monotonic()
        why = getattr(error, "strerror", None) or error
        log.warning("Results are not kept: %s cannot be read or written (%s).", place, why)


@dataclass(frozen=True)
class Entry:
    """One result that is being written or read.

    Args:
        key: see `key_of`.
        variant: how it is computed.
        shards: how many parts it has.
    """

    key: str
    variant: Variant
    shards: int

    @property
    def folder(self) -> Path:
        return home() / FORMAT / self.key[:2] / self.key / str(self.variant)

    def read(self, shard: int) -> pd.DataFrame | None:
        """A finished shard, or None; a damaged one is set aside so that it is computed again."""
        return read_part(part(self.folder, shard), self.key, shard)

    def write(self, shard: int, rows: pd.DataFrame) -> bool:
        """Publish a shard whole: written aside, flushed, read back, linked. The first writer wins.

        Returns:
            False if the folder cannot be written; the result is then simply not kept.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            commit(part(self.folder, shard), rows, self.key, shard)
            return True
        except (OSError, pa.ArrowException) as error:
            unusable(self.folder, error)
            return False

    def finish(self, content: dict[str, Any]) -> None:
        """Write the manifest once every shard is there: what was asked, and the digest of each part."""
        parts = [part(self.folder, shard) for shard in range(self.shards)]
        with contextlib.suppress(OSError):  # `write` has already said that results are not kept
            if all(path.is_file() for path in parts):
                manifest = {"content": content, "parts": {path.name: file_digest(path) for path in parts}}
                replace_file(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
                sweep(self.folder)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written; whoever still writes here is younger."""
    for name in names_in(folder):
        path = folder / name
        if name.startswith(".") and name.endswith(".partial") and time.time() - path.stat().st_mtime > STALE:
            path.unlink(missing_ok=True)


def read_finished(folder: Path, key: str) -> pd.DataFrame | None:
    """All rows of a finished result, or None if any part of it is not what its manifest and key say.

    What was verified once is remembered as long as no file of it changes; nobody may change the rows.
    """
    try:
        state = tuple((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    except OSError:
        state = ()
    try:
        return _read_finished(folder, key, state)
    except OSError as error:  # which may pass, so it is not remembered and nothing is set aside
        unusable(folder, error)
        return None


@lru_cache(maxsize=32)
def _read_finished(folder: Path, key: str, state: tuple) -> pd.DataFrame | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        parts = sorted(manifest["parts"].items())
        if key_of(manifest["content"]) != key or not parts:
            raise ValueError("the key does not match")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        set_aside(folder / "manifest.json", error)
        return None
    frames = []
    for shard, (name, digest) in enumerate(parts):
        path = folder / Path(name).name
        if intact(path, digest):
            rows = read_part(path, key, shard, verified=True)
            if rows is None and path.exists():
                raise OSError(f"{name} is whole, and cannot be read")
        else:
            set_aside(path, "its digest does not match")
            rows = None
        if rows is None:
            set_aside(folder / "manifest.json", "a part is damaged")
            return None
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)


def counted(content: dict[str, Any], count: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Figures that depend on their content alone: those that were counted before, else counted now and kept."""
    key = key_of(content)
    for _, folder in variants(key):
        rows = read_finished(folder, key)
        if rows is not None:
            return rows
    entry, rows = Entry(key, COUNTED, 1), count()
    entry.write(0, rows)
    entry.finish(content)
    return rows


def is_counted(content: dict[str, Any]) -> bool:
    """Whether figures are kept under a content."""
    return next(variants(key_of(content)), None) is not None


def forget(content: dict[str, Any]) -> None:
    """Drop what `counted` keeps of a content on this machine."""
    shutil.rmtree(Entry(key_of(content), COUNTED, 1).folder, ignore_errors=True)


def part(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:06d}.parquet"


def commit(path: Path, rows: pd.DataFrame, key: str, shard: int) -> None:
    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({"key": key, "shard": str(shard), "rows": digest_of_rows(rows)})
    partial = beside(path)
    try:
        pq.write_table(table, partial, **encoding(table))
        pq.read_table(partial, page_checksum_verification=True)
        flush(partial)
        os.link(partial, path)
    except FileExistsError:
        pass  # a twin was faster, with the same rows
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    flush_names(path.parent)


def encoding(table: pa.Table) -> dict[str, Any]:
    """Floating-point numbers byte by byte, which shrinks them by a third, and a checksum on every page."""
    numbers = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    others = [name for name in table.column_names if name not in numbers]
    return {
        "compression": "zstd",
        "compression_level": 9,
        "use_byte_stream_split": numbers,
        "use_dictionary": others,
        "write_page_checksum": True,
    }


def read_part(path: Path, key: str, shard: int, verified: bool = False) -> pd.DataFrame | None:
    """The rows of a file, or None; what is damaged is set aside. What is verified is not checked again."""
    if not os.path.exists(path):
        return None
    try:
        if not os.path.isfile(path):
            raise ValueError("it is not a file")
        table = pq.read_table(path, page_checksum_verification=not verified)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if (metadata.get("key"), metadata.get("shard")) != (key, str(shard)):
            raise ValueError("it belongs to another result")
        rows = table.to_pandas(ignore_metadata=True)
        if not verified and metadata.get("rows") != digest_of_rows(
            rows
        ):  # a page has a checksum, the footer with the names has none
            raise ValueError("its rows are not what was written")
        return rows
    except Exception as error:  # damage in a footer shows in many ways, KeyError and TypeError among them
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # it cannot be read now, and may be whole
            unusable(path, error)
        else:
            set_aside(path, error)
        return None


def digest_of_rows(rows: pd.DataFrame) -> str:
    """SHA-256 over the names, kinds and values of all columns."""
    total = hashlib.sha256()
    for name, column in rows.items():
        values = column.to_numpy()
        data = "\n".join(map(str, values)).encode() if values.dtype == object else values.tobytes()
        total.update(f"{name}\n{values.dtype}\n{len(data)}\n".encode() + data)
    return total.hexdigest()


def set_aside(path: Path, reason: object) -> None:
    """Rename what is damaged, so that it is computed again and can still be looked at; what is shipped stays."""
    log.warning("%s is damaged and is computed again (%s).", path, reason)
    if SHIPPED not in path.parents:
        with contextlib.suppress(OSError):  # in a read-only place it stays and is found damaged again
            path.rename(path.with_name(f".bad-{path.name}.{uuid.uuid4().hex[:8]}"))


def add_notes(key: str, rows: pd.DataFrame) -> None:
    """Keep what is known of single pictures: `image` and more columns. A name is the digest of its rows."""
    folder = home() / FORMAT / key[:2] / key
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        commit(folder / f"notes-{digest_of_rows(rows)[:32]}.parquet", rows, key, 0)
    except (OSError, pa.ArrowException) as error:
        unusable(folder, error)


def read_notes(key: str, seen: set[Path]) -> Iterator[pd.DataFrame]:
    """What is known of single pictures under a key, file by file, this machine's first.

    Args:
        key: as they were kept under.
        seen: the files that were read before, to which those that are read now are added.
    """
    folders = [root / key[:2] / key for root in roots()]
    for path in (folder / name for folder in folders for name in names_in(folder)):
        if path.name.startswith("notes-") and path not in seen:
            rows = read_part(path, key, 0)
            if rows is not None:
                seen.add(path)
                yield rows


def intact(path: Path, digest: str) -> bool:
    """Whether a file is there and is what a manifest says.

    Raises:
        OSError: it cannot be read now.
    """
    return path.is_file() and file_digest(path) == digest


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
