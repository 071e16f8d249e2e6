"""Text from outside (names of files, labels, reasons) as text alone, wherever it is shown."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

UNSHOWN = ("C", "Zl", "Zp")  # Unicode categories: control and direction characters, ends of lines
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would run


def visible(text: str) -> str:
    """A text on one line, with a replacement character for each that would not show or would change the others."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c).startswith(UNSHOWN) else c for c in text)


def csv_of(table: pd.DataFrame) -> str:
    """A table as CSV; texts that a spreadsheet would take for formulas begin with an apostrophe."""
    return table.rename(columns=harmless).map(harmless).to_csv(index=False)


def harmless(cell: Any) -> Any:
    """A cell that no spreadsheet runs."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
