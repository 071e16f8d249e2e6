"""The search for the training noise (Sec. 3.3): a start, a map, and a number of steps.

| symbol           | meaning                                                   | equation |
|------------------|-----------------------------------------------------------|----------|
| x_t              | alpha_t x_0 + sigma_t eps                                 | 2        |
| f(eps)           | eps_theta(x_t, t), whose fixed point is searched          | 6        |
| eps^n            | f(eps^(n-1))                                              | 7        |
| delta^n          | eps^n - eps^(n-1), the residual                           | 8        |
| d(i, j)          | ||eps^i - eps^j||_p; d(0, 1) is the published attack, d(0, 2) the attack with One More Step | 9 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Map = Callable[["Tensor"], "Tensor"]
Advance = Callable[[list["Tensor"]], "Tensor"]  # from the iterates so far to the next one
Scheme = Callable[[Map], Advance]


def diffuse(x_0: Tensor, eps: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
    """x_t, the picture with noise (Eq. 2); all of shape (B, C, H, W)."""
    return alpha_t * x_0 + sigma_t * eps


def predicted_x_0(x_t: Tensor, eps: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
    """The picture that remains when the noise is taken away (Eq. 2 solved for x_0)."""
    return (x_t - sigma_t * eps) / alpha_t


def picard(f: Map) -> Advance:
    """eps^n = f(eps^(n-1)) (Eq. 7)."""
    return lambda eps: f(eps[-1])


def fixed_point(f: Map, given: Iterable[Tensor], n: int, scheme: Scheme = picard) -> Trajectory:
    """Go on from the given iterates up to eps^n, by plain iteration (Eq. 7) unless another scheme is named."""
    eps, advance = list(given), scheme(f)
    while len(eps) <= n:
        eps.append(advance(eps))
    return Trajectory(tuple(eps))


@dataclass(frozen=True)
class Trajectory:
    """The iterates eps^0 ... eps^N of a batch, each of shape (B, C, H, W)."""

    eps: tuple[Tensor, ...]

    def residual(self, n: int) -> Tensor:
        """delta^n = eps^n - eps^(n-1) (Eq. 8), (B, C, H, W)."""
        return self.eps[n] - self.eps[n - 1]

    def distance(self, i: int, j: int, p: float) -> Tensor:
        """d(i, j) = ||eps^i - eps^j||_p for each picture (Eq. 9), (B,) float32."""
        return norm(self.difference(i, j), p)

    def difference(self, i: int, j: int) -> Tensor:
        """eps^i - eps^j, (B, C H W) float32."""
        return (self.eps[i].float() - self.eps[j].float()).flatten(1)


def norm(difference: Tensor, p: float) -> Tensor:
    """The p-norm of each row of (B, D), (B,)."""
    import torch

    if p == 4:  # far faster than a general power
        return difference.square().square().sum(dim=1).sqrt().sqrt()
    return torch.linalg.vector_norm(difference, p, dim=1)
