"""The page on single pictures, the drawer that every page opens, and the guessing game."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest
from test_pages import opened, words

from oms_core import catalog, metrics
from oms_core.attacks import ATTACKS
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.run import lookup, plan, scores
from pages.common.attacks import ACCUSED, CAUGHT, CLEARED, MISSED, held_out_p, judge
from pages.common.context import Context
from pages.common.drawer import opinions

INSPECT, STEP = "pages/4_Inspect.py", "pages/1_Step_the_search.py"
DIGITS = open_images("digits").table.set_index("image")


def press(test: AppTest, label: str) -> AppTest:
    return next(button for button in test.button if button.label == label).click().run()


def judged(model: str = "ddpm-digits", n: int = 1, fpr: float = 0.05) -> pd.DataFrame:
    """Naive attack, counted here by the book: image, member, score, called."""
    planned = plan(Context(model=Location(model)).run(steps=3))
    table = scores(planned, lookup(planned))
    rows = table[table.n == n].set_index("image")
    cut = metrics.roc(rows.score.to_numpy(), rows.member.to_numpy()).threshold_at(fpr)
    return rows.assign(called=rows.score >= cut)


def thumbnails(test: AppTest) -> list[str]:
    """What stands below each thumbnail."""
    return [caption.value for caption in test.caption if "label" in caption.value and "\n" in caption.value]


def opens(test: AppTest) -> str:
    """The file that is shown in detail."""
    (line,) = [m.value for m in test.markdown if re.match(r"\*\*\S+\.png\*\*, a", m.value)]
    return line.split("**")[1]


def place(test: AppTest) -> str:
    return next(
        m.value.strip("*") for m in test.markdown if m.value.startswith("**Picture ") or "pictures**" in m.value
    )


# Who is on which side


def test_every_picture_falls_on_one_side_and_its_p_value_counts_the_others() -> None:
    rng = np.random.default_rng(0)
    member = np.arange(60) % 3 == 0
    table = pd.DataFrame({"image": [f"{k:02d}" for k in range(60)], "member": member})
    table = pd.concat([table.assign(n=n, score=rng.normal(size=60).round(1) + n * member) for n in (1, 2)])
    for n in (1, 2):
        found = judge(table, n, 0.1)
        rows = table[table.n == n].set_index("image")
        cut = metrics.roc(rows.score.to_numpy(), rows.member.to_numpy()).threshold_at(0.1)
        for one in found.itertuples():
            called = rows.score[one.image] >= cut
            assert one.outcome == {(1, 1): CAUGHT, (0, 1): ACCUSED, (1, 0): MISSED, (0, 0): CLEARED}[one.member, called]
            reference = rows.score[~rows.member].drop(one.image, errors="ignore")
            assert one.p == pytest.approx((1 + (reference >= one.score).sum()) / (1 + len(reference)))
        assert (found.outcome == ACCUSED).sum() <= 0.1 * (~member).sum()
    first, second = (judge(table, n, 0.1).set_index("image") for n in (1, 2))
    assert [*second.gain] == pytest.approx([*(first.p - second.p)])


def test_a_lone_non_member_has_nobody_to_be_held_against() -> None:
    assert [*held_out_p(np.array([0.0, 1.0]), np.array([False, True]))] == [1.0, 0.5]


def test_the_opinions_on_a_picture_leave_it_out_of_its_own_reference() -> None:
    planned = plan(Context().run(("NA", "PIA"), 3))
    rows = judged()
    for image in (rows.index[~rows.member][3], rows.index[rows.member][3]):
        said = opinions(planned, image).set_index("attack").loc["NA"]
        others = rows.drop(image)
        reference, members = others.score[~others.member], others.score[others.member]
        own = rows.score[image]
        assert float(said.score) == pytest.approx(own, rel=6e-3)
        assert float(said.p) == pytest.approx((1 + (reference >= own).sum()) / (1 + len(reference)), abs=5e-4)
        assert said["above members"] == f"{100 * (members < own).mean():.0f} %"


# The page


@pytest.mark.parametrize("model", catalog.built_in())
def test_it_opens_on_the_ten_most_wrongly_accused(model: str) -> None:
    test = opened(INSPECT, model=model)
    assert not test.exception
    assert not test.error
    rows = judged(model)
    accused = rows[rows.called & ~rows.member].sort_values("score", ascending=False)
    shown = thumbnails(test)
    assert [line.split("  \n")[0] for line in shown] == [ACCUSED] * min(10, len(accused))
    assert [line.split("  \n")[2] for line in shown] == [f"{score:.3g}" for score in accused.score[:10]]
    files = open_images(catalog.describe(model).images).table.set_index("image").file
    assert opens(test) == files[accused.index[0]]
    said = words(test)
    assert f"wrongly accuses {len(accused)} of {(~rows.member).sum()} non-members" in said
    assert f"catches {(rows.called & rows.member).sum()} of {rows.member.sum()} members" in said
    assert "are caught by all 4 attacks" in said


def test_an_attack_below_chance_is_not_called_evidence() -> None:
    said = words(opened(INSPECT, model="uvit-fashion", attack="SecMI", n="2"))
    assert "accuses members no more often than others" in said
    assert "Try another attack" in said  # One More Step is on already
    assert "never in the training set" not in said


def test_each_order_is_kept() -> None:
    test = opened(INSPECT)
    rising = {"score": 2, "p-value": 3}
    for name in test.selectbox(key="kept sort").options:
        test.selectbox(key="kept sort").set_value(name).run()
        assert not test.exception
        column = next((place for word, place in rising.items() if word in name), None)
        if column:
            values = [float(line.split("  \n")[column].split()[-1]) for line in thumbnails(test)]
            assert values == sorted(values, reverse=name.startswith(("highest", "largest")))


def test_filters_by_outcome_and_label_show_no_others() -> None:
    test = opened(INSPECT)
    for outcome in (CAUGHT, ACCUSED, MISSED, CLEARED):
        test.get("button_group")[0].set_value([outcome]).run()
        assert {line.split("  \n")[0] for line in thumbnails(test)} == {outcome}
    test.multiselect(key="kept labels").set_value(["3"]).run()
    assert {line.split("  \n")[1] for line in thumbnails(test)} == {"label 3"}
    rows = judged()
    threes = DIGITS.label[rows.index] == "3"
    assert f"of {(threes & ~rows.called & ~rows.member).sum()}" in place(test)
    assert not test.exception


def test_nobody_left_is_a_sentence_with_the_next_action() -> None:
    test = opened(INSPECT)
    test.get("button_group")[0].set_value([]).run()
    assert not test.exception
    assert "Choose another outcome" in words(test)
    assert not thumbnails(test)
    test.get("button_group")[0].set_value([CAUGHT]).run()
    assert len(thumbnails(test)) == 10


def test_who_is_caught_by_which_attacks_can_be_asked_for() -> None:
    test = opened(INSPECT)
    test.get("button_group")[0].set_value([CAUGHT, MISSED]).run()
    box = test.selectbox(key="kept together")
    box.set_value("NA").run()
    assert thumbnails(test)
    assert {line.split("  \n")[0] for line in thumbnails(test)} == {CAUGHT}  # the naive attack is the one looked at
    test.selectbox(key="kept together").set_value("PIA").run()
    assert {line.split("  \n")[0] for line in thumbnails(test)} == {MISSED}


def test_the_walk_goes_on_to_both_ends_and_no_further() -> None:
    test = opened(INSPECT)
    enabled = lambda label: not next(b for b in test.button if b.label == label).disabled  # noqa: E731
    assert place(test) == "Picture 1 of 50"
    assert not enabled("Previous")
    assert not enabled("Earlier row")
    seen = [opens(test)]
    for number in (2, 3):
        press(test, "Next")
        assert place(test) == f"Picture {number} of 50"
        seen.append(opens(test))
    assert len(set(seen)) == 3
    press(test, "Previous")
    assert opens(test) == seen[1]
    rows = judged()
    accused = rows[rows.called & ~rows.member].sort_values("score", ascending=False)
    test = opened(INSPECT, pick=accused.index[38][:12])
    assert place(test) == "Picture 39 of 50"
    press(test, "Later row")
    assert place(test) == "Picture 41 of 50"
    assert not enabled("Later row")
    press(test, "50")
    assert place(test) == "Picture 50 of 50"
    assert not enabled("Next")
    assert not test.exception


def test_a_pinned_picture_stays_beside_the_next_ones() -> None:
    test = opened(INSPECT)
    first = opens(test)
    press(test, "Pin")
    press(test, "Next")
    files = [m.value.split("**")[1] for m in test.markdown if re.match(r"\*\*\S+\.png\*\*, a", m.value)]
    assert len(files) == 2
    assert files[0] == first != files[1]
    press(test, "Unpin")
    assert opens(test) == files[1]
    assert not test.exception


def test_a_picture_in_the_address_is_opened() -> None:
    rows = judged()
    image = rows.index[~rows.called & rows.member][0]
    test = opened(INSPECT, pick=image[:12])
    assert not test.exception
    assert not test.error
    assert opens(test) == DIGITS.file[image]
    assert "is not among those shown" in words(test)
    press(test, "Next")
    assert place(test) == "Picture 1 of 50"


def test_a_picture_of_another_set_is_a_sentence_and_the_walk_begins_anew() -> None:
    other = open_images("fashion").table.image.iloc[0]
    for pick in (other[:12], "0" * 12):
        test = opened(INSPECT, pick=pick)
        assert not test.exception
        assert "has no picture" in test.error[0].value
        press(test, "Next")
        assert not test.error


def test_another_model_forgets_the_picture() -> None:
    test = opened(INSPECT, pick=DIGITS.index[0][:12])
    test.sidebar.selectbox(key="picked model").set_value("ddpm-fashion").run()
    assert not test.exception
    assert not test.error
    assert test.session_state["context"].pick == ""


def test_choices_that_a_set_does_not_offer_are_dropped() -> None:
    test = opened(INSPECT)
    test.session_state["together"], test.session_state["labels"] = "NA + QR", ["3", "nothing"]
    test.run()
    assert not test.exception
    assert test.multiselect(key="kept labels").value == ["3"]


def test_scores_that_are_missing_can_be_run() -> None:
    test = opened(INSPECT, t="60", limit="20")
    assert not test.exception
    assert [button for button in test.button if button.label == "Run"]
    assert "appear here" in words(test)


def test_a_rate_below_one_picture_asks_for_more_false_alarms() -> None:
    fewer = opened(INSPECT, model="ddpm-fashion", fpr="0.001")
    assert not fewer.exception
    rows = judged("ddpm-fashion")
    assert ("less than one picture" in words(fewer)) == ((~rows.member).sum() < 1000)


@pytest.mark.parametrize("attack", ["QR", "NA-trajectory"])
def test_an_attack_that_is_no_search_shows_the_search_it_builds_on(attack: str) -> None:
    test = opened(INSPECT, attack=attack)
    assert not test.exception
    assert not test.error
    assert f"Its search by {ATTACKS[attack].shown_as}. Residual at step" in words(test)


# The drawer


@pytest.mark.parametrize("page", [STEP, "pages/2_Convergence.py", "pages/3_Attacks.py"])
def test_a_copied_address_opens_its_picture_once(page: str) -> None:
    image = DIGITS.index[DIGITS.role == "member"][0]
    test = opened(page, pick=image[:12])
    assert not test.exception
    assert DIGITS.file[image] in words(test)
    assert "Its search by NA" in words(test)
    test.run()
    assert "Its search by NA" not in words(test)
    assert test.session_state["context"].pick == image[:12]


def test_from_a_picture_its_search_is_stepped_beside_one_of_the_other_kind() -> None:
    image = DIGITS.index[DIGITS.role == "nonmember"][0]
    test = press(opened(INSPECT, pick=image[:12]), "Step its search")
    context = test.session_state["context"]
    assert context.first == image[:12]
    assert DIGITS.role[DIGITS.index.str.startswith(context.second)].item() == "member"


# The game


def playing() -> AppTest:
    return press(opened(STEP), "Hide who is who")


def member_of(test: AppTest) -> str:
    """Which of the two was in training."""
    first = test.session_state["context"].first
    return "A" if DIGITS.role[DIGITS.index.str.startswith(first)].item() == "member" else "B"


def vote(test: AppTest, right: bool) -> None:
    answer = member_of(test)
    test.segmented_control[0].set_value(answer if right else "AB".replace(answer, "")).run()


def score(test: AppTest) -> str:
    return next((m.value for m in test.markdown if " right**" in m.value), "")


def test_rounds_are_counted_with_their_steps_and_hold_against_chance_in_the_end() -> None:
    test = playing()
    for number, right in enumerate([True, True, False, True, True], start=1):
        press(test, "Step")
        assert score(test) == "" if number == 1 else score(test)
        vote(test, right)
        press(test, "Reveal")
        assert ("it is: this picture" in words(test)) == right
        assert score(test).startswith(f"**{sum([True, True, False, True, True][:number])} of {number} right**")
        assert "after 1.0 steps" in score(test)
        assert ("Guessing gives" in score(test)) == (number >= 5)
        press(test, "Next round")
        assert test.session_state["context"].step == 0
        assert test.segmented_control[0].value is None
    assert "2.5 of 5 on average, and 4 or more in 19 %" in score(test)
    assert not test.exception


def test_a_vote_counts_once_and_not_after_the_answer() -> None:
    test = playing()
    reveal = lambda: next(b for b in test.button if b.label == "Reveal")  # noqa: E731
    assert reveal().disabled
    vote(test, False)
    assert not reveal().disabled
    press(test, "Reveal")
    assert score(test).startswith("**0 of 1 right**")
    assert test.segmented_control[0].disabled
    assert reveal().disabled
    press(test, "Step")
    press(press(test, "End the game"), "Hide who is who")
    assert score(test).startswith("**0 of 1 right**")
    assert test.segmented_control[0].value is None  # a new round
    assert reveal().disabled


def test_a_new_pair_without_a_vote_counts_nothing_and_hides_again() -> None:
    test = playing()
    for _ in range(3):
        press(test, "New pair")
    assert score(test) == ""
    assert next(b for b in test.button if b.label == "Reveal").disabled
    said = words(test).replace("non-member", "member")
    assert "A: member" not in said
    assert "B: member" not in said


def test_who_is_who_cannot_be_read_from_the_order() -> None:
    answers = set()
    for _ in range(12):
        answers.add(member_of(playing()))
        if len(answers) == 2:
            break
    assert answers == {"A", "B"}


def test_a_hidden_pair_cannot_be_opened() -> None:
    test = playing()
    press(test, "Step")
    specs = [str(chart.proto) for chart in test.get("plotly_chart")]
    assert not any("customdata" in spec for spec in specs)
    vote(test, True)
    press(test, "Reveal")
    assert any("customdata" in str(chart.proto) for chart in test.get("plotly_chart"))
