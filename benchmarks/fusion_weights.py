"""Learns the fusion weights that Lightbox ships, on SciFact train and iu_xray train together.

``python -m benchmarks.fusion_weights`` prints them with what they reach on every source; ``--write`` ships them.
The sources of one kind of query weigh the same, however many queries they have. The `image` leg is not learned: the
shipped tower has seen the films of train, so it would get a weight that it does not earn on films it has not seen.
It keeps the share below, so that documents without words are found, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import collections
from retrieval import tune
from server import judging, terminal
from server.assemble import SHIPPED_WEIGHTS
from server.home import Home

LEGS = ("lexical", "dense", "ontology")
SOURCES = {  # kind of query -> collection, source, split
    "text": (
        ("scifact", "scifact", "train"),
        ("train-reports", "label_reports", "test"),
        ("train-reports", "absent_reports", "test"),
    ),
    "report": (("train-reports", "report_reports", "test"),),
}
IMAGE_SHARE = 0.05  # of the weight of queries in words; a fifth where the ontology has nothing to say
LEAST = 0.03  # of every leg: where the ontology has nothing to say, the others must be heard
# A picture alone is silent in lexical and ontology, and `image` has the rest; the text vectors nearest to a film say
# little (on the demo's films of the same patient any weight of `dense` costs nDCG). Beside words, words count.
PICTURE = {"lexical": 0.2, "dense": 0.0, "ontology": 0.3, "image": 0.5}


def main(write: bool) -> None:
    """Prints a table; writes server/weights.json where `write`."""
    home, films = collections.home(), collections.tasks("train")
    collections.indexed(home, "scifact", collections.data() / "scifact", pictures=False)
    collections.indexed(home, "train-reports", films / "label_reports", pictures=False)
    shipped: dict[str, dict[str, float]] = {"picture": PICTURE}
    for kind, sources in SOURCES.items():
        judged = [
            _candidates(home, collection, (collections.data() if source == "scifact" else films) / source, split)
            for collection, source, split in sources
        ]
        learned, mean = tune.learn_weights(LEGS, judged)
        weights = _floored(learned)
        shipped[kind] = {leg: round(w * (1 - IMAGE_SHARE), 3) for leg, w in weights.items()} | {"image": IMAGE_SHARE}
        print(f"{kind}: {dict(learned)}, mean nDCG@10 {mean:.4f}; none under {LEAST}: {dict(weights)}")
        table = [[source, str(len(rows)), *_reached(rows, weights)] for (_, source, _), rows in zip(sources, judged)]
        print("\n".join(terminal.table(["", "queries", *LEGS, "fused"], table)))
    if write:
        SHIPPED_WEIGHTS.write_text(json.dumps(dict(sorted(shipped.items(), reverse=True)), indent=1) + "\n")


def _floored(weights: Mapping[str, float]) -> dict[str, float]:
    raised = {leg: max(weight, LEAST) for leg, weight in weights.items()}
    return {leg: weight / sum(raised.values()) for leg, weight in raised.items()}


def _candidates(home: Home, name: str, source: Path, split: str) -> list[tune.Judged]:
    """What the legs give the judged queries of one source, a column per leg."""
    judged = judging.judgments(source, split)
    with terminal.progress() as progress:
        legs, rows = judging.candidates(home.engine(name), judged, progress, drop_identical_ids=True)
    order = [legs.index(leg) for leg in LEGS]
    return [row._replace(scores=np.ascontiguousarray(row.scores[:, order])) for row in rows]


def _reached(rows: Sequence[tune.Judged], weights: Mapping[str, float]) -> list[str]:
    """nDCG@10 of each leg alone, and of all with the weights."""
    grid = np.vstack([np.eye(len(LEGS)), [weights[leg] for leg in LEGS]]).astype(np.float32)
    return [f"{value:.4f}" for value in np.mean([tune.ndcg(row, grid) for row in rows], axis=0)]


if __name__ == "__main__":
    main(write="--write" in sys.argv)
