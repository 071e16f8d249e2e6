"""Inspect: who is missed, and who is wrongly accused?"""

import numpy as np
import pandas as pd
import streamlit as st

from oms_core import figures, metrics
from oms_core.attacks import COMPARED
from oms_core.run import Plan
from pages.common.attacks import (
    ACCUSED,
    CAUGHT,
    CLEARED,
    MISSED,
    OUTCOMES,
    controls,
    gather,
    judge,
    measurable,
    score_table,
)
from pages.common.context import CLICKED, STATE, Context, kept, update
from pages.common.drawer import content
from pages.common.gate import report
from pages.common.pictures import thumbnail
from pages.common.shell import begin, guarded, show
from pages.common.text import literal

AT_ONCE = 10  # thumbnails in the row
OVERLAPPING = COMPARED[:4]
ANYBODY = "any attack or none"
SORTS = {  # by which column, and whether the smallest comes first
    "highest score": ("score", False),
    "lowest score": ("score", True),
    "smallest p-value": ("p", True),
    "largest p-value": ("p", False),
    "helped most by One More Step": ("gain", False),
    "hurt most by One More Step": ("gain", True),
}


def verdict(found: pd.DataFrame, context: Context, n: int) -> None:
    """Who is caught and who is accused, in numbers."""
    count = found.outcome.value_counts().reindex([*OUTCOMES.values()], fill_value=0)
    members, others = count[CAUGHT] + count[MISSED], count[ACCUSED] + count[CLEARED]
    caught, accused = count[CAUGHT] / members, count[ACCUSED] / others
    said = (
        f"{figures.label_of(context.attack, n)} at {100 * context.fpr:g} % false alarms: it catches {count[CAUGHT]} of "
        f"{members} members ({100 * caught:.1f} %) and misses {count[MISSED]}. It wrongly accuses {count[ACCUSED]} of "
        f"{others} non-members ({100 * accused:.1f} %)."
    )
    if caught > accused:
        wrong = 100 * count[ACCUSED] / (count[ACCUSED] + count[CAUGHT])
        st.success(f"{said} Of those it accuses, {wrong:.0f} % were never in the training set.")
        return
    untried = "another attack or another timestep" if n > 1 else "One More Step, another attack or another timestep"
    area = 100 * metrics.auc(found.score.to_numpy(), found.member.to_numpy())
    st.warning(
        f"{said} It accuses members no more often than others, so an accusation says nothing here (AUC {area:.1f} %, "
        f"50 % is chance). Try {untried}."
    )


def with_labels(found: pd.DataFrame, planned: Plan) -> pd.DataFrame:
    """What was found, with each picture's label and its row in the set."""
    table = planned.images.table.rename_axis("row").reset_index()[["image", "row", "label"]]
    return found.merge(table, on="image")


def together(table: pd.DataFrame, n: int, fpr: float) -> pd.Series:
    """For each member, which of the attacks that overlap catch it at the same false-alarm rate."""
    caught = {}
    for attack in OVERLAPPING:
        own = table[(table.attack == attack) & table.n.isin({1, n})]
        if len(own):
            judged = judge(own, n, fpr)
            caught[attack] = judged[judged.member].set_index("image").outcome == CAUGHT
    frame = pd.DataFrame(caught)
    return pd.Series([figures.combination(frame.columns[row]) for row in frame.to_numpy()], frame.index, dtype=str)


def choose(found: pd.DataFrame, sets: pd.Series) -> pd.DataFrame:
    """The pictures that the visitor asked for, in the order asked for."""
    outcomes = kept(
        st.pills, "Show", "outcomes", [ACCUSED], options=[*OUTCOMES.values()], selection_mode="multi",
        label_visibility="collapsed",
    )  # fmt: skip
    first, second, third = st.columns(3)
    with first:
        labels = kept(
            st.multiselect, "Labels", "labels", [], options=sorted(found.label.unique()), placeholder="all labels"
        )  # fmt: skip
    with second:
        options = [ANYBODY, *sets.value_counts().index]
        which = kept(st.selectbox, "Members caught by", "together", ANYBODY, options=options)
    with third:
        sort = kept(st.selectbox, "Sort by", "sort", next(iter(SORTS)), options=list(SORTS))
    shown = found[found.outcome.isin(outcomes)]
    if labels:
        shown = shown[shown.label.isin(labels)]
    if which != ANYBODY:
        shown = shown[shown.image.isin(sets.index[sets == which])]
    by, rising = SORTS[sort]
    return shown.sort_values(by, ascending=rising, kind="stable").reset_index(drop=True)


def place_of(shown: pd.DataFrame, pick: str) -> int | None:
    """Where the chosen picture stands among those shown; the first if none is chosen, None if it is not shown."""
    if not pick:
        return 0
    found = np.flatnonzero(shown.image.str.startswith(pick))
    return int(found[0]) if len(found) else None


def choose_place(shown: pd.DataFrame, place: int) -> None:
    """Go to a picture of the list."""
    update(pick=shown.image[min(max(place, 0), len(shown) - 1)][: figures.NAME])


def walk(shown: pd.DataFrame, place: int | None, image: str) -> None:
    """Through the list, by one or by a row, and keeping a picture."""
    first, back, said, keep, forward, last = st.columns(6, vertical_alignment="center")
    start = 0 if place is None else place - place % AT_ONCE
    at = -1 if place is None else place
    moves = (
        (first, "Earlier row", start - AT_ONCE, None, start == 0),
        (back, "Previous", at - 1, "Left", at <= 0),
        (forward, "Next", at + 1, "Right", at >= len(shown) - 1),
        (last, "Later row", start + AT_ONCE, None, start + AT_ONCE >= len(shown)),
    )
    for column, label, to, key, disabled in moves:
        column.button(
            label, shortcut=key, disabled=disabled, on_click=choose_place, args=(shown, to), width="stretch"
        )  # fmt: skip
    where = f"Picture {at + 1} of {len(shown)}" if place is not None else f"{len(shown)} pictures"
    said.markdown(f"**{where}**", text_alignment="center")
    pinned = bool(st.session_state.get("pinned"))
    keep.button(
        "Unpin" if pinned else "Pin", icon=":material/keep_off:" if pinned else ":material/keep:", on_click=pin,
        args=("" if pinned else image,), width="stretch", help="Keep this picture beside the next ones.",
    )  # fmt: skip


def row_of_pictures(shown: pd.DataFrame, place: int | None, planned: Plan) -> None:
    """Ten thumbnails with what was found of each, and a button to open it."""
    start = 0 if place is None else place - place % AT_ONCE
    for column, number in zip(st.columns(AT_ONCE, gap="small"), range(start, start + AT_ONCE), strict=True):
        if number < len(shown):
            with column:
                one = shown.iloc[number]
                pixels = thumbnail(planned.images.name, int(one.row), one.image)
                st.image(pixels, width="stretch", alt=f"{one.outcome}, label {one.label}")
                st.button(
                    str(number + 1), key=f"open {number - start}", on_click=choose_place, args=(shown, number),
                    type="primary" if number == place else "secondary", width="stretch",
                )  # fmt: skip
                st.caption(f"{one.outcome}  \nlabel {literal(one.label)}  \n{one.score:.3g}  \np {one.p:.3f}")


def details(context: Context, image: str) -> None:
    """The chosen picture, beside the one that was pinned if there is one."""
    pinned = st.session_state.get("pinned", "")
    left, right = st.columns(2, gap="large") if pinned else (None, st.container())
    if pinned:
        with left, guarded():
            content(context, pinned, "pinned")
    with right, guarded():
        content(context, image, ask_model=bool(context.pick), wide=not pinned)


def pin(image: str) -> None:
    """Keep a picture beside those that follow; "" keeps none."""
    st.session_state["pinned"] = image


@st.fragment
def gallery(found: pd.DataFrame, sets: pd.Series, planned: Plan) -> None:
    """The pictures asked for, and one of them in detail."""
    report()
    context = st.session_state[STATE]
    shown = choose(found, sets)
    place = place_of(shown, context.pick)
    if shown.empty:
        st.info("No picture fits these choices. Choose another outcome, or take labels away.")
        return
    image = context.pick or shown.image[0]
    walk(shown, place, image)
    row_of_pictures(shown, place, planned)
    if place is None:
        st.caption("The picture below is not among those shown; press Next to go to the first of them.")
    details(context, image)


def filter_together(name: str) -> None:
    """Show the members that exactly these attacks catch."""
    st.session_state.update({"together": name, "outcomes": [CAUGHT, MISSED], "labels": []})
    st.rerun()


def main() -> None:
    context = begin("Inspect", "Who is missed, and who is wrongly accused?")
    st.session_state.pop(CLICKED, None)  # a picture opens within this page
    with guarded():
        n = controls(context)
        planned, known, _ = gather(context)
        if context.attack not in known:
            st.caption("The pictures appear here when the scores are known.")
            return
        table = score_table(planned, known, {*OVERLAPPING, context.attack} & {*known})
        own = table[(table.attack == context.attack) & table.n.isin({1, 2})]
        n = min(n, int(own.n.max()))
        if not measurable(own[own.n == n].member.to_numpy(), context.fpr):
            return
        found = with_labels(judge(own, n, context.fpr), planned)
        verdict(found, context, n)
        sets = together(table, n, context.fpr)
        gallery(found, sets, planned)
        if len(sets):
            chart = figures.caught_together(sets, OVERLAPPING)
            show(chart, "overlap", f"{chart.alt} A click on a bar shows these members.", filter_together)


main()
