"""What every page shares: its frame, its model picker, its charts, and its view of long work."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import streamlit as st
from streamlit.logger import get_logger

from oms_core import catalog, libraries
from oms_core.attacks import SEARCHES
from oms_core.compute import score, score_each, set_libraries_aside
from oms_core.decode import decode
from oms_core.errors import InputError
from oms_core.figures import Chart
from oms_core.files import ASSETS
from oms_core.images import BUILT_IN
from oms_core.jobs import SERVICE, Job
from oms_core.run import Plan, Run, calls, lookup, plan
from pages.common import context as chosen
from pages.common import gate, receiving
from pages.common.context import Context, control, current, including
from pages.common.gate import OWN_IMAGES, RATES, gated, gated_choice
from pages.common.text import literal

receiving.install()
log = logging.getLogger(__name__)
get_logger("oms_core").propagate = True  # what the engine says reaches the server's log too, and whoever else listens
TIMESTEPS = [None, 20, 50, 100, 150, 200, 250, 300, 350, 400]
FAMILY_NAMES = {
    "ddpm": "DDPM",
    "uvit": "U-ViT in continuous time",
    "stable_diffusion": "Stable Diffusion on latents with captions",
    "transformer": "diffusion transformer on latents",
}
ANEW = {"first": "", "second": "", "step": 0, "pick": ""}  # choices that another model or image set undoes
WARM_UP_AFTER = 2.0  # seconds
PLAIN = {"displayModeBar": False}  # a Plotly chart without its tools
PAGES = (
    ("app.py", "Start", ":material/home:"),
    ("pages/1_Step_the_search.py", "Step the search", ":material/directions_walk:"),
    ("pages/2_Convergence.py", "Convergence", ":material/trending_down:"),
    ("pages/3_Attacks.py", "Attacks", ":material/troubleshoot:"),
    ("pages/4_Inspect.py", "Inspect", ":material/search:"),
    ("pages/5_Try_your_images.py", "Try your images", ":material/add_photo_alternate:"),
    ("pages/6_Sweep.py", "Sweep", ":material/grid_on:"),
    ("pages/7_Paper_method_limits.py", "Paper, method, limits", ":material/menu_book:"),
)


def begin(title: str, question: str) -> Context:
    """Open a page: its title, the question it answers, the links, and the choice of the model."""
    st.set_page_config(page_title=f"{title} - OMS Explorer", page_icon=str(ASSETS / "icon.svg"), layout="wide")
    st.title(title)
    st.markdown(f"*{question}*")
    try:
        if not catalog.built_in():
            raise InputError("The folder assets/models is empty; restore it by git checkout assets, then reload.")
        gate.enter()
        context = current()
        with st.sidebar:
            links()
            pick_model(context)
    except InputError as error:
        st.error(sentence(error))
        st.stop()
    gate.report()
    for problem in st.session_state.get(chosen.PROBLEMS, []):
        st.warning(sentence(problem), icon=":material/link_off:")
    return context


def links() -> None:
    """The pages, each opened with what was chosen here; a picture may be clicked later, and does not open twice."""
    params = {name: value for name, value in st.session_state[chosen.WRITTEN].items() if name != "pick"}
    for page, label, icon in PAGES:
        st.page_link(page, label=label, icon=icon, query_params=params)
    st.divider()


@st.cache_resource
def warm_up() -> threading.Timer:
    """Import the slow libraries once there is something to compute, behind the paint of the page that offers it."""
    timer = threading.Timer(WARM_UP_AFTER, import_slow_libraries)
    timer.daemon = True
    timer.start()
    return timer


def import_slow_libraries() -> None:
    libraries.load_engine()
    set_libraries_aside()


def pick_model(context: Context) -> None:
    """The model, the epoch of its weights, and what it is."""
    key, models = "picked model", gate.models()
    base = st.session_state[key] = gate.base_of(context.model)
    gated_choice(
        st.selectbox,
        "Model",
        key,
        list(models),
        on_change=lambda: chosen.update(model=models[st.session_state[key]], images=OWN_IMAGES, **ANEW),
        help="Small diffusion models that were trained for this app, the closed-form ideal memoriser, and the models "
        "in folders that the owner of this app opened with OMS_MODELS.",
    )
    model = catalog.describe(context.model)
    if model.card and len(catalog.epochs(base)) > 1:
        pick_epoch(context, base)
    st.caption(about(model))
    pick_images(context, model)
    if model.captioned:
        pick_captions(context)
    good, said = fit(context, model)
    (st.success if good else st.warning)(said, icon=":material/check:" if good else ":material/help:")


def pick_images(context: Context, model: catalog.Model) -> None:
    """The image set, where there is more than the model's own to choose from."""
    key, sets = "picked images", gate.image_sets()
    if len(sets) == len(BUILT_IN) and model.card:
        return
    st.session_state[key] = gate.name_of(context.images or model.images or next(iter(sets)), sets)
    gated_choice(
        st.selectbox,
        "Image set",
        key,
        list(sets),
        on_change=lambda: chosen.update(images=sets[st.session_state[key]], **ANEW),
        help="Built in, or in a folder that the owner of this app opened with OMS_IMAGES.",
    )


def pick_captions(context: Context) -> None:
    """Whose captions the model hears."""
    kind, key = context.captions.partition(":")[0], "picked captions"
    st.session_state[key] = kind
    words = {"given": "given with the pictures", "blip": "written by BLIP", "none": "none", "text": "one of your own"}
    gated_choice(
        st.selectbox,
        "Captions",
        key,
        list(words),
        format_func=words.get,
        on_change=lambda: chosen.update(
            captions=st.session_state[key] if st.session_state[key] != "text" else "text:a photo"
        ),
        help="An auditor seldom knows the captions of the training set; BLIP writes one by looking at the picture.",
    )
    if kind == "text":
        st.session_state["own caption"] = context.captions.partition(":")[2]
        gated(
            st.text_input,
            "Caption of every picture",
            "own caption",
            gate.is_words,
            max_chars=gate.LONGEST_CAPTION,
            on_change=lambda: chosen.update(captions=f"text:{st.session_state['own caption']}"),
        )


def fit(context: Context, model: catalog.Model) -> tuple[bool, str]:
    """Whether model and pictures belong together, and a sentence that says so."""
    planned = plan(context.run())
    images = planned.images
    if images.name == model.images:
        own = gate.name_of(images.name, gate.image_sets())
        return True, f"{len(images)} pictures of {literal(own)} fit; the split is ours, so we know the members."
    picture, _ = decode(images.read(images.table.index[0]))
    name = literal(gate.name_of(images.name, gate.image_sets()))
    says = f"Who is a member is what {name} says; this model may never have seen them."
    height, width = model.profile.size
    if (picture.height, picture.width) != (height, width):
        says += f" Pictures are brought from {picture.height} x {picture.width} to {height} x {width}."
    if (picture.mode == "L") != (model.profile.channels == 1):
        says += " Grey and colour are converted."
    return False, says


def pick_epoch(context: Context, base: str) -> None:
    """The training epoch after which the weights were kept."""
    default = catalog.built_in()[base]["recipe"]["default"]
    key = "picked epoch"
    epoch = context.model.removeprefix(base).removeprefix("@")
    st.session_state[key] = int(epoch) if epoch else default
    gated_choice(
        st.select_slider,
        "Weights after epoch",
        key,
        catalog.epochs(base),
        on_change=lambda: chosen.update(model=gate.after_epoch(base, st.session_state[key], default)),
        help="Early weights have not memorised yet; late ones leave no room for One More Step.",
    )


def about(model: catalog.Model) -> str:
    """Two sentences on what a model is."""
    if model.family == "ideal":
        return f"The closed-form denoiser that remembers the members of {model.images} perfectly. Nothing was trained."
    height, width = model.profile.size
    what = f"{FAMILY_NAMES[model.family]} ({model.parameters / 1e6:.2f} million parameters, {height} x {width})"
    if not model.card:
        return f"A {what} from a folder that the owner opened. What it was trained on is for its maker to say."
    members, minutes = model.card["members"], model.card["minutes"]
    return f"A small {what}, trained for {minutes:.0f} minutes on {members} pictures of {model.images}: the members."


def search() -> None:
    """Which attack starts the search that is looked at."""
    control(st.selectbox, "Search", "attack", options=list(SEARCHES), format_func=lambda name: SEARCHES[name].title)


def false_alarms() -> None:
    """How many non-members may be accused."""
    control(st.select_slider, "False alarms allowed", "fpr", options=RATES, format_func=lambda r: f"{100 * r:g} %")


def timestep() -> None:
    """The timestep of every attack, or of each its own."""
    control(
        st.select_slider, "Timestep t", "t", options=including(TIMESTEPS, "t"),
        format_func=lambda t: "as on the model's card" if t is None else str(t),
    )  # fmt: skip


@contextmanager
def guarded() -> Iterator[None]:
    """Show a sentence instead of a failure; details of what should not happen go to the log."""
    try:
        yield
    except InputError as error:
        st.error(sentence(error))
    except Exception as error:
        if type(error).__module__.startswith("streamlit"):
            raise  # stop, rerun: Streamlit's own control flow
        number = uuid.uuid4().hex[:8]
        log.exception("Page failed [%s]", number)
        st.error(
            f"Something went wrong that should not; the server's log has the details under {number}. Reload the page."
        )


def sentence(said: object) -> str:
    """A message of the engine, which may name files and labels, as Markdown without markup of theirs."""
    return literal(gate.without_roots(str(said)))


def show(chart: Chart, key: str, caption: str = "", clicked: Callable[[str], None] | None = None) -> None:
    """A chart with the sentence that stands for it, and its table.

    Args:
        chart: what to show; if its traces carry customdata it can be clicked.
        key: of the widget.
        caption: in place of the sentence.
        clicked: what to do with the customdata of a clicked point; by default it is a picture, and opens.
    """
    from pages.common.drawer import open_picture  # which needs this module

    said = caption or chart.alt
    if any(trace.customdata is not None for trace in chart.figure.data):
        clickable(chart, key, clicked or open_picture)
        said += "" if clicked else " A click on a point opens its picture."
    else:
        st.plotly_chart(chart.figure, key=key, alt=chart.alt, config=PLAIN)
    st.caption(literal(said))
    with st.expander("Table"):
        st.table(chart.table.map(lambda cell: literal(cell) if isinstance(cell, str) else cell), hide_index=True)


@st.fragment
def clickable(chart: Chart, key: str, clicked: Callable[[str], None]) -> None:
    """A chart that follows a click alone, without the rest of its page."""
    gate.report()
    gate.register(key, "the chart", gate.points_of(carried_by(chart)))
    follow(key, clicked)  # first: drawing a large chart takes longer than opening a picture
    st.plotly_chart(
        chart.figure, key=key, alt=chart.alt, config=PLAIN, on_select=lambda: note_click(key), selection_mode="points"
    )


def carried_by(chart: Chart) -> frozenset[str]:
    """What the points of a chart carry."""
    return frozenset(one for trace in chart.figure.data if trace.customdata is not None for one in trace.customdata)


def note_click(key: str) -> None:
    """Remember what a clicked point of a chart carries until `follow`."""
    carried = [point["customdata"] for point in st.session_state[key]["selection"]["points"] if "customdata" in point]
    if carried and carried[0]:
        st.session_state[chosen.CLICKED] = key, carried[0]


def follow(key: str, clicked: Callable[[str], None]) -> None:
    """Do what a click asks for, once, in the run that it caused."""
    if st.session_state.get(chosen.CLICKED, ("", ""))[0] == key:
        clicked(st.session_state.pop(chosen.CLICKED)[1])


def signals(run: Run, what: str) -> tuple[Plan, dict[str, pd.DataFrame], bool]:
    """The distances of a run: known ones, or those that have come in so far, with the controls to compute them.

    Args:
        run: what a page needs.
        what: a few words for the button.

    Returns:
        The plan, distances by attack (perhaps of some pictures only, perhaps none), and whether they are all.
    """
    planned = plan(run)
    known = lookup(planned)
    if len(known) == len(planned.tasks):
        return planned, known, True
    job = attended([planned], what)
    came_in = {task.attack.name: job.so_far(task.attack.name) for task in planned.tasks} if job else {}
    done = job is not None and job.state == "done"
    return planned, known | {name: rows for name, rows in came_in.items() if rows is not None}, done


def gathered(runs: list[Run], what: str) -> tuple[list[tuple[Plan, dict[str, pd.DataFrame]]], bool]:
    """The distances of several runs where all are known; else the controls to compute those that are missing."""
    found = [(planned, lookup(planned)) for planned in map(plan, runs)]
    missing = [planned for planned, known in found if len(known) < len(planned.tasks)]
    if missing:
        attended(missing, what)
    return found, not missing


def attended(missing: list[Plan], what: str) -> Job | None:
    """The job that computes some plans, with its controls: watched while it lives, else offered."""
    key = " ".join(job_key(planned) for planned in missing)
    job = SERVICE.find(key)
    if job is not None and job.live:
        watch(key)
    elif job is not None and job.state == "done":
        st.caption("These results could not be kept on disk; they last as long as the app runs.")
    else:
        offer(missing, job, what, key)
    return job


def job_key(planned: Plan) -> str:
    """Equal work has an equal key, whoever asks."""
    run = planned.run
    return " ".join([*(task.key for task in planned.tasks), str((run.steps, run.device, run.dtype, run.batch))])


def viewer() -> str:
    """A name for this visitor, to know who still looks at a job."""
    return st.session_state.setdefault("viewer", uuid.uuid4().hex)


def offer(missing: list[Plan], job: Job | None, what: str, key: str) -> None:
    """Say that something must be computed first, what became of the last try, and how to start."""
    warm_up()
    if job is not None and job.state == "failed":
        st.error(sentence(job.error))
    elif job is not None and job.state == "cancelled":
        st.info(f"Cancelled after {job.done} of {job.total} pictures; what was finished is kept.")
    asked = sum(asked_at_most(planned) for planned in missing)
    left, right = st.columns([3, 1], vertical_alignment="center")
    pictures = max(len(planned.images) for planned in missing)
    left.info(
        f"{what} asks the model at most {asked} times for each of {pictures} pictures, once; what it answers is kept."
    )
    if right.button("Run", type="primary", key=f"run {what}", width="stretch"):
        with guarded():
            runs = [planned.run for planned in missing]
            SERVICE.submit(
                key, lambda tick: score(runs[0], tick) if len(runs) == 1 else score_each(runs, tick), viewer()
            )
            st.rerun()


def asked_at_most(planned: Plan) -> int:
    """Model calls per picture of all attacks of a plan, each run alone."""
    counted = calls(planned)
    return sum(max(count for (name, _), count in counted.items() if name == task.attack.name) for task in planned.tasks)


@st.fragment(run_every=1)
def watch(key: str) -> None:
    """Progress of a live job, polled while it lives; then the page is drawn anew."""
    job = SERVICE.find(key)
    if job is None or not job.live:
        st.rerun()
    job.touch(viewer())
    left, right = st.columns([4, 1], vertical_alignment="center")
    if job.state == "queued":
        before = SERVICE.position(job)
        left.progress(0.0, f"Waiting; {before} {'run goes' if before == 1 else 'runs go'} first.")
    else:
        left.progress(job.done / max(1, job.total), progress_sentence(job))
    if right.button("Cancel", key="cancel", width="stretch") and not job.leave(viewer()):
        st.toast("Somebody else watches this run, so it goes on.")
    seen = st.session_state.get("seen progress", {})
    if job.done != seen.get(key) and time.monotonic() - st.session_state.get("seen at", 0) > 2:
        st.session_state["seen progress"], st.session_state["seen at"] = {key: job.done}, time.monotonic()
        st.rerun()


def progress_sentence(job: Job) -> str:
    """How far, how fast, how long still."""
    if not job.done:
        return "Loading the model ..."
    if job.stage == "fit":
        return "Fitting what learns from the distances ..."
    if job.stage == "captions":
        return f"BLIP has captioned {job.done} of {job.total} pictures"
    left = (job.total - job.done) / job.rate
    return f"{job.done} of {job.total} pictures, {job.rate:.0f} per second, {left:.0f} s left"


def ask(work: Callable[[], object]) -> object:
    """Something short from the device, with a spinner."""
    with st.spinner("Asking the model ..."):
        return SERVICE.ask(work, viewer())
