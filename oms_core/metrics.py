"""What an attack achieves: exact ROC, AUC, TPR at a low FPR, ASR, each with an interval over pictures.

Scores point one way everywhere: larger = more likely a member. Rates are fractions from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from oms_core.errors import InputError

FPR_BOUNDS = {"tpr5": 0.05, "tpr1": 0.01, "tpr01": 0.001}
COLUMNS = ["image", "member", "attack", "t", "n", "score"]
DRAWS = 1000  # of the bootstrap
ELEMENTS = 2_000_000  # draws x pictures held at once
LEVEL = 0.95
FEW = 10  # pictures of a kind below which a rate says little
ASR_DRAWS, ASR_SHARE = 10, 0.1  # App. E, "The threshold tau"


def check_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The one validator of a score table: its columns in order, rows with finite scores only.

    Raises:
        InputError: a column is missing.
    """
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise InputError(f"The score table has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}.")
    return table[np.isfinite(table.score)]


@dataclass(frozen=True)
class Roc:
    """An exact ROC curve: every threshold of the sorted scores.

    Attributes:
        fpr, tpr: rates, both rising, (K,).
        thresholds: falling; a picture is called a member if its score is at least this.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray

    def tpr_at(self, bound: float) -> float:
        """The largest TPR whose FPR does not exceed the bound."""
        return float(self.tpr[self.fpr <= bound].max())

    def threshold_at(self, bound: float) -> float:
        """The lowest threshold whose FPR does not exceed the bound."""
        return float(self.thresholds[self.fpr <= bound].min())


def roc(scores: np.ndarray, member: np.ndarray) -> Roc:
    """The ROC curve of scores (N,) against membership (N,) bool.

    Raises:
        InputError: one of the two groups is empty.
    """
    need_both(member)
    fpr, tpr = cumulative_rates(scores, member, np.ones((1, len(scores))))
    return Roc(fpr[0], tpr[0], np.append(np.inf, np.unique(scores)[::-1]))


def cumulative_rates(scores: np.ndarray, member: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and TPR at every distinct threshold, from the highest down, under each row of weights.

    Equal to scikit-learn's `roc_curve` with `sample_weight`, for many weightings at once and without its import.

    Args:
        scores: (N,).
        member: (N,) bool.
        weights: how often each picture counts, (draws, N).

    Returns:
        FPR and TPR, both (draws, distinct scores + 1), beginning at 0.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights = weights[:, order]
    fpr, tpr = (
        np.pad(np.cumsum(weights * group[order], axis=1)[:, last_of_ties] / group.sum(), ((0, 0), (1, 0)))
        for group in (~member, member)
    )
    return fpr, tpr


def need_both(member: np.ndarray) -> None:
    """An ROC needs members and non-members."""
    for group, count in (("members", member.sum()), ("non-members", (~member).sum())):
        if not count:
            raise InputError(f"The set holds no {group}; AUC and error rates need both groups.")


def auc(scores: np.ndarray, member: np.ndarray) -> float:
    """Area under the ROC curve by the trapezoid rule, which counts ties as half."""
    curve = roc(scores, member)
    return float(np.trapezoid(curve.tpr, curve.fpr))


def asr(scores: np.ndarray, member: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Attack success rate as in App. E: the best threshold of a random 10 %, applied to the other 90 %.

    Success is the mean of the rates of right answers among members and among non-members, which is the
    accuracy where the groups are equally large, as in the paper. A threshold lies midway between two scores.

    Returns:
        Mean and standard deviation over ten draws; NaN where a group is a single picture and nothing is left of it.
    """
    if min(member.sum(), (~member).sum()) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(ASR_DRAWS):
        chosen = np.zeros(len(scores), bool)
        for group in (np.flatnonzero(member), np.flatnonzero(~member)):
            chosen[rng.choice(group, max(1, round(ASR_SHARE * len(group))), replace=False)] = True
        curve = roc(scores[chosen], member[chosen])
        best = np.argmax(curve.tpr - curve.fpr)
        called = scores >= curve.thresholds[best : best + 2].mean()
        right = (called == member)[~chosen]
        rates.append((right[member[~chosen]].mean() + right[~member[~chosen]].mean()) / 2)
    return float(np.mean(rates)), float(np.std(rates, ddof=1))


def resampled(scores: dict[int, np.ndarray], member: np.ndarray, seed: int = 0) -> dict[int, dict[str, np.ndarray]]:
    """Bootstrap over pictures, members and non-members apart; every column sees the same resampled pictures.

    Args:
        scores: columns of (N,), by n.
        member: (N,) bool.
        seed: of the resampling.

    Returns:
        For each column `auc` and the TPR at each of `FPR_BOUNDS`, arrays of (draws,).
    """
    rng = np.random.default_rng(seed)
    at_once = max(1, ELEMENTS // len(member))
    figures: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in scores}
    for start in range(0, DRAWS, at_once):
        weights = draw(rng, member, min(at_once, DRAWS - start))
        for n, column in scores.items():
            figures[n].append(weighted_figures(column, member, weights))
    return {n: {name: np.concatenate([f[name] for f in parts]) for name in parts[0]} for n, parts in figures.items()}


def draw(rng: np.random.Generator, member: np.ndarray, draws: int) -> np.ndarray:
    """How often each picture is taken in each resampling, (draws, N)."""
    weights = np.zeros((draws, len(member)), np.float32)
    for group in (np.flatnonzero(member), np.flatnonzero(~member)):
        weights[:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), draws)
    return weights


def weighted_figures(scores: np.ndarray, member: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUC and TPRs under each row of weights (draws, N)."""
    fpr, tpr = cumulative_rates(scores, member, weights)
    at = {name: np.where(fpr <= bound, tpr, 0).max(axis=1) for name, bound in FPR_BOUNDS.items()}
    return {"auc": np.trapezoid(tpr, fpr, axis=1)} | at


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def evaluate(
    table: pd.DataFrame, calls: dict[tuple[str, int], int], rivals: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """A row of figures for every attack and n of a score table.

    Args:
        table: a score table.
        calls: model calls per picture, by attack and n.
        rivals: by attack, the one that spends as many calls at n without One More Step; rivals get no rows.

    Returns:
        Rows with `attack, t, n, calls, auc, auc_lo, auc_hi, asr, asr_sd`, `tpr5, tpr1, tpr01` with their
        intervals (None where there are fewer than 1 / FPR non-members), `gain, gain_lo, gain_hi`, the AUC
        less that of n = 1 on the same resampled pictures (None for n = 1), `rival_auc` and `lead, lead_lo, lead_hi`,
        the AUC less the rival's at equal calls (None without a rival), and a `note` where the figures say little.

    Raises:
        InputError: members or non-members are missing, or an attack gives no finite score.
    """
    check_scores(table)
    found = {key: Resampled.of(group, *key) for key, group in table.groupby(["attack", "t"], sort=False)}
    by_name = {attack: one for (attack, _), one in found.items()}
    named = set(rivals.values())
    rows = []
    for (attack, t), one in found.items():
        if attack in named:
            continue
        for n in one.scores:
            row = {"attack": attack, "t": int(t), "n": n, "calls": calls[attack, n]}
            row |= rates(one.scores[n], one.member, one.draws[n])
            row |= compared("gain", one, n, one if n > 1 else None, 1)
            rival = by_name.get(rivals.get(attack, ""))
            row |= {"rival_auc": auc(rival.scores[n], rival.member) if rival and n in rival.scores else None}
            row |= compared("lead", one, n, rival if n > 1 else None, n)
            rows.append(row | {"note": note(one.scores[n], one.member, one.left_out)})
    return rows


@dataclass(frozen=True)
class Resampled:
    """The scores of one attack, and what they give on resampled pictures.

    Attributes:
        images: the pictures, (N,).
        member: which of them are members, (N,) bool.
        scores: by n, each (N,).
        draws: by n, see `resampled`.
        left_out: pictures without a finite score.
    """

    images: np.ndarray
    member: np.ndarray
    scores: dict[int, np.ndarray]
    draws: dict[int, dict[str, np.ndarray]]
    left_out: int

    @classmethod
    def of(cls, group: pd.DataFrame, attack: str, t: int) -> Resampled:
        """From the rows of one attack in a score table."""
        wide = check_scores(group).pivot(index="image", columns="n", values="score").dropna()
        if wide.empty:
            raise InputError(f"{attack} at t = {t} gives no picture a finite score; try another precision.")
        member = group.drop_duplicates("image").set_index("image").member.loc[wide.index].to_numpy()
        need_both(member)
        scores = {int(n): wide[n].to_numpy() for n in wide}
        left_out = group.image.nunique() - len(wide)
        return cls(wide.index.to_numpy(), member, scores, resampled(scores, member), left_out)


def compared(name: str, one: Resampled, n: int, other: Resampled | None, m: int) -> dict[str, float | None]:
    """The AUC at n less another's at m, on the same resampled pictures; None where there is nothing to compare."""
    if other is None or m not in other.scores or not np.array_equal(one.images, other.images):
        return {name: None, f"{name}_lo": None, f"{name}_hi": None}
    low, high = interval(one.draws[n]["auc"] - other.draws[m]["auc"])
    difference = auc(one.scores[n], one.member) - auc(other.scores[m], other.member)
    return {name: difference, f"{name}_lo": low, f"{name}_hi": high}


def note(scores: np.ndarray, member: np.ndarray, left_out: int = 0) -> str:
    """What a reader must know before believing a row."""
    fewest = min(member.sum(), (~member).sum())
    facts = {
        "all scores are equal": np.ptp(scores) == 0,
        f"only {fewest} {'picture' if fewest == 1 else 'pictures'} of a kind: too few": fewest < FEW,
        f"pictures left out for want of a finite score: {left_out}": left_out > 0,
    }
    return "; ".join(fact for fact, holds in facts.items() if holds)


def rates(scores: np.ndarray, member: np.ndarray, draws: dict[str, np.ndarray]) -> dict[str, float | None]:
    """AUC, ASR and the TPRs of one column of scores, with intervals."""
    curve = roc(scores, member)
    mean, spread = asr(scores, member)
    row = {"auc": auc(scores, member), "asr": mean, "asr_sd": spread}
    row |= {name: curve.tpr_at(bound) for name, bound in FPR_BOUNDS.items()}
    for name in ("auc", *FPR_BOUNDS):
        row[f"{name}_lo"], row[f"{name}_hi"] = interval(draws[name])
    for name, bound in FPR_BOUNDS.items():
        if not measurable(bound, member):
            row |= {name: None, f"{name}_lo": None, f"{name}_hi": None}
    return row


def measurable(bound: float, member: np.ndarray) -> bool:
    """Whether there are enough non-members, 1 / FPR, to see so low a rate."""
    return (~member).sum() >= round(1 / bound)


def corrected(scores: pd.DataFrame, bound: float) -> pd.DataFrame:
    """Which pictures One More Step puts right and which it newly gets wrong, both at the same false-alarm rate.

    Args:
        scores: rows of one attack with n = 1 and n = 2.
        bound: the false-alarm rate that sets a threshold for each n.

    Returns:
        A row per picture: `image`, `member`, `before` and `after` (right or wrong, bool), Figure F.1b.
    """
    wide = scores.pivot(index=["image", "member"], columns="n", values="score").dropna().reset_index()
    member = wide.member.to_numpy()
    right = {}
    for n in (1, 2):
        values = wide[n].to_numpy()
        right[n] = (values >= roc(values, member).threshold_at(bound)) == member
    return pd.DataFrame({"image": wide.image, "member": member, "before": right[1], "after": right[2]})
