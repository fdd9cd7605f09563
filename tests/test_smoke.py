"""The smoke series that `make smoke` has just run by papermill: its pages and records beside what
is committed.

$VIPR_SMOKE names its folder. Pages must repeat to the letter but for cells tagged
nbval-ignore-output; what stands in those comes from scores, and scores hang on a processor's
rounding: they are held against tests/smoke.yaml, each within its range.
"""

import json
import os
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SMOKE = Path(os.environ.get("VIPR_SMOKE", ""))
EXPECTED = yaml.safe_load((ROOT / "tests" / "smoke.yaml").read_text(encoding="utf-8"))
PAGES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.skipif(
    "VIPR_SMOKE" not in os.environ, reason="`make smoke` runs the series and sets $VIPR_SMOKE"
)


def sanitised(text: str) -> str:
    """The text after nbval's own replacements, of what differs between machines for good reason."""
    rules = ConfigParser()
    rules.read(ROOT / "tests" / "nbval.cfg")
    for rule in rules.sections():
        text = re.sub(rules[rule]["regex"], rules[rule]["replace"], text)
    return text


def page(path: Path) -> list[tuple[str, str]]:
    """(source, text shown) of every cell whose output must repeat."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or {"nbval-ignore-output", "injected-parameters"} & set(
            tags
        ):
            continue
        shown = [output.get("text", []) for output in cell["outputs"]]
        shown += [
            text
            for o in cell["outputs"]
            for kind, text in sorted(o.get("data", {}).items())
            if "text/" in kind
        ]
        found.append(("".join(cell["source"]), sanitised("\n".join(map("".join, shown)))))
    return found


@pytest.mark.parametrize("stem", PAGES)
def test_page_repeats_what_is_committed(stem):
    assert page(SMOKE / stem / "notebook.ipynb") == page(ROOT / "notebooks" / f"{stem}.ipynb")


@pytest.mark.parametrize("stem", sorted(EXPECTED))
def test_record_repeats_counts_exactly_and_scores_within_their_range(stem):
    record, expected = (
        json.loads((SMOKE / stem / "run.json").read_text(encoding="utf-8")),
        EXPECTED[stem],
    )
    assert {name: record["metrics"][name] for name in ("n_queries", "n_gallery")} == expected[
        "counts"
    ]
    assert (record["validation"] or {}).get("split", "") == expected["split"] and not record[
        "cut_short"
    ]
    rows = {row["name"]: row["map_at_5"] for row in record["metrics"].get("rows", [])} | {
        "": record["metrics"]["map_at_5"]
    }
    assert set(expected["rows"]) <= set(rows)
    wrong = {
        n: rows[n] for n, (low, high) in expected["rows"].items() if not low <= rows[n] <= high
    }
    assert not wrong, "outside the range of tests/smoke.yaml"
