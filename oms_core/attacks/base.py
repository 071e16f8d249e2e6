"""What an attack is: what it asks the model about a picture, and how it reads the answers.

Most attacks are a start, a map and a norm (`Search`); One More Step is only the number n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oms_core import ddim
from oms_core.search import Map, diffuse, fixed_point, norm, picard

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from oms_core.denoiser import Denoiser
    from oms_core.search import Scheme

NORMS = (2, 4)
SECMI_STRIDE = 10  # k - t (Sec. E.1)
MAX_STEPS = 20
Signal = dict[str, "Tensor"]  # by column; (B,) numbers, or (B, K) for K numbers in one column


class Probe:
    """A batch of pictures before a model, with the answers that several attacks share.

    Args:
        denoiser: the model.
        x_0: the pictures, (B, C, H, W).
        condition: what the model needs besides, see `Denoiser.condition`.
        draw: from k to the k-th draw from N(0, I) of every picture, shaped like x_0.
        scheme: how the search goes on.

    Attributes:
        calls: how often the model has been asked about the batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x_0: Tensor,
        condition: Any,
        draw: Callable[[int], Tensor],
        scheme: Scheme = picard,
    ) -> None:
        self.denoiser, self.x_0, self.condition = denoiser, x_0, condition
        self.draw, self.scheme = draw, scheme
        self.coefficients = denoiser.coefficients
        self.calls = 0
        self._answers: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by t: what was asked, and the answer

    @cached_property
    def noise(self) -> Tensor:
        """The first draw."""
        return self.draw(0)

    def ask(self, x_t: Tensor, t: int) -> Tensor:
        """eps_theta(x_t, t), asked now."""
        self.calls += 1
        return self.denoiser.eps(x_t, t, self.condition)

    def eps(self, x_t: Tensor, t: int) -> Tensor:
        """eps_theta(x_t, t), asked once for all attacks."""
        import torch

        known = self._answers.setdefault(t, [])
        for asked, answer in known:
            if torch.equal(asked, x_t):
                return answer
        known.append((x_t, self.ask(x_t, t)))
        return known[-1][1]

    def map(self, t: int) -> Map:
        """f of Eq. 6: the noise predicted in x_t, as a function of the noise put in."""
        return lambda eps: self.eps(diffuse(self.x_0, eps, *self.coefficients(t)), t)

    def differentiable_map(self, t: int) -> Map:
        """The same for those who differentiate it, which an answer from before does not allow."""
        return lambda eps: self.ask(diffuse(self.x_0, eps, *self.coefficients(t)), t)

    @cached_property
    def without_captions(self) -> Probe:
        """The same pictures before a model that is told nothing of them."""
        return Probe(self.denoiser, self.x_0, self.denoiser.condition([""] * len(self.x_0)), self.draw, self.scheme)

    @property
    def eps_of_x_0(self) -> Tensor:
        """eps_theta(x_0, 0) (Eq. E.4)."""
        return self.eps(self.x_0, 0)

    def walk(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t by deterministic DDIM, eps^0 = eps_theta(x_t, t), and eps^1 at x_k one step further (Eq. E.6)."""
        x_t = ddim.walk(self.x_0, t, self.eps, self.coefficients)
        eps_0 = self.eps(x_t, t)
        return x_t, eps_0, self.step_from(x_t, eps_0, t, t + SECMI_STRIDE)

    def step_from(self, x_t: Tensor, eps: Tensor, t: int, k: int) -> Tensor:
        """The model's answer at x_k, the DDIM step from x_t to k along eps."""
        return self.eps(ddim.step(x_t, eps, self.coefficients(t), self.coefficients(k)), k)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A membership attack: what it measures on a batch, and the score it reads from that.

    Attributes:
        name: how the command line and the pages call it.
        title: the same for people.
        t: the paper's timestep.
        calls: model calls per picture of the published attack, n = 1, as a function of t.
        source: where it comes from.
        reach: how far beyond t the model is asked; t + reach must be a timestep of the model.
        per_step: model calls per picture of each further step.
        most: the largest n.
        access: gray-box asks the model for its outputs, white-box for its gradients too.
        captioned: it needs a model that takes captions.
        shown_as: the attack whose timestep a model's card gives it; by default its own.
        timed: it looks at one timestep, which may be chosen.
    """

    name: str
    title: str
    t: int
    calls: Callable[[int], int]
    source: str
    reach: int = 0
    per_step: int = 1
    most: int = MAX_STEPS
    access: str = "gray-box"
    captioned: bool = False
    shown_as: str = ""
    timed: bool = True
    gradients: ClassVar[bool] = False  # whether measuring differentiates the model

    def calls_at(self, t: int, n: int) -> int:
        """Model calls per picture after n steps."""
        return self.calls(t) + self.per_step * (n - 1)

    @abstractmethod
    def columns(self, steps: int) -> list[str]:
        """The columns of its signal when the search goes up to N = steps."""

    @abstractmethod
    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """Ask the model about a batch; the columns of `columns(steps)`."""

    @abstractmethod
    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """The score after n steps of each row of the signal, (N,); larger = more likely a member."""


@dataclass(frozen=True, kw_only=True)
class Search(Attack):
    """An attack that reads distances between iterates of the noise search.

    Attributes:
        search: from a probe and t to the given iterates (eps^0, perhaps eps^1) and the map that goes on.
        p: the norm of the distance.
        given: how many iterates the start gives; an iteration scheme begins after them.
    """

    search: Callable[[Probe, int], tuple[tuple[Tensor, ...], Map]]
    p: int
    given: int = 1

    def columns(self, steps: int) -> list[str]:
        """Every d(i, j) in every norm."""
        return [column(i, j, p) for p in NORMS for i, j in pairs(steps)]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """One pass to n = N gives every distance."""
        given, f = self.search(probe, t)
        trajectory = fixed_point(f, given, steps, probe.scheme)
        found = {}
        for i, j in pairs(steps):  # one difference after the other, since all of them are as large as many batches
            apart = trajectory.difference(i, j)
            found |= {column(i, j, p): norm(apart, p) for p in NORMS}
        return {name: found[name] for name in self.columns(steps)}

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """-d(0, n) (Eq. 9)."""
        return -rows[column(0, n, self.p)].to_numpy()


def column(i: int, j: int, p: float) -> str:
    """The name under which d(i, j) in the norm p is kept."""
    return f"d({i},{j}) p={p}"


def pairs(steps: int) -> list[tuple[int, int]]:
    """Every (i, j) with 0 <= i < j <= steps."""
    return [(i, j) for j in range(1, steps + 1) for i in range(j)]


@dataclass(frozen=True)
class Study:
    """What a learned attack may look at.

    Attributes:
        rows: the signal of the pictures in question, with `image`.
        member: which of them are members, (N,) bool; only for those that the attack takes to learn from.
        auxiliary: the signal of pictures that are known not to be members; empty where none are needed.
        pixels: from names of pictures to the pictures as the model takes them, (N, H, W, C) uint8.
        steps: N.
        t: the timestep.
        coefficients: alpha_t and sigma_t of the model.
        seed: of every draw.
    """

    rows: pd.DataFrame
    member: np.ndarray
    auxiliary: pd.DataFrame
    pixels: Callable[[pd.Series], np.ndarray]
    steps: int
    t: int
    coefficients: Callable[[int], tuple[float, float]]
    seed: int

    def labelled(self, share: float) -> np.ndarray:
        """Which pictures an attack may know the membership of, a seeded share of either group, (N,) bool."""
        rng, chosen = np.random.default_rng(self.seed), np.zeros(len(self.member), bool)
        for group in (np.flatnonzero(self.member), np.flatnonzero(~self.member)):
            chosen[rng.choice(group, max(2, round(share * len(group))), replace=False)] = True
        return chosen


@dataclass(frozen=True, kw_only=True)
class Learned(Attack):
    """An attack that fits something to the signal of another; its own signal are the finished scores.

    Attributes:
        base: whose signal it reads.
        fit: from a study to `image` and a column per entry of `columns(steps)`, for the pictures it judges.
        heads: names of several scores for the same n; the first is the attack's.
        auxiliary: it learns from pictures of the role auxiliary, which are known not to be members.
        version: raised when a change of the fit changes a score.
    """

    base: Attack
    fit: Callable[[Study], pd.DataFrame]
    heads: tuple[str, ...] = ("score",)
    auxiliary: bool = False
    version: int = 1

    def columns(self, steps: int) -> list[str]:
        """One per head and n."""
        return [learned_column(head, n) for n in range(1, min(steps, self.most) + 1) for head in self.heads]

    def measure(self, probe: Probe, t: int, steps: int) -> Signal:
        """It asks the model nothing itself.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name} is fitted to the signal of {self.base.name}")

    def score(self, rows: pd.DataFrame, n: int) -> np.ndarray:
        """What the fit found, by its first head."""
        return rows[learned_column(self.heads[0], n)].to_numpy()


def learned_column(head: str, n: int) -> str:
    """The name under which a learned score after n steps is kept."""
    return f"{head} n={n}"
