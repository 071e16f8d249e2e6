"""Try your images: where would your own pictures fall?"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st
from PIL import Image, ImageOps

from oms_core import audit, evidence, figures, metrics, people, uploads
from oms_core.audit import Audit
from oms_core.compute import unkept, unkept_trace
from oms_core.decode import Profile, decode, fit
from oms_core.edits import Edit, with_edit
from oms_core.errors import InputError
from oms_core.export import findings_csv, findings_page
from oms_core.images import ImageSet
from oms_core.jobs import SERVICE
from oms_core.plain_text import harmless
from oms_core.run import Plan, Run, Trace, about, lookup, plan, residuals
from oms_core.uploads import as_seen
from pages.common.context import Context, searching
from pages.common.gate import are_files, between, gated, gated_choice, is_flag, register, rows_below
from pages.common.pictures import enlarge, small
from pages.common.shell import (
    ask,
    begin,
    false_alarms,
    guarded,
    search,
    sentence,
    show,
    signals,
    timestep,
    viewer,
    warm_up,
    watch,
)

STEPS, PATH_STEPS = 3, 10
READY = 10  # pictures of an example
REMEMBERED = 16  # of what was made of the visitor's pictures; a search on 512 x 512 pixels takes some 30 MB
THUMBNAIL, SHOWN = 96, 512  # pixels of the longer side, in a table and beside the sliders
LIMITS = (
    f"1 to {uploads.MOST} pictures (PNG, JPEG, WebP, BMP, TIFF, or a GIF, whose first frame is used), or a zip of "
    "them. They stay in this visit: not on disk, not in the address, gone two minutes after you close the page."
)


def main() -> None:
    context = begin("Try your images", "Where would your own pictures fall, between members and pictures never seen?")
    context = searching(context)
    with guarded():
        warm_up()
        receive(context)
        images = st.session_state.get("uploads")
        if images is None:
            st.info(
                "Choose pictures above, or an example. Each is scored and compared with pictures that the model "
                "certainly never saw; you need not know who is a member."
            )
            return
        controls()
        found = findings(context, images)
        if found is not None:
            views(context, found)


def receive(context: Context) -> None:
    """Take pictures in, or an example; what was sent is checked at once, and Streamlit's copy is let go."""
    number = st.session_state.setdefault("upload number", 0)
    files = gated(
        st.file_uploader, "Your pictures", f"files {number}", are_files, type=["image/*", ".zip"],
        accept_multiple_files=True,
    )  # fmt: skip
    if files:
        take(lambda: uploads.received([(file.name, file.getvalue()) for file in files]))
        let_go()
        st.rerun()
    if st.session_state.get("uploads") is None:
        st.caption(LIMITS)
    if problem := st.session_state.get("upload problem"):
        st.error(sentence(problem))
    examples(context)


def take(read: Callable[[], ImageSet | None]) -> None:
    """New pictures in place of the last, or the sentence why there are none."""
    state = st.session_state
    try:
        images = read()
        state.pop("uploads", None)  # else Streamlit holds the last pictures until the next run
        state["uploads"], state["upload problem"] = images, ""
    except InputError as error:
        state["upload problem"] = str(error)
    state["upload number"] += 1
    for kept in ("own signals", "own"):
        state.pop(kept, None)


def let_go() -> None:
    """Free what Streamlit keeps of this visitor's files; it would keep them until the tab is closed."""
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    run = get_script_run_ctx()
    if run is not None:
        run.uploaded_file_mgr.remove_session_files(run.session_id)


def drop() -> None:
    """Forget the pictures."""
    take(lambda: None)


def examples(context: Context) -> None:
    """Pictures to try when there are none at hand."""
    columns = st.columns(4)
    ready = {
        "Ten known members": ("member", None),
        "Ten known non-members": ("nonmember", None),
        "The same, inverted": ("nonmember", ImageOps.invert),
    }
    for column, (label, (role, change)) in zip(columns, ready.items(), strict=False):
        column.button(
            label,
            on_click=take,
            args=(lambda role=role, change=change: example(context, role, change),),
            width="stretch",
        )
    if st.session_state.get("uploads") is not None:
        columns[3].button("Remove your pictures", on_click=drop, width="stretch", icon=":material/delete:")


def example(context: Context, role: str, change: Callable[[Image.Image], Image.Image] | None) -> ImageSet:
    """Ten pictures of the image set in use, as if somebody had sent them."""
    images = plan(context.run()).images.with_role(role)
    chosen = images.table.iloc[:READY]
    if chosen.empty:
        raise InputError(f"{images.name} has none of these; choose another example.")
    files = [(row.file, images.read(row.Index)) for row in chosen.itertuples()]
    if change is not None:
        files = [(f"inverted {name}", png(change(decode(data)[0]))) for name, data in files]
    return uploads.received(files)


def controls() -> None:
    """The attack, the timestep and the false-alarm rate."""
    left, middle, right = st.columns(3)
    with left:
        search()
    with middle:
        timestep()
    with right:
        false_alarms()


def run_of(context: Context, steps: int = STEPS) -> Run:
    """The run on the known pictures; a visitor's pictures have no captions, so BLIP writes those of all."""
    run = context.run(steps=steps)
    captioned = plan(run).model.captioned
    return replace(run, captions="blip") if captioned and run.captions == "given" else run


def findings(context: Context, images: ImageSet) -> Audit | None:
    """What can be said; None while something is still being computed."""
    run = run_of(context)
    question = audit.ask(run, images, context.fpr)
    attack = question.known.tasks[0].attack.name
    _, known, complete = signals(run, "Scoring the known pictures")
    if not complete:
        return None
    own = own_signal(question.asked)
    if own is None:
        return None
    key = "audit", question.known.tasks[0].key, question.asked.tasks[0].key, context.fpr
    return remembered(key, lambda: audit.answer(question, known[attack], own))


def remembered(key: tuple, make: Callable[[], Any]) -> Any:
    """Something that this visit made before; only the last `REMEMBERED` stay."""
    kept = st.session_state.setdefault("own", {})
    if key not in kept:
        while len(kept) >= REMEMBERED:
            kept.pop(next(iter(kept)))
        kept[key] = make()
    return kept[key]


def own_signal(asked: Plan) -> pd.DataFrame | None:
    """The distances of the visitor's pictures, which only this visit remembers; None while they are computed."""
    kept = st.session_state.setdefault("own signals", {})
    name, key = asked.tasks[0].attack.name, asked.tasks[0].key
    if key in kept:
        return kept[key]
    number = st.session_state["upload number"]
    place = f"{viewer()} {number} {key}"
    job = SERVICE.find(place)
    if job is not None and job.state in ("failed", "cancelled"):
        st.error(sentence(job.error or "Cancelled."))
        if not st.button("Score them again", type="primary"):
            return None
    if job is None or not job.live:
        shaped = asked if asked.model.captioned else replace(asked, images=as_seen(asked.images, asked.model.profile))
        SERVICE.submit(place, lambda tick: kept.update({key: unkept(shaped, tick)[name]}), viewer())
    watch(place)
    return None


def views(context: Context, found: Audit) -> None:
    """The shift alarm first, then what was chosen to look at."""
    (st.warning if audit.shifted(found) else st.info)(
        audit.in_question(found), icon=":material/compare:" if audit.shifted(found) else ":material/check:"
    )
    first = next(iter(VIEWS))
    view = gated_choice(st.segmented_control, "Look at", "upload view", list(VIEWS), default=first, required=True)
    VIEWS[view](context, found)


def each_picture(context: Context, found: Audit) -> None:
    """Every picture on the ruler, and a sentence on the one that is chosen."""
    steps = [int(n) for n in found.pictures.n.unique()]
    for n in steps:
        st.markdown(audit.summary(found, n))
    st.caption(audit.said_of_attack(found) + below_chance(found))
    chart = ruler(found)
    left, right = st.columns(2, gap="large")
    with left:
        show(chart, "ruler")
    with right:
        gallery(found)
        verdicts(found)
    rejects(found.question.asked.images)
    exports(found, chart)


def below_chance(found: Audit) -> str:
    """A warning where the attack points the wrong way on this model."""
    known = found.scores[(found.scores.group != "asked") & (found.scores.n == 1)]
    if (
        known.group.nunique() < 2
        or (area := metrics.auc(known.score.to_numpy(), known.group.eq("member").to_numpy())) >= 0.5
    ):
        return ""
    return f" On the known pictures this attack points the wrong way (AUC {100 * area:.1f} %): choose another one."


def ruler(found: Audit) -> figures.Chart:
    images = found.question.asked.images
    return figures.ruler(found.scores, images.table.set_index("image").file, audit.thresholds(found))


def gallery(found: Audit) -> None:
    """A row per picture: as it was sent, as the model sees it, what was changed on the way, and its p-values."""
    images, profile = found.question.asked.images, found.question.known.model.profile
    table = remembered(("gallery", images.digest, profile), lambda: side_by_side(images, profile))
    wide = found.pictures.pivot(index="image", columns="n", values="p").reindex(images.table.image)
    for n, title in P_COLUMNS.items():
        if n in wide:
            table = table.assign(**{title: wide[n].astype(float).to_numpy()})
    register("gallery", "the table of pictures", rows_below(len(table)))
    st.dataframe(
        table, hide_index=True, key="gallery", on_select=choose, selection_mode="single-row", row_height=56, height=380,
        column_order=["sent", "seen", *P_COLUMNS.values(), "changed on the way", "file"],
        column_config={
            "sent": st.column_config.ImageColumn("as sent", width=64),
            "seen": st.column_config.ImageColumn("as seen", width=64, help="As the model sees it."),
            **{title: st.column_config.NumberColumn(format="%.3f", width=64) for title in P_COLUMNS.values()},
        },
        alt=f"Your {len(table)} pictures, as they were sent and as the model sees them, with their p-values.",
    )  # fmt: skip


P_COLUMNS = {1: "p", 2: "p +OMS"}


def side_by_side(images: ImageSet, profile: Profile) -> pd.DataFrame:
    """Each picture as it was sent and as the model sees it."""
    rows = []
    for row in images.table.itertuples():
        picture, _ = decode(images.read(row.Index))
        pixels, changes = fit(picture, profile)
        seen = Image.fromarray(pixels.squeeze(2) if profile.channels == 1 else pixels)
        changed = "; ".join(filter(None, [row.notes, *changes])) or "nothing"
        file = harmless(row.file)  # the table can be saved as CSV
        rows.append({"sent": shown(picture), "seen": shown(seen), "file": file, "changed on the way": changed})
    return pd.DataFrame(rows)


def choose() -> None:
    """Remember which picture was chosen, for this page alone: it is the visitor's own."""
    rows, images = st.session_state["gallery"]["selection"]["rows"], st.session_state.get("uploads")
    if rows and images is not None and rows[0] < len(images):
        st.session_state["own pick"] = images.table.image.iloc[rows[0]]


def picked(images: ImageSet) -> str:
    """The picture that is looked at: the chosen one, else the first."""
    image = st.session_state.get("own pick")
    return image if images.table.image.eq(image).any() else images.table.image.iloc[0]


def verdicts(found: Audit) -> None:
    """What can be said of the chosen picture, without and with One More Step."""
    image = picked(found.question.asked.images)
    rows = found.pictures[found.pictures.image == image]
    st.text(rows.file.iloc[0])
    for row in rows.itertuples():
        (st.success if row.flagged else st.info)(f"{heading(row.n)}: {audit.verdict_of(found, row)}")
    st.caption("Click a row to choose a picture. No score says that a picture was trained on.")


def heading(n: int) -> str:
    return audit.NAMES[n][0].upper() + audit.NAMES[n][1:]


def rejects(images: ImageSet) -> None:
    """What could not be used, and why."""
    if len(images.rejected):
        with st.expander(f"{len(images.rejected)} could not be used"):
            st.dataframe(images.rejected.map(harmless), hide_index=True)


def exports(found: Audit, chart: figures.Chart) -> None:
    """The findings as files, if the visitor wants them."""
    report = people.plain(audit.report(found))
    kinds = {
        "CSV": ("csv", "text/csv", lambda: findings_csv(report)),
        "JSON": ("json", "application/json", lambda: json.dumps(report, indent=1, allow_nan=False)),
        "HTML": ("html", "text/html", lambda: findings_page(report, chart)),
    }
    for column, (label, (ending, mime, write)) in zip(st.columns(4), kinds.items(), strict=False):
        column.download_button(
            f"Save as {label}", write, f"oms-verdict.{ending}", mime, on_click="ignore", icon=":material/download:",
            width="stretch",
        )  # fmt: skip


def collection(context: Context, found: Audit) -> None:
    """The pictures as a set, and how many it would take to decide one."""
    for n in found.sets:
        (st.success if found.sets[n]["decided"] else st.info)(audit.said_of_set(found, n))
    if not found.sets:
        st.info(audit.said_of_set(found, 1))
    st.caption(
        "Single pictures are hard to tell; sets are not. The permutation test decides: scores are skewed, and Welch's "
        "t-test then raises up to three times as many false alarms as it promises."
    )
    st.markdown(audit.said_of_power(found))
    if not found.power.empty:
        show(figures.power_curves(found.power, evidence.ENOUGH), "power")


def edit_one(context: Context, found: Audit) -> None:
    """Change a picture and watch its search."""
    images = found.question.asked.images
    left, right = st.columns([1, 2], gap="large")
    with left:
        image, edit = edit_controls(images)
    changed = with_edit(images, image, edit)
    run, cohort = cohort_of(context)
    planned = about(plan(run), images)
    traces = {
        "as sent": own_trace(planned, with_edit(images, image, Edit()), Edit()),
        "edited": own_trace(planned, changed, edit),
    }
    with left:
        seen(changed, planned, traces["edited"])
    with right:
        own = [(name, None, trace.residuals()) for name, trace in traces.items()]
        show(figures.path(cohort, own, run.steps, planned.model.dimension), "own path")
        st.table(compare(found, traces), hide_index=True)


def edit_controls(images: ImageSet) -> tuple[str, Edit]:
    """Which picture, and what to do to it."""
    names = images.table.set_index("image").file
    st.session_state["edited"] = picked(images)
    image = gated_choice(
        st.selectbox, "Picture", "edited", list(names.index), format_func=names.get,
        on_change=lambda: st.session_state.update({"own pick": st.session_state["edited"]}),
    )  # fmt: skip
    qualities = [0, 95, 90, 75, 50, 30, 20, 10, 5]
    words = {quality: str(quality) for quality in qualities} | {0: "as it is"}
    jpeg = gated_choice(st.select_slider, "JPEG quality", "jpeg", qualities, format_func=words.get)
    noise = slide("Noise (standard deviation in grey levels)", "noise", 0, 60)
    blur = slide("Blur (radius in pixels)", "blur", 0.0, 3.0, step=0.25)
    cut = slide("Crop (% of each side)", "crop", 0, 50, step=2)
    flip = gated(st.toggle, "Mirror", "mirror", is_flag)
    return image, Edit(crop=cut / 100, flip=flip, blur=blur, noise=float(noise), jpeg=jpeg)


def slide(label: str, key: str, low: float, high: float, **more: Any) -> float:
    """A slider between two numbers."""
    return gated(st.slider, label, key, between(low, high), low, high, **more)


def cohort_of(context: Context) -> tuple[Run, pd.DataFrame]:
    """Residuals of the known pictures, ten steps where they are known; and the run that gave them."""
    for steps in (PATH_STEPS, STEPS):
        run = run_of(context, steps)
        planned = plan(run)
        known = lookup(planned)
        if known:
            return run, residuals(planned, known[context.attack])
    return run, residuals(planned, signals(run, "Scoring the known pictures")[1][context.attack])


def own_trace(planned: Plan, images: ImageSet, edit: Edit) -> Trace:
    """The search for the noise of one of the visitor's pictures."""
    key = "trace", about(planned, images).tasks[0].key, planned.run.steps, edit
    return remembered(key, lambda: ask(lambda: unkept_trace(about(planned, images))))


def seen(images: ImageSet, planned: Plan, trace: Trace) -> None:
    """The edited picture, and what the model is asked with at the last step."""
    picture, _ = decode(images.read(images.table.index[0]))
    pixels, _ = fit(picture, planned.model.profile)
    pictures = [
        (small(picture, SHOWN), "edited"),
        (pixels, "as the model sees it"),
        (trace.shown(planned.run.steps)[0], "with the noise it found"),
    ]
    for column, (values, caption) in zip(st.columns(3), pictures, strict=True):
        flat = values.squeeze(2) if values.ndim == 3 and values.shape[2] == 1 else values
        column.image(enlarge(flat, 160), caption=caption, width="stretch", alt=caption)


def compare(found: Audit, traces: dict[str, Trace]) -> pd.DataFrame:
    """Score and p-value as sent and edited, without and with One More Step."""
    attack = found.question.known.tasks[0].attack
    rows = []
    for n in found.pictures.n.unique():
        known = found.scores[(found.scores.group == "nonmember") & (found.scores.n == n)].score.to_numpy()
        for name, trace in traces.items():
            score = attack.score(trace.distances(), int(n))
            p = f"{evidence.p_values(score, known)[0]:.3f}" if len(known) else "-"
            rows.append({"": heading(n), "picture": name, "score": f"{score[0]:.3f}", "p": p})
    return pd.DataFrame(rows)


def shown(picture: Image.Image) -> str:
    """A small copy of a picture for a table, written anew: what was sent is never sent back."""
    return "data:image/png;base64," + base64.b64encode(png(Image.fromarray(small(picture, THUMBNAIL)))).decode()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


VIEWS = {"Each picture": each_picture, "The collection": collection, "Edit one": edit_one}

main()
