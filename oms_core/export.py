"""Writing a chart to a file: self-contained HTML, or a picture where a Chrome is installed."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from oms_core.errors import InputError
from oms_core.figures import Chart
from oms_core.plain_text import csv_of
from oms_core.writing import write_file

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; }"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>{style}</style>
</head><body><h1>{title}</h1><p>{alt}</p>{figure}<details><summary>Table</summary>{table}</details></body></html>
"""


def write_figure(chart: Chart, title: str, out: Path) -> None:
    """Write a chart as .html, .png or .svg.

    Raises:
        InputError: the place cannot be written, or a picture is asked for where no Chrome is found.
    """
    kind = out.suffix.removeprefix(".")
    write_file(out, page(chart, title).encode(errors="replace") if kind == "html" else picture(chart, title, kind))


def page(chart: Chart, title: str) -> str:
    """An HTML page with the figure, its sentence and its table; it loads nothing from elsewhere."""
    return PAGE.format(
        style=STYLE,
        title=html.escape(title),
        alt=html.escape(chart.alt),
        figure=chart.figure.to_html(full_html=False, include_plotlyjs=True),
        table=chart.table.to_html(index=False, float_format="%.4f", border=0),
    )


def picture(chart: Chart, title: str, kind: str) -> bytes:
    """The figure as PNG or SVG, drawn by the Chrome or Chromium on this machine."""
    titled = go.Figure(chart.figure).update_layout(title={"text": title, "font": {"size": 16}}, margin={"t": 90})
    try:
        return titled.to_image(format=kind, width=1100, height=max(620, titled.layout.height or 0), scale=2)
    except (RuntimeError, ValueError) as error:  # without a Chrome, or with one that does not start
        raise InputError(
            "A PNG or SVG needs Chrome or Chromium on this machine; install one, or write .html."
        ) from error


FINDINGS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>OMS Explorer: verdict</title>
<style>{style}</style></head><body><h1>What can be said of {pictures} pictures</h1>
<p>Asked of {model} with {attack} at t = {t}; compared with known pictures of {known}. No figure here says that a
picture was trained on: it says how rare its score is among pictures that were not.</p>
<ul>{says}</ul>{figure}{table}</body></html>
"""


def findings_page(found: dict[str, Any], chart: Chart) -> str:
    """A verdict as an HTML page that loads nothing from elsewhere.

    Args:
        found: see `oms_core.audit.report`.
        chart: the ruler.
    """
    table = findings_table(found).to_html(index=False, float_format="%.4g", border=0)
    return FINDINGS.format(
        style=STYLE,
        pictures=len({row["image"] for row in found["pictures"]}),
        model=html.escape(found["model"]),
        attack=html.escape(found["attack"]),
        t=found["t"],
        known=html.escape(found["reference"]),
        says="".join(f"<li>{html.escape(sentence)}</li>" for sentence in found["says"]),
        figure=chart.figure.to_html(full_html=False, include_plotlyjs=True),
        table=table,
    )


def findings_csv(found: dict[str, Any]) -> str:
    """The pictures of a verdict as CSV."""
    return csv_of(findings_table(found))


def findings_table(found: dict[str, Any]) -> pd.DataFrame:
    """A row per picture and n."""
    return pd.DataFrame(found["pictures"])
