"""Pictures to unit vectors, and the texts of the same space: open_clip pairs, timm towers, and the shipped chest-film.

A name is one of
- `chest-film`, what Lightbox ships, or a folder that `lightbox train` wrote: a picture tower aligned to a text encoder
  that stays what it is. Where the collection uses that text encoder, both are one space and texts are encoded once;
- `MODEL/TAG` as `open_clip.list_pretrained()` has them, for example `ViT-B-32/laion2b_s34b_b79k`;
- `hf-hub:OWNER/NAME`, an open_clip model on the hub, or a folder with `open_clip_config.json` and weights;
- `timm/NAME` on the hub, or a folder with timm's `config.json` and weights: pictures only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open

from encoders import images, runtime
from encoders.models import configuration, found, model_files
from encoders.resize import Resize
from encoders.text import encoded, text_encoder
from encoders.tokens import Fixed
from encoders.towers import Loaded, load_open_clip, load_timm, load_trained, make_image, make_text
from retrieval.errors import BackendError, InputError
from retrieval.types import Encoder, ImageSource, Item, Matrix, Side

SHIPPED = "chest-film"
WEIGHTS = Path(__file__).parent / "weights"
BATCH = 16  # pictures: more gain nothing on a CPU and hold more memory
DECODERS = 2  # threads that decode while the tower runs


class TextSide(Protocol):
    """What a pair needs of its text side; `encoders.text.Text` is one."""

    @property
    def digests(self) -> Mapping[Side, str]: ...
    def handles(self, item: Item) -> bool: ...
    def encode_queries(self, items: Sequence[Item]) -> Matrix: ...
    def encode_documents(self, items: Sequence[Item]) -> Matrix: ...


class Pair:
    """Pictures, and texts where there is a text side, in one space. Implements `retrieval.types.Encoder`."""

    def __init__(self, space: str, pictures: Pictures, text: TextSide | None) -> None:
        self.space = space
        self.dim = pictures.dim
        self._pictures = pictures
        self._text = text

    @property
    def digests(self) -> Mapping[Side, str]:
        own: dict[Side, str] = {"image": self._pictures.digest}
        return own if self._text is None else {"text": self._text.digests["text"], **own}

    def handles(self, item: Item) -> bool:
        """True for pictures, and for texts that the text side can encode."""
        return item.image is not None or (self._text is not None and self._text.handles(item))

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        """(Q, D) of pictures and texts in any order."""
        texts = None if self._text is None else self._text.encode_queries
        return self._encode(items, self._pictures.encode_queries, texts)

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        """(N, D) of pictures and texts in any order."""
        return self._encode(items, self._pictures.encode, None if self._text is None else self._text.encode_documents)

    def as_queries(self, side: Side, vectors: Matrix) -> Matrix:
        """(N, D) as pictures ask; texts as they are."""
        return self._pictures.asking(vectors) if side == "image" else vectors

    def _encode(
        self,
        items: Sequence[Item],
        pictures: Callable[[Sequence[ImageSource]], Matrix],
        texts: Callable[[Sequence[Item]], Matrix] | None,
    ) -> Matrix:
        out = np.zeros((len(items), self.dim), np.float32)
        seen = [n for n, item in enumerate(items) if item.image is not None]
        read = [n for n, item in enumerate(items) if item.image is None]
        if seen:
            out[seen] = pictures([image for n in seen if (image := items[n].image) is not None])
        if read:
            if texts is None:
                raise InputError("this image encoder reads no texts; search it with a picture")
            out[read] = texts([items[n] for n in read])
        return out


class Pictures:
    """A picture tower: decoded pictures to unit vectors.

    middle: (D,), what is taken from the vector of a picture that asks; see `encoders.joined.middle`.
    """

    def __init__(self, tower: runtime.Tower, digest: str, middle: runtime.Array | None = None) -> None:
        self.dim = int(tower.spec["dim"])
        self.digest = digest
        self._middle = middle
        self._tower = tower
        self._resize = Resize.of(tower.spec["resize"])

    def encode(self, pictures: Sequence[ImageSource]) -> Matrix:
        """(N, D) unit vectors. Paths and bytes are decoded here, beside the encoding of others."""
        if len(pictures) <= 2:
            return runtime.unit(self._tower.one({"image": np.stack([self._array(p) for p in pictures])}))
        return runtime.unit(np.concatenate(self._tower.many(self._batches(pictures), len(pictures))))

    def encode_queries(self, pictures: Sequence[ImageSource]) -> Matrix:
        """(Q, D) unit vectors of pictures that ask."""
        return self.asking(self.encode(pictures))

    def asking(self, vectors: Matrix) -> Matrix:
        """(Q, D) unit vectors that pictures ask with whose vectors are `vectors`."""
        return vectors if self._middle is None else runtime.unit(vectors - self._middle)

    def _array(self, picture: ImageSource) -> runtime.Array:
        return self._resize(images.pixels(picture))

    def _batches(self, pictures: Sequence[ImageSource]) -> Iterator[runtime.Inputs]:
        """Batches of arrays. The next one is being decoded while the last one is encoded, never more."""
        with ThreadPoolExecutor(DECODERS) as pool:
            rest = iter(pictures)
            coming = [pool.submit(self._array, p) for p in islice(rest, BATCH)]
            while coming:
                after = [pool.submit(self._array, p) for p in islice(rest, BATCH)]
                yield {"image": np.stack([made.result() for made in coming])}
                coming = after


class Texts:
    """The text side of an open_clip model."""

    def __init__(self, tower: runtime.Tower, digest: str) -> None:
        self.dim = int(tower.spec["dim"])
        self.digests: Mapping[Side, str] = {"text": digest}
        self._tower = tower
        self._tokens = Fixed.read(tower.folder, tower.spec["tokens"])

    def handles(self, item: Item) -> bool:
        return item.image is None and bool(item.text.strip())

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        return encoded(self._tower, self._tokens, [item.text for item in items], self.dim)

    encode_queries = encode_documents  # CLIP knows no prompts of its own


# ---- finding a model


def image_encoder(name: str | None, text: Encoder | None, cache: Path) -> Pair:
    """The image encoder of that name or folder; None is the shipped `chest-film`.

    text: the collection's text encoder. Where the tower is aligned to it the pair shares its space, otherwise the
    space is `image` and has a text side of its own (none for a timm tower).
    Raises InputError for a name or folder that holds no such model.
    """
    label = name or SHIPPED
    model = _model(name, cache)
    digests = runtime.Digests(cache)
    digest = digests.files(model.files, model.how | {"side": "image"})
    loaded = _Once(model.load)
    tower = runtime.tower(cache, digest, lambda: loaded().image, lambda out: make_image(loaded(), out))
    pictures = Pictures(tower, digest, None if model.aligned is None else _middle(model.files["model.safetensors"]))
    if model.aligned is not None:
        side = _aligned_text(model.aligned, text, cache, label)
        return Pair("text" if side is text else "image", pictures, side)
    if not model.reads:
        return Pair("image", pictures, None)
    read = digests.files(model.files, model.how | {"side": "text"})
    words = runtime.tower(cache, read, lambda: loaded().text, lambda out: make_text(loaded(), out, label))
    return Pair("image", pictures, Texts(words, read))


class _Model:
    """A model found but not loaded: its files, how they are used, and what it will have."""

    def __init__(
        self,
        files: Mapping[str, Path],
        how: Mapping[str, Any],
        load: Callable[[], Loaded],
        reads: bool = False,
        aligned: Mapping[str, Any] | None = None,
    ) -> None:
        self.files, self.how, self.load, self.reads, self.aligned = files, dict(how), load, reads, aligned


class _Once:
    """Loads a model when it is first needed, and only then."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._loaded: Loaded | None = None

    def __call__(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def _model(name: str | None, cache: Path) -> _Model:
    if name in (None, SHIPPED):
        return _trained(WEIGHTS / SHIPPED, SHIPPED)
    assert name is not None  # for the type checker: None is the shipped tower
    if name.startswith("hf-hub:"):
        return _open_clip(found(name.removeprefix("hf-hub:")), name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, name)
    if name.startswith("timm/"):
        return _timm(found(name), name)
    model, _, tag = name.partition("/")
    if tag and "/" not in tag and not name.startswith((".", "~")):
        return _tagged(model, tag, cache)
    raise InputError(
        f"unknown image encoder {name!r}: expected {SHIPPED}, MODEL/TAG of open_clip, hf-hub:OWNER/NAME, timm/NAME, "
        "or the folder of one"
    )


def _of_folder(path: Path, name: str) -> _Model:
    if (path / "open_clip_config.json").is_file():
        return _open_clip(path, name)
    if not (path / "config.json").is_file():
        raise InputError(f"{name!r} holds neither open_clip_config.json nor config.json: expected a model's folder")
    held = configuration(path / "config.json", name)
    return _trained(path, name) if "tower" in held else _timm(path, name)


def _trained(folder: Path, name: str) -> _Model:
    """A tower that `lightbox train` wrote."""
    files = {file: folder / file for file in ("config.json", "model.safetensors")}
    if not all(path.is_file() for path in files.values()):
        kind = BackendError if folder == WEIGHTS / SHIPPED else InputError
        raise kind(f"{name!r} is not whole: expected config.json and model.safetensors; install or train it again")
    config = configuration(files["config.json"], name)
    needed = {"tower", "members", "size", "channels", "mean", "std", "dim", "text_encoder", "text_digest"}
    missing = needed - set(config)
    if missing or not str(config["tower"]).startswith("timm/"):
        raise InputError(
            f"{name!r}: config.json lacks {sorted(missing)} or names a tower that is not timm's: train it again"
        )
    return _Model(files, {"kind": "film"}, lambda: load_trained(files, config, name), aligned=config)


def _middle(weights: Path) -> runtime.Array:
    """(D,) what a trained tower takes from pictures that ask."""
    with safe_open(weights, framework="numpy") as opened:
        return np.asarray(opened.get_tensor("middle"), np.float32)


def _open_clip(folder: Path, name: str) -> _Model:
    files = model_files(folder, name)
    if "open_clip_config.json" not in files:
        raise InputError(f"{name!r} holds no open_clip_config.json: expected an open_clip model")
    return _Model(files, {"kind": "open_clip"}, lambda: load_open_clip(f"local-dir:{folder}", None, name), reads=True)


def _timm(folder: Path, name: str) -> _Model:
    files = model_files(folder, name)
    if "architecture" not in configuration(folder / "config.json", name):
        raise InputError(f"{name!r}: config.json names no architecture; expected timm's or that of a trained tower")
    return _Model(files, {"kind": "timm"}, lambda: load_timm(folder, name))


def _tagged(model: str, tag: str, cache: Path) -> _Model:
    """An open_clip model by tag. Where its weights lie is remembered: only open_clip, and so torch, can tell."""
    note = cache / "names" / f"{model}--{tag}.json"
    try:
        kept = json.loads(note.read_text("utf-8"))
        weights, config = Path(kept["weights"]), kept["config"]
    except (OSError, ValueError, KeyError, TypeError):
        weights, config = None, None
    if weights is None or not weights.is_file():
        weights, config = _download(model, tag)
        runtime.write(note, json.dumps({"weights": str(weights), "config": config}).encode())
    how = {"kind": "open_clip", "config": config}
    return _Model({"weights": weights}, how, lambda: load_open_clip(model, tag, f"{model}/{tag}"), reads=True)


def _download(model: str, tag: str) -> tuple[Path, Any]:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    config = open_clip.get_model_config(model)
    known = get_pretrained_cfg(model, tag)
    if config is None or not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) if config else ""
        raise InputError(f"unknown image encoder {model}/{tag}" + (f"; tags of {model}: {tags}" if tags else ""))
    try:
        weights = download_pretrained(known)
    except Exception as error:
        raise InputError(
            f"the weights of {model}/{tag} are not here and cannot be fetched; check the network, or give the folder "
            "of a downloaded model"
        ) from error
    return Path(weights), [config, known]


def _aligned_text(config: Mapping[str, Any], text: Encoder | None, cache: Path, name: str) -> TextSide:
    """The collection's own text encoder where the tower was aligned to it, else the one that it was aligned to."""
    if text is not None and getattr(text, "weights", None) == config["text_digest"]:
        return text
    own = text_encoder(str(config["text_encoder"]), cache)
    if own.weights != config["text_digest"]:
        raise InputError(
            f"{name!r} was aligned to another version of the text encoder {config['text_encoder']!r}: train it again"
        )
    return own
