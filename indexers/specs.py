"""Names of vector indexes, as the command line and the configuration spell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from retrieval.errors import Invalid

NAMES = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin", "ivfpq")


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed vector index spec, for example ``ivfpq:M=48,nlist=256,nprobe=16``."""

    kind: str
    keys: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, ",".join(f"{key}={value}" for key, value in self.keys.items()))))

    def check(self, dim: int) -> None:
        """Raise Invalid where vectors of `dim` dimensions cannot be indexed so."""
        codes = self.keys.get("M", 1)
        if dim % codes:
            divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
            raise Invalid(f"{self}: M={codes} does not divide the dimension {dim}; M can be {divisors}")


_CODE_KEYS = {"M": None, "nlist": None, "nprobe": None, "refine": 0}  # None: no default


def parse_spec(text: str) -> Spec:
    """Read a spec; Invalid, with the list of what there is, where it names nothing known.

    >>> str(parse_spec("ivfpq:M=48,nlist=256"))
    'ivfpq:M=48,nlist=256,nprobe=16,refine=0'
    """
    kind, colon, rest = text.partition(":")
    if kind not in NAMES:
        raise Invalid(f"no vector index {text!r}; there are {_vocabulary()}", "vector_index")
    if kind != "ivfpq":
        if colon:
            raise Invalid(f"the vector index {kind} takes no keys, got {rest!r}", "vector_index")
        return Spec(kind)
    pairs = [_pair(text, item) for item in rest.split(",") if item]
    given = dict(pairs)
    if len(given) < len(pairs):
        raise Invalid(f"{text!r} gives a key twice; expected {_vocabulary()}", "vector_index")
    missing = [key for key in ("M", "nlist") if key not in given]
    if missing:
        raise Invalid(f"{text!r} lacks {' and '.join(missing)}; expected {_vocabulary()}", "vector_index")
    # A sixteenth of the lists, the usual start; what it costs in recall is measured at build time.
    nprobe = min(given.get("nprobe", max(1, given["nlist"] // 16)), given["nlist"])
    keys = {"M": given["M"], "nlist": given["nlist"], "nprobe": nprobe, "refine": given.get("refine", 0)}
    return Spec(kind, keys)


def _pair(text: str, item: str) -> tuple[str, int]:
    key, _, value = item.partition("=")
    if key not in _CODE_KEYS or not value.isascii() or not value.isdigit() or len(value) > 7:
        raise Invalid(f"{item!r} in {text!r} is not one of M=, nlist=, nprobe=, refine= and a number", "vector_index")
    if int(value) == 0 and key != "refine":
        raise Invalid(f"{key} in {text!r} must be at least 1", "vector_index")
    return key, int(value)


def _vocabulary() -> str:
    return ", ".join(NAMES[:-1]) + ", ivfpq:M=..,nlist=..[,nprobe=..][,refine=..]"
