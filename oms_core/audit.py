"""A verdict on pictures whose membership is unknown: scores beside known non-members, tests, and plain words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from oms_core import evidence, shift
from oms_core.attacks import ATTACKS, Learned
from oms_core.errors import InputError
from oms_core.images import ImageSet
from oms_core.run import Plan, Run, about, plan, scores, steps_of

NAMES = {1: "as published", 2: "with One More Step"}
OPEN = ("as_high", "p", "flagged", "q", "discovered", "unusual")  # what nothing can be said of without a reference


@dataclass(frozen=True)
class Question:
    """What is asked: an attack on a model, known pictures to compare with, and pictures of unknown membership.

    Attributes:
        known: the plan of the known pictures, members and non-members; one attack.
        asked: the same of the pictures in question.
        fpr: the false-alarm rate at which a single picture is flagged.
    """

    known: Plan
    asked: Plan
    fpr: float

    @property
    def reference(self) -> ImageSet:
        """Known non-members that are not themselves in question."""
        others = self.known.images.with_role("nonmember")
        return replace(others, table=others.table[~others.table.image.isin(self.asked.images.table.image)])


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        question: what was asked.
        pictures: a row per picture and n: `image, file, n, score` and the columns of `evidence.judged`, with
            `unusual`, see `shift.unusual`; what cannot be said is None.
        sets: by n, see `evidence.compare_sets`; empty where there is nothing to compare.
        power: `n, pictures, power`, see `evidence.power`; empty without known members and non-members.
        shift: see `shift.compare`, of the pictures in question and the reference; None without a reference.
        members, reference: how many known ones there were to compare with.
        caught: by n, the share of the known members that would be flagged.
        scores: of all: `group` (member, nonmember, asked), `image`, `n`, `score`.
    """

    question: Question
    pictures: pd.DataFrame
    sets: dict[int, dict[str, Any]]
    power: pd.DataFrame
    shift: dict[str, Any] | None
    members: int
    reference: int
    caught: dict[int, float]
    scores: pd.DataFrame


def ask(run: Run, images: ImageSet, fpr: float) -> Question:
    """Put a question: a run on known pictures with one attack, and the pictures in question.

    Raises:
        InputError: see `oms_core.run.plan`; or several attacks are named, or one that learns from known members.
    """
    if not 0 < fpr < 1:
        raise InputError(f"The false-alarm rate is {fpr}; it must lie between 0 and 1, 0.01 say.")
    known = plan(run)
    if len(known.tasks) != 1:
        raise InputError("A verdict takes one attack; name it with --attack.")
    if isinstance(known.tasks[0].attack, Learned):
        usable = [name for name, attack in ATTACKS.items() if not isinstance(attack, Learned)]
        raise InputError(f"{run.attacks[0]} learns from known members; for a verdict use one of {', '.join(usable)}.")
    return Question(known, about(known, images), fpr)


def answer(question: Question, known: pd.DataFrame, asked: pd.DataFrame) -> Audit:
    """Find out what can be said.

    Args:
        question: what was asked.
        known: the signal of the known pictures.
        asked: the signal of the pictures in question.
    """
    attack = question.known.tasks[0].attack
    everything = tidy(question, {attack.name: known}, {attack.name: asked})
    sides = {n: split(rows) for n, rows in everything.groupby("n")}
    steps = [n for n in steps_of(attack, question.known.run) if n in NAMES and n in sides]
    unusual, difference = beside(question)
    pictures = [judged(question, sides[n]["asked"], sides[n]["nonmember"], unusual).assign(n=n) for n in steps]
    sets = {n: found for n in steps if (found := compared(sides[n])) is not None}
    both = [n for n in steps if len(sides[n]["member"]) and len(sides[n]["nonmember"])]
    curves = [
        evidence.power(*(sides[n][role].to_numpy() for role in ("member", "nonmember"))).assign(n=n) for n in both
    ]
    return Audit(
        question,
        pd.concat(pictures, ignore_index=True),
        sets,
        pd.concat(curves, ignore_index=True) if curves else pd.DataFrame({"pictures": [], "power": [], "n": []}),
        difference,
        len(sides[1]["member"]),
        len(sides[1]["nonmember"]),
        {n: caught(sides[n], question.fpr) for n in both},
        everything[everything.n.isin(steps)],
    )


def tidy(question: Question, known: dict[str, pd.DataFrame], asked: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Finite scores of members, of the reference, and of the pictures in question: group, image, n, score."""
    own = scores(question.asked, asked).assign(group="asked")
    others = scores(question.known, known)
    others["group"] = np.where(others.member, "member", "nonmember")
    others = others[~others.image.isin(own.image)]
    rows = pd.concat([others, own], ignore_index=True)[["group", "image", "n", "score"]]
    return rows[np.isfinite(rows.score)]


def split(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The scores of each group at one n, by picture."""
    return {role: rows[rows.group == role].set_index("image").score for role in ("member", "nonmember", "asked")}


def caught(sides: dict[str, pd.Series], fpr: float) -> float:
    """The share of the known members that would be flagged."""
    return float((evidence.p_values(sides["member"].to_numpy(), sides["nonmember"].to_numpy()) <= fpr).mean())


def thresholds(audit: Audit) -> dict[int, float]:
    """By n, the score from which on a picture is flagged; none where nothing can be."""
    found = {}
    for n, rows in audit.scores[audit.scores.group == "nonmember"].groupby("n"):
        known = np.sort(rows.score)[::-1]
        most = int(audit.question.fpr * (1 + len(known)) + 1e-9) - 1  # of the reference that may score as high
        if most >= 0:
            found[n] = float(np.nextafter(known[most], np.inf)) if most < len(known) else float(known[-1])
    return found


def compared(sides: dict[str, pd.Series]) -> dict[str, Any] | None:
    """The set in question against the reference, where there are enough pictures."""
    own, reference = sides["asked"].to_numpy(), sides["nonmember"].to_numpy()
    return evidence.compare_sets(own, reference) if min(len(own), len(reference)) >= 2 else None


def beside(question: Question) -> tuple[pd.Series, dict[str, Any] | None]:
    """What pixels alone say: how unusual each picture is, and whether the sets differ."""
    images, profile, reference = question.asked.images, question.known.model.profile, shift.some(question.reference)
    if len(reference) <= shift.NEIGHBOUR:
        return pd.Series(np.nan, index=images.table.image), None
    own, others = images.pixels(profile), reference.pixels(profile)
    return pd.Series(shift.unusual(own, others), index=images.table.image), shift.compare(own, others)


def judged(question: Question, own: pd.Series, reference: pd.Series, unusual: pd.Series) -> pd.DataFrame:
    """A row for each picture in question at one n."""
    table = question.asked.images.table[["image", "file"]]
    found = pd.DataFrame({"image": own.index, "score": own.to_numpy()})
    if len(reference):
        found = evidence.judged(own.to_numpy(), reference.to_numpy(), question.fpr).assign(image=own.index)
    rows = table.merge(found, on="image", how="left").assign(unusual=unusual.loc[table.image].to_numpy())
    rows = rows.reindex(columns=["image", "file", "score", *OPEN])
    return rows.astype(object).where(rows.notna(), None)


def verdict_of(audit: Audit, row: Any) -> str:
    """What can be said of one picture, in a sentence that claims no more than that."""
    task, fpr = audit.question.known.tasks[0], audit.question.fpr
    if row.score is None:
        return "No verdict: the model gives this picture no finite score."
    if row.p is None:
        return "No verdict: without known non-members a score has no false-alarm rate."
    if audit.reference < evidence.needed_reference(fpr):
        return (
            f"No verdict at {100 * fpr:g} %: that takes {evidence.needed_reference(fpr)} known non-members, and there "
            f"are {audit.reference}."
        )
    count = f"{row.as_high} of {audit.reference:,} known non-members score at least as high (p = {row.p:.3f})"
    doubt = " It looks unlike all of them, so this may only say that it is of another kind." * odd(row)
    if row.flagged:
        at = f"at t = {task.t}, at a false-alarm rate of {100 * fpr:g} %"
        return f"Consistent with members {at}: {count}.{doubt}"
    return f"Not to be told from pictures that the model never saw: {count}.{doubt}"


def odd(row: Any) -> bool:
    """Whether a picture looks unlike the reference."""
    return row.unusual is not None and row.unusual <= shift.ALARM


def summary(audit: Audit, n: int) -> str:
    """How many pictures are flagged, and how many would be by chance."""
    rows = audit.pictures[audit.pictures.n == n]
    judged, fpr = rows[rows.p.notna()], audit.question.fpr
    if judged.empty:
        return "No known non-members: pictures can be put in order by their scores, but nothing can be flagged."
    flagged, left = int(judged.flagged.sum()), int(judged.discovered.sum())
    by_chance = f"{fpr * len(judged):.2g} would be by chance"
    said = f"{flagged} of {len(judged)} {plural(len(judged))} flagged {NAMES[n]} at {100 * fpr:g} % ({by_chance})"
    if len(judged) == 1:
        return f"{said}."
    return f"{said}; corrected for their number (Benjamini-Hochberg) {left} {'is' if left == 1 else 'are'}."


def said_of_attack(audit: Audit) -> str:
    """How many known members the attack finds at all, to weigh what it does not flag."""
    rate, task = f"{100 * audit.question.fpr:g} %", audit.question.known.tasks[0]
    if not audit.caught:
        return "How many members this attack finds cannot be said without known members and non-members."
    found = ", ".join(f"{100 * share:.1f} % {NAMES[n]}" for n, share in audit.caught.items())
    return f"Of {audit.members} known members {task.attack.name} flags at {rate}: {found}. The others are members too."


def plural(count: int) -> str:
    return "picture is" if count == 1 else "pictures are"


def said_of_set(audit: Audit, n: int) -> str:
    """Is the set as a whole more member-like than known non-members?"""
    found = audit.sets.get(n)
    if found is None:
        return "A set can be compared from two pictures on, and with known non-members."
    level = f"{100 * evidence.SET_LEVEL:g} %"
    outcome = (
        f"more member-like than known non-members, at a false-alarm rate of {level}"
        if found["decided"]
        else f"not to be told from known non-members at a false-alarm rate of {level}"
    )
    effect = f"{found['effect']:+.2f} [{found['effect_lo']:+.2f}, {found['effect_hi']:+.2f}]"
    return (
        f"As a set, {NAMES[n]}, these {found['pictures']} pictures are {outcome}: permutation test p = "
        f"{found['permutation']:.4f}, Welch's t-test p = {found['welch']:.2g}, mean score {effect} standard "
        "deviations from theirs."
    )


def said_of_power(audit: Audit) -> str:
    """How many pictures it takes to decide a set of members."""
    if audit.power.empty:
        return "How many pictures it takes cannot be said without known members and non-members."
    said = []
    for n, curve in audit.power.groupby("n"):
        least = evidence.enough(curve.reset_index(drop=True))
        most = int(curve.pictures.max())
        said.append(f"{NAMES[n]} {least} known members" if least else f"{NAMES[n]} not even {most} known members")
    share = f"{evidence.ENOUGH * 10:.0f} times in 10"
    return f"It takes, to decide a set at {100 * evidence.SET_LEVEL:g} % {share}: {', '.join(said)}."


def said_of_shift(found: dict[str, Any] | None, first: str, second: str) -> str:
    """Whether two sets can be told apart by their pixels alone, and what that means."""
    if found is None:
        return f"Whether {first} differ from {second} by their pixels alone cannot be said: one of the two is missing."
    if found["auc"] is None:
        least = f"that takes {shift.FEWEST} of each"
        return f"{found['pictures']} are too few to see whether {first} differ in kind from {second}: {least}."
    chance = (
        f"AUC {100 * found['auc']:.1f} %, chance gives {100 * found['chance_lo']:.1f} to {100 * found['chance_hi']:.1f}"
    )
    if found["alarm"]:
        return (
            f"The pixels alone tell {first} from {second} ({chance}), without asking any model. The attack's figure "
            "may measure how these sets differ, and not membership."
        )
    return f"The pixels alone do not tell {first} from {second} ({chance})."


def shifted(audit: Audit) -> bool:
    """Whether the pictures in question, or some of them, are of another kind than the reference."""
    return bool(audit.shift and audit.shift["alarm"]) or any(odd(row) for row in audit.pictures.itertuples())


def in_question(audit: Audit) -> str:
    """The shift alarm of an audit as a sentence, with how many single pictures are unusual."""
    first = audit.pictures[audit.pictures.n == 1]
    strange = sum(odd(row) for row in first.itertuples())
    said = said_of_shift(audit.shift, "these pictures", "the known non-members")
    single = f" {strange} of {len(first)} look unlike every known non-member: of such a picture the attack says little."
    return said + single * bool(strange)


def report(audit: Audit) -> dict[str, Any]:
    """Everything that was found, as plain values for JSON."""
    question = audit.question
    task, model = question.known.tasks[0], question.known.model
    rows = audit.pictures.assign(verdict=[verdict_of(audit, row) for row in audit.pictures.itertuples()])
    return {
        "model": model.name,
        "model_sha256": model.fingerprint,
        "attack": task.attack.name,
        "t": task.t,
        "seed": question.known.run.seed,
        "reference": question.known.images.name,
        "reference_sha256": question.reference.digest,
        "non_members": audit.reference,
        "members": audit.members,
        "fpr": question.fpr,
        "members_flagged": audit.caught,
        "says": says(audit),
        "shift": audit.shift,
        "pictures": rows[["file", "image", "n", "score", *OPEN, "verdict"]].to_dict("records"),
        "set": [{"n": n} | found for n, found in audit.sets.items()],
        "power": audit.power.to_dict("records"),
        "rejected": question.asked.images.rejected.to_dict("records"),
    }


def says(audit: Audit) -> list[str]:
    """The findings in sentences, the shift alarm first."""
    steps = [int(n) for n in audit.pictures.n.unique()]
    return [
        in_question(audit),
        said_of_attack(audit),
        *(summary(audit, n) for n in steps),
        *(said_of_set(audit, n) for n in steps),
        said_of_power(audit),
    ]
