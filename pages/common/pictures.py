"""Pictures of a set for people: enlarged, found, and what a model sees in them."""

import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image

from oms_core import figures
from oms_core.decode import decode
from oms_core.errors import InputError
from oms_core.images import open_images
from oms_core.run import Trace

READY = 8  # pictures of each kind whose search is shipped
BLUE, ORANGE = np.array([0, 114, 178]), np.array([213, 94, 0])


@st.cache_data(max_entries=1024, show_spinner=False)  # at most 50 MB of pixels
def thumbnail(images: str, row: int, digest: str) -> np.ndarray:
    """A small copy of a picture of a set, see `small`; `digest` keys the cache."""
    return small(decode(open_images(images).read(row))[0])


def small(picture: Image.Image, scale: int = 128) -> np.ndarray:
    """A copy with no side above `scale`: a larger picture shrunk, of a smaller one its pixels repeated.

    Returns:
        (H, W) or (H, W, 3) uint8.
    """
    times = scale / max(picture.size)
    if times < 1:
        sides = [max(1, round(side * times)) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return enlarge(np.asarray(picture), scale)


def enlarge(pixels: np.ndarray, scale: int = 128) -> np.ndarray:
    """Repeat pixels until the longer side is about `scale` long."""
    times = max(1, scale // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def find(table: pd.DataFrame, beginning: str) -> pd.Series:
    """The picture of a set whose SHA-256 begins so; its name is its row in the set.

    Raises:
        InputError: there is none.
    """
    found = table[table.image.str.startswith(beginning)]
    if found.empty:
        raise InputError(f"The set has no picture {beginning!r}; choose another one, or another image set.")
    return found.iloc[0]


def kind(member: bool) -> str:
    """What a picture is, in a word."""
    return "member" if member else "non-member"


def ordinary(images: pd.Series, cohort: pd.DataFrame, member: bool) -> str:
    """The picture whose second residual is closest to the median of its kind; the first if that is not known."""
    second = cohort[(cohort.n == 2) & (cohort.member == member)].set_index("image").residual
    if second.empty:
        return images.iloc[0]
    return (second.loc[images] - second.median()).abs().idxmin()


def heat(eps: np.ndarray) -> np.ndarray:
    """Noise of (H, W, C) as colours: blue below zero, orange above, white at zero, full at three."""
    strength = np.clip(eps.mean(axis=2, keepdims=True) / 3, -1, 1)
    ink = np.where(strength < 0, BLUE, ORANGE)
    return (255 - np.abs(strength) * (255 - ink)).astype(np.uint8)


def strip(trace: Trace, n: int, name: str, picture: np.ndarray) -> None:
    """What the model sees and says at step n."""
    x_t, x_0 = trace.shown(n)
    shown = [
        (picture, "picture x₀"),
        (x_t, "x₀ + noise"),
        (heat(trace.eps[n].transpose(1, 2, 0)), f"noise ε{str(n).translate(figures.SUPERSCRIPT)}"),
        (x_0, "model's x₀"),
    ]
    for column, (pixels, caption) in zip(st.columns(4), shown, strict=True):
        side = enlarge(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels, 160)
        column.image(side, caption=caption, width="stretch", alt=f"{name}: {caption}")
