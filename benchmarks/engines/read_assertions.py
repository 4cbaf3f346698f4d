"""Runs in a rival's venv: `python read_assertions.py medspacy|negspacy < texts.json`, one JSON object to stdout.

Input: {"texts": [...], "cases": [[text, [[start, end], ...]], ...]}. Output: reports a second over the texts, with the
rival's own matching of fourteen findings, and its readings of the cases' spans: negated, uncertain or affirmed.
"""

from __future__ import annotations

import json
import sys
import time

TARGETS = "atelectasis cardiomegaly effusion infiltrate mass nodule pneumonia pneumothorax consolidation edema".split()
TARGETS += ["emphysema", "fibrosis", "pleural thickening", "hernia"]


def medspacy_reader():
    import medspacy
    from loguru import logger
    from medspacy.ner import TargetRule

    logger.remove()  # its sentence splitter logs every token
    pipeline = medspacy.load()
    pipeline.get_pipe("medspacy_target_matcher").add([TargetRule(target, "FINDING") for target in TARGETS])
    return pipeline, ["medspacy_pyrush", "medspacy_context"], lambda e: (e._.is_negated, e._.is_uncertain)


def negspacy_reader():
    import spacy
    from negspacy.negation import Negex  # noqa: F401  registers the component

    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "FINDING", "pattern": [{"LOWER": w} for w in t.split()]} for t in TARGETS])
    pipeline.add_pipe("negex", config={"ent_types": ["FINDING"]})
    return pipeline, ["sentencizer", "negex"], lambda e: (e._.negex, False)


def read(pipeline, steps, says, text, spans):
    doc = pipeline.make_doc(text)
    found = [doc.char_span(a, b, label="FINDING", alignment_mode="expand") for a, b in spans]
    doc.ents = [span for span in found if span is not None]
    for step in steps:
        doc = pipeline.get_pipe(step)(doc)
    readings = {(e.start_char, e.end_char): says(e) for e in doc.ents}
    out = []
    for span in found:
        negated, uncertain = readings.get((span.start_char, span.end_char), (False, False)) if span else (False, False)
        out.append("negated" if negated else "uncertain" if uncertain else "affirmed")
    return out


def main():
    given = json.load(sys.stdin)
    pipeline, steps, says = {"medspacy": medspacy_reader, "negspacy": negspacy_reader}[sys.argv[1]]()
    for text in given["texts"][:10]:
        pipeline(text)
    started = time.perf_counter()
    for text in given["texts"]:
        pipeline(text)
    rate = len(given["texts"]) / (time.perf_counter() - started)
    cases = [read(pipeline, steps, says, text, spans) for text, spans in given["cases"]]
    json.dump({"rate": rate, "cases": cases}, sys.stdout)


if __name__ == "__main__":
    main()
