"""OPQ + IVFPQ in FAISS (Ge et al., CVPR 2013; Jégou et al., TPAMI 2011), taken apart and put together.

Shapes: N rows, D dimensions, L centroids, M codebooks of C codewords; a code has log2(C) bits, 4 or 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.types import Matrix

faiss: Any = untyped_faiss  # its stubs lack half of what it has

_FLOOR = 0.05  # of the mean: what the directions that no query looks in still count
_ROTATION_ROWS = 65_536  # with an eighth, a million vectors lose one neighbour in sixty
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


def fitted(
    sample: Matrix, codes: int, lists: int, seed: int = 0, queries: Matrix | None = None, bits: int = 8
) -> Quantizers:
    """Quantizers that lose little of `sample` (N, D); rows count several times where there are too few.

    queries: (Q, D); where there are some, less is lost in the directions that they look in, and more in others.
    """
    rows, dim = sample.shape
    if rows < 1 << bits:
        sample = np.resize(sample, (1 << bits, dim))
    stretch = np.eye(dim, dtype=np.float32) if queries is None else _stretch(sample, queries)
    sample = np.ascontiguousarray(sample @ stretch.T)
    centroids = _centroids(sample, lists, seed)
    residuals = sample - centroids[_lists_of(sample, centroids)]
    rotation = _rotation(residuals, codes, bits, seed)
    quantizers = _quantizers(dim, codes, bits, 10, seed)  # iterations, of 25: the recall is the same
    quantizers.train(np.ascontiguousarray(residuals @ rotation.T))
    codebooks = faiss.vector_to_array(quantizers.centroids).reshape(codes, 1 << bits, dim // codes)
    return Quantizers(
        np.ascontiguousarray(rotation @ stretch), np.ascontiguousarray(centroids @ rotation.T), codebooks
    )


def _centroids(sample: Matrix, lists: int, seed: int) -> Matrix:
    """(L, D) of spherical k-means, as FAISS makes them for an inner product."""
    clustering = faiss.Clustering(sample.shape[1], lists)
    clustering.spherical, clustering.niter, clustering.min_points_per_centroid = True, 10, 1
    clustering.seed += seed
    clustering.train(sample, faiss.IndexFlatIP(sample.shape[1]))
    found: NDArray[np.float32] = faiss.vector_to_array(clustering.centroids).reshape(lists, -1)
    return found


def _lists_of(rows: Matrix, centroids: Matrix) -> NDArray[np.int64]:
    """(N,) the list that each row goes to: the one whose centroid scores best."""
    coarse = faiss.IndexFlatIP(centroids.shape[1])
    coarse.add(np.ascontiguousarray(centroids))
    found: NDArray[np.int64] = coarse.search(rows, 1)[1][:, 0]
    return found


def _quantizers(dim: int, codes: int, bits: int, iterations: int, seed: int = 0) -> Any:
    quantizers = faiss.ProductQuantizer(dim, codes, bits)
    quantizers.cp.niter = iterations
    quantizers.cp.min_points_per_centroid = 1  # FAISS prints a warning otherwise
    quantizers.cp.seed += seed
    return quantizers


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
    """An IndexPreTransform without vectors, faced to documents; one goes to the list whose centroid scores best.

    Codes of 4 bits are summed up in registers (FAISS's fast scan, André et al., arXiv 1812.09162): 32 vectors at once,
    over tables that are rounded to 8 bits for each query.
    """
    turn, centroids, codebooks = quantizers
    lists, dim = centroids.shape
    transform = faiss.LinearTransform(dim, dim, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(turn).ravel(), transform.A)
    transform.is_trained = True
    coarse = faiss.IndexFlatIP(dim)
    coarse.add(np.ascontiguousarray(centroids))
    if codebooks.shape[1] == 16:
        inverted = faiss.IndexIVFPQFastScan(coarse, dim, lists, len(codebooks), 4, _IP)
        inverted.by_residual = True  # as it is without saying in the other
    else:
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
    inverted = faiss.downcast_index(index.index)
    codebooks = faiss.vector_to_array(inverted.pq.centroids).reshape(inverted.pq.M, inverted.pq.ksub, -1)
    return Quantizers(turn, inverted.quantizer.reconstruct_n(0, inverted.nlist), codebooks)


def _rotation(sample: Matrix, codes: int, bits: int, seed: int) -> Matrix:
    """(D, D) orthogonal: after it `codes` quantizers lose least of `sample` (non-parametric OPQ).

    Alternates between quantizers for a rotation and the rotation for quantizers (an orthogonal Procrustes
    problem), starting from a random one.
    """
    rows, dim = sample.shape
    sample = sample[spread(rows, _ROTATION_ROWS)]
    start = np.random.default_rng(seed).standard_normal((dim, dim))
    rotation: Matrix = np.linalg.qr(start)[0].astype(np.float32)
    quantizers = _quantizers(dim, codes, bits, 4)
    for _ in range(_ROTATION_ROUNDS):
        rotated = np.ascontiguousarray(sample @ rotation.T)
        quantizers.train(rotated)
        left, _, right = np.linalg.svd(quantizers.decode(quantizers.compute_codes(rotated)).T @ sample)
        rotation = np.ascontiguousarray(left @ right)
    return rotation


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
