"""Pictures in rows instead of files: parquet, CIFAR's binary files, data sets of the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from oms_core.errors import InputError
from oms_core.layouts import Listed, Rows, role_of

IMAGE = ("image", "img", "png", "jpg")
ROLE, LABEL, CAPTION = ("role", "member"), ("label", "fine_label", "labels"), ("caption", "text")
GROUPS = 2  # row groups in memory: one with members, one with non-members
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
        names = file.schema_arrow.names
    except Exception as error:  # damage shows in many ways
        raise InputError(f"{path} is no complete parquet file; copy it again.") from error
    column = first(IMAGE, names)
    if column is None:
        raise InputError(f"{path} has no column of pictures; it needs one called {' or '.join(IMAGE)}.")
    return file, column


def said_in(path: Path, file: pq.ParquetFile) -> list[Listed]:
    """What the other columns say of each row.

    Raises:
        InputError: they are damaged, or a role is unclear.
    """
    wanted = [name for name in file.schema_arrow.names if name in (*ROLE, *LABEL, *CAPTION)]
    try:
        cells = [row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist()]
    except Exception as error:  # damage shows in many ways
        raise InputError(f"{path} is no complete parquet file; copy it again.") from error
    return said(path.stem, cells, str(path))


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
    wanted = [known for known in data.column_names if known in (*ROLE, *LABEL, *CAPTION)]
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
