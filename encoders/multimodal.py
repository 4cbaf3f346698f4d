"""Multimodal and causal LLMs as embedders: texts, pictures or both to the hidden state behind the last token.

A causal model sees all of its input only at the last token, so that is what is read, behind a prompt that asks for
one word (E5-V, https://arxiv.org/abs/2407.12580; UniME, https://arxiv.org/abs/2504.17432); rows are padded on the
left, so that the last column is the last token of all. LoRA (https://arxiv.org/abs/2106.09685) makes one a student
that fits beside its frozen weights.

Families are those that transformers has classes for; models of other families, or ones that bring code of their own,
are refused.

Shapes: B items, L tokens, D hidden numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders.images import pixels
from encoders.models import configuration, found, loading, model_files
from encoders.runtime import Digests, unit
from encoders.saving import folder_made, refusing
from encoders.scores import digest
from retrieval.errors import InputError
from retrieval.types import Item, Matrix, Side

TEXT = "{}\nSummary above sentences in one word:"
PICTURE = "Summary above image in one word:"
BOTH = "{}\nSummary above image and sentences in one word:"
BATCH = 8  # items of one forward pass
LINEAR = r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"


class Family(NamedTuple):
    """How models of one architecture are asked. turn: a user's turn. language: where the language layers lie."""

    name: str  # of the class in transformers
    picture: str = ""  # what stands for a picture in the prompt; empty for a language model
    turn: str = "{}"
    language: str = r"layers\..*"


_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES: Mapping[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", "<image>", "USER: {} ASSISTANT:", r"language_model\..*"),
    "llava_next": Family("LlavaNextForConditionalGeneration", "<image>", "USER: {} ASSISTANT:", r"language_model\..*"),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", "<image>", _CHATML, r"language_model\..*"),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", _QWEN, _CHATML, r"language_model\..*"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", _QWEN, _CHATML, r"language_model\..*"),
    "phi4_multimodal": Family("Phi4MultimodalForCausalLM", "<|image|>", "<|user|>{}<|end|><|assistant|>"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"), Family("AutoModelForCausalLM")),
}


class Multimodal:
    """An LLM as embedder. Implements `retrieval.types.Encoder`; `module` is what learns.

    Made by `multimodal_encoder`. Vectors of texts and of pictures lie in one space.
    """

    def __init__(self, module: nn.Module, processor: Any, family: Family, key: str) -> None:
        self.module, self.processor, self.family = module, processor, family
        self.space = "multimodal" if family.picture else "text"
        config: Any = module.config
        self.dim = int(config.get_text_config().hidden_size)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module.to(self.device)
        prompts = [TEXT, PICTURE, BOTH, *family]
        sides: tuple[Side, ...] = ("text", "image") if family.picture else ("text",)
        self.digests: Mapping[Side, str] = {side: digest([key, side, *prompts]) for side in sides}
        self._tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def handles(self, item: Item) -> bool:
        """True for texts that are not blank and, where the model sees, for pictures."""
        return bool(item.text.strip()) if item.image is None else bool(self.family.picture)

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        """(Q, D)."""
        return self._encode(items)

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        """(N, D), asked as queries are."""
        return self._encode(items)

    def as_queries(self, side: Side, vectors: Matrix) -> Matrix:
        """(N, D) as they are."""
        del side
        return vectors

    def _encode(self, items: Sequence[Item]) -> Matrix:
        if not items:
            return np.zeros((0, self.dim), np.float32)
        learning = self.module.training
        self.module.eval()
        with torch.no_grad():
            made = [self.vectors(items[n : n + BATCH]).cpu().numpy() for n in range(0, len(items), BATCH)]
        self.module.train(learning)
        return unit(np.concatenate(made))

    def vectors(self, items: Sequence[Item]) -> Tensor:
        """(B, D) unit vectors, with their gradient where gradients are on.

        Raises InputError for an item without text and picture, and for a picture where the model sees none.
        """
        if not all(self.handles(item) for item in items):
            raise InputError("an item holds nothing that this model reads: a text, or a picture if it sees pictures")
        seen = [item.image is not None for item in items]
        groups = [[n for n, has in enumerate(seen) if has == side] for side in (True, False)]
        made = torch.cat([self._last([items[n] for n in group]) for group in groups if group])  # groups' order
        back = torch.tensor(np.argsort(np.concatenate([np.array(group, np.int64) for group in groups])))
        return functional.normalize(made[back.to(made.device)], dim=1)

    def prompt(self, item: Item) -> str:
        """What the model reads for an item; the picture's place is marked."""
        if item.image is None:
            return self.family.turn.format(TEXT.format(item.text.strip()))
        asked = BOTH.format(item.text.strip()) if item.text.strip() else PICTURE
        return self.family.turn.format(f"{self.family.picture}\n{asked}")

    def _last(self, items: Sequence[Item]) -> Tensor:
        """(B, D) hidden states behind the last token, of items that all have a picture or all have none."""
        prompts = [self.prompt(item) for item in items]
        if items[0].image is None:
            given = self._tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        else:
            pictures = [pixels(item.image).convert("RGB") for item in items if item.image is not None]
            given = self.processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
        inputs = {name: value.to(self.device) for name, value in given.items() if isinstance(value, Tensor)}
        states: Tensor = self.module(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
        return states[:, -1].float()

    # ---- learning

    def adapt(self, rank: int = 16, alpha: int = 32, dropout: float = 0.05) -> None:
        """Freeze the model and put LoRA beside the linear layers of its language part: `module` is what learns.

        Raises InputError where it has no layer of the names that are known.
        """
        from peft import LoraConfig, get_peft_model

        where = rf"^{self.family.language}\.{LINEAR}$"
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=where)
        with adapting():
            self.module = get_peft_model(self.module, config).to(self.device)

    def save(self, folder: Path) -> None:
        """What LoRA learned, as safetensors that `multimodal_encoder` takes. Raises BackendError on a full disk."""
        module: Any = self.module
        folder_made(folder)
        with refusing(folder):
            module.save_pretrained(str(folder), safe_serialization=True)


@contextmanager
def adapting() -> Iterator[None]:
    """What peft says of layers that are not there, as ours."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"LoRA does not fit this model: {' '.join(str(error).split())[:200]}") from error


def multimodal_encoder(name: str, cache: Path, adapter: Path | None = None) -> Multimodal:
    """The model of that name or path, from files alone; no code of its own is run.

    adapter: a folder that `Multimodal.save` wrote.
    Raises InputError for a family that is not among `FAMILIES` and for a model or an adapter that cannot be loaded.
    """
    import transformers

    folder = found(name)
    kind = configuration(folder / "config.json", name).get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise InputError(f"{name!r} is of the family {kind!r}; known are {', '.join(FAMILIES)}")
    key = Digests(cache).files(model_files(folder, name), {"kind": "multimodal"})
    precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with loading(name, family.name):
        made: Any = getattr(transformers, family.name).from_pretrained(
            str(folder), local_files_only=True, dtype=precision, trust_remote_code=False
        )
        reader: Any = transformers.AutoProcessor if family.picture else transformers.AutoTokenizer
        processor = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    encoder = Multimodal(made.model.eval(), processor, family, key)  # without the head that names tokens
    if adapter is not None:
        _load_adapter(encoder, adapter, Digests(cache))
    return encoder


def _load_adapter(encoder: Multimodal, folder: Path, digests: Digests) -> None:
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds no adapter: give a folder that training wrote")
    key = digests.files(model_files(folder, folder.name), {"kind": "adapter"})
    with loading(folder.name, "LoRA"), adapting():
        module: Any = encoder.module
        encoder.module = PeftModel.from_pretrained(module, str(folder)).eval().to(encoder.device)
    encoder.digests = {side: digest([value, key]) for side, value in encoder.digests.items()}
