"""What the figures of docs/results.md are measured on: sources made from the development data, indexed once.

Sources and collections are kept below .bench/, so that a second run measures without encoding again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from retrieval.errors import Conflict
from retrieval.files import read_source
from server.assemble import Config
from server.home import Home
from server.settings import Settings
from server.terminal import progress

BENCH = Path(".bench")
CLASSICS = ("cranfield", "cacm", "cisi", "med", "npl", "adi")
TASKS = (
    "label_reports", "absent_reports", "report_reports", "label_images", "image_images", "image_reports",
    "report_images",
)  # fmt: skip


def data() -> Path:
    """The development data; exits where it is not there."""
    found = Path(os.environ.get("LIGHTBOX_DATA", "../shared/data"))
    if not found.is_dir():
        sys.exit(f"LIGHTBOX_DATA: no folder '{found}'; these figures need the development data")
    return found.resolve()


def home() -> Home:
    return Home(Settings(home=BENCH / "home"))


def tasks(part: str) -> Path:
    """The radiograph tasks of one part, written where they are missing."""
    out = BENCH / "tasks" / part
    if not (out / "image_images" / "qrels" / "test.tsv").exists():
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(data() / "tasks.py"), str(out), "--part", part], check=True)
    return out


def indexed(home: Home, name: str, source: Path, *, pictures: bool = True, vector_index: str = "flat") -> None:
    """Indexes `source` as collection `name`, unless that was done before by the same encoders."""
    if name in home.names():
        with suppress(Conflict):
            home.engine(name).snapshot()
            return
    config = Config(image_encoder=None if pictures else "none", vector_index=vector_index)
    with progress(None) as told:
        home.index(name, read_source(source).documents(), config, progress=told)
