from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrieval import analysis
from retrieval.analysis import highlights, spans, tokens


def test_words_are_folded_and_stemmed() -> None:
    assert tokens("Enlarged ENLARGING enlarges") == ["enlarg"] * 3
    assert tokens("naïve Ångström ﬁbrosis ＣＴ") == ["naiv", "angstrom", "fibrosi", "ct"]
    assert tokens("STRASSE Straße") == ["strass", "strass"]


def test_composed_and_decomposed_letters_are_one_word() -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert tokens(unicodedata.normalize(form, "Café, señor")) == ["cafe", "señor".replace("ñ", "n")]


def test_stop_words_leave_no_token() -> None:
    assert tokens("to be or to be with it") == []
    assert tokens("") == []
    assert tokens(" \n\t.,;-_") == []


def test_words_that_deny_stay() -> None:
    assert tokens("There is no effusion, not without doubt") == ["no", "effus", "not", "without", "doubt"]


def test_hyphens_underscores_and_digits_cut_as_expected() -> None:
    assert tokens("X-ray Pleural_Thickening T4 2.5") == ["x", "ray", "pleural", "thicken", "t4", "2", "5"]


def test_apostrophes_neither_split_a_name_nor_keep_a_possessive() -> None:
    assert tokens("O'Brien's patient\u2019s don't 5'-end") == ["obrien", "patient", "dont", "5", "end"]


def test_a_t_cell_stays_a_t_cell() -> None:
    assert tokens("T cells can't") == ["t", "cell", "cant"]


def test_marks_and_joiners_do_not_cut_words() -> None:
    assert len(tokens("हिन्दी")) == 1
    assert tokens("pneumo\u00adthorax") == tokens("pneumothorax")


def test_scripts_without_blanks_give_a_token_a_letter() -> None:
    assert tokens("肺炎 x") == ["肺", "炎", "x"]


def test_endless_words_are_cut() -> None:
    assert [len(token) for token in tokens("a" * 5000)] == [analysis.MAX_LETTERS]


def test_spans_point_into_the_original_text() -> None:
    text = "Ça: e\u0301tude ﬁn\u00adal"
    assert [text[start:end] for _, start, end in spans(text)] == ["Ça", "e\u0301tude", "ﬁn\u00adal"]


def test_highlights_mark_what_the_query_asks_for() -> None:
    text = "The heart is enlarged. No widening of the mediastinum; enlarging hearts."
    assert [text[start:end] for start, end in highlights(text, set(tokens("an enlarged heart")))] == [
        "heart",
        "enlarged",
        "enlarging",
        "hearts",
    ]
    assert highlights(text, set(tokens("the"))) == []


@given(st.text())
def test_tokens_and_spans_agree_and_no_token_holds_white_space(text: str) -> None:
    found = spans(text)
    assert [token for token, _, _ in found] == tokens(text)
    assert all(token and not any(letter.isspace() for letter in token) for token, _, _ in found)
    ends = [0, *(end for _, _, end in found)]
    assert all(before <= start < end for before, (_, start, end) in zip(ends, found, strict=False))


@given(st.text(st.sampled_from("ab'S2_- t.")))
def test_one_foreign_letter_elsewhere_changes_no_token(text: str) -> None:
    assert tokens(text + " é")[:-1] == tokens(text)


def test_white_space_tokens_survive_the_trip_through_an_engine() -> None:
    text = "½ cup of ﷺ and Ⅳ, 10µm; İstanbul"
    assert " ".join(tokens(text)).split() == tokens(text)


def bm25(folder: Path) -> float:
    """nDCG@10 on the test queries; k1 1.2, b 0.75."""
    docs = [json.loads(line) for line in (folder / "corpus.jsonl").open()]
    texts = [f"{d['title']} {d['text']}".strip() for d in docs]
    analysed = [tokens(text) for text in texts]
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row, document in enumerate(analysed):
        for token, times in Counter(document).items():
            postings[token].append((row, times))
    lengths = np.array([len(document) for document in analysed], float)
    norm = 1.2 * (0.25 + 0.75 * lengths / lengths.mean())
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    for line in (folder / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, document_id, grade = line.split("\t")
        grades[query][document_id] = int(grade)
    gains = []
    for line in (folder / "queries.jsonl").open():
        query = json.loads(line)
        if query["_id"] not in grades:
            continue
        scores = np.zeros(len(docs))
        for token in tokens(query["text"]):
            if token in postings:
                rows, times = np.array(postings[token]).T
                idf = np.log1p((len(docs) - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[rows] += idf * times / (times + norm[rows])
        relevant = grades[query["_id"]]
        top = [relevant.get(docs[row]["_id"], 0) for row in np.argsort(-scores, kind="stable")[:10]]
        discount = 1 / np.log2(np.arange(2, 12))
        ideal = np.array([*sorted(relevant.values(), reverse=True), *[0] * 10][:10])
        gains.append(float((top * discount).sum() / (ideal * discount).sum()))
    return float(np.mean(gains))


def test_bm25_over_these_tokens_reaches_the_published_figure_on_scifact(data: Path) -> None:
    assert bm25(data / "scifact") >= 0.68


def test_the_stemmer_is_not_shared_between_threads() -> None:
    words = [f"running{n} enlargements{n}" for n in range(500)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(tokens, words * 4))
    assert results == [tokens(text) for text in words] * 4
