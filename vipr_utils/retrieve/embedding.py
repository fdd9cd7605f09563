"""Photos + model -> embeddings (N, D) float32, kept on disk."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from vipr_utils.data.store import Photos, loader
from vipr_utils.data.transforms import Evaluation
from vipr_utils.host.device import autocast, compute_dtype
from vipr_utils.learn import models
from vipr_utils.learn.pooling import RMAC
from vipr_utils.retrieve import engine, rerank
from vipr_utils.retrieve.cache import kept

VERSION = 1  # of the cached features: rises with the code that computes them
BLOCK = 4096  # photos whose features are on disk before the next are computed


def embed(
    model,
    store,
    rows,
    *,
    device=torch.device("cpu"),
    batch_size: int = 64,
    image_size: int = 0,
    fit: str = "squash",
    zoom: float = 1.0,
    precision: str = "auto",
    cache_dir: Path | None = None,
    features: bool = False,
) -> np.ndarray:
    """(N, D) float32 embeddings of these catalog rows, by the model's own eval transform.
    features: the pooled output before the neck instead, as it is (for training.fit_head).
    image_size: pixels, 0 takes the model's own. fit: 'squash', 'crop' or 'pad'. zoom: the central
    share of each side that is seen. precision: see `compute_dtype`. With cache_dir a photo passes
    the backbone once, whatever rows and necks are asked for. A row without photo gets NaN.
    """
    size, dtype = image_size or model.record["image_size"], compute_dtype(precision, device)
    rows = np.asarray(rows, np.int64)
    readable = store.readable[rows]
    if not readable.any():
        return np.full((len(rows), model.record["embedding_dim"]), np.nan, np.float32)
    transform = Evaluation(size, fit, model.record["interpolation"])
    fast = engine.pays(device, dtype, len(store.readable))
    forward = engine.compiled_later(model, size, dtype) if fast else type(model).features

    def pooled(rows: np.ndarray) -> np.ndarray:
        photos = Photos(store, rows, transform, zoom=zoom)
        return _forwarded(model, forward, photos, batch_size=batch_size, device=device, dtype=dtype)

    key = _key(model, store, size, fit, zoom, dtype, fast) if cache_dir else ""
    folder = cache_dir and Path(cache_dir, "pooled", key)
    found = np.stack(kept(folder, rows[readable], pooled, block=BLOCK))
    found = found if features else _through_neck(model, found)
    embeddings = np.full((len(rows), found.shape[1]), np.nan, np.float32)
    embeddings[readable] = found
    return embeddings


def _through_neck(model, pooled: np.ndarray) -> np.ndarray:
    """(N, D) float32, L2-normalised, computed where the model is, in float32."""
    device = next(model.parameters()).device
    was_training = model.neck.training
    model.neck.eval()
    with torch.inference_mode():
        blocks = torch.from_numpy(pooled).split(BLOCK)
        out = [F.normalize(model.neck(x.to(device)), dim=1).cpu().numpy() for x in blocks]
    model.neck.train(was_training)
    return np.concatenate(out)


def embed_at_sizes(model, store, rows, *, image_sizes: tuple[int, ...], **settings) -> np.ndarray:
    """(N, D) float32, L2-normalised: the sum of the embeddings of the same photos at several sizes
    in pixels.

    Settings as in `embed`. Costs as much as the sizes together. Source: Gordo et al. 2017,
    arXiv:1610.07940 (multi-resolution).
    """
    return rerank.unit(
        sum(embed(model, store, rows, image_size=px, **settings) for px in image_sizes)
    )


def embed_zoomed(
    model, store, rows, *, zoom: tuple[float, float], customer, **settings
) -> np.ndarray:
    """(N, D) float32, settings as in `embed`: customers' photos through the first zoom, the others
    through the second. customer (N,) bool, or one for all.
    """
    rows = np.asarray(rows, np.int64)
    shares = np.broadcast_to(np.where(customer, *zoom), rows.shape)
    seen = {share: shares == share for share in np.unique(shares)}
    parts = [embed(model, store, rows[at], zoom=share, **settings) for share, at in seen.items()]
    if len(parts) == 1:
        return parts[0]
    found = np.empty((len(rows), parts[0].shape[1]), np.float32)
    for at, part in zip(seen.values(), parts):
        found[at] = part
    return found


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
    """The model with the whitening of its R-MAC pooling set to PCA whitening of the regions of
    these photos.

    The layer is filled in place and stays trainable. power and refusals as in
    `rerank.fit_whitening`: there must be more regions (14 a photo) than channels; a few thousand
    photos are plenty. Source: Gordo et al. 2017, arXiv:1610.07940.
    """
    if not isinstance(model.pooling, RMAC):
        raise ValueError(
            f"pooling is {model.record['pooling']!r} and has no regions: create the model with "
            "pooling='rmac'"
        )
    rows, size = np.asarray(rows), image_size or model.record["image_size"]
    seen = Evaluation(size, fit, model.record["interpolation"])
    photos = Photos(store, rows[store.readable[rows]], seen)

    def regions(model, pixels: torch.Tensor) -> torch.Tensor:
        return model.pooling.regions(model.maps(pixels)).flatten(0, -2)

    dtype = compute_dtype(precision, device)
    found = _forwarded(model, regions, photos, batch_size=batch_size, device=device, dtype=dtype)
    white = rerank.fit_whitening(found, found.shape[1], power=power)
    layer = model.pooling.whitening
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(white.matrix.T))
        layer.bias.copy_(torch.as_tensor(-white.mean @ white.matrix))
    return model


def with_learned_whitening(model, store, rows: pd.DataFrame, dim: int, **settings):
    """A copy of the model that ends in a learned whitening to `dim` numbers, fitted on the photos
    of the catalog rows given and their products (see `rerank.fit_learned_whitening`), in place of
    its neck. settings as in `embed`, and the image_size at which it will be used: features shift
    with it.
    """
    features = embed(model, store, rows.index, features=True, **settings)
    seen = ~np.isnan(features).any(1)
    fitted = rerank.fit_learned_whitening(features[seen], rows["product_id"][seen], dim)
    return models.with_projection(model, fitted.mean, fitted.matrix)


def _forwarded(model, forward, photos: Photos, *, batch_size: int, device, dtype) -> np.ndarray:
    """forward(model, pixels) of all photos, float32, in their order; the model in eval mode
    meanwhile. Where there are several GPUs each takes its part of every batch."""
    was_training, found = model.training, []
    model.eval().to(device, memory_format=torch.channels_last)
    places = _places(device)
    replicas = [model, *(copy.deepcopy(model).to(place) for place in places[1:])]
    with torch.inference_mode(), autocast(device, dtype):
        for pixels, _, _ in loader(photos, batch_size=batch_size, device=device):
            parts = [  # a GPU is asked for its part, not waited for, before the next is
                forward(
                    replica, part.to(place, memory_format=torch.channels_last, non_blocking=True)
                ).float()
                for replica, place, part in zip(replicas, places, pixels.chunk(len(places)))
            ]
            found += [part.cpu().numpy() for part in parts]
    model.train(was_training)
    return np.concatenate(found)


def _places(device: torch.device) -> list[torch.device]:
    """Where to embed: the device; all GPUs where it is 'cuda' without a number."""
    if device != torch.device("cuda"):
        return [device]
    return [device, *(torch.device("cuda", i) for i in range(1, torch.cuda.device_count()))]


def _key(model, store, size: int, fit: str, zoom: float, dtype, fast: bool) -> str:
    """What a photo's features depend on beside its pixels; the neck has no part in them."""
    transform = [model.record[k] for k in ("name", "pooling", "mean", "std", "interpolation")]
    settings = [VERSION, *transform, size, fit, zoom, str(dtype), store.key]
    settings += ["openvino"] if fast else []
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("neck."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
