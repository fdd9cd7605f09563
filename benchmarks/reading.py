"""What reading packages gains: the kit's choice with it and without, on the same queries.

    python tests/packages.py /scratch/packages
    python benchmarks/reading.py /path/to/grocery /scratch/packages

One frozen network, no training: the quick way. Everything is chosen on validation, by the climb of
notebook 06. Record: submissions/reference/reading.json, which `make results` shows.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.host.device import hardware
from vipr_utils.host.files import whole_file
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.metrics import average_precision_at_k, paired_difference
from vipr_utils.judge.task import Task

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "submissions" / "reference" / "reading.json"
STACKS = ["product_votes(3)", "k_reciprocal(20, 6, 0.3) + product_votes(5)"]
VERIFIED = ["verify(20) + product_votes(3)"]
READINGS = ["read(0.2)", "read(0.4)", "read(0.8)", "read(1.6)"]
PACKED = range(19, 28)  # groups of the grocery set: juice, milk, yoghurt and what is like them


def compared(a, b, queries: pd.DataFrame, some: np.ndarray) -> dict:
    """mAP@5 of a Retrieval and of another, their paired difference, P@1, over some queries."""
    scores = [found.average_precision[some] for found in (a, b)]
    first = [average_precision_at_k(f.hits, f.n_relevant, k=1)[some] for f in (a, b)]
    difference, low, high = paired_difference(*scores, queries["product_id"][some])
    return {
        "queries": int(some.sum()),
        "without": float(np.nanmean(scores[1])),
        "with": float(np.nanmean(scores[0])),
        "difference": [difference, low, high],
        "precision_at_1": [float(np.nanmean(first[1])), float(np.nanmean(first[0]))],
    }


def variants(found, view) -> dict:
    """Of the first answers: how many are the product's, how many another variant of its line."""
    line = view.gallery["group"].to_numpy()[found.ranks[:, 0]] == view.queries["group"].to_numpy()
    right = found.hits[:, 0]
    return {"right": int(right.sum()), "another variant": int((line & ~right).sum())}


def tried(name: str, task: Task, zooms: list[float], stacks, verified, loose=()) -> list[dict]:
    """A row for plain search and for the best of the climb, each with reading and without."""
    with tempfile.TemporaryDirectory() as nothing:
        choice = Choice.open(
            task, Path(nothing), backbones=["tf_efficientnet_lite0"], image_size=224
        )
    view, base = task.views["test"], Candidate((Part("tf_efficientnet_lite0"),))
    read = choice.best([base, *(Candidate(base.parts, (step,)) for step in READINGS)])
    pairs = {"plain search": (base, read)}
    without = choice.climb(zooms, stacks, verified)
    pairs["the choice"] = (without, choice.climb(zooms, stacks, verified, READINGS))
    rows = []
    for what, pair in pairs.items():
        plain, seen = (choice.found(candidate, "test") for candidate in pair)
        parts = {"all": np.ones(len(view.queries), bool)}
        if len(loose):
            parts["loose goods"] = view.queries["product"].isin(loose).to_numpy()
            parts["packages"] = ~parts["loose goods"]
        rows.append(
            {
                "task": name,
                "what": what,
                "steps": str(pair[1]),
                "before": variants(plain, view),
                "after": variants(seen, view),
                "parts": {
                    part: compared(seen, plain, view.queries, some) for part, some in parts.items()
                },
                "refused": choice.refused.get("reading", ""),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grocery", type=Path)
    parser.add_argument("packages", type=Path, help="a folder made by tests/packages.py")
    given = parser.parse_args()
    products = pd.read_csv(given.grocery / "products.csv", dtype=str)
    loose = products["class"][~products["group"].astype(int).isin(PACKED)]
    rows, zooms = [], [1.0, 0.8, 0.65]
    for name, settings in {
        "test": {},
        "unseen": {"protocol": "unseen"},
        "test, shop photos alone": {"gallery_domain": "shop"},
    }.items():
        task = Task(str(given.grocery), image_size=224, seen_px=345, device="cpu", **settings)
        rows += tried(name, task, zooms, STACKS, VERIFIED, loose)
        write(rows)
    packages = Task(str(given.packages), image_size=224, device="cpu")
    rows += tried("400 queries of 100 drawn packages", packages, [1.0], STACKS, [])
    write(rows)


def write(rows: list[dict]) -> None:
    with whole_file(RECORD) as part:
        part.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
