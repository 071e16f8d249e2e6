"""Rows of figures as people read them: per cent, with intervals, the paper's figures in columns of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from oms_core import exhibits

NAMES = ("model", "attack", "scheme", "score", "t", "n", "calls", "nominal")
MEASURES = {
    "auc": ("AUC %", ".1f"),
    "gain": ("gain", "+.1f"),
    "lead": ("lead at equal calls", "+.1f"),
    "fpr": ("FPR %", ".2f"),
    "tpr": ("TPR %", ".1f"),
    "tpr5": ("TPR@5%", ".1f"),
    "tpr1": ("TPR@1%", ".1f"),
    "tpr01": ("TPR@0.1%", ".1f"),
}


def readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates in per cent with their intervals, for people."""
    return [
        {name: row[name] for name in NAMES if name in row}
        | ({"ASR %": f"{100 * row['asr']:.1f} ± {100 * row['asr_sd']:.1f}"} if "asr" in row else {})
        | {title: with_interval(row, name, form) for name, (title, form) in MEASURES.items() if name in row}
        | ({"pixels alone %": f"{100 * row['pixels_auc']:.1f}"} if row.get("pixels_auc") is not None else {})
        | ({"note": row["note"]} if row.get("note") else {})
        for row in rows
    ]


def with_interval(row: dict[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return "-"
    value, low, high = (100 * row[key] for key in (name, f"{name}_lo", f"{name}_hi"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def beside_the_paper(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table for people, the paper's figures in columns of their own."""
    shown = exhibits.TABLES[name].shown
    return [human | papers(row, shown) for human, row in zip(readable(rows), rows, strict=True)]


def papers(row: dict[str, Any], shown: Sequence[str]) -> dict[str, str]:
    """What the paper reports, a cell for each figure that matters in a table."""
    found = row["paper"] or {}
    return {
        f"paper's {MEASURES[name][0]}": ", ".join(f"{data} {100 * has[name]:.1f}" for data, has in found.items())
        for name in shown
        if name != "asr"
    }


def plain(value: Any) -> Any:
    """A value as JSON knows it: no NumPy numbers, no NaN."""
    match value:
        case dict():
            return {str(key): plain(part) for key, part in value.items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case None | str() | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
    return plain(value.item())  # a NumPy number
