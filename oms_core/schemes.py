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


def averaged(f: Map, eps: Tensor, weight: float) -> Tensor:
    """(1 - weight) eps + weight f(eps)."""
    return eps + weight * (f(eps) - eps)


def krasnoselskij(f: Map) -> Advance:
    """Averaging with a fixed weight 1/2 (Krasnoselskij, 1955)."""
    return lambda eps: averaged(f, eps[-1], HALF)


def mann(f: Map) -> Advance:
    """Averaging with the falling weight 1 / (n + 1) (Mann, 1953)."""
    return lambda eps: averaged(f, eps[-1], 1 / (len(eps) + 1))


def ishikawa(f: Map) -> Advance:
    """Two calls per step: average with the answer at an average, both with weight 1/2 (Ishikawa, 1974)."""

    def advance(eps: list[Tensor]) -> Tensor:
        between = averaged(f, eps[-1], HALF)
        return eps[-1] + HALF * (f(between) - eps[-1])

    return advance


def anderson(f: Map) -> Advance:
    """Mix the last answers so that their residuals cancel in least squares (Anderson, 1965; Walker & Ni, 2011)."""
    asked: list[Tensor] = []
    answers: list[Tensor] = []

    def advance(eps: list[Tensor]) -> Tensor:
        import torch

        asked.append(eps[-1])
        answers.append(f(eps[-1]))
        if len(answers) == 1:
            return answers[-1]
        g = torch.stack(answers[-DEPTH - 1 :]).flatten(2).transpose(0, 1).double()  # (B, m + 1, D)
        r = g - torch.stack(asked[-DEPTH - 1 :]).flatten(2).transpose(0, 1).double()
        dg, dr = g.diff(dim=1), r.diff(dim=1)  # (B, m, D)
        gram = dr @ dr.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
        regular = gram + 1e-10 * scale * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(regular, dr @ r[:, -1:].mT)  # (B, m, 1)
        mixed = g[:, -1] - (dg.mT @ weights)[..., 0]
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
