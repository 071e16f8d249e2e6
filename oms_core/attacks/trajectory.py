"""All distances of one chain instead of one: which of them tell members apart is learned.

The iterates up to eps^n give every d(i, j) with j <= n for the price of d(0, n). A score is made of their
logarithms in one of two ways: by a logistic regression on pictures whose membership is known, or, where only
non-members are known, by how many of their standard deviations the distances lie below theirs on average.
For n = 1 there is one distance, and both rank as the published attack does (the regression the other way round
where its labels say so).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from oms_core import libraries
from oms_core.attacks.base import Learned, Search, Study, column, learned_column, pairs
from oms_core.attacks.naive import NA
from oms_core.attacks.pia import PIA
from oms_core.attacks.secmi import SECMI
from oms_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SHARE = 0.1  # of either group, labelled
FEWEST = 3  # of either group: two to learn from and one to judge
FLOOR = 1e-12  # of a distance before its logarithm; an ideal denoiser reaches zero


def features(rows: pd.DataFrame, p: int, n: int) -> np.ndarray:
    """log d(i, j) in the norm p for all i < j <= n, (N, n (n + 1) / 2); NaN where a distance is not finite."""
    distances = rows[[column(i, j, p) for i, j in pairs(n)]].to_numpy(float)
    return np.log(np.maximum(np.where(np.isfinite(distances), distances, np.nan), FLOOR))


def from_labels(base: Search, study: Study) -> pd.DataFrame:
    """Fit a logistic regression to a labelled share of the pictures and score the others with it.

    Args:
        base: the attack whose signal it is.
        study: what may be looked at.

    Returns:
        `image` and the score for each n, without the labelled pictures.

    Raises:
        InputError: there are too few members or non-members.
    """
    if min(study.member.sum(), (~study.member).sum()) < FEWEST:
        raise InputError(f"{base.name}-trajectory needs at least {FEWEST} members and {FEWEST} non-members.")
    known = study.labelled(SHARE)

    def score(n: int) -> np.ndarray:
        found = features(study.rows, base.p, n)
        return log_odds(found[known], study.member[known], found[~known])

    return scored(study.rows[~known], study.steps, score)


def log_odds(known: np.ndarray, member: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The log odds of membership of others (M, K), learned from known (N, K) and member (N,); NaN where one is."""
    libraries.load(*libraries.LEARNING)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    usable, whole = np.isfinite(known).all(axis=1), np.isfinite(others).all(axis=1)
    found = np.full(len(others), np.nan)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(known[usable], member[usable])
    found[whole] = model.decision_function(others[whole])
    return found


def from_nonmembers(base: Search, study: Study) -> pd.DataFrame:
    """Score pictures by how far the logarithms of their distances lie below those of known non-members.

    Args:
        base: the attack whose signal it is.
        study: what may be looked at; only the auxiliary pictures are learned from.

    Returns:
        `image` and the score for each n: the mean over all distances, in standard deviations of the auxiliary
        pictures. This is O'Brien's one-sided test (1984) against members that all distances show alike.
    """
    libraries.load(*libraries.LEARNING)
    from sklearn.preprocessing import StandardScaler

    def score(n: int) -> np.ndarray:
        usual = StandardScaler().fit(features(study.auxiliary, base.p, n))
        return -usual.transform(features(study.rows, base.p, n)).mean(axis=1)

    return scored(study.rows, study.steps, score)


def scored(rows: pd.DataFrame, steps: int, score: Callable[[int], np.ndarray]) -> pd.DataFrame:
    """`image` and a column per n."""
    return rows[["image"]].assign(**{learned_column("score", n): score(n) for n in range(1, steps + 1)})


def on_chain(base: Search, kind: str, title: str, fit: Callable[[Search, Study], pd.DataFrame], source: str) -> Learned:
    """An attack that learns from all distances of another's chain."""
    return Learned(
        name=f"{base.name}-{kind}",
        title=f"{base.title}, {title}",
        base=base,
        fit=partial(fit, base),
        auxiliary=fit is from_nonmembers,
        t=base.t,
        calls=base.calls,
        reach=base.reach,
        shown_as=base.name,
        source=f"{base.source}; {source}",
    )


def trajectory(base: Search) -> Learned:
    """The regression on the distances of an attack."""
    source = f"a logistic regression on {SHARE:.0%} labelled pictures"
    return on_chain(base, "trajectory", "regression on all distances", from_labels, source)


def calibrated(base: Search) -> Learned:
    """The distances of an attack beside those of known non-members."""
    return on_chain(base, "calibrated", "all distances against known non-members", from_nonmembers, "O'Brien (1984)")


NA_TRAJECTORY, PIA_TRAJECTORY, SECMI_TRAJECTORY = map(trajectory, (NA, PIA, SECMI))
NA_CALIBRATED, PIA_CALIBRATED = map(calibrated, (NA, PIA))
