"""Text that comes from outside (names of files, labels, captions, addresses, messages about them) as Markdown."""

from __future__ import annotations

import re

from oms_core.plain_text import visible

MARKUP = re.compile(r"([\\`*_\[\]<>&$~|])")
BEGINS = re.compile(r"^(\d*)([-+=#.)])")  # a list, a rule or a heading, at the beginning of a line
LINKED = re.compile(r"(?<=:)(?=\S)|(?<=www)(?=\.)|(?<=@)(?=[^\s@]*\.\w)", re.IGNORECASE)
JOINER = "\N{WORD JOINER}"  # has no width; a browser makes no link, icon or address of what it stands in


def literal(text: str) -> str:
    """Markdown that shows a text as it is, on one line: no link, image, icon, formula or list comes of it.

    Control and direction characters are replaced, see `oms_core.plain_text.visible`.

    Backslashes alone are not enough: Streamlit looks for addresses and icons in the text after it has taken them away.
    """
    line = visible(" ".join(str(text).split()))
    return BEGINS.sub(r"\1\\\2", MARKUP.sub(r"\\\1", LINKED.sub(JOINER, line)))
