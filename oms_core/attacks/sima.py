"""SimA: the size of the noise that the model sees where none was put in, a search that starts at zero."""

from __future__ import annotations

from oms_core.attacks.base import Search

SIMA = Search(
    name="SimA",
    title="SimA, started at no noise",
    search=lambda probe, t: ((probe.x_0.new_zeros(probe.x_0.shape),), probe.map(t)),
    p=4,
    t=100,
    calls=lambda t: 1,
    source="Rao et al. (2025), with x_t = alpha_t x_0 in place of x_0",
)
