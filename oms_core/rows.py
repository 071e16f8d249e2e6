"""Pictures in rows instead of files: parquet, CIFAR's binary files, data sets of the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from oms_core.errors import InputError
from oms_core.layouts import MAX_CAPTION, MAX_PICTURES, Listed, Rows, role_of

IMAGE = ("image", "img", "png", "jpg")
ROLE, LABEL, CAPTION = ("role", "member"), ("label", "fine_label", "labels"), ("caption", "text")
BESIDE = (*ROLE, *LABEL, *CAPTION)
GROUPS = 2  # row groups in memory: one with members, one with non-members
MAX_GROUP, PLAIN_GROUP, MAX_RATIO = 2**31, 2**28, 10  # bytes of a column in a row group, unpacked: in all, and at any
# ratio; beyond that they are at most so many times what is stored, as pictures are packed already
TEXTS = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
CIFAR = {  # files in training order, bytes of labels before each picture
    "data_batch_1.bin": ([f"data_batch_{k}.bin" for k in range(1, 6)], 1),
    "train.bin": (["train.bin"], 2),
}
CIFAR_SHAPE = (3, 32, 32)
PICKLED = ("data_batch_1", "train")  # files of the Python versions of CIFAR-10 and CIFAR-100


def parquet(files: list[Path]) -> Rows:
    """Parquet files with a column of pictures, as bytes or as the hub's {bytes, path}.

    Columns `role` or `member`, `label`, and `caption` or `text` are used where they are there. Two row groups
    are in memory at a time.

    Raises:
        InputError: a file is damaged or has no column of pictures.
    """
    opened = [open_parquet(path) for path in files]
    refuse_many(sum(file.metadata.num_rows for file, _ in opened), str(files[0]))
    listed = [one for path, (file, _) in zip(files, opened, strict=True) for one in said_in(path, file)]
    groups = [(file, column, group) for file, column in opened for group in range(file.num_row_groups)]
    ends = np.cumsum([file.metadata.row_group(group).num_rows for file, _, group in groups])

    @lru_cache(GROUPS)
    def cells(place: int) -> Any:
        file, column, group = groups[place]
        return file.read_row_group(group, columns=[column]).column(0)

    lock = Lock()  # a set is shared between threads, a ParquetFile is not made for that

    def read(number: int) -> bytes:
        place = int(np.searchsorted(ends, number, side="right"))
        try:
            with lock:
                column = cells(place)
            cell = column[number - int(ends[place])].as_py()  # counted from the end of its row group
        except Exception as error:  # damage shows in many ways
            raise InputError("the row is damaged") from error
        return picture_in(cell)

    return Rows(listed, read)


def open_parquet(path: Path) -> tuple[pq.ParquetFile, str]:
    """A parquet file and the name of its column of pictures.

    Raises:
        InputError: it is damaged or has no such column.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
        # what is stored once and named in many rows stays so in memory
        texts = [leaf.path for leaf in leaves if leaf.physical_type in TEXTS]
        file = pq.ParquetFile(path, metadata=file.metadata, read_dictionary=texts, page_checksum_verification=True)
        names = file.schema_arrow.names
        column = first(IMAGE, names)
        used = [number for number, leaf in enumerate(leaves) if leaf.path.partition(".")[0] in (column, *BESIDE)]
        sizes = sizes_of(file.metadata, used)
    except Exception as error:  # damage shows in many ways
        raise InputError(f"{path} is no complete parquet file; copy it again.") from error
    if column is None:
        raise InputError(f"{path} has no column of pictures; it needs one called {' or '.join(IMAGE)}.")
    refuse_packed(path, sizes)
    return file, column


def sizes_of(metadata: pq.FileMetaData, columns: list[int]) -> list[tuple[int, int]]:
    """How many bytes these columns take in each row group, unpacked and as they are stored.

    Raises:
        ValueError: the row groups do not hold the rows of the file.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ValueError("rows are missing")
    parts = [group.column(number) for group in groups for number in columns]
    return [(part.total_uncompressed_size, part.total_compressed_size) for part in parts]


def refuse_packed(path: Path, sizes: list[tuple[int, int]]) -> None:
    """Refuse, before anything is unpacked, what unpacks to more than memory should hold.

    Raises:
        InputError: a column of a row group does.
    """
    for unpacked, stored in sizes:
        if unpacked > min(MAX_GROUP, max(PLAIN_GROUP, MAX_RATIO * stored)):
            raise InputError(
                f"{path} unpacks to {unpacked >> 20:,} MB in one row group, from {stored >> 20:,} MB; "
                "write it in smaller row groups."
            )


def refuse_many(count: int, where: str) -> None:
    """Refuse more pictures than can be listed.

    Raises:
        InputError: there are more.
    """
    if count > MAX_PICTURES:
        raise InputError(f"{where} holds {count:,} pictures, at most {MAX_PICTURES:,} are supported; use a part of it.")


def said_in(path: Path, file: pq.ParquetFile) -> list[Listed]:
    """What the other columns say of each row.

    Raises:
        InputError: they are damaged, a text is endless, or a role is unclear.
    """
    wanted = [name for name in file.schema_arrow.names if name in BESIDE]
    try:
        cells = [*cells_in(file, wanted)] if wanted else [{}] * file.metadata.num_rows
    except Exception as error:  # damage shows in many ways
        raise InputError(f"{path} is no complete parquet file; copy it again.") from error
    if any(len(text) > MAX_CAPTION for row in cells for text in row.values()):
        raise InputError(f"{path} holds a text of more than {MAX_CAPTION >> 10} kB beside a picture; shorten it.")
    return said(path.stem, cells, str(path))


def cells_in(file: pq.ParquetFile, columns: list[str]) -> Iterable[dict[str, str]]:
    """Rows of texts."""
    for batch in file.iter_batches(columns=columns):
        names = batch.schema.names
        for values in zip(*map(texts_of, batch.columns), strict=True):
            yield dict(zip(names, values, strict=True))


def texts_of(cells: pa.Array) -> list[str]:
    """Cells as texts; equal ones are one in memory."""
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        cells = first_of_each(cells)
    if not pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_encode()
    words = [text_of(value) for value in cells.dictionary.to_pylist()]
    return ["" if place is None else words[place] for place in cells.indices.to_pylist()]


def first_of_each(lists: pa.ListArray) -> pa.Array:
    """The first of each list, nothing of one that is empty or missing."""
    starts = lists.offsets.to_numpy()
    empty = starts[1:] == starts[:-1]
    return lists.values.take(pa.array(starts[:-1], mask=empty | lists.is_null().to_numpy(zero_copy_only=False)))


def said(stem: str, cells: Iterable[dict[str, Any]], where: str) -> list[Listed]:
    """What rows say of their pictures, in columns named as usual.

    Raises:
        InputError: a role is unclear.
    """
    listed = []
    for number, row in enumerate(cells):
        role, label, caption = (text_of(row.get(first(known, row))) for known in (ROLE, LABEL, CAPTION))
        listed.append(Listed(f"{stem}-{number:06d}", role and role_of(role, where), label, caption))
    return listed


def first(known: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of the known names that is there."""
    return next((name for name in known if name in names), None)


def text_of(cell: Any) -> str:
    """A cell as text; of a list, such as several captions, the first."""
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    return "" if cell is None else str(cell)


def picture_in(cell: Any) -> bytes:
    """The bytes of a picture in a cell.

    Raises:
        InputError: there are none.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise InputError("the row holds no picture")
    return data


def cifar(folder: Path) -> Rows:
    """CIFAR-10 or CIFAR-100 in the binary version, in training order.

    Raises:
        InputError: a file is missing or not whole.
    """
    first = next(name for name in CIFAR if (folder / name).is_file())
    names, labels = CIFAR[first]
    length = labels + int(np.prod(CIFAR_SHAPE))
    for name in names:
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if not size or size % length:
            raise InputError(f"{folder / name} is missing or not whole; unpack the archive again.")
    refuse_many(sum((folder / name).stat().st_size for name in names) // length, str(folder))
    arrays = [np.memmap(folder / name, np.uint8, "r").reshape(-1, length) for name in names]
    ends = np.cumsum([len(array) for array in arrays])

    def row(number: int) -> np.ndarray:
        place = int(np.searchsorted(ends, number, side="right"))
        return arrays[place][number - int(ends[place])]  # counted from the end of its file

    def read(number: int) -> bytes:
        buffer = io.BytesIO()  # BMP: the same bytes everywhere
        Image.fromarray(row(number)[labels:].reshape(CIFAR_SHAPE).transpose(1, 2, 0)).save(buffer, "BMP")
        return buffer.getvalue()

    listed = [Listed(f"{folder.name}-{k:05d}", "", str(row(k)[labels - 1])) for k in range(int(ends[-1]))]
    return Rows(listed, read)


def hub(name: str) -> Rows:
    """A data set of the Hugging Face hub, ``owner/name`` or ``owner/name:split`` (by default train).

    Raises:
        InputError: the library `datasets` is not installed, or the data set cannot be fetched or has no pictures.
    """
    data, column = fetched(name)
    refuse_many(len(data), f"hub:{name}")
    wanted = [known for known in data.column_names if known in BESIDE]
    others = [known for known in data.column_names if known not in wanted]
    cells = data.remove_columns(others) if wanted else [{}] * len(data)
    listed = said(name.partition(":")[0].rpartition("/")[2], cells, f"hub:{name}")
    return Rows(listed, lambda number: picture_in(data[number][column]))


def fetched(name: str) -> tuple[Any, str]:
    """A data set of the hub with its pictures as bytes, and the name of their column.

    Raises:
        InputError: see `hub`.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"To open hub:{name} install the library datasets: pip install datasets.") from error
    place, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(place, split=split or "train")
        column = first(IMAGE, data.column_names)
        bare = column and data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # the library raises many kinds
        raise InputError(f"The data set {place} cannot be fetched; check its name and the connection.") from error
    if not column:
        raise InputError(f"The data set {place} has no column of pictures ({', '.join(IMAGE)}).")
    return bare, column
