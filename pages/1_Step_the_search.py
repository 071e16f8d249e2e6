"""Step the search: one picture's noise, iterate by iterate."""

import inspect

import numpy as np
import pandas as pd
import streamlit as st

from oms_core import figures
from oms_core.attacks import SEARCHES
from oms_core.compute import compute_trace
from oms_core.errors import InputError
from oms_core.run import Plan, Trace, lookup_trace, residuals
from oms_core.search import fixed_point
from pages.common.context import Context, control, searching, update
from pages.common.pictures import READY, enlarge, ordinary, thumbnail
from pages.common.shell import ask, begin, guarded, show, signals

STEPS = 10
BLUE, ORANGE = np.array([0, 114, 178]), np.array([213, 94, 0])


def pair(planned: Plan, context: Context, cohort: pd.DataFrame) -> pd.DataFrame:
    """The two pictures on the table; unless others are chosen, the most ordinary ready one of each kind."""
    table = planned.images.table
    rows = []
    for chosen, role in ((context.first, "member"), (context.second, "nonmember")):
        image = chosen or ordinary(table[table.role == role].image.iloc[:READY], cohort, role == "member")
        found = table[table.image.str.startswith(image)]
        if found.empty:
            raise InputError(f"The set has no picture {chosen!r}; choose New pair.")
        rows.append(found.iloc[0])
    return pd.DataFrame(rows)


def new_pair(planned: Plan) -> None:
    """Draw a member and a non-member, in random order, among those whose search is ready."""
    rng = np.random.default_rng()
    groups = [planned.images.table[planned.images.table.role == role].image for role in ("member", "nonmember")]
    drawn = [str(rng.choice(group.iloc[:READY])) for group in groups]
    rng.shuffle(drawn)
    update(first=drawn[0][:12], second=drawn[1][:12], step=0)
    st.session_state["revealed"] = False


def trace_of(planned: Plan, image: str) -> Trace:
    """The search for one picture's noise, computed if it is not known."""
    found = lookup_trace(planned, image)
    return found if found is not None else ask(lambda: compute_trace(planned, image))


def names_of(pictures: pd.DataFrame, hidden: bool) -> list[tuple[str, bool | None]]:
    """What each picture is called, and whether it is a member; None while that is hidden."""
    if hidden:
        return [("A", None), ("B", None)]
    return [
        (f"{letter}: {'member' if row.role == 'member' else 'non-member'}", row.role == "member")
        for letter, row in zip("AB", pictures.itertuples(), strict=True)
    ]


def controls(planned: Plan, context: Context) -> bool:
    """The search's settings and the game; whether the labels are hidden."""
    left, middle, right = st.columns([2, 1, 1], vertical_alignment="bottom")
    with left:
        control(st.selectbox, "Search", "attack", options=list(SEARCHES), format_func=lambda name: SEARCHES[name].title)
    middle.button("New pair", on_click=new_pair, args=(planned,), width="stretch", help="A member and a non-member.")
    game = right.toggle("Hide who is who", key="game", help="Let the class vote first, then reveal.")
    return game and not st.session_state.get("revealed", False)


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


def vote(pictures: pd.DataFrame, hidden: bool) -> None:
    """The guess, and the answer once it is asked for."""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    guess = left.radio("Which one was in training?", ["A", "B"], index=None, horizontal=True, key="guess")
    right.button(
        "Reveal", width="stretch", disabled=not hidden, on_click=st.session_state.update, args=({"revealed": True},)
    )
    if not hidden and guess:
        right_answer = "A" if pictures.iloc[0].role == "member" else "B"
        if guess == right_answer:
            st.success(f"{guess} it is: this picture was in the training set.")
        else:
            st.warning(f"It was {right_answer}. One pair proves little: look at how far the two bands overlap.")


def heat(eps: np.ndarray) -> np.ndarray:
    """Noise of (H, W, C) as colours: blue below zero, orange above, white at zero, full at three."""
    strength = np.clip(eps.mean(axis=2, keepdims=True) / 3, -1, 1)
    ink = np.where(strength < 0, BLUE, ORANGE)
    return (255 - np.abs(strength) * (255 - ink)).astype(np.uint8)


def strip(trace: Trace, n: int, name: str, picture: np.ndarray) -> None:
    """What the model sees and says at step n."""
    st.markdown(f"**{name}**")
    x_t, x_0 = trace.shown(n)
    shown = [
        (picture, "picture x₀"),
        (x_t, "x₀ + noise"),
        (heat(trace.eps[n].transpose(1, 2, 0)), f"noise ε{str(n).translate(figures.SUPERSCRIPT)}"),
        (x_0, "model's x₀"),
    ]
    for column, (pixels, caption) in zip(st.columns(4), shown, strict=True):
        side = enlarge(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels, 160)
        column.image(side, caption=caption, width="stretch", alt=f"{name}: {caption}")


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
            show(figures.path(cohort, own, context.step, planned.model.dimension), "path")
        with right:
            for (name, _), trace, row in zip(names, traces, pictures.itertuples(), strict=True):
                strip(trace, context.step, name, thumbnail(planned.images.name, row.Index, row.image))
        if st.session_state.get("game"):
            vote(pictures, hidden)
        essay(planned, traces, context.step)


def no_cohort() -> pd.DataFrame:
    """Bands of nobody, until the distances of the whole set are known."""
    return pd.DataFrame({"image": [], "member": pd.Series(dtype=bool), "n": pd.Series(dtype=int), "residual": []})


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
