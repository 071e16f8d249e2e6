"""Step the search: one picture's noise, iterate by iterate."""

import inspect
import math

import numpy as np
import pandas as pd
import streamlit as st

from oms_core import figures
from oms_core.run import Plan, Trace, residuals
from oms_core.search import fixed_point
from pages.common.context import Context, control, searching, update
from pages.common.drawer import follow_address, no_cohort, trace_of
from pages.common.gate import gated, one_of
from pages.common.pictures import READY, find, kind, ordinary, strip, thumbnail
from pages.common.shell import begin, guarded, search, show, signals

STEPS = 10
ENOUGH = 5  # rounds after which a score is held against chance


def pair(planned: Plan, context: Context, cohort: pd.DataFrame) -> pd.DataFrame:
    """The two pictures on the table; unless others are chosen, the most ordinary ready one of each kind."""
    table = planned.images.table
    rows = []
    for chosen, role in ((context.first, "member"), (context.second, "nonmember")):
        image = chosen or ordinary(table[table.role == role].image.iloc[:READY], cohort, role == "member")
        rows.append(find(table, image))
    return pd.DataFrame(rows)


def next_round(planned: Plan) -> None:
    """Draw a member and a non-member, in random order, among those whose search is ready; a new vote."""
    rng = np.random.default_rng()
    groups = [planned.images.table[planned.images.table.role == role].image for role in ("member", "nonmember")]
    drawn = [str(rng.choice(group.iloc[:READY])) for group in groups]
    rng.shuffle(drawn)
    update(first=drawn[0][: figures.NAME], second=drawn[1][: figures.NAME], step=0)
    st.session_state["round"] = this_round() + 1


def playing() -> bool:
    """Whether this visitor plays the guessing game."""
    return st.session_state.get("game", False)


def switch(planned: Plan) -> None:
    """The game on or off; it begins with a new pair, since who has seen the labels should not vote."""
    st.session_state["game"] = not playing()
    if playing():
        next_round(planned)


def this_round() -> int:
    """The number of this visitor's round in the guessing game."""
    return st.session_state.get("round", 0)


def rounds() -> dict[int, tuple[bool, int]]:
    """By round, whether the vote was right and after how many steps it was revealed; each counts once."""
    return st.session_state.setdefault("rounds", {})


def reveal(right: bool, step: int) -> None:
    """Count the vote of this round, and show who is who."""
    rounds().setdefault(this_round(), (right, step))


def names_of(pictures: pd.DataFrame, hidden: bool) -> list[tuple[str, bool | None]]:
    """What each picture is called, and whether it is a member; None while that is hidden."""
    if hidden:
        return [("A", None), ("B", None)]
    return [
        (f"{letter}: {kind(row.role == 'member')}", row.role == "member")
        for letter, row in zip("AB", pictures.itertuples(), strict=True)
    ]


def controls(planned: Plan, context: Context) -> bool:
    """The search's settings and the game; whether the labels are hidden."""
    left, middle, right = st.columns([2, 1, 1], vertical_alignment="bottom")
    with left:
        search()
    middle.button("New pair", on_click=next_round, args=(planned,), width="stretch", help="A member and a non-member.")
    game = playing()
    right.button(
        "End the game" if game else "Hide who is who", on_click=switch, args=(planned,), width="stretch",
        help="Let the class vote first, then reveal.",
    )  # fmt: skip
    return game and this_round() not in rounds()


def stepper(context: Context) -> None:
    """Step, back, reset, and the scrubber."""
    back, forward, reset, scrub = st.columns([1, 1, 1, 4], vertical_alignment="bottom")
    n = context.step
    back.button("Back", shortcut="Left", on_click=update, kwargs={"step": max(0, n - 1)}, width="stretch")
    forward.button(
        "Step", type="primary", shortcut="Right", width="stretch", disabled=n >= STEPS,
        on_click=update, kwargs={"step": min(STEPS, n + 1)},
    )  # fmt: skip
    reset.button("Reset", shortcut="Home", on_click=update, kwargs={"step": 0}, width="stretch")
    with scrub:
        control(st.slider, "Step n", "step", min_value=0, max_value=STEPS)


def vote(planned: Plan, pictures: pd.DataFrame, hidden: bool, step: int) -> None:
    """The guess, the answer once it is asked for, and the score so far."""
    left, middle, right = st.columns([3, 1, 1], vertical_alignment="bottom")
    guess = gated(
        left.segmented_control, "Which one was in training?", f"guess {this_round()}", one_of(["A", "B", None]),
        ["A", "B"], disabled=not hidden,
    )  # fmt: skip
    answer = "A" if pictures.iloc[0].role == "member" else "B"
    middle.button(
        "Reveal", width="stretch", disabled=not (hidden and guess), on_click=reveal, args=(guess == answer, step),
        help="Vote for A or B first; the vote counts once.",
    )  # fmt: skip
    right.button("Next round", width="stretch", on_click=next_round, args=(planned,))
    if not hidden:
        if rounds()[this_round()][0]:
            st.success(f"{answer} it is: this picture was in the training set.")
        else:
            st.warning(f"It was {answer}. One pair proves little: look at how far the two bands overlap.")
    if rounds():
        st.markdown(tally([*rounds().values()]))


def tally(played: list[tuple[bool, int]]) -> str:
    """The score over all rounds, and after some rounds what guessing would give."""
    right, count = sum(won for won, _ in played), len(played)
    said = (
        f"**{right} of {count} right**, revealed after {sum(step for _, step in played) / count:.1f} steps on average."
    )
    if count < ENOUGH:
        return said
    lucky = sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count
    chance = f"Guessing gives {count / 2:g} of {count} on average, and {right} or more in {100 * lucky:.0f} % of games."
    return f"{said} {chance}"


def essay(planned: Plan, traces: list[Trace], n: int) -> None:
    """Eq. 7, the code that runs it, and the numbers it just gave."""
    task = planned.tasks[0]
    first = traces[0]
    asked = task.attack.calls(task.t) - 1 + n
    with st.expander("The equation, and the code that just ran it"):
        st.latex(
            r"\epsilon^n = f(\epsilon^{n-1}), \quad f(\epsilon) = \epsilon_\theta(\alpha_t x_0 + \sigma_t \epsilon,\ t)"
        )
        st.code(inspect.getsource(fixed_point), language="python")
        st.markdown(
            f"t = {task.t + task.attack.reach}, α = {first.alpha:.4f}, σ = {first.sigma:.4f}; "
            f"start: {task.attack.title} ({task.attack.source}). "
            f"Up to this step the model was asked {asked} times for each picture."
        )


def main() -> None:
    context = begin(
        "Step the search",
        "A model finds a noise in every picture. Does the search settle faster where it was trained on the picture?",
    )
    context = searching(context)
    with guarded():
        planned, known, _ = signals(context.run(steps=STEPS), "Comparing with all pictures")
        cohort = residuals(planned, known[context.attack]) if context.attack in known else no_cohort()
        pictures = pair(planned, context, cohort)
        hidden = controls(planned, context)
        stepper(context)
        traces = [trace_of(planned, image) for image in pictures.image]
        names = names_of(pictures, hidden)
        verdict(traces, names, context.step)
        own = [(name, member, trace.residuals()) for (name, member), trace in zip(names, traces, strict=True)]
        left, right = st.columns(2, gap="large")
        with left:
            opening = () if hidden else tuple(pictures.image)  # an open picture says what it is
            show(figures.path(cohort, own, context.step, planned.model.dimension, opening), "path")
        with right:
            for (name, _), trace, row in zip(names, traces, pictures.itertuples(), strict=True):
                st.markdown(f"**{name}**")
                strip(trace, context.step, name, thumbnail(planned.images.name, row.Index, row.image))
        if playing():
            vote(planned, pictures, hidden, context.step)
        essay(planned, traces, context.step)
        if not hidden:
            follow_address()


def verdict(traces: list[Trace], names: list[tuple[str, bool | None]], n: int) -> None:
    """One sentence on where the two searches stand."""
    if n == 0:
        st.info(
            "Press Step, or the right arrow key: the model names the noise it sees, and is asked again with that noise."
        )
        return
    now = [trace.residuals()[n - 1] for trace in traces]
    smaller, larger = np.argsort(now)
    share = 100 * (1 - now[smaller] / now[larger])
    st.info(
        f"After step {n} the noise of **{names[smaller][0]}** moves {share:.0f} % less "
        f"({now[smaller]:.2f} against {now[larger]:.2f})."
    )


main()
