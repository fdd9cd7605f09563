"""The Products-10K tables as one DataFrame; protocols and subsets."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from vipr_utils.host.files import whole_file

COLUMNS = ["name", "class", "group", "domain"]
CATALOG = ["image_id", "name", "path", "split", "product_id", "group", "domain"]
Fault = tuple[pd.Series, str, str]  # wrong values under their row, problem with {}, remedy
INSIDE = r"(?![/\\])(?!(.*[/\\])?\.\.([/\\]|$)).+"  # neither empty nor absolute nor with .. in it
WHOLE = r"\d{1,18}(\.0*)?"
MAYBE = WHOLE + "|-1|"


class CatalogError(ValueError):
    """A table that cannot be used: names file, row and remedy."""


def read_table(path: Path, columns=("name",)) -> pd.DataFrame:
    """The rows of a CSV file as text, '' where a field is empty; of columns of one name the first.

    UTF-8, with or without a byte order mark; empty lines are passed over. Raises CatalogError for a
    file that is no such CSV, has no rows or lacks one of the columns, and for a row with more or
    fewer fields than the header.
    """
    try:
        rows = pd.read_csv(
            path,
            header=None,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            engine="python",  # the default one fills rows up that are too short
        )
        if len(rows) < 2:
            raise ValueError("no rows below a header")
    except (OSError, ValueError) as error:
        raise CatalogError(
            f"{path} is no readable CSV ({error}): expected UTF-8 text, a header, rows of as many "
            "fields, and quotes around a field with a comma"
        ) from error
    table = rows[1:].reset_index(drop=True).set_axis(rows.loc[0].str.strip(), axis=1)
    if not set(columns) <= set(table):
        raise CatalogError(
            f"{path}: expected the columns {', '.join(columns)}, found {', '.join(table)}. "
            "Rename or add them"
        )
    first = table.iloc[:, 0]
    short = first[table.isna().any(axis=1)]
    refuse(path, first, [(short, "fewer fields than the header", "Put a comma for each field.")])
    return table.loc[:, ~table.columns.duplicated()]


def refuse(path: Path, names: pd.Series, faults: list[Fault]) -> None:
    """Raise CatalogError for the first of the faults that is found, and say how many rows share it.

    names (N,) name the rows; their numbers count the header as row 1, as an editor shows them.
    """
    for values, problem, remedy in faults:
        if len(values):
            row, problem = values.index[0], problem.format(values.iloc[0])
            raise CatalogError(
                f"{path}, row {row + 2} ({names[row]}): {problem}. {remedy} "
                f"Rows like it: {values.index.nunique()}."
            )


def repeated(names: pd.Series) -> Fault:
    """The fault of names that are there twice, for `refuse`."""
    return names[names.duplicated()], "this name already has a row above", "Keep one row for each."


def read_rows(root: Path, split: str) -> pd.DataFrame:
    """name, product_id, group, domain of every row of train.csv or test.csv, checked.

    product_id and group are int64, -1 = unknown; domain is '' where unknown; other columns are left
    out. The classes of test_kaggletest.csv take the place of those of test.csv. Raises CatalogError
    for the first row that holds a value that cannot be right.
    """
    file, labels = Path(root, f"{split}.csv"), Path(root, "test_kaggletest.csv")
    train = split == "train"
    table = read_table(file, ["name", "class"] if train else ["name"])
    if not train and labels.is_file():
        classes = read_table(labels, ["name", "class"])[["name", "class"]]
        table = table.drop(columns="class", errors="ignore").merge(classes, "left", on="name")
    table = table.reindex(columns=COLUMNS, fill_value="").fillna("")
    values = {
        "name": (INSIDE, "a path inside the image folder"),
        "class": (WHOLE if train else MAYBE, "a whole number >= 0"),
        "group": (MAYBE, "a whole number >= 0 or nothing"),
        "domain": ("shop|customer|", "shop, customer or nothing"),
    }
    faults = [repeated(table["name"])]
    for column, (pattern, expected) in values.items():
        wrong = table[column][~table[column].str.fullmatch(pattern)]
        faults.append((wrong, f"{column} {{!r}}, expected {expected}", "Correct the table."))
    refuse(file, table["name"], faults)
    numbers = ["class", "group"]
    table[numbers] = table[numbers].replace("", "-1").apply(pd.to_numeric).astype(np.int64)
    return table.rename(columns={"class": "product_id"})


def read(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(catalog, problems) of a data root in the Products-10K layout.

    Photos that are named but absent are listed in problems (file, problem) and left out. attrs of
    the catalog: root, fingerprint (of tables and file sizes). A root without test.csv has train
    photos only. Raises CatalogError for a table that is missing, lacks columns, or holds values
    that cannot be right.
    """
    root = Path(root)
    splits = ["train", "test"] if (root / "test.csv").is_file() else ["train"]
    photos = pd.concat([_photos(root, split) for split in splits])
    there = photos["size"] >= 0
    catalog = photos.loc[there, CATALOG].reset_index(drop=True)
    if "train" not in set(catalog["split"]):
        raise CatalogError(
            f"{root.name}/train: none of the photos named in train.csv is there; unpack train/ "
            "beside it"
        )
    recorded = photos[["name", "product_id", "group", "domain", "size"]]
    hashes = pd.util.hash_pandas_object(recorded, index=False).to_numpy()
    fingerprint = hashlib.sha256(hashes).hexdigest()[:16]
    catalog.attrs = {"root": str(root), "fingerprint": fingerprint}
    return catalog, pd.DataFrame({"file": photos["path"][~there], "problem": "absent"})


def _photos(root: Path, split: str) -> pd.DataFrame:
    """`read_rows` with image_id, path from the root, split, size in bytes (-1 = absent)."""
    rows = read_rows(root, split)
    folder = f"{split}/{split}" if (root / split / split).is_dir() else split
    paths = folder + "/" + rows["name"]
    files = paths.map(root.joinpath)
    sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in files]
    return rows.assign(image_id=split + "/" + rows["name"], path=paths, split=split, size=sizes)


def describe_data(catalog: pd.DataFrame) -> dict:
    """The `data` entry of run.json; the root by its folder name only."""
    train = catalog[catalog["split"] == "train"]
    return {
        "root": Path(catalog.attrs["root"]).name,
        "n_train": len(train),
        "n_test": len(catalog) - len(train),
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
        products = np.random.default_rng(seed).permutation(np.unique(train["product_id"]))
        n_hidden = max(1, round(holdout * len(products)))
        hidden = train[train["product_id"].isin(products[:n_hidden])]
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

    layouts (N, B) whole numbers, `audit.colour_layouts` of the rows: two photos are alike when at
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

    how: 'visits' (whole ones were held out) or 'photos' (single ones: hardly a product was seen on
    two visits).
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

    def save(self, folder: Path) -> None:
        """Write the table to <folder>/split.csv, whole."""
        with whole_file(folder / "split.csv") as part:
            self.table.to_csv(part, index=False)

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


def hold_out(
    train: pd.DataFrame, layouts: np.ndarray, *, holdout: float = 0.1, gallery_domain: str = ""
) -> Validation:
    """A share of each product's train photos as queries, in whole visits; the rest is searched.

    The same for every run and machine: no seed and no model has a part in it. layouts as in
    `visits`. Where visits leave less than a quarter of the products with a query (studio photos on
    one ground all look like one visit), single photos are held out. Raises CatalogError where every
    product has one photo.
    """
    queries, unit = _held_out(train, holdout, 0, visits(train, layouts)), "visits"
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
    if strategy == "random":
        products = rng.permutation(counts.index)
    elif strategy == "capped":
        products = rng.permutation(counts.index[counts >= 4])
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
