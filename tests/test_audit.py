"""Verdicts on pictures of unknown membership: from files to sentences, in the engine and on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from oms_core import audit, evidence
from oms_core.__main__ import main
from oms_core.assemble import png
from oms_core.compute import compute_trace, measured, unkept, unkept_trace
from oms_core.errors import InputError
from oms_core.export import findings_csv, findings_page
from oms_core.figures import Chart, ruler
from oms_core.images import ImageSet, open_images
from oms_core.location import Location
from oms_core.people import plain
from oms_core.run import Run, about, lookup, plan
from oms_core.uploads import received


def sent(name: str, role: str, count: int) -> ImageSet:
    """The first pictures of a role of a built-in set, as files that somebody hands in."""
    images = open_images(name).with_role(role).limit(count)
    return received([(f"{role} {row}.png", images.read(row)) for row in images.table.index])


def audited(run: Run, images: ImageSet, fpr: float = 0.05) -> audit.Audit:
    question = audit.ask(run, images, fpr)
    (name,) = run.attacks
    return audit.answer(question, measured(question.known)[name], unkept(question.asked)[name])


@pytest.fixture(scope="module")
def on_digits() -> audit.Audit:
    """Twelve known members and twelve known non-members of the shipped digits, with PIA."""
    images = [open_images("digits").with_role(role).limit(12) for role in ("member", "nonmember")]
    files = [(f"{one.table.role[row]} {row}.png", one.read(row)) for one in images for row in one.table.index]
    return audited(Run("ddpm-digits", attacks=("PIA",)), received(files))


def test_known_pictures_handed_in_as_files_get_the_scores_that_are_shipped(on_digits: audit.Audit) -> None:
    planned = plan(Run("ddpm-digits", attacks=("PIA",)))
    shipped = lookup(planned)["PIA"].set_index("image")
    attack = planned.tasks[0].attack
    for n, rows in on_digits.pictures.groupby("n"):
        expected = attack.score(shipped.loc[rows.image], n)
        assert rows.score.astype(float).to_numpy() == pytest.approx(expected, rel=1e-5)


def test_a_picture_in_question_is_not_part_of_its_own_reference(on_digits: audit.Audit) -> None:
    everything = open_images("digits").table
    assert on_digits.reference == (everything.role == "nonmember").sum() - 12
    assert on_digits.members == (everything.role == "member").sum() - 12
    assert not set(on_digits.question.reference.table.image) & set(on_digits.question.asked.images.table.image)


def test_p_values_are_those_of_the_reference(on_digits: audit.Audit) -> None:
    for n, rows in on_digits.pictures.groupby("n"):
        known = on_digits.scores[(on_digits.scores.n == n) & (on_digits.scores.group == "nonmember")].score.to_numpy()
        expected = evidence.p_values(rows.score.to_numpy(float), known)
        assert rows.p.to_numpy(float) == pytest.approx(expected)
        assert rows.flagged.tolist() == (expected <= 0.05).tolist()


def test_the_threshold_on_the_ruler_is_where_pictures_are_flagged(on_digits: audit.Audit) -> None:
    for n, rows in on_digits.pictures.groupby("n"):
        assert rows.flagged.tolist() == (rows.score.astype(float) >= audit.thresholds(on_digits)[n]).tolist()


@pytest.mark.parametrize(("size", "fpr"), [(99, 0.01), (98, 0.01), (1000, 0.05), (5, 0.5), (3, 0.9)])
def test_the_threshold_agrees_with_the_p_value_for_every_score(size: int, fpr: float) -> None:
    known = np.arange(float(size))
    rows = pd.DataFrame({"group": "nonmember", "n": 1, "score": known})
    found = audit.thresholds(SimpleNamespace(scores=rows, question=SimpleNamespace(fpr=fpr)))
    scores = np.arange(-1, size + 1, 0.5)
    flagged = evidence.p_values(scores, known) <= fpr + 1e-12
    assert (scores >= found[1]).tolist() == flagged.tolist() if 1 in found else not flagged.any()


def test_members_as_a_set_are_decided_and_non_members_are_not() -> None:
    run = Run("ddpm-digits", attacks=("PIA",))
    members, others = (audited(run, sent("digits", role, 40)) for role in ("member", "nonmember"))
    assert members.sets[2]["decided"]
    assert not others.sets[2]["decided"]
    assert "more member-like than known non-members" in audit.said_of_set(members, 2)
    assert "not to be told from known non-members" in audit.said_of_set(others, 2)
    for found in (members, others):
        assert not audit.shifted(found) or "look unlike" in audit.in_question(found)
        assert "do not tell these pictures" in audit.in_question(found)


def test_pictures_of_another_kind_set_off_the_alarm_in_the_first_line() -> None:
    found = audited(Run("ddpm-digits", attacks=("NA",)), sent("fashion", "nonmember", 12))
    assert audit.shifted(found)
    first = audit.says(found)[0]
    assert "may measure how these sets differ, and not membership" in first
    assert "12 of 12 look unlike every known non-member" in first
    row = next(found.pictures.itertuples())
    assert audit.odd(row)
    assert "of another kind" in audit.verdict_of(found, row)


# What cannot be said


@pytest.fixture
def half(tmp_path: Path, pictures: Path) -> dict[str, Location]:
    """Members only, and non-members only."""
    found = {}
    for role in ("member", "nonmember"):
        (tmp_path / role).symlink_to(pictures / role)
        found[role] = Location(f"{role}={pictures / role}")
    return found


def some(count: int, *shape: int, seed: int = 5) -> ImageSet:
    return received([(f"{k}.png", png(pixels)) for k, pixels in enumerate(random_pixels(count, *shape, seed=seed))])


def random_pixels(count: int, *shape: int, seed: int = 5) -> list[np.ndarray]:
    """The pixels of such pictures."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


def test_without_known_non_members_pictures_are_put_in_order_and_nothing_more(
    pipeline: Path, half: dict[str, Location]
) -> None:
    found = audited(Run(Location(pipeline), half["member"], attacks=("NA",), t=100), some(3, 8, 8))
    assert (found.reference, found.members) == (0, 6)
    assert found.pictures.score.notna().all()
    assert found.pictures[["p", "flagged", "q", "unusual"]].isna().all(axis=None)
    assert found.sets == {}
    assert found.power.empty
    assert audit.thresholds(found) == {}
    said = audit.says(found)
    assert "nothing can be flagged" in " ".join(said)
    assert "without known non-members" in audit.verdict_of(found, next(found.pictures.itertuples()))
    assert json.dumps(plain(audit.report(found)), allow_nan=False)


def test_without_known_members_pictures_are_judged_but_the_power_is_unknown(
    pipeline: Path, half: dict[str, Location]
) -> None:
    found = audited(Run(Location(pipeline), half["nonmember"], attacks=("NA",), t=100), some(3, 8, 8), fpr=0.5)
    assert (found.reference, found.members) == (6, 0)
    assert found.pictures.p.notna().all()
    assert 1 in found.sets
    assert found.power.empty
    assert "cannot be said without known members" in audit.said_of_power(found)
    assert "cannot be said without known members" in audit.said_of_attack(found)


def test_a_rate_below_what_the_reference_can_show_is_not_decided(pipeline: Path, pictures: Path) -> None:
    found = audited(Run(Location(pipeline), Location(pictures), attacks=("NA",), t=100), some(2, 8, 8), fpr=0.01)
    assert not found.pictures.flagged.any()
    assert "takes 99 known non-members, and there are 6" in audit.verdict_of(found, next(found.pictures.itertuples()))


def test_a_single_picture_is_judged_alone(pipeline: Path, pictures: Path) -> None:
    found = audited(Run(Location(pipeline), Location(pictures), attacks=("NA",), t=100), some(1, 8, 8), fpr=0.5)
    assert found.sets == {}
    assert "from two pictures on" in audit.said_of_set(found, 1)
    assert "are too few to see" in audit.in_question(found)


@pytest.mark.parametrize(
    ("changes", "fpr", "says"),
    [
        ({"attacks": ("NA", "PIA")}, 0.01, "takes one attack"),
        ({"attacks": ("GSA",)}, 0.01, "learns from known members"),
        ({"attacks": ("NA",)}, 0.0, "must lie between 0 and 1"),
        ({"attacks": ("NA",)}, 1.5, "must lie between 0 and 1"),
        ({"attacks": ("NA",)}, float("nan"), "must lie between 0 and 1"),
    ],
)
def test_an_unusable_question_is_refused_in_one_sentence(changes: dict, fpr: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        audit.ask(replace(Run(), **changes), some(1, 8, 8), fpr)


def test_a_model_that_needs_captions_says_so_for_pictures_without(pipeline: Path) -> None:
    with pytest.raises(InputError, match="--captions blip"):
        audit.ask(Run("sd-fashion", attacks=("NA",)), some(1, 8, 8), 0.05)


# A visitor's pictures are the visitor's own


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", ["ddpm-digits", "sd-fashion"])
def test_nothing_of_a_visitors_pictures_is_kept(model: str, cache_folder: Path) -> None:
    run = Run(model, attacks=("NA",), captions="blip" if model == "sd-fashion" else "given")
    planned = plan(run)
    lookup(planned)
    before = files_below(cache_folder)
    asked = about(planned, some(2, 28, 28))
    assert unkept(asked)["NA"].image.tolist() == asked.images.table.image.tolist()
    one = replace(asked, images=replace(asked.images, table=asked.images.table.iloc[:1]))
    unkept_trace(one)
    assert files_below(cache_folder) == before


def test_what_is_not_kept_is_what_would_have_been_kept(pipeline: Path, pictures: Path) -> None:
    planned = plan(Run(Location(pipeline), Location(pictures), attacks=("NA", "PIA", "SecMI"), t=100, batch=16))
    kept, fresh = measured(planned), unkept(planned)
    for name in kept:
        pd.testing.assert_frame_equal(kept[name], fresh[name])
    image = planned.images.table.image.iloc[0]
    own = replace(planned, images=replace(planned.images, table=planned.images.table.iloc[:1]))
    assert np.array_equal(compute_trace(planned, image).eps, unkept_trace(own).eps)


def test_the_distances_of_a_trace_are_those_of_the_signal(pipeline: Path, pictures: Path) -> None:
    planned = plan(Run(Location(pipeline), Location(pictures), attacks=("SecMI",), t=100, batch=1))
    signal = measured(planned)["SecMI"]
    found = compute_trace(planned, signal.image.iloc[0]).distances()
    assert found.iloc[0].to_dict() == pytest.approx(signal.iloc[0].drop("image").to_dict(), rel=1e-4)


# Files and the command line


def test_the_findings_as_files_hold_every_picture_and_run_nothing(on_digits: audit.Audit) -> None:
    rows = on_digits.pictures.copy()
    rows.loc[0, "file"] = "=cmd|' /C calc'!A0"
    rows.loc[1, "file"] = "<script>alert(1)</script>"
    found = plain(audit.report(replace(on_digits, pictures=rows)))
    table = findings_csv(found)
    assert "'=cmd" in table
    assert len(table.splitlines()) == len(rows) + 1
    page = findings_page(found, Chart(drawn(on_digits).figure, "", pd.DataFrame()))
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert all(sentence.split("'")[0].split("(")[0].strip() in page for sentence in found["says"])


def drawn(found: audit.Audit) -> Chart:
    return ruler(found.scores, found.question.asked.images.table.set_index("image").file, audit.thresholds(found))


def test_the_ruler_shows_every_picture_in_question_once_for_each_n(on_digits: audit.Audit) -> None:
    chart = drawn(on_digits)
    stars = [trace for trace in chart.figure.data if trace.name == "your pictures"]
    assert [len(trace.x) for trace in stars] == [24, 24]
    assert len(chart.table) == 48
    beyond = [int(on_digits.pictures[on_digits.pictures.n == n].flagged.sum()) for n in (1, 2)]
    assert f"{beyond[0]} of 24 as published; {beyond[1]} of 24 with One More Step" in chart.alt


def run_main(arguments: Sequence[str], capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    code = main([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_says_the_same(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for k, pixels in enumerate(random_pixels(3, 8, 8)):
        (own / f"{k}.png").write_bytes(png(pixels))
    (own / "broken.png").write_bytes(b"no picture")
    asked = ["verdict", "--model", str(pipeline), "--reference", str(pictures), "--images", str(own)]
    asked += ["--attack", "NA", "--t", "100", "--fpr", "0.5"]
    code, out, err = run_main([*asked, "--json"], capsys)
    assert code == 0
    found = json.loads(out)
    assert {"pictures", "set", "power", "shift", "says", "fpr", "non_members"} <= set(found)
    assert [row["file"] for row in found["pictures"]] == ["0.png", "1.png", "2.png"] * 2
    assert found["rejected"][0]["file"] == "broken.png"
    assert "not scored: broken.png" in err
    run = Run(Location(pipeline), Location(pictures), attacks=("NA",), t=100)
    expected = audited(run, some(3, 8, 8), 0.5).pictures
    assert [row["p"] for row in found["pictures"]] == pytest.approx(expected.p.astype(float).tolist())
    code, out, _ = run_main(asked, capsys)
    assert code == 0
    assert all(sentence in out for sentence in found["says"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--attack", "NA"], "--images"),
        (["--attack", "NA", "--images", "/nowhere"], "There is no image set or folder"),
        (["--attack", "NA", "--images", "digits", "--reference", "/nowhere"], "There is no image set or folder"),
        (["--images", "digits"], "name it with --attack"),
        (["--attack", "NA", "--images", "digits", "--fpr", "2"], "between 0 and 1"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    code, out, err = run_main(["verdict", *arguments], capsys)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
