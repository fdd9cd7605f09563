"""Whom the answers serve: figures of parts of the queries, and of galleries with fewer photos."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd

from vipr_utils.data.store import Store
from vipr_utils.judge import metrics
from vipr_utils.judge.task import Retrieval, View
from vipr_utils.retrieve.search import top_k

SIDE = 224  # pixels of the shorter side at which sharpness is measured
LEAST = 20  # queries of a part that is shown
FIGURES = [
    "n_queries",
    "n_products",
    "map_at_5",
    "map_at_5_low",
    "map_at_5_high",
    "precision_at_1",
]


def kinds(view: View, store: Store) -> pd.DataFrame:
    """The parts that each query belongs to: a column a kind, '' where it belongs to none.

    Thirds are of the queries: by the gallery photos of their product, by the pixels of their file
    and by how sharp they are.
    """
    queries, gallery = view
    counts = queries["product_id"].map(gallery["product_id"].value_counts()).fillna(0)
    variants = gallery[gallery["group"] >= 0].groupby("group")["product_id"].nunique()
    others = queries["group"].map(variants).fillna(0) - 1
    files = store.files.loc[queries.index]
    sides = files[["width", "height"]].min(axis=1)
    return pd.DataFrame(
        {
            "query by": queries["domain"],
            "photos of the product": _thirds(counts, "few", "some", "many"),
            "other variants of its line": np.where(
                others < 0, "", np.where(others > 0, "some", "none")
            ),
            "shorter side": _thirds(sides, "small", "medium", "large"),
            "sharpness": _thirds(sharpness(queries, store), "blurred", "medium", "sharp"),
        },
        index=queries.index,
    )


def _thirds(values: pd.Series, *names: str) -> pd.Series:
    """The name of the third that each value is in, with its range: 'few (1 to 12)'; '' for all
    where the thirds are not apart.
    """
    cuts = values.quantile([1 / 3, 2 / 3]).to_numpy()
    at = np.searchsorted(cuts, values, side="left")
    if len(np.unique(at)) < len(names):
        return pd.Series("", values.index)
    parts = {}
    for third, name in enumerate(names):
        inside = values[at == third]
        parts[third] = f"{name} ({inside.min():,.0f} to {inside.max():,.0f})"
    return pd.Series(at, values.index).map(parts)


def sharpness(rows: pd.DataFrame, store: Store) -> pd.Series:
    """Variance of the Laplacian of each photo in grey, its shorter side SIDE pixels; small is
    blurred. Source: Pech-Pacheco et al. 2000, doi:10.1109/ICPR.2000.903548.
    """
    found = []
    for row in rows.index:
        grey = cv2.cvtColor(store[row], cv2.COLOR_RGB2GRAY)
        scale = SIDE / min(grey.shape)
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found.append(cv2.Laplacian(grey, cv2.CV_32F).var())
    return pd.Series(found, rows.index)


def slices(
    found: Retrieval,
    view: View,
    parts: pd.DataFrame,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each part of each kind: n_queries, n_products, map_at_5 with low and high, and
    precision_at_1; parts as from `kinds`, those of fewer than LEAST queries left out.
    """
    products = view.queries["product_id"].to_numpy()
    counted = (found.n_relevant > 0) & (products >= 0)
    table = {}
    for kind in parts:
        values = parts[kind].to_numpy()
        for part in sorted(set(values) - {""}):
            inside = counted & (values == part)
            if inside.sum() >= LEAST:
                table[kind, part] = metrics.summary(
                    found.hits[inside], found.n_relevant[inside], products[inside], seed=seed
                )
    names = pd.MultiIndex.from_tuples(table, names=["kind", "part"]) if table else None
    return pd.DataFrame(list(table.values()), names, FIGURES)


def by_group(found: Retrieval, view: View, *, seed: int = 0) -> pd.DataFrame:
    """`slices` of the groups that have LEAST queries, the 10 with the lowest mAP@5."""
    groups = view.queries["group"]
    named = groups.astype(str).where(groups >= 0, "")
    table = slices(found, view, named.to_frame("group"), seed=seed)
    return table.sort_values("map_at_5").head(10)


def numbered_in_product(products: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) a number from 0 for each photo among those of its product (N,), in random order."""
    shuffled = pd.Series(products)[rng.permutation(len(products))]
    return shuffled.groupby(shuffled).cumcount().sort_index().to_numpy()


def photos_a_product(
    view: View,
    queries: np.ndarray,
    gallery: np.ndarray,
    counts: tuple[int, ...] = (1, 2, 4, 8),
    *,
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the first answer is right where each product has so many gallery photos: a row a
    count, with photos, precision_at_1, low, high, n_queries, n_products.

    queries (Q, D) and gallery (G, D) are embeddings of the view's rows. The queries are the same in
    all rows: of products with as many photos as the largest count or more. Photos are drawn anew
    `draws` times; the interval is over products.
    """
    rng = np.random.default_rng(seed)
    products = view.gallery["product_id"].to_numpy()
    sizes = view.queries["product_id"].map(view.gallery["product_id"].value_counts())
    asked = (sizes >= max(counts)).to_numpy()
    labels = view.queries["product_id"].to_numpy()[asked]
    table = []
    for count in counts:
        right = []
        for _ in range(draws):
            rows = np.flatnonzero(numbered_in_product(products, rng) < count)
            _, ranks = top_k(queries[asked], gallery[rows], 1)
            right.append(products[rows][ranks[:, 0]] == labels)
        shares = np.mean(right, axis=0)
        low, high = metrics.bootstrap_interval(shares, labels, seed=seed)
        table.append([count, shares.mean(), low, high, len(labels), len(np.unique(labels))])
    columns = ["photos", "precision_at_1", "low", "high", "n_queries", "n_products"]
    return pd.DataFrame(table, columns=columns).set_index("photos")
