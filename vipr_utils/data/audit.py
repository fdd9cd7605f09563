"""What is wrong with a catalog, or alike in it: copies, leaks, visits, photos that do not belong."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vipr_utils.data import catalog
from vipr_utils.data.store import read_image
from vipr_utils.host.device import cores
from vipr_utils.host.files import whole_file


def difference_hash(image: np.ndarray) -> np.uint64:
    """64 bits, one per pair of horizontal neighbours of the 9 x 8 grey thumbnail: near duplicates differ in few.
    Source: Krawetz 2013, "Kind of Like That"."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)[0]


def colour_layout(image: np.ndarray) -> np.ndarray:
    """(256,) uint16: how many of 1,024 pixels in each quarter of the picture (H, W, 3) have each of 64 colours.

    64 x 64 pixels are picked evenly and their channels cut to 2 bits. All of it is in whole numbers: any processor finds the
    same. Source: Swain, Ballard 1991, "Color indexing".
    """
    y, x = ((2 * np.arange(64) + 1) * side // 128 for side in image.shape[:2])
    colours = (image[y[:, None], x] >> 6) @ np.array([16, 4, 1], np.uint8)  # (64, 64) of 0..63
    quarters = colours.reshape(2, 32, 2, 32).swapaxes(1, 2).reshape(4, -1)
    return np.concatenate([np.bincount(q, minlength=64) for q in quarters]).astype(np.uint16)


def colour_layouts(photos: pd.DataFrame, *, cache_dir: Path) -> np.ndarray:
    """(N, 256) uint16: the `colour_layout` of each catalog row given, of its file as it came; kept in cache_dir."""
    root = Path(photos.attrs["root"])
    files = hashlib.sha256("\n".join(photos["path"]).encode()).hexdigest()[:16]
    kept = Path(cache_dir) / "layouts" / f"{photos.attrs['fingerprint']}-{files}.npy"
    if kept.is_file():
        return np.load(kept)

    def layout(path: str) -> np.ndarray:
        return colour_layout(read_image(root / path, least_px=64))

    with ThreadPoolExecutor(cores()) as pool:
        layouts = np.stack(list(pool.map(layout, photos["path"])))
    with whole_file(kept) as part, open(part, "wb") as file:
        np.save(file, layouts)
    return layouts


def border_whiteness(image: np.ndarray, *, width: float = 0.04) -> float:
    """Share of the picture's border (4 % of each side) that is nearly white and nearly grey, in 0..1."""
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA).astype(np.int16)
    w = max(1, round(128 * width))
    border = np.concatenate(
        [side.reshape(-1, 3) for side in (small[:w], small[-w:], small[:, :w], small[:, -w:])]
    )
    return float(((border.min(1) > 225) & (np.ptp(border, axis=1) < 20)).mean())


def similar(rows: pd.DataFrame, embeddings: np.ndarray, *, similarity: float = 0.8) -> pd.Series:
    """A number for each row: photos of one product that a chain of cosine similarities over `similarity` connects.

    embeddings (N, D), L2-normalised, one for each row. For cleaning: the last digits of a processor may move a photo.
    """
    return catalog.chains(rows, lambda at: embeddings[at] @ embeddings[at].T > similarity)


def linked(rows: pd.DataFrame, pairs: np.ndarray) -> pd.Series:
    """A number for each row: photos of one product that a chain of pairs (M, 2) of row numbers connects.

    The pairs are those that passed a test, such as enough inliers of a spatial verification; pairs across products and of
    other rows count for nothing.
    """
    at = rows.index.get_indexer(np.asarray(pairs, np.int64).ravel()).reshape(-1, 2)
    product = rows["product_id"].to_numpy()
    i, j = at[(at >= 0).all(1) & (product[at[:, 0]] == product[at[:, 1]])].T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(rows), len(rows)))
    return pd.Series(connected_components(graph, directed=False)[1], rows.index)


def clean(rows: pd.DataFrame, groups: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(kept, dropped) of the rows: a photo is dropped when its group is smaller than the largest one of its product.

    groups: a number for each row, from `similar` (like photos) or `linked` (verified pairs). Where no group is the
    largest alone, as when nothing was linked, all of the largest stay. dropped also holds in_group, in_main (photos) and
    reason. Source: Gordo et al. 2017, arXiv:1610.07940 (the main component of the graph of verified photos of a class).
    Mislabelled photos go, and right ones that no chain reaches go with them (the back of a box): look at what is dropped.
    On the grocery set with 5 % of the train labels made wrong, `similar` of frozen EfficientNet-Lite0 embeddings at similarity
    0.5, 0.6, 0.7 drop 62, 74, 89 % of the wrong photos and 1, 4, 11 % of the right ones.
    Pairs of `verification.verified_pairs` drop 98 % of the wrong ones there and 43 % of the right ones, most of them fruit: on
    drawn packages they drop 78 % and none.
    """
    size = rows.groupby([rows["product_id"], groups.loc[rows.index]])["product_id"].transform(
        "size"
    )
    main = size.groupby(rows["product_id"]).transform("max")
    small = size < main
    dropped = rows[small].assign(in_group=size[small], in_main=main[small])
    count = (
        dropped["in_group"].astype(str)
        + " linked, the product's main group has "
        + dropped["in_main"].astype(str)
    )
    return rows[~small], dropped.assign(reason=count)


def exact_duplicates(catalog: pd.DataFrame) -> pd.DataFrame:
    """Photos whose files are equal byte by byte: row, copy_of (rows of the catalog). Hashes only files of equal size."""
    root = Path(catalog.attrs["root"])
    sizes = pd.Series([os.path.getsize(root / p) for p in catalog["path"]], catalog.index)
    same_size = sizes[sizes.duplicated(keep=False)].index
    hashes = pd.Series(
        [
            hashlib.sha256((root / p).read_bytes()).hexdigest()
            for p in catalog.loc[same_size, "path"]
        ],
        same_size,
        dtype=object,
    )
    first = {h: row for row, h in reversed(list(hashes.items()))}
    pairs = [(row, first[h]) for row, h in hashes.items() if first[h] != row]
    return pd.DataFrame(pairs, columns=["row", "copy_of"], dtype=np.int64)


def near_duplicates(hashes: np.ndarray, max_bits: int = 4) -> np.ndarray:
    """Pairs (M, 2) of positions i < j whose 64-bit hashes (N,) uint64 differ in at most max_bits bits. Exact.

    Hashes that differ in b bits agree in at least one of b + 1 bands, so only photos that share a band are compared:
    Manku et al. 2007. A crowded band (blank photos) is compared in blocks and stays within memory.
    """
    hashes, found = np.asarray(hashes, np.uint64), []
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    for low, high in zip(edges, edges[1:]):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for shared in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for start in range(0, len(shared) if len(shared) > 1 else 0, 1024):
                rows = shared[start : start + 1024]
                close = np.bitwise_count(hashes[rows][:, None] ^ hashes[shared]) <= max_bits
                i, j = np.nonzero(close)
                found.append(np.stack([rows[i], shared[j]], 1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), int)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def leaks(catalog: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    """Of pairs (M, 2) of catalog rows, those between train and test: train, test, same_product."""
    pairs = np.asarray(pairs, int).reshape(-1, 2)
    splits = catalog["split"].to_numpy()[pairs]
    pairs, splits = pairs[splits[:, 0] != splits[:, 1]], splits[splits[:, 0] != splits[:, 1]]
    train = np.where(splits[:, 0] == "train", pairs[:, 0], pairs[:, 1])
    test = np.where(splits[:, 0] == "train", pairs[:, 1], pairs[:, 0])
    product = catalog["product_id"].to_numpy()
    return pd.DataFrame(
        {"train": train, "test": test, "same_product": product[train] == product[test]}
    )
