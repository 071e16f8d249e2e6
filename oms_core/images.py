"""Image sets: pictures with an identity, a role, and what is known of them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from oms_core.decode import FORMATS, MAX_BYTES, Profile, decode, pixels
from oms_core.errors import InputError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILT_IN = ("digits", "fashion")
READ_ONLY = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
ROLES = ("member", "nonmember", "auxiliary")
TRUE_WORDS, FALSE_WORDS = ("1", "true", "yes", "member"), ("0", "false", "no", "nonmember", "non-member")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures that are read when they are needed, never all at once.

    Attributes:
        name: how a user calls the set.
        table: a row per picture: `image` (SHA-256 of its file), `file` (for people), `role` (member,
            nonmember, auxiliary), `label`, `caption`. The index is the row's place in the whole set.
        read: from a row's place in the whole set to the file's bytes.
        rejected: `file` and `reason` of what could not be used.
    """

    name: str
    table: pd.DataFrame
    read: Callable[[int], bytes]
    rejected: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the identities in order: equal sets have equal digests, whatever their name."""
        return hashlib.sha256("\n".join(self.table.image).encode()).hexdigest()

    def with_role(self, *roles: str) -> "ImageSet":
        """Only the pictures of these roles."""
        return replace(self, table=self.table[self.table.role.isin(roles)])

    def limit(self, count: int | None) -> "ImageSet":
        """The first `count` pictures, as many members as non-members where there are enough."""
        if count is None or count >= len(self):
            return self
        turn = self.table.groupby("role").cumcount()
        kept = turn.sort_values(kind="stable").index[:count]
        return replace(self, table=self.table.loc[self.table.index.isin(kept)])

    def mixed(self) -> "ImageSet":
        """The same pictures with the roles evenly mixed, so that the first part of the set is like the whole."""
        roles = self.table.groupby("role").role
        place = (roles.cumcount() + 0.5) / roles.transform("size")
        return replace(self, table=self.table.loc[place.sort_values(kind="stable").index])

    def pixels(self, profile: Profile) -> np.ndarray:
        """All pictures as a model sees them, (N, H, W, C) uint8."""
        if not len(self):
            return np.zeros((0, *profile.size, profile.channels), np.uint8)
        return np.stack([pixels(self.read(row), profile) for row in self.table.index])


def open_images(name: str) -> ImageSet:
    """Open an image set by the name of a built-in one or the path of a folder.

    A folder holds ``member/`` and ``nonmember/`` (and perhaps ``auxiliary/``), or ``metadata.csv`` with the
    columns `file_name` and `member` and perhaps `label` and `text`.

    Raises:
        InputError: no such set, or nothing in it can be used.
    """
    if name in BUILT_IN:
        return built_in(name)
    if not name or not os.path.exists(name):
        raise InputError(f"There is no image set or folder {name!r}; the built-in sets are {', '.join(BUILT_IN)}.")
    if not os.path.isdir(name):
        raise InputError(f"{name} is a file; name the folder that holds member/ and nonmember/.")
    return from_folder(Path(name))


@lru_cache
def built_in(name: str) -> ImageSet:
    """A set shipped in ``assets/images``.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = ASSETS / "images" / f"{name}.parquet"
    try:
        rows = pd.read_parquet(path, page_checksum_verification=True)
        table = pd.DataFrame(
            {
                "image": [sha256(data) for data in rows.png],
                "file": [f"{name}-{row:04d}.png" for row in rows.index],
                "role": rows.role,
                "label": rows.label.astype(str),
                "caption": rows.caption,
            }
        )
    except Exception as error:  # damage in a footer shows in many ways, AttributeError and KeyError among them
        raise InputError(f"{path.name} in assets/images is missing or damaged; restore it by git checkout.") from error
    return ImageSet(name, table, rows.png.__getitem__, rejected_table([]))


def from_folder(folder: Path) -> ImageSet:
    """Pictures below a folder; each file is read once to take its identity and to see that it decodes.

    Raises:
        InputError: neither layout is there, or no picture can be used.
    """
    if os.path.isfile(folder / "metadata.csv"):
        listed = listed_in_metadata(folder)
    elif any(os.path.isdir(folder / role) for role in ROLES):
        listed = listed_in_role_folders(folder)
    else:
        raise InputError(f"{folder} holds neither member/ and nonmember/ nor metadata.csv; add one of them.")
    kept, rejected, paths = [], [], {}
    for file, role, label, caption in listed:
        try:
            data = read_regular(folder / file)
            decode(data)
            kept.append((sha256(data), readable(file), role, readable(label), caption))
            paths.setdefault(sha256(data), folder / file)
        except InputError as error:
            rejected.append((readable(file), str(error)))
    table = pd.DataFrame(kept, columns=["image", "file", "role", "label", "caption"])
    table, doubled = without_doubles(table)
    if table.empty:
        first = rejected + doubled
        why = f" The first reason: {first[0][0]}: {first[0][1]}." if first else ""
        raise InputError(f"No picture in {folder} can be used; supported are {', '.join(FORMATS)}.{why}")
    read = partial(read_again, paths, table.image)
    return ImageSet(str(folder), table, read, rejected_table(rejected + doubled))


def read_again(paths: dict[str, Path], images: pd.Series, row: int) -> bytes:
    """The bytes of a row's file, which must still be the picture that the row names.

    Raises:
        InputError: the file was changed or removed since the set was opened.
    """
    path = paths[images[row]]
    try:
        data = read_regular(path)
    except InputError as error:
        raise InputError(f"{path} was removed while it was in use ({error}); open the set again.") from error
    if sha256(data) != images[row]:
        raise InputError(f"{path} was changed while it was in use; open the set again.")
    return data


def listed_in_role_folders(folder: Path) -> Iterable[tuple[str, str, str, str]]:
    """(file, role, label, caption) of each file below member/, nonmember/ and auxiliary/; a sub-folder is a label.

    Raises:
        InputError: a sub-folder cannot be listed.
    """
    for role in ROLES:
        for root, folders, files in os.walk(folder / role, onerror=refuse_unlisted):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]  # listed, never followed
            label = os.path.relpath(root, folder / role)
            for file in sorted(files + links):
                if not file.startswith(".") and file != "Thumbs.db":
                    path = os.path.relpath(os.path.join(root, file), folder)
                    yield path, role, "" if label == "." else label, ""


def refuse_unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # one of the three roles may be missing
        raise InputError(f"The folder {error.filename} cannot be listed; allow reading it.") from error


def listed_in_metadata(folder: Path) -> Iterable[tuple[str, str, str, str]]:
    """(file, role, label, caption) of each row of ``metadata.csv``.

    Raises:
        InputError: a column is missing, a value of `member` is unclear, or a path leaves the folder.
    """
    try:
        rows = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"metadata.csv in {folder} cannot be read as CSV: {reason}.") from error
    for column in ("file_name", "member"):
        if column not in rows:
            raise InputError(f"metadata.csv in {folder} has no column {column!r}; it needs file_name and member.")
    blank = pd.Series("", index=rows.index)
    columns = (rows.file_name, rows.member, rows.get("label", blank), rows.get("text", blank))
    for file, member, label, caption in zip(*columns, strict=True):
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise InputError(f"metadata.csv in {folder} names {file!r}, which lies outside the folder.")
        yield file, role_of(member, folder), label, caption


def role_of(word: str, folder: Path) -> str:
    """The role that a cell of the column `member` means."""
    word = word.strip().lower()
    if word in TRUE_WORDS:
        return "member"
    if word in FALSE_WORDS:
        return "nonmember"
    if word == "auxiliary":
        return "auxiliary"
    raise InputError(f"metadata.csv in {folder} has {word!r} in its column member; use true, false or auxiliary.")


def without_doubles(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Drop repeated files within a role, and every copy of a picture that stands in two roles."""
    roles = table.groupby("image").role.transform("nunique") if len(table) else pd.Series(dtype=int)
    torn = roles > 1
    repeated = table.duplicated("image") & ~torn
    reasons = [(file, "the same picture is also listed with another role") for file in table.file[torn]]
    reasons += [(file, "the same picture is listed twice") for file in table.file[repeated]]
    return table[~torn & ~repeated].reset_index(drop=True), reasons


def rejected_table(rows: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["file", "reason"])


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`; a pipe or a device is never waited for.

    Raises:
        InputError: it cannot be opened, is not a regular file, or is too large.
    """
    try:
        handle = os.open(path, READ_ONLY)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError("not a regular file")
        with open(handle, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError("the file cannot be opened") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"the file is larger than {MAX_BYTES >> 20} MB")
    return data


def readable(name: str) -> str:
    """A file's name as text that can be kept and shown, also where its bytes are no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
