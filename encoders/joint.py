"""A cross-encoder that begins as the dual encoder it is made from.

The lower layers read query and document apart, as the dual encoder does, the upper ones together (PreTTR, MacAvaney et
al., SIGIR 2020, https://arxiv.org/abs/2004.14255; DeFormer, Cao et al., ACL 2020, https://arxiv.org/abs/2005.00697).
What comes out is compared as the dual encoder compares it, pooled, and token by token (ColBERT,
https://arxiv.org/abs/2004.12832), before a trained part adds to it. So an untrained one already ranks, and a few
hundred judged queries are enough to better it, where a fresh classification head would have to learn matching from
nothing.

Shapes: B pairs, Q tokens of a query, K of a document, L of both, H hidden numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders.student import Body, seen
from encoders.tokens import LONGEST
from retrieval.errors import InputError

KIND = "joint"  # of a folder's config.json


class Head(nn.Module):
    """Hidden states of a query's and of a document's tokens to a score: at first ten times two cosines."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.full((2,), 10.0))
        self.weigh = nn.Linear(hidden, 1)  # how much a token of the query counts
        self.compare = nn.Linear(2 * hidden, 1)
        for layer in (self.weigh, self.compare):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, query_mask: Tensor, document: Tensor, document_mask: Tensor) -> Tensor:
        """(B,) of (B, Q, H), (B, Q) bool, (B, K, H), (B, K) bool."""
        asked, found = _pooled(query, query_mask), _pooled(document, document_mask)  # (B, H)
        near = functional.normalize(query, dim=2) @ functional.normalize(document, dim=2).transpose(1, 2)  # (B, Q, K)
        nearest = near.masked_fill(~document_mask[:, None, :], -1.0).amax(2)  # (B, Q)
        share = self.weigh(query)[:, :, 0].masked_fill(~query_mask, -1e4).softmax(1)  # (B, Q)
        compared = self.compare(torch.cat([asked * found * asked.shape[1] ** 0.5, (asked - found).abs()], 1))  # (B, 1)
        cosines = torch.stack([(asked * found).sum(1), (share * nearest).sum(1)], 1)  # (B, 2)
        out: Tensor = cosines @ self.scales + compared[:, 0]
        return out


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, H) unit vectors: the mean of the real tokens."""
    kept = mask[:, :, None].to(hidden.dtype)
    return functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1), dim=1)


class Joint(nn.Module):
    """The whole of it, from the tokens of pairs to scores: what is served.

    A row reads ``[CLS] query [SEP] [CLS] document [SEP]``, the document's part marked by token type 1.
    """

    def __init__(self, body: Any, separate: int) -> None:
        super().__init__()
        self.inner = body
        self.body = Body(body, KIND)
        self.separate = separate
        self.head = Head(int(body.config.hidden_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """(B, 1) of three (B, L)."""
        real, second = attention_mask.bool(), token_type_ids.bool()
        query, document = real & ~second, real & second
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]
        positions = places - second.long() * query.sum(1, keepdim=True)  # each side counts from 0
        apart = (second[:, None, :, None] == second[:, None, None, :]) & real[:, None, None, :]  # (B, 1, L, L)
        hidden = self.body.embedded(input_ids, positions.clamp(min=0))
        hidden = self.body.through(hidden, apart, 0, self.separate)
        hidden = self.body.through(hidden, real[:, None, None, :], self.separate, len(self.body.layers))
        scores: Tensor = self.head(hidden, query, hidden, document)
        return scores[:, None]

    def scored(self, query: Tensor, query_mask: Tensor, document: Tensor, document_mask: Tensor) -> Tensor:
        """(B,) from what the separate layers made: (B, Q, H), (B, Q), (B, K, H), (B, K).

        Where no layer is separate, from (B, Q) and (B, K) token ids.
        """
        if not query.is_floating_point():
            query, document = self.body.embedded(query), self.body.embedded(document)
        hidden, mask = torch.cat([query, document], 1), torch.cat([query_mask, document_mask], 1)
        hidden = self.body.through(hidden, seen(mask), self.separate, len(self.body.layers))
        width = query.shape[1]
        hidden = hidden.float()
        made: Tensor = self.head(hidden[:, :width], query_mask, hidden[:, width:], document_mask)
        return made


def pair_tokenizer(tokenizer: Any) -> Any:
    """A BERT tokenizer of transformers, made to read pairs as `Joint` does."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {cls}:1 $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer


class Loaded:
    """A released joint cross-encoder, in PyTorch."""

    def __init__(self, module: Joint, tokenizer: Any, max_length: int) -> None:
        self.module, self.tokenizer, self.max_length = module.float().eval(), tokenizer, max_length

    def features(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """What the module reads, by name."""
        given = self.tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            padding=True,
            truncation="longest_first",
            max_length=min(self.max_length, LONGEST),
            return_token_type_ids=True,
            return_tensors="pt",
        )
        return {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def load_joint(folder: Path, config: Mapping[str, Any], name: str) -> Loaded:
    """What `lightbox train` wrote of kind `cross`. Raises InputError where it is damaged."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from encoders.models import loading

    with loading(name, "joint cross-encoder"):
        if config.get("activation", "identity") != "identity":
            raise InputError(f"{name!r}: unknown activation {config['activation']!r}")
        body = BertModel(BertConfig(**config["body"]), add_pooling_layer=False)
        module = Joint(body, int(config["separate"]))
        module.load_state_dict(load_file(str(folder / "model.safetensors")), strict=True)
        tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(folder / "tokenizer.json"),
            **{key: config["tokens"][key] for key in ("pad_token", "cls_token", "sep_token", "unk_token")},
        )
    return Loaded(module, tokenizer, int(config["max_length"]))
