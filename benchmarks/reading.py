"""What reading packages gains: the kit's choice with it and without, on the same queries.

    python tests/packages.py /scratch/packages
    vipr run params/laptop/04_pretrained_sweep.yaml --output-dir /scratch/trained ...
    python benchmarks/reading.py /path/to/grocery /scratch/packages --trained /scratch/trained

One frozen network, no training: the quick way; with --trained the networks of that folder take part
in one more row. Everything is chosen on validation, by the climb of notebook 06. Two rivals of the
kit's sum of cosines are tried as well: that of texts of length 1, and reciprocal ranks (Cormack,
Clarke, Buettcher, SIGIR 2009). Last, products are asked for by their names alone. Record:
submissions/reference/reading.json, which `make results` shows.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import normalize

from vipr_utils.host.device import hardware
from vipr_utils.host.files import whole_file
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.metrics import average_precision_at_k, paired_difference
from vipr_utils.judge.task import Retrieval, Task, View, scored
from vipr_utils.learn import models
from vipr_utils.retrieve import reading, rerank, text
from vipr_utils.retrieve.encoder import WHOLE
from vipr_utils.retrieve.search import Search

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


def tried(
    name: str, task: Task, zooms: list[float], stacks, verified, loose=(), runs: str = ""
) -> list[dict]:
    """A row for plain search and for the best of the climb, each with reading and without.

    runs: folder of trained networks that take part.
    """
    with tempfile.TemporaryDirectory() as nothing:
        choice = Choice.open(
            task, Path(runs or nothing), backbones=["tf_efficientnet_lite0"], image_size=224
        )
    view, base = task.views["test"], Candidate((Part(list(choice.networks)[-1]),))
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


def of_length_1(search: Search, weight: float) -> Search:
    """`text.read` with the plain cosine of texts, however little a photo says."""
    return fused(search, weight, lambda scores, alike: scores + weight * alike, normed=True)


def by_ranks(search: Search, weight: float) -> Search:
    """Reciprocal ranks of both lists added, those of what shares no text aside."""

    def scores(scores: np.ndarray, alike: np.ndarray) -> np.ndarray:
        place, by_text = (np.argsort(np.argsort(-x, 1, kind="stable"), 1) for x in (scores, alike))
        return 1 / (60 + place) + np.where(alike > 0, weight / (60 + by_text), 0)

    return fused(search, weight, scores, normed=False)


def fused(search: Search, weight: float, how: Callable, normed: bool) -> Search:
    """Lists in the order of how(scores, cosines of texts), both (Q, k)."""
    search = text.read(search, 0.0)  # what reads alike has joined
    sides = [
        reading.lines(rows, cache_dir=search.cache_dir)
        for rows in (search.query_rows, search.gallery_rows)
    ]
    queries, gallery = text.vectors(*sides)
    if normed:
        queries, gallery = normalize(queries), normalize(gallery)
    q, at = np.nonzero(search.ranks >= 0)
    alike = np.zeros(search.ranks.shape)
    alike[q, at] = text._cosines(queries, gallery, q, search.ranks[q, at])
    return search.sorted_by(how(search.scores, alike).astype(np.float32))


def rivals(task: Task) -> list[dict]:
    """Ways to bring text into plain search, each at the weight that validates best."""
    model = models.create("tf_efficientnet_lite0")
    sides = {
        view: task.zoomed(model, view, zoom=WHOLE, image_size=224)
        for view in ("validation", "test")
    }
    ways = {
        "sum by certainty": (text.read, [0.2, 0.4, 0.8, 1.6]),
        "sum of cosines": (of_length_1, [0.1, 0.2, 0.4, 0.8]),
        "reciprocal ranks": (by_ranks, [0.5, 1.0, 2.0, 4.0]),
    }
    rows = []
    for name, (way, weights) in ways.items():
        found = {}
        for view, (queries, gallery) in sides.items():
            answered, known = task.views[view], task.known(view)
            rows_of = gallery[known.index.get_indexer(answered.gallery.index)]
            plain = Search(
                rerank.unit(queries),
                rerank.unit(rows_of),
                answered.queries,
                answered.gallery,
                cache_dir=task.cache_dir,
            ).searched(100)
            found[view] = [cut(way(plain, weight), answered) for weight in weights]
        best = int(np.argmax([one.metrics["map_at_5"] for one in found["validation"]]))
        rows.append({"way": name, "weight": weights[best]})
        rows[-1] |= {view: scores[best].metrics["map_at_5"] for view, scores in found.items()}
        print(rows[-1], flush=True)
    return rows


def cut(search: Search, view: View) -> Retrieval:
    return scored(view, search.scores[:, :5], search.ranks[:, :5])


def asked_by_name(task: Task, products: pd.DataFrame) -> dict:
    """How far the names of packages go, without a photo of theirs.

    Shares: of package queries whose product's name is the likest among all names, or one of the
    five likest; of names whose likest gallery photo shows the product, or one of the five likest.
    """
    names = [[reading.Line(n.replace("-", " "), 1.0, (0.4, 0.4, 0.6, 0.6))] for n in products.name]
    packages = products["class"].to_numpy()
    queries, gallery = task.views["test"]
    queries = queries[queries["product"].isin(packages)]
    found = {"names": len(names), "queries": len(queries)}
    for way, rows in {"photo to name": queries, "name to photo": gallery}.items():
        lines = reading.lines(rows, cache_dir=task.cache_dir)
        if way == "photo to name":
            asked, known = text.vectors(lines, names)
            own, answers = rows["product"].to_numpy(), packages
        else:
            asked, known = text.vectors(names, lines)
            own, answers = packages, rows["product"].to_numpy()
        alike = (asked @ known.T).toarray()
        order = np.argsort(-alike, 1, kind="stable")[:, :5]
        right = answers[order] == own[:, None]
        right &= np.take_along_axis(alike, order, 1) > 0
        found[way] = {"first": float(right[:, 0].mean()), "of five": float(right.any(1).mean())}
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grocery", type=Path)
    parser.add_argument("packages", type=Path, help="a folder made by tests/packages.py")
    parser.add_argument("--trained", default="", help="folder of runs on the grocery set")
    given = parser.parse_args()
    products = pd.read_csv(given.grocery / "products.csv", dtype=str)
    loose = products["class"][~products["group"].astype(int).isin(PACKED)]
    record, zooms = {"hardware": hardware(), "rows": []}, [1.0, 0.8, 0.65]
    tasks = {
        "test": {},
        "unseen": {"protocol": "unseen"},
        "test, shop photos alone": {"gallery_domain": "shop"},
    }
    for name, settings in tasks.items():
        task = Task(str(given.grocery), image_size=224, seen_px=345, device="cpu", **settings)
        record["rows"] += tried(name, task, zooms, STACKS, VERIFIED, loose)
        if name == "test":
            record["rivals"] = rivals(task)
            packed = products[~products["class"].isin(loose)].rename(columns={"product": "name"})
            record["names"] = asked_by_name(task, packed)
            if given.trained:
                record["rows"] += tried(
                    "test, trained", task, zooms, STACKS, VERIFIED, loose, given.trained
                )
        write(record)
    packages = Task(str(given.packages), image_size=224, device="cpu")
    record["rows"] += tried("400 queries of 100 drawn packages", packages, [1.0], STACKS, [])
    write(record)


def write(record: dict) -> None:
    with whole_file(RECORD) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
