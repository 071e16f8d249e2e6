"""Captions for pictures that came without: BLIP (Li et al., 2022) looks at each and writes one (Sec. 4.2).

``written`` needs no torch: it looks up captions that are known. ``write`` asks the captioner for the others.
A caption is kept by the captioner's fingerprint and the picture's identity, whatever set the picture is in.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from oms_core import cache, catalog, libraries
from oms_core.decode import decode
from oms_core.errors import InputError
from oms_core.files import ASSETS, digest_of, digest_of_file, read_json, refuse_code, weight_files, weight_sizes
from oms_core.images import ImageSet

if TYPE_CHECKING:
    from PIL import Image

    from oms_core.device import Placement

SHIPPED = ASSETS / "captioners"
BATCH = 32  # pictures that are captioned at once
LONGEST = 40  # new tokens of a caption
SAID: dict[tuple[Path, str], tuple[set[Path], dict[str, str]]] = {}  # the files that were read, and what stands there
GUARD = threading.Lock()


@dataclass(frozen=True)
class Captioner:
    """A BLIP before its weights are loaded.

    Attributes:
        name: as a user calls it.
        folder: of its weights, vocabulary and configurations.
        fingerprint: SHA-256 over all of them.
    """

    name: str
    folder: Path
    fingerprint: str


def built_in() -> dict[str, Path]:
    """The folder of each shipped captioner, by name."""
    cards = {path.parent.name: read_json(path) for path in sorted(SHIPPED.glob("*/card.json"))}
    return {name: SHIPPED / name / f"epoch-{card['recipe']['default']:04d}" for name, card in cards.items()}


def describe(name: str) -> Captioner:
    """Say what a captioner is without loading it: a built-in one, a folder, or a Hugging Face owner/name.

    Raises:
        InputError: there is none, or it is no BLIP that writes captions.
    """
    if name in built_in():
        return in_folder(built_in()[name], name)
    if os.path.isdir(name):
        return in_folder(Path(name), name)
    if catalog.HUB_ID.fullmatch(name):
        return in_folder(catalog.download(name)[0], name)
    raise InputError(f"There is no captioner or folder {name!r}; built in are {', '.join(built_in())}.")


def in_folder(folder: Path, name: str) -> Captioner:
    """A `BlipForConditionalGeneration` folder."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "blip" or "BlipForConditionalGeneration" not in config.get("architectures", []):
        raise InputError(f"{folder / 'config.json'} describes no BlipForConditionalGeneration; name a folder with one.")
    read_json(folder / "preprocessor_config.json")
    refuse_code(folder)
    weight_sizes(folder)
    words = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
    return Captioner(name, folder, digest_of([digest_of_file(path) for path in (*words, *weight_files(folder))]))


def key(captioner: Captioner) -> str:
    """Under which a captioner's captions are kept."""
    return cache.key_of({"captioner": captioner.fingerprint, "longest": LONGEST})


def written(captioner: Captioner, images: ImageSet) -> pd.Series:
    """The captions that are known, by picture; fewer than there are pictures where some were never captioned."""
    known = said(cache.home().resolve(), key(captioner))
    found = [image for image in images.table.image if image in known]
    return pd.Series([known[image] for image in found], pd.Index(found, dtype=str), dtype=str)


def said(home: Path, key: str) -> dict[str, str]:
    """Every caption that is kept, by picture. A file is read once, as it never changes."""
    seen, known = SAID.setdefault((home, key), (set(), {}))
    with GUARD:
        for notes in cache.read_notes(key, seen):
            for image, text in zip(notes.image, notes.caption, strict=True):
                known.setdefault(image, text)
    return known


def write(
    captioner: Captioner, images: ImageSet, placement: Placement, tick: Callable[[int, int], None] | None = None
) -> pd.Series:
    """A caption for every picture of a set, by picture, in the set's order.

    Args:
        captioner: who writes.
        images: the pictures.
        placement: where it computes.
        tick: told how many of how many are done; it may raise to stop, and what is written is kept.

    Raises:
        InputError: the captioner's weights do not fit its config.
    """
    known = written(captioner, images)
    missing = images.table.index[~images.table.image.isin(known.index)]
    if not len(missing):
        return known.reindex(images.table.image)
    done = len(images) - len(missing)
    for rows, texts in spoken(captioner, images, missing, placement):
        notes = pd.DataFrame({"image": images.table.image[rows].to_numpy(), "caption": texts})
        cache.add_notes(key(captioner), notes)
        known = pd.concat([known, notes.set_index("image").caption])
        done += len(rows)
        if tick:
            tick(done, len(images))
    return known.reindex(images.table.image)


def spoken(
    captioner: Captioner, images: ImageSet, rows: pd.Index, placement: Placement
) -> Iterator[tuple[pd.Index, list[str]]]:
    """Captions of some rows of a set, batch by batch; nothing is kept.

    Raises:
        InputError: the captioner's weights do not fit its config.
    """
    blip = loaded(captioner, placement)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        yield batch, blip([decode(images.read(row))[0] for row in batch])


@lru_cache(maxsize=1)
def loaded(captioner: Captioner, placement: Placement) -> Callable[[list[Image.Image]], list[str]]:
    """From pictures to their captions."""
    with libraries.lock:
        import torch
        from transformers import BertTokenizer, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        from oms_core.families.base import load_text_encoder, load_tokenizer

    device, dtype = torch.device(placement.device), getattr(torch, placement.dtype)
    model = load_text_encoder(BlipForConditionalGeneration, captioner.folder, captioner.name, dtype).to(device)
    tokenizer = load_tokenizer(BertTokenizer, captioner.folder, captioner.name)
    processor = load_tokenizer(BlipImageProcessorPil, captioner.folder, captioner.name)
    longest = min(LONGEST, model.config.text_config.max_position_embeddings - 2)

    @torch.inference_mode()
    def caption(pictures: list[Image.Image]) -> list[str]:
        pixels = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
        tokens = model.generate(pixel_values=pixels.to(device, dtype), max_new_tokens=longest)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return caption
