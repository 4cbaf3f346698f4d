"""OPQ + IVFPQ in FAISS (Ge et al., CVPR 2013; Jégou et al., TPAMI 2011), taken apart and put together.

Shapes: N rows, D dimensions, L centroids, M codebooks of C codewords.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.types import Matrix

faiss: Any = untyped_faiss  # its stubs lack half of what it has

CODEWORDS = 256  # of each product quantizer: 8 bits a code
_FLOOR = 0.05  # of the mean: what the directions that no query looks in still count
_ROTATION_ROWS = 8_192
_ROTATION_ROUNDS = 10
_IP = untyped_faiss.METRIC_INNER_PRODUCT


class Quantizers(NamedTuple):
    """What a vector is approximated with, in turned coordinates: a centroid and a codeword for each part.

    turn: (D, D), what documents are multiplied with; queries with its inverse transposed, so that inner products stay
    what they are. A rotation is its own inverse transposed. centroids: (L, D). codebooks: (M, C, D / M).
    """

    turn: Matrix
    centroids: Matrix
    codebooks: NDArray[np.float32]


def fitted(sample: Matrix, codes: int, lists: int, seed: int = 0, queries: Matrix | None = None) -> Quantizers:
    """Quantizers that lose little of `sample` (N, D); rows count several times where there are too few.

    queries: (Q, D); where there are some, less is lost in the directions that they look in, and more in others.
    """
    rows, dim = sample.shape
    if rows < CODEWORDS:
        sample = np.resize(sample, (CODEWORDS, dim))
    stretch = np.eye(dim, dtype=np.float32) if queries is None else _stretch(sample, queries)
    sample = np.ascontiguousarray(sample @ stretch.T)
    rotation = _rotation(sample, codes, seed)
    inverted = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, codes, 8, _IP)
    inverted.pq.cp.niter = 10  # of 25: the recall is the same
    for clustering in (inverted.cp, inverted.pq.cp):
        clustering.min_points_per_centroid = 1  # FAISS prints a warning otherwise
        clustering.seed = clustering.seed + seed
    inverted.train(np.ascontiguousarray(sample @ rotation.T))
    return Quantizers(np.ascontiguousarray(rotation @ stretch), *_held(inverted))


def _stretch(sample: Matrix, queries: Matrix) -> Matrix:
    """(D, D) symmetric, the fourth root of the queries' second moment S; turned vectors have unit length on average.

    The error of a score is q . (x - x'), its square on average |S^(1/2) (x - x')|^2: turned by the square root of S,
    k-means minimizes just that. Half of the turn ranks better (docs/distill_vq.md), and suits queries that differ
    from those to learn from.
    """
    moment = (queries.T @ queries).astype(np.float64) / len(queries)
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0) + _FLOOR * max(float(values.mean()), float(np.finfo(np.float32).tiny))
    stretch = (vectors * values**0.25) @ vectors.T
    return np.asarray(stretch / max(float(np.linalg.norm(sample @ stretch, axis=1).mean()), 1e-12), np.float32)


def empty_index(quantizers: Quantizers) -> Any:
    """An IndexPreTransform without vectors, faced to documents; one goes to the list whose centroid scores best."""
    turn, centroids, codebooks = quantizers
    lists, dim = centroids.shape
    transform = faiss.LinearTransform(dim, dim, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(turn).ravel(), transform.A)
    transform.is_trained = True
    coarse = faiss.IndexFlatIP(dim)
    coarse.add(np.ascontiguousarray(centroids))
    inverted = faiss.IndexIVFPQ(coarse, dim, lists, len(codebooks), 8, _IP)
    faiss.copy_array_to_vector(np.ascontiguousarray(codebooks).ravel(), inverted.pq.centroids)
    inverted.is_trained = True
    index = faiss.IndexPreTransform(transform, inverted)
    index.is_trained = True
    return index


def face(index: Any) -> None:
    """Turns an index that vectors are added to into one that is searched, and back: FAISS has one transform for both.

    What is saved is faced to queries, so that plain FAISS can search it.
    """
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    turn = faiss.vector_to_array(transform.A).reshape(index.d, index.d)
    faiss.copy_array_to_vector(np.ascontiguousarray(other_side(turn)).ravel(), transform.A)


def other_side(turn: Matrix) -> Matrix:
    """(D, D) the inverse transposed: what queries are multiplied with, given what documents are, and the reverse."""
    return np.asarray(np.linalg.inv(turn.astype(np.float64)).T, np.float32)


def quantizers_of(index: Any) -> Quantizers:
    """What an index that is faced to documents quantizes with; copies."""
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    turn = faiss.vector_to_array(transform.A).reshape(index.d, index.d)
    return Quantizers(turn, *_held(faiss.downcast_index(index.index)))


def _held(inverted: Any) -> tuple[Matrix, NDArray[np.float32]]:
    """(centroids, codebooks)"""
    pq = inverted.pq
    codebooks = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    return inverted.quantizer.reconstruct_n(0, inverted.nlist), codebooks


def _rotation(sample: Matrix, codes: int, seed: int) -> Matrix:
    """(D, D) orthogonal: the rotation after which `codes` quantizers lose least (non-parametric OPQ).

    Alternates between quantizers for a rotation and the rotation for quantizers (an orthogonal Procrustes
    problem), starting from a random one.
    """
    rows, dim = sample.shape
    sample = sample[spread(rows, _ROTATION_ROWS)]
    start = np.random.default_rng(seed).standard_normal((dim, dim))
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


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
