"""What is alike in a catalog, or does not belong there: copies, leaks, visits, odd ones out."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
from scipy.sparse import coo_array

from vipr_utils.data import catalog


def difference_hash(image: np.ndarray) -> np.uint64:
    """64 bits, one per pair of horizontal neighbours of the 9 x 8 grey thumbnail.

    Near duplicates differ in few of them. Source: Krawetz 2013, "Kind of Like That".
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    brighter = thumbnail[:, 1:] > thumbnail[:, :-1]  # (8, 8)
    return np.packbits(brighter).view(np.uint64)[0]


def colour_layout(image: np.ndarray) -> np.ndarray:
    """(256,) uint16: how many of 1,024 pixels in each quarter of a picture have each of 64 colours.

    64 x 64 pixels are picked evenly and their channels cut to 2 bits. All of it is in whole
    numbers: any processor finds the same. Source: Swain, Ballard 1991, "Color indexing".
    """
    y, x = ((2 * np.arange(64) + 1) * side // 128 for side in image.shape[:2])
    colours = (image[np.ix_(y, x)] >> 6) @ np.array([16, 4, 1], np.uint8)  # (64, 64) of 0..63
    quarters = np.arange(4).reshape(2, 2).repeat(32, 0).repeat(32, 1)  # (64, 64) of 0..3
    return np.bincount((64 * quarters + colours).ravel(), minlength=256).astype(np.uint16)


def border_whiteness(image: np.ndarray) -> float:
    """Share of the picture's border, 4 % of each side, that is nearly white, in 0..1.

    Nearly white: no channel under 226 of 255, and less than 20 between two channels. Shop photos
    stand on white, so this tells domains apart where no table does.
    """
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)  # whatever the shape
    white = (small.min(2) > 225) & (np.ptp(small, axis=2) < 20)
    border = np.pad(np.zeros((118, 118), bool), 5, constant_values=True)
    return white[border].mean()


def similar(rows: pd.DataFrame, embeddings: np.ndarray, *, similarity: float = 0.8) -> pd.Series:
    """A number for each row: photos of a product that a chain of like embeddings connects.

    embeddings (N, D), L2-normalised, one for each row; two are alike over this cosine. For
    cleaning: the last digits of a processor may move a photo, so no split is made by it.
    """
    return catalog.chains(rows, lambda at: embeddings[at] @ embeddings[at].T > similarity)


def linked(rows: pd.DataFrame, pairs: np.ndarray) -> pd.Series:
    """A number for each row: photos of a product that a chain of pairs (M, 2) of rows connects.

    The pairs are those that passed a test, such as enough inliers of a spatial verification; pairs
    across products count for nothing.
    """
    i, j = rows.index.get_indexer(np.ravel(pairs)).reshape(-1, 2).T
    links = coo_array((np.ones(len(i)), (i, j)), shape=(len(rows), len(rows))).tocsr()
    return catalog.chains(rows, lambda positions: links[positions][:, positions])


def clean(rows: pd.DataFrame, groups: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(kept, dropped): a photo is dropped when its group is not the largest of its product.

    groups: a number for each row, from `similar` (like photos) or `linked` (verified pairs). Where
    several are the largest, as when nothing was linked, all of them stay. dropped also holds the
    photos in_group and in_main, the product's largest.
    Mislabelled photos go, and right ones that no chain reaches go with them (the back of a box):
    look at what is dropped. On the grocery set with 5 % of the train labels made wrong, `similar`
    of frozen EfficientNet-Lite0 embeddings at 0.5, 0.6, 0.7 drops 62, 74, 89 % of the wrong photos
    and 1, 4, 11 % of the right ones. Verified pairs drop 98 % of the wrong ones there and 43 % of
    the right ones, most of them fruit: on drawn packages they drop 78 % and none.
    Source: Gordo et al. 2017, arXiv:1610.07940 (the main component of a class's verified photos).
    """
    product = rows["product_id"]
    in_group = product.groupby([product, groups]).transform("size")
    in_main = in_group.groupby(product).transform("max")
    small = in_group < in_main
    return rows[~small], rows.assign(in_group=in_group, in_main=in_main)[small]


def exact_duplicates(photos: pd.DataFrame, hashes: pd.Series) -> np.ndarray:
    """Pairs (M, 2) of catalog rows, a copy and the first of its kind: files equal byte by byte.

    hashes: a hash of the file of each row, `Store.files`. Copies that were saved anew differ in
    their bytes: `near_duplicates` finds them.
    """
    rows = photos.index.to_series()
    first = rows.groupby(hashes[rows]).transform("first")
    pairs = np.stack([rows, first], 1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def near_duplicates(hashes: np.ndarray, max_bits: int = 4) -> np.ndarray:
    """Pairs (M, 2) of positions i < j whose 64-bit hashes (N,) differ in at most max_bits bits.

    Every hash is compared with all that come after it: 142,000 take seconds.
    """
    pairs = [np.empty((0, 2), int)]
    for i in range(len(hashes)):
        near = np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= max_bits
        j = i + 1 + np.flatnonzero(near)
        pairs.append(np.stack([np.full(len(j), i), j], 1))
    return np.concatenate(pairs)


def leaks(photos: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    """Of pairs (M, 2) of catalog rows, those between train and test: train, test, same_product.

    A query that has its own copy in the gallery is answered by memory; under another product the
    copy is a wrong label. same_product is NaN where the test photo's label is unknown.
    """
    # a catalog lists its train photos first
    found = pd.DataFrame(np.sort(pairs, axis=1), columns=["train", "test"])
    split, product = photos["split"], photos["product_id"]
    across = found["train"].map(split) != found["test"].map(split)
    asked = found["test"].map(product)
    same_product = found["train"].map(product) == asked
    found["same_product"] = same_product.where(asked >= 0)
    return found[across].reset_index(drop=True)
