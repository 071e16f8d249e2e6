"""Questions that take more than one run: sweeps, iteration schemes and the regression on a chain, as tidy tables.

Every function takes runs and gives a row per figure; one pass over the model serves every n, pair and norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from oms_core import catalog, metrics
from oms_core.attacks.base import column, pairs
from oms_core.compute import Tick, score
from oms_core.evaluation import evaluation
from oms_core.run import Plan, Run, Task, plan, residuals
from oms_core.schemes import SCHEMES

Rows = list[dict[str, Any]]
Signals = dict[str, pd.DataFrame]
SWEPT = (50, 70, 90, 110, 130, 150, 170, 190, 210, 230, 250)  # Fig. 2b
ROUNDING = 1e-6  # of the size of a noise, single precision
BUDGET = 2  # model calls beyond those of the start, as OMS spends
PICTURES = 600  # of a sweep unless a number is given


def figures_of(run: Run, asked: tuple[str, ...], tick: Tick | None = None) -> Rows:
    """The figures of a run's attacks, see `metrics.evaluate`; those that are not asked for only stand beside."""
    return evaluation(plan(run), score(run, tick), asked)


def by_timestep(run: Run, timesteps: Iterable[int] = SWEPT, tick: Tick | None = None) -> Rows:
    """The figures of a run at several timesteps (Fig. 2b)."""
    return [row for t in timesteps for row in figures_of(replace(run, t=t), run.attacks, tick)]


def by_epoch(run: Run, tick: Tick | None = None) -> Rows:
    """The figures of a run after each epoch whose weights are there (Fig. 2a), with `epoch`."""
    base = run.model.partition("@")[0]
    found = []
    for epoch in catalog.epochs(base):
        found += [
            row | {"epoch": epoch} for row in figures_of(replace(run, model=f"{base}@{epoch}"), run.attacks, tick)
        ]
    return found


def members(planned: Plan, signal: pd.DataFrame) -> np.ndarray:
    """Who is a member, in the order of a signal's rows, (N,) bool."""
    return planned.images.table.set_index("image").role.eq("member").loc[signal.image].to_numpy()


def of_columns(columns: Mapping[Any, np.ndarray], member: np.ndarray) -> Rows:
    """AUC with its interval for each column of scores: name, auc, auc_lo, auc_hi."""
    draws = metrics.resampled(dict(columns), member)
    rows = []
    for name, values in columns.items():
        low, high = metrics.interval(draws[name]["auc"])
        rows.append({"name": name, "auc": metrics.auc(values, member), "auc_lo": low, "auc_hi": high})
    return rows


def grid(planned: Plan, signals: Signals, p: float) -> pd.DataFrame:
    """The AUC of every distance d(i, j) of a run's first attack: t, pair, i, j, auc."""
    task = planned.tasks[0]
    signal = signals[task.attack.name]
    member = members(planned, signal)
    rows = []
    for i, j in pairs(planned.run.steps):
        found = metrics.auc(-signal[column(i, j, p)].to_numpy(), member)
        rows.append({"t": task.t, "pair": f"d({i},{j})", "i": i, "j": j, "auc": found})
    return pd.DataFrame(rows)


def runs_of_schemes(run: Run) -> dict[str, Run]:
    """The run once per iteration scheme, with as many steps as the calls of One More Step pay for."""
    return {name: replace(run, scheme=name, steps=BUDGET // scheme.calls) for name, scheme in SCHEMES.items()}


def by_scheme(run: Run, tick: Tick | None = None) -> Rows:
    """Does any iteration scheme separate better than plain OMS at equal model calls?

    Each may spend two calls beyond those of the start, as OMS does; Ishikawa spends both on one step.

    Returns:
        Rows with `model, attack, t, scheme, calls`, the AUC of `d(0, n)` with its interval, and `lead`, that AUC
        less the one of plain iteration on the same resampled pictures, with its interval.
    """
    runs = runs_of_schemes(run)
    return led_by({name: (plan(one), score(one, tick)) for name, one in runs.items()}, run.attacks)


def led_by(found: dict[str, tuple[Plan, Signals]], attacks: tuple[str, ...]) -> Rows:
    """The rows of `by_scheme`, from the plan and the signals of each scheme."""
    return [row for attack in attacks for row in led(attack, found)]


def led(attack: str, found: dict[str, tuple[Plan, Signals]]) -> Rows:
    """The rows of one attack, each scheme compared with plain iteration."""
    planned, signals = found["picard"]
    task = next(task for task in planned.tasks if task.attack.name == attack)
    member = members(planned, signals[attack])
    scores = {name: -signals[attack][last_distance(plan, task)].to_numpy() for name, (plan, signals) in found.items()}
    draws = metrics.resampled(scores, member)
    base = metrics.auc(scores["picard"], member)
    rows = []
    for name, values in scores.items():
        value = metrics.auc(values, member)
        row = {"model": planned.model.name, "attack": attack, "t": task.t, "scheme": name}
        row |= {"calls": task.attack.calls_at(task.t, BUDGET)} | interval_of("auc", value, draws[name]["auc"])
        rows.append(row | interval_of("lead", value - base, draws[name]["auc"] - draws["picard"]["auc"]))
    return rows


def last_distance(planned: Plan, task: Task) -> str:
    """The column of d(0, N)."""
    return column(0, planned.run.steps, task.attack.p)


def interval_of(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    """A figure with its interval under `name`, `name_lo` and `name_hi`."""
    low, high = metrics.interval(draws)
    return {name: value, f"{name}_lo": low, f"{name}_hi": high}


def over_timesteps(
    run: Run, timesteps: Iterable[int], table: Callable[[Plan, pd.DataFrame], pd.DataFrame], tick: Tick | None = None
) -> pd.DataFrame:
    """A table of a run's first attack at each of several timesteps, with `t`."""
    frames = []
    for t in timesteps:
        planned = plan(replace(run, t=t))
        frames.append(table(planned, score(planned.run, tick)[run.attacks[0]]).assign(t=t))
    return pd.concat(frames, ignore_index=True)


def contraction(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The contraction constant of f along each picture's search: image, member, k (Fig. B.1).

    k is the largest ||f(a) - f(b)|| / ||a - b|| over all pairs of iterates. It is a lower bound of the true constant,
    as every estimate from finitely many points is; the paper does not say how it estimated its own. Pairs that differ
    by no more than rounding say nothing.
    """
    steps = planned.run.steps
    found, rounding = np.zeros(len(rows)), ROUNDING * math.sqrt(planned.model.dimension)
    for j in range(1, steps):
        for i in range(j):
            before, after = (rows[column(i + k, j + k, 2)].to_numpy() for k in (0, 1))
            found = np.fmax(found, np.divide(after, before, out=np.full(len(rows), np.nan), where=before > rounding))
    return pd.DataFrame({"image": rows.image, "member": members(planned, rows), "k": found})


def ratios(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The ratio of successive residuals, ||delta^(n+1)|| / ||delta^n||: image, member, n, ratio."""
    found = residuals(planned, rows).sort_values(["image", "n"])
    following = found.groupby("image").residual.shift(-1)
    return found.assign(ratio=following / found.residual).dropna(subset="ratio")[["image", "member", "n", "ratio"]]


def jacobian_norms(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The norm of f's Jacobian at each iterate: image, member, n, norm (Fig. 1, above)."""
    wide = rows[["image"]].assign(**{str(n): rows[f"jacobian n={n}"] for n in range(planned.run.steps)})
    tidy = wide.melt("image", var_name="n", value_name="norm").astype({"n": int})
    member = pd.Series(members(planned, rows), index=rows.image)
    return tidy.assign(member=member.loc[tidy.image].to_numpy())


def against_chain(run: Run, tick: Tick | None = None) -> Rows:
    """A regression on the distances of a chain beside +OMS and d(1, 2), at equal calls on the same pictures.

    Returns:
        Rows with `model, attack, t, calls, score`, the AUC with its interval, and `lead`, that AUC less the one of
        +OMS on the same resampled pictures, with its interval.
    """
    names = tuple(f"{attack}-trajectory" for attack in run.attacks)
    planned = plan(replace(run, attacks=(*run.attacks, *names)))
    signals = score(planned.run, tick)
    rows = []
    for task in planned.tasks[: len(run.attacks)]:
        judged = signals[f"{task.attack.name}-trajectory"]
        signal = signals[task.attack.name].set_index("image").loc[judged.image].reset_index()
        member, p = members(planned, signal), task.attack.p
        found = {"d(0,2), +OMS": -signal[column(0, 2, p)].to_numpy(), "d(1,2)": -signal[column(1, 2, p)].to_numpy()}
        found["regression on the chain"] = judged["score n=2"].to_numpy()
        draws = metrics.resampled(found, member)
        for name, values in found.items():
            row = {"model": planned.model.name, "attack": task.attack.name, "t": task.t, "score": name}
            row |= {"calls": task.attack.calls_at(task.t, 2)} | interval_of(
                "auc", metrics.auc(values, member), draws[name]["auc"]
            )
            lead = row["auc"] - metrics.auc(found["d(0,2), +OMS"], member)
            rows.append(row | interval_of("lead", lead, draws[name]["auc"] - draws["d(0,2), +OMS"]["auc"]))
    return rows
