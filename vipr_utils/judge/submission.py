"""A submission answers every query. Write it, read it, check it and score it, without a model.

Two forms. Ranking, `id,images`: the gallery images of each query, best first, one space between two
names; five, or the whole gallery where it is smaller. Classification, `name,class`: one product for
each query. The checks share no code with the search, so that they can prove it wrong.

    vipr score submission.csv DATA_ROOT [--gallery-domain shop]
"""

import argparse
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd

from vipr_utils.data import catalog, tables
from vipr_utils.data.tables import CatalogError, Fault
from vipr_utils.host.files import whole_file
from vipr_utils.judge import metrics

RANKING, CLASSIFICATION, LENGTH = ["id", "images"], ["name", "class"], 5
PREDICT = "Predict a class of the train photos for every query."
SubmissionError = CatalogError  # a submission is a table: file, row, id, what is wrong, remedy


def write_ranking(path: Path, query_names, gallery_names) -> Path:
    """The CSV `id,images` of query_names (Q,) and gallery_names (Q, 5), best first; its path.

    A blank in a gallery name is written %20, and % then %25. Raises ValueError, and leaves an older
    file as it is, where there is not one list for each query, and SubmissionError for a query or
    an image that comes twice; `validate` finds every other fault.
    """
    lists = []
    for query, names in zip(query_names, gallery_names, strict=True):
        if len(set(names)) < len(names):
            raise SubmissionError(f"{query}: an image is listed twice in {list(names)}")
        lists.append(" ".join(name.replace("%", "%25").replace(" ", "%20") for name in names))
    return _write(path, RANKING, query_names, lists)


def write_classification(path: Path, names, products) -> Path:
    """The CSV `name,class` of query names (Q,) and the names of products (Q,); its path."""
    return _write(path, CLASSIFICATION, names, products)


def write_answers(
    path: Path,
    data_root: Path,
    queries: pd.DataFrame,
    gallery: pd.DataFrame,
    ranks: np.ndarray,
    *,
    gallery_domain: str = "",
    form: str = "ranking",
) -> Path:
    """The submission of ranked lists (Q, k) of gallery rows, for every query of a data root.

    form: 'ranking', or 'classification': the product of the first photo. A query without a readable
    photo is answered too, by the photos that the others' lists hold most often; with these a list
    is filled up that has fewer than it could, and with unreadable ones at last.
    """
    names = gallery["name"].to_numpy()
    asked, listed = _sides(data_root, gallery_domain)
    often = pd.Series(ranks[ranks >= 0]).value_counts().index
    usual = list(dict.fromkeys([*names[often], *names, *listed.index]))[: 2 * LENGTH]
    answers = {name: names[row[row >= 0]] for name, row in zip(queries["name"], ranks)}
    lists = []
    for name in asked.index:
        images = [*answers.get(name, []), *usual]
        lists.append(list(dict.fromkeys(images))[:LENGTH])
    if form == "ranking":
        return write_ranking(path, asked.index, lists)
    products = [listed["product"][images[0]] for images in lists]
    return write_classification(path, asked.index, products)


def _write(path: Path, header: list, names, answers) -> Path:
    """Raises ValueError, and writes nothing, where there is not one answer for each name."""
    table = pd.DataFrame(zip(names, answers, strict=True), columns=header)
    twice = table[header[0]][table[header[0]].duplicated()]
    if len(twice):
        raise SubmissionError(f"{path}: query {twice.iloc[0]!r} is answered twice: answer it once")
    with whole_file(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")
    return Path(path)


def validate(path: Path, data_root: Path, *, gallery_domain: str = "") -> pd.DataFrame:
    """The rows of a submission that passed every check.

    Each query once (`catalog.read_rows`), each with min(5, gallery size) different train photos (of
    that domain), or with a class of theirs. Raises SubmissionError for the first fault, with
    file, row, id, remedy, and how many rows share it; also for what is wrong in the data root.
    """
    return _checked(path, *_sides(data_root, gallery_domain))


def _sides(data_root: Path, domain: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the queries and of the gallery, by name."""
    queries, gallery = catalog.read_rows(data_root)
    return queries, catalog.narrow(gallery, domain)


def _checked(path: Path, queries: pd.DataFrame, gallery: pd.DataFrame) -> pd.DataFrame:
    if not Path(path).is_file():
        raise SubmissionError(f"{path}: no such file. Run notebook 06_submission to write it.")
    table = tables.read_table(path, ())
    if list(table) not in (RANKING, CLASSIFICATION):
        raise SubmissionError(
            f"{path}: header {','.join(table)!r}, expected 'id,images' or 'name,class'. "
            "Rename the columns and leave out the others."
        )
    ids, answers = (table[column] for column in table)
    missing = queries.index.difference(ids, sort=False)
    names = pd.concat([ids, pd.Series(missing)], ignore_index=True)
    unknown = ids[~ids.isin(queries.index)]
    faults = [
        tables.repeated(ids),
        (unknown, "unknown query, not among the test photos", "Name the test photos."),
        (names[len(ids) :], "no row for this query of the test photos", "Answer every query."),
    ]
    if list(table) == RANKING:
        faults.extend(_wrong_rankings(answers, gallery.index))
    else:
        unknown = answers[_product_ids(answers, gallery).isna()]
        faults.append((unknown, "class {!r} is no class of the train photos", PREDICT))
    tables.refuse(path, names, faults)
    return table


def _images(answers: pd.Series) -> pd.Series:
    """The names in lists of images, a row each under the row of its list."""
    return answers.str.split(" ").explode().map(unquote)


def _product_ids(answers: pd.Series, gallery: pd.DataFrame) -> pd.Series:
    """The product_id of names of products, NaN where the gallery has none of it; 3.0 is 3."""
    known = gallery.drop_duplicates("product").set_index("product")["product_id"]
    plain = answers.str.replace(r"\.0*$", "", regex=True)
    return answers.where(answers.isin(known.index), plain).map(known)


def _wrong_rankings(answers: pd.Series, gallery_names: pd.Index) -> list[Fault]:
    """The faults of lists of image names: one that is unknown, their length, a name twice."""
    length = min(LENGTH, len(gallery_names))
    images = _images(answers)
    counts = images.groupby(level=0).size()
    unknown = images[~images.isin(gallery_names)]
    again = images.reset_index().duplicated().to_numpy()
    names = "Give names of the gallery that was searched, with exactly one space between two."
    best = f"Rank the best {length} gallery images of every query."
    return [
        (unknown, "unknown image {!r}, not a train photo or not of the gallery_domain", names),
        (counts[counts != length], f"{{}} images, expected {length}", best),
        (images[again], "{} is listed more than once", "Rank each image once."),
    ]


def score(path: Path, data_root: Path, *, gallery_domain: str = "", seed: int = 0) -> dict:
    """The figures of `metrics.summary` for a valid submission, and n_gallery.

    Scores are NaN where no query has a label. n counts the train photos (of that domain);
    a query without a label is excluded and counted. For the form name,class: top_1_accuracy =
    right / labelled queries, with its interval. Raises the errors of `validate`.
    """
    queries, gallery = _sides(data_root, gallery_domain)
    table = _checked(path, queries, gallery)
    products = queries["product_id"][table.iloc[:, 0]].to_numpy()
    if list(table) == RANKING:
        ranked = gallery["product_id"][_images(table["images"])].to_numpy()
        n_relevant = metrics.count_relevant(products, gallery["product_id"])
    else:
        ranked = _product_ids(table["class"], gallery).to_numpy()
        n_relevant = (products >= 0).astype(int)
    ranked = ranked.reshape(len(table), -1)  # (Q, min(5, G)) or (Q, 1)
    hits = np.zeros((len(table), LENGTH), bool)
    hits[:, : ranked.shape[1]] = ranked == products[:, None]
    found = metrics.summary(hits, n_relevant, products, seed=seed)
    if list(table) == RANKING:
        found["chance"] = metrics.chance_map_at_k(n_relevant, len(gallery))
        return {**found, "n_gallery": len(gallery)}
    return {  # of one answer a query AP@5 is the accuracy
        "top_1_accuracy": found["map_at_5"],
        "top_1_accuracy_low": found["map_at_5_low"],
        "top_1_accuracy_high": found["map_at_5_high"],
        **{name: found[name] for name in ("n_queries", "n_excluded", "n_products")},
        "definition": "top-1 accuracy = right / labelled queries",
        "n_gallery": len(gallery),
    }


def _line(found: dict) -> str:
    """The score in words: 'mAP@5 0.458 [0.441, 0.476] over 2,485 queries ...'."""
    value, low, high = list(found.values())[:3]
    name = "mAP@5" if "map_at_5" in found else "top-1 accuracy"
    if np.isnan(value):
        return f"{name} unknown: no query has a label"
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
