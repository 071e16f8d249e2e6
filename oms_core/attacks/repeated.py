"""What the same number of model calls buys without One More Step: the published attack, repeated and averaged.

An attack here is compared with the search that it repeats: after n "steps" both have asked the model equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oms_core.attacks.base import SECMI_STRIDE, Attack, Probe, Search, Signal
from oms_core.attacks.naive import NA
from oms_core.attacks.pia import PIA, PIAN
from oms_core.attacks.secmi import SECMI
from oms_core.search import Trajectory

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

NEAR = (0, -50, 50)  # timesteps asked besides t
Pair = tuple["Tensor", "Tensor"]  # eps^0 and eps^1


@dataclass(frozen=True, kw_only=True)
class Repeated(Attack):
    """The mean of several first residuals d(0, 1).

    Attributes:
        of: the attack that is repeated.
        repeat: eps^0 and eps^1 of the k-th repetition, from a probe, t and k = 0, 1, ...
    """

    of: Search
    repeat: Callable[[Probe, int, int], Pair]

    def columns(self, steps: int) -> list[str]:
        """One per repetition."""
        return [f"d(0,1) #{k}" for k in range(1, min(steps, self.most) + 1)]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """The first residual of every repetition, in the norm of the attack."""
        pairs = (self.repeat(probe, t, k) for k in range(min(steps, self.most)))
        distances = (Trajectory(pair).distance(0, 1, self.of.p) for pair in pairs)
        return dict(zip(self.columns(steps), distances, strict=True))

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """Minus the mean of the first n."""
        return -rows[self.columns(n)].mean(axis=1).to_numpy()


def another_draw(probe: Probe, t: int, k: int) -> Pair:
    """NA with the k-th noise."""
    eps = probe.noise if k == 0 else probe.draw(k)
    return eps, probe.map(t)(eps)


def another_timestep(of: Search) -> Callable[[Probe, int, int], Pair]:
    """PIA or PIAN at a neighbouring timestep; the start is asked for once."""

    def repeat(probe: Probe, t: int, k: int) -> Pair:
        (eps,), f = of.search(probe, max(1, t + NEAR[k]))
        return eps, f(eps)

    return repeat


def another_k(probe: Probe, t: int, k: int) -> Pair:
    """SecMI's t-error at k = t + 10, t + 20, ...; the walk to t is made once."""
    x_t, eps_0, eps_1 = probe.walk(t)
    if k == 0:
        return eps_0, eps_1
    return eps_0, probe.step_from(x_t, eps_0, t, t + (k + 1) * SECMI_STRIDE)


def repeated(of: Search, what: str, repeat: Callable[[Probe, int, int], Pair], reach: int = 0) -> Repeated:
    """The repetition of an attack."""
    return Repeated(
        name=f"{of.name}-repeated",
        title=f"{of.title}, {what} averaged",
        of=of,
        repeat=repeat,
        t=of.t,
        shown_as=of.name,
        calls=of.calls,
        reach=reach,
        most=len(NEAR),
        source=f"{of.source}; a baseline of equal budget",
    )


NA_REPEATED = repeated(NA, "several draws", another_draw)
PIA_REPEATED = repeated(PIA, "several timesteps", another_timestep(PIA), max(NEAR))
PIAN_REPEATED = repeated(PIAN, "several timesteps", another_timestep(PIAN), max(NEAR))
SECMI_REPEATED = repeated(SECMI, "several distances", another_k, len(NEAR) * SECMI_STRIDE)
