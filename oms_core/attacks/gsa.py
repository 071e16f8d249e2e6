"""Gradient-based attack: pictures that a model was trained on pull at its weights differently.

For ten timesteps the loss of a picture is the mean squared error between the drawn noise and what the model makes of
it, eps^0 - eps^1, and with One More Step eps^0 - eps^2. The L2 norms of its gradients by every tensor of weights
are the features, from which boosted trees learn membership on labelled pictures.

The paper does not say how far the gradient of eps^0 - eps^2 goes back; here it goes through both model calls, and
with `GSA-last` through the last one only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oms_core import libraries
from oms_core.attacks.base import Attack, Learned, Probe, Signal, Study, learned_column
from oms_core.errors import InputError
from oms_core.search import fixed_point

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

STRIDE, REACH = 100, 900  # t = 0, 100, ..., 900 (Sec. E.3)
TIMES = REACH // STRIDE + 1
MOST = 2  # as in the paper
SHARE = 0.5  # of either group, labelled
FEWEST = 3  # of either group: two to learn from and one to judge
FLOOR = 1e-12  # of a norm before its logarithm; a weight may have no gradient at all


@dataclass(frozen=True, kw_only=True)
class Gradients(Attack):
    """The norms of the gradients of the loss by every tensor of weights.

    Attributes:
        through: they go back through every model call, not only through the last.
    """

    through: bool
    gradients: ClassVar[bool] = True

    def columns(self, steps: int) -> list[str]:
        """One per n, each with the norms for all timesteps, 10 x (number of tensors)."""
        return [f"gradients n={n}" for n in range(1, min(steps, self.most) + 1)]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """The model is asked once per timestep and n; every n goes back from there by itself.

        Raises:
            InputError: the model has no weights.
        """
        import torch

        from oms_core.gradients import gradient_norms

        network, columns = probe.denoiser.network, self.columns(steps)
        if network is None:
            raise InputError("A gradient-based attack needs the weights of a model; closed forms have no weights.")
        found = [
            gradient_norms(network, len(probe.x_0), lambda at=at: self.losses(probe, at, len(columns)))
            for at in range(t, t + REACH + 1, STRIDE)
        ]
        return {name: torch.cat(norms, dim=1) for name, norms in zip(columns, zip(*found, strict=True), strict=True)}

    def losses(self, probe: Probe, t: int, steps: int) -> list[Tensor]:
        """The mean squared eps^0 - eps^n for n = 1 ... N, each (B,) float32."""
        f = probe.differentiable_map(t)
        found = fixed_point(f if self.through else lambda eps: f(eps.detach()), [probe.noise], steps)
        eps = [each.float().flatten(1) for each in found.eps]
        return [(eps[0] - eps[n]).square().mean(dim=1) for n in range(1, steps + 1)]

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """Norms are no score by themselves.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name} is only read by an attack that learns")


def features(rows: pd.DataFrame, n: int) -> np.ndarray:
    """The logarithms of the norms after n steps, (N, 10 x tensors) float32; NaN where one is not finite."""
    norms = np.stack([np.frombuffer(numbers, np.float32) for numbers in rows[f"gradients n={n}"]])
    return np.log(np.maximum(np.where(np.isfinite(norms), norms, np.nan), FLOOR))


def fit(study: Study) -> pd.DataFrame:
    """Learn membership from a labelled share of the pictures and score the others.

    Args:
        study: what may be looked at.

    Returns:
        `image` and the log odds of membership for each n, without the labelled pictures.

    Raises:
        InputError: there are too few members or non-members.
    """
    if min(study.member.sum(), (~study.member).sum()) < FEWEST:
        raise InputError(f"A gradient-based attack needs at least {FEWEST} members and {FEWEST} non-members.")
    known, rows = study.labelled(SHARE), study.rows

    def score(n: int) -> np.ndarray:
        found = features(rows, n)
        return log_odds(found[known], study.member[known], found[~known], study.seed)

    steps = range(1, min(study.steps, MOST) + 1)
    return rows.loc[~known, ["image"]].assign(**{learned_column("score", n): score(n) for n in steps})


def log_odds(known: np.ndarray, member: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
    """The log odds of membership of others (M, K), learned from known (N, K) and member (N,)."""
    libraries.load(*libraries.LEARNING, "xgboost")
    from sklearn.preprocessing import StandardScaler
    from xgboost import XGBClassifier

    scale = StandardScaler().fit(known)
    trees = XGBClassifier(n_jobs=1, random_state=seed)  # in one thread the last bits are always the same
    trees.fit(scale.transform(known), member.astype(int))
    return trees.predict(scale.transform(others), output_margin=True)


def gsa(name: str, title: str, through: bool) -> Learned:
    """The attack, and the signal that it reads."""
    common = {
        "t": 0,
        "reach": REACH,
        "calls": lambda t: TIMES,
        "per_step": TIMES,
        "most": MOST,
        "access": "white-box",
        "timed": False,
        "source": "Pang et al. (2023); Sec. 4.4, E.3",
    }
    base = Gradients(name=f"{name}-gradients", title=f"{title}, gradients", through=through, **common)
    return Learned(name=name, title=title, base=base, fit=fit, **common)


GSA = gsa("GSA", "Gradient-based attack", through=True)
GSA_LAST = gsa("GSA-last", "Gradient-based attack, through the last model call only", through=False)
