"""Every figure and table as one HTML file that needs nothing else, with all that is needed to repeat them."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from oms_core import catalog, exhibits
from oms_core.compute import Tick
from oms_core.errors import InputError
from oms_core.export import STYLE
from oms_core.people import beside_the_paper
from oms_core.run import Run
from oms_core.writing import unwritable, write_file

LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pandas", "scikit-learn", "plotly", "streamlit")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>OMS Explorer: report</title>
<style>{style}</style></head><body>
<h1>One More Step: every figure and table</h1>
<p>Measured on small models that were trained for this purpose, unless a model is named below. What the paper reports
stands in columns of its own and was measured by its authors on other, larger models. AUC and rates in per cent with
95 % intervals; larger scores mean: more likely a member.</p>
{body}</body></html>
"""


def write_report(folder: Path, run: Run, tick: Tick | None = None) -> Path:
    """Compute what is missing and write ``report.html``.

    Args:
        folder: made if it is not there.
        run: settings for all exhibits; its model, if it names one, is shown in all of them.

    Raises:
        InputError: the place cannot be written; or see `oms_core.exhibits`.
    """
    body = "\n".join(sections(run, tick))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error.strerror, "--out") from error
    path = folder / "report.html"
    write_file(path, PAGE.format(style=STYLE, body=body).encode(errors="replace"))
    return path


def sections(run: Run, tick: Tick | None) -> Iterator[str]:
    """Tables, figures, and how they were made."""
    for name, shown in exhibits.TABLES.items():
        number = f"Table {name}" if name.isdigit() else f"Beyond the paper: {name}"
        yield f"<h2>{number}. {html.escape(shown.title)}</h2>"
        yield excused(lambda name=name: as_html(beside_the_paper(name, exhibits.table(name, run, tick))))
    script = True
    for name, shown in exhibits.FIGURES.items():
        yield f"<h2>Figure {name}. {html.escape(shown.title)}</h2>"
        yield excused(lambda name=name, script=script: drawn(name, run, script, tick))
        script = False
    yield f"<h2>How this was made</h2><pre>{html.escape(json.dumps(made_with(run), indent=1))}</pre>"
    for name, card in catalog.built_in().items():
        card = {key: value for key, value in card.items() if key != "loss"}
        words = html.escape(json.dumps(card, indent=1))
        yield f"<details><summary>Card of {html.escape(name)}</summary><pre>{words}</pre></details>"


def excused(section: Callable[[], str]) -> str:
    """A section, or the sentence why the model has none."""
    try:
        return section()
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"


def as_html(rows: list[dict[str, Any]]) -> str:
    return pd.DataFrame(rows, dtype=object).fillna("").to_html(index=False, border=0)


def drawn(name: str, run: Run, script: bool, tick: Tick | None) -> str:
    """A figure with its sentence and table; the first brings the script that draws them all."""
    planned, chart = exhibits.figure(name, run, tick)
    of = f"{planned.model.name}, {len(planned.images)} pictures of {planned.images.name}"
    picture = chart.figure.to_html(full_html=False, include_plotlyjs=script)
    table = chart.table.to_html(index=False, float_format="%.4f", border=0)
    words = f"<p>On {html.escape(of)}. {html.escape(chart.alt)}</p>"
    return f"{words}{picture}<details><summary>Table</summary>{table}</details>"


def made_with(run: Run) -> dict[str, Any]:
    """The settings and the versions of everything that decides a number."""
    return {
        "settings": asdict(run),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
