"""The service over the fakes in a process of its own: ``python -m tests.small_serve HOME PORT``."""

from __future__ import annotations

import sys
from pathlib import Path

from server import logs
from server.app import run
from server.settings import Settings
from tests.small_home import small_app, small_home

if __name__ == "__main__":
    logs.configure()
    home = small_home(Path(sys.argv[1]))
    run(small_app(Settings(home=Path(sys.argv[1]), max_concurrent=64), home), "127.0.0.1", int(sys.argv[2]), 1)
