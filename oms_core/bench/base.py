"""What all measurements have in common: rows with a target, fair turns, and caches that know nothing."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from oms_core.attacks import COMPARED
from oms_core.catalog import Model, describe
from oms_core.compute import loaded
from oms_core.device import Placement, place
from oms_core.run import Plan, Run, plan

if TYPE_CHECKING:
    from oms_core.denoiser import Denoiser

STEPS = 3  # N: the attacks with n = 0 ... 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured with.

    Attributes:
        name: of the model.
        pictures: how many are scored.
        batch: how many at once; 0 for what pays.
        dtype, mode: precision and way of the network, see `oms_core.device`.
    """

    name: str
    pictures: int
    batch: int = 0
    dtype: str = ""
    mode: str = ""

    @cached_property
    def model(self) -> Model:
        return describe(self.name)

    @cached_property
    def placement(self) -> Placement:
        return place(dtype=self.dtype, mode=self.mode)

    @property
    def denoiser(self) -> Denoiser:
        return loaded(self.model, self.placement)

    def plan(self, attacks: tuple[str, ...] = COMPARED, limit: int | None = None) -> Plan:
        """Attacks on the first pictures of the model's own set, in batches of one size."""
        return plan(self.run(attacks, limit=limit or self.pictures))

    def run(self, attacks: tuple[str, ...] = COMPARED, **more: Any) -> Run:
        """What is computed on which pictures, as it is computed in every measurement."""
        how = {"batch": self.batch, "device": self.placement.device, "dtype": self.dtype, "mode": self.mode}
        return Run(self.name, attacks=attacks, steps=STEPS, **how, **more)


def row(name: str, value: float, unit: str = "", most: float | None = None, least: float | None = None) -> Row:
    """A measured value, perhaps against the most or the least that it should be."""
    found: Row = {"name": name, "value": float(f"{value:.4g}"), "unit": unit}
    if most is not None:
        share = value / most if most else 1 + value
        return found | {"target": f"at most {most:g}", "holds": value <= most, "of target": share}
    if least is not None:
        return found | {"target": f"at least {least:g}", "holds": value >= least, "of target": least / value}
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(work: Sequence[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Seconds of several pieces of work that take turns, so that all meet the same machine; a list per piece."""
    for one in work:
        one()  # warms up
    return [[*times] for times in zip(*([timed(one) for one in work] for _ in range(turns)), strict=True)]


def middle_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios of two pieces of work that took turns."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def bare_forward(denoiser: Denoiser, batch: int, t: int = 100) -> Callable[[], None]:
    """One forward pass of the model on a batch, and nothing else."""
    pixels = np.zeros((batch, *denoiser.profile.size, denoiser.profile.channels), np.uint8)
    with torch.inference_mode():
        x_0, condition = denoiser.encode(pixels), denoiser.condition([""] * batch)

    def forward() -> None:
        with torch.inference_mode():
            denoiser.eps(x_0, t, condition).sum().item()  # waits for the device

    return forward


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Keep results in a folder."""
    before = os.environ.get("OMS_CACHE")
    os.environ["OMS_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("OMS_CACHE")
        if before is not None:
            os.environ["OMS_CACHE"] = before


@contextmanager
def empty_cache() -> Iterator[Path]:
    """Keep results in a temporary folder, so that nothing is found."""
    with tempfile.TemporaryDirectory() as folder, kept_in(Path(folder)):
        yield Path(folder)
