"""Imports of large libraries while the app runs, in one place: one thread at a time.

Two threads that enter a library by different doors at once may each find it half imported. Whoever imports one in a
function that several threads may call has it loaded here first; what one thread alone calls after `load_engine`
needs no more.
"""

from __future__ import annotations

import threading
from importlib import import_module

ENGINE = ("oms_core.families.ddpm",)  # torch, diffusers and transformers, as far as every model needs them
STATISTICS = ("scipy.stats",)
LEARNING = (
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.neighbors",
    "sklearn.pipeline",
    "sklearn.preprocessing",
)

lock = threading.RLock()
loaded: set[str] = set()


def load(*names: str) -> None:
    """Import modules, or wait while another thread does.

    Raises:
        ImportError: one is missing or broken.
    """
    if loaded.issuperset(names):
        return
    with lock:
        for name in names:
            import_module(name)
            loaded.add(name)


def load_engine() -> None:
    """Import what asking any model takes, some seconds."""
    load(*ENGINE)
