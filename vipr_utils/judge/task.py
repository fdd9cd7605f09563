"""Embeddings -> ranked lists with their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.judge import metrics
from vipr_utils.retrieve import rerank, search, verification
from vipr_utils.retrieve.embedding import embed


@dataclass(frozen=True)
class Retrieval:
    """Ranked lists of Q queries: scores, ranks (rows of the gallery table), hits (Q, k); metrics as in run.json."""

    scores: np.ndarray
    ranks: np.ndarray
    hits: np.ndarray
    n_relevant: np.ndarray
    metrics: dict


def retrieve(
    query_embeddings,
    gallery_embeddings,
    queries: pd.DataFrame,
    gallery: pd.DataFrame,
    *,
    k: int = 5,
    distance: str = "cosine",
    seed: int = 0,
    device="cpu",
    steps: list[str] = (),
    cache_dir: Path | None = None,
) -> Retrieval:
    """Search the gallery with every query and score the lists where products are known.

    steps: post-processing by name, see `rerank.apply`; by cosine. Their seconds are in metrics["steps"]. `verify:TOP` reads
    the original photos, whose local features are kept in cache_dir.
    A query that could not be read (NaN) is ranked by the centre of the gallery and counted as n_unreadable_queries.
    """
    q, unreadable = query_embeddings.copy(), np.isnan(query_embeddings).any(1)
    q[unreadable] = gallery_embeddings.mean(0)
    ids = {
        "query_ids": queries["image_id"].to_numpy(),
        "gallery_ids": gallery["image_id"].to_numpy(),
    }
    if steps and distance == "manhattan":
        raise ValueError(
            f"steps {list(steps)} work by cosine, got distance 'manhattan': leave the steps or the distance away"
        )
    wanted, there = queries["product_id"].to_numpy(), gallery["product_id"].to_numpy()
    if steps:
        how = _verifiers(steps, queries, gallery, cache_dir)
        found = rerank.apply(
            steps, q, gallery_embeddings, k=k, labels=there, device=device, **ids, **how
        )
        scores, ranks = found.scores, found.ranks
    else:
        scores, ranks = search.top_k(
            q, gallery_embeddings, k, distance=distance, device=device, **ids
        )
    hits = metrics.hits_from_ranks(ranks, wanted, there)
    n_relevant = metrics.count_relevant(wanted, there) - np.isin(
        ids["query_ids"], ids["gallery_ids"]
    )
    known = wanted >= 0
    summary = (
        metrics.summary(hits[known], n_relevant[known], wanted[known], seed=seed)
        if known.any()
        else {}
    )
    summary |= {"n_gallery": len(gallery), "n_unreadable_queries": int(unreadable.sum())}
    summary |= {"steps": found.seconds} if steps else {}
    return Retrieval(scores, ranks, hits, n_relevant, summary)


def _verifiers(steps: list[str], queries: pd.DataFrame, gallery: pd.DataFrame, cache_dir) -> dict:
    """depth, verify and verified_qe for `rerank.apply`: lists as long as they are verified, verification of these photos."""
    tops = [int(step.split(":")[1]) for step in steps if step.startswith("verify:")]
    last = {}

    def verify(scores, ranks, top):
        last["found"] = verification.verify(
            scores, ranks, queries, gallery, depth=top, cache_dir=cache_dir
        )
        return last["found"].scores, last["found"].ranks

    def verified_qe(q, g, scores, ranks, n):
        if "found" not in last:
            verify(scores, ranks, ranks.shape[1])
        return verification.verified_expansion(q, g, last["found"], most=n)

    return {"depth": max([100, *tops]), "verify": verify, "verified_qe": verified_qe}


def evaluate(
    model,
    store,
    pairs: dict[str, tuple[pd.DataFrame, pd.DataFrame]],
    *,
    distance: str = "cosine",
    k: int = 5,
    seed: int = 0,
    **embed_settings,
) -> dict[str, Retrieval]:
    """A Retrieval for each named (queries, gallery); every photo is embedded once. Settings as in `embed`."""
    rows = np.unique(np.concatenate([table.index for pair in pairs.values() for table in pair]))
    embeddings = embed(model, store, rows, **embed_settings)

    def of(table: pd.DataFrame) -> np.ndarray:
        return embeddings[np.searchsorted(rows, table.index)]

    return {
        n: retrieve(of(q), of(g), q, g, k=k, distance=distance, seed=seed)
        for n, (q, g) in pairs.items()
    }
