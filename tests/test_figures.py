"""Figures show what their tables hold, say it in numbers, keep the house's signs, and stand alone as files."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from oms_core import figures
from oms_core.errors import InputError
from oms_core.export import page, write_figure
from oms_core.figures import LEAST_RATE, MEMBER, NONMEMBER, Chart, corners
from oms_core.metrics import Roc, auc, corrected, roc

RNG = np.random.default_rng(0)
COLOURS, SYMBOLS = {True: MEMBER, False: NONMEMBER}, {True: "circle", False: "diamond"}
DASHES = {True: "solid", False: "dash"}


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)]


def residual_table(pictures: int = 20, steps: int = 6, seed: int = 0) -> pd.DataFrame:
    """Residuals that fall with n, those of members faster."""
    rng = np.random.default_rng(seed)
    rows = [
        {"image": f"{k:03d}", "member": k % 2 == 0, "n": n, "residual": 60 * (0.4 if k % 2 == 0 else 0.6) ** n * noise}
        for k in range(pictures)
        for n, noise in zip(range(1, steps + 1), rng.uniform(0.8, 1.2, steps), strict=True)
    ]
    return pd.DataFrame(rows)


def score_table(seed: int = 0, each: int = 200, kind: str = "continuous") -> pd.DataFrame:
    """Scores of one attack at n = 1 and 2."""
    rng = np.random.default_rng(seed)
    member = np.arange(2 * each) % 2 == 0
    before = rng.normal(size=2 * each) + member
    after = before + member + rng.normal(size=2 * each)
    change = {"continuous": lambda s: s, "few values": np.round, "constant": np.zeros_like}[kind]
    one = pd.DataFrame({"image": [f"{k:04d}" for k in range(2 * each)], "member": member, "attack": "NA", "t": 100})
    return pd.concat([one.assign(n=1, score=change(before)), one.assign(n=2, score=change(after))], ignore_index=True)


def curves(seed: int = 0) -> dict[tuple[str, int], tuple[Roc, float]]:
    found = {}
    for place, (attack, n) in enumerate([("NA", 1), ("NA", 2), ("PIA", 1), ("PIA", 2), ("mine", 1), ("mine", 2)]):
        scores = score_table(seed + place)
        scores = scores[scores.n == n]
        values, member = scores.score.to_numpy(), scores.member.to_numpy()
        found[attack, n] = roc(values, member), auc(values, member)
    return found


def changes() -> pd.DataFrame:
    found = corrected(score_table(), 0.05)
    return found.assign(label=RNG.choice(["0", "1", "10", "cat"], len(found)))


def auc_table() -> pd.DataFrame:
    rows = [("NA", "d(0,1)", 0.6), ("NA", "d(0,2)", 0.75), ("PIA", "d(0,1)", 0.912), ("PIA", "d(0,2)", 0.9)]
    return pd.DataFrame(
        [{"attack": a, "pair": p, "auc": v, "auc_lo": v - 0.03, "auc_hi": v + 0.02} for a, p, v in rows]
    )


OWN = [("a cat", True, [30.0, 12.0, 5.0]), ("a dog", False, [40.0, 25.5, 17.25])]
HIDDEN = [(name, None, values) for name, _, values in OWN]


def lines(chart: Chart, name: str) -> list[go.Scatter]:
    """The traces of a name; that of a ROC curve has its AUC behind it."""
    return [trace for trace in chart.figure.data if trace.name == name or (trace.name or "").startswith(f"{name} (")]


# What every figure has


CHARTS = {
    "residual_boxes": lambda: figures.residual_boxes(residual_table(), 64),
    "roc_curves": lambda: figures.roc_curves(curves(), ("linear", "log")),
    "histograms": lambda: figures.histograms(score_table(), {1: 0.5, 2: 0.7}),
    "changed_labels": lambda: figures.changed_labels(changes()),
    "auc_by_pair": lambda: figures.auc_by_pair(auc_table()),
    "path": lambda: figures.path(residual_table(), OWN, 2, 64),
}


@pytest.mark.parametrize("name", CHARTS)
def test_every_figure_is_a_chart_with_a_sentence_a_table_and_named_axes(name: str) -> None:
    chart = CHARTS[name]()
    assert isinstance(chart, Chart)
    assert re.fullmatch(r"[A-Z].*\d.*\.", chart.alt)
    assert "nan" not in chart.alt
    assert len(chart.table)
    assert chart.table.notna().all(axis=None)
    assert chart.figure.layout.xaxis.title.text
    assert chart.figure.layout.yaxis.title.text
    go.Figure(chart.figure.to_dict())  # nothing in it that Plotly would refuse


def test_the_sentence_on_residuals_holds_the_medians_of_its_table() -> None:
    for steps, shown in ((1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (10, [1, 2, 3, 10])):
        rows = residual_table(steps=steps)
        chart = figures.residual_boxes(rows, 64)
        expected = []
        for n in shown:
            of_n = chart.table[chart.table.n == n].set_index("member")["50%"]
            assert of_n[True] == pytest.approx(np.median(rows.residual[(rows.n == n) & rows.member]))
            expected += [n, of_n[True], of_n[False]]
        assert numbers(chart.alt) == pytest.approx(expected, abs=0.005)


def test_the_sentence_on_curves_holds_the_aucs_of_its_table() -> None:
    given = curves()
    chart = figures.roc_curves(given)
    assert [*zip(chart.table.attack, chart.table.n, strict=True)] == [*given]
    assert [*chart.table.auc] == [area for _, area in given.values()]
    assert [*chart.table["tpr at 1 % fpr"]] == [curve.tpr_at(0.01) for curve, _ in given.values()]
    assert numbers(chart.alt) == pytest.approx([100 * area for area in chart.table.auc], abs=0.05)
    assert "NA +OMS" in chart.alt


def test_the_sentence_on_scores_holds_the_share_of_members_beyond_each_threshold() -> None:
    table = score_table()
    chart = figures.histograms(table, {1: 0.5, 2: 0.7})
    shares = [100 * np.mean(table.score[(table.n == n) & table.member] >= cut) for n, cut in ((1, 0.5), (2, 0.7))]
    assert numbers(chart.alt) == pytest.approx(shares, abs=0.05)
    assert chart.table["count"].tolist() == [200] * 4
    means = table.groupby(["n", "member"]).score.mean()
    assert chart.table["mean"].tolist() == pytest.approx(means.tolist())


def test_the_sentence_on_labels_holds_the_sums_of_its_table() -> None:
    given = changes()
    chart = figures.changed_labels(given)
    members = given[given.member]
    corrected_now = (~members.before & members.after).sum()
    newly_wrong = (members.before & ~members.after).sum()
    assert corrected_now > newly_wrong > 0
    assert (chart.table.corrected.sum(), chart.table["newly wrong"].sum()) == (corrected_now, newly_wrong)
    assert numbers(chart.alt) == [corrected_now, newly_wrong]
    for row in chart.table.itertuples(index=False):
        of_label = members[members.label == row.label]
        assert row.corrected == (~of_label.before & of_label.after).sum()
    up, down = chart.figure.data
    assert [*up.y] == [*chart.table.corrected]
    assert [*down.y] == [*-chart.table["newly wrong"]]
    assert [*up.x] == [*down.x] == sorted(given.label.unique())


def test_labels_without_a_change_are_shown_as_zero() -> None:
    same = changes().assign(before=True, after=True)
    chart = figures.changed_labels(same)
    assert (chart.table[["corrected", "newly wrong"]] == 0).all(axis=None)
    assert len(chart.table) == same.label.nunique()
    assert numbers(chart.alt) == [0, 0]


def test_the_sentence_on_distances_names_the_best_of_each_attack() -> None:
    chart = figures.auc_by_pair(auc_table())
    assert chart.alt == "The best distance: NA d(0,2) 75.0 %; PIA d(0,1) 91.2 %."
    for bar in chart.figure.data:
        rows = chart.table[chart.table.attack == bar.name]
        assert [*bar.y] == pytest.approx([*100 * rows.auc])
        assert [*np.add(bar.y, bar.error_y.array)] == pytest.approx([*100 * rows.auc_hi])
        assert [*np.subtract(bar.y, bar.error_y.arrayminus)] == pytest.approx([*100 * rows.auc_lo])


def test_the_axis_of_distances_reaches_below_the_worst_interval() -> None:
    table = auc_table().assign(auc_lo=0.2)
    low, high = figures.auc_by_pair(table).figure.layout.yaxis.range
    assert low < 20
    assert high == 100
    assert figures.auc_by_pair(auc_table()).figure.layout.yaxis.range[0] == 40  # stays put while all are above


def test_the_sentence_on_paths_holds_the_last_row_of_its_table() -> None:
    for n in (1, 2, 3):
        chart = figures.path(residual_table(), OWN, n, 64)
        assert [*chart.table.n] == [*range(1, n + 1)]
        assert [*chart.table["a dog"]] == OWN[1][2][:n]
        assert numbers(chart.alt) == [n, *(values[n - 1] for _, _, values in OWN)]


# Residuals


@pytest.mark.parametrize(("dimension", "shown"), [(3 * 32 * 32, "78.38"), (64, "11.31")])
def test_the_green_line_is_the_distance_of_two_random_noises(dimension: int, shown: str) -> None:
    drawn = np.linalg.norm(np.diff(np.random.default_rng(0).normal(size=(2, 500, dimension)), axis=0), axis=-1).mean()
    for chart in (
        figures.residual_boxes(residual_table(), dimension),
        figures.path(residual_table(), OWN, 1, dimension),
    ):
        (line,) = [trace for trace in chart.figure.data if trace.line.color == figures.NOISE]
        assert set(line.y) == {math.sqrt(2 * dimension)}
        assert line.y[0] == pytest.approx(drawn, rel=0.01)
        assert shown in line.name


def test_boxes_hold_the_residuals_of_each_group() -> None:
    rows = residual_table()
    chart = figures.residual_boxes(rows, 64)
    for member, name in ((True, "members"), (False, "non-members")):
        (box,) = lines(chart, name)
        for place, n in enumerate(box.x):
            values = rows.residual[(rows.member == member) & (rows.n == n)]
            drawn = [getattr(box, key)[place] for key in ("q1", "median", "q3")]
            assert drawn == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
        assert [*box.x] == sorted(rows.n.unique())
        assert box.marker.color == COLOURS[member]


def outliers(values: pd.Series) -> pd.Series:
    """Which values lie more than 1.5 interquartile ranges outside the box, by the book."""
    low, high = np.quantile(values, [0.25, 0.75])
    return (values < low - 1.5 * (high - low)) | (values > high + 1.5 * (high - low))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the spread of infinite values
@pytest.mark.parametrize("draw", [lambda rows: figures.residual_boxes(rows, 64),
                                  lambda rows: figures.around_one(rows, "residual", "ratio")])  # fmt: skip
def test_exactly_the_outliers_are_points_that_carry_their_picture(draw) -> None:
    rows = residual_table(pictures=200)
    rows.loc[rows.index % 37 == 0, "residual"] *= 8
    rows.loc[5, "residual"] = math.inf
    rows["image"] = rows.image + "0123456789abcdef"
    chart, finite = draw(rows), rows[np.isfinite(rows.residual)]
    for member, name in ((True, "members"), (False, "non-members")):
        group = finite[finite.member == member]
        outside = group[group.groupby("n").residual.transform(outliers)]
        assert len(outside) > 5
        (points,) = [trace for trace in chart.figure.data if trace.name == f"{name}, outliers"]
        expected = {(row.n, row.image[:12], row.residual) for row in outside.itertuples()}
        assert {*zip(np.rint(points.x), points.customdata, points.y, strict=True)} == expected
        assert points.marker.symbol == SYMBOLS[member]
        (box,) = lines(chart, name)
        for place, n in enumerate(box.x):
            values = group.residual[group.n == n]
            inside = values[~outliers(values)]
            assert (box.lowerfence[place], box.upperfence[place]) == (inside.min(), inside.max())


def test_a_group_that_is_missing_leaves_its_boxes_empty() -> None:
    rows = residual_table()
    chart = figures.residual_boxes(rows[rows.member], 64)
    assert len(lines(chart, "non-members")[0].median) == 0
    assert len(lines(chart, "members")[0].median) == rows.n.nunique()


def test_the_residual_axis_is_logarithmic_and_holds_everything() -> None:
    for scale in (1e-5, 1, 1e4):
        rows = residual_table().assign(residual=lambda rows, scale=scale: rows.residual * scale)
        for chart, top in (
            (figures.residual_boxes(rows, 64), rows.residual.max()),
            (figures.path(rows, [("one", True, [0.01 * scale, 50 * scale])], 2, 64), 50 * scale),
        ):
            axis = chart.figure.layout.yaxis
            assert axis.type == "log"
            assert 10 ** axis.range[0] <= max(1e-6, 0.01 * scale if top == 50 * scale else rows.residual.min())
            assert 10 ** axis.range[1] >= max(top, math.sqrt(128))
            inside = [tick for tick in axis.tickvals if axis.range[0] <= math.log10(tick) <= axis.range[1]]
            assert len(inside) >= 3
            assert [float(text) for text in axis.ticktext] == pytest.approx([*axis.tickvals])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the spread of infinite values
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_search_that_stands_still_or_diverges_can_be_drawn(value: float) -> None:
    rows = residual_table()
    rows.loc[rows.n == 6, "residual"] = value
    rows.loc[3, "residual"] = value
    own = [("one", True, [5.0, 2.0, value])]
    for chart in (figures.residual_boxes(rows, 64), figures.path(rows, own, 3, 64), figures.path(rows, own, 0, 64)):
        low, high = chart.figure.layout.yaxis.range
        assert -9 < low < high < 9


# The path of single pictures


def test_members_are_circles_on_solid_lines_and_non_members_diamonds_on_dashes() -> None:
    chart = figures.path(residual_table(), OWN, 3, 64)
    for name, member, values in OWN:
        (line,) = lines(chart, name)
        assert line.marker.symbol == SYMBOLS[member]
        assert line.line.dash == DASHES[member]
        assert line.line.color == COLOURS[member]
        assert [*zip(line.x, line.y, strict=True)] == [*zip((1, 2, 3), values, strict=True)]
    for name, member in (("8 of 10 members", True), ("8 of 10 non-members", False)):
        (band,) = lines(chart, name)
        assert band.line.color == COLOURS[member]
        assert band.line.dash == DASHES[member]


def test_a_hidden_label_shows_neither_groups_colour_nor_sign() -> None:
    styles = []
    for own in (HIDDEN, HIDDEN[::-1]):
        chart = figures.path(residual_table(), own, 3, 64)
        found = [lines(chart, name)[0] for name, _, _ in own]
        assert not {line.line.color for line in found} & {*COLOURS.values()}
        assert not {line.marker.symbol for line in found} & {*SYMBOLS.values()}
        styles.append([(line.line.color, line.marker.symbol, line.line.dash) for line in found])
        assert len(set(styles[-1])) == 2  # they can be told apart
        assert "member" not in chart.alt
    assert styles[0] == styles[1]  # by their place, not by what they are


def test_a_path_of_no_steps_shows_the_cohorts_and_asks_for_the_first() -> None:
    chart = figures.path(residual_table(), OWN, 0, 64)
    assert "press Step" in chart.alt
    assert all(len(line.y) == 0 for name, *_ in OWN for line in lines(chart, name))
    assert lines(chart, "8 of 10 members")
    assert chart.table.empty


def test_the_axes_of_a_path_stay_put_while_the_search_goes_on() -> None:
    ranges = set()
    for n in range(4):
        layout = figures.path(residual_table(), [*OWN, ("far off", None, [3.0, 900.0, 0.001])], n, 64).figure.layout
        ranges.add((layout.xaxis.range, layout.yaxis.range))
    assert len(ranges) == 1


def test_a_band_holds_eight_of_ten_pictures() -> None:
    rows = residual_table(pictures=400, steps=3)
    chart = figures.path(rows, OWN, 1, 64)
    for member, name in ((True, "8 of 10 members"), (False, "8 of 10 non-members")):
        place = [trace.name for trace in chart.figure.data].index(name)
        low, high = chart.figure.data[place - 1 : place + 1]
        assert high.fill == "tonexty"
        for n, bottom, top in zip(high.x, low.y, high.y, strict=True):
            values = rows.residual[(rows.n == n) & (rows.member == member)]
            assert ((bottom <= values) & (values <= top)).mean() == pytest.approx(0.8, abs=0.01)


def test_a_cohort_of_one_group_is_drawn_alone() -> None:
    rows = residual_table()
    chart = figures.path(rows[~rows.member], OWN, 1, 64)
    assert not lines(chart, "8 of 10 members")
    assert lines(chart, "8 of 10 non-members")


def test_cohorts_alone_can_be_drawn() -> None:
    chart = figures.path(residual_table(steps=5), [], 3, 64)
    assert chart.figure.layout.xaxis.range[1] > 5


# ROC curves


def test_curves_are_dotted_without_oms_and_solid_with_in_the_colour_of_their_attack() -> None:
    chart = figures.roc_curves(curves(), ("linear", "log"))
    colours = {}
    for attack, n in curves():
        panels = lines(chart, figures.label_of(attack, n))
        assert len(panels) == 2
        assert {line.line.dash for line in panels} == {"dot" if n == 1 else "solid"}
        assert [line.showlegend for line in panels] == [True, False]
        colours.setdefault(attack, set()).update(line.line.color for line in panels)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


def test_more_than_one_more_step_is_neither_dotted_nor_solid() -> None:
    curve = next(iter(curves().values()))
    chart = figures.roc_curves({("NA", n): curve for n in (1, 2, 3, 7)})
    assert [line.line.dash for n in (3, 7) for line in lines(chart, f"NA n = {n}")] == ["dash", "longdash"]


def test_log_axes_begin_at_the_least_rate_and_hold_the_curve() -> None:
    chart = figures.roc_curves(curves(), ("linear", "log"))
    layout = chart.figure.layout
    for axis in (layout.xaxis, layout.yaxis):
        assert axis.type != "log"
        assert axis.range[0] <= 0 < 1 <= axis.range[1]
    for axis in (layout.xaxis2, layout.yaxis2):
        assert axis.type == "log"
        assert 10 ** axis.range[0] == pytest.approx(LEAST_RATE) == pytest.approx(0.001)
        assert 10 ** axis.range[1] >= 1
    logged = [trace for trace in chart.figure.data if trace.xaxis == "x2"]
    assert len(logged) == 7
    assert all(min(*trace.x, *trace.y) >= LEAST_RATE for trace in logged)  # a log axis has no place for 0


def test_chance_is_the_diagonal() -> None:
    for trace in lines(figures.roc_curves(curves(), ("linear", "log")), "chance"):
        assert [*trace.x] == [*trace.y]
        assert max(trace.x) == 1


def along(fpr: np.ndarray, tpr: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The places on a polyline where fpr + tpr, which rises along any ROC, has the given values."""
    return np.column_stack([np.interp(points, fpr + tpr, rate) for rate in (fpr, tpr)])


def turns(curve: Roc, members: int, nonmembers: int) -> int:
    """How many points of a curve do not lie between their neighbours, in whole numbers; the ends never do."""
    points = [(round(f * nonmembers), round(t * members)) for f, t in zip(curve.fpr, curve.tpr, strict=True)]
    triples = zip(points, points[1:], points[2:], strict=False)
    return 2 + sum((b[0] - a[0]) * (c[1] - b[1]) != (b[1] - a[1]) * (c[0] - b[0]) for a, b, c in triples)


@pytest.mark.parametrize("kind", ["continuous", "few values", "constant", "separated", "reversed", "interleaved"])
def test_corners_keep_the_curve_and_drop_what_lies_between(kind: str) -> None:
    for seed, (members, nonmembers) in enumerate([(50, 50), (30, 90), (1, 40), (40, 1), (2000, 3000)]):
        rng = np.random.default_rng(seed)
        member = np.arange(members + nonmembers) < members
        scores = rng.normal(size=len(member)) + member
        if kind == "few values":
            scores = np.round(2 * scores)
        elif kind == "constant":
            scores = np.zeros(len(member))
        elif kind == "separated":
            scores = np.where(member, scores + 100, scores)
        elif kind == "reversed":
            scores = np.where(member, scores - 100, scores)
        elif kind == "interleaved":  # chance exactly: as many members as non-members at each score
            scores = np.where(member, np.arange(len(member)) % 5, (np.arange(len(member)) - members) % 5)
        curve = roc(scores, member)
        fpr, tpr = curve.fpr[corners(curve)], curve.tpr[corners(curve)]
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert along(fpr, tpr, curve.fpr + curve.tpr) == pytest.approx(
            np.column_stack([curve.fpr, curve.tpr]), abs=1e-9
        )
        assert len(fpr) == turns(curve, members, nonmembers)
        assert np.trapezoid(tpr, fpr) == pytest.approx(auc(scores, member), abs=1e-9)


def test_a_curve_of_pure_chance_is_drawn() -> None:
    curve = roc(np.zeros(10), np.arange(10) < 5)
    (line,) = lines(figures.roc_curves({("NA", 1): (curve, 0.5)}), "NA")
    assert [*zip(line.x, line.y, strict=True)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize("kind", ["continuous", "few values", "constant"])
def test_each_point_of_a_curve_carries_a_picture_with_just_that_score(kind: str) -> None:
    from oms_core.exhibits import curves as drawn

    table = score_table(kind=kind)
    table["image"] = table.image + "0123456789abcdef"
    chart = drawn(table, ("linear", "log"))
    for n, name in ((1, "NA"), (2, "NA +OMS")):
        rows = table[table.n == n]
        of_picture = rows.set_index(rows.image.str[:12])
        others, members = rows.score[~rows.member], rows.score[rows.member]
        for line in lines(chart, name):
            assert line.mode == "lines+markers"
            assert line.customdata[0] == ""
            assert len(line.customdata) == len(line.x)
            for x, y, image in [*zip(line.x, line.y, line.customdata, strict=True)][1:]:
                threshold = of_picture.score[image]
                assert x == pytest.approx(max((others >= threshold).mean(), 0 if line.xaxis == "x" else LEAST_RATE))
                assert y == pytest.approx(max((members >= threshold).mean(), 0 if line.xaxis == "x" else LEAST_RATE))


# Scores before and after


def bars_of(chart: Chart) -> list[go.Histogram]:
    return [trace for trace in chart.figure.data if isinstance(trace, go.Histogram)]


def test_below_the_bars_each_picture_is_a_point_that_carries_it() -> None:
    table = score_table()
    chart = figures.histograms(table, {1: 0.5, 2: 0.7})
    rugs = [trace for trace in chart.figure.data if isinstance(trace, go.Scatter)]
    assert len(rugs) == 4
    for rug, (n, member) in zip(rugs, [(1, True), (1, False), (2, True), (2, False)], strict=True):
        rows = table[(table.n == n) & (table.member == member)].set_index("image")
        assert {*rug.customdata} == {*rows.index}
        assert len({*rug.y}) == 1
        assert rug.y[0] < 0
        low = np.quantile(table.score[table.n == n], 0.002)
        assert [*rug.x] == pytest.approx([*rows.score[[*rug.customdata]].clip(low)])
        assert (rug.marker.color, rug.marker.symbol) == (COLOURS[member], SYMBOLS[member])
    assert rugs[0].y[0] != rugs[1].y[0]


def test_a_bar_of_labels_carries_its_label() -> None:
    for bars in figures.changed_labels(changes()).figure.data:
        assert [*bars.customdata] == [*bars.x]


def test_a_path_carries_its_picture_only_when_it_is_told() -> None:
    names = ["a" * 64, "b" * 64]
    for n in (0, 2):
        chart = figures.path(residual_table(), OWN, n, 64, names)
        assert [[*lines(chart, name)[0].customdata] for name, *_ in OWN] == [["a" * 12] * n, ["b" * 12] * n]
    assert all(trace.customdata is None for trace in figures.path(residual_table(), OWN, 2, 64).figure.data)


def test_members_caught_by_each_combination_are_counted_once() -> None:
    caught = pd.Series(["NA + PIA"] * 5 + ["none"] * 7 + ["PIA"] * 2)
    chart = figures.caught_together(caught, ("NA", "PIA"))
    bar, na, pia = chart.figure.data
    assert dict(zip(bar.x, bar.y, strict=True)) == {"none": 7, "NA + PIA": 5, "PIA": 2}
    assert [*bar.customdata] == [*bar.x]
    assert ([*na.x], [*pia.x]) == (["NA + PIA"], ["NA + PIA", "PIA"])
    assert numbers(chart.alt) == [14, 5, 2, 7]
    assert chart.table.members.sum() == len(caught)


@pytest.mark.parametrize("kind", ["continuous", "few values", "constant"])
def test_every_score_falls_into_a_bin(kind: str) -> None:
    table = score_table(kind=kind)
    chart = figures.histograms(table, {1: 0.5, 2: 0.7})
    found = bars_of(chart)
    assert len(found) == 4
    for bars in found:
        assert bars.xbins.size > 0
        assert len(bars.x) == 200
        assert min(bars.x) >= bars.xbins.start
        assert max(bars.x) < bars.xbins.end  # Plotly leaves out what lies at the end of the last bin


def test_both_groups_share_the_bins_and_have_their_colours() -> None:
    chart = figures.histograms(score_table(), {1: 0.5, 2: 0.7})
    found = bars_of(chart)
    for panel in (found[:2], found[2:]):
        members, nonmembers = panel
        assert members.xbins == nonmembers.xbins
        assert (members.marker.color, nonmembers.marker.color) == (MEMBER, NONMEMBER)
        assert members.marker.pattern.shape != nonmembers.marker.pattern.shape  # not by colour alone


def test_each_panel_has_its_threshold_and_its_title() -> None:
    layout = figures.histograms(score_table(), {1: 0.5, 2: 0.7}).figure.layout
    assert [(shape.x0, shape.x1, shape.xref) for shape in layout.shapes] == [(0.5, 0.5, "x"), (0.7, 0.7, "x2")]
    assert [title.text for title in layout.annotations] == ["NA", "NA +OMS"]


# Files


class Loads(HTMLParser):
    """What a page loads, and the tags and the title that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.title = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [(tag, name) for name, _ in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title" and not self.title:
            self.title = data


HOSTILE = "</title></script><img src=http://example.com/x.png><b>&{0}{title}"


def test_a_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for name in ("path", "histograms"):
        write_figure(CHARTS[name](), "Figure 1", tmp_path / "figure.html")
        text = (tmp_path / "figure.html").read_text(encoding="utf-8")
        found = Loads(text)
        assert found.loads == []
        assert not {"link", "img", "iframe", "object", "embed", "base"} & {*found.tags}
        assert "script" in found.tags
        assert "Plotly.newPlot" in text
        assert len(text) > 1_000_000  # the library itself


def test_a_page_shows_the_title_the_sentence_and_the_table() -> None:
    chart = CHARTS["auc_by_pair"]()
    text = page(chart, "Figure 3: d(i, j)")
    assert Loads(text).title == "Figure 3: d(i, j)"
    assert f"<p>{chart.alt}</p>" in text
    assert all(f"<td>{value}</td>" in text for value in ("d(0,2)", "0.7500", "0.9120"))


def test_names_in_a_page_are_text_whatever_they_hold() -> None:
    chart = figures.path(residual_table(), [(HOSTILE, True, [3.0, 2.0])], 2, 64)
    plain = Loads(page(CHARTS["path"](), "Figure"))
    found = Loads(page(chart, HOSTILE))
    assert found.title == HOSTILE
    assert found.loads == []
    assert {*found.tags} == {*plain.tags}


@pytest.fixture
def no_chrome(monkeypatch: pytest.MonkeyPatch) -> None:
    from choreographer.browsers.chromium import Chromium

    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(Chromium, "find_browser", lambda *_, **__: None)


@pytest.mark.parametrize("kind", [".png", ".svg"])
@pytest.mark.usefixtures("no_chrome")
def test_a_picture_without_a_chrome_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError) as refused:
        write_figure(CHARTS["auc_by_pair"](), "Figure 3", tmp_path / f"figure{kind}")
    assert re.fullmatch(r"A PNG or SVG needs Chrome or Chromium [^.]*or write \.html\.", str(refused.value))
    assert list(tmp_path.glob("figure*")) == []


def test_a_picture_leaves_the_chart_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(go.Figure, "to_image", lambda figure, **how: seen.append((figure, how)) or b"drawn")
    chart = CHARTS["auc_by_pair"]()
    before = chart.figure.to_json()
    write_figure(chart, "Figure 3", tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == b"drawn"
    ((figure, how),) = seen
    assert figure.layout.title.text == "Figure 3"
    assert how["format"] == "svg"
    assert chart.figure.to_json() == before


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\); choose another place"):
        write_figure(CHARTS["auc_by_pair"](), "Figure 3", tmp_path / "nowhere" / "figure.html")
