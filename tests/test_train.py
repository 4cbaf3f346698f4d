from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from encoders import film
from encoders import train as training
from encoders.film import Shards, build, decided, learned_from
from encoders.joined import Joined, middle, turn
from encoders.lesson import Lesson, Texts, augmented
from encoders.packed import pack
from encoders.recipe import Augment, Pace, Recipe, Tower, Turn, read
from encoders.studies import is_held_out, read_studies, said
from retrieval.errors import BackendError, InputError
from retrieval.types import Assertion, Finding, Progress
from tests.fakes import HashingEncoder, WordLinker

_RECIPE = """
templates = ["{}", "film with {}"]
[data]
source = "tiny"
lateral = 0.2
balance = 0.5
[tower]
name = "test_resnet"
size = 48
[schedule]
epochs = [3]
batch = 8
shards = 2
seed = 3
size_from = 32
size_grown = 0.6
[[findings]]
name = "square"
phrases = ["bright square", "square"]
concepts = ["square"]
[[findings]]
name = "line"
phrases = ["line"]
concepts = ["line", "stripe"]
"""
_TURN = """
[turn]
share = 0.5
middle = 0.3
"""


def _quiet(phase: str, done: int, total: int | None) -> None:
    pass


def train(recipe: Path, out: Path | None, progress: Progress) -> Path:
    return training.train(recipe, out, progress, HashingEncoder(dim=24), WordLinker(["square", "line"]))


def _film(path: Path, square: bool) -> None:
    grey = np.full((60, 60), 90, np.uint8)
    if square:
        grey[15:40, 15:40] = 220
    else:
        grey[28:31] = 250
    Image.fromarray(grey).save(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the collection `tiny`: 20 studies, half with a square, half with a line; the recipe beside it."""
    images = tmp_path / "tiny" / "images"
    images.mkdir(parents=True)
    rows = []
    for number in range(20):
        square = number % 2 == 0
        names = [f"images/{number}-{side}.png" for side in ("Frontal", "Lateral")]
        for name in names:
            _film(tmp_path / "tiny" / name, square)
        rows.append({
            "uid": f"S{number}",
            "findings": "Bright square. No line." if square else "A line. No square.",
            "impression": f"Study {'alpha' if square else 'beta'} {number // 4}.",
            "images": [{"file": n, "projection": s} for n, s in zip(names, ("Frontal", "Lateral"), strict=True)],
        })  # fmt: skip
    (tmp_path / "tiny" / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(_RECIPE)
    monkeypatch.setenv("LIGHTBOX_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_makes_weights_a_config_and_a_lineage(place: Path) -> None:
    folder = train(place / "recipe.toml", None, _quiet)
    assert folder == Path("runs/recipe")
    config = json.loads((folder / "config.json").read_text())
    assert config["tower"] == "timm/test_resnet"
    assert (config["size"], config["channels"], config["dim"]) == (48, 1, 24)
    assert config["text_digest"] == "hashing-text"
    weights = load_file(folder / "model.safetensors")
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float16}
    Joined([build(Tower(name="test_resnet", size=48), 24)], 24).load_state_dict(weights)
    lineage = json.loads((folder / "lineage.json").read_text())
    (member,) = lineage["members"]
    assert lineage["recipe"]["schedule"]["seed"] == member["seed"] == 3
    assert [epoch["size"] for epoch in member["epochs"]] == [32, 32, 48]
    assert lineage["affirmed"]["square"] == len([s for s in range(0, 20, 2) if not is_held_out(f"S{s}")])
    assert len(lineage["data_digest"]) == 64


def test_shards_give_the_gradient_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    batch, wanted = torch.randn(6, 1, 3, 3), torch.randn(6, 4)
    whole = torch.autograd.grad(((tower(batch) - wanted) ** 2).sum(), list(tower.parameters()))
    shards = Shards(tower, 3, torch.float32)
    outputs = shards.forward(batch)
    torch.testing.assert_close(outputs, tower(batch))
    ((outputs - wanted) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    shards.backward(outputs)
    for parameter, gradient in zip(tower.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_interrupted_run_ends_as_if_it_had_not_been(place: Path) -> None:
    whole = load_file(train(place / "recipe.toml", place / "whole", _quiet) / "model.safetensors")
    assert _gone_on(place, "epoch 3", whole) == {"epoch 3 of 3"}


def _gone_on(place: Path, stop_at: str, whole: dict[str, torch.Tensor]) -> set[str]:
    """The epochs that a run needs after it was stopped in a phase, to give the weights of one that was not."""

    def stop(phase: str, done: int, total: int | None) -> None:
        if phase.startswith(stop_at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(place / "recipe.toml", place / "halted", stop)
    assert not (place / "halted" / "model.safetensors").exists()
    phases: list[str] = []
    train(place / "recipe.toml", place / "halted", lambda phase, done, total: phases.append(phase))
    for name, value in load_file(place / "halted" / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name
    return {phase for phase in phases if "epoch" in phase}


def test_members_differ_by_seed_and_go_on_where_they_were_stopped(place: Path) -> None:
    (place / "recipe.toml").write_text(_RECIPE.replace("size = 48", "size = 48\nmembers = 2", 1) + _TURN)
    whole = load_file(train(place / "recipe.toml", place / "whole", _quiet) / "model.safetensors")
    seeds = [member["seed"] for member in json.loads((place / "whole" / "lineage.json").read_text())["members"]]
    assert seeds == [6, 7]
    towers = [{n[9:]: v for n, v in whole.items() if n.startswith(f"towers.{m}.")} for m in (0, 1)]
    assert not torch.equal(towers[0]["fc.weight"], towers[1]["fc.weight"])
    assert not torch.equal(whole["turn.weight"], torch.eye(24).half())
    assert 0 < whole["middle"].norm() < 0.3
    later = {f"member 2 of 2, epoch {n} of 3" for n in (2, 3)}
    assert _gone_on(place, "member 2 of 2, epoch 2", whole) == later


def test_a_tower_gives_the_mean_of_its_members_turned() -> None:
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Flatten(), nn.Linear(9, 4)) for _ in range(3)]
    joined, films = Joined(towers, 4), torch.randn(5, 1, 3, 3)
    units = [nn.functional.normalize(tower(films), dim=1) for tower in towers]
    mean = nn.functional.normalize(units[0] + units[1] + units[2], dim=1)
    torch.testing.assert_close(joined(films), mean @ joined.turn.weight.T)


def test_the_middle_of_films_is_a_share_of_the_mean_of_their_unit_vectors() -> None:
    films = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    torch.testing.assert_close(middle(films, 0.4), torch.tensor([0.2, 0.2]))
    assert not middle(films, 0.0).any()


def test_films_turn_towards_texts_that_speak_of_their_findings() -> None:
    """Films know two findings faintly, beside much that is their own; texts lie along directions of their own."""
    draw = torch.Generator().manual_seed(0)
    states = (torch.rand(200, 2, generator=draw) < 0.3).to(torch.int8)
    told = torch.nn.functional.normalize(torch.randn(3, 12, generator=draw), dim=1)  # of normal, first, second finding
    spoken = torch.cat([(states.sum(1, keepdim=True) == 0).float(), states.float()], 1) @ told
    reports = nn.functional.normalize(spoken + 0.05 * torch.randn(200, 12, generator=draw), dim=1)
    faint = torch.randn(2, 12, generator=draw)
    films = nn.functional.normalize(0.3 * states.float() @ faint + torch.randn(200, 12, generator=draw), dim=1)
    phrases = [told[1:2], told[2:3]]
    number, none = np.arange(200), np.zeros(0, bool)
    texts = Texts(reports, torch.from_numpy(number), torch.zeros(0, 12), [], none, phrases, states)
    lesson = Lesson(np.zeros((200, 1, 1), np.uint8), number, np.full(200, 1 / 200), np.ones(200, bool), texts)

    def told_apart(vectors: torch.Tensor) -> list[float]:
        scores = [nn.functional.normalize(vectors, dim=1) @ phrase[0] for phrase in phrases]
        return [float(s[states[:, f] == 1].mean() - s[states[:, f] == 0].mean()) for f, s in enumerate(scores)]

    assert torch.equal(turn(lesson, films, Turn()), torch.eye(12))
    turned = films @ turn(lesson, films, Turn(share=1.0)).T
    for before, after in zip(told_apart(films), told_apart(turned), strict=True):
        assert after > before + 0.1
    states[:] = 0  # a finding that nobody has pulls nowhere
    assert torch.equal(turn(lesson, films, Turn(share=1.0)), torch.eye(12))


def _stopped(place: Path) -> Path:
    """A folder with the checkpoint of a run that was stopped in its second epoch."""

    def stop(phase: str, done: int, total: int | None) -> None:
        if phase.startswith("epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(place / "recipe.toml", place / "out", stop)
    return place / "out"


def test_a_run_of_another_recipe_is_not_continued(place: Path) -> None:
    folder = _stopped(place)
    (place / "recipe.toml").write_text(_RECIPE.replace("seed = 3", "seed = 4"))
    with pytest.raises(InputError, match="another recipe"):
        train(place / "recipe.toml", folder, _quiet)


def test_a_damaged_checkpoint_is_named(place: Path) -> None:
    folder = _stopped(place)
    (folder / "member-0" / "checkpoint.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no readable safetensors"):
        train(place / "recipe.toml", folder, _quiet)


def test_a_finished_run_is_not_repeated_and_leaves_no_checkpoint(place: Path) -> None:
    folder = train(place / "recipe.toml", place / "out", _quiet)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "curve.png",
        "lineage.json",
        "model.safetensors",
    ]
    phases: list[str] = []
    train(place / "recipe.toml", folder, lambda phase, done, total: phases.append(phase))
    assert not [p for p in phases if p.startswith("epoch")]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_saved(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(film, "symmetric", broken)
    with pytest.raises(BackendError, match=r"loss is nan in epoch 1: lower schedule\.rate"):
        train(place / "recipe.toml", place / "out", _quiet)
    assert not (place / "out" / "model.safetensors").exists()


def test_the_loss_falls(place: Path) -> None:
    (place / "recipe.toml").write_text(_RECIPE.replace("epochs = [3]", "epochs = [12, 12]\nrate = 3e-3"))
    lineage = json.loads((train(place / "recipe.toml", None, _quiet) / "lineage.json").read_text())
    epochs = lineage["members"][0]["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 48", "size = 48\nwidth = 3", r"unknown key tower\.width; known here: .*size"),
        ("[data]", "[date]", "unknown key date"),
        ("size = 48", "size = 48\nmembers = 0", r"tower\.members is 0; it must lie between 1 and 16"),
        ("size = 48", "size = 4", r"tower\.size is 4; it must lie between 32 and 512"),
        ("size = 48", "size = 48.5", r"tower\.size is 48\.5; needed is int"),
        ("epochs = [3]", "epochs = [true]", r"schedule\.epochs\[0\] is True; needed is int"),
        ("epochs = [3]", "epochs = []", r"schedule\.epochs must list one number or more"),
        ("epochs = [3]\n", "", r"schedule\.epochs is missing"),
        ("lateral = 0.2", "part = 'dev'", r"data\.part is 'dev'; it must be one of train, all"),
        ("size_from = 32", "size_from = 96", "size_from must be 0 or lie between"),
        ("size = 48", "size = 48\ndropout = 0.1", "would not be repeatable"),
        ("shards = 2", "shards = 3", r"shards must divide schedule\.batch"),
        ('concepts = ["line", "stripe"]', "concepts = []", r"findings\[1\]\.concepts is empty"),
        ('phrases = ["line"]', 'phrases = [""]', r"findings\[1\]\.phrases holds no phrase"),
        ('phrases = ["line"]', 'phrases = "line"', "a list is needed"),
        ('"film with {}"', '"film"', "must hold {} once"),
        ("seed = 3", "seed = 3\nrate = nan", "must lie between"),
        ("[data]", "[data", "not valid TOML"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key_and_what_it_may_hold(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "recipe.toml").write_text(_RECIPE.replace(old, new))
    with pytest.raises(InputError, match=message):
        read(tmp_path / "recipe.toml")


def test_a_recipe_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(_RECIPE + "\n[loss]\nreports = 0\nsentences = 0\nfindings = 0\n")
    with pytest.raises(InputError, match="nothing would be learned"):
        read(tmp_path / "recipe.toml")


def test_a_missing_recipe_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable recipe"):
        read(tmp_path / "none.toml")


def test_an_unknown_tower_is_the_callers_fault(place: Path) -> None:
    (place / "recipe.toml").write_text(_RECIPE.replace("test_resnet", "resnet_of_nobody"))
    with pytest.raises(InputError, match="timm knows no model 'resnet_of_nobody'"):
        train(place / "recipe.toml", None, _quiet)


def test_missing_data_is_said_with_what_to_set(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBOX_DATA", str(place / "nowhere"))
    with pytest.raises(InputError, match="set LIGHTBOX_DATA"):
        train(place / "recipe.toml", None, _quiet)


def test_a_missing_or_broken_film_is_named(place: Path) -> None:
    (place / "tiny" / "images" / "1-Frontal.png").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"1-Frontal\.png cannot be read"):
        train(place / "recipe.toml", None, _quiet)
    (place / "tiny" / "images" / "1-Frontal.png").unlink()
    with pytest.raises(InputError, match=r"1-Frontal\.png is missing"):
        train(place / "recipe.toml", None, _quiet)


def test_a_line_that_is_no_study_is_named_without_its_text(place: Path) -> None:
    with (place / "tiny" / "reports.jsonl").open("a") as opened:
        opened.write('{"secret": "text"}\n')
    with pytest.raises(InputError, match="line 21: not a study") as caught:
        train(place / "recipe.toml", None, _quiet)
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_the_machines_fault(place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be written"):
        train(place / "recipe.toml", place / "file" / "out", _quiet)


def test_the_held_out_fifth_never_trains(place: Path) -> None:
    parts = {part: {s.uid for s in read_studies(place / "tiny", part)} for part in ("train", "dev", "all")}
    assert parts["train"].isdisjoint(parts["dev"])
    assert parts["train"] | parts["dev"] == parts["all"]
    assert all(is_held_out(uid) for uid in parts["dev"])


def test_a_report_affirms_doubts_or_leaves_a_finding_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(_RECIPE)
    topics = read(tmp_path / "recipe.toml").findings
    square, doubt = Finding("square", Assertion.negated, (0, 1)), Finding("line", Assertion.uncertain, (2, 3))
    assert said([square, doubt], topics).tolist() == [0, -1]
    assert said([doubt, Finding("stripe", Assertion.affirmed, (4, 5))], topics).tolist() == [0, 1]
    assert said([], topics).tolist() == [0, 0]


def test_findings_need_a_linker(place: Path) -> None:
    with pytest.raises(InputError, match="a linker must be given"):
        training.train(place / "recipe.toml", None, _quiet, HashingEncoder(dim=24))


def test_a_finding_in_doubt_pulls_nowhere_and_a_rare_one_counts_more() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = decided(logits, torch.tensor([[1, -1], [0, 0]]), torch.tensor([4.0, 1.0]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx((4 + 1 + 1) * math.log(2) / 3)
    assert logits.grad is not None
    assert logits.grad.mul(3).tolist() == [[pytest.approx(-2.0), 0.0], [0.5, 0.5]]
    assert decided(logits, torch.full((2, 2), -1), torch.ones(2)).item() == 0


def test_a_packed_lesson_trains_where_the_collection_is_not(place: Path) -> None:
    plan, linker = read(place / "recipe.toml"), WordLinker(["square", "line"])
    taught, digests = learned_from(plan, place / "cache", _quiet, HashingEncoder(dim=24), linker)
    pack(place / "tiny.lesson", plan, taught, digests)
    (place / "tiny").rename(place / "elsewhere")
    found, told = learned_from(plan, place / "cache", _quiet)
    assert told == digests
    assert np.abs(found.films.astype(int) - taught.films).mean() < 8  # WebP
    assert torch.equal(found.texts.states, taught.texts.states)
    torch.testing.assert_close(found.texts.reports, taught.texts.reports, atol=1e-3, rtol=0)
    assert [list(s) for s in found.texts.said] == [list(s) for s in taught.texts.said]
    np.testing.assert_array_equal(found.draw, taught.draw)
    lineage = json.loads((training.train(place / "recipe.toml", None, _quiet) / "lineage.json").read_text())
    assert lineage["data_digest"] == digests["data"]
    (place / "recipe.toml").write_text(_RECIPE.replace('"line"]', '"line", "stripe"]'))
    with pytest.raises(InputError, match="packed for another recipe"):
        training.train(place / "recipe.toml", None, _quiet)


def _shipping(place: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]) -> None:
    """A package `some_weights` with these tensors."""
    (place / "some_weights").mkdir()
    torch.save(tensors, place / "some_weights" / "tower.pth")
    monkeypatch.syspath_prepend(str(place))


def test_a_tower_starts_from_the_weights_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    given = timm.create_model("test_resnet", num_classes=10).state_dict()
    _shipping(tmp_path, monkeypatch, {f"layer{n}": value for n, value in enumerate(given.values())})
    plan = Tower(name="test_resnet", size=48, start="some_weights")
    made = build(plan, 24).state_dict()
    first, *others = [name for name in given if not name.startswith("fc")]
    torch.testing.assert_close(made[first], given[first].sum(1, keepdim=True))
    assert all(torch.equal(made[name], given[name]) for name in others)
    assert made["fc.weight"].shape == (24, given["fc.weight"].shape[1])
    with pytest.raises(InputError, match="tensors, the tower"):
        build(dataclasses.replace(plan, name="test_vit"), 24)


def test_a_start_that_is_missing_or_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Tower(name="test_resnet", size=48, start="some_weights")
    with pytest.raises(InputError, match="install the package some-weights"):
        build(plan, 24)
    _shipping(tmp_path, monkeypatch, {})
    (tmp_path / "some_weights" / "tower.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        build(plan, 24)


@pytest.mark.parametrize("part", ["[augment]\nmix = 0.5", "[augment]\ncover = 0.5", "[loss]\nsoft = 0.4"])
def test_films_can_be_mixed_and_covered_and_targets_soft(place: Path, part: str) -> None:
    (place / "recipe.toml").write_text(_RECIPE.replace("[[findings]]", f"{part}\n[[findings]]", 1))
    once, again = (load_file(train(place / "recipe.toml", place / n, _quiet) / "model.safetensors") for n in "ab")
    assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_a_covered_film_has_a_grey_box() -> None:
    films = torch.ones(4, 1, 40, 40)
    still = Augment(zoom_low=1, zoom_high=1, shift=0, rotate=0, contrast=0, brightness=0, noise=0, cover=0.5)
    seen = augmented(films, 40, still)
    assert set(seen.mul(100).round().unique().tolist()) == {50, 100}
    assert (seen < 0.6).flatten(1).float().mean(1).max() <= 0.25


def test_a_film_is_only_resized_where_nothing_is_to_vary() -> None:
    still = Augment(zoom_low=1, zoom_high=1, shift=0, rotate=0, contrast=0, brightness=0, noise=0)
    film = torch.linspace(0, 1, 37).expand(1, 1, 37, 37)
    out = augmented(film, 32, still)
    assert out.shape == (1, 1, 32, 32)
    assert torch.all(out[0, 0, 5, 1:] > out[0, 0, 5, :-1])


def test_the_shipped_recipe_is_valid() -> None:
    recipe = read(Path(training.__file__).parent / "recipes" / "chest-film.toml")
    assert isinstance(recipe, Recipe)
    assert recipe.data.part == "train"
    assert random.Random(0).choice(recipe.findings).phrases


class Falling:
    """A course whose weight falls by its rate each step, and whose dev figures are given."""

    def __init__(self, pace: Pace, dev: list[float]) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.module.weight)
        self.pace, self.digests, self.steps, self.rows = pace, {"recipe": "falling"}, 2, 1
        self.dev, self.released = list(dev), 0.0

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        self.module.weight.grad = torch.ones(1, 1)
        return 1.0

    def settle(self) -> None:
        pass

    def judge(self) -> dict[str, float]:
        return {"dev": self.dev.pop(0)} if self.dev else {}

    def release(self, folder: Path) -> dict[str, object]:
        self.released = self.module.weight.item()
        return {}


def _run(course: Falling, folder: Path) -> list[dict[str, float]]:
    folder.mkdir()
    run = training.Run(course, folder, _quiet)
    run.to_the_end()
    return run.history


def test_the_epoch_that_is_best_on_dev_is_released_and_patience_ends_the_run(tmp_path: Path) -> None:
    pace = Pace(epochs=(9,), rate=0.01, warmup=0.0, weight_decay=0.0)
    last = Falling(pace, [])
    assert len(_run(last, tmp_path / "last")) == 9
    chosen = Falling(dataclasses.replace(pace, patience=2), [0.1, 0.5, 0.2, 0.3, 0.9])
    assert len(_run(chosen, tmp_path / "chosen")) == 4
    assert last.released < chosen.released < 1  # released as it was after the second epoch
    assert json.loads((tmp_path / "chosen" / "lineage.json").read_text())["best_epoch"] == 2


def test_averaged_weights_trail_the_latest_ones(tmp_path: Path) -> None:
    pace = Pace(epochs=(9,), rate=0.01, warmup=0.0, weight_decay=0.0)
    plain, averaged = Falling(pace, []), Falling(dataclasses.replace(pace, ema=0.9), [])
    _run(plain, tmp_path / "plain")
    _run(averaged, tmp_path / "averaged")
    assert plain.released < averaged.released < 1
    assert averaged.module.weight.item() == pytest.approx(plain.released, abs=1e-6)  # learning itself is the same


def test_two_processes_learn_from_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """What `torchrun` would start, over gloo: both end with the same weights."""
    script = (
        "import os, sys, torch\n"
        "from torch import nn, distributed\n"
        "from encoders.train import _processes, _share\n"
        "with _processes():\n"
        "    weight = nn.Parameter(torch.zeros(2))\n"
        "    weight.grad = torch.full((2,), float(distributed.get_rank()))\n"
        "    _share([weight])\n"
        "    assert weight.grad.tolist() == [0.5, 0.5], weight.grad\n"
    )
    port = str(20_000 + os.getpid() % 20_000)
    about = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", script], env=about | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]


PIECES = """
import random
import torch
from encoders.train import Freed, own_memory

freed, kept, most = Freed(), [], 0
random.seed(0)
for step in range(60):
    for group in range(10):
        held = [torch.empty(262_144 * random.choice([1, 4, 3])).fill_(1) for _ in range(4)]
        kept += [torch.empty(100).fill_(1) for _ in held]
    length, held = random.randint(36, 43), []
    for shape in (((80, length, 384),) * 6 + ((80, 12, length, length),) * 2 + ((80, length, 1_536),) * 3) * 3:
        held.append(torch.empty(shape).fill_(1))
        torch.empty(shape).fill_(0)
    del held
    freed.look()
    most = max(most, own_memory())
print(most)
"""


def test_steps_of_ever_other_sizes_do_not_fill_the_memory() -> None:
    """Without `Freed.look` this comes to 4 GB, and a real training came to 23."""
    child = [sys.executable, "-c", PIECES]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9
