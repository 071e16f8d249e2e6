"""What the engine costs beyond the model itself, measured against bare forward and backward passes in one run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oms_core.attacks import COMPARED, Probe
from oms_core.compute import Progress, automatic_batch, compute, loaded, probe_of
from oms_core.denoiser import Denoiser
from oms_core.device import place
from oms_core.gradients import gradient_norms
from oms_core.run import Plan, Run, plan

PICTURES, STEPS, ROUNDS = 512, 3, 5
TURNS = 9  # of what is compared in turns
CALLS = 25  # NA 3; eps_theta(x_0, 0) 1, shared; PIA 3; PIAN 3; SecMI's walk 10, then 1 + 2 + 2 for both readings
ALONE = 8  # pictures whose gradients are taken one at a time, for a comparison


def bench(model: str) -> list[dict[str, Any]]:
    """Rows of `name, value, target, holds`; what is only good to know has no target."""
    run = Run(model=model, attacks=COMPARED, steps=STEPS, limit=PICTURES)
    planned = plan(run)
    placement = place()
    denoiser = loaded(planned.model, placement)
    batch = automatic_batch(denoiser, placement)
    calls = calls_per_batch(planned, denoiser, batch)
    ratio = overhead(planned, denoiser, batch, calls)
    return [
        row(f"scoring {PICTURES} pictures / bare forwards, {model}", round(ratio, 3), 1.05),
        row("model calls per picture, NA + PIA + PIAN + SecMI both ways", calls, CALLS),
        row("evaluate from a warm cache, whole process, seconds", round(warm_evaluate(model), 2), 3.0),
        {"name": "seconds per model call and picture", "value": seconds_per_call(denoiser, batch)},
        *gradient_rows(model, planned, denoiser, batch),
    ]


def row(name: str, value: float, target: float) -> dict[str, Any]:
    """A measured value against the most that it should be."""
    return {"name": name, "value": value, "target": target, "holds": value <= target}


def calls_per_batch(planned: Plan, denoiser: Denoiser, batch: int) -> int:
    """How often the model is asked about a batch in one pass over all attacks."""
    images = planned.images.limit(batch)
    probe = probe_of(denoiser, images, images.pixels(denoiser.profile), planned.run)
    for task in planned.tasks:
        task.attack.measure(probe, task.t, STEPS)
    return probe.calls


def overhead(planned: Plan, denoiser: Denoiser, batch: int, calls: int) -> float:
    """Time of scoring over time of as many bare forwards of the same batches.

    The forwards are made in the same run, as many after each batch as the batch took, so that both meet the same
    machine; what is left of the run's time is the scoring.
    """
    forward = bare_forward(denoiser, batch)
    forward()
    bare = 0.0

    def tick(_: Progress) -> None:
        nonlocal bare
        bare += timed(lambda: [forward() for _ in range(calls)])

    def rounds() -> None:
        for _ in range(ROUNDS):
            with empty_cache():
                compute(planned, tick)

    return (timed(rounds) - bare) / bare


def bare_forward(denoiser: Denoiser, batch: int) -> Callable[[], None]:
    """One forward pass of the model on a batch, and nothing else."""
    pixels = np.zeros((batch, *denoiser.profile.size, denoiser.profile.channels), np.uint8)
    x_0, condition = denoiser.encode(pixels), denoiser.condition([""] * batch)

    @torch.inference_mode()
    def forward() -> None:
        denoiser.eps(x_0, 100, condition).sum().item()  # waits for the device

    return forward


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_per_call(denoiser: Denoiser, batch: int) -> float:
    """Seconds of a bare forward pass for each of its pictures."""
    forward = bare_forward(denoiser, batch)
    forward()
    return round(min(timed(forward) for _ in range(ROUNDS)) / batch, 6)


def gradient_rows(model: str, planned: Plan, denoiser: Denoiser, batch: int) -> list[dict[str, Any]]:
    """What the gradients of single pictures cost, beside an ordinary backward pass and beside one picture at a time.

    The three take turns, and the median of their ratios counts.
    """
    if denoiser.network is None:
        return []
    whole, *single = probes(planned, denoiser, batch)
    network = denoiser.network
    work = (
        lambda: norms_together(network, whole),
        lambda: backward(network, whole),
        lambda: [norms_alone(network, one) for one in single],
    )
    turns = [[timed(one) for one in work] for _ in range(1 + TURNS)][1:]  # the first warms up
    ordinary = statistics.median(turn[0] / turn[1] for turn in turns)
    alone = statistics.median(turn[0] / turn[2] for turn in turns) * len(single) / len(whole.x_0)
    return [
        row(f"gradients of each picture / backward pass of the batch, {model}", round(ordinary, 2), 1.8),
        row(f"gradients of each picture / one picture at a time, {model}", round(alone, 2), 0.2),
    ]


def probes(planned: Plan, denoiser: Denoiser, batch: int) -> list[Probe]:
    """A batch before the model, and then some of its pictures alone."""
    images = planned.images.limit(batch)
    groups = [images, *(replace(images, table=images.table.iloc[k : k + 1]) for k in range(ALONE))]
    with torch.no_grad():
        return [probe_of(denoiser, group, group.pixels(denoiser.profile), planned.run) for group in groups]


def loss(probe: Probe) -> Tensor:
    """The mean squared eps^0 - eps^1 at one timestep, (B,)."""
    return (probe.noise - probe.map(100)(probe.noise)).float().square().flatten(1).mean(dim=1)


def norms_together(network: nn.Module, probe: Probe) -> None:
    """The norm of the gradient of each picture by each tensor of weights."""
    (norms,) = gradient_norms(network, len(probe.x_0), lambda: [loss(probe)])
    norms.sum().item()  # waits for the device


def norms_alone(network: nn.Module, probe: Probe) -> None:
    """The same for one picture by an ordinary backward pass."""
    torch.stack([one.norm() for one in backward(network, probe)]).sum().item()


def backward(network: nn.Module, probe: Probe) -> tuple[Tensor, ...]:
    """An ordinary backward pass of the mean loss to every tensor of weights."""
    network.requires_grad_(True)
    found = torch.autograd.grad(loss(probe).mean(), [*network.parameters()], materialize_grads=True)
    network.requires_grad_(False)
    found[0].sum().item()  # waits for the device
    return found


@contextmanager
def empty_cache() -> Iterator[None]:
    """Keep results in a temporary folder, so that nothing is found."""
    before = os.environ.get("OMS_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMS_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("OMS_CACHE")
            if before is not None:
                os.environ["OMS_CACHE"] = before


def warm_evaluate(model: str) -> float:
    """Seconds of a whole `evaluate` process whose distances are known: the median of three."""
    command = [sys.executable, "-m", "oms_core", "evaluate", "--model", model, "--json"]
    process = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    process()  # whatever is missing is computed here
    return statistics.median(timed(process) for _ in range(3))
