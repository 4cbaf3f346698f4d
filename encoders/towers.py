"""Picture towers and their text sides in PyTorch: loaded from files alone, and handed to the runtime for conversion.

Weights are safetensors, or what `torch.load(weights_only=True)` opens; no code comes with a model. torch and the model
libraries are imported inside, so that nothing here costs a search anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encoders import runtime
from encoders.models import loading
from encoders.resize import Resize
from encoders.text import PROBES
from encoders.tokens import Fixed
from retrieval.errors import InputError


class Loaded:
    """A model in memory, in PyTorch. resize: as `Resize` reads it. tokenizer: open_clip's, where it reads texts."""

    def __init__(self, image: Any, resize: Mapping[str, Any], text: Any = None, tokenizer: Any = None) -> None:
        self.image, self.resize, self.text, self.tokenizer = image, resize, text, tokenizer


def load_trained(files: Mapping[str, Path], config: Mapping[str, Any], name: str) -> Loaded:
    """What `lightbox train` wrote; pictures are squeezed to a square, as it trains on them."""
    import timm
    from safetensors.torch import load_file

    from encoders.joined import Joined

    with loading(name, "trained tower"):
        members = [
            timm.create_model(
                str(config["tower"]).removeprefix("timm/"),
                pretrained=False,
                in_chans=int(config["channels"]),
                num_classes=int(config["dim"]),
            )
            for _ in range(int(config["members"]))
        ]
        tower = Joined(members, int(config["dim"]))
        tower.load_state_dict(load_file(str(files["model.safetensors"])), strict=True)
    size = [int(config["size"])] * 2
    how = {"size": size, "scale": size, "mode": "squash", "filter": "bilinear", "fill": 0}
    return Loaded(_Picture(tower.float().eval()), how | {"mean": config["mean"], "std": config["std"]})


def load_open_clip(model: str, tag: str | None, name: str) -> Loaded:
    """A whole open_clip model. model: open_clip's name, or `local-dir:` and a folder."""
    import open_clip

    with loading(name, "open_clip"):
        made = open_clip.create_model(model, pretrained=tag, require_pretrained=True, weights_only=True).float().eval()
        tokenizer = open_clip.get_tokenizer(model)
    return Loaded(_Picture(made.encode_image, made), _open_clip_resize(made.visual), _Words(made), tokenizer)


def _open_clip_resize(visual: Any) -> dict[str, Any]:
    given = visual.preprocess_cfg
    size = given["size"] if isinstance(given["size"], (list, tuple)) else [given["size"]] * 2
    size = [int(edge) for edge in size][-2:]
    mode = given.get("resize_mode") or "shortest"
    # open_clip passes its interpolation on, except to the resize of pictures that are not square
    bicubic = given["interpolation"] != "bilinear" or (mode == "shortest" and size[0] != size[1])
    return {
        "size": size,
        "scale": size,
        "mode": mode,
        "filter": "bicubic" if bicubic else "bilinear",
        "fill": int(given.get("fill_color") or 0),
        "mean": list(given["mean"]),
        "std": list(given["std"]),
    }


def load_timm(folder: Path, name: str) -> Loaded:
    """A timm tower without its classifier."""
    import timm
    from timm.data.config import resolve_model_data_config

    with loading(name, "timm"):
        tower: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
        tower.reset_classifier(0)
        given: dict[str, Any] = resolve_model_data_config(tower)  # type: ignore[no-untyped-call]
    size = [int(edge) for edge in given["input_size"][-2:]]
    resize = {
        "size": size,
        "scale": [int(edge / given["crop_pct"]) for edge in size],
        "mode": {"squash": "squash", "border": "longest"}.get(given["crop_mode"], "shortest"),
        "filter": given["interpolation"],
        "fill": round(255 * given["mean"][0]),
        "mean": list(given["mean"]),
        "std": list(given["std"]),
    }
    return Loaded(_Picture(tower), resize)


def _Picture(encode: Callable[[Any], Any], owner: Any = None) -> Any:
    """What turns a batch of arrays into vectors, as a module with one input named `image`."""
    import torch

    class Picture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = encode if owner is None else owner  # so that its weights move with it

        def forward(self, image: Any) -> Any:
            return encode(image)

    return Picture().eval()


def _Words(model: Any) -> Any:
    """An open_clip model's text side as a module with one input named `input_ids`."""
    import torch

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model.encode_text(input_ids)

    return Words().eval()


# ---- converting


def make_image(loaded: Loaded, out: Path) -> dict[str, Any]:
    """Convert the picture side into the folder `out`; what an encoder must know of it."""
    import torch

    resize = Resize.of(loaded.resize)
    draw = torch.Generator().manual_seed(0)
    shape = (len(resize.mean), *resize.size)
    probes = [{"image": torch.randn(count, *shape, generator=draw)} for count in (2, 1, 3)]
    runs = runtime.convert(loaded.image, out, probes[0], probes, fixed=True)
    with torch.inference_mode():
        dim = int(loaded.image(**probes[1]).shape[1])
    return {"runtime": runs, "dim": dim, "resize": resize._asdict()}


def make_text(loaded: Loaded, out: Path, name: str) -> dict[str, Any]:
    """Convert the text side into the folder `out`; what an encoder must know of it."""
    import torch

    tokens = Fixed.write(loaded.tokenizer, out)
    probes = [{"input_ids": loaded.tokenizer(list(texts))} for texts in (PROBES[:2], PROBES[2:3], PROBES)]
    for texts, probe in zip((PROBES[:2], PROBES[2:3], PROBES), probes, strict=True):
        ours = Fixed.read(out, tokens)
        if not np.array_equal(ours.padded(ours.rows(texts))["input_ids"], probe["input_ids"].numpy()):
            raise InputError(f"{name!r} reads texts in a way of its own, which its tokenizer.json does not hold")
    runs = runtime.convert(loaded.text, out, probes[0], probes, fixed=True)
    with torch.inference_mode():
        dim = int(loaded.text(**probes[1]).shape[1])
    return {"runtime": runs, "dim": dim, "tokens": tokens}
