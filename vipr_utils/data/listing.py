"""The photos that a data root lists for train or for test, by its tables or by its folders."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vipr_utils.data.tables import read_table, refuse, repeated
from vipr_utils.host.platform import GALLERIES, QUERIES

COLUMNS = ["name", "class", "group", "domain"]
UNKNOWN = ["", "-1"]
TABLES = {
    "train": ["train.csv"],
    "test": ["test.csv", "test_kaggletest.csv"],
}
FOLDERS = {
    "train": GALLERIES,
    "test": QUERIES,
}
PHOTOS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)
# no drive, no root, no .., no control character
INSIDE = r"(?![A-Za-z]:|[/\\])(?!(.*[/\\])?\.\.([/\\]|$))[^\x00-\x1f]+"


def listed(root: Path, split: str, products=()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(split, path from the root and COLUMNS of each photo, strays: file, problem of other files).

    train: train.csv, else the folders train/<product>/ or gallery/<product>/. test: test.csv, else
    test_kaggletest.csv, which brings the classes where both are there, else the folder test/ or
    queries/, with or without a folder for each of the products (of train). attrs["form"] says
    which. All is text, '' where unknown; no rows where there is neither table nor photo. Raises
    CatalogError for the first row of a table with a value that cannot be right.
    """
    files = [root / name for name in TABLES[split] if (root / name).is_file()]
    folder = _image_folder(root, split, in_table=bool(files))
    inside = folder.relative_to(root).as_posix() + "/"
    if files:
        table, strays = _from_tables(files), pd.DataFrame({"file": [], "problem": []}, dtype=str)
        inner = table["name"].str.replace("\\", "/")  # a table may have been written on Windows
        form = " + ".join(file.name for file in files)
    else:
        table, strays = from_folder(folder, split, products)
        inner = table["name"]
        strays["file"] = inside + strays["file"]
        labels = "a folder a product" if table["class"].any() else "no labels"
        form = f"folder {folder.name}/, {labels}" if len(table) else "none"
    table = table.assign(split=split, path=inside + inner)
    table.attrs["form"] = f"{split}: {form}"
    return table, strays


def _image_folder(root: Path, split: str, *, in_table: bool) -> Path:
    """Where the photos of a split lie; one level down where archives were unpacked to train/train.

    Without a table a folder of its own name may be a product, unless it is all there is.
    """
    folders = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    folder = next(iter(folders), root / split)
    inner = folder / folder.name
    if inner.is_dir() and (in_table or list(folder.glob("[!.]*")) == [inner]):
        return inner
    return folder


def _from_tables(files: list[Path]) -> pd.DataFrame:
    """COLUMNS of the first table, '' where nothing stands; the classes of the last one."""
    needed = ["name"] if files[0].name == "test.csv" else ["name", "class"]
    table = read_table(files[0], needed)
    if len(files) > 1:
        classes = read_table(files[1], ["name", "class"])[["name", "class"]]
        table = table.drop(columns="class", errors="ignore")
        table = table.merge(classes, "left", on="name")
    table = table.reindex(columns=COLUMNS, fill_value="").fillna("")

    # what is there must be right
    for column in ("class", "group"):
        # csv.writer puts no quotes around a carriage return, which would end the row
        table[column] = table[column].str.replace("\r", " ").str.strip()

    outside = ~table["name"].str.fullmatch(INSIDE)
    nameless = table["class"].isin(UNKNOWN) & (files[0].name == "train.csv")
    elsewhere = ~table["domain"].isin(["shop", "customer", ""])
    wrong = [
        ("name", outside, "a path inside the image folder"),
        ("class", nameless, "the name or number of a product"),
        ("domain", elsewhere, "shop, customer or nothing"),
    ]
    faults = [repeated(table["name"])]
    for column, rows, expected in wrong:
        problem = f"{column} {{!r}}, expected {expected}"
        faults.append((table[column][rows], problem, "Correct the table."))
    refuse(files[0], table["name"], faults)
    return table


def from_folder(folder: Path, split: str, products) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(COLUMNS of the photos below a folder in the order of their names, strays).

    Its own folders are the products. Those of test are so where one of them is a product of train,
    else they are days, shops or cameras.
    """
    files, places = [], {}
    for where, folders, inside in os.walk(folder, followlinks=True):
        folders.sort()
        # a link to a folder that was listed, perhaps one above, is a stray itself
        if places.setdefault(os.path.realpath(where), where) != where:
            folders[:], inside = [], [""]
        files += [Path(where, file) for file in inside]

    # in a name that is no Unicode ? takes the place of what is none: such a file is absent
    names = [
        file.relative_to(folder).as_posix().encode(errors="replace").decode()
        for file in sorted(files)
    ]
    names = pd.Series(names, dtype=str)
    classes = names.str.extract("^(.*?)/", expand=False).fillna("")

    # .DS_Store, notes.txt, and photos of train that no folder names
    hidden = names.str.contains(r"(?:^|/)\.|[\x00-\x1f]")
    other = hidden | ~names.str.lower().str.endswith(PHOTOS)
    loose = ~other & (classes == "") & (split == "train")
    if split == "test" and not classes.isin(products).any():
        classes = ""

    table = pd.DataFrame(
        {
            "name": names,
            "class": classes,
            "group": "",
            "domain": "",
        }
    )
    strays = pd.DataFrame({"file": names, "problem": "no photo, by its name"})
    strays.loc[loose, "problem"] = "in no folder of a product"
    return table[~other & ~loose].reset_index(drop=True), strays[other | loose]
