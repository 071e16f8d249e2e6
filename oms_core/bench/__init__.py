"""Speed, model calls and memory of the engine, each measured against a baseline in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go

from oms_core.bench.app import app_rows
from oms_core.bench.base import Row, Subject
from oms_core.bench.cluster import cluster_rows, scheduler_rows
from oms_core.bench.engine import engine_rows
from oms_core.bench.gradients import gradient_rows
from oms_core.bench.memory import growth_rows, memory_rows
from oms_core.bench.network import network_rows
from oms_core.compute import batch_for
from oms_core.device import place
from oms_core.errors import InputError
from oms_core.figures import Chart, layout
from oms_core.run import Run, plan

PARTS: dict[str, Callable[[Subject], list[Row]]] = {
    "network": network_rows,
    "engine": engine_rows,
    "gradients": gradient_rows,
    "app": app_rows,
    "memory": memory_rows,
    "growth": growth_rows,
    "cluster": cluster_rows,
    "scheduler": scheduler_rows,
}
QUICK = ("network", "engine", "gradients", "app", "memory")  # the others take many minutes
KEPT, MISSED = "#2a78d6", "#e34948"


def bench(model: str, pictures: int, parts: Sequence[str] = QUICK) -> list[Row]:
    """Measure some parts.

    Args:
        model: the model to measure with.
        pictures: how many are scored.
        parts: names of `PARTS`.

    Returns:
        Rows of part, name, value, unit, target, holds; what is only good to know has no target.

    Raises:
        InputError: there is no such part or model.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"There is no part {part!r}; known are {', '.join(PARTS)}.")
    if pictures < 1:
        raise InputError(f"pictures is {pictures}; it must be at least 1.")
    subject = Subject(model, pictures, batch_for(plan(Run(model, limit=pictures)), place()))
    return [{"part": part, **row} for part in dict.fromkeys(parts) for row in PARTS[part](subject)]


def chart(rows: Sequence[Row]) -> Chart:
    """Every value with a target, as a share of it; up to 1 it holds."""
    table = pd.DataFrame(rows)
    judged = table[table.target.notna()] if "target" in table else table.iloc[:0]
    colours = [KEPT if holds else MISSED for holds in judged.get("holds", [])]
    figure = go.Figure(
        go.Bar(x=judged.get("of target"), y=judged.get("name"), orientation="h", marker_color=colours, width=0.6)
    )
    figure.add_vline(1, line_dash="dot", line_color="#6b7280")
    layout(figure, "share of what is allowed (at most 1 holds)", "", height=120 + 36 * len(judged))
    figure.update_yaxes(autorange="reversed", automargin=True)
    held = int(judged["holds"].sum()) if len(judged) else 0
    return Chart(figure, f"{held} of {len(judged)} targets hold.", table)
