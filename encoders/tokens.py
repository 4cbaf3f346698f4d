"""Texts to the arrays that a tower reads, by the `tokenizers` library alone: no torch, no transformers."""

from __future__ import annotations

import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST = 1_000_000  # tokens of a text that a model without a limit reads


class Tokens:
    """Texts to the arrays that a tower reads, by the `tokenizers` library alone."""

    def __init__(self, tokenizer: Any, inputs: Sequence[str], pad: int, left: bool, pad_type: int) -> None:
        self._tokenizer = tokenizer
        self._inputs = tuple(inputs)
        self._pad = {"input_ids": pad, "token_type_ids": pad_type, "attention_mask": 0}
        self._left = left

    @classmethod
    def read(cls, folder: Path, spec: Mapping[str, Any]) -> Tokens:
        """From a converted tower's `tokenizer.json` and what `Tokens.spec` says of it."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec["max_length"], strategy="longest_first", direction=spec["cut"])
        return cls(tokenizer, spec["inputs"], spec["pad"], spec["left"], spec["pad_type"])

    @staticmethod
    def spec(tokenizer: Any, inputs: Sequence[str], max_length: int | None) -> dict[str, Any]:
        """What must be known beside `tokenizer.json`. tokenizer: a fast one of transformers."""
        return {
            "inputs": list(inputs),
            "max_length": min(max_length or LONGEST, LONGEST),
            "cut": tokenizer.truncation_side,
            "pad": int(tokenizer.pad_token_id or 0),
            "pad_type": int(tokenizer.pad_token_type_id or 0),
            "left": tokenizer.padding_side == "left",
        }

    def rows(self, texts: Sequence[Any]) -> list[Any]:
        """One encoding per text, or per pair of texts."""
        return list(self._tokenizer.encode_batch(list(texts)))

    def padded(self, rows: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        """Name -> (B, longest) int64."""
        longest = max(len(row) for row in rows)
        out = {name: np.full((len(rows), longest), self._pad[name], np.int64) for name in self._inputs}
        for at, row in enumerate(rows):
            place = slice(longest - len(row), None) if self._left else slice(0, len(row))
            values = {"input_ids": row.ids, "token_type_ids": row.type_ids, "attention_mask": row.attention_mask}
            for name, array in out.items():
                array[at, place] = values[name]
        return out


class Fixed:
    """Texts to the rows of fixed length that open_clip's text towers read."""

    def __init__(self, tokenizer: Any, spec: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._spec = spec

    @classmethod
    def read(cls, folder: Path, spec: Mapping[str, Any]) -> Fixed:
        """From a converted tower's `tokenizer.json` and what `write` returned."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec["context"])
        return cls(tokenizer, spec)

    @staticmethod
    def write(tokenizer: Any, folder: Path) -> dict[str, Any]:
        """Write open_clip's `tokenizer` as `tokenizer.json`; what must be known beside it."""
        inner: Any = getattr(tokenizer, "tokenizer", None)  # transformers' one inside, where there is one
        made = _byte_pairs(tokenizer) if inner is None else inner.backend_tokenizer
        made.save(str(folder / "tokenizer.json"))
        clean = getattr(tokenizer, "clean_fn", None)
        drop = inner.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None
        return {
            "context": int(tokenizer.context_length),
            "clean": clean.__name__.removeprefix("_clean_") if clean is not None else "canonicalize",
            "pad": 0 if inner is None else int(inner.pad_token_id or 0),
            "drop": drop,
        }

    def rows(self, texts: Sequence[str]) -> list[Any]:
        """One encoding per text; all have the length that the tower reads once they are padded."""
        return [_Row(row.ids, self._spec["context"]) for row in self._tokenizer.encode_batch(self._cleaned(texts))]

    def padded(self, rows: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        """`input_ids` -> (B, context) int64."""
        out = np.full((len(rows), self._spec["context"]), self._spec["pad"], np.int64)
        for at, row in enumerate(rows):
            out[at, : len(row.ids)] = row.ids
        if self._spec["drop"] is not None:
            out[out == self._spec["drop"]] = 0
        return {"input_ids": out}

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        return [cleaned(text, self._spec["clean"]) for text in texts]


class _Row:
    """Token ids whose length counts as that of the whole row: the tower computes the padding too."""

    def __init__(self, ids: list[int], context: int) -> None:
        self.ids = ids
        self._context = context

    def __len__(self) -> int:
        return self._context


def cleaned(text: str, how: str) -> str:
    """A text as open_clip cleans it before it cuts it into tokens.

    how: `lower`, `whitespace` or `canonicalize` (no punctuation, lower case).

    >>> cleaned("  Fluid &amp; <i>air</i>_level ", "lower"), cleaned("Fluid, (air)_level", "canonicalize")
    ('fluid & <i>air</i>_level', 'fluid air level')
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    elif how == "lower":
        text = text.lower()
    return " ".join(text.split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _byte_pairs(simple: Any) -> Any:
    """open_clip's own byte-pair tokenizer as one of the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import BPE

    ranks = simple.bpe_ranks
    merges = sorted((pair for pair in ranks if len(pair) == 2), key=ranks.__getitem__)
    made = Tokenizer(BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix="</w>"))
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    start, end = ("<start_of_text>", simple.sot_token_id), ("<end_of_text>", simple.eot_token_id)
    made.add_special_tokens([start[0], end[0]])
    made.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    return made
