"""Files of a training run: safetensors and JSON, whole or not at all; never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrieval.errors import BackendError, InputError


def folder_made(folder: Path) -> Path:
    """The folder, made where it was missing. Raises BackendError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BackendError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def save(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all. Raises BackendError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, dict(notes))
        part.chmod(0o644)  # safetensors keeps its files to their owner
        _flush(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BackendError(f"{path.name} cannot be written: {error}") from error


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """What a library says of a disk that refuses, as ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BackendError(f"{folder} cannot be written: {error}") from error


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are released: floating numbers in float16, the others as they are."""
    return {name: value.to(torch.float16) if value.is_floating_point() else value for name, value in tensors.items()}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file. Raises InputError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no readable safetensors file: remove it to start anew") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all. Raises BackendError where the disk refuses."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _flush(part)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BackendError(f"{path.name} cannot be written: {error.strerror}") from error


def _flush(path: Path) -> None:
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())
