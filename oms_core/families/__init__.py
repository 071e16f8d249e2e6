"""One file per kind of model; `load` is the only door."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from oms_core.files import in_a_sentence

if TYPE_CHECKING:
    from oms_core.catalog import Model
    from oms_core.denoiser import Denoiser
    from oms_core.device import Placement

FAMILIES = ("ddpm", "uvit", "stable_diffusion", "transformer", "ideal")


@in_a_sentence
def load(model: Model, placement: Placement) -> Denoiser:
    """Load a described model onto a device.

    Raises:
        InputError: its files changed since it was described, its weights do not fit its config or are not finite, or it
            gives no usable output.
    """
    return import_module(f"oms_core.families.{model.family}").load(model, placement)
