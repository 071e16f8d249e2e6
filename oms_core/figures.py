"""Plotly figures from tables. Each comes with a sentence that says what it shows, in numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from oms_core.metrics import Roc

pio.templates.default = "plotly_white"  # a figure that is given another one later takes four times as long to make
MEMBER, NONMEMBER, UPLOAD, NOISE = "#0072B2", "#D55E00", "#8A8A8A", "#009E73"
GROUPS = ((True, "members", MEMBER, "circle", "solid"), (False, "non-members", NONMEMBER, "diamond", "dash"))
ATTACK_COLOURS = {
    "NA": "#009E73",
    "PIA": "#CC79A7",
    "PIAN": "#E69F00",
    "SecMI": "#56B4E9",
    "SecMI-xt": "#8C6BB1",
    "SecMI-released": "#7F7F7F",
}
DASH = {1: "dot", 2: "solid", 3: "dash"}  # the paper's convention: dotted without OMS, solid with
LEAST_RATE = 1e-3  # where the log-scaled ROC begins
DOTS = {"size": 5, "maxdisplayed": 40}  # on a curve that can be clicked; those not drawn can be clicked too
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BAND = (0.1, 0.9)  # quantiles of a cohort drawn as a band
GAP = 0.3  # between the boxes of two n, and between those of one n, as shares
NAME = 12  # hex digits of a picture's SHA-256 that a clicked point carries


@dataclass(frozen=True)
class Chart:
    """A figure, the sentence that stands for it, and the table behind it."""

    figure: go.Figure
    alt: str
    table: pd.DataFrame


def layout(figure: go.Figure, x: str, y: str, height: int = 380) -> go.Figure:
    """The common look: legend above, light margins, axis titles."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        font={"size": 14},
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def colour_of(attack: str) -> str:
    return ATTACK_COLOURS.get(attack, "#333333")


def label_of(attack: str, n: int) -> str:
    """An attack's name with its number of steps, as the legend shows it."""
    return attack if n == 1 else f"{attack} +OMS" if n == 2 else f"{attack} n = {n}"


def names(images: Iterable[str]) -> list[str]:
    """Pictures as a clicked point carries them: by the beginning of their SHA-256."""
    return [image[:NAME] for image in images]


def residual_boxes(residuals: pd.DataFrame, dimension: int) -> Chart:
    """Boxes of ||delta^n|| by n for members and non-members, with the distance of two noises (Fig. 1, below).

    Args:
        residuals: image, member, n, residual.
        dimension: how many numbers a picture has; two draws from N(0, I) are about sqrt(2 d) apart.
    """
    figure = go.Figure()
    add_boxes_and_outliers(figure, residuals, "residual")
    green = add_noise_line(figure, dimension, residuals.n.max())
    figure.update_yaxes(residual_axis(np.append(residuals.residual, green)))
    figure.update_xaxes(dtick=1)
    layout(figure, "step n", "residual ‖δⁿ‖₂")
    table = residuals.groupby(["n", "member"]).residual.describe()[["count", "25%", "50%", "75%"]].reset_index()
    return Chart(figure, residual_sentence(residuals), table)


def add_boxes_and_outliers(figure: go.Figure, rows: pd.DataFrame, value: str) -> None:
    """Boxes of a value by n, members beside non-members, and what lies outside the whiskers as points to click.

    Whiskers reach to the last picture within 1.5 interquartile ranges of the box; what is not finite is left out.
    """
    rows = rows[np.isfinite(rows[value])]
    for side, (member, name, colour, symbol, _) in zip((-1, 1), GROUPS, strict=True):
        group = rows[rows.member == member]
        quartiles = group.groupby("n")[value].quantile([0.25, 0.5, 0.75]).unstack().reindex(columns=[0.25, 0.5, 0.75])
        reach = 1.5 * (quartiles[0.75] - quartiles[0.25])
        low, high = group.n.map(quartiles[0.25] - reach), group.n.map(quartiles[0.75] + reach)
        inside = group[value].between(low, high)
        whiskers = group[inside].groupby("n")[value].agg(["min", "max"])
        figure.add_box(
            x=quartiles.index, q1=quartiles[0.25], median=quartiles[0.5], q3=quartiles[0.75],
            lowerfence=whiskers["min"], upperfence=whiskers["max"], name=name, marker_color=colour, line_width=1.5,
            offsetgroup=name, legendgroup=name,
        )  # fmt: skip
        outside = group[~inside]
        figure.add_scatter(
            x=outside.n + side * (1 - GAP) / 4, y=outside[value], mode="markers", name=f"{name}, outliers",
            marker={"color": colour, "symbol": symbol, "size": 5}, customdata=names(outside.image),
            legendgroup=name, showlegend=False, hovertemplate="%{y:.3g}",
        )  # fmt: skip
    figure.update_layout(boxmode="group", boxgap=GAP, boxgroupgap=GAP)


def residual_and_error(residuals: pd.DataFrame, errors: pd.DataFrame, dimension: int, shown: int = 10) -> Chart:
    """Boxes of the residual by n, left, and of the distance from the last iterate, right (Fig. B.1, B.2).

    Args:
        residuals: image, member, n, residual.
        errors: image, member, n, error.
        dimension: how many numbers x_0 has.
        shown: the largest n that is drawn.
    """
    figure = make_subplots(1, 2, horizontal_spacing=0.1)
    green, groups = math.sqrt(2 * dimension), ((residuals, "residual"), (errors, "error"))
    for place, (rows, value) in enumerate(groups, start=1):
        rows = rows[(rows.n >= 1) & (rows.n <= shown)]
        for member, name, colour, _, _ in GROUPS:
            own = rows[rows.member == member]
            figure.add_box(
                x=own.n, y=own[value], name=name, marker_color=colour, boxpoints=False, line_width=1.5,
                offsetgroup=name, legendgroup=name, showlegend=place == 1, row=1, col=place,
            )  # fmt: skip
        figure.add_hline(green, line_color=NOISE, line_dash="dashdot", row=1, col=place)
        figure.update_yaxes(residual_axis(np.append(rows[value], green)), row=1, col=place)
    figure.update_layout(boxmode="group")
    layout(figure, "step n", "residual ‖δⁿ‖₂")
    figure.update_xaxes(dtick=1)
    last = int(residuals.n.max())
    figure.update_yaxes(title_text=f"error ‖εⁿ - ε{str(last).translate(SUPERSCRIPT)}‖₂", col=2)
    near = errors[errors.n == min(shown, last - 1)].groupby("member").error.median()
    alt = residual_sentence(residuals[residuals.n <= shown]) + (
        f" Median distance from eps^{last} at n = {min(shown, last - 1)}: {near.get(True, math.nan):.2f} for members, "
        f"{near.get(False, math.nan):.2f} for non-members."
    )
    medians = errors.groupby(["n", "member"]).error.median().reset_index()
    table = residuals.groupby(["n", "member"]).residual.median().reset_index().merge(medians, how="outer")
    return Chart(figure, alt, table)


def residual_axis(values: np.ndarray) -> dict:
    """A log axis from below the least finite value to above the largest, in steps, so that it stays put."""
    values = values[np.isfinite(values)]
    low, high = math.log10(max(values.min(), 1e-6)), math.log10(values.max())
    ticks = [digit * 10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for digit in (1, 2, 5)]
    return {
        "type": "log",
        "range": [math.floor(3 * low) / 3, math.ceil(6 * high) / 6 + 0.05],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def add_noise_line(figure: go.Figure, dimension: int, steps: int) -> float:
    """The distance of two draws from N(0, I) in so many dimensions, about sqrt(2 d), as the paper's green line."""
    green = math.sqrt(2 * dimension)
    figure.add_scatter(
        x=[0.5, steps + 0.5], y=[green, green], mode="lines", line={"color": NOISE, "dash": "dashdot", "width": 2},
        name=f"two random noises, √(2d) = {green:.2f}",
    )  # fmt: skip
    return green


def residual_sentence(residuals: pd.DataFrame) -> str:
    medians = residuals.groupby(["n", "member"]).residual.median().unstack()
    parts = [
        f"n = {n}: {row.get(True, math.nan):.2f} and {row.get(False, math.nan):.2f}" for n, row in medians.iterrows()
    ]
    shown = [*parts[:3], *([parts[-1]] if len(parts) > 3 else [])]
    return "Median residual of members and non-members at " + "; ".join(shown) + "."


def roc_curves(
    curves: Mapping[tuple[str, int], tuple[Roc, float]],
    scales: Sequence[str] = ("linear",),
    pictures: Mapping[tuple[str, int], Sequence[str]] = MappingProxyType({}),
) -> Chart:
    """ROC curves, dotted without OMS and solid with, one colour per attack (Fig. D.1, D.2).

    Args:
        curves: the curve and its AUC, by attack and n.
        scales: a panel for each, linear or log; log axes begin at 0.001.
        pictures: for each threshold of a curve one whose score it is, "" for the first; with them it can be clicked.
    """
    figure = make_subplots(1, len(scales), horizontal_spacing=0.08)
    for place, scale in enumerate(scales, start=1):
        log = scale == "log"
        chance = np.geomspace(LEAST_RATE, 1, 50) if log else [0, 1]
        figure.add_scatter(
            x=chance, y=chance, mode="lines", line={"color": "#BBBBBB", "width": 1}, name="chance",
            showlegend=place == 1, row=1, col=place,
        )  # fmt: skip
        for (attack, n), (curve, auc) in curves.items():
            kept = corners(curve)
            fpr, tpr = (np.maximum(rate[kept], LEAST_RATE if log else 0) for rate in (curve.fpr, curve.tpr))
            figure.add_scatter(
                x=fpr, y=tpr, mode="lines", name=f"{label_of(attack, n)} ({100 * auc:.1f})",
                line={"color": colour_of(attack), "dash": DASH.get(n, "longdash"), "width": 2},
                legendgroup=f"{attack} {n}", showlegend=place == 1, row=1, col=place,
            )  # fmt: skip
            if pictures:
                carried = np.asarray(names(pictures[attack, n]))[kept]
                figure.data[-1].update(mode="lines+markers", marker=DOTS, customdata=carried.tolist())
        axis = {"type": "log", "range": [math.log10(LEAST_RATE), 0.02], "dtick": 1} if log else {"range": [-0.01, 1.01]}
        figure.update_xaxes(axis, col=place)
        figure.update_yaxes(axis, col=place)
    layout(figure, "false alarms (FPR)", "members caught (TPR)", height=440)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    rows = [{"attack": a, "n": n, "auc": auc, "tpr at 1 % fpr": c.tpr_at(0.01)} for (a, n), (c, auc) in curves.items()]
    alt = "AUC: " + "; ".join(f"{label_of(row['attack'], row['n'])} {100 * row['auc']:.1f} %" for row in rows) + "."
    return Chart(figure, alt, pd.DataFrame(rows))


def corners(curve: Roc) -> np.ndarray:
    """Which points of a curve are its ends or where it turns, (K,) bool; the others lie between them."""
    direction = np.arctan2(np.diff(curve.tpr), np.diff(curve.fpr))
    kept = np.ones(len(curve.fpr), bool)
    kept[1:-1] = ~np.isclose(direction[:-1], direction[1:])
    return kept


def histograms(scores: pd.DataFrame, threshold: Mapping[int, float], bins: int = 50) -> Chart:
    """Scores of members and non-members without and with OMS, with the threshold of each (Fig. F.1a)."""
    steps = sorted(scores.n.unique())
    attack = scores.attack.iloc[0]
    figure = make_subplots(1, len(steps), subplot_titles=[label_of(attack, n) for n in steps], horizontal_spacing=0.06)
    for place, n in enumerate(steps, start=1):
        group = scores[scores.n == n]
        low, high = np.quantile(group.score, [0.002, 1])
        width = (high - low) / bins or 1  # 1 where all scores are equal
        tallest = 0.0
        for member, name, colour, _, _ in GROUPS:
            values = group.score[group.member == member].clip(low)
            figure.add_histogram(
                x=values, name=name, marker_color=colour, opacity=0.6,
                xbins={"start": low, "end": high + width, "size": width}, histnorm="probability",
                marker_pattern_shape="" if member else "/", legendgroup=name, showlegend=place == 1, row=1, col=place,
            )  # fmt: skip
            counts, _ = np.histogram(values, bins + 1, (low, low + (bins + 1) * width))
            tallest = max(tallest, counts.max() / max(1, len(values)))
        for below, (member, name, colour, symbol, _) in zip((0.05, 0.11), GROUPS, strict=True):
            rows = group[group.member == member]
            figure.add_scatter(
                x=rows.score.clip(low), y=np.full(len(rows), -below * tallest), mode="markers", name=f"{name}, each",
                marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.5}, customdata=names(rows.image),
                legendgroup=name, showlegend=False, hovertemplate="%{x:.4g}", row=1, col=place,
            )  # fmt: skip
        figure.update_yaxes(range=[-0.16 * tallest, 1.05 * tallest], col=place)
        figure.add_vline(threshold[n], line_dash="dash", line_color="#555555", row=1, col=place)
    figure.update_layout(barmode="overlay")
    layout(figure, "score (larger = more likely a member)", "")
    figure.update_layout(margin_t=80, legend_y=1.12)
    figure.update_yaxes(title_text="share of the group", col=1)
    table = scores.groupby(["n", "member"]).score.describe()[["count", "mean", "std", "50%"]].reset_index()
    shares = [f"{label_of(attack, n)} {100 * caught(scores[scores.n == n], threshold[n]):.1f} %" for n in steps]
    return Chart(figure, "Members beyond the threshold: " + "; ".join(shares) + ".", table)


def caught(scores: pd.DataFrame, threshold: float) -> float:
    """The share of members whose score reaches the threshold."""
    return float((scores.score[scores.member] >= threshold).mean())


def changed_labels(changes: pd.DataFrame) -> Chart:
    """How many members of each label OMS corrects, and how many it newly breaks (Fig. F.1b, and its other side).

    Args:
        changes: image, member, label, before, after; see `oms_core.metrics.corrected`.
    """
    members = changes[changes.member]
    fixed = members[~members.before & members.after].groupby("label").size()
    broken = members[members.before & ~members.after].groupby("label").size()
    table = pd.DataFrame({"corrected": fixed, "newly wrong": broken}).reindex(sorted(changes.label.unique()))
    table = table.fillna(0).astype(int).rename_axis("label").reset_index()
    shown = table.label.map(html.escape)  # Plotly reads tags in what it writes beside an axis
    figure = go.Figure()
    figure.add_bar(x=shown, y=table.corrected, name="corrected by OMS", marker_color=MEMBER, customdata=table.label)
    figure.add_bar(
        x=shown, y=-table["newly wrong"], name="newly wrong", marker_color=NONMEMBER, marker_pattern_shape="/",
        customdata=table.label,
    )  # fmt: skip
    figure.update_layout(barmode="relative")
    figure.update_xaxes(type="category")
    layout(figure, "label", "members")
    alt = f"OMS corrects {table.corrected.sum()} members and newly misses {table['newly wrong'].sum()}."
    return Chart(figure, alt, table)


def auc_by_pair(table: pd.DataFrame) -> Chart:
    """AUC of each distance d(i, j), by attack (Fig. 3).

    Args:
        table: attack, pair, auc, auc_lo, auc_hi.
    """
    figure = go.Figure()
    for attack, rows in table.groupby("attack", sort=False):
        figure.add_bar(
            x=rows.pair, y=100 * rows.auc, name=attack, marker_color=colour_of(attack),
            error_y={"type": "data", "symmetric": False, "array": 100 * (rows.auc_hi - rows.auc),
                     "arrayminus": 100 * (rows.auc - rows.auc_lo)},
        )  # fmt: skip
    figure.add_hline(50, line_color="#BBBBBB")
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[min(40, 100 * table.auc_lo.min() - 2), 100])
    layout(figure, "distance between iterates", "AUC (%)")
    best = table.loc[table.groupby("attack", sort=False).auc.idxmax()]
    alt = "The best distance: " + "; ".join(f"{r.attack} {r.pair} {100 * r.auc:.1f} %" for r in best.itertuples()) + "."
    return Chart(figure, alt, table)


def path(
    cohort: pd.DataFrame,
    own: Sequence[tuple[str, bool | None, Sequence[float]]],
    n: int,
    dimension: int,
    pictures: Sequence[str] = (),
) -> Chart:
    """Residual paths of single pictures up to step n, over the bands of both cohorts.

    Args:
        cohort: image, member, n, residual of many pictures.
        own: a name, whether it is a member (None hides it), and the residuals at n = 1, 2, ... of each picture.
        n: how far the search has gone.
        dimension: how many numbers a picture has.
        pictures: which ones they are; with them the lines can be clicked.
    """
    figure = go.Figure()
    low_high = cohort.groupby(["member", "n"]).residual.quantile(BAND).unstack()
    for member, name, colour, _, dash in GROUPS:
        if member in low_high.index.get_level_values("member"):
            add_band(figure, low_high.loc[member], f"8 of 10 {name}", colour, dash)
    for place, (name, member, values) in enumerate(own):
        colour, symbol, dash = {True: (MEMBER, "circle", "solid"), False: (NONMEMBER, "diamond", "dash")}.get(
            member, (("#777777", "#C08A00")[place % 2], ("square", "x")[place % 2], ("solid", "dash")[place % 2])
        )
        figure.add_scatter(
            x=list(range(1, n + 1)), y=list(values[:n]), name=name, mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 3}, marker={"symbol": symbol, "size": 11},
            customdata=names([pictures[place]] * n) if pictures else None,
        )  # fmt: skip
    steps = max([len(values) for *_, values in own] or [int(cohort.n.max())])
    green = add_noise_line(figure, dimension, steps)
    everything = [green, *low_high.to_numpy().ravel(), *(value for *_, values in own for value in values)]
    figure.update_yaxes(residual_axis(np.array(everything)))
    figure.update_xaxes(range=[0.7, steps + 0.3], dtick=1)
    layout(figure, "step n", "residual ‖δⁿ‖₂", height=420)
    table = pd.DataFrame({name: list(values[:n]) for name, _, values in own}, index=range(1, n + 1)).rename_axis("n")
    said = "; ".join(f"{name} {values[n - 1]:.2f}" for name, _, values in own) if n else "press Step to begin"
    return Chart(figure, f"Residual at step n = {n}: {said}.", table.reset_index())


def add_band(figure: go.Figure, band: pd.DataFrame, name: str, colour: str, dash: str) -> None:
    """The range between two quantiles, (n, 2), as a filled band."""
    low, high = band.columns
    figure.add_scatter(
        x=band.index,
        y=band[low],
        mode="lines",
        line={"color": colour, "width": 1, "dash": dash},
        showlegend=False,
    )
    figure.add_scatter(
        x=band.index, y=band[high], mode="lines", line={"color": colour, "width": 1, "dash": dash}, name=name,
        fill="tonexty", fillcolor=f"rgba({', '.join(str(int(colour[k:k + 2], 16)) for k in (1, 3, 5))}, 0.15)",
    )  # fmt: skip


def convergence(norms: pd.DataFrame, residuals: pd.DataFrame, dimension: int) -> Chart:
    """The norm of f's Jacobian, above, and the residual, below, by n for each timestep (Fig. 1).

    Args:
        norms: image, member, t, n, norm.
        residuals: image, member, t, n, residual.
        dimension: how many numbers a picture has.
    """
    timesteps = sorted(residuals.t.unique())
    figure = make_subplots(
        2, len(timesteps), subplot_titles=[f"t = {t}" for t in timesteps], shared_xaxes="columns",
        horizontal_spacing=0.06, vertical_spacing=0.08,
    )  # fmt: skip
    for place, t in enumerate(timesteps, start=1):
        add_boxes(figure, norms[norms.t == t], "norm", 1, place, place == 1)
        add_boxes(figure, residuals[residuals.t == t], "residual", 2, place, False)
        figure.add_hline(1, line_dash="dot", line_color="#555555", row=1, col=place)
        figure.add_hline(math.sqrt(2 * dimension), line_dash="dashdot", line_color=NOISE, row=2, col=place)
    figure.update_yaxes(range_of(norms.norm, 1), row=1)
    figure.update_yaxes(residual_axis(np.append(residuals.residual, math.sqrt(2 * dimension))), row=2)
    layout(figure, "", "", height=620)
    figure.update_xaxes(dtick=2)
    figure.update_xaxes(title_text="step n", row=2)
    figure.update_layout(boxmode="group", legend_y=1.06)
    figure.update_yaxes(title_text="‖∂f/∂ε‖ at εⁿ", row=1, col=1)
    figure.update_yaxes(title_text="residual ‖δⁿ‖₂", row=2, col=1)
    medians = norms.groupby(["t", "n", "member"]).norm.median().unstack()
    said = [f"t = {t}: {two_medians(medians.loc[t].iloc[0])}" for t in timesteps]
    table = residuals.groupby(["t", "n", "member"]).residual.median().reset_index()
    table = norms.groupby(["t", "n", "member"]).norm.median().reset_index().merge(table, how="outer")
    alt = "Median norm of the Jacobian at the start, members and non-members: " + "; ".join(said) + "."
    return Chart(figure, alt, table)


def around_one(rows: pd.DataFrame, value: str, title: str) -> Chart:
    """Boxes by n of something that says by its side of 1 whether the search contracts.

    Args:
        rows: image, member, n, and the value.
        value: its column.
        title: what it is.
    """
    figure = go.Figure()
    add_boxes_and_outliers(figure, rows, value)
    figure.add_hline(1, line_dash="dot", line_color="#555555")
    figure.update_yaxes(range_of(rows[value], 1))
    layout(figure, "step n", title)
    figure.update_xaxes(dtick=1)
    medians = rows.groupby(["n", "member"])[value].median().unstack()
    said = "; ".join(f"n = {n}: {two_medians(row)}" for n, row in medians.head(3).iterrows())
    table = rows.groupby(["n", "member"])[value].describe()[["count", "25%", "50%", "75%"]].reset_index()
    return Chart(figure, f"Median of members and non-members at {said}.", table)


def range_of(values: pd.Series, *more: float) -> dict:
    """A linear axis that holds nearly all of some values, and more."""
    low, high = np.nanquantile(values, [0.005, 0.995])
    low, high = min(low, *more), max(high, *more)
    return {"range": [low - 0.05 * (high - low), high + 0.05 * (high - low)]}


def two_medians(row: pd.Series, form: str = ".2f") -> str:
    return f"{row.get(True, math.nan):{form}} and {row.get(False, math.nan):{form}}"


def add_boxes(figure: go.Figure, rows: pd.DataFrame, value: str, row: int, col: int, legend: bool) -> None:
    """Boxes of a value by n, members beside non-members."""
    for member, name, colour, _, _ in GROUPS:
        group = rows[rows.member == member]
        figure.add_box(
            x=group.n, y=group[value], name=name, marker_color=colour, boxpoints=False, line_width=1.5,
            offsetgroup=name, legendgroup=name, showlegend=legend, row=row, col=col,
        )  # fmt: skip


def contraction_and_error(constants: pd.DataFrame, errors: pd.DataFrame) -> Chart:
    """The contraction constant by timestep, first, then the error by n for each timestep (Fig. B.1).

    Args:
        constants: image, member, t, k.
        errors: image, member, t, n, error.
    """
    timesteps = sorted(errors.t.unique())
    titles = ["contraction constant", *(f"error, t = {t}" for t in timesteps)]
    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.05)
    add_boxes(figure, constants.assign(n=constants.t.astype(str)), "k", 1, 1, True)
    figure.add_hline(1, line_dash="dot", line_color="#555555", row=1, col=1)
    last = int(errors.n.max()) + 1
    shown = errors[(errors.error > 0) & (errors.n <= 10)]
    for place, t in enumerate(timesteps, start=2):
        add_boxes(figure, shown[shown.t == t], "error", 1, place, False)
        figure.update_yaxes(residual_axis(shown.error.to_numpy()), col=place)
    layout(figure, "step n", "", height=420)
    figure.update_layout(boxmode="group", legend_y=1.1)
    figure.update_xaxes(title_text="timestep t", type="category", col=1)
    figure.update_yaxes(title_text=f"‖εⁿ - ε{str(last).translate(SUPERSCRIPT)}‖₂", col=2)
    medians = constants.groupby(["t", "member"]).k.median().unstack()
    said = [f"t = {t}: {two_medians(medians.loc[t])}" for t in timesteps]
    below = 100 * (constants.k < 1).mean()
    alt = f"Median contraction constant of members and non-members: {'; '.join(said)}; below 1 for {below:.0f} %."
    table = shown.groupby(["t", "n", "member"]).error.median().reset_index()
    return Chart(figure, alt, table.merge(medians.stack().rename("k").reset_index(), how="outer"))


def sweep(rows: Sequence[Mapping], by: str, title: str) -> Chart:
    """AUC and TPR at 1 % FPR over something that varies, dotted without OMS and solid with (Fig. 2a).

    Args:
        rows: see `oms_core.metrics.evaluate`, and `by`.
        by: what varies.
        title: the same for people.
    """
    table = pd.DataFrame(rows)[["attack", "n", by, *(f"{m}{end}" for m in ("auc", "tpr1") for end in ENDS)]]
    table = table[table.n <= 2]
    figure = make_subplots(1, 2, horizontal_spacing=0.1)
    for place, measure in enumerate(("auc", "tpr1"), start=1):
        for (attack, n), group in table.groupby(["attack", "n"], sort=False):
            add_line(figure, group, by, measure, attack, n, place)
    layout(figure, title, "")
    figure.update_yaxes(title_text="AUC (%)", col=1)
    figure.update_yaxes(title_text="TPR at 1 % FPR (%)", rangemode="tozero", col=2)
    return Chart(figure, sweep_sentence(table, by), table)


ENDS = ("", "_lo", "_hi")  # a figure and its interval


def add_line(figure: go.Figure, rows: pd.DataFrame, by: str, measure: str, attack: str, n: int, place: int) -> None:
    """One attack at one n, with its intervals."""
    value, low, high = (100 * rows[f"{measure}{end}"].astype(float) for end in ENDS)
    figure.add_scatter(
        x=rows[by], y=value, mode="lines+markers", name=label_of(attack, n), legendgroup=f"{attack} {n}",
        line={"color": colour_of(attack), "dash": DASH.get(n, "longdash"), "width": 2}, showlegend=place == 1,
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "width": 2,
                 "thickness": 1},
        row=1, col=place,
    )  # fmt: skip


def sweep_sentence(table: pd.DataFrame, by: str) -> str:
    ends = []
    for (attack, n), rows in table.groupby(["attack", "n"], sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        ends.append(f"{label_of(attack, n)} {100 * first.auc:.1f} to {100 * last.auc:.1f} %")
    return f"AUC from {by} {table[by].min()} to {table[by].max()}: {'; '.join(ends)}."


def boost(rows: Sequence[Mapping]) -> Chart:
    """What OMS adds to AUC, with its paired interval, and to TPR at 1 % FPR, by timestep (Fig. 2b).

    Args:
        rows: see `oms_core.metrics.evaluate`, at several timesteps.
    """
    table = pd.DataFrame(rows)
    base = table[table.n == 1].set_index(["attack", "t"]).tpr1
    table = table[table.n == 2].set_index(["attack", "t"])
    table["tpr1_gain"] = (table.tpr1 - base).astype(float)
    table = table.reset_index()[["attack", "t", *(f"gain{end}" for end in ENDS), "tpr1_gain"]]
    figure = make_subplots(1, 2, horizontal_spacing=0.1)
    for attack, group in table.groupby("attack", sort=False):
        add_line(figure, group, "t", "gain", attack, 2, 1)
        figure.add_scatter(
            x=group.t, y=100 * group.tpr1_gain, mode="lines+markers", legendgroup=f"{attack} 2", showlegend=False,
            line={"color": colour_of(attack), "width": 2}, row=1, col=2,
        )  # fmt: skip
    figure.add_hline(0, line_color="#BBBBBB")
    layout(figure, "timestep t", "")
    figure.update_yaxes(title_text="gain in AUC (points)", col=1)
    figure.update_yaxes(title_text="gain in TPR at 1 % FPR (points)", col=2)
    best = table.loc[table.groupby("attack", sort=False).gain.idxmax()]
    said = "; ".join(f"{r.attack} {100 * r.gain:+.1f} at t = {r.t}" for r in best.itertuples())
    return Chart(figure, f"The largest gain of OMS in AUC points: {said}.", table)


def auc_grid(table: pd.DataFrame) -> Chart:
    """AUC of every distance d(i, j) at every timestep as a heat map.

    Args:
        table: t, pair, auc.
    """
    wide = table.pivot(index="pair", columns="t", values="auc").loc[table.pair.unique()]
    figure = go.Figure(
        go.Heatmap(
            x=[str(t) for t in wide.columns], y=wide.index, z=100 * wide.to_numpy(), texttemplate="%{z:.0f}",
            colorscale="RdBu_r", zmid=50, zmin=0, zmax=100, colorbar_title="AUC %",
        )
    )  # fmt: skip
    layout(figure, "timestep t", "distance")
    figure.update_xaxes(type="category")
    best = table.loc[table.auc.idxmax()]
    return Chart(figure, f"The best distance: {best.pair} at t = {best.t}, AUC {100 * best.auc:.1f} %.", table)


def ruler(scores: pd.DataFrame, files: Mapping[str, str], threshold: Mapping[int, float]) -> Chart:
    """Where pictures in question lie between known members and known non-members, a panel for each n.

    Args:
        scores: group (member, nonmember, asked), image, n, score.
        files: what each picture in question is called.
        threshold: by n, the score from which on a picture is flagged.
    """
    steps = sorted(scores.n.unique())
    titles = ["as published" if n == 1 else "with One More Step" for n in steps]
    figure = make_subplots(len(steps), 1, subplot_titles=titles, vertical_spacing=0.2)
    for place, n in enumerate(steps, start=1):
        group = scores[scores.n == n].set_index("group").sort_index()
        known = group.score[group.index != "asked"]
        low, high = np.quantile(known, [0.005, 1]) if len(known) else (group.score.min(), group.score.max())
        margin = 0.04 * (high - low) or 1
        for (member, name, colour, _, _), side in zip(GROUPS, ("positive", "negative"), strict=True):
            role = "member" if member else "nonmember"
            figure.add_violin(
                x=group.score[group.index == role].clip(low), y0=0, orientation="h", side=side, points=False, width=1.8,
                name=f"known {name}", line={"color": colour, "width": 1.5}, fillcolor=colour, opacity=0.55,
                legendgroup=name, showlegend=place == 1, hoverinfo="skip", row=place, col=1,
            )  # fmt: skip
        own = group[group.index == "asked"]
        figure.add_scatter(
            x=own.score.clip(low - margin / 2, high + margin / 2), y=np.zeros(len(own)), mode="markers",
            name="your pictures",
            marker={"symbol": "star", "size": 13, "color": UPLOAD, "line": {"color": "#222222", "width": 1}},
            hovertext=[html.escape(files[image]) for image in own.image], hoverinfo="text", legendgroup="asked",
            showlegend=place == 1, row=place, col=1,
        )  # fmt: skip
        if n in threshold:
            figure.add_vline(threshold[n], line_dash="dash", line_color="#555555", row=place, col=1)
        figure.update_xaxes(range=[low - margin, high + margin], row=place, col=1)
    layout(figure, "", "", height=230 * len(steps) + 60)
    figure.update_xaxes(title_text="score (larger = more likely a member)", row=len(steps))
    figure.update_yaxes(showticklabels=False, zeroline=True, range=[-1, 1])
    figure.update_layout(violingap=0, margin_t=80, legend_y=1.06)
    table = scores[scores.group == "asked"].assign(file=lambda rows: rows.image.map(files))[["file", "n", "score"]]
    beyond = [
        f"{int((rows.score >= threshold[n]).sum())} of {len(rows)} {title}"
        for n, title in zip(steps, titles, strict=True)
        if n in threshold and len(rows := table[table.n == n])
    ]
    return Chart(figure, f"Your pictures beyond the dashed threshold: {'; '.join(beyond) or 'none known'}.", table)


def power_curves(curves: pd.DataFrame, enough: float) -> Chart:
    """How often a set of so many known members is decided, dotted without OMS and solid with.

    Args:
        curves: n, pictures, power.
        enough: the share of decided sets that is called enough.
    """
    figure = go.Figure()
    for n, rows in curves.groupby("n"):
        figure.add_scatter(
            x=rows.pictures, y=100 * rows.power, mode="lines+markers",
            line={"color": MEMBER, "dash": DASH[n], "width": 2},
            name="as published" if n == 1 else "with One More Step",
        )  # fmt: skip
    figure.add_hline(100 * enough, line_dash="dash", line_color="#555555")
    layout(figure, "pictures in a set of known members", "sets decided (%)")
    ticks = sorted(curves.pictures.unique())
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(range=[-2, 103])
    said = "; ".join(
        f"{'as published' if n == 1 else 'with One More Step'} "
        + ", ".join(
            f"{r.pictures} pictures {100 * r.power:.0f} %" for r in rows[rows.pictures.isin([10, 50])].itertuples()
        )
        for n, rows in curves.groupby("n")
    )
    return Chart(figure, f"Sets of known members that are decided: {said}.", curves)


def combination(attacks: Iterable[str]) -> str:
    """Some attacks as one name."""
    return " + ".join(attacks) or "none"


def caught_together(combinations: pd.Series, attacks: Sequence[str]) -> Chart:
    """How many members exactly these attacks catch, most first; below each bar which attacks they are.

    Args:
        combinations: of each member, see `combination`.
        attacks: all that are compared.
    """
    counts = combinations.value_counts()
    bars = counts.index.tolist()
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.03, row_heights=[0.65, 0.35])
    figure.add_bar(
        x=bars, y=counts, name="members", marker_color=MEMBER, customdata=bars, text=counts, showlegend=False,
        hovertemplate="%{x}: %{y}", row=1, col=1,
    )  # fmt: skip
    for attack in attacks:
        of = [bar for bar in bars if attack in bar.split(" + ")]
        figure.add_scatter(
            x=of, y=[attack] * len(of), mode="markers", name=attack, customdata=of, showlegend=False,
            marker={"color": colour_of(attack), "size": 12}, row=2, col=1,
        )  # fmt: skip
    layout(figure, "", "", height=340)
    figure.update_xaxes(showticklabels=False, type="category", categoryarray=bars)
    figure.update_xaxes(title_text="caught by exactly these attacks", row=2)
    figure.update_yaxes(title_text="members", row=1)
    figure.update_yaxes(type="category", categoryarray=[*attacks][::-1], showgrid=True, row=2)
    all_of_them, nobody = (int(counts.get(name, 0)) for name in (combination(attacks), combination([])))
    alt = f"Of {len(combinations)} members {all_of_them} are caught by all {len(attacks)} attacks and {nobody} by none."
    return Chart(figure, alt, counts.rename_axis("caught by").rename("members").reset_index())
