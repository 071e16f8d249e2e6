"""Speed, model calls and memory of the engine, each measured against a baseline in the same run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from oms_core.bench.app import app_rows
from oms_core.bench.base import Row, Subject
from oms_core.bench.cluster import cluster_rows, scheduler_rows
from oms_core.bench.engine import engine_rows
from oms_core.bench.gradients import gradient_rows
from oms_core.bench.kills import kill_rows
from oms_core.bench.memory import growth_rows, memory_rows
from oms_core.bench.network import network_rows
from oms_core.compute import batch_for
from oms_core.errors import InputError
from oms_core.figures import Chart, layout


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
        measure: from what is measured with to its rows.
        model, pictures: with which the targets are to be reached.
        quick: whether it is over in some minutes.
    """

    measure: Callable[[Subject], list[Row]]
    model: str = "ddpm-digits"
    pictures: int = 512
    quick: bool = True


PARTS = {
    "network": Part(network_rows),
    "engine": Part(engine_rows, "ddpm-fashion", 1500),
    "gradients": Part(gradient_rows),
    "app": Part(app_rows),
    "memory": Part(memory_rows, "ddpm-fashion", 1500),
    "growth": Part(growth_rows, quick=False),
    "cluster": Part(cluster_rows, quick=False),
    "scheduler": Part(scheduler_rows, quick=False),
    "kills": Part(kill_rows, quick=False),
}
QUICK = tuple(name for name, part in PARTS.items() if part.quick)
ALL = "all"
KEPT, MISSED = "#2a78d6", "#e34948"
LINE = 56  # characters of a name beside the plot


def bench(
    parts: Sequence[str] = QUICK, model: str = "", pictures: int | None = None, dtype: str = "", mode: str = ""
) -> list[Row]:
    """Measure some parts.

    Args:
        parts: names of `PARTS`, or `ALL`.
        model: the model to measure with; by default each part's own.
        pictures: how many are scored; by default as many as the part's targets say.
        dtype, mode: how the network runs, see `oms_core.device`.

    Returns:
        Rows of part, name, value, unit, target, holds; what is only good to know has no target.

    Raises:
        InputError: there is no such part, model, precision or mode.
    """
    for name in parts:
        if name not in (*PARTS, ALL):
            raise InputError(f"There is no part {name!r}; known are {', '.join(PARTS)}, and {ALL}.")
    if pictures is not None and pictures < 1:
        raise InputError(f"pictures is {pictures}; it must be at least 1.")
    rows = []
    for name in PARTS if ALL in parts else dict.fromkeys(parts):
        part = PARTS[name]
        subject = Subject(model or part.model, pictures or part.pictures, dtype=dtype, mode=mode)
        subject = replace(subject, batch=batch_for(subject.plan(), subject.placement))
        rows += [{"part": name, **row} for row in part.measure(subject)]
    return rows


def chart(rows: Sequence[Row]) -> Chart:
    """Every value with a target, as a share of it; up to 1 it holds."""
    table = pd.DataFrame(rows)
    judged = table[table.target.notna()] if "target" in table else table.iloc[:0]
    colours = [KEPT if holds else MISSED for holds in judged.get("holds", [])]
    names = ["<br>".join(textwrap.wrap(name, LINE, break_on_hyphens=False)) for name in judged.get("name", [])]
    figure = go.Figure(go.Bar(x=judged.get("of target"), y=names, orientation="h", marker_color=colours, width=0.6))
    figure.add_vline(1, line_dash="dot", line_color="#6b7280")
    layout(figure, "share of what is allowed (at most 1 holds)", "", height=120 + 40 * len(judged))
    figure.update_yaxes(autorange="reversed", automargin=True)
    held = int(judged["holds"].sum()) if len(judged) else 0
    return Chart(figure, f"{held} of {len(judged)} targets hold.", table)
