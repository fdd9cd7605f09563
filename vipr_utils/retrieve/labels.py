"""What neighbours say of a photo: its product, how sure that is, whether the catalogue has it, and
which photos belong together where nobody has named them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.cluster import HDBSCAN, AgglomerativeClustering
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    pair_confusion_matrix,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vipr_utils.retrieve.rerank import votes_for
from vipr_utils.retrieve.search import top_k

NEIGHBOURS = 10  # photos that vote, and that a photo hands its label to
KEPT = 0.95  # share of the queries whose product is there that are taken for such
MOST_LABELS = 20  # products that a photo can be of while labels spread

# ------------------------------------------------------------------------------------- prediction


class Votes(NamedTuple):
    """What each list says, (Q,) each: the product with most votes (-1 for an empty list), its share
    of all votes, the similarity of its best photo, and by how much that beats the best photo of any
    other product.
    """

    product: np.ndarray
    share: np.ndarray
    similarity: np.ndarray
    margin: np.ndarray

    @property
    def evidence(self) -> np.ndarray:
        """(Q, 3) float64: what confidence is computed from."""
        return np.column_stack([self.share, self.similarity, self.margin]).astype(np.float64)


def vote(scores: np.ndarray, ranks: np.ndarray, products: np.ndarray, alpha: float = 3.0) -> Votes:
    """Votes of lists (Q, k), best first: each photo has max(score, 0)^alpha for its product.

    products (G,) numbers of the gallery rows that ranks name; -1 in ranks is no photo.
    """
    products = np.append(products, -1)[ranks]  # (Q, k)
    scores = np.where(ranks >= 0, scores, -1.0).astype(np.float32)
    weights = scores.clip(0) ** alpha
    totals = votes_for(products, weights)
    totals[ranks < 0] = -1
    rows, at = np.arange(len(ranks)), totals.argmax(axis=1)  # of equal votes the nearest photo's
    winner = products[rows, at]
    mine = products == winner[:, None]
    others = np.where(mine, -1.0, scores).max(axis=1)
    share = totals[rows, at] / weights.sum(axis=1).clip(1e-12)
    return Votes(winner, share.clip(0), scores[rows, at], scores[rows, at] - others)


@dataclass(frozen=True)
class Confidence:
    """How probable something is by the evidence (N, 3) of `Votes`: a logistic regression, in which
    coefficients (3,) and intercept are those of the evidence as it is.
    """

    coefficients: list[float]
    intercept: float

    @classmethod
    def fit(cls, evidence: np.ndarray, true: np.ndarray) -> Confidence:
        """true (N,) bool. Where all or none are it is their share, drawn a little to a half."""
        true = np.asarray(true, bool)
        if true.all() or not true.any():
            odds = (true.sum() + 0.5) / ((~true).sum() + 0.5)
            return cls([0.0] * evidence.shape[1], float(np.log(odds)))
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(evidence, true)
        scaler, regression = model[0], model[1]
        coefficients = regression.coef_[0] / scaler.scale_
        intercept = regression.intercept_[0] - coefficients @ scaler.mean_
        return cls(coefficients.tolist(), float(intercept))

    def __call__(self, evidence: np.ndarray) -> np.ndarray:
        """(N,) in 0..1."""
        return 1 / (1 + np.exp(-(evidence @ np.array(self.coefficients) + self.intercept)))


@dataclass(frozen=True)
class Judge:
    """Says of votes how probably they are right, and whether the product is in the catalogue.

    right: given that it is there; there: that it is; least: what `there` must reach, so that a
    share KEPT of the queries it was fitted on whose product is there were kept.
    """

    right: Confidence
    there: Confidence
    least: float

    @classmethod
    def fit(cls, votes: Votes, labels: np.ndarray, strangers: Votes) -> Judge:
        """labels (Q,): the products that validation queries show. strangers: votes for the same
        queries by a gallery without their products.
        """
        evidence = np.concatenate([votes.evidence, strangers.evidence])
        known = np.arange(len(evidence)) < len(votes.evidence)
        there = Confidence.fit(evidence, known)
        least = float(np.quantile(there(votes.evidence), 1 - KEPT))
        return cls(Confidence.fit(votes.evidence, votes.product == labels), there, least)

    def __call__(self, votes: Votes) -> tuple[np.ndarray, np.ndarray]:
        """(confidence, there), (Q,) each: of being right, and whether the product is there."""
        return self.right(votes.evidence), self.there(votes.evidence) >= self.least


def judge(queries, labels, gallery, products, *, device="cpu") -> Judge:
    """A Judge fitted on validation queries (Q, D) that show the products `labels` (Q,), by a
    gallery (G, D) of the products (G,), all of length 1 and as numbers.
    """
    votes = vote(*top_k(queries, gallery, NEIGHBOURS, device=device), products)
    # ids that a query never meets: here the photos of its own product
    strange_lists = top_k(
        queries, gallery, NEIGHBOURS, query_ids=labels, gallery_ids=products, device=device
    )
    strangers = vote(*strange_lists, products)
    return Judge.fit(votes, labels, strangers)


def coverage_curve(confidence: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """coverage and accuracy where only the most confident are answered: a row a query more."""
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(np.asarray(right)[order]) / answered
    return pd.DataFrame({"coverage": answered / len(order), "accuracy": accuracy})


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean over the queries of |accuracy - confidence| of their bin.

    Bins are of equal width. Source: Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599.
    """
    at = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    table = pd.DataFrame({"confidence": confidence, "right": np.asarray(right, float)}).groupby(at)
    return (table.mean().diff(axis=1)["right"].abs() * table.size()).sum() / len(at)


# ----------------------------------------------------------------------------------------- clusters


def clusters(x: np.ndarray, n: int = 0, *, least: int = 3) -> np.ndarray:
    """(N,) cluster numbers of embeddings (N, D) of length 1, by nothing but their similarity.

    n: how many, by average linkage; 0 where that is unknown, by HDBSCAN with clusters of `least`
    photos or more, which leaves photos that belong to none: each is a cluster of its own. Time and
    memory grow with N^2: give some thousand photos.
    """
    if n and len(x) > 1:
        linkage = AgglomerativeClustering(n, metric="cosine", linkage="average")
        return linkage.fit_predict(x)
    if len(x) <= least:
        return np.arange(len(x))
    found = HDBSCAN(min_cluster_size=least, min_samples=1, copy=True).fit_predict(x)
    alone = found < 0
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    return found


def cluster_scores(found: np.ndarray, products: np.ndarray) -> dict[str, float]:
    """Adjusted Rand index, normalised mutual information and F1 over pairs, of clusters (N,)
    against products (N,).
    """
    (_, wrong), (missed, right) = pair_confusion_matrix(products, found)
    return {
        "adjusted_rand": adjusted_rand_score(products, found),
        "nmi": normalized_mutual_info_score(products, found),
        "pairwise_f1": 2 * right / max(1, 2 * right + wrong + missed),
        "clusters": len(np.unique(found)),
    }


# -------------------------------------------------------------------------------------- propagation


def propagate(
    x: np.ndarray,
    labels: np.ndarray,
    *,
    k: int = NEIGHBOURS,
    alpha: float = 0.9,
    rounds: int = 30,
) -> np.ndarray:
    """(N,) labels of embeddings (N, D) of length 1, spread from those that have one over a graph of
    their k nearest; -1 for what none reaches.

    labels (N,): -1 is unknown. F = alpha S F + (1 - alpha) Y, with S the graph of cosines^3 as
    D^-1/2 W D^-1/2; those that had a label keep it. F is sparse, with the MOST_LABELS largest
    values of a row: memory is of N, not of N times products.
    Source: Zhou et al. 2003, Learning with Local and Global Consistency (NIPS).
    """
    labels = np.asarray(labels)
    given = labels >= 0
    names, numbers = np.unique(labels[given], return_inverse=True)
    rows = np.flatnonzero(given)
    start = sparse.csr_array((np.ones(len(rows)), (rows, numbers)), (len(x), len(names)))
    graph, spread = neighbour_graph(x, k), start
    for _ in range(rounds):
        spread = _largest(alpha * (graph @ spread) + (1 - alpha) * start, MOST_LABELS)
    reached = spread.sum(axis=1) > 0
    found = np.where(reached, names[np.asarray(spread.argmax(axis=1)).ravel()], -1)
    return np.where(given, labels, found)


def neighbour_graph(x: np.ndarray, k: int) -> sparse.csr_array:
    """(N, N) D^-1/2 W D^-1/2: W has max(cosine, 0)^3 where one of two rows is among the k nearest
    of the other."""
    itself = np.arange(len(x))
    scores, ranks = top_k(x, x, k, query_ids=itself, gallery_ids=itself)
    rows, at = np.nonzero(ranks >= 0)
    weights = scores[rows, at].astype(np.float64).clip(0) ** 3
    graph = sparse.csr_array((weights, (rows, ranks[rows, at])), (len(x), len(x)))
    graph = graph.maximum(graph.T)
    scale = sparse.diags_array(1 / np.sqrt(graph.sum(axis=1).clip(1e-12)))
    return (scale @ graph @ scale).tocsr()


def _largest(
    matrix: sparse.csr_array,
    most: int,
) -> sparse.csr_array:
    """With the `most` largest values of each row."""
    matrix = matrix.tocsr()
    sizes = np.diff(matrix.indptr)
    if sizes.max(initial=0) <= most:
        return matrix
    rows = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-matrix.data, rows))
    kept = order[np.arange(len(rows)) - np.repeat(matrix.indptr[:-1], sizes) < most]
    return sparse.csr_array((matrix.data[kept], (rows[kept], matrix.indices[kept])), matrix.shape)
