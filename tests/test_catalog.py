"""What a model is, said from its files alone; and the files that must be refused before anything is built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from watch import watched

from oms_core import catalog
from oms_core.catalog import describe
from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.images import open_images
from oms_core.location import Location

INDEX, NETWORK, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]
Save = Callable[..., Path]


@pytest.fixture
def model(pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be changed."""
    return shutil.copytree(pipeline, tmp_path / "model")


def setting(file: str, **values: Any) -> Change:
    """Put values into a configuration."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_bytes())
        (folder / file).write_text(json.dumps(config | values))

    return change


def content(file: str, data: bytes) -> Change:
    """Put other bytes into a file."""
    return lambda folder: (folder / file).write_bytes(data)


def weights(change: Callable[[bytes], bytes]) -> Change:
    """Damage the weights."""
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def header(tensors: object) -> Change:
    """Weights that consist of a header alone (the safetensors format: eight bytes of length, then JSON)."""
    text = json.dumps(tensors).encode()
    return content(WEIGHTS, struct.pack("<Q", len(text)) + text)


def hollow(numbers: int) -> Change:
    """Weights of so many zeros that take no room on a disk."""

    def change(folder: Path) -> None:
        header({"a": {"dtype": "U8", "shape": [numbers], "data_offsets": [0, numbers]}})(folder)
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + numbers)

    return change


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


INCOMPLETE = "is not a complete safetensors file; copy it again"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
REFUSED: dict[str, tuple[Change, str]] = {
    "code": (content("unet/my_unet.py", b"raise SystemExit"), "my_unet.py is code"),
    "no network config": (lambda folder: (folder / NETWORK).unlink(), "config.json is missing"),
    "half a network config": (content(NETWORK, b'{"_class_name": "UNet2'), "config.json is not valid JSON"),
    "a list for a config": (content(NETWORK, b"[]"), "does not hold a JSON object"),
    "a deep config": (content(NETWORK, b"[" * 500_000), "config.json is not valid JSON"),
    "binary config": (content(NETWORK, b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "a config of 2 MB": (content(NETWORK, b" " * 2**21), "larger than a configuration should be"),
    "half an index": (content(INDEX, b"{"), "model_index.json is not valid JSON"),
    "an index that names a module": (setting(INDEX, scheduler=["os", "system"]), "has scheduler ['os', 'system']"),
    "an index with a latent space": (setting(INDEX, vqvae=["diffusers", "VQModel"]), "has vqvae"),
    "an index with another network": (setting(INDEX, unet=["my_unet", "MyUNet"]), "has unet ['my_unet', 'MyUNet']"),
    "another network": (setting(NETWORK, _class_name="UNet2DConditionModel"), "describes UNet2DConditionModel"),
    "an unknown network": (setting(NETWORK, _class_name="MyUNet"), "describes 'MyUNet'; known are UNet2DModel, UVit"),
    "no scheduler folder": (lambda folder: shutil.rmtree(folder / "scheduler"), "lists scheduler, but"),
    "no kind of network": (setting(NETWORK, _class_name=None), "describes None"),
    "a conditional network": (setting(NETWORK, num_class_embeds=10), "has num_class_embeds 10"),
    "a continuous network": (setting(NETWORK, time_embedding_type="fourier"), "has time_embedding_type 'fourier'"),
    "no size": (setting(NETWORK, sample_size=None), "has sample_size None"),
    "a size in words": (setting(NETWORK, sample_size="8"), "has sample_size '8'"),
    "size 0": (setting(NETWORK, sample_size=0), "has sample_size 0"),
    "a size of three": (setting(NETWORK, sample_size=[8, 8, 8]), "has sample_size [8, 8, 8]"),
    "size 10^9": (setting(NETWORK, sample_size=10**9), "has sample_size 1000000000"),
    "latent channels": (setting(NETWORK, in_channels=4), "has in_channels 4"),
    "10^6 channels": (setting(NETWORK, in_channels=10**6), "has in_channels 1000000"),
    "other channels out than in": (setting(NETWORK, out_channels=3), "has out_channels"),
    "10^9 layers": (
        setting(NETWORK, layers_per_block=10**9),
        "asks for 2,000,000,000 layers, more than its weights hold",
    ),
    "an unknown scheduler": (setting(SCHEDULER, _class_name="MyScheduler"), "'MyScheduler'; known are DDPMScheduler"),
    "10^9 timesteps": (setting(SCHEDULER, num_train_timesteps=10**9), "has num_train_timesteps 1000000000"),
    "no timesteps": (setting(SCHEDULER, num_train_timesteps=0), "has num_train_timesteps 0"),
    "half a scheduler config": (content(SCHEDULER, b"{"), "scheduler_config.json is not valid JSON"),
    "only a pickle": (only_pickle, "holds no safetensors weights; pickles are never loaded"),
    "truncated weights": (weights(lambda data: data[:-10]), INCOMPLETE),
    "weights with something behind": (weights(lambda data: data + b"x"), INCOMPLETE),
    "empty weights": (content(WEIGHTS, b""), INCOMPLETE),
    "a git-lfs pointer": (content(WEIGHTS, POINTER), INCOMPLETE),
    "a header of 2^62 bytes": (weights(lambda data: struct.pack("<Q", 2**62) + data[8:]), INCOMPLETE),
    "a deep header": (content(WEIGHTS, struct.pack("<Q", 200_000) + b"[" * 200_000), INCOMPLETE),
    "a pickle under another name": (content(WEIGHTS, b"\x80\x04cos\nsystem\n"), INCOMPLETE),
    "no tensors": (header({}), INCOMPLETE),
    "a list of tensors": (header([]), INCOMPLETE),
    "a tensor without a shape": (header({"a": {"data_offsets": [0, 0]}}), INCOMPLETE),
    "a shape of words": (header({"a": {"shape": ["8"], "data_offsets": [0, 0]}}), INCOMPLETE),
    "a negative shape": (header({"a": {"shape": [-8], "data_offsets": [0, 0]}}), INCOMPLETE),
    "a tensor without its bytes": (header({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 0]}}), INCOMPLETE),
    "bytes that two tensors share": (
        header({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 8]} for name in "ab"}),
        INCOMPLETE,
    ),
    "30 billion parameters": (hollow(30 * 10**9), "more than 20 billion parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_sound_model_is_refused_in_one_sentence(model: Path, name: str) -> None:
    describe(Location(model))  # what is refused below is the change, not the model
    change, expected = REFUSED[name]
    change(model)
    with pytest.raises(InputError) as refusal:
        describe(Location(model))
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Pipelines of several parts

TEXT, VAE, TRANSFORMER = "text_encoder/config.json", "vae/config.json", "transformer/config.json"


def removed(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name)


def unlisted(name: str) -> Change:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        index.pop(name)
        (folder / INDEX).write_text(json.dumps(index))

    return change


LATENT_REFUSED: dict[str, tuple[str, Change, str]] = {
    "a second text encoder": (
        "sd",
        setting(INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        "has text_encoder_2 ['transformers', 'CLIPTextModelWithProjection'], which no UNet2DConditionModel pipeline",
    ),
    "a network of SDXL": ("sd", setting(NETWORK, addition_embed_type="text_time"), "addition_embed_type 'text_time'"),
    "an image encoder's network": (
        "sd",
        setting(NETWORK, encoder_hid_dim_type="image_proj"),
        "encoder_hid_dim_type 'image_proj'",
    ),
    "a network with classes": ("sd", setting(NETWORK, num_class_embeds=1000), "num_class_embeds 1000"),
    "inpainting": ("sd", setting(NETWORK, in_channels=9), "in_channels 9, but its autoencoder's latents have 4"),
    "other latents": ("sd", setting(VAE, latent_channels=16), "in_channels 4, but its autoencoder's latents have 16"),
    "an autoencoder of depth": ("sd", setting(VAE, in_channels=4), "in_channels 4"),
    "no list of blocks": (
        "sd",
        setting(VAE, block_out_channels=64),
        "has block_out_channels 64; a list of 1 to 16, each a side of one of its tensors is needed",
    ),
    "30 blocks": ("sd", setting(VAE, block_out_channels=[8] * 30), "a list of 1 to 16"),
    "an unknown part": ("sd", setting(INDEX, controlnet=["diffusers", "ControlNetModel"]), "has controlnet"),
    "another autoencoder": ("sd", setting(INDEX, vae=["diffusers", "VQModel"]), "known are AutoencoderKL"),
    "a part from elsewhere": ("sd", setting(INDEX, vae=["mine", "AutoencoderKL"]), "has vae ['mine', 'AutoencoderKL']"),
    "a part that is no class": ("sd", setting(INDEX, vae=["diffusers"]), "has vae ['diffusers']"),
    "no tokenizer": ("sd", unlisted("tokenizer"), "has no tokenizer; a UNet2DConditionModel needs its whole pipeline"),
    "no scheduler listed": ("sd", unlisted("scheduler"), "has no scheduler; known are DDPMScheduler"),
    "no folder of the tokenizer": ("sd", removed("tokenizer"), "lists tokenizer, but"),
    "no folder of the text encoder": ("sd", removed("text_encoder"), "lists text_encoder, but"),
    "no folder of the scheduler": ("sd", removed("scheduler"), "lists scheduler, but"),
    "no scheduler config": (
        "sd",
        lambda folder: (folder / SCHEDULER).unlink(),
        "has no scheduler/scheduler_config.json; a UNet2DConditionModel needs the one it came with",
    ),
    "a flow for Stable Diffusion": (
        "sd",
        setting(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "names the scheduler 'FlowMatchEulerDiscreteScheduler'",
    ),
    "no config of the text encoder": ("sd", lambda folder: (folder / TEXT).unlink(), "config.json is missing"),
    "no config of the autoencoder": ("sd", lambda folder: (folder / VAE).unlink(), "config.json is missing"),
    "no weights of the autoencoder": (
        "sd",
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae holds no safetensors weights",
    ),
    "code of the text encoder": ("sd", content("text_encoder/mine.py", b""), "mine.py is code"),
    "10^9 layers of text": ("sd", setting(TEXT, num_hidden_layers=10**9), "asks for 1,000,000,000 layers"),
    "10^9 layers of the autoencoder": ("sd", setting(VAE, layers_per_block=10**9), "asks for 2,000,000,000 layers"),
    "10^9 transformers in a block": (
        "sd",
        setting(NETWORK, transformer_layers_per_block=[1, 10**9]),
        "asks for 2,000,000,000 layers",
    ),
    "10^9 layers of a transformer": ("dit", setting(TRANSFORMER, num_layers=10**9), "asks for 1,000,000,000 layers"),
    "classes that are no numbers": ("dit", setting(INDEX, id2label={"cat": "cat"}), "id2label"),
    "another transformer": ("dit", setting(TRANSFORMER, _class_name="FluxTransformer2DModel"), "'FluxTransformer2DMod"),
    "an unknown old transformer": (
        "dit",
        setting(TRANSFORMER, _class_name="Transformer2DModel", norm_type="layer_norm"),
        "describes 'Transformer2DModel'",
    ),
    "a diffusion of SD3": ("sd3", setting(SCHEDULER, _class_name="DDIMScheduler"), "known are FlowMatchEulerDiscrete"),
    "10^9 blocks": ("uvit", setting("config.json", depth=10**9), "asks for 1,000,000,000 layers"),
    "a U-ViT of latents": ("uvit", setting("config.json", in_channels=4), "has in_channels 4"),
}
SAVE = {
    "sd": tiny.save_stable_diffusion,
    "dit": tiny.save_dit,
    "sd3": lambda folder: tiny.save_sd3(folder, third=True),
    "uvit": tiny.save_uvit,
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by kind; not to be changed."""
    return {kind: save(tmp_path_factory.mktemp("saved") / kind) for kind, save in SAVE.items()}


@pytest.mark.parametrize("name", LATENT_REFUSED)
def test_a_pipeline_that_is_not_known_or_not_whole_is_refused_in_one_sentence(
    tmp_path: Path, saved: dict[str, Path], name: str
) -> None:
    kind, change, expected = LATENT_REFUSED[name]
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    describe(Location(folder))  # what is refused below is the change, not the model
    change(folder)
    with pytest.raises(InputError) as refusal:
        describe(Location(folder))
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", [None, [None, None]])
def test_a_safety_checker_and_parts_that_are_absent_do_not_matter(
    tmp_path: Path, saved: dict[str, Path], part: list | None
) -> None:
    folder = shutil.copytree(saved["sd"], tmp_path / "model")
    setting(INDEX, safety_checker=["mine", "Checker"], image_encoder=part, controlnet=part)(folder)
    assert describe(Location(folder)).fingerprint == describe(Location(saved["sd"])).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        setting(TEXT, eos_token_id=1),
        setting(VAE, scaling_factor=0.5),
        setting(SCHEDULER, beta_end=0.03),
        content("tokenizer/tokenizer.json", b"{}"),
    ],
)
def test_every_part_of_a_pipeline_decides_its_fingerprint(
    tmp_path: Path, saved: dict[str, Path], change: Change
) -> None:
    folder = shutil.copytree(saved["sd"], tmp_path / "model")
    change(folder)
    assert describe(Location(folder)).fingerprint != describe(Location(saved["sd"])).fingerprint


@pytest.mark.parametrize("name", ["", "nothing", "../nothing", "x" * 5000, "a\0b", "~/.ssh", "http://a/b", "\\\\a\\b"])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"There is no model or folder .*ideal:SET"):
        describe(Location(name))


def test_a_file_is_refused_as_a_model(pipeline: Path) -> None:
    with pytest.raises(InputError, match="is a file; name a diffusers folder"):
        describe(Location(pipeline / WEIGHTS))


def test_a_folder_that_is_no_model_is_refused_for_that_and_not_for_what_else_it_holds(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        describe(Location(tmp_path))


@pytest.mark.usefixtures("as_in_a_script")
def test_a_script_names_a_folder_by_a_plain_string(pipeline: Path, pictures: Path) -> None:
    assert describe(str(pipeline)).fingerprint == describe(Location(pipeline)).fingerprint
    assert len(open_images(f"member={pictures}/member,nonmember={pictures}/nonmember")) == 12


@pytest.mark.parametrize("name", ["{}", "{}/unet", "owner/name", "ideal:{}", "ideal:member={}", "ideal:hub:owner/name"])
@pytest.mark.usefixtures("as_in_the_app")
def test_a_plain_string_opens_no_model_that_is_not_built_in(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for client in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, client, lambda *_, **__: pytest.fail("something is fetched"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: pytest.fail("fetched")))
    with (
        watched() as seen,
        pytest.raises(InputError, match=r"There is no built-in (model|image set)"),
    ):
        describe(name.format(pipeline))
    assert not [one for one in seen if str(pipeline) in one.path]
    with watched() as seen:
        describe(Location(pipeline))
    assert [one for one in seen if str(pipeline) in one.path]  # or nothing would be seen above either


# What is said of a sound model


def test_a_pipeline_is_described_as_diffusers_sees_it(pipeline: Path) -> None:
    model, unet = describe(Location(pipeline)), UNet2DModel.from_pretrained(pipeline / "unet")
    assert model.parameters == unet.num_parameters()
    assert model.profile == Profile((8, 8), 1)
    assert model.timesteps == 1000
    assert model.name == str(pipeline)


def test_a_network_alone_is_the_same_model_as_its_pipeline(pipeline: Path) -> None:
    assert describe(Location(pipeline / "unet")).fingerprint == describe(Location(pipeline)).fingerprint


def test_a_network_without_a_scheduler_gets_the_linear_schedule(pipeline: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(pipeline / "unet", tmp_path / "alone")
    assert describe(Location(alone)).schedule == {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
    }


def test_weights_in_parts_are_one_model(pipeline: Path, model: Path) -> None:
    unet = UNet2DModel.from_pretrained(pipeline / "unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="50KB")
    assert len(list((model / "unet").glob("*.safetensors"))) > 2
    assert describe(Location(model)).parameters == unet.num_parameters()


def test_a_fingerprint_does_not_depend_on_the_place(pipeline: Path, model: Path) -> None:
    (model / "README.md").write_text("another text")
    assert describe(Location(model)).fingerprint == describe(Location(pipeline)).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        weights(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        setting(SCHEDULER, beta_end=0.03),
        setting(SCHEDULER, num_train_timesteps=500),
        setting(SCHEDULER, prediction_type="v_prediction"),
        setting(NETWORK, flip_sin_to_cos=False),
        setting(NETWORK, norm_eps=1e-6),
    ],
)
def test_a_fingerprint_changes_with_everything_that_decides_an_output(model: Path, change: Change) -> None:
    before = describe(Location(model)).fingerprint
    change(model)
    assert describe(Location(model)).fingerprint != before


def test_an_ideal_model_is_decided_by_the_members_alone(tmp_path: Path, save_pictures: Save) -> None:
    one, other = save_pictures(tmp_path / "one", 8, 8, each=2), save_pictures(tmp_path / "other", 8, 8, each=2)
    before = describe(Location(f"ideal:{one}"))
    assert (before.images, before.family, before.profile) == (str(one), "ideal", Profile((8, 8), 1))
    (other / "nonmember" / "0.png").unlink()
    assert describe(Location(f"ideal:{other}")).fingerprint == before.fingerprint
    (other / "member" / "0.png").unlink()
    assert describe(Location(f"ideal:{other}")).fingerprint != before.fingerprint


def test_an_ideal_model_needs_a_set_with_members(tmp_path: Path, save_pictures: Save) -> None:
    folder = save_pictures(tmp_path / "set", 8, 8, each=1)
    shutil.rmtree(folder / "member")
    with pytest.raises(InputError, match="has no members"):
        describe(Location(f"ideal:{folder}"))
    with pytest.raises(InputError, match="no image set or folder ''"):
        describe(Location("ideal:"))


# Built-in models


@pytest.fixture
def shipped(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A built-in model that was kept after two epochs."""
    folder = tmp_path / "models" / "tiny"
    for epoch in (50, 100):
        shutil.copytree(pipeline, folder / f"epoch-{epoch:04d}")
    weights(lambda data: data[:-1] + b"\0")(folder / "epoch-0050")
    card = {"name": "tiny", "images": "digits", "recipe": {"snapshots": [50, 100], "default": 100}}
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(catalog, "MODELS", tmp_path / "models")
    return "tiny"


def test_a_built_in_model_is_its_default_epoch_unless_another_is_named(shipped: str) -> None:
    assert catalog.epochs(shipped) == [50, 100]
    assert describe("tiny").fingerprint == describe("tiny@100").fingerprint != describe("tiny@50").fingerprint
    assert [describe(name).name for name in ("tiny", "tiny@50")] == ["tiny", "tiny@50"]
    assert describe("tiny").images == "digits"


@pytest.mark.parametrize("epoch", ["51", "x", "-50", "50.0", "\N{SUPERSCRIPT TWO}", "50@100"])
def test_an_epoch_that_was_not_kept_is_refused_with_those_that_were(shipped: str, epoch: str) -> None:
    with pytest.raises(InputError, match=r"kept are 50, 100\."):
        describe(f"{shipped}@{epoch}")


def test_every_shipped_model_is_what_its_card_says() -> None:
    cards = catalog.built_in()
    assert cards
    for name, card in cards.items():
        for file, digest in card["files"].items():
            assert hashlib.sha256((catalog.MODELS / name / file).read_bytes()).hexdigest() == digest, file
        models = [describe(name), *(describe(f"{name}@{epoch}") for epoch in catalog.epochs(name))]
        parameters = card["parameters"] + card.get("autoencoder", {}).get("parameters", 0)
        assert {model.parameters for model in models} == {parameters}
        assert len({model.fingerprint for model in models}) == len(catalog.epochs(name))
        assert open_images(card["images"]).with_role("member").digest == card["members_digest"]


# Hugging Face

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Hugging Face with one repository, whose files are those of a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
        self.folder, self.asked = folder, []
        self.sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.*")} | sizes
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        files = [SimpleNamespace(rfilename=file, size=size) for file, size in self.sizes.items()]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def snapshot_download(self, name: str, revision: str, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        return str(self.folder)


def test_a_repository_is_fetched_at_one_commit(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(pipeline, monkeypatch, **{"README.md": 10**15, "unet/diffusion_pytorch_model.bin": 10**15})
    model = describe(Location("owner/name"))
    assert (model.name, model.commit) == ("owner/name", COMMIT)
    assert model.fingerprint == describe(Location(pipeline)).fingerprint
    ((name, revision, files),) = hub.asked
    assert (name, revision) == ("owner/name", COMMIT)
    assert sorted(files) == sorted([INDEX, NETWORK, SCHEDULER, WEIGHTS])


def test_a_repository_that_is_too_large_is_refused_before_it_is_fetched(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(pipeline, monkeypatch, **{WEIGHTS: catalog.MAX_DOWNLOAD})
    with pytest.raises(InputError, match="owner/name is larger than 40 GB; fetch it yourself and name its folder"):
        describe(Location("owner/name"))
    assert hub.asked == []


def test_a_fetch_that_breaks_off_is_refused_in_one_sentence(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(pipeline, monkeypatch)

    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"owner/name could not be fetched from Hugging Face; try again\."):
        describe(Location("owner/name"))


ERRORS = [
    ConnectionError("offline"),
    OSError(28, "No space left on device"),
    LocalEntryNotFoundError("nothing here"),
    HFValidationError("no such name"),
    HfHubHTTPError.__new__(HfHubHTTPError, "404 Client Error"),
    RuntimeError("a kind that the client may invent tomorrow"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_a_connection_what_was_fetched_before_is_used_and_else_one_sentence_said(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    hub, kept = Hub(pipeline, monkeypatch), shutil.copytree(pipeline, tmp_path / COMMIT)

    def fail(*_: object, **__: object) -> str:
        raise error

    def local(name: str, local_files_only: bool) -> str:
        assert local_files_only
        return str(kept)

    monkeypatch.setattr(hub, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    assert describe(Location("owner/name")).commit == COMMIT
    assert describe(Location("owner/name")).fingerprint == describe(Location(pipeline)).fingerprint
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="'owner/name' is no folder here and cannot be fetched from Hugging Face"):
        describe(Location("owner/name"))


PLAIN, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
PARTS = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
SHARD_LIST = "unet/diffusion_pytorch_model.safetensors.index.json"
CHOICES: dict[str, tuple[list[str], list[str]]] = {
    "a bare network": (["config.json", PLAIN], []),
    "a captioner": (["config.json", "preprocessor_config.json", "model.safetensors", "vocab.txt"], []),
    "plain weights before half ones": ([f"unet/{PLAIN}"], [f"unet/{HALF}"]),
    "half weights where there are no others": ([f"unet/{HALF}", f"vae/{PLAIN}"], [f"vae/{HALF}"]),
    "weights in parts": ([*PARTS, SHARD_LIST], [f"unet/{HALF}"]),
    "vocabularies": (["tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_3/spiece.model"], []),
    "text encoders": ([f"text_encoder{n}/model.safetensors" for n in ("", "_2", "_3")], ["text_encoder/model.bin"]),
    "a scheduler": (["model_index.json", "scheduler/scheduler_config.json"], []),
    "no pickles and no code": ([], ["unet/diffusion_pytorch_model.bin", "model.ckpt", "pipeline.py", "unet/my.py"]),
    "no other weights": ([], ["v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]),
    "no other parts": ([], ["safety_checker/model.safetensors", "safety_checker/config.json", "a/unet/config.json"]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_of_a_repository_only_what_a_model_needs_is_fetched(name: str) -> None:
    needed, others = CHOICES[name]
    assert sorted(catalog.wanted(needed + others)) == sorted(needed)
    assert sorted(catalog.wanted(others + needed)) == sorted(needed)


# What must not be imported before it is needed

HEAVY = """
import sys
heavy = {"torch", "diffusers", "transformers", "sklearn", "streamlit"} & set(sys.modules)
assert not heavy, heavy
"""


def run_alone(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code + HEAVY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_describing_a_model_and_planning_a_run_import_no_torch(pipeline: Path, pictures: Path) -> None:
    code = """
import sys
from oms_core import catalog, run
from oms_core.location import Location
catalog.describe("ideal:digits")
planned = run.plan(run.Run(model=Location(sys.argv[1]), images=Location(sys.argv[2])))
assert run.lookup(planned) == {}
"""
    run_alone(code, str(pipeline), str(pictures))


def test_the_light_half_of_the_engine_imports_nothing_heavy() -> None:
    run_alone("import oms_core.run, oms_core.attacks, oms_core.search, oms_core.ddim, oms_core.cache, oms_core.images")


def test_the_check_for_heavy_imports_sees_them() -> None:
    with pytest.raises(AssertionError, match="torch"):
        run_alone("import torch")


def test_a_card_that_was_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MODELS", tmp_path)
    card = tmp_path / "one" / "card.json"
    card.parent.mkdir()
    for number, members in enumerate((3, 4)):
        card.write_text(json.dumps({"name": "one", "members": members}))
        os.utime(card, ns=(number, number))
        assert catalog.built_in()["one"]["members"] == members
