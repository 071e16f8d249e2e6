"""Text from outside (names of files, labels, reasons) as text alone, wherever it is shown."""

from __future__ import annotations

import logging
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

UNSHOWN = ("C", "Zl", "Zp")  # Unicode categories: control and direction characters, ends of lines
FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet would run


def visible(text: str) -> str:
    """A text on one line, with a replacement character for each that would not show or would change the others."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c).startswith(UNSHOWN) else c for c in text)


class Record(logging.LogRecord):
    """A warning that holds nothing but text: on one line if it is ours."""

    def getMessage(self) -> str:
        text = super().getMessage()
        return visible(text) if self.name.startswith("oms_core") else "\n".join(map(visible, text.split("\n")))


def csv_of(table: pd.DataFrame) -> str:
    """A table as CSV, a row on each line; texts that a spreadsheet would take for formulas begin with an apostrophe."""
    texts = table.select_dtypes(["object", "string"])
    return table.assign(**texts.map(harmless)).rename(columns=harmless).to_csv(index=False)


def harmless(cell: Any) -> Any:
    """A cell that no spreadsheet runs, and that ends no row."""
    text = visible(cell) if isinstance(cell, str) else ""
    return f"'{text}" if text.startswith(FORMULA) else text or cell
