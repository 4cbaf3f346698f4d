"""LLMs as embedders: tiny random models of the real classes, saved and loaded as a downloaded one would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.multimodal import Multimodal, multimodal_encoder
from encoders.unime import tdd_loss
from retrieval.errors import InputError
from retrieval.types import Item, Picture

SPECIAL = ["<pad>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TURNS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|image|>", "<|audio|>"]
WORDS = (
    "left lung clear effusion Summary above sentences in one word : image and USER ASSISTANT user assistant".split()
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def tokenizer(**more: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *TURNS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([*SPECIAL, *TURNS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=more
    )


def llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def llava(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    LlavaProcessor(
        images,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def qwen(folder: Path) -> None:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    Qwen2VLProcessor(images, tokenizer(), Qwen2VLVideoProcessor()).save_pretrained(folder)


def phi(folder: Path) -> None:
    from transformers import (
        Phi4MultimodalConfig,
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalForCausalLM,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
    )

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 448,  # its picture processor counts on 448 px and patches of 14
        "crop_size": 448,
        "patch_size": 14,
        "image_token_id": 13,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_blocks": 1,
        "num_attention_heads": 4,
        "ext_pw_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": 14,
    }
    config = Phi4MultimodalConfig(**SIZES, vision_config=vision, audio_config=audio)
    Phi4MultimodalForCausalLM(config).save_pretrained(folder)
    images = Phi4MultimodalImageProcessor(dynamic_hd=1)
    tokens = tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    Phi4MultimodalProcessor(images, Phi4MultimodalFeatureExtractor(), tokens).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folders = {}
    for make in (llama, llava, qwen, phi):
        folders[make.__name__] = tmp_path_factory.mktemp(make.__name__)
        make(folders[make.__name__])
    return folders


def picture(grey: int) -> Picture:
    shade = np.full((40, 40, 3), grey, np.uint8)
    shade[:20] = 255 - grey
    return Picture(str(grey), b"", Image.fromarray(shade), None)


def loaded(models: dict[str, Path], name: str, cache: Path, adapter: Path | None = None) -> Multimodal:
    return multimodal_encoder(str(models[name]), cache, adapter)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen", "phi"])
def test_a_text_is_read_at_its_last_token_whatever_stands_beside_it(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    encoder = loaded(models, name, tmp_path)
    long = Item(text="left lung clear effusion left lung clear")
    both = encoder.encode_documents([Item(text="lung"), long])
    alone = encoder.encode_queries([Item(text="lung")])
    assert both.shape == (2, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(both[0], alone[0], atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen", "phi"])
def test_pictures_texts_and_both_lie_in_one_space(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    encoder = loaded(models, name, tmp_path)
    items = [
        Item(image=picture(0)),
        Item(text="left lung"),
        Item(image=picture(0), text="left lung"),
        Item(image=picture(200)),
    ]
    vectors = encoder.encode_documents(items)
    assert vectors.shape == (4, encoder.dim)
    alone = np.concatenate([encoder.encode_documents([item]) for item in items])
    np.testing.assert_allclose(vectors, alone, atol=1e-4)
    assert all(np.abs(vectors[i] - vectors[j]).max() > 1e-5 for i in range(4) for j in range(i))
    assert set(encoder.digests) == {"text", "image"}
    assert encoder.digests["text"] != encoder.digests["image"]


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_lora_learns_a_teachers_similarities_and_comes_back_from_disk(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    encoder = loaded(models, name, tmp_path)
    encoder.adapt(rank=4, dropout=0.0)
    learning = [p for p in encoder.module.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in learning) < sum(p.numel() for p in encoder.module.parameters()) / 2
    assert not [n for n, p in encoder.module.named_parameters() if p.requires_grad and "vision" in n]
    texts = [Item(text=text) for text in ("left lung", "clear", "effusion lung", "left effusion")]
    teacher = torch.tensor([[9.0, 3, 0, 0], [3, 9, 0, 0], [0, 0, 9, 3], [0, 0, 3, 9]])
    optimiser = torch.optim.Adam(learning, 3e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        vectors = encoder.vectors(texts)
        loss = tdd_loss(20 * vectors @ vectors.T, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert min(losses) < losses[0] / 2
    encoder.save(tmp_path / "adapter")
    again = loaded(models, name, tmp_path, tmp_path / "adapter")
    np.testing.assert_allclose(again.encode_queries(texts), encoder.encode_queries(texts), atol=1e-4)
    assert again.digests["text"] != encoder.digests["text"]
    assert not list((tmp_path / "adapter").rglob("*.bin"))


def test_what_cannot_be_read_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    encoder = loaded(models, "llama", tmp_path)
    assert not encoder.handles(Item(text=" "))
    assert not encoder.handles(Item(image=picture(0)))
    assert encoder.encode_queries([]).shape == (0, encoder.dim)
    with pytest.raises(InputError, match="nothing that this model reads"):
        encoder.vectors([Item(image=picture(0))])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(InputError, match=r"of the family 't5'; known are llava"):
        multimodal_encoder(str(tmp_path / "other"), tmp_path)
    with pytest.raises(InputError, match="holds no adapter"):
        loaded(models, "llama", tmp_path, tmp_path / "other")


# ---- UniME as a recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Collections `notes` of texts and `films` of pictures with texts."""
    draw = np.random.default_rng(0)
    for name in ("notes", "films"):
        rows = []
        for n in range(24):
            text = " ".join(draw.choice(["left", "lung", "clear", "effusion"], 5)) + f" {n} ."
            row = {"_id": f"d{n}", "text": text}
            if name == "films":
                (tmp_path / name / "images").mkdir(parents=True, exist_ok=True)
                row["image"] = f"images/{n}.png"
                Image.fromarray(np.full((30, 30), 10 * n, np.uint8)).save(tmp_path / name / "images" / f"{n}.png")
            rows.append(json.dumps(row))
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("LIGHTBOX_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("encoders.cut_course.HELD_OUT", 8)
    monkeypatch.setattr("encoders.unime_course.HELD_OUT", 8)
    return tmp_path


def unime(place: Path, models: dict[str, Path], student: str, pairs: str = "", epochs: str = "[4]") -> Path:
    path = place / "unime.toml"
    path.write_text(
        f'kind = "unime"\nteacher = "{models["llama"]}"\n[data]\nsources = ["notes"]\n{pairs}\n'
        f'[student]\nbase = "{models[student]}"\nrank = 4\ndropout = 0.0\n[loss]\nk = 2\n'
        f"[schedule]\nepochs = {epochs}\nbatch = 4\nrate = 3e-2\nwarmup = 0.1\n"
    )
    return path


def quiet(phase: str, done: int, total: int | None) -> None:
    pass


def test_stage_one_nears_the_teachers_similarities(place: Path, models: dict[str, Path]) -> None:
    from encoders.train import train

    folder = train(unime(place, models, "llama"), place / "out", quiet)
    told = json.loads((folder / "lineage.json").read_text())
    figures = [epoch["dev"] for epoch in told["epochs"]]
    assert max(figures[1:]) > figures[0]
    assert {"data_digest", "base_digest", "teacher_digest"} <= set(told)
    again = multimodal_encoder(str(models["llama"]), place / "cache", folder)
    assert again.encode_queries([Item(text="left lung")]).shape == (1, 32)
    assert not (folder / "checkpoint.safetensors").exists()


def test_stage_two_follows_on_pictures_with_their_texts(place: Path, models: dict[str, Path]) -> None:
    from encoders.train import train

    path = unime(place, models, "llava", 'pairs = ["films"]', "[1, 1]")
    folder = train(path, place / "out", quiet)
    told = json.loads((folder / "lineage.json").read_text())
    assert [epoch["stage"] for epoch in told["epochs"]] == [1, 2]
    assert told["pairs"] == 24
    assert told["family"] == "LlavaForConditionalGeneration"


def test_the_shipped_recipe_is_valid_and_its_students_family_is_known() -> None:
    from encoders import unime_course
    from encoders.multimodal import FAMILIES

    plan = unime_course.read_unime(Path(unime_course.__file__).parent / "recipes" / "unime-qwen.toml")
    assert len(plan.schedule.epochs) == 2
    assert FAMILIES["qwen2_vl"].picture


def test_a_sentence_transformers_model_teaches_as_itself(place: Path, models: dict[str, Path]) -> None:
    from encoders.text import Text
    from encoders.unime_course import teacher_of

    assert isinstance(teacher_of("all-MiniLM-L6-v2", place / "cache"), Text)
    assert isinstance(teacher_of(str(models["llama"]), place / "cache"), Multimodal)


@pytest.mark.parametrize(
    ("student", "pairs", "epochs", "message"),
    [
        ("llava", 'pairs = ["films"]', "[1]", "give pairs and two cycles, or neither"),
        ("llava", "", "[1, 1]", "give pairs and two cycles, or neither"),
        ("llama", 'pairs = ["films"]', "[1, 1]", "sees no pictures"),
        ("llava", 'pairs = ["notes"]', "[1, 1]", "data.pairs hold 0 documents"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(
    place: Path, models: dict[str, Path], student: str, pairs: str, epochs: str, message: str
) -> None:
    from encoders.train import train

    with pytest.raises(InputError, match=message):
        train(unime(place, models, student, pairs, epochs), place / "out", quiet)
