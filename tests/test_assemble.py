from __future__ import annotations

import threading
from pathlib import Path

import pytest

from retrieval.errors import BackendError, InputError, Invalid
from server.assemble import Config, Models, lazily, shipped_weights
from server.backends import check_backend
from server.settings import Settings, load


def test_a_config_survives_json() -> None:
    config = Config(text_encoder="none", reranker="some/model", vector_index="hnsw")
    assert Config.of(config.json()) == config


def test_a_config_of_another_format_is_refused() -> None:
    with pytest.raises(BackendError, match="format: got 99, this version reads 1; index it again"):
        Config.of({"format": 99})


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tower").mkdir()
    (tmp_path / "chest").mkdir()  # a folder that happens to be called like the shipped ontology
    config = Config.given(text_encoder="tower", image_encoder="org/name", ontology="chest")
    assert config.text_encoder == str(tmp_path / "tower")
    assert config.image_encoder == "org/name"
    assert config.ontology == "chest"


def test_what_is_lazy_is_made_once_by_whoever_comes_first() -> None:
    made = []
    words = lazily(lambda: made.append(1) or ["a", "b"])  # type: ignore[func-returns-value]
    assert not made
    threads = [threading.Thread(target=lambda: words.index("b")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_an_error_of_a_lazy_part_is_raised_at_every_use() -> None:
    def fail() -> list[str]:
        raise BackendError("no weights")

    part = lazily(fail)
    for _ in range(2):
        with pytest.raises(BackendError, match="no weights"):
            part.index("a")


def test_assembling_loads_neither_linker_nor_reranker(tmp_path: Path) -> None:
    models = Models(Settings(home=tmp_path))
    config = Config(text_encoder="none", image_encoder="none", reranker="no/such", ontology="/no/such")
    parts = models.parts(config, shipped_weights())
    assert parts.linker is not None
    assert parts.scorer is not None
    assert parts.encoders == {}


def test_collections_share_what_they_load(tmp_path: Path) -> None:
    models = Models(Settings(home=tmp_path))
    assert models.linker(Config()) is models.linker(Config(vector_index="hnsw"))
    assert models.linker(Config()) is not models.linker(Config(ontology="other"))


def test_none_leaves_a_part_out(tmp_path: Path) -> None:
    models = Models(Settings(home=tmp_path))
    config = Config(ontology="none", reranker="none")
    assert models.linker(config) is None
    assert models.findings_score(None) is None
    assert models.scorer(config) is None


def test_shipped_weights_know_every_kind_of_query() -> None:
    weights = shipped_weights()
    assert set(weights) == {"text", "report", "picture"}
    for legs in weights.values():
        assert set(legs) == {"lexical", "dense", "image", "ontology"}
        assert sum(legs.values()) == pytest.approx(1.0)


def test_a_backend_that_there_is_not_is_refused() -> None:
    check_backend("embedded")
    check_backend("https://host:9200")
    with pytest.raises(Invalid, match="got 'elastic', expected 'embedded' or a URL"):
        check_backend("elastic")


KEY = "reader:read:" + "a" * 64


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LIGHTBOX_API_KEYS", f"{KEY}, boss:admin:{'b' * 64}")
    monkeypatch.setenv("LIGHTBOX_IMAGE_HOSTS", "images.example.org")
    settings = load()
    assert settings.collections == tmp_path / "home" / "collections"
    assert [(key.name, key.role) for key in settings.api_keys] == [("reader", "read"), ("boss", "admin")]
    assert settings.image_hosts == ("images.example.org",)
    assert load(home=tmp_path).home == tmp_path


@pytest.mark.parametrize("keys", ["reader", "reader:god:" + "a" * 64, "reader:read:secret", ":read:" + "a" * 64])
def test_a_wrong_key_is_refused_without_showing_it(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBOX_API_KEYS", keys)
    with pytest.raises(InputError, match="LIGHTBOX_API_KEYS: expected name:role:sha256hex") as error:
        load()
    assert keys.rpartition(":")[2] not in str(error.value)
