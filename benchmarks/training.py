"""Training at real size: images per second, memory and use of the device, for the study's networks.

    python benchmarks/training.py [--products 400] [--steps 60] [--device cuda] [--out FILE]

The photos are the generated set; its rows are repeated to the 141,931 of Products-10K, so that
sampler, index and loader work at that size. Each network trains at 224 px and its study batch, in
the half precision that the device takes, with the loader's own decoding and augmentation. The
first third of the steps warms up and is not counted.
"""

import argparse
import json
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from vipr_utils.data import catalog, toy, transforms
from vipr_utils.data.store import Photos, build_store, loader
from vipr_utils.host import platform
from vipr_utils.host.device import compute_dtype, hardware, tune, working_device
from vipr_utils.host.files import whole_file
from vipr_utils.learn import losses, models, sampling, training

IMAGES = 141_931
NETWORKS = {
    "siamese_90m": 32,
    "resnet50.tv_in1k": 32,
    "efficientnet_b4.ra2_in1k": 32,
}  # name: images a step


def photos_at_scale(products: int, n: int):
    """(photos, store, rows (n,)): a generated set whose train rows are repeated to n."""
    root = toy.generate(
        platform.cache_folder() / f"benchmark-{products}", products=products, image_size=256
    )
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=platform.cache_folder(), store_px=256)
    rows = photos.index[photos.split == "train"].to_numpy()
    return photos, store, np.resize(rows, n)


def used(device: torch.device) -> str:
    """What the driver says of the device's use, '' without a GPU."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def measure(name: str, batch_size: int, data, *, device: torch.device, steps: int) -> dict:
    photos, store, rows = data
    labels = np.unique(photos.loc[rows, "product_id"], return_inverse=True)[1]
    labels = labels + (labels.max() + 1) * (
        np.arange(len(rows)) // max(1, len(rows) // 24)
    )  # about 24 times the products
    model = models.create(name, weights="none", embedding_dim=128)
    criterion = losses.criterion("contrastive", "euclidean", 128)
    data = Photos(store, rows, transforms.augmentation("study", 224), labels=labels)
    sampler = sampling.sampler("products", labels, batch_size=batch_size)
    recipe = training.Recipe(
        epochs=1,
        lr=1e-3,
        folder=Path("unused"),  # nothing is saved
        optimizer="adam",
        weight_decay=0.0,
        device=device,
    )
    dtype = compute_dtype(recipe.precision, device, training=True)
    state = training._Training(training._Network(model, criterion, dtype), data, sampler, recipe)
    batches = state.begin_epoch()
    seen, began, use = 0, time.perf_counter(), []
    for step, (pixels, targets, _) in enumerate(
        loader(data, batch_sampler=batches[:steps], device=device)
    ):
        state.step(pixels, targets)
        if step == steps // 3:
            seen, began = 0, time.perf_counter()
        seen += len(targets)
        use += [used(device)] if step % 20 == 19 else []
    seconds = time.perf_counter() - began
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else of_process
    return {
        "network": name,
        "million_parameters": round(model.record["parameters"] / 1e6, 1),
        "batch_size": batch_size,
        "precision": str(dtype),
        "images": len(rows),
        "batches_an_epoch": len(batches),
        "images_per_second": round(seen / seconds, 1),
        "memory_gb": round(peak, 2),
        "gpu_use": use,
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", type=int, default=400)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tune()
    device, data = working_device(given.device), photos_at_scale(given.products, given.images)
    found = [measure(n, b, data, device=device, steps=given.steps) for n, b in NETWORKS.items()]
    print(json.dumps(found, indent=1))
    if given.out:
        with whole_file(given.out) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
