"""Pictures that crash or occupy the decoder, which no real file here does: it is made to, in every new process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from oms_core.assemble import png

MARK, ENDLESS = b"POISON", b"ENDLESS"  # after the end of a PNG, where a decoder does not look
CRASH = f"""
import ctypes
import oms_core.survey as survey

original, survey.LONGEST = survey.decode, 0.5

def decode(data):
    if data.endswith({MARK!r}):
        ctypes.string_at(0)
    while data.endswith({ENDLESS!r}):
        pass
    return original(data)

survey.decode = decode
"""


def crashing_on(folder: Path) -> dict[str, str]:
    """What the environment needs so that every new process crashes on such a picture."""
    started = folder / "started"
    started.mkdir()
    (started / "sitecustomize.py").write_text(CRASH)
    return {"PYTHONPATH": f"{started}:{Path(__file__).resolve().parent.parent}"}


def named(number: int) -> str:
    return f"{'member' if number % 2 else 'nonmember'}/{number:03d}.png"


def pictures_with(folder: Path, count: int, poisoned: list[int], mark: bytes = MARK) -> Path:
    """A folder of different pictures, half of them members, some of them poisoned."""
    rng = np.random.default_rng(count)
    for number in range(count):
        path = folder / named(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = png(rng.integers(0, 256, (8, 8), np.uint8))
        path.write_bytes(data + mark if number in poisoned else data)
    return folder
