"""Sweep: when does One More Step work? Over timestep, distance, training epoch and iteration scheme."""

from collections.abc import Callable
from dataclasses import replace

import altair as alt
import pandas as pd
import streamlit as st

from oms_core import catalog, figures, laboratory
from oms_core.attacks import SEARCHES
from oms_core.attacks.base import NORMS
from oms_core.evaluation import evaluation
from oms_core.exhibits import OVER_TIMESTEPS, OVER_TRAINING
from oms_core.run import Run
from oms_core.schemes import SCHEMES
from pages.common.context import Context, searching, update
from pages.common.gate import gated_choice, marks_of, register
from pages.common.shell import begin, gathered, guarded, search, show

TIMESTEPS = (*laboratory.SWEPT, 300, 350)
STEPS = 3
SIZE = laboratory.PICTURES


def settings(context: Context, attacks: tuple[str, ...], steps: int) -> Run:
    """What a sweep computes; its timestep varies."""
    return replace(context.run(attacks, steps), t=None, limit=context.limit or SIZE)


def by_distance(context: Context) -> None:
    """The AUC of every distance at every timestep; a click carries timestep and step to every page."""
    left, right = st.columns(2)
    with left:
        search()
    usual = NORMS.index(SEARCHES[context.attack].p)
    key = f"norm {context.attack}"
    p = gated_choice(right.radio, "Norm p of the distance", key, NORMS, index=usual, horizontal=True)
    runs = [replace(settings(context, (context.attack,), STEPS), t=t) for t in TIMESTEPS]
    found, complete = gathered(runs, "The grid")
    if not complete:
        return
    table = pd.concat([laboratory.grid(planned, known, p) for planned, known in found], ignore_index=True)
    best, top = table.loc[table.auc.idxmax()], 100 * table.groupby("pair").auc.max()
    st.success(
        f"{context.attack} separates best by {best.pair} at t = {best.t}: AUC {100 * best.auc:.1f} %. As published, "
        f"by d(0,1), it reaches at most {top['d(0,1)']:.1f} %, with One More Step, d(0,2), {top['d(0,2)']:.1f} %. "
        "Chosen on the pictures it is measured on, so a little too good."
    )
    register("grid", "the grid", marks_of("cell", t=frozenset(table.t), j=frozenset(table.j)))
    st.altair_chart(cells(table), key="grid", on_select=jump, alt=figures.auc_grid(table).alt)
    pictures = len(found[0][0].images)
    st.caption(
        f"AUC in % on {pictures} pictures. Click a cell: every page goes to its timestep and its number of steps."
    )
    with st.expander("Table"):
        st.table(table.pivot(index="pair", columns="t", values="auc").mul(100).round(1))


def cells(table: pd.DataFrame) -> alt.LayerChart:
    """A heat map whose cells can be clicked."""
    chosen = alt.selection_point(name="cell", fields=["t", "j"], on="click")
    percent = table.assign(percent=100 * table.auc)
    base = alt.Chart(percent).encode(
        x=alt.X("t:O", title="timestep t", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("pair:N", title="distance", sort=None),
    )
    colours = alt.Scale(scheme="blueorange", domain=[0, 100], domainMid=50, reverse=True)
    tiles = base.mark_rect(stroke="white").encode(
        color=alt.Color("percent:Q", scale=colours, title="AUC %"),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.6)),
    )
    ink = alt.condition("abs(datum.percent - 50) > 35", alt.value("white"), alt.value("black"))
    numbers = base.mark_text().encode(alt.Text("percent:Q", format=".0f"), color=ink)
    return alt.layer(tiles.add_params(chosen), numbers).properties(height=320)


def jump() -> None:
    """Carry the clicked cell to every page."""
    points = st.session_state["grid"]["selection"].get("cell", [])
    if points:
        update(t=int(points[0]["t"]), n=int(points[0]["j"]))


def by_timestep(context: Context) -> None:
    """What One More Step adds at each timestep (Fig. 2b)."""
    runs = [replace(settings(context, OVER_TIMESTEPS, 2), t=t) for t in laboratory.SWEPT]
    found, complete = gathered(runs, "The sweep over timesteps")
    if complete:
        rows = [row for planned, known in found for row in evaluation(planned, known, OVER_TIMESTEPS)]
        verdict(rows, "t")
        show(figures.boost(rows), "boost")
        show(figures.sweep(rows, "t", "timestep t"), "timesteps")


def by_epoch(context: Context) -> None:
    """How attacks grow with training, without and with One More Step (Fig. 2a)."""
    base = context.model.partition("@")[0]
    epochs = catalog.epochs(base) if base in catalog.built_in() else []
    if len(epochs) < 2:
        st.info("Only one set of weights of this model is here; choose ddpm-digits or ddpm-fashion.")
        return
    runs = [replace(settings(context, OVER_TRAINING, 2), model=f"{base}@{epoch}", t=context.t) for epoch in epochs]
    found, complete = gathered(runs, "The sweep over training")
    if complete:
        rows = [
            row | {"epoch": epoch}
            for epoch, (planned, known) in zip(epochs, found, strict=True)
            for row in evaluation(planned, known, OVER_TRAINING)
        ]
        verdict(rows, "epoch")
        show(figures.sweep(rows, "epoch", "training epoch"), "epochs")


def verdict(rows: list[dict], by: str) -> None:
    """Where One More Step gains, and where it loses, by the paired interval."""
    more = pd.DataFrame([row for row in rows if row["n"] == 2])
    gains, losses = more[more.gain_lo > 0], more[more.gain_hi < 0]
    said = f"One More Step gains in {len(gains)} of {len(more)} cases and loses in {len(losses)}, by the 95 % interval."
    if len(losses):
        places = losses.groupby("attack", sort=False)[by].apply(lambda found: ", ".join(map(str, found)))
        said += " It loses for " + "; ".join(f"{name} at {by} = {where}" for name, where in places.items()) + "."
    (st.warning if len(losses) else st.success)(said)


def by_scheme(context: Context) -> None:
    """Does another iteration find more with the same calls?"""
    attacks = ("NA", "PIA")
    runs = laboratory.runs_of_schemes(replace(settings(context, attacks, STEPS), t=context.t, limit=context.limit))
    found, complete = gathered(list(runs.values()), "The comparison of schemes")
    if not complete:
        return
    rows = pd.DataFrame(laboratory.led_by(dict(zip(runs, found, strict=True)), attacks))
    others = rows[rows.scheme != "picard"]
    better, worse = others[others.lead_lo > 0], others[others.lead_hi < 0]
    names = ", ".join(f"{SCHEMES[r.scheme].title} for {r.attack} ({100 * r.lead:+.1f})" for r in better.itertuples())
    (st.success if len(better) else st.info)(
        f"At equal calls {names or 'no scheme'} separates better than plain One More Step; {len(worse)} of "
        f"{len(others)} are worse, by the 95 % interval of the paired difference."
    )
    shown = rows.assign(scheme=rows.scheme.map(lambda name: SCHEMES[name].title))
    st.dataframe(percentages(shown), hide_index=True)


def percentages(rows: pd.DataFrame) -> pd.DataFrame:
    """AUC and lead as text with their intervals."""
    texts = {
        title: [f"{100 * v:{form}} [{100 * lo:{form}}, {100 * hi:{form}}]" for v, lo, hi in zip(*parts, strict=True)]
        for title, form, parts in (
            ("AUC %", ".1f", (rows.auc, rows.auc_lo, rows.auc_hi)),
            ("lead over Picard", "+.1f", (rows.lead, rows.lead_lo, rows.lead_hi)),
        )
    }
    return rows[["attack", "t", "scheme", "calls"]].assign(**texts)


VIEWS: dict[str, Callable[[Context], None]] = {
    "Timestep and distance": by_distance,
    "Gain by timestep": by_timestep,
    "Training epoch": by_epoch,
    "Iteration scheme": by_scheme,
}


def main() -> None:
    context = begin("Sweep", "When does One More Step work: at which timestep, which distance, how far in training?")
    context = searching(context)
    with guarded():
        first = next(iter(VIEWS))
        view = gated_choice(st.segmented_control, "Sweep over", "view", list(VIEWS), default=first, required=True)
        VIEWS[view](context)


main()
