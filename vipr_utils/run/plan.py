"""What runs would take here: minutes, memory and disk, by a few seconds of measuring, and sums.

Every figure is of this machine, as busy as it is now. A photo costs what some photos of the data
cost, a network what one with random weights costs at its size. Then

    training = trainings x epochs x photos to fit x step, at most trainings x max_minutes
    embedding = passes x photos x forward
    search = searches x queries x gallery x dimensions x one multiplication

Terms that are small beside these are left out, and so is verification, which notebooks leave out
where it does not fit into max_minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

import pandas as pd
import torch

from vipr_utils.data import catalog, toy, transforms
from vipr_utils.data.store import Photos, build_store, packed_px
from vipr_utils.host import platform
from vipr_utils.host.device import (
    DepthwiseInFloat32,
    autocast,
    compute_dtype,
    cores,
    hardware,
    memory_gb,
    working_device,
)
from vipr_utils.learn import models
from vipr_utils.retrieve import search
from vipr_utils.run.params import Run

SAMPLE = 32  # photos that are packed and looked at
SESSION_MINUTES = {"kaggle": 9 * 60, "colab": 11 * 60}  # both end at 12 hours
STAGES = ["store", "training", "embedding", "search"]
COLUMNS = [*STAGES, "minutes", "memory GB", "GPU GB", "outputs GB", "cache GB"]
KERNEL_GB = 1.5  # a kernel with torch
COPIES = 4  # of the embeddings of all photos: a view's sides, projected, joined
FOUND = "{root}: {n_train:,} gallery photos of {n_products:,} products, {n_test:,} queries"
DEFAULTS = {  # of parameters that a notebook may not have
    "augmentation": "none",
    "batch_size": 0,
    "cache_dir": "",
    "data_root": "",
    "device": "auto",
    "epochs": 0,
    "holdout": 0.0,
    "image_size": 0,
    "max_minutes": 0.0,
    "n_products": inf,
}

# -------------------------------------------------------------------------------------- measured


class PhotoCost(NamedTuple):
    """Of one photo, for networks of some size."""

    pack_s: float  # by all cores
    packed_gb: float
    look_s: float  # of one core, to read it from the store and transform it


class NetworkCost(NamedTuple):
    """Of one image, at some size."""

    parameters: int
    dim: int  # of the features
    forward_s: float
    step_s: float  # of training
    held_gb: float  # by a step: activations


photos_of = cache(catalog.read)  # once a data root: 197,000 files take seconds


@cache
def photo_cost(root: Path, px: int, augmentation: str) -> PhotoCost:
    """Measured on SAMPLE photos."""
    photos, _ = photos_of(root)
    some = photos.sample(SAMPLE, replace=True, random_state=0)
    transform = transforms.augmentation(augmentation, px)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        began = perf_counter()
        store = build_store(some, cache_dir=Path(folder), store_px=packed_px(px))
        packed = perf_counter()
        rows = store.readable.nonzero()[0]
        list(map(Photos(store, rows, transform).__getitem__, range(len(rows))))
        looked = perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
    return PhotoCost(
        pack_s=(packed - began) / SAMPLE,
        packed_gb=size / SAMPLE / 1e9,
        look_s=(looked - packed) / SAMPLE,
    )


@cache
def network_cost(name: str, px: int, device: torch.device, trained: bool) -> NetworkCost:
    """Measured with random weights, on one image, on a GPU on 32; no step if it is not
    trained.
    """
    n = 32 if device.type == "cuda" else 1
    model = models.Embedder(name).train()
    model.to(device, memory_format=torch.channels_last)
    pixels = torch.rand(max(2, n), 3, px, px, device=device).to(memory_format=torch.channels_last)

    def forward(images):
        exact = DepthwiseInFloat32() if model.training else nullcontext()
        with autocast(device, compute_dtype("auto", device, training=model.training)), exact:
            return model(images).sum()

    def step():
        forward(pixels[:n]).backward()
        return next(model.parameters()).grad.sum()

    step_s = held = 0.0
    if trained:
        step_s, half = _seconds(step), pixels.chunk(2)[0]
        held = (_held(forward, pixels) - _held(forward, half)) / len(half)
    model.eval()
    with torch.inference_mode():
        forward_s = _seconds(lambda: forward(pixels[:n]))
    sizes = model.record["parameters"], model.record["embedding_dim"]
    return NetworkCost(*sizes, forward_s / n, step_s / n, held / 1e9)


def _held(forward: Callable, images: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward one, weights as they are computed with."""
    found = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        forward(images)
    return sum(found.values())


@cache
def multiply_s(device: torch.device) -> float:
    """Seconds that a search takes for a query, a gallery photo and a dimension."""
    queries, gallery = torch.rand(1024, 128), torch.rand(16384, 128)
    return _seconds(lambda: search.top_k(queries, gallery, device=device)[0].sum()) / (
        len(queries) * gallery.numel()
    )


def _seconds(work: Callable) -> float:
    """Of one call; where it is short of the third, when all is set up."""
    for _ in range(3):
        began = perf_counter()
        float(work())  # fetched: the device has done it
        took = perf_counter() - began
        if took > 0.3:
            break
    return took


def image_s(device: torch.device, compute_s: float, look_s: float) -> float:
    """Seconds an image, looking at its photo included.

    On a GPU worker processes prepare photos meanwhile, and cards share the work; a CPU does one
    after the other.
    """
    if device.type == "cuda":
        return max(compute_s / torch.cuda.device_count(), look_s / min(cores(), 8))
    return compute_s + look_s


# ------------------------------------------------------------------------------------------ sums


class Work(NamedTuple):
    """What a notebook does, with each of its networks."""

    networks: list[str]
    trainings: int
    passes: float  # of all photos; at another size than image_size they count by their area
    searches: int


def work_of(values: dict, px: int, learned: list[str]) -> Work:
    """As its parameters tell, for the same name means the same everywhere.

    learned: networks that were trained before, the newest last.
    """
    networks = [values[name] for name in ("network", "backbone") if name in values]
    trainings = len(values.get("strategies", []))
    trainings += len(values.get("losses", [])) * len(values.get("distances", []))
    if "most_backbones" in values:
        networks = values["backbones"][: values["most_backbones"] or None]
        trainings = 1
    if "most_runs" in values:
        networks = values["backbones"] + learned[-values["most_runs"] :]

    sizes = [values.get("test_size", 0) or px] * trainings  # what was trained is tested
    sizes += values.get("resolutions", [])
    sizes += values.get("multi_sizes", [])
    sizes += [px] * len(values.get("poolings", []))
    passes = len(values.get("zooms", [1.0])) + sum((size / px) ** 2 for size in sizes)
    searches = 4 * passes + 2 * len(values.get("candidates", []))  # two views, plain and projected
    return Work(networks, trainings, passes, round(searches))


class Setting(NamedTuple):
    """A run's parameters, photos and device."""

    values: dict
    px: int
    root: Path
    data: dict  # as in run.json
    device: torch.device


def plan(todo: list[Run]) -> pd.DataFrame:
    """A row a run: minutes by stage and in all, GB of memory, of the GPU, of outputs and of cache,
    and `refused`: why it cannot end here, '' where it can.

    attrs["found"]: lines on the data and the machine. Raises CatalogError, and RuntimeError for a
    device that does not work.
    """
    todo = [run for run in todo if "data_root" in run.values] or todo  # 09 only reads records
    stores, learned = set(), []
    rows = [_row(run, stores, learned) for run in todo]
    table = pd.DataFrame(rows, [run.name for run in todo])
    here = _limits(DEFAULTS | todo[0].values)
    for what, most in here.items():
        needed = table[what]
        if what in ("outputs GB", "cache GB"):  # disks fill up from run to run
            needed = needed.cumsum()
        table.loc[needed > most, "refused"] += f"{what}: here {most:.0f}; "
    room = ", ".join(f"{what} {most:.0f}" for what, most in here.items())
    table.attrs["found"] = [*table.pop("data").unique(), f"here: {hardware()}, {room}"]
    return table


def _limits(values: dict) -> dict[str, float]:
    """What there is, by columns of the plan."""
    gpu_bytes = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    outputs = platform.output_folder(values["output_dir"])
    return {
        "minutes": SESSION_MINUTES.get(platform.where(), inf),
        "memory GB": memory_gb()[1],
        "GPU GB": gpu_bytes / 1e9,
        "outputs GB": platform.room_gb(outputs),
        "cache GB": platform.room_gb(platform.cache_folder(values["cache_dir"])),
    }


def _row(run: Run, stores: set, learned: list[str]) -> dict:
    """stores and learned: what the runs before it leave; they get what it leaves."""
    values = DEFAULTS | run.values
    root, _ = toy.data_root_or_toy(values["data_root"], values["cache_dir"])
    data = catalog.describe_data(photos_of(root)[0])
    px = values["image_size"] or 224
    setting = Setting(values, px, root, data, working_device(values["device"]))
    work = work_of(values, px, learned)
    tuned = work.networks[: values.get("most_tuned") or None] if work.trainings else []
    if tuned:
        learned += work.networks  # those not tuned have a head

    row = _packing(setting, stores)
    for name in work.networks:
        cost = network_cost(name, px, setting.device, name in learned)
        if name in tuned:
            _add_training(row, setting, work, cost)
        elif not tuned and row["embedding"] > (values["max_minutes"] or inf):
            break  # a choice begins with another network while max_minutes last
        _add_embedding(row, setting, work, cost)
    row["minutes"] = sum(row[stage] for stage in STAGES)
    row["data"] = FOUND.format(**data)
    return row


def _packing(setting: Setting, stores: set) -> dict:
    """A row with the store alone, where none is there."""
    n = setting.data["n_train"] + setting.data["n_test"]
    key = f"{setting.data['fingerprint']}-{n}-*{packed_px(setting.px)}"
    cache_dir = platform.cache_folder(setting.values["cache_dir"])
    if key in stores or any(cache_dir.glob(f"stores/{key}")):
        n = 0
    stores.add(key)
    cost = photo_cost(setting.root, setting.px, "none")
    return dict.fromkeys(COLUMNS, 0.0) | {
        "store": n * cost.pack_s / 60,
        "memory GB": KERNEL_GB,
        "cache GB": n * cost.packed_gb,
        "refused": "",
    }


def _add_training(row: dict, setting: Setting, work: Work, cost: NetworkCost) -> None:
    """Trainings of a network."""
    values, data = setting.values, setting.data
    images = data["n_train"] * (1 - values["holdout"])
    images *= min(1.0, values["n_products"] / data["n_products"])  # of a subset
    look_s = photo_cost(setting.root, setting.px, values["augmentation"]).look_s
    a_pass = images * image_s(setting.device, cost.step_s, look_s) / 60
    limit = values["max_minutes"] or inf
    if a_pass > limit:
        row["refused"] = f"max_minutes {limit:g} end before a pass ({a_pass:.0f}); "
    row["training"] += work.trainings * min(limit, values["epochs"] * a_pass)

    weights = 4 * cost.parameters / 1e9
    row["outputs GB"] += (work.trainings + 3) * weights  # models, and a checkpoint meanwhile
    needed = 4 * weights + values["batch_size"] * cost.held_gb  # gradients and two moments too
    where, before = ("GPU GB", 0.0) if setting.device.type == "cuda" else ("memory GB", KERNEL_GB)
    row[where] = max(row[where], before + needed)


def _add_embedding(row: dict, setting: Setting, work: Work, cost: NetworkCost) -> None:
    """All photos through a network, and searches with their embeddings."""
    n_train, n_test = setting.data["n_train"], setting.data["n_test"]
    n = n_train + n_test
    look_s = photo_cost(setting.root, setting.px, "none").look_s
    a_pass = n * image_s(setting.device, cost.forward_s, look_s) / 60
    row["embedding"] += work.passes * a_pass
    multiplied = n_train * n_test * cost.dim * multiply_s(setting.device)
    row["search"] += work.searches * multiplied / 60
    embeddings = n * cost.dim * 4 / 1e9
    row["cache GB"] += work.passes * embeddings
    row["memory GB"] = max(row["memory GB"], KERNEL_GB + COPIES * embeddings)
