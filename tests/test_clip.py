"""Image encoders, built small here and loaded by the real code: chest-film's format, open_clip, timm."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders.clip import image_encoder
from encoders.images import read_picture
from encoders.resize import Resize
from encoders.text import Text, packaged, text_encoder
from retrieval.errors import InputError, NotAnImage
from retrieval.types import Item, Matrix
from tests.fakes import HashingEncoder

TEXTS = ["Chest x-ray, enlarged heart; it's NOT normal!", "naïve café &amp; 2 lungs", "lung " * 200, "a"]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    draw = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    image = Image.fromarray(draw).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


PICTURES = [picture(90, 60, 1), picture(50, 77, 2), picture(32, 32, 3), picture(1, 1, 4), picture(64, 200, 5, "L")]


def cosines(ours: Matrix, wanted: Any) -> Any:
    rows = np.asarray(wanted, np.float32)
    return (ours * (rows / np.linalg.norm(rows, axis=1, keepdims=True))).sum(1)


def seen(contents: Sequence[bytes]) -> list[Item]:
    return [Item(image=content) for content in contents]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "encoders"  # one for all tests of encoders: MiniLM is converted once


@pytest.fixture(scope="module")
def minilm(cache: Path) -> Text:
    return text_encoder(None, cache)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_film(tmp_path_factory.mktemp("film"))


def saved_film(folder: Path) -> Path:
    """What `lightbox train` writes, untrained."""
    import timm
    import torch
    from safetensors.torch import save_file

    from encoders.joined import Joined

    torch.manual_seed(0)
    tower = Joined([timm.create_model("test_resnet", pretrained=False, in_chans=1, num_classes=384)], 384)
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in tower.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "tower": "timm/test_resnet",
        "members": 1,
        "size": 64,
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "dim": 384,
        "text_encoder": "all-MiniLM-L6-v2",
        "text_digest": hashlib.sha256((packaged() / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_clip(tmp_path_factory.mktemp("clip"), {"resize_mode": "shortest", "interpolation": "bicubic"})


def saved_clip(folder: Path, preprocess: Mapping[str, Any]) -> Path:
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], **preprocess}}
        )
    )
    model = open_clip.model.CLIP(**config)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


# ---- chest-film's format


def test_a_trained_tower_shares_the_space_of_its_text_encoder(film: Path, minilm: Text, cache: Path) -> None:
    pair = image_encoder(str(film), minilm, cache)
    assert (pair.space, pair.dim) == ("text", 384)
    assert pair.digests["text"] == minilm.digests["text"] != pair.digests["image"]
    mixed = [Item(text="effusion"), Item(image=PICTURES[0]), Item(text="clear lungs")]
    vectors = pair.encode_queries(mixed)
    np.testing.assert_allclose(vectors[[0, 2]], minilm.encode_queries([mixed[0], mixed[2]]), atol=1e-5)
    np.testing.assert_allclose(vectors[[1]], pair.encode_documents([mixed[1]]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_picture_that_asks_loses_the_middle(film: Path, minilm: Text, cache: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    middle = np.random.default_rng(0).normal(0, 0.05, 384).astype(np.float16)
    save_file(load_file(film / "model.safetensors") | {"middle": middle}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((film / "config.json").read_bytes())
    pair, items = image_encoder(str(tmp_path), minilm, cache), [*seen(PICTURES), Item(text="effusion")]
    found, asked = pair.encode_documents(items), pair.encode_queries(items)
    np.testing.assert_allclose(found, image_encoder(str(film), minilm, cache).encode_documents(items), atol=1e-5)
    wanted = found[:-1] - middle
    np.testing.assert_allclose(asked[:-1], wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(asked[-1], found[-1], atol=1e-5)  # a text stays
    np.testing.assert_allclose(pair.as_queries("image", found[:-1]), asked[:-1], atol=1e-5)
    assert pair.as_queries("text", found) is found


def test_with_another_text_encoder_the_space_is_its_own(film: Path, minilm: Text, cache: Path) -> None:
    for other in (None, HashingEncoder()):
        pair = image_encoder(str(film), other, cache)
        assert pair.space == "image"
        assert pair.digests["text"] == minilm.digests["text"]
        item = Item(text="effusion")
        np.testing.assert_allclose(pair.encode_queries([item]), minilm.encode_queries([item]), atol=1e-5)


def test_the_vectors_are_the_towers(film: Path, minilm: Text, cache: Path) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    from encoders.joined import Joined

    tower = Joined([timm.create_model("test_resnet", pretrained=False, in_chans=1, num_classes=384)], 384).eval()
    tower.load_state_dict(load_file(str(film / "model.safetensors")))
    squeezed = [Image.open(io.BytesIO(p)).convert("L").resize((64, 64), Image.Resampling.BILINEAR) for p in PICTURES]
    batch = torch.from_numpy(np.stack([np.asarray(s, np.float32) for s in squeezed]))[:, None] / 255
    with torch.inference_mode():
        wanted = tower((batch - 0.5) / 0.25).numpy()
    assert cosines(image_encoder(str(film), minilm, cache).encode_documents(seen(PICTURES)), wanted).min() > 0.9999


def test_many_pictures_give_what_each_gives_alone(film: Path, minilm: Text, cache: Path, tmp_path: Path) -> None:
    pair = image_encoder(str(film), minilm, cache)
    contents = [picture(40 + n, 60, n) for n in range(35)]
    (tmp_path / "a.png").write_bytes(contents[0])
    sources: list[Item] = [Item(image=tmp_path / "a.png"), Item(image=read_picture(contents[1])), *seen(contents[2:])]
    together = pair.encode_documents(sources)
    for n in (0, 1, 17, 34):
        np.testing.assert_allclose(together[[n]], pair.encode_queries([Item(image=contents[n])]), atol=1e-4)


def test_odd_pictures_give_sane_vectors_and_broken_ones_a_refusal(film: Path, minilm: Text, cache: Path) -> None:
    pair = image_encoder(str(film), minilm, cache)
    deep = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    icon = Image.new("RGBA", (16, 16), (200, 30, 30, 90))
    odd = []
    for image in (deep, icon, Image.new("RGB", (1, 1)), Image.new("L", (3000, 1)), Image.new("CMYK", (20, 20))):
        out = io.BytesIO()
        image.save(out, "JPEG" if image.mode == "CMYK" else "PNG")
        odd.append(out.getvalue())
    vectors = pair.encode_documents(seen(odd))
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for many in (1, 20):
        with pytest.raises(NotAnImage):
            pair.encode_documents(seen([*odd * many, b"<html>"]))


def test_a_damaged_or_foreign_tower_is_refused(film: Path, minilm: Text, cache: Path, tmp_path: Path) -> None:
    config = json.loads((film / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not whole"):
        image_encoder(str(tmp_path), minilm, cache)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be loaded"):
        image_encoder(str(tmp_path), minilm, cache)
    (tmp_path / "model.safetensors").write_bytes((film / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_digest": "0" * 64}))
    with pytest.raises(InputError, match="aligned to another version"):
        image_encoder(str(tmp_path), minilm, cache)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tower": "stranger"}))
    with pytest.raises(InputError, match="not timm's"):
        image_encoder(str(tmp_path), minilm, cache)


# ---- open_clip


def test_an_open_clip_folder_gives_open_clips_vectors(clip: Path, minilm: Text, cache: Path) -> None:
    import open_clip
    import torch

    pair = image_encoder(str(clip), minilm, cache)
    assert (pair.space, pair.dim, sorted(pair.digests)) == ("image", 24, ["image", "text"])
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    arrays = [transform(Image.open(io.BytesIO(content))) for content in PICTURES]
    with torch.inference_mode():
        pictures, texts = model.eval().encode_image(torch.stack(arrays)), model.encode_text(tokenizer(TEXTS))
    assert cosines(pair.encode_documents(seen(PICTURES)), pictures.numpy()).min() > 0.9999
    assert cosines(pair.encode_queries([Item(text=text) for text in TEXTS]), texts.numpy()).min() > 0.9999


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_pictures_are_resized_as_open_clip_does(mode: str, filter_: str) -> None:
    from open_clip.transform import image_transform

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    wanted = image_transform(
        32, is_train=False, mean=mean, std=std, resize_mode=mode, interpolation=filter_, fill_color=7
    )
    ours = Resize((32, 32), (32, 32), mode, filter_, 7, mean, std)
    for content in PICTURES:
        image = Image.open(io.BytesIO(content))
        np.testing.assert_allclose(ours(image), wanted(image).numpy(), atol=1e-5)


def test_what_changes_a_vector_changes_the_digest(clip: Path, cache: Path, tmp_path: Path) -> None:
    other = image_encoder(str(saved_clip(tmp_path, {"resize_mode": "squash"})), None, cache)
    same = image_encoder(str(clip), None, cache)
    assert other.digests["image"] != same.digests["image"]


def test_a_checkpoint_that_is_code_is_refused(clip: Path, cache: Path, tmp_path: Path) -> None:
    import pickle

    class Ran:
        def __reduce__(self) -> Any:
            return print, ("code in a checkpoint ran",)

    (tmp_path / "open_clip_config.json").write_text((clip / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Ran()))
    with pytest.raises(InputError, match="cannot be loaded"):
        image_encoder(str(tmp_path), None, cache)


def test_a_tag_is_looked_up_and_its_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, clip: Path, tmp_path: Path
) -> None:
    import open_clip.factory
    import open_clip.pretrained

    held = json.loads((clip / "open_clip_config.json").read_text())
    weights = clip / "open_clip_model.safetensors"
    fetched: list[Any] = []

    def download(known: Any, *_: Any, **__: Any) -> str:
        fetched.append(known)
        return str(weights)

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", held["model_cfg"])
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    known = {"url": "somewhere", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"tiny": known})
    first = image_encoder("Tiny/tiny", None, tmp_path)
    assert first.dim == 24
    fetched.clear()
    again = image_encoder("Tiny/tiny", None, tmp_path)
    assert (again.digests, fetched) == (first.digests, [])  # remembered: open_clip was not asked
    with pytest.raises(InputError, match="tags of Tiny: tiny"):
        image_encoder("Tiny/other", None, tmp_path)


# ---- timm


def test_a_timm_folder_encodes_pictures_and_no_texts(tmp_path: Path, cache: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    torch.manual_seed(0)
    tower: Any = timm.create_model("test_vit", pretrained=False)
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    held = {
        "input_size": [3, 160, 160],
        "crop_pct": 0.95,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": held})
    )
    pair = image_encoder(str(tmp_path), None, cache)
    assert (pair.space, list(pair.digests)) == ("image", ["image"])
    assert [pair.handles(item) for item in (Item(text="x"), Item(image=PICTURES[0]))] == [False, True]
    with pytest.raises(InputError, match="reads no texts"):
        pair.encode_queries([Item(text="x")])
    tower.reset_classifier(0)
    transform = create_transform(**resolve_model_data_config(tower, held), is_training=False)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        wanted = tower.eval()(
            torch.stack([transform(Image.open(io.BytesIO(p)).convert("RGB")) for p in PICTURES])
        ).numpy()
    assert cosines(pair.encode_documents(seen(PICTURES)), wanted).min() > 0.9999


@pytest.mark.parametrize(
    "name",
    [
        "no-such-encoder",
        "ViT-B-32/no-such-tag",
        "No-Such/tag",
        "hf-hub:nobody/nothing",
        "timm/nothing",
        "./gone",
        "a/b/c",
    ],
)
def test_an_unknown_name_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        image_encoder(name, None, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a model's folder"):
        image_encoder(str(tmp_path), None, tmp_path)
