"""The Jacobian norm as a score: does the map contract more around a picture it was trained on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from oms_core.attacks.base import Attack, Probe, Signal
from oms_core.convergence import MOST, jacobian_norm
from oms_core.search import fixed_point

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

PRODUCTS = 2 * MOST  # at most, with the Jacobian and its transpose; each counts as a model call
PER_STEP = 2 + PRODUCTS  # the model is asked once for the next iterate and once for the Jacobian


@dataclass(frozen=True, kw_only=True)
class Contracting(Attack):
    """How strongly the map contracts along a plain search from a drawn noise (Sec. 3.4, App. B.1)."""

    gradients: ClassVar[bool] = True

    def columns(self, steps: int) -> list[str]:
        """The norm at eps^0 ... eps^(N-1)."""
        return [f"jacobian n={n}" for n in range(steps)]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """The norm at each iterate is sought from the direction found at the one before."""
        f, found = probe.differentiable_map(t), fixed_point(probe.map(t), [probe.noise], steps)
        signal, start = {}, None
        for n in range(steps):
            norm = jacobian_norm(f, found.eps[n], start)
            signal[f"jacobian n={n}"], start = norm.value, norm.direction
        return signal

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """Minus the norm at eps^(n-1), where the n-th step is taken."""
        return -rows[f"jacobian n={n - 1}"].to_numpy()


JACOBIAN = Contracting(
    name="Jacobian",
    title="Jacobian norm",
    t=350,
    shown_as="NA",
    calls=lambda t: PER_STEP,
    per_step=PER_STEP,
    access="white-box",
    source="Sec. 3.4 and Figure 1 of the paper, read as an attack",
)
