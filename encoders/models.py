"""Where a model lies: a folder, or a name on the Hugging Face hub; and which of its files decide what it gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from retrieval.errors import BackendError, InputError

WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """The names of the models that come with Lightbox."""
    return sorted(path.name for path in WEIGHTS.glob("*") if (path / "config.json").is_file())


def found(name: str, owner: str = "sentence-transformers") -> Path:
    """The folder of a model given as a path or as a name on the Hugging Face hub, where `owner/` may be left out."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in shipped():
        return WEIGHTS / name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"no folder {name!r}: give the folder of a model, or its name on the hub")
    names = [name] if "/" in name else [f"{owner}/{name}", name]
    for candidate in names:
        if (kept := _fetched(candidate, local=True)) is not None:
            return kept
    for candidate in names:
        if (kept := _fetched(candidate, local=False)) is not None:
            return kept
    raise InputError(
        f"unknown model {name!r}: no such folder, not among the downloaded models, and not to be had from the hub; "
        "check the name and the network, or give the path of a downloaded model"
    )


def _fetched(name: str, local: bool) -> Path | None:
    """The folder of a hub model, None where it is not there. local: look among the downloaded ones only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not local and offline():
        return None
    skipped = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.gguf"]
    try:
        return Path(snapshot_download(name, local_files_only=local, ignore_patterns=skipped, etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError):
        return None


def offline() -> bool:
    """Whether the operator keeps the hub out of reach."""
    asked = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in asked)


def model_files(folder: Path, name: str) -> dict[str, Path]:
    """Relative name -> path of every file that decides what a model gives. Raises InputError where none does."""
    kinds = {".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".pth", ".jinja"}
    files: dict[str, Path] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("onnx", "openvino"))
        for file in sorted(names):
            path = Path(root) / file
            if path.suffix in kinds and not file.startswith("."):
                files[path.relative_to(folder).as_posix()] = path
    if any(path.suffix == ".safetensors" for path in files.values()):  # then the other formats are copies
        files = {key: path for key, path in files.items() if path.suffix not in (".bin", ".pt", ".pth")}
    weights = any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in files.values())
    if not weights or not any(path.suffix == ".json" for path in files.values()):
        raise InputError(
            f"{name!r} holds no model: expected a folder with a configuration (JSON) and weights (safetensors)"
        )
    return files


class loading:
    """Whatever a library says of a model that it cannot load, as one sentence that names the model."""

    def __init__(self, name: str, kind: str) -> None:
        self._name, self._kind = name, kind

    def __enter__(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # weights load within a second

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (InputError, BackendError)):
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{self._name!r} cannot be loaded as a {self._kind} model: {why}") from error


def configuration(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises InputError where it is missing or damaged."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{name!r}: {path.name} is missing or no JSON") from error
    if not isinstance(read, dict):
        raise InputError(f"{name!r}: {path.name} holds no JSON object")
    return read
