"""A submission answers every query. Write it, read it, check it and score it, from CSV files alone.

Two forms. Ranking, `id,images`: the gallery images of each query, best first, one space between two names;
five, or the whole gallery where it is smaller. Classification, `name,class`: one product for each query.
The checks share no code with the search, so that they can prove it wrong.

    python -m vipr_utils score submission.csv DATA_ROOT [--gallery-domain shop]
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.host.files import whole_file
from vipr_utils.judge import metrics

RANKING, CLASSIFICATION, LENGTH = ["id", "images"], ["name", "class"], 5
TWICE = "this query already has a row above. Keep one row for each query."


class SubmissionError(ValueError):
    """One line: the file, the data row (1 = first below the header) and its id, what is wrong, the remedy."""


def _fault(path: Path, row: int, name: str, problem: str) -> SubmissionError:
    """The error for data row number `row` (from 0) of a file."""
    return SubmissionError(f"{path}, row {row + 1} ({name}): {problem}")


def write_ranking(path: Path, query_names, gallery_names) -> Path:
    """The CSV `id,images` for query_names (Q,) and gallery_names (Q, 5) lists, best first; returns its path.

    Raises SubmissionError, and writes nothing, for what no reader could take apart again: a name with a space,
    a name twice in a list, lists of different lengths, a query twice.
    """
    queries, lists = (
        [str(q) for q in query_names],
        [[str(n) for n in names] for names in gallery_names],
    )
    _same_length(path, queries, lists)
    for row, (query, names) in enumerate(zip(queries, lists, strict=True)):
        if spaced := [name for name in names if " " in name or not name]:
            raise _fault(path, row, query, _spaced(spaced[0]))
        if (
            not 1 <= len(names) <= LENGTH
            or len(names) != len(lists[0])
            or len(set(names)) < len(names)
        ):
            raise _fault(
                path,
                row,
                query,
                f"{len(names)} images, {len(set(names))} different; expected {LENGTH} "
                f"different ones (fewer in all rows alike, where the gallery is smaller). Rank each once.",
            )
    return _write(path, RANKING, queries, [" ".join(names) for names in lists])


def write_classification(path: Path, names, classes) -> Path:
    """The CSV `name,class` for query names (Q,) and integer product ids (Q,); returns its path.

    Raises SubmissionError, and writes nothing, for a class that is NaN, negative or no whole number.
    """
    names, classes = [str(n) for n in names], list(classes)
    _same_length(path, names, classes)
    number = pd.to_numeric(pd.Series(classes, dtype=object), errors="coerce")
    if (bad := np.flatnonzero(~((number >= 0) & (number % 1 == 0)))).size:
        raise _fault(
            path,
            bad[0],
            names[bad[0]],
            f"class {classes[bad[0]]!r}, expected a whole number >= 0. "
            f"Predict a class of train.csv for every query.",
        )
    return _write(path, CLASSIFICATION, names, number.astype("int64"))


def _same_length(path, names, answers) -> None:
    if len(names) != len(answers):
        raise SubmissionError(
            f"{path}: {len(names)} queries, {len(answers)} answers. Give one for each query."
        )


def _write(path: Path, header: list[str], names: list[str], answers) -> Path:
    if len(twice := pd.Series(names, dtype=object)[lambda s: s.duplicated()]):
        raise _fault(path, twice.index[0], twice.iloc[0], TWICE)
    table = pd.DataFrame(dict(zip(header, (names, answers), strict=True)))
    with whole_file(Path(path)) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")
    return Path(path)


def _spaced(name: str) -> str:
    return (
        f"image name {name!r} has a space or is empty, but id,images puts one space between names. Rename the "
        f"file, or write the classification form name,class."
    )


def read(path: Path) -> pd.DataFrame:
    """The rows of a submission as text: columns `id, images` or `name, class`.

    Raises SubmissionError for a file that is absent, empty, not UTF-8, under another header, or ragged.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise SubmissionError(
            f"{path}: no such file. Run notebook 06_submission to write it."
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SubmissionError(
            f"{path}: cannot be read as CSV ({error}). Save it as UTF-8 text."
        ) from None
    if not rows:
        raise SubmissionError(
            f"{path}: the file is empty. Write a header and a row for each query."
        )
    if rows[0] not in (RANKING, CLASSIFICATION):
        raise SubmissionError(
            f"{path}: header {','.join(rows[0])!r}, expected {','.join(RANKING)!r} or "
            f"{','.join(CLASSIFICATION)!r}. Rename the columns and leave out the others."
        )
    for row, fields in enumerate(rows[1:]):
        if len(fields) != 2:
            raise _fault(
                path,
                row,
                fields[0],
                f"{len(fields)} fields, expected 2. Put spaces, not commas, between "
                f"image names, and quotes around a name with a comma.",
            )
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=object)


def _table(data_root: Path, file: str, *columns: str) -> pd.DataFrame:
    """A table of the data root as text, each image once; class is int64, -1 = unknown."""
    path = Path(data_root) / file
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise SubmissionError(
            f"{path}: cannot be read ({why}). Give a data root that has it."
        ) from None
    if missing := [column for column in columns if column not in table]:
        raise SubmissionError(
            f"{path}: no column {missing[0]!r}, expected {','.join(columns)}. Add it"
            f"{' or leave out gallery_domain' if missing[0] == 'domain' else ''}."
        )
    if "class" not in table:
        return table.drop_duplicates("name")
    number = pd.to_numeric(table["class"].replace("", "-1"), errors="coerce")
    if (bad := np.flatnonzero(~(number % 1 == 0))).size:
        name, value = table.loc[bad[0], ["name", "class"]]
        raise _fault(
            path, bad[0], name, f"class {value!r}, expected a whole number. Correct the table."
        )
    table = table.assign(**{"class": number.astype("int64")}).drop_duplicates(["name", "class"])
    if (twice := table["name"].duplicated()).any():
        row = twice.idxmax()
        raise _fault(
            path, row, table["name"][row], "this image has another class above. Keep the right row."
        )
    return table


def _gallery(data_root: Path, domain: str) -> pd.DataFrame:
    """The rows of train.csv that may be ranked: all, or those of one domain; index = row of the file."""
    train = _table(data_root, "train.csv", "name", "class", *(["domain"] if domain else []))
    gallery = train[train["domain"] == domain] if domain else train
    if gallery.empty:
        raise SubmissionError(
            f"{Path(data_root) / 'train.csv'}: no image of domain {domain!r}, only of "
            f"{sorted(set(train.get('domain', [])))}. Give one of these, or none."
        )
    return gallery


def validate(path: Path, data_root: Path, *, gallery_domain: str = "") -> pd.DataFrame:
    """The rows of a submission that passed every check: each query of test.csv once, each with min(5, gallery
    size) different images of train.csv (of that domain), or with a class of train.csv.

    Raises SubmissionError for the first fault, with file, row, id, remedy, and how many rows share it.
    """
    table, gallery = read(path), _gallery(data_root, gallery_domain)
    queries, ids = _table(data_root, "test.csv", "name")["name"], table.iloc[:, 0]

    def check(faulty, problem: str, remedy: str, detail=lambda row: ""):
        if len(rows := np.flatnonzero(faulty)):
            more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
            raise _fault(
                path, rows[0], ids[rows[0]], f"{problem.format(detail(rows[0]))}{more}. {remedy}"
            )

    check(ids.duplicated(), *TWICE.split(". "))
    check(~ids.isin(queries), "unknown query, not in test.csv", "Give the image names of test.csv.")
    if len(missing := queries[~queries.isin(ids)]):
        raise _fault(
            path,
            len(ids),
            missing.iloc[0],
            f"no row for this query of test.csv ({len(missing)} of "
            f"{len(queries)} missing). Write a row for every query.",
        )
    if list(table) == CLASSIFICATION:
        number, known = pd.to_numeric(table["class"], errors="coerce"), gallery["class"]
        check(
            ~number.isin(known[known >= 0]),
            "class {!r} is no class of train.csv",
            "Predict a class of train.csv for every query.",
            lambda row: table["class"][row],
        )
        return table
    if (spaced := gallery["name"].str.contains(" ")).any():
        row = spaced.idxmax()
        raise _fault(
            Path(data_root, "train.csv"), row, gallery["name"][row], _spaced(gallery["name"][row])
        )
    lists, there, length = (
        table["images"].str.split(" "),
        set(gallery["name"]),
        min(LENGTH, len(gallery)),
    )
    of_domain = f" with domain {gallery_domain}" if gallery_domain else ""
    check(
        [("" in names) for names in lists],
        "an empty name in {!r}",
        "Put exactly one space between two names, none at the ends.",
        lambda row: table["images"][row],
    )
    check(
        [len(names) != length for names in lists],
        "{} images, expected " + str(length),
        f"Rank the best {length} gallery images of every query.",
        lambda row: len(lists[row]),
    )
    check(
        [len(set(names)) < length for names in lists],
        "{} is listed more than once",
        "Rank each image once.",
        lambda row: max(lists[row], key=lists[row].count),
    )
    check(
        [not there.issuperset(names) for names in lists],
        "unknown image {}, not in train.csv" + of_domain,
        "Give image names of the gallery, and the gallery_domain that was searched.",
        lambda row: next(name for name in lists[row] if name not in there),
    )
    return table


def _labels(data_root: Path, names: pd.Series) -> np.ndarray:
    """Product ids (Q,) int64 of the queries: test.csv's class, else test_kaggletest.csv's; -1 = unknown."""
    table = _table(data_root, "test.csv", "name")
    if "class" not in table or (table["class"] < 0).all():
        if not Path(data_root, "test_kaggletest.csv").is_file():
            return np.full(len(names), -1)
        table = _table(data_root, "test_kaggletest.csv", "name", "class")
    class_of = dict(zip(table["name"], table["class"], strict=True))
    return np.array([class_of.get(name, -1) for name in names], dtype=np.int64)


def score(path: Path, data_root: Path, *, gallery_domain: str = "", seed: int = 0) -> dict:
    """The figures of `metrics.summary` for a valid submission, and n_gallery; None where no query has a label.

    n counts rows of train.csv (of that domain); a query without a label is excluded and counted. For the form
    name,class: top_1_accuracy = right / labelled queries, with its interval. Raises SubmissionError.
    """
    table = validate(path, data_root, gallery_domain=gallery_domain)
    gallery = _gallery(data_root, gallery_domain)
    products = _labels(data_root, table.iloc[:, 0])  # (Q,)
    if list(table) == CLASSIFICATION:
        found = _accuracy(pd.to_numeric(table["class"]).to_numpy(), products, seed)
    else:
        class_of = dict(zip(gallery["name"], gallery["class"], strict=True))
        ranked = np.array(
            [[class_of[name] for name in names.split(" ")] for names in table["images"]]
        )
        hits = (ranked == products[:, None]) & (ranked >= 0)  # (Q, min(5, G))
        hits = np.pad(hits, [(0, 0), (0, LENGTH - hits.shape[1])])
        n_relevant = (
            gallery["class"][gallery["class"] >= 0].value_counts().reindex(products, fill_value=0)
        )
        found = metrics.summary(hits, n_relevant.to_numpy(), products, seed=seed)
    if (products < 0).all():
        found = {key: None if isinstance(value, float) else value for key, value in found.items()}
    return {**found, "n_gallery": len(gallery)}


def _accuracy(predicted: np.ndarray, products: np.ndarray, seed: int) -> dict:
    """Top-1 accuracy over the labelled queries, NaN without any, with its 95 % interval over products."""
    known = products >= 0
    right = (predicted == products)[known].astype(float)
    low, high = metrics.bootstrap_interval(right, products[known], seed=seed)
    return {
        "top_1_accuracy": float(right.mean()) if known.any() else float("nan"),
        "top_1_accuracy_low": low,
        "top_1_accuracy_high": high,
        "n_queries": int(known.sum()),
        "n_excluded": int((~known).sum()),
        "n_products": len(set(products[known])),
        "definition": "top-1 accuracy = right / labelled queries",
    }


def _line(found: dict) -> str:
    """The score in words: 'mAP@5 0.458 [0.441, 0.476] over 2,485 queries ...'."""
    name, key = (
        ("mAP@5", "map_at_5") if "map_at_5" in found else ("top-1 accuracy", "top_1_accuracy")
    )
    if found[key] is None:
        return f"{name} unknown: no query has a label in test.csv or test_kaggletest.csv"
    return (
        f"{name} {found[key]:.3f} [{found[key + '_low']:.3f}, {found[key + '_high']:.3f}] over "
        f"{found['n_queries']:,} queries ({found['n_excluded']:,} excluded), {found['n_gallery']:,} "
        f"gallery images\n{found['definition']}; interval: 95 % bootstrap over {found['n_products']:,} products"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 and the score for a valid submission, 1 and one line that says why for another."""
    parser = argparse.ArgumentParser(
        "python -m vipr_utils score", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("data_root", type=Path)
    parser.add_argument(
        "--gallery-domain", default="", help="the gallery searched: shop or customer"
    )
    given = parser.parse_args(arguments)
    try:
        found = score(given.file, given.data_root, gallery_domain=given.gallery_domain)
    except SubmissionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"valid: {given.file}\n{_line(found)}")
    return 0
