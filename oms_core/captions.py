"""Captions for pictures that came without: BLIP (Li et al., 2022) looks at each and writes one (Sec. 4.2).

``written`` needs no torch: it looks up captions that are known. ``write`` asks the captioner for the others.
A caption is kept by the captioner's fingerprint and the picture's identity, whatever set the picture is in.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from oms_core import cache, catalog, libraries, schemas
from oms_core.decode import decode
from oms_core.errors import InputError
from oms_core.files import (
    ASSETS,
    MAX_VOCABULARY_BYTES,
    Part,
    Shapes,
    digest_of,
    digest_of_file,
    in_a_sentence,
    numbers_of,
    parse,
    read_json,
    refuse_code,
    shapes_of,
    weight_files,
    word_files,
)
from oms_core.folders import check_depth
from oms_core.images import ImageSet
from oms_core.location import require_location

if TYPE_CHECKING:
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
        part: what was found in the folder.
    """

    name: str
    folder: Path
    fingerprint: str
    part: Part = field(compare=False)


def built_in() -> dict[str, Path]:
    """The folder of each shipped captioner, by name."""
    cards = {path.parent.name: read_json(path) for path in sorted(SHIPPED.glob("*/card.json"))}
    return {name: SHIPPED / name / f"epoch-{card['recipe']['default']:04d}" for name, card in cards.items()}


@in_a_sentence
def describe(name: str) -> Captioner:
    """Say what a captioner is without loading it: a built-in one, a folder, or a Hugging Face owner/name.

    Raises:
        InputError: there is none, or it is no BLIP that writes captions.
    """
    if name in built_in():
        return in_folder(built_in()[name], name)
    require_location(name, "captioner", ", ".join(built_in()))
    if os.path.isdir(name):
        return in_folder(Path(name), name)
    if catalog.HUB_ID.fullmatch(name):
        return in_folder(catalog.download(name)[0], name)
    raise InputError(f"There is no captioner or folder {name!r}; built in are {', '.join(built_in())}.")


def in_folder(folder: Path, name: str) -> Captioner:
    """A `BlipForConditionalGeneration` folder."""
    refuse_code(folder)
    names = word_files(folder, folder, (".json", ".txt"))
    for file in ("config.json", "preprocessor_config.json"):
        read_json(folder / file, folder)
    digests = {file: digest_of_file(folder / file, folder, MAX_VOCABULARY_BYTES) for file in names}
    shapes = shapes_of(folder, folder)
    config = configured(Part(folder, folder, {}, digests), shapes)
    digests |= {file: digest_of_file(folder / file, folder) for file in weight_files(folder, folder)}
    part = Part(folder, folder, config, digests, numbers_of(shapes))
    return Captioner(name, folder, digest_of([*digests.values()]), part)


def configured(part: Part, shapes: Shapes) -> dict[str, Any]:
    """The config of a `BlipForConditionalGeneration`, after all that its folder says was checked.

    Args:
        part: the folder.
        shapes: of its tensors.

    Raises:
        InputError: it is another network's, or see `schemas.check`.
    """
    said = {name: parse(part.read(name), part.folder / name) for name in part.words if name in schemas.CAPTIONER}
    path, config = part.folder / "config.json", said["config.json"]
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and "BlipForConditionalGeneration" in architectures
    if config.get("model_type") != "blip" or not named:
        raise InputError(f"{path} describes no BlipForConditionalGeneration; name a folder with one.")
    for name, content in said.items():
        schemas.check(content, schemas.CAPTIONER[name], part.folder / name, shapes)
    for name, schema in (("text_config", schemas.BLIP_TEXT), ("vision_config", schemas.BLIP_VISION)):
        inner = config.get(name) or {}
        check_depth(inner, path, len(shapes))
        schemas.check(inner, schema, path, shapes)
    return config


def key(captioner: Captioner) -> str:
    """Under which a captioner's captions are kept."""
    return cache.key_of({"captioner": captioner.fingerprint, "longest": LONGEST})


def written(captioner: Captioner, images: ImageSet) -> pd.Series:
    """The captions that are known, by picture; fewer than there are pictures where some were never captioned."""
    known = said(Path(os.path.realpath(cache.home())), key(captioner))
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


def generation(part: Part) -> Any:
    """How a captioner chooses its words, from its generation_config.json; None where there is none."""
    with libraries.lock:
        from transformers import GenerationConfig

    name = "generation_config.json"
    return GenerationConfig.from_dict(parse(part.read(name), part.folder / name)) if name in part.words else None


@lru_cache(maxsize=1)
@in_a_sentence
def loaded(captioner: Captioner, placement: Placement) -> Callable[[list[Image.Image]], list[str]]:
    """From pictures to their captions."""
    with libraries.lock:
        import torch
        from transformers import BertTokenizer, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        from oms_core.families.base import load_text_encoder, load_tokenizer, tokenizer_for

    device, dtype, part = torch.device(placement.device), getattr(torch, placement.dtype), captioner.part
    settings = generation(part)
    model = load_text_encoder(BlipForConditionalGeneration, part, captioner.name, dtype, generation_config=settings)
    model.to(device)
    tokenizer = tokenizer_for(BertTokenizer, part, model, captioner.name)
    processor = load_tokenizer(BlipImageProcessorPil, part, captioner.name)
    longest = min(LONGEST, model.config.text_config.max_position_embeddings - 2)

    @torch.inference_mode()
    def caption(pictures: list[Image.Image], length: int = longest) -> list[str]:
        pixels = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
        tokens = model.generate(pixel_values=pixels.to(device, dtype), max_new_tokens=length)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    caption([Image.new("L", (8, 8))], 1)  # whatever does not fit together shows here
    return caption
