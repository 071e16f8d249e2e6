"""Attacks that learn: what they may see, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from oms_core.attacks.base import Study
from oms_core.images import ImageSet
from oms_core.run import Plan, Task


def learn(
    task: Task,
    planned: Plan,
    rows: pd.DataFrame,
    auxiliary: pd.DataFrame,
    coefficients: Callable[[int], tuple[float, float]],
) -> pd.DataFrame:
    """Fit a learned attack and judge the pictures of a plan with it.

    Args:
        task: of the learned attack.
        planned: the pictures, and who is a member.
        rows: the signal of its base on these pictures.
        auxiliary: the same on the auxiliary pictures, if it learns from those.
        coefficients: of the model.

    Returns:
        `image` and the attack's columns, for the pictures that it did not learn from.
    """
    member = planned.images.table.set_index("image").role.eq("member").loc[rows.image].to_numpy()

    def pixels(images: pd.Series) -> np.ndarray:
        return pixels_of(images, (planned.images, planned.auxiliary), planned)

    study = Study(rows, member, auxiliary, pixels, planned.run.steps, task.t, coefficients, planned.run.seed)
    found = task.attack.fit(study)
    return found[["image", *task.attack.columns(planned.run.steps)]].reset_index(drop=True)


def pixels_of(images: pd.Series, sets: tuple[ImageSet, ...], planned: Plan) -> np.ndarray:
    """Pictures by name, as the model takes them, (N, H, W, C) uint8."""
    for one in sets:
        places = pd.Series(one.table.index, index=one.table.image)
        if images.isin(places.index).all():
            chosen = one.table.loc[places.loc[images]]
            return replace(one, table=chosen).pixels(planned.model.profile)
    raise ValueError("pictures of both sets at once")
