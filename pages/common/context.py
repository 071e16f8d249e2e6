"""What a visitor has chosen: one frozen context for all pages, mirrored in the address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import streamlit as st

from oms_core.attacks import ATTACKS, SEARCHES
from oms_core.errors import InputError
from oms_core.location import Location
from oms_core.run import Run, plan
from pages.common import gate
from pages.common.gate import DEFAULT_MODEL, OWN_IMAGES, between, gated, gated_choice, one_of

STATE, WRITTEN, PROBLEMS, CLICKED = "context", "context written", "context problems", "clicked"


@dataclass(frozen=True)
class Context:
    """The choices that every page shares. A copied address restores all of them.

    Raises:
        TypeError: the model or the image set is a plain string, which no visitor has chosen at the gate.
    """

    model: Location = DEFAULT_MODEL
    images: Location = OWN_IMAGES
    captions: str = "given"  # for a model that takes them
    attack: str = "NA"
    t: int | None = None  # None: the model card's or the paper's for each attack
    n: int = 1  # 2 with One More Step
    seed: int = 0
    limit: int | None = None
    fpr: float = 0.05
    first: str = ""  # two pictures, by the beginning of their SHA-256
    second: str = ""
    step: int = 0
    pick: str = ""  # the picture that was clicked, likewise

    def __post_init__(self) -> None:
        for name in ("model", "images"):
            if not isinstance(getattr(self, name), Location):
                raise TypeError(f"{name} is no Location")

    def run(self, attacks: tuple[str, ...] | None = None, steps: int = 3) -> Run:
        """The run that the pages compute or look up."""
        return Run(
            self.model,
            self.images,
            attacks=attacks or (self.attack,),
            t=self.t,
            steps=steps,
            seed=self.seed,
            captions=self.captions,
            limit=self.limit,
        )


def current() -> Context:
    """The context of this visitor; the address wins where it differs from what was last written there."""
    state, written = st.session_state, st.session_state.get(WRITTEN, {})
    context = state.get(STATE, Context())
    asked = {key: value for key, value in st.query_params.items() if written.get(key) != value}
    values, problems = gate.parse(asked)
    context = replace(context, **values)
    problems += unusable(context)
    if problems and unusable(context):
        context = replace(context, t=None, images=OWN_IMAGES, captions="given", attack="NA")
    if values or problems:
        state[PROBLEMS] = problems
    if values.get("pick"):
        state[CLICKED] = "address", values["pick"]
    write(context)
    return context


def unusable(context: Context) -> list[str]:
    """Why the context as a whole cannot be run, if it cannot."""
    try:
        plan(context.run())
    except InputError as error:
        return [str(error)]
    return []


def write(context: Context) -> None:
    """Keep a context, and mirror what is not default in the address."""
    default = Context()
    values = {spec.name: getattr(context, spec.name) for spec in fields(Context)}
    params = {name: str(value) for name, value in values.items() if value != getattr(default, name)}
    for name, choices in (("model", gate.models), ("images", gate.image_sets)):
        if name in params:
            params[name] = gate.name_of(values[name], choices())
    st.session_state[STATE], st.session_state[WRITTEN] = context, params
    if dict(st.query_params) != params:
        st.query_params.from_dict(params)


def update(**changes: Any) -> None:
    """Change some choices; for callbacks."""
    write(replace(st.session_state.get(STATE, Context()), **changes))


def including(options: list[int | None], name: str) -> list[int | None]:
    """A slider's numbers with the chosen one among them; None stays at its end."""
    numbers = sorted({option for option in (*options, getattr(st.session_state[STATE], name)) if option is not None})
    return [None, *numbers] if options[0] is None else [*numbers, None]


def searching(context: Context) -> Context:
    """The context with an attack that is a search; in place of another one the search that it builds on."""
    if context.attack in SEARCHES:
        return context
    update(attack=ATTACKS[context.attack].shown_as or "NA")
    return st.session_state[STATE]


def kept(widget: Callable[..., Any], label: str, name: str, default: Any, options: list, **more: Any) -> Any:
    """A choice that outlives a change of page, and that others may set under its name, as far as it is offered."""
    key, state = f"kept {name}", st.session_state
    value = state.get(name, default)
    if isinstance(value, list):
        state[key] = [one for one in value if one in options]
    else:
        state[key] = value if value in options else default
    return gated_choice(widget, label, key, options, on_change=lambda: state.update({name: state[key]}), **more)


def control(widget: Callable[..., Any], label: str, name: str, **options: Any) -> Any:
    """A widget for one field of the context, which offers options or numbers between limits."""
    key = f"control {name}"
    offered = options.get("options")
    rule = between(options["min_value"], options["max_value"]) if offered is None else one_of(offered)
    st.session_state[key] = getattr(st.session_state[STATE], name)
    return gated(widget, label, key, rule, on_change=lambda: update(**{name: st.session_state[key]}), **options)
