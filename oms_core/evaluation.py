"""What attacks achieve on a run's pictures, counted once and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd

from oms_core import cache, metrics
from oms_core.attacks import RIVALS
from oms_core.run import Plan, Run, calls, scores

METRICS = 1  # raised when a change of the code changes a figure


def with_rivals(run: Run) -> Run:
    """The same run with the attack of equal budget beside each attack that has one."""
    added = (RIVALS[name] for name in run.attacks if name in RIVALS) if run.steps > 1 else ()
    return replace(run, attacks=tuple(dict.fromkeys([*run.attacks, *added])))


def evaluation(planned: Plan, signals: dict[str, pd.DataFrame], asked: tuple[str, ...]) -> list[dict[str, Any]]:
    """The figures of every attack and n, see `metrics.evaluate`; found again by the scores they were counted from.

    Args:
        planned: the pictures and the attacks, rivals among them.
        signals: by attack.
        asked: the attacks that get rows; others only stand beside.
    """
    table = scores(planned, signals)
    counted = calls(planned)
    rivals = {name: rival for name, rival in RIVALS.items() if rival in signals and rival not in asked}
    content = {
        "evaluation": METRICS,
        "scores": cache.digest_of_rows(table),
        "calls": [[*key, count] for key, count in counted.items()],
        "rivals": rivals,
    }

    def count() -> pd.DataFrame:
        rows = pd.DataFrame(metrics.evaluate(table, counted, rivals))
        return rows.astype({name: float for name in rows if name.endswith(OPTIONAL)})

    rows = cache.counted(content, count)
    return [plain(row) for row in rows.to_dict("records")]


OPTIONAL = ("gain", "lead", "_lo", "_hi", "_auc", "tpr5", "tpr1", "tpr01")  # columns whose figures may be missing


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row with None for what could not be measured."""
    missing = (name for name, value in row.items() if name.endswith(OPTIONAL) and missing_number(value))
    return row | dict.fromkeys(missing)


def missing_number(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
