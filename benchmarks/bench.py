"""The kit beside its rivals and the floor below it, in turn, on the same data: `make bench`.

    python benchmarks/bench.py [--data FOLDER] [--only search,metrics] [--runs 5] [--out FILE]

Two processes stand side by side, one with the kit as its notebooks set it up (`device.tune`) and
the bare operations that are its floor, one as a user of the rival finds it. They are asked in turn,
the other one at rest, and the medians of their runs are compared. What a rival cannot be had for is
left out and named.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
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
    "open-metric-learning",
    "onnxruntime",
    "openvino",
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
            calls["floor: bare product"] = partial(products, a, b)
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
        calls["pytorch-metric-learning"] = partial(pml_search, q, g, distance)
    return calls


def products(a, b) -> None:
    """Of 4,096 queries at a time: all scores of 55,000 x 1,000,000 take 220 GB."""
    for part in a.split(4096):
        part @ b.T


def pml_search(q: np.ndarray, g: np.ndarray, distance: str):
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.utils.inference import CustomKNN

    measure = CosineSimilarity() if distance == "cosine" else LpDistance(normalize_embeddings=False)
    return CustomKNN(measure, batch_size=1024)(torch.from_numpy(q), K, torch.from_numpy(g))


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
    folder, threads = large_jpegs(root, n), torch.get_num_threads()

    def read(dataset):
        batches = DataLoader(dataset, batch_size=64, num_workers=threads)
        return lambda: list(map(len, batches))

    import timm.data

    timms = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder)),
        input_size=(3, px, px),
        batch_size=64,
        is_training=True,
        color_jitter=0.1,
        num_workers=threads,
        device=torch.device("cpu"),
        use_prefetcher=False,
        persistent_workers=False,
    )
    calls = {
        "ImageFolder + DataLoader, 800 px": read(ImageFolder(folder, study)),
        "timm's loader, its own augmentations": lambda: list(map(len, timms)),
    }
    if importable("oml"):
        from oml.datasets import ImageBaseDataset

        files = sorted(folder.rglob("*.jpg"))
        calls["open-metric-learning"] = read(ImageBaseDataset(files, transform=study))
    return calls


def importable(module: str) -> bool:
    """Whether a rival that may be absent can be used; a broken installation is named."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"left out: {module}, {error}", flush=True)
        return False
    return True


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


@dataclass
class Named:
    """The same for open-metric-learning, which wants names."""

    plain: Plain
    input_tensors_key = "images"
    index_key = "index"

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, i: int) -> dict:
        return {"images": self.plain[i][0], "index": i}


def embedding(kit: bool, root: Path, n: int, px: int, network: str, precision: str, **_) -> dict:
    """The photos through a frozen backbone, from the packed store; rivals from the same photos."""
    import torch

    from vipr_utils.learn import models

    model = models.create(network).eval()
    store, rows, _ = photos_of(root, n, px)
    if kit:
        from vipr_utils.host.device import autocast, compute_dtype
        from vipr_utils.retrieve import engine
        from vipr_utils.retrieve.embedding import embed

        cpu = torch.device("cpu")
        dtype = compute_dtype(precision, cpu)
        batch = torch.rand(64, 3, px, px).to(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)

        def bare():
            with torch.inference_mode(), autocast(cpu, dtype):
                for _ in range(n // 64):
                    model(batch)

        kits = partial(embed, model, store, rows, image_size=px, precision=precision)

        def by_torch():
            with unittest.mock.patch.object(engine, "pays", lambda *given: False):
                kits()

        name = "kit, by torch" if engine.pays(cpu, dtype, len(store.readable)) else "kit"
        calls = {name: by_torch, "floor: bare forward": bare}
        return calls if name == "kit" else {"kit": kits, **calls}
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
    calls = {"naive loop": naive}
    if precision == "auto":  # no rival has another precision: they are with float32
        return calls
    calls["pytorch-metric-learning"] = lambda: tester.get_all_embeddings(plain, model)
    if importable("oml"):
        from oml.inference import inference

        settings = {"batch_size": 64, "num_workers": 2}
        calls["open-metric-learning"] = partial(inference, model, Named(plain), **settings)
    ready = torch.rand(64, 3, px, px)
    for name, make in {"ONNX Runtime": onnx_forward, "OpenVINO": openvino_forward}.items():
        if importlib.util.find_spec(name.lower().replace(" ", "")):
            forward = make(model, ready)
            calls[f"{name}, ready photos, float32"] = partial(repeated, forward, n // 64)
    return calls


def repeated(function: Callable, times: int) -> None:
    for _ in range(times):
        function()


def onnx_forward(model, images) -> Callable:
    """The network by ONNX Runtime, as its own exporter and defaults have it."""
    import onnxruntime
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.onnx")
        torch.onnx.export(model, (images,), file, input_names=["images"], dynamo=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"images": images.numpy()})


def openvino_forward(model, images) -> Callable:
    from vipr_utils.retrieve.engine import without_telemetry

    openvino = without_telemetry()
    converted = openvino.convert_model(model, example_input=images)
    network = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return partial(network, images.numpy())


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

    from pytorch_metric_learning.trainers import MetricLossOnly

    trainer = MetricLossOnly(
        models={"trunk": model},
        optimizers={"trunk_optimizer": optimizer},
        batch_size=32,
        loss_funcs={"metric_loss": loss},
        dataset=plain,
        data_device=torch.device("cpu"),
        dataloader_num_workers=2,
        iterations_per_epoch=n // 32,
    )
    logging.getLogger("pytorch-metric-learning").setLevel(logging.WARNING)
    return {"naive loop": naive, "pytorch-metric-learning's trainer": trainer.train}


# ---------------------------------------------------------------------------- steps and notebooks


def k_reciprocal(kit: bool, rows: int, queries: int, **_) -> dict:
    """Re-ranking as published, k1 20, k2 6, of planted embeddings, a dozen photos a product."""
    rng = np.random.default_rng(0)
    products = rng.integers(0, rows // 12, rows + queries)
    x = vectors(rows // 12, 0)[products] + 0.06 * rng.standard_normal((rows + queries, DIM))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    if not kit:
        return {"published, dense numpy": lambda: published_k_reciprocal(x, queries)}
    import pandas as pd
    import torch

    from vipr_utils.retrieve import pipeline
    from vipr_utils.retrieve.search import Search

    table = pd.DataFrame({"image_id": np.arange(len(x)), "product_id": products})
    asked = Search(x[:queries], x[queries:], table[:queries], table[queries:])
    step = "transductive_k_reciprocal(k1=20, k2=6, weight=0.3)"
    everything = torch.from_numpy(x)
    return {
        "kit": lambda: pipeline.apply([step], asked, k=K),
        "floor: bare product": lambda: everything @ everything.T,
    }


def published_k_reciprocal(x: np.ndarray, queries: int, k1=20, k2=6, weight=0.3) -> np.ndarray:
    """Lists (Q, K) by the algorithm of Zhong et al. 2017, arXiv:1701.08398, as it is usually run:
    dense matrices of all photos by all photos, a loop over photos.
    """
    distances = 2 - 2 * x @ x.T
    distances /= distances.max(axis=0)
    order = np.argsort(distances, axis=1)

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        return forward[(order[forward, : k + 1] == i).any(axis=1)]

    weights = np.zeros_like(distances)
    for i in range(len(x)):
        near = joined = reciprocal(i, k1)
        for j in near:
            others = reciprocal(j, round(k1 / 2))
            if len(np.intersect1d(others, near)) > 2 / 3 * len(others):
                joined = np.append(joined, others)
        joined = np.unique(joined)
        shares = np.exp(-distances[i, joined])
        weights[i, joined] = shares / shares.sum()
    weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(len(x))])
    holders = [np.flatnonzero(column) for column in weights.T]
    jaccard = np.empty((queries, len(x)), np.float32)
    for i in range(queries):
        shared = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    mixed = (1 - weight) * jaccard + weight * distances[:queries]
    return np.argsort(mixed[:, queries:], axis=1)[:, :K]


def notebooks(kit: bool, **_) -> dict:
    """The series on the toy set by `vipr run params/smoke`, kernels and figures included."""
    if not kit:
        return {}

    def series():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vipr_utils", "run", "params/smoke"]
            command += ["--output-dir", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return {"kit": series}


# --------------------------------------------------------------------------------------------- run


@dataclass
class Comparison:
    """What both processes do, and what is asked of the kit: at most so many times the floor, and
    of rivals to take at least so many times as long.
    """

    group: Callable
    what: str
    settings: dict
    of_floor: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    memory: bool = False  # whether its peak is measured, by one run more
    long: bool = False  # a run takes minutes: one, and none before it


def comparisons(root: Path) -> list[Comparison]:
    listed = []
    for rows, queries in itertools.product((10_000, 142_000, 1_000_000), (1, 1000, 55_000)):
        asked = (None, {"usearch exact": 1.0, "scikit-learn": 10.0})
        if queries > 1:
            asked = (1.15, {"FAISS flat": 1.0, "scikit-learn": 10.0})
        asking = "1 query" if queries == 1 else f"{queries:,} queries"
        what = f"{asking} in {rows:,} x {DIM}"
        listed.append(
            Comparison(
                search,
                what,
                {"rows": rows, "queries": queries},
                *asked,
                memory=True,
                long=rows * queries > 5e9,
            )
        )
    what = f"1,000 queries in 142,000 x {DIM}, euclidean"
    settings = {"rows": 142_000, "queries": 1000, "distance": "euclidean"}
    listed.append(Comparison(search, what, settings, None, {"FAISS flat": 1.0}, memory=True))
    what, settings = "mAP@5 of 55,000 queries", {"queries": 55_000}
    rivals = {"torchmetrics, no interval": 50.0}
    listed.append(Comparison(metrics, what, settings, None, rivals))
    what, settings = "k-reciprocal, 500 queries in 4,500", {"rows": 4500, "queries": 500}
    listed.append(Comparison(k_reciprocal, what, settings))
    asked = {
        "reading": (1.3, {}),
        "study": (None, {"ImageFolder + DataLoader, 800 px": 8.0}),
    }
    for name, marks in asked.items():
        settings = {"root": root, "n": 512, "px": 224, "augmentation": name}
        what = f"512 photos of 352 px, {name}, 224 px"
        listed.append(Comparison(pipeline, what, settings, *marks))
    for precision in ("auto", "float32"):
        settings = {"root": root, "network": "tf_efficientnet_lite0", "precision": precision}
        rivals = {"naive loop": 3.0, "pytorch-metric-learning": 1.5, "open-metric-learning": 1.5}
        what = f"512 photos, Lite0, 224 px, {precision}"
        listed.append(Comparison(embedding, what, settings | {"n": 512, "px": 224}, 1.1, rivals))
        rivals = {"naive loop": 1.5}
        what = f"128 photos, Lite0, 160 px, {precision}"
        listed.append(Comparison(training, what, settings | {"n": 128, "px": 160}, 1.15, rivals))
    listed.append(Comparison(notebooks, "eight notebooks on the toy set", {}, long=True))
    return listed


def reset_peak() -> float | None:
    """Memory of this process in MB, what it had freed being given back and its peak forgotten; None
    where Linux does not say.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return peak()


def peak() -> float:
    """The largest memory of this process in MB since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


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
            name, of_memory = given
            before = reset_peak() if of_memory else None
            began = time.perf_counter()
            calls[name]()
            seconds = time.perf_counter() - began
            pipe.send((seconds, None if before is None else peak() - before))


def compared(sides, asked: Comparison, runs: int) -> dict[str, dict]:
    """contestant -> seconds of each run, in turn, the first of each not counted, and MB beyond what
    the process held before a last one, which begins without memory that was freed.
    """
    pipes = {}
    for pipe in sides:
        pipe.send(("make", asked.group, asked.settings))
        pipes |= dict.fromkeys(pipe.recv(), pipe)
    order = ["memory"] if asked.long else [None] + ["time"] * runs + ["memory"] * asked.memory
    taken = {name: {"runs": []} for name in pipes}
    for use, (name, pipe) in itertools.product(order, pipes.items()):
        time.sleep(PAUSE)
        pipe.send(("run", name, use == "memory"))
        seconds, megabytes = pipe.recv()
        if use == "time" or asked.long:
            taken[name]["runs"].append(seconds)
        if megabytes is not None:
            taken[name]["peak_mb"] = round(megabytes)
    return taken


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
        for asked in comparisons(root):
            if given.only and asked.group.__name__ not in given.only.split(","):
                continue
            for name, taken in compared(sides, asked, given.runs).items():
                row = {"group": asked.group.__name__, "what": asked.what, "contestant": name}
                row |= {"seconds": statistics.median(taken["runs"]), **taken}
                if name == "kit":
                    row |= {"of_floor": asked.of_floor, "rivals": asked.rivals}
                record["rows"].append(row)
                print(f"{asked.what:50} {name:42} {row['seconds']:9.4f} s", flush=True)
            with whole_file(given.out) as part:  # as far as it has come
                part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for pipe in sides:
            pipe.send(None)


if __name__ == "__main__":
    main()
