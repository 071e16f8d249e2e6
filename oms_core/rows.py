"""Pictures in rows instead of files: parquet, CIFAR's binary files, data sets of the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from oms_core.errors import InputError
from oms_core.layouts import Listed, role_of

IMAGE, CAPTION, LABEL = ("image", "img", "png", "jpg"), ("caption", "text"), ("label", "fine_label", "labels")
CIFAR = {  # files in training order, bytes of labels before each picture
    "data_batch_1.bin": ([f"data_batch_{k}.bin" for k in range(1, 6)], 1),
    "train.bin": (["train.bin"], 2),
}
CIFAR_SHAPE = (3, 32, 32)
PICKLED = "data_batch_1"  # CIFAR's Python version


class Rows(NamedTuple):
    """Pictures that are read by their number.

    Attributes:
        listed: what is said of each.
        read: from a picture's number to its bytes.
    """

    listed: Iterable[Listed]
    read: Callable[[int], bytes]


def parquet(files: list[Path]) -> Rows:
    """Parquet files with a column of pictures, as bytes or as the hub's {bytes, path}.

    Columns `role` or `member`, `label`, and `caption` or `text` are used where they are there. One row group
    is in memory at a time.

    Raises:
        InputError: a file is damaged or has no column of pictures.
    """
    try:
        opened = [pq.ParquetFile(file, page_checksum_verification=True) for file in files]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{files[0]} is no complete parquet file; copy it again.") from error
    names = set(opened[0].schema_arrow.names)
    column = next((name for name in IMAGE if name in names), None)
    if column is None:
        raise InputError(f"{files[0]} has no column of pictures; it needs one called {' or '.join(IMAGE)}.")
    groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
    ends = np.cumsum([file.metadata.row_group(group).num_rows for file, group in groups])
    kept: dict[int, Any] = {}

    def read(number: int) -> bytes:
        place = int(np.searchsorted(ends, number, side="right"))
        if place not in kept:
            kept.clear()
            file, group = groups[place]
            kept[place] = file.read_row_group(group, columns=[column]).column(0)
        cell = kept[place][number - int(ends[place - 1] if place else 0)].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise InputError("the row holds no picture")
        return data

    return Rows(said_in(opened, names, files[0].stem), read)


def said_in(opened: list[pq.ParquetFile], names: set[str], stem: str) -> Iterable[Listed]:
    """What the other columns say of each row."""
    chosen = {
        "role": next((name for name in ("role", "member") if name in names), None),
        "label": next((name for name in LABEL if name in names), None),
        "caption": next((name for name in CAPTION if name in names), None),
    }
    wanted = [name for name in chosen.values() if name]
    number = 0
    for file in opened:
        for batch in file.iter_batches(columns=wanted):
            cells = {key: batch.column(name).to_pylist() if name else None for key, name in chosen.items()}
            for k in range(batch.num_rows):
                said = {key: "" if column is None or column[k] is None else column[k] for key, column in cells.items()}
                role = role_of(str(said["role"]), f"{stem}.parquet") if said["role"] != "" else ""
                yield Listed(f"{stem}-{number:06d}", role, str(said["label"]), str(said["caption"]))
                number += 1


def cifar(folder: Path) -> Rows:
    """CIFAR-10 or CIFAR-100 in the binary version, in training order.

    Raises:
        InputError: a file is missing or not whole.
    """
    first = next(name for name in CIFAR if (folder / name).is_file())
    names, labels = CIFAR[first]
    length = labels + int(np.prod(CIFAR_SHAPE))
    for name in names:
        if not (folder / name).is_file() or (folder / name).stat().st_size % length:
            raise InputError(f"{folder / name} is missing or not whole; unpack the archive again.")
    arrays = [np.memmap(folder / name, np.uint8, "r").reshape(-1, length) for name in names]
    ends = np.cumsum([len(array) for array in arrays])

    def row(number: int) -> np.ndarray:
        place = int(np.searchsorted(ends, number, side="right"))
        return arrays[place][number - int(ends[place - 1] if place else 0)]

    def read(number: int) -> bytes:
        buffer = io.BytesIO()  # BMP: the same bytes everywhere
        Image.fromarray(row(number)[labels:].reshape(CIFAR_SHAPE).transpose(1, 2, 0)).save(buffer, "BMP")
        return buffer.getvalue()

    said = (Listed(f"{folder.name}-{k:05d}", "", str(row(k)[labels - 1])) for k in range(int(ends[-1])))
    return Rows(said, read)


def hub(name: str) -> Rows:
    """A data set of the Hugging Face hub, ``owner/name`` or ``owner/name:split`` (by default train).

    Raises:
        InputError: the library `datasets` is not installed, or the data set cannot be fetched or has no pictures.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"To open hub:{name} install the library datasets: pip install datasets.") from error
    owner_name, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(owner_name, split=split or "train")
    except Exception as error:  # the library raises many kinds
        raise InputError(f"The data set {owner_name} cannot be fetched; check its name and the connection.") from error
    column = next((column for column in IMAGE if column in data.column_names), None)
    if column is None:
        raise InputError(f"The data set {owner_name} has no column of pictures ({', '.join(IMAGE)}).")
    data = data.cast_column(column, datasets.Image(decode=False))
    label, caption = (next((c for c in known if c in data.column_names), None) for known in (LABEL, CAPTION))
    said = data.remove_columns([c for c in data.column_names if c not in (label, caption)])
    stem = owner_name.rpartition("/")[2]

    def listed() -> Iterable[Listed]:
        for number in range(len(data)):
            cells = said[number] if label or caption else {}
            texts = [str(cells.get(c, "")) if c else "" for c in (label, caption)]
            yield Listed(f"{stem}-{number:06d}", "", *texts)

    return Rows(listed(), lambda number: data[number][column]["bytes"])
