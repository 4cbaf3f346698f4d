"""The approximate vector indexes: how each is made from a sample of the vectors, and how it is asked.

Graphs: `hnsw` keeps float32 rows beside the graph, `hnsw-sq8` and `hnsw-sq4` 8 and 4 bits a dimension,
`hnsw-bin` one bit a dimension (RaBitQ, arXiv 2405.12497). Lists: `ivfpq` is OPQ + IVFPQ (Ge et al., CVPR 2013;
Jégou et al., TPAMI 2011), and `distillvq` has the same form with what Distill-VQ learned in it (arXiv 2204.00185).
What searches codes can be rescored on the stored vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from indexers.product import Quantizers, empty_index, fitted, other_side, quantizers_of
from indexers.queries import MOST, perturbed
from indexers.scan import Numbers, Scores, Stored
from indexers.specs import Spec
from retrieval.types import Matrix, Progress

faiss: Any = untyped_faiss  # its stubs lack half of what it has

LINKS = 32  # of a graph node, on the lowest level twice as many
EF_BUILD = 100
EF_SEARCH = (32, 64, 128, 256, 512)  # tried in this order until the recall is high enough
SAMPLE_ROWS = 131_072  # that lists and codes are trained on: 512 for each of 256 codewords
ROWS_PER_LIST = 39  # where that is more: what FAISS asks for
DRAWN = 2  # vectors around each stored one, where there are no queries to learn from
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
    sample_rows: ClassVar[int] = 32_768  # to train on; only codes of a few bits need any

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

    @property
    def sample_rows(self) -> int:
        """Rows to train on, where there are as many."""
        return max(SAMPLE_ROWS, ROWS_PER_LIST * self.spec.keys["nlist"])

    def train(self, sample: Matrix) -> Trained:
        fit, notes = self._fitted(sample, None)
        return Trained(empty_index(fit), notes)

    def _fitted(self, sample: Matrix, queries: Matrix | None) -> tuple[Quantizers, tuple[str, ...]]:
        rows, wanted, notes = len(sample), self.spec.keys["nlist"], []
        lists = min(wanted, rows)
        if lists < wanted:
            notes.append(f"{rows} vectors to train on: nlist is {lists}, not {wanted}")
        if rows < self.codewords:
            notes.append(f"{rows} vectors to train {self.codewords} codewords: each vector counts several times")
        fit = fitted(sample, self.spec.keys["M"], lists, queries=queries, bits=self.spec.bits)
        return fit, tuple(notes)

    def probe(self, index: Any, queries: Matrix, fetch: int, effort: int, allowed: Any) -> tuple[Scores, Numbers]:
        """effort: lists visited (nprobe)."""
        if self.spec.bits == 4:  # the fast scan sums up garbage where it is told to visit more lists than there are
            effort = min(effort, faiss.extract_index_ivf(index).nlist)
        params = faiss.SearchParametersIVF(nprobe=effort, sel=allowed)
        if isinstance(index, faiss.IndexPreTransform):
            params = faiss.SearchParametersPreTransform(index_params=params)
        scores, found = index.search(queries, fetch, params=params)
        scores[found < 0] = -np.inf
        return scores, found

    @property
    def codewords(self) -> int:
        return 1 << self.spec.bits

    @property
    def oversample(self) -> int:
        return self.spec.keys["refine"]

    @property
    def efforts(self) -> tuple[int, ...]:
        return (self.spec.keys["nprobe"],)


@dataclass(frozen=True, slots=True)
class Distilled(Lists):
    """Lists and codes that are taught, after they were trained, to score as the stored vectors do."""

    def teach(self, sample: Matrix, stored: Stored, queries: Matrix | None, progress: Progress) -> Trained:
        """Learned from training queries (Q, D), or from what lies around the vectors. sample: (N, D) to start from."""
        said: tuple[str, ...] = ()
        if len(stored) < self.codewords:
            start, notes = self._fitted(sample, None)
            return Trained(empty_index(start), (*notes, f"{len(stored)} vectors are too few to distil from"))
        if queries is None:
            said = ("no queries to learn from: learned from vectors drawn around the stored ones",)
            queries = perturbed(sample, min(MOST, DRAWN * len(sample)), seed=0)
        from indexers import distill_vq  # brings torch, which serving does without

        start, notes = self._fitted(sample, queries)
        learned = distill_vq.taught(start, stored, queries, progress)
        if learned is None:
            said = (*said, "what was learned scored no better: the codes stay as trained")
        return Trained(empty_index(learned or start), (*notes, *said))

    def like(self, index: Any) -> Any:
        """An empty index with the quantizers of another that is searched; costs no learning."""
        searched = quantizers_of(index)
        return empty_index(searched._replace(turn=other_side(searched.turn)))

    @property
    def efforts(self) -> tuple[int, ...]:
        """The lists to visit that were asked for, or every power of two, to choose from."""
        if "nprobe" in self.spec.keys:
            return (self.spec.keys["nprobe"],)
        lists = self.spec.keys["nlist"]
        return (*(1 << n for n in range(lists.bit_length()) if 1 << n < lists), lists)


def _scalar(bits: int) -> Callable[[int], Any]:
    return lambda dim: faiss.IndexHNSWSQ(dim, bits, LINKS, _IP)


Kind = Graph | Lists  # and Distilled, which is Lists
_GRAPHS = {
    "hnsw": Graph(lambda dim: faiss.IndexHNSWFlat(dim, LINKS, _IP), 0),
    "hnsw-sq8": Graph(_scalar(untyped_faiss.ScalarQuantizer.QT_8bit), 2),
    "hnsw-sq4": Graph(_scalar(untyped_faiss.ScalarQuantizer.QT_4bit), 4),
    # It knows L2 only, which orders unit vectors as the inner product does.
    "hnsw-bin": Graph(lambda dim: faiss.IndexHNSWRaBitQ(dim, LINKS), 16),
}


def kind_of(spec: Spec) -> Kind | None:
    """None for `flat`, which needs nothing but the stored vectors."""
    if "nlist" not in spec.keys:
        return _GRAPHS.get(spec.kind)
    return Distilled(spec) if spec.kind == "distillvq" else Lists(spec)


def selector(numbers: Numbers, count: int) -> Any:
    """The FAISS form of ascending vector numbers below `count`."""
    bits = np.zeros(count, np.bool_)
    bits[numbers] = True
    packed: NDArray[np.uint8] = np.packbits(bits, bitorder="little")
    chosen = faiss.IDSelectorBitmap(packed)
    chosen.packed = packed  # FAISS holds a bare pointer
    return chosen
