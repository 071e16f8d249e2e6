"""Where pictures lie and what is said of them there: folders and zips in the layouts that the field uses.

A `Tree` is a folder or a zip. A layout looks at its files and says of each picture its role, label and caption:

| layout                | how it is recognised                                                    |
|-----------------------|-------------------------------------------------------------------------|
| `metadata.csv`        | the file, with `file_name`, and `member` and perhaps `label`, `text`    |
| role folders          | ``member/``, ``nonmember/``, ``auxiliary/``                             |
| LFW                   | ``Name/Name_0001.jpg`` throughout: the first half of the names are members |
| anything else         | every picture, in order, of unknown role                                |

Captions come from ``caption.json`` ({file: caption}), from COCO's ``captions_*.json``, or from a ``.txt`` beside
the picture, as img2dataset writes them for LAION.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from oms_core.decode import MAX_BYTES
from oms_core.errors import InputError
from oms_core.files import read_regular, size_of

ROLES = ("member", "nonmember", "auxiliary")
TRUE_WORDS, FALSE_WORDS = ("1", "true", "yes", "member"), ("0", "false", "no", "nonmember", "non-member")
IGNORED = ("Thumbs.db", "desktop.ini")
BESIDE = (".txt", ".json", ".csv", ".npz", ".parquet", ".tsv", ".md")  # what may lie beside pictures
MAX_WORDS, MAX_VALUES = 128 * 2**20, 10**7  # bytes and values of a file of captions; COCO's largest has 92 MB
MAX_CAPTION = 2**16  # bytes of a caption in a file of its own
MAX_PICTURES = 2_000_000  # of a set
MAX_ENTRIES, MAX_RATIO = 20_000, 200  # of a zip
MAX_DIRECTORY = 16 * 2**20  # bytes of the list of a zip's entries, which takes many times as much in memory
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others are unpacked as a whole, whatever size is claimed
KNOWN_COLUMNS = ("file_name", "member", "label", "text")  # of metadata.csv
LFW = re.compile(r"(?:.*/)?([^/]+)/\1_\d{4}\.(?:jpe?g|png)", re.IGNORECASE)


class Listed(NamedTuple):
    """A picture before it is opened."""

    file: str
    role: str = ""
    label: str = ""
    caption: str = ""


class Rows(NamedTuple):
    """Pictures that are read by their number, which is their place in the data set.

    Attributes:
        listed: what is said of each.
        read: from a picture's number to its bytes.
    """

    listed: list[Listed]
    read: Callable[[int], bytes]


class Stamp(NamedTuple):
    """By what a change of a file shows: its size, and when it was written and changed, in ns (-1 where it is not)."""

    path: str
    size: int
    written: int
    changed: int


@dataclass(eq=False)
class Folder:
    """The files below a folder; links to folders are listed, never followed."""

    path: Path

    @cached_property
    def files(self) -> list[str]:
        """Relative paths, sorted.

        Raises:
            InputError: a sub-folder cannot be listed.
        """
        found = []
        for root, folders, files in os.walk(self.path, onerror=refuse_unlisted):
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            found += [Path(root, file).relative_to(self.path).as_posix() for file in files + links]
        return sorted(file for file in found if not hidden(file))

    def read(self, file: str, most: int = MAX_BYTES) -> bytes:
        return read_regular(self.path / file, most)

    def __str__(self) -> str:
        return str(self.path)


class Careful(io.BufferedReader):
    """A zip to be opened. The list of its entries is read at once, so a long one is noticed before it is parsed."""

    most: int | None = None  # bytes that may be read at once

    def read(self, size: int | None = -1) -> bytes:
        if self.most is not None and (size or 0) > self.most:
            raise InputError("the list of its entries is too long")
        return super().read(size)


def archive_of(source: Path | io.BytesIO, most: int = MAX_DIRECTORY) -> zipfile.ZipFile:
    """A zip, on disk or in memory, with its list of entries, which must be bounded.

    Args:
        source: the file or its bytes.
        most: bytes that the list may have.

    Raises:
        InputError: the list is too long.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    file = Careful(io.FileIO(source) if isinstance(source, Path) else source)
    file.most = most
    archive = zipfile.ZipFile(file)
    file.most = None
    return archive


@dataclass(eq=False)
class Zip:
    """The files in a zip archive, on disk or in memory; nothing is ever unpacked to disk."""

    source: Path | io.BytesIO
    longest: int = MAX_DIRECTORY  # bytes of the list of its entries

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        try:
            archive = archive_of(self.source, self.longest)
        except Exception as error:  # damage in the directory shows in many ways
            raise InputError(f"{self} is no complete zip archive; pack it again.") from error
        if len(archive.infolist()) > MAX_ENTRIES:
            raise InputError(f"{self} holds more than {MAX_ENTRIES:,} files; unpack it and name the folder.")
        return archive

    @cached_property
    def entries(self) -> dict[str, zipfile.ZipInfo]:
        """Its entries by name; the second of a name is called name (2)."""
        names: dict[str, int] = {}
        return {numbered(entry.filename, names): entry for entry in self.archive.infolist()}

    @cached_property
    def files(self) -> list[str]:
        """The names of its entries, sorted."""
        names = [name for name, entry in self.entries.items() if not entry.filename.endswith("/")]
        return sorted(name for name in names if not hidden(name) and not name.startswith("__MACOSX/"))

    def read(self, file: str, most: int = MAX_BYTES) -> bytes:
        if file not in self.entries:
            raise InputError("it is not in the archive")
        entry = self.entries[file]
        name = entry.filename
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise InputError("its name points out of the archive")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputError("it is a link")
        if entry.flag_bits & 1:
            raise InputError("it is encrypted")
        if entry.compress_type not in BOUNDED:
            raise InputError("it is packed in an unusual way; pack it again")
        if entry.file_size > most:
            raise InputError(f"the file is larger than {size_of(most)}")
        if entry.file_size > MAX_RATIO * max(1, entry.compress_size):
            raise InputError(f"it unpacks to more than {MAX_RATIO} times its size")
        try:
            with self.archive.open(entry) as opened:
                return opened.read(most)
        except Exception as error:  # each kind of compression has its own
            raise InputError("the entry is damaged") from error

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "the archive"


Tree = Folder | Zip


def numbered(name: str, names: dict[str, int]) -> str:
    """A name that was not there before: the second of a name is called name (2).

    Args:
        name: a name.
        names: those that were there, each with how often; this one is added.
    """
    free = name
    while free in names:
        names[name] += 1
        free = f"{name} ({names[name]})"
    names[free] = 1
    return free


def refuse_doubles(archive: Zip) -> None:
    """Refuse a zip in which a name stands twice, as what is said of it could mean either.

    Raises:
        InputError: naming the first.
    """
    for name in archive.files:
        entry = archive.entries[name]
        if name != entry.filename:
            raise InputError(f"{archive} holds two entries called {entry.filename!r}; pack it again with one of each.")


def listed(tree: Tree) -> Iterable[Listed]:
    """Every picture of a tree, by the first layout that fits.

    Raises:
        InputError: what describes the pictures is damaged or unclear, or a name stands twice in a zip.
    """
    if isinstance(tree, Zip):
        refuse_doubles(tree)
    if "metadata.csv" in tree.files:
        return in_metadata(tree)
    words = captions_in(tree)
    pictures = [file for file in tree.files if not file.lower().endswith(BESIDE)]
    if any(file.startswith(tuple(f"{role}/" for role in ROLES)) for file in tree.files):
        return in_role_folders(pictures, words)
    if pictures and all(LFW.fullmatch(file) for file in pictures):
        return in_identity_folders(pictures)
    return [Listed(file, "", "/".join(PurePosixPath(file).parts[:-1]), words(file)) for file in pictures]


def in_role_folders(pictures: list[str], words: Callable[[str], str]) -> Iterable[Listed]:
    """Pictures below member/, nonmember/ and auxiliary/; a sub-folder is a label, unless it is called images."""
    for role in ROLES:
        for file in pictures:
            parts = PurePosixPath(file).parts
            if parts[0] == role:
                label = "/".join(part for part in parts[1:-1] if part != "images")
                yield Listed(file, role, label, words(file))


def in_identity_folders(pictures: list[str]) -> Iterable[Listed]:
    """Labeled Faces in the Wild: the first half of the names, in order, are members (App. C says half of them)."""
    names = sorted({LFW.fullmatch(file)[1] for file in pictures})
    members = {*names[: len(names) // 2]}
    for file in pictures:
        name = LFW.fullmatch(file)[1]
        yield Listed(file, "member" if name in members else "nonmember", name)


def in_metadata(tree: Tree) -> Iterable[Listed]:
    """Each row of ``metadata.csv``.

    Raises:
        InputError: a column is missing, a value of `member` is unclear, or a path leaves the folder.
    """
    where = f"metadata.csv in {tree}"
    for count, row in enumerate(metadata_rows(tree)):
        if count == 0:
            for column in ("file_name", "member"):
                if column not in row:
                    raise InputError(f"{where} has no column {column!r}; it needs file_name and member.")
        file = row["file_name"]
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise InputError(f"{where} names {file!r}, which lies outside the folder.")
        if count == MAX_PICTURES:
            raise InputError(f"{where} names more than {MAX_PICTURES:,} pictures; use a part of them.")
        yield Listed(file, role_of(row["member"], where), row.get("label", ""), row.get("text", ""))


def metadata_rows(tree: Tree) -> Iterable[dict[str, str]]:
    """The rows of ``metadata.csv`` by column, read one by one; what a short row lacks is empty.

    Raises:
        InputError: it cannot be read as CSV.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(tree.read("metadata.csv")), "utf-8-sig", newline="")
        rows = filter(None, csv.reader(text, strict=True))
        columns = next(rows, None)
        if not columns:
            raise ValueError("it is empty")
        for row in rows:
            if len(row) > len(columns):
                raise ValueError(f"a row has {len(row)} cells, the first has {len(columns)}")
            cells = row + [""] * (len(columns) - len(row))
            yield {name: cells[columns.index(name)] for name in KNOWN_COLUMNS if name in columns}
    except (ValueError, csv.Error, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"metadata.csv in {tree} cannot be read as CSV: {reason}.") from error


def role_of(word: str, where: str) -> str:
    """The role that a cell of the column `member` means.

    Raises:
        InputError: it is unclear.
    """
    word = word.strip().lower()
    if word in TRUE_WORDS:
        return "member"
    if word in FALSE_WORDS:
        return "nonmember"
    if word == "auxiliary":
        return "auxiliary"
    raise InputError(f"{where} has {word!r} in its column member; use true, false or auxiliary.")


def captions_in(tree: Tree) -> Callable[[str], str]:
    """From a picture to its caption, wherever the tree keeps captions; "" where there is none."""
    found: dict[str, str] = {}
    for file in tree.files:
        name = PurePosixPath(file).name
        if name == "caption.json" or re.fullmatch(r"captions(_\w+)?\.json", name):
            found |= captions_of(tree, file)
    beside = {file for file in tree.files if file.endswith(".txt")}

    def caption(file: str) -> str:
        text = f"{os.path.splitext(file)[0]}.txt"
        if text in beside:
            return text_in(tree, text)
        places = (file, f"{file.partition('/')[0]}/**/{PurePosixPath(file).name}", f"**/{PurePosixPath(file).name}")
        return next((found[place] for place in places if place in found), "")

    return caption


def text_in(tree: Tree, file: str) -> str:
    """The words in a text file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return tree.read(file, MAX_CAPTION).decode(errors="replace").strip()
    except InputError as error:
        raise InputError(f"{file} in {tree} holds no caption that can be read: {error}.") from error


def captions_of(tree: Tree, file: str) -> dict[str, str]:
    """The captions in a JSON file: {file: caption}, a list of objects, or COCO's annotations.

    Files are named from where the JSON lies or from ``images/`` there; in a folder, their bare names will do
    for all below that folder, and COCO's, which are unique, for all pictures.

    Raises:
        InputError: it is damaged, or none of them.
    """
    try:
        words = tree.read(file, MAX_WORDS)
        if sum(map(words.count, (b",", b"[", b"{"))) > MAX_VALUES:  # each takes tens of bytes in memory
            raise ValueError("it holds too many values")
        content = json.loads(words)
        pairs = [*caption_pairs(content)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{file} in {tree} holds no captions that can be read; restore the original file.") from error
    near = PurePosixPath(file).parent
    anywhere = isinstance(content, dict) and "annotations" in content
    below = "**" if anywhere else f"{file.partition('/')[0]}/**"
    named: dict[str, str] = {}
    for name, caption in pairs:
        for place in (near / name, near / "images" / name, f"{below}/{PurePosixPath(name).name}"):
            named[str(place)] = caption
    return named


def caption_pairs(content: Any) -> Iterable[tuple[str, str]]:
    """File and caption; of several captions of a picture the first counts."""
    if isinstance(content, dict) and "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(names[row["image_id"]], row["caption"]) for row in reversed(content["annotations"])]
    elif isinstance(content, dict):
        rows = [*content.items()]
    else:
        rows = [(row.get("file_name") or row.get("image") or row["file"], row["caption"]) for row in reversed(content)]
    for name, caption in rows:
        yield str(name), str(caption[0] if isinstance(caption, list) else caption).strip()


def stamps(path: str) -> tuple[Stamp, ...]:
    """The stamp of a path and of all that lies below it; nothing is read.

    Raises:
        InputError: a sub-folder cannot be listed.
    """
    found = [path]
    for root, folders, files in os.walk(path, onerror=refuse_unlisted) if os.path.isdir(path) else ():
        found += [os.path.join(root, name) for name in folders + files]
    return tuple(map(stamp, sorted(found)))


def stamp(path: str) -> Stamp:
    """The stamp of a file; of a link, that of the file which it names."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return Stamp(path, -1, -1, -1)
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hidden(file: str) -> bool:
    """Whether a file is the system's, not the user's."""
    parts = file.split("/")
    return any(re.match(r"\.[^.]", part) for part in parts) or parts[-1] in IGNORED


def refuse_unlisted(error: OSError) -> None:
    raise InputError(f"The folder {error.filename} cannot be listed; allow reading it.") from error
