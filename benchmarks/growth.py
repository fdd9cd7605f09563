"""Time and memory of the stages at 1,000, 10,000 and 142,000 photos: `docs/growth.png`.

    python benchmarks/growth.py /scratch/growth                # ten minutes, 2 GB of disk

Photos are drawn as in rehearsal.py. Each size is measured in a process of its own: reading the
tables, packing all photos, embedding them with a small network at 48 px, a search for 1,000
queries in as many rows of 512 numbers, mAP@5 with its interval for as many queries. What must grow
with the photos alone grows with them; a search grows with its queries as well, which are fixed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import numpy as np
import pandas as pd
import rehearsal

from vipr_utils.host.device import cores, hardware
from vipr_utils.host.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1_000, 10_000, 142_000)
NETWORK, PX, SIDE = "siamese_small", 48, 128
LINES = {  # stage -> how its line is drawn
    "read the tables": ":",
    "pack the photos": "-",
    "embed": "--",
    "search": "-.",
    "mAP@5": (0, (1, 3)),
}


def measured(root: Path, photos: int) -> list[dict]:
    """[{stage, seconds, peak_mb}] in this process; memory beyond what it had before the first."""
    import torch

    from vipr_utils.data import catalog
    from vipr_utils.data.store import open_data
    from vipr_utils.host.device import tune
    from vipr_utils.judge.metrics import summary
    from vipr_utils.learn import models
    from vipr_utils.retrieve.embedding import embed
    from vipr_utils.retrieve.search import top_k

    tune()
    torch.manual_seed(0)
    model = models.create(NETWORK, weights="none", embedding_dim=128)
    queries, gallery = bench.vectors(1000, 1), bench.vectors(photos, 0)
    rng = np.random.default_rng(0)
    hits = rng.random((photos, 5)) < 0.4
    products = rng.integers(0, photos // 15, photos)
    opened = []
    with tempfile.TemporaryDirectory(dir=root.parents[2]) as cache:
        stages = {
            "read the tables": lambda: catalog.read(root),
            "pack the photos": lambda: opened.extend(open_data(str(root), cache, px=PX)[:2]),
            "embed": lambda: embed(model, opened[1], opened[0].index, image_size=PX),
            "search": lambda: top_k(queries, gallery),
            "mAP@5": lambda: summary(hits, hits.sum(1) + 3, products),
        }
        found, before = [], bench.reset_peak()
        for stage, function in stages.items():
            bench.reset_peak()
            began = time.perf_counter()
            function()
            seconds = time.perf_counter() - began
            found.append({"stage": stage, "seconds": seconds, "peak_mb": bench.peak() - before})
        return [{"photos": len(opened[0]), **row} for row in found]


def drawn(table: pd.DataFrame, path: Path) -> None:
    """Seconds and memory over photos, both axes by powers of ten, beside a straight growth."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage, rows in table.groupby("stage", sort=False):
        style = {"linestyle": LINES[stage], "marker": "o", "markersize": 4, "label": stage}
        left.plot(rows["photos"], rows["seconds"], **style)
        right.plot(rows["photos"], rows["peak_mb"].clip(lower=1), **style)
    for axes, title in ((left, "Seconds"), (right, "Memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="photos", title=title)
        ends = np.array([table["photos"].min(), table["photos"].max()])
        low = axes.get_ylim()[0]
        axes.plot(ends, low * ends / ends[0], color="0.7", zorder=0, label="in proportion")
        axes.set_xticks(sorted(table["photos"].unique()))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--measure", type=int, default=0, help="one size, printed")
    given = parser.parse_args()
    if given.measure:
        share = given.measure / (rehearsal.GALLERY + rehearsal.QUERIES)
        root = rehearsal.make_input(given.work / f"{given.measure}", share, SIDE)
        print(json.dumps(measured(root, given.measure)))
        return
    rows = []
    for size in SIZES:
        command = [sys.executable, __file__, str(given.work), "--measure", str(size)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows += json.loads(printed.splitlines()[-1])
        print(pd.DataFrame(rows).to_string(), flush=True)
    record = {"hardware": hardware(), "threads": cores(), "rows": rows}
    with whole_file(ROOT / "benchmarks" / "growth.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    drawn(pd.DataFrame(rows), ROOT / "docs" / "growth.png")


if __name__ == "__main__":
    main()
