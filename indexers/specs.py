"""Names of vector indexes, as the command line and the configuration spell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from retrieval.errors import Invalid

CODES = ("ivfpq", "distillvq")  # take keys
NAMES = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin", *CODES)


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed vector index spec, for example ``ivfpq:M=48,nlist=256,nprobe=16``."""

    kind: str
    keys: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, ",".join(f"{key}={value}" for key, value in self.keys.items()))))

    @property
    def bits(self) -> int:
        """Of each of the M codes of a vector."""
        return self.keys.get("bits", 8)

    def check(self, dim: int) -> None:
        """Raise Invalid where vectors of `dim` dimensions cannot be indexed so."""
        codes = self.keys.get("M", 1)
        if dim % codes:
            divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
            raise Invalid(f"{self}: M={codes} does not divide the dimension {dim}; M can be {divisors}")


_CODE_KEYS = ("M", "bits", "nlist", "nprobe", "refine")


def parse_spec(text: str) -> Spec:
    """Read a spec; Invalid, with the list of what there is, where it names nothing known.

    >>> str(parse_spec("ivfpq:M=48,nlist=256"))
    'ivfpq:M=48,nlist=256,nprobe=16,refine=0'
    >>> str(parse_spec("distillvq:M=24,nlist=256"))  # nprobe is chosen when it is built
    'distillvq:M=24,nlist=256,refine=0'
    >>> str(parse_spec("ivfpq:M=96,bits=4,nlist=256"))  # 48 bytes too
    'ivfpq:M=96,bits=4,nlist=256,nprobe=16,refine=0'
    """
    kind, colon, rest = text.partition(":")
    if kind not in NAMES:
        raise Invalid(f"no vector index {text!r}; there are {_vocabulary()}", "vector_index")
    if kind not in CODES:
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
    if given.get("bits", 8) not in (4, 8):
        raise Invalid(f"bits={given['bits']} in {text!r}: a code has 4 or 8 bits", "vector_index")
    if given.get("bits") == 8:
        del given["bits"]  # as it is without saying
    if kind == "ivfpq":
        # A sixteenth of the lists, the usual start; what it costs in recall is measured at build time.
        given.setdefault("nprobe", max(1, given["nlist"] // 16))
    if "nprobe" in given:
        given["nprobe"] = min(given["nprobe"], given["nlist"])
    given.setdefault("refine", 0)
    return Spec(kind, {key: given[key] for key in _CODE_KEYS if key in given})


def _pair(text: str, item: str) -> tuple[str, int]:
    key, _, value = item.partition("=")
    if key not in _CODE_KEYS or not value.isascii() or not value.isdigit() or len(value) > 7:
        raise Invalid(
            f"{item!r} in {text!r} is not one of M=, bits=, nlist=, nprobe=, refine= and a number", "vector_index"
        )
    if int(value) == 0 and key != "refine":
        raise Invalid(f"{key} in {text!r} must be at least 1", "vector_index")
    return key, int(value)


def _vocabulary() -> str:
    keys = ":M=..,nlist=..[,bits=4][,nprobe=..][,refine=..]"
    return ", ".join(name + keys if name in CODES else name for name in NAMES)
