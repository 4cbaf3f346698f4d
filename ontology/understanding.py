"""How much of a query an ontology understands: the share of its words that are about findings of its own field.

A hybrid must know when the concepts have little to say. "Amitriptyline for chronic headaches" names a disease, but
what it asks for is not in a chest ontology; "show me small effusions on the left, if any" is all understood.
"""

from __future__ import annotations

from collections.abc import Sequence

from ontology.assertion import readings
from ontology.lexicon import NEGATIVES
from ontology.tables import Tables
from retrieval.types import Finding

# Words that ask for texts and pictures, or for what they show, or join other words: they name nothing themselves.
ASKING = frozenset(
    """about after all and any anybody appearance because before but can case cases could cxr describe described
    describes describing did do does due during every evidence exam examination examinations exams feature
    features film films find finding findings from get give how i if image images into list look looking man me
    mention mentioned mentioning mentions my need on onto or our patient patients people person picture pictures
    please radiograph radiographs ray report reports scan scans search see seen should show showing shown shows
    sign signs so some someone studies study such than their them then they upon want we what when where which
    who whom whose will woman would xray you your""".split()
)


def understood(tables: Tables, text: str, findings: Sequence[Finding]) -> float:
    """Share of the words of a text that lie inside findings of the ontology's own field; 0 where there are none.

    Words that ask, modify, count or assert count neither way. Findings of sources that only lend their names, such
    as HPO's beside `chest`, are outside the field.
    """
    vocabulary = tables.lexicon.vocabulary
    own = [f.span for f in findings if tables.numbers.get(f.concept) in tables.own]
    cues = {word.stem for reading in readings(text, own) for word in vocabulary.words(reading.cue)}
    idle = vocabulary.modifiers | cues
    total = inside = 0
    for word in vocabulary.words(text):
        if any(start <= word.start and word.end <= end for start, end in own):
            inside += 1
        elif word.stem in idle or word.surface in ASKING or word.surface in NEGATIVES or word.surface.isdigit():
            continue
        total += 1
    return inside / total if total else 0.0
