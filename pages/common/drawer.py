"""One picture, opened by a click anywhere: what it is, what each attack says of it, and how its search goes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from oms_core import figures
from oms_core.attacks import ATTACKS, COMPARED, SEARCHES
from oms_core.compute import compute_trace
from oms_core.exhibits import members
from oms_core.run import Plan, Trace, lookup, lookup_trace, plan, residuals
from pages.common.attacks import STEPS, held_out_p
from pages.common.context import STATE, Context, update
from pages.common.pictures import find, kind, strip, thumbnail
from pages.common.shell import ask, follow, guarded, show
from pages.common.text import literal

SHOWN_STEPS = 10
WIDTH = 720  # pixels
OPINION = ("score", "p", "above members")  # what an attack says of a picture


def open_picture(image: str) -> None:
    """Choose a picture for every page, and open it."""
    update(pick=image[: figures.NAME])
    drawer()


def follow_address() -> None:
    """Open the picture that a copied address names, once; a page calls this when it has drawn itself."""
    follow("address", open_picture)


@st.dialog("One picture", width=WIDTH, position="right", icon=":material/image_search:")
def drawer() -> None:
    with guarded():
        context = st.session_state[STATE]
        content(context, context.pick)
        if st.button("Inspect", icon=":material/search:", help="The same picture among all others."):
            st.switch_page("pages/4_Inspect.py")


def content(context: Context, image: str, place: str = "drawer", ask_model: bool = True, wide: bool = False) -> None:
    """Everything about one picture, what is known first.

    Args:
        context: the visitor's choices.
        image: the beginning of its SHA-256.
        place: where it is shown; keys its widgets.
        ask_model: whether to ask for a search that is not known.
        wide: whether there is room to put the search beside the rest.
    """
    left, right = st.columns(2, gap="large") if wide else (st.container(), st.container())
    name = context.attack if context.attack in SEARCHES else ATTACKS[context.attack].shown_as or "NA"
    planned = plan(context.run((name,), SHOWN_STEPS))
    row = find(planned.images.table, image)
    with left:
        headline(planned, row)
        said = opinions(plan(context.run(COMPARED, STEPS)), row.image)
        if said.empty:
            st.caption("No attack has judged it at these settings; press Run on the page Attacks.")
        else:
            st.markdown(as_text(said))
            st.caption("As published → with One More Step. p: the share of known non-members that score as high.")
    with right:
        search(planned, row, max(1, context.step), place, ask_model)
    if left.button("Step its search", icon=":material/directions_walk:", key=f"step {place}"):
        table = planned.images.table
        other = table[table.role != row.role].image.iloc[0]
        update(first=row.image[: figures.NAME], second=other[: figures.NAME], step=0, attack=name)
        st.switch_page("pages/1_Step_the_search.py")


def headline(planned: Plan, row: pd.Series) -> None:
    """The picture, and what is known of it without a model."""
    left, right = st.columns([1, 5], vertical_alignment="center")
    what = kind(row.role == "member")
    left.image(thumbnail(planned.images.name, row.name, row.image), width="stretch", alt=f"{row.file}, a {what}")
    right.markdown(f"**{literal(row.file)}**, a **{what}**; label {literal(row.label)}")
    if planned.model.captioned:
        right.caption(f"Caption: {literal(row.caption or 'none')}")


def opinions(planned: Plan, image: str) -> pd.DataFrame:
    """What each attack that is known says of a picture, without and with One More Step; perhaps nothing."""
    known, lines = lookup(planned), []
    for task in planned.tasks:
        if task.attack.name in known:
            rows = known[task.attack.name]
            member, own = members(planned, rows), (rows.image == image).to_numpy()
            line = {"attack": task.attack.name}
            for n, more in ((1, ""), (2, " +OMS")):
                line |= opinion(task.attack.score(rows, n), member, own, more)
            lines.append(line)
    columns = [f"{name}{more}" for name in OPINION for more in ("", " +OMS")]
    return pd.DataFrame(lines, columns=["attack", *columns])


def as_text(table: pd.DataFrame) -> str:
    """The table of `opinions` in one piece of Markdown, which a browser draws sooner than a cell at a time."""
    names = [name for name in table if not name.endswith(" +OMS")]
    lines = [
        "| " + " | ".join([names[0], *(f"{name} → +OMS" for name in names[1:])]) + " |",
        "| --- " * len(names) + "|",
    ]
    for row in table.fillna("-").to_dict("records"):
        cells = [row["attack"], *(f"{row[name]} → {row[f'{name} +OMS']}" for name in names[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def opinion(scores: np.ndarray, member: np.ndarray, own: np.ndarray, more: str) -> dict[str, str]:
    """One attack at one n: score, p-value against the known non-members, and how many other members score lower."""
    finite = np.isfinite(scores)
    if not (finite & own).any():
        return {}
    score = scores[own][0]
    p = held_out_p(scores[finite], member[finite])[own[finite]][0]
    above = 100 * np.mean(scores[finite & member & ~own] < score)
    return {f"score{more}": f"{score:.3g}", f"p{more}": f"{p:.3f}", f"above members{more}": f"{above:.0f} %"}


def search(planned: Plan, row: pd.Series, n: int, place: str, ask_model: bool) -> None:
    """The residual path over both cohorts, and what the model sees at step n."""
    cohort = known_residuals(planned)
    known = cohort[cohort.image == row.image].sort_values("n").residual.tolist()
    if known:
        draw_path(planned, cohort, row, known, place)
    trace = trace_of(planned, row.image) if ask_model else lookup_trace(planned, row.image)
    if trace is None:
        return
    if not known:
        draw_path(planned, cohort, row, trace.residuals(), place)
    strip(trace, n, row.file, thumbnail(planned.images.name, row.name, row.image))


def draw_path(planned: Plan, cohort: pd.DataFrame, row: pd.Series, path: Sequence[float], place: str) -> None:
    """The residuals of one picture, step by step, over the bands of both cohorts."""
    member = row.role == "member"
    chart = figures.path(cohort, [(f"this {kind(member)}", member, path)], len(path), planned.model.dimension)
    chart.figure.update_layout(height=300)
    show(chart, f"path {place}", f"Its search by {planned.tasks[0].attack.name}. {chart.alt}")


def known_residuals(planned: Plan) -> pd.DataFrame:
    """Residuals of the whole set under a plan's first attack, as far as they are known."""
    name = planned.tasks[0].attack.name
    for steps in (planned.run.steps, STEPS):
        shorter = plan(replace(planned.run, steps=steps))
        known = lookup(shorter)
        if name in known:
            return residuals(shorter, known[name])
    return no_cohort()


def no_cohort() -> pd.DataFrame:
    """Residuals of nobody, until those of the whole set are known."""
    return pd.DataFrame({"image": [], "member": pd.Series(dtype=bool), "n": pd.Series(dtype=int), "residual": []})


def trace_of(planned: Plan, image: str) -> Trace:
    """The search for one picture's noise, computed if it is not known."""
    found = lookup_trace(planned, image)
    return found if found is not None else ask(lambda: compute_trace(planned, image))
