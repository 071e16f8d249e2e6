"""The network alone in every way that the device can run it, each with how far it moves the scores."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np

from oms_core.bench.base import Row, Subject, bare_forward, empty_cache, in_turns, middle_ratio, row
from oms_core.compute import compute, loaded
from oms_core.device import DTYPES, MODES, Placement
from oms_core.errors import InputError
from oms_core.metrics import auc
from oms_core.run import scores

TURNS = 9
SCORED = 256  # pictures on which the drift is seen


def network_rows(subject: Subject) -> list[Row]:
    """Seconds of a forward pass, as written and in every other mode and precision; only what runs here."""
    plain = subject.placement
    others = [replace(plain, mode=mode) for mode in MODES] + [replace(plain, dtype=dtype) for dtype in DTYPES]
    runs, failed = {plain: bare_forward(subject.denoiser, subject.batch)}, []
    for placement in (other for other in others if other != plain):
        try:
            runs[placement] = bare_forward(loaded(subject.model, placement), subject.batch)
            runs[placement]()
        except (InputError, RuntimeError):
            runs.pop(placement, None)
            failed.append(placement)
    times = dict(zip(runs, in_turns([*runs.values()], TURNS), strict=True))
    scored = {placement: scores_in(subject, placement) for placement in runs}
    per_picture = statistics.median(times[plain]) / subject.batch
    best = min(runs, key=lambda placement: middle_ratio(times[placement], times[plain]))
    return [
        row(f"bare forward, {said(plain)}, {subject.name}", 1000 * per_picture, "ms per picture and call"),
        *(
            row(f"{said(placement)} / {said(plain)}", middle_ratio(times[placement], times[plain])) | drift(found, base)
            for base in [scored[plain]]
            for placement, found in scored.items()
            if placement != plain
        ),
        *({"name": f"{said(placement)} / {said(plain)}", "note": "does not run here"} for placement in failed),
        {"name": "the fastest of them", "note": said(best)},
    ]


def said(placement: Placement) -> str:
    return f"{placement.mode} {placement.dtype}"


def scores_in(subject: Subject, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the naive attack with One More Step, and who is a member."""
    planned = subject.plan(("NA",), limit=min(SCORED, subject.pictures))
    run = replace(planned.run, device=placement.device, dtype=placement.dtype, mode=placement.mode)
    with empty_cache():
        table = scores(planned, compute(replace(planned, run=run)))
    table = table[table.n == 2]
    return table.score.to_numpy(), table.member.to_numpy()


def drift(found: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]) -> Row:
    """How far scores moved: the largest change in standard deviations of the scores, and the change of the AUC."""
    (moved, member), (was, _) = found, base
    return {
        "drift of a score": f"{np.abs(moved - was).max() / was.std():.1e} sd",
        "drift of the AUC": f"{100 * (auc(moved, member) - auc(was, member)):+.2f} points",
    }
