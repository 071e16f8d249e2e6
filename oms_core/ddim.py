"""Deterministic DDIM (Song et al., 2020), which PIA and SecMI are built on (Eq. E.3, E.6, E.7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from oms_core.search import diffuse, predicted_x_0

if TYPE_CHECKING:
    from torch import Tensor

Coefficients = tuple[float, float]


def step(x_s: Tensor, eps: Tensor, at: Coefficients, to: Coefficients) -> Tensor:
    """Move x_s to another timestep along the noise eps, forwards (Eq. E.6) or backwards (Eq. E.7).

    `at` and `to` are (alpha, sigma) of the two timesteps; shapes are (B, C, H, W).
    """
    return diffuse(predicted_x_0(x_s, eps, *at), eps, *to)


def stops(t: int, stride: int = 10) -> list[int]:
    """The timesteps of the walk 0, stride, 2 stride, ... that ends at t."""
    return [*range(0, t, stride), t]


def walk(
    x_0: Tensor, t: int, eps: Callable[[Tensor, int], Tensor], coefficients: Callable[[int], Coefficients]
) -> Tensor:
    """Carry x_0, taken as the picture at timestep 0, deterministically to x_t (Eq. E.6)."""
    x = x_0
    for at, to in pairwise(stops(t)):
        x = step(x, eps(x, at), coefficients(at), coefficients(to))
    return x


def t_error_factor(at: Coefficients, to: Coefficients) -> float:
    """c of the t-error c ||eps^0 - eps^1|| (Eq. E.8), with `at` the coefficients of t and `to` those of k.

    0.0327525 for t = 100, k = 110 in the linear schedule from 1e-4 to 0.02. It does not change a ranking.
    """
    (alpha_t, sigma_t), (alpha_k, sigma_k) = at, to
    return math.fsum((alpha_t * sigma_k, -alpha_k * sigma_t)) / alpha_k
