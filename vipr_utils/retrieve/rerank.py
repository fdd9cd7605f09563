"""What can be done to embeddings and ranked lists after the model: arrays in, arrays out, each step from its paper.

Similarity is the cosine throughout. Steps on embeddings change (queries, gallery), steps on lists change
(scores, ranks); `apply` runs a list of them by name. All are inductive, that is a query is answered without a look at
the other queries, save the one whose name says so. What helps is a matter of the data: measure each one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vipr_utils.retrieve import search

CHUNK = 256  # queries, or rows of pairs, worked on at once


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) float32 of length 1; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


# --------------------------------------------------------------------------------------------------- projections


@dataclass(frozen=True)
class Projection:
    """x -> (x - mean) @ matrix, mean (D,), matrix (D, d): centring, PCA or whitening, fitted once, used on both sides."""

    mean: np.ndarray
    matrix: np.ndarray

    def raw(self, x: np.ndarray) -> np.ndarray:
        """(N, d) float32, not normalised: here whitened data has identity covariance."""
        return (np.asarray(x, np.float32) - self.mean) @ self.matrix

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, d) float32, L2-normalised."""
        return unit(self.raw(x))


def fit_centring(x: np.ndarray) -> Projection:
    """The Projection (D -> D) that takes the mean of x (N, D) away."""
    return Projection(np.asarray(x, np.float32).mean(0), np.eye(x.shape[1], dtype=np.float32))


def fit_whitening(x: np.ndarray, dim: int = 0, *, power: float = 1.0) -> Projection:
    """The Projection of x (N, D) on its `dim` main directions (0: all), each divided by (standard deviation)^power.

    power 1 whitens: identity covariance. power 0 is PCA, which turns and cuts and keeps the scale. Between the two
    the weak directions are raised less. Directions without variance get no weight.
    Source: Jegou and Chum 2012 (whitening of image vectors); Conde 2022 (PCA from 1024 to 64 for GUIE).
    Raises ValueError when x has fewer than `dim` directions.
    """
    x = np.asarray(x)
    mean, most = x.mean(0, dtype=np.float64), min(x.shape[1], len(x) - 1)
    if not 0 <= dim <= most:
        raise ValueError(
            f"{len(x)} embeddings of {x.shape[1]} dimensions span {most} directions, got dim={dim}: use at most {most}"
        )
    values, vectors = _main_directions(
        _covariance(x, mean[None], np.zeros(len(x), int)), dim or most
    )
    scale = np.where(values > 1e-9 * values[0], values.clip(1e-30) ** (-power / 2), 0.0)
    return Projection(mean.astype(np.float32), (vectors * scale).astype(np.float32))


def fit_learned_whitening(
    x: np.ndarray, labels: np.ndarray, dim: int = 0, *, shrink: float = 0.1
) -> Projection:
    """The Projection of x (N, D) that whitens what differs inside a product, then keeps the `dim` main directions.

    C_S = covariance of x around its product's mean; P = C_S^(-1/2) V with V the main directions of C_S^(-1/2) C C_S^(-1/2).
    shrink: share of a round covariance of the same trace mixed into C_S, which few photos cannot give in full.
    Closed form, and the largest gain of all steps where the gallery's products are known: on the grocery set's test, frozen
    EfficientNet-Lite0, gallery of all photos, dim 64: mAP@5 0.458 -> 0.692, and 0.272 -> 0.411 on products not fitted on.
    Source: Radenovic et al. 2018, arXiv:1711.02512, with labels in the place of their matching pairs.
    """
    x, labels = np.asarray(x), np.unique(labels, return_inverse=True)[1]
    means = (
        np.stack([np.bincount(labels, column) for column in x.T], 1) / np.bincount(labels)[:, None]
    )
    inside, mean = _covariance(x, means, labels), x.mean(0, dtype=np.float64)
    if not inside.any():
        raise ValueError(
            f"no product of {len(means)} has two photos that differ: use fit_whitening"
        )
    inside = (1 - shrink) * inside + shrink * np.trace(inside) / len(inside) * np.eye(len(inside))
    values, vectors = np.linalg.eigh(inside)
    root = vectors / np.sqrt(values.clip(1e-30)) @ vectors.T
    whole = _covariance(x, mean[None], np.zeros(len(x), int))
    turn = _main_directions(root @ whole @ root, dim or len(root))[1]
    return Projection(mean.astype(np.float32), (root @ turn).astype(np.float32))


def _covariance(x: np.ndarray, centres: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(D, D) float64: mean over the rows of (x - c)(x - c)^T with c = centres[of]; in pieces, for 142,000 rows."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), 32 * CHUNK):
        part = x[start : start + 32 * CHUNK] - centres[of[start : start + 32 * CHUNK]]
        total += part.T @ part
    return total / len(x)


def _main_directions(covariance: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(variances (dim,), directions (D, dim)) of the largest variance, largest first."""
    values, vectors = np.linalg.eigh(covariance)  # ascending
    return values[::-1][:dim], vectors[:, ::-1][:, :dim]


# ----------------------------------------------------------------------------------------------------- expansion


def alpha_query_expansion(queries, gallery, scores, ranks, *, alpha: float = 3.0) -> np.ndarray:
    """New queries (Q, D), L2-normalised: q + sum over the list of max(score, 0)^alpha * g.

    scores and ranks (Q, k) as from `search.top_k`: all k neighbours are used, -1 counts for nothing, so a list of
    verified neighbours does as well. alpha 0 is plain average expansion.
    Source: Chum et al. 2007 (average); Radenovic et al. 2018, arXiv:1711.02512 (alpha).
    """
    weights = np.where(ranks >= 0, np.maximum(scores, 0.0) ** alpha, 0.0).astype(np.float32)
    return unit(unit(queries) + _weighted_sum(weights, ranks, unit(gallery)))


def database_augmentation(
    gallery, k: int, *, alpha: float | None = None, device="cpu"
) -> np.ndarray:
    """New gallery (G, D), L2-normalised: each row becomes a weighted sum of itself and its k - 1 nearest rows.

    Row r of the k (r = 0: itself) weighs (k - r) / k; with alpha instead its similarity^alpha. k = 1 changes nothing.
    Queries are not looked at; where queries are gallery photos themselves, they are mixed into their neighbours.
    Source: Arandjelovic and Zisserman 2012; Gordo et al. 2017, arXiv:1610.07940 (weights by rank).
    """
    if k <= 1:
        return gallery
    gallery = unit(gallery)
    scores, ranks = _neighbours(gallery, k - 1, device=device)
    weights = 1.0 - np.arange(1, k) / k if alpha is None else np.maximum(scores, 0.0) ** alpha
    return unit(
        gallery
        + _weighted_sum(np.where(ranks >= 0, weights, 0.0).astype(np.float32), ranks, gallery)
    )


def _weighted_sum(weights: np.ndarray, ranks: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(Q, D): sum over the list of weight * gallery row."""
    n, k = ranks.shape
    shape = (n, len(gallery))
    return (
        sparse.csr_matrix((weights.ravel(), ranks.clip(0).ravel(), np.arange(n + 1) * k), shape)
        @ gallery
    )


def _neighbours(x: np.ndarray, k: int, *, ids=None, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks), both (N, k): nearest rows of x to each of its own, without itself and its namesakes."""
    ids = np.arange(len(x)) if ids is None else ids
    return search.top_k(x, x, k, query_ids=ids, gallery_ids=ids, device=device)


# -------------------------------------------------------------------------------------------------- k-reciprocal


def k_reciprocal(
    queries, gallery, ranks, *, k1: int = 20, k2: int = 6, weight: float = 0.3, device="cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks) in the shape of ranks (Q, K), K >= k1: each list in a new order, best first.

    score = (1 - weight) * J + weight * cosine. J is the Jaccard similarity sum(min(v, w)) / sum(max(v, w)) of the pair's
    neighbourhood vectors over the gallery: exp(cosine - 1) on the k1-reciprocal neighbours R(k1), each c of them adding
    its R(k1 / 2) where two thirds of that lie in R(k1); normalised to sum 1; averaged over itself and its k2 - 1 nearest.
    Inductive: the gallery's vectors are built in the gallery alone, and a query joins it by itself: g is its reciprocal
    neighbour when g stands in its first k1 and it is as near to g as g's k1-th neighbour in the gallery.
    Source: Zhong et al. 2017, arXiv:1701.08398, who let queries be each other's neighbours
    (`transductive_k_reciprocal`).
    """
    _check_numbers(k1, k2, weight)
    queries, gallery, ranks = unit(queries), unit(gallery), np.asarray(ranks)
    if ranks.shape[1] < min(k1, len(gallery)):
        raise ValueError(
            f"k_reciprocal needs lists of k1={k1} photos, got {ranks.shape[1]}: search deeper or lower k1"
        )
    scores, near = _neighbours(gallery, k1, device=device)
    half, vectors = _encoded(gallery, near, k1)
    first = ranks[:, :k1]
    rows = np.repeat(np.arange(len(first)), first.shape[1])
    cosine = _cosines(queries, gallery, rows, first.ravel()).reshape(first.shape)
    mutual = (first >= 0) & (
        cosine >= scores[first, -1] - 1e-6
    )  # a gallery of k1 rows or fewer: -inf, all are near
    own = _weighted(
        _expanded(_sets(np.where(mutual, first, -1), len(gallery)), half), queries, gallery
    )
    nearest = _sets(first[:, : k2 - 1], len(gallery))
    own = sparse.diags_array(1 / (1 + nearest.sum(1))) @ (own + nearest @ vectors)
    return _reordered(queries, gallery, ranks, own.tocsr(), _averaged(vectors, near, k2), weight)


def transductive_k_reciprocal(
    queries,
    gallery,
    ranks,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    query_ids=None,
    gallery_ids=None,
    device="cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks) of `k_reciprocal` as published: neighbours are sought among gallery and queries together.

    Transductive: a query's list depends on the other queries, which a shop that answers one customer at a time does
    not have. Ids tell which query and gallery photo are the same: they are not each other's neighbours.
    Source: Zhong et al. 2017, arXiv:1701.08398.
    """
    _check_numbers(k1, k2, weight)
    queries, gallery = unit(queries), unit(gallery)
    everything, n = np.concatenate([gallery, queries]), len(gallery)
    ids = (
        None
        if query_ids is None or gallery_ids is None
        else np.concatenate([gallery_ids, query_ids])
    )
    near = _neighbours(everything, k1, ids=ids, device=device)[1]
    vectors = _averaged(_encoded(everything, near, k1)[1], near, k2)
    return _reordered(queries, gallery, np.asarray(ranks), vectors[n:], vectors[:n], weight)


def _check_numbers(k1: int, k2: int, weight: float) -> None:
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(
            f"k_reciprocal needs k1 and k2 of at least 1 and a weight in 0..1, got {k1}, {k2}, {weight}: try 20, 6, 0.3"
        )


def _sets(lists: np.ndarray, width: int) -> sparse.csr_array:
    """(N, width) of zeros and ones: row numbers in lists (N, k), -1 left out."""
    there = lists >= 0
    indptr = np.concatenate([[0], np.cumsum(there.sum(1))])
    return sparse.csr_array(
        (np.ones(indptr[-1], np.float32), lists[there], indptr), (len(lists), width)
    )


def _with_itself(near: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(len(near))[:, None], near], 1)


def _encoded(x: np.ndarray, near: np.ndarray, k1: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """(R(k1 / 2) as a set, neighbourhood vectors) of each row of x among all of them, both (N, N)."""
    lists = _with_itself(near)
    full, half = (_sets(lists[:, : k + 1], len(x)) for k in (k1, round(k1 / 2)))
    full, half = full.multiply(full.T).tocsr(), half.multiply(half.T).tocsr()
    return half, _weighted(_expanded(full, half), x, x)


def _expanded(full: sparse.csr_array, half: sparse.csr_array) -> sparse.csr_array:
    """R(k1) of each row, and R(k1 / 2) of each member of it that has two thirds of its own in R(k1)."""
    shared = (
        (full @ half.T).multiply(full).tocsr()
    )  # |R(k1) of the row and R(k1 / 2) of the member|
    joins = 3 * shared.data >= 2 * half.sum(1)[shared.indices]
    shared.data = joins.astype(np.float32)
    shared.eliminate_zeros()
    return (full + shared @ half).tocsr()


def _weighted(sets: sparse.csr_array, left: np.ndarray, right: np.ndarray) -> sparse.csr_array:
    """exp(cosine - 1) of left row and right column where sets is not zero, rows normalised to sum 1."""
    rows = np.repeat(np.arange(len(left)), np.diff(sets.indptr))
    values = np.exp(_cosines(left, right, rows, sets.indices) - 1.0)
    values /= np.bincount(rows, values, len(left))[rows]
    return sparse.csr_array((values.astype(np.float32), sets.indices, sets.indptr), sets.shape)


def _cosines(left: np.ndarray, right: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(M,) inner products of left row i and right row j."""
    pieces = range(0, len(i), 128 * CHUNK)
    parts = [
        np.einsum("nd,nd->n", left[i[a : a + 128 * CHUNK]], right[j[a : a + 128 * CHUNK]])
        for a in pieces
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _averaged(vectors: sparse.csr_array, near: np.ndarray, k2: int) -> sparse.csr_array:
    """Each row's mean over itself and its k2 - 1 nearest: the paper's local query expansion."""
    lists = _sets(_with_itself(near)[:, :k2], len(near))
    return (sparse.diags_array(1 / lists.sum(1)) @ (lists @ vectors)).tocsr()


def _reordered(
    queries, gallery, ranks, of_queries, of_gallery, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks): lists sorted by (1 - weight) * Jaccard + weight * cosine; -1 stays at the end with -inf."""
    scores = np.full(ranks.shape, -np.inf, np.float32)
    of_rows = of_gallery.sum(1)
    for start in range(0, len(ranks), CHUNK):
        part = ranks[start : start + CHUNK]
        q, at = np.nonzero(part >= 0)
        g = part[q, at]
        dense, listed = of_queries[start : start + CHUNK].toarray(), of_gallery[g]
        pair = np.repeat(np.arange(len(g)), np.diff(listed.indptr))
        least = np.bincount(pair, np.minimum(listed.data, dense[q[pair], listed.indices]), len(g))
        jaccard = least / (dense.sum(1)[q] + of_rows[g] - least).clip(1e-12)
        scores[start + q, at] = (1 - weight) * jaccard + weight * _cosines(
            queries, gallery, start + q, g
        )
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ranks, order, 1)
