"""Which device computes, in which precision, and how many pictures at once: decided at run time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from oms_core.errors import InputError

DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float32", "float16", "bfloat16")
MODES = ("eager", "channels_last", "compiled")
FIRST_BATCH, LARGEST_BATCH = 16, 1024
SLOWER = 1.02  # a batch twice as large may take so much longer for each picture, as there are fewer batches
LONG = 0.25  # seconds; a batch that takes so long is large enough
TRIES = 3  # of a batch, the quickest of which counts, as other work on the machine only makes them slower


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes.

    Attributes:
        device: cpu, cuda or mps.
        dtype: precision of the network; distances are always taken in float32.
        mode: how the network runs: as it is written, with channels as the innermost dimension, or compiled.
    """

    device: str
    dtype: str
    mode: str = MODES[0]


def place(device: str = "", dtype: str = "", mode: str = "") -> Placement:
    """Fill in what was not asked for: the best device here (or the one in OMS_DEVICE), float32, and eager.

    Raises:
        InputError: an unknown device, precision or mode, or a device that this machine does not have.
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
    if mode and mode not in MODES:
        raise InputError(f"There is no mode {mode!r}; choose one of {', '.join(MODES)}.")
    best = next(name for name in ("cuda", "mps", "cpu") if available[name])
    return Placement(wanted or best, dtype or DTYPES[0], mode or MODES[0])


def batch_size(placement: Placement, forward: Callable[[int], None]) -> int:
    """How many pictures to compute at once: tried before a run, and doubled as long as that costs nothing.

    Args:
        placement: where.
        forward: runs the model once on a batch of the given size, and waits for the answer.

    Raises:
        InputError: not even one picture fits.
    """
    size, best, least = FIRST_BATCH, 0, math.inf
    while 0 < size <= LARGEST_BATCH:
        seconds = trial(placement, forward, size)
        if seconds is None and best:
            return max(1, best // 2)  # half of what fits leaves room for the iterates
        if seconds is None:
            size //= 2
            continue
        if seconds / size > SLOWER * least:
            return best
        best, least = size, min(least, seconds / size)
        if seconds > LONG:
            return best
        size *= 2
    if not best:
        raise InputError(f"Not even one picture fits into the memory of {placement.device}; use another device.")
    return best


def trial(placement: Placement, forward: Callable[[int], None], size: int) -> float | None:
    """Seconds of the quickest of some forward passes after one that prepares the device; None if there is no room."""
    times: list[float] = []
    try:
        forward(size)
        while len(times) < TRIES and sum(times) < LONG:
            started = time.perf_counter()
            forward(size)
            times.append(time.perf_counter() - started)
        return min(times)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release(placement)
        return None


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
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
