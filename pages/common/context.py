"""What a visitor has chosen: one frozen context for all pages, mirrored in the address."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import streamlit as st

from oms_core import catalog
from oms_core.attacks import ATTACKS, SEARCHES
from oms_core.errors import InputError
from oms_core.images import BUILT_IN
from oms_core.run import Run, plan

CAPTIONS = ("given", "blip", "none")
STATE, WRITTEN, PROBLEMS, CLICKED = "context", "context written", "context problems", "clicked"
MAX_SHOWN_STEPS = 10
RATES = (0.001, 0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Context:
    """The choices that every page shares. A copied address restores all of them."""

    model: str = "ddpm-digits"
    images: str = ""  # "": the set that the model was trained on
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


def parse(params: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Known parameters of an address as values, and a sentence for each one that cannot be used."""
    values, problems = {}, []
    for spec in fields(Context):
        if spec.name in params:
            try:
                values[spec.name] = checked(spec.name, spec.type, params[spec.name])
            except (ValueError, InputError) as error:
                shown = params[spec.name][:40]
                reason = str(error) if isinstance(error, InputError) else "it has not the form that is needed."
                problems.append(f"The address asks for {spec.name} = {shown!r}, which is ignored: {reason}")
    return values, problems


def checked(name: str, kind: str, text: str) -> Any:
    """One parameter as a value.

    Raises:
        ValueError, InputError: it has the wrong form, or is not among what there is.
    """
    if kind.startswith("int"):
        value = int(text)
        low, high = {"n": (1, 3), "step": (0, MAX_SHOWN_STEPS), "limit": (20, 10**6)}.get(name, (0, 2**31 - 1))
        if not low <= value <= high:
            raise InputError(f"it must lie between {low} and {high}.")
        return value
    if kind == "float":
        if float(text) not in RATES:
            raise InputError(f"it must be one of {', '.join(map(str, RATES))}.")
        return float(text)
    if name == "model" and text not in choices():
        raise InputError(f"the models here are {', '.join(models())}.")
    if name == "images" and text not in image_sets():
        raise InputError(f"the image sets here are {', '.join(image_sets())}.")
    if name == "captions" and text not in CAPTIONS and not (text.startswith("text:") and len(text) <= 300):
        raise InputError(f"captions are {', '.join(CAPTIONS)}, or text: and words.")
    if name == "attack" and text not in ATTACKS:
        raise InputError(f"the attacks are {', '.join(ATTACKS)}.")
    if name in ("first", "second", "pick") and not (text.isalnum() and len(text) <= 64):
        raise InputError("it is not the name of a picture.")
    return text


def models() -> list[str]:
    """The models that a visitor may pick: built in, closed form, and in the folders that the owner opened."""
    ideal = [f"ideal:{images}" for images in BUILT_IN]
    return [*catalog.built_in(), *ideal, *opened("OMS_MODELS", ("model_index.json", "config.json"))]


def image_sets() -> list[str]:
    """The image sets that a visitor may pick: built in, and in the folders that the owner opened."""
    return [*BUILT_IN, *opened("OMS_IMAGES")]


def opened(setting: str, marks: tuple[str, ...] = ()) -> list[str]:
    """The folders (or, without marks, also files) directly below those that a setting names, which only the owner sets.

    Args:
        setting: an environment variable with folders, separated as in PATH.
        marks: a folder counts if it holds one of these.
    """
    found = []
    for root in filter(None, os.environ.get(setting, "").split(os.pathsep)):
        for path in sorted(Path(root).resolve().glob("*")):
            marked = any((path / mark).is_file() for mark in marks)
            usable = path.is_dir() or path.suffix in (".zip", ".parquet")
            if not path.name.startswith(".") and (marked if marks else usable):
                found.append(str(path))
    return found


def choices() -> list[str]:
    """The same with every snapshot."""
    return models() + [f"{name}@{epoch}" for name in catalog.built_in() for epoch in catalog.epochs(name)]


def current() -> Context:
    """The context of this visitor; the address wins where it differs from what was last written there."""
    state, written = st.session_state, st.session_state.get(WRITTEN, {})
    context = state.get(STATE, Context())
    asked = {key: value for key, value in st.query_params.items() if written.get(key) != value}
    values, problems = parse(asked)
    context = replace(context, **values)
    problems += unusable(context)
    if problems and unusable(context):
        context = replace(context, t=None, images="", captions="given", attack="NA")
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
    params = {
        spec.name: str(value)
        for spec in fields(Context)
        if (value := getattr(context, spec.name)) != getattr(default, spec.name)
    }
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
    return widget(label, options, key=key, on_change=lambda: state.update({name: state[key]}), **more)


def control(widget: Callable[..., Any], label: str, name: str, **options: Any) -> Any:
    """A widget for one field of the context."""
    key = f"control {name}"
    st.session_state[key] = getattr(st.session_state[STATE], name)
    return widget(label, key=key, on_change=lambda: update(**{name: st.session_state[key]}), **options)
