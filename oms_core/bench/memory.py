"""How much memory scoring takes beyond the model itself, and how time and memory grow with the set."""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from oms_core.bench.base import Row, Subject, bare_forward, empty_cache, row
from oms_core.cache import FORMAT
from oms_core.compute import Progress, compute
from oms_core.errors import InputError
from oms_core.images import ImageSet
from oms_core.run import Plan, about

MB = 2**20
ALLOWED = {"memory": 150, "growth": 1.05}
SMALL, LARGE, TURNS = 1024, 51_200, 10  # pictures in whole batches
GROWN = ("NA",)


def memory_rows(subject: Subject) -> list[Row]:
    """Peaks of two processes, one that only asks the network, and one that scores."""
    bare, engine = alone(peak_of_forwards, subject), alone(peak_of_scoring, subject)
    what = f"{subject.pictures} pictures, {subject.name}"
    return [
        row("peak of a process with bare forwards", bare, "MB"),
        row(f"peak of scoring beyond bare forwards, {what}", engine - bare, "MB", most=ALLOWED["memory"]),
    ]


def growth_rows(subject: Subject) -> list[Row]:
    """A small and a large set in one process: time for each picture, and what the large one adds to memory."""
    found = alone(grown, subject)
    what = f"{SMALL:,} to {LARGE:,} pictures, {' + '.join(GROWN)}, {subject.name}"
    return [
        row(f"time per picture, {what}", found["time"], "large / small", most=ALLOWED["growth"]),
        row(f"peak of memory, {what}", found["memory"], "MB more", most=ALLOWED["memory"]),
        row(f"parts on disk, {LARGE:,} pictures", found["parts"], "files"),
    ]


def alone(work: Callable[[Subject], Any], subject: Subject) -> Any:
    """The answer of a process that does nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, subject).result()


def peak() -> float:
    """The most memory that this process had so far, in MB.

    Raises:
        InputError: this system does not say.
    """
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / MB
    try:
        import resource
    except ImportError as error:
        raise InputError("Peaks of memory can be measured on Linux and macOS only; leave these parts out.") from error

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / MB if sys.platform == "darwin" else found * 1024 / MB


def peak_of_forwards(subject: Subject) -> float:
    forward = bare_forward(subject.denoiser, subject.batch)
    for _ in range(10):
        forward()
    return peak()


def peak_of_scoring(subject: Subject) -> float:
    with empty_cache():
        compute(subject.plan())
    return peak()


def grown(subject: Subject) -> dict[str, float]:
    """The small set again and again between parts of the large one, so that both meet the same machine."""
    small = repeated(subject, SMALL)
    ends: list[float] = []  # of the small ones and of the parts between them, in turn
    sizes: list[int] = []  # pictures of each part

    def score_small() -> None:
        run = replace(small.run, seed=len(ends) + 1)  # a question of its own, so that nothing is found
        compute(about(replace(small, run=run), small.images))
        ends.append(time.perf_counter())

    def tick(progress: Progress) -> None:
        if progress.done * TURNS >= (len(sizes) + 1) * LARGE:
            ends.append(time.perf_counter())
            sizes.append(progress.done - sum(sizes))
            score_small()

    with empty_cache() as folder:
        score_small()  # warms up
        before = peak()
        large = repeated(subject, LARGE)
        score_small()
        compute(large, tick)
        parts = len([*(folder / FORMAT).glob(f"*/{large.tasks[0].key}/*/part-*.parquet")])
    took = [end - start for start, end in pairwise(ends[1:])]  # a part, a small one, a part, a small one ...
    ratios = [part / size / (one / SMALL) for part, one, size in zip(took[::2], took[1::2], sizes, strict=True)]
    return {"time": statistics.median(ratios), "memory": peak() - before, "parts": parts}


def repeated(subject: Subject, count: int) -> Plan:
    """The shipped pictures again and again, under new identities."""
    planned = subject.plan(GROWN, limit=10**9)
    images = planned.images
    rows = [images.table.index[number % len(images)] for number in range(count)]
    table = images.table.loc[rows].reset_index(drop=True)
    names = [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number, name in enumerate(table.image)]
    table = table.assign(image=names)
    again = ImageSet(f"{images.name} x {count}", table, lambda row: images.read(rows[row]), images.rejected)
    return about(planned, again)
