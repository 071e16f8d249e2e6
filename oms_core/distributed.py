"""Scoring on a cluster: the shards of a plan through a pool of Ray actors, each of which holds the model.

Ray only says who does what. A worker computes and keeps its shard as the local engine does, so that the files are
the same, bit by bit, whoever made them; a shard is there whole or not at all, and the first of two equal ones stays.
What is finished is read from the files, never from what the workers say.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from oms_core import cache
from oms_core.attacks import MEASURED
from oms_core.compute import Progress, Shards, Tick, captioned, loaded, settled, shard_of, variant_of
from oms_core.device import DTYPES, MODES, Placement, fitting, place
from oms_core.errors import InputError
from oms_core.run import Plan, Run, Task, plan, task_of

if TYPE_CHECKING:
    from oms_core.denoiser import Denoiser

RETRIES = 2  # of a shard; without a limit one that kills its worker is tried for ever
LATE = 60.0  # seconds in which a file that another machine wrote may stay unseen, as on NFS
MOST_BLOCKS = 20_000  # what Ray schedules; of more shards several go together
IN_FLIGHT = 1  # shards that an actor has; another would be lost with the one that kills it
UNWRITTEN = "A worker cannot write its results into the cache; make room, or name another folder in OMS_CACHE."
MARK = "oms-explorer"  # a file in the folder of a Ray cluster that was started here


@dataclass(frozen=True)
class Cluster:
    """How many workers there are, and what each has.

    Attributes:
        workers: actors, each with a model of its own; 0 for as many as there is room for.
        threads: CPU threads of each.
        gpus: GPUs of each, 0.5 say where two share one; None for one each where there are any.
    """

    workers: int = 0
    threads: int = 1
    gpus: float | None = None


@dataclass(frozen=True)
class Errand:
    """What a worker is told: a few words, never pictures.

    Attributes:
        run: the settings.
        attacks: what is measured.
        auxiliary: whether it is the auxiliary pictures.
        keys: of the results, so that a worker that sees other pictures or another model notices.
        folder, cache: where the driver works and keeps results; both must be the same place for all.
        threads, gpus: see `Cluster`.
        variant: how to compute.
    """

    run: Run
    attacks: tuple[str, ...]
    auxiliary: bool
    keys: tuple[str, ...]
    folder: str
    cache: str
    threads: int
    gpus: float
    variant: cache.Variant | None = None

    def accept(self) -> Plan:
        """Become a worker of the driver's run.

        Raises:
            InputError: this machine does not see what the driver sees.
        """
        import torch

        os.chdir(self.folder)
        os.environ["OMS_CACHE"] = self.cache
        torch.set_num_threads(self.threads)
        if 0 < self.gpus < 1 and torch.cuda.is_available():  # a batch must fit beside those of the others
            torch.cuda.set_per_process_memory_fraction(self.gpus)
        os.environ["LOKY_MAX_CPU_COUNT"] = str(self.threads)  # if pictures have to be looked at here
        planned = plan(self.run)
        moved = replace(planned, images=planned.auxiliary if self.auxiliary else planned.images, tasks=())
        tasks = tuple(task_of(MEASURED[name], moved) for name in self.attacks)
        if tuple(task.key for task in tasks) != self.keys:
            raise InputError(
                f"A worker sees another model or other pictures under {self.run.model} and {moved.images.name}; "
                "put both where all machines see the same files."
            )
        return replace(moved, tasks=tasks)


def errand_of(planned: Plan, room: Cluster) -> Errand:
    """What the workers of a cluster are told of a plan."""
    return Errand(
        run=planned.run,
        attacks=tuple(task.attack.name for task in planned.tasks),
        auxiliary=planned.images is planned.auxiliary,
        keys=tuple(task.key for task in planned.tasks),
        folder=os.getcwd(),
        cache=str(cache.home().resolve()),
        threads=room.threads,
        gpus=room.gpus or 0.0,
    )


class Scorer:
    """An actor: it loads the model with the first shard, and answers each shard with a receipt."""

    def __init__(self, errand: Errand) -> None:
        self.errand = errand
        self.sick = False

    @cached_property
    def shards(self) -> Shards:
        return Shards(self.errand.accept(), self.errand.variant)

    @cached_property
    def placement(self) -> Placement:
        """As it was settled: a worker with another device than the others refuses."""
        how = self.errand.variant
        return place(how.device, how.dtype, how.mode)

    @cached_property
    def denoiser(self) -> Denoiser:
        return loaded(self.shards.plan.model, self.placement)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list]:
        """Compute and keep a shard, unless it is finished.

        After a failure that nobody foresaw, a lost GPU say, the next shard is not even tried: this process ends, and
        Ray gives the shard to a new one.

        Args:
            rows: `shard`, one number.

        Returns:
            `shard`, `error` (one sentence, or nothing), whether the user has to act on it (`final`), `worker` (its
            process), and when it `began` and `ended`, in seconds since 1970; it begins when the model is loaded.
        """
        if self.sick:
            os._exit(1)
        shard, began, error, final = int(rows["shard"][0]), time.time(), "", False
        try:
            denoiser = self.denoiser
            began = time.time()
            self.score(denoiser, shard)
        except InputError as problem:
            error, final = str(problem), True
        except Exception as problem:  # a receipt says what no log of a lost machine would
            error, self.sick = sentence(problem), True
        said = {"shard": shard, "error": error, "final": final, "worker": os.getpid(), "began": began}
        return {name: [value] for name, value in (said | {"ended": time.time()}).items()}

    def score(self, denoiser: Denoiser, shard: int) -> None:
        """Compute and keep a shard.

        Raises:
            InputError: the device runs out of memory, a picture has changed, or the cache cannot be written.
        """
        with fitting(self.placement, self.errand.variant.batch), ThreadPoolExecutor(1) as writer:
            images = captioned(replace(self.shards.plan, images=self.shards.images(shard)), self.placement)
            for _ in shard_of(denoiser, self.shards, shard, images, writer):
                pass
        if len(self.shards.kept(shard)) < len(self.shards.entries):
            raise InputError(UNWRITTEN)


def sentence(problem: Exception) -> str:
    """What went wrong, in a sentence."""
    return str(problem) if isinstance(problem, InputError) else f"{type(problem).__name__}: {problem}."


def compute_on(cluster: Cluster, planned: Plan, tick: Tick | None = None) -> dict[str, pd.DataFrame]:
    """The same as `oms_core.compute.compute`, on a cluster.

    Raises:
        InputError: Ray is not installed, the cluster has no room, a worker says what the user has to do, or shards
            could not be computed; what is finished stays, and the same call goes on from there.
    """
    with started(cluster) as room:
        shards = Shards(planned, settled_there(planned, room))
        errand = replace(errand_of(planned, room), variant=shards.variant)
        todo, receipts = shards.missing(), []
        done = len(planned.images) - sum(len(shards.places[shard]) for shard in todo)
        for receipt in tried(todo, errand, room):
            receipts.append(receipt)
            done += 0 if receipt["error"] else len(shards.places[receipt["shard"]])
            if tick:
                tick(Progress(done, len(planned.images), {}))
    kept = all_kept(shards, [receipt["shard"] for receipt in receipts if not receipt["error"]])
    refuse_missing(shards, kept, [receipt["error"] for receipt in receipts if receipt["error"]])
    shards.finish()
    return {task.attack.name: pd.concat([one.pop(task) for one in kept], ignore_index=True) for task in planned.tasks}


def tried(todo: list[int], errand: Errand, room: Cluster) -> Iterator[dict[str, Any]]:
    """The receipts of shards; one that failed is tried again by new workers before its receipt counts.

    Raises:
        InputError: a worker says what the user has to do; nothing more is computed.
    """
    for left in reversed(range(1 + RETRIES)):
        failed = []
        for receipt in scatter(todo, Scorer, errand, room):
            if receipt["final"]:
                raise InputError(receipt["error"])
            if receipt["error"] and left:
                failed.append(receipt["shard"])
            else:
                yield receipt
        todo = failed


def all_kept(shards: Shards, finished: list[int]) -> list[dict[Task, pd.DataFrame]]:
    """What there is of every shard; of those that a worker has finished, it may take a while to be seen here."""
    kept, until = [shards.kept(shard) for shard in range(len(shards))], time.monotonic() + LATE
    while unseen := [shard for shard in finished if len(kept[shard]) < len(shards.entries)]:
        if time.monotonic() > until:
            break
        time.sleep(1)
        for shard in unseen:
            kept[shard] = shards.kept(shard)
    return kept


def refuse_missing(shards: Shards, kept: list[dict[Task, pd.DataFrame]], problems: list[str]) -> None:
    """Say which shards are not there, and the first reason."""
    missing = [shard for shard, found in enumerate(kept) if len(found) < len(shards.entries)]
    if missing:
        why = problems[0] if problems else "their workers were lost again and again."
        raise InputError(
            f"{len(missing)} of {len(shards)} shards are missing, first number {missing[0]}: {why} "
            "The finished ones are kept; the same command goes on from there."
        )


def settled_there(planned: Plan, room: Cluster) -> cache.Variant:
    """How a plan is computed, as a worker finds it, whose device may be another than the driver's; if the run says it
    all, nobody is asked.

    Raises:
        InputError: see `Errand.accept` and `oms_core.compute.settled`.
    """
    import ray

    run = planned.run
    if run.device and run.batch:
        return variant_of(run, Placement(run.device, run.dtype or DTYPES[0], run.mode or MODES[0]), run.batch)
    settle = ray.remote(num_cpus=room.threads, num_gpus=room.gpus, max_retries=RETRIES)(settle_for)
    found = ray.get(settle.remote(errand_of(planned, room)))
    if isinstance(found, str):
        raise InputError(found)
    return found


def settle_for(errand: Errand) -> cache.Variant | str:
    """Runs on a worker; a sentence if it cannot."""
    try:
        return settled(errand.accept())
    except Exception as problem:
        return sentence(problem)


def scatter(shards: list[int], worker: type, errand: Any, room: Cluster) -> Iterator[dict[str, Any]]:
    """Have every shard worked on, and yield the receipts as they come in; those of lost workers never do.

    Args:
        shards: numbers.
        worker: made with the errand, and called with ``{"shard": [number]}``; see `Scorer`.
        errand: what it is told.
        room: see `started`.
    """
    import ray.data

    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks, context.enable_progress_bars = -1, False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = min(len(shards), MOST_BLOCKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how retries are named changes in a later Ray
        receipts = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=blocks).map_batches(
            worker,
            fn_constructor_args=(errand,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(room.workers, len(shards)), max_tasks_in_flight_per_actor=IN_FLIGHT
            ),
            num_cpus=room.threads,
            num_gpus=room.gpus,
            max_task_retries=RETRIES,
            max_restarts=-1,  # what ends them is limited; Ray never replaces an actor whose restarts are used up
        )
    yield from receipts.iter_rows()


@contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    """A connection to the cluster of RAY_ADDRESS, or else a cluster on this machine for as long as it is needed.

    Yields:
        the cluster with every number filled in.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or there is no room for the workers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError as error:
        raise InputError("To score on a cluster install Ray: pip install -r requirements-ray.txt.") from error
    if ray.is_initialized():
        yield room_in(cluster, machines())
        return
    folder = connected(cluster)
    try:
        yield room_in(cluster, machines())
    finally:
        ray.shutdown()
        sweep(folder)


def connected(cluster: Cluster) -> Path | None:
    """Connect to Ray, or start it.

    Returns:
        The folder of the cluster, if it was started here.

    Raises:
        InputError: the cluster of RAY_ADDRESS cannot be reached.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": max(os.cpu_count() or 1, cluster.workers * cluster.threads)}
    before = os.umask(0o077)  # the token that opens the cluster is nobody else's business
    try:
        context = ray.init(
            address=address or "local", include_dashboard=None if address else False,
            log_to_driver=False, logging_level=logging.ERROR, **own,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"The Ray cluster {address or 'on this machine'} cannot be used: {error}.") from error
    finally:
        os.umask(before)
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)
    if address:
        return None
    folder = Path(context.address_info["session_dir"])
    (folder / MARK).touch()
    return folder


def sweep(folder: Path | None) -> None:
    """Remove what a cluster that was started here, and earlier ones whose driver was killed, left behind."""
    if folder is None:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for mark in folder.parent.glob(f"*/{MARK}"):
        process = mark.parent.name.rpartition("_")[2]
        if process.isdigit() and not alive(int(process)):
            shutil.rmtree(mark.parent, ignore_errors=True)


def alive(process: int) -> bool:
    if os.name == "nt":  # where the question would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room_in(cluster: Cluster, nodes: list[dict[str, float]]) -> Cluster:
    """Fill in what was not asked for.

    Args:
        cluster: what was.
        nodes: what each machine has.

    Raises:
        InputError: there is no room for the workers, which Ray would wait for without end.
    """
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    each = (1.0 if gpus else 0.0) if cluster.gpus is None else cluster.gpus

    def fitting_on(node: dict[str, float]) -> int:
        most = node.get("CPU", 0) // cluster.threads
        return int(min(most, on_gpus(node.get("GPU", 0), each)) if each else most)

    most = sum(map(fitting_on, nodes))
    if not most or cluster.workers > most:
        raise InputError(
            f"The cluster has {cores:g} cores and {gpus:g} GPUs, too few for {max(1, cluster.workers)} workers of "
            f"{cluster.threads} threads and {each:g} GPUs; ask for at most {most}."
        )
    return Cluster(cluster.workers or most, cluster.threads, each)


def on_gpus(gpus: float, each: float) -> float:
    """How many workers so many GPUs have room for; a part of a GPU is a part of one."""
    return gpus // each if each >= 1 else int(gpus) * int(round(1 / each, 6))
