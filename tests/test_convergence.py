"""The Jacobian norm, and every scheme of searching, against linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor

from oms_core.attacks import Probe
from oms_core.attacks.jacobian import JACOBIAN, PER_STEP
from oms_core.catalog import describe
from oms_core.convergence import MOST, jacobian_norm
from oms_core.decode import Profile
from oms_core.denoiser import Denoiser
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.location import Location
from oms_core.schemes import DEPTH, SCHEMES
from oms_core.search import Map, diffuse, fixed_point

CPU = Placement("cpu", "float32")
SHAPE = (3, 1, 4, 4)
SIZE = 16  # numbers in a picture


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turned(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with given singular values, (B, D, D), or one for all pictures, (1, D, D)."""
    left, right = (torch.linalg.qr(drawn(seed + k, SIZE, SIZE)).Q for k in (0, 1))
    return left @ torch.diag_embed(values) @ right.mT


def symmetric(values: Tensor) -> Tensor:
    """A matrix with given eigenvalues, (D, D)."""
    basis = torch.linalg.qr(drawn(5, SIZE, SIZE)).Q
    return basis @ torch.diag(values) @ basis.mT


def affine(matrix: Tensor, offset: Tensor | float = 0.0) -> Map:
    """eps -> matrix eps + offset, picture by picture."""
    return lambda eps: (eps.flatten(1)[:, None] @ matrix.mT.to(eps))[:, 0].view_as(eps) + offset


def spread(low: float, high: float) -> Tensor:
    return torch.linspace(high, low, SIZE, dtype=torch.float64)


# The Jacobian norm


def test_the_norm_of_a_linear_map_is_its_largest_singular_value() -> None:
    largest = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64)
    f = affine(turned(largest[:, None] * spread(0, 1)), drawn(9))
    norm = jacobian_norm(f, drawn(2))
    assert (norm.value.shape, norm.value.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(norm.value.double(), largest, rtol=0.01, atol=0)
    assert (norm.value <= largest * (1 + 1e-6)).all()
    stretched = f(norm.direction.view(SHAPE).double()) - f(torch.zeros(SHAPE, dtype=torch.float64))
    torch.testing.assert_close(norm.direction.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(stretched.flatten(1).norm(dim=1).float(), norm.value)


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 3.0])
def test_a_map_that_stretches_all_noise_alike_needs_two_products(factor: float) -> None:
    norm = jacobian_norm(lambda eps: factor * eps + 1, drawn(0))
    torch.testing.assert_close(norm.value, torch.full((3,), abs(factor)))
    assert norm.products <= 2


def test_a_map_of_few_numbers_is_not_asked_for_more_directions_than_there_are() -> None:
    matrix = torch.tensor([[1.0, 0.2], [0.0, 0.5]])
    norm = jacobian_norm(lambda eps: (eps.flatten(1) @ matrix.T).view_as(eps), torch.zeros(1, 1, 1, 2))
    assert norm.products <= 2
    assert norm.value.item() == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-5)


def test_where_a_map_bends_its_norm_is_that_of_the_tangent() -> None:
    weight = turned(spread(0.1, 1.5))[None]
    eps = drawn(3)
    slope = torch.cos(affine(weight)(eps)).flatten(1)  # of the sine
    expected = torch.linalg.matrix_norm(slope[:, :, None] * weight, 2)
    norm = jacobian_norm(lambda eps: torch.sin(affine(weight)(eps)), eps)
    torch.testing.assert_close(norm.value.double(), expected, rtol=0.01, atol=0)


def test_a_good_start_saves_products_and_changes_nothing_else() -> None:
    f, eps = affine(turned(spread(0.5, 1))), drawn(2)
    cold = jacobian_norm(f, eps)
    warm = jacobian_norm(f, eps, cold.direction)
    assert warm.products < cold.products
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-3, atol=0)


def test_the_number_of_products_is_bounded() -> None:
    diagonal = torch.linspace(0.5, 1, 10_000).view(1, 1, 100, 100) ** 0.1
    assert jacobian_norm(lambda eps: diagonal * eps, torch.zeros(1, 1, 100, 100)).products <= MOST


def test_the_norm_of_a_picture_does_not_depend_on_its_company() -> None:
    matrices = turned(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) * spread(0, 1) ** 3)
    norm = jacobian_norm(affine(matrices), drawn(2))
    others = jacobian_norm(affine(torch.stack([matrices[0], matrices[0] * 0, symmetric(spread(0.98, 1))])), drawn(2))
    assert others.products != norm.products
    assert torch.equal(others.value[0], norm.value[0])
    assert torch.equal(others.direction[0], norm.direction[0])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_the_norm_of_a_map_in_half_precision_is_found(dtype: torch.dtype) -> None:
    norm = jacobian_norm(affine(turned(spread(0, 1.2))[None]), drawn(2, dtype=dtype))
    torch.testing.assert_close(norm.value, torch.full((3,), 1.2), rtol=0.03, atol=0)


def test_a_derivative_that_is_not_finite_is_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match="not finite") as refused:
        jacobian_norm(torch.sqrt, torch.zeros(SHAPE))
    assert str(refused.value).endswith(".")


KINDS = ("ddpm", "ddpm-digits", "uvit", "stable_diffusion", "dit", "pixart", "sd3", "ideal")


@pytest.fixture(scope="module", params=KINDS)
def denoiser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Denoiser:
    if request.param in ("ddpm", "ddpm-digits"):
        return load(describe(Location(pipeline) if request.param == "ddpm" else request.param), CPU)
    if request.param == "ideal":
        return load(describe("ideal:digits"), CPU)
    folder = tmp_path_factory.mktemp("models") / request.param
    return load(describe(Location(getattr(tiny, f"save_{request.param}")(folder))), CPU)


def map_of(denoiser: Denoiser, t: int) -> tuple[Map, Tensor]:
    """The map of two random pictures, and a noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *denoiser.profile.size, denoiser.profile.channels), np.uint8)
    x_0, condition = denoiser.encode(pixels), denoiser.condition(["", "a cat"])
    f = Probe(denoiser, x_0, condition, lambda k: x_0).differentiable_map(t)
    return f, drawn(1, *x_0.shape, dtype=torch.float32)


@pytest.mark.parametrize("t", [100, 350])
def test_the_norm_is_that_of_the_whole_jacobian_for_every_family(denoiser: Denoiser, t: int) -> None:
    f, eps = map_of(denoiser, t)
    whole = torch.autograd.functional.jacobian(f, eps).flatten(5).flatten(1, 3)  # (B, D, B, D)
    expected = torch.stack([torch.linalg.matrix_norm(whole[k, :, k], 2) for k in (0, 1)])
    with torch.no_grad():
        torch.testing.assert_close(jacobian_norm(f, eps).value, expected, rtol=0.01, atol=0)


# As an attack


class Gaussian:
    """The exact denoiser of one Gaussian of width tau around zero: f shrinks the noise by a known factor."""

    fingerprint, profile, timesteps = "gaussian", Profile((4, 4), 1), 1000

    def __init__(self, tau: float) -> None:
        self.tau, self.asked = tau, 0

    def coefficients(self, t: int) -> tuple[float, float]:
        return math.cos(t / 1000), math.sin(t / 1000)

    def factor(self, t: int) -> float:
        alpha, sigma = self.coefficients(t)
        return sigma**2 / (sigma**2 + alpha**2 * self.tau**2)

    def eps(self, x_t: Tensor, t: int, condition: object = None) -> Tensor:
        self.asked += 1
        return self.factor(t) / self.coefficients(t)[1] * x_t


class Bent(Gaussian):
    """A denoiser whose map contracts by another factor at every iterate."""

    def eps(self, x_t: Tensor, t: int, condition: object = None) -> Tensor:
        return torch.tanh(2 * super().eps(x_t, t).roll(1, dims=-1)) + x_t / 5


def probe(denoiser: Gaussian | None = None) -> Probe:
    return Probe(denoiser or Bent(0.5), drawn(0), None, lambda k: drawn(1 + k))


@pytest.mark.parametrize("t", [50, 300, 900])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_before_a_gaussian_the_norm_is_the_known_factor(t: int, tau: float) -> None:
    on = probe(Gaussian(tau))
    signal = JACOBIAN.measure(on, t, 3)
    assert list(signal) == JACOBIAN.columns(3)
    for values in signal.values():
        torch.testing.assert_close(values, torch.full((3,), on.denoiser.factor(t)), rtol=1e-4, atol=1e-6)


def test_the_attack_measures_at_every_iterate() -> None:
    on = probe()
    f, signal = on.differentiable_map(300), JACOBIAN.measure(on, 300, 4)
    eps = fixed_point(f, [on.noise], 4).eps
    for n in range(4):  # a direction from before may make it stop a little early
        torch.testing.assert_close(signal[f"jacobian n={n}"], jacobian_norm(f, eps[n]).value, rtol=0.02, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_are_a_part_of_more(steps: int) -> None:
    many, few = JACOBIAN.measure(probe(), 300, 4), JACOBIAN.measure(probe(), 300, steps)
    assert list(few) == JACOBIAN.columns(steps)
    assert all(torch.equal(values, many[name]) for name, values in few.items())


def test_a_smaller_norm_where_the_step_is_taken_is_a_higher_score() -> None:
    rows = pd.DataFrame({"jacobian n=0": [0.9, 0.5], "jacobian n=1": [0.2, 0.4]})
    assert JACOBIAN.score(rows, 1).tolist() == [-0.9, -0.5]
    assert JACOBIAN.score(rows, 2).tolist() == [-0.2, -0.4]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_attack_asks_no_more_than_it_says(steps: int) -> None:
    on = probe()
    JACOBIAN.measure(on, 300, steps)
    assert on.denoiser.asked == 2 * steps
    assert JACOBIAN.calls_at(300, steps) == steps * PER_STEP == steps * (2 + 2 * MOST)


# Schemes


def searched(scheme: str, f: Map, n: int, start: Tensor | None = None) -> tuple[Tensor, ...]:
    return fixed_point(f, [drawn(1) if start is None else start], n, SCHEMES[scheme].advance).eps


def far(eps: Tensor, fixed: Tensor) -> float:
    return float((eps - fixed).norm() / fixed.norm())


def fixed_of(matrix: Tensor, offset: Tensor) -> Tensor:
    """Where eps = matrix eps + offset."""
    solved = torch.linalg.solve(torch.eye(SIZE, dtype=torch.float64) - matrix, offset.flatten(1)[..., None])
    return solved.view_as(offset)


def factors(scheme: str, value: Tensor, n: int) -> Tensor:
    """By how much a scheme shrinks the error along an eigenvector of a linear map in n steps."""
    mann = torch.stack([1 - (1 - value) / (k + 1) for k in range(1, n + 1)]).prod(dim=0)
    ishikawa = 0.5 + value * (1 + value) / 4
    return {"picard": value**n, "krasnoselskij": ((1 + value) / 2) ** n, "mann": mann, "ishikawa": ishikawa**n}[scheme]


@pytest.mark.parametrize("scheme", ["picard", "krasnoselskij", "mann", "ishikawa"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_scheme_shrinks_the_error_along_every_eigenvector_as_its_formula_says(scheme: str, n: int) -> None:
    values = spread(-1.2, 0.9)
    basis = torch.linalg.qr(drawn(5, SIZE, SIZE)).Q
    matrix, offset = symmetric(values), drawn(6)
    fixed = fixed_of(matrix, offset)
    before = (drawn(1) - fixed).flatten(1) @ basis
    after = (searched(scheme, affine(matrix, offset), n)[n] - fixed).flatten(1) @ basis
    torch.testing.assert_close(after, factors(scheme, values, n) * before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_settles_at_the_fixed_point_of_a_contraction(scheme: str) -> None:
    matrix, offset = symmetric(spread(-0.6, 0.5)), drawn(6)
    fixed = fixed_of(matrix, offset)
    error = [far(eps, fixed) for eps in searched(scheme, affine(matrix, offset), 200)]
    assert error[-1] < min(1e-1, error[20], error[0] / 20)
    if scheme != "mann":  # whose error falls by a power of n only
        assert error[60] < 1e-7


@pytest.mark.parametrize("lowest", [-1.0, -1.5])
@pytest.mark.parametrize("scheme", ["krasnoselskij", "mann", "ishikawa"])
def test_averaging_settles_where_plain_iteration_swings(scheme: str, lowest: float) -> None:
    matrix, offset = symmetric(spread(lowest, 0.4)), drawn(6)
    fixed = fixed_of(matrix, offset)
    plain, averaged = (searched(name, affine(matrix, offset), 60)[-1] for name in ("picard", scheme))
    assert far(averaged, fixed) < 0.1 < far(plain, fixed)


@pytest.mark.parametrize("kinds", range(1, DEPTH + 1))
def test_anderson_solves_a_linear_problem_of_few_kinds_of_error_in_one_step_more(kinds: int) -> None:
    different = torch.tensor([0.9, -0.7, 1.6][:kinds], dtype=torch.float64)  # as GMRES; it need not contract
    matrix, offset = symmetric(different.repeat(SIZE)[:SIZE]), drawn(6)
    fixed = fixed_of(matrix, offset)
    eps = searched("anderson", affine(matrix, offset), kinds + 1)
    assert far(eps[kinds + 1], fixed) < 1e-10
    assert far(eps[kinds], fixed) > 1e-3


def test_anderson_is_far_ahead_of_plain_iteration_on_a_slow_contraction() -> None:
    matrix, offset = symmetric(spread(0.5, 0.95)), drawn(6)
    fixed = fixed_of(matrix, offset)
    ahead, behind = (searched(name, affine(matrix, offset), 20)[-1] for name in ("anderson", "picard"))
    assert far(ahead, fixed) < far(behind, fixed) / 20


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_anderson_stays_at_a_fixed_point_once_it_is_there(factor: float, dtype: torch.dtype) -> None:
    offset = drawn(6, dtype=dtype)
    eps = searched("anderson", lambda eps: factor * eps + offset, 12, drawn(1, dtype=dtype))
    precision = 20 * torch.finfo(dtype).eps
    for later in eps[3:]:
        assert later.dtype == dtype
        torch.testing.assert_close(later, offset / (1 - factor), rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [torch.half, torch.float32, torch.float64])
def test_anderson_goes_on_plainly_where_residuals_stay_the_same(dtype: torch.dtype) -> None:
    offset = drawn(6, dtype=dtype)  # eps + offset has no fixed point
    eps = searched("anderson", lambda eps: eps + offset, 8, drawn(1, dtype=dtype))
    torch.testing.assert_close(eps[8], drawn(1, dtype=dtype) + 8 * offset, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_calls_as_often_per_step_as_it_says(scheme: str) -> None:
    asked = []

    def f(eps: Tensor) -> Tensor:
        asked.append(1)
        return eps.tanh()

    for given in ([drawn(1)], [drawn(1), drawn(2)]):
        asked.clear()
        fixed_point(f, given, 5, SCHEMES[scheme].advance)
        assert len(asked) == SCHEMES[scheme].calls * (6 - len(given))


def test_the_papers_scheme_is_the_map_and_nothing_else() -> None:
    f, eps = torch.tanh, drawn(1)
    for found in searched("picard", f, 5):
        assert torch.equal(found, eps)
        eps = f(eps)


def bent(x_0: Tensor) -> Map:
    """A map that is not linear, of the shape that attacks iterate."""
    return lambda eps: x_0 + torch.sin(diffuse(x_0, eps.roll(1, dims=-1), 0.6, 0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_picture_is_searched_alone_as_in_company(scheme: str, dtype: torch.dtype) -> None:
    x_0, start = drawn(0, dtype=dtype), drawn(1, dtype=dtype)
    together = searched(scheme, bent(x_0), 6, start)
    for k in range(3):
        alone = searched(scheme, bent(x_0[k : k + 1]), 6, start[k : k + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("company", [lambda eps: eps * 0, lambda eps: eps * 1e6], ids=["empty", "huge"])
def test_other_pictures_in_a_batch_change_no_bit(scheme: str, company: Callable[[Tensor], Tensor]) -> None:
    x_0, start = drawn(0, dtype=torch.float32), drawn(1, dtype=torch.float32)
    others, elsewhere = (torch.cat([given[:1], company(given[1:])]) for given in (x_0, start))
    before, after = searched(scheme, bent(x_0), 6, start), searched(scheme, bent(others), 6, elsewhere)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(before, after, strict=True))
