"""Text towers that learn: a sentence-transformers model whose lower layers may be frozen, or left out.

What frozen layers make of a text never changes, so it is computed once and kept: with half of the layers frozen a step
costs half, from the second time a text is met. Layers are frozen or left out only in bodies built as BERT is
(`embeddings`, `encoder.layer`); any other tower learns as a whole, its word embeddings excepted.

Shapes: B texts, L tokens, H hidden numbers, D dimensions of a vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encoders.runtime import budgeted, unit
from encoders.saving import folder_made, halved, refusing, save
from encoders.scores import digest
from encoders.studies import write_array
from encoders.text import loaded, prompts_of
from retrieval.errors import InputError
from retrieval.types import Matrix, Progress

BLOCK = 1024  # texts whose tokens are held at once
BUDGET = 4096  # tokens that go through the layers at once, padding included
BUDGET_GPU = 131_072


class Body:
    """A body built as BERT is: token ids to hidden states, layer by layer."""

    def __init__(self, body: Any, name: str) -> None:
        layers = getattr(getattr(body, "encoder", None), "layer", None)
        if layers is None or not hasattr(body, "embeddings"):
            raise InputError(
                f"{name!r} is not built as BERT is: set frozen and layers to 0, so that it learns as a whole", "frozen"
            )
        self.embeddings: Any = body.embeddings
        self.layers: nn.ModuleList = layers

    def embedded(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, L, H) of (B, L) token ids."""
        made: Tensor = self.embeddings(input_ids=ids, position_ids=positions)
        return made

    def through(self, hidden: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Hidden states through layers start to stop. mask: (B, 1, L or 1, L) bool, who is seen; None: all."""
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, mask)
        return hidden


def seen(mask: Tensor) -> Tensor | None:
    """(B, L) of real tokens as an attention mask; None where nothing is padded."""
    return None if bool(mask.all()) else mask[:, None, None, :]


class Student:
    """A text tower in training. `module` is what learns.

    name: a sentence-transformers model by name or path. tokens: of a text that are read in training; 0 for as many
    as the model reads. frozen: layers, from below, that stay; all of them where only the head learns. layers: which of
    its layers the student keeps. head: whether a linear map is put behind the pooling; it begins by changing nothing.
    """

    def __init__(
        self,
        name: str | None,
        *,
        tokens: int = 0,
        frozen: int = 0,
        layers: Sequence[int] = (),
        head: bool = False,
    ) -> None:
        self.model: Any = loaded(name)
        self.digest = tensors_digest(self.model.state_dict())
        if head:
            _add_head(self.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.longest = min(tokens or self.model.max_seq_length, self.model.max_seq_length)
        self.dim = int(self.model.get_embedding_dimension())
        prompts = prompts_of(self.model)
        self.query_prompt, self.document_prompt = prompts["query"], prompts["document"]
        inner = self.model[0].model
        self.body = Body(inner, name or "the packaged MiniLM") if frozen or layers else None
        if self.body is not None and layers:
            _keep_layers(inner, self.body, layers)
        self.frozen = frozen
        self.kind = torch.float32  # what its layers compute in; parameters and vectors stay float32
        self.head_only = self.body is not None and frozen == len(self.body.layers) and head
        self._known: dict[str, Tensor] = {}
        self._freeze(inner)
        self.module: nn.Module = self._above()

    def _freeze(self, inner: Any) -> None:
        for parameter in inner.get_input_embeddings().parameters():
            parameter.requires_grad_(False)
        if self.body is not None:
            if self.frozen > len(self.body.layers):
                raise InputError(f"frozen is {self.frozen} of {len(self.body.layers)} layers", "student.frozen")
            for part in (self.body.embeddings, *self.body.layers[: self.frozen]):
                for parameter in part.parameters():
                    parameter.requires_grad_(False)

    def _above(self) -> nn.Module:
        if self.body is None:
            whole: nn.Module = self.model
            return whole
        return nn.ModuleList([*self.body.layers[self.frozen :], *list(self.model)[1:]])

    @property
    def budget(self) -> int:
        """Tokens that go through the layers at once."""
        return BUDGET_GPU if self.device.type == "cuda" else BUDGET

    def must_learn(self) -> None:
        """Raises InputError where nothing of the tower would learn."""
        if not any(p.requires_grad for p in self.module.parameters()):
            raise InputError(
                f"frozen is {self.frozen}, which is every layer: one must learn, or a head", "student.frozen"
            )

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """(B, D) unit vectors, with their gradient where gradients are on."""
        rows = self.below(texts)
        if self.head_only and all(len(row) == 1 for row in rows):  # see `know`
            return nn.functional.normalize(self._encoded(rows), dim=1)
        groups = budgeted([len(row) for row in rows], self.budget)
        made = torch.cat([self._encoded([rows[n] for n in group]) for group in groups])  # (B, D) in groups' order
        back = torch.from_numpy(np.argsort(np.concatenate(groups)))
        return nn.functional.normalize(made[back.to(made.device)], dim=1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Matrix:
        """(N, D) unit vectors as the trained tower stands, in evaluation mode."""
        learning = self.module.training
        self.module.eval()
        blocks = [self.vectors(texts[n : n + BLOCK]).cpu().numpy() for n in range(0, len(texts), BLOCK)]
        self.module.train(learning)
        return unit(np.concatenate(blocks))

    def read_whole(self) -> None:
        """From now on as many tokens as the model reads, which is what the released tower does."""
        self.longest, self._known = self.model.max_seq_length, {}

    def below(self, texts: Sequence[str]) -> list[Tensor]:
        """Per text its (L,) token ids, or the (L, H) that the frozen layers make of it."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._remember(missing)
        return [self._known[text] for text in texts]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        read: list[list[int]] = self.model.tokenizer(list(texts), truncation=True, max_length=self.longest)[
            "input_ids"
        ]
        return read

    def keep(self, texts: Sequence[str], cache: Path, progress: Progress) -> None:
        """Have the frozen layers read these texts now, or take what they made of them in an earlier run.

        Raises BackendError where the cache cannot be written.
        """
        if not self.frozen:
            return
        made_of = [self.digest, self.frozen, self.longest, *texts]
        path = cache / f"below-{digest(made_of)[:16]}.npy"
        rows = self._ids(texts)
        ends = np.cumsum([len(row) for row in rows])
        if not path.exists():
            for start in range(0, len(texts), BLOCK):
                progress("frozen layers", start, len(texts))
                self.below(texts[start : start + BLOCK])
            write_array(path, np.concatenate([self._known[text].numpy() for text in texts]))
        whole = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))  # (sum of L, H)
        for text, end, row in zip(texts, ends.tolist(), rows, strict=True):
            self._known[text] = whole[end - len(row) : end]

    def know(self, texts: Sequence[str], vectors: Matrix) -> None:
        """Take (N, D) vectors of the whole tower for what its frozen layers make: enough where only the head learns.

        A vector is kept as a text of one token, which pools to itself; its length does not matter, since the head is
        linear and what comes after it is of unit length.
        """
        for text, vector in zip(texts, torch.from_numpy(vectors), strict=True):
            self._known[text] = vector[None]

    @torch.no_grad()
    def _remember(self, texts: Sequence[str]) -> None:
        rows = self._ids(texts)
        if not self.frozen or self.body is None:
            self._known |= {text: torch.tensor(ids) for text, ids in zip(texts, rows, strict=True)}
            return
        for group in budgeted([len(row) for row in rows], self.budget):
            ids, mask = padded([torch.tensor(rows[n]) for n in group])
            ids, mask = ids.to(self.device), mask.to(self.device)
            hidden = self.body.through(self.body.embedded(ids), seen(mask), 0, self.frozen).half().cpu()
            for row, n in enumerate(group.tolist()):
                self._known[texts[n]] = hidden[row, : len(rows[n])].clone()

    def _encoded(self, rows: list[Tensor]) -> Tensor:
        given, mask = padded(rows)
        given, mask = given.to(self.device), mask.to(self.device)
        features: dict[str, Any] = {"attention_mask": mask.long()}
        with torch.autocast(self.device.type, self.kind, enabled=self.kind != torch.float32):
            if self.body is None:
                features = self.model[0](features | {"input_ids": given})
            else:
                hidden = given.float() if self.frozen else self.body.embedded(given)
                features["token_embeddings"] = self.body.through(
                    hidden, seen(mask), self.frozen, len(self.body.layers)
                )
        features["token_embeddings"] = features["token_embeddings"].float()
        for part in list(self.model)[1:]:
            features = part(features)
        made: Tensor = features["sentence_embedding"]
        return made

    def save(self, folder: Path) -> None:
        """The tower as a sentence-transformers folder, float16, whole or with an error."""
        release(self.model, folder)


def release(model: Any, folder: Path) -> None:
    """A sentence-transformers model as a folder of float16 safetensors and JSON; the weights come last.

    Raises BackendError where the disk refuses.
    """
    folder_made(folder)
    weights = halved(model[0].model.state_dict())
    with refusing(folder):
        model.save_pretrained(str(folder), create_model_card=False)
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors keeps its files to their owner
        (folder / "model.safetensors").unlink()  # in float32: ours is half of it
    save(folder / "model.safetensors", weights, {"format": "pt"})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and values."""
    whole = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return whole.hexdigest()


def _add_head(model: Any) -> None:
    """A linear map of the pooled vector, the identity to begin with, before what follows the pooling."""
    from sentence_transformers.sentence_transformer.modules import Dense

    dim = int(model.get_embedding_dimension())
    head = Dense(dim, dim, bias=False, activation_function=None, init_weight=torch.eye(dim))
    parts = list(model)
    model._modules.clear()
    for number, part in enumerate([*parts[:2], head, *parts[2:]]):
        model.add_module(str(number), part)


def _keep_layers(inner: Any, body: Body, kept: Sequence[int]) -> None:
    count = len(body.layers)
    if list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        raise InputError(
            f"layers is {list(kept)}; it must be rising numbers of the model's layers 0 to {count - 1}", "layers"
        )
    body.layers = nn.ModuleList(body.layers[n] for n in kept)
    inner.encoder.layer = body.layers
    inner.config.num_hidden_layers = len(kept)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, L, ...) of rows of different length, zeros at their ends, and (B, L) bool of what is real."""
    lengths = torch.tensor([len(row) for row in rows])
    together = (
        torch.stack(list(rows)) if len(set(lengths.tolist())) == 1 else nn.utils.rnn.pad_sequence(list(rows), True)
    )
    return together, torch.arange(together.shape[1])[None, :] < lengths[:, None]
