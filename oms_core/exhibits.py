"""The paper's figures and tables by name, each from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from oms_core import catalog, figures, laboratory, metrics, paper, shift
from oms_core.attacks import ATTACKS, COMPARED
from oms_core.attacks.base import column
from oms_core.compute import Tick, score
from oms_core.errors import InputError
from oms_core.evaluation import with_rivals
from oms_core.figures import Chart
from oms_core.laboratory import members, of_columns
from oms_core.run import Plan, Run, errors, plan, residuals, scores

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3))  # Fig. 3
FALSE_ALARMS = 0.05  # the rate at which Figures F.1a and F.1b compare
LAST = 20  # the iterate that Figures B.1 and B.2 take for the fixed point
SHOWN_T = (100, 200, 350)  # of Figures 1 and B.1
OVER_TRAINING, OVER_TIMESTEPS = ("NA", "PIA", "SecMI"), ("NA", "PIA")  # attacks of Figures 2a and 2b
Signals = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Exhibit:
    """A figure of the paper.

    Attributes:
        title: what it shows.
        draw: from a completed run to the chart.
        attacks: which attacks it compares unless others are named.
        steps: how far the search must go.
        family: whose first shipped model it shows unless one is named.
        limit: how many pictures it takes unless a number is given.
    """

    title: str
    draw: Callable[[Run, Tick | None], Chart]
    attacks: tuple[str, ...]
    steps: int
    family: str = "ddpm"
    limit: int | None = None


def of_one_run(draw: Callable[[Plan, Signals], Chart]) -> Callable[[Run, Tick | None], Chart]:
    """A figure that needs the distances of a single run."""

    def drawn(run: Run, tick: Tick | None) -> Chart:
        return draw(plan(run), score(run, tick))

    return drawn


def convergence(run: Run, tick: Tick | None) -> Chart:
    """Figure 1: Jacobian norm above, residuals below, by t and n."""
    norms = laboratory.over_timesteps(replace(run, attacks=("Jacobian",)), SHOWN_T, laboratory.jacobian_norms, tick)
    rows = laboratory.over_timesteps(run, SHOWN_T, residuals, tick)
    return figures.convergence(norms, rows, plan(run).model.dimension)


def contraction_and_error(run: Run, tick: Tick | None) -> Chart:
    """Figure B.1: the contraction constant by t, and errors against eps^20 by t and n."""
    constants = laboratory.over_timesteps(run, SHOWN_T, laboratory.contraction, tick)
    return figures.contraction_and_error(constants, laboratory.over_timesteps(run, SHOWN_T, errors, tick))


def training(run: Run, tick: Tick | None) -> Chart:
    """Figure 2a: AUC and TPR at 1 % FPR by training epoch, without and with OMS."""
    return figures.sweep(laboratory.by_epoch(run, tick), "epoch", "training epoch")


def boost(run: Run, tick: Tick | None) -> Chart:
    """Figure 2b: what OMS adds to AUC and TPR at 1 % FPR by timestep."""
    return figures.boost(laboratory.by_timestep(run, tick=tick))


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
        columns = {f"d({i},{j})": -signal[column(i, j, task.attack.p)].to_numpy() for i, j in PAIRS}
        rows += [{"attack": task.attack.name} | row for row in of_columns(columns, members(planned, signal))]
    return pd.DataFrame(rows).rename(columns={"name": "pair"})


def roc(planned: Plan, signals: Signals, scale: str = "linear") -> Chart:
    """Figure D.1, or D.2 on log scales: ROC curves without and with OMS."""
    table = metrics.check_scores(scores(planned, signals))
    return curves(table[table.n <= 2], (scale,))


def curves(table: pd.DataFrame, scales: tuple[str, ...]) -> Chart:
    """The ROC curve of every attack and n in a score table, a panel for each scale."""
    found, pictures = {}, {}
    for (attack, n), rows in table.groupby(["attack", "n"], sort=False):
        values, member = rows.score.to_numpy(), rows.member.to_numpy()
        found[attack, n] = metrics.roc(values, member), metrics.auc(values, member)
        pictures[attack, n] = ["", *rows.sort_values("score", ascending=False).drop_duplicates("score").image]
    return figures.roc_curves(found, scales, pictures)


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


FIGURES = {
    "1": Exhibit("Jacobian norm and residuals by timestep and step", convergence, ("NA",), 10, limit=200),
    "2a": Exhibit(
        "AUC and TPR@1%FPR by training epoch, without and with OMS", training, OVER_TRAINING, 2,
        limit=laboratory.PICTURES,
    ),
    "2b": Exhibit("What OMS adds by timestep", boost, OVER_TIMESTEPS, 2, limit=laboratory.PICTURES),
    "3": Exhibit("AUC of each distance between iterates", of_one_run(pairs), COMPARED, 3),
    "B1": Exhibit("Contraction constant and error by timestep", contraction_and_error, ("NA",), LAST, limit=200),
    "B2": Exhibit(
        "Residual and error by step on U-ViT", of_one_run(residuals_and_errors), ("NA",), LAST, family="uvit", limit=200
    ),
    "D1": Exhibit("ROC curves without and with OMS", of_one_run(roc), COMPARED, 2),
    "D2": Exhibit("ROC curves on log scales without and with OMS", of_one_run(log_roc), COMPARED, 2),
    "D3": Exhibit(
        "ROC curves of a text-to-image model, linear and log", of_one_run(both_rocs), COMPARED, 2,
        family="stable_diffusion",
    ),
    "F1a": Exhibit("Scores before and after OMS", of_one_run(histograms), ("NA",), 2),
    "F1b": Exhibit(
        "Labels of the members that OMS corrects, and of those it newly breaks", of_one_run(labels), ("NA",), 2
    ),
}  # fmt: skip


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
    return plan(run), shown.draw(run, tick)


def evaluate(run: Run, tick: Tick | None = None) -> list[dict[str, Any]]:
    """The figures of every attack and n of a run, see `metrics.evaluate`, with the baseline of equal budget.

    Rows carry model and images too, and `pixels_auc`: what a classifier makes of the pictures without the model.
    """
    asked, run = run.attacks, with_rivals(run)
    planned = plan(run)
    names = {"model": planned.model.name, "images": planned.images.name}
    rows = laboratory.figures_of(run, asked, tick)
    alone = shift.of_roles(planned)
    return [names | row | {"pixels_auc": alone and alone["auc"]} for row in rows]


@dataclass(frozen=True)
class Table:
    """A table, of the paper or one that it should have had.

    Attributes:
        title: what it shows.
        families: whose shipped models it shows unless one is named.
        attacks: which attacks it compares unless others are named.
        rows: from a completed run to its rows.
        paper: from a row to the paper's figures.
        shown: the figures that matter in it.
        left_out: shipped models that take too long to be shown unless they are named.
    """

    title: str
    families: tuple[str, ...]
    attacks: tuple[str, ...]
    rows: Callable[[Run, Tick | None], list[dict[str, Any]]]
    paper: Callable[[dict[str, Any]], paper.Reported]
    shown: tuple[str, ...] = ("asr", "auc")
    left_out: tuple[str, ...] = ()

    def models(self) -> list[str]:
        """The shipped models that it shows."""
        return [name for name in of_family(*self.families) if name not in self.left_out]


def nothing(row: dict[str, Any]) -> None:
    """What the paper has of it."""


def false_alarms(run: Run, tick: Tick | None) -> list[dict[str, Any]]:
    """Table 5: members caught, and false alarms measured, at each nominal rate of the quantile regression."""
    from oms_core.attacks.quantile import rates_by_level

    planned = plan(run)
    task, rows = planned.tasks[0], score(run, tick)[run.attacks[0]]
    names = {"model": planned.model.name, "images": planned.images.name, "t": task.t}
    found = rates_by_level(rows, members(planned, rows), run.steps)
    return [names | row | {"calls": task.attack.calls_at(task.t, row["n"])} for row in found]


TABLES = {
    "1": Table("MIA methods on DDPM", ("ddpm",), COMPARED, evaluate, lambda row: paper.ddpm(row["attack"], row["n"])),
    "2": Table(
        "TPR at low FPR on DDPM", ("ddpm",), COMPARED, evaluate, lambda row: paper.ddpm(row["attack"], row["n"]),
        ("tpr1", "tpr01"),
    ),
    "3": Table(
        "MIA methods on text-to-image models", ("stable_diffusion",), COMPARED, evaluate,
        lambda row: paper.text_to_image(row["attack"], row["n"]), ("asr", "auc", "tpr1", "tpr01"),
    ),
    "4": Table(
        "MIA methods on U-ViT", ("uvit",), COMPARED, evaluate, lambda row: paper.uvit(row["attack"], row["n"]),
        ("asr", "auc", "tpr1"),
    ),
    "5": Table(
        "Quantile regression", ("ddpm", "uvit"), ("QR",), false_alarms,
        lambda row: paper.quantile(row["n"], row["nominal"]), ("tpr",),
    ),
    "6": Table(
        "Gradient-based attack, white-box", ("ddpm", "stable_diffusion"), ("GSA",), evaluate,
        lambda row: paper.gradients(row["attack"], row["n"]), ("asr", "auc", "tpr1", "tpr01"), ("ddpm-fashion",),
    ),
    "schemes": Table(
        "Iteration schemes at equal model calls", ("ddpm", "uvit", "stable_diffusion"), ("NA", "PIA"),
        laboratory.by_scheme, nothing, (),
    ),
    "trajectory": Table(
        "A regression on the whole chain at equal model calls", ("ddpm", "uvit", "stable_diffusion"),
        ("NA", "PIA", "SecMI"),
        laboratory.against_chain, nothing, (),
    ),
}  # fmt: skip


def table(name: str, run: Run, tick: Tick | None = None) -> list[dict[str, Any]]:
    """A table by its number in the paper, measured on the run's model or, without one, on every shipped model of
    its families; the paper's figures beside in `paper`.

    Raises:
        InputError: no such table.
    """
    if name not in TABLES:
        raise InputError(f"There is no table {name!r}; known are {', '.join(TABLES)}.")
    shown = TABLES[name]
    named = run.attacks if run.attacks != COMPARED else shown.attacks
    models = [run.model] if run.model else shown.models()
    rows = [row for model in models for row in shown.rows(replace(run, model=model, attacks=named), tick)]
    return [row | {"paper": shown.paper(row)} for row in rows]


def of_family(*families: str) -> list[str]:
    """The shipped models of some families, by name."""
    built_in = catalog.built_in()
    return [name for family in families for name, card in built_in.items() if card["family"] == family]


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
