"""The naive attack: a drawn noise as start."""

from oms_core.attacks.base import Search

NA = Search(
    name="NA",
    title="Naive attack",
    search=lambda probe, t: ((probe.noise,), probe.map(t)),
    p=2,
    t=350,
    calls=lambda t: 1,
    source="Matsumoto et al. (2023); Eq. E.2",
)
