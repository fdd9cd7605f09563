"""Time and peak memory of search, steps and choice at the size of Products-10K, without a photo.

    python benchmarks/at_scale.py --share 0.05                 # a rehearsal in a minute
    python benchmarks/at_scale.py --out benchmarks/at_scale.json

9,691 products, 141,931 gallery and 55,000 query photos; validation holds out 14,000. Embeddings are
planted: products are random directions, photos lie around them, so every step has a right answer.
The address space is limited (`ulimit -v` of 30 GB), so what asks for more fails. CPU seconds stand
beside the clock's, which count the neighbours on a shared machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipr_utils.data import audit
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.task import Task, View
from vipr_utils.retrieve import cache, rerank, search

LIMIT_GB = 30  # of address space
GALLERY, QUERIES, PRODUCTS = 141_931, 55_000, 9_691
RANK = 100  # directions in which products differ
NOISE = 3.0  # of a photo, in lengths of its product's direction
STACKS = [
    ["learned_whitening(128)"],
    ["pca(256)"],
    ["learned_whitening(128)", "product_votes(3)"],
    ["learned_whitening(128)", "alpha_query_expansion(5, 3)", "product_votes(5)"],
    ["learned_whitening(128)", "database_augmentation(3)"],
    ["learned_whitening(128)", "k_reciprocal(20, 6, 0.3)", "product_votes(5)"],
    ["learned_whitening(128)", "transductive_k_reciprocal(20, 6, 0.3)"],
]
ZOOMS = (1.0, 0.8, 0.65)


class Planted(Task):
    """A Task whose photos nobody sees: `_embedded` draws what a network would find in them."""

    def __init__(self, share: float, dim: int) -> None:
        self.dim, self.seed, self.device = dim, 0, torch.device("cpu")
        self.cache_dir, self.batch_size, self.precision = None, 64, "float32"
        products, gallery, queries = (round(n * share) for n in (PRODUCTS, GALLERY, QUERIES))
        rng = np.random.default_rng(0)
        popular = rng.pareto(1.5, products) + 1
        drawn = rng.choice(products, gallery + queries - products, p=popular / popular.sum())
        labels = np.concatenate([np.arange(products), drawn])
        self.photos = pd.DataFrame({"product_id": labels, "product": labels, "group": -1})
        self.photos["image_id"] = [f"{i:06d}.jpg" for i in range(len(labels))]
        self.photos["domain"] = ""
        self.photos["split"] = np.where(np.arange(len(labels)) < gallery, "train", "test")
        train, test = self.photos[:gallery], self.photos[gallery:]
        held = train[products:].sample(frac=0.1, random_state=0).sort_index()
        self.fit = train.drop(held.index)
        self.validation = View(held, self.fit)
        self.views = {"test": View(test, train), "validation": self.validation}

    def _embedded(self, model, rows, image_size, *, zoom=1.0, **settings) -> np.ndarray:
        """(N, dim) float32: the same for the same rows, network and zoom."""
        centres = np.random.default_rng(zlib.crc32(model.encode()))
        turns = centres.standard_normal((RANK, self.dim), np.float32) / np.float32(RANK**0.5)
        centres = centres.standard_normal((PRODUCTS, RANK), np.float32) @ turns
        asked = [model.encode(), repr(zoom).encode(), rows.index.to_numpy().tobytes()]
        rng, found = np.random.default_rng(zlib.crc32(b"".join(asked))), []
        for labels in np.array_split(rows["product_id"].to_numpy(), 1 + len(rows) // 8192):
            noise = rng.standard_normal((len(labels), self.dim), np.float32)
            found.append(rerank.unit(centres[labels] + np.float32(NOISE) * noise))
        return np.concatenate(found)


def memory_gib(what: str) -> float:
    """VmHWM, the largest resident memory since the last reset, or VmPeak, of address space."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 2**20


def measured(step: str, do, rows: list[dict]):
    """What do() returns; its time and memory are added to rows, or why it could not be done."""
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu, out, row = time.perf_counter(), time.process_time(), None, {"step": step}
    before = memory_gib("VmRSS")
    try:
        out = do()
    except (MemoryError, ValueError, RuntimeError) as error:
        row["failed"] = str(error)[:200]
    row["wall_s"] = round(time.perf_counter() - wall, 1)
    row["cpu_s"] = round(time.process_time() - cpu, 1)
    row |= {"before_gib": round(before, 2), "peak_gib": round(memory_gib("VmHWM"), 2)}
    row["address_gib"] = round(memory_gib("VmPeak"), 2)
    if hasattr(out, "metrics"):
        row["map_at_5"] = round(out.metrics["map_at_5"], 4)
    rows.append(row)
    print(row, flush=True)
    return out


def retrievals(task: Planted, rows: list[dict]) -> None:
    """Plain search and every stack, on both views."""
    embeddings = measured("embeddings drawn", lambda: task._embedded("a", task.photos, 0), rows)
    for steps in [[], *STACKS]:
        for view in task.views:
            name = " + ".join(steps) or "plain search"
            measured(f"{view}: {name}", partial(task.retrieve, embeddings, view, steps=steps), rows)
    few = {"queries": embeddings[:1024], "gallery": embeddings}
    for distance in search.DISTANCES:
        name = f"1,024 queries by {distance}"
        measured(name, partial(search.top_k, **few, distance=distance), rows)


def joined(task: Planted, rows: list[dict], projection: str = "") -> None:
    """Three zooms of two networks joined, all their numbers or projected."""
    choice = Choice(task, {"a": "a", "b": "b"}, {"a": 224, "b": 224})
    parts = []
    for network in choice.networks:
        parts += [Part(network, (zoom, 1.0), projection) for zoom in ZOOMS]
    for steps in ((), ("learned_whitening(128)",), ("learned_whitening(128)", "product_votes(3)")):
        candidate = Candidate(tuple(parts), steps)
        measured(
            f"{choice.asked.sum():,} of validation: {candidate}",
            partial(choice.found, candidate, "validation", asked=choice.asked),
            rows,
        )
        measured(f"test: {candidate}", partial(choice.found, candidate, "test"), rows)


def files(task: Planted, rows: list[dict]) -> None:
    """What is kept on disk of each photo, and copies among their hashes."""
    numbers = np.arange(len(task.photos))

    def drawn(part: np.ndarray) -> np.ndarray:
        return np.full((len(part), task.dim), 0.5, np.float32)

    with tempfile.TemporaryDirectory() as folder:
        for what in ("written", "read again"):
            name = f"embeddings {what}"
            measured(name, lambda: cache.kept(Path(folder), numbers, drawn, block=4096), rows)
    hashes = np.random.default_rng(0).integers(0, 2**63, len(task.fit), np.uint64)
    measured("near duplicates", lambda: audit.near_duplicates(hashes), rows)


PARTS = {
    "files": files,
    "retrievals": retrievals,
    "projected": partial(joined, projection="learned_whitening(128)"),
    "joined": joined,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of photos and products")
    parser.add_argument("--dim", type=int, default=1280, help="numbers an embedding")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    limit = LIMIT_GB * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    task, rows = Planted(given.share, given.dim), []
    for part in given.parts.split(","):
        PARTS[part](task, rows)
    setting = {
        "share": given.share,
        "dim": given.dim,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    if given.out:
        given.out.write_text(json.dumps({**setting, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
