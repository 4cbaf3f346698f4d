"""What related and unrelated queries score in a collection: measured when it is built, kept with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from retrieval import confidence
from retrieval.answers import distinct_words
from retrieval.confidence import HYBRID, MIN_SAMPLE, UNRELATED, Calibration, Calibrations
from retrieval.engine import Engine
from retrieval.types import ImageSource, Part, Query, Ranking, Snapshot

SAMPLE = 200  # related queries of each kind
WORDS: Mapping[Literal["text", "report"], int] = {"text": 8, "report": 40}  # in a query cut out of a document


def calibrate(engine: Engine, pictures: Sequence[ImageSource] = ()) -> Calibrations:
    """Per kind of query and leg. `pictures` are unrelated ones, since none can be drawn here."""
    snapshot = engine.snapshot()
    out: dict[str, Mapping[str, Calibration]] = {}
    for kind, words in WORDS.items():
        strangers = [Query(parts=(Part(text=text, kind=kind),)) for text in UNRELATED]
        out[kind] = _calibrated(engine, snapshot, _cuttings(snapshot, words, kind), strangers)
    if pictures and engine.has_pictures(snapshot):
        strangers = [Query(parts=(Part(image=engine.parts.read_picture(picture)),)) for picture in pictures]
        out["picture"] = _calibrated(engine, snapshot, _stored(snapshot, engine.parts.image_space or ""), strangers)
    return out


def _cuttings(snapshot: Snapshot, words: int, kind: Literal["text", "report"]) -> list[Query]:
    """Runs of words out of the collection's own documents."""
    rng = np.random.default_rng(0)
    documents = snapshot.fetch(snapshot.sample(SAMPLE))
    texts = [confidence.cut(document.content, words, rng) for document in documents if document is not None]
    return [Query(parts=(Part(text=text, kind=kind),)) for text in texts if text is not None]


def _stored(snapshot: Snapshot, space: str) -> list[Query]:
    """The collection's own pictures, each named after its document, which is not to find itself."""
    ids = snapshot.sample(SAMPLE)
    rows, matrix = snapshot.vectors(space, "image", ids)
    found = zip(rows.tolist(), matrix, strict=True)
    return [Query(id=ids[row], parts=(Part(vectors={(space, "image"): vector}),)) for row, vector in found]


def _calibrated(
    engine: Engine, snapshot: Snapshot, related: Sequence[Query], unrelated: Sequence[Query]
) -> dict[str, Calibration]:
    """Leg -> calibration, {} where there are too few queries to say anything."""
    if min(len(related), len(unrelated)) < MIN_SAMPLE:
        return {}
    samples = [engine.encoded(related, snapshot), engine.encoded(unrelated, snapshot)]
    out: dict[str, Calibration] = {}
    for leg in (*engine.legs(), HYBRID):  # hybrid last: it is calibrated on what the legs are sure of
        retrieve = engine.retriever(leg, snapshot)
        best = [
            sorted(_best(leg, query, ranking, out) for query, ranking in zip(sample, retrieve(sample, 2), strict=True))
            for sample in samples
        ]
        if any(score > 0 for sample in best for score in sample):  # a leg that never spoke has nothing to tell
            out[leg] = Calibration(*best)
    return out


def _best(leg: str, query: Query, ranking: Ranking, calibrations: Mapping[str, Calibration]) -> float:
    """What the best hit besides the query itself scores, as `confidence.combined` will look at it."""
    hit = next((hit for hit in ranking if hit.id != query.id), None)
    if hit is None:
        return 0.0
    if leg == HYBRID:
        sure = confidence.combined([hit.parts], calibrations, distinct_words(query))
        return 0.0 if sure is None else float(sure[0])
    return hit.score / distinct_words(query) if leg == "lexical" else hit.score
