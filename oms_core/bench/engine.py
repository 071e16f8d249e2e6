"""Scoring beside as many bare forward passes, and beside the published attacks computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from oms_core.attacks import ATTACKS, COMPARED, RIVALS, Probe
from oms_core.bench.base import STEPS, Row, Subject, empty_cache, row, timed
from oms_core.compute import Progress, compute, probe_of
from oms_core.run import Plan, about
from oms_core.search import diffuse

ALLOWED = {"overhead": 1.03, "published": 0.27, "idle": 0.01}
BATCHES = 4  # that are computed before it is another's turn
SAMPLED = 4  # one of so many batches goes through the published attacks
GRID = 30  # timesteps at which NA, PIA and PIAN are asked where they are published with a search over timesteps
PUBLISHED = {"SecMI": 12, "PIA": 31, "PIAN": 31, "NA": 30}  # model calls per picture


def engine_rows(subject: Subject) -> list[Row]:
    """Scoring, as many bare forward passes, and the published attacks, group by group of pictures in turns, so that all
    three meet the same machine; the published attacks, which take four times as long, on a quarter of the batches.
    """
    planned, batch = subject.plan(), subject.batch
    one = probe_on(subject)
    forward = forward_of(one)
    calls = calls_of(subject, COMPARED)
    engine = bare = published = waited = 0.0
    last = Progress(0, 0, {})

    def tick(progress: Progress) -> None:
        nonlocal last
        last = progress

    forward()
    for group in groups_of(planned, BATCHES * batch):
        batches = -(-len(group.images) // batch)
        with empty_cache():
            engine += timed(lambda group=group: compute(group, tick))
        waited += last.waited
        bare += timed(lambda batches=batches: [forward() for _ in range(batches * calls)])
        some = -(-batches // SAMPLED)
        published += timed(lambda some=some: [compute_published(one) for _ in range(some)]) * batches / some
    everything = (*COMPARED, *RIVALS.values())
    alone = sum(ATTACKS[name].calls_at(timestep(subject, name), STEPS) for name in everything)
    what = f"{len(planned.images)} pictures, {subject.name}"
    return [
        row(f"scoring / bare forwards, {what}", engine / bare, most=ALLOWED["overhead"]),
        row(f"scoring / published attacks one by one, {what}", engine / published, most=ALLOWED["published"]),
        row(f"share of the time in which the model waits for pictures, {what}", waited / engine, most=ALLOWED["idle"]),
        row("model calls per picture, NA + PIA + PIAN + SecMI both ways", calls, "calls", most=distinct(subject)),
        row("the same with their repetitions", calls_of(subject, everything), "calls"),
        row("the same if each were computed alone", alone, "calls"),
        row(f"scoring, {what}", 1000 * engine / len(planned.images), "ms per picture"),
        row("batch that was found to pay", batch, "pictures"),
    ]


def forward_of(one: Probe) -> Callable[[], None]:
    """One forward pass on a batch of noisy pictures, and nothing else; on empty ones it would be faster."""
    t = ATTACKS["PIA"].t
    with torch.inference_mode():
        x_t = diffuse(one.x_0, one.noise, *one.coefficients(t))

    def forward() -> None:
        with torch.inference_mode():
            one.ask(x_t, t).sum().item()  # waits for the device

    return forward


def groups_of(planned: Plan, size: int) -> list[Plan]:
    """The pictures of a plan in groups, each as a plan of its own."""
    table = planned.images.table
    sets = (replace(planned.images, table=table.iloc[k : k + size]) for k in range(0, len(table), size))
    return [about(planned, images) for images in sets]


def timestep(subject: Subject, name: str) -> int:
    return next(task.t for task in subject.plan((name,)).tasks)


def distinct(subject: Subject) -> int:
    """Different questions that the compared attacks have to ask, counted by hand: each start once, a call per step, one
    walk for both readings of SecMI."""
    t = timestep(subject, "SecMI")
    walk = ATTACKS["SecMI"].calls(t)
    return STEPS + 1 + 2 * STEPS + walk + 2 * (STEPS - 1) - shared_start(t)


def shared_start(t: int) -> int:
    """SecMI's walk begins with the question that PIA and PIAN start with."""
    return 1 if t else 0


def probe_on(subject: Subject) -> Probe:
    """A full batch before the model."""
    images = subject.plan().images.limit(subject.batch)
    pixels = images.pixels(subject.denoiser.profile)
    return probe_of(subject.denoiser, images, pixels, subject.plan().run)


def calls_of(subject: Subject, attacks: tuple[str, ...]) -> int:
    """How often the model is asked about a batch in one pass over attacks."""
    one, planned = probe_on(subject), subject.plan(attacks)
    for task in planned.tasks:
        task.attack.measure(one, task.t, STEPS)
    return one.calls


def compute_published(one: Probe) -> None:
    """Each published attack alone, at its published number of calls; SecMI at its timestep, the others on a grid."""
    last = one.denoiser.timesteps - 1
    grid = [1 + k * (last - 1) // GRID for k in range(GRID)]
    for name, calls in PUBLISHED.items():
        alone, attack = fresh(one), ATTACKS[name]
        for t in [attack.t] if name == "SecMI" else grid:
            for distances in attack.measure(alone, t, 1).values():
                distances.cpu()  # waits for the device
        assert alone.calls == calls, (name, alone.calls)


def fresh(one: Probe) -> Probe:
    """The same batch, about which nothing was asked yet."""
    return Probe(one.denoiser, one.x_0, one.condition, one.draw, one.scheme)
