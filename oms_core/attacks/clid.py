"""CLiD: how much the caption helps the model to name the noise; more for pictures it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oms_core.attacks.base import Attack, Probe, Signal
from oms_core.search import fixed_point

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Discrepancy(Attack):
    """The loss without a caption less the loss with it, on the same drawn noise."""

    def columns(self, steps: int) -> list[str]:
        """Squared distances, with and without caption, per n."""
        return [f"{which} n={n}" for n in range(1, steps + 1) for which in ("with", "without")]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """Both searches from the same noise."""
        own = fixed_point(probe.map(t), [probe.noise], steps)
        blind = fixed_point(probe.without_captions.map(t), [probe.noise], steps)
        squares = [found.distance(0, n, 2).square() for n in range(1, steps + 1) for found in (own, blind)]
        return dict(zip(self.columns(steps), squares, strict=True))

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """The discrepancy after n steps."""
        return (rows[f"without n={n}"] - rows[f"with n={n}"]).to_numpy()


CLID = Discrepancy(
    name="CLiD",
    title="CLiD, conditional likelihood discrepancy",
    t=350,
    calls=lambda t: 2,
    per_step=2,
    captioned=True,
    source="Zhai et al. (2024), the discrepancy of one draw at one timestep",
)
