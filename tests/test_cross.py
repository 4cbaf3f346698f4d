"""Cross-encoders by path, built here: two small layers of BERT and one score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from encoders.cross import cross_encoder
from retrieval.errors import InputError
from retrieval.types import Document, Item
from tests.test_text import tiny_bert

DOCUMENTS = ["left lung clear .", "effusion", "", "effusion left lung " * 20] * 40


def saved(folder: Path, labels: int) -> Path:
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification

    how = tiny_bert(folder / "bert")
    how["config"].num_labels = labels
    BertForSequenceClassification(**how).save_pretrained(folder / "bert")
    CrossEncoder(str(folder / "bert"), max_length=16, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("cross"), 1)


def documents(texts: list[str]) -> list[Document]:
    return [Document(id=str(n), text=text) for n, text in enumerate(texts)]


def test_scores_are_those_of_sentence_transformers(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    ours = cross_encoder(str(tiny), tmp_path)
    wanted = CrossEncoder(str(tiny), device="cpu").predict([["left effusion", text] for text in DOCUMENTS])
    scores = ours.score(Item(text="left effusion"), documents(DOCUMENTS))
    assert scores.shape == (160,)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, wanted, atol=1e-3)
    assert np.ptp(wanted) > 0.02  # so that agreement says something
    few = ours.score(Item(text="left effusion"), documents(DOCUMENTS[:3]))
    np.testing.assert_allclose(few, scores[:3], atol=1e-5)


def test_a_title_is_read_with_the_text(tiny: Path, tmp_path: Path) -> None:
    ours = cross_encoder(str(tiny), tmp_path)
    titled = Document(id="a", title="left", text="effusion")
    plain = Document(id="b", text="left effusion")
    first, second = ours.score(Item(text="lung"), [titled, plain])
    assert first == pytest.approx(second)


def test_no_documents_give_no_scores_and_a_query_needs_words(tiny: Path, tmp_path: Path) -> None:
    ours = cross_encoder(str(tiny), tmp_path)
    assert ours.score(Item(text="lung"), []).shape == (0,)
    with pytest.raises(InputError, match="the query has none"):
        ours.score(Item(image=b"x"), documents(["lung"]))


def test_a_model_with_several_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives 3 scores a pair"):
        cross_encoder(str(saved(tmp_path, 3)), tmp_path / "cache")


def test_a_text_tower_is_refused_for_its_head_would_be_random(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = saved(tmp_path, 1)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(InputError, match="no head that scores a pair"):
        cross_encoder(str(folder), tmp_path / "cache")


def test_a_configuration_need_not_name_its_architecture(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert len(cross_encoder(str(folder), tmp_path / "cache").score(Item(text="lung"), documents(["effusion"]))) == 1


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="unknown model 'no-such-reranker'"):
        cross_encoder("no-such-reranker", tmp_path)
