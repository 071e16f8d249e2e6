"""A run: one frozen description that is cache key, command-line flags, address and page state in one.

`plan` says what a run means, `lookup` finds what is known of it, and the rest turns known distances into
tables. Nothing here imports torch; `oms_core.compute` is the slow half.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from oms_core import cache, captions, catalog
from oms_core.attacks import ATTACKS, COMPARED, Attack, Learned, Search
from oms_core.attacks.base import MAX_STEPS, NORMS, column, pairs
from oms_core.catalog import Model
from oms_core.device import DEVICES, DTYPES, MODES
from oms_core.errors import InputError
from oms_core.images import ImageSet, open_images
from oms_core.schemes import SCHEMES

FORMULA = 1  # raised when a change of the code changes a number
MAX_BATCH = 4096
SEEN = ("seen_x_t", "seen_x_0")  # columns of a trace of latents


def setting(default: Any, help: str, low: int | None = None, high: int | None = None) -> Any:
    """A field of `Run` with the words and limits that the command line and the pages show."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Run:
    """What to compute. Defaults are the paper's where it names one."""

    model: str = setting("ddpm-digits", "a built-in name, ideal:SET, a diffusers folder, or a Hugging Face owner/name")
    images: str = setting("", "digits, fashion, or a folder; a built-in model brings its own")
    attacks: tuple[str, ...] = setting(COMPARED, "names of attacks, comma separated, or all")
    t: int | None = setting(None, "timestep; by default the model card's or the paper's for each attack", 0)
    steps: int = setting(3, "N, how far the search goes; n = 1 is the published attack, n = 2 is +OMS", 1, MAX_STEPS)
    seed: int = setting(0, "seed of the drawn noise; each picture has its own", 0, 2**31 - 1)
    scheme: str = setting("picard", f"how the search goes on: {', '.join(SCHEMES)}")
    captions: str = setting(
        "given", "for a model that takes them: given (with the pictures), blip, none, or text:WORDS for all"
    )
    captioner: str = setting("blip-fashion", "who writes captions: a built-in name, a BLIP folder, or owner/name")
    limit: int | None = setting(None, "only so many pictures, half of them members", 1)
    device: str = setting("", f"{', '.join(DEVICES)}; by default the best one here")
    dtype: str = setting("", f"precision of the network: {', '.join(DTYPES)}; by default float32")
    mode: str = setting("", f"how the network runs: {', '.join(MODES)}; by default {MODES[0]}")
    batch: int = setting(0, "pictures at once; by default what pays. Part of the result's identity", 0, MAX_BATCH)


@dataclass(frozen=True)
class Task:
    """One attack of a run, with the key under which its distances are kept."""

    attack: Attack
    t: int
    content: dict[str, Any] = field(compare=False)

    @cached_property
    def key(self) -> str:
        return cache.key_of(self.content)


@dataclass(frozen=True)
class Plan:
    """A run with its names resolved: the model, the pictures, and a task per attack.

    Attributes:
        auxiliary: pictures known not to be members, for the attacks that learn from such; perhaps none.
    """

    run: Run
    model: Model
    images: ImageSet
    tasks: tuple[Task, ...]
    auxiliary: ImageSet


def plan(run: Run) -> Plan:
    """Resolve a run.

    Raises:
        InputError: a name is unknown, a number is out of range, or model and pictures do not fit.
    """
    check_limits(run)
    model = catalog.describe(run.model)
    name = run.images or model.images
    if not name:
        raise InputError(f"{run.model} brings no pictures of its own; name an image set with --images.")
    everything = open_images(name)
    images = everything.with_role("member", "nonmember").limit(run.limit).mixed()
    if not len(images):
        raise InputError(
            f"{name} says of no picture whether it is a member, so there is nothing to compare; sort them into member/ "
            "and nonmember/, add metadata.csv, or name SPLIT.npz@SET or member=SET,nonmember=SET."
        )
    auxiliary = everything.with_role("auxiliary")
    if model.captioned:
        images, auxiliary = with_captions(images, run), with_captions(auxiliary, run)
    planned = Plan(run, model, images, (), auxiliary)
    return replace(planned, tasks=tuple(task_of(attack, planned) for attack in attacks_of(run)))


def about(planned: Plan, images: ImageSet) -> Plan:
    """The questions of a plan, asked about other pictures, whatever their role.

    Raises:
        InputError: the model needs captions and these pictures have none.
    """
    if planned.model.captioned:
        images = with_captions(images, planned.run)
    moved = replace(planned, images=images, tasks=())
    return replace(moved, tasks=tuple(task_of(task.attack, moved) for task in planned.tasks))


def with_captions(images: ImageSet, run: Run) -> ImageSet:
    """The pictures with the captions that a run asks for; those that BLIP has still to write are missing.

    Raises:
        InputError: an unknown kind of captions, or none are given.
    """
    if run.captions == "given":
        if len(images) and images.table.caption.eq("").all():
            raise InputError(
                f"{images.name} has no captions, which {run.model} needs; use --captions blip to have them written, "
                "--captions text:WORDS for one of your own, or --captions none."
            )
        return images
    if run.captions == "blip":
        texts = captions.written(captions.describe(run.captioner), images).reindex(images.table.image)
        return replace(images, table=images.table.assign(caption=texts.to_numpy()))
    if run.captions != "none" and not run.captions.startswith("text:"):
        raise InputError(f"There are no captions {run.captions!r}; choose given, blip, none, or text:WORDS.")
    return replace(images, table=images.table.assign(caption=run.captions.partition(":")[2]))


def caption_content(run: Run, texts: pd.Series) -> str:
    """What decides the captions: who writes them, or what they are."""
    if run.captions == "blip":
        return captions.key(captions.describe(run.captioner))
    return catalog.digest_of([text.encode() for text in texts])


def check_limits(run: Run) -> None:
    """Refuse numbers outside the limits that `Run` states."""
    for name, spec in Run.__dataclass_fields__.items():
        value, low, high = getattr(run, name), spec.metadata["low"], spec.metadata["high"]
        if value is None or low is None:
            continue
        if not isinstance(value, int) or value < low or (high is not None and value > high):
            limits = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise InputError(f"{name} is {value}; it must be {limits}.")


def attacks_of(run: Run) -> list[Attack]:
    """The attacks that a run names."""
    if not run.attacks:
        raise InputError(f"No attack is named; choose among {', '.join(ATTACKS)}.")
    if run.scheme not in SCHEMES:
        raise InputError(f"There is no scheme {run.scheme!r}; known are {', '.join(SCHEMES)}.")
    for name in run.attacks:
        if name not in ATTACKS:
            raise InputError(f"There is no attack {name!r}; known are {', '.join(ATTACKS)}, or all.")
    return [ATTACKS[name] for name in dict.fromkeys(run.attacks)]


def timestep(attack: Attack, run: Run, model: Model) -> int:
    """The timestep asked for, else the one on the model's card, else the paper's."""
    shown = model.card["recipe"]["timesteps"] if model.card else {}
    t = run.t if run.t is not None and attack.timed else shown.get(attack.shown_as or attack.name, attack.t)
    if t + attack.reach >= model.timesteps:
        highest = model.timesteps - 1 - attack.reach
        if highest < 0:
            raise InputError(f"{model.name} has only {model.timesteps} timesteps, too few for {attack.name}.")
        raise InputError(f"{attack.name} at t = {t} asks {model.name} beyond its last timestep; use at most {highest}.")
    return t


def task_of(attack: Attack, planned: Plan) -> Task:
    """The task of one attack on a plan's pictures, keyed by content: never by a name or a shape.

    Raises:
        InputError: the attack does not fit the model or the pictures.
    """
    run, model, images = planned.run, planned.model, planned.images
    if attack.captioned and not model.captioned:
        raise InputError(f"{attack.name} needs a model that takes captions, and {model.name} takes none.")
    if attack.gradients and run.mode == "compiled":
        raise InputError(f"{attack.name} differentiates the network, so it cannot be compiled; leave out --mode.")
    t = timestep(attack, run, model)
    if isinstance(attack, Learned):
        return Task(attack, t, learned_content(attack, planned))
    content = {
        "formula": FORMULA,
        "model": model.fingerprint,
        "images": images.digest,
        "profile": [*model.profile.size, model.profile.channels],
        "attack": attack.name,
        "t": t,
        "seed": run.seed,
        "norms": list(NORMS),
    }
    if run.scheme != "picard":
        content["scheme"] = run.scheme
    if model.captioned:
        content["captions"] = caption_content(run, images.table.caption)
    return Task(attack, t, content)


def learned_content(attack: Learned, planned: Plan) -> dict[str, Any]:
    """What decides the scores of a learned attack: the signals that it reads, and its own version.

    Raises:
        InputError: it learns from auxiliary pictures and the set has none.
    """
    content = {"learned": attack.name, "version": attack.version, "base": task_of(attack.base, planned).content}
    if not attack.auxiliary:
        return content
    if not len(planned.auxiliary):
        raise InputError(
            f"{attack.name} learns from pictures that are known not to be members and are not judged; "
            f"{planned.images.name} has none of the role auxiliary."
        )
    return content | {"auxiliary": task_of(attack.base, replace(planned, images=planned.auxiliary)).content}


def lookup(plan: Plan) -> dict[str, pd.DataFrame]:
    """The distances that are already known, by attack."""
    known = {}
    for task in plan.tasks:
        for variant, folder in cache.variants(task.key):
            if fits(variant, plan.run):
                rows = cache.read_finished(folder, task.key)
                if rows is not None:
                    known[task.attack.name] = rows[["image", *task.attack.columns(plan.run.steps)]]
                    break
    return known


def fits(variant: cache.Variant, run: Run) -> bool:
    """Whether a kept result is what a run asks for; a device or batch size that it leaves open may be any."""
    asked = (
        (run.device, variant.device),
        (run.dtype or DTYPES[0], variant.dtype),
        (run.mode or MODES[0], variant.mode),
        (run.batch, variant.batch),
    )
    return variant.steps >= run.steps and all(not wanted or wanted == kept for wanted, kept in asked)


def scores(planned: Plan, signals: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The score table: image, member, attack, t, n, score; larger = more likely a member, everywhere."""
    member = planned.images.table.set_index("image").role.eq("member")
    frames = []
    for task in planned.tasks:
        rows = signals[task.attack.name]
        for n in steps_of(task.attack, planned.run):
            frames.append(
                pd.DataFrame(
                    {
                        "image": rows.image,
                        "member": member.loc[rows.image].to_numpy(),
                        "attack": task.attack.name,
                        "t": task.t,
                        "n": n,
                        "score": task.attack.score(rows, n),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def steps_of(attack: Attack, run: Run) -> range:
    """n = 1, 2, ... as far as a run goes and an attack allows."""
    return range(1, min(run.steps, attack.most) + 1)


def calls(planned: Plan) -> dict[tuple[str, int], int]:
    """Model calls per picture of each attack run alone, by attack and n."""
    return {
        (task.attack.name, n): task.attack.calls_at(task.t, n) + calls_of_scheme(task.attack, n, planned.run.scheme)
        for task in planned.tasks
        for n in steps_of(task.attack, planned.run)
    }


def calls_of_scheme(attack: Attack, n: int, scheme: str) -> int:
    """What an iteration scheme asks beyond plain iteration."""
    return (SCHEMES[scheme].calls - 1) * (n + 1 - attack.given) if isinstance(attack, Search) else 0


def residuals(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The norm of each residual, ||delta^n||_2: image, member, n, residual; a row per picture and n (Fig. 1)."""
    steps = range(1, planned.run.steps + 1)
    wide = rows[["image"]].assign(**{str(n): rows[column(n - 1, n, 2)] for n in steps})
    tidy = wide.melt("image", var_name="n", value_name="residual").astype({"n": int})
    member = planned.images.table.set_index("image").role.eq("member")
    return tidy.assign(member=member.loc[tidy.image].to_numpy())


def errors(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The distance from the last iterate, ||eps^n - eps^N||_2 for n < N: image, member, n, error (Fig. B.2)."""
    last = planned.run.steps
    wide = rows[["image"]].assign(**{str(n): rows[column(n, last, 2)] for n in range(last)})
    tidy = wide.melt("image", var_name="n", value_name="error").astype({"n": int})
    member = planned.images.table.set_index("image").role.eq("member")
    return tidy.assign(member=member.loc[tidy.image].to_numpy())


@dataclass(frozen=True)
class Trace:
    """The search for the noise of one picture, step by step.

    Attributes:
        x_0: the picture as the model takes it, (C, H, W).
        eps: the iterates eps^0 ... eps^N, (N + 1, C, H, W) float32.
        alpha, sigma: coefficients of the timestep at which the map asks the model.
        pictures: for a model of latents, x_t and the predicted x_0 of each n as pictures, (2, N + 1, H, W, C) uint8.
    """

    x_0: np.ndarray
    eps: np.ndarray
    alpha: float
    sigma: float
    pictures: np.ndarray | None = None

    def shown(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """x_t and the predicted x_0 after n steps as pictures, each (H, W, C) uint8."""
        if self.pictures is not None:
            return self.pictures[0, n], self.pictures[1, n]
        return pixels_of(self.x_t(n)), pixels_of(self.predicted_x_0(n))

    def x_t(self, n: int) -> np.ndarray:
        """The noisy picture in which the model looks for noise after n steps (Eq. 2), (C, H, W)."""
        return self.alpha * self.x_0 + self.sigma * self.eps[n]

    def predicted_x_0(self, n: int) -> np.ndarray:
        """The picture that the model sees in x_t: what remains when eps^n is taken from what it was asked with."""
        return (self.x_t(max(0, n - 1)) - self.sigma * self.eps[n]) / self.alpha

    def residuals(self) -> list[float]:
        """||delta^n||_2 for n = 1 ... N."""
        return [float(np.linalg.norm(delta)) for delta in np.diff(self.eps, axis=0)]

    def distances(self) -> pd.DataFrame:
        """Every d(i, j) (Eq. 9) in one row, as an attack reads its signal."""
        flat = self.eps.reshape(len(self.eps), -1).astype(np.float64)
        found = {column(i, j, p): np.linalg.norm(flat[i] - flat[j], p) for p in NORMS for i, j in pairs(len(flat) - 1)}
        return pd.DataFrame([found])

    def rows(self) -> pd.DataFrame:
        """As kept on disk: a row per iterate."""
        values = [eps.astype("<f4").tobytes() for eps in self.eps]
        once = {"x_0": self.x_0.astype("<f4").tobytes(), "alpha": self.alpha, "sigma": self.sigma}
        shape = dict(zip(("channels", "height", "width"), self.x_0.shape, strict=True))
        rows = pd.DataFrame({"n": range(len(values)), "eps": values}).assign(**once, **shape)
        if self.pictures is None:
            return rows
        seen = {name: [p.tobytes() for p in group] for name, group in zip(SEEN, self.pictures, strict=True)}
        return rows.assign(**seen, shown_height=self.pictures.shape[2], shown_width=self.pictures.shape[3])

    @classmethod
    def from_rows(cls, rows: pd.DataFrame, steps: int) -> Trace:
        """Back from disk, up to N = steps."""
        first = rows.iloc[0]
        shape = (int(first.channels), int(first.height), int(first.width))
        eps = np.stack([np.frombuffer(values, "<f4").reshape(shape) for values in rows.eps[: steps + 1]])
        pictures = None
        if SEEN[0] in rows:
            size = (int(first.shown_height), int(first.shown_width), -1)
            groups = [[np.frombuffer(data, np.uint8).reshape(size) for data in rows[name]] for name in SEEN]
            pictures = np.array(groups)[:, : steps + 1]
        x_0 = np.frombuffer(first.x_0, "<f4").reshape(shape)
        return cls(x_0, eps, float(first.alpha), float(first.sigma), pictures)


def pixels_of(x: np.ndarray) -> np.ndarray:
    """A picture of (C, H, W) in [-1, 1] as (H, W, C) uint8."""
    return np.rint(np.clip(x.transpose(1, 2, 0) + 1, 0, 2) * 127.5).astype(np.uint8)


def trace_content(planned: Plan, image: str) -> dict[str, Any]:
    """What the trace of a plan's first attack is keyed by: its task on this one picture, whatever set it is in."""
    content = {key: value for key, value in planned.tasks[0].content.items() if key not in ("images", "norms")}
    if planned.model.captioned:
        own = planned.images.table.caption[planned.images.table.image == image]
        content["captions"] = caption_content(planned.run, own)
    return content | {"trace": image}


def lookup_trace(planned: Plan, image: str) -> Trace | None:
    """The trace of a picture under a plan's first attack, if it is known.

    Raises:
        InputError: the picture is not in the set.
    """
    if not planned.images.table.image.eq(image).any():
        raise InputError(f"{planned.images.name} has no picture {image[:12]!r}; pick one from the list.")
    key = cache.key_of(trace_content(planned, image))
    one = replace(planned.run, batch=1)  # traces are computed picture by picture
    for variant, folder in cache.variants(key):
        if fits(variant, one):
            rows = cache.read_finished(folder, key)
            if rows is not None:
                return Trace.from_rows(rows, planned.run.steps)
    return None
