"""Steps on embeddings and ranked lists, each from its paper: a Search in, a Search out.

Similarity is the cosine throughout. All are inductive, that is a query is answered without a look
at the other queries, save the one whose name says so. What helps is a matter of the data: measure
each one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.linalg import eigh
from sklearn.preprocessing import normalize

from vipr_utils.retrieve.search import Search, top_k

CHUNK = 256  # queries worked on at once
PAIRS = 32768  # pairs of rows whose cosines are taken at once


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) float32 of length 1; a zero row stays zero.

    x itself where all rows have it: at Products-10K's size a copy is a gigabyte.
    """
    x = np.asarray(x, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]  # norm() would copy all of x
    return x if (abs(lengths - 1) < 1e-5).all() else x / lengths.clip(1e-12)


def joined(parts: list[np.ndarray], weights) -> np.ndarray:
    """(N, D) from parts (N, d) of length 1: the cosine of two rows is the weighted mean of theirs.

    A single part is returned as it is.
    """
    if len(parts) == 1:
        return parts[0]
    weights = np.array(weights, np.float32)
    together = np.hstack(parts)
    together *= np.repeat(np.sqrt(weights / weights.sum()), [part.shape[1] for part in parts])
    return together


# ------------------------------------------------------------------------------------- projections


@dataclass(frozen=True)
class Projection:
    """x -> (x - mean) @ matrix, L2-normalised, with mean (D,) and matrix (D, d): fitted once, used
    on both sides. Without a matrix directions stay as they are.
    """

    mean: np.ndarray
    matrix: np.ndarray | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, d) float32."""
        centred = x - self.mean
        return unit(centred if self.matrix is None else centred @ self.matrix)

    def applied(self, search: Search) -> Search:
        """Both sides through it."""
        return replace(
            search,
            queries=self(search.queries),
            gallery=self(search.gallery),
            projections=(*search.projections, self),
        )


def fit_whitening(x: np.ndarray, dim: int = 0, *, power: float = 1.0) -> Projection:
    """The Projection of x (N, D) on its `dim` main directions (0: all), each divided by (standard
    deviation)^power.

    power 1 whitens: identity covariance. power 0 is PCA, which turns and cuts and keeps the scale.
    Between the two the weak directions are raised less. Directions without variance get no weight.
    Source: Jegou and Chum 2012 (whitening of image vectors); Conde 2022 (PCA from 1024 to 64 for
    GUIE). Raises ValueError when x has fewer than `dim` directions.
    """
    mean, most = x.mean(0, dtype=np.float64), min(x.shape[1], len(x) - 1)
    if not 0 <= dim <= most:
        raise ValueError(
            f"{len(x)} embeddings of {x.shape[1]} dimensions span {most} directions, got "
            f"dim={dim}: use at most {most}"
        )
    variances, directions = _main_directions(_covariance(x - mean), dim or most)
    seen = variances > 1e-9 * variances[0]
    scale = np.where(seen, variances.clip(1e-30) ** (-power / 2), 0.0)
    return Projection(mean.astype(np.float32), (directions * scale).astype(np.float32))


def fit_learned_whitening(
    x: np.ndarray, labels: np.ndarray, dim: int = 0, *, shrink: float = 0.1
) -> Projection:
    """The Projection of x (N, D) that whitens what differs inside a product, then keeps the `dim`
    main directions (0: all); of N photos at most N.

    C_S = covariance of x around its product's mean; the columns v of the matrix solve
    C v = s C_S v, largest s first, with v^T C_S v = 1.

    shrink: share of a round covariance of the same trace mixed into C_S, which few photos cannot
    give in full. Closed form, and the largest gain of all steps where the gallery's products are
    known: on the grocery set's test, frozen EfficientNet-Lite0, gallery of all photos, dim 64:
    mAP@5 0.458 -> 0.692, and 0.272 -> 0.411 on products not fitted on.
    Source: Radenovic et al. 2018, arXiv:1711.02512, with labels in the place of their matching
    pairs. Raises ValueError where no product has two photos.
    """
    mean = x.mean(0, dtype=np.float64)
    basis = np.eye(len(mean))
    if len(x) < len(mean):  # what they span is all that counts, and takes a tenth of the time
        basis, _ = np.linalg.qr((x - mean).T)
        x = x @ basis
    numbers, products = pd.factorize(labels)
    members = normalize(_sparse(numbers[:, None], len(products)).T.tocsr(), norm="l1")
    differences = (members @ x)[numbers]
    differences -= x  # in place, here and below: the only copy of all embeddings
    inside = _covariance(differences)
    whole = _covariance(np.subtract(x, mean @ basis, out=differences))
    if np.trace(inside) <= 1e-12 * np.trace(whole):  # copies differ by what float32 rounds
        raise ValueError(
            f"no product of {len(products)} has two photos that differ: leave learned_whitening "
            "away"
        )
    round_one = np.trace(inside) / len(mean) * np.eye(len(inside))
    inside = (1 - shrink) * inside + shrink * round_one
    _, directions = _main_directions(whole, dim or len(mean), inside)
    return Projection(mean.astype(np.float32), (basis @ directions).astype(np.float32))


def _covariance(differences: np.ndarray) -> np.ndarray:
    """(D, D) float64 of differences (N, D) from a mean; in blocks, so that they may be float32."""
    total = 0.0
    for block in np.array_split(differences, len(differences) // PAIRS + 1):
        exact = block.astype(np.float64)
        total += exact.T @ exact
    return total / len(differences)


def _main_directions(
    covariance: np.ndarray, dim: int, inside: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(s (dim,), directions v (D, dim)) that solve C v = s C_S v, largest s first; C_S = inside,
    else the identity. At most D.
    """
    size = len(covariance)
    values, vectors = eigh(covariance, inside, subset_by_index=(max(0, size - dim), size - 1))
    return values[::-1], vectors[:, ::-1]  # they come smallest first


def centring(search: Search) -> Search:
    """The gallery's mean taken away from both sides."""
    return Projection(search.gallery.mean(0)).applied(search)


def pca(search: Search, dim: int) -> Search:
    """The gallery's `dim` main directions, as they are."""
    return whitening(search, dim, power=0.0)


def whitening(search: Search, dim: int, power: float = 1.0) -> Search:
    """The gallery's `dim` main directions, made alike by `fit_whitening`."""
    return fit_whitening(search.gallery, dim, power=power).applied(search)


def learned_whitening(search: Search, dim: int) -> Search:
    """What differs inside the gallery's products made round, see `fit_learned_whitening`."""
    labels = search.gallery_rows["product_id"]
    return fit_learned_whitening(search.gallery, labels, dim).applied(search)


# --------------------------------------------------------------------------------------- expansion


def alpha_query_expansion(search: Search, k: int, alpha: float = 3.0) -> Search:
    """Searched again with queries (Q, D): q + sum over the first k of max(score, 0)^alpha * g.

    Places without a photo (-1) count for nothing. alpha 0 is plain average expansion.
    Source: Chum et al. 2007 (average); Radenovic et al. 2018, arXiv:1711.02512 (alpha).
    """
    return expanded(search, search.scores[:, :k].clip(0) ** alpha)


def average_query_expansion(search: Search, k: int) -> Search:
    """`alpha_query_expansion` that weighs all alike."""
    return alpha_query_expansion(search, k, alpha=0.0)


def database_augmentation(search: Search, k: int) -> Search:
    """With a gallery (G, D) in which each row is a weighted sum of itself and its k - 1 nearest.

    Row r of the k (r = 0: itself) weighs (k - r) / k; k = 1 changes nothing. Queries are not looked
    at; where queries are gallery photos themselves, they are mixed into their neighbours. Source:
    Arandjelovic and Zisserman 2012; Gordo et al. 2017, arXiv:1610.07940 (weights by rank).
    """
    if k <= 1:
        return search
    _, near = _neighbours(search.gallery, k - 1, device=search.device)
    weights = 1.0 - np.arange(near.shape[1]) / k
    mixed = _sparse(near, len(near), weights) @ search.gallery
    return replace(search, gallery=unit(mixed))


def expanded(search: Search, weights: np.ndarray) -> Search:
    """Searched again with queries to which weights (Q, k) times the photos at their first k places
    are added, L2-normalised.
    """
    near = search.ranks[:, : weights.shape[1]]
    added = _sparse(near, len(search.gallery), weights) @ search.gallery
    queries = search.queries + added
    k = search.ranks.shape[1]
    if search.answers is not None:  # lists are twice as long as they were asked for
        k //= 2
    return replace(search, queries=unit(queries)).searched(k)


def _sparse(lists: np.ndarray, width: int, values=1.0) -> sparse.csr_array:
    """(N, width) with values (N, k) in the columns that lists (N, k) name; -1 names none."""
    rows, at = np.nonzero(lists >= 0)
    values = np.broadcast_to(values, lists.shape)[rows, at].astype(np.float32)
    return sparse.csr_array((values, (rows, lists[rows, at])), (len(lists), width))


def _neighbours(x: np.ndarray, k: int, *, ids=None, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks), both (N, k + 1): of each row of x itself, then its k nearest among the
    others, its namesakes left out.
    """
    itself = np.arange(len(x))[:, None]
    ids = itself[:, 0] if ids is None else ids
    scores, ranks = top_k(x, x, k, query_ids=ids, gallery_ids=ids, device=device)
    return np.hstack([np.ones_like(scores[:, :1]), scores]), np.hstack([itself, ranks])


# ------------------------------------------------------------------------------------------ votes


def product_votes(search: Search, k: int = 5, alpha: float = 3.0) -> Search:
    """With each list in the order of its products' votes, inside a product by score.

    The first k photos of a list vote for their products, each by max(score, 0)^alpha, or by its
    inliers once it was verified. So where the first answer is right, the next are. Photos keep
    their scores.
    Source: Ozaki and Yokoo 2019, arXiv:1906.04087 (discriminative re-ranking), with the gallery's
    own labels in place of a classifier's.
    """
    products = np.append(search.gallery_rows["product_id"], -1)[search.ranks]  # (Q, K)
    weights = search.scores[:, :k].clip(0) ** alpha
    weights = np.where(search.ranks[:, :k] >= 0, weights, 0)
    votes = votes_for(products, weights)
    votes[search.ranks < 0] = -1
    order = np.lexsort((-search.scores, -votes))
    return search.ordered(order)


def votes_for(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(Q, K): for each of the products (Q, K) in a list the weights (Q, k) of its own among the
    first k."""
    votes = np.empty(products.shape, weights.dtype)
    for start in range(0, len(votes), CHUNK):
        part = slice(start, start + CHUNK)
        same = products[part, :, None] == products[part, None, : weights.shape[1]]  # (q, K, k)
        votes[part] = np.einsum("qnk,qk->qn", same, weights[part])
    return votes


# ------------------------------------------------------------------------------------ k-reciprocal


def k_reciprocal(search: Search, k1: int = 20, k2: int = 6, weight: float = 0.3) -> Search:
    """With each list (K >= k1 photos) in a new order.

    score = (1 - weight) * J + weight * cosine. J is the Jaccard similarity sum(min(v, w)) /
    sum(max(v, w)) of the pair's neighbourhood vectors over the gallery: exp(cosine - 1) on the
    k1-reciprocal neighbours R(k1), each c of them adding its R(k1 / 2) where two thirds of that lie
    in R(k1); normalised to sum 1; averaged over itself and its k2 - 1 nearest.
    Inductive: the gallery's vectors are built in the gallery alone, and a query joins it by itself:
    g is its reciprocal neighbour when g stands in its first k1 and it is as near to g as g's k1-th
    neighbour in the gallery.
    Source: Zhong et al. 2017, arXiv:1701.08398, who let queries be each other's neighbours
    (`transductive_k_reciprocal`).
    """
    _check_numbers(k1, k2, weight)
    queries, gallery, ranks = search.queries, search.gallery, search.ranks
    if ranks.shape[1] < min(k1, len(gallery)):
        raise ValueError(
            f"k_reciprocal needs lists of k1={k1} photos, got {ranks.shape[1]}: search deeper or "
            "lower k1"
        )
    scores, near = _neighbours(gallery, k1, device=search.device)
    vectors = _encoded(gallery, near, k1)
    first = ranks[:, :k1]
    rows = np.repeat(np.arange(len(first)), first.shape[1])
    cosine = _cosines(queries, gallery, rows, first.ravel()).reshape(first.shape)
    mutual = cosine >= scores[first, -1] - 1e-6  # a gallery of k1 or fewer: -inf, all are near
    own = _sparse(np.where(mutual, first, -1), len(gallery))
    own = _weighted(_joined(own, near, k1), queries, gallery)
    nearest = _sparse(first[:, : k2 - 1], len(gallery))
    own = sparse.diags_array(1 / (1 + nearest.sum(1))) @ (own + nearest @ vectors)
    return _reordered(search, own.tocsr(), _averaged(vectors, near, k2), weight)


def transductive_k_reciprocal(
    search: Search, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> Search:
    """`k_reciprocal` as published: neighbours are sought among gallery and queries together.

    Transductive: a query's list depends on the other queries, which a shop that answers one
    customer at a time does not have. A query and the gallery photo of its id are not each other's
    neighbours. Source: Zhong et al. 2017, arXiv:1701.08398.
    """
    _check_numbers(k1, k2, weight)
    n, everything = len(search.gallery), np.concatenate([search.gallery, search.queries])
    ids = np.concatenate([search.gallery_rows["image_id"], search.query_rows["image_id"]])
    _, near = _neighbours(everything, k1, ids=ids, device=search.device)
    vectors = _averaged(_encoded(everything, near, k1), near, k2)
    return _reordered(search, vectors[n:], vectors[:n], weight)


def _check_numbers(k1: int, k2: int, weight: float) -> None:
    """Raises ValueError for numbers that k_reciprocal cannot have."""
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(
            "k_reciprocal needs k1 and k2 of at least 1 and a weight in 0..1, got "
            f"{k1}, {k2}, {weight}: try 20, 6, 0.3"
        )


def _encoded(x: np.ndarray, near: np.ndarray, k1: int) -> sparse.csr_array:
    """(N, N) neighbourhood vectors of each row of x among all; near as from `_neighbours`."""
    return _weighted(_joined(_reciprocal(near, k1), near, k1), x, x)


def _reciprocal(near: np.ndarray, k: int) -> sparse.csr_array:
    """(N, N): R(k) of each row, who has the row among its own k nearest."""
    sets = _sparse(near[:, : k + 1], len(near))
    return sets.multiply(sets.T).tocsr()


def _joined(full: sparse.csr_array, near: np.ndarray, k1: int) -> sparse.csr_array:
    """The R(k1) given of each row, and R(k1 / 2) of each member of it that has two thirds of its
    own in R(k1).
    """
    half = _reciprocal(near, round(k1 / 2))
    common = (full @ half.T).multiply(full)  # |R(k1) of the row and R(k1 / 2) of the member|
    share = common @ sparse.diags_array(1 / half.sum(1))
    joins = share >= 2 / 3 - 1e-6
    return full + joins.astype(np.float32) @ half


def _weighted(sets: sparse.csr_array, left: np.ndarray, right: np.ndarray) -> sparse.csr_array:
    """exp(cosine - 1) of left row and right column where sets is not zero, rows of sum 1."""
    rows, columns = sets.nonzero()
    values = np.exp(_cosines(left, right, rows, columns) - 1.0)
    return normalize(sparse.csr_array((values, (rows, columns)), sets.shape), norm="l1")


def _cosines(left: np.ndarray, right: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(M,) inner products of left row i and right row j."""
    cosines = np.empty(len(i), np.float32)
    for start in range(0, len(i), PAIRS):
        part = slice(start, start + PAIRS)
        cosines[part] = np.einsum("nd,nd->n", left[i[part]], right[j[part]])
    return cosines


def _averaged(vectors: sparse.csr_array, near: np.ndarray, k2: int) -> sparse.csr_array:
    """Each row's mean over itself and its k2 - 1 nearest: the paper's local query expansion."""
    return normalize(_sparse(near[:, :k2], len(near)), norm="l1") @ vectors


def _reordered(
    search: Search, of_queries: sparse.csr_array, of_gallery: sparse.csr_array, weight: float
) -> Search:
    """With lists sorted by (1 - weight) * Jaccard + weight * cosine; -1 stays at the end."""
    scores = np.full(search.ranks.shape, -np.inf, np.float32)
    for start in range(0, len(scores), CHUNK):
        q, at = np.nonzero(search.ranks[start : start + CHUNK] >= 0)
        q += start
        g = search.ranks[q, at]
        mine, its = of_queries[q], of_gallery[g]
        shared = mine.minimum(its).sum(1)
        jaccard = shared / (mine.sum(1) + its.sum(1) - shared)
        cosine = _cosines(search.queries, search.gallery, q, g)
        scores[q, at] = (1 - weight) * jaccard + weight * cosine
    return search.sorted_by(scores)
