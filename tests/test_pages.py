"""Every page in every state it can be in: no exception, and always a next action."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from oms_core import catalog
from oms_core.attacks import ATTACKS
from oms_core.compute import Progress
from oms_core.jobs import SERVICE
from pages.common.shell import job_key

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "app.py", "pages/1_Step_the_search.py", "pages/2_Convergence.py", "pages/3_Attacks.py", "pages/4_Inspect.py",
    "pages/5_Try_your_images.py", "pages/6_Sweep.py", "pages/7_Paper_method_limits.py",
]  # fmt: skip
BAD_ADDRESSES = {
    "model": "../../etc/passwd",
    "images": "/etc",
    "captions": "banana",
    "attack": "<script>alert(1)</script>",
    "t": "-5",
    "n": "99999999999999999999",
    "fpr": "nan",
    "first": "../x",
    "pick": "../x",
    "limit": "0",
    "seed": "one",
    "step": "1e9",
}


def opened(page: str, **address: str) -> AppTest:
    """A page as a visitor with this address finds it."""
    test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in address.items():
        test.query_params[name] = value
    if page != "app.py":
        test.switch_page(page)
    return test.run()


def words(test: AppTest) -> str:
    """Everything that a page says in its messages."""
    kinds = (test.error, test.warning, test.info, test.success, test.caption, test.markdown)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_on_its_precomputed_scene(page: str) -> None:
    test = opened(page)
    assert not test.exception
    assert not test.error
    assert not [button for button in test.button if button.label == "Run"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("model", catalog.built_in())
def test_a_precomputed_scene_says_its_numbers(page: str, model: str) -> None:
    test = opened(page, model=model, n="2", step="2")
    assert not test.exception
    assert not test.error
    said = words(test)
    expected = {
        "app.py": "Residual at step n = 10",
        "1_": "After step 2 the noise of",
        "2_": "the median residual of members is",
        "3_": "gain in AUC points with its 95 % interval",
        "4_": "It wrongly accuses",
        "5_": "Choose pictures above, or an example",
        "6_": "separates best by d(" if model == "ddpm-digits" else "asks the model at most",
        "7_": "what the paper reports stands in columns of its own",
    }
    assert next(text for key, text in expected.items() if key in page) in said


@pytest.mark.parametrize("captions", ["blip", "none"])
def test_the_captions_of_a_text_to_image_model_can_be_exchanged(captions: str) -> None:
    test = opened("pages/3_Attacks.py", model="sd-fashion", n="2", captions=captions)
    assert not test.exception
    assert "gain in AUC points" in words(test)
    assert test.sidebar.selectbox(key="picked captions").value == captions


LOOKED_AT = [("pages/3_Attacks.py", name, "") for name in ATTACKS] + [
    ("pages/4_Inspect.py", "NA-repeated", ""), ("pages/4_Inspect.py", "GSA", ""),
    ("pages/3_Attacks.py", "NA-repeated", "20"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "attack", "limit"), LOOKED_AT)
def test_any_attack_that_a_page_offers_can_be_looked_at(page: str, attack: str, limit: str) -> None:
    address = {"model": "sd-fashion" if ATTACKS[attack].captioned else "ddpm-digits", "attack": attack, "n": "2"}
    test = opened(page, **address, **({"limit": limit} if limit else {}))
    assert not test.exception
    assert not test.error
    assert "which is ignored" not in words(test)


def test_only_folders_that_the_owner_opened_join_the_pickers(
    pipeline: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = {"model": str(pipeline), "images": str(pictures)}
    assert "which is ignored" in words(opened("pages/3_Attacks.py", **address))
    monkeypatch.setenv("OMS_MODELS", str(pipeline.parent))
    monkeypatch.setenv("OMS_IMAGES", str(pictures.parent))
    test = opened("pages/3_Attacks.py", **address)
    assert not test.exception
    assert "which is ignored" not in words(test)
    assert "Who is a member is what grey says" in words(test)
    assert [button for button in test.button if button.label == "Run"]


@pytest.mark.parametrize(
    ("page", "wrong"),
    [(page, [*BAD_ADDRESSES]) for page in PAGES] + [("pages/3_Attacks.py", [name]) for name in BAD_ADDRESSES],
)
def test_a_bad_address_is_ignored_with_a_sentence(page: str, wrong: list[str]) -> None:
    test = opened(page, **{name: BAD_ADDRESSES[name] for name in wrong})
    assert not test.exception
    for name in wrong:
        assert any(f"asks for {name}" in warning.value for warning in test.warning)
    assert test.session_state["context"] == type(test.session_state["context"])()


@pytest.mark.parametrize("page", PAGES)
def test_without_models_a_page_says_how_to_get_them_back(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(catalog, "MODELS", tmp_path)
    test = opened(page)
    assert not test.exception
    assert "git checkout assets" in test.error[0].value


@pytest.mark.parametrize("page", PAGES)
def test_a_broken_card_is_one_sentence(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "card.json").write_text("{")
    monkeypatch.setattr(catalog, "MODELS", tmp_path)
    test = opened(page)
    assert not test.exception
    assert "card.json is not valid JSON" in test.error[0].value


@pytest.mark.parametrize("page", [*PAGES[2:5], PAGES[6]])
def test_what_is_not_known_yet_is_offered_and_runs_to_its_end(page: str) -> None:
    test = opened(page, limit="20", t=str(60 + PAGES.index(page)))  # no two pages ask the same
    assert not test.exception
    (run,) = [button for button in test.button if button.label == "Run"]
    run.click().run()
    finished(test)
    test.run()
    assert not test.exception
    assert not test.error
    assert not [button for button in test.button if button.label in ("Run", "Cancel")]


def finished(test: AppTest) -> None:
    """Wait for the worker to have done everything that was asked."""
    SERVICE.ask(lambda: None)
    assert SERVICE.jobs
    for job in list(SERVICE.jobs.values()):
        while job.live:
            job.touch()
            SERVICE.ask(lambda: None)


@pytest.mark.parametrize("page", PAGES[2:4])
def test_a_running_job_shows_its_progress_and_what_has_come_in(page: str) -> None:
    from dataclasses import replace

    from oms_core.attacks import COMPARED
    from oms_core.compute import score
    from oms_core.evaluation import with_rivals
    from oms_core.run import plan
    from pages.common.context import Context

    context = Context(t=70, limit=40)
    run = with_rivals(context.run(COMPARED, 3)) if "3_" in page else context.run(steps=10)
    signals = {name: rows.iloc[:30] for name, rows in score(replace(run, seed=1)).items()}
    go_on, half_way = threading.Event(), threading.Event()

    def work(tick) -> None:
        tick(Progress(30, 40, signals))
        half_way.set()
        go_on.wait(60)

    job = SERVICE.submit(job_key(plan(run)), work, "somebody else")
    assert half_way.wait(60)
    test = opened(page, t="70", limit="40")
    assert not test.exception
    assert [button for button in test.button if button.label == "Cancel"]
    assert "30 of 40 pictures" in words(test) or "So far" in words(test)
    next(button for button in test.button if button.label == "Cancel").click().run()
    assert not job.cancelled  # somebody else still watches
    test.run()
    job.leave("somebody else")
    assert not job.cancelled  # and so does this page
    next(button for button in test.button if button.label == "Cancel").click().run()
    assert job.cancelled
    go_on.set()


@pytest.mark.parametrize("view", ["Ratio of residuals", "Jacobian norm"])
def test_convergence_is_looked_at_in_more_than_one_way(view: str) -> None:
    test = opened("pages/2_Convergence.py")
    test.segmented_control(key="look").set_value(view).run()
    assert not test.exception
    assert not test.error
    assert "AUC of the " in words(test)


@pytest.mark.parametrize("view", ["Gain by timestep", "Training epoch", "Iteration scheme"])
def test_a_sweep_says_what_it_found(view: str) -> None:
    test = opened("pages/6_Sweep.py")
    test.segmented_control(key="view").set_value(view).run()
    assert not test.exception
    assert not test.error
    assert "by the 95 % interval" in words(test)


@pytest.mark.parametrize("table", ["1", "2", "3", "4", "5", "6"])
def test_a_table_of_the_paper_stands_beside_what_was_measured(table: str) -> None:
    test = opened("pages/7_Paper_method_limits.py")
    test.segmented_control(key="table").set_value(table).run()
    assert not test.exception
    assert not test.error
    (shown,) = [frame.value for frame in test.dataframe]
    assert any(str(column).startswith("paper's") for column in shown)
    assert "is not measured yet" not in words(test)


@pytest.mark.parametrize("attack", ["QR", "GSA", "SimA", "NA-trajectory"])
def test_any_attack_can_be_looked_at_closely(attack: str) -> None:
    test = opened("pages/3_Attacks.py", attack=attack, n="2")
    assert not test.exception
    assert not test.error
    assert not test.warning or "asks for" not in words(test)


@pytest.mark.parametrize("page", ["pages/1_Step_the_search.py", "pages/2_Convergence.py", "pages/6_Sweep.py"])
def test_an_attack_that_is_no_search_gives_way_to_the_search_it_builds_on(page: str) -> None:
    test = opened(page, attack="SecMI-trajectory")
    assert not test.exception
    assert test.session_state["context"].attack == "SecMI"


def test_an_attack_on_captions_is_refused_for_a_model_without() -> None:
    test = opened("pages/3_Attacks.py", attack="CLiD")
    assert not test.exception
    assert "CLiD needs a model that takes captions" in words(test)
    assert test.session_state["context"].attack == "NA"


def test_a_search_can_be_stepped_before_its_cohort_is_known() -> None:
    test = opened(PAGES[1], seed="7", limit="20", step="2")
    assert not test.exception
    assert not test.error
    assert "After step 2 the noise of" in words(test)
    assert [button for button in test.button if button.label == "Run"]


def test_step_back_and_reset_move_the_search() -> None:
    test = opened(PAGES[1])
    press = lambda label: next(b for b in test.button if b.label == label).click().run()  # noqa: E731
    press("Step")
    press("Step")
    assert test.session_state["context"].step == 2
    assert "After step 2" in words(test)
    press("Back")
    assert "After step 1" in words(test)
    press("Reset")
    assert "Press Step" in words(test)
    assert not test.exception


def test_the_game_hides_who_is_who_until_it_is_revealed() -> None:
    test = opened(PAGES[1], step="3")
    next(b for b in test.button if b.label == "Hide who is who").click().run()
    assert "member" not in "".join(m.value for m in test.info).replace("non-", "")
    test.segmented_control[0].set_value("A").run()
    next(b for b in test.button if b.label == "Reveal").click().run()
    assert not test.exception
    assert "in the training set" in words(test) or "It was" in words(test)


def test_a_new_pair_holds_one_member_and_one_other_picture() -> None:
    test = opened(PAGES[1])
    next(b for b in test.button if b.label == "New pair").click().run()
    assert not test.exception
    context = test.session_state["context"]
    from oms_core.images import open_images

    table = open_images("digits").table
    roles = [table[table.image.str.startswith(name)].role.item() for name in (context.first, context.second)]
    assert sorted(roles) == ["member", "nonmember"]


def test_one_more_step_moves_the_verdict() -> None:
    test = opened(PAGES[3])
    assert "Switch on One More Step" in words(test)
    test.toggle(key="oms").set_value(True).run()
    assert not test.exception
    assert "gain in AUC points" in words(test)
    assert test.query_params["n"] == ["2"] or test.query_params["n"] == "2"


def test_a_gain_towards_chance_is_called_one() -> None:
    assert "Below chance with One More Step too: SecMI, SecMI-xt." in words(
        opened(PAGES[3], model="uvit-fashion", n="2")
    )
    assert "Below chance" not in words(opened(PAGES[3], model="uvit-digits", n="2"))


def test_choices_survive_a_change_of_page_and_return_to_the_address() -> None:
    test = opened(PAGES[3], model="ddpm-digits@700", fpr="0.01", n="2", attack="PIA")
    for page in PAGES[1:] + PAGES[1:3]:
        test.query_params.clear()
        test.switch_page(page).run()
        assert not test.exception
    context = test.session_state["context"]
    assert (context.model, context.fpr, context.n, context.attack) == ("ddpm-digits@700", 0.01, 2, "PIA")
    assert test.query_params["model"] in ("ddpm-digits@700", ["ddpm-digits@700"])


def test_first_visits_import_no_slow_library() -> None:
    slow = ["torch", "diffusers", "transformers", "sklearn"]
    code = f"""
import sys
from streamlit.testing.v1 import AppTest
for page in {PAGES!r}:
    test = AppTest.from_file("app.py", default_timeout=60)
    if page != "app.py":
        test.switch_page(page)
    test.run()
    assert not test.exception, test.exception
    found = [name for name in {slow!r} if name in sys.modules]
    assert not found, (page, found)
print("light")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "light" in done.stdout, done.stderr[-2000:]
