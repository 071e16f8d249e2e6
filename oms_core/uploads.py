"""Pictures that a visitor hands in: files or zips, in memory, never written anywhere."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence

from oms_core.decode import MAX_BYTES
from oms_core.errors import InputError
from oms_core.images import ImageSet, collected
from oms_core.layouts import BESIDE, Listed, Rows, Zip, numbered
from oms_core.plain_text import visible
from oms_core.survey import look_through

MOST = 200  # pictures
QUOTA = 256 * 2**20  # bytes of one visitor, as they were sent and again unpacked
PATIENCE = 60.0  # seconds in which the pictures must be looked through
LOOKING = 2  # processes that look at what visitors send, for all of them together
LONGEST_NAME = 64
MAX_DIRECTORY = 4 * 2**20  # bytes of the list of a zip's entries, which takes many times as much in memory
ZIP_BEGINS = (b"PK\x03\x04", b"PK\x05\x06")
NAME = "your upload"

Read = Callable[[], bytes]


def received(files: Sequence[tuple[str, bytes]]) -> ImageSet:
    """The pictures among files that were sent, those in zips included; all of unknown role.

    Args:
        files: names and contents. A name is only shown, it is never part of a path.

    Raises:
        InputError: no picture can be used.
    """
    listed, sources, refused = looked_through(files)
    until = time.monotonic() + PATIENCE

    def read(number: int) -> bytes:
        if time.monotonic() > until:
            raise InputError(
                f"left out, as {PATIENCE:.0f} seconds were over before its turn came; try again, or use fewer"
            )
        return sources[number]()

    looks = look_through(read, len(listed), together=1, processes=LOOKING)
    images = collected(NAME, Rows(listed, read), looks, refused)
    until = math.inf  # what was found in time may be read whenever it is needed
    return images


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
    source = Careful(data)
    archive = Zip(source)
    try:
        files = [file for file in archive.files if not file.lower().endswith(BESIDE)]
    except InputError as error:
        raise InputError("the zip is damaged, or holds too many files; pack it again") from error
    if not files:
        raise InputError("the zip holds no pictures")
    source.careful = False
    for file in files:
        size = archive.entries[file].file_size
        yield file, size if size <= MAX_BYTES else 0, lambda file=file: archive.read(file)  # a larger one is refused


class Careful(io.BytesIO):
    """A zip in memory. The list of its entries is read at once, so a large one is noticed before it is taken apart."""

    careful = True

    def read(self, size: int | None = -1) -> bytes:
        if self.careful and (size or 0) > MAX_DIRECTORY:
            raise InputError("the list of its entries is too long")
        return super().read(size)


def shown(name: str) -> str:
    """A name as it can be shown: on one line, without control or direction characters, and not endless."""
    text = visible(name[:LONGEST_NAME] or "unnamed")
    return text if len(name) <= LONGEST_NAME else text[:-1] + "…"
