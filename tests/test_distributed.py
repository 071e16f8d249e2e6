"""Results of a cluster are the files that this machine would have made, also when workers or drivers are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from poison import crashing_on, named, pictures_with
from test_pages import opened

from oms_core import cache, distributed
from oms_core.bench import kills
from oms_core.bench.kills import Harm
from oms_core.compute import SHARD, Shards, compute, settled
from oms_core.device import FIRST_BATCH
from oms_core.distributed import (
    MARK,
    RETRIES,
    Cluster,
    Scorer,
    all_kept,
    compute_on,
    errand_of,
    room_in,
    scatter,
    started,
    sweep,
    tried,
)
from oms_core.errors import InputError
from oms_core.location import Location
from oms_core.run import Run, plan

KILLS = int(os.environ.get("OMS_KILLS", "1"))  # of a worker and then of the driver
ROOT = Path(__file__).resolve().parent.parent
ONE, TWO = Cluster(1, 1, 0.0), Cluster(workers=2)
RUN = Run(model="ddpm-digits", attacks=("NA",), t=300, steps=10, limit=600, batch=64, device="cpu")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A cluster on this machine, for all who only use it."""
    with started(TWO):
        yield


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_cluster_makes_what_is_missing_as_this_machine_would_and_a_page_shows_it(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, told = plan(RUN), []
    monkeypatch.setenv("OMS_CACHE", str(tmp_path / "local"))
    whole = compute(planned)["NA"]
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    monkeypatch.setenv("OMS_CACHE", str(tmp_path / "ray"))
    assert [button for button in opened("pages/2_Convergence.py", t="310", limit="600").button if button.label == "Run"]
    shards = Shards(planned, settled(planned))
    cache.part(shards.entries[planned.tasks[0]].folder, 0).unlink()
    kept = next((tmp_path / "ray").rglob("part-000001.parquet"))
    before = kept.stat().st_mtime_ns
    assert shards.missing() == [0]
    found = compute_on(TWO, planned, told.append)["NA"]
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert kept.stat().st_mtime_ns == before  # what is finished is not computed again
    assert [(one.done, one.total) for one in told] == [(len(planned.images), len(planned.images))]
    page = opened("pages/2_Convergence.py", t="300", limit="600")
    assert not page.exception
    assert not [button for button in page.button if button.label == "Run"]


def test_a_shard_that_kills_its_worker_is_given_up_and_the_others_are_not(ray: None, tmp_path: Path) -> None:
    class Killer:
        """Ends its worker at shard 3, refuses shard 5, and answers to others."""

        def __init__(self, folder: str) -> None:
            self.folder = folder

        def __call__(self, rows: dict[str, Any]) -> dict[str, list]:
            shard = int(rows["shard"][0])
            with open(f"{self.folder}/{shard}", "a") as tries:
                tries.write("x")
            if shard == 3:
                time.sleep(1)  # others may wait behind it
                os.kill(os.getpid(), signal.SIGKILL)
            return {"shard": [shard], "error": ["it is full" if shard == 5 else ""]}

    with started(TWO) as room:
        receipts = {one["shard"]: one["error"] for one in scatter([*range(12)], Killer, str(tmp_path), room)}
    assert receipts == {shard: "it is full" if shard == 5 else "" for shard in range(12) if shard != 3}
    assert 1 < len((tmp_path / "3").read_text()) <= 1 + RETRIES


def test_a_shard_that_failed_is_tried_again_and_a_word_to_the_user_ends_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []

    def answers(*problems: dict[int, str], final: bool = False) -> None:
        asked.clear()

        def scattered(shards: list[int], *_: Any) -> Iterator[dict[str, Any]]:
            said = problems[min(len(asked), len(problems) - 1)]
            asked.append(shards)
            yield from ({"shard": k, "error": said.get(k, ""), "final": final and k in said} for k in shards)

        monkeypatch.setattr(distributed, "scatter", scattered)

    def receipts() -> dict[int, str]:
        return {one["shard"]: one["error"] for one in tried([0, 1, 2], None, ONE)}

    answers({1: "lost GPU"}, {})
    assert receipts() == {0: "", 1: "", 2: ""}
    assert asked == [[0, 1, 2], [1], []]
    answers({1: "lost GPU"})
    assert receipts() == {0: "", 1: "lost GPU", 2: ""}
    assert asked == [[0, 1, 2], [1], [1]]
    answers({1: "the disk is full; make room."}, final=True)
    with pytest.raises(InputError, match="the disk is full; make room"):
        receipts()
    assert asked == [[0, 1, 2]]


def test_a_cache_that_workers_cannot_write_ends_the_job(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, and no folder")
    with pytest.raises(InputError, match="A worker cannot write its results into the cache; make room"):
        compute_on(TWO, plan(RUN))


def test_a_worker_answers_what_went_wrong_and_ends_before_the_next_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scorer):
        denoiser = None

        def __init__(self, problem: Exception) -> None:
            super().__init__(None)
            self.problem = problem

        def score(self, denoiser: Any, shard: int) -> None:
            raise self.problem

    monkeypatch.setattr(os, "_exit", sys.exit)
    refused = Failing(InputError("cuda ran out of memory at 64 pictures at once; run again with a batch size of 32."))
    for _ in range(2):
        receipt = refused({"shard": [4]})
        assert (receipt["shard"], receipt["final"]) == ([4], [True])
        assert receipt["error"][0].endswith("run again with a batch size of 32.")
    broken = Failing(RuntimeError("device-side assert"))
    receipt = broken({"shard": [4]})
    assert (receipt["error"], receipt["final"]) == (["RuntimeError: device-side assert."], [False])
    with pytest.raises(SystemExit):
        broken({"shard": [5]})


def test_a_file_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMS_CACHE", str(tmp_path))
    planned = plan(RUN)
    shards = Shards(planned, settled(planned))
    entry, rows = shards.entries[planned.tasks[0]], pd.DataFrame({"image": ["a"]})
    monkeypatch.setattr(time, "sleep", lambda _: entry.write(1, rows))
    assert [len(found) for found in all_kept(shards, [])] == [0, 0]
    assert [len(found) for found in all_kept(shards, [1])] == [0, 1]
    monkeypatch.setattr(distributed, "LATE", -1.0)
    assert [len(found) for found in all_kept(shards, [0, 1])] == [0, 1]


def test_workers_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    for gpus in (0.0, 0.25, 1.0, 2.0):
        errand_of(plan(RUN), Cluster(1, 1, gpus)).accept()
    assert shares == [0.25]


def test_missing_shards_are_counted_with_the_first_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMS_CACHE", str(tmp_path))
    planned = plan(RUN)
    with pytest.raises(InputError) as refused:
        distributed.refuse_missing(Shards(planned, settled(planned)), [{}, {}], ["it is full."])
    assert str(refused.value).startswith("2 of 2 shards are missing, first number 0: it is full. The finished ones")


def test_a_worker_finds_the_device_and_a_batch_where_none_is_named(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMS_CACHE", str(tmp_path))
    planned = plan(replace(RUN, batch=0, device=""))
    found = distributed.settled_there(planned, ONE)
    assert (found.device, found.dtype, found.mode, found.steps) == ("cpu", "float32", "eager", 10)
    assert found.batch >= FIRST_BATCH
    assert distributed.settled_there(plan(RUN), ONE) == settled(plan(RUN))
    with pytest.raises(InputError, match="no usable cuda"):
        distributed.settled_there(plan(replace(RUN, batch=0, device="cuda")), ONE)


def test_a_worker_that_sees_other_pictures_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures_with(tmp_path / "set", 4, [])
    errand = errand_of(plan(Run(images=Location(folder), attacks=("NA",))), ONE)
    (folder / named(2)).unlink()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as it becomes, and is no longer afterwards
    with pytest.raises(InputError, match="A worker sees another model or other pictures"):
        errand.accept()


@pytest.mark.parametrize(
    ("asked", "has", "gets"),
    [
        (Cluster(), {"CPU": 8.0}, Cluster(8, 1, 0.0)),
        (Cluster(threads=3), {"CPU": 8.0}, Cluster(2, 3, 0.0)),
        (Cluster(), {"CPU": 64.0, "GPU": 4.0}, Cluster(4, 1, 1.0)),
        (Cluster(gpus=0.5), {"CPU": 64.0, "GPU": 4.0}, Cluster(8, 1, 0.5)),
        (Cluster(gpus=0.1), {"CPU": 64.0, "GPU": 1.0}, Cluster(10, 1, 0.1)),
        (Cluster(gpus=0.6), {"CPU": 64.0, "GPU": 4.0}, Cluster(4, 1, 0.6)),
        (Cluster(gpus=2), {"CPU": 64.0, "GPU": 5.0}, Cluster(2, 1, 2)),
        (Cluster(workers=3, gpus=0), {"CPU": 64.0, "GPU": 4.0}, Cluster(3, 1, 0)),
    ],
)
def test_what_was_not_asked_for_is_what_has_room(asked: Cluster, has: dict[str, float], gets: Cluster) -> None:
    assert room_in(asked, [has]) == gets
    assert (
        room_in(replace(asked, workers=0), [has, has]).workers == 2 * room_in(replace(asked, workers=0), [has]).workers
    )


@pytest.mark.parametrize("asked", [Cluster(workers=9), Cluster(threads=9), Cluster(gpus=1.0)])
def test_workers_without_room_are_refused_at_once(asked: Cluster) -> None:
    with pytest.raises(InputError, match="The cluster has 8 cores and 0 GPUs, too few"):
        room_in(asked, [{"CPU": 8.0}])


def test_a_worker_needs_room_on_one_machine() -> None:
    with pytest.raises(InputError, match="The cluster has 16 cores and 0 GPUs, too few for 1 workers of 9 threads"):
        room_in(Cluster(threads=9), [{"CPU": 8.0}, {"CPU": 8.0}])
    assert room_in(Cluster(threads=6), 3 * [{"CPU": 8.0}]).workers == 3


def test_only_what_was_started_here_and_is_dead_is_swept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {"own": "session_1_1", "dead": f"session_1_{gone.pid}", "alive": f"session_1_{os.getpid()}"}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).touch()
    (tmp_path / f"session_2_{gone.pid}").mkdir()  # somebody else's
    sweep(tmp_path / names["own"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names["alive"], f"session_2_{gone.pid}"])


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="workers are found in /proc")
def test_whoever_is_killed_nothing_is_lost_and_a_poisoned_picture_is_only_named(tmp_path: Path) -> None:
    count = (kills.SHARDS - (kills.LEFT if KILLS == 1 else 0)) * SHARD
    folder, healthy = (pictures_with(tmp_path / name, count, bad) for name, bad in (("set", [7]), ("same", [])))
    (healthy / named(7)).unlink()
    harm = kills.survived("ddpm-digits", folder, tmp_path, KILLS, healthy, **crashing_on(tmp_path))
    assert harm.log.count(f"not scored: {named(7)}: it crashes the decoder") == 2  # said by both of the last drivers
    assert replace(harm, log="") == Harm(kills=2 * KILLS)


def test_what_kills_may_do_is_told_from_what_they_may_not(tmp_path: Path) -> None:
    before = {tmp_path / "part-000000.parquet": 1, tmp_path / "part-000001.parquet": 1}
    notes = tmp_path / "notes"
    notes.write_text("2\n3\n3\n")
    assert kills.computed_again(notes, before, 1) == 0  # the one in flight
    notes.write_text("2\n3\n3\n2\n")
    assert kills.computed_again(notes, before, 1) == 1
    notes.write_text("0\n2\n")
    assert kills.computed_again(notes, before, 1) == 1  # it was finished
    assert kills.lost(before, tmp_path) == 2
    (tmp_path / "part-000000.parquet").touch()
    assert kills.lost({tmp_path / "part-000000.parquet": 1}, tmp_path) == 1  # it is another one
    assert kills.lost(kills.parts(tmp_path), tmp_path) == 0
