"""Pictures of nothing: what a collection's own pictures are told from when it learns what a score means.

Drawn rather than kept: noise of several grains, gradients, stripes, checks and discs, grey and coloured, each of its
own seed. A photograph scores lower than a film of the same kind and higher than most of these, so the confidence of
pictures errs to the generous side.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COUNT = 60
SIDE = 224  # px

Plane = NDArray[np.float64]  # (SIDE, SIDE), any range


def strangers(count: int = COUNT) -> list[bytes]:
    """`count` pictures as PNG, the same ones every time."""
    return [_picture(seed) for seed in range(count)]


def _picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    draw = DRAWN[seed % len(DRAWN)]
    planes = [draw(rng)] * 3 if seed % 2 else [draw(rng) for _ in range(3)]
    out = io.BytesIO()
    Image.fromarray(np.stack([_bytes(plane) for plane in planes], axis=-1)).save(out, "PNG")
    return out.getvalue()


def _bytes(plane: Plane) -> NDArray[np.uint8]:
    low, high = plane.min(), plane.max()
    return np.asarray((plane - low) / max(high - low, 1e-9) * 255, np.uint8)


def _noise(rng: np.random.Generator) -> Plane:
    grain = int(rng.integers(1, 56))
    cells = SIDE // grain + 1
    return np.kron(rng.random((cells, cells)), np.ones((grain, grain)))[:SIDE, :SIDE]


def _gradient(rng: np.random.Generator) -> Plane:
    x, y = _turned(rng)
    return np.asarray(x + rng.random() * y * y)


def _stripes(rng: np.random.Generator) -> Plane:
    x, _ = _turned(rng)
    return np.asarray(np.sin(x * rng.uniform(3, 60)))


def _checks(rng: np.random.Generator) -> Plane:
    x, y = _turned(rng)
    width = rng.uniform(3, 30)
    return np.asarray(np.sign(np.sin(x * width) * np.sin(y * width)))


def _discs(rng: np.random.Generator) -> Plane:
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    plane = np.zeros((SIDE, SIDE))
    for _ in range(int(rng.integers(2, 12))):
        inside = (x - rng.random()) ** 2 + (y - rng.random()) ** 2 < rng.uniform(0.02, 0.2) ** 2
        plane[inside] = rng.random()
    return plane


def _turned(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates from -1 to 1, turned by a random angle."""
    x, y = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    angle = rng.uniform(0, np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


DRAWN: tuple[Callable[[np.random.Generator], Plane], ...] = (_noise, _gradient, _stripes, _checks, _discs)
