"""OMS Explorer's engine: membership inference on diffusion models as a search for the training noise.

from oms_core import Run, score
distances = score(Run(model="ddpm-digits", attacks=("PIA",)))["PIA"]

A model or an image set that is not built in is named by its folder: Run("FOLDER", "PICTURES"). In the app, such a name
must be a `Location`, see `oms_core.location`.
"""

import os
from importlib import import_module
from typing import Any

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

HOMES = {
    "ATTACKS": "attacks",
    "InputError": "errors",
    "Location": "location",
    "Run": "run",
    "lookup": "run",
    "open_images": "images",
    "plan": "run",
    "score": "compute",
    "scores": "run",
}
__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is first asked for: the command line answers Ctrl-C before that."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
