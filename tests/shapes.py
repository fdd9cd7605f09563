"""Data roots of many shapes, cut from the toy set: what people bring, and what a notebook meets."""

import shutil
from pathlib import Path

import pandas as pd

TEXT = ["B07XJ8C8F5", "SKU-0012/red", "Müsli & Nüsse", "0042"]  # names of the first products


def one_photo_a_product(train, test):
    return train[train["domain"] == "shop"].groupby("class").head(1), test


def two_photos_a_product(train, test):
    return train.groupby("class").head(2), test


def no_domain_and_no_group(train, test):
    return train[["name", "class"]], test[["name", "class"]]


def product_names_in_text(train, test):
    def named(table):
        classes = table["class"].map(dict(enumerate(TEXT))).fillna("p" + table["class"].astype(str))
        return table.assign(**{"class": classes, "group": "line " + table["group"].astype(str)})

    return named(train), named(test)


def no_labels(train, test):
    return train, test[["name"]]


def two_products_and_three_queries(train, test):
    first = one_photo_a_product(train, test)[0].head(2)
    return first, test[test["class"].isin(first["class"])].head(3)


def shop_photos_alone(train, test):
    return train[train["domain"] == "shop"], test


def customer_photos_alone(train, test):
    return train[train["domain"] == "customer"], test


TABLES = {
    function.__name__: function
    for function in (
        one_photo_a_product,
        two_photos_a_product,
        no_domain_and_no_group,
        product_names_in_text,
        no_labels,
        two_products_and_three_queries,
        shop_photos_alone,
        customer_photos_alone,
    )
}
SHAPES = [
    *TABLES,
    "folders_with_labels",
    "folders_without_labels",
    "folders_gallery_and_queries",
    "kaggles_test_table_alone",
    "names_with_blanks_and_umlauts",
    "one_product_of_300_photos",
    "folder_with_other_files",
]
DRAWN = {  # where no photo can be spared to choose by
    "one_photo_a_product",
    "two_products_and_three_queries",
    "shop_photos_alone",
}


def cut(shape: str, toy_root: Path, folder: Path) -> Path:
    """A data root of that shape in the folder, of a toy set's photos."""
    train, test = (pd.read_csv(toy_root / f"{split}.csv") for split in ("train", "test"))
    if shape in TABLES:
        return with_tables(folder, toy_root, *TABLES[shape](train, test))
    if shape == "kaggles_test_table_alone":
        with_tables(folder, toy_root, train, test)
        (folder / "test.csv").unlink()
        usage = test[["name", "class"]].assign(Usage="Public")
        usage.to_csv(folder / "test_kaggletest.csv", index=False)
    elif shape == "names_with_blanks_and_umlauts":
        renamed = [
            "größe " + (table["class"].astype(str) + "/photo " + table["name"]).str.upper()
            for table in (train, test)
        ]
        with_tables(folder, toy_root, train, test, *renamed)
    elif shape == "one_product_of_300_photos":
        five = sorted(set(train["class"]))[:5]
        few = train[train["class"].isin(five)].groupby("class").head(3)
        many = pd.concat([few[few["class"] == five[0]].head(1)] * 300)
        names = [f"{i}.jpg" for i in range(300)] + [f"few/{name}" for name in few["name"]]
        asked = test[test["class"].isin(five)]
        listed = pd.concat([many, few]).drop(columns="domain")
        with_tables(folder, toy_root, listed, asked, names)
    else:
        in_folders(shape, folder, toy_root, train, test)
    return folder


def with_tables(folder, toy_root, train, test, train_names=None, test_names=None) -> Path:
    """The photos of these rows, under other names where they are given, and their tables."""
    for split, rows, names in (("train", train, train_names), ("test", test, test_names)):
        names = rows["name"] if names is None else names
        for old, new in zip(rows["name"], names):
            copied(toy_root / split / old, folder / split / new)
        rows.assign(name=list(names)).to_csv(folder / f"{split}.csv", index=False)
    return folder


def in_folders(shape, folder, toy_root, train, test) -> None:
    """The photos of these rows, a folder a product, and no table."""
    gallery = shape == "folders_gallery_and_queries"
    for i, row in enumerate(train.itertuples(index=False)):
        inner = "back/" if i % 3 == 0 else ""  # a folder in a folder
        target = folder / ("gallery" if gallery else "train") / f"product {row[1]}"
        copied(toy_root / "train" / row[0], target / f"{inner}{row[0]}")
    for row in test.itertuples(index=False):
        product = "" if shape == "folders_without_labels" else f"product {row[1]}"
        target = folder / ("queries" if gallery else "test") / product
        copied(toy_root / "test" / row[0], target / row[0])
    if shape == "folder_with_other_files":
        (folder / "test" / "notes.txt").write_text("from Monday")
        (folder / "test" / ".DS_Store").write_bytes(b"\0")
        copied(toy_root / "test" / row[0], folder / "train" / "loose.jpg")


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
