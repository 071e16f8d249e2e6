"""The paper's figures and tables by name, each from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from oms_core import catalog, figures, metrics, paper
from oms_core.attacks import ATTACKS, COMPARED
from oms_core.attacks.base import column
from oms_core.compute import Tick, score
from oms_core.errors import InputError
from oms_core.figures import Chart
from oms_core.run import Plan, Run, calls, errors, plan, residuals, scores

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3))  # Fig. 3
FALSE_ALARMS = 0.05  # the rate at which Figures F.1a and F.1b compare
Signals = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Exhibit:
    """A figure of the paper.

    Attributes:
        title: what it shows.
        draw: from a plan and its distances to the chart.
        attacks: which attacks it compares unless others are named.
        steps: how far the search must go.
        family: whose first shipped model it shows unless one is named.
        limit: how many pictures it takes unless a number is given.
    """

    title: str
    draw: Callable[[Plan, Signals], Chart]
    attacks: tuple[str, ...]
    steps: int
    family: str = "ddpm"
    limit: int | None = None


def boxes(planned: Plan, signals: Signals) -> Chart:
    """Figure 1, below: residuals by n."""
    rows = residuals(planned, signals[planned.tasks[0].attack.name])
    return figures.residual_boxes(rows, planned.model.dimension)


def residuals_and_errors(planned: Plan, signals: Signals) -> Chart:
    """Figure B.2: residuals and errors against eps^20 by n."""
    signal = signals[planned.tasks[0].attack.name]
    return figures.residual_and_error(residuals(planned, signal), errors(planned, signal), planned.model.dimension)


def pairs(planned: Plan, signals: Signals) -> Chart:
    """Figure 3: the AUC of each distance between iterates."""
    return figures.auc_by_pair(auc_of_pairs(planned, signals))


def auc_of_pairs(planned: Plan, signals: Signals) -> pd.DataFrame:
    """AUC with its interval for each attack and pair: attack, pair, auc, auc_lo, auc_hi."""
    rows = []
    for task in planned.tasks:
        signal = signals[task.attack.name]
        member = members(planned, signal)
        columns = {pair: -signal[column(*pair, task.attack.p)].to_numpy() for pair in PAIRS}
        draws = metrics.resampled(columns, member)
        for (i, j), values in columns.items():
            low, high = metrics.interval(draws[i, j]["auc"])
            found = {"auc": metrics.auc(values, member), "auc_lo": low, "auc_hi": high}
            rows.append({"attack": task.attack.name, "pair": f"d({i},{j})"} | found)
    return pd.DataFrame(rows)


def members(planned: Plan, signal: pd.DataFrame) -> Any:
    """Who is a member, in the order of a signal's rows, (N,) bool."""
    return planned.images.table.set_index("image").role.eq("member").loc[signal.image].to_numpy()


def roc(planned: Plan, signals: Signals, scale: str = "linear") -> Chart:
    """Figure D.1, or D.2 on log scales: ROC curves without and with OMS."""
    table = metrics.check_scores(scores(planned, signals))
    return curves(table[table.n <= 2], (scale,))


def curves(table: pd.DataFrame, scales: tuple[str, ...]) -> Chart:
    """The ROC curve of every attack and n in a score table, a panel for each scale."""
    found = {}
    for (attack, n), rows in table.groupby(["attack", "n"], sort=False):
        values, member = rows.score.to_numpy(), rows.member.to_numpy()
        found[attack, n] = metrics.roc(values, member), metrics.auc(values, member)
    return figures.roc_curves(found, scales)


def both_rocs(planned: Plan, signals: Signals) -> Chart:
    """Figure D.3: linear and log ROC side by side."""
    table = metrics.check_scores(scores(planned, signals))
    return curves(table[table.n <= 2], ("linear", "log"))


def log_roc(planned: Plan, signals: Signals) -> Chart:
    """Figure D.2."""
    return roc(planned, signals, "log")


def before_and_after(planned: Plan, signals: Signals) -> pd.DataFrame:
    """The scores of the first attack at n = 1 and n = 2."""
    table = metrics.check_scores(scores(planned, signals))
    return table[(table.attack == planned.tasks[0].attack.name) & (table.n <= 2)]


def histograms(planned: Plan, signals: Signals) -> Chart:
    """Figure F.1a: the scores before and after, with the threshold of 5 % false alarms."""
    table = before_and_after(planned, signals)
    thresholds = {
        n: metrics.roc(rows.score.to_numpy(), rows.member.to_numpy()).threshold_at(FALSE_ALARMS)
        for n, rows in table.groupby("n")
    }
    return figures.histograms(table, thresholds)


def labels(planned: Plan, signals: Signals) -> Chart:
    """Figure F.1b: labels of the members that OMS corrects, and of those that it newly breaks."""
    changes = metrics.corrected(before_and_after(planned, signals), FALSE_ALARMS)
    label = planned.images.table.set_index("image").label
    return figures.changed_labels(changes.assign(label=label.loc[changes.image].to_numpy()))


LAST = 20  # the iterate that Figures B.1 and B.2 take for the fixed point

FIGURES = {
    "1": Exhibit("Residuals by step, members and non-members", boxes, ("NA",), 10),
    "B2": Exhibit("Residual and error by step on U-ViT", residuals_and_errors, ("NA",), LAST, family="uvit", limit=600),
    "3": Exhibit("AUC of each distance between iterates", pairs, COMPARED, 3),
    "D1": Exhibit("ROC curves without and with OMS", roc, COMPARED, 2),
    "D2": Exhibit("ROC curves on log scales without and with OMS", log_roc, COMPARED, 2),
    "D3": Exhibit(
        "ROC curves of a text-to-image model, linear and log", both_rocs, COMPARED, 2, family="stable_diffusion"
    ),
    "F1a": Exhibit("Scores before and after OMS", histograms, ("NA",), 2),
    "F1b": Exhibit("Labels of the members that OMS corrects, and of those it newly breaks", labels, ("NA",), 2),
}


def exhibit(name: str) -> Exhibit:
    """A figure by its name in the paper.

    Raises:
        InputError: no such figure.
    """
    if name not in FIGURES:
        raise InputError(f"There is no figure {name!r}; known are {', '.join(FIGURES)}.")
    return FIGURES[name]


def figure(name: str, run: Run, tick: Tick | None = None) -> tuple[Plan, Chart]:
    """Compute what a figure needs and draw it; a run that names no model, no attacks or too few steps is completed."""
    shown = exhibit(name)
    named = run.attacks if run.attacks != COMPARED else shown.attacks
    model, limit = run.model or of_family(shown.family)[0], run.limit or shown.limit
    run = replace(run, model=model, attacks=named, steps=max(run.steps, shown.steps), limit=limit)
    planned = plan(run)
    return planned, shown.draw(planned, score(run, tick))


def evaluate(run: Run, tick: Tick | None = None) -> list[dict[str, Any]]:
    """The figures of every attack and n of a run, see `metrics.evaluate`; rows carry model and images too."""
    planned = plan(run)
    table = scores(planned, score(run, tick))
    names = {"model": planned.model.name, "images": planned.images.name}
    return [names | row for row in metrics.evaluate(table, calls(planned))]


@dataclass(frozen=True)
class Table:
    """A table of the paper: every attack without and with OMS on each model of a family.

    Attributes:
        title: what it shows.
        family: whose shipped models it shows unless one is named.
        paper: from an attack and n to the paper's figures.
    """

    title: str
    family: str
    paper: Callable[[str, int], paper.Reported]


TABLES = {
    "1": Table("MIA methods on DDPM", "ddpm", paper.ddpm),
    "3": Table("MIA methods on text-to-image models", "stable_diffusion", paper.text_to_image),
    "4": Table("MIA methods on U-ViT", "uvit", paper.uvit),
}


def table(name: str, run: Run, tick: Tick | None = None) -> list[dict[str, Any]]:
    """A table by its number in the paper, measured on the run's model or, without one, on every shipped model of
    its family; the paper's figures beside in `paper`.

    Raises:
        InputError: no such table.
    """
    if name not in TABLES:
        raise InputError(f"There is no table {name!r}; known are {', '.join(TABLES)}.")
    shown = TABLES[name]
    models = [run.model] if run.model else of_family(shown.family)
    rows = [row for model in models for row in evaluate(replace(run, model=model), tick)]
    return [row | {"paper": shown.paper(row["attack"], row["n"])} for row in rows]


def of_family(family: str) -> list[str]:
    """The shipped models of a family, by name."""
    return [name for name, card in catalog.built_in().items() if card["family"] == family]


def listing(what: str) -> list[dict[str, Any]]:
    """What there is: models, images, attacks or figures, a row each."""
    return LISTINGS[what]()


def list_models() -> list[dict[str, Any]]:
    rows = []
    for name, card in catalog.built_in().items():
        model = catalog.describe(name)
        row = {"name": name, "family": model.family, "images": model.images, "size": list(model.profile.size)}
        row |= {"parameters": model.parameters, "members": card["members"], "epochs": catalog.epochs(name)}
        rows.append(row)
    return [*rows, {"name": "ideal:SET", "family": "ideal", "images": "SET"}]


def list_images() -> list[dict[str, Any]]:
    from oms_core.images import BUILT_IN, open_images

    return [{"name": name} | open_images(name).table.role.value_counts().to_dict() for name in BUILT_IN]


def list_attacks() -> list[dict[str, Any]]:
    return [
        {"name": a.name, "title": a.title, "t": a.t, "calls": a.calls(a.t), "access": a.access, "source": a.source}
        for a in ATTACKS.values()
    ]


def list_figures() -> list[dict[str, Any]]:
    return [{"name": name, "title": shown.title} for name, shown in FIGURES.items()]


def list_tables() -> list[dict[str, Any]]:
    return [{"name": name, "title": shown.title} for name, shown in TABLES.items()]


LISTINGS = {
    "models": list_models,
    "images": list_images,
    "attacks": list_attacks,
    "figures": list_figures,
    "tables": list_tables,
}
