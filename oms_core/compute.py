"""The slow half: ask the model what a run needs, shard by shard, on whatever device there is.

A killed run goes on from its last finished shard. The batch size is fixed and the last batch filled up, and
noise belongs to a picture, so a picture's distances are bit-identical in any company, order or worker.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from oms_core import cache, captions, libraries
from oms_core.attacks import Learned, Probe
from oms_core.catalog import Model
from oms_core.device import DTYPES, FIRST_BATCH, MODES, Placement, batch_size, fitting, place
from oms_core.errors import InputError
from oms_core.images import ImageSet
from oms_core.learned import learn
from oms_core.run import Plan, Run, Task, Trace, lookup, lookup_trace, plan, task_of, trace_content
from oms_core.schemes import SCHEMES
from oms_core.search import Map, fixed_point

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.denoiser import Denoiser

SHARD = 512  # pictures; rounded up to whole batches
UNKEPT_BATCH = 16  # pictures; a visitor's are few, and a batch is always filled up


Columns = dict[str, np.ndarray]  # the table of a batch, which takes a tenth of the time of a DataFrame


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done, total: pictures.
        signals: the distances of the pictures that just came in, by attack.
        stage: what is done to them.
        waited: seconds that the model waited for pictures so far.
    """

    done: int
    total: int
    signals: dict[str, Columns]
    stage: str = "scores"
    waited: float = 0.0


Tick = Callable[[Progress], None]
Engine = Callable[[Plan, Tick | None], dict[str, pd.DataFrame]]


def table_of(parts: list[Columns]) -> pd.DataFrame:
    """The tables of several batches as one."""
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def score(run: Run, tick: Tick | None = None, engine: Engine | None = None) -> dict[str, pd.DataFrame]:
    """Every distance of a run, by attack: from the cache where known, computed where not.

    Args:
        run: what to compute.
        tick: called after each batch; it may raise to stop, and what is finished is kept.
        engine: what computes; by default `compute`, in this process.

    Returns:
        For each attack a row per picture with the columns that it names.

    Raises:
        InputError: see `plan` and `oms_core.families.load`.
    """
    planned = plan(run)
    known = lookup(planned)
    missing = [task for task in planned.tasks if task.attack.name not in known]
    learned = [task for task in missing if isinstance(task.attack, Learned)]
    wanted = {one.attack.name: one for one in missing if one not in learned}
    wanted |= {one.attack.base.name: task_of(one.attack.base, planned) for one in learned}
    signals = known | measured(replace(planned, tasks=tuple(wanted.values())), tick, engine)
    found = signals | {one.attack.name: judged(one, planned, signals, tick, engine) for one in learned}
    return {name: found[name] for name in dict.fromkeys(run.attacks)}


def score_each(runs: list[Run], tick: Tick | None = None) -> list[dict[str, pd.DataFrame]]:
    """Every distance of several runs, with one progress over all of them."""
    sizes, found = [len(plan(run).images) for run in runs], []
    for number, run in enumerate(runs):
        before = sum(sizes[:number])
        told = (
            None if tick is None else lambda p, before=before: tick(Progress(before + p.done, sum(sizes), {}, p.stage))
        )
        found.append(score(run, told))
    return found


def measured(planned: Plan, tick: Tick | None = None, engine: Engine | None = None) -> dict[str, pd.DataFrame]:
    """The signals of a plan without learned attacks, known ones from the cache."""
    known = lookup(planned)
    missing = tuple(task for task in planned.tasks if task.attack.name not in known)
    return known | ((engine or compute)(replace(planned, tasks=missing), tick) if missing else {})


def judged(
    one: Task, planned: Plan, signals: dict[str, pd.DataFrame], tick: Tick | None, engine: Engine | None
) -> pd.DataFrame:
    """The scores of a learned attack, fitted now and kept."""
    base, run = one.attack.base, planned.run
    auxiliary = pd.DataFrame()
    if one.attack.auxiliary:
        others = replace(planned, images=planned.auxiliary)
        auxiliary = measured(replace(others, tasks=(task_of(base, others),)), tick, engine)[base.name]
    placement = placed(run) if engine is None else Placement("cpu", DTYPES[0])  # a driver needs no device
    denoiser = loaded(planned.model, placement)
    if tick:
        tick(Progress(0, len(planned.images), {}, "fit"))
    rows = learn(one, planned, signals[base.name], auxiliary, denoiser.coefficients)
    named = Placement(run.device or placement.device, run.dtype or DTYPES[0], run.mode or MODES[0])
    entry = cache.Entry(one.key, variant_of(run, named, run.batch), 1)
    entry.write(0, rows)
    entry.finish(one.content)
    return rows


@lru_cache(maxsize=2)
def loaded(model: Model, placement: Placement) -> Denoiser:
    """The model in memory; at most two stay."""
    libraries.load(f"oms_core.families.{model.family}")
    from oms_core.families import load

    denoiser = load(model, placement)
    prepare(denoiser, placement.mode)
    set_libraries_aside()
    return denoiser


def prepare(denoiser: Denoiser, mode: str) -> None:
    """Let a network run in one of `oms_core.device.MODES`.

    Raises:
        InputError: it cannot be compiled here.
    """
    import torch

    if mode == MODES[0] or denoiser.network is None:
        return
    if mode == "channels_last":
        denoiser.network.to(memory_format=torch.channels_last)
        return
    denoiser.network.compile()
    try:
        for count, t in ((FIRST_BATCH, 0), (2 * FIRST_BATCH, 1)):  # two of each, and it is compiled for all of them
            forward_pass(denoiser, count, t)
    except Exception as error:  # a compiler fails in many ways, most often because there is none
        raise InputError("The network cannot be compiled on this machine; leave out --mode.") from error


@lru_cache(1)
def set_libraries_aside() -> None:
    """Spare the garbage collector the objects of the libraries, half a million, which stay anyway; once.

    Streamlit has it look through everything after each run of each visitor, which takes a third of a second, and
    a few who watch a job would leave it no time.
    """
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Shards:
    """A plan cut into parts of whole batches, each of which is computed by one worker and kept as a whole.

    Attributes:
        plan: its pictures and tasks.
        variant: how it is computed; the same for all parts.
    """

    plan: Plan
    variant: cache.Variant

    @cached_property
    def places(self) -> list[pd.Index]:
        """The rows of each shard."""
        size = -(-SHARD // self.variant.batch) * self.variant.batch
        rows = self.plan.images.table.index
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @cached_property
    def entries(self) -> dict[Task, cache.Entry]:
        """Where the shards of each task are kept."""
        return {task: cache.Entry(task.key, self.variant, len(self)) for task in self.plan.tasks}

    def __len__(self) -> int:
        return len(self.places)

    def images(self, shard: int) -> ImageSet:
        """The pictures of a shard."""
        return replace(self.plan.images, table=self.plan.images.table.loc[self.places[shard]])

    def kept(self, shard: int) -> dict[Task, pd.DataFrame]:
        """What is finished of a shard."""
        found = {task: entry.read(shard) for task, entry in self.entries.items()}
        return {task: rows for task, rows in found.items() if rows is not None}

    def missing(self) -> list[int]:
        """The shards of which something is not finished."""
        return [shard for shard in range(len(self)) if len(self.kept(shard)) < len(self.entries)]

    def finish(self) -> None:
        """Say in a manifest that every shard is there."""
        for task, entry in self.entries.items():
            entry.finish(task.content)


def placed(run: Run) -> Placement:
    """Where and how a run computes."""
    return place(run.device, run.dtype, run.mode)


def variant_of(run: Run, placement: Placement, batch: int) -> cache.Variant:
    return cache.Variant(placement.device, placement.dtype, batch, run.steps, placement.mode)


def settled(planned: Plan) -> cache.Variant:
    """How a plan is computed on this machine: in what batches it was begun, else in batches that pay."""
    run, placement = planned.run, placed(planned.run)
    like = variant_of(run, placement, run.batch)
    begun = (cache.begun(task.key, like) for task in planned.tasks)
    return replace(like, batch=run.batch or next(filter(None, begun), 0) or batch_for(planned, placement))


def batch_for(planned: Plan, placement: Placement) -> int:
    """The batch size that pays, or the power of two that holds all pictures if that is less."""
    pays = automatic_batch(planned.model, placement, differentiate(planned.tasks))
    return min(pays, 1 << (len(planned.images) - 1).bit_length())


def differentiate(tasks: Iterable[Task]) -> bool:
    """Whether any of the tasks takes derivatives of the model."""
    return any(task.attack.gradients for task in tasks)


def compute(plan: Plan, tick: Tick | None = None) -> dict[str, pd.DataFrame]:
    """Compute every task of a plan in one pass over the pictures, sharing model calls between attacks."""
    placement = placed(plan.run)
    denoiser = loaded(plan.model, placement)
    shards = Shards(replace(plan, images=captioned(plan, placement, tick)), settled(plan))
    parts: dict[Task, list[Columns]] = {task: [] for task in plan.tasks}
    done, waited = 0, 0.0
    with fitting(placement, shards.variant.batch), ThreadPoolExecutor(1) as writer:
        for shard in range(len(shards)):
            for signals, seconds in shard_of(denoiser, shards, shard, shards.images(shard), writer):
                for task, came_in in signals.items():
                    parts[task].append(came_in)
                done, waited = done + len(next(iter(signals.values()))["image"]), waited + seconds
                if tick:
                    named = {task.attack.name: rows for task, rows in signals.items()}
                    tick(Progress(done, len(plan.images), named, waited=waited))
    shards.finish()
    return {task.attack.name: table_of(came_in) for task, came_in in parts.items()}


def unkept(planned: Plan, tick: Tick | None = None, batch: int = UNKEPT_BATCH) -> dict[str, pd.DataFrame]:
    """What a plan asks, by attack, for pictures that are a visitor's own: nothing of it is kept anywhere.

    Args:
        planned: attacks that are not learned, and the pictures.
        tick: called after each batch, without the distances; it may raise to stop.
        batch: pictures at once.

    Raises:
        InputError: see `oms_core.families.load`; or the device ran out of memory.
    """
    run, images = planned.run, planned.images
    placement = placed(run)
    denoiser = loaded(planned.model, placement)
    images, done = with_unkept_captions(planned, placement), 0
    parts: dict[str, list[Columns]] = {task.attack.name: [] for task in planned.tasks}
    with fitting(placement, batch):
        for came_in, _ in batches(denoiser, images, [*planned.tasks], batch, run):
            for task, rows in came_in.items():
                parts[task.attack.name].append(rows)
            done += len(rows["image"])
            if tick:
                tick(Progress(done, len(images), {}))
    return {name: table_of(came_in) for name, came_in in parts.items()}


def with_unkept_captions(planned: Plan, placement: Placement) -> ImageSet:
    """The pictures of a plan, with captions written for those that still need one, and not kept."""
    images = planned.images
    missing = images.table.index[images.table.caption.isna()]
    texts = images.table.caption.copy()
    if len(missing):
        captioner = captions.describe(planned.run.captioner)
        for rows, said in captions.spoken(captioner, images, missing, placement):
            texts[rows] = said
    return replace(images, table=images.table.assign(caption=texts))


def captioned(plan: Plan, placement: Placement, tick: Tick | None = None) -> ImageSet:
    """The pictures of a plan, with captions written for those that still need one."""
    images, run = plan.images, plan.run
    if not plan.model.captioned or not images.table.caption.isna().any():
        return images
    told = None if tick is None else lambda done, total: tick(Progress(done, total, {}, "captions"))
    texts = captions.write(captions.describe(run.captioner), images, placement, told)
    return replace(images, table=images.table.assign(caption=texts.to_numpy()))


def shard_of(
    denoiser: Denoiser, shards: Shards, shard: int, images: ImageSet, writer: Executor
) -> Iterator[tuple[dict[Task, Columns], float]]:
    """The distances of a shard, every task in each piece: as a whole if finished, else batch by batch, then kept.

    Beside each piece the seconds that the model waited for its pictures, which are `images`. What is finished is kept
    by the writer while the model goes on.
    """
    kept, run, batch = shards.kept(shard), shards.plan.run, shards.variant.batch
    todo = [task for task in shards.entries if task not in kept]
    if not todo:
        yield {task: columns_of(rows) for task, rows in kept.items()}, 0.0
        return
    fresh: dict[Task, list[Columns]] = {task: [] for task in todo}
    start = 0
    for signals, waited in batches(denoiser, images, todo, batch, run):
        for task, rows in signals.items():
            fresh[task].append(rows)
        yield signals | {task: columns_of(rows[start : start + batch]) for task, rows in kept.items()}, waited
        start += batch
    for task, came_in in fresh.items():
        written = writer.submit(shards.entries[task].write, shard, table_of(came_in))
        written.add_done_callback(Future.result)  # what `write` does not expect is logged


def columns_of(rows: pd.DataFrame) -> Columns:
    return {name: rows[name].to_numpy() for name in rows}


@lru_cache
def automatic_batch(model: Model, placement: Placement, differentiated: bool = False) -> int:
    """The batch size that pays for this model on this device, asked or differentiated; tried once."""
    denoiser, once = loaded(model, placement), derivative if differentiated else forward_pass
    return batch_size(placement, lambda count: once(denoiser, count))


def forward_pass(denoiser: Denoiser, count: int, t: int = 0) -> None:
    """Ask a model once about a batch of empty pictures, and wait for the answer."""
    import torch

    with torch.inference_mode():
        f, x_0 = empty_pictures(denoiser, count, t)
        f(x_0).sum().item()


def derivative(denoiser: Denoiser, count: int) -> None:
    """Multiply the Jacobian of a model and its transpose with a vector, for a batch of empty pictures, and wait."""
    import torch

    from oms_core.convergence import drawn, products

    with torch.no_grad():
        f, x_0 = empty_pictures(denoiser, count)
        forward, backward = products(f, x_0)
        backward(forward(drawn(x_0))).sum().item()


def empty_pictures(denoiser: Denoiser, count: int, t: int = 0) -> tuple[Map, Tensor]:
    """A model's answer to a batch at one timestep, and a batch of empty pictures."""
    pixels = np.zeros((count, *denoiser.profile.size, denoiser.profile.channels), np.uint8)
    condition = denoiser.condition([""] * count)
    return lambda x_t: denoiser.eps(x_t, t, condition), denoiser.encode(pixels)


def batches(
    denoiser: Denoiser, images: ImageSet, tasks: list[Task], batch: int, run: Run
) -> Iterator[tuple[dict[Task, Columns], float]]:
    """The distances of each batch and the seconds waited for its pictures; the next ones are decoded meanwhile."""
    groups = [images.table.index[start : start + batch] for start in range(0, len(images), batch)]
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read_batch, images, groups[0], denoiser, batch)
        for following in [*groups[1:], None]:
            started = time.perf_counter()
            group, pixels = pending.result()
            waited = time.perf_counter() - started
            if following is not None:
                pending = reader.submit(read_batch, images, following, denoiser, batch)
            yield signals_of(denoiser, group, pixels, tasks, run), waited


def read_batch(images: ImageSet, places: pd.Index, denoiser: Denoiser, batch: int) -> tuple[ImageSet, np.ndarray]:
    """The pictures of a batch, filled up with empty ones: the batch size decides the last bits of a score."""
    group = replace(images, table=images.table.loc[places])
    pixels = group.pixels(denoiser.profile)
    empty = np.zeros((batch - len(pixels), *pixels.shape[1:]), np.uint8)
    return group, np.concatenate([pixels, empty])


def signals_of(
    denoiser: Denoiser, group: ImageSet, pixels: np.ndarray, tasks: list[Task], run: Run
) -> dict[Task, Columns]:
    """Run every task on one batch."""
    import torch

    with torch.no_grad() if differentiate(tasks) else torch.inference_mode():
        probe = probe_of(denoiser, group, pixels, run)
        names = group.table.image.to_numpy(object)
        return {task: signal(task.attack.measure(probe, task.t, run.steps), names) for task in tasks}


def probe_of(denoiser: Denoiser, group: ImageSet, pixels: np.ndarray, run: Run) -> Probe:
    """A batch before the model; pictures beyond the group's length are padding."""
    padding = len(pixels) - len(group)
    x_0, images = denoiser.encode(pixels), [*group.table.image]
    condition = denoiser.condition([*group.table.caption, *[""] * padding])
    return Probe(denoiser, x_0, condition, lambda k: noise_like(x_0, images, run.seed, k), SCHEMES[run.scheme].advance)


def noise_like(x_0: Tensor, images: list[str], seed: int, k: int = 0) -> Tensor:
    """The k-th draw from N(0, I) of each picture, decided by its identity and the seed alone; zeros for padding."""
    import torch

    noise, number = torch.zeros(x_0.shape), f" {k}" if k else ""
    for row, image in enumerate(images):
        digest = hashlib.sha256(f"{image} {seed}{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise[row] = torch.randn(x_0.shape[1:], generator=generator)
    return noise.to(x_0)


def signal(columns: dict[str, Tensor], names: np.ndarray) -> Columns:
    """What was measured on a batch, an entry per named picture; many numbers in one column are kept as bytes."""
    import torch

    found: Columns = {"image": names}
    single = {name: values.float() for name, values in columns.items() if values.ndim == 1}
    if single:  # fetched from the device at once, and kept in one piece
        found |= zip(single, torch.stack([*single.values()])[:, : len(names)].cpu().numpy(), strict=True)
    for name in columns.keys() - single.keys():
        found[name] = np.empty(len(names), object)
        found[name][:] = [numbers.tobytes() for numbers in columns[name][: len(names)].float().cpu().numpy()]
    return {name: found[name] for name in ("image", *columns)}


def trace(run: Run, image: str) -> Trace:
    """The iterates of one picture under a run's first attack, from the cache or computed.

    Raises:
        InputError: see `plan`; or the picture is not in the set.
    """
    planned = plan(run)
    found = lookup_trace(planned, image)
    return found if found is not None else compute_trace(planned, image)


def pictures_of(found: Trace, denoiser: Denoiser, x_0: Tensor) -> np.ndarray:
    """What the latents of a trace look like, see `Trace.pictures`; x_0 says where they are decoded."""
    import torch

    steps = range(len(found.eps))
    latents = [*(found.x_t(n) for n in steps), *(found.predicted_x_0(n) for n in steps)]
    decoded = [denoiser.decode(torch.from_numpy(x)[None].to(x_0))[0] for x in latents]
    return np.stack(decoded).reshape(2, len(steps), *decoded[0].shape)


def compute_trace(planned: Plan, image: str) -> Trace:
    """Ask the model for the iterates of one picture, and keep them."""
    run = planned.run
    placement = placed(run)
    group = replace(planned.images, table=planned.images.table[planned.images.table.image == image])
    found = traced(replace(planned, images=captioned(replace(planned, images=group), placement)))
    content = trace_content(planned, image)
    entry = cache.Entry(cache.key_of(content), variant_of(run, placement, 1), 1)
    entry.write(0, found.rows())
    entry.finish(content)
    return found


def unkept_trace(planned: Plan) -> Trace:
    """Ask the model for the iterates of a plan's only picture, a visitor's own, and keep nothing."""
    placement = placed(planned.run)
    return traced(replace(planned, images=with_unkept_captions(planned, placement)))


def traced(planned: Plan) -> Trace:
    """The iterates of a plan's only picture under its first attack."""
    import torch

    run, task, group = planned.run, planned.tasks[0], planned.images
    denoiser = loaded(planned.model, placed(run))
    with torch.inference_mode():
        probe = probe_of(denoiser, group, group.pixels(denoiser.profile), run)
        given, f = task.attack.search(probe, task.t)
        iterates = fixed_point(f, given, run.steps, probe.scheme).eps
        eps = torch.cat(iterates).float().cpu().numpy()  # (N + 1, C, H, W)
        alpha, sigma = denoiser.coefficients(task.t + task.attack.reach)
        found = Trace(probe.x_0[0].float().cpu().numpy(), eps, alpha, sigma)
        return replace(found, pictures=pictures_of(found, denoiser, probe.x_0)) if planned.model.latent else found
