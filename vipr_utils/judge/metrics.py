"""How good a ranking is: average precision at k and its relatives, each with an interval.

Everything stands on two arrays, no model and no file: `hits` (Q, k) bool, "the image at this rank
shows the query's product", best rank first, and `n_relevant` (Q,) int, the gallery images that
could have been found. A query with n = 0 has no right answer: its value is NaN, means leave it out,
and `summary` counts it.

>>> hits = [[True, False, False, True, True], [True, False, False, False, False]]
>>> average_precision_at_k(hits, n_relevant=[3, 14]).round(3).tolist()
[0.7, 0.2]
"""

from __future__ import annotations

import numpy as np
import pandas as pd

DEFINITION = (
    "AP@5 = (1 / min(n, 5)) * sum over ranks i <= 5 of P(i) * rel(i); n = relevant gallery images "
    "of the query; queries with n = 0 are excluded and counted"
)


def hits_from_ranks(ranks, query_ids, gallery_ids) -> np.ndarray:
    """Hits (Q, k) bool: does the gallery row at this rank show the query's product?

    ranks (Q, k) int are row numbers into gallery_ids (G,), best first; -1 = nothing there, never a
    hit. query_ids (Q,) and gallery_ids (G,) are product_id of the catalog; -1 = unknown, matches
    nothing. A row listed twice scores at its first rank only and leaves its later ranks empty, as
    in Kaggle's `apk`. Raises ValueError for a rank outside -1..G-1, which would point at another
    image, and for lists of another number of queries.

    >>> hits_from_ranks([[0, 2, 2, -1]], [7], [7, 8, 7]).tolist()
    [[True, True, False, False]]
    """
    ranks, wanted = np.asarray(ranks), np.reshape(query_ids, (len(ranks), 1))
    if not ((ranks >= -1) & (ranks < len(gallery_ids))).all():
        raise ValueError(
            f"ranks run from {ranks.min()} to {ranks.max()}, expected -1 to "
            f"{len(gallery_ids) - 1} for {len(gallery_ids)} rows. Pass the gallery_ids searched."
        )
    found = np.append(gallery_ids, -1)[ranks]  # (Q, k); rank -1 reads the -1 appended here
    same_row = ranks[:, :, None] == ranks[:, None, :]  # (Q, k, k)
    listed_before = np.tril(same_row, -1).any(axis=2)
    return (found == wanted) & (found != -1) & ~listed_before


def count_relevant(query_ids, gallery_ids) -> np.ndarray:
    """n_relevant (Q,) int64: gallery images of the query's product; 0 for the unknown product -1.

    Where the query itself is in the gallery (leave one out), subtract it: it cannot be found.
    """
    counts = pd.Series(gallery_ids).value_counts()
    return counts.drop(-1, errors="ignore").reindex(query_ids, fill_value=0).to_numpy()


def _checked(hits, n_relevant, k: int) -> tuple:
    """hits (Q, k) bool and n_relevant (Q,) float64, NaN for 0, or a ValueError that says why."""
    hits = np.asarray(hits)
    if hits.dtype != bool or hits.ndim != 2 or hits.shape[1] < k:
        raise ValueError(
            f"hits has shape {hits.shape} and type {hits.dtype}, expected True and False of shape "
            f"(Q, {k}) or wider. Pass the result of hits_from_ranks, not scores, of a search with "
            f"k={k}; where the gallery is smaller, fill up with False (rank -1)."
        )
    found, n = hits.sum(axis=1), np.reshape(n_relevant, len(hits))
    if (found > n).any():
        query = (found > n).argmax()
        raise ValueError(
            f"query {query} has {found[query]} hits but n_relevant = {n[query]}, expected no more "
            "hits than relevant images. Pass count_relevant over the gallery searched."
        )
    return hits[:, :k], np.where(n > 0, n, np.nan)


def average_precision_at_k(hits, n_relevant, k: int = 5) -> np.ndarray:
    """AP@k (Q,) float64 in 0..1, NaN where n = 0.

    AP@k = (1 / min(n, k)) * sum over ranks i <= k of P(i) * rel(i), where P(i) is the share of hits
    in the first i ranks. With min(n, k) a perfect list scores 1 whatever n is. Others call "mAP@5"
    the same sum divided by the hits found (torchmetrics, open-metric-learning: one hit at rank 1
    scores 1) or by n (pytorch-metric-learning: five hits of 14 score 0.357).
    Raises ValueError for arrays that do not fit.
    Source: Kaggle's `apk` (benhamner/Metrics); Google Landmark Retrieval.
    """
    hits, n = _checked(hits, n_relevant, k)
    precision = np.cumsum(hits, axis=1) / np.arange(1, k + 1)  # (Q, k) P(i)
    return (precision * hits).sum(axis=1) / np.minimum(n, k)


def recall_at_k(hits, n_relevant, k: int = 5) -> np.ndarray:
    """R@k (Q,) in {0, 1}, NaN where n = 0: is there a hit in the first k ranks?

    This is the Recall@K of metric learning (Oh Song 2016, arXiv 1511.06452), elsewhere "hit rate";
    it is not the share hits / n of text retrieval, which cannot pass k / n.
    """
    return np.sign(mrr_at_k(hits, n_relevant, k))


def mrr_at_k(hits, n_relevant, k: int = 5) -> np.ndarray:
    """Reciprocal rank (Q,) in 0..1, NaN where n = 0: 1 / rank of the first hit, 0 for none to k."""
    hits, n = _checked(hits, n_relevant, k)
    return hits.any(axis=1) / (1 + hits.argmax(axis=1)) / np.minimum(n, 1)


def guie_precision_at_k(hits, n_relevant, k: int = 5) -> np.ndarray:
    """mP@k of Google Universal Image Embedding (Q,), NaN where n = 0.

    mP@k = hits in ranks 1..min(n, k) / min(n, k). Not an average precision: a hit behind rank
    min(n, k) is worth nothing. Source: Kaggle, GUIE 2022.
    """
    hits, n = _checked(hits, n_relevant, k)
    inside = np.arange(1, k + 1) <= n[:, None]  # (Q, k)
    return (hits & inside).sum(axis=1) / np.minimum(n, k)


def bootstrap_interval(
    values, products, *, seed: int = 0, n_boot: int = 1000
) -> tuple[float, float]:
    """(low, high): 95 % percentile interval of the mean of values (Q,), by resampling products.

    The queries of one product stand or fall together, so whole products (Q,) are drawn with
    replacement, n_boot times; the mean is over all queries drawn: sum of values / number of values.
    NaN values are left out; with fewer than two products left nothing can be resampled and both
    ends are NaN. The same seed gives the same interval.
    Source: Field and Welsh, Bootstrapping clustered data, JRSS B 69 (2007).
    """
    queries = pd.DataFrame({"value": np.asarray(values, float), "product": np.asarray(products)})
    totals = queries.dropna().groupby("product")["value"].agg(["sum", "size"])  # (P, 2)
    n = len(totals)
    if n < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(n, size=(n_boot, n), dtype=np.int32)
    sums, sizes = (column[drawn].sum(axis=1) for column in totals.to_numpy(float).T)
    return tuple(np.quantile(sums / sizes, [0.025, 0.975]).tolist())


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN when there is none."""
    return float(pd.Series(values).mean())


def paired_difference(a, b, products, *, seed: int = 0) -> tuple[float, float, float]:
    """(difference, low, high): mean of a - b over the same queries, with its 95 % interval.

    a and b (Q,) are values of two runs, row by row the same query; products (Q,) are theirs. Hard
    queries are hard for both: this interval is narrower than the runs' own. Raises ValueError where
    only one of the runs counts a query.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    counted_a, counted_b = ~np.isnan(a), ~np.isnan(b)
    if not np.array_equal(counted_a, counted_b):
        raise ValueError(
            f"a counts {counted_a.sum()} queries and b {counted_b.sum()}, expected the same "
            "queries in both. Compare runs of one protocol, gallery and query order."
        )
    return _mean(a - b), *bootstrap_interval(a - b, products, seed=seed)


def summary(hits, n_relevant, products, *, seed: int = 0) -> dict:
    """The figures of a run: mAP@5, its 95 % interval over products (Q,), P@1, MRR@5, R@5, sizes.

    Means are over the n_queries with n > 0, NaN when there is none; n_excluded counts the others,
    n_products the products of the counted ones. hits has 5 ranks or more. The caller adds
    n_gallery.
    """
    ap = average_precision_at_k(hits, n_relevant)
    low, high = bootstrap_interval(ap, products, seed=seed)
    counted = ~np.isnan(ap)
    return {
        "map_at_5": _mean(ap),
        "map_at_5_low": low,
        "map_at_5_high": high,
        "precision_at_1": _mean(average_precision_at_k(hits, n_relevant, k=1)),
        "mrr_at_5": _mean(mrr_at_k(hits, n_relevant)),
        "recall_at_5": _mean(recall_at_k(hits, n_relevant)),
        "n_queries": int(counted.sum()),
        "n_excluded": int((~counted).sum()),
        "n_products": pd.Series(products)[counted].nunique(),
        "definition": DEFINITION,
    }


def chance_map_at_k(n_relevant, n_gallery: int, k: int = 5) -> float:
    """Expected mAP@k in 0..1 of a ranking at random of n_gallery images; n = 0 is left out, NaN
    where nothing else is there.

    For one query (1 / min(n, k)) * sum over i <= k of p * (1 + (i - 1) * (n - 1) / (G - 1)) / i
    with p = n / G: a hit at rank i, and the expected hits before it.
    """
    n = np.asarray(n_relevant, dtype=float)
    n = n[n > 0]
    i = np.arange(1, min(k, n_gallery) + 1)[:, None]
    before = (i - 1) * (n - 1) / max(1, n_gallery - 1)  # (k, Q) expected hits above rank i
    return _mean((n / n_gallery * (1 + before) / i).sum(axis=0) / np.minimum(n, k))
