"""Everything that a film recipe learns from, in one file: `python -m benchmarks.pack [RECIPE.toml FILE]`.

For training on a machine that has neither the collection nor the encoders: see `encoders.packed`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from encoders.film import learned_from
from encoders.packed import pack
from encoders.recipe import read
from server import terminal
from server.assemble import Config, Models
from server.settings import Settings

RECIPE = Path(__file__).parents[1] / "encoders" / "recipes" / "chest-film.toml"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    recipe, target = map(Path, given or (RECIPE, "runs/iu_xray.lesson"))
    plan, linker = read(recipe), Models(Settings()).linker(Config.given())
    with terminal.progress() as progress:
        pack(target, plan, *learned_from(plan, Path("runs") / "cache", progress, None, linker))


if __name__ == "__main__":
    main()
