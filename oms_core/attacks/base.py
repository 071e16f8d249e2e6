"""What an attack is: a start, a map and a norm. One More Step is only the number n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from oms_core import ddim
from oms_core.search import Map, diffuse

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.denoiser import Denoiser

SECMI_STRIDE = 10  # k - t (Sec. E.1)


class Probe:
    """A batch of pictures before a model, with the answers that several attacks share.

    Args:
        denoiser: the model.
        x_0: the pictures, (B, C, H, W).
        condition: what the model needs besides, see `Denoiser.condition`.
        noise: one draw from N(0, I) per picture, shaped like x_0.

    Attributes:
        calls: how often the model has been asked about the batch.
    """

    def __init__(self, denoiser: Denoiser, x_0: Tensor, condition: Any, noise: Tensor) -> None:
        self.denoiser, self.x_0, self.condition, self.noise = denoiser, x_0, condition, noise
        self.coefficients = denoiser.coefficients
        self.calls = 0
        self._walks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def eps(self, x_t: Tensor, t: int) -> Tensor:
        """eps_theta(x_t, t)."""
        self.calls += 1
        return self.denoiser.eps(x_t, t, self.condition)

    def map(self, t: int) -> Map:
        """f of Eq. 6: the noise predicted in x_t, as a function of the noise put in."""
        return lambda eps: self.eps(diffuse(self.x_0, eps, *self.coefficients(t)), t)

    @cached_property
    def eps_of_x_0(self) -> Tensor:
        """eps_theta(x_0, 0) (Eq. E.4)."""
        return self.eps(self.x_0, 0)

    def walk(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t by deterministic DDIM, eps^0 = eps_theta(x_t, t), and eps^1 at x_k one step further (Eq. E.6)."""
        if t not in self._walks:
            x_t = ddim.walk(self.x_0, t, self._eps_on_walk, self.coefficients)
            eps_0 = self._eps_on_walk(x_t, t)
            k = t + SECMI_STRIDE
            x_k = ddim.step(x_t, eps_0, self.coefficients(t), self.coefficients(k))
            self._walks[t] = x_t, eps_0, self.eps(x_k, k)
        return self._walks[t]

    def _eps_on_walk(self, x: Tensor, t: int) -> Tensor:
        return self.eps_of_x_0 if t == 0 else self.eps(x, t)


@dataclass(frozen=True)
class Attack:
    """A membership attack that reads distances between iterates of the noise search.

    Attributes:
        name: how the command line and the pages call it.
        title: the same for people.
        search: from a probe and t to the given iterates (eps^0, perhaps eps^1) and the map that goes on.
        p: the norm of the distance.
        t: the paper's timestep.
        calls: model calls per picture of the published attack, n = 1, as a function of t.
        reach: how far beyond t the model is asked; t + reach must be a timestep of the model.
        source: where it comes from.
    """

    name: str
    title: str
    search: Callable[[Probe, int], tuple[tuple[Tensor, ...], Map]]
    p: int
    t: int
    calls: Callable[[int], int]
    source: str
    reach: int = 0
