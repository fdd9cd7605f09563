"""The training loop, with checkpoints that continue bit for bit.

Everything random is a pure function of (seed, epoch, step): batches come from
`sampler.batches(epoch)`, each photo's augmentation from (seed, epoch, row, occurrence), dropout
from (seed, step). A checkpoint therefore holds no random state, and a run that was killed anywhere
ends with the weights of one that never was.
"""

from __future__ import annotations

import math
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from vipr_utils.data import store
from vipr_utils.data.store import Photos
from vipr_utils.host.device import autocast, compute_dtype, cores, tune
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.learn.sampling import ShuffledSampler, with_occurrences

SAVED = (
    "identity",
    "epoch",
    "batch",
    "steps",
    "stage",
    "used",
    "validation_seconds",
    "best",
    "lr",
    "history",
    "results",
)
START_UP = 0.05  # share of max_minutes that may pass before the clock drives the schedule
NOT_DECISIVE = ("folder", "validate", "device", "max_minutes", "checkpoint_minutes")
NOT_SENT = (
    "fit with processes > 1 sends model, criterion, photos, sampler and validate to other "
    "processes by pickle, which failed ({}): use functions and classes of an importable module, "
    "no lambda and nothing defined in a notebook, or processes=1"
)


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training, then how it runs: keyword arguments of `fit`."""

    epochs: int
    lr: float  # of the backbone
    folder: Path  # of checkpoint and history
    head_lr: float = 0.0  # of neck and criterion; 0 takes lr
    layer_decay: float = 1.0  # each layer's rate over that of the next; 1 is one rate for all
    optimizer: str = "adamw"  # timm's name: adamw, adam ...
    weight_decay: float = 1e-4
    milestones: tuple | None = None  # epochs at which rates fall to a tenth; None takes `rate`
    frozen_epochs: int = 0  # epochs in which only neck and criterion learn
    ema_decay: float = 0.0  # of the averaged weights that are validated and kept; 0 has none
    validate_every: int = 1  # epochs
    precision: str = "auto"  # see compute_dtype
    seed: int = 0
    processes: int = 1
    validate: Callable | None = None  # model -> dict with map_at_5
    device: torch.device = torch.device("cpu")
    max_minutes: float = 0.0  # the schedule fits into, over restarts; 0 is no limit
    checkpoint_minutes: float = 5.0


def fit(model: models.Embedder, criterion, photos: Photos, sampler, **recipe) -> pd.DataFrame:
    """Train `model` in place and return its history, one row an epoch.

    criterion(embeddings, labels) -> (loss, share of active pairs or accuracy); an nn.Module's
    parameters are trained. recipe: the fields of `Recipe`; epochs, lr and folder must be given.
    With `validate` the epoch with the best map_at_5 is kept, else the last. Where max_minutes
    (validation included) do not allow all epochs, the clock drives the schedule to its end, and
    `cut_short` says so; where they do they change nothing.
    processes: each embeds its part of every batch, on a GPU of its own or on the CPU; loss and
    gradients are those of the whole batch. All that is given is sent to them by pickle.
    Raises Diverged when the loss is not finite; the last checkpoint stays. ValueError for more
    processes than GPUs, and for what cannot be pickled.
    """
    recipe = Recipe(**recipe)
    if recipe.processes > 1 and not distributed.is_initialized():
        return _by_processes(model, criterion, photos, sampler, recipe)
    training = _Training(model, criterion, photos, sampler, recipe)
    training.resume()
    while not training.done():
        training.run_epoch()
        row = training.end_epoch()
        if training.leads:
            print(_line(row), flush=True)
        if not training.done():
            training.save()
    return training.finish()


def cut_short(history: pd.DataFrame) -> str:
    """'to 3.4 of 8 epochs, fitted into 29 minutes' where max_minutes did not allow all; '' else."""
    last = history.iloc[-1]
    if not last.cut_short:
        return ""
    passes = math.floor(10 * last.passes) / 10
    return f"to {passes:g} of {last.epochs} epochs, fitted into {last.max_minutes:g} minutes"


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
            # The gradient that comes back is summed over the processes' equal losses, and
            # DistributedDataParallel takes the mean: together that of one process's whole batch.
            embeddings, labels = torch.cat(all_gather(embeddings)), torch.cat(all_gather(labels))
        loss, active = self.criterion(embeddings, labels)
        return loss, active, embeddings.detach()


class _Training:
    """A training under way: weights, optimiser, scaler, average, position and history."""

    def __init__(self, model, criterion, photos: Photos, sampler, recipe: Recipe) -> None:
        self.model, self.photos, self.sampler, self.recipe = model, photos, sampler, recipe
        self.folder, self.leads = Path(recipe.folder), _rank() == 0
        self.dtype = compute_dtype(recipe.precision, recipe.device, training=True)
        self.network = _Network(model, criterion, self.dtype)
        self.network.to(recipe.device, memory_format=torch.channels_last)
        self.optimizer = _optimizer(model, criterion, recipe)
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(recipe.device.type, enabled=half)
        self.parts = [self.network, self.optimizer, self.scaler]
        self.average, self.evaluated = None, model  # what is validated and kept
        if recipe.ema_decay:
            self.average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
            self.evaluated = self.average.module
            self.parts.append(self.average)
        self.identity = _identity(model, photos, sampler, recipe, self.dtype)
        self.start = self.last_saved = time.monotonic()
        self.epoch, self.batch, self.steps = 0, 0, 1
        self.stage = 0  # the sampler's epoch: the schedule's, and another one each time
        self.used = 0.0  # share of max_minutes
        self.validation_seconds = 0.0  # the longest
        self.best, self.lr = -1.0, recipe.lr
        self.history: list[dict] = []
        self.results: list[tuple] = []  # (loss, active, random distance) of this epoch's batches

    def position(self) -> float:
        """Epochs of the schedule that are over: those stepped through, or the clock's if further.

        The clock's are 0 at START_UP and all when max_minutes are used up, so that a training
        which ends in time at an even pace is never ahead of its own steps.
        """
        stepped = self.epoch + self.batch / self.steps
        by_clock = (self.used - START_UP) / (1 - START_UP)
        return max(stepped, by_clock * self.recipe.epochs)

    def done(self) -> bool:
        return self.position() >= self.recipe.epochs

    def read_clock(self) -> None:
        """Bring `used` up to date by the first process's clock; the last validation is set aside.

        Before the first step nothing is used: there is at least one.
        """
        limit = self.recipe.max_minutes * 60
        if not limit:
            return
        trainable = max(limit - self.validation_seconds, 1e-9)
        used = torch.tensor(self.spent() / trainable, device=self.recipe.device)
        if distributed.is_initialized():
            distributed.broadcast(used, 0)
        self.used = max(self.used, used.item())

    def begin_epoch(self) -> list[np.ndarray]:
        """This process's part of the epoch's batches, with the network ready for them."""
        whole = self.sampler.batches(self.stage)
        batches = _shares(with_occurrences(whole), self.recipe.processes) if whole else []
        if not batches:
            raise ValueError("the sampler gives no batch of 2 images or more: change batch_size")
        self.steps = len(batches)
        self.photos.set_epoch(self.epoch)
        self._freeze(self.position() < self.recipe.frozen_epochs)
        return batches

    def _freeze(self, frozen: bool) -> None:
        """Ready all for training, or all but the backbone."""
        self.frozen = frozen
        self.model.train()
        # The batch statistics of a frozen backbone stay those of pretraining.
        self.model.backbone.requires_grad_(not frozen).train(not frozen)
        self.forward = self.network
        if distributed.is_initialized():
            unused = self.model.pooling is not None  # layers of the backbone's own head
            self.forward = DistributedDataParallel(self.network, find_unused_parameters=unused)

    def run_epoch(self) -> None:
        """Train to the end of the epoch or of the schedule."""
        rest = self.begin_epoch()[self.batch :]
        loader = store.loader(self.photos, batch_sampler=rest, device=self.recipe.device)
        for pixels, labels, _ in loader:
            self.step(pixels, labels)
            self.read_clock()
            if self.done():
                return
            if time.monotonic() - self.last_saved > self.recipe.checkpoint_minutes * 60:
                self.save()

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        """One update by the loss of a whole batch."""
        recipe, position = self.recipe, self.position()
        stepped = self.epoch * self.steps + self.batch
        if self.frozen and position >= recipe.frozen_epochs:  # within an epoch, by the clock
            self._freeze(False)
        if recipe.milestones is None:
            factor = rate(position * self.steps, recipe.epochs * self.steps)
        else:
            factor = 0.1 ** sum(position >= milestone for milestone in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.lr = recipe.lr * factor
        pixels = pixels.to(recipe.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(recipe.device, non_blocking=True)
        self.optimizer.zero_grad()
        torch.manual_seed(recipe.seed * 1_000_003 + stepped)
        loss, active, embeddings = self.forward(pixels, labels)
        self.scaler.scale(loss).backward()
        if not loss.isfinite():
            raise Diverged(
                f"loss is {loss.item()} in epoch {self.epoch}, batch {self.batch}: lower lr; the "
                "last checkpoint is kept"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.batch += 1
        if self.average is not None:
            self.average.update(self.model, step=stepped + 1)
        half = len(embeddings) // 2  # neighbours in a P x K batch are one product
        similarity = (embeddings[:half] * embeddings[-half:]).sum(1).mean()
        self.results.append((loss.item(), active, 1 - similarity.item()))

    def spent(self) -> float:
        """Seconds since the first start."""
        return time.monotonic() - self.start

    def end_epoch(self) -> dict:
        """Validate and go to the next epoch; the row of this one, now in the history."""
        recipe, done = self.recipe, self.done()
        passes = self.epoch + self.batch / self.steps
        loss, active, random_distance = np.mean(self.results, axis=0).tolist()
        self.epoch, self.batch, self.results = self.epoch + 1, 0, []
        row = {
            "epoch": self.epoch,
            "loss": loss,
            "active": active,
            "random_distance": random_distance,
            "lr": self.lr,
            "seconds": self.spent(),
            "epochs": recipe.epochs,
            "passes": passes,
            "max_minutes": recipe.max_minutes,
        }
        self.history.append(row)
        if recipe.validate and (done or self.epoch % recipe.validate_every == 0):
            if self.leads:
                self._validate(row)
            self.read_clock()
        row["cut_short"] = self.done() and passes < recipe.epochs
        self.stage = max(self.stage + 1, int(self.position()))
        if self.leads:
            _warn_of_collapse(row, of_pairs=not isinstance(self.network.criterion, nn.Module))
        return row

    def _validate(self, row: dict) -> None:
        start = time.monotonic()
        row["map_at_5"] = float(self.recipe.validate(self.evaluated)["map_at_5"])
        self.validation_seconds = max(self.validation_seconds, time.monotonic() - start)
        if row["map_at_5"] > self.best:
            self.best = row["map_at_5"]
            models.save(self.evaluated, self.folder / "best.pt")

    def finish(self) -> pd.DataFrame:
        """Put the weights to keep into the model; the first process writes the history."""
        self.model.backbone.requires_grad_(True)
        history = pd.DataFrame(self.history)
        if not self.leads:
            return history
        kept = models.load(self.folder / "best.pt") if self.best >= 0 else self.evaluated
        self.model.load_state_dict(kept.state_dict())
        self.model.eval()
        for file in ("checkpoint.pt", "best.pt"):
            (self.folder / file).unlink(missing_ok=True)
        with whole_file(self.folder / "history.csv") as part:
            history.to_csv(part, index=False)
        return history

    def save(self) -> None:
        """Write the checkpoint."""
        if not self.leads:
            return
        data = {name: getattr(self, name) for name in SAVED} | {"seconds": self.spent()}
        data["parts"] = [part.state_dict() for part in self.parts]
        with whole_file(self.folder / "checkpoint.pt") as path:
            torch.save(data, path)
        self.last_saved = time.monotonic()

    def resume(self) -> None:
        """Continue from a checkpoint of the same settings; one of others is left behind."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        data = torch.load(path, map_location=self.recipe.device, weights_only=True)
        if data["identity"] != self.identity:
            return
        self.start -= data["seconds"]
        for name in SAVED:
            setattr(self, name, data[name])
        for part, state in zip(self.parts, data["parts"]):
            part.load_state_dict(state)


def _optimizer(model: models.Embedder, criterion, recipe: Recipe) -> torch.optim.Optimizer:
    """Groups of parameters with their `base_lr`: neck and criterion at head_lr, the rest at lr.

    No weight decay on biases, norms, GeM's p, class tokens and position embeddings. With
    layer_decay the backbone's rates fall from its last layer to its first (Clark et al. 2020,
    arXiv:2003.10555).
    """
    model.requires_grad_(True)  # a training that was stopped may have left the backbone frozen
    optimizer = create_optimizer_v2(
        model.backbone,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        layer_decay=None if recipe.layer_decay == 1.0 else recipe.layer_decay,
    )
    head_lr = recipe.head_lr or recipe.lr
    for part, lr in ((model.pooling, recipe.lr), (model.neck, head_lr), (criterion, head_lr)):
        if isinstance(part, nn.Module):
            for group in param_groups_weight_decay(part, recipe.weight_decay):
                optimizer.add_param_group(group | {"lr": lr})
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"] * group.get("lr_scale", 1.0)
    return optimizer


def rate(step: int, steps: int) -> float:
    """The factor on the learning rate at a step, in (0, 1].

    Linear warm-up over a twentieth of the steps, then half a cosine down to 0 (Loshchilov, Hutter
    2017, arXiv:1608.03983).
    """
    rise = max(1.0, 0.05 * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def _identity(model, photos: Photos, sampler, recipe: Recipe, dtype: torch.dtype) -> str:
    """A hash of all that decides the outcome, so that only its own run continues a checkpoint."""
    settings = vars(recipe) | {"precision": str(dtype), "record": model.record, "saved": SAVED}
    for name in NOT_DECISIVE:
        del settings[name]
    shown = [photos.rows, *sampler.batches(0), *sampler.batches(recipe.epochs - 1)]
    weights = [tensor.cpu().numpy() for tensor in model.state_dict().values()]
    return joblib.hash([settings, shown, weights])


# ------------------------------------------------------------------------------ several processes


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _shares(batches: list[np.ndarray], processes: int) -> list[np.ndarray]:
    """This process's part of every batch: parts are alike, what cannot be divided is left out."""
    shares = []
    for batch in batches:
        length = len(batch) // processes
        if length > 1:  # batch statistics need two
            shares.append(batch[_rank() * length : (_rank() + 1) * length])
    return shares


def _by_processes(model, criterion, photos: Photos, sampler, recipe: Recipe) -> pd.DataFrame:
    """The history of a training by several; model and criterion get their weights."""
    gpus = torch.cuda.device_count()
    if recipe.device.type == "cuda" and recipe.processes > gpus:
        raise ValueError(
            f"processes={recipe.processes} need a GPU each, this machine has {gpus}: "
            f"use processes={gpus}"
        )
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.pt")
        try:
            torch.save((model, criterion, photos, sampler, recipe), job)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(NOT_SENT.format(error)) from error
        try:
            spawn(_work, (job,), nprocs=recipe.processes)
        except ProcessException as error:
            message = str(error).strip().splitlines()[-1]
            kind = Diverged if f"{Diverged.__name__}: " in message else RuntimeError
            raise kind(f"training process {error.error_index} ended: {message}") from error
        *trained, history = torch.load(job, weights_only=False, map_location="cpu")
    for given, learned in zip((model, criterion), trained):
        if isinstance(given, nn.Module):
            given.load_state_dict(learned.state_dict())
    model.to(recipe.device).eval()
    return history


def _work(rank: int, job: Path) -> None:
    """One of the processes that train together; the first leaves what it trained in job's place."""
    try:
        *parts, recipe = torch.load(job, weights_only=False, map_location="cpu")
    except AttributeError as error:
        raise ValueError(NOT_SENT.format(error)) from error
    tune(max(1, cores() // recipe.processes))
    backend, device = "gloo", recipe.device
    if device.type == "cuda":
        backend, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        store=distributed.FileStore(f"{job}.store", recipe.processes),
        rank=rank,
        world_size=recipe.processes,
        timeout=timedelta(hours=3),  # the others wait as long as the first validates
    )
    history = fit(*parts, **(vars(recipe) | {"device": device}))
    if rank == 0:
        torch.save((*parts[:2], history), job)
    distributed.barrier()  # the first still validates and writes
    distributed.destroy_process_group()


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
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
) -> None:
    """Train neck and criterion on cached features (N, C), in place.

    features: embedding.embed(..., features=True) of the frozen backbone. The best return per GPU
    hour in Kaggle's Universal Image Embedding (2022). The neck comes back to where the model is.
    """
    if isinstance(model.neck, nn.Identity):
        raise ValueError("fit_head trains a neck and the model has none: give it an embedding_dim")
    home = next(model.parameters()).device
    learned = nn.ModuleList([model.neck.train(), criterion]).to(device)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, weight_decay=1e-4)
    inputs = torch.as_tensor(features, dtype=torch.float32, device=device)
    targets = torch.as_tensor(labels, device=device)
    sampler = ShuffledSampler(np.arange(len(inputs)), batch_size=batch_size, seed=seed)
    schedule = LambdaLR(optimizer, partial(rate, steps=epochs * len(sampler.batches(0))))
    for epoch in range(epochs):
        for rows in sampler.batches(epoch):
            embeddings = nn.functional.normalize(model.neck(inputs[rows]), dim=1)
            loss, _ = criterion(embeddings, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.neck.to(home).eval()


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
        line += f"\nCUT SHORT {cut_short(pd.DataFrame([row]))}"
    return line
