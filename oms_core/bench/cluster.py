"""A cluster on this machine beside the local engine, and its scheduler with work that is none."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from oms_core import cache
from oms_core.attacks import COMPARED
from oms_core.bench.base import Row, Subject, bare_forward, empty_cache, middle_ratio, row, timed
from oms_core.compute import Shards, compute
from oms_core.distributed import Cluster, all_kept, errand_of, scatter, settled_there, started, tried
from oms_core.images import TICK, open_images, remembered
from oms_core.location import Location
from oms_core.run import Plan, plan

PICTURES, TURNS = 20_480, 5  # eight shards a turn
BARE = 5.0  # seconds of bare forward passes
NO_WORK = 100_000  # shards
WRITTEN = 500  # shards that are kept and read back
ALLOWED = {"workers": 1.8, "overhead": 1.10}


def cluster_rows(subject: Subject) -> list[Row]:
    """This process with one thread, one worker and two workers of one thread each, group by group in turns."""
    turns = []
    with tempfile.TemporaryDirectory() as folder, two_processes(subject) as both:
        began = time.time()
        with started(Cluster(2)):
            up = time.time() - began
            for number, path in enumerate(files_of_pictures(subject.model.images, Path(folder))):
                with empty_cache():
                    planned = plan(subject.run(images=Location(path), seed=number))
                local, one, two = local_seconds(planned), on_cluster(planned, 1), on_cluster(planned, 2)
                turns.append({"local": local, "bare": bare_together(subject, both), 1: one, 2: two})
    local, bare = [turn["local"] for turn in turns], statistics.median(turn["bare"] for turn in turns)
    one, two = ({key: [turn[workers][key] for turn in turns] for key in turns[0][1]} for workers in (1, 2))
    what = f"{PICTURES:,} pictures, {len(COMPARED)} attacks, {subject.name}"
    faster, slower = middle_ratio(one["steady"], two["steady"]), middle_ratio(one["steady"], local)
    once = up + statistics.median(one["whole"]) - statistics.median(one["steady"])
    whole = slower + once / sum(local)
    return [
        row(f"two workers / one worker, pictures per second while all work, {what}", faster, least=ALLOWED["workers"]),
        row("two processes / one, bare forward passes per second: what this machine gives", bare),
        row(f"one worker / local engine, seconds while it works, {what}", slower, most=ALLOWED["overhead"]),
        row(f"one worker / local engine, start and end included, {what}", whole, most=ALLOWED["overhead"]),
        row("start of a cluster", up, "s"),
        row("start of one worker, model and all", statistics.median(one["start"]), "s"),
        row("start of two workers", statistics.median(two["start"]), "s"),
        row("share of the time in which a worker waits between shards", statistics.median(one["idle"]), most=0.01),
        row("local engine with one thread", sum(local), "s"),
        row("one worker while it works", sum(one["steady"]), "s"),
        row("two workers while both work", sum(two["steady"]), "s"),
    ]


@contextmanager
def two_processes(subject: Subject) -> Iterator[list[Executor]]:
    """Two processes that have loaded the model."""
    with ExitStack() as stack:
        both = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(2)]
        for one in both:
            one.submit(forwards, subject, 0.0).result()
        yield both


def bare_together(subject: Subject, both: list[Executor]) -> float:
    """How many more forward passes two processes of one thread make than one alone."""
    alone = both[0].submit(forwards, subject, BARE).result()
    return sum(answer.result() for answer in [one.submit(forwards, subject, BARE) for one in both]) / alone


def forwards(subject: Subject, seconds: float) -> int:
    """Forward passes in so many seconds, with one thread."""
    torch.set_num_threads(1)
    forward, count = bare_forward(subject.denoiser, subject.batch), 0
    forward()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        forward()
        count += 1
    return count


def files_of_pictures(name: str, folder: Path) -> list[Path]:
    """Different pictures in parquet files, one for each turn."""
    files = [folder / f"{turn}.parquet" for turn in range(TURNS)]
    for turn, path in enumerate(files):
        many_pictures(name, PICTURES // TURNS, path, PICTURES // TURNS * turn)
    time.sleep(2 * TICK / 10**9)  # what has just been written is looked through by everybody
    return files


def many_pictures(name: str, count: int, path: Path, start: int = 0) -> None:
    """A parquet file with the pictures of a set again and again, each with a number of its own in its file."""
    images = open_images(name).with_role("member", "nonmember")
    rows, files = [images.table.index[number % len(images)] for number in range(count)], []
    for number, place in enumerate(rows, start):
        note, buffer = PngInfo(), io.BytesIO()
        note.add_text("number", str(number))
        Image.open(io.BytesIO(images.read(place))).save(buffer, "PNG", pnginfo=note)
        files.append(buffer.getvalue())
    pd.DataFrame({"image": files, "role": images.table.role.loc[rows].to_numpy()}).to_parquet(path)


def local_seconds(planned: Plan) -> float:
    """Seconds of scoring in this process with one thread; the model is loaded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with empty_cache():
            return timed(lambda: compute(planned))
    finally:
        torch.set_num_threads(threads)


def on_cluster(planned: Plan, workers: int) -> dict[str, float]:
    """Seconds of all, seconds until all workers work, seconds if they worked all the time, and the share in which they
    waited."""
    with empty_cache(), started(Cluster(workers)) as room:
        survey(planned)
        began = time.time()
        shards = Shards(planned, settled_there(planned, room))
        errand = replace(errand_of(planned, room), variant=shards.variant)
        receipts = pd.DataFrame(tried(shards.missing(), errand, room))
        kept = all_kept(shards, [*receipts.shard])
        shards.finish()
        whole = time.time() - began
        assert all(len(found) == len(planned.tasks) for found in kept)
    begin, end = receipts.groupby("worker").began.min().max(), receipts.groupby("worker").ended.max().min()
    took = receipts.ended - receipts.began
    within = (receipts.ended.clip(upper=end) - receipts.began.clip(lower=begin)).clip(lower=0)  # while all worked
    size = receipts.shard.map(lambda shard: len(shards.places[shard]))
    rate = (size * within / took).sum() / (end - begin)
    steady, idle = len(planned.images) / rate, 1 - within.sum() / workers / (end - begin)
    return {"whole": whole, "start": begin - began, "steady": steady, "idle": idle}


def survey(planned: Plan) -> None:
    """Have the pictures looked through now, not by the workers."""
    remembered.cache_clear()
    open_images(planned.run.images)


class Idler:
    """A worker without work."""

    def __init__(self, errand: Any) -> None:
        pass

    def __call__(self, rows: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"shard": rows["shard"], "ended": np.array([time.time()])}


def scheduler_rows(subject: Subject) -> list[Row]:
    """What it takes to hand out a hundred thousand shards."""
    with started(Cluster(2)) as room:
        began = time.time()
        ended = sorted(receipt["ended"] for receipt in scatter([*range(NO_WORK)], Idler, None, room))
    steady = ended[-1] - ended[0]
    written, read = a_shard_kept(subject)
    return [
        row(f"{NO_WORK:,} shards without work, handed out and receipted", len(ended), "shards", least=NO_WORK),
        row("time per shard without work", 1000 * steady / NO_WORK, "ms"),
        row("start until the first of them", ended[0] - began, "s"),
        row("keeping the results of one attack for a shard", 1000 * written, "ms"),
        row("finding them again, every checksum verified", 1000 * read, "ms"),
    ]


def a_shard_kept(subject: Subject) -> tuple[float, float]:
    """Seconds in which a shard of the naive attack is written, and read back."""
    planned = subject.plan(("NA",))
    with empty_cache():
        rows = compute(planned)["NA"]
        entry = cache.Entry(cache.key_of({}), cache.COUNTED, WRITTEN)
        written = timed(lambda: [entry.write(shard, rows) for shard in range(WRITTEN)])
        return written / WRITTEN, timed(lambda: [entry.read(shard) for shard in range(WRITTEN)]) / WRITTEN
