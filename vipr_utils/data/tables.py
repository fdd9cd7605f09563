"""CSV files of names, read as text, and refused by row with the remedy."""

from pathlib import Path

import pandas as pd

Fault = tuple[pd.Series, str, str]  # wrong values under their row, problem with {}, remedy


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
