"""OMS Explorer: the start page. Run it with ``make app`` or ``streamlit run app.py``."""

import sys

import streamlit as st

from oms_core import cache, catalog, figures
from oms_core.run import lookup, lookup_trace, plan, residuals
from pages.common.context import Context
from pages.common.pictures import READY, ordinary
from pages.common.shell import begin, guarded, show

CARDS = (
    (
        "Step the search",
        "pages/1_Step_the_search.py",
        ":material/directions_walk:",
        "Two pictures, one of them from the training set. Step the search for their noise and see which one settles.",
        {"model": "ddpm-digits"},
    ),
    (
        "Do members settle faster?",
        "pages/2_Convergence.py",
        ":material/trending_down:",
        "Residuals of 1,600 handwritten digits, step by step: boxes, outliers, and the picture behind each point.",
        {"model": "ddpm-digits"},
    ),
    (
        "Flip One More Step",
        "pages/3_Attacks.py",
        ":material/troubleshoot:",
        "Four published attacks with and without one more model call: ROC curves, caught members, paired intervals.",
        {"model": "ddpm-digits", "fpr": "0.01"},
    ),
    (
        "The same on clothes",
        "pages/3_Attacks.py",
        ":material/apparel:",
        "Fashion pictures at 28 x 28. One More Step helps the naive attack, and here it can also hurt.",
        {"model": "ddpm-fashion"},
    ),
    (
        "A transformer",
        "pages/3_Attacks.py",
        ":material/hub:",
        "The same digits, learned by a U-ViT in continuous time. Does One More Step help there too?",
        {"model": "uvit-digits", "n": "2"},
    ),
    (
        "Pictures with captions",
        "pages/3_Attacks.py",
        ":material/subtitles:",
        "A small Stable Diffusion on latents. What is the caption worth: given, written by BLIP, or none?",
        {"model": "sd-fashion", "n": "2", "captions": "blip"},
    ),
    (
        "Who is wrongly accused?",
        "pages/4_Inspect.py",
        ":material/search:",
        "The pictures behind the errors: arrow through the most wrongly accused, and see which attack catches whom.",
        {"model": "ddpm-fashion", "attack": "PIA", "fpr": "0.01"},
    ),
    (
        "Your own pictures",
        "pages/5_Try_your_images.py",
        ":material/add_photo_alternate:",
        "Hand in a few pictures: where do they fall between members and pictures that the model never saw?",
        {"model": "ddpm-digits", "attack": "PIA", "fpr": "0.01"},
    ),
    (
        "When does it work?",
        "pages/6_Sweep.py",
        ":material/grid_on:",
        "Every timestep against every distance, as a grid. Click a cell, and every page goes there.",
        {"model": "ddpm-digits"},
    ),
    (
        "Beside the paper",
        "pages/7_Paper_method_limits.py",
        ":material/menu_book:",
        "The paper's six tables next to what these small models give, and where the method ends.",
        {},
    ),
)
PER_ROW = 5


def cards() -> None:
    """Ready scenes, one click each."""
    for start in range(0, len(CARDS), PER_ROW):
        row = CARDS[start : start + PER_ROW]
        for column, (title, page, icon, words, params) in zip(st.columns(PER_ROW), row, strict=True):
            with column.container(border=True, height="stretch"):
                st.markdown(f"#### {title}")
                st.write(words)
                st.page_link(page, label="Open", icon=icon, query_params=params)


def pair(context: Context) -> None:
    """A member and a non-member, ten steps each, over the bands of all pictures."""
    run = Context(model=context.model).run(steps=10)
    planned = plan(run)
    known = lookup(planned)
    if not known:
        st.info("This model has no precomputed scene. Open a page above and press Run.")
        return
    cohort, table, own = residuals(planned, known["NA"]), planned.images.table, []
    for role, name in (("member", "a member"), ("nonmember", "a non-member")):
        image = ordinary(table[table.role == role].image.iloc[:READY], cohort, role == "member")
        found = lookup_trace(planned, image)
        if found is not None:
            own.append((name, role == "member", found.residuals()))
    show(figures.path(cohort, own, run.steps, planned.model.dimension), "path")


def system_check() -> None:
    """Is it working: device, models, cache."""
    with st.expander("System check"):
        torch = sys.modules.get("torch")
        device = "not loaded yet; nothing on this page needs it" if torch is None else device_sentence()
        st.markdown(
            f"- Device: {device}\n- Models: {', '.join(catalog.built_in())}\n"
            f"- Results are kept in `{cache.home().name}`, and found again by content"
        )


def device_sentence() -> str:
    from oms_core.device import place

    placement = place()
    return f"{placement.device}, {placement.dtype}"


def main() -> None:
    context = begin("OMS Explorer", "Was this picture in the training set of that diffusion model?")
    st.markdown(
        "A diffusion model learns to name the noise in a picture. Ask it once, and the answer is a little better for "
        "pictures it was trained on: that is every published attack. Feed the answer back and ask again, "
        "εⁿ = f(εⁿ⁻¹), and the difference often grows: that is **One More Step**."
    )
    with guarded():
        cards()
        pair(context)
        system_check()


main()
