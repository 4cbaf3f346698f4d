"""How a picture becomes the array that a tower reads: the evaluation transforms of open_clip and timm, without torch.

The order is theirs: convert, resize, crop or pad to size, scale to [0, 1], normalise by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.errors import InputError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MODES = ("shortest", "longest", "squash")


class Resize(NamedTuple):
    """What a tower wants. Sizes are (height, width)."""

    size: tuple[int, int]  # of the array
    scale: tuple[int, int]  # that the picture is resized to, before it is cropped or padded to `size`
    mode: str  # which edge meets `scale`: the shortest, the longest, or both
    filter: str
    fill: int
    mean: tuple[float, ...]  # one a channel: one for greys, three for colours
    std: tuple[float, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Resize:
        """From what a converted tower's `tower.json` keeps."""
        pair = {name: tuple(int(x) for x in given[name]) for name in ("size", "scale")}
        lists = {name: tuple(float(x) for x in given[name]) for name in ("mean", "std")}
        made = cls(**(dict(given) | pair | lists))
        if made.mode not in MODES or made.filter not in FILTERS:
            raise InputError(
                f"a tower resizes by {made.mode!r} and {made.filter!r}; known are {MODES}, {tuple(FILTERS)}"
            )
        return made

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """(C, H, W) float32 of one decoded picture."""
        channels = len(self.mean)
        image = image.convert("L" if channels == 1 else "RGB")
        fitted = self._fit(self._resized(image))
        shares = np.asarray(fitted, np.float32).reshape(*self.size, channels).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray((shares - mean) / std)

    def _resized(self, image: Image.Image) -> Image.Image:
        (height, width), (wide, high) = self.scale, image.size
        if self.mode == "shortest" and height == width:  # as torchvision rounds it
            short, long = min(wide, high), max(wide, high)
            edge = int(height * long / short)
            height, width = (height, edge) if high <= wide else (edge, height)
        elif self.mode != "squash":
            pick = max if self.mode == "longest" else min
            ratio = pick(high / height, wide / width)
            height, width = max(1, round(high / ratio)), max(1, round(wide / ratio))
        return image if image.size == (width, height) else image.resize((width, height), FILTERS[self.filter])

    def _fit(self, image: Image.Image) -> Image.Image:
        """Crop what is too large and pad what is too small, about the centre."""
        height, width = self.size
        if image.size == (width, height):
            return image
        padded = (max(width, image.width), max(height, image.height))
        if padded != image.size:
            paper = Image.new(image.mode, padded, (self.fill,) * len(self.mean) if len(self.mean) > 1 else self.fill)
            paper.paste(image, ((padded[0] - image.width) // 2, (padded[1] - image.height) // 2))
            image = paper
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))
