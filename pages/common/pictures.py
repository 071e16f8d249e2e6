"""Pictures of a set for people: enlarged, and which ones to begin with."""

import numpy as np
import pandas as pd
import streamlit as st

from oms_core.decode import decode
from oms_core.images import open_images

READY = 8  # pictures of each kind whose search is shipped


@st.cache_data(max_entries=4096, show_spinner=False)
def thumbnail(images: str, row: int, digest: str, scale: int = 128) -> np.ndarray:
    """A picture of a set, enlarged without smoothing, (H, W) or (H, W, 3) uint8; `digest` keys the cache."""
    picture, _ = decode(open_images(images).read(row))
    return enlarge(np.asarray(picture), scale)


def enlarge(pixels: np.ndarray, scale: int = 128) -> np.ndarray:
    """Repeat pixels until a side is about `scale` long."""
    times = max(1, scale // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def ordinary(images: pd.Series, cohort: pd.DataFrame, member: bool) -> str:
    """The picture whose second residual is closest to the median of its kind; the first if that is not known."""
    second = cohort[(cohort.n == 2) & (cohort.member == member)].set_index("image").residual
    if second.empty:
        return images.iloc[0]
    return (second.loc[images] - second.median()).abs().idxmin()
