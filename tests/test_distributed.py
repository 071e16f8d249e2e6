"""Results of a cluster are the files that this machine would have made, also when workers or drivers are killed."""

from __future__ import annotations

import os
import random
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
from poison import crashing_on, named, pictures_with
from test_pages import opened

from oms_core import cache, distributed
from oms_core.__main__ import main
from oms_core.compute import Shards, compute, settled
from oms_core.device import FIRST_BATCH
from oms_core.distributed import MARK, Cluster, compute_on, errand_of, room_in, scatter, started, sweep
from oms_core.errors import InputError
from oms_core.run import Run, plan

KILLS = int(os.environ.get("OMS_KILLS", "1"))  # of a worker and then of the driver
SHARDS = 4
ROOT = Path(__file__).resolve().parent.parent
TWO = Cluster(workers=2)
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
    assert 1 < len((tmp_path / "3").read_text()) <= 1 + distributed.RETRIES


def test_missing_shards_are_counted_with_the_first_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMS_CACHE", str(tmp_path))
    planned = plan(RUN)
    with pytest.raises(InputError) as refused:
        distributed.refuse_missing(Shards(planned, settled(planned)), ["it is full."])
    assert str(refused.value).startswith("2 of 2 shards are missing, first number 0: it is full. The finished ones")


def test_a_worker_finds_the_device_and_a_batch_where_none_is_named(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMS_CACHE", str(tmp_path))
    planned = plan(replace(RUN, batch=0, device=""))
    found = distributed.settled_there(planned, Cluster(1, 1, 0.0))
    assert (found.device, found.dtype, found.mode, found.steps) == ("cpu", "float32", "eager", 10)
    assert found.batch >= FIRST_BATCH
    assert distributed.settled_there(plan(RUN), Cluster(1, 1, 0.0)) == settled(plan(RUN))
    with pytest.raises(InputError, match="no usable cuda"):
        distributed.settled_there(plan(replace(RUN, batch=0, device="cuda")), Cluster(1, 1, 0.0))


def test_a_worker_that_sees_other_pictures_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures_with(tmp_path / "set", 4, [])
    errand = errand_of(plan(Run(images=str(folder), attacks=("NA",))), 1)
    (folder / named(2)).unlink()
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="A worker sees another model or other pictures"):
        errand.accept()


@pytest.mark.parametrize(
    ("asked", "has", "gets"),
    [
        (Cluster(), {"CPU": 8.0}, Cluster(8, 1, 0.0)),
        (Cluster(threads=3), {"CPU": 8.0}, Cluster(2, 3, 0.0)),
        (Cluster(), {"CPU": 64.0, "GPU": 4.0}, Cluster(4, 1, 1.0)),
        (Cluster(gpus=0.5), {"CPU": 64.0, "GPU": 4.0}, Cluster(8, 1, 0.5)),
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


def command(cached: Path, *more: str) -> list[str]:
    settings = ["--model", "ddpm-digits", "--attack", "NA", "--t", "300", "--steps", "3"]
    settings += ["--batch", "64", "--device", "cpu"]
    return [sys.executable, "-m", "oms_core", "score", *settings, "--out", f"{cached}.parquet", *more]


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


def parts(cached: Path) -> dict[Path, int]:
    """The finished shards, and when they were finished."""
    return {path: path.stat().st_mtime_ns for path in cached.rglob("part-*.parquet") if "any-" not in str(path)}


def killed(kind: str, driver: subprocess.Popen, cached: Path, chance: random.Random) -> None:
    """End a worker, or the driver, at a random moment after its first shard."""
    before, deadline = len(parts(cached)), time.monotonic() + 120
    while len(parts(cached)) == before and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(chance.random())
    victims = workers(driver.pid)[:1] if kind == "worker" else [driver.pid]
    assert victims
    os.kill(victims[0], signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="workers are found in /proc")
def test_whoever_is_killed_nothing_is_lost_and_a_poisoned_picture_is_only_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, healthy = (pictures_with(tmp_path / name, SHARDS * 512, bad) for name, bad in (("set", [7]), ("same", [])))
    (healthy / named(7)).unlink()
    local, cached, log = tmp_path / "local", tmp_path / "ray", tmp_path / "log"
    monkeypatch.setenv("OMS_CACHE", str(local))
    assert main(command(local, "--images", str(healthy))[3:]) == 0
    images, chance = ["--images", str(folder)], random.Random(KILLS)
    environment = os.environ | crashing_on(tmp_path)
    again = command(cached, *images, "--engine", "ray", "--workers", "2")
    for last in [False] * KILLS + [True]:
        finished = parts(cached)
        with log.open("w") as said:  # no pipe, which would stay open until Ray notices, after a minute
            driver = subprocess.Popen(again, cwd=ROOT, env=environment | {"OMS_CACHE": str(cached)}, stderr=said)
        for victim in () if last else ("worker", "driver"):
            killed(victim, driver, cached, chance)
        driver.wait(300)
        assert driver.returncode == (0 if last else -signal.SIGKILL), log.read_text()[-2000:]
        assert {path: parts(cached).get(path) for path in finished} == finished  # they stay
        if not last:  # leave some for the next
            for path in sorted(parts(cached))[2:]:
                path.unlink(missing_ok=True)
    assert f"not scored: {named(7)}: it crashes the decoder" in log.read_text()
    assert set(parts(cached)) == {cached / path.relative_to(local) for path in parts(local)}
    assert all(path.read_bytes() == (local / path.relative_to(cached)).read_bytes() for path in parts(cached))
    pd.testing.assert_frame_equal(
        pd.read_parquet(f"{local}.parquet"), pd.read_parquet(f"{cached}.parquet"), check_exact=True
    )
