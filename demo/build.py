"""Builds the demo source from two public collections: ``python demo/build.py DATA``.

vqa_rad (CC0 1.0): each picture's clinician questions and answers become short statements.
hannover_cxr (CC BY 3.0): metadata with numbers as numbers, and one sentence on how the film was taken.
The result is committed beside this file, so this runs only when one of the two or the wording changes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]

ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
UNKNOWN = re.compile(r"(?i)\b(not sure|unknown|cannot|can't tell|n/a|ambiguous|not seen here|null)\b|^$")
# What says nothing about one picture rather than another: "is this normal?", "is there any abnormality?"
EMPTY = re.compile(
    r"(?i)^(?:is|are|was|were|does|do|can|could) (?:(?:this|it|these|the (?:image|picture|findings?|scan|study|film|"
    r"[a-z]+ scan|(?:chest )?x-?rays?))\b.*\b(?:ab)?(?:normal|normality|typical|healthy|patholog\w+)\b|"
    r"there (?:an? |any )?(?:abnormal\w*|patholog\w*|finding\w*|lesions? or)(?: findings?)?$|"
    r"(?:you|we) (?:see|tell)|anything|this (?:image|picture)? ?(?:a )?(?:good|adequate))"
)
TAIL = re.compile(
    r"(?i)\s*(?:(?:as )?(?:seen|shown|shows?|visible|present|noted|pictured|identified|demonstrated|displayed) )?"
    r"(?:in|on|from|by|with) (?:this|these|the) (?:above |shown |following )?"
    r"(?:image|images|picture|scan|film|study|radiograph|x-?ray|xray|ct|mri|chest x-?ray)s?\b.*$"
)
# Words that open the predicate of "is the heart size increased".
PREDICATE = re.compile(
    r"(?i)^(?:\w{3,}ed|in|on|at|within|above|below|under|normal|abnormal|visible|present|midline|sharp|clear|large|"
    r"larger|bigger|wide|wider|well|more|less|(?:hyper|hypo)\w*(?:ense|ic|lucent)|calcified|symmetric\w*|asymmetric\w*|torn|seen|"
    r"shown|broken|intact|not|cystic|solid|\w+(?:ous|ible|ent|ant))$"
)
UNFINISHED = {"a", "an", "the", "of", "these", "this", "it", "and", "any", "more", "less"}  # no subject ends so


def statement(question: str, answer: str) -> str:
    """One readable statement from a question and its answer, "" where they say nothing of the picture.

    >>> statement("Is there evidence of a pneumothorax", "No")
    'No evidence of a pneumothorax.'
    >>> statement("Is the heart enlarged?", "yes")
    'The heart is enlarged.'
    >>> statement("Where is the mass?", "Pancreas")
    'Location of the mass: pancreas.'
    >>> statement("Is this a normal image?", "No")
    ''
    """
    question = TAIL.sub("", _clean(question)).strip(" ,")
    answer = _clean(answer).rstrip(".")
    if UNKNOWN.search(answer) or EMPTY.search(question):
        return ""
    if answer.lower() in ("yes", "no"):
        return _closed(question, answer.lower() == "yes")
    return _open(question, answer)


def _closed(question: str, yes: bool) -> str:
    if match := re.match(r"(?i)(is|are|was) there (no |any |an? |any evidence of |evidence of )?(.+)$", question):
        verb, article, rest = match[1].lower(), (match[2] or "").lower(), match[3]
        if article == "no ":
            yes, article = not yes, ""
        evidence = "evidence of " if "evidence" in article else ""
        if not yes:
            return _sentence(f"no {evidence}{rest}")
        return _sentence(f"there {verb} {evidence or article.replace('any ', '')}{rest}")
    if match := re.match(r"(?i)(?:is|was) (?:this|it|the image) (?:an?|the|taken|in) (.+)$", question):
        return _sentence(f"this is {match[1]}") if yes else ""
    if match := re.match(r"(?i)(is|are|was|were|have|has) (.+)$", question):
        return _predicated(match[1].lower(), match[2], yes)
    if match := re.match(
        r"(?i)(?:does|do|can) (?:this|the|you|these) ?(?:image|picture|patient)? ?(?:see|show|have) (?:any )?(.+)$",
        question,
    ):
        return _sentence(match[1] if yes else f"no {match[1]}")
    return _sentence(f"{question}: {'yes' if yes else 'no'}")


def _predicated(verb: str, rest: str, yes: bool) -> str:
    words = rest.split()
    for i in range(1 + (words[0].lower() in ("the", "a", "an", "these", "both", "any")), len(words)):
        if PREDICATE.match(words[i]) and words[i - 1].lower() not in UNFINISHED:
            negation = "" if yes else " not"
            return _sentence(f"{' '.join(words[:i])} {verb}{negation} {' '.join(words[i:])}")
    return _sentence(f"{rest}: {'yes' if yes else 'no'}")


OPEN = [  # question pattern -> what the statement starts with
    (r"where (?:is|are|was) (.+?)(?: located| found)?$", r"location of \1"),
    (r".*\b(?:modality|taken|type of (?:image|scan|imaging|radiograph)|kind of (?:image|scan))\b.*", "modality"),
    (r".*\b(?:planes?|cut|cross.?section)\b.*", "plane"),
    (r".*\borgan system\b.*", "organ system"),
    (r"what (?:is|are) (?:the )?(?:abnormal\w*|pathology|wrong|seen|diagnosis|finding\w*)\b.*", "finding"),
    (r"what (?:abnormalit\w+|pathology|pathologies)\b.*", "finding"),
    (r"(?:how would you|how can you|please)? ?describe (.+)$", r"\1"),
    (r"what (?:is|are) (.+)$", r"\1"),
    (r"(?:is|are) (the .+) \S+ or .+$", r"\1"),
    (r"how big (?:is|are) (.+)$", r"size of \1"),
    (r"how many (.+?)(?: (?:are|is|can|do)\b.*)?$", r"number of \1"),
]


def _open(question: str, answer: str) -> str:
    for pattern, start in OPEN:
        if match := re.fullmatch(pattern, question, re.IGNORECASE):
            return _sentence(f"{match.expand(start)}: {_lower(answer)}")
    return _sentence(f"{question}: {_lower(answer)}")


def _clean(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).strip(" ?.,")


def _lower(text: str) -> str:
    """The first word in lower case, unless it is an abbreviation."""
    return text if text[1:2].isupper() or text[:1].isdigit() else text[:1].lower() + text[1:]


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + "."


# --- vqa_rad -------------------------------------------------------------------------------------


def vqa_rad(data: Path) -> list[Row]:
    """One document per picture."""
    by_image: dict[str, list[Row]] = defaultdict(list)
    for line in (data / "qa.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_image[row["image_name"]].append(row)
    return [_vqa_document(name, rows) for name, rows in sorted(by_image.items())]


def _vqa_document(name: str, rows: list[Row]) -> Row:
    stem = Path(name).stem
    organ = ORGANS[rows[0]["image_organ"]]
    modality = _modality(organ, rows)
    said = [statement(row["question"], row["answer"]) for row in rows]
    text = " ".join(dict.fromkeys(sentence for sentence in said if sentence))  # once each, in their order
    return {
        "_id": f"vqa-{stem}",
        "title": {"chest": "Chest x-ray", "abdomen": "Abdominal CT"}.get(organ, f"Head {modality or 'scan'}"),
        "text": text,
        "image": f"images/vqa_rad/{stem}.jpg",
        "metadata": {
            "collection": "vqa_rad",
            "organ": organ,
            "modality": modality,
            "plane": _plane(rows),
            "source_url": rows[0]["image_case_url"],
            "licence": "CC0-1.0",
        },
    }


def _modality(organ: str, rows: list[Row]) -> str | None:
    """All chest pictures are radiographs, all abdominal ones CT; of heads, what the answers say most often."""
    if organ != "head":
        return {"chest": "x-ray", "abdomen": "CT"}[organ]
    said = Counter(
        "MRI" if re.search(r"(?i)\b(?:mri?|flair|t1|t2|dwi|gadolinium)\b", text) else "CT"
        for row in rows
        if row["question_type"] == "MODALITY"
        and re.search(r"(?i)\b(?:ct|mri?|flair|t1|t2|dwi|gadolinium)\b", text := f"{row['question']} {row['answer']}")
        and str(row["answer"]).strip().lower() != "no"
    )
    return said.most_common(1)[0][0] if said else None


def _plane(rows: list[Row]) -> str | None:
    for row in rows:
        if row["question_type"] == "PLANE" and str(row["answer"]).strip().lower() != "no":
            text = f"{row['question']} {row['answer']}".lower()
            if " or " not in row["question"].lower():
                for plane in ("axial", "coronal", "sagittal"):
                    if plane in text:
                        return plane
            for plane in ("pa", "ap"):
                if re.search(rf"\b{plane}\b", str(row["answer"]).lower()):
                    return plane
    return None


# --- hannover_cxr --------------------------------------------------------------------------------

MODALITIES = {"CR": "computed radiography", "DX": "digital radiography"}
PROJECTIONS = {"ap": "anteroposterior (AP)", "pa": "posteroanterior (PA)"}
SEXES = {"f": "female", "m": "male"}
WORDS = {"file", "patient_id", "image_id", "sex", "modality", "projection", "width", "height"}


def hannover(data: Path) -> list[Row]:
    """One document per film."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    return [_film(row) for row in sorted(rows, key=lambda row: str(row["image_id"]))]


def _film(row: Row) -> Row:
    numbers = {key: _number(value) for key, value in row.items() if key not in WORDS}
    projection, sex = row["projection"], SEXES[row["sex"]]
    return {
        "_id": f"hannover-{row['image_id']}",
        "title": f"Chest x-ray, {projection.upper()}",
        "text": f"Chest radiograph of a {sex} patient, {PROJECTIONS[projection]} projection, "
        f"{MODALITIES[row['modality']]}.",
        "image": f"images/hannover_cxr/{Path(row['file']).name}",
        "metadata": {
            "collection": "hannover_cxr",
            "organ": "chest",
            "patient_id": row["patient_id"],
            "sex": sex,
            "modality": row["modality"],
            "projection": projection,
            **numbers,
            "licence": "CC-BY-3.0",
        },
    }


def _number(text: str) -> float | int | None:
    """Lab values are ends of intervals: an infinite one says nothing."""
    value = float(text)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and "." not in text else value


def same_patient(films: list[Row]) -> tuple[list[Row], list[tuple[str, str, int]]]:
    """The first film of each patient with several asks for the others. A query has its own document's id."""
    by_patient: dict[str, list[Row]] = defaultdict(list)
    for film in films:
        by_patient[film["metadata"]["patient_id"]].append(film)
    queries, qrels = [], []
    for _, (first, *others) in sorted(by_patient.items()):
        if others:
            queries.append({"_id": first["_id"], "text": "", "image": first["image"], "metadata": {}})
            qrels += [(first["_id"], other["_id"], 1) for other in others]
    return queries, qrels


# --- the folder ----------------------------------------------------------------------------------


def main(data: Path, out: Path) -> None:
    """Writes corpus.jsonl, queries.jsonl, qrels/test.tsv and images/ below `out`."""
    films = hannover(data / "hannover_cxr")
    documents = vqa_rad(data / "vqa_rad") + films
    queries, qrels = same_patient(films)
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(out / "corpus.jsonl", documents)
    _write_lines(out / "queries.jsonl", queries)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (out / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    for document in documents:
        target = out / document["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / document["metadata"]["collection"] / "images" / target.name, target)
    print(f"{len(documents)} documents, {len(queries)} queries, {len(qrels)} judgments")


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data"), HERE)
