"""The kit beside its rivals and the floor below it, in turn, on the same data: `make bench`.

    python benchmarks/bench.py [--data FOLDER] [--only search,metrics] [--runs 5] [--out FILE]

Two processes stand side by side, one with the kit as its notebooks set it up (`device.tune`) and
the bare operations that are its floor, one as a user of the rival finds it. They are asked in turn,
the other one at rest, and the medians of their runs are compared. What a rival cannot be had for is
left out and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vipr_utils.data.store import Store

PAUSE = 0.3  # seconds between two runs: threads of the other process come to rest
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "opencv-python-headless",
    "simplejpeg",
    "faiss-cpu",
    "usearch",
    "scikit-learn",
    "pytorch-metric-learning",
    "torchmetrics",
    "ranx",
)
DIM, K = 512, 5


# ------------------------------------------------------------------------------------------ search


def vectors(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, DIM), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def search(kit: bool, rows: int, queries: int, distance: str = "cosine", **_) -> dict:
    """On the same unit vectors; what kit and rivals prepare of the gallery is not timed."""
    q, g = vectors(queries, 1), vectors(rows, 0)
    if kit:
        import torch

        from vipr_utils.retrieve.search import Prepared, top_k

        a, b = torch.from_numpy(q), torch.from_numpy(g)
        prepared = Prepared(g)
        calls = {"kit": lambda: top_k(q, prepared, K, distance=distance)}
        if distance == "cosine":
            # the scores of 4,096 queries at a time: those of 55,000 x 1,000,000 take 220 GB
            calls["floor: bare product"] = lambda: [part @ b.T for part in a.split(4096)]
        return calls
    import faiss
    from sklearn.neighbors import NearestNeighbors
    from usearch.index import MetricKind
    from usearch.index import search as usearch

    metric = faiss.METRIC_INNER_PRODUCT if distance == "cosine" else faiss.METRIC_L2
    index = faiss.IndexFlat(DIM, metric)
    index.add(g)
    neighbours = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=distance).fit(g)
    kind = MetricKind.Cos if distance == "cosine" else MetricKind.L2sq
    calls = {"FAISS flat": lambda: index.search(q, K)}
    if rows * queries <= 2e8:  # minutes otherwise
        calls["usearch exact"] = lambda: usearch(g, q, K, kind, exact=True)
        calls["scikit-learn"] = lambda: neighbours.kneighbors(q)
    return calls


# ----------------------------------------------------------------------------------------- metrics


def metrics(kit: bool, queries: int, **_) -> dict:
    """mAP@5 of lists of 20, with its interval where there is one."""
    rng = np.random.default_rng(0)
    hits = rng.random((queries, 20)) < 0.4
    products = rng.integers(0, 9_691, queries)
    relevant = hits.sum(1) + rng.integers(0, 9, queries)
    if kit:
        from vipr_utils.judge.metrics import summary

        return {"kit": lambda: summary(hits, relevant, products)}
    import torch
    from torchmetrics.retrieval import RetrievalMAP

    scores = torch.arange(20, 0, -1).float().repeat(queries)
    indexes = torch.arange(queries).repeat_interleave(20)
    found = torch.from_numpy(hits).flatten()
    run = {f"q{i}": {f"d{j}": 20.0 - j for j in range(20)} for i in range(queries)}
    truth = {f"q{i}": {f"d{j}": 1 for j in np.flatnonzero(row)} for i, row in enumerate(hits)}
    truth = {name: found or {"none": 1} for name, found in truth.items()}
    calls = {
        "torchmetrics, no interval": lambda: RetrievalMAP(top_k=5)(scores, found, indexes=indexes)
    }
    from ranx import Qrels, Run, evaluate

    truth, run = Qrels(truth), Run(run)
    calls["ranx, no interval"] = lambda: evaluate(truth, run, "map@5")
    return calls


# ------------------------------------------------------------------------------ photos and networks


def photos_of(root: Path, n: int, px: int):
    """(store, rows (n,), labels (n,)) of a data root, packed beside it."""
    from vipr_utils.data.store import open_data

    photos, store, _ = open_data(str(root), str(root.parent / "cache"), px=px)
    rows = np.resize(photos.index.to_numpy(), n)
    labels = np.resize(photos["product_id"].to_numpy(), n)
    return store, rows, np.unique(labels, return_inverse=True)[1]


def large_jpegs(root: Path, n: int) -> Path:
    """A folder for torchvision's ImageFolder: the same photos, enlarged to JPEGs of 800 px."""
    import cv2

    folder = root.parent / f"large-{n}"
    if not folder.exists():
        store, rows, labels = photos_of(root, n, 224)
        for i, (row, label) in enumerate(zip(rows, labels)):
            path = folder / f"{label:05d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo = cv2.cvtColor(store[row], cv2.COLOR_RGB2BGR)
            scale = 800 / min(photo.shape[:2])
            large = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(path), large, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return folder


def pipeline(kit: bool, root: Path, n: int, px: int, augmentation: str, **_) -> dict:
    """An epoch of photos, in batches of 64."""
    if kit:
        import simplejpeg

        from vipr_utils.data import transforms
        from vipr_utils.data.store import Photos, loader

        store, rows, labels = photos_of(root, n, px)
        packed = []
        for row in rows:
            block = store.blocks[store._block_of[row]].get_slice("jpegs")
            packed.append(block[int(store._starts[row]) : int(store._ends[row])].tobytes())

        def kits(transform):
            return list(map(len, loader(Photos(store, rows, transform), device="cpu")))

        calls = {"floor: bare decoding": lambda: [len(simplejpeg.decode_jpeg(x)) for x in packed]}
        if augmentation == "reading":
            return calls | {"kit": lambda: [len(store[row]) for row in rows]}
        return calls | {"kit": partial(kits, transforms.augmentation(augmentation, px))}
    if augmentation == "reading":
        return {}
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    study = T.Compose(
        [
            T.Resize((round(px * 8 / 7),) * 2),
            T.RandomResizedCrop(px),
            T.RandomRotation(50),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.1, 0.1, 0.1, 0.1),
            T.ToTensor(),
        ]
    )
    folder = ImageFolder(large_jpegs(root, n), study)
    epoch = DataLoader(folder, batch_size=64, num_workers=torch.get_num_threads())
    return {"ImageFolder + DataLoader, 800 px": lambda: list(map(len, epoch))}


@dataclass
class Plain:
    """A dataset as notebooks write it, of photos that are packed already."""

    store: Store
    rows: np.ndarray
    labels: np.ndarray
    transform: Callable

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.store[self.rows[i]])), int(self.labels[i])


def embedding(kit: bool, root: Path, n: int, px: int, network: str, precision: str, **_) -> dict:
    """The photos through a frozen backbone, from the packed store; rivals from the same photos."""
    import torch

    from vipr_utils.learn import models

    model = models.create(network).eval()
    store, rows, _ = photos_of(root, n, px)
    if kit:
        from vipr_utils.host.device import autocast, compute_dtype
        from vipr_utils.retrieve.embedding import embed

        cpu = torch.device("cpu")
        batch = torch.rand(64, 3, px, px).to(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)

        def bare():
            with torch.inference_mode(), autocast(cpu, compute_dtype(precision, cpu)):
                for _ in range(n // 64):
                    model(batch)

        kits = partial(embed, model, store, rows, image_size=px, precision=precision)
        return {"kit": kits, "floor: bare forward": bare}
    from torchvision import transforms as T

    transform = T.Compose(
        [
            T.Resize((px, px)),
            T.ToTensor(),
            T.Normalize(model.record["mean"], model.record["std"]),
        ]
    )

    plain = Plain(store, rows, np.zeros(n, int), transform)

    @torch.no_grad()
    def naive():
        return torch.cat(
            [model(torch.stack([plain[j][0] for j in range(i, i + 64)])) for i in range(0, n, 64)]
        )

    from pytorch_metric_learning.testers import BaseTester

    tester = BaseTester(batch_size=64, dataloader_num_workers=2, data_device=torch.device("cpu"))
    return {
        "naive loop": naive,
        "pytorch-metric-learning": lambda: tester.get_all_embeddings(plain, model),
    }


def training(kit: bool, root: Path, n: int, px: int, network: str, precision: str, **_) -> dict:
    """An epoch of n photos in batches of 32, ArcFace, the kit's own recipe of 04."""
    import torch

    from vipr_utils.learn import losses, models

    store, rows, labels = photos_of(root, n, px)
    model = models.create(network, embedding_dim=256).train()
    if kit:
        from vipr_utils.data import transforms
        from vipr_utils.data.store import Photos
        from vipr_utils.host.device import compute_dtype
        from vipr_utils.learn import sampling
        from vipr_utils.learn import training as kits

        counts = np.bincount(labels)
        criterion = losses.criterion("arcface", "cosine", 256, counts=counts)
        dtype = compute_dtype(precision, torch.device("cpu"), training=True)
        photos = Photos(store, rows, transforms.augmentation("kit", px), labels=labels)
        sampler = sampling.sampler("shuffled", labels, batch_size=32)
        recipe = kits.Recipe(epochs=10_000, lr=1e-4, folder=Path("unused"), ema_decay=0.99)
        state = kits._Training(kits._Network(model, criterion, dtype), photos, sampler, recipe)
        pixels = torch.rand(32, 3, px, px).to(memory_format=torch.channels_last)
        targets = torch.arange(32) % (labels.max() + 1)

        def bare():
            for _ in range(n // 32):
                state.network.zero_grad()
                state.network(pixels, targets)[0].backward()

        def epoch():
            for images, wanted, _ in state.loader(state.begin_epoch()):
                state.step(images, wanted)

        return {"kit": epoch, "floor: forward and backward": bare}
    from pytorch_metric_learning.losses import ArcFaceLoss
    from torchvision import transforms as T

    steps = [
        T.RandomResizedCrop(px, scale=(0.4, 1.0)),
        T.RandomRotation(15),
        T.RandomHorizontalFlip(),
        T.ColorJitter(0.3, 0.3, 0.3),
        T.ToTensor(),
        T.Normalize(model.record["mean"], model.record["std"]),
    ]
    transform = T.Compose(steps)

    plain = Plain(store, rows, labels, transform)

    loss = ArcFaceLoss(int(labels.max()) + 1, 256)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-4)

    def naive():
        epoch = torch.utils.data.DataLoader(plain, batch_size=32, shuffle=True, num_workers=2)
        for images, wanted in epoch:
            optimizer.zero_grad()
            loss(model(images), wanted).backward()
            optimizer.step()

    return {"naive loop with pytorch-metric-learning": naive}


# --------------------------------------------------------------------------------------------- run


def comparisons(root: Path) -> list[tuple]:
    """(group, what, settings, repetitions of the runs asked for)."""
    sizes = [(10_000, 1), (10_000, 1000), (142_000, 1), (142_000, 1000), (142_000, 8192)]
    listed = [
        (search, f"{q:,} queries in {g:,} x {DIM}", {"rows": g, "queries": q}) for g, q in sizes
    ]
    large = {"rows": 1_000_000, "queries": 1000}
    listed.append((search, f"1,000 queries in 1,000,000 x {DIM}", large))
    euclid = {"rows": 142_000, "queries": 1000, "distance": "euclidean"}
    listed.append((search, f"1,000 queries in 142,000 x {DIM}, euclidean", euclid))
    listed.append((metrics, "mAP@5 of 55,000 queries", {"queries": 55_000}))
    for name in ("reading", "study"):
        settings = {"root": root, "n": 512, "px": 224, "augmentation": name}
        listed.append((pipeline, f"512 photos of 352 px, {name}, 224 px", settings))
    for precision in ("auto", "float32"):
        settings = {"root": root, "network": "tf_efficientnet_lite0", "precision": precision}
        listed.append(
            (embedding, f"512 photos, Lite0, 224 px, {precision}", settings | {"n": 512, "px": 224})
        )
        listed.append(
            (training, f"128 photos, Lite0, 160 px, {precision}", settings | {"n": 128, "px": 160})
        )
    return listed


def side(kit: bool, pipe) -> None:
    """One of the two processes: makes what it is asked for, and runs it when it is asked to."""
    warnings.simplefilter("ignore")
    if kit:
        from vipr_utils.host.device import tune

        tune()
    calls = {}
    for order, *given in iter(pipe.recv, None):
        if order == "make":
            group, settings = given
            calls = {}  # frees what was made before
            calls = group(kit, **settings)
            pipe.send(list(calls))
        else:
            began = time.perf_counter()
            calls[given[0]]()
            pipe.send(time.perf_counter() - began)


def compared(sides, group, settings: dict, runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each contestant, in turn, the first of each not counted."""
    seconds = {}
    for pipe in sides:
        pipe.send(("make", group, settings))
        seconds |= {name: (pipe, []) for name in pipe.recv()}
    for _ in range(runs + 1):
        for name, (pipe, taken) in seconds.items():
            time.sleep(PAUSE)
            pipe.send(("run", name))
            taken.append(pipe.recv())
    return {name: taken[1:] for name, (_, taken) in seconds.items()}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    import torch

    from vipr_utils.data import toy
    from vipr_utils.host.device import cores, hardware
    from vipr_utils.host.files import whole_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="photos; a generated set where none are named")
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photos")
        if given.data:
            root.symlink_to(given.data.resolve())
        else:
            toy.generate(root, products=100, image_size=400)
        sides = []
        for kit in (True, False):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            context = multiprocessing.get_context("spawn")
            context.Process(target=side, args=(kit, theirs), daemon=False).start()
            sides.append(ours)
        record = {
            "hardware": hardware(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": cores(),
            "data": given.data.name if given.data else "toy, 100 products, 400 px",
            "versions": versions(),
            "rows": [],
        }
        for group, what, settings in comparisons(root):
            if given.only and group.__name__ not in given.only.split(","):
                continue
            for name, taken in compared(sides, group, settings, given.runs).items():
                row = {"group": group.__name__, "what": what, "contestant": name}
                row |= {"seconds": statistics.median(taken), "runs": taken}
                record["rows"].append(row)
                print(f"{what:50} {name:42} {row['seconds']:9.4f} s", flush=True)
            with whole_file(given.out) as part:  # as far as it has come
                part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for pipe in sides:
            pipe.send(None)


if __name__ == "__main__":
    main()
