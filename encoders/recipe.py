"""Recipes: TOML files that say all that a training run depends on. Read strictly: what is unknown is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from retrieval.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Which films, by folder and part. A relative `source` lies under LIGHTBOX_DATA (default ../shared/data)."""

    source: str
    part: str = "train"  # a fifth of the studies, cut by a hash of the id, is kept for evaluation; "all" takes both
    lateral: float = 0.0  # share of lateral films among those drawn
    balance: float = 0.0  # 0 draws studies evenly, 1 as if every finding were as frequent as the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A timm model that reads one grey channel, and how a film becomes its input."""

    name: str
    size: int
    mean: float = 0.5
    std: float = 0.25
    dropout: float = 0.0
    skipped: float = 0.0  # share of the residual blocks that a film passes by (stochastic depth), at the last block
    start: str = ""  # a package that ships the tower's ImageNet weights; empty: the tower starts untrained
    members: int = 1  # towers that are trained, each from a seed of its own; a film's vector is the mean of theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long and how fast the loop of `encoders.train` goes, whatever it teaches."""

    epochs: tuple[int, ...]  # of each cycle; rate and size start over, the rate peaks at 0.7 of the cycle before
    batch: int = 128
    seed: int = 0
    rate: float = 1e-3
    warmup: float = 0.15  # share of the steps in which the rate rises
    weight_decay: float = 0.05
    clip: float = 5.0  # norm above which a step's gradient is scaled down
    ema: float = 0.0  # share of the averaged weights that a step keeps; 0 releases the latest weights
    patience: int = 0  # epochs without a better dev figure after which a run ends; 0 goes on
    precision: str = "auto"  # bfloat16 where the machine computes in it, float32 elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Pace):
    """An epoch draws as many films as there are frontal ones."""

    shards: int = 1  # parts of a batch that are computed side by side, each with batch statistics of its own
    size_from: int = 0  # side of the first epochs' films; 0 means full size throughout
    size_grown: float = 0.0  # share of the epochs by which the full size is reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """Random changes of a film, uniform in [-x, x] unless it says otherwise."""

    zoom_low: float = 0.85  # side of the crop as a share of the film's, drawn from [zoom_low, zoom_high]
    zoom_high: float = 1.05
    shift: float = 0.05  # how far a crop may reach over the film's edge, as a share of the side
    rotate: float = 7.0  # degrees
    contrast: float = 0.25
    brightness: float = 0.15
    noise: float = 0.03  # standard deviation, greys run from 0 to 1
    cover: float = 0.0  # side of a grey box over the film as a share of the film's, drawn from [0, cover]
    mix: float = 0.0  # two films of a batch shine through each other, in shares from Beta(mix, mix); 0: none do


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Weights of the terms: the first two are contrastive, the third decides on every finding by itself."""

    reports: float = 1.0  # film against whole reports
    sentences: float = 1.0  # film against single sentences
    findings: float = 1.0  # film against phrases of findings
    denial: float = 0.2  # how much a sentence that denies or states normality counts beside one that affirms
    temperature: float = 0.07  # where the three learned temperatures start
    rarity: float = 0.5  # a report with a finding counts (reports / reports with it) to this power; 0: all alike
    soft: float = 0.0  # share of a film's target that goes to reports as they are alike in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """How the trained vectors are turned towards the findings: see `encoders.joined`."""

    share: float = 0.0  # of the findings beside what the members give; 0 leaves it as it is
    shrink: float = 1.0  # how much of a sphere the films' covariance is made
    middle: float = 0.0  # how much of the films' mean is taken from a picture that asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A finding: the phrases that ask for it, and the linker's concepts of which a report that has it names one."""

    name: str
    phrases: tuple[str, ...]
    concepts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Digested:
    """A recipe of whatever kind: it is known by its values."""

    @property
    def digest(self) -> str:
        """sha256 of the values, whatever the order and comments of the file."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Digested):
    data: Data
    tower: Tower
    schedule: Schedule
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    turn: Turn = field(default_factory=Turn)
    findings: tuple[Topic, ...] = ()
    templates: tuple[str, ...] = ("{}",)  # how a phrase may be put; {} is the phrase
    kind: str = "film"


class Limits(NamedTuple):
    """What values a recipe may hold, by dotted name."""

    ranges: Mapping[str, tuple[float, float]]
    choices: Mapping[str, tuple[str, ...]]


PACE = Limits(
    {
        "schedule.batch": (2, 65_536), "schedule.seed": (0, 2**31), "schedule.rate": (1e-7, 1),
        "schedule.warmup": (0, 0.9), "schedule.weight_decay": (0, 1), "schedule.clip": (1e-3, 1e6),
        "schedule.ema": (0, 0.99999), "schedule.patience": (0, 10_000),
    },
    {"schedule.precision": ("auto", "float32", "bfloat16")},
)  # fmt: skip
_RANGES: Mapping[str, tuple[float, float]] = {
    **PACE.ranges,
    "data.lateral": (0, 0.9), "data.balance": (0, 1),
    "tower.size": (32, 512), "tower.mean": (0, 1), "tower.std": (0.01, 1), "tower.dropout": (0, 0.9),
    "tower.skipped": (0, 0.9), "tower.members": (1, 16),
    "schedule.shards": (1, 64),
    "schedule.size_from": (0, 512), "schedule.size_grown": (0, 1),
    "augment.zoom_low": (0.3, 1.5), "augment.zoom_high": (0.3, 1.5), "augment.shift": (0, 0.5),
    "augment.rotate": (0, 180), "augment.contrast": (0, 0.9), "augment.brightness": (0, 0.9), "augment.noise": (0, 1),
    "augment.cover": (0, 0.9), "augment.mix": (0, 10),
    "loss.reports": (0, 100), "loss.sentences": (0, 100), "loss.findings": (0, 100), "loss.denial": (0, 1),
    "loss.temperature": (0.01, 1), "loss.rarity": (0, 1), "loss.soft": (0, 0.9),
    "turn.share": (0, 10), "turn.shrink": (1e-3, 1e3), "turn.middle": (0, 1),
}  # fmt: skip
_CHOICES: Mapping[str, tuple[str, ...]] = {**PACE.choices, "data.part": ("train", "all"), "kind": ("film",)}


def read(path: Path) -> Recipe:
    """The film recipe in a TOML file. Raises InputError that names the key, what it holds and what it may hold."""
    recipe: Recipe = read_as(Recipe, path, Limits(_RANGES, _CHOICES))
    _check_together(recipe)
    return recipe


def kind_of(path: Path) -> str:
    """What a recipe makes: its `kind`, `film` where it names none."""
    return str(_table(path).get("kind", "film"))


def read_as(kind: type, path: Path, limits: Limits) -> Any:
    """The recipe in a TOML file as a `kind`, within `limits`. Raises InputError as `read` does."""
    recipe = _build(kind, _table(path), "", limits)
    check_epochs(recipe.schedule)
    return recipe


def check_epochs(pace: Pace) -> None:
    """Raises InputError where there is no cycle, or one without an epoch."""
    if not pace.epochs or min(pace.epochs) < 1:
        raise InputError("schedule.epochs must list one number or more, each 1 or more", "schedule.epochs")


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no readable recipe at {path}: give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path.name} is not valid TOML: {error}") from error


def _build(kind: type, table: Any, at: str, limits: Limits) -> Any:
    if not isinstance(table, dict):
        raise InputError(f"{at} holds {table!r}; a table is needed", at)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(fields)):
        raise InputError(f"unknown key {_join(at, unknown[0])}; known here: {', '.join(sorted(fields))}", unknown[0])
    missing = [
        name for name, f in fields.items()
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise InputError(f"{_join(at, missing[0])} is missing from the recipe", missing[0])
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, _join(at, name), limits) for name, value in table.items()})


def _value(kind: Any, value: Any, at: str, limits: Limits) -> Any:
    if kind == tuple[Topic, ...]:
        return tuple(_topic(entry, f"{at}[{n}]", limits) for n, entry in enumerate(_list(value, at)))
    if kind in (tuple[str, ...], tuple[int, ...]):
        inner = str if kind == tuple[str, ...] else int
        return tuple(_value(inner, entry, f"{at}[{n}]", limits) for n, entry in enumerate(_list(value, at)))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, at, limits)  # type: ignore[arg-type]
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{at} is {value!r}; needed is {kind.__name__}", at)
    _check_value(value, at, limits)
    return kind(value)


def _check_value(value: Any, at: str, limits: Limits) -> None:
    low, high = limits.ranges.get(at, (float("-inf"), float("inf")))
    if not isinstance(value, str) and not low <= value <= high:
        raise InputError(f"{at} is {value}; it must lie between {low} and {high}", at)
    if at in limits.choices and value not in limits.choices[at]:
        raise InputError(f"{at} is {value!r}; it must be one of {', '.join(limits.choices[at])}", at)


def _topic(table: Any, at: str, limits: Limits) -> Topic:
    topic: Topic = _build(Topic, table, at, limits)
    if not topic.phrases or not all(phrase.strip() for phrase in topic.phrases):
        raise InputError(f"{at}.phrases holds no phrase or an empty one", at)
    if not topic.concepts:
        raise InputError(f"{at}.concepts is empty; the concepts that a report with the finding names are needed", at)
    return topic


def _check_together(recipe: Recipe) -> None:
    loss, augment = recipe.loss, recipe.augment
    if loss.reports + loss.sentences + loss.findings == 0:
        raise InputError("loss.reports, loss.sentences and loss.findings are all 0; nothing would be learned", "loss")
    if loss.findings and not recipe.findings:
        raise InputError("loss.findings counts, but the recipe lists no [[findings]]", "findings")
    if not recipe.templates or any(template.count("{}") != 1 for template in recipe.templates):
        raise InputError("every one of templates must hold {} once, and there must be one", "templates")
    if augment.zoom_low > augment.zoom_high:
        raise InputError("augment.zoom_low is above augment.zoom_high", "augment.zoom_low")
    if recipe.schedule.batch % recipe.schedule.shards:
        raise InputError("schedule.shards must divide schedule.batch", "schedule.shards")
    if recipe.tower.dropout + recipe.tower.skipped and recipe.schedule.shards > 1:
        raise InputError(
            "tower.dropout or tower.skipped with schedule.shards above 1 would not be repeatable", "tower.dropout"
        )
    if recipe.schedule.size_from and not 32 <= recipe.schedule.size_from <= recipe.tower.size:
        raise InputError("schedule.size_from must be 0 or lie between 32 and tower.size", "schedule.size_from")


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{at} holds {value!r}; a list is needed", at)
    return value


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
