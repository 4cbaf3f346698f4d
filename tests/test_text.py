"""Text towers: the packaged MiniLM, and any other sentence-transformers model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders import text
from encoders.text import Text, packaged, text_encoder
from retrieval.errors import InputError
from retrieval.types import Item

SENTENCES = [
    "Effusion",
    "Heart size is enlarged. No focal consolidation, pleural effusion or pneumothorax.",
    "  leading blanks, UPPER case, naïve café  ",
    "word " * 400,
    "",
    "the left lung is clear " * 12,
]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "query",
    "passage",
    ":",
    "left",
    "lung",
    "effusion",
    "clear",
    ".",
]


def items(texts: list[str]) -> list[Item]:
    return [Item(text=text) for text in texts]


def tiny_bert(folder: Path) -> dict[str, Any]:
    """A tokenizer of thirteen words and a BERT of two small layers, saved where transformers finds them."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **special)  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    return {
        "config": BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model with prompts, pooled at its first token."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("tiny")
    BertModel(**tiny_bert(folder / "bert")).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"), max_seq_length=16)
    model = SentenceTransformer(
        modules=[body, Pooling(32, pooling_mode="cls")], prompts={"query": "query: ", "document": "passage: "}
    )
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "encoders"  # one for all tests of encoders: MiniLM is converted once


@pytest.fixture(scope="module")
def minilm(cache: Path) -> Text:
    return text_encoder(None, cache)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_packaged_model_gives_what_sentence_transformers_gives(minilm: Text) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(packaged()), device="cpu")
    wanted = plain.encode(SENTENCES, normalize_embeddings=True)
    for ours in (minilm.encode_documents(items(SENTENCES)), minilm.encode_queries(items(SENTENCES))):
        assert ours.shape == (len(SENTENCES), minilm.dim) == (6, 384)
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
        assert (ours * wanted).sum(1).min() > 0.9999


def test_a_text_has_one_vector_alone_or_among_others(minilm: Text) -> None:
    many = items([f"finding {n} in the left lung, " * (n % 23 + 1) for n in range(150)])
    together = minilm.encode_documents(many)
    alone = np.concatenate([minilm.encode_queries([item]) for item in many[::29]])
    np.testing.assert_allclose(together[::29], alone, atol=2e-5)


def test_nothing_to_encode_gives_no_rows(minilm: Text) -> None:
    assert minilm.encode_queries([]).shape == (0, 384)


def test_texts_are_handled_and_pictures_and_blanks_are_not(minilm: Text) -> None:
    assert [minilm.handles(i) for i in (Item(text="x"), Item(text=" \n"), Item(image=b"x"))] == [True, False, False]


def test_the_packaged_model_answers_to_its_names(minilm: Text, cache: Path) -> None:
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", str(packaged())):
        assert text_encoder(name, cache).digests == minilm.digests


def test_prompts_pooling_and_truncation_are_the_models_own(tiny: Path, cache: Path) -> None:
    from sentence_transformers import SentenceTransformer

    plain, ours = SentenceTransformer(str(tiny), device="cpu"), text_encoder(str(tiny), cache)
    texts = ["left lung clear .", "effusion", "effusion left " * 20]
    queries, documents = ours.encode_queries(items(texts)), ours.encode_documents(items(texts))
    assert (queries * plain.encode_query(texts, normalize_embeddings=True)).sum(1).min() > 0.9999
    assert (documents * plain.encode_document(texts, normalize_embeddings=True)).sum(1).min() > 0.9999
    assert (queries * documents).sum(1).min() < 0.999  # the prompts differ, and it shows


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config_sentence_transformers.json", {"prompts": {"query": "clear: ", "document": ""}}),
        ("1_Pooling/config.json", {"pooling_mode": "mean"}),
    ],
)
def test_what_changes_a_vector_changes_the_digest(
    tiny: Path, cache: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    assert text_encoder(str(other), cache).digests == text_encoder(str(tiny), cache).digests
    held = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(held | change))
    assert text_encoder(str(other), cache).digests != text_encoder(str(tiny), cache).digests


def test_a_prompt_that_pooling_leaves_out_is_refused(tiny: Path, cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    file = other / "1_Pooling" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_mode": "mean", "include_prompt": False}))
    with pytest.raises(InputError, match="treats queries or documents"):
        text_encoder(str(other), cache)


@pytest.mark.parametrize(
    "name", ["no-such-model", "nobody/no-such-model", "./no/such/folder", "/no/such/folder", "a b"]
)
def test_an_unknown_name_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        text_encoder(name, tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        text_encoder(str(tmp_path), tmp_path)


def test_damaged_weights_are_refused_in_one_sentence(tiny: Path, cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot be loaded as a sentence-transformers model") as caught:
        text_encoder(str(other), cache)
    assert "\n" not in str(caught.value)


def test_a_model_that_brings_code_is_refused(tiny: Path, cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    modules = json.loads((other / "modules.json").read_text())
    modules[0]["type"] = "stranger.Code"
    (other / "modules.json").write_text(json.dumps(modules))
    (other / "stranger.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="cannot be loaded"):
        text_encoder(str(other), cache)


def test_the_hub_is_asked_only_where_it_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, bool]] = []

    def snapshot(name: str, local_files_only: bool, **_: Any) -> str:
        asked.append((name, local_files_only))
        raise OSError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for set_to, wanted in (("1", [True]), ("0", [True, False])):
        monkeypatch.setenv("HF_HUB_OFFLINE", set_to)
        asked.clear()
        with pytest.raises(InputError, match="unknown model"):
            text_encoder("somebody/model", tmp_path)
        assert asked == [("somebody/model", local) for local in wanted]


def test_the_probes_hold_a_text_longer_than_any_model_here_reads() -> None:
    assert len(text.PROBES[3].split()) > 512
