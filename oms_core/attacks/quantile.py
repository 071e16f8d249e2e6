"""Quantile regression: a threshold of its own for every picture, learned from known non-members.

A small network looks at the clean picture and predicts the alpha-quantile of SecMI's t-error among non-members
that look like it; a picture whose error lies below is called a member, which at most a share alpha of the
non-members are. With One More Step the t-error of eps^n takes the place of that of eps^1, in training and test.

A network is too sure of its own quantiles, so they are corrected as in conformalized quantile regression: the
auxiliary pictures are dealt into folds, each is judged by networks that were trained on the other folds, and
every head is shifted until exactly the share alpha of these pictures lies below. The pictures in question are
dealt into the folds as well and judged by the same networks, so that nothing sets them apart from the auxiliary
ones but membership. With m of these, the measured rate still varies as Beta(k, m + 1 - k), k = alpha (m + 1):
between 4.1 and 6.0 % for 2,000 pictures and 5 %, between 2.1 and 7.8 % for 197. A level below 1 / (m + 1) cannot
be learned, and its scores are NaN.

Everything is done in logarithms: quantiles go along with any monotone map, and errors differ by factors.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from oms_core import ddim, libraries
from oms_core.attacks.base import SECMI_STRIDE, Learned, Study, column, learned_column
from oms_core.attacks.secmi import SECMI
from oms_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Generator, Tensor, nn

LEVELS = (0.05, 0.01, 0.001)  # alpha of each head (Sec. E.2)
HEADS = tuple(map(str, LEVELS))
MEDIAN = 0.5  # a head that is learned along and not used: low quantiles alone teach the layers below little
FEWEST = math.ceil(1 / LEVELS[0]) - 1  # auxiliary pictures for the highest level
FOLDS, ROUNDS = 4, 2  # networks for each n: 8; each picture is judged by two that were not trained on its fold
WIDTHS = (8, 16, 16)  # of the convolutions
STEPS, EPOCHS = 300, 12  # of training; the batch follows
RATE, DECAY = 0.01, 0.1
SIDE = 64  # larger pictures are averaged down to it
CHUNK = 512  # pictures held as the model takes them
FLOOR = 1e-12  # of a distance before its logarithm; an ideal denoiser reaches zero


def fit(study: Study) -> pd.DataFrame:
    """Learn the quantiles from the auxiliary pictures and judge the others.

    Args:
        study: what may be looked at; membership is not.

    Returns:
        `image`, and for each level alpha and n the score log q_alpha(x) - log error: positive means member.

    Raises:
        InputError: there are too few auxiliary pictures for the highest level.
    """
    known, others = (pictures(study, rows.image) for rows in (study.auxiliary, study.rows))
    found = study.rows[["image"]]
    for n in range(1, study.steps + 1):
        columns = [learned_column(head, n) for head in HEADS]
        found = found.assign(**dict(zip(columns, margins(study, known, others, n).T.numpy(), strict=True)))
    return found


def margins(study: Study, known: Tensor, others: Tensor, n: int) -> Tensor:
    """The scores after n steps of other pictures (N, C, H, W), learned from known non-members (M, C, H, W), (N, 3)."""
    import torch

    y = log_error(study, study.auxiliary, n)
    usable = y.isfinite()
    y = y[usable]
    if len(y) < FEWEST:
        raise InputError(f"QR learns a level of {LEVELS[0]:.0%} from {FEWEST} auxiliary pictures; here are {len(y)}.")
    images = [*study.auxiliary.image[usable.numpy()], *study.rows.image]
    folds = [folds_of(images, f"{study.seed} {turn}") for turn in range(ROUNDS)]
    generator = torch.Generator().manual_seed(study.seed)
    q = expected(torch.cat([known[usable], others]), y, folds, generator)
    return calibrated(q, y)[len(y) :] - log_error(study, study.rows, n)[:, None]


def log_error(study: Study, rows: pd.DataFrame, n: int) -> Tensor:
    """The logarithm of SecMI's t-error after n steps (Eq. E.8), (N,) float32."""
    import torch

    factor = ddim.t_error_factor(*(study.coefficients(t) for t in (study.t, study.t + SECMI_STRIDE)))
    return torch.tensor(factor * rows[column(0, n, SECMI.p)].to_numpy(float)).clamp_min(FLOOR).log().float()


def pictures(study: Study, images: pd.Series) -> Tensor:
    """Pictures as the network takes them, in [-1, 1], (N, C, H, W) with sides of at most 64."""
    import torch

    chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    return torch.cat([shrunk(torch.from_numpy(study.pixels(chunk)).permute(0, 3, 1, 2)) for chunk in chunks])


def shrunk(pixels: Tensor) -> Tensor:
    """uint8 (N, C, H, W) in [-1, 1], averaged down where it is larger than `SIDE`."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(pixels / 127.5 - 1, [min(side, SIDE) for side in pixels.shape[2:]])


def folds_of(images: list[str], salt: str) -> Tensor:
    """The fold of each picture, (N,); its name decides it, never its company."""
    import torch

    digests = (hashlib.sha256(f"{image} {salt}".encode()).digest() for image in images)
    return torch.tensor([int.from_bytes(digest[:8], "big") % FOLDS for digest in digests])


def expected(x: Tensor, y: Tensor, folds: list[Tensor], generator: Generator) -> Tensor:
    """The quantiles that networks predict for pictures which they were not trained on.

    Args:
        x: the pictures (m + N, C, H, W), the m auxiliary ones first.
        y: the log errors of these m.
        folds: for each round the fold of each of all pictures, (m + N,).
        generator: of every draw.

    Returns:
        (m + N, 3), a column per level.
    """
    import torch

    found = torch.zeros(len(x), len(LEVELS))
    for fold in folds:
        for k in range(FOLDS):
            learned = torch.nonzero(fold[: len(y)] != k).squeeze(1)
            location, scale = y[learned].mean(), y[learned].std().clamp_min(FLOOR)
            network = trained(x[learned], (y[learned] - location) / scale, generator)
            with torch.no_grad():
                found[fold == k] += (network(x[fold == k])[:, 1:] * scale + location) / len(folds)
    return found


def trained(x: Tensor, y: Tensor, generator: Generator) -> nn.Sequential:
    """A network fitted to pictures (N, C, H, W) and numbers (N,)."""
    import torch

    levels = torch.tensor([MEDIAN, *LEVELS])
    network = untrained(x.shape[1], torch.quantile(y, levels), generator)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    batch = math.ceil(EPOCHS * len(y) / STEPS)
    for _ in range(STEPS):
        drawn = torch.randint(len(y), (batch,), generator=generator)
        optimizer.zero_grad()
        pinball(network(x[drawn]), y[drawn], levels).backward()
        optimizer.step()
        schedule.step()
    return network


def untrained(channels: int, quantiles: Tensor, generator: Generator) -> nn.Sequential:
    """A network of any picture of at least 8 x 8 that predicts the same quantiles (K,) for all."""
    from torch import nn

    layers: list[Any] = []
    for before, after in pairwise((channels, *WIDTHS)):
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)
        nn.init.kaiming_uniform_(convolution.weight, generator=generator)
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.SiLU()]
    heads = nn.Linear(WIDTHS[-1], len(quantiles))
    nn.init.zeros_(heads.weight)
    heads.bias = nn.Parameter(quantiles.clone())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), heads)


def pinball(q: Tensor, y: Tensor, levels: Tensor) -> Tensor:
    """The mean pinball loss of quantiles q (N, K) of y (N,) at levels (K,); the true quantiles minimise it."""
    import torch

    above = y[:, None] - q
    return torch.maximum(levels * above, (levels - 1) * above).mean()


def calibrated(q: Tensor, y: Tensor) -> Tensor:
    """Shift each column of q (m + N, 3) so that its level's share of y (m,) lies below (Romano et al., 2019)."""
    import torch

    residuals = y[:, None] - q[: len(y)]
    return q + torch.stack([conformal(column, level) for column, level in zip(residuals.T, LEVELS, strict=True)])


def conformal(residuals: Tensor, level: float) -> Tensor:
    """The bound that a further residual like these (m,) stays below with probability k / (m + 1) <= level."""
    k = math.floor(level * (len(residuals) + 1))
    return residuals.kthvalue(k).values if k else residuals.new_tensor(math.nan)


def rates_by_level(rows: pd.DataFrame, member: np.ndarray, steps: int) -> list[dict[str, Any]]:
    """What the scores achieve at their own thresholds, beside the false-alarm rate that they promise (Table 5).

    Args:
        rows: the columns of QR.
        member: which pictures are members, (N,) bool.
        steps: N.

    Returns:
        A row for each n and level: `attack, n, nominal, fpr, tpr`, each rate with its exact 95 % interval as
        `fpr_lo` and so on; None where the level could not be learned or the group is empty.
    """
    found = []
    for n in range(1, steps + 1):
        for level, head in zip(LEVELS, HEADS, strict=True):
            margin = rows[learned_column(head, n)].to_numpy()
            row = {"attack": QR.name, "n": n, "nominal": level}
            found.append(row | rate("fpr", margin[~member]) | rate("tpr", margin[member]))
    return found


def rate(name: str, margins: np.ndarray) -> dict[str, float | None]:
    """The share of positive margins with its Clopper-Pearson interval."""
    libraries.load(*libraries.STATISTICS)
    from scipy.stats import binomtest

    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return {name: None, f"{name}_lo": None, f"{name}_hi": None}
    found = binomtest(int((margins > 0).sum()), len(margins))
    low, high = found.proportion_ci(method="exact")
    return {name: found.statistic, f"{name}_lo": float(low), f"{name}_hi": float(high)}


QR = Learned(
    name="QR",
    title="Quantile regression on SecMI's t-error",
    base=SECMI,
    fit=fit,
    heads=HEADS,
    auxiliary=True,
    t=SECMI.t,
    calls=SECMI.calls,
    reach=SECMI.reach,
    shown_as=SECMI.name,
    source="Bertran et al. (2024), Tang et al. (2023); Sec. 4.3, E.2, Table 5; corrected as by Romano et al. (2019)",
)
