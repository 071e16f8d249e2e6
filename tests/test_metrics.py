"""Rates and intervals: exact against scikit-learn, closed forms of the binormal model, and counting by hand."""

from __future__ import annotations

import itertools
import math
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, multivariate_normal, norm
from sklearn.metrics import roc_auc_score, roc_curve

from oms_core import metrics
from oms_core.errors import InputError
from oms_core.metrics import FPR_BOUNDS, asr, auc, check_scores, corrected, evaluate, resampled, roc, weighted_figures

BOUNDS = [0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.999, 1]
KINDS = ("continuous", "few values", "two values", "constant", "float32")


def binormal(seed: int, members: int, nonmembers: int, d: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members from N(d, 1) and of non-members from N(0, 1), shuffled, and who is a member."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(members + nonmembers) < members)
    return rng.normal(size=len(member)) + d * member, member


def scores_of(kind: str, seed: int, members: int = 40, nonmembers: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a kind, and who is a member."""
    scores, member = binormal(seed, members, nonmembers)
    change = {
        "continuous": lambda s: s,
        "few values": np.round,
        "two values": lambda s: np.sign(s - 0.5),
        "constant": np.zeros_like,
        "float32": lambda s: s.astype(np.float32),
    }
    return change[kind](scores), member


def by_counting(scores: np.ndarray, member: np.ndarray, weights: np.ndarray | None = None) -> list[tuple[float, float]]:
    """(FPR, TPR) when everything from a score upwards is called a member, for each score, and for nothing called."""
    weights = np.ones(len(scores)) if weights is None else weights
    rates = [(0.0, 0.0)]
    for threshold in np.unique(scores):
        called = scores >= threshold
        rates.append(tuple(weights[called & group].sum() / weights[group].sum() for group in (~member, member)))
    return rates


def best_under(rates: list[tuple[float, float]], bound: float) -> float:
    return max(tpr for fpr, tpr in rates if fpr <= bound)


def table(**columns: object) -> pd.DataFrame:
    """A score table of one attack with n = 1, 2, ... from `scores_1, scores_2, ...` and `member`."""
    member = np.asarray(columns.pop("member"))
    frames = [
        pd.DataFrame({"image": [f"{k:05d}" for k in range(len(member))], "member": member, "score": scores}).assign(
            attack="NA", t=100, n=int(name.removeprefix("scores_"))
        )
        for name, scores in columns.items()
    ]
    return pd.concat(frames, ignore_index=True)


CALLS = {("NA", n): n for n in range(1, 5)}


# The exact curve


@pytest.mark.parametrize("kind", KINDS)
def test_the_tpr_at_a_bound_is_the_largest_whose_fpr_does_not_exceed_it(kind: str) -> None:
    for seed in range(10):
        scores, member = scores_of(kind, seed)
        rates, curve = by_counting(scores, member), roc(scores, member)
        for bound in BOUNDS:
            assert curve.tpr_at(bound) == best_under(rates, bound)


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_that_of_scikit_learn(kind: str) -> None:
    for seed, (members, nonmembers) in enumerate([(40, 60), (60, 40), (1, 100), (100, 1)]):
        scores, member = scores_of(kind, seed, members, nonmembers)
        curve = roc(scores, member)
        expected = roc_curve(member, scores, drop_intermediate=False)
        for found, known in zip((curve.fpr, curve.tpr, curve.thresholds), expected, strict=True):
            assert np.array_equal(found, known)
        assert auc(scores, member) == pytest.approx(roc_auc_score(member, scores), abs=1e-12)


def test_a_bound_that_is_met_exactly_counts_as_kept() -> None:
    for bound in FPR_BOUNDS.values():
        nonmembers = round(1 / bound)
        scores = np.array([3.0, 2.0, 1.0] + [0.0] * (nonmembers - 1))
        member = np.array([True, False, True] + [False] * (nonmembers - 1))
        assert roc(scores, member).tpr_at(bound) == 1  # one of 1 / bound non-members stands above the last member
        assert roc(scores[:-1], member[:-1]).tpr_at(bound) == 0.5  # one of fewer is beyond the bound
        at = weighted_figures(scores, member, np.ones((1, len(scores)), np.float32))
        assert [at[name][0] for name, other in FPR_BOUNDS.items() if other == bound] == [1]


def test_the_nearest_fpr_is_never_taken_where_it_exceeds_the_bound() -> None:
    scores = np.array([5.0, 4.0, 3.0, *np.zeros(89)])  # 2 of 91 non-members, 2.2 %, stand above the last member
    member = np.array([True, False, True, *[False] * 89])
    scores[3], member[3] = 3.5, False
    curve = roc(scores, member)
    assert curve.fpr[np.argmin(abs(curve.fpr - 0.02))] > 0.02
    assert curve.tpr_at(0.02) == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_at_a_bound_gives_exactly_the_tpr_at_that_bound(kind: str) -> None:
    for seed in range(10):
        scores, member = scores_of(kind, seed)
        curve = roc(scores, member)
        for bound in BOUNDS:
            called = scores >= curve.threshold_at(bound)
            assert called[member].mean() == curve.tpr_at(bound)
            assert called[~member].mean() <= bound
            lower = scores[scores < curve.threshold_at(bound)]
            if len(lower):
                assert (scores >= lower.max())[~member].mean() > bound  # no lower threshold would do


def test_heavy_tails_do_not_hide_the_tpr_at_low_fpr_as_a_grid_of_thresholds_does() -> None:
    scores, member = binormal(0, 1000, 1000, d=1.3)
    scores[np.flatnonzero(~member)[0]] = -1e6  # one picture that the model does not understand at all
    grid = np.linspace(scores.min(), scores.max(), 2000)
    on_grid = [((scores >= t)[~member].mean(), (scores >= t)[member].mean()) for t in grid[1:]]
    assert best_under([(0.0, 0.0), *on_grid], 0.01) <= 0.001
    exact = roc(scores, member).tpr_at(0.01)
    assert exact == best_under(by_counting(scores, member), 0.01)
    assert exact == pytest.approx(norm.sf(norm.isf(0.01) - 1.3), abs=0.06)  # binormal: Phi(d - z), about 0.15


def test_the_auc_of_two_normal_groups_is_the_closed_form() -> None:
    for d in (0.0, 0.5, 1.0, 2.0):
        scores, member = binormal(1, 20_000, 20_000, d)
        assert auc(scores, member) == pytest.approx(norm.cdf(d / math.sqrt(2)), abs=0.012)


def test_the_auc_is_the_chance_that_a_member_scores_higher_with_ties_for_half() -> None:
    for kind in KINDS:
        scores, member = scores_of(kind, 0)
        difference = scores[member][:, None] - scores[~member]
        assert auc(scores, member) == pytest.approx(((difference > 0) + (difference == 0) / 2).mean(), abs=1e-12)


# Weights, that is, resampled pictures


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_figures_are_those_of_scikit_learn_with_sample_weight(kind: str) -> None:
    for seed, (members, nonmembers) in enumerate([(40, 60), (60, 40), (1, 100), (100, 1), (3, 3)]):
        scores, member = scores_of(kind, seed, members, nonmembers)
        weights = metrics.draw(np.random.default_rng(seed), member, 20)
        found = weighted_figures(scores, member, weights)
        for row, w in enumerate(weights.astype(float)):
            expected = roc_auc_score(member, scores, sample_weight=w)
            assert found["auc"][row] == pytest.approx(expected, abs=1e-9)
            fpr, tpr, _ = roc_curve(member, scores, sample_weight=w, drop_intermediate=False)
            for name, bound in FPR_BOUNDS.items():
                counted = best_under(by_counting(scores, member, w), bound)
                assert found[name][row] == pytest.approx(counted, abs=1e-9)
                assert found[name][row] == pytest.approx(tpr[fpr <= bound].max(), abs=1e-9)


def test_the_order_of_the_pictures_does_not_matter_where_scores_are_equal() -> None:
    member = np.array([True, False] * 50)
    weights = np.ones((1, 100), np.float32)
    for order in (np.arange(100), np.argsort(member), np.argsort(~member)):
        assert weighted_figures(np.zeros(100), member[order], weights)["auc"] == [0.5]
        assert weighted_figures(np.zeros(100), member[order], weights)["tpr5"] == [0]


def test_a_draw_takes_as_many_members_and_non_members_as_there_are() -> None:
    _, member = binormal(0, 30, 70)
    weights = metrics.draw(np.random.default_rng(0), member, 500)
    assert weights.shape == (500, 100)
    assert (weights[:, member].sum(axis=1) == 30).all()
    assert (weights[:, ~member].sum(axis=1) == 70).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(100), abs=6 / math.sqrt(500))  # each picture as often
    assert weights.var(axis=0).mean() == pytest.approx(1, abs=0.05)  # binomial: (1 - 1/k) of a Poisson's


# Intervals


def closed_form_deviation(members: int, nonmembers: int, d: float) -> float:
    """Standard deviation of the AUC of two normal groups (Bamber, 1975)."""
    area = norm.cdf(d / math.sqrt(2))
    both = multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf([d / math.sqrt(2)] * 2)  # two members above one, or one
    variance = area * (1 - area) + (members + nonmembers - 2) * (both - area**2)
    return math.sqrt(variance / (members * nonmembers))


def test_intervals_of_the_auc_cover_the_truth_as_often_as_they_say() -> None:
    sets, truth = 120, norm.cdf(1 / math.sqrt(2))
    intervals = []
    for seed in range(1000, 1000 + sets):
        scores, member = binormal(seed, 100, 100)
        intervals.append(metrics.interval(resampled({1: scores}, member, seed)[1]["auc"]))
    covered = sum(low <= truth <= high for low, high in intervals)
    least, most = binom.interval(0.999, sets, metrics.LEVEL)
    assert least <= covered <= most
    width = np.mean([high - low for low, high in intervals])
    assert width == pytest.approx(2 * norm.isf(0.025) * closed_form_deviation(100, 100, 1), rel=0.05)


def test_more_pictures_give_narrower_intervals() -> None:
    def width(count: int, seed: int) -> float:
        scores, member = binormal(seed, count, count)
        return np.ptp(metrics.interval(resampled({1: scores}, member)[1]["auc"]))

    few, more, many = (np.mean([width(count, seed) for seed in range(10)]) for count in (25, 100, 400))
    assert few / more == pytest.approx(2, rel=0.15)
    assert more / many == pytest.approx(2, rel=0.15)


def test_the_gain_of_identical_columns_is_exactly_nothing() -> None:
    scores, member = binormal(0, 50, 50)
    _, row = evaluate(table(scores_1=scores, scores_2=scores, member=member), CALLS)
    assert (row["gain"], row["gain_lo"], row["gain_hi"]) == (0, 0, 0)


def test_the_paired_interval_of_correlated_scores_is_narrower_than_the_unpaired() -> None:
    scores, member = binormal(0, 100, 100)
    noise = np.random.default_rng(1).normal(size=200)
    columns = {1: scores, 2: scores + 0.3 * member + 0.3 * noise}
    paired, other = resampled(columns, member, seed=0), resampled(columns, member, seed=1)
    narrow = np.ptp(metrics.interval(paired[2]["auc"] - paired[1]["auc"]))
    wide = np.ptp(metrics.interval(paired[2]["auc"] - other[1]["auc"]))
    assert narrow < 0.7 * wide
    row = evaluate(table(scores_1=scores, scores_2=columns[2], member=member), CALLS)[1]
    assert row["gain_hi"] - row["gain_lo"] < 0.7 * wide
    assert row["gain_lo"] < row["gain"] < row["gain_hi"]


def test_a_seed_decides_the_resampling() -> None:
    scores, member = binormal(0, 30, 30)
    one, again, other = (resampled({1: scores}, member, seed)[1]["auc"] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_resampling_in_small_pieces_is_as_good_and_still_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, member = binormal(0, 60, 80)
    whole = resampled({1: scores}, member)[1]
    sizes, draw = [], metrics.draw

    def recorded(*arguments: object) -> np.ndarray:
        weights = draw(*arguments)
        sizes.append(weights.shape)
        return weights

    monkeypatch.setattr(metrics, "draw", recorded)
    monkeypatch.setattr(metrics, "ELEMENTS", 7 * len(member) + 3)
    pieces = resampled({1: scores, 2: scores.copy(), 3: -scores}, member)
    assert {size for size, _ in sizes[:-1]} == {7}
    assert sum(size for size, _ in sizes) == metrics.DRAWS == len(pieces[1]["auc"])
    assert len(np.unique(pieces[1]["auc"])) > metrics.DRAWS / 2  # no piece repeats another
    spread = whole["auc"].std()
    assert pieces[1]["auc"].mean() == pytest.approx(whole["auc"].mean(), abs=5 * spread / math.sqrt(500))
    assert pieces[1]["auc"].std() == pytest.approx(spread, rel=0.15)
    for name in ("auc", *FPR_BOUNDS):
        assert np.array_equal(pieces[1][name], pieces[2][name])
    assert pieces[1]["auc"] + pieces[3]["auc"] == pytest.approx(np.ones(metrics.DRAWS), abs=1e-9)


def test_a_set_larger_than_one_piece_is_resampled_one_draw_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, member = binormal(0, 30, 30)
    monkeypatch.setattr(metrics, "ELEMENTS", 10)
    monkeypatch.setattr(metrics, "DRAWS", 25)
    assert len(resampled({1: scores}, member)[1]["auc"]) == 25


def test_twenty_thousand_pictures_fit_into_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, member = binormal(0, 10_000, 10_000)
    monkeypatch.setattr(metrics, "DRAWS", 250)  # two and a half pieces
    tracemalloc.start()
    try:
        draws = resampled({1: scores, 2: scores + member}, member)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300 * 2**20  # all weights at once would be twice as much for a thousand draws
    low, high = metrics.interval(draws[1]["auc"])
    assert high - low == pytest.approx(2 * norm.isf(0.025) * closed_form_deviation(10_000, 10_000, 1), rel=0.25)


# Attack success rate


def by_hand(scores: np.ndarray, member: np.ndarray, seed: int) -> list[float]:
    """Accuracies of App. E: the best cut of a tenth of each group, applied to the others; ten draws."""
    rng, rates = np.random.default_rng(seed), []
    for _ in range(10):
        tenths = [rng.choice(np.flatnonzero(group), group.sum() // 10, replace=False) for group in (member, ~member)]
        chosen = np.isin(np.arange(len(scores)), np.concatenate(tenths))
        levels = sorted(set(scores[chosen]), reverse=True)
        cuts = [math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), levels[-1]]
        accuracies = [((scores >= cut) == member)[chosen].mean() for cut in cuts]
        called = [[(scores >= cut)[chosen & group].mean() for group in (member, ~member)] for cut in cuts]
        best = max(range(len(cuts)), key=lambda place: called[place][0] - called[place][1])
        assert accuracies[best] == max(accuracies)
        rates.append(((scores >= cuts[best]) == member)[~chosen].mean())
    return rates


@pytest.mark.parametrize("kind", ["continuous", "few values", "two values", "constant"])
def test_the_asr_of_equal_groups_is_the_accuracy_of_the_best_threshold_of_a_tenth(kind: str) -> None:
    for seed in range(5):
        scores, member = scores_of(kind, seed, 100, 100)
        rates = by_hand(scores, member, seed)
        assert asr(scores, member, seed) == pytest.approx((np.mean(rates), np.std(rates, ddof=1)), abs=1e-12)


def test_the_asr_of_scores_with_a_gap_between_the_groups_is_one() -> None:
    rng = np.random.default_rng(0)
    member = rng.permutation(np.arange(120) < 60)
    for scores in (member.astype(float), rng.random(120) + 2 * member):
        assert asr(scores, member) == (1, 0)
        assert asr(-scores, member)[0] <= 0.5


def test_the_asr_of_scores_that_say_nothing_is_about_a_half_whatever_the_shares() -> None:
    for members, nonmembers in ((400, 400), (100, 700), (700, 100)):
        scores, member = binormal(0, members, nonmembers, d=0)
        assert asr(scores, member)[0] == pytest.approx(0.5, abs=0.07)
        assert asr(np.zeros(800), member) == (0.5, 0)


def test_the_asr_of_two_normal_groups_approaches_the_best_possible_accuracy_from_below() -> None:
    scores, member = binormal(0, 5000, 5000, d=2)
    best = norm.cdf(1)  # the cut at d / 2
    assert best - 0.015 < asr(scores, member)[0] < best + 0.007  # three standard errors of 9000 pictures, ten draws


# The rows of a table


def test_each_attack_and_n_has_a_row_with_its_model_calls() -> None:
    scores, member = binormal(0, 50, 50)
    one = table(scores_1=scores, scores_2=scores + member, scores_3=scores, member=member)
    both = pd.concat([one, one[one.n < 3].assign(attack="PIA", t=200)])
    rows = evaluate(both, CALLS | {("PIA", 1): 2, ("PIA", 2): 3})
    named = [(row["attack"], row["t"], row["n"], row["calls"]) for row in rows]
    assert named == [("NA", 100, 1, 1), ("NA", 100, 2, 2), ("NA", 100, 3, 3), ("PIA", 200, 1, 2), ("PIA", 200, 2, 3)]
    for row in rows:
        gains = [row["gain"], row["gain_lo"], row["gain_hi"]]
        assert gains == [None] * 3 if row["n"] == 1 else None not in gains
        assert row["note"] == ""
    assert rows[1]["gain"] == rows[1]["auc"] - rows[0]["auc"]
    assert rows[2]["gain"] == 0


def test_a_row_says_what_the_single_functions_say() -> None:
    scores, member = binormal(0, 1000, 1000)
    (row,) = evaluate(table(scores_1=scores, member=member), CALLS)
    assert row["auc"] == pytest.approx(roc_auc_score(member, scores))
    for name, bound in FPR_BOUNDS.items():
        assert row[name] == best_under(by_counting(scores, member), bound)
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]
    assert row["auc_lo"] < row["auc"] < row["auc_hi"]
    assert (row["asr"], row["asr_sd"]) == asr(scores, member)


def test_pictures_are_matched_by_name_and_not_by_their_place() -> None:
    scores, member = binormal(0, 40, 40)
    rows = table(scores_1=scores, scores_2=scores**3, member=member)
    shuffled = rows.sample(frac=1, random_state=0)
    assert evaluate(shuffled.sort_values("n", kind="stable"), CALLS) == evaluate(rows, CALLS)


@pytest.mark.parametrize(("kept", "missing"), [(True, "non-members"), (False, "members")])
def test_one_group_alone_is_refused_in_one_sentence(kept: bool, missing: str) -> None:
    scores, member = binormal(0, 20, 20)
    rows = table(scores_1=scores, member=member)
    sentence = f"The set holds no {missing}; AUC and error rates need both groups."
    chosen = member == kept
    for refused in (
        lambda: evaluate(rows[rows.member == kept], CALLS),
        lambda: auc(scores[chosen], member[chosen]),
        lambda: roc(scores[chosen], member[chosen]),
    ):
        with pytest.raises(InputError) as found:
            refused()
        assert str(found.value) == sentence


@pytest.mark.parametrize(("nonmembers", "seen"), [(19, 0), (20, 1), (99, 1), (100, 2), (999, 2), (1000, 3)])
def test_a_rate_is_shown_only_where_there_are_enough_non_members_to_see_it(nonmembers: int, seen: int) -> None:
    scores, member = binormal(0, 50, nonmembers)
    (row,) = evaluate(table(scores_1=scores, member=member), CALLS)
    for place, name in enumerate(FPR_BOUNDS):
        shown = [row[name], row[f"{name}_lo"], row[f"{name}_hi"]]
        assert None not in shown if place < seen else shown == [None] * 3
    assert None not in (row["auc"], row["auc_lo"], row["auc_hi"], row["asr"])


def test_equal_scores_are_worth_nothing_and_a_note_says_so() -> None:
    _, member = binormal(0, 40, 60)
    (row,) = evaluate(table(scores_1=np.full(100, -3.5), member=member), CALLS)
    assert (row["auc"], row["auc_lo"], row["auc_hi"], row["asr"], row["tpr5"]) == (0.5, 0.5, 0.5, 0.5, 0)
    assert row["note"] == "all scores are equal"


@pytest.mark.parametrize(("members", "nonmembers"), [(9, 40), (40, 9), (2, 2), (2, 500)])
def test_few_pictures_of_a_kind_are_measured_with_a_note(members: int, nonmembers: int) -> None:
    scores, member = binormal(0, members, nonmembers)
    (row,) = evaluate(table(scores_1=scores, member=member), CALLS)
    assert row["note"] == f"only {min(members, nonmembers)} pictures of a kind: too few"
    assert 0 <= row["auc_lo"] <= row["auc"] <= row["auc_hi"] <= 1
    assert 0 <= row["asr"] <= 1


def test_ten_pictures_of_a_kind_need_no_note() -> None:
    scores, member = binormal(0, 10, 10)
    assert evaluate(table(scores_1=scores, member=member), CALLS)[0]["note"] == ""


def test_a_single_member_leaves_nothing_to_apply_a_threshold_to() -> None:
    scores, member = binormal(0, 1, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = evaluate(table(scores_1=scores, member=member), CALLS)
    assert math.isnan(row["asr"])
    assert math.isnan(row["asr_sd"])
    assert row["note"] == "only 1 picture of a kind: too few"
    assert row["auc"] == pytest.approx(roc_auc_score(member, scores))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_without_a_finite_score_are_left_out_and_counted(value: float) -> None:
    scores, member = binormal(0, 50, 50)
    second = scores + member
    rows = table(scores_1=scores, scores_2=second, member=member)
    damaged = rows.copy()
    damaged.loc[3, "score"] = value  # one at n = 1, another at n = 2
    damaged.loc[100 + 7, "score"] = value
    assert len(check_scores(damaged)) == len(rows) - 2
    kept = ~np.isin(np.arange(100), (3, 7))
    found = evaluate(damaged, CALLS)
    expected = evaluate(table(scores_1=scores[kept], scores_2=second[kept], member=member[kept]), CALLS)
    assert [row | {"note": ""} for row in found] == expected
    assert {row["note"] for row in found} == {"pictures left out for want of a finite score: 2"}


def test_an_attack_without_a_single_finite_score_is_refused_and_not_passed_over() -> None:
    scores, member = binormal(0, 20, 20)
    good = table(scores_1=scores, member=member)
    bad = good.assign(attack="PIA", score=np.nan)
    with pytest.raises(InputError, match="PIA at t = 100 gives no picture a finite score"):
        evaluate(pd.concat([good, bad]), CALLS | {("PIA", 1): 2})


def test_a_table_without_a_column_is_refused_with_its_name() -> None:
    scores, member = binormal(0, 5, 5)
    for name in metrics.COLUMNS:
        with pytest.raises(InputError, match=f"has no column '{name}'; it needs image, member"):
            evaluate(table(scores_1=scores, member=member).drop(columns=name), CALLS)


# What One More Step puts right


def test_labels_before_and_after_are_judged_at_the_same_false_alarm_rate() -> None:
    scores, member = binormal(0, 80, 120)
    noise = np.random.default_rng(1).normal(size=200)
    after = 10 * (scores + member + noise) - 3  # another scale, so that one threshold for both would not do
    for bound in (0.0, 0.05, 0.2):
        changes = corrected(table(scores_1=scores, scores_2=after, member=member), bound)
        assert list(changes.columns) == ["image", "member", "before", "after"]
        assert len(changes) == 200
        for name, values in (("before", scores), ("after", after)):
            nonmembers = np.sort(values[~member])[::-1]
            allowed = math.floor(bound * 120 + 1e-9)
            right = np.where(member, values > nonmembers[allowed], values <= nonmembers[allowed])
            expected = dict(zip((f"{k:05d}" for k in range(200)), right, strict=True))
            assert dict(zip(changes.image, changes[name], strict=True)) == expected
            wrong = ~changes[name][~changes.member]
            assert wrong.sum() == allowed


def test_identical_scores_change_no_label() -> None:
    scores, member = binormal(0, 30, 30)
    changes = corrected(table(scores_1=scores, scores_2=scores, scores_3=-scores, member=member), 0.05)
    assert (changes.before == changes.after).all()
    assert 0 < changes.before.sum() < 60
