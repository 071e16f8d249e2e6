"""Ways to search for a fixed point beyond plain iteration, which the paper names as future work (App. G).

Every scheme takes a map f and returns how the next iterate follows from those so far; see
`oms_core.search.fixed_point`, which runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oms_core.search import Advance, Map, Scheme, picard

if TYPE_CHECKING:
    from torch import Tensor

HALF = 0.5
DEPTH = 3  # how many differences Anderson's scheme remembers
ROUNDING = 10  # machine epsilons of an answer's norm


def averaged(f: Map, eps: Tensor, weight: float) -> Tensor:
    """(1 - weight) eps + weight f(eps)."""
    return eps + weight * (f(eps) - eps)


def krasnoselskij(f: Map) -> Advance:
    """Averaging with a fixed weight 1/2 (Krasnoselskij, 1955)."""
    return lambda eps: averaged(f, eps[-1], HALF)


def mann(f: Map) -> Advance:
    """Averaging with a falling weight, 1 / (n + 1) on the way to eps^n (Mann, 1953)."""
    return lambda eps: averaged(f, eps[-1], 1 / (len(eps) + 1))


def ishikawa(f: Map) -> Advance:
    """Two calls per step: average with the answer at an average, both with weight 1/2 (Ishikawa, 1974)."""

    def advance(eps: list[Tensor]) -> Tensor:
        between = averaged(f, eps[-1], HALF)
        return eps[-1] + HALF * (f(between) - eps[-1])

    return advance


def anderson(f: Map) -> Advance:
    """Mix the last answers so that their residuals cancel in least squares (Anderson, 1965; Walker & Ni, 2011).

    Differences of residuals that are no more than rounding have no part in it; without any this is plain iteration.
    """
    answers: list[Tensor] = []

    def advance(eps: list[Tensor]) -> Tensor:
        import torch

        answers.append(f(eps[-1]))
        kept, exact = min(len(answers), DEPTH + 1), torch.promote_types(eps[-1].dtype, torch.float32)
        asked, g = (torch.stack(given[-kept:], dim=1).flatten(2).to(exact) for given in (eps, answers))  # (B, m + 1, D)
        noise = ROUNDING * torch.finfo(eps[-1].dtype).eps * g[:, -1].norm(dim=1)
        r = g - asked
        weights = r[:, -1:] @ torch.linalg.pinv(r.diff(dim=1), atol=noise)  # (B, 1, m)
        mixed = g[:, -1:] - weights @ g.diff(dim=1)
        return mixed.view_as(eps[-1]).to(eps[-1].dtype)

    return advance


@dataclass(frozen=True)
class Listed:
    """A scheme with what people must know of it.

    Attributes:
        title: how it is called.
        advance: the scheme itself.
        calls: model calls per step.
    """

    title: str
    advance: Scheme
    calls: int = 1


SCHEMES = {
    "picard": Listed("Picard, the paper's", picard),
    "krasnoselskij": Listed("Krasnoselskij", krasnoselskij),
    "mann": Listed("Mann", mann),
    "ishikawa": Listed("Ishikawa", ishikawa, 2),
    "anderson": Listed("Anderson", anderson),
}
