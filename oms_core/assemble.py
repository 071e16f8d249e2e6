"""The two built-in image sets, made from their originals.

``python -m oms_core assemble --source DIR`` writes ``assets/images/digits.parquet`` and
``assets/images/fashion.parquet``: one row per picture with the columns `png` (bytes), `label`, `caption`
and `role` (member, nonmember or auxiliary). The split is class-balanced and seeded.
"""

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from oms_core.cards import write_card
from oms_core.errors import InputError
from oms_core.writing import replace_file, unwritable

SPLIT_SEED = 0
DIGITS_ROLES = {"member": 600, "nonmember": 1000, "auxiliary": 197}
FASHION_ROLES = {"member": 500, "nonmember": 1000, "auxiliary": 2000}
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST = 2**26  # bytes; Fashion-MNIST's training file has 47 million
NEAR_DUPLICATE = 0.06  # root mean square difference of pixels in [0, 1]; 0.2 % of Fashion-MNIST lies below


def digits() -> pd.DataFrame:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey levels 0-16 stretched to 0-255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * 255 / 16).astype(np.uint8)  # (1797, 8, 8)
    rows, roles = split(data.target, DIGITS_ROLES, rejected=np.zeros(len(pixels), bool))
    captions = [f"the handwritten digit {name}" for name in DIGIT_NAMES]
    return table(pixels[rows], data.target[rows], captions, roles)


def fashion(source: Path) -> pd.DataFrame:
    """A subset of Fashion-MNIST's training file, 28 x 28, without near-duplicates.

    Args:
        source: folder with the original ``train-images-idx3-ubyte.gz`` and ``train-labels-idx1-ubyte.gz``.

    Raises:
        InputError: a file is missing or damaged.
    """
    pixels = idx(source / "train-images-idx3-ubyte.gz", 16, 28 * 28).reshape(-1, 28, 28)
    labels = idx(source / "train-labels-idx1-ubyte.gz", 8, 1).ravel()
    if len(labels) != len(pixels):
        raise InputError(
            f"{source} holds {len(pixels):,} pictures and {len(labels):,} labels; copy the originals again."
        )
    shortlist, _ = split(labels, {"candidate": 4000}, rejected=np.zeros(len(labels), bool))
    rejected = np.ones(len(labels), bool)
    rejected[shortlist[~near_duplicate(pixels[shortlist])]] = False
    rows, roles = split(labels, FASHION_ROLES, rejected)
    captions = [f"a photo of a {name}".replace("a ankle", "an ankle") for name in FASHION_CLASSES]
    return table(pixels[rows], labels[rows], captions, roles)


def idx(path: Path, header: int, length: int) -> np.ndarray:
    """The bytes of an IDX file behind its header, (rows, length) uint8; at most `MOST` are unpacked."""
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(MOST), np.uint8, offset=header).reshape(-1, length)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read; install Debian's package dataset-fashion-mnist or name the folder with --source."
        ) from error


def near_duplicate(pixels: np.ndarray) -> np.ndarray:
    """True for each picture that lies within `NEAR_DUPLICATE` of an earlier one, (N,) bool."""
    x = pixels.reshape(len(pixels), -1) / np.float32(255)
    square = (x**2).sum(axis=1)
    mean_square = (square[:, None] + square - 2 * x @ x.T) / x.shape[1]
    return np.tril(mean_square < NEAR_DUPLICATE**2, k=-1).any(axis=1)


def split(labels: np.ndarray, sizes: dict[str, int], rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw disjoint groups with the classes as evenly filled as they allow.

    Returns:
        Row numbers and the group of each, both (sum of sizes,).
    """
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled = rng.permutation(np.flatnonzero(~rejected))
    turn = pd.Series(labels[shuffled]).groupby(labels[shuffled]).cumcount()  # the k-th picture of its class
    order = shuffled[np.argsort(turn, kind="stable")]  # one of each class, then another of each, ...
    return order[: sum(sizes.values())], np.repeat(list(sizes), list(sizes.values()))


def table(pixels: np.ndarray, labels: np.ndarray, captions: list[str], roles: np.ndarray) -> pd.DataFrame:
    """Rows of PNG bytes, label, caption and role."""
    return pd.DataFrame(
        {"png": [png(p) for p in pixels], "label": labels, "caption": [captions[k] for k in labels], "role": roles}
    )


def png(pixels: np.ndarray) -> bytes:
    """A picture of (H, W) or (H, W, 3) uint8 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def assemble(source: Path, to: Path) -> list[Path]:
    """Write both built-in sets into the folder `to` and return the files.

    Raises:
        InputError: an original is missing, or the folder cannot be written.
    """
    made = {to / "digits.parquet": digits(), to / "fashion.parquet": fashion(source)}
    try:
        to.mkdir(parents=True, exist_ok=True)
        for path, rows in made.items():
            replace_file(path, rows.to_parquet(compression="zstd", index=False, write_page_checksum=True))
        write_card(to, {"name": "built-in image sets", "split_seed": SPLIT_SEED})
    except OSError as error:
        raise unwritable(to, error.strerror, "--to") from error
    return [*made]
