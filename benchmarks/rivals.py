"""Rivals live in venvs of their own below .bench/venvs, never in the lock."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

VENVS = Path(".bench/venvs")


def python_with(name: str, *packages: str) -> str | None:
    """The interpreter of a venv that has `packages`; None, and a word why, where they cannot be installed."""
    folder = VENVS / name
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        uv = shutil.which("uv", path=str(Path(sys.executable).parent))
        pip = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
        done = subprocess.run([*pip, "--quiet", *packages], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"{name}: cannot be installed here: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
        (folder / ".installed").touch()
    return str(python.absolute())
