"""Scoring beside the same questions asked bare, and beside the published attacks computed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from oms_core.attacks import ATTACKS, COMPARED, RIVALS, Probe
from oms_core.bench.base import STEPS, Row, Subject, empty_cache, row, timed
from oms_core.compute import Progress, automatic_batch, compute, probe_of

if TYPE_CHECKING:
    from oms_core.denoiser import Denoiser

ALLOWED = {"overhead": 1.03, "published": 0.27, "idle": 0.01}
SAMPLED = 4  # one of so many batches goes through the published attacks
GRID = 30  # timesteps at which NA, PIA and PIAN are asked where they are published with a search over timesteps
PUBLISHED = {"SecMI": 12, "PIA": 31, "PIAN": 31, "NA": 30}  # model calls per picture
Question = tuple[torch.Tensor, int, Any]  # x_t, t, condition


def engine_rows(subject: Subject) -> list[Row]:
    """Scoring, which stops after each batch, so that the network is asked the same questions again by itself: both
    meet the same machine. The published attacks, which take four times as long, go through one batch in four.
    """
    planned, denoiser, one = subject.plan(), subject.denoiser, probe_on(subject)
    bare: list[float] = []
    published: list[float] = []
    with overheard(denoiser) as asked, empty_cache():

        def tick(progress: Progress) -> None:
            questions = [*asked]
            bare.append(timed(lambda: ask_again(denoiser, questions)))
            if len(bare) % SAMPLED == 1:
                published.append(timed(lambda: compute_published(one)))
            asked.clear()

        whole = timed(lambda: compute(planned, tick))
    engine = whole - sum(bare) - sum(published)
    alone = len(bare) * sum(published) / len(published)
    everything = (*COMPARED, *RIVALS.values())
    calls_alone = sum(ATTACKS[name].calls_at(timestep(subject, name), STEPS) for name in everything)
    what = f"{len(planned.images)} pictures, {subject.name}"
    return [
        row(f"scoring / bare forwards, {what}", engine / sum(bare), most=ALLOWED["overhead"]),
        row(f"scoring / published attacks one by one, {what}", engine / alone, most=ALLOWED["published"]),
        row(
            f"share of the time in which the model waits for pictures, {what}",
            waited(subject),
            most=ALLOWED["idle"],
        ),
        row(
            "model calls per picture, NA + PIA + PIAN + SecMI both ways",
            calls_of(subject, COMPARED),
            "calls",
            most=distinct(subject),
        ),
        row("the same with their repetitions", calls_of(subject, everything), "calls"),
        row("the same if each were computed alone", calls_alone, "calls"),
        row(f"scoring, {what}", 1000 * engine / len(planned.images), "ms per picture"),
        row("batch that was found to pay", subject.batch, "pictures"),
        row("finding it, once before a run", timed(lambda: try_batches(subject)), "s"),
    ]


def waited(subject: Subject) -> float:
    """The share of the time in which the model waits for pictures, when nothing else goes on between batches."""
    told: list[Progress] = []
    with empty_cache():
        seconds = timed(lambda: compute(subject.plan(limit=max(1, subject.pictures // SAMPLED)), told.append))
    return told[-1].waited / seconds


@contextmanager
def overheard(denoiser: Denoiser) -> Iterator[list[Question]]:
    """Write down what a model is asked."""
    asked: list[Question] = []
    eps = denoiser.eps

    def listen(x_t: torch.Tensor, t: int, condition: Any = None) -> torch.Tensor:
        asked.append((x_t, t, condition))
        return eps(x_t, t, condition)

    denoiser.eps = listen
    try:
        yield asked
    finally:
        del denoiser.eps


def ask_again(denoiser: Denoiser, questions: list[Question]) -> None:
    """Forward passes and nothing else; the answers are held, as scoring holds them."""
    with torch.inference_mode():
        answers = [denoiser.eps(x_t, t, condition) for x_t, t, condition in questions]
        answers[-1].cpu()  # waits for the device


def try_batches(subject: Subject) -> None:
    """As before a run, as if it had not been tried before."""
    automatic_batch.__wrapped__(subject.model, subject.placement)


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


@torch.inference_mode()
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
