"""Convergence: residuals of many pictures, members against non-members."""

from dataclasses import replace

import altair as alt
import pandas as pd
import streamlit as st

from oms_core import figures, metrics
from oms_core.exhibits import LAST
from oms_core.laboratory import jacobian_norms, of_columns, ratios
from oms_core.run import errors, residuals
from pages.common.context import CLICKED, Context, control, including, searching
from pages.common.drawer import follow_address, open_picture
from pages.common.gate import gated, gated_choice, is_flag, marks_of, register, report
from pages.common.shell import begin, follow, guarded, search, show, signals, timestep

STEPS = 10
JACOBIAN_STEPS, JACOBIAN_PICTURES = 5, 200
SIZES = [100, 300, 1000, None]


def controls() -> None:
    """What to compute."""
    left, middle, right = st.columns(3)
    with left:
        search()
    with middle:
        timestep()
    with right:
        control(
            st.select_slider, "Pictures", "limit", options=including(SIZES, "limit"),
            format_func=lambda size: "all" if size is None else str(size),
            help="Half of them members.",
        )  # fmt: skip


def verdict(rows: pd.DataFrame, context: Context, complete: bool) -> None:
    """Do members settle faster? With numbers."""
    medians = rows.groupby(["n", "member"]).residual.median().unstack()
    if not {True, False} <= set(medians):
        return
    smaller = medians.index[medians[True] < medians[False]].tolist()
    aucs = {n: auc_of(group) for n, group in rows.groupby("n")}
    best = max(aucs, key=aucs.get)
    decay = {group: medians[group].iloc[-1] / medians[group].iloc[0] for group in (True, False)}
    sentence = (
        f"{answer(smaller, len(medians))}: the median residual of members is "
        f"{medians[True][1]:.2f} against {medians[False][1]:.2f} at n = 1 and {medians[True].iloc[-1]:.2f} against "
        f"{medians[False].iloc[-1]:.2f} at n = {medians.index[-1]}. It separates the groups best at n = {best} "
        f"(AUC {100 * aucs[best]:.1f} %, {100 * aucs[1]:.1f} % at n = 1)."
    )
    ratio = (
        f" From first to last step it falls to {100 * decay[True]:.0f} % for members and {100 * decay[False]:.0f} % "
        f"for non-members."
    )
    (st.success if 1 in smaller and 2 in smaller else st.warning)(("" if complete else "So far: ") + sentence + ratio)


def answer(smaller: list[int], steps: int) -> str:
    """At which steps members are ahead."""
    if len(smaller) == steps:
        return "Yes, at every step"
    if smaller == [*range(1, len(smaller) + 1)]:
        return f"Yes, up to n = {len(smaller)}" if smaller else "No, at no step"
    return f"Only at n = {', '.join(map(str, smaller))}"


def auc_of(group: pd.DataFrame) -> float:
    return metrics.auc(-group.residual.to_numpy(), group.member.to_numpy(dtype=bool))


@st.fragment
def scatter(rows: pd.DataFrame) -> None:
    """The first residual against the second; a click opens the picture."""
    report()
    wide = rows[rows.n <= 2].pivot(index=["image", "member"], columns="n", values="residual").reset_index()
    wide = wide.rename(columns={1: "first", 2: "second"}).assign(
        group=wide.member.map({True: "members", False: "non-members"})
    )
    chosen = alt.selection_point(name="picked", fields=["image"], on="click")
    colours = alt.Scale(domain=["members", "non-members"], range=[figures.MEMBER, figures.NONMEMBER])
    shapes = alt.Scale(domain=["members", "non-members"], range=["circle", "diamond"])
    chart = (
        alt.Chart(wide)
        .mark_point(filled=True)
        .encode(
            x=alt.X("first:Q", title="first residual ‖δ¹‖", scale=alt.Scale(zero=False)),
            y=alt.Y("second:Q", title="second residual ‖δ²‖", scale=alt.Scale(zero=False)),
            color=alt.Color("group:N", scale=colours, title=None),
            shape=alt.Shape("group:N", scale=shapes, title=None),
            opacity=alt.condition(chosen, alt.value(0.7), alt.value(0.25)),
            size=alt.condition(chosen, alt.value(45), alt.value(25)),
        )
        .add_params(chosen)
        .properties(height=400)
        .configure_legend(orient="top")
    )
    spoken = f"First against second residual of {len(wide)} pictures; the table is under the boxes."
    register("scatter", "the scatter plot", marks_of("picked", image=frozenset(wide.image)))
    st.altair_chart(chart, key="scatter", on_select=note_click, alt=spoken)
    st.caption("Click a point to open its picture; the outliers are worth a look.")
    follow("scatter", open_picture)


def note_click() -> None:
    """Remember which picture was clicked."""
    points = st.session_state["scatter"]["selection"].get("picked", [])
    if points:
        st.session_state[CLICKED] = "scatter", points[0]["image"]


def residual_view(context: Context) -> None:
    """Residuals by step, first against second, and the picture behind a point."""
    far = gated(
        st.toggle, "Distance from ε²⁰", "far", is_flag,
        help="Twenty steps: how near each iterate is to the last (Fig. B.2).",
    )  # fmt: skip
    planned, known, complete = signals(context.run(steps=LAST if far else STEPS), "Comparing all pictures")
    if context.attack not in known:
        st.caption("The boxes appear here, and grow while batches come in.")
        return
    rows = residuals(planned, known[context.attack])
    if far:
        chart = figures.residual_and_error(rows, errors(planned, known[context.attack]), planned.model.dimension)
        show(chart, "far")
    verdict(rows, context, complete)
    left, right = st.columns(2, gap="large")
    with left:
        show(figures.residual_boxes(rows, planned.model.dimension), "boxes")
    with right:
        scatter(rows)


def ratio_view(context: Context) -> None:
    """By how much each residual is smaller than the one before: the other half of "members converge faster"."""
    planned, known, _ = signals(context.run(steps=STEPS), "Comparing all pictures")
    if context.attack in known:
        rows = ratios(planned, known[context.attack])
        sides(rows, "ratio", "The residuals of members fall faster", "of the ratio ‖δⁿ⁺¹‖ / ‖δⁿ‖")
        show(figures.around_one(rows, "ratio", "‖δⁿ⁺¹‖ / ‖δⁿ‖"), "ratios")


def jacobian_view(context: Context) -> None:
    """The norm of the map's Jacobian at each iterate (Fig. 1, above)."""
    run = replace(context.run(("Jacobian",), JACOBIAN_STEPS), limit=min(context.limit or JACOBIAN_PICTURES, 1000))
    planned, known, _ = signals(run, "The Jacobian norm")
    st.caption("From drawn noise, whatever search is chosen above: the largest singular value of ∂f/∂ε at εⁿ.")
    if "Jacobian" in known:
        rows = jacobian_norms(planned, known["Jacobian"])
        sides(rows, "norm", "The map contracts more around members", "of the Jacobian norm")
        show(figures.around_one(rows, "norm", "‖∂f/∂ε‖ at εⁿ"), "norms")


def sides(rows: pd.DataFrame, value: str, claim: str, what: str) -> None:
    """Whether a value is smaller for members, step by step, as AUC with its interval."""
    found = {}
    for n, group in rows.groupby("n"):
        columns = {"own": -group[value].to_numpy()}
        (found[n],) = of_columns(columns, group.member.to_numpy(dtype=bool))
    smaller = [n for n, row in found.items() if row["auc_lo"] > 0.5]
    larger = [n for n, row in found.items() if row["auc_hi"] < 0.5]
    first = found[min(found)]
    interval = f"{100 * first['auc']:.1f} % [{100 * first['auc_lo']:.1f}, {100 * first['auc_hi']:.1f}]"
    said = f"{claim} at {steps_named(smaller)}; the opposite holds at {steps_named(larger)}. AUC {what} at n = "
    (st.success if smaller and not larger else st.warning)(f"{said}{min(found)}: {interval}.")


def steps_named(steps: list[int]) -> str:
    return f"n = {', '.join(map(str, steps))}" if steps else "no step that this set can show"


VIEWS = {"Residual": residual_view, "Ratio of residuals": ratio_view, "Jacobian norm": jacobian_view}


def main() -> None:
    context = begin(
        "Convergence", "Do the residuals of members settle faster than those of pictures the model never saw?"
    )
    context = searching(context)
    with guarded():
        controls()
        view = gated_choice(st.segmented_control, "Look at", "look", list(VIEWS), default="Residual", required=True)
        VIEWS[view](context)
        follow_address()


main()
