"""Attacks that learn: what they may see, the rates that they promise, and closed forms of Gaussian errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta, norm
from sklearn.metrics import mean_pinball_loss

from oms_core import compute
from oms_core.assemble import png
from oms_core.attacks import ATTACKS, Learned
from oms_core.attacks import quantile as qr
from oms_core.attacks.base import Study, column, learned_column, pairs
from oms_core.attacks.quantile import LEVELS, QR, rates_by_level
from oms_core.attacks.trajectory import SHARE
from oms_core.compute import score
from oms_core.errors import InputError
from oms_core.location import Location
from oms_core.metrics import auc
from oms_core.run import Run, calls, lookup, plan, scores

LABELLED = ("NA-trajectory", "PIA-trajectory", "SecMI-trajectory")
CALIBRATED = ("NA-calibrated", "PIA-calibrated")
EVERY = ("QR", *LABELLED, *CALIBRATED)
Errors = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # from brightness in [0, 1] to log d(0, 1)


def coefficients(t: int) -> tuple[float, float]:
    angle = math.pi / 2 * t / 1000
    return math.cos(angle), math.sin(angle)


def log_normal(logs: dict[str, np.ndarray], name: str) -> pd.DataFrame:
    """A signal with these logarithms of distances, its pictures called name 0, name 1, ..."""
    distances = {pair: np.exp(values) for pair, values in logs.items()}
    return pd.DataFrame({"image": [f"{name} {k}" for k in range(len(next(iter(logs.values()))))], **distances})


def chain(p: int, count: int, shift: np.ndarray, name: str, seed: int = 0) -> pd.DataFrame:
    """d(i, j) for i < j <= 2 with independent logarithms from N(-shift, 1), shift (3,) or (count, 3)."""
    logs = np.random.default_rng(seed).normal(size=(count, 3)) - shift
    return log_normal({column(i, j, p): logs[:, k] for k, (i, j) in enumerate(pairs(2))}, name)


def gaussian(base: str, shift: tuple[float, float, float], each: int = 2000) -> Study:
    """As many members as non-members and auxiliary pictures; the distances of members are smaller by e^shift."""
    member = np.arange(2 * each) % 2 == 0
    p = ATTACKS[base].p
    rows, auxiliary = chain(p, 2 * each, member[:, None] * np.array(shift), "a"), chain(p, each, np.zeros(3), "b", 1)
    return Study(rows, member, auxiliary, lambda images: np.zeros((len(images), 8, 8, 1), np.uint8), 2, 100,
                 coefficients, 0)  # fmt: skip


def bright(count: int, name: str, errors: Errors, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Grey pictures of one brightness each and their errors; the brightness is in the name."""
    rng = np.random.default_rng(seed)
    light = rng.integers(0, 256, count)
    rows = log_normal({column(0, 1, 2): errors(light / 255, rng)}, name)
    return rows.assign(image=rows.image + "/" + light.astype(str)), light / 255


def pixels(images: pd.Series) -> np.ndarray:
    return np.stack([np.full((8, 8, 1), int(image.split("/")[1]), np.uint8) for image in images])


def heteroscedastic(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright pictures have larger errors, which also vary more."""
    return 3 * light + (0.2 + 0.8 * light) * rng.normal(size=len(light))


def bright_study(known: int = 60, judged: int = 40) -> Study:
    """A small study of such pictures, every other one a member."""
    auxiliary, _ = bright(known, "b", heteroscedastic, 1)
    rows, _ = bright(judged, "a", heteroscedastic, 2)
    return Study(rows, np.arange(judged) % 2 == 0, auxiliary, pixels, 1, 100, coefficients, 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that hardly learn, where it does not matter how well."""
    monkeypatch.setattr(qr, "STEPS", 8)


# The quantile regression


@pytest.mark.parametrize("level", [0.001, 0.05, 0.5])
def test_the_quantile_minimises_the_pinball_loss(level: float) -> None:
    y = np.sort(np.random.default_rng(0).normal(size=1001))
    losses = [qr.pinball(torch.full((1001, 1), q), torch.tensor(y), torch.tensor([level])).item() for q in y]
    assert y[np.argmin(losses)] == np.quantile(y, level, method="inverted_cdf")


def test_the_pinball_loss_is_scikit_learns() -> None:
    y, q = np.random.default_rng(0).normal(size=(2, 50))
    for level in LEVELS:
        found = qr.pinball(torch.tensor(q)[:, None], torch.tensor(y), torch.tensor([level], dtype=torch.float64))
        assert found.item() == pytest.approx(mean_pinball_loss(y, q, alpha=level), rel=1e-12)


@pytest.mark.parametrize(("count", "level"), [(20, 0.05), (198, 0.05), (198, 0.01), (2001, 0.001)])
def test_of_exchangeable_values_just_so_many_lie_below_the_bound_of_the_others(count: int, level: float) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    below = sum(values[k] < qr.conformal(torch.cat([values[:k], values[k + 1 :]]), level) for k in range(count))
    assert below == math.floor(level * count)


def test_a_level_beyond_the_number_of_known_pictures_is_not_learned() -> None:
    assert qr.conformal(torch.arange(998.0), 0.001).isnan()
    assert qr.conformal(torch.arange(999.0), 0.001) == 0


@pytest.fixture(scope="module")
def learned() -> tuple[Study, pd.DataFrame, np.ndarray]:
    """A study of pictures whose quantiles are known, what was learned from it, and the brightness of each picture."""
    auxiliary, _ = bright(2000, "b", heteroscedastic, 1)
    rows, light = bright(4000, "a", heteroscedastic, 2)
    study = Study(rows, np.zeros(4000, bool), auxiliary, pixels, 1, 100, coefficients, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qr, "ROUNDS", 1)
        return study, QR.fit(study), light


@pytest.mark.parametrize("level", LEVELS)
def test_measured_rates_are_nominal(learned: tuple[Study, pd.DataFrame, np.ndarray], level: float) -> None:
    study, found, _ = learned
    called = found[learned_column(str(level), 1)] > 0
    spread = math.sqrt(level * (1 - level) * (1 / len(study.auxiliary) + 1 / len(study.rows)))
    assert called.mean() == pytest.approx(level, abs=4 * spread)


def test_the_learned_quantile_is_that_of_pictures_alike(learned: tuple[Study, pd.DataFrame, np.ndarray]) -> None:
    study, found, light = learned
    margin, error = found[learned_column("0.05", 1)].to_numpy(), np.log(study.rows[column(0, 1, 2)])
    true = 3 * light + (0.2 + 0.8 * light) * norm.ppf(0.05)
    assert np.sqrt(np.mean((margin + error - true) ** 2)) < 0.25
    same = np.log(study.auxiliary[column(0, 1, 2)]).quantile(0.05)  # one threshold for all
    dark, middle, light = light < 1 / 3, (light > 1 / 3) & (light < 2 / 3), light > 2 / 3
    assert (error < same)[dark].mean() > 0.1
    assert (error < same)[light].mean() < 0.01
    assert all(0.02 < (margin > 0)[part].mean() < 0.09 for part in (dark, middle, light))


@pytest.mark.usefixtures("quick")
def test_who_judges_a_picture_never_trained_on_it() -> None:
    x, y = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60.0)
    folds = [qr.folds_of([f"{k}" for k in range(80)], f"{turn}") for turn in range(2)]
    before = qr.expected(x, y, folds, torch.Generator().manual_seed(0))
    y[7] = 1e6
    after = qr.expected(x, y, folds, torch.Generator().manual_seed(0))
    alone = (folds[0] == folds[0][7]) & (folds[1] == folds[1][7])
    assert torch.equal(after[alone], before[alone])
    assert not torch.isclose(after[~alone], before[~alone]).all(dim=1).any()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 30, 3), (80, 70, 4)])
def test_pictures_may_have_any_shape(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    study = replace(bright_study(20, 4), pixels=lambda images: rng.integers(0, 256, (len(images), *shape), np.uint8))
    found = QR.fit(study)
    assert np.isfinite(found[learned_column("0.05", 1)]).all()
    assert found[[learned_column("0.01", 1), learned_column("0.001", 1)]].isna().all(axis=None)  # 20 cannot teach it


@pytest.mark.usefixtures("quick")
def test_scores_follow_a_change_of_units_and_a_power_of_the_error() -> None:
    study, name = bright_study(), column(0, 1, 2)
    head = learned_column("0.05", 1)
    changed = {part: getattr(study, part).copy() for part in ("rows", "auxiliary")}
    for rows in changed.values():
        rows[name] = 7 * rows[name] ** 2
    expected, found = QR.fit(study)[head], QR.fit(replace(study, **changed))[head]
    np.testing.assert_allclose(found, 2 * expected, atol=0.02)  # log(7 d^2) = log 7 + 2 log d
    other = replace(study, coefficients=lambda t: coefficients(2 * t))  # another factor of the t-error
    np.testing.assert_allclose(QR.fit(other)[head], expected, atol=0.02)


@pytest.mark.usefixtures("quick")
def test_pictures_without_a_finite_error_are_left_out() -> None:
    study = bright_study(21)
    study.auxiliary.loc[:1, column(0, 1, 2)] = np.inf, np.nan
    study.rows.loc[:1, column(0, 1, 2)] = np.inf, np.nan
    found = QR.fit(study)
    assert [*np.isfinite(found[learned_column("0.05", 1)])] == [False, False, *[True] * 38]
    with pytest.raises(InputError, match=r"^QR learns a level of 5% from 19 auxiliary pictures; here are 18\.$"):
        QR.fit(replace(study, auxiliary=study.auxiliary[:20]))


def test_rates_have_exact_intervals() -> None:
    margins = {learned_column("0.05", 1): [1.0, -1, -1, -1, 2, -3, 0], learned_column("0.01", 1): [np.nan] * 7}
    rows = pd.DataFrame(margins | {learned_column("0.001", 1): [1.0] * 7})
    first, second, third = rates_by_level(rows, np.arange(7) > 3, 1)
    assert {key: first[key] for key in ("attack", "n", "nominal", "fpr")} == {
        "attack": "QR", "n": 1, "nominal": 0.05, "fpr": 0.25,
    }  # fmt: skip
    assert first["fpr_lo"] == pytest.approx(beta.ppf(0.025, 1, 4))
    assert first["fpr_hi"] == pytest.approx(beta.ppf(0.975, 2, 3))
    assert first["tpr"] == pytest.approx(1 / 3)
    assert all(second[f"{rate}{end}"] is None for rate in ("fpr", "tpr") for end in ("", "_lo", "_hi"))
    assert (third["fpr"], third["fpr_hi"], third["fpr_lo"]) == (1, 1, pytest.approx(0.025 ** (1 / 4)))


# The regression on a chain, and its comparison with known non-members


@pytest.mark.parametrize("name", LABELLED)
def test_the_regression_is_as_good_as_the_best_test(name: str) -> None:
    attack, shift = ATTACKS[name], (0.3, -0.4, 1.0)
    study = gaussian(attack.base.name, shift)
    found = attack.fit(study)
    member = study.member[found.index]
    for n, known in ((1, shift[:1]), (2, shift)):
        best = norm.cdf(np.linalg.norm(known) / math.sqrt(2))  # of the likelihood ratio
        assert auc(attack.score(found, n), member) == pytest.approx(best, abs=0.025)


@pytest.mark.parametrize("name", CALIBRATED)
def test_distances_that_show_members_alike_add_up(name: str) -> None:
    attack = ATTACKS[name]
    study = gaussian(attack.base.name, (0.5, 0.5, 0.5))
    found = attack.fit(study)
    for n, count in ((1, 1), (2, 3)):
        best = norm.cdf(0.5 * math.sqrt(count / 2))
        assert auc(attack.score(found, n), study.member) == pytest.approx(best, abs=0.025)


@pytest.mark.parametrize("name", [*LABELLED, *CALIBRATED])
def test_one_step_ranks_as_the_published_attack(name: str) -> None:
    attack = ATTACKS[name]
    found = attack.fit(study := gaussian(attack.base.name, (0.5, 0, 0), 200))
    published = attack.base.score(study.rows.loc[found.index], 1)
    assert [*np.argsort(attack.score(found, 1))] == [*np.argsort(published)]


@pytest.mark.parametrize("name", LABELLED)
def test_a_labelled_picture_is_never_judged(name: str) -> None:
    study = gaussian(ATTACKS[name].base.name, (0.5, 0.5, 0.5), 100)
    found = ATTACKS[name].fit(study)
    assert {*found.image} == {*study.rows.image[~study.labelled(SHARE)]}
    judged = study.member[found.index]
    assert (judged.sum(), (~judged).sum()) == (90, 90)


@pytest.mark.parametrize("name", LABELLED)
def test_who_is_judged_is_not_learned_from(name: str) -> None:
    study = gaussian(ATTACKS[name].base.name, (0.5, 0.5, 0.5), 100)
    found = ATTACKS[name].fit(study)
    others = ~study.labelled(SHARE)
    changed = study.rows.copy()
    changed.loc[others, changed.columns[1:]] *= 3
    again = ATTACKS[name].fit(replace(study, rows=changed))
    moved = again.drop(columns="image") - found.drop(columns="image")
    assert np.allclose(moved, moved.iloc[0])  # a factor moves the scores of all alike: the weights are the same


@pytest.mark.parametrize("name", LABELLED)
def test_a_zero_is_a_distance_and_infinity_is_none(name: str) -> None:
    study = gaussian(ATTACKS[name].base.name, (0.5, 0.5, 0.5), 100)
    for known in (study.labelled(SHARE), ~study.labelled(SHARE)):
        first, second, *_ = np.flatnonzero(known)
        study.rows.iloc[first, 1:], study.rows.iloc[second, 1:] = 0, np.inf
    found = ATTACKS[name].fit(study).set_index("image")
    first, second, *_ = study.rows.image[~study.labelled(SHARE)]
    assert np.isfinite(found.drop(index=second)).all(axis=None)
    assert found.loc[second].isna().all()


@pytest.mark.parametrize("member", [[True] * 9 + [False] * 2, [False] * 9])
def test_a_group_too_small_for_labels_is_refused(member: list[bool]) -> None:
    rows = chain(2, len(member), np.zeros(3), "a")
    study = replace(gaussian("NA", (0, 0, 0), 5), rows=rows, member=np.array(member))
    with pytest.raises(InputError, match=r"^NA-trajectory needs at least 3 members and 3 non-members\.$"):
        ATTACKS["NA-trajectory"].fit(study)


# What holds for all


def study_for(name: str) -> Study:
    return bright_study() if name == "QR" else gaussian(ATTACKS[name].base.name, (0.5, 0.2, 0.1), 60)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", EVERY)
def test_a_seed_decides_a_fit(name: str) -> None:
    study = study_for(name)
    found = ATTACKS[name].fit(study)
    torch.rand(1)
    pd.testing.assert_frame_equal(ATTACKS[name].fit(study), found, check_exact=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [name for name in EVERY if name not in LABELLED])
def test_known_nonmembers_alone_are_learned_from(name: str) -> None:
    study = study_for(name)
    found = ATTACKS[name].fit(study)
    pd.testing.assert_frame_equal(ATTACKS[name].fit(replace(study, member=~study.member)), found, check_exact=True)
    some = study.rows[::3]
    again = ATTACKS[name].fit(replace(study, rows=some, member=study.member[::3]))
    pd.testing.assert_frame_equal(again, found.loc[some.index], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [*LABELLED, *CALIBRATED])
def test_the_first_steps_do_not_depend_on_the_last(name: str) -> None:
    study = study_for(name)
    shorter, longer = ATTACKS[name].fit(replace(study, steps=1)), ATTACKS[name].fit(study)
    pd.testing.assert_frame_equal(longer[shorter.columns], shorter, check_exact=True)


@pytest.fixture(scope="module")
def three_roles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six members, six non-members and twenty auxiliary pictures, grey, 8 x 8."""
    folder, rng = tmp_path_factory.mktemp("three roles"), np.random.default_rng(0)
    for role, count in (("member", 6), ("nonmember", 6), ("auxiliary", 20)):
        (folder / role).mkdir()
        for number in range(count):
            (folder / role / f"{number}.png").write_bytes(png(rng.integers(0, 256, (8, 8), np.uint8)))
    return folder


@pytest.mark.usefixtures("quick")
def test_a_fit_is_made_once_and_kept(pipeline: Path, three_roles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(model=Location(pipeline), images=Location(three_roles), attacks=EVERY, t=100, steps=2, batch=8)
    found = score(run)
    assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(EVERY, 12) | dict.fromkeys(LABELLED, 8)
    monkeypatch.setattr(compute, "loaded", None)  # no model can be asked any more
    again = score(run)
    for name in EVERY:
        pd.testing.assert_frame_equal(again[name], found[name])
    planned = plan(run)
    assert {*lookup(planned)} == {*EVERY}
    table = scores(planned, again)
    assert np.isfinite(table.score).all()
    assert {(name, n) for name in EVERY for n in (1, 2)} == {*table[["attack", "n"]].itertuples(index=False, name=None)}
    assert len(rates_by_level(again["QR"], plan(run).images.table.role.eq("member").to_numpy(), 2)) == 6


def test_learning_costs_no_model_call(pipeline: Path, three_roles: Path) -> None:
    names = {name: ATTACKS[name].base.name for name in EVERY}
    run = Run(model=Location(pipeline), images=Location(three_roles), attacks=(*names, *names.values()), steps=3)
    counted = calls(plan(run))
    assert all(counted[name, n] == counted[base, n] for name, base in names.items() for n in (1, 2, 3))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in LABELLED])
def test_without_auxiliary_pictures_one_sentence_says_so(name: str, pipeline: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match=rf"^{name} learns from pictures .* none of the role auxiliary\.$"):
        score(Run(model=Location(pipeline), images=Location(pictures), attacks=(name,), t=100))


@pytest.mark.parametrize("name", EVERY)
def test_a_learned_attack_takes_after_its_base(name: str) -> None:
    attack = ATTACKS[name]
    assert isinstance(attack, Learned)
    assert (attack.t, attack.reach, attack.shown_as) == (attack.base.t, attack.base.reach, attack.base.name)
    with pytest.raises(TypeError, match=f"^{name} is fitted to the signal of {attack.base.name}$"):
        attack.measure(None, 0, 1)
