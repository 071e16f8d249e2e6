"""Workers and drivers of a cluster that are killed at random moments: what is lost, done twice, or different."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from oms_core import cache
from oms_core.bench.base import Row, Subject, kept_in, row
from oms_core.bench.cluster import many_pictures
from oms_core.compute import SHARD, score
from oms_core.errors import InputError
from oms_core.files import ASSETS
from oms_core.location import Location
from oms_core.run import Run, plan, scores

KILLS = 5  # of a worker, and as many of the driver
SHARDS, LEFT = 8, 3  # of a set, and finished ones that the next round finds: there must be enough to do for both kills
LONGEST = 300  # seconds of a driver
MOMENTS = 0.5  # seconds after a shard among which one is drawn; a shard takes longer
ATTACK, SETTINGS = "NA", {"t": 300, "steps": 10, "batch": 64, "device": "cpu"}
DRIVER = """
import os, sys
from oms_core import distributed
from oms_core.__main__ import main

class NotingScorer(distributed.Scorer):
    def score(self, denoiser, shard):
        if len(self.shards.kept(shard)) < len(self.shards.entries):
            with open(os.environ["OMS_NOTES"], "a") as notes:
                print(shard, file=notes)
        super().score(denoiser, shard)

scatter = distributed.scatter
distributed.scatter = lambda shards, worker, errand, room: scatter(shards, NotingScorer, errand, room)
sys.exit(main())
"""


@dataclass
class Harm:
    """What kills did.

    Attributes:
        kills: how many there were.
        lost: shards that were finished, and were gone or changed later.
        again: shards that were computed again after they were finished, or once more than a kill accounts for.
        different: files, and tables of scores, that are not those of the local engine, bit by bit.
        log: what the last drivers said.
    """

    kills: int = 0
    lost: int = 0
    again: int = 0
    different: int = 0
    log: str = ""


def kill_rows(subject: Subject) -> list[Row]:
    """Two workers, one of them killed and then their driver, again and again; at last two drivers at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        many_pictures(subject.model.images, SHARDS * SHARD, folder / "set.parquet")
        harm = survived(subject.name, folder / "set.parquet", folder, KILLS)
    return [
        row("kill -9 of a worker or of the driver, at random moments", harm.kills, "kills", least=2 * KILLS),
        row("finished shards that were lost", harm.lost, "shards", most=0),
        row("shards computed again beyond the one in flight", harm.again, "shards", most=0),
        row("files that are not those of the local engine with two threads", harm.different, "files", most=0),
    ]


def survived(model: str, images: Path, folder: Path, kills: int, like: Path | None = None, **more: str) -> Harm:
    """Score a set on a cluster whose workers and drivers are killed, until it is done, then by two drivers at once.

    Args:
        model: what scores.
        images: the set.
        folder: where everything is kept.
        kills: of a worker and then of the driver, both in one run.
        like: the set that the local engine scores, if another one.
        more: of the environment of drivers and workers.

    Raises:
        InputError: this system does not show its processes, or a run that nobody killed failed.
    """
    if not Path("/proc/self/cmdline").exists():
        raise InputError("Workers can be found and killed on Linux only; leave this part out.")
    harm, common = Harm(), folder / "ray"
    for number in range(kills):
        before, notes = parts(common), folder / f"notes-{number}"
        driver = start(model, images, common, folder / "log", more | {"OMS_NOTES": str(notes)})
        for victim in ("worker", "driver"):
            kill(victim, driver, common, folder / "log")
            harm.kills += 1
        driver.wait(LONGEST)
        harm.lost += lost(before, common)
        harm.again += computed_again(notes, before, 1)
        for path in sorted(parts(common))[LEFT:]:
            path.unlink(missing_ok=True)
    both(model, images, common, folder, more, harm)
    score_here(model, like or images, folder / "local")
    harm.different = different(common, folder / "twin", folder / "local")
    return harm


def both(model: str, images: Path, common: Path, folder: Path, more: dict[str, str], harm: Harm) -> None:
    """Let two drivers do the same at once; either may do what the other does, but nothing that was finished."""
    before, notes = parts(common), folder / "notes"
    outs = [common, folder / "twin"]
    logs = [folder / "log", folder / "twin.log"]
    environment = more | {"OMS_NOTES": str(notes)}
    drivers = [start(model, images, common, log, environment, out) for out, log in zip(outs, logs, strict=True)]
    codes = [driver.wait(LONGEST) for driver in drivers]
    harm.log = "".join(log.read_text() for log in logs)
    if any(codes):
        raise InputError(f"A run that nobody killed failed: {harm.log[-2000:]}")
    harm.lost += lost(before, common)
    harm.again += computed_again(notes, before, len(parts(common)))


def start(
    model: str, images: Path, kept: Path, log: Path, more: dict[str, str], out: Path | None = None
) -> subprocess.Popen:
    """A driver of two workers, which notes each shard that is computed."""
    asked = {"model": model, "images": images, "attack": ATTACK, **SETTINGS}
    settings = asked | {"engine": "ray", "workers": 2, "out": f"{out or kept}.parquet"}
    command = [sys.executable, "-c", DRIVER, "score", *(f"--{name}={value}" for name, value in settings.items())]
    environment = os.environ | more | {"OMS_CACHE": str(kept)}
    with log.open("w") as said:  # no pipe, which would stay open until Ray notices, after a minute
        return subprocess.Popen(command, cwd=ASSETS.parent, env=environment, stdout=said, stderr=said)


def kill(kind: str, driver: subprocess.Popen, kept: Path, log: Path) -> None:
    """End a worker, or the driver, at a random moment after its next shard.

    Raises:
        InputError: there is nobody to kill, as the run is over.
    """
    before, deadline = len(parts(kept)), time.monotonic() + LONGEST
    while len(parts(kept)) == before and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.uniform(0, MOMENTS))
    victims = workers(driver.pid)[:1] if kind == "worker" else [driver.pid]
    if driver.poll() is not None or not victims:
        said = log.read_text()[-2000:]
        raise InputError(f"The run was over before its {kind} could be killed. What it said last: {said}")
    os.kill(victims[0], signal.SIGKILL)


def workers(driver: int) -> list[int]:
    """The processes of a driver that hold a model."""
    titles = {path.parent.name: read_or_nothing(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    held = [int(process) for process, title in titles.items() if title.startswith("ray::") and "Scorer" in title]
    return [process for process in held if driver in ancestors(process)]


def ancestors(process: int) -> list[int]:
    found = [process]
    while found[-1] > 1:
        said = read_or_nothing(Path(f"/proc/{found[-1]}/status"))
        found.append(int(said.partition("PPid:")[2].split()[0]) if said else 0)
    return found


def read_or_nothing(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def parts(kept: Path) -> dict[Path, int]:
    """The finished shards, and when they were finished."""
    return {path: path.stat().st_mtime_ns for path in kept.rglob("part-*.parquet") if "any-" not in str(path)}


def lost(before: dict[Path, int], kept: Path) -> int:
    now = parts(kept)
    return sum(now.get(path) != finished for path, finished in before.items())


def computed_again(notes: Path, before: dict[Path, int], excused: int) -> int:
    """Shards that were begun although they were finished before, and those begun again beyond what is excused."""
    begun = Counter(map(int, read_or_nothing(notes).split()))
    finished = {int(path.stem.removeprefix("part-")) for path in before}
    repeated = sum(begun.values()) - len(begun)
    return sum(begun[shard] for shard in finished) + max(0, repeated - excused)


def score_here(model: str, images: Path, kept: Path) -> None:
    """The same by the local engine, with two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with kept_in(kept):
            run = Run(model, Location(images), attacks=(ATTACK,), **SETTINGS)
            scores(plan(run), score(run)).to_parquet(f"{kept}.parquet", index=False)
    finally:
        torch.set_num_threads(threads)


def different(common: Path, twin: Path, alone: Path) -> int:
    """Shards, and tables of scores, that are not the same as when scored alone."""
    here, there = ({path.relative_to(root) for path in parts(root)} for root in (alone, common))
    unlike = sum((common / name).read_bytes() != (alone / name).read_bytes() for name in here & there)
    right, *others = (cache.digest_of_rows(pd.read_parquet(f"{root}.parquet")) for root in (alone, common, twin))
    return len(here ^ there) + unlike + sum(table != right for table in others)
