"""Which device computes, in which precision, and how many pictures at once: decided at run time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from oms_core.errors import InputError

DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float32", "float16", "bfloat16")
CPU_BATCH = 64
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes.

    Attributes:
        device: cpu, cuda or mps.
        dtype: precision of the network; distances are always taken in float32.
    """

    device: str
    dtype: str


def place(device: str = "", dtype: str = "") -> Placement:
    """Fill in what was not asked for: the best device here (or the one in OMS_DEVICE), and float32.

    Raises:
        InputError: an unknown device or precision, or a device that this machine does not have.
    """
    import torch

    wanted = device or os.environ.get("OMS_DEVICE", "")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted and wanted not in DEVICES:
        raise InputError(f"There is no device {wanted!r}; choose one of {', '.join(DEVICES)}.")
    if wanted and not available[wanted]:
        raise InputError(f"This machine has no usable {wanted}; leave the device out to use what it has.")
    if dtype and dtype not in DTYPES:
        raise InputError(f"There is no precision {dtype!r}; choose one of {', '.join(DTYPES)}.")
    best = next(name for name in ("cuda", "mps", "cpu") if available[name])
    return Placement(wanted or best, dtype or "float32")


def batch_size(placement: Placement, forward: Callable[[int], None]) -> int:
    """How many pictures to compute at once: `CPU_BATCH`, or the most that a trial shows to fit on a GPU.

    Args:
        placement: where.
        forward: runs the model once on a batch of the given size.

    Raises:
        InputError: not even one picture fits.
    """
    if placement.device == "cpu":
        return CPU_BATCH
    size = LARGEST_BATCH
    while size:
        try:
            forward(size)
            return max(1, size // 2)  # half of what fits leaves room for the iterates
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size //= 2
    raise InputError(f"Not even one picture fits into the memory of {placement.device}; use another device.")


@contextmanager
def fitting(placement: Placement, batch: int) -> Iterator[None]:
    """Turn a lack of memory into a sentence. The batch is never made smaller silently: that would change scores.

    Raises:
        InputError: in place of the device's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release(placement)
        less = f"run again with a batch size of {batch // 2}" if batch > 1 else "use another device"
        raise InputError(f"{placement.device} ran out of memory at {batch} pictures at once; {less}.") from None


def release(placement: Placement) -> None:
    """Give back what a failed run left reserved on a GPU."""
    import torch

    if placement.device == "cuda":
        torch.cuda.empty_cache()
    elif placement.device == "mps":
        torch.mps.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory; CUDA has a class for it, MPS and the CPU only words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
