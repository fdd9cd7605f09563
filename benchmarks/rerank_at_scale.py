"""Time and peak memory of search and post-processing at the size of Products-10K, on vectors with
planted neighbours.

    python benchmarks/rerank_at_scale.py --share 0.1            # a rehearsal in a minute
    python benchmarks/rerank_at_scale.py --out benchmarks/rerank_at_scale.json

55,000 queries x 142,000 gallery rows x 512 dimensions: products are random directions, photos lie
around them, so a ranking has a right answer and mAP@5 shows that every step still finds it. CPU
seconds stand beside the clock's, which count the neighbours on a shared machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipr_utils.judge import metrics
from vipr_utils.retrieve import pipeline, rerank
from vipr_utils.retrieve.search import Search

STACK = [
    "database_augmentation(4)",
    "alpha_query_expansion(5, 3)",
    "k_reciprocal(20, 6, 0.3)",
]


def planted(
    n: int, centres: np.ndarray, rng: np.random.Generator, *, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """(vectors (n, D) of unit length, product ids (n,)): a product's direction plus noise of
    `noise` times its length.
    """
    products = rng.permutation(np.arange(n) % len(centres))
    x = rng.standard_normal((n, centres.shape[1]), np.float32) * np.float32(
        noise / centres.shape[1] ** 0.5
    )
    return rerank.unit(x + centres[products]), products


def peak_gib(*, reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset, in GiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def measured(step: str, do, rows: list[dict]):
    """What do() returns; its time and memory are added to rows."""
    peak_gib(reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    out = do()
    rows.append(
        {
            "step": step,
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_gib": peak_gib(),
        }
    )
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the rows and products of Products-10K"
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=2.4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    n_queries, n_gallery, n_products = (round(n * given.share) for n in (55_000, 142_000, 9_691))
    centres = rerank.unit(rng.standard_normal((n_products, given.dim), np.float32))
    (q, wanted), (g, there) = (
        planted(n, centres, rng, noise=given.noise) for n in (n_queries, n_gallery)
    )
    n_relevant, rows = metrics.count_relevant(wanted, there), []

    def score(ranks) -> None:
        hits = metrics.hits_from_ranks(ranks[:, :5], wanted, there)
        ap = metrics.average_precision_at_k(hits, n_relevant)
        rows[-1]["map_at_5"] = float(np.nanmean(ap))
        print("mAP@5", round(rows[-1]["map_at_5"], 4), flush=True)

    tables = (
        pd.DataFrame({"image_id": [f"{side}/{i}" for i in range(len(x))]})
        for side, x in (("test", q), ("train", g))
    )
    search = Search(q, g, *tables)
    score(measured("top 5", lambda: search.searched(5), rows).ranks)
    augmented = measured(STACK[0], lambda: pipeline.bind(STACK[0])(search), rows)
    found = measured("top 100", lambda: augmented.searched(100), rows)
    score(found.ranks)
    for step in STACK[1:]:
        found = measured(step, partial(pipeline.bind(step), found), rows)
        score(found.ranks)
    sizes = {
        "queries": n_queries,
        "gallery": n_gallery,
        "products": n_products,
        "dim": given.dim,
        "noise": given.noise,
    }
    setting = {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    if given.out:
        given.out.write_text(json.dumps({**sizes, **setting, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
