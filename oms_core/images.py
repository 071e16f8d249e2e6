"""Image sets: pictures with an identity, a role, and what is known of them."""

import hashlib
import io
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL

from oms_core import cache, layouts, rows
from oms_core.decode import FORMATS, Profile, decode, pixels
from oms_core.errors import InputError
from oms_core.files import ASSETS
from oms_core.layouts import BESIDE, ROLES, Folder, Listed, Rows, Stamp, Tree, Zip, stamps
from oms_core.location import part_of, require_location
from oms_core.survey import Look, look_through, sha256

BUILT_IN = ("digits", "fashion")
REMEMBERED = 4  # opened sets
SURVEY = 2  # raised when the decoder takes or refuses other pictures
SPLIT = ("mia_train_idxs", "mia_eval_idxs")  # the arrays of a split
MOST_INDICES = 2**24  # bytes of an array of a split, and more for large sets
TICK = 2 * 10**9  # ns, the coarsest clock of a file system (FAT); two changes within a tick may have one stamp


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
    """Open an image set by its name; one whose files have not changed since it was last opened is not read again.

    | name                              | what it is                                                            |
    |-----------------------------------|-----------------------------------------------------------------------|
    | digits, fashion                   | built in                                                              |
    | FOLDER or FILE.zip                | pictures in one of the layouts of `oms_core.layouts`                  |
    | FILE.parquet, or a folder of them | a column of pictures, perhaps with `member`, `label`, `text`          |
    | a folder of CIFAR's binary files  | in training order                                                     |
    | hub:OWNER/NAME[:SPLIT]            | a data set of the Hugging Face hub                                    |
    | SPLIT.npz@NAME                    | NAME with the roles of `mia_train_idxs` and `mia_eval_idxs`           |
    | member=NAME,nonmember=NAME        | two sets, each as a whole in one role                                 |

    In the app, all but the built-in sets are opened only as an `oms_core.location.Location`.

    Raises:
        InputError: no such set, one that may not be opened, or nothing in it can be used.
    """
    if name in BUILT_IN:
        return built_in(name)
    if re.match(rf"({'|'.join(ROLES)})=", name):
        return joined(name)
    require_location(name, "image set", ", ".join(BUILT_IN))
    split, at, rest = name.partition(".npz@")
    places = [f"{split}.npz", rest] if at else [name]
    state = tuple(one for place in places for one in stamps(place))
    if places[-1].startswith("hub:") or (is_fresh(state) and not cache.is_counted(content_of(name, state))):
        return opened(name)
    return remembered(name, state)


def is_fresh(state: tuple[Stamp, ...]) -> bool:
    """Whether a file is so new that another change might not show; when it was written could be set to any time.

    Stamps from the future, of a clock that was set back or that is another machine's, do not say how new a file is. It
    is then as old as it has been seen to be.
    """
    newest, now = max(one.changed for one in state), time.time_ns()
    return abs(now - first_seen(state)) < TICK if newest > now else newest > now - TICK


@lru_cache(REMEMBERED)
def first_seen(state: tuple[Stamp, ...]) -> int:
    """When files were first seen to have this state, here or by another process, in ns."""
    content = {"files": digest_of_stamps(state), "first": "seen"}
    return int(cache.counted(content, lambda: pd.DataFrame({"ns": [time.time_ns()]})).ns[0])


def digest_of_stamps(state: tuple[Stamp, ...]) -> str:
    return hashlib.sha256("\n".join(map(str, state)).encode()).hexdigest()


def content_of(name: str, state: tuple[Stamp, ...]) -> dict[str, Any]:
    """Under which is kept what was seen of a set."""
    return {"decoder": [SURVEY, PIL.__version__], "set": name, "files": digest_of_stamps(state)}


@lru_cache(REMEMBERED)
def remembered(name: str, state: tuple[Stamp, ...]) -> ImageSet:
    """A set as it was opened while its files had this state, here or by another process."""
    return opened(name, content_of(name, state))


def opened(name: str, content: dict[str, Any] | None = None) -> ImageSet:
    """A set that is one place, or a split of it; what is found in its files is kept under the content, if given."""
    split, at, rest = name.partition(".npz@")
    found = with_split(Path(f"{split}.npz"), located(rest), rest) if at else located(name)
    count = len(found.listed)
    if content is None or rest in BUILT_IN:  # whose files have no stamp
        return collected(name, found, look_through(found.read, count))
    known = cache.counted(content, lambda: pd.DataFrame(look_through(found.read, count), columns=Look._fields))
    if len(known) != count:  # a file came or went between the stamps and now
        cache.forget(content)
        return opened(name)
    looks = without_passing_reasons(known, found).itertuples(index=False, name=None)
    return collected(name, found, looks, changed=lambda: cache.forget(content))


def without_passing_reasons(known: pd.DataFrame, found: Rows) -> pd.DataFrame:
    """What was seen of each picture, after another try where no bytes could be read, which may have been the disk's
    fault."""
    unread = [*known.index[known.image == ""]]
    if not unread:
        return known
    looks = look_through(lambda number: found.read(unread[number]), len(unread))
    again = pd.DataFrame(looks, columns=Look._fields, index=unread)
    return pd.concat([known.drop(unread), again]).sort_index()


def located(name: str) -> Rows:
    """The pictures that a name stands for, before any is opened.

    Raises:
        InputError: there is no such set, or what describes it cannot be read.
    """
    if name in BUILT_IN:
        images = built_in(name)
        said = images.table[[*Listed._fields]].itertuples(index=False)
        return Rows([Listed(*one) for one in said], images.read)
    if name.startswith("hub:"):
        return rows.hub(name.removeprefix("hub:"))
    if not name or not os.path.exists(name):
        raise InputError(f"There is no image set or folder {name!r}; the built-in sets are {', '.join(BUILT_IN)}.")
    path = Path(name)
    if os.path.isdir(path):
        return in_folder(path)
    kind = path.suffix.lower() if os.path.isfile(path) else ""
    if kind == ".zip":
        return in_tree(Zip(path))
    if kind == ".parquet":
        return rows.parquet([path])
    raise InputError(f"{name} is a file; name a folder that holds member/ and nonmember/, a .zip, or a .parquet.")


def inspection(images: ImageSet) -> dict[str, Any]:
    """What a set holds: counts, roles, sizes with their number, and the rejected files by reason."""
    sizes = Counter()
    for row in images.table.index:
        picture, _ = decode(images.read(row))
        sizes[f"{picture.height} x {picture.width} {'grey' if picture.mode == 'L' else 'colour'}"] += 1
    roles = images.table.role.replace("", "unknown").value_counts()
    return {
        "name": images.name,
        "pictures": len(images),
        "captioned": int(images.table.caption.ne("").sum()),
        "labels": int(images.table.label[images.table.label.ne("")].nunique()),
        "roles": {role: int(count) for role, count in roles.items()},
        "sizes": dict(sizes.most_common()),
        "rejected": {reason: [*files] for reason, files in images.rejected.groupby("reason").file},
    }


@lru_cache
def built_in(name: str) -> ImageSet:
    """A set shipped in ``assets/images``.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = ASSETS / "images" / f"{name}.parquet"
    try:
        found = pd.read_parquet(path, page_checksum_verification=True)
        table = pd.DataFrame(
            {
                "image": [sha256(data) for data in found.png],
                "file": [f"{name}-{row:04d}.png" for row in found.index],
                "role": found.role,
                "label": found.label.astype(str),
                "caption": found.caption,
            }
        )
    except Exception as error:  # damage in a footer shows in many ways, AttributeError and KeyError among them
        raise InputError(f"{path.name} in assets/images is missing or damaged; restore it by git checkout.") from error
    return ImageSet(name, table, found.png.__getitem__, rejected_table([]))


def in_folder(path: Path) -> Rows:
    """Pictures below a folder, or in the rows of files that lie in it."""
    if any(os.path.isfile(path / name) for name in rows.CIFAR):
        return rows.cifar(path)
    if any(os.path.isfile(path / name) for name in rows.PICKLED):
        raise InputError(f"{path} holds CIFAR as pickles, which can run code; use the binary version of the data set.")
    tree = Folder(path)
    tables = [path / file for file in tree.files if "/" not in file and file.lower().endswith(".parquet")]
    tables = [file for file in tables if os.path.isfile(file)]
    if tables and all(file.lower().endswith(BESIDE) for file in tree.files):
        return rows.parquet(tables)
    return in_tree(tree)


def in_tree(tree: Tree) -> Rows:
    """The pictures of a folder or a zip."""
    listed = [*layouts.listed(tree)]
    return Rows(listed, lambda number: tree.read(listed[number].file))


def collected(
    name: str,
    found: Rows,
    looks: Iterable[tuple[str, str]],
    refused: Sequence[tuple[str, str]] = (),
    changed: Callable[[], None] = lambda: None,
) -> ImageSet:
    """An image set of the pictures that can be used.

    Args:
        name: how a user calls the set.
        found: the pictures.
        looks: what was seen of each, see `oms_core.survey.Look`.
        refused: file and reason of what was turned away before.
        changed: called when a picture turns out to be another than was looked at.

    Raises:
        InputError: no picture can be used.
    """
    kept, rejected = {}, [*refused]
    for number, (one, (image, reason)) in enumerate(zip(found.listed, looks, strict=True)):
        file, label, caption = (readable(text) for text in (one.file, one.label, one.caption))
        if reason:
            rejected.append((file, reason))
        else:
            kept[number] = (image, file, one.role, label, caption)
    columns = ["image", "file", "role", "label", "caption"]
    table, doubled = without_doubles(pd.DataFrame.from_dict(kept, orient="index", columns=columns))
    rejected += doubled
    refuse_nothing(name, table, rejected)

    numbers, images = [*table.index], [*table.image]

    def again(row: int) -> bytes:
        return read_again(found, numbers[row], name, images[row], changed)

    return ImageSet(name, table.reset_index(drop=True), again, rejected_table(rejected))


def refuse_nothing(name: str, table: pd.DataFrame, rejected: list[tuple[str, str]]) -> None:
    """Refuse a set without pictures, with the first reason."""
    if table.empty:
        why = " The first reason: {}: {}.".format(*rejected[0]) if rejected else ""
        raise InputError(f"No picture in {name} can be used; supported are {', '.join(FORMATS)}.{why}")


def read_again(found: Rows, number: int, name: str, image: str, changed: Callable[[], None]) -> bytes:
    """The bytes of a picture, which must still be the picture of this identity; if not, `changed` is called.

    Raises:
        InputError: it was changed or removed since the set was opened.
    """
    where = Path(name) / readable(found.listed[number].file)
    try:
        data = found.read(number)
        if sha256(data) == image:
            return data
        change = "changed while it was in use"
    except InputError as error:
        change = f"removed while it was in use ({error})"
    remembered.cache_clear()  # the set is read again, even if its files' stamps have not changed
    changed()
    raise InputError(f"{where} was {change}; open the set again.")


def with_split(split: Path, found: Rows, name: str) -> Rows:
    """Pictures with the roles of a ``*_train_ratio0.5.npz``: indices in the order of the data set.

    Raises:
        InputError: the file is damaged, lacks an array, or its indices do not fit the set.
    """
    size = len(found.listed)
    try:
        archive = Zip(io.BytesIO(layouts.read_regular(split)))
        parts = [indices_in(archive.read(f"{name}.npy", MOST_INDICES + 16 * size)) for name in SPLIT]
    except Exception as error:  # NumPy raises many kinds for what is no such file
        raise InputError(f"{split} holds no {' and '.join(SPLIT)} that can be read.") from error
    if not all(np.issubdtype(part.dtype, np.integer) for part in parts):
        raise InputError(f"{split} holds indices that are not whole numbers; save them as integers.")
    if any(len(part) and not 0 <= part.min() <= part.max() < size for part in parts):
        raise InputError(f"{split} names pictures outside {name}, which has {size}; are they of one data set?")
    members, others = (part.astype(np.int64) for part in parts)
    if np.bincount(np.concatenate([members, others])).max(initial=0) > 1:
        raise InputError(f"{split} names a picture twice; members and non-members must be disjoint.")
    role = np.full(size, "", object)
    role[members], role[others] = "member", "nonmember"
    return found._replace(listed=[one._replace(role=part) for one, part in zip(found.listed, role, strict=True)])


def indices_in(data: bytes) -> np.ndarray:
    """The numbers in the bytes of an ``.npy`` file, in one row; a header that promises more is not believed.

    Raises:
        ValueError: it is no such file.
    """
    file = io.BytesIO(data)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
    numbers = np.frombuffer(data, dtype, offset=file.tell())
    return numbers.reshape(shape).ravel()


def joined(name: str) -> ImageSet:
    """Several sets, each as a whole in one role: ``member=NAME,nonmember=NAME``.

    Raises:
        InputError: a role is unknown or given twice, or every picture stands in two roles.
    """
    parts = [part.partition("=") for part in name.split(",")]
    roles = [role.strip() for role, _, _ in parts]
    if len({*roles}) != len(roles) or not {*roles} <= {*ROLES}:
        raise InputError(f"{name!r} should name each of {', '.join(ROLES)} at most once, as role=SET.")
    sets = [open_images(part_of(name, place.strip())) for _, _, place in parts]
    tables = [part.table.assign(role=role) for role, part in zip(roles, sets, strict=True)]
    places = [(part, row) for part, table in zip(sets, tables, strict=True) for row in table.index]
    whole, doubled = without_doubles(pd.concat(tables, ignore_index=True))
    refused = [pair for part in sets for pair in part.rejected.itertuples(index=False, name=None)] + doubled
    refuse_nothing(name, whole, refused)
    places = [places[row] for row in whole.index]

    def read(row: int) -> bytes:
        part, place = places[row]
        return part.read(place)

    return ImageSet(name, whole.reset_index(drop=True), read, rejected_table(refused))


def without_doubles(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Drop repeated files within a role, and every copy of a picture that stands in two roles."""
    torn = table.groupby("image").role.transform("nunique") > 1
    repeated = table.duplicated("image") & ~torn
    reasons = [(file, "the same picture is also listed with another role") for file in table.file[torn]]
    reasons += [(file, "the same picture is listed twice") for file in table.file[repeated]]
    return table[~torn & ~repeated], reasons


def rejected_table(found: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(found, columns=["file", "reason"])


def readable(name: str) -> str:
    """A file's name or a caption as text that can be kept and shown, also where its bytes are no UTF-8."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name)
