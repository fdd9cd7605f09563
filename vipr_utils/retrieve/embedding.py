"""Photos + model -> embeddings (N, D) float32, kept on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipr_utils.data import transforms
from vipr_utils.data.store import Photos, loader
from vipr_utils.host.device import autocast, compute_dtype
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.learn.pooling import RMAC
from vipr_utils.retrieve import rerank


def embed(
    model,
    store,
    rows,
    *,
    device=torch.device("cpu"),
    batch_size: int = 64,
    image_size: int = 0,
    fit: str = "squash",
    precision: str = "auto",
    cache_dir: Path | None = None,
    features: bool = False,
) -> np.ndarray:
    """(N, D) float32 embeddings of the catalog rows given, in their order, with the model's own eval transform.
    features: the pooled backbone output before the neck instead, as it is (for training.fit_head).

    image_size: pixels, 0 takes the model's own. fit: 'squash', 'crop' or 'pad'. precision: see `compute_dtype`. With
    cache_dir the result is kept under a key of weights, data, rows, transform and precision. A row that the store could
    not read gets NaN, which `retrieve` counts and `search.top_k` refuses.
    """
    size = image_size or model.record["image_size"]
    dtype = compute_dtype(precision, device)
    path = (
        Path(cache_dir)
        / "embeddings"
        / f"{_key(model, store, rows, size, fit, features, dtype)}.npy"
        if cache_dir
        else None
    )
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
        with whole_file(path) as part, open(part, "wb") as file:
            np.save(file, embeddings)
    return embeddings


def embed_at_sizes(model, store, rows, *, image_sizes: tuple[int, ...], **settings) -> np.ndarray:
    """(N, D) float32, L2-normalised: the sum of the embeddings of the same photos at several sizes in pixels.

    Settings as in `embed`. Costs as much as the sizes together.
    Source: Gordo et al. 2017, arXiv:1610.07940 (multi-resolution).
    """
    return rerank.unit(
        sum(embed(model, store, rows, image_size=px, **settings) for px in image_sizes)
    )


def fit_region_whitening(
    model,
    store,
    rows,
    *,
    device=torch.device("cpu"),
    batch_size: int = 64,
    image_size: int = 0,
    fit: str = "squash",
    precision: str = "auto",
    power: float = 1.0,
):
    """The model with the whitening of its R-MAC pooling set to PCA whitening of the regions of these photos.

    The layer is filled in place and stays trainable. power and refusals as in `rerank.fit_whitening`: there must be more
    regions (14 a photo) than channels; a few thousand photos are plenty.
    Source: Gordo et al. 2017, arXiv:1610.07940.
    """
    if not isinstance(model.pooling, RMAC):
        raise ValueError(
            f"pooling is {model.record['pooling']!r} and has no regions: create the model with pooling='rmac'"
        )
    rows, size = np.asarray(rows), image_size or model.record["image_size"]
    rows = rows[store.readable[rows]]
    dtype = compute_dtype(precision, device)
    how = {"device": device, "batch_size": batch_size, "size": size, "fit": fit, "dtype": dtype}
    regions = _forwarded(lambda x: model.pooling.regions(model.maps(x)), model, store, rows, **how)
    regions = np.concatenate([r.reshape(-1, r.shape[-1]) for r in regions])
    white, layer = (
        rerank.fit_whitening(regions, regions.shape[1], power=power),
        model.pooling.whitening,
    )
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


def _forwarded(
    forward, model, store, rows: np.ndarray, *, device, batch_size, size, dtype, fit="squash"
) -> list:
    """forward(pixels) of every batch of the photos, as float32 arrays; the model in eval mode meanwhile."""
    r, out = model.record, []
    transform = transforms.eval_transform(
        size, mean=r["mean"], std=r["std"], interpolation=r["interpolation"], fit=fit
    )
    photos = Photos(store, rows, transform)
    batches = loader(photos, batch_size=batch_size, device=device)
    was_training = model.training
    model.eval().to(device, memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(device, dtype):
        for pixels, _, _ in batches:
            pixels = pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
            out.append(forward(pixels).float().cpu().numpy())
    model.train(was_training)
    return out


def _key(model, store, rows, size: int, fit: str, features: bool, dtype) -> str:
    seen_as = [model.record[k] for k in ("name", "pooling", "mean", "std", "interpolation")]
    digest = hashlib.sha256(
        json.dumps([seen_as, size, fit, features, str(dtype), store.key]).encode()
    )
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
