"""Exact top-k search in chunks, under cosine, euclidean or manhattan distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from vipr_utils.host.progress import reporter
from vipr_utils.learn.losses import DISTANCES

QUERY_CHUNK, GALLERY_CHUNK = 1024, 16384  # one block of scores is 64 MB


def top_k(
    queries,
    gallery,
    k: int = 5,
    *,
    distance: str = "cosine",
    query_ids=None,
    gallery_ids=None,
    device="cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ranks), both (Q, k): the k most similar gallery rows of each query, best first.

    queries (Q, D), gallery (G, D). Scores are similarities: the cosine, or minus the distance. A
    query never meets itself: gallery rows whose id equals the query's id are left out wherever they
    rank. Where fewer than k rows remain, ranks are -1 and scores -inf. Equal scores stand in
    gallery order. The gallery is sent to the device once. Raises ValueError for NaN or infinite
    embeddings, unequal widths, an empty gallery.
    """
    q, g = checked(queries, "query"), checked(gallery, "gallery")
    _check_sizes(q, g, k, distance)
    query_ids, gallery_ids = _numbered(query_ids, gallery_ids, q, g)
    of_gallery = [_placed(part, device, distance) for part in g.split(GALLERY_CHUNK)]
    found, blocks = [], q.split(QUERY_CHUNK)
    reached = reporter(f"blocks of {QUERY_CHUNK:,} queries searched", len(blocks))
    for block in blocks:
        ids, query_ids = np.split(query_ids, [len(block)])
        block = _placed(block, device, distance)
        best = torch.full((len(block), k), -torch.inf, device=device)
        rows = torch.full_like(best, -1, dtype=torch.long)
        left = 0
        for section in of_gallery:
            numbers = gallery_ids[left : left + len(section)]
            part = _similarity(block, section, distance)  # (q, g)
            if np.isin(ids, numbers).any():  # seldom, and to compare all takes longer than topk
                part[torch.from_numpy(ids[:, None] == numbers)] = -torch.inf
            best, rows = _merged(best, rows, part, left)
            left += len(section)
        found.append((best.cpu(), rows.cpu()))
        reached(len(found))
    return tuple(torch.cat(parts).numpy() for parts in zip(*found))


def _placed(x: torch.Tensor, device, distance: str) -> torch.Tensor:
    """x (N, D) on the device as it is compared: of length 1 for the cosine."""
    x = x.to(device)
    return F.normalize(x, dim=1) if distance == "cosine" else x


def checked(embeddings, what: str) -> torch.Tensor:
    """(N, D) float32 on the CPU. Raises ValueError for another shape, NaN and infinity."""
    x = torch.as_tensor(np.asarray(embeddings, dtype=np.float32))
    if x.ndim != 2:
        raise ValueError(f"{what} embeddings must be (N, D), got shape {tuple(x.shape)}")
    low, high = x.aminmax(dim=1)  # NaN where a row holds one; without a copy of all
    bad = (~(torch.isfinite(low) & torch.isfinite(high))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(x)} {what} embeddings hold NaN or infinity (first: row "
            f"{int(bad[0])}): the model diverged or fp16 overflowed; lower the learning rate or "
            "embed in float32."
        )
    return x


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


def _similarity(a: torch.Tensor, b: torch.Tensor, distance: str) -> torch.Tensor:
    """(Q, G): larger is nearer."""
    if distance == "cosine":
        return a @ b.T
    power = 1.0 if distance == "manhattan" else 2.0
    return -torch.cdist(a, b, p=power, compute_mode="donot_use_mm_for_euclid_dist")


def _numbered(query_ids, gallery_ids, q: torch.Tensor, g: torch.Tensor) -> list[np.ndarray]:
    """Both sides' ids as whole numbers (Q,) and (G,), equal where the ids are; without ids no two
    are equal.
    """
    if query_ids is None or gallery_ids is None:
        query_ids, gallery_ids = np.zeros(len(q)), np.ones(len(g))
    if len(query_ids) != len(q) or len(gallery_ids) != len(g):
        raise ValueError(
            f"ids do not match: {len(query_ids)} ids for {len(q)} queries, {len(gallery_ids)} for "
            f"{len(g)} rows"
        )
    return np.split(pd.factorize(np.concatenate([query_ids, gallery_ids]))[0], [len(q)])


def _merged(
    best: torch.Tensor, rows: torch.Tensor, part: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of those so far and of a part's columns, the gallery rows from `left` on; equal
    scores stand in gallery order, and -inf never takes a place.
    """
    k = best.shape[1]
    at = _largest(part, k)
    scores = torch.cat([best, part.gather(1, at)], 1)
    rows = torch.cat([rows, at + left], 1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


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
    own photos alone still knows its customers' photos, and steps may look at them.
    """

    queries: np.ndarray
    gallery: np.ndarray
    query_rows: pd.DataFrame
    gallery_rows: pd.DataFrame
    scores: np.ndarray | None = None
    ranks: np.ndarray | None = None
    inliers: np.ndarray | None = None
    answers: np.ndarray | None = None
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
        lists = [self._nearest(rows, k) for rows in kinds]
        scores, ranks = (np.hstack(parts) for parts in zip(*lists))
        return replace(self, ranks=ranks).sorted_by(scores)

    def _nearest(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, ranks) (Q, k) among these gallery rows (R,)."""
        scores, ranks = top_k(
            self.queries,
            self.gallery if self.answers is None else self.gallery[rows],  # no copy of it
            k,
            query_ids=self.query_rows["image_id"],
            gallery_ids=self.gallery_rows["image_id"].iloc[rows],
            device=self.device,
        )
        return scores, np.where(ranks < 0, -1, rows[ranks])

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
