"""Do two sets of pictures differ by their pixels alone, without any model? Then an attack may measure just that.

A model-free classifier runs beside every attack: benchmarks whose members and non-members differ in kind were taken
for evidence of memorisation (Das et al., 2024; Meeus et al., 2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from oms_core import cache, libraries
from oms_core.images import ImageSet
from oms_core.run import Plan

VERSION = 1  # raised when a change of the code changes a figure
MOST = 2_000  # pictures of a kind that are looked at
SIDE = 8  # of the thumbnail among the features
BANDS = 8  # of the spectrum
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the grey levels
FOLDS, PENALTY = 10, 30.0  # of the ridge regression
SHUFFLES = 499
ALARM = 0.01  # one alarm in so many for sets that are alike
FEWEST = 10  # pictures of a kind that a classifier needs
NEIGHBOUR = 5  # the one whose distance says how unusual a picture is
LEAST = 1e-6  # added before a logarithm


def features(pixels: np.ndarray) -> np.ndarray:
    """What can be seen in pictures without a model: a thumbnail, grey levels, colours, edges, and the spectrum.

    Args:
        pixels: (N, H, W, C) uint8, as a model takes them.

    Returns:
        (N, F).
    """
    grey = pixels.astype(np.float32).mean(axis=3) / 255
    flat = grey.reshape(len(grey), -1)
    colours = pixels.reshape(len(pixels), -1, pixels.shape[3]).mean(axis=1) / 255
    levels = [np.quantile(flat, LEVELS, axis=1).T, flat.mean(1), flat.std(1), (flat == 0).mean(1), (flat == 1).mean(1)]
    edges = [np.abs(np.diff(grey, order, axis=axis)).sum((1, 2)) / flat.shape[1] for order in (1, 2) for axis in (1, 2)]
    shades = [len(np.unique(picture)) / 256 for picture in pixels]
    return np.column_stack(
        [thumbnails(grey), *levels, colours, np.log(LEAST + np.array(edges).T), spectrum(grey), shades]
    )


def thumbnails(grey: np.ndarray) -> np.ndarray:
    """Means over the cells of a grid of at most `SIDE` x `SIDE`, (N, cells)."""
    for axis in (1, 2):
        parts = np.array_split(grey, min(SIDE, grey.shape[axis]), axis=axis)
        grey = np.concatenate([part.mean(axis=axis, keepdims=True) for part in parts], axis=axis)
    return grey.reshape(len(grey), -1)


def spectrum(grey: np.ndarray) -> np.ndarray:
    """The logarithm of the mean power in rings of equal width around frequency 0, (N, rings)."""
    power = np.abs(np.fft.rfft2(grey)) ** 2
    frequency = np.hypot(np.fft.fftfreq(grey.shape[1])[:, None], np.fft.rfftfreq(grey.shape[2])[None])
    ring = np.minimum(BANDS - 1, frequency / np.hypot(0.5, 0.5) * BANDS).astype(int)
    return np.column_stack([np.log(LEAST + power[:, ring == band].mean(axis=1)) for band in np.unique(ring)])


def compare(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How well a classifier tells two sets apart that never asks a model, see `told_apart`.

    Args:
        first, second: pictures of either set as a model takes them, (N, H, W, C) uint8.
        seed: of the folds and the shuffling.

    Returns:
        `pictures` (of the smaller set), `auc`, `chance_lo` and `chance_hi` (the central 95 % of shuffled labels), `p`,
        and `alarm`. All but the first are None where a set has fewer than `FEWEST` pictures.
    """
    fewest = min(len(first), len(second))
    if fewest < FEWEST:
        return {"pictures": fewest, "auc": None, "chance_lo": None, "chance_hi": None, "p": None, "alarm": None}
    return {"pictures": fewest} | told_apart(features(first), features(second), seed)


def told_apart(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """A ridge regression on features, cross-validated, beside the same regression on shuffled labels.

    For sets that are drawn alike the alarm goes off with a probability of at most `ALARM`, whatever the features.

    Args:
        first, second: features of either set, (N, F).
        seed: of the folds and the shuffling.
    """
    libraries.load(*libraries.STATISTICS, *libraries.LEARNING)
    from scipy.stats import rankdata
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.preprocessing import scale

    label = np.repeat([1.0, 0.0], [len(first), len(second)])
    rng = np.random.default_rng(seed)
    labels = np.column_stack([label, *(rng.permutation(label) for _ in range(SHUFFLES))])
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(Ridge(PENALTY), scale(np.concatenate([first, second])), labels, cv=folds)
    ranks = rankdata(predicted, axis=0)
    auc = ((ranks * labels).sum(axis=0) / len(first) - (len(first) + 1) / 2) / len(second)
    low, high = np.quantile(auc[1:], [0.025, 0.975])
    p = float(1 + (auc[1:] >= auc[0]).sum()) / (1 + SHUFFLES)
    return {"auc": float(auc[0]), "chance_lo": float(low), "chance_hi": float(high), "p": p, "alarm": p <= ALARM}


def unusual(pixels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How unlike the reference each picture is, as a conformal p-value; small for what does not belong there.

    The measure is the distance of `features` from the `NEIGHBOUR`-th nearest picture of the reference.

    Args:
        pixels: (M, H, W, C) uint8.
        reference: (N, H, W, C) uint8, N > `NEIGHBOUR`.

    Returns:
        (M,).
    """
    libraries.load(*libraries.STATISTICS, *libraries.LEARNING)
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    known = features(reference)
    scaler = StandardScaler().fit(known)
    near = NearestNeighbors(n_neighbors=NEIGHBOUR).fit(scaler.transform(known))
    usual = np.sort(near.kneighbors()[0][:, -1])
    distance = near.kneighbors(scaler.transform(features(pixels)))[0][:, -1]
    return (1 + len(usual) - np.searchsorted(usual, distance)) / (1 + len(usual))


def of_roles(planned: Plan) -> dict[str, Any] | None:
    """`compare` of the members and the non-members of a plan's pictures; counted once and kept.

    Returns:
        None where one of the two groups is missing.
    """
    groups = [planned.images.with_role(role) for role in ("member", "nonmember")]
    if not all(map(len, groups)):
        return None
    profile = planned.model.profile
    content = {
        "shift": VERSION,
        "members": groups[0].digest,
        "non-members": groups[1].digest,
        "profile": [*profile.size, profile.channels],
    }

    def count() -> pd.DataFrame:
        return pd.DataFrame([compare(*(some(group).pixels(profile) for group in groups))])

    return cache.counted(content, count).astype(object).replace({np.nan: None}).iloc[0].to_dict()


def some(images: ImageSet) -> ImageSet:
    """At most `MOST` pictures of a set, drawn evenly; the draw is always the same."""
    table = images.table
    return replace(images, table=table.sample(MOST, random_state=0)) if len(table) > MOST else images
