"""Statistics on pictures of unknown membership: laws, known answers, and what they give on the shipped models."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, binom, kstest, norm, ttest_ind

from oms_core import evidence, metrics
from oms_core.errors import InputError
from oms_core.run import Run, lookup, plan, scores

SHIPPED = ["ddpm-digits", "ddpm-fashion", "uvit-digits", "uvit-fashion", "sd-fashion"]


def shipped(model: str, attack: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the members and the non-members of a shipped model."""
    planned = plan(Run(model, attacks=(attack,)))
    table = scores(planned, lookup(planned))
    table = table[table.n == n]
    return table.score[table.member].to_numpy(), table.score[~table.member].to_numpy()


# A single picture


def test_a_p_value_counts_the_reference_that_scores_at_least_as_high() -> None:
    reference = np.array([3.0, 1.0, 2.0, 2.0])
    assert evidence.p_values(np.array([4.0, 3.0, 2.0, 1.5, 0.0]), reference) == pytest.approx(
        [1 / 5, 2 / 5, 4 / 5, 4 / 5, 1]
    )


def test_p_values_of_what_is_drawn_like_the_reference_are_as_small_as_they_should_be() -> None:
    rng = np.random.default_rng(0)
    reference, own = rng.exponential(size=(400, 99)), rng.exponential(size=400)
    found = np.array([evidence.p_values(own[k : k + 1], reference[k])[0] for k in range(400)])
    assert kstest(found - rng.uniform(0, 0.01, 400), "uniform").pvalue > 0.001  # ties of the grid of 1/100 broken
    assert (found <= 0.05).sum() <= binom.ppf(0.9999, 400, 0.05)


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("model", SHIPPED)
def test_known_members_are_flagged_as_often_as_the_roc_curve_says(model: str, fpr: float) -> None:
    for attack, n in (("NA", 1), ("NA", 2), ("PIA", 2)):
        members, others = shipped(model, attack, n)
        flagged = evidence.judged(members, others, fpr).flagged
        curve = metrics.roc(np.concatenate([members, others]), np.repeat([True, False], [len(members), len(others)]))
        allowed = (np.floor(fpr * (1 + len(others)) + 1e-9) - 1) / len(others)
        assert flagged.mean() == pytest.approx(curve.tpr_at(allowed + 1e-12))


@pytest.mark.parametrize("model", SHIPPED)
def test_known_non_members_are_flagged_as_seldom_as_was_promised(model: str) -> None:
    rng, fpr = np.random.default_rng(0), 0.05
    _, others = shipped(model, "PIA", 2)
    rates, half = [], len(others) // 2
    for _ in range(200):
        order = rng.permutation(len(others))
        rates.append((evidence.p_values(others[order[:half]], others[order[half:]]) <= fpr).mean())
    expected = np.floor(fpr * (1 + len(others) - half) + 1e-9) / (1 + len(others) - half)
    assert abs(np.mean(rates) - expected) < 4 * np.std(rates) / np.sqrt(len(rates))
    # with a fixed reference the rate of flags follows a beta-binomial law; its spread is bounded by that
    spread = beta(expected * (half + 1), (1 - expected) * (half + 1)).std() + np.sqrt(fpr / half)
    assert np.std(rates) < 2 * spread


def test_a_reference_must_be_large_enough_for_a_rate() -> None:
    for fpr in (0.1, 0.05, 0.01, 0.001):
        needed = evidence.needed_reference(fpr)
        best = [evidence.p_values(np.array([1.0]), np.zeros(count))[0] for count in (needed, needed - 1)]
        assert best[0] <= fpr + 1e-12 < best[1]


def test_pictures_are_corrected_for_their_number_as_the_textbook_says() -> None:
    reference = np.arange(999.0)
    own = np.array([998.5, 990.5, 950.5, 500.5, 100.5])
    found = evidence.judged(own, reference, 0.05)
    ranked = found.p * 5 / found.p.rank()
    assert found.q.tolist() == pytest.approx(ranked[::-1].cummin()[::-1].tolist())
    assert found.as_high.tolist() == [0, 8, 48, 498, 898]
    assert found.flagged.tolist() == [True, True, True, False, False]
    assert (found.discovered <= found.flagged).all()


# A set


def test_the_permutation_test_is_exact_where_all_permutations_can_be_counted() -> None:
    own, others = np.array([5.0, 6.0]), np.array([1.0, 2.0, 3.0])
    assert evidence.permutation(own, others) == pytest.approx(1 / 10)  # 1 of the 10 ways to choose two of five


@pytest.mark.parametrize(("model", "attack", "n"), [("ddpm-fashion", "PIA", 2), ("ddpm-digits", "SecMI", 1)])
def test_sets_of_non_members_are_decided_no_more_often_than_was_promised(model: str, attack: str, n: int) -> None:
    rng, draws, level = np.random.default_rng(0), 1_000, evidence.SET_LEVEL
    _, others = shipped(model, attack, n)
    alarms = 0
    for number in range(draws):
        chosen = np.zeros(len(others), bool)
        chosen[rng.choice(len(others), 50, replace=False)] = True
        p = evidence.permutation(others[chosen], others[~chosen], seed=number, resamplings=199)
        alarms += p <= level
    low, high = binom.interval(0.999, draws, level)
    assert low <= alarms <= high


def test_a_difference_of_means_is_found_with_the_right_size() -> None:
    rng = np.random.default_rng(0)
    own, others = rng.normal(5, 2, 200), rng.normal(3, 2, 1000)
    found = evidence.compare_sets(own, others)
    assert found["decided"]
    assert found["effect_lo"] < 1 < found["effect_hi"]
    assert found["effect_lo"] < found["effect"] < found["effect_hi"]
    assert found["welch"] == ttest_ind(own, others, equal_var=False, alternative="greater").pvalue
    assert not evidence.compare_sets(others[:200] - 1, others[200:])["decided"]


def test_equal_scores_decide_nothing() -> None:
    with pytest.warns(RuntimeWarning):
        found = evidence.compare_sets(np.ones(5), np.ones(50))
    assert not found["decided"]
    assert found["permutation"] == 1
    assert np.isnan(found["effect"])


@pytest.mark.parametrize(("own", "others"), [(1, 10), (10, 1), (0, 10)])
def test_a_set_takes_two_pictures_on_either_side(own: int, others: int) -> None:
    with pytest.raises(InputError, match="two pictures or more"):
        evidence.compare_sets(np.zeros(own), np.zeros(others))


# How many pictures it takes


def test_the_power_of_a_known_difference_is_what_theory_says() -> None:
    rng, shift = np.random.default_rng(0), 0.5
    curve = evidence.power(rng.normal(shift, 1, 50_000), rng.normal(0, 1, 50_000))
    expected = norm.cdf(shift * np.sqrt(curve.pictures) - norm.ppf(0.99))
    assert np.abs(curve.power - expected).max() < 0.06  # 4,000 draws decide the 99 % point and the share
    assert evidence.enough(curve) == 50  # theory: (z(0.99) + z(0.8))^2 / 0.25 = 40


def test_sets_of_non_members_have_no_power_but_the_level() -> None:
    rng = np.random.default_rng(0)
    curve = evidence.power(rng.normal(size=20_000), rng.normal(size=20_000))
    assert curve.power.max() < 0.03
    assert evidence.enough(curve) is None


def test_enough_is_where_the_power_stays_above() -> None:
    curve = pd.DataFrame({"pictures": [2, 5, 10, 20], "power": [0.85, 0.7, 0.81, 0.9]})
    assert evidence.enough(curve) == 10
    assert evidence.enough(curve.assign(power=0.9)) == 2
    assert evidence.enough(curve.assign(power=[0.9, 0.9, 0.9, 0.1])) is None


@pytest.mark.parametrize("model", SHIPPED)
def test_fifty_members_are_decided_where_single_ones_are_not(model: str) -> None:
    members, others = shipped(model, "NA", 2)
    single = evidence.judged(members, others, evidence.SET_LEVEL).flagged.mean()
    together = evidence.power(members, others).set_index("pictures").power[50]
    assert single < 0.5 < 0.95 < together
