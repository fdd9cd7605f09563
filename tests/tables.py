"""Put the tables of submissions/reference between the result marks of the README: `make readme`."""

from pathlib import Path

from vipr_utils.host.files import whole_file
from vipr_utils.judge import runs

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results:start -->", "<!-- results:end -->"


def inserted(readme: str, tables: str) -> str:
    """The text with what stands between its result marks replaced."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} ... {END}: put both marks where the tables belong")
    return f"{before}{START}\n{tables}\n{END}{after}"


if __name__ == "__main__":
    tables = runs.tables(ROOT / "submissions" / "reference")
    with whole_file(ROOT / "README.md") as part:
        part.write_text(
            inserted((ROOT / "README.md").read_text(encoding="utf-8"), tables), encoding="utf-8"
        )
