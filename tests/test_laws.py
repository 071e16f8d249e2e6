"""What must hold whatever the model: closed forms, the schedulers of diffusers, and what a score may not depend on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

from oms_core import compute, ddim
from oms_core.attacks import ATTACKS, COMPARED, SEARCHES, Learned, Probe
from oms_core.attacks.pia import normalised
from oms_core.cache import part, variants
from oms_core.catalog import IDEAL_WIDTH, describe
from oms_core.compute import score
from oms_core.decode import Profile
from oms_core.denoiser import PREDICTION_TYPES, to_eps
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.families.base import alpha_bar
from oms_core.folders import DIFFUSED
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.run import Run, lookup, plan, scores
from oms_core.search import Trajectory, diffuse, fixed_point, predicted_x_0

LINEAR = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
ABAR = alpha_bar(LINEAR)
PLAIN = DDPMScheduler(clip_sample=False)
SHAPE = (3, 2, 4, 4)


def coefficients(t: int) -> tuple[float, float]:
    return math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Stub:
    """A denoiser without weights that counts how often it is asked."""

    fingerprint, profile, timesteps = "stub", Profile((4, 4), 2), 1000

    def __init__(self) -> None:
        self.asked: list[int] = []

    def coefficients(self, t: int) -> tuple[float, float]:
        return coefficients(t)

    def condition(self, captions: list[str]) -> None:
        return None

    def eps(self, x_t: Tensor, t: int, condition: object = None) -> Tensor:
        self.asked.append(t)
        return torch.tanh(x_t.roll(1, dims=-1) + 0.3 * x_t) + t / 1000


def probe() -> Probe:
    return Probe(Stub(), drawn(0), None, lambda k: drawn(1 + k))


def searched(name: str, t: int, n: int, on: Probe | None = None) -> Trajectory:
    given, f = ATTACKS[name].search(on or probe(), t)
    return fixed_point(f, given, n)


# Schedules


@pytest.mark.parametrize("name", DIFFUSED)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_coefficients_are_those_of_the_models_own_scheduler(name: str, beta_schedule: str) -> None:
    scheduler = getattr(diffusers, name)(beta_schedule=beta_schedule)
    ours = alpha_bar(dict(scheduler.config) | {"_class_name": name})
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_timestep_0_is_the_first_noisy_one() -> None:
    assert float(ABAR[0]) == pytest.approx(0.9999, abs=1e-9)
    assert len(ABAR) == 1000


@pytest.mark.parametrize("t", [0, 1, 100, 350, 999])
def test_a_noisy_picture_is_that_of_add_noise(t: int) -> None:
    x_0, eps = drawn(0, dtype=torch.float32), drawn(1, dtype=torch.float32)
    torch.testing.assert_close(diffuse(x_0, eps, *coefficients(t)), PLAIN.add_noise(x_0, eps, torch.tensor([t])))


def test_taking_the_noise_away_gives_the_picture_back() -> None:
    x_0, eps = drawn(0), drawn(1)
    for t in (0, 500, 999):
        x_t = diffuse(x_0, eps, *coefficients(t))
        torch.testing.assert_close(predicted_x_0(x_t, eps, *coefficients(t)), x_0)


# What a network predicts


@pytest.mark.parametrize("t", [20, 100, 500, 999])
def test_all_kinds_of_prediction_of_one_model_mean_the_same_noise(t: int) -> None:
    x_0, eps = drawn(0, dtype=torch.float32), drawn(1, dtype=torch.float32)
    x_t = PLAIN.add_noise(x_0, eps, torch.tensor([t]))
    velocity = PLAIN.get_velocity(x_0, eps, torch.tensor([t]))
    for predicts, output in {"epsilon": eps, "sample": x_0, "v_prediction": velocity}.items():
        torch.testing.assert_close(to_eps(output, x_t, *coefficients(t), predicts), eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [0.01, 0.5, 0.99])
def test_a_flow_means_the_noise_at_its_end(s: float) -> None:
    x_0, eps = drawn(0), drawn(1)
    x_t = diffuse(x_0, eps, 1 - s, s)
    torch.testing.assert_close(to_eps(eps - x_0, x_t, 1 - s, s, "flow_prediction"), eps)


def test_an_unknown_kind_of_prediction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=rf"'banana' is not supported; known are {', '.join(PREDICTION_TYPES)}\."):
        to_eps(drawn(0), drawn(1), 0.5, 0.5, "banana")


# DDIM


def test_a_step_backwards_is_that_of_the_ddim_scheduler() -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(100)
    for t in (10, 100, 110, 990):
        x, eps = drawn(t), drawn(t + 1)
        theirs = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(
            ddim.step(x, eps, coefficients(t), coefficients(t - 10)), theirs, rtol=1e-5, atol=1e-5
        )


def test_a_step_forwards_is_that_of_the_inverse_ddim_scheduler() -> None:
    scheduler = DDIMInverseScheduler(clip_sample=False)
    scheduler.set_timesteps(100)
    for t in (10, 100, 110, 990):
        x, eps = drawn(t), drawn(t + 1)
        theirs = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(
            ddim.step(x, eps, coefficients(t - 10), coefficients(t)), theirs, rtol=1e-5, atol=1e-5
        )


def test_a_step_with_the_same_noise_back_undoes_it() -> None:
    x, eps, at, to = drawn(0), drawn(1), coefficients(100), coefficients(110)
    torch.testing.assert_close(ddim.step(ddim.step(x, eps, at, to), eps, to, at), x)


@pytest.mark.parametrize(("t", "stops"), [(0, [0]), (7, [0, 7]), (10, [0, 10]), (25, [0, 10, 20, 25])])
def test_a_walk_goes_by_tens_and_ends_at_t(t: int, stops: list[int]) -> None:
    assert ddim.stops(t) == stops
    asked = []
    ddim.walk(drawn(0), t, lambda x, at: asked.append(at) or x, coefficients)
    assert asked == stops[:-1]


@pytest.mark.parametrize("t", [5, 100, 350])
def test_a_walk_before_a_model_of_one_picture_is_exact(t: int) -> None:
    centre, x_0 = drawn(0), drawn(1)  # eps(x, t) = (x - alpha_t c) / sigma_t stays the same along the whole path

    def eps(x: Tensor, at: int) -> Tensor:
        alpha, sigma = coefficients(at)
        return (x - alpha * centre) / sigma

    expected = diffuse(centre, eps(x_0, 0), *coefficients(t))
    torch.testing.assert_close(ddim.walk(x_0, t, eps, coefficients), expected)


@pytest.mark.parametrize(("t", "k"), [(100, 110), (90, 100), (0, 10), (500, 510), (989, 999)])
def test_the_t_error_is_the_distance_of_the_noises_times_a_factor(t: int, k: int) -> None:
    x_t, eps_0, eps_1 = drawn(0), drawn(1), drawn(2)
    at, to = coefficients(t), coefficients(k)
    there_and_back = ddim.step(ddim.step(x_t, eps_0, at, to), eps_1, to, at)
    expected = ddim.t_error_factor(at, to) * (eps_0 - eps_1)  # E.8, element by element
    torch.testing.assert_close(there_and_back - x_t, expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-3


def test_the_factor_of_the_t_error_is_that_of_the_linear_schedule() -> None:
    assert ddim.t_error_factor(coefficients(100), coefficients(110)) == pytest.approx(0.0327525, abs=5e-8)


def test_secmi_measures_the_t_error() -> None:
    on = probe()
    x_t, eps_0, eps_1 = on.walk(100)
    at, to = coefficients(100), coefficients(110)
    back = ddim.step(ddim.step(x_t, eps_0, at, to), eps_1, to, at)
    t_error = (back - x_t).flatten(1).norm(dim=1)
    distance = searched("SecMI", 100, 1).distance(0, 1, 2)
    torch.testing.assert_close(ddim.t_error_factor(at, to) * distance.double(), t_error, rtol=1e-6, atol=0)


# The search


def test_a_search_asks_only_for_what_is_not_given() -> None:
    asked = []

    def double(eps: Tensor) -> Tensor:
        asked.append(1)
        return 2 * eps

    eps = drawn(0)
    assert len(fixed_point(double, [eps], 3).eps) == 4
    assert len(asked) == 3
    assert len(fixed_point(double, [eps, eps], 3).eps) == 4
    assert len(asked) == 5
    torch.testing.assert_close(fixed_point(double, [eps], 3).eps[3], 8 * eps)


def test_the_start_and_all_residuals_make_up_the_last_iterate() -> None:
    trajectory = searched("NA", 100, 5)
    whole = trajectory.eps[0] + sum(trajectory.residual(n) for n in range(1, 6))
    torch.testing.assert_close(whole, trajectory.eps[5])


def test_a_contraction_is_searched_down_to_its_fixed_point() -> None:
    q, b = 0.7, drawn(0)
    trajectory = fixed_point(lambda eps: q * eps + b, [drawn(1)], 20)
    fixed = b / (1 - q)
    first = trajectory.residual(1).norm()
    for n in range(1, 21):  # Banach: a priori, and by the last residual
        error = (trajectory.eps[n] - fixed).norm()
        assert error <= q**n / (1 - q) * first * (1 + 1e-9)
        assert error <= q / (1 - q) * trajectory.residual(n).norm() * (1 + 1e-9)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("name", SEARCHES)
def test_one_more_step_measures_the_sum_of_two_residuals(name: str, p: int) -> None:
    trajectory = searched(name, 100, 2)
    both = (trajectory.residual(1) + trajectory.residual(2)).flatten(1).numpy()
    expected = np.linalg.norm(both, p, axis=1)
    np.testing.assert_allclose(trajectory.distance(0, 2, p).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(trajectory.distance(2, 0, p).numpy(), expected, rtol=1e-5)


def test_a_distance_is_taken_in_single_precision_whatever_the_model() -> None:
    far = Trajectory((torch.zeros(1, 1, 4, 4, dtype=torch.half), torch.full((1, 1, 4, 4), 300, dtype=torch.half)))
    for p in (2, 4):  # 300^2 is beyond half precision
        assert far.distance(0, 1, p).dtype == torch.float32
        assert far.distance(0, 1, p).item() == pytest.approx(300 * 16 ** (1 / p), rel=1e-5)


# Attacks


def f_at(t: int, x_0: Tensor, eps: Tensor) -> Tensor:
    """f of Eq. 6, written out."""
    alpha, sigma = coefficients(t)
    return Stub().eps(alpha * x_0 + sigma * eps, t)


def test_na_starts_at_the_drawn_noise() -> None:
    on = probe()
    trajectory = searched("NA", 350, 2, on)
    assert trajectory.eps[0] is on.noise
    torch.testing.assert_close(trajectory.eps[1], f_at(350, on.x_0, on.noise))
    torch.testing.assert_close(trajectory.eps[2], f_at(350, on.x_0, trajectory.eps[1]))


def test_pia_starts_at_the_noise_seen_in_the_clean_picture() -> None:
    on = probe()
    trajectory = searched("PIA", 200, 2, on)
    torch.testing.assert_close(trajectory.eps[0], Stub().eps(on.x_0, 0))  # x_0 is not rescaled
    torch.testing.assert_close(trajectory.eps[1], f_at(200, on.x_0, trajectory.eps[0]))


def test_pian_starts_there_with_the_mean_absolute_value_of_gaussian_noise() -> None:
    pia, pian = searched("PIA", 200, 2), searched("PIAN", 200, 2)
    mean = pian.eps[0].abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean, torch.full((3,), math.sqrt(2 / math.pi), dtype=torch.float64))
    ratio = pian.eps[0] / pia.eps[0]  # the same direction, and one factor per picture
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand(SHAPE))
    assert (ratio > 0).all()
    torch.testing.assert_close(pian.eps[1], f_at(200, drawn(0), pian.eps[0]))
    torch.testing.assert_close(pian.eps[2], f_at(200, drawn(0), pian.eps[1]))  # only eps^0 is normalised


def test_gaussian_noise_is_normalised_already() -> None:
    eps = drawn(0, 1, 3, 256, 256)
    torch.testing.assert_close(normalised(eps), eps, rtol=0.01, atol=0)


def test_both_readings_of_secmi_agree_on_the_published_attack_only() -> None:
    at_x_0, at_x_t = searched("SecMI", 100, 2), searched("SecMI-xt", 100, 2)
    for p in (2, 4):
        assert torch.equal(at_x_0.distance(0, 1, p), at_x_t.distance(0, 1, p))
        assert not torch.allclose(at_x_0.distance(0, 2, p), at_x_t.distance(0, 2, p))


def test_secmi_goes_on_as_it_is_read() -> None:
    on = probe()
    x_t, eps_0, eps_1 = on.walk(100)
    _, at_x_0 = ATTACKS["SecMI"].search(on, 100)
    _, at_x_t = ATTACKS["SecMI-xt"].search(on, 100)
    torch.testing.assert_close(at_x_0(eps_1), f_at(110, on.x_0, eps_1))
    torch.testing.assert_close(at_x_t(eps_0), eps_1)  # around x_t the published second iterate is f(eps^0)
    torch.testing.assert_close(eps_0, Stub().eps(x_t, 100))


def test_secmi_as_released_compares_at_90_and_100() -> None:
    on = probe()
    searched("SecMI-released", ATTACKS["SecMI-released"].t, 1, on)
    assert on.denoiser.asked == [*range(0, 100, 10), 100]


MEASURED = [name for name, attack in ATTACKS.items() if not (isinstance(attack, Learned) or attack.gradients)]


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("t", [0, 7, 100, 350])
def test_an_attack_asks_the_model_as_often_as_it_says(name: str, t: int) -> None:
    for n in (1, 2, 3):
        on = probe()
        ATTACKS[name].measure(on, t, n)
        asked, said = len(on.denoiser.asked), ATTACKS[name].calls_at(t, n)
        assert asked == said or (t == 0 and asked < said)  # there two neighbouring timesteps are one
        assert max(on.denoiser.asked) <= t + ATTACKS[name].reach


def test_all_attacks_together_never_ask_the_model_the_same_twice() -> None:
    on, asked = probe(), []
    ask = on.denoiser.eps
    on.denoiser.eps = lambda x_t, t, condition: asked.append((t, x_t.numpy().tobytes())) or ask(x_t, t, condition)
    alone = 0
    for name in MEASURED:
        ATTACKS[name].measure(on, ATTACKS[name].t, 3)
        alone += ATTACKS[name].calls_at(ATTACKS[name].t, 3)
    blind = on.without_captions.calls  # the same picture without its caption is another question
    assert len(asked) - blind == len(set(asked)) == on.calls
    assert on.calls < 0.7 * alone


@pytest.mark.parametrize(("name", "base"), [("NA", 1), ("PIA", 2), ("PIAN", 2), ("SecMI", 12), ("SecMI-xt", 12)])
def test_one_more_step_costs_one_more_call(name: str, base: int) -> None:
    attack = ATTACKS[name]
    for n, calls in ((1, base), (2, base + 1)):
        on = probe()
        searched(name, attack.t, n, on)
        assert on.calls == calls


def test_attacks_on_one_batch_share_what_they_both_need() -> None:
    on = probe()
    for name in COMPARED:
        searched(name, ATTACKS[name].t, 3, on)
    alone = sum(ATTACKS[name].calls(ATTACKS[name].t) + 2 for name in COMPARED)
    assert (on.calls, alone) == (25, 39)


def test_sharing_changes_no_iterate() -> None:
    on = probe()
    for name in COMPARED:
        together, alone = searched(name, 100, 3, on), searched(name, 100, 3)
        assert all(map(torch.equal, together.eps, alone.eps))


# The ideal denoiser


@pytest.fixture(scope="session")
def ideal(pictures: Path) -> tuple[compute.Denoiser, Tensor]:
    """The closed-form model of six random pictures, far from each other, and these pictures."""
    denoiser = load(describe(Location(f"ideal:{pictures}")), Placement("cpu", "float32"))
    return denoiser, denoiser.encode(open_images(Location(pictures)).with_role("member").pixels(denoiser.profile))


@pytest.mark.parametrize("t", [50, 100, 200])
def test_at_a_lone_member_the_search_shrinks_the_noise_by_a_known_factor(ideal: tuple, t: int) -> None:
    denoiser, x_0 = ideal
    alpha, sigma = denoiser.coefficients(t)
    k = sigma**2 / (sigma**2 + alpha**2 * IDEAL_WIDTH**2)
    noise = drawn(0, *x_0.shape, dtype=torch.float32)
    trajectory = fixed_point(Probe(denoiser, x_0, None, lambda k: noise).map(t), [noise], 4)
    for n in range(5):
        torch.testing.assert_close(trajectory.eps[n], k**n * noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [100, 600, 900])
def test_the_ideal_noise_is_the_slope_of_the_density(ideal: tuple, t: int) -> None:
    denoiser, centres = ideal
    alpha, sigma = denoiser.coefficients(t)
    x = drawn(1, *centres.shape, dtype=torch.float64).requires_grad_()
    variance = alpha**2 * IDEAL_WIDTH**2 + sigma**2
    squared = torch.cdist(x.flatten(1), alpha * centres.double().flatten(1)) ** 2
    log_density = torch.logsumexp(-squared / (2 * variance), dim=1).sum()
    (slope,) = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(denoiser.eps(x.detach().float(), t).double(), -sigma * slope, rtol=1e-3, atol=1e-3)


def test_a_member_of_the_ideal_model_lies_closer_than_any_other_picture(pictures: Path) -> None:
    run = Run(
        model=Location(f"ideal:{pictures}"), images=Location(pictures), attacks=("PIA", "SecMI"), steps=2, batch=8
    )
    table = scores(plan(run), score(run))
    for _, group in table.groupby(["attack", "n"]):
        assert group.score[group.member].min() > group.score[~group.member].max()


# What a score may not depend on


@pytest.fixture(params=["ddpm", "ideal"])
def model(request: pytest.FixtureRequest, pipeline: Path, pictures: Path) -> Location:
    return Location(pipeline if request.param == "ddpm" else f"ideal:{pictures}")


def fresh(tmp_path: Path, model: Location, images: Path, **settings: object) -> dict[str, pd.DataFrame]:
    """The distances of a run that knows nothing yet, by attack, with the picture as index."""
    defaults = {"attacks": COMPARED, "t": 20, "batch": 5}
    run = Run(model=model, images=Location(images), **(defaults | settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMS_CACHE", str(tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"))
        return {name: rows.set_index("image") for name, rows in score(run).items()}


def assert_same(found: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> None:
    """Every bit of every distance of the pictures in `found`."""
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert len(rows) > 0
        pd.testing.assert_frame_equal(rows, expected[name].loc[rows.index], check_exact=True)


def copied(pictures: Path, to: Path, rename: Callable[[str], str], kept: int = 6) -> Path:
    for role in ("member", "nonmember"):
        (to / role).mkdir(parents=True)
        for path in sorted((pictures / role).iterdir())[-kept:]:
            shutil.copy(path, to / role / rename(path.name))
    return to


def test_the_same_run_gives_the_same_bits(tmp_path: Path, model: Location, pictures: Path) -> None:
    assert_same(fresh(tmp_path, model, pictures), fresh(tmp_path, model, pictures))


def test_a_score_does_not_depend_on_the_order(tmp_path: Path, model: Location, pictures: Path) -> None:
    turned = copied(pictures, tmp_path / "turned", lambda name: f"{9 - int(name[0])}.png")
    before, after = fresh(tmp_path, model, pictures), fresh(tmp_path, model, turned)
    assert list(before["NA"].index) != list(after["NA"].index)
    assert_same(after, before)


def test_a_score_does_not_depend_on_the_company(tmp_path: Path, model: Location, pictures: Path) -> None:
    few = copied(pictures, tmp_path / "few", str, kept=2)
    all_of_them = fresh(tmp_path, model, pictures)
    assert_same(fresh(tmp_path, model, few), all_of_them)
    assert_same(fresh(tmp_path, model, pictures, limit=3), all_of_them)


def test_a_score_does_not_depend_on_the_attacks_beside(tmp_path: Path, model: Location, pictures: Path) -> None:
    together = fresh(tmp_path, model, pictures)
    for name in COMPARED:
        alone = fresh(tmp_path, model, pictures, attacks=(name,))
        assert_same(alone, {name: together[name]})


def test_another_batch_size_changes_no_more_than_the_last_bits(tmp_path: Path, model: Location, pictures: Path) -> None:
    one, other = (fresh(tmp_path, model, pictures, batch=batch) for batch in (5, 12))
    for name in COMPARED:
        pd.testing.assert_frame_equal(one[name], other[name], rtol=1e-4)


def test_a_seed_decides_the_drawn_noise_and_nothing_else(tmp_path: Path, model: Location, pictures: Path) -> None:
    zero, one = (fresh(tmp_path, model, pictures, seed=seed) for seed in (0, 1))
    assert (zero["NA"] != one["NA"]).all(axis=None)
    assert_same({name: one[name] for name in COMPARED[1:]}, {name: zero[name] for name in COMPARED[1:]})


def test_the_drawn_noise_is_standard_normal_and_differs_between_pictures() -> None:
    x_0 = torch.zeros(40, 3, 32, 32)
    noise = compute.noise_like(x_0, [f"picture {k}" for k in range(30)], 0)
    flat = noise[:30].flatten(1)
    assert abs(flat.mean()) < 0.01
    assert abs(flat.std() - 1) < 0.01
    between = flat @ flat.T / flat.shape[1]
    assert (between - torch.eye(30)).abs().max() < 0.1
    assert noise[30:].abs().max() == 0  # padding


def test_the_global_random_state_is_neither_used_nor_changed(tmp_path: Path, model: Location, pictures: Path) -> None:
    torch.manual_seed(1)
    one = fresh(tmp_path, model, pictures, attacks=("NA",))
    state = torch.random.get_rng_state()
    assert_same(fresh(tmp_path, model, pictures, attacks=("NA",)), one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_last_batch_is_filled_up(monkeypatch: pytest.MonkeyPatch, pipeline: Path, pictures: Path) -> None:
    sizes = []
    asked = Probe.eps
    monkeypatch.setattr(Probe, "eps", lambda self, x_t, t: sizes.append(len(x_t)) or asked(self, x_t, t))
    signals = score(Run(model=Location(pipeline), images=Location(pictures), attacks=("NA",), batch=5, steps=1))
    assert sizes == [5, 5, 5]  # twelve pictures
    assert len(signals["NA"]) == 12


# What is known


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded although everything is known")


def test_fewer_steps_are_served_from_more_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipeline: Path, pictures: Path
) -> None:
    run = {"model": Location(pipeline), "images": Location(pictures), "batch": 5, "t": 20}
    many = score(Run(**run, steps=4))
    computed = {steps: fresh(tmp_path, Location(pipeline), pictures, steps=steps) for steps in (1, 2, 3)}
    monkeypatch.setattr(compute, "loaded", no_model)
    for steps, expected in computed.items():
        few = score(Run(**run, steps=steps))
        for name in COMPARED:
            wanted = ["image", *ATTACKS[name].columns(steps)]
            assert list(few[name]) == wanted
            pd.testing.assert_frame_equal(few[name], many[name][wanted], check_exact=True)
        assert_same({name: rows.set_index("image") for name, rows in few.items()}, expected)


def test_what_is_kept_is_what_was_computed(monkeypatch: pytest.MonkeyPatch, model: Location, pictures: Path) -> None:
    run = Run(model=model, images=Location(pictures), batch=5, steps=2)
    first = score(run)
    monkeypatch.setattr(compute, "loaded", no_model)
    again = score(run)
    for name in COMPARED:
        pd.testing.assert_frame_equal(again[name], first[name], check_exact=True)


@pytest.mark.parametrize("change", [{"seed": 1}, {"t": 99}, {"steps": 4}, {"batch": 6}, {"limit": 4}])
def test_another_question_is_not_answered_by_what_is_kept(pipeline: Path, pictures: Path, change: dict) -> None:
    run = {"model": Location(pipeline), "images": Location(pictures), "attacks": ("NA",), "batch": 5, "t": 100}
    score(Run(**run))
    assert lookup(plan(Run(**run)))
    assert lookup(plan(Run(**(run | change)))) == {}


class Stopped(Exception):
    """What a cancelled run raises from its tick."""


def test_a_stopped_run_goes_on_from_its_last_finished_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipeline: Path, pictures: Path
) -> None:
    monkeypatch.setattr(compute, "SHARD", 4)
    run = Run(model=Location(pipeline), images=Location(pictures), batch=4, t=20)

    def stop(progress: compute.Progress) -> None:
        if progress.done > 4:
            raise Stopped

    with pytest.raises(Stopped):
        score(run, stop)
    assert lookup(plan(run)) == {}
    batches = []
    signals_of = compute.signals_of
    monkeypatch.setattr(compute, "signals_of", lambda *given: batches.append(1) or signals_of(*given))
    ticks = []
    resumed = score(run, lambda progress: ticks.append(progress.done))
    assert ticks == [4, 8, 12]
    assert len(batches) == 2
    whole = fresh(tmp_path, Location(pipeline), pictures, batch=4)
    assert_same({name: rows.set_index("image") for name, rows in resumed.items()}, whole)


def test_a_damaged_result_is_computed_again_to_the_same_bits(pipeline: Path, pictures: Path) -> None:
    run = Run(model=Location(pipeline), images=Location(pictures), attacks=("PIA",), batch=5)
    first = score(run)["PIA"]
    ((_, folder),) = variants(plan(run).tasks[0].key)
    path = part(folder, 0)
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    pd.testing.assert_frame_equal(score(run)["PIA"], first, check_exact=True)
    assert lookup(plan(run))


def test_a_score_is_a_distance_turned_round(pipeline: Path, pictures: Path) -> None:
    run = Run(model=Location(pipeline), images=Location(pictures), batch=5)
    signals, planned = score(run), plan(run)
    table = scores(planned, signals)
    assert len(table) == 12 * len(COMPARED) * run.steps
    for (name, n), group in table.groupby(["attack", "n"]):
        distance = signals[name].set_index("image")[f"d(0,{n}) p={ATTACKS[name].p}"]
        assert (group.score.to_numpy() == -distance.loc[group.image].to_numpy()).all()
    roles = planned.images.table.set_index("image").role
    assert (roles.loc[table.image].eq("member").to_numpy() == table.member.to_numpy()).all()
