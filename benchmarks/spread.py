"""How far two trainings of one recipe end apart: by seed, by number of threads, and run again.

    python benchmarks/spread.py DATA WORK         # half an hour; DATA in the Products-10K layout

Two recipes of params/sweeps/laptop that train for two minutes each: a backbone fine-tuned and a
network from scratch. What is found goes to submissions/reference/spread.json for RESULTS.md, after
every run; a finished run in WORK is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from vipr_utils.host.device import hardware
from vipr_utils.host.files import write_whole
from vipr_utils.judge import runs

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "submissions" / "reference" / "spread.json"
RECIPES = {  # what -> sweep, its row, the system of the record
    "Lite0, fine-tuned": ("gap", "gap_seen-baseline", "fine-tuned"),
    "from scratch": ("study_scratch", "study_scratch-triplet-cosine-seed0", ""),
}
RUNS = [  # seed, threads, 1 for the first time and 2 for the same again
    (0, 1, 1),
    (0, 1, 2),
    (1, 1, 1),
    (2, 1, 1),
    (0, 2, 1),
    (0, 4, 1),
]


def trained(recipe: str, run: tuple[int, int, int], data: Path, work: Path) -> dict:
    """Its score, with what was trained."""
    sweep, row, system = RECIPES[recipe]
    seed, threads, time = run
    name = f"{sweep}-seed{seed}-threads{threads}-{time}"
    command = [sys.executable, "-m", "vipr_utils", "run", f"params/sweeps/laptop/{sweep}.yaml"]
    command += ["--only", row, "--output-dir", str(work)]
    for value in (f"data_root={data}", f"seed={seed}", f"run_name={name}", "max_minutes=0"):
        command += ["-p", value]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VIPR_PRECISION": "float32"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    record = runs.load(work / name)
    systems = record["metrics"].get("rows") or [record["metrics"]]
    scores = next(found for found in systems if system in found.get("name", ""))
    return {
        "recipe": recipe,
        "seed": seed,
        "threads": threads,
        "time": time,
        "map_at_5": scores["map_at_5"],
        "minutes": record["seconds"] / 60,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="photos in the Products-10K layout")
    parser.add_argument("work", type=Path, help="folder of the runs")
    given = parser.parse_args()
    rows = []
    for recipe in RECIPES:
        for run in RUNS:
            rows.append(trained(recipe, run, given.data.resolve(), given.work.resolve()))
            print(rows[-1], flush=True)
            told = {"data": given.data.name, "hardware": hardware(), "rows": rows}
            write_whole(RECORD, json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
