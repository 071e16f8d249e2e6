"""Files and folders that are whole or not there: made beside their place, flushed, and moved into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from oms_core.errors import InputError


def write_file(path: Path, data: bytes, flag: str = "--out") -> None:
    """Write a file of the user's whole, or leave what is there.

    Args:
        path: the file.
        data: its content.
        flag: by which another place can be named.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise unwritable(path, error.strerror, flag) from error


def unwritable(path: Path, why: object, flag: str) -> InputError:
    """The sentence on a place that cannot be written."""
    return InputError(f"{path} cannot be written ({why}); choose another place with {flag}.")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one. Where a link stands, its file is written.

    Raises:
        OSError: it could not be written; the old file is as it was, and nothing is left beside it.
    """
    path = Path(os.path.realpath(path))
    refuse_kept(path)
    partial = beside(path)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    flush_names(path.parent)


def refuse_kept(path: Path) -> None:
    """Refuse to replace what is no file, or a file that must not be written."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "it is there and is not a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "it is write-protected")


def beside(path: Path) -> Path:
    """A name in the same folder that nobody else uses, however long the first name is."""
    return path.with_name(f".{uuid.uuid4().hex}.partial")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends well and is removed if it does not.

    Args:
        path: the place; a folder that stands there is replaced.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    partial = beside(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush_tree(partial)
        put_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    flush_names(path.parent)


def put_folder(made: Path, path: Path) -> None:
    """Rename a folder; what stands there before is set aside, put back if the renaming fails, and removed if not."""
    if not os.path.lexists(path):
        os.rename(made, path)
        return
    before = beside(path)
    os.rename(path, before)
    try:
        os.rename(made, path)
    except BaseException:
        os.rename(before, path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Wait until all that lies below a folder is on disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(Path(root, name))
        flush_names(Path(root))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; Windows flushes no folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where its file system can say so; each is whole in any case."""
    with contextlib.suppress(OSError):
        flush(folder)
