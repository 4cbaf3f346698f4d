"""What the operator sets: environment variables named LIGHTBOX_*, each with a default that works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from retrieval.errors import InputError

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = ("read", "write", "admin")


class ApiKey(NamedTuple):
    """A caller that the server knows. Only the digest of the key is kept."""

    name: str
    role: Role
    sha256: str  # hex digest of the key


class Settings(BaseSettings):
    """One field per variable: `home` is LIGHTBOX_HOME. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="LIGHTBOX_", extra="ignore", frozen=True)

    # Places
    home: Path = Path("lightbox-data")  # collections, caches, jobs
    data: Path = Path("../shared/data")  # development data, only for tests and benchmarks
    cache: Path | None = None  # converted towers and compiled ontologies; default: cache/ in the home
    sources: Path | None = None  # the folder below which POST …/evaluations may name a source
    debug: bool = False  # tracebacks on the command line

    # Who may ask
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = ()  # name:role:sha256hex,…
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()  # Host headers accepted besides loopback
    image_hosts: Annotated[tuple[str, ...], NoDecode] = ()  # hosts that pictures may be fetched from; none by default

    # Limits
    max_body: int = Field(32 * 2**20, gt=0)  # of one HTTP request
    max_pixels: int = Field(64_000_000, gt=0)  # of a picture, checked before it is decoded
    max_k: int = Field(1000, gt=0, le=1000)
    max_batch: int = Field(256, gt=0)  # queries of one search/batch
    max_concurrent: int = Field(64, gt=0)  # searches in flight; more are answered 429
    max_rate: float = Field(200.0, gt=0)  # requests per second and key
    allow_burned_in: bool = False  # DICOM that says it carries annotations in its pixels

    # Elasticsearch
    es_api_key: SecretStr | None = None
    es_user: str | None = None  # instead of a key
    es_password: SecretStr | None = None
    es_ca: Path | None = None  # certificate authority of the cluster, PEM
    es_shards: int = Field(1, gt=0, le=1024)  # of a new generation: about one for every 30 GB

    @field_validator("api_keys", mode="before")
    @classmethod
    def _keys(cls, value: object) -> object:
        return tuple(_key(text) for text in _listed(value)) if isinstance(value, str) else value

    @field_validator("allowed_hosts", "image_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: object) -> object:
        return _listed(value) if isinstance(value, str) else value

    @property
    def es_secrets(self) -> tuple[SecretStr | None, SecretStr | None]:
        """The key and the password of the cluster."""
        return self.es_api_key, self.es_password

    @property
    def collections(self) -> Path:
        """One folder per collection."""
        return self.home / "collections"

    @property
    def caches(self) -> Path:
        """Everything that can be made again."""
        return self.cache or self.home / "cache"


def load(**given: object) -> Settings:
    """Settings from the environment; what is `given` (and not None) comes first.

    Raises InputError that names the variable, never its value: it may be a secret.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = "LIGHTBOX_" + "_".join(str(part) for part in first["loc"][:1]).upper()
        raise InputError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _key(text: str) -> ApiKey:
    name, _, rest = text.partition(":")
    role, _, digest = rest.partition(":")
    hexadecimal = len(digest) == 64 and all(c in "0123456789abcdef" for c in digest)
    if not name or role not in ROLES or not hexadecimal:
        raise ValueError(f"expected name:role:sha256hex with a role of {', '.join(ROLES)}, separated by commas")
    return ApiKey(name, role, digest)
