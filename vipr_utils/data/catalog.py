"""A data root as one DataFrame of photos; protocols and subsets."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from vipr_utils.data import listing
from vipr_utils.data.tables import CatalogError
from vipr_utils.host.files import retried, write_whole

CATALOG = ["image_id", "name", "path", "split", "product_id", "product", "group", "domain"]
# pandas writes 3.0 for 3 where a field of the column is empty
WHOLE = r"(0|[1-9][0-9]{0,17})(\.0*)?"
ENOUGH = 100  # queries to choose by
MOST_HELD = 0.4  # share of a product's photos to find them


def read_rows(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(queries, gallery) that a data root lists, by name: product_id, product, group, domain.

    As in `read`, those included whose file is absent; queries in the order of their table. Raises
    CatalogError where there is none.
    """
    rows = _rows(Path(root))[0].set_index("name")
    queries, gallery = (rows[rows["split"] == split] for split in ("test", "train"))
    if queries.empty:
        raise CatalogError(
            f"{root}: no query. Name them in test.csv, or put photos into test/ or queries/"
        )
    return queries, gallery


def read(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(catalog, problems) of a data root with tables or folders, see `listing.listed`.

    product is the name that came in, '' where unknown. product_id and group are int64, -1 where
    unknown: whole numbers as they came where all of train are, else numbers in the order of the
    names; what test calls its products changes no number of train. Files that are named but absent,
    or no photos, are listed in problems (file, problem) and left out. attrs of the catalog: root;
    form, in words; fingerprint (of the rows of train and of names and sizes of all files: labels of
    queries have no part in it). Raises CatalogError for a root that cannot be used.
    """
    root = Path(root)
    photos, strays = _rows(root)
    form = photos.attrs["form"]
    sizes = _sizes(root, photos["path"])
    photos = photos.assign(image_id=photos["split"] + "/" + photos["name"], size=sizes)
    there = photos["size"] >= 0
    catalog = photos.loc[there, CATALOG].reset_index(drop=True)
    if "train" not in set(catalog["split"]):
        raise CatalogError(
            f"{root.name}/train: none of the photos named in train.csv is there; unpack train/ "
            "beside it"
        )
    absent = pd.DataFrame({"file": photos["path"][~there], "problem": "absent"})
    problems = pd.concat([strays, absent], ignore_index=True)
    catalog.attrs = {"root": str(root), "form": form, "fingerprint": _fingerprint(photos)}
    return catalog, problems


def _sizes(root: Path, paths: pd.Series) -> list[int]:
    """Bytes of each file, -1 where there is none; asked in threads, as a network disk is slow to
    answer and answers many at once.
    """

    def size(path: str) -> int:
        try:
            found = retried(os.stat, f"{root}/{path}")
        except FileNotFoundError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    with ThreadPool(32) as pool:
        return pool.map(size, paths, chunksize=256)


def _rows(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(all that train and test list, train first, with numbers for the names, strays)."""
    train, train_strays = listing.listed(root, "train")
    if train.empty:
        raise CatalogError(
            f"{root} has no train.csv, and no photos in train/<product>/ or gallery/<product>/. "
            "Write a train.csv with the columns name,class, or put a folder for each product there"
        )
    test, test_strays = listing.listed(root, "test", set(train["class"]))
    rows = pd.concat([train, test], ignore_index=True)
    is_train = rows["split"] == "train"
    rows["product_id"], rows["product"] = _numbered(rows["class"], is_train)
    rows["group"], _ = _numbered(rows["group"], is_train)
    rows.attrs = {"form": "; ".join([train.attrs["form"], test.attrs["form"]])}
    return rows, pd.concat([train_strays, test_strays], ignore_index=True)


def _numbered(names: pd.Series, is_train: pd.Series) -> tuple[pd.Series, pd.Series]:
    """(an int64 for each name, the name without what pandas added to a number); see `read`."""
    names = names.mask(names.isin(listing.UNKNOWN), "")
    whole = names.str.fullmatch(WHOLE)
    numbers = {"": -1}
    if (whole | (names == ""))[is_train].all():
        names = names.mask(whole, names.str.replace(r"\.0*$", "", regex=True))
        numbers |= {name: int(name) for name in set(names[whole])}

    of_train = set(names[is_train])
    texts = set(names) - set(numbers)
    start = max(numbers.values()) + 1
    for number, name in enumerate(sorted(texts & of_train) + sorted(texts - of_train), start):
        numbers[name] = number
    return names.map(numbers).astype(np.int64), names


def _fingerprint(photos: pd.DataFrame) -> str:
    """16 hexadecimal digits that two roots share when their files and the rows of train agree."""
    train = photos["split"] == "train"
    known = photos.loc[train, ["name", "product", "group", "domain", "size"]]
    hashes = [
        pd.util.hash_pandas_object(rows, index=False).to_numpy()
        for rows in (known, photos.loc[~train, ["name", "size"]])
    ]
    return hashlib.sha256(np.concatenate(hashes)).hexdigest()[:16]


def describe_data(catalog: pd.DataFrame) -> dict:
    """The `data` entry of run.json; the root by its folder name only."""
    train = catalog[catalog["split"] == "train"]
    return {
        "root": Path(catalog.attrs["root"]).name,
        "n_train": len(train),
        "n_test": int((catalog["split"] == "test").sum()),
        "n_products": train["product_id"].nunique(),
        "fingerprint": catalog.attrs["fingerprint"],
    }


def split(
    catalog: pd.DataFrame,
    protocol: str,
    *,
    seed: int = 0,
    gallery_domain: str = "",
    holdout: float = 0.2,
) -> tuple[pd.DataFrame, ...]:
    """(train, queries, gallery), rows of the catalog with their row numbers kept.

    test: queries are the test photos, the gallery is the train photos.
    seen: a share `holdout` (at least one) of each product's train photos are queries, where two or
    more are there; customer photos where domains are known. unseen: the share `holdout` of products
    is not trained on; half of their photos are queries, the other half joins all other products in
    the gallery. gallery_domain narrows the gallery to 'shop' or 'customer' photos.
    """
    gallery = train = catalog[catalog["split"] == "train"]
    if protocol == "test":
        queries = catalog[catalog["split"] == "test"]
    elif protocol == "seen":
        queries = _held_out(train, holdout, seed)
        train = gallery = train.drop(queries.index)
    elif protocol == "unseen":
        hidden = train[train["product_id"].isin(unseen_products(train, holdout, seed))]
        queries = _held_out(hidden, 0.5, seed)
        gallery, train = train.drop(queries.index), train.drop(hidden.index)
    else:
        raise ValueError(f"protocol {protocol!r} is unknown: use one of ('test', 'seen', 'unseen')")
    if queries.empty:
        raise CatalogError(
            f"protocol {protocol!r} has no query: 'test' needs photos in test.csv and test/, "
            "'seen' and 'unseen' need products with two train photos"
        )
    return train, queries, narrow(gallery, gallery_domain)


def unseen_products(train: pd.DataFrame, holdout: float, seed: int) -> np.ndarray:
    """Those that protocol `unseen` does not train on: a share of the products of these rows."""
    products = np.random.default_rng(seed).permutation(np.unique(train["product_id"]))
    return products[: max(1, round(holdout * len(products)))]


def narrow(gallery: pd.DataFrame, domain: str) -> pd.DataFrame:
    """The gallery rows of one domain; '' keeps all. Raises CatalogError when none is left."""
    narrowed = gallery[gallery["domain"] == domain] if domain else gallery
    if narrowed.empty:
        there = sorted(set(gallery["domain"]))
        raise CatalogError(
            f"gallery_domain {domain!r} leaves no photo (domains here: {there}): use one of these, "
            "or '' for all"
        )
    return narrowed


def _held_out(rows: pd.DataFrame, share: float, seed: int, visits=None) -> pd.DataFrame:
    """A share of each product's photos, at least one, never the last one.

    Customer photos where domains are known. With visits whole ones are taken, up to half of the
    photos: a product of a single visit asks nothing.
    """
    rng = np.random.default_rng(seed)
    held = []
    for _, product in rows.groupby("product_id"):
        candidates = product.index[product["domain"] != "shop"]
        wanted = min(max(1, round(share * len(candidates))), len(product) - 1)
        if visits is None:
            held.extend(rng.permutation(candidates)[:wanted])
            continue
        taken, most = [], len(candidates) / 2
        photos_of = candidates.groupby(visits[candidates])
        for visit in rng.permutation(list(photos_of)):
            if len(taken) < wanted and len(taken) + len(photos_of[visit]) <= most:
                taken.extend(photos_of[visit])
        held.extend(taken)
    return rows[rows.index.isin(held)]


def visits(rows: pd.DataFrame, layouts: np.ndarray) -> pd.Series:
    """A number for each row: photos of one product that a chain of like colours connects.

    layouts (N, B) whole numbers, `Store.layouts` of the rows: two photos are alike when at
    least 70 % of what they count is shared (their histogram intersection). No rounding
    decides, so visits are the same on every machine. Photos of one shopping trip look alike, and a
    random split puts them on both sides: on the grocery set frozen features score 0.83 on single
    photos held out of train, 0.41 on visits held out, and 0.47 on the real test of later visits;
    with a learned whitening 0.96, 0.70 and 0.69.
    """

    most = 0.6 * layouts[0].sum()

    def alike(positions):
        return cdist(layouts[positions], layouts[positions], "cityblock") <= most

    return chains(rows, alike)


def chains(rows: pd.DataFrame, alike) -> pd.Series:
    """The component of each row in its product; alike(positions) (n, n) says which are linked."""
    found = pd.Series(-1, rows.index)
    for positions in rows.groupby("product_id").indices.values():
        found.iloc[positions] = connected_components(alike(positions), directed=False)[1]
    return found


@dataclass(frozen=True)
class Validation:
    """Train photos set aside to choose by: what is left to fit, the queries, and their gallery.

    how: 'visits' (whole ones were held out), 'photos' (single ones: hardly a product was seen on
    two visits) or 'drawn' (`drawn.queries`: nothing was held out).
    """

    fit: pd.DataFrame
    queries: pd.DataFrame
    gallery: pd.DataFrame
    how: str

    @property
    def table(self) -> pd.DataFrame:
        """image_id and part ('fit' or 'query') of every photo, in the order of the catalog."""
        parts = pd.concat([self.fit.assign(part="fit"), self.queries.assign(part="query")])
        return parts.sort_index()[["image_id", "part"]]

    @property
    def split(self) -> str:
        """16 hexadecimal digits that two runs share when they held out the same photos."""
        return hashlib.sha256(self.table.to_csv(index=False).encode()).hexdigest()[:16]

    @property
    def origin(self) -> str:
        """Where the queries come from, in words."""
        domain = "shop" if "shop" in set(self.fit["domain"]) else "train"
        return f"drawn from {domain} photos" if self.how == "drawn" else f"{self.how} held out"

    def save(self, folder: Path) -> None:
        """Write the table to <folder>/split.csv, whole."""
        write_whole(folder / "split.csv", self.table.to_csv(index=False))

    def record(self, metrics: dict) -> dict:
        """The `validation` entry of run.json: the split and what was scored on it."""
        return {
            "how": self.how,
            "split": self.split,
            "n_queries": len(self.queries),
            "map_at_5": metrics["map_at_5"],
            "low": metrics["map_at_5_low"],
            "high": metrics["map_at_5_high"],
        }


def spares_photos(train: pd.DataFrame, gallery_domain: str = "") -> bool:
    """Whether a quarter of the products or more have a photo that `hold_out` can make a query and
    another that answers it, of that domain."""
    asked = train["product_id"][train["domain"] != "shop"].unique()
    answers = narrow(train, gallery_domain)["product_id"].value_counts().reindex(asked)
    itself = gallery_domain != "shop"  # the query is one of those that could answer
    return 4 * (answers > itself).sum() >= train["product_id"].nunique()


def hold_out(
    train: pd.DataFrame, layouts: np.ndarray, *, holdout: float = 0.1, gallery_domain: str = ""
) -> Validation:
    """A share of each product's train photos as queries, in whole visits; the rest is searched.

    The share is doubled, and doubled again up to MOST_HELD, while fewer than ENOUGH queries are
    found, for few queries tell few candidates apart.
    The same for every run and machine: no seed and no model has a part in it. layouts as in
    `visits`. Where visits leave less than a quarter of the products with a query (studio photos on
    one ground all look like one visit), single photos are held out. Raises CatalogError where every
    product has one photo.
    """
    of_visits = visits(train, layouts)
    queries, unit = _held_out(train, holdout, 0, of_visits), "visits"
    while len(queries) < ENOUGH and 2 * holdout <= MOST_HELD:
        holdout *= 2
        queries = _held_out(train, holdout, 0, of_visits)
    photos = _held_out(train, holdout, 0)
    if photos.empty:
        raise CatalogError(
            "no product has two train photos, so none can be held out to choose by: where there "
            "is holdout, set it to 0"
        )
    if 4 * queries["product_id"].nunique() < photos["product_id"].nunique():
        queries, unit = photos, "photos"
    fit = train.drop(queries.index)
    return Validation(fit, queries, narrow(fit, gallery_domain), unit)


def subset(
    train: pd.DataFrame, strategy: str, n_products: int, *, seed: int = 0, nearest=()
) -> pd.DataFrame:
    """Photos of n_products products.

    'random'; 'largest' (most photos); 'capped' (random among products with at least 4 photos, at
    most 50 of each: Conde 2022); 'nearest' (those that unlabelled queries look like: nearest holds
    the product ids ranked first for the queries, and the products with most votes are taken).
    """
    counts = train.groupby("product_id").size()
    rng = np.random.default_rng(seed)
    if strategy in ("random", "capped"):
        least = 4 if strategy == "capped" else 1
        products = rng.permutation(counts.index[counts >= least])
    elif strategy == "largest":
        products = counts.nlargest(n_products).index
    elif strategy == "nearest":
        votes = pd.Series(np.ravel(nearest)).value_counts().reindex(counts.index).dropna()
        products = votes.nlargest(n_products).index
    else:
        raise ValueError(
            f"strategy {strategy!r} is unknown: use 'random', 'largest', 'capped' or 'nearest'"
        )
    if not len(products):
        raise CatalogError(
            f"strategy {strategy!r} finds no product: 'capped' needs products with 4 photos, "
            "'nearest' needs the product ids ranked first for the queries (pass nearest=)"
        )
    rows = train[train["product_id"].isin(products[:n_products])]
    if strategy == "capped":
        drawn = pd.Series(rng.random(len(rows)), rows.index)
        rows = rows[drawn.groupby(rows["product_id"]).rank() <= 50]
    return rows


def with_labels(rows: pd.DataFrame) -> np.ndarray:
    """(N,) int64 labels 0..C-1 in the order of the product ids."""
    return pd.factorize(rows["product_id"], sort=True)[0]
