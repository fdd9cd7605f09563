"""Exact top-k search in blocks, under cosine, euclidean or manhattan distance."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipr_utils.host.progress import reporter
from vipr_utils.learn.losses import DISTANCES, distance_matrix
from vipr_utils.retrieve import by_faiss

# Rows of either side that meet in one product. Its scores take 16 MB, which stay in the caches of
# the cores until their best are found. The products of 1,000 queries with 142,000 x 512 took 0.40 s
# so and 0.48 as one, whose scores are written to memory (two cores of an Intel Xeon with AMX).
QUERY_CHUNK, GALLERY_CHUNK = 1024, 4096

# columns of a block that are looked at by their largest score alone
GROUP = 64

# rows more than asked for, of which exact distances choose
SPARE = 8

# how far from the length 1 rounding leaves vectors of that length
UNIT = 1e-6


class Prepared:
    """Embeddings (N, D) for any number of searches: their check and their lengths, half of the time
    of a search for one photo in a gallery, are had once. No copy of float32 is made.

    Raises ValueError for NaN and infinity, and for another shape.
    """

    def __init__(self, embeddings, what: str = "gallery") -> None:
        self.rows = _matrix(embeddings, what)
        self.lengths = _lengths(self.rows, what)  # (N,)


def top_k(
    queries,
    gallery,
    k: int = 5,
    *,
    distance: str = "cosine",
    query_ids=None,
    gallery_ids=None,
    device="cpu",
    engine: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks), both (Q, k): the k most similar gallery rows of each query, best first.

    queries (Q, D), gallery (G, D), `Prepared` where it is searched again; no copy of it is made.
    Scores are similarities: the cosine, or minus the distance. A query never meets itself: gallery
    rows whose id equals the query's id are left out wherever they rank. Where fewer than k rows
    remain, ranks are -1 and scores -inf. Equal scores stand in gallery order.
    engine: 'torch', 'faiss' or 'ivfpq', see `by_faiss`; None: $VIPR_SEARCH, else 'torch'. FAISS
    has no part in manhattan distances.
    Raises ValueError for NaN and infinity, unequal widths, an empty gallery, another engine.
    """
    engine = by_faiss.engine(engine)
    given = Prepared(queries, "query")
    g = gallery if isinstance(gallery, Prepared) else Prepared(gallery)
    _check_sizes(given.rows, g.rows, k, distance)
    ids = _numbered(query_ids, gallery_ids, given.rows, g.rows)
    q, unit = given.rows.to(device), distance == "cosine"
    if unit:
        q = _unit(q, given.lengths.to(device))
    if engine != "torch" and distance != "manhattan":
        rows = _unit(g.rows, g.lengths) if unit else g.rows
        best, rows = by_faiss.nearest(q, rows, k, ids, distance, engine)
    elif unit:
        best, rows = _running(q, g, k, ids, lambda *section: _unit(*section).T, torch.mm)
    elif distance == "euclidean":
        best, rows = _by_euclid(q, g, k, ids)
    else:
        best, rows = _directly(q, g, k, ids, distance)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
    return best.gather(1, order).cpu().numpy(), rows.gather(1, order).cpu().numpy()


def _matrix(embeddings, what: str) -> torch.Tensor:
    """(N, D) float32 on the CPU; of such an array it is a view."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nothing is written
        x = torch.as_tensor(np.asarray(embeddings, dtype=np.float32))
    if x.ndim != 2:
        raise ValueError(f"{what} embeddings must be (N, D), got shape {tuple(x.shape)}")
    return x


def _lengths(x: torch.Tensor, what: str) -> torch.Tensor:
    """(N,) of x (N, D). Raises ValueError where x holds NaN or infinity."""
    lengths = torch.linalg.vector_norm(x, dim=1)
    if lengths.isfinite().all():
        return lengths
    bad = (~x.isfinite()).any(dim=1).nonzero().flatten()
    if not len(bad):
        raise ValueError(
            f"{what} embeddings are longer than float32 can hold: divide them by a number"
        )
    raise ValueError(
        f"{len(bad)} of {len(x)} {what} embeddings hold NaN or infinity (first: row "
        f"{int(bad[0])}): the model diverged or fp16 overflowed; lower the learning rate or "
        "embed in float32."
    )


def _check_sizes(q: torch.Tensor, g: torch.Tensor, k: int, distance: str) -> None:
    """Raises ValueError for what cannot be searched."""
    if q.shape[1] != g.shape[1]:
        raise ValueError(
            f"queries have {q.shape[1]} dimensions, the gallery {g.shape[1]}: embed both with one "
            "model"
        )
    if k < 1 or len(g) == 0:
        raise ValueError(f"top_k needs k >= 1 and a gallery, got k={k} and {len(g)} gallery rows")
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r} is unknown: use one of {DISTANCES}")


def _numbered(query_ids, gallery_ids, q: torch.Tensor, g: torch.Tensor) -> list[np.ndarray]:
    """Both sides' ids as whole numbers (Q,) and (G,), equal where the ids are; without ids no two
    are equal.
    """
    if query_ids is None or gallery_ids is None:
        return [np.full(len(q), -1), np.full(len(g), -2)]
    if len(query_ids) != len(q) or len(gallery_ids) != len(g):
        raise ValueError(
            f"ids do not match: {len(query_ids)} ids for {len(q)} queries, {len(gallery_ids)} for "
            f"{len(g)} rows"
        )
    return np.split(pd.factorize(np.concatenate([query_ids, gallery_ids]))[0], [len(q)])


def _unit(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """x (N, D) of length 1: itself where it is, zeros where it is zero."""
    if ((lengths - 1).abs() < UNIT).all():
        return x
    return x / lengths.clamp_min(1e-12)[:, None]


def _directly(q, g: Prepared, k: int, ids, distance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By distances of all pairs, each computed for itself: no digits are lost to the lengths of the
    vectors, and it is many times slower than a product of matrices.
    """
    return _running(
        q, g, k, ids, lambda section, _: section, lambda *pair: -distance_matrix(*pair, distance)
    )


def _by_euclid(q, g: Prepared, k: int, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """By |q - g|^2 = |q|^2 - 2 (q g - |g|^2 / 2), where q g is a product of matrices.

    Rounding takes its last digits: it names k + SPARE rows, of which exact distances choose.
    Queries for which another row might be as near, by the worst case of rounding, are searched
    directly.
    """
    centre = _centre(g.rows).to(q.device)
    moved = q - centre
    longest = []  # of each section

    def prepared(section, lengths):
        """Rows without the centre, as columns, and half the squares of their lengths."""
        if centre.any():
            section = section - centre
            lengths = torch.linalg.vector_norm(section, dim=1)
        longest.append(lengths.amax())
        return section.T, lengths.square() / 2

    def nearness(block, section):
        """Larger where |q - g| is smaller, for one query."""
        rows, halves = section
        return (block @ rows).sub_(halves)

    near, named = _running(moved, g, k + SPARE, ids, prepared, nearness)
    exact = _exactly(q, g.rows, named)
    at = _largest(exact, k)
    best = exact.gather(1, at)
    rows = named.gather(1, at)

    # squared distances of rows that are not named are no less than `others`
    squares = moved.square().sum(dim=1)
    error = 4 * q.shape[1] * 2**-24 * (squares.sqrt() + max(longest)).square()
    others = squares - 2 * near.amin(dim=1) - error
    unsure = (best.amin(dim=1).square() >= others) & others.isfinite()
    if unsure.any():
        asked = ids[0][unsure.cpu().numpy()], ids[1]
        best[unsure], rows[unsure] = _directly(q[unsure], g, k, asked, "euclidean")
    return best, rows


def _exactly(q: torch.Tensor, g: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Minus the euclidean distances (Q, k) to the gallery rows (Q, k) named, -inf for row -1."""
    found = []
    for block, named in zip(q.split(QUERY_CHUNK), rows.split(QUERY_CHUNK)):
        differences = block[:, None] - g[named.cpu()].to(block)
        found.append(-torch.linalg.vector_norm(differences, dim=2))
    scores = torch.cat(found)
    scores[rows < 0] = -torch.inf
    return scores


def _centre(g: torch.Tensor) -> torch.Tensor:
    """(D,) what to take off both sides, which leaves distances and makes rounding less: about the
    mean where all rows lie near it, else zeros.
    """
    some = g[:: max(1, len(g) // GALLERY_CHUNK)]
    mean = some.mean(dim=0)
    near = (some - mean).square().sum() < 0.1 * some.square().sum()
    return mean if near else torch.zeros_like(mean)


def _running(
    q: torch.Tensor, g: Prepared, k: int, ids, prepared: Callable, similarity: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, rows) (Q, k) on the device of q, in gallery order: the k best of all sections of g.

    prepared(section (n, D), lengths (n,)) is called once for each, and similarity(block (b, D),
    what that gave) -> (b, n), larger is nearer, for each block of queries.
    """
    # blocks are views of these two, which are changed in place
    best = torch.full((len(q), k), -torch.inf, device=q.device)
    rows = torch.full_like(best, -1, dtype=torch.long)
    in_gallery = torch.from_numpy(np.where(np.isin(*ids), ids[0], -1))
    parts = [x.split(QUERY_CHUNK) for x in (q, best, rows, in_gallery)]
    blocks = list(zip(*parts))
    reached = reporter("gallery rows searched", len(g.rows))
    # few queries wait for memory, not for the product: larger sections, fewer calls
    step = GALLERY_CHUNK * (1 if len(q) > QUERY_CHUNK // 4 else 4)
    for left in range(0, len(g.rows), step):
        part = slice(left, left + step)
        numbers = ids[1][part]
        section = prepared(g.rows[part].to(q.device), g.lengths[part].to(q.device))
        for block, best_of, rows_of, ids_of in blocks:
            scores = similarity(block, section)
            if (ids_of >= 0).any() and np.isin(ids_of, numbers).any():  # to compare all takes long
                scores[ids_of[:, None] == torch.from_numpy(numbers)] = -torch.inf
            _merge(best_of, rows_of, scores, left)
        reached(left + len(numbers))
    return best, rows


def _merge(best: torch.Tensor, rows: torch.Tensor, part: torch.Tensor, left: int) -> None:
    """Put the k best of those so far and of a part's columns, the gallery rows from `left` on, into
    best and rows, in gallery order; of equal scores the first ones, and -inf never takes a place.

    Most queries gain nothing by a section. What the others gain lies in the groups of columns with
    the largest scores: as many as have one over the k-th so far, k at most.
    """
    width = GROUP if part.shape[1] % GROUP == 0 else 1
    groups = part.unflatten(1, (-1, width))  # (q, groups, columns)
    tops = groups.amax(dim=2)
    counted = (tops > best.amin(dim=1, keepdim=True)).sum(dim=1)
    gaining = counted.nonzero().flatten()
    if not len(gaining):
        return

    # the columns of those groups, in order;
    # the first of equal groups hold the first of equal scores
    at = _largest(tops[gaining], min(best.shape[1], int(counted.max())))
    scores = groups[gaining[:, None], at].flatten(1)
    within = torch.arange(width, device=at.device)
    columns = (width * at[:, :, None] + within).flatten(1)

    scores = torch.cat([best[gaining], scores], dim=1)
    columns = torch.cat([rows[gaining], left + columns], dim=1)
    at = _largest(scores, best.shape[1])
    best[gaining] = scores.gather(1, at)
    rows[gaining] = columns.gather(1, at)


def _largest(part: torch.Tensor, k: int) -> torch.Tensor:
    """Columns (Q, k) of each row's largest scores, in the order of columns; fewer where fewer are.

    Of scores that equal the k-th the first ones are taken. `topk` takes any of them: rows where the
    one behind the cut is equal are sorted whole.
    """
    values, at = part.topk(min(k + 1, part.shape[1]), dim=1)
    tied = (values[:, k - 1 : k] == values[:, k:]).any(dim=1)
    ordered = part[tied].argsort(dim=1, descending=True, stable=True)
    at[tied, :k] = ordered[:, :k]
    return at[:, :k].sort(dim=1).values


@dataclass(frozen=True)
class Search:
    """What one step of post-processing hands to the next.

    queries (Q, D) and gallery (G, D), L2-normalised, with their catalog rows; scores and ranks
    (Q, K), best first, are None until the gallery is searched; inliers (Q, K) until `verify`.

    answers (G,) bool: the gallery rows that may be answered, None for all. A shop that shows its
    own photos alone still knows its customers' photos, and steps may look at them. projections:
    those that both sides went through, as they were fitted.
    """

    queries: np.ndarray
    gallery: np.ndarray
    query_rows: pd.DataFrame
    gallery_rows: pd.DataFrame
    scores: np.ndarray | None = None
    ranks: np.ndarray | None = None
    inliers: np.ndarray | None = None
    answers: np.ndarray | None = None
    projections: tuple = ()
    device: str | torch.device = "cpu"
    cache_dir: Path | None = None

    def searched(self, k: int) -> Search:
        """With the k nearest gallery rows of every query, by cosine.

        Where not all may be answered lists are twice as long: the k nearest of those that may and
        the k nearest of the others, by cosine. So steps look at neighbours of every kind, and
        lists are long enough once they are `narrowed`. Places without a row hold -1.
        """
        kinds = [np.arange(len(self.gallery))]
        if self.answers is not None:
            kinds = [np.flatnonzero(self.answers), np.flatnonzero(~self.answers)]
        lists = []
        for rows in kinds:
            scores, ranks = top_k(
                self.queries,
                self.gallery if self.answers is None else self.gallery[rows],  # no copy of it
                k,
                query_ids=self.query_rows["image_id"],
                gallery_ids=self.gallery_rows["image_id"].iloc[rows],
                device=self.device,
            )
            lists.append((scores, np.where(ranks < 0, -1, rows[ranks])))
        scores, ranks = map(np.hstack, zip(*lists))
        return replace(self, ranks=ranks).sorted_by(scores)

    def narrowed(self) -> Search:
        """With the rows that may be answered as its gallery, in the same order.

        The others have done their part: neighbours that vote, expand a query or smooth a gallery.
        What compares photos with photos comes after this.
        """
        if self.answers is None:
            return self
        rows = np.flatnonzero(self.answers)
        ranks = pd.Index(rows).get_indexer(self.ranks.ravel()).reshape(self.ranks.shape)
        absent = ranks < 0
        narrow = replace(
            self,
            gallery=self.gallery[rows],
            gallery_rows=self.gallery_rows.iloc[rows],
            scores=np.where(absent, -np.inf, self.scores),
            ranks=ranks,
            answers=None,
        )
        return narrow.ordered(absent.argsort(axis=1, kind="stable"))

    def sorted_by(self, scores: np.ndarray) -> Search:
        """With each list in the order of new scores (Q, K); what was verified is forgotten."""
        order = np.argsort(-scores, axis=1, kind="stable")
        return replace(self, scores=scores, inliers=None).ordered(order)

    def ordered(self, order: np.ndarray) -> Search:
        """With each list in this order (Q, K) of its places."""
        inliers = self.inliers
        if inliers is not None:
            inliers = np.take_along_axis(inliers, order, axis=1)
        return replace(
            self,
            scores=np.take_along_axis(self.scores, order, axis=1),
            ranks=np.take_along_axis(self.ranks, order, axis=1),
            inliers=inliers,
        )
