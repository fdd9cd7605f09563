"""The Products-10K tables as one DataFrame; protocols and subsets."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from vipr_utils.host.files import whole_file

DOMAINS = ("", "shop", "customer")


PROTOCOLS = ("test", "seen", "unseen")


STRATEGIES = ("random", "largest", "capped", "nearest")


class CatalogError(ValueError):
    """A table that cannot be used: names file, row and remedy."""


def read(root: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(catalog, problems) of a data root in the Products-10K layout.

    Photos that are named but absent or empty are listed in problems (file, row, problem) and left out. attrs of the
    catalog: root, fingerprint (of tables and file sizes), notes. A root without test.csv has train photos only.
    Raises CatalogError for a table that is missing, lacks columns, or holds values that cannot be right.
    """
    root = Path(root)
    if not (root / "train.csv").is_file():
        raise CatalogError(
            f"{root.name}/train.csv is missing: a data root holds train.csv (name,class,group), test.csv and the "
            "folders train/ and test/"
        )
    digest, notes, parts, problems = hashlib.sha256(), [], [], []
    for split in ("train", "test"):
        if split == "test" and not (root / "test.csv").is_file():
            notes.append("test.csv is missing: protocols seen and unseen only")
            continue
        table = _table(root, split, notes)
        present, missing = _present(root, split, table, digest)
        parts.append(present)
        problems.append(missing)
    catalog = pd.concat(parts, ignore_index=True)
    if not (catalog["split"] == "train").any():
        raise CatalogError(
            f"{root.name}/train: none of the photos named in train.csv is there; unpack train/ beside it"
        )
    catalog.attrs = {"root": str(root), "fingerprint": digest.hexdigest()[:16], "notes": notes}
    return catalog, pd.concat(problems, ignore_index=True)


def _table(root: Path, split: str, notes: list[str]) -> pd.DataFrame:
    """name, product_id, group, domain of train.csv or test.csv, checked row by row."""
    file = root / f"{split}.csv"
    table = _read_csv(file)
    required = ["name", "class"] if split == "train" else ["name"]
    if absent := [c for c in required if c not in table]:
        raise CatalogError(
            f"{file.name}: column{'s' * (len(absent) > 1)} {', '.join(absent)} missing, found {', '.join(table.columns)}. "
            f"Expected name,class,group{'' if split == 'train' else ' (class and group where known)'}"
        )
    if extra := [c for c in table if c not in ("name", "class", "group", "domain")]:
        notes.append(f"{file.name}: columns {', '.join(extra)} ignored")
    if table.empty:
        raise CatalogError(f"{file.name} has no rows: expected one per photo")
    if split == "test" and "class" not in table and (root / "test_kaggletest.csv").is_file():
        table = table.merge(
            _read_csv(root / "test_kaggletest.csv")[["name", "class"]], on="name", how="left"
        )
    _check_names(table["name"], file.name)
    domain = table["domain"].fillna("") if "domain" in table else pd.Series("", index=table.index)
    if (wrong := ~domain.isin(DOMAINS)).any():
        row = wrong.idxmax()
        raise CatalogError(
            f"{file.name} row {row + 2}: domain {domain[row]!r} is unknown, expected shop or customer"
        )
    ids = {
        c: _integers(table, c, file.name, unknown_allowed=c == "group" or split == "test")
        for c in ("class", "group")
    }
    return pd.DataFrame(
        {"name": table["name"], "product_id": ids["class"], "group": ids["group"], "domain": domain}
    )


def _read_csv(file: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, dtype=str, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CatalogError(
            f"{file.name} is no readable CSV ({error}): expected UTF-8 with a header name,class,group"
        ) from error
    return table.rename(columns=lambda c: c.strip())


def _check_names(names: pd.Series, file: str) -> None:
    """Row numbers in messages count from the header as line 1, as an editor shows them."""
    if names.isna().any():
        raise CatalogError(f"{file} row {names.isna().idxmax() + 2}: no name")
    if (twice := names.duplicated()).any():
        row = twice.idxmax()
        raise CatalogError(
            f"{file} row {row + 2}: {names[row]!r} stands there twice ({twice.sum()} duplicate names); keep one row per photo"
        )
    for row, name in names.items():
        if (
            name.startswith(("/", "\\"))
            or ".." in name
            and ".." in PurePosixPath(name.replace("\\", "/")).parts
        ):
            raise CatalogError(
                f"{file} row {row + 2}: {name!r} leaves the data root; names are relative to the image folder"
            )


def _integers(table: pd.DataFrame, column: str, file: str, *, unknown_allowed: bool) -> np.ndarray:
    if column not in table:
        return np.full(len(table), -1, np.int64)
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = (values.isna() & (table[column].notna() | (not unknown_allowed))) | (
        values.notna() & (values % 1 != 0)
    )
    wrong |= values < (-1 if unknown_allowed else 0)
    if wrong.any():
        row = wrong.idxmax()
        raise CatalogError(
            f"{file} row {row + 2}: {column} {table[column][row]!r} is no whole number >= 0"
        )
    return values.fillna(-1).astype(np.int64).to_numpy()


def _present(
    root: Path, split: str, table: pd.DataFrame, digest
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows whose file is there, problems); each image folder is listed once, so 142,000 files take a second."""
    folder = f"{split}/{split}" if (root / split / split).is_dir() else split
    sizes: dict[str, int] = {}
    for sub in sorted({str(PurePosixPath(n).parent) for n in table["name"]}):
        where = root / folder / sub
        if where.is_dir():
            with os.scandir(where) as entries:
                sizes |= {
                    str(PurePosixPath(sub) / e.name): e.stat().st_size
                    for e in entries
                    if e.is_file()
                }
    size = table["name"].map(lambda n: sizes.get(str(PurePosixPath(n)), -1))
    digest.update(
        pd.util.hash_pandas_object(table.assign(size=size), index=False).to_numpy().tobytes()
    )
    good = size > 0
    rows = table[good].assign(split=split)
    rows["image_id"] = split + "/" + rows["name"]
    rows["path"] = folder + "/" + rows["name"]
    bad = pd.DataFrame(
        {
            "file": folder + "/" + table["name"][~good],
            "row": table.index[~good] + 2,
            "problem": np.where(size[~good] < 0, "absent", "empty file"),
        }
    )
    return rows[["image_id", "name", "path", "split", "product_id", "group", "domain"]], bad


def describe_data(catalog: pd.DataFrame) -> dict:
    """The `data` entry of run.json; the root by its folder name only."""
    split = catalog["split"]
    return {
        "root": Path(catalog.attrs["root"]).name,
        "n_train": int((split == "train").sum()),
        "n_test": int((split == "test").sum()),
        "n_products": int(catalog["product_id"][split == "train"].nunique()),
        "fingerprint": catalog.attrs["fingerprint"],
    }


def split(
    catalog: pd.DataFrame,
    protocol: str,
    *,
    seed: int = 0,
    gallery_domain: str = "",
    holdout: float = 0.2,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(train, queries, gallery), rows of the catalog with their row numbers kept.

    test: queries are the test photos, the gallery is the train photos.
    seen: a share `holdout` (at least one) of each product's train photos are queries, where two or more are there;
    customer photos where domains are known. unseen: the share `holdout` of products is not trained on; half of their
    photos are queries, the other half joins all other products in the gallery.
    gallery_domain narrows the gallery to 'shop' or 'customer' photos.
    """
    train = catalog[catalog["split"] == "train"]
    if protocol == "test":
        queries = catalog[catalog["split"] == "test"]
        if queries.empty:
            raise CatalogError(
                "protocol 'test' needs test photos and there are none: add test.csv and test/, or use 'seen' or 'unseen'"
            )
        gallery = train
    elif protocol == "seen":
        queries = _held_out(train, holdout, seed)
        if queries.empty:
            raise CatalogError(
                "protocol 'seen' holds out photos and every product has one: use 'test' or 'unseen'"
            )
        train = gallery = train.drop(queries.index)
    elif protocol == "unseen":
        products = np.random.default_rng(seed).permutation(np.unique(train["product_id"]))
        hidden = train[train["product_id"].isin(products[: max(1, round(holdout * len(products)))])]
        queries = _held_out(hidden, 0.5, seed)
        gallery, train = train.drop(queries.index), train.drop(hidden.index)
    else:
        raise ValueError(f"protocol {protocol!r} is unknown: use one of {PROTOCOLS}")
    return train, queries, narrow(gallery, gallery_domain)


def narrow(gallery: pd.DataFrame, domain: str) -> pd.DataFrame:
    """The gallery rows of one domain; '' keeps all. Raises CatalogError when none is left."""
    if domain not in DOMAINS:
        raise ValueError(
            f"gallery_domain {domain!r} is unknown: use 'shop', 'customer' or '' for all"
        )
    narrowed = gallery[gallery["domain"] == domain] if domain else gallery
    if narrowed.empty:
        found = gallery["domain"].replace("", "unknown").value_counts().to_dict()
        raise CatalogError(
            f"gallery_domain {domain!r} leaves no photo (domains here: {found}); use '' for all"
        )
    return narrowed


def _held_out(rows: pd.DataFrame, share: float, seed: int, visits=None) -> pd.DataFrame:
    """A share of each product's photos, at least one, never the last one; customer photos where domains are known.

    With visits whole ones are taken, up to half of the photos: a product of a single visit asks nothing.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for _, product in rows.groupby("product_id"):
        candidates = product.index[product["domain"] != "shop"].to_numpy()
        take = min(max(1, round(share * len(candidates))), len(candidates), len(product) - 1)
        if visits is None:
            chosen.append(rng.permutation(candidates)[:take])
            continue
        held = np.empty(0, np.int64)
        for visit in rng.permutation(np.unique(visits[candidates])):
            its = candidates[visits[candidates] == visit]
            if len(held) < take and len(held) + len(its) <= len(candidates) / 2:
                held = np.concatenate([held, its])
        chosen.append(held)
    return rows.loc[np.sort(np.concatenate(chosen).astype(np.int64))]


def visits(rows: pd.DataFrame, layouts: np.ndarray, *, percent: int = 70) -> pd.Series:
    """A number for each row: photos of one product that a chain of photos with like colours connects.

    layouts (N, B) whole numbers, `audit.colour_layouts` of the rows: two photos are alike when at least `percent` of what
    they count is shared (their histogram intersection). No rounding decides, so visits are the same on every machine.
    Photos of one shopping trip look alike, and a random split puts them on both sides: on the grocery set frozen features
    score 0.83 on single photos held out of train, 0.41 on visits held out, and 0.47 on the real test of later visits; with a
    learned whitening 0.96, 0.70 and 0.69.
    """

    def alike(at: np.ndarray) -> np.ndarray:
        counts = layouts[at].astype(np.int64)
        shared = np.stack([np.minimum(row, counts).sum(1) for row in counts])
        totals = counts.sum(1)
        return 100 * shared >= percent * np.minimum.outer(totals, totals)

    return chains(rows, alike)


def chains(rows: pd.DataFrame, alike) -> pd.Series:
    """The component of each row, within its product; alike(positions) says which of them are linked (n, n)."""
    found = pd.Series(-1, rows.index)
    for at in rows.groupby("product_id").indices.values():
        found.iloc[at] = connected_components(alike(at), directed=False)[1]
    return found


@dataclass(frozen=True)
class Validation:
    """Train photos set aside to choose by: what is left to fit, the queries, and the gallery that they search.

    how: 'visits' (whole ones were held out) or 'photos' (single ones: hardly a product was seen on two visits).
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
        with whole_file(Path(folder) / "split.csv") as part:
            self.table.to_csv(part, index=False)

    def record(self, metrics: dict) -> dict:
        """The `validation` entry of run.json: the split and what was scored on it."""
        return {
            "how": self.how,
            "split": self.split,
            "n_queries": len(self.queries),
            "map_at_5": metrics.get("map_at_5"),
            "low": metrics.get("map_at_5_low"),
            "high": metrics.get("map_at_5_high"),
        }


def hold_out(
    train: pd.DataFrame, layouts: np.ndarray, *, holdout: float = 0.1, gallery_domain: str = ""
) -> Validation:
    """A share of each product's train photos as validation queries, whole visits of them; the rest is fitted and searched.

    The same for every run and machine: no seed and no model has a part in it. layouts as in `visits`. Where visits leave
    less than a quarter of the products with a query (studio photos on one ground all look like one visit), single photos
    are held out. Raises CatalogError where every product has one photo.
    """
    single_photos = _held_out(train, holdout, 0)
    if single_photos.empty:
        raise CatalogError(
            "no product has two train photos, so none can be held out to choose by: where there is holdout, set it to 0"
        )
    whole_visits = _held_out(train, holdout, 0, visits(train, layouts))
    too_few = 4 * whole_visits["product_id"].nunique() < single_photos["product_id"].nunique()
    how, queries = ("photos", single_photos) if too_few else ("visits", whole_visits)
    fit = train.drop(queries.index)
    return Validation(fit, queries, narrow(fit, gallery_domain), how)


def subset(
    train: pd.DataFrame, strategy: str, n_products: int, *, seed: int = 0, nearest=()
) -> pd.DataFrame:
    """Photos of n_products products: 'random'; 'largest' (most photos); 'capped' (random among products with at
    least 4 photos, at most 50 of each: Conde 2022); 'nearest' (those that unlabelled queries look like: nearest holds
    the product ids ranked first for the queries, and the products with most votes are taken)."""
    counts = train["product_id"].value_counts().sort_index()
    rng = np.random.default_rng(seed)
    if strategy == "largest":
        products = counts.sort_values(ascending=False, kind="stable").index[:n_products]
    elif strategy == "nearest":
        votes = (
            pd.Series(np.asarray(nearest).ravel())
            .value_counts()
            .reindex(counts.index, fill_value=0)
        )
        if not votes.any():
            raise CatalogError(
                "strategy 'nearest' needs the product ids ranked first for the queries: pass nearest="
            )
        products = votes.sort_values(ascending=False, kind="stable").index[:n_products]
    elif strategy in ("random", "capped"):
        pool = counts.index[counts >= 4] if strategy == "capped" else counts.index
        if pool.empty:
            raise CatalogError(
                "strategy 'capped' needs products with 4 photos and there are none: use 'random'"
            )
        products = rng.permutation(pool)[:n_products]
    else:
        raise ValueError(f"strategy {strategy!r} is unknown: use one of {STRATEGIES}")
    rows = train[train["product_id"].isin(products)]
    if strategy == "capped":
        order = pd.Series(rng.random(len(rows)), rows.index).groupby(rows["product_id"]).rank()
        rows = rows[order <= 50]
    return rows


def with_labels(rows: pd.DataFrame) -> np.ndarray:
    """(N,) int64 labels 0..C-1 in the order of the product ids."""
    return np.unique(rows["product_id"], return_inverse=True)[1].astype(np.int64)
