"""Exact top-k search in chunks, under cosine, euclidean or manhattan distance."""

from __future__ import annotations

import numpy as np
import torch

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

    queries (Q, D), gallery (G, D). Scores are similarities: the cosine, or minus the distance. A query never meets
    itself: gallery rows whose id equals the query's id are left out wherever they rank. Where fewer than k rows
    remain, ranks are -1 and scores -inf. Equal scores stand in gallery order.
    Raises ValueError for NaN or infinite embeddings, unequal widths, an empty gallery.
    """
    q, g = checked(queries, "query"), checked(gallery, "gallery")
    if q.shape[1] != g.shape[1]:
        raise ValueError(
            f"queries have {q.shape[1]} dimensions, the gallery {g.shape[1]}: embed both with one model"
        )
    if k < 1 or len(g) == 0:
        raise ValueError(f"top_k needs k >= 1 and a gallery, got k={k} and {len(g)} gallery rows")
    similarity = _similarity(distance)
    if distance == "cosine":
        q, g = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(g, dim=1)
    own = _own_rows(query_ids, gallery_ids, len(q), len(g))
    chunk = GALLERY_CHUNK if distance == "cosine" else GALLERY_CHUNK // 8
    scores, ranks = [], []
    for start in range(0, len(q), QUERY_CHUNK):
        block = q[start : start + QUERY_CHUNK].to(device)
        best = torch.full((len(block), 0), -torch.inf, device=device)
        rows = torch.zeros((len(block), 0), dtype=torch.long, device=device)
        for left in range(0, len(g), chunk):
            part = similarity(block, g[left : left + chunk].to(device))  # (q, g)
            _hide(part, own, start, left)
            values, at = part.topk(min(k, part.shape[1]), dim=1)
            best, rows = _merge(torch.cat([best, values], 1), torch.cat([rows, at + left], 1), k)
        scores.append(best.cpu())
        ranks.append(torch.where(torch.isneginf(best), -1, rows).cpu())
    return _padded(torch.cat(scores).numpy(), k, -np.inf), _padded(torch.cat(ranks).numpy(), k, -1)


def checked(embeddings, what: str) -> torch.Tensor:
    x = torch.as_tensor(np.asarray(embeddings, dtype=np.float32))
    if x.ndim != 2:
        raise ValueError(f"{what} embeddings must be (N, D), got shape {tuple(x.shape)}")
    bad = (~torch.isfinite(x).all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(x)} {what} embeddings hold NaN or infinity (first: row {int(bad[0])}): the model "
            "diverged or fp16 overflowed; lower the learning rate or embed in float32."
        )
    return x


def _similarity(distance: str):
    if distance == "cosine":
        return lambda a, b: a @ b.T
    if distance == "euclidean":
        return lambda a, b: -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if distance == "manhattan":
        return lambda a, b: -torch.cdist(a, b, p=1.0)
    raise ValueError(f"distance {distance!r} is unknown: use one of {DISTANCES}")


def _own_rows(
    query_ids, gallery_ids, n_queries: int, n_gallery: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query rows, gallery rows) of every pair with one id, sorted by query row."""
    if query_ids is None or gallery_ids is None:
        return np.empty(0, int), np.empty(0, int)
    if len(query_ids) != n_queries or len(gallery_ids) != n_gallery:
        raise ValueError(
            f"ids do not match: {len(query_ids)} ids for {n_queries} queries, {len(gallery_ids)} for {n_gallery} rows"
        )
    where: dict = {}
    for row, image_id in enumerate(gallery_ids):
        where.setdefault(image_id, []).append(row)
    pairs = [(q, row) for q, image_id in enumerate(query_ids) for row in where.get(image_id, ())]
    return tuple(np.array(pairs, int).reshape(-1, 2).T)


def _hide(part: torch.Tensor, own, start: int, left: int) -> None:
    """Put -inf where a query meets itself, in the block of queries from `start` and gallery rows from `left`."""
    q, g = own[0] - start, own[1] - left
    inside = (q >= 0) & (q < part.shape[0]) & (g >= 0) & (g < part.shape[1])
    part[torch.as_tensor(q[inside]), torch.as_tensor(g[inside])] = -torch.inf


def _merge(scores: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of the candidates; equal scores stand in gallery order."""
    order = rows.argsort(dim=1, stable=True)
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


def _padded(x: np.ndarray, k: int, value) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, k - x.shape[1])), constant_values=value)
