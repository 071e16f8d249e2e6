"""Attacks: what an auditor can claim, without and with One More Step."""

import pandas as pd
import streamlit as st

from oms_core import audit, figures, metrics, shift
from oms_core.attacks import COMPARED, SEARCHES
from oms_core.attacks.base import column
from oms_core.evaluation import evaluation
from oms_core.exhibits import curves, members
from oms_core.run import Plan
from pages.common.attacks import OUTCOMES, controls, gather, measurable, score_table
from pages.common.context import Context
from pages.common.drawer import follow_address
from pages.common.shell import begin, guarded, show

EQUAL_CALLS = (
    "Lead at equal calls: the AUC with One More Step less that of the published attack averaged over two draws (NA), "
    "two timesteps (PIA, PIAN) or two distances (SecMI), which asks the model as often."
)


def overview(rows: list[dict], n: int, alone: float | None) -> pd.DataFrame:
    """Without and with OMS side by side, a row per attack, beside what the pixels alone give."""
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        base, more = (next(r for r in rows if (r["attack"], r["n"]) == (attack, k)) for k in (1, n))
        line = {"attack": attack, "t": base["t"], "calls": f"{base['calls']} → {more['calls']}"}
        line |= {"AUC": 100 * base["auc"], "AUC +OMS": 100 * more["auc"], "gain": gain(more)}
        line |= {"pixels alone": percent(alone)}
        line |= {"lead at equal calls": gain(more, "lead")}
        line |= {"ASR": 100 * base["asr"], "ASR +OMS": 100 * more["asr"]}
        for name, title in (("tpr1", "TPR@1%"), ("tpr01", "TPR@0.1%")):
            line |= {title: percent(base[name]), f"{title} +OMS": percent(more[name])}
        lines.append(line)
    return pd.DataFrame(lines)


def gain(row: dict, name: str = "gain") -> str:
    """A paired difference of AUCs in points, with its interval."""
    if row[name] is None:
        return "-"
    return f"{100 * row[name]:+.1f} [{100 * row[f'{name}_lo']:+.1f}, {100 * row[f'{name}_hi']:+.1f}]"


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def verdict(rows: list[dict], n: int) -> None:
    """Which attacks One More Step helps, and which it hurts, by the paired interval."""
    sides: dict[str, list[str]] = {"helps": [], "hurts": [], "makes no difference that this set can show for": []}
    for row in rows:
        if row["n"] == n and row["gain"] is not None:
            side = "helps" if row["gain_lo"] > 0 else "hurts" if row["gain_hi"] < 0 else list(sides)[2]
            sides[side].append(f"{row['attack']} ({gain(row)})")
    if n == 1:
        st.info("Published attacks: one step. Switch on One More Step to see what the second residual adds.")
        return
    said = "; ".join(f"it {what} {', '.join(names)}" for what, names in sides.items() if names)
    (st.warning if sides["hurts"] else st.success)(f"One More Step, gain in AUC points with its 95 % interval: {said}.")


def below_chance(rows: list[dict]) -> None:
    """Where even a gain leaves an attack pointing the wrong way."""
    wrong = [row["attack"] for row in rows if row["n"] == 2 and row["auc_hi"] < 0.5]
    if wrong:
        st.caption(
            f"Below chance with One More Step too: {', '.join(wrong)}. There members have the larger distances, and a "
            "gain only leads towards chance."
        )


def explanation(rows: list[dict], planned: Plan, known: dict[str, pd.DataFrame]) -> None:
    """Why One More Step hurts where it does: what the second residual says alone."""
    hurt = [r["attack"] for r in rows if r["n"] == 2 and r["gain_hi"] < 0 and r["attack"] in SEARCHES]
    if not hurt:
        return
    alone = []
    for task in planned.tasks:
        if task.attack.name in hurt:
            signal = known[task.attack.name]
            found = metrics.auc(-signal[column(1, 2, task.attack.p)].to_numpy(), members(planned, signal))
            alone.append(f"{task.attack.name} {100 * found:.1f} %")
    st.caption(
        f"Why: AUC of the second residual alone, d(1, 2): {'; '.join(alone)} (50 % is chance). Added to the first "
        "it dilutes it; below 50 % the later residuals of members are even the larger ones. See Convergence."
    )


def closely(table: pd.DataFrame, planned: Plan, context: Context, n: int) -> None:
    """One attack: its scores, who is caught, and whom OMS corrects or newly gets wrong."""
    own = table[(table.attack == context.attack) & table.n.isin({1, max(2, n)})]
    if not measurable(own[own.n == 1].member.to_numpy(), context.fpr):
        return
    found = {k: metrics.roc(g.score.to_numpy(), g.member.to_numpy()) for k, g in own.groupby("n")}
    before, after = (found[k].tpr_at(context.fpr) for k in sorted(found))
    members = int(own[own.n == 1].member.sum())
    st.markdown(
        f"At {100 * context.fpr:g} % false alarms {context.attack} catches **{round(before * members)}** of {members} "
        f"members; with One More Step **{round(after * members)}**."
    )
    left, right = st.columns([3, 2])
    with left:
        show(figures.histograms(own, {k: curve.threshold_at(context.fpr) for k, curve in found.items()}), "histograms")
    with right:
        changes = metrics.corrected(own[own.n <= 2], context.fpr)
        label = planned.images.table.set_index("image").label
        chart = figures.changed_labels(changes.assign(label=label.loc[changes.image].to_numpy()))
        show(chart, "labels", f"{chart.alt} A click on a bar opens the pictures of its label.", inspect_label)


def inspect_label(label: str) -> None:
    """Go to the pictures of a label."""
    st.session_state.update({"labels": [label], "outcomes": [*OUTCOMES.values()]})
    st.switch_page("pages/4_Inspect.py")


def pixels_alone(planned: Plan) -> float | None:
    """What a classifier makes of members and non-members that never asks the model: a warning where it can."""
    found = shift.of_roles(planned)
    said = audit.said_of_shift(found, "members", "non-members")
    if found and found["alarm"]:
        st.warning(said, icon=":material/compare:")
    else:
        st.caption(said)
    return found and found["auc"]


def main() -> None:
    context = begin("Attacks", "What can an auditor claim, and what does One More Step add?")
    with guarded():
        n = controls(context)
        planned, known, complete = gather(context)
        if not known:
            st.caption("The table and the curves appear here.")
            return
        names = tuple(name for name in (*COMPARED, context.attack) if name in known)
        table = score_table(planned, known, names)
        head = st.container()  # filled below: the curves are there sooner than the intervals
        show(curves(table[table.n.isin({1, n})], ("linear", "log")), "roc")
        with head:
            if complete:
                rows = evaluation(planned, known, tuple(dict.fromkeys(names)))
                alone = pixels_alone(planned)
                verdict(rows, n)
                if n == 2:
                    below_chance(rows)
                    explanation(rows, planned, known)
                st.dataframe(overview(rows, 2, alone), hide_index=True, column_config=number_columns())
                st.caption(EQUAL_CALLS)
            else:
                count = table.image.nunique()
                st.info(f"{count} of {len(planned.images)} pictures so far; the table comes with the last.")
        if context.attack in known:
            closely(table, planned, context, n)
        follow_address()


def number_columns() -> dict:
    """One decimal for every rate."""
    names = ("AUC", "ASR", "TPR@1%", "TPR@0.1%")
    names = [name + more for name in names for more in ("", " +OMS")]
    return {name: st.column_config.NumberColumn(format="%.1f") for name in (*names, "pixels alone")}


main()
