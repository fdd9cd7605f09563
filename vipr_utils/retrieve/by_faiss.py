"""Search by FAISS on the CPU, where it is installed (extra `index`) and asked for.

'faiss' finds what 'torch' finds, equal scores in any order. 'ivfpq' is for galleries past memory or
a million photos: approximate lists by cosine, with a warning that says how much of the exact ones
they hold; galleries of fewer than LEAST_ROWS and euclidean distances are searched exactly.
"""

import importlib.util
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from vipr_utils.host.files import whole_file
from vipr_utils.host.progress import reporter

ENGINES = (
    "torch",
    "faiss",
    "ivfpq",
)
LEAST_ROWS = 100_000  # fewer are searched exactly in less time than an index takes to build
CODE = 64  # bytes in memory of each gallery row
CANDIDATES = 20  # rows by their codes for each one asked for, of which exact scores choose
SAMPLE = 200  # queries that recall is measured on
ENOUGH = 0.95  # recall up to which more lists are looked at,
GAIN = 0.005  # while twice as many find so much more

# what is looked at together: rows in a rotated copy, queries with the vectors of their candidates
ROWS = 65_536
QUERIES = 256


def engine(name: str | None) -> str:
    """The one named, else $VIPR_SEARCH, else 'torch'. Raises ValueError for one that is unknown or
    not installed.
    """
    name = name or os.environ.get("VIPR_SEARCH") or "torch"
    if name not in ENGINES:
        raise ValueError(f"search by {name!r} is unknown, by engine or $VIPR_SEARCH: use {ENGINES}")
    if name != "torch" and importlib.util.find_spec("faiss") is None:
        raise ValueError(f"search by {name!r} needs FAISS: pip install faiss-cpu, or use 'torch'")
    return name


def nearest(q, rows, k: int, ids, distance: str, engine: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, ranks) of queries (Q, D) in rows (G, D), of length 1 for cosine: as `search.top_k`,
    of k and as many more as share an id with a query.
    """
    queries, gallery = q.cpu().numpy(), rows.numpy()
    asked = np.where(ids[0] < 0, -3, ids[0])  # a query without an id shares it with no row
    own = ids[1][np.isin(ids[1], asked)]
    k += int(np.bincount(own, minlength=1).max())
    large = len(gallery) >= LEAST_ROWS and len(queries) > 0
    if engine == "ivfpq" and distance == "cosine" and large:
        approximate = Index(gallery)
        approximate.tune(queries, k)
        scores, found = approximate.search(queries, k)
    else:
        scores, found = exact(queries, gallery, k, distance)
    absent = (found < 0) | (ids[1][found] == asked[:, None])
    scores[absent] = -np.inf
    found[absent] = -1
    return torch.from_numpy(scores), torch.from_numpy(found)


def _faiss():
    """The library, by as many threads as torch has. It is loaded where it is asked for alone."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The mean share of each wanted list (Q, k) of rows that stands in the list found (Q, k)."""
    shares = [np.isin(row, of).mean() for row, of in zip(wanted, found)]
    return float(np.mean(shares))


def exact(queries: np.ndarray, gallery: np.ndarray, k: int, distance: str = "cosine"):
    """(scores, rows) (Q, k), best first, of queries (Q, D) in a gallery (G, D), both float32: the
    product, or minus the euclidean distance; row -1 where the gallery has no more. It makes no copy
    of the gallery.
    """
    faiss = _faiss()
    if distance == "cosine":
        return faiss.knn(queries, gallery, k, faiss.METRIC_INNER_PRODUCT)
    squares, rows = faiss.knn(queries, gallery, k, faiss.METRIC_L2)
    return -np.sqrt(squares.clip(0)), rows


def export(gallery: np.ndarray, path: Path, kind: str = "flat") -> float:
    """Write an index of rows (G, D) float32 of length 1 for FAISS itself, by inner product; the
    share of the 10 nearest of some of these rows that it finds.

    kind: 'flat' finds all; 'ivfpq' holds CODE bytes a row and scores by them. Raises ValueError for
    another, and for an 'ivfpq' of fewer than LEAST_ROWS.
    """
    faiss = _faiss()
    if kind not in ("flat", "ivfpq"):
        raise ValueError(f"kind {kind!r} is unknown: use 'flat' or 'ivfpq'")
    if kind == "flat":
        written = faiss.IndexFlatIP(gallery.shape[1])
        written.add(gallery)
    elif len(gallery) < LEAST_ROWS:
        raise ValueError(f"{len(gallery):,} rows are too few for 'ivfpq': use 'flat'")
    else:
        approximate = Index(gallery)
        approximate.tune(gallery, 10)
        written = approximate.index
    some = gallery[:: math.ceil(len(gallery) / SAMPLE)]
    share = recall(written.search(some, 10)[1], exact(some, gallery, 10)[1])
    with whole_file(path) as part:
        faiss.write_index(written, str(part))
    return share


class Index:
    """The rows of a gallery (G, D), float32 of length 1, by lists of near ones and CODE bytes each.

    The gallery is kept where it is, in a memory-mapped file too: the rows that codes name are
    scored exactly. `recall` is the share of the exact nearest rows that the last `tune` found.
    Source: Jégou et al. 2011, doi:10.1109/TPAMI.2010.57 (IVF-PQ).
    """

    def __init__(self, gallery: np.ndarray) -> None:
        faiss = _faiss()
        rows, dim = gallery.shape
        code = min(CODE, dim)
        lists = round(2 * math.sqrt(rows))
        # a random rotation to a width of equal parts, one for each byte
        width = code * math.ceil(dim / code)
        kind = f"RR{width},IVF{lists},PQ{code}np"
        self.gallery, self.recall = gallery, math.nan
        self.index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        self.lists = faiss.extract_index_ivf(self.index)
        rng = np.random.default_rng(0)
        enough = 64 * max(lists, 256)
        some = rng.choice(rows, min(rows, enough), replace=False)
        some.sort()
        self.index.train(gallery[some])
        reached = reporter("gallery rows indexed", rows)
        for start in range(0, rows, ROWS):
            self.index.add(gallery[start : start + ROWS])
            reached(self.index.ntotal)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(cosines, rows) (Q, k) of queries (Q, D) of length 1, best first; row -1 where fewer were
        found.
        """
        blocks = np.array_split(queries, math.ceil(len(queries) / QUERIES))
        scores, rows = zip(*(self._searched(block, k) for block in blocks))
        return np.concatenate(scores), np.concatenate(rows)

    def _searched(self, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, of so few queries that their candidates' vectors fit into memory."""
        _, rows = self.index.search(block, CANDIDATES * k)
        scores = np.einsum("qd,qkd->qk", block, self.gallery[rows])
        scores[rows < 0] = -np.inf
        best = np.argsort(-scores, axis=1)[:, :k]
        return (
            np.take_along_axis(scores, best, axis=1),
            np.take_along_axis(rows, best, axis=1),
        )

    def tune(self, queries: np.ndarray, k: int) -> None:
        """Measure the recall of the k nearest rows of some of these queries (Q, D), with as few
        lists looked at as find ENOUGH of them, by doubling. Warns of what it is.
        """
        some = queries[:: math.ceil(len(queries) / SAMPLE)]
        wanted = exact(some, self.gallery, k)[1]
        self.recall = 0.0
        lists = self.lists
        lists.nprobe = 2
        gain = 1.0
        while self.recall < ENOUGH and lists.nprobe < lists.nlist and gain > GAIN:
            lists.nprobe = min(2 * lists.nprobe, lists.nlist)
            _, found = self.search(some, k)
            share = recall(found, wanted)
            gain = share - self.recall
            self.recall = share
        warnings.warn(
            f"search is approximate: it finds {self.recall:.1%} of the {k} nearest rows, by "
            f"{len(some)} queries that were searched exactly too ({lists.nprobe} of "
            f"{lists.nlist} lists looked at)",
            stacklevel=2,
        )
