"""The only place that names concrete classes: a collection's config to its encoders, linker, reranker, index, engine.

Everything loads on first use, so that a search pays for what it needs and nothing else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import numpy as np

from retrieval.engine import Parts, Wordings
from retrieval.errors import BackendError
from retrieval.ingest import Ingest
from retrieval.types import (
    Encoder,
    FindingsScore,
    ImageSource,
    Item,
    Likeness,
    Linker,
    Matrix,
    Picture,
    Prepare,
    Scorer,
    SpaceInfo,
)  # fmt: skip
from server.backends import Backend, Held, backend_of
from server.settings import Settings

if TYPE_CHECKING:
    from indexers.queries import Ask

T = TypeVar("T")
NONE = "none"  # the name that leaves a part out
SHIPPED = {NONE, "chest", "chest-film"}  # names, also where a file is called so
FORMAT = 1
SHIPPED_WEIGHTS = Path(__file__).with_name("weights.json")

Weights = Mapping[str, Mapping[str, float]]  # kind of query -> leg -> weight


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a collection is made with. It is kept with every generation, as JSON.

    None is what Lightbox ships: the packaged MiniLM, the chest-film tower, no reranker, the ontology `chest`.
    """

    text_encoder: str | None = None
    image_encoder: str | None = None
    reranker: str | None = None
    ontology: str | None = None
    frames: Literal["middle", "all"] = "middle"
    vector_index: str = "flat"

    def json(self) -> dict[str, Any]:
        """The JSON object that `of` reads."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Config:
        """Raises BackendError for a collection that another version of Lightbox made."""
        if kept.get("format") != FORMAT:
            raise BackendError(
                f"collection format: got {kept.get('format')}, this version reads {FORMAT}; index it again"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in kept.items() if name in known})

    @classmethod
    def given(
        cls,
        text_encoder: str | None = None,
        image_encoder: str | None = None,
        reranker: str | None = None,
        ontology: str | None = None,
        **plain: Any,
    ) -> Config:
        """From what a user typed: local paths become absolute, so that the collection opens from anywhere."""
        return cls(
            text_encoder=_settled(text_encoder),
            image_encoder=_settled(image_encoder),
            reranker=_settled(reranker),
            ontology=_settled(ontology),
            **plain,
        )


class Models:
    """The towers, linkers and rerankers of one process, each loaded once and shared by all collections."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._made: dict[tuple[str | None, ...], Any] = {}
        self._lock = threading.RLock()

    def backend(self, folder: Path, asked: str | None = None, config: Config | None = None) -> Backend:
        """Where the collection in `folder` lives, or is to live. config: what it is about to be built with."""
        return backend_of(folder, self.settings, asked, None if config is None else self.ask(config))

    def ask(self, config: Config) -> Ask:
        """Makes (Q, D) queries in a space of a collection, of texts or of pictures' stored vectors."""

        def ask(space: str, asked: Sequence[str] | Matrix) -> Matrix | None:
            encoder = self.encoders(config)[0].get(space)
            if encoder is None:
                return None
            if isinstance(asked, np.ndarray):
                return encoder.as_queries("image", asked)
            items = [Item(text=text) for text in asked]
            return encoder.encode_queries(items) if items and all(map(encoder.handles, items)) else None

        return ask

    def index(self, folder: Path) -> Held:
        """The index of the collection in `folder`. Raises NotFound where nothing was published."""
        return self.backend(folder).open()

    def published(self, folder: Path) -> bool:
        """True where a search could start: there is a published generation, whatever its state."""
        return self.backend(folder).published()

    def parts(self, config: Config, weights: Weights) -> Parts:
        """What a collection of this config is assembled from."""
        encoders, image_space = self.encoders(config)
        linker = self.linker(config)
        read = self.reader(config)
        return Parts(
            encoders=encoders,
            image_space=image_space,
            read_picture=read,
            prepare=lazily(lambda: cast(Prepare, Ingest(list(encoders.values()), linker, read))),
            weights=weights,
            linker=linker,
            findings_score=self.findings_score(linker),
            scorer=self.scorer(config),
            wordings=self.wordings(encoders.get(image_space or ""), linker),
        )

    def wordings(self, encoder: Encoder | None, linker: Linker | None) -> Wordings | None:
        """What asks pictures in all wordings that the ontology has for a finding; None where there is no ontology."""
        if encoder is None or linker is None:
            return None

        def load() -> Wordings:
            from encoders.prompts import Prompts
            from ontology.wordings import wordings

            return Prompts(encoder, wordings(cast(Any, linker)))

        return lazily(load)

    def encoders(self, config: Config) -> tuple[dict[str, Encoder], str | None]:
        """Space -> encoder, and the space that `image` searches."""
        text = None if config.text_encoder == NONE else self._text(config.text_encoder)
        encoders = {text.space: text} if text else {}
        if config.image_encoder == NONE:
            return encoders, None
        image = self._image(config.image_encoder, config.text_encoder, text)
        return encoders | {image.space: image}, image.space

    def spaces(self, config: Config) -> dict[str, SpaceInfo]:
        """What the index is told of the spaces."""
        encoders, _ = self.encoders(config)
        return {space: SpaceInfo(space, encoder.dim, encoder.digests) for space, encoder in encoders.items()}

    def linker(self, config: Config) -> Linker | None:
        """What reads findings, None where the collection goes without an ontology."""
        if config.ontology == NONE:
            return None

        def load() -> Linker:
            from ontology.linker import load_linker

            return load_linker(config.ontology, self.settings.caches)

        return self._once(("linker", config.ontology), lambda: lazily(load))

    def scorer(self, config: Config) -> Scorer | None:
        """The reranker, None where the collection has none."""
        name = config.reranker
        if name is None or name == NONE:
            return None

        def load() -> Scorer:
            from encoders.cross import cross_encoder

            return cross_encoder(name, self.settings.caches)

        return self._once(("scorer", name), lambda: lazily(load))

    def _text(self, name: str | None) -> Encoder:
        def load() -> Encoder:
            from encoders.text import text_encoder

            return text_encoder(name, self.settings.caches)

        return self._once(("text", name), load)

    def _image(self, name: str | None, text_name: str | None, text: Encoder | None) -> Encoder:
        def load() -> Encoder:
            from encoders.clip import image_encoder

            return image_encoder(name, text, self.settings.caches)

        return self._once(("image", name, text_name), load)

    def findings_score(self, linker: Linker | None) -> FindingsScore | None:
        """How well the findings of documents fit those of a query."""
        if linker is None:
            return None

        def load() -> FindingsScore:
            from ontology.tversky import findings_score

            return findings_score(linker)

        return lazily(load)

    def likeness(self, linker: Linker | None) -> Likeness | None:
        """How alike the findings of reports are: what teaches a text tower."""
        if linker is None:
            return None

        def load() -> Likeness:
            from ontology.tversky import measure, tversky_matrix

            return partial(tversky_matrix, by=measure(linker))

        return lazily(load)

    def reader(self, config: Config) -> Callable[[ImageSource], Picture]:
        """What decodes pictures, within the limits of the settings."""
        settings = self.settings

        def read(source: ImageSource) -> Picture:
            if isinstance(source, Picture):
                return source
            from encoders.images import read_picture

            return read_picture(
                source,
                frames=config.frames,
                max_pixels=settings.max_pixels,
                allow_burned_in=settings.allow_burned_in,
            )

        return read

    def _once(self, key: tuple[str | None, ...], make: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return cast(T, self._made[key])


class _Lazy(Generic[T]):
    """Stands for a part until something is asked of it; then the part is made, once, and answers."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = threading.Lock()

    def _part(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Callable[..., Any], self._part())(*args, **kwargs)


def lazily(make: Callable[[], T]) -> T:
    """What `make` returns, made on first use.

    >>> words = lazily(lambda: print("made") or ["a", "b"])
    >>> words.index("b")
    made
    1
    """
    return cast(T, _Lazy(make))


def shipped_weights() -> Weights:
    """Fusion weights learned on SciFact train and iu_xray train together."""
    return cast(Weights, json.loads(SHIPPED_WEIGHTS.read_text()))


def _settled(name: str | None) -> str | None:
    if name is None or name in SHIPPED:
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
