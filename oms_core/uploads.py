"""Pictures that a visitor hands in: files or zips, in memory, never written anywhere.

Each is decoded once, in a process of its own; this one only ever opens the PNG that comes back.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from oms_core.decode import MAX_BYTES, Profile, decode, fit
from oms_core.errors import InputError
from oms_core.images import ImageSet, collected
from oms_core.layouts import BESIDE, Listed, Rows, Zip, numbered
from oms_core.plain_text import visible
from oms_core.survey import LONGEST, VISITORS, Kept, Look, keep, look_through

MOST = 200  # pictures
QUOTA = 256 * 2**20  # bytes of one visitor, as they were sent, again unpacked, and again decoded
HELD = 2**30  # bytes of all visitors' pictures, decoded
PATIENCE = 60.0  # seconds in which the pictures must be looked through
EFFORT = 30.0  # seconds of a CPU that the pictures may take in all
LONGEST_NAME = 64
MAX_DIRECTORY = 4 * 2**20  # bytes of the list of a zip's entries, which takes many times as much in memory
ZIP_BEGINS = (b"PK\x03\x04", b"PK\x05\x06")
NAME = "your upload"

Read = Callable[[], bytes]


def received(files: Sequence[tuple[str, bytes]]) -> ImageSet:
    """The pictures among files that were sent, those in zips included; all of unknown role.

    A picture's identity is the SHA-256 of the file that was sent; what is read of it is a PNG of its pixels. The
    table's column `notes` says what was changed on the way.

    Args:
        files: names and contents. A name is only shown, it is never part of a path.

    Raises:
        InputError: no picture can be used.
    """
    listed, sources, refused = looked_through(files)
    album = Album()
    rows = Rows(listed, lambda number: sources[number]())
    images = collected(NAME, rows, album.looks(sources), refused)
    names, notes = [*images.table.image], [*images.table.image.map(album.notes)]
    return replace(images, table=images.table.assign(notes=notes), read=lambda row: album.pngs[names[row]])


class Album:
    """The pictures of one visitor, decoded, in memory; counted as long as somebody holds them."""

    held = 0  # bytes of all albums
    guard = threading.RLock()  # an album may be forgotten at any moment, on any thread

    def __init__(self) -> None:
        self.pngs: dict[str, bytes] = {}  # by the SHA-256 of what was sent
        self.notes: dict[str, str] = {}
        self.size = 0
        self.spent = 0.0  # seconds of a CPU
        self.until = time.monotonic() + PATIENCE

    def __del__(self) -> None:
        with Album.guard:
            Album.held -= self.size

    def looks(self, sources: list[Read]) -> Iterator[Look]:
        """Decode pictures, and keep those that can be used while there is room."""

        def read(number: int) -> bytes:
            self.refuse_late()
            return sources[number]()

        for seen in look_through(read, len(sources), keep, VISITORS):
            yield self.kept(seen) if isinstance(seen, Kept) else self.lost(seen)

    def refuse_late(self) -> None:
        """Refuse to begin with another picture when those before it took too long."""
        if time.monotonic() > self.until:
            raise InputError(
                f"left out, as {PATIENCE:.0f} seconds were over before its turn came; try again, or use fewer"
            )
        if self.spent > EFFORT:
            raise InputError(
                f"left out, as the pictures before it took {EFFORT:.0f} seconds to decode; use smaller ones, or fewer"
            )

    def kept(self, seen: Kept) -> Look:
        """Keep a picture that can be used, and is not yet there."""
        self.spent += seen.seconds
        try:
            if not seen.reason and seen.image not in self.pngs:
                self.make_room(len(seen.png))
                self.pngs[seen.image], self.notes[seen.image] = seen.png, "; ".join(seen.notes)
        except InputError as error:
            return Look(seen.image, str(error))
        return Look(seen.image, seen.reason)

    def lost(self, seen: Look) -> Look:
        """Count what was spent on a picture that ended its process."""
        self.spent += LONGEST if seen.image else 0
        return seen

    def make_room(self, size: int) -> None:
        refuse_above(QUOTA, self.size + size)
        with Album.guard:
            if Album.held + size > HELD:
                raise InputError("the pictures of all visitors fill the memory for them; try again in some minutes")
            Album.held += size
            self.size += size


def as_seen(images: ImageSet, profile: Profile) -> ImageSet:
    """The same pictures in the shape that a model needs, made now: who asks it later has nothing large to decode."""
    seen = {row: png(fit(decode(images.read(row))[0], profile)[0]) for row in images.table.index}
    return replace(images, read=seen.__getitem__)


def png(pixels: np.ndarray) -> bytes:
    """(H, W, C) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def looked_through(files: Sequence[tuple[str, bytes]]) -> tuple[list[Listed], list[Read], list[tuple[str, str]]]:
    """What may be pictures, how each is read, and file and reason of what was turned away; none is decoded yet."""
    listed, sources, refused = [], [], []
    names: dict[str, int] = {}
    sent = unpacked = 0
    for name, data in files:
        sent += len(data)
        try:
            refuse_above(QUOTA, sent)
            for inner, size, read in pictures_in(name, data):
                unpacked += size
                refuse_above(QUOTA, unpacked)
                if len(sources) == MOST:
                    raise InputError(f"more than {MOST} pictures; what comes after them is left out")
                listed.append(Listed(numbered(shown(inner), names)))
                sources.append(read)
        except InputError as error:
            refused.append((shown(name), str(error)))
    return listed, sources, refused


def refuse_above(quota: int, size: int) -> None:
    if size > quota:
        raise InputError(f"more than {quota >> 20} MB in all; use smaller pictures or fewer")


def pictures_in(name: str, data: bytes) -> Iterator[tuple[str, int, Read]]:
    """What a file holds, as names, sizes and ways to read: itself, or the entries of a zip (told by content)."""
    if not data.startswith(ZIP_BEGINS):
        yield name, len(data), lambda: data
        return
    archive = Zip(io.BytesIO(data), MAX_DIRECTORY)
    try:
        files = [file for file in archive.files if not file.lower().endswith(BESIDE)]
    except InputError as error:
        raise InputError("the zip is damaged, or holds too many files; pack it again") from error
    if not files:
        raise InputError("the zip holds no pictures")
    for file in files:
        size = archive.entries[file].file_size
        yield file, size if size <= MAX_BYTES else 0, lambda file=file: archive.read(file)  # a larger one is refused


def shown(name: str) -> str:
    """A name as it can be shown: on one line, without control or direction characters, and not endless."""
    text = visible(name[:LONGEST_NAME] or "unnamed")
    return text if len(name) <= LONGEST_NAME else text[:-1] + "…"
