"""Spatial verification: do two photos show the same printed thing?

The system of Chum 2007, "Total Recall" (ICCV): SIFT features matched one to one, the homography
that most matches agree with, lists ordered by its inliers, queries expanded by what was verified.
Every step looks at one query alone and is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from vipr_utils.data.store import BrokenImage, read_image
from vipr_utils.host.device import cores
from vipr_utils.retrieve.cache import kept, place
from vipr_utils.retrieve.rerank import expanded
from vipr_utils.retrieve.search import Search

VERSION = 2  # of what is cached: rises with the code that computes it
PX = 640  # longest side of the picture that is looked at
ENLARGED = 2.0  # a small photo at most so many times
KEYPOINTS = 1000  # of a photo, the strongest
RATIO = 0.85  # nearest over second nearest distance; Lowe 2004 takes 0.8, geometry judges here too
TOLERANCE_PX = 4.0  # of a match that a homography explains
LEAST = 15  # inliers of a verified photo; unrelated pictures full of shapes have up to 11
SHARE = 0.7  # of its list's most inliers, for a photo to expand its query
SAMPLE = 16  # photos by which time is estimated
MOST_BYTES = 4 * 2**30  # of local features in memory
KEYPOINT = np.dtype([("xy", np.float32, 2), ("descriptor", np.uint8, 128)])
PHOTO_BYTES = KEYPOINTS * KEYPOINT.itemsize  # 136 kB, in memory and on disk

# ---------------------------------------------------------------------------------------- features


def features(photos: pd.DataFrame, *, cache_dir: Path | None = None) -> list[np.ndarray]:
    """Local features of the catalog rows given, an array (M,) of KEYPOINT each, as from `sift`.

    Taken from the original files: the packed store holds photos at the size of networks. A photo
    that cannot be read or has no texture has M = 0. With cache_dir a photo is looked at once;
    PHOTO_BYTES each are kept, empty places included.
    """
    paths = (Path(photos.attrs["root"]) / photos["path"]).to_dict()

    def computed(rows: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(rows), KEYPOINTS), KEYPOINT)
        for i, found in enumerate(_on_all_cores(lambda row: _features_of(paths[row]), rows)):
            padded[i, : len(found)] = found
        return padded

    folder = _place(cache_dir, "local", photos)
    padded = kept(folder, photos.index.to_numpy(), computed, block=256)
    return [photo[: photo["descriptor"].any(1).sum()] for photo in padded]  # no copies


def _place(cache_dir: Path | None, kind: str, photos: pd.DataFrame) -> Path | None:
    rules = [VERSION, PX, ENLARGED, KEYPOINTS, RATIO, TOLERANCE_PX]
    return place(cache_dir, kind, photos, rules)


def _features_of(path: Path) -> np.ndarray:
    """`sift` of a file, none of one that cannot be read."""
    try:
        return sift(read_image(path, least_px=PX))
    except BrokenImage:
        return np.zeros(0, KEYPOINT)


def sift(image: np.ndarray) -> np.ndarray:
    """(M,) of KEYPOINT of an RGB picture, the strongest, M <= KEYPOINTS: xy in longest sides and
    512 times the descriptor.

    RootSIFT: the square root of the L1-normalised SIFT histogram, so that the Euclidean distance is
    Hellinger's. Source: Lowe 2004 (IJCV 60); Arandjelovic and Zisserman 2012 (CVPR).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(ENLARGED, PX / max(grey.shape))
    size = [max(1, round(side * scale)) for side in grey.shape[::-1]]
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # half the usual contrast: blurred print keeps twice the keypoints, KEYPOINTS bounds sharp ones
    detector = cv2.SIFT_create(KEYPOINTS, contrastThreshold=0.02)
    keypoints, x = detector.detectAndCompute(grey, None)
    if not keypoints:
        return np.zeros(0, KEYPOINT)
    found = np.zeros(len(keypoints), KEYPOINT)
    found["xy"] = cv2.KeyPoint.convert(keypoints) / max(size)
    root = np.sqrt(x / x.sum(1, keepdims=True).clip(1e-6))
    found["descriptor"] = (512 * root).round().clip(max=255)
    return found[:KEYPOINTS]  # among equals OpenCV gives more


def _on_all_cores(function: Callable, *items) -> list:
    """[function(*item)] by one thread a core; torch, which would take all cores again, gets one."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(function, *items))
    torch.set_num_threads(threads)
    return found


# ---------------------------------------------------------------------------------------- geometry


def match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 2) rows of descriptors a and b that belong together, one to one, surest first.

    A row of a keeps its nearest in b if it is nearer than RATIO times the second nearest (Lowe
    2004); of several that meet in one row of b the nearest stays. OpenCV's brute-force matcher
    takes 9 ms a pair of photos, this 2.6.
    """
    if len(a) == 0 or len(b) < 2:
        return np.zeros((0, 2), np.int64)
    a, b = (F.normalize(torch.from_numpy(x).float(), dim=1) for x in (a, b))
    similarity = (a @ b.T).numpy()
    rows = np.arange(len(a))
    nearest = similarity.argmax(1)  # numpy's is ten times as fast as topk(2)
    first = similarity[rows, nearest]
    similarity[rows, nearest] = -1.0
    rows = rows[1 - first < RATIO**2 * (1 - similarity.max(1))]  # squared distances are 2 - 2 cos
    rows = rows[np.argsort(-first[rows], kind="stable")]
    rows = rows[np.sort(np.unique(nearest[rows], return_index=True)[1])]
    return np.stack([rows, nearest[rows]], 1)


def inliers(query: np.ndarray, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a (M, 2), b (M, 2)): points in longest sides of the query and of the photo that one
    homography, a to b, brings together up to TOLERANCE_PX.

    None where it mirrors or collapses the picture: that is no view of a flat thing.
    Source: Barath et al. 2020, arXiv:1912.05909 (MAGSAC++), as in OpenCV, with its fixed seed.
    """
    pairs = match(query["descriptor"], photo["descriptor"])
    a, b = query["xy"][pairs[:, 0]], photo["xy"][pairs[:, 1]]
    if len(pairs) < LEAST:
        return a[:0], b[:0]
    matrix, inside = cv2.findHomography(
        PX * a, PX * b, cv2.USAC_MAGSAC, TOLERANCE_PX, maxIters=500, confidence=0.999
    )
    if matrix is None or not 1 / 64 < np.linalg.det(matrix[:2, :2]) < 64:
        return a[:0], b[:0]
    inside = inside.ravel() > 0
    return a[inside], b[inside]


def _inlier_counts(
    queries: pd.DataFrame, gallery: pd.DataFrame, pairs: np.ndarray, cache_dir: Path | None
) -> np.ndarray:
    """(P,) inliers of each pair (P, 2) of catalog rows; with cache_dir each is counted once.

    Pairs are taken in groups whose photos' local features fit into MOST_BYTES, half for each side.
    """
    side = 2**31  # a pair is kept as one number

    def counted(numbers: np.ndarray) -> np.ndarray:
        first, second = np.divmod(numbers, side)
        a = _by_row(queries, first, cache_dir)
        b = _by_row(gallery, second, cache_dir)
        found = _on_all_cores(lambda q, g: len(inliers(a[q], b[g])[0]), first, second)
        return np.array(found)

    folder = _place(cache_dir, "pairs", queries)
    numbers = pairs[:, 0] * side + pairs[:, 1]

    most = max(1, MOST_BYTES // (2 * PHOTO_BYTES))  # photos of a side
    groups = [pd.factorize(rows, sort=True)[0] // most for rows in pairs.T]

    counts = np.zeros(len(pairs), np.int64)
    for at in pd.Series(numbers).groupby(groups).indices.values():
        counts[at] = kept(folder, numbers[at], counted, block=16384)
    return counts


def disk_gb(photos: pd.DataFrame, cache_dir: Path) -> float:
    """GB that the local features of these photos would add to cache_dir.

    What lies there already, of these or of other photos of the catalog, is taken off.
    """
    files = _place(cache_dir, "local", photos).glob("*.npz")
    return max(0, len(photos) * PHOTO_BYTES - sum(file.stat().st_size for file in files)) / 1e9


def _by_row(photos: pd.DataFrame, rows: np.ndarray, cache_dir: Path | None) -> dict:
    """catalog row -> local features, of those of the photos that are asked for."""
    photos = photos[photos.index.isin(rows)]
    return dict(zip(photos.index, features(photos, cache_dir=cache_dir)))


# ------------------------------------------------------------------------------------------- steps


def verify(search: Search, top: int) -> Search:
    """With the first `top` of each list (0: all) that have LEAST inliers or more in front, most
    inliers first; the others stay as they are.

    Their scores are no cosines any more: the number of inliers is added. Only photos in the lists
    are read. LEAST, SHARE and TOLERANCE_PX were chosen on held-out train photos of the grocery and
    the toy set, where LEAST from 8 to 15 and TOLERANCE_PX from 2 to 6 differ by 0.003 and 0.03.
    Source: Philbin et al. 2007 (CVPR).
    """
    q, at = np.nonzero(search.ranks[:, : top or None] >= 0)
    query_rows, gallery_rows = search.query_rows, search.gallery_rows
    pairs = np.stack([query_rows.index[q], gallery_rows.index[search.ranks[q, at]]], 1)
    counts = np.full(search.ranks.shape, -1)
    counts[q, at] = _inlier_counts(query_rows, gallery_rows, pairs, search.cache_dir)
    verified = np.where(counts >= LEAST, counts, 0).astype(np.float32)
    found = replace(search, scores=search.scores + verified, inliers=counts)
    return found.ordered(np.argsort(-verified, axis=1, kind="stable"))


def seconds(queries: pd.DataFrame, gallery: pd.DataFrame, top: int) -> float:
    """About how long this machine takes to verify the first `top` of every query's list.

    Measured on the first SAMPLE photos of both sides, without any cache: so an estimate does not
    hang on what ran before. What a photo costs once, its local features, and what every pair costs
    are told apart.
    """
    began = perf_counter()
    asked = features(queries[:SAMPLE])
    searched = features(gallery[:SAMPLE])
    per_photo = (perf_counter() - began) / (len(asked) + len(searched))

    began = perf_counter()
    pairs = _on_all_cores(inliers, asked, searched)
    per_pair = (perf_counter() - began) / len(pairs)

    n_pairs = len(queries) * min(top, len(gallery))
    n_photos = len(queries) + min(len(gallery), n_pairs)
    return per_photo * n_photos + per_pair * n_pairs


def verified_expansion(search: Search, k: int) -> Search:
    """Searched again with each query the L2-normalised mean of itself and its verified photos.

    They are the first k with LEAST inliers and a SHARE of the most in the list; without one a query
    stays as it is. Average expansion believes every list; this believes what geometry confirmed.
    Source: Chum 2007 (ICCV).
    """
    if search.inliers is None:
        search = verify(search, top=0)
    most = search.inliers.max(1, keepdims=True)
    sure = search.inliers >= np.maximum(LEAST, SHARE * most)
    return expanded(search, sure & (sure.cumsum(1) <= k))


def verified_pairs(rows: pd.DataFrame, *, cache_dir: Path | None = None) -> np.ndarray:
    """(M, 2) row numbers of catalog rows: photos of one product that one homography brings together
    in LEAST inliers or more, for `audit.linked`. Every pair inside a product is compared.

    Source: Gordo et al. 2017, arXiv:1610.07940 (cleaning of landmarks).
    """

    pairs = [
        pair
        for photos in rows.groupby("product_id").groups.values()
        for pair in combinations(photos, 2)
    ]
    pairs = np.array(pairs, np.int64).reshape(-1, 2)
    return pairs[_inlier_counts(rows, rows, pairs, cache_dir) >= LEAST]
