"""What the gradients of single pictures cost, beside an ordinary backward pass and beside one picture at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from oms_core.attacks import Probe
from oms_core.bench.base import Row, Subject, in_turns, middle_ratio, row
from oms_core.compute import probe_of
from oms_core.gradients import gradient_norms

TURNS = 9
BATCH = 64
ALONE = 8  # pictures whose gradients are taken one at a time, for a comparison
ALLOWED = {"ordinary": 1.8, "alone": 0.2}


def gradient_rows(subject: Subject) -> list[Row]:
    """The three take turns, and the median of their ratios counts."""
    network = subject.denoiser.network
    if network is None:
        return []
    whole, *single = probes(subject)
    together, ordinary, one_by_one = in_turns(
        [
            lambda: norms_together(network, whole),
            lambda: backward(network, whole),
            lambda: [norms_alone(network, one) for one in single],
        ],
        TURNS,
    )
    alone = middle_ratio(together, one_by_one) * len(single) / len(whole.x_0)
    what = f"{BATCH} pictures, {subject.name}"
    return [
        row(f"gradients of each picture / backward pass of the batch, {what}", middle_ratio(together, ordinary),
            most=ALLOWED["ordinary"]),
        row(f"gradients of each picture / one picture at a time, {what}", alone, most=ALLOWED["alone"]),
    ]  # fmt: skip


def probes(subject: Subject) -> list[Probe]:
    """A batch before the model, and then some of its pictures alone."""
    planned = subject.plan(limit=BATCH)
    images = planned.images
    groups = [images, *(replace(images, table=images.table.iloc[k : k + 1]) for k in range(ALONE))]
    with torch.no_grad():
        return [
            probe_of(subject.denoiser, group, group.pixels(subject.denoiser.profile), planned.run) for group in groups
        ]


def loss(probe: Probe) -> Tensor:
    """The mean squared eps^0 - eps^1 at one timestep, (B,)."""
    return (probe.noise - probe.differentiable_map(100)(probe.noise)).float().square().flatten(1).mean(dim=1)


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
