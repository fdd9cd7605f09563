"""The training loop, with checkpoints that continue bit for bit.

Everything random is a pure function of (seed, epoch, step): batches come from
`sampler.batches(epoch)`, each photo's augmentation from (seed, epoch, row), dropout from
(seed, step). A checkpoint therefore holds no random state, and a run that was killed anywhere ends
with the weights of one that never was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from vipr_utils.data import store
from vipr_utils.data.store import Photos
from vipr_utils.host.device import autocast, compute_dtype, cores, tune
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.learn.sampling import ShuffledSampler

SAVED = ("identity", "epoch", "batch", "updates", "seconds", "best", "history", "results")


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training, then how it runs: keyword arguments of `fit`."""

    epochs: int
    lr: float  # of the backbone
    head_lr: float = 0.0  # of neck and criterion; 0 takes lr
    layer_decay: float = 1.0  # each layer's rate over that of the next; 1 is one rate for all
    optimizer: str = "adamw"  # adamw, adam
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # cosine (with warm-up), multistep, constant
    warmup: float = 0.05  # share of all steps
    milestones: tuple[int, ...] = ()  # epochs, for multistep
    gamma: float = 0.1  # factor at each milestone
    frozen_epochs: int = 0  # epochs in which only neck and criterion learn
    clip_norm: float = 0.0  # 0 clips nothing
    ema_decay: float = 0.0  # of the averaged weights that are validated and kept; 0 has none
    validate_every: int = 1  # epochs
    precision: str = "auto"  # see compute_dtype
    seed: int = 0
    max_minutes: float = 0.0  # from the first start, over restarts; 0 is no limit
    checkpoint_minutes: float = 5.0
    progress: bool = True  # a line an epoch


@dataclass(frozen=True)
class _Job:
    """One call of `fit`, as it is sent to other processes."""

    model: models.Embedder
    criterion: Callable
    photos: Photos
    sampler: object
    recipe: Recipe
    folder: Path
    device: torch.device
    validate: Callable | None
    processes: int


def fit(
    model: models.Embedder,
    criterion,
    photos: Photos,
    sampler,
    *,
    folder: Path,
    device: torch.device = torch.device("cpu"),
    validate=None,  # model -> dict with map_at_5
    processes: int = 1,
    **recipe,
) -> pd.DataFrame:
    """Train `model` in place and return its history, one row an epoch.

    criterion(embeddings, labels) -> (loss, share of active pairs or accuracy); an nn.Module's
    parameters are trained. recipe: the fields of `Recipe`; epochs and lr must be given.
    With `validate` the epoch with the best map_at_5 is kept, else the last. When max_minutes are
    used up training stops, keeps what it has, and returns: see `cut_short`.
    processes: each embeds its part of every batch, on a GPU of its own or on the CPU; loss and
    gradients are those of the whole batch. All that is given is sent to them by pickle.
    Raises Diverged when the loss is not finite; the last checkpoint stays. ValueError for more
    processes than GPUs, and for what cannot be pickled.
    """
    parts = (model, criterion, photos, sampler, Recipe(**recipe), Path(folder), device, validate)
    job = _Job(*parts, processes)
    if processes > 1 and not distributed.is_initialized():
        return _launch(job)
    training = _Training(job)
    training.resume()
    out_of_time = False
    while training.epoch < job.recipe.epochs and not out_of_time:
        out_of_time = training.run_epoch()
        row = training.end_epoch(out_of_time)
        if job.recipe.progress and training.leads:
            print(_line(row), flush=True)
        if not out_of_time:
            training.save()
    return training.finish()


def cut_short(history: pd.DataFrame) -> str:
    """'in epoch 3 of 8' when max_minutes ended this training before its schedule did, '' else."""
    last = history.iloc[-1]
    return f"in epoch {last.epoch:.0f} of {last.epochs:.0f}" if last.cut_short else ""


class _Network(nn.Module):
    """Model and criterion in one forward pass over the photos of all processes."""

    def __init__(self, model: nn.Module, criterion, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.criterion, self.dtype = model, criterion, dtype

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor):
        """(loss, share of active pairs or accuracy, embeddings without gradient)."""
        with autocast(pixels.device, self.dtype):
            embeddings = self.model(pixels)
        if distributed.is_initialized():
            # DistributedDataParallel averages over processes. The criterion's gradient is the same
            # in all of them; the model's is by this process's photos alone, and shall be summed.
            processes = distributed.get_world_size()
            embeddings.register_hook(lambda gradient: gradient * processes)
            embeddings, labels = _gathered(embeddings), _gathered(labels)
        loss, active = self.criterion(embeddings, labels)
        return loss, active, embeddings.detach()


class _Training:
    """A training under way: weights, optimiser, scaler, average, position and history."""

    def __init__(self, job: _Job) -> None:
        self.job, self.recipe, self.device = job, job.recipe, job.device
        self.leads = not distributed.is_initialized() or distributed.get_rank() == 0
        self.dtype = compute_dtype(self.recipe.precision, self.device, training=True)
        self.model = job.model.to(self.device, memory_format=torch.channels_last)
        self.criterion = job.criterion
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(self.device)
        self.optimizer = _optimizer(self.model, self.criterion, self.recipe)
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.average = None
        if self.recipe.ema_decay:
            self.average = ModelEmaV3(self.model, decay=self.recipe.ema_decay, use_warmup=True)
        self.identity = _identity(job, self.dtype)
        self.start = self.last_saved = time.monotonic()
        self.epoch = self.batch = self.updates = 0
        self.seconds, self.best = 0.0, -1.0  # seconds of the runs before this one
        self.history: list[dict] = []
        self.results: list[tuple] = []  # (loss, active, random distance) of this epoch's batches
        self.steps = 0  # of this epoch
        self.network: nn.Module | None = None

    def spent(self) -> float:
        """Seconds since the first start."""
        return self.seconds + time.monotonic() - self.start

    def run_epoch(self) -> bool:
        """Train to the end of the epoch; True when time ran out before or with it."""
        job = self.job
        batches = _shares(job.sampler.batches(self.epoch), job.processes)
        if not batches:
            raise ValueError("the sampler gives no batch: use a smaller batch_size or more images")
        self.steps = len(batches)
        self._begin_epoch()
        job.photos.set_epoch(self.epoch)
        rest = batches[self.batch :]
        for pixels, labels, _ in store.loader(job.photos, batch_sampler=rest, device=self.device):
            seed = self.recipe.seed * 1_000_003 + self.epoch * self.steps + self.batch
            self.step(pixels, labels, factor=self._factor(self.batch), seed=seed)
            if self._out_of_time():
                return True
            if time.monotonic() - self.last_saved > self.recipe.checkpoint_minutes * 60:
                self.save()
        return False

    def _begin_epoch(self) -> None:
        self.model.train()
        frozen = self.epoch < self.recipe.frozen_epochs
        self.model.backbone.requires_grad_(not frozen)
        if frozen:
            self.model.backbone.eval()  # batch statistics stay those of pretraining
        if self.network is None or self.epoch == self.recipe.frozen_epochs:
            self.network = _Network(self.model, self.criterion, self.dtype)
            if distributed.is_initialized():
                unused = self.model.pooling is not None  # layers of the backbone's own head
                self.network = DistributedDataParallel(self.network, find_unused_parameters=unused)

    def _factor(self, batch: int) -> float:
        """The factor on the learning rates at a batch of this epoch."""
        recipe = self.recipe
        return rate(
            self.epoch * self.steps + batch,
            recipe.epochs * self.steps,
            recipe.schedule,
            recipe.warmup,
            [milestone * self.steps for milestone in recipe.milestones],
            recipe.gamma,
        )

    def step(
        self, pixels: torch.Tensor, labels: torch.Tensor, *, factor: float = 1.0, seed: int = 0
    ) -> None:
        """One update by the loss of a whole batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        pixels = pixels.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        loss, active, embeddings = self.network(pixels, labels)
        self.scaler.scale(loss).backward()
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"loss is {loss.item()} in epoch {self.epoch}, batch {self.batch}: lower lr or set "
                "clip_norm (1.0 is usual); the last checkpoint is kept"
            )
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.batch += 1
        self.updates += 1
        if self.average is not None:
            self.average.update(self.model, step=self.updates)
        half = len(embeddings) // 2  # neighbours in a P x K batch are one product
        similarity = (embeddings[:half] * embeddings[-half:]).sum(1).mean()
        self.results.append((loss.item(), active, 1 - similarity.item()))

    def _out_of_time(self) -> bool:
        """Whether max_minutes are used up, by the first process's clock."""
        limit = self.recipe.max_minutes * 60
        if not limit:
            return False
        late = torch.tensor(int(self.spent() > limit), device=self.device)
        if distributed.is_initialized():
            distributed.broadcast(late, 0)
        return bool(late)

    def end_epoch(self, out_of_time: bool) -> dict:
        """Validate and go to the next epoch; the row of this one, now in the history."""
        epochs = self.recipe.epochs
        last = self.epoch + 1 == epochs
        loss, active, random_distance = np.mean(self.results, axis=0).tolist()
        row = {
            "epoch": self.epoch + 1,
            "loss": loss,
            "active": active,
            "random_distance": random_distance,
            "lr": self.recipe.lr * self._factor(self.batch - 1),
            "seconds": self.spent(),
            "epochs": epochs,
            "cut_short": out_of_time and not (last and self.batch == self.steps),
        }
        due = last or out_of_time or (self.epoch + 1) % self.recipe.validate_every == 0
        if self.leads and self.job.validate and due:
            self._validate(row)
        self.epoch, self.batch, self.results = self.epoch + 1, 0, []
        self.history.append(row)
        if self.leads:
            _warn_of_collapse(row, of_pairs=not isinstance(self.criterion, nn.Module))
        return row

    def evaluated(self) -> nn.Module:
        """What is validated and kept: the averaged weights where there are some."""
        return self.model if self.average is None else self.average.module

    def _validate(self, row: dict) -> None:
        scores = self.job.validate(self.evaluated())
        for name, value in scores.items():
            if isinstance(value, (int, float)):
                row[name] = float(value)
        if row.get("map_at_5", -1.0) > self.best:
            self.best = row["map_at_5"]
            models.save(self.evaluated(), self.job.folder / "best.pt")

    def finish(self) -> pd.DataFrame:
        """Put the weights to keep into the model; the first process writes the history."""
        self.model.backbone.requires_grad_(True)
        history = pd.DataFrame(self.history)
        if not self.leads:
            return history
        best = self.job.folder / "best.pt"
        kept = models.load(best) if self.best >= 0 and best.exists() else self.evaluated()
        self.model.load_state_dict(kept.state_dict())
        self.model.eval()
        for file in ("checkpoint.pt", "best.pt"):
            (self.job.folder / file).unlink(missing_ok=True)
        with whole_file(self.job.folder / "history.csv") as part:
            history.to_csv(part, index=False)
        return history

    def save(self) -> None:
        """Write the checkpoint."""
        if not self.leads:
            return
        data = {name: getattr(self, name) for name in SAVED} | {"seconds": self.spent()}
        for name, part in self._parts().items():
            data[name] = part.state_dict()
        with whole_file(self.job.folder / "checkpoint.pt") as path:
            torch.save(data, path)
        self.last_saved = time.monotonic()

    def resume(self) -> None:
        """Continue from a checkpoint of the same settings; one of others is left behind."""
        path = self.job.folder / "checkpoint.pt"
        if not path.exists():
            return
        data = torch.load(path, map_location=self.device, weights_only=True)
        if data["identity"] != self.identity:
            return
        for name in SAVED:
            setattr(self, name, data[name])
        for name, part in self._parts().items():
            part.load_state_dict(data[name])

    def _parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.average is not None:
            parts["average"] = self.average
        if isinstance(self.criterion, nn.Module):
            parts["criterion"] = self.criterion
        return parts


def _optimizer(model: models.Embedder, criterion, recipe: Recipe) -> torch.optim.Optimizer:
    """Groups of parameters with their `base_lr`: neck and criterion at head_lr, the rest at lr.

    No weight decay on biases, norms, GeM's p, class tokens and position embeddings. With
    layer_decay the backbone's rates fall from its last layer to its first (Clark et al. 2020,
    arXiv:2003.10555).
    """
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if recipe.optimizer not in kinds:
        raise ValueError(f"optimizer {recipe.optimizer!r} is unknown: use one of {tuple(kinds)}")
    model.requires_grad_(True)  # a training that was stopped may have left the backbone frozen
    decay, backbone = recipe.weight_decay, model.backbone
    spared = getattr(backbone, "no_weight_decay", set)()
    if recipe.layer_decay == 1.0:
        groups = param_groups_weight_decay(backbone, decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(
            backbone, decay, no_weight_decay_list=spared, layer_decay=recipe.layer_decay
        )
    if model.pooling is not None:
        groups += param_groups_weight_decay(model.pooling, decay)
    for group in groups:
        group["base_lr"] = recipe.lr * group.get("lr_scale", 1.0)
    learns = isinstance(criterion, nn.Module)
    heads = nn.ModuleList([model.neck, criterion] if learns else [model.neck])
    head_groups = param_groups_weight_decay(heads, decay)
    for group in head_groups:
        group["base_lr"] = recipe.head_lr or recipe.lr
    return kinds[recipe.optimizer](groups + head_groups, lr=recipe.lr)


def _identity(job: _Job, dtype: torch.dtype) -> str:
    """A hash of all that decides the outcome, so that only its own run continues a checkpoint."""
    no_matter = {"max_minutes": 0.0, "checkpoint_minutes": 0.0, "progress": False}
    recipe = replace(job.recipe, precision=str(dtype), **no_matter)
    settings = [asdict(recipe), job.processes, job.model.record]
    arrays = [np.asarray(job.photos.rows)]
    for epoch in (0, max(0, job.recipe.epochs - 1)):
        arrays += job.sampler.batches(epoch)
    arrays += [tensor.cpu().numpy() for tensor in job.model.state_dict().values()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ------------------------------------------------------------------------------ several processes

NOT_SENT = (
    "fit with processes > 1 sends model, criterion, photos, sampler and validate to other "
    "processes by pickle, which failed ({error}): use functions and classes of an importable "
    "module, no lambda and nothing defined in a notebook, or processes=1"
)


def _shares(batches: list[np.ndarray], processes: int) -> list[np.ndarray]:
    """This process's part of every batch: parts are alike, what cannot be divided is left out."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    shares = []
    for batch in batches:
        length = len(batch) // processes
        if length > 1:  # batch statistics need two
            shares.append(batch[rank * length : (rank + 1) * length])
    return shares


def _gathered(values: torch.Tensor) -> torch.Tensor:
    """Those of all processes, (B, ...) -> (P * B, ...), with this process's own in the graph."""
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values.detach().contiguous())
    parts[distributed.get_rank()] = values
    return torch.cat(parts)


def _launch(job: _Job) -> pd.DataFrame:
    """The history of `job` by several processes; its model and criterion get their weights."""
    gpus = torch.cuda.device_count()
    if job.device.type == "cuda" and job.processes > gpus:
        raise ValueError(
            f"processes={job.processes} need a GPU each, this machine has {gpus}: "
            f"use processes={gpus}"
        )
    with whole_file(job.folder / "job.pt") as path:
        try:
            torch.save(job, path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(NOT_SENT.format(error=error)) from error
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.processes,
        run_id="vipr",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        history = _launched(config, job.folder)
    finally:
        (job.folder / "job.pt").unlink()
    trained = job.folder / "trained.pt"
    model, criterion = torch.load(trained, weights_only=False, map_location="cpu")
    trained.unlink()
    job.model.load_state_dict(model.state_dict())
    job.model.to(job.device).eval()
    if isinstance(criterion, nn.Module):
        job.criterion.load_state_dict(criterion.state_dict())
    return history


def _launched(config: LaunchConfig, folder: Path) -> pd.DataFrame:
    """Run `_work` in all processes; the first that dies ends the others, with its error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return elastic_launch(config, _work)(folder)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):  # of an exception; of a signal it is a text
            message = message["message"]
        kind = Diverged if message.startswith("Diverged") else RuntimeError
        raise kind(f"training process {rank} ended: {message}") from error
    finally:  # the launcher leaves its own behind
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _work(folder: Path) -> pd.DataFrame:
    """One of the processes that train together; the first leaves trained.pt in the folder."""
    try:
        job = torch.load(folder / "job.pt", weights_only=False, map_location="cpu")
    except AttributeError as error:
        raise ValueError(NOT_SENT.format(error=error)) from error
    tune(max(1, cores() // job.processes))
    backend, device = "gloo", job.device
    if device.type == "cuda":
        backend, device = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait as long as the first validates.
    distributed.init_process_group(backend, timeout=timedelta(hours=3))
    history = fit(
        *(job.model, job.criterion, job.photos, job.sampler),
        folder=folder,
        device=device,
        validate=job.validate,
        processes=job.processes,
        **asdict(job.recipe),
    )
    if distributed.get_rank() == 0:
        torch.save((job.model, job.criterion), folder / "trained.pt")
    distributed.barrier()  # the first still validates and writes
    distributed.destroy_process_group()
    return history


# ------------------------------------------------------------------------------- the head alone


def fit_head(
    model: models.Embedder,
    criterion: nn.Module,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int = 40,
    lr: float = 4e-3,
    batch_size: int = 256,
    weight_decay: float = 1e-4,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
) -> pd.DataFrame:
    """Train neck and criterion on cached features (N, C), in place; loss and accuracy by epoch.

    features: embedding.embed(..., features=True) of the frozen backbone. The best return per GPU
    hour in Kaggle's Universal Image Embedding (2022). The neck comes back to where the model is.
    """
    if isinstance(model.neck, nn.Identity):
        raise ValueError(
            "fit_head trains a neck and the model has none: create it with embedding_dim"
        )
    home = next(model.parameters()).device
    learned = nn.ModuleList([model.neck.train(), criterion]).to(device)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, weight_decay=weight_decay)
    inputs = torch.as_tensor(features, dtype=torch.float32, device=device)
    targets = torch.as_tensor(labels, device=device)
    sampler = ShuffledSampler(np.arange(len(inputs)), batch_size=batch_size, seed=seed)
    steps = len(sampler.batches(0))
    results = []
    for epoch in range(epochs):
        for batch, rows in enumerate(sampler.batches(epoch)):
            factor = rate(epoch * steps + batch, epochs * steps, "cosine", 0.05, [], 0.1)
            optimizer.param_groups[0]["lr"] = lr * factor
            embeddings = nn.functional.normalize(model.neck(inputs[rows]), dim=1)
            loss, accuracy = _head_step(optimizer, criterion, embeddings, targets[rows])
            results.append((epoch + 1, loss, accuracy))
    model.neck.to(home).eval()
    by_batch = pd.DataFrame(results, columns=["epoch", "loss", "active"])
    return by_batch.groupby("epoch", as_index=False).mean()


def _head_step(optimizer, criterion, embeddings, labels) -> tuple[float, float]:
    """One update; (loss, accuracy)."""
    loss, accuracy = criterion(embeddings, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item(), accuracy


def rate(
    step: int, steps: int, schedule: str, warmup: float, milestones: list[int], gamma: float
) -> float:
    """The factor on the learning rate at a step, in (0, 1].

    cosine: linear warm-up over `warmup * steps`, then half a cosine down to 0 (Loshchilov, Hutter
    2017, arXiv:1608.03983). multistep: gamma to the number of milestones (in steps) passed.
    constant: 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "multistep":
        return gamma ** sum(step >= m for m in milestones)
    if schedule == "cosine":
        rise = max(1.0, warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))
    raise ValueError(f"schedule {schedule!r} is unknown: use 'cosine', 'multistep' or 'constant'")


def _warn_of_collapse(row: dict, of_pairs: bool) -> None:
    """Warn of embeddings that fell together, or (losses of pairs) of nothing left to learn from."""
    if row["random_distance"] < 0.05:
        warnings.warn(
            f"collapse: random pairs lie {row['random_distance']:.3f} apart (cosine; 1 is usual). "
            "Every product looks alike to the network: lower lr, use mining='semi_hard' or 'all' "
            "at first, or a larger margin.",
            stacklevel=3,
        )
    elif of_pairs and row["active"] < 0.001:
        warnings.warn(
            f"only {row['active']:.2%} of the pairs or triplets are still active: the others teach "
            "nothing. Use a larger margin, mining='batch_hard', or more products in a batch.",
            stacklevel=3,
        )


def _line(row: dict) -> str:
    line = (
        f"epoch {row['epoch']}/{row['epochs']}  loss {row['loss']:.4f}  "
        f"active {row['active']:.2f}  {row['seconds']:.0f} s"
    )
    if "map_at_5" in row:
        line += f"  mAP@5 {row['map_at_5']:.3f}"
    if row["cut_short"]:
        line += "\nCUT SHORT: max_minutes was used up before the schedule ended"
    return line
