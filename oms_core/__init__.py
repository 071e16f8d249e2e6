"""OMS Explorer's engine: membership inference on diffusion models as a search for the training noise.

from oms_core import Run, score
distances = score(Run(model="ddpm-digits", attacks=("PIA",)))["PIA"]

A model or an image set that is not built in is named by a `Location`: Run(Location("FOLDER"), Location("PICTURES")).
"""

import os

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from oms_core.attacks import ATTACKS
from oms_core.compute import score
from oms_core.errors import InputError
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.run import Run, lookup, plan, scores

__all__ = ["ATTACKS", "InputError", "Location", "Run", "lookup", "open_images", "plan", "score", "scores"]
