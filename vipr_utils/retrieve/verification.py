"""Spatial verification: do two photos show the same printed thing? Local features, geometry, what the count says.

The system of Chum 2007, "Total Recall" (ICCV): SIFT features matched one to one, a geometry that explains them, lists
ordered by the inliers, queries expanded by what was verified. Points are in units of a photo's longest side, so that
tolerances mean the same at every size. Every step looks at one query alone and is deterministic.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from vipr_utils.data.store import BrokenImage, read_image
from vipr_utils.host.device import cores
from vipr_utils.host.files import whole_file

VERSION = 1  # of the cached features
LARGEST = 2.0  # a small photo is enlarged at most so many times
RATIO = 0.85  # nearest over second nearest distance; Lowe 2004 takes 0.8, here the keypoints' own turn and size judge too
LOOSE, TIGHT, CELL = (
    0.1,
    0.01,
    0.02,
)  # affine tolerance, homography tolerance, one place: in longest sides
TURN, GROWTH = (
    np.pi / 6,
    2.0,
)  # how far a keypoint's own angle and size may differ from the homography's
LEAST = 5  # inliers; four points always fit
NOISE = 1.25  # the least mean count of wrong pairs: below, five inliers in a list of a hundred would be proof
TRUST = 8.0  # weight of the evidence, in standard deviations of the list's scores per nat
MOST_PAIRS, MOST_BYTES = (
    200_000,
    8 * 2**30,
)  # of one call: about 6 minutes on 2 cores; 60,000 photos


# ------------------------------------------------------------------------------------------------------ features


@dataclass(frozen=True)
class Features:
    """Local features of N photos: features[i] is (points (M, 4), descriptors (M, 128)), both float32.

    A point is x, y, diameter in longest sides, and its angle in radians; descriptors are L2-normalised. offsets (N + 1,)
    say whose rows are whose; a photo that could not be read or has no texture has M = 0.
    """

    offsets: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray  # uint8, 512 times the value

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        its = slice(self.offsets[i], self.offsets[i + 1])
        x = self.descriptors[its].astype(np.float32)
        return self.points[its], x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-6)


def features(
    photos: pd.DataFrame, *, px: int = 640, n_keypoints: int = 1000, cache_dir: Path | None = None
) -> Features:
    """Features of the catalog rows given, in their order, from the original files at px pixels on the longest side.

    The packed store is no source: it holds photos at the size of networks. With cache_dir the result is kept under a key
    of data, rows and settings, and photos that another kept table holds are taken from there; a damaged file is built anew.
    144 bytes a keypoint.
    Raises ValueError where they would not fit in 8 GiB.
    """
    if (size := len(photos) * n_keypoints * 144) > MOST_BYTES:
        raise ValueError(
            f"features of {len(photos):,} photos with {n_keypoints:,} keypoints may take {size / 2**30:.0f} GiB, over "
            f"{MOST_BYTES / 2**30:.0f}: verify fewer photos (a smaller depth) or take fewer keypoints"
        )
    rows, folder = photos.index.to_numpy(), Path(cache_dir) / "features" if cache_dir else None
    settings = json.dumps([VERSION, photos.attrs["fingerprint"], px, n_keypoints])
    name = f"{hashlib.sha256(settings.encode()).hexdigest()[:24]}-{hashlib.sha256(rows.tobytes()).hexdigest()[:24]}.npz"
    known: dict = {}  # row -> its points and descriptors
    for path in [folder / name, *sorted(folder.glob(f"{name[:25]}*.npz"))] if folder else []:
        known |= _kept(path, [row for row in rows if row not in known])
    root = Path(photos.attrs["root"])
    missing = photos["path"][[row not in known for row in rows]]
    known |= zip(
        missing.index,
        _on_all_cores(lambda file: _features_of(root / file, px, n_keypoints), missing),
    )
    points, descriptors = zip(*[known[row] for row in rows] or [_no_features()])
    offsets = np.cumsum([0, *map(len, points)])[: len(photos) + 1]
    result = Features(offsets, np.concatenate(points), np.concatenate(descriptors))
    if folder and len(missing):
        with whole_file(folder / name) as part, open(part, "wb") as file:
            np.savez(file, rows=rows, **vars(result))
    return result


def _kept(path: Path, rows: list) -> dict:
    """Points and descriptors of those of the rows that a file holds; none where it is absent or cut short."""
    try:
        with np.load(path) as file:  # reads what is asked for
            at = {row: i for i, row in enumerate(file["rows"].tolist())}
            if not (wanted := [row for row in rows if row in at]):
                return {}
            offsets, points, descriptors = (file[n] for n in ("offsets", "points", "descriptors"))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    spans = [slice(*offsets[at[row] : at[row] + 2]) for row in wanted]
    return {row: (points[span], descriptors[span]) for row, span in zip(wanted, spans)}


def _features_of(path: Path, px: int, n_keypoints: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        return sift(read_image(path, least_px=px), px=px, n_keypoints=n_keypoints)
    except BrokenImage:
        return _no_features()


def _no_features() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 4), np.float32), np.zeros((0, 128), np.uint8)


def sift(
    image: np.ndarray, *, px: int = 640, n_keypoints: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """(points (M, 4) float32, descriptors (M, 128) uint8) of an RGB picture, strongest first, M <= n_keypoints.

    RootSIFT: the square root of the L1-normalised SIFT histogram, so that the Euclidean distance is Hellinger's.
    Source: Lowe 2004 (IJCV 60); Arandjelovic and Zisserman 2012 (CVPR).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(LARGEST, px / max(grey.shape))
    size = [max(1, round(side * scale)) for side in grey.shape[::-1]]
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # half the usual contrast: blurred print keeps twice the keypoints, and n_keypoints bounds the sharp photos
    keypoints, x = cv2.SIFT_create(n_keypoints, contrastThreshold=0.02).detectAndCompute(grey, None)
    if not keypoints:
        return _no_features()
    order = np.argsort([-k.response for k in keypoints], kind="stable")[:n_keypoints]
    points = np.array([(*keypoints[i].pt, keypoints[i].size, 0) for i in order], np.float32) / max(
        size
    )
    points[:, 3] = np.deg2rad([keypoints[i].angle for i in order])
    root = np.sqrt(x[order] / x[order].sum(1, keepdims=True).clip(1e-6))
    return points, (512 * root).round().clip(0, 255).astype(np.uint8)


def _on_all_cores(function, items) -> list:
    """[function(item)] by one thread a core; torch and OpenCV, which would each take all cores again, get one."""
    with (
        _single_threaded(),
        ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(function, items))


@contextmanager
def _single_threaded() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


# ------------------------------------------------------------------------------------------------------ geometry


def match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 2) rows of a and b that belong together, one to one, surest first; a and b are L2-normalised descriptors.

    A row of a keeps its nearest in b if it is nearer than RATIO times the second nearest (Lowe 2004); of several that
    meet in one row of b the nearest stays.
    """
    if len(a) == 0 or len(b) < 2:
        return np.zeros((0, 2), np.int64)
    similarity = (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()
    rows = np.arange(len(a))
    nearest = similarity.argmax(1)  # numpy's is ten times as fast as topk(2)
    first = similarity[rows, nearest]
    similarity[rows, nearest] = -1.0
    rows = rows[1 - first < RATIO**2 * (1 - similarity.max(1))]  # squared distances are 2 - 2 cos
    rows = rows[np.argsort(-first[rows], kind="stable")]
    rows = rows[np.sort(np.unique(nearest[rows], return_index=True)[1])]
    return np.stack([rows, nearest[rows]], 1)


def _affine_inliers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M,) bool: matched points (M, 4) that one affine map brings together up to LOOSE.

    Each of the 200 surest matches proposes the similarity that its diameters and angles imply; the one that most points
    agree with is refined to an affine map by least squares. Source: Philbin 2007 (CVPR): no random draws.
    """
    p, q = (x[:, 0] + 1j * x[:, 1] for x in (a, b))
    turn = (b[:200, 2] / a[:200, 2] * np.exp(1j * (b[:200, 3] - a[:200, 3]))).astype(np.complex64)
    error = np.abs(turn[:, None] * (p - p[:200, None]) - (q - q[:200, None]))  # (hypotheses, M)
    inside = (error < LOOSE)[(error < LOOSE).sum(1).argmax()]
    x = np.c_[a[:, :2], np.ones(len(a))]
    for tolerance in (LOOSE, LOOSE / 2, LOOSE / 2):
        if inside.sum() < LEAST:
            break
        fit = np.linalg.lstsq(x[inside], b[inside, :2], rcond=None)[0]
        inside = np.linalg.norm(x @ fit - b[:, :2], axis=1) < tolerance
    return inside


def homography(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """((M,) bool inliers, H (3, 3) or None) with b = H a up to TIGHT for matched points a, b (M, 4).

    The affine test comes first: it is cheap and rejects most wrong pairs; RANSAC then runs among its inliers. A
    homography that mirrors, folds or flattens the picture is no view of a flat thing and is rejected, and a match whose
    keypoints turn or grow otherwise than it does is no inlier.
    """
    none = np.zeros(len(a), bool), None
    if len(a) < LEAST or (near := _affine_inliers(a, b)).sum() < LEAST:
        return none
    how = {"maxIters": 500, "confidence": 0.999}
    matrix, _ = cv2.findHomography(a[near, None, :2], b[near, None, :2], cv2.RANSAC, TIGHT, **how)
    if matrix is None:
        return none
    x = np.c_[a[:, :2], np.ones(len(a))] @ matrix.T
    inside = x[:, 2] > 1e-6
    inside &= (
        np.linalg.norm(x[:, :2] / np.where(inside, x[:, 2], 1)[:, None] - b[:, :2], axis=1) < TIGHT
    )
    if inside.sum() < LEAST or not _is_a_view(matrix, a[inside, :2]):
        return none
    inside[inside] = _turns_and_grows_alike(matrix, a[inside], b[inside])
    return (inside, matrix) if inside.sum() >= LEAST else none


def _local(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(M, 2, 2) Jacobians of the homography at points (M, 2)."""
    x = np.c_[points, np.ones(len(points))] @ matrix.T
    y, w = x[:, :2, None] / x[:, 2, None, None], x[:, 2, None, None]
    return (matrix[:2, :2] - y * matrix[2, :2]) / w


def _is_a_view(matrix: np.ndarray, points: np.ndarray) -> bool:
    """Whether at every point the local scale is 1/8 to 8, the two axes differ up to 5 times, and nothing is mirrored."""
    local = _local(matrix, points)
    long, short = np.linalg.svd(local, compute_uv=False).T
    return bool(
        (np.linalg.det(local) > 0).all()
        and long.max() < 8
        and short.min() > 1 / 8
        and (long / short).max() < 5
    )


def _turns_and_grows_alike(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M,) bool: matched points (M, 4) whose angle and diameter change as the homography does there.

    Positions alone let five chance matches through where things are not flat; their angles and sizes are at random.
    """
    local = _local(matrix, a[:, :2])
    arrow = (local @ np.stack([np.cos(a[:, 3]), np.sin(a[:, 3])], 1)[..., None])[..., 0]
    turn = np.angle((arrow[:, 0] + 1j * arrow[:, 1]) * np.exp(-1j * b[:, 3]))
    growth = np.sqrt(np.linalg.det(local)) * a[:, 2] / b[:, 2]
    return (np.abs(turn) < TURN) & (np.abs(np.log(growth)) < np.log(GROWTH))


def inliers(query: tuple, photo: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(a (M, 2), b (M, 2), H): points in longest sides of the query and of the photo that H, a to b, brings together."""
    pairs = match(query[1], photo[1])
    a, b = query[0][pairs[:, 0]], photo[0][pairs[:, 1]]
    inside, matrix = homography(a, b)
    return a[inside, :2], b[inside, :2], matrix


def places(a: np.ndarray, b: np.ndarray) -> int:
    """How many places of CELL x CELL the points (M, 2) cover, in the picture where they cover fewer: many matches on
    one spot (a keypoint's several angles, a dot pattern) are one place."""
    return min(len(np.unique(np.floor(x / CELL), axis=0)) for x in (a, b)) if len(a) else 0


def inlier_counts(queries: Features, gallery: Features, ranks: np.ndarray) -> np.ndarray:
    """(Q, k) int64 `places` of the inliers of each query and each gallery row in ranks (Q, k); 0 where that is -1."""

    def of(q: int) -> list[int]:
        query = queries[q]
        return [
            places(*inliers(query, gallery[g])[:2]) if g >= 0 and len(query[0]) else 0
            for g in ranks[q]
        ]

    return np.array(_on_all_cores(of, range(len(ranks))), np.int64).reshape(ranks.shape)


# ------------------------------------------------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Verified:
    """Ranked lists as of search.top_k, and what verification found at each rank: inlier counts (-1: not looked at), probability, both
    (Q, k)."""

    scores: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray
    probability: np.ndarray


def evidence(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probability in 0..1 that a photo shows the query's product, evidence in nats >= 0 that it is no accident), (Q, k).

    F = n * exp(-count / noise) is how many wrong photos among the n looked at would have such a count by accident; evidence
    = log(1 + 1 / F) - log(1 + 1 / n): 0 without inliers, then growing with their number. A variant with the same logo is no
    accident and still wrong: probability = (count / best count of the list)^3 / (1 + F), so the runner-up falls. Above 0.9
    85 to 100 % were right on drawn packages and collages, 75 % on real cartons whose variants differ in a word. noise is the
    query's own, from no labels: the mean of the exponential that has its list's median, at least NOISE. Where right and
    wrong photos match alike (a tag that hangs in every photo) it is high and none stands out; variants with the same
    artwork do not raise it while they are the smaller half, so a list should have 20 photos. -1: not looked at.
    Source: the number of false alarms of Desolneux, Moisan and Morel 2000 (IJCV 40).
    """
    looked = [row[row >= 0] for row in counts]
    noise = np.array(
        [max(NOISE, np.median(row) / np.log(2)) if len(row) else NOISE for row in looked]
    )
    accidents = np.log([max(1, len(row)) for row in looked])[:, None]
    odds = counts.clip(0) / noise[:, None] - accidents
    share = counts.clip(0) / counts.max(1, keepdims=True, initial=1)
    return share**3 / (1 + np.exp(-odds)), np.logaddexp(0, odds) - np.logaddexp(0, 0.0 - accidents)


def spatial_verification(
    scores: np.ndarray, ranks: np.ndarray, queries: Features, gallery: Features, *, depth: int = 0
) -> Verified:
    """Lists (Q, k) ordered anew by global score and verified geometry, in the form of search.top_k.

    score = global score + TRUST * (standard deviation of the query's scores) * `evidence`: no cosine any more, but a list
    in which nothing was verified stays as it is. Looks at the first `depth` of each list; 0: as many as 200,000 pairs
    allow, all of a small gallery. Raises ValueError for lists that do not fit the features.
    """
    if (
        scores.shape != ranks.shape
        or len(ranks) != len(queries)
        or ranks.max(initial=-1) >= len(gallery)
    ):
        raise ValueError(
            f"scores {scores.shape} and ranks {ranks.shape} up to {ranks.max(initial=-1)} do not fit features of "
            f"{len(queries)} queries and {len(gallery)} gallery photos: pass the lists and the tables of one search"
        )
    depth = _affordable(depth, ranks)
    return _reordered(scores, ranks, inlier_counts(queries, gallery, ranks[:, :depth]))


def _reordered(scores: np.ndarray, ranks: np.ndarray, seen: np.ndarray) -> Verified:
    """The Verified lists for the inlier counts (Q, depth) of their first photos."""
    counts = np.full(ranks.shape, -1)
    counts[:, : seen.shape[1]] = seen
    counts[ranks < 0] = -1
    probability, nats = evidence(counts)
    spread = np.ma.masked_invalid(scores).std(1).filled(0)
    final = scores + (TRUST * spread[:, None] * nats).astype(scores.dtype)
    order = np.argsort(-final, axis=1, kind="stable")
    return Verified(
        *(np.take_along_axis(x, order, axis=1) for x in (final, ranks, counts, probability))
    )


def verify(
    scores: np.ndarray,
    ranks: np.ndarray,
    queries: pd.DataFrame,
    gallery: pd.DataFrame,
    *,
    depth: int = 0,
    cache_dir: Path | None = None,
    **settings,
) -> Verified:
    """`spatial_verification` of the lists of a search over two catalog tables; settings as in `features`.

    Of the gallery only the photos that are looked at get features: all of a small one, what the lists hold of a large one.
    With cache_dir the count of every pair is kept too: other lists of the same photos then cost only their new pairs.
    """
    settings |= {"cache_dir": cache_dir}
    depth = _affordable(depth, ranks)
    used = np.unique(ranks[:, :depth].clip(0))
    used = (
        used if len(used) < len(gallery) / 2 else np.arange(len(gallery))
    )  # most: then all, one cache for every search
    few, sizes = features(gallery.iloc[used], **settings), np.zeros(len(gallery), np.int64)
    sizes[used] = np.diff(few.offsets)
    whole = Features(np.cumsum([0, *sizes]), few.points, few.descriptors)
    counted = _kept_counts(
        ranks[:, :depth], queries, gallery, (features(queries, **settings), whole), settings
    )
    return _reordered(scores, ranks, counted)


def _kept_counts(
    ranks: np.ndarray, queries: pd.DataFrame, gallery: pd.DataFrame, its: tuple, settings: dict
) -> np.ndarray:
    """`inlier_counts` of the lists, of which those in cache_dir are not computed again; new ones are added to it."""
    if not (folder := settings["cache_dir"]):
        return inlier_counts(*its, ranks)
    rules = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float))}
    key = [
        queries.attrs["fingerprint"],
        rules,
        {k: v for k, v in settings.items() if k != "cache_dir"},
    ]
    path = (
        Path(folder)
        / "features"
        / f"counts-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npz"
    )
    pairs = (
        queries.index.to_numpy()[:, None] * 2**31 + gallery.index.to_numpy()[ranks]
    )  # (Q, k) catalog rows of both
    try:
        with np.load(path) as file:
            known, values = file["pairs"], file["counts"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # absent, or cut short
        known, values = np.array([-1]), np.array([0])
    at = np.searchsorted(known, pairs).clip(max=len(known) - 1)
    found = known[at] == pairs
    counts = np.where(found, values[at], inlier_counts(*its, np.where(found, -1, ranks)))
    counts[ranks < 0] = 0
    fresh = ~found & (ranks >= 0)
    known, first = np.unique(np.concatenate([known, pairs[fresh]]), return_index=True)
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez(file, pairs=known, counts=np.concatenate([values, counts[fresh]])[first])
    return counts


def verified_pairs(
    rows: pd.DataFrame, *, least: int = 15, cache_dir: Path | None = None, **settings
) -> np.ndarray:
    """(M, 2) row numbers of catalog rows: photos of one product that one homography brings together in `least` places or
    more, for `audit.linked`. Every pair inside a product is compared, some 4 ms of a core each; settings as in `features`.

    Source: Gordo et al. 2017, arXiv:1610.07940 (cleaning of landmarks).
    """
    products = list(rows.groupby("product_id").indices.values())
    first, later = (
        np.concatenate(products),
        [at[i + 1 :] for at in products for i in range(len(at))],
    )
    ranks = np.full((len(rows), max(map(len, later), default=0)), -1)
    for row, others in zip(first, later):
        ranks[row, : len(others)] = others
    found = features(rows, cache_dir=cache_dir, **settings)
    counts = _kept_counts(ranks, rows, rows, (found, found), settings | {"cache_dir": cache_dir})
    i, at = np.nonzero((counts >= least) & (ranks >= 0))
    return rows.index.to_numpy()[np.stack([i, ranks[i, at]], 1)]


def _affordable(depth: int, ranks: np.ndarray) -> int:
    return min(depth or max(1, MOST_PAIRS // max(1, len(ranks))), ranks.shape[1])


def verified_expansion(
    queries: np.ndarray, gallery: np.ndarray, found: Verified, *, least: float = 0.9, most: int = 5
) -> np.ndarray:
    """(Q, D) queries, each the L2-normalised mean of itself and its verified photos: search with them again.

    Verified are the first `most` with a probability of at least `least`; without one a query stays as it is. Plain average
    expansion believes every list; this believes what geometry has confirmed. Source: Chum 2007 (ICCV).
    """
    sure = (found.probability >= least) & (found.ranks >= 0)
    first = np.argsort(~sure, axis=1, kind="stable")[:, :most]
    taken = np.take_along_axis(sure, first, axis=1)[..., None]
    rows = np.take_along_axis(found.ranks, first, axis=1)
    total = queries + (gallery[rows] * taken).sum(1)
    total /= np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)
    return np.where(taken.any(1), total, queries).astype(np.float32)
