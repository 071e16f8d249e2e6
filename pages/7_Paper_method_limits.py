"""Paper, method, limits: why it works, when it does not, and the paper's tables beside this machine's."""

from dataclasses import replace

import pandas as pd
import streamlit as st

from oms_core import exhibits
from oms_core.errors import InputError
from oms_core.evaluation import evaluation, with_rivals
from oms_core.exhibits import TABLES, Table
from oms_core.people import beside_the_paper
from oms_core.run import Run, lookup, plan
from pages.common.gate import gated_choice
from pages.common.shell import begin, guarded

METHOD = r"""
A diffusion model $\epsilon_\theta$ is trained to name the noise in $x_t = \alpha_t x_0 + \sigma_t \epsilon$. An auditor
does not know the noise that a picture was trained with. So look for one that the model names itself, a fixed point of
$f(\epsilon) = \epsilon_\theta(\alpha_t x_0 + \sigma_t \epsilon,\, t)$, by $\epsilon^n = f(\epsilon^{n-1})$.

- Published attacks read the first residual, $d(0,1) = \lVert \epsilon^0 - \epsilon^1 \rVert_p$. They differ in where
  they start: **NA** at drawn noise, **PIA** at $\epsilon_\theta(x_0, 0)$, **PIAN** at the same, scaled to Gaussian
  size, **SecMI** at the end of a deterministic walk to $x_t$.
- **One More Step** reads $d(0,2)$: one more model call, and the second residual joins the first.
- If $f$ contracts, residuals fall by its Jacobian's norm at every step. The paper's hypothesis is that they fall faster
  for members.
"""

LIMITS = """
- A score says that a picture is *consistent with* members at a stated rate of false alarms. It never proves training.
- The figures need known members and non-members **of the same kind**. Where the two sets differ in any other way, an
  attack may measure that difference.
- The models here are small and made to memorise. Gains and losses on them need not hold on large ones.
- One More Step can lose: where the second residuals of members are the larger ones, adding them hurts. The page
  Attacks says where, with intervals. The timesteps were chosen on the same pictures that the figures are measured on.
- The gain must be compared with what the same calls buy otherwise; the column *lead at equal calls* does that.
- That absolute residuals are smaller for members does not mean that they decay faster: Convergence shows both.
- GSA looks at gradients and needs the weights: white-box. The quantile regression needs pictures that are
  known not to be members.
"""

GLOSSARY = {
    "member": "a picture that the model was trained on",
    "AUC": "how often a random member scores above a random non-member; 50 % is chance",
    "FPR, false alarms": "the share of non-members that are called members",
    "TPR": "the share of members that are called members",
    "ASR": "attack success rate: right answers at a threshold chosen on a tenth of the pictures",
    "t": "the timestep: how much noise the model is shown",
    "n": "steps of the search; 1 is the published attack, 2 is One More Step",
    "calls": "how often the model is asked about one picture",
    "+OMS": "One More Step",
}


def rows_of(name: str, shown: Table) -> tuple[list[dict], list[str]]:
    """What is known of a table without asking a model, and the models that it would still have to ask."""
    rows, missing = [], []
    for model in shown.models():
        found = measured(shown, Run(model=model, attacks=shown.attacks))
        rows += found
        if not found:
            missing.append(model)
    return [row | {"paper": shown.paper(row)} for row in rows], missing


def measured(shown: Table, run: Run) -> list[dict]:
    """The rows of one model, if its distances are known."""
    try:
        planned = plan(with_rivals(run))
    except InputError:  # the model or its pictures do not allow the attack
        return []
    known = lookup(planned)
    if not set(run.attacks) <= set(known):
        return []
    if shown.rows is not exhibits.evaluate:
        return shown.rows(run, None)
    reached = replace(planned, tasks=tuple(task for task in planned.tasks if task.attack.name in known))
    names = {"model": planned.model.name, "images": planned.images.name}
    return [names | row for row in evaluation(reached, known, run.attacks)]


def main() -> None:
    begin("Paper, method, limits", "Why should it work, when does it not, and what did we find beside the paper?")
    with guarded():
        st.markdown(METHOD)
        tables()
        st.subheader("Limits")
        st.markdown(LIMITS)
        st.subheader("Words")
        st.table(pd.DataFrame(GLOSSARY.items(), columns=["word", "meaning"]), hide_index=True)


def tables() -> None:
    """The paper's tables, one at a time."""
    st.subheader("The paper's tables beside this machine's")
    numbers = [name for name in TABLES if name.isdigit()]
    name = gated_choice(st.segmented_control, "Table", "table", numbers, default="1", required=True)
    shown = TABLES[name]
    st.markdown(f"**Table {name}. {shown.title}**")
    rows, missing = rows_of(name, shown)
    if rows:
        st.dataframe(pd.DataFrame(beside_the_paper(name, rows)), hide_index=True)
        st.caption("Measured here on small models; what the paper reports stands in columns of its own.")
    for model in missing:
        st.info(f"{model} is not measured yet; `python -m oms_core table {name} --model {model}` does it.")


main()
