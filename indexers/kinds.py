"""The approximate vector indexes: how each is made from a sample of the vectors, and how it is asked.

Graphs: `hnsw` keeps float32 rows beside the graph, `hnsw-sq8` and `hnsw-sq4` 8 and 4 bits a dimension,
`hnsw-bin` one bit a dimension (RaBitQ, arXiv 2405.12497). Lists: `ivfpq` is OPQ + IVFPQ (Ge et al., CVPR 2013;
Jégou et al., TPAMI 2011). What searches codes can be rescored on the stored vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from indexers.scan import Numbers, Scores
from indexers.specs import Spec
from retrieval.types import Matrix

faiss: Any = untyped_faiss  # its stubs lack half of what it has

LINKS = 32  # of a graph node, on the lowest level twice as many
EF_BUILD = 100
EF_SEARCH = (32, 64, 128, 256, 512)  # tried in this order until the recall is high enough
CODEWORDS = 256  # of each product quantizer: 8 bits a code
_ROTATION_ROWS = 8_192
_ROTATION_ROUNDS = 10
_IP = untyped_faiss.METRIC_INNER_PRODUCT


class Trained(NamedTuple):
    """An index that vectors can be added to, and what was done otherwise than asked."""

    index: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A kind of HNSW index. oversample: candidates per result that are rescored on stored vectors; 0 for none."""

    make: Callable[[int], Any]
    oversample: int

    def train(self, sample: Matrix) -> Trained:
        index = self.make(sample.shape[1])
        index.hnsw.efConstruction = EF_BUILD
        index.train(sample)
        return Trained(index)

    def probe(self, index: Any, queries: Matrix, fetch: int, effort: int, allowed: Any) -> tuple[Scores, Numbers]:
        """effort: length of the queue (ef)."""
        params = faiss.SearchParametersHNSW(efSearch=max(effort, fetch), sel=allowed)
        found: tuple[Scores, Numbers] = index.search(queries, fetch, params=params)
        return found

    @property
    def efforts(self) -> tuple[int, ...]:
        return EF_SEARCH


@dataclass(frozen=True, slots=True)
class Lists:
    """Inverted lists of product-quantized residuals, after a rotation."""

    spec: Spec

    def train(self, sample: Matrix) -> Trained:
        rows, dim = sample.shape
        spec, notes = self.spec, []
        lists = min(spec.keys["nlist"], rows)
        if lists < spec.keys["nlist"]:
            notes.append(f"{rows} vectors to train on: nlist is {lists}, not {spec.keys['nlist']}")
        if rows < CODEWORDS:
            notes.append(f"{rows} vectors to train {CODEWORDS} codewords: each vector counts several times")
            sample = np.resize(sample, (CODEWORDS, dim))
        rotation = _rotation(sample, spec.keys["M"])
        transform = faiss.LinearTransform(dim, dim, False)
        faiss.copy_array_to_vector(rotation.ravel(), transform.A)
        transform.is_trained = True
        inverted = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, spec.keys["M"], 8, _IP)
        inverted.pq.cp.niter = 10  # of 25: the recall is the same
        for clustering in (inverted.cp, inverted.pq.cp):
            clustering.min_points_per_centroid = 1  # FAISS prints a warning otherwise; the note says it
        inverted.train(np.ascontiguousarray(sample @ rotation.T))
        index = faiss.IndexPreTransform(transform, inverted)
        index.is_trained = True
        return Trained(index, tuple(notes))

    def probe(self, index: Any, queries: Matrix, fetch: int, effort: int, allowed: Any) -> tuple[Scores, Numbers]:
        """effort: lists visited (nprobe)."""
        params = faiss.SearchParametersIVF(nprobe=effort, sel=allowed)
        if isinstance(index, faiss.IndexPreTransform):
            params = faiss.SearchParametersPreTransform(index_params=params)
        found: tuple[Scores, Numbers] = index.search(queries, fetch, params=params)
        return found

    @property
    def oversample(self) -> int:
        return self.spec.keys["refine"]

    @property
    def efforts(self) -> tuple[int, ...]:
        return (self.spec.keys["nprobe"],)


def _rotation(sample: Matrix, codes: int) -> Matrix:
    """(D, D) orthogonal: the rotation after which `codes` quantizers lose least (non-parametric OPQ).

    Alternates between quantizers for a rotation and the rotation for quantizers (an orthogonal Procrustes
    problem), starting from a random one.
    """
    rows, dim = sample.shape
    sample = sample[_spread(rows, _ROTATION_ROWS)]
    start = np.random.default_rng(0).standard_normal((dim, dim))
    rotation: Matrix = np.linalg.qr(start)[0].astype(np.float32)
    quantizers = faiss.ProductQuantizer(dim, codes, 8)
    quantizers.cp.niter = 4
    quantizers.cp.min_points_per_centroid = 1
    for _ in range(_ROTATION_ROUNDS):
        rotated = np.ascontiguousarray(sample @ rotation.T)
        quantizers.train(rotated)
        left, _, right = np.linalg.svd(quantizers.decode(quantizers.compute_codes(rotated)).T @ sample)
        rotation = np.ascontiguousarray(left @ right)
    return rotation


def _spread(count: int, most: int) -> Numbers:
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _scalar(bits: int) -> Callable[[int], Any]:
    return lambda dim: faiss.IndexHNSWSQ(dim, bits, LINKS, _IP)


Kind = Graph | Lists
_GRAPHS = {
    "hnsw": Graph(lambda dim: faiss.IndexHNSWFlat(dim, LINKS, _IP), 0),
    "hnsw-sq8": Graph(_scalar(untyped_faiss.ScalarQuantizer.QT_8bit), 2),
    "hnsw-sq4": Graph(_scalar(untyped_faiss.ScalarQuantizer.QT_4bit), 4),
    # It knows L2 only, which orders unit vectors as the inner product does.
    "hnsw-bin": Graph(lambda dim: faiss.IndexHNSWRaBitQ(dim, LINKS), 16),
}


def kind_of(spec: Spec) -> Kind | None:
    """None for `flat`, which needs nothing but the stored vectors."""
    return Lists(spec) if "nlist" in spec.keys else _GRAPHS.get(spec.kind)


def selector(numbers: Numbers, count: int) -> Any:
    """The FAISS form of ascending vector numbers below `count`."""
    bits = np.zeros(count, np.bool_)
    bits[numbers] = True
    packed: NDArray[np.uint8] = np.packbits(bits, bitorder="little")
    chosen = faiss.IDSelectorBitmap(packed)
    chosen.packed = packed  # FAISS holds a bare pointer
    return chosen
