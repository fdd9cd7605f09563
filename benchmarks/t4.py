"""What the notebooks of params/kaggle_t4 would take on Kaggle's T4 x2, by arithmetic.

    python benchmarks/t4.py /scratch/rehearsal      # after benchmarks/rehearsal.py

Sums and limits are those of `vipr run --dry-run`, over the rehearsal's photos. No T4 was timed.
Instead of seconds measured with a network they take the operations that one counts, divided by what
a T4 is assumed to do; what the cores do with a photo is measured here, on photos of 500 pixels, and
shared by Kaggle's four. To these are added all seconds of the same notebook in the rehearsal: with
networks next to nothing they are what everything else took, and more than that.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from vipr_utils.data import toy
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.run import params, plan

ROOT = Path(__file__).resolve().parents[1]
CARDS, CORES = 2, 4
PEAK = 65e12  # multiplications and additions a second in float16: NVIDIA's data sheet of the T4
REACHED = 0.25  # share of it that a network is assumed to reach
SEARCHED = 4e12  # half of the data sheet's 8.1e12 in float32
STEP = 3  # forward passes that a step costs: forward, and twice as much backward
SIDE = 500  # pixels of the photos that are packed and looked at
NETWORKS = {}  # operations that a photo takes, by (name, pixels)


@cache
def network_on_t4(name: str, px: int, device: torch.device, trained: bool) -> plan.NetworkCost:
    """By the operations counted in a pass that computes nothing."""
    with torch.device("meta"):
        model = models.Embedder(name).eval()
        pixels = torch.rand(1, 3, px, px)
    with FlopCounterMode(display=False) as counted:
        features = model(pixels)
    NETWORKS[name, px] = counted.get_total_flops()
    forward_s = NETWORKS[name, px] / (PEAK * REACHED)
    parameters = model.record["parameters"]
    return plan.NetworkCost(parameters, features.shape[1], forward_s, STEP * forward_s, 0.0)


def image_s(device: torch.device, compute_s: float, look_s: float) -> float:
    """Cards share the work, worker processes on the cores prepare photos meanwhile."""
    return max(compute_s / CARDS, look_s / CORES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the rehearsal")
    given = parser.parse_args()
    tree = given.work / "kaggle" / "input" / "competitions" / "products-10k"
    rehearsed = json.loads((given.work / "rehearsal.json").read_text(encoding="utf-8"))
    measured = {row["notebook"]: row["seconds"] / 60 for row in rehearsed["notebooks"]}

    with TemporaryDirectory() as folder:
        photos = toy.generate(Path(folder, "photos"), image_size=SIDE)
        photo_cost = plan.photo_cost

        def photo_here(root: Path, px: int, augmentation: str) -> plan.PhotoCost:
            return photo_cost(photos, px, augmentation)

        places = {"data_root": str(tree), "cache_dir": folder, "output_dir": folder}
        todo = params.load_runs([ROOT / "params" / "kaggle_t4"], places)
        with (
            patch.object(plan, "network_cost", network_on_t4),
            patch.object(plan, "image_s", image_s),
            patch.object(plan, "photo_cost", photo_here),
            patch.object(plan, "multiply_s", lambda device: 2 / SEARCHED),
        ):
            table = plan.plan(todo)
        look_ms = {
            recipe: 1000 * photo_cost(photos, 224, recipe).look_s for recipe in ("none", "strong")
        }
    table["rehearsal"] = [measured[name] for name in table.index]
    columns = ["training", "embedding", "search", "rehearsal"]
    table = table[columns].assign(minutes=table[columns].sum(axis=1)).round(2)
    print(table.to_string())
    gpu = table["minutes"][table["training"] + table["embedding"] > 0]
    print(f"longest {table.minutes.max() / 60:.1f} hours, with a GPU {gpu.sum() / 60:.1f} in all")
    record = {
        "networks": [
            {"network": name, "px": px, "gflop": flop / 1e9}
            for (name, px), flop in NETWORKS.items()
        ],
        "operations_a_second": PEAK * REACHED,
        "look_ms": look_ms,
        "notebooks": table.rename_axis("notebook").reset_index().to_dict("records"),
    }
    with whole_file(given.work / "t4.json") as part:
        part.write_text(json.dumps(record, indent=1))
    return int(table["minutes"].max() > 9 * 60 or gpu.sum() > 12 * 60)


if __name__ == "__main__":
    sys.exit(main())
