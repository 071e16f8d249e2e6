"""Reading what models are kept in, without torch: regular files, JSON, safetensors headers, digests.

Only regular files are read, never a pipe or a device, and a link is followed only within its model's folder.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from oms_core.decode import MAX_BYTES
from oms_core.device import out_of_memory
from oms_core.errors import InputError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
READ_ONLY = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
MAX_CONFIG_BYTES = 2**20
MAX_VOCABULARY_BYTES, MAX_VOCABULARY_FILES = 64 * 2**20, 50
MAX_HEADER_BYTES, MAX_TENSORS = 16 * 2**20, 20_000
STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call weights
VARIANTS = ("", ".fp16")  # the first that is there is used
WEIGHTS = ".safetensors"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}  # of one number, by safetensors' name of its type

Shapes = dict[str, tuple[int, ...]]
Given, Made = ParamSpec("Given"), TypeVar("Made")


@dataclass(frozen=True)
class Part:
    """One folder of a model as it was looked at; a network or a tokenizer is made of this and of nothing else.

    Attributes:
        folder: where it lies.
        home: the model's folder, which a link must not leave.
        config: what its config.json said; empty for a tokenizer.
        digests: SHA-256 of each file of weights or vocabulary, by name.
        numbers: how many its weights hold.
    """

    folder: Path
    home: Path
    config: dict[str, Any]
    digests: dict[str, bytes]
    numbers: int = 0

    def read(self, name: str) -> bytes:
        """The bytes of a file, which are those that were digested.

        Raises:
            InputError: they are not; all digests are then taken anew.
        """
        path = self.folder / name
        with opened(path, self.home) as file:
            data = file.read()
        if hashlib.sha256(data).digest() != self.digests[name]:
            _digest_of_file.cache_clear()
            raise InputError(f"{path} changed since it was looked at; run again.")
        return data

    @property
    def weights(self) -> list[str]:
        """The names of its safetensors, in the order of their numbers."""
        return [name for name in self.digests if name.endswith(WEIGHTS)]

    @property
    def words(self) -> list[str]:
        """The names of its other files."""
        return [name for name in self.digests if not name.endswith(WEIGHTS)]


def in_a_sentence(read: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function refuse a model in one sentence, whatever a library raises over what lies in its folder.

    A lack of memory stays what it is, see `oms_core.device.fitting`.

    Args:
        read: its first argument is a model or the name of one.
    """

    @wraps(read)
    def reading(*given: Given.args, **named: Given.kwargs) -> Made:
        try:
            return read(*given, **named)
        except InputError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            name = getattr(given[0], "name", given[0])
            raise InputError(f"{name} cannot be read: {reason(error)}; restore its original files.") from error

    return reading


def reason(error: Exception) -> str:
    """What an error says, on one line and short enough for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def opened(path: Path, home: Path | None = None) -> BinaryIO:
    """A regular file, open to be read.

    Args:
        path: the file.
        home: the folder of a model, which a link must not leave; without one every link is followed.

    Raises:
        InputError: it is missing, no regular file, or a link that leads elsewhere.
    """
    real = path if home is None else within(path, home)
    try:
        return regular(real)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing, no regular file, or cannot be read; put the original there.") from error


def within(path: Path, home: Path) -> Path:
    """Where a path leads, which must be within the model's folder.

    Raises:
        InputError: a link leads out of it.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(ground(home)):
        raise InputError(f"{path} is a link out of the model's folder; put a copy of the file in its place.")
    return real


def ground(home: Path) -> Path:
    """What links in a model's folder may lead to: the folder, or, in the cache of Hugging Face, its repository.

    There a file is a link from models--owner--name/snapshots/COMMIT to models--owner--name/blobs.
    """
    real = Path(os.path.realpath(home))
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent
    return real


def read_regular(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most so many; a pipe or a device is never waited for.

    Raises:
        InputError: it cannot be opened, is not a regular file, or is too large.
    """
    try:
        with regular(path) as file:
            data = file.read(most + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError("the file cannot be opened") from error
    if len(data) > most:
        raise InputError(f"the file is larger than {size_of(most)}")
    return data


def size_of(count: int) -> str:
    """So many bytes in words."""
    return f"{count >> 20} MB" if count >= 2**20 else f"{count >> 10} kB"


def regular(path: Path) -> BinaryIO:
    """A regular file, open to be read.

    Raises:
        InputError: it is something else.
        OSError, ValueError: it cannot be opened.
    """
    handle = os.open(path, READ_ONLY)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return open(handle, "rb")
    os.close(handle)
    raise InputError("not a regular file")


def read_json(path: Path, home: Path | None = None) -> dict[str, Any]:
    """A JSON object of at most `MAX_CONFIG_BYTES`.

    Raises:
        InputError: the file is missing, too large, or not a JSON object; see `opened`.
    """
    return parse(read_bytes(path, home), path)


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the bytes of a file.

    Raises:
        InputError: there is none.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON; restore the original file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; restore the original file.")
    return content


def read_bytes(path: Path, home: Path | None = None) -> bytes:
    """A small file.

    Raises:
        InputError: it is larger than `MAX_CONFIG_BYTES`; see `opened`.
    """
    with opened(path, home) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise InputError(f"{path} is larger than a configuration should be ({MAX_CONFIG_BYTES >> 20} MB).")
    return data


def refuse_code(folder: Path) -> None:
    """A model folder holds data; code in it is refused, never run."""
    for path in folder.rglob("*.py"):
        raise InputError(f"{path} is code; remove it, a model folder holds only configurations and weights.")


def weight_files(folder: Path, home: Path) -> list[str]:
    """The names of a network's safetensors: one file, or the parts that a large one was split into.

    Raises:
        InputError: there are none, they are not whole, or there is more than one choice.
    """
    names = sorted(os.listdir(within(folder, home)))
    for variant in VARIANTS:
        choices = [files for stem in STEMS for files in (whole(names, stem, variant), parts(names, stem, variant))]
        found = [files for files in choices if files]
        if len(found) > 1:
            both = " and ".join(files[0] for files in found)
            raise InputError(f"{folder} holds both {both}, either of which could be its weights; keep one.")
        if found:
            check_parts_whole(folder, found[0])
            check_index(folder, home, variant, found[0])
            return found[0]
    raise InputError(f"{folder} holds no safetensors weights; pickles are never loaded, convert them first.")


def whole(names: list[str], stem: str, variant: str) -> list[str]:
    """The file of weights that were not split, among the names in a folder."""
    return [name for name in names if name == f"{stem}{variant}{WEIGHTS}"]


def parts(names: list[str], stem: str, variant: str) -> list[str]:
    """The files of weights that were split."""
    return [name for name in names if re.fullmatch(rf"{stem}{re.escape(variant)}-\d+-of-\d+{WEIGHTS}", name)]


def check_parts_whole(folder: Path, files: list[str]) -> None:
    """Refuse weights of which a part is missing, or parts of two ways to split them."""
    numbers = [
        [int(number) for number in re.findall(r"-(\d+)-of-(\d+)\.", name)[0]] for name in files if "-of-" in name
    ]
    total = len(numbers)
    if numbers and numbers != [[number, total] for number in range(1, total + 1)]:
        raise InputError(f"{folder} holds {total} parts of its weights, of which {files[0]} is one; copy all of them.")


def check_index(folder: Path, home: Path, variant: str, files: list[str]) -> None:
    """Refuse an index that lists other files than those that are there; where there is none, none is needed."""
    stem = next(stem for stem in STEMS if files[0].startswith(stem))
    for name in (f"{stem}{variant}{WEIGHTS}.index.json", f"{stem}{WEIGHTS}.index{variant}.json"):
        if os.path.lexists(folder / name):
            listed = read_json(folder / name, home).get("weight_map")
            if not isinstance(listed, dict) or {str(file) for file in listed.values()} != {*files}:
                raise InputError(
                    f"{folder / name} lists other weights than {', '.join(files[:3])}; keep one of the two."
                )


def word_files(folder: Path, home: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The names of a tokenizer's files.

    Raises:
        InputError: there are more than any tokenizer has.
    """
    names = sorted(name for name in os.listdir(within(folder, home)) if Path(name).suffix in suffixes)
    if len(names) > MAX_VOCABULARY_FILES:
        raise InputError(f"{folder} holds {len(names)} files; a tokenizer has at most {MAX_VOCABULARY_FILES}.")
    return names


def shapes_of(folder: Path, home: Path) -> Shapes:
    """The shape of each tensor of a network, read from the headers alone.

    Raises:
        InputError: see `weight_files`; a header is not one, or a tensor is there twice.
    """
    found: Shapes = {}
    for name in weight_files(folder, home):
        header = safetensors_header(folder / name, home)
        if twice := found.keys() & header.keys():
            raise InputError(f"{folder} holds {min(twice)} in two parts of its weights; copy them again.")
        found |= {tensor: tuple(entry["shape"]) for tensor, entry in header.items()}
    return found


def numbers_of(shapes: Shapes) -> int:
    """How many numbers the tensors of a network hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def safetensors_header(path: Path, home: Path | None = None) -> dict[str, Any]:
    """The tensors that a safetensors file lists: eight bytes of length, then JSON (the format's documentation).

    Raises:
        InputError: it is no such file, not whole, or lists more than `MAX_TENSORS`; see `opened`.
    """
    with opened(path, home) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError("its header is too long")
            text = file.read(length)
            if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS + 2:
                raise ValueError("it lists too many tensors")
            tensors = json.loads(text)
            tensors.pop("__metadata__", None)
            check_spans([*tensors.values()], size - 8 - length)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
            raise InputError(f"{path} is not a complete safetensors file; copy it again.") from error
    return tensors


def check_spans(tensors: list[dict[str, Any]], length: int) -> None:
    """Refuse tensors that do not fill their file one behind the other, each with as many bytes as its shape asks for.

    Raises:
        ValueError, LookupError, TypeError: they do not.
    """
    end = 0
    for entry in sorted(tensors, key=lambda entry: entry["data_offsets"]):
        (begin, stop), shape = entry["data_offsets"], entry["shape"]
        if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
            raise ValueError("a shape is not one")
        if begin != end or 8 * (stop - begin) != BITS[entry["dtype"]] * math.prod(shape):
            raise ValueError("its tensors do not fill it")
        end = stop
    if not tensors or end != length:
        raise ValueError("it is not as long as its header says")


def digest_of(parts: list[bytes]) -> str:
    """SHA-256 over parts, each preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def digest_of_file(path: Path, home: Path | None = None, most: int | None = None) -> bytes:
    """SHA-256 of a file; asked again, an unchanged file is not read again.

    Args:
        path: the file.
        home: see `opened`.
        most: how many bytes it may have.

    Raises:
        InputError: it is larger; see `opened`.
    """
    with opened(path, home) as file:
        status = os.fstat(file.fileno())
    if most is not None and status.st_size > most:
        raise InputError(f"{path} is larger than {most >> 20} MB; restore the original file.")
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _digest_of_file(path, home, stamp)


@lru_cache(maxsize=256)
def _digest_of_file(path: Path, home: Path | None, stamp: tuple[int, ...]) -> bytes:
    with opened(path, home) as file:
        return hashlib.file_digest(file, "sha256").digest()
