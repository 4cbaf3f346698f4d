"""Three searches to try on the collection `demo`, each with its answer."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

FILM = Path(__file__).parent / "images" / "hannover_cxr" / "1880e301.jpg"
SEARCHES = (
    ("demo", "chest x-ray with enlarged heart", "-k", "3"),
    (
        "demo",
        "--image",
        str(FILM.relative_to(Path.cwd())) if FILM.is_relative_to(Path.cwd()) else str(FILM),
        "-k",
        "3",
    ),
    ("demo", "no pleural effusion", "--where", '{"organ": "chest"}', "-k", "3"),
)


def main() -> int:
    """Prints each command line and what it answers; the first failure's exit status."""
    for words in SEARCHES:
        print(f"\n$ lightbox search {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "server.cli", "search", *words], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
