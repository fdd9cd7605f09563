"""The whole series at Products-10K's size, by the parameter files of kaggle_t4, without a GPU.

    python benchmarks/rehearsal.py /scratch/rehearsal                 # hours, 10 GB of disk
    python benchmarks/rehearsal.py /scratch/small --share 0.02        # the check of `make soak`

9,691 products, 141,931 gallery photos and 55,000 queries are drawn into a folder shaped like
Kaggle's. Each product is drawn a few times; its other photos are those again, cropped, lit and
encoded anew. Then notebooks 01 to 09 run one after the other with the files of params/kaggle_t4:
only the networks are tiny, the epochs few and the minutes short. The address space of every process
is limited for real. What each notebook and stage took is written to <work>/rehearsal.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
import psutil

from vipr_utils.data import toy
from vipr_utils.host.device import hardware
from vipr_utils.host.files import whole_file
from vipr_utils.run.params import parameters_of

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS, GALLERY, QUERIES = 9_691, 141_931, 55_000
ADDRESS_SPACE, KEPT, SCRATCH = 30e9, 20e9, 60e9  # bytes that a session on Kaggle has
DRAWN = 3  # photos drawn of a product, one of them the shop's; the rest are made of these
TINY = ["lcnet_035", "mobilenetv3_small_050"]  # 1,280 and 1,024 features, as wide as real ones
NARROW = "test_convnext3"  # 128 features: 07 compares all photos of the gallery a dozen times
SMALL = {  # beside the values of params/kaggle_t4
    "image_size": 32,
    "test_size": 32,
    "epochs": 1,
    "head_epochs": 1,
    "embedding_dim": 32,  # Manhattan distances of all queries take minutes for every 32
    "weights": "none",
    "backbone": NARROW,
    "backbones": json.dumps(TINY),
    "network": "siamese_small",
}
MINUTES = {"03": 1, "04": 2, "05": 1, "06": 20, "07": 10}  # of a training, or of choosing
MINUTES_OF_SMALL = dict.fromkeys(MINUTES, 0.05)  # where a share is rehearsed
FOLDERS = {"kept": "kaggle/working", "scratch": "kaggle/temp"}


# ---------------------------------------------------------------------------------- the photos


def photos(share: float) -> pd.DataFrame:
    """A row a photo: split, name, class, group, photo (its number in the product).

    Both sides have a long tail: shares of the products fall as one over their rank, smoothed.
    """
    rng = np.random.default_rng(0)
    products = max(4, round(PRODUCTS * share))
    weights = rng.permutation(1 / (np.arange(products) + products / 20))
    tables = []
    for split, total in {"train": GALLERY, "test": QUERIES}.items():
        more = round(total * share) - products
        counts = 1 + rng.multinomial(max(0, more), weights / weights.sum())
        classes = rng.permutation(np.repeat(np.arange(products), counts))
        table = pd.DataFrame({"split": split, "class": classes})
        table["name"] = (table.index + 1).astype(str) + ".jpg"
        tables.append(table)
    found = pd.concat(tables, ignore_index=True)
    found["group"] = found["class"] // toy.VARIANTS
    found["photo"] = found.groupby("class").cumcount()
    return found


def draw(rows: pd.DataFrame, root: Path, side: int) -> None:
    """The photos of some products."""
    for product, listed in rows.groupby("class"):
        drawn = [toy.shop_photo(product, 0, 0, side)]
        for photo in range(1, min(DRAWN, len(listed))):
            drawn.append(toy.customer_photo(product, photo, 0, side))
        for split, name, photo in listed[["split", "name", "photo"]].itertuples(index=False):
            image = changed(drawn[photo % len(drawn)], np.random.default_rng((product, photo)))
            _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
            (root / split / name).write_bytes(data.tobytes())


def changed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of it under another light, (H, W, 3) uint8."""
    share = rng.uniform(0.8, 1.0, 2)
    size = (share * image.shape[:2]).astype(int)
    y, x = (rng.random(2) * (np.array(image.shape[:2]) - size)).astype(int)
    light = rng.uniform(0.8, 1.2, 3)
    return (image[y : y + size[0], x : x + size[1]] * light).clip(0, 255).astype(np.uint8)


def make_input(work: Path, share: float, side: int) -> Path:
    """<work>/kaggle/input/competitions/products-10k as Kaggle mounts it; made once."""
    root = work / "kaggle" / "input" / "competitions" / "products-10k"
    if (root / "train.csv").is_file():
        return root
    table = photos(share)
    for split in ("train", "test"):
        (root / split).mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    parts = [rows for _, rows in table.groupby(table["class"] // 16)]
    joblib.Parallel(-1)(joblib.delayed(draw)(rows, root, side) for rows in parts)
    test = table[table["split"] == "test"]
    usage = np.where(np.arange(len(test)) % 3, "Private", "Public")
    test.assign(Usage=usage)[["name", "class", "Usage"]].to_csv(
        root / "test_kaggletest.csv", index=False
    )
    train = table[table["split"] == "train"]
    with whole_file(root / "train.csv") as part:  # last: the mark of a complete input
        train[["name", "class", "group"]].to_csv(part, index=False)
    return root


# --------------------------------------------------------------------------------- the notebooks


class Watch:
    """A process with all that it starts, every second: (time, resident memory of all, address space
    of the largest, disk), in GB.
    """

    def __init__(self, pid: int, work: Path) -> None:
        self.process, self.work, self.samples = psutil.Process(pid), work, []
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while self.process.is_running():
            try:
                family = [self.process, *self.process.children(recursive=True)]
                memory = [process.memory_info() for process in family]
                disk = sum(size_gb(self.work / folder) for folder in FOLDERS.values())
            except (psutil.Error, FileNotFoundError):  # one has just ended
                continue
            resident = sum(found.rss for found in memory) / 1e9
            largest = max(found.vms for found in memory) / 1e9
            self.samples.append((time.time(), resident, largest, disk))
            time.sleep(1)

    def peak(self, start: float, end: float) -> tuple[float, float, float]:
        """Resident memory, address space and disk in between."""
        inside = [found[1:] for found in self.samples if start <= found[0] <= end]
        return tuple(np.max(inside, axis=0)) if inside else (np.nan,) * 3


def run(notebook: str, work: Path, minutes: dict[str, float]) -> dict:
    """Run one notebook by `vipr run`; what it took, by stage as well."""
    known = parameters_of(ROOT / "notebooks" / f"{notebook}.ipynb")
    values = SMALL | {"max_minutes": minutes.get(notebook[:2], 0)}
    settings = [f"-p{name}={value}" for name, value in values.items() if name in known]
    command = [sys.executable, "-m", "vipr_utils", "run", "params/kaggle_t4", "--force"]
    places = {"VIPR_PLATFORM_ROOT": str(work), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    began = time.time()
    process = subprocess.Popen(
        [*command, "--only", notebook, *settings],
        cwd=ROOT,
        env=os.environ | places,
        preexec_fn=limit_address_space,
    )
    watch = Watch(process.pid, work)
    code = process.wait()
    end = time.time()
    resident, virtual, _ = watch.peak(began, end)
    executed = work / "kaggle" / "working" / "submissions" / notebook / "notebook.ipynb"
    return {
        "notebook": notebook,
        "ended": code == 0,
        "seconds": end - began,
        "resident_gb": resident,
        "address_space_gb": virtual,
        **{f"{kind}_gb": size_gb(work / folder) for kind, folder in FOLDERS.items()},
        "stages": stages(executed, watch) if executed.is_file() else [],
    }


def limit_address_space() -> None:
    limit = int(ADDRESS_SPACE)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def stages(executed: Path, watch: Watch) -> list[dict]:
    """Seconds, peak memory and disk of the sections of a notebook that was run."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    found, stage = {}, "set up"
    for cell in cells:
        heads = [line for line in "".join(cell["source"]).splitlines() if line.startswith("## ")]
        if cell["cell_type"] == "markdown" and heads:
            stage = heads[-1].removeprefix("## ").strip()
        ran = cell["metadata"].get("papermill", {})
        if cell["cell_type"] == "code" and ran.get("end_time"):
            times = [
                datetime.fromisoformat(ran[at]).timestamp() for at in ("start_time", "end_time")
            ]
            found.setdefault(stage, []).append(times)
    table = []
    for stage, times in found.items():
        seconds = sum(end - start for start, end in times)
        resident, _, disk = watch.peak(times[0][0], times[-1][1])
        row = {"stage": stage, "seconds": seconds, "resident_gb": resident, "disk_gb": disk}
        table.append(row)
    return table


def size_gb(folder: Path) -> float:
    """Of all files below, holes not counted."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(512 * found.st_blocks for found in files) / 1e9


def main() -> int:
    """Exit code 0 where every notebook ended inside the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of Products-10K's numbers")
    parser.add_argument("--side", type=int, default=192, help="pixels of the photos drawn")
    parser.add_argument("--only", default="", help="beginnings of notebooks, with commas")
    given = parser.parse_args()
    work = given.work.resolve()
    began = time.time()
    root = make_input(work, given.share, given.side)
    print(f"{root}: {time.time() - began:.0f} s", flush=True)
    listed = listing(root)
    for folder in FOLDERS.values():
        (work / folder).mkdir(parents=True, exist_ok=True)

    path = work / "rehearsal.json"
    for file in sorted((ROOT / "params" / "kaggle_t4").glob("*.yaml")):
        if file.stem.startswith(tuple(given.only.split(","))):
            row = run(file.stem, work, MINUTES if given.share == 1 else MINUTES_OF_SMALL)
            rows = recorded(path) | {file.stem: row}  # another may have written meanwhile
            record = {"share": given.share, "side": given.side, "hardware": hardware()}
            record["notebooks"] = [rows[name] for name in sorted(rows)]
            with whole_file(path) as part:
                part.write_text(json.dumps(record, indent=1))
    table = pd.DataFrame(recorded(path).values()).drop(columns="stages")
    print(table.round(1).to_string(index=False))
    unchanged = listing(root) == listed
    print("the input is as it was" if unchanged else "AN INPUT WAS WRITTEN TO")
    inside = (table["kept_gb"] < KEPT / 1e9) & (table["scratch_gb"] < SCRATCH / 1e9)
    return int(not (table["ended"] & inside).all() or not unchanged)


def recorded(path: Path) -> dict[str, dict]:
    """Rows of the record by notebook."""
    rows = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else []
    return {row["notebook"]: row for row in rows}


def listing(root: Path) -> list:
    """Names and times of the folders: what is written into one changes it."""
    return [(str(path), path.stat().st_mtime_ns) for path in sorted([root, *root.iterdir()])]


if __name__ == "__main__":
    sys.exit(main())
