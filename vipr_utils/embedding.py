"""Photos + model -> embeddings (N, D) float32, kept on disk; embeddings -> ranked lists with their scores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipr_utils import host, images, metrics, models, rerank, search, verification


def embed(
    model, store, rows, *, device=torch.device("cpu"), batch_size: int = 64, image_size: int = 0, fit: str = "squash",
    precision: str = "auto", cache_dir: Path | None = None, features: bool = False,
) -> np.ndarray:
    """(N, D) float32 embeddings of the catalog rows given, in their order, with the model's own eval transform.
    features: the pooled backbone output before the neck instead, as it is (for training.fit_head).

    image_size: pixels, 0 takes the model's own. fit: 'squash', 'crop' or 'pad'. precision: see `host.precision`. With
    cache_dir the result is kept under a key of weights, data, rows, transform and precision. A row that the store could
    not read gets NaN, which `retrieve` counts and `search.top_k` refuses.
    """
    size = image_size or model.record["image_size"]
    dtype = host.precision(precision, device)
    path = Path(cache_dir) / "embeddings" / f"{_key(model, store, rows, size, fit, features, dtype)}.npy" if cache_dir else None
    if path and path.exists():
        return np.load(path)
    rows = np.asarray(rows)
    readable = store.readable[rows]
    forward = model.features if features else model
    how = {"device": device, "batch_size": batch_size, "size": size, "fit": fit, "dtype": dtype}
    out = _forwarded(forward, model, store, rows[readable], **how)
    width = out[0].shape[1] if out else model.record["embedding_dim"]
    embeddings = np.full((len(rows), width), np.nan, np.float32)
    if out:
        embeddings[readable] = np.concatenate(out)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with host.whole_file(path) as part, open(part, "wb") as file:
            np.save(file, embeddings)
    return embeddings


def embed_at_sizes(model, store, rows, *, image_sizes: tuple[int, ...], **settings) -> np.ndarray:
    """(N, D) float32, L2-normalised: the sum of the embeddings of the same photos at several sizes in pixels.

    Settings as in `embed`. Costs as much as the sizes together.
    Source: Gordo et al. 2017, arXiv:1610.07940 (multi-resolution).
    """
    return rerank.unit(sum(embed(model, store, rows, image_size=px, **settings) for px in image_sizes))


def fit_region_whitening(
    model, store, rows, *, device=torch.device("cpu"), batch_size: int = 64, image_size: int = 0, fit: str = "squash",
    precision: str = "auto", power: float = 1.0,
):  # fmt: skip
    """The model with the whitening of its R-MAC pooling set to PCA whitening of the regions of these photos.

    The layer is filled in place and stays trainable. power and refusals as in `rerank.fit_whitening`: there must be more
    regions (14 a photo) than channels; a few thousand photos are plenty.
    Source: Gordo et al. 2017, arXiv:1610.07940.
    """
    if not isinstance(model.pooling, models.RMAC):
        raise ValueError(f"pooling is {model.record['pooling']!r} and has no regions: create the model with pooling='rmac'")
    rows, size = np.asarray(rows), image_size or model.record["image_size"]
    rows = rows[store.readable[rows]]
    dtype = host.precision(precision, device)
    how = {"device": device, "batch_size": batch_size, "size": size, "fit": fit, "dtype": dtype}
    regions = _forwarded(lambda x: model.pooling.regions(model.maps(x)), model, store, rows, **how)
    regions = np.concatenate([r.reshape(-1, r.shape[-1]) for r in regions])
    white, layer = rerank.fit_whitening(regions, regions.shape[1], power=power), model.pooling.whitening
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(white.matrix.T))
        layer.bias.copy_(torch.as_tensor(-white.mean @ white.matrix))
    return model


def with_learned_whitening(model, store, rows: pd.DataFrame, dim: int, **settings):
    """A copy of the model that ends in a learned whitening to `dim` numbers, fitted on the photos of the catalog rows given
    and their products (see `rerank.fit_learned_whitening`), in place of its neck. settings as in `embed`, and the image_size
    at which it will be used: features shift with it.
    """
    features = embed(model, store, rows.index, features=True, **settings)
    seen = ~np.isnan(features).any(1)
    fitted = rerank.fit_learned_whitening(features[seen], rows["product_id"].to_numpy()[seen], dim)
    return models.with_projection(model, fitted.mean, fitted.matrix)


def _forwarded(forward, model, store, rows: np.ndarray, *, device, batch_size, size, dtype, fit="squash") -> list:
    """forward(pixels) of every batch of the photos, as float32 arrays; the model in eval mode meanwhile."""
    r, out = model.record, []
    transform = images.eval_transform(size, mean=r["mean"], std=r["std"], interpolation=r["interpolation"], fit=fit)
    photos = images.Photos(store, rows, transform)
    loader = images.loader(photos, batch_size=batch_size, device=device)
    was_training = model.training
    model.eval().to(device, memory_format=torch.channels_last)
    with torch.inference_mode(), host.autocast(device, dtype):
        for pixels, _, _ in loader:
            pixels = pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
            out.append(forward(pixels).float().cpu().numpy())
    model.train(was_training)
    return out


def _key(model, store, rows, size: int, fit: str, features: bool, dtype) -> str:
    seen_as = [model.record[k] for k in ("name", "pooling", "mean", "std", "interpolation")]
    digest = hashlib.sha256(json.dumps([seen_as, size, fit, features, str(dtype), store.key]).encode())
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


@dataclass(frozen=True)
class Retrieval:
    """Ranked lists of Q queries: scores, ranks (rows of the gallery table), hits (Q, k); metrics as in run.json."""

    scores: np.ndarray
    ranks: np.ndarray
    hits: np.ndarray
    n_relevant: np.ndarray
    metrics: dict


def retrieve(
    query_embeddings, gallery_embeddings, queries: pd.DataFrame, gallery: pd.DataFrame, *, k: int = 5,
    distance: str = "cosine", seed: int = 0, device="cpu", steps: list[str] = (), cache_dir: Path | None = None,
) -> Retrieval:  # fmt: skip
    """Search the gallery with every query and score the lists where products are known.

    steps: post-processing by name, see `rerank.apply`; by cosine. Their seconds are in metrics["steps"]. `verify:TOP` reads
    the original photos, whose local features are kept in cache_dir.
    A query that could not be read (NaN) is ranked by the centre of the gallery and counted as n_unreadable_queries.
    """
    q, unreadable = query_embeddings.copy(), np.isnan(query_embeddings).any(1)
    q[unreadable] = gallery_embeddings.mean(0)
    ids = {"query_ids": queries["image_id"].to_numpy(), "gallery_ids": gallery["image_id"].to_numpy()}
    if steps and distance == "manhattan":
        raise ValueError(f"steps {list(steps)} work by cosine, got distance 'manhattan': leave the steps or the distance away")
    wanted, there = queries["product_id"].to_numpy(), gallery["product_id"].to_numpy()
    if steps:
        how = _verifiers(steps, queries, gallery, cache_dir)
        found = rerank.apply(steps, q, gallery_embeddings, k=k, labels=there, device=device, **ids, **how)
        scores, ranks = found.scores, found.ranks
    else:
        scores, ranks = search.top_k(q, gallery_embeddings, k, distance=distance, device=device, **ids)
    hits = metrics.hits_from_ranks(ranks, wanted, there)
    n_relevant = metrics.count_relevant(wanted, there) - np.isin(ids["query_ids"], ids["gallery_ids"])
    known = wanted >= 0
    summary = metrics.summary(hits[known], n_relevant[known], wanted[known], seed=seed) if known.any() else {}
    summary |= {"n_gallery": len(gallery), "n_unreadable_queries": int(unreadable.sum())}
    summary |= {"steps": found.seconds} if steps else {}
    return Retrieval(scores, ranks, hits, n_relevant, summary)


def _verifiers(steps: list[str], queries: pd.DataFrame, gallery: pd.DataFrame, cache_dir) -> dict:
    """depth, verify and verified_qe for `rerank.apply`: lists as long as they are verified, verification of these photos."""
    tops = [int(step.split(":")[1]) for step in steps if step.startswith("verify:")]
    last = {}

    def verify(scores, ranks, top):
        last["found"] = verification.verify(scores, ranks, queries, gallery, depth=top, cache_dir=cache_dir)
        return last["found"].scores, last["found"].ranks

    def verified_qe(q, g, scores, ranks, n):
        if "found" not in last:
            verify(scores, ranks, ranks.shape[1])
        return verification.verified_expansion(q, g, last["found"], most=n)

    return {"depth": max([100, *tops]), "verify": verify, "verified_qe": verified_qe}


def evaluate(
    model, store, pairs: dict[str, tuple[pd.DataFrame, pd.DataFrame]], *, distance: str = "cosine", k: int = 5,
    seed: int = 0, **embed_settings,
) -> dict[str, Retrieval]:  # fmt: skip
    """A Retrieval for each named (queries, gallery); every photo is embedded once. Settings as in `embed`.
    """
    rows = np.unique(np.concatenate([table.index for pair in pairs.values() for table in pair]))
    embeddings = embed(model, store, rows, **embed_settings)

    def of(table: pd.DataFrame) -> np.ndarray:
        return embeddings[np.searchsorted(rows, table.index)]

    return {n: retrieve(of(q), of(g), q, g, k=k, distance=distance, seed=seed) for n, (q, g) in pairs.items()}
