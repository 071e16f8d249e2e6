"""SecMI: the noise at the end of a deterministic DDIM walk as start.

`eps^1` is the model's answer at x_k, the DDIM step from x_t to k = t + 10. From there Eq. E.8 can be read in
two ways: the search goes on around x_0, as the equation is written, or around x_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oms_core import ddim
from oms_core.attacks.base import SECMI_STRIDE, Probe, Search

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.search import Map


def anchored_at_x_0(probe: Probe, t: int) -> tuple[tuple[Tensor, ...], Map]:
    """Go on with eps_theta(alpha_k x_0 + sigma_k eps, k)."""
    _, eps_0, eps_1 = probe.walk(t)
    return (eps_0, eps_1), probe.map(t + SECMI_STRIDE)


def anchored_at_x_t(probe: Probe, t: int) -> tuple[tuple[Tensor, ...], Map]:
    """Go on with eps_theta at the DDIM step from x_t to k along eps."""
    x_t, eps_0, eps_1 = probe.walk(t)
    k = t + SECMI_STRIDE
    at, to = probe.coefficients(t), probe.coefficients(k)
    return (eps_0, eps_1), lambda eps: probe.eps(ddim.step(x_t, eps, at, to), k)


def calls(t: int) -> int:
    """One per stop of the walk from 0 to t, and one at k."""
    return len(ddim.stops(t)) + 1


SECMI = Search(
    name="SecMI",
    title="SecMI, anchored at x_0",
    search=anchored_at_x_0,
    p=2,
    given=2,
    t=100,
    calls=calls,
    reach=SECMI_STRIDE,
    source="Duan et al. (2023); Eq. E.6-E.8",
)

SECMI_X_T = Search(
    name="SecMI-xt",
    title="SecMI, anchored at x_t",
    search=anchored_at_x_t,
    p=2,
    given=2,
    t=100,
    calls=calls,
    reach=SECMI_STRIDE,
    source="Duan et al. (2023); Eq. E.6-E.8, the second reading",
)

SECMI_RELEASED = Search(
    name="SecMI-released",
    title="SecMI (as released)",
    search=anchored_at_x_0,
    p=2,
    given=2,
    t=90,
    calls=calls,
    reach=SECMI_STRIDE,
    source="Duan et al. (2023); the published script compares at 90 -> 100 -> 90",
)
