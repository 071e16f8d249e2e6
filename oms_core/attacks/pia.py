"""PIA and PIAN: the noise that the model sees in the clean picture as start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from oms_core.attacks.base import Search

if TYPE_CHECKING:
    from torch import Tensor


def normalised(eps: Tensor) -> Tensor:
    """Scale each picture's noise to the mean absolute value of N(0, I), sqrt(2 / pi)."""
    dims = tuple(range(1, eps.ndim))
    return eps / eps.abs().mean(dim=dims, keepdim=True) * math.sqrt(2 / math.pi)


PIA = Search(
    name="PIA",
    title="Proximal initialisation attack",
    search=lambda probe, t: ((probe.eps_of_x_0,), probe.map(t)),
    p=4,
    t=200,
    calls=lambda t: 2,
    source="Kong et al. (2023); Eq. E.4, E.5",
)

PIAN = Search(
    name="PIAN",
    title="Proximal initialisation attack, normalised",
    search=lambda probe, t: ((normalised(probe.eps_of_x_0),), probe.map(t)),
    p=4,
    t=200,
    calls=lambda t: 2,
    source="Kong et al. (2023); Sec. 4.2",
)
