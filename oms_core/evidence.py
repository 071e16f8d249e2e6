"""What can be said of pictures whose membership is unknown, from known non-members alone.

Scores point one way everywhere: larger = more likely a member. Rates are fractions from 0 to 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from oms_core import libraries
from oms_core.errors import InputError

SET_LEVEL = 0.01  # false-alarm rate at which a set is decided
RESAMPLINGS, BOOTSTRAPS = 9_999, 1_000  # of the permutation test, and of the interval of the effect
AT_ONCE = 500  # of them in memory
POWER_DRAWS, ENOUGH = 4_000, 0.8  # sets drawn for each size; the power that is called enough
SIZES = (2, 3, 5, 10, 20, 30, 50, 75, 100, 150, 200)


def p_values(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Conformal p-values of pictures against known non-members, (1 + #{reference >= score}) / (1 + N).

    A picture that is drawn like the reference gets a p-value of at most a with a probability of at most a
    (Vovk, Gammerman & Shafer, 2005; Bates et al., 2023).

    Args:
        scores: (M,).
        reference: scores of known non-members, (N,).
    """
    at_least = len(reference) - np.searchsorted(np.sort(reference), scores, side="left")
    return (1 + at_least) / (1 + len(reference))


def needed_reference(fpr: float) -> int:
    """How many known non-members it takes for a p-value to reach a false-alarm rate at all."""
    return math.ceil(round(1 / fpr, 9)) - 1


def judged(scores: np.ndarray, reference: np.ndarray, fpr: float) -> pd.DataFrame:
    """Each picture against known non-members.

    Args:
        scores: (M,).
        reference: scores of known non-members, (N,).
        fpr: the false-alarm rate of a single picture.

    Returns:
        A row per picture: `score`, `as_high` (how many of the reference score at least as high), `p`, `flagged`
        (p <= fpr), `q` (p adjusted for the number of pictures by Benjamini & Hochberg, 1995) and `discovered`
        (q <= fpr: at most this share of those is expected to be false).
    """
    libraries.load(*libraries.STATISTICS)
    from scipy.stats import false_discovery_control

    p = p_values(scores, reference)
    q = false_discovery_control(p)
    as_high = np.rint(p * (1 + len(reference)) - 1).astype(int)
    return pd.DataFrame(
        {"score": scores, "as_high": as_high, "p": p, "flagged": p <= fpr, "q": q, "discovered": q <= fpr}
    )


def compare_sets(scores: np.ndarray, reference: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Is a set as a whole more member-like than known non-members? (Dataset inference, Maini et al., 2021.)

    Args:
        scores: of the set, (M,), at least two.
        reference: of known non-members of the same kind, (N,), at least two.
        seed: of the permutations and of the bootstrap.

    Returns:
        `pictures`, `welch` and `permutation` (one-sided p-values), `effect` with `effect_lo` and `effect_hi` (the
        difference of the means in standard deviations of the reference, 95 % bootstrap interval), and `decided`:
        whether the permutation test is at most `SET_LEVEL`.

    Raises:
        InputError: fewer than two pictures on a side.
    """
    libraries.load(*libraries.STATISTICS)
    from scipy.stats import ttest_ind

    if min(len(scores), len(reference)) < 2:
        raise InputError("A set can be compared when it has two pictures or more; add pictures.")
    low, high = effect_interval(scores, reference, seed)
    exact = permutation(scores, reference, seed)
    return {
        "pictures": len(scores),
        "welch": float(ttest_ind(scores, reference, equal_var=False, alternative="greater").pvalue),
        "permutation": exact,
        "effect": float(effect(scores, reference)),
        "effect_lo": low,
        "effect_hi": high,
        "decided": exact <= SET_LEVEL,
    }


def permutation(scores: np.ndarray, reference: np.ndarray, seed: int = 0, resamplings: int = RESAMPLINGS) -> float:
    """One-sided p-value of the difference of the means by shuffling who belongs to the set.

    For sets that are drawn alike it is at most a with a probability of at most a, whatever the shape of the scores.
    Scores are skewed, and Welch's t-test is then too bold.
    """
    libraries.load(*libraries.STATISTICS)
    from scipy.stats import permutation_test

    found = permutation_test(
        (scores, reference), gap, alternative="greater", n_resamples=resamplings, batch=AT_ONCE, vectorized=True,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def effect_interval(scores: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The central 95 % of the effect over resampled pictures."""
    libraries.load(*libraries.STATISTICS)
    from scipy.stats import bootstrap

    found = bootstrap(
        (scores, reference), effect, n_resamples=BOOTSTRAPS, method="percentile", batch=AT_ONCE, vectorized=True,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def gap(scores: np.ndarray, reference: np.ndarray, axis: int = -1) -> np.ndarray:
    """The difference of the means."""
    return scores.mean(axis=axis) - reference.mean(axis=axis)


def effect(scores: np.ndarray, reference: np.ndarray, axis: int = -1) -> np.ndarray:
    """The difference of the means in standard deviations of the reference; NaN where that has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return gap(scores, reference, axis) / reference.std(axis=axis, ddof=1)


def power(members: np.ndarray, reference: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """How often sets of known members of each size have a mean that sets of known non-members hardly ever reach.

    Args:
        members: scores of known members, (K,).
        reference: scores of known non-members, (N,).
        seed: of the drawing.

    Returns:
        `pictures` and `power`, a row per size: the share of the sets of members whose mean score exceeds that of all
        but `SET_LEVEL` of the sets of non-members.
    """
    rng, rows = np.random.default_rng(seed), []
    for size in SIZES:
        own, others = (rng.choice(group, (POWER_DRAWS, size)).mean(axis=1) for group in (members, reference))
        rows.append({"pictures": size, "power": float((own > np.quantile(others, 1 - SET_LEVEL)).mean())})
    return pd.DataFrame(rows)


def enough(curve: pd.DataFrame) -> int | None:
    """The smallest size of a power curve from which on sets are decided often enough; None if none is."""
    weak = curve.index[curve.power < ENOUGH]
    after = curve.pictures[curve.index > (weak.max() if len(weak) else -1)]
    return int(after.iloc[0]) if len(after) else None
