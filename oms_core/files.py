"""Reading what models are kept in, without torch: JSON, safetensors headers, digests."""

import hashlib
import json
import math
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from oms_core.errors import InputError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MAX_CONFIG_BYTES = 2**20
STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call weights
VARIANTS = ("", ".fp16")  # the first that is there is used


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most `MAX_CONFIG_BYTES`.

    Raises:
        InputError: the file is missing, too large, or not a JSON object.
    """
    data = read_bytes(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON; restore the original file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; restore the original file.")
    return content


def read_bytes(path: Path) -> bytes:
    """A small file.

    Raises:
        InputError: it is missing or larger than `MAX_CONFIG_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} is larger than a configuration should be ({MAX_CONFIG_BYTES >> 20} MB).")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is missing or cannot be read.") from error


def refuse_code(folder: Path) -> None:
    """A model folder holds data; code in it is refused, never run."""
    for path in folder.rglob("*.py"):
        raise InputError(f"{path} is code; remove it, a model folder holds only configurations and weights.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a network: one file, or the parts that a large one was split into."""
    for variant in VARIANTS:
        for stem in STEMS:
            whole = folder / f"{stem}{variant}.safetensors"
            found = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}{variant}-*-of-*.safetensors"))
            if found:
                return found
    return []


def variant_of(folder: Path) -> str | None:
    """What diffusers calls the variant of a folder's weights: fp16, or None for the plain ones."""
    files = weight_files(folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def weight_sizes(folder: Path) -> list[int]:
    """How many numbers each tensor holds, read from the headers alone.

    Raises:
        InputError: there are no safetensors, or a header is not one.
    """
    files = weight_files(folder)
    if not files:
        raise InputError(f"{folder} holds no safetensors weights; pickles are never loaded, convert them first.")
    return [math.prod(entry["shape"]) for path in files for entry in safetensors_header(path).values()]


def safetensors_header(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file lists: eight bytes of length, then JSON (the format's documentation)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(100 * 2**20, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        if not all(isinstance(n, int) and n >= 0 for entry in tensors.values() for n in entry["shape"]):
            raise ValueError("a shape is not one")
        if 8 + length + max(entry["data_offsets"][1] for entry in tensors.values()) != path.stat().st_size:
            raise ValueError("it is not as long as its header says")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(f"{path} is not a complete safetensors file; copy it again.") from error
    return tensors


def digest_of(parts: list[bytes]) -> str:
    """SHA-256 over parts, each preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def digest_of_file(path: Path) -> bytes:
    """SHA-256 of a file; asked again, an unchanged file is not read again."""
    status = os.stat(path)
    return _digest_of_file(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of_file(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
