"""What the pages on attacks share: their controls, their scores, and who is on which side of the threshold."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from oms_core import metrics
from oms_core.attacks import ATTACKS, COMPARED
from oms_core.catalog import describe
from oms_core.evaluation import with_rivals
from oms_core.evidence import p_values
from oms_core.run import Plan, lookup, plan, scores
from pages.common.context import Context, control, update
from pages.common.gate import gated, is_flag
from pages.common.shell import false_alarms, signals, timestep

STEPS = 3
CAUGHT, ACCUSED, MISSED, CLEARED = "caught member", "wrongly accused", "missed member", "rightly cleared"
OUTCOMES = {(True, True): CAUGHT, (False, True): ACCUSED, (True, False): MISSED, (False, False): CLEARED}


def fitting(context: Context) -> list[str]:
    """The attacks that the model can answer."""
    captioned = describe(context.model).captioned
    return [name for name, attack in ATTACKS.items() if captioned or not attack.captioned]


def titled(name: str) -> str:
    """An attack for people; one that needs more than the model's answers says so."""
    attack = ATTACKS[name]
    return attack.title if attack.access == "gray-box" else f"{attack.title} ({attack.access}: needs the weights)"


def flip() -> None:
    """One More Step on or off, for the address too."""
    update(n=2 if st.session_state["oms"] else 1)


def controls(context: Context) -> int:
    """One More Step, timestep, attack and false-alarm rate; n."""
    first, left, middle, right = st.columns(4, vertical_alignment="bottom")
    st.session_state["oms"] = context.n > 1
    gated(
        first.toggle, "**+ One More Step**", "oms", is_flag, on_change=flip, help="d(0, 2) instead of d(0, 1)."
    )  # fmt: skip
    with left:
        timestep()
    with middle:
        control(st.selectbox, "Look closely at", "attack", options=fitting(context), format_func=titled)
    with right:
        false_alarms()
    return 2 if st.session_state["oms"] else 1


def gather(context: Context) -> tuple[Plan, dict[str, pd.DataFrame], bool]:
    """The attacks that are always compared, with their rivals, and the one that is looked at closely.

    Returns:
        The plan with those of them that are known, their distances, and whether these are all.
    """
    run = with_rivals(context.run(COMPARED, STEPS))
    planned, complete = plan(run), True
    known = lookup(planned)
    if not set(COMPARED) <= set(known):  # rivals alone are not worth a wait
        planned, known, complete = signals(run, "Running every attack")
    tasks = {task.attack.name: task for task in planned.tasks}
    if context.attack not in COMPARED and context.attack not in known:  # a rival may be known already
        own, found, _ = signals(context.run((context.attack,), STEPS), ATTACKS[context.attack].title)
        tasks |= {task.attack.name: task for task in own.tasks}
        known = known | found
    return replace(planned, tasks=tuple(task for name, task in tasks.items() if name in known)), known, complete


def score_table(planned: Plan, known: dict[str, pd.DataFrame], names: Iterable[str]) -> pd.DataFrame:
    """The finite scores of some attacks whose distances are known."""
    tasks = tuple(task for task in planned.tasks if task.attack.name in names)
    return metrics.check_scores(scores(replace(planned, tasks=tasks), known))


def measurable(member: np.ndarray, fpr: float) -> bool:
    """Whether a false-alarm rate is at least one picture; else a sentence says so."""
    if metrics.measurable(fpr, member):
        return True
    st.warning(f"{100 * fpr:g} % of the non-members is less than one picture here; allow more false alarms.")
    return False


def held_out_p(scores: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Conformal p-values against the known non-members; a known non-member is left out of its own reference.

    Args:
        scores: of known members and known non-members, (N,).
        member: which are members, (N,) bool.
    """
    reference = scores[~member]
    p = p_values(scores, reference)
    as_high = p * (1 + len(reference)) - 1
    return np.where(member, p, as_high / max(1, len(reference)))


def judge(own: pd.DataFrame, n: int, fpr: float) -> pd.DataFrame:
    """On which side of the threshold each picture falls.

    Args:
        own: the score table of one attack, with n = 1 and the n that is judged.
        n: which score decides.
        fpr: the false-alarm rate that sets the threshold.

    Returns:
        A row per picture: `image, member, score, p, outcome`, and `gain`, by how much One More Step lowers its p-value.
    """
    wide = own.pivot(index=["image", "member"], columns="n", values="score").dropna().reset_index()
    member = wide.member.to_numpy()
    p = {k: held_out_p(wide[k].to_numpy(), member) for k in wide.columns.intersection([1, 2])}
    score = wide[n].to_numpy()
    called = score >= metrics.roc(score, member).threshold_at(fpr)
    outcome = [OUTCOMES[key] for key in zip(member, called, strict=True)]
    found = pd.DataFrame({"image": wide.image, "member": member, "score": score, "p": p[n], "outcome": outcome})
    return found.assign(gain=p[1] - p[2] if 2 in p else np.nan)
