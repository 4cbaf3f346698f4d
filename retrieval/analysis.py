"""Text to tokens: the one analyzer of both lexical engines and of the highlights.

A token is a word, folded (NFKD, accents stripped, case folded) and stemmed (Snowball English); English stop words
leave none, but words that deny stay: in a report they carry the meaning. Both engines index the tokens joined by
blanks, so no token holds white space. A letter of a script that is written without blanks (Han, Kana) is a word of
its own.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Set
from functools import lru_cache

import Stemmer

MAX_LETTERS = 100  # of a token: Lucene's white-space tokenizer splits what is longer than 255

NEGATIONS = frozenset(["no", "not", "without"])

# Lucene's English stop words but the negations. Keeping those costs SciFact nothing (nDCG@10 0.684, 0.683 with them)
# and helps where reports deny what they name: denied findings in words 0.734 to 0.771, present ones 0.376 to 0.397.
_STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with"""
STOP_WORDS = frozenset(_STOP_WORDS.split()) - NEGATIONS

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_JOINERS = "\u00ad\u200c\u200d\u2060"  # soft hyphen and its kin stand inside words and are no letters
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:(?<=[A-Za-z])'(?=[A-Za-z])[A-Za-z0-9]+)*")


def tokens(text: str) -> list[str]:
    """The tokens of a text in their order.

    >>> tokens("No pleural effusions; the patient's heart is ENLARGED.")
    ['no', 'pleural', 'effus', 'patient', 'heart', 'enlarg']
    """
    return [token for token in map(_token, _words(text).findall(text)) if token]


def spans(text: str) -> list[tuple[str, int, int]]:
    """The tokens with their places: ``text[start:end]`` is the word as it was written.

    >>> spans("Café au lait")
    [('cafe', 0, 4), ('au', 5, 7), ('lait', 8, 12)]
    """
    return [(token, *word.span()) for word in _words(text).finditer(text) if (token := _token(word[0]))]


def highlights(text: str, wanted: Set[str]) -> list[tuple[int, int]]:
    """Places in `text` of the words whose tokens are wanted.

    >>> highlights("Small effusions, left effusion.", {"effus"})
    [(6, 15), (22, 30)]
    """
    return [word.span() for word in _words(text).finditer(text) if _token(word[0]) in wanted] if wanted else []


def _words(text: str) -> re.Pattern[str]:
    return _ASCII_WORD if text.isascii() else _unicode_word()


@lru_cache(maxsize=1)
def _unicode_word() -> re.Pattern[str]:
    """Letters and digits with the marks that belong to them, which ``\\w`` leaves out."""
    marks = "".join(
        chr(point)
        for block in (range(0x300, 0x3100), range(0xA66F, 0xAC00), range(0xFB1E, 0xFE30))
        for point in block
        if unicodedata.category(chr(point)).startswith("M")
    )
    letter = rf"[^\W_{_UNSPACED}]"
    word = rf"{letter}+(?:[{re.escape(marks)}{_JOINERS}]+{letter}*)*"
    return re.compile(rf"[{_UNSPACED}](?:[\u3099\u309a])*|{word}(?:(?<=[^\W\d])['\u2019](?=[^\W\d_]){word})*")


@lru_cache(maxsize=1 << 18)
def _token(word: str) -> str:
    """A word as both engines see it, "" for stop words. Cached: few words make most of a text."""
    folded = _folded(word.removesuffix("'s").removesuffix("\u2019s"))
    if folded in STOP_WORDS:
        return ""
    return str(_stemmer().stemWord(folded[:MAX_LETTERS]))


def _folded(word: str) -> str:
    if word.isascii():
        return word.lower().replace("'", "")
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", word).casefold())
    return "".join(letter for letter in decomposed if letter.isalnum())


_local = threading.local()


def _stemmer() -> Stemmer.Stemmer:
    """One for each thread: PyStemmer's are not safe to share."""
    if not hasattr(_local, "stemmer"):
        _local.stemmer = Stemmer.Stemmer("english", 0)  # 0: the cache is ours
    stemmer: Stemmer.Stemmer = _local.stemmer
    return stemmer
