"""A submission answers every query. Write it, read it, check it and score it, from CSV files alone.

Two forms. Ranking, `id,images`: the gallery images of each query, best first, one space between two
names; five, or the whole gallery where it is smaller. Classification, `name,class`: one product for
each query. The checks share no code with the search, so that they can prove it wrong.

    vipr score submission.csv DATA_ROOT [--gallery-domain shop]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.data import catalog
from vipr_utils.data.catalog import CatalogError, Fault
from vipr_utils.host.files import whole_file
from vipr_utils.judge import metrics

RANKING, CLASSIFICATION, LENGTH = ["id", "images"], ["name", "class"], 5
PREDICT = "Predict a class of train.csv for every query."
SubmissionError = CatalogError  # a submission is a table: file, row, id, what is wrong, remedy


def write_ranking(path: Path, query_names, gallery_names) -> Path:
    """The CSV `id,images` of query_names (Q,) and gallery_names (Q, 5), best first; its path.

    Raises SubmissionError, and writes nothing, for a name with a space: no reader could take the
    list apart again. `validate` finds every other fault.
    """
    queries = pd.Series(list(query_names), dtype=object)
    lists = pd.Series([list(names) for names in gallery_names], dtype=object)
    images = lists.explode().dropna()
    spaced = images[images.str.contains(" |^$")]
    problem = "image name {!r} has a space or is empty, but id,images puts one space between names"
    remedy = "Rename the file, or write the classification form name,class."
    catalog.refuse(path, queries, [(spaced, problem, remedy)])
    return _write(path, RANKING, queries, lists.map(" ".join))


def write_classification(path: Path, names, classes) -> Path:
    """The CSV `name,class` of query names (Q,) and integer product ids (Q,); its path."""
    return _write(path, CLASSIFICATION, names, classes)


def _write(path: Path, header: list, names, answers) -> Path:
    """Raises ValueError, and writes nothing, where there is not one answer for each name."""
    table = pd.DataFrame(zip(names, answers, strict=True), columns=header)
    with whole_file(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")
    return Path(path)


def validate(path: Path, data_root: Path, *, gallery_domain: str = "") -> pd.DataFrame:
    """The rows of a submission that passed every check.

    Each query of test.csv once, each with min(5, gallery size) different images of train.csv (of
    that domain), or with a class of train.csv. Raises SubmissionError for the first fault, with
    file, row, id, remedy, and how many rows share it; also for a table of the data root.
    """
    return _checked(path, *_sides(data_root, gallery_domain))


def _sides(data_root: Path, domain: str) -> tuple[pd.Series, pd.Series]:
    """The product ids of the queries and of the gallery, both by name."""
    queries = catalog.read_rows(data_root, "test").set_index("name")
    gallery = catalog.narrow(catalog.read_rows(data_root, "train"), domain).set_index("name")
    return queries["product_id"], gallery["product_id"]


def _checked(path: Path, queries: pd.Series, gallery: pd.Series) -> pd.DataFrame:
    if not Path(path).is_file():
        raise SubmissionError(f"{path}: no such file. Run notebook 06_submission to write it.")
    table = catalog.read_table(path, ())
    if list(table) not in (RANKING, CLASSIFICATION):
        raise SubmissionError(
            f"{path}: header {','.join(table)!r}, expected 'id,images' or 'name,class'. "
            "Rename the columns and leave out the others."
        )
    ids, answers = (table[column] for column in table)
    missing = queries.index.difference(ids, sort=False)
    names = pd.concat([ids, pd.Series(missing)], ignore_index=True)
    faults = [
        catalog.repeated(ids),
        (
            ids[~ids.isin(queries.index)],
            "unknown query, not in test.csv",
            "Name those of test.csv.",
        ),
        (names[len(ids) :], "no row for this query of test.csv", "Write a row for every query."),
    ]
    if list(table) == RANKING:
        faults.extend(_wrong_rankings(answers, gallery.index))
    else:
        known = pd.to_numeric(answers, errors="coerce").isin(gallery)
        faults.append((answers[~known], "class {!r} is no class of train.csv", PREDICT))
    catalog.refuse(path, names, faults)
    return table


def _wrong_rankings(answers: pd.Series, gallery_names: pd.Index) -> list[Fault]:
    """The faults of lists of image names: one that is unknown, their length, a name twice."""
    length = min(LENGTH, len(gallery_names))
    lists = answers.str.split(" ")
    counts, images = lists.map(len), lists.explode()
    unknown = images[~images.isin(gallery_names)]
    again = images.reset_index().duplicated().to_numpy()
    names = "Give names of the gallery that was searched, with exactly one space between two."
    best = f"Rank the best {length} gallery images of every query."
    return [
        (unknown, "unknown image {!r}, not in train.csv or not of the gallery_domain", names),
        (counts[counts != length], f"{{}} images, expected {length}", best),
        (images[again], "{} is listed more than once", "Rank each image once."),
    ]


def score(path: Path, data_root: Path, *, gallery_domain: str = "", seed: int = 0) -> dict:
    """The figures of `metrics.summary` for a valid submission, and n_gallery.

    Scores are NaN where no query has a label. n counts rows of train.csv (of that domain);
    a query without a label is excluded and counted. For the form name,class: top_1_accuracy =
    right / labelled queries, with its interval. Raises the errors of `validate`.
    """
    queries, gallery = _sides(data_root, gallery_domain)
    table = _checked(path, queries, gallery)
    products = queries[table.iloc[:, 0]].to_numpy()
    if list(table) == CLASSIFICATION:
        found = _accuracy(pd.to_numeric(table["class"]).to_numpy(), products, seed)
    else:
        images = table["images"].str.split(" ").explode()
        ranked = gallery[images].to_numpy().reshape(len(table), -1)  # (Q, min(5, G))
        hits = np.zeros((len(table), LENGTH), bool)
        hits[:, : ranked.shape[1]] = ranked == products[:, None]
        n_relevant = metrics.count_relevant(products, gallery)
        found = metrics.summary(hits, n_relevant, products, seed=seed)
        found["chance"] = metrics.chance_map_at_k(n_relevant, len(gallery))
    return {**found, "n_gallery": len(gallery)}


def _accuracy(predicted, products, seed: int) -> dict:
    """Top-1 accuracy over the labelled queries, with its 95 % interval; NaN without any."""
    known = products >= 0
    right = pd.Series((predicted == products)[known])
    low, high = metrics.bootstrap_interval(right, products[known], seed=seed)
    return {
        "top_1_accuracy": float(right.mean()),
        "top_1_accuracy_low": low,
        "top_1_accuracy_high": high,
        "n_queries": len(right),
        "n_excluded": len(products) - len(right),
        "n_products": len(set(products[known])),
        "definition": "top-1 accuracy = right / labelled queries",
    }


def _line(found: dict) -> str:
    """The score in words: 'mAP@5 0.458 [0.441, 0.476] over 2,485 queries ...'."""
    value, low, high = list(found.values())[:3]
    name = "mAP@5" if "map_at_5" in found else "top-1 accuracy"
    if np.isnan(value):
        return f"{name} unknown: no query has a label in test.csv or test_kaggletest.csv"
    return (
        "{} {:.3f} [{:.3f}, {:.3f}] over {n_queries:,} queries ({n_excluded:,} excluded), "
        "{n_gallery:,} gallery images\n{definition}; interval: 95 % bootstrap over "
        "{n_products:,} products"
    ).format(name, value, low, high, **found)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 and the score of a valid submission, 1 and one line that says why for another."""
    parser = argparse.ArgumentParser("vipr score", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("data_root", type=Path)
    parser.add_argument(
        "--gallery-domain", default="", help="the gallery searched: shop or customer"
    )
    given = parser.parse_args(arguments)
    try:
        found = score(given.file, given.data_root, gallery_domain=given.gallery_domain)
    except CatalogError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"valid: {given.file}\n{_line(found)}")
    return 0
