"""The training loop, with checkpoints that continue bit for bit.

Everything random is a pure function of (seed, epoch, step): batches come from
`sampler.batches(epoch)`, each photo's augmentation from (seed, epoch, row, occurrence), dropout
from (seed, step). A checkpoint therefore holds no random state: a run that was killed anywhere, or
spread over sessions, ends with the weights of one that never was.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from vipr_utils.host import platform, progress
from vipr_utils.host.device import DepthwiseInFloat32, autocast, compute_dtype, cores, tune
from vipr_utils.host.files import whole_file, write_whole
from vipr_utils.learn import models
from vipr_utils.learn.sampling import ShuffledSampler, with_occurrences

VERSION = 3  # of the training: rises with code that changes what is learned
SAVED = (
    "epoch",
    "batch",
    "steps",
    "stage",
    "used",
    "validation_seconds",
    "best",
    "best_state",
    "lr",
    "history",
    "results",
    "skipped",
    "skipped_in_a_row",
)
START_UP = 0.05  # share of max_minutes that may pass before the clock drives the schedule
NOT_DECISIVE = (
    "folder",
    "validate",
    "device",
    "session_minutes",
    "checkpoint_minutes",
)
SKIPS_IN_A_ROW = 10  # steps under float16 without a finite loss or gradient that end a training
WARM_UP, TIMED = 3, 12  # batches, when one card is compared with several
HASH = "hash "
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
    clip_norm: float = 0.0  # the longest gradient, of all parameters together; 0 clips none
    ema_decay: float = 0.0  # of the averaged weights that are validated and kept; 0 has none
    validate_every: int = 1  # epochs
    precision: str = "auto"  # see compute_dtype
    seed: int = 0
    processes: int = 1  # 0 takes all GPUs where that is measured to be faster than one
    validate: Callable | None = None  # model -> dict with map_at_5
    device: torch.device = torch.device("cpu")
    max_minutes: float = 0.0  # the schedule fits into, over sessions; 0 is no limit
    session_minutes: float = 0.0  # of it from this start on; 0 is no limit
    checkpoint_minutes: float = 5.0


def fit(model: models.Embedder, criterion, photos: Photos, sampler, **recipe) -> pd.DataFrame:
    """Train `model` in place and return its history, one row an epoch.

    criterion(embeddings, labels) -> (loss, share of active pairs or accuracy); an nn.Module's
    parameters are trained. recipe: the fields of `Recipe`; epochs, lr and folder must be given.
    With `validate` the epoch with the best map_at_5 is kept, else the last. Where max_minutes
    (validation included) do not allow all epochs, the clock drives the schedule to its end, and
    `cut_short` says so; where they do they change nothing.
    <folder>/trained.pt holds model, criterion and history as soon as training ends: the same
    training then comes back at once. checkpoint.pt is continued, in the folder or attached from
    an earlier session's outputs, and stays when session_minutes are used up.
    processes: each embeds its part of every batch, on a GPU of its own or on the CPU; loss and
    gradients are those of the whole batch. All that is given is sent to them by pickle.
    Raises Diverged when the loss is not finite (float16: or a gradient, SKIPS_IN_A_ROW times); the
    last checkpoint stays. ValueError for a checkpoint of another training, for more processes than
    GPUs, and for what cannot be pickled.
    """
    recipe = Recipe(**recipe)
    dtype = compute_dtype(recipe.precision, recipe.device, training=True)
    parts = _Network(model, criterion, dtype), photos, sampler
    history = _already_trained(*parts, recipe)
    if history is None:
        recipe = replace(recipe, processes=recipe.processes or _processes(*parts, recipe))
        run = _train if recipe.processes == 1 else partial(_by_processes, _train)
        history = run(*parts, recipe)
    model.to(recipe.device).eval()
    return history


def _train(network: _Network, photos: Photos, sampler, recipe: Recipe) -> pd.DataFrame:
    """The history of a training from its start or checkpoint to its end or the session's."""
    training = _Training(network, photos, sampler, recipe)
    training.resume()
    while not training.done():
        training.run_epoch()
        if training.end_epoch()["continues"]:
            break
        if not training.done():
            training.save()
    return training.finish()


def announce(text: str, more: str = "") -> None:
    """Print a line, and log it with more."""
    print(text, flush=True)
    progress.LOG.info(text.replace("\n", "; ") + more)


def cut_short(history: pd.DataFrame) -> str:
    """'to 3.4 of 8 epochs, fitted into 29 minutes' where max_minutes did not allow all, 'to 3.4 of
    8 epochs; continues from its checkpoint' where a session ended; '' else."""
    last = history.iloc[-1]
    if not last.cut_short:
        return ""
    passes = math.floor(10 * last.passes) / 10
    why = f", fitted into {last.max_minutes:g} minutes"
    if last.get("continues"):
        why = "; continues from its checkpoint"
    return f"to {passes:g} of {last.epochs} epochs{why}"


class _Network(nn.Module):
    """Model and criterion in one forward pass over the photos of all processes."""

    def __init__(self, model: nn.Module, criterion, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.criterion, self.dtype = model, criterion, dtype

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor):
        """(loss, share of active pairs or accuracy, embeddings without gradient)."""
        with autocast(pixels.device, self.dtype), DepthwiseInFloat32():
            embeddings = self.model(pixels)
        if distributed.is_initialized():
            # The gradient that comes back is summed over the processes' equal losses, and
            # DistributedDataParallel takes the mean: together that of one process's whole batch.
            embeddings, labels = torch.cat(all_gather(embeddings)), torch.cat(all_gather(labels))
        loss, active = self.criterion(embeddings, labels)
        return loss, active, embeddings.detach()


class _Training:
    """A training under way: weights, optimiser, scaler, average, position and history."""

    def __init__(self, network: _Network, photos: Photos, sampler, recipe: Recipe) -> None:
        self.network, self.model = network, network.model
        self.photos, self.sampler, self.recipe = photos, sampler, recipe
        self.folder, self.leads = Path(recipe.folder), _rank() == 0
        self.identity = _identity(network, photos, sampler, recipe)
        network.to(recipe.device, memory_format=torch.channels_last)
        self.optimizer = _optimizer(network, recipe)
        self.scaler = torch.amp.GradScaler(
            recipe.device.type, enabled=network.dtype is torch.float16
        )
        self.parts = [network, self.optimizer, self.scaler]
        self.average, self.evaluated = None, self.model  # what is validated and kept
        if recipe.ema_decay:
            self.average = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True)
            self.evaluated = self.average.module
            self.parts.append(self.average)
        self.start = self.last_saved = time.monotonic()
        self.session_end = 60 * (recipe.session_minutes or math.inf)  # as seconds are counted
        self.epoch, self.batch, self.steps = 0, 0, 1
        self.stage = 0  # the sampler's epoch: the schedule's, and another one each time
        self.used = 0.0  # share of max_minutes
        self.seconds = self.validation_seconds = 0.0  # since the first start; of the longest
        self.best, self.best_state, self.lr = -1.0, None, recipe.lr
        self.history: list[dict] = []
        self.results: list[tuple] = []  # (loss, active, random distance) of this epoch's batches
        self.skipped = self.skipped_in_a_row = 0  # steps of this epoch; without a finite loss

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

    def paused(self) -> bool:
        """Whether the session's minutes are used up and the schedule is not at its end."""
        return self.seconds + self.validation_seconds >= self.session_end and not self.done()

    def read_clock(self) -> None:
        """Bring what is used up to date by the first process's clock; the last validation is set
        aside.

        Before the first step nothing is used: there is at least one.
        """
        read = torch.tensor([self.spent(), self.validation_seconds], dtype=torch.float64)
        if distributed.is_initialized():
            read = read.to(self.recipe.device)
            distributed.broadcast(read, 0)
        self.seconds, self.validation_seconds = read.tolist()
        trainable = 60 * (self.recipe.max_minutes or math.inf) - self.validation_seconds
        self.used = max(self.used, self.seconds / max(trainable, 1e-9))

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
        """Train to the end of the epoch, of the schedule, or of the session."""
        rest = self.begin_epoch()[self.batch :]
        for pixels, labels, _ in self.loader(rest):
            self.step(pixels, labels)
            self.read_clock()
            if self.done():
                return
            due = time.monotonic() - self.last_saved > self.recipe.checkpoint_minutes * 60
            if due or self.paused():  # the next session goes on from here, whatever comes now
                self.save()
            if self.paused():
                return

    def loader(self, batches: list[np.ndarray]):
        return store.loader(self.photos, batch_sampler=batches, device=self.recipe.device)

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
        buffers = self.network.buffers() if self.scaler.is_enabled() else ()
        statistics = [buffer.clone() for buffer in buffers]
        loss, active, embeddings = self.forward(pixels, labels)
        self.scaler.scale(loss).backward()
        half = len(embeddings) // 2  # neighbours in a P x K batch are one product
        similarity = (embeddings[:half] * embeddings[-half:]).sum(1).mean()
        told = [loss.detach(), torch.as_tensor(active, device=loss.device), similarity]
        # the one wait for the device in a step: whether weights move hangs on it
        loss, active, similarity = torch.stack([value.float() for value in told]).tolist()
        if math.isfinite(loss):
            self._update(stepped + 1)
            self.results.append((loss, active, 1 - similarity))
        else:
            self._skip(loss, statistics)
        self.batch += 1

    def _update(self, step: int) -> None:
        """Weights by their gradients, the average by the weights."""
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < before:  # a gradient was infinite: no weight has moved
            self._count_skip("a gradient is infinite")
            return
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.model, step=step)

    def _skip(self, loss: float, statistics: list[torch.Tensor]) -> None:
        """Undo a step whose loss is not finite and halve the scale.

        statistics: the network's buffers before the step, which saw what became infinite.
        """
        self._count_skip(f"loss is {loss}")
        for buffer, before in zip(self.network.buffers(), statistics):
            buffer.copy_(before)
        self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

    def _count_skip(self, problem: str) -> None:
        """Raises Diverged where another scale is no cure."""
        at = f"{problem} in epoch {self.epoch}, batch {self.batch}"
        if not self.scaler.is_enabled():
            raise Diverged(f"{at}: lower lr; the last checkpoint is kept")
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPS_IN_A_ROW:
            raise Diverged(
                f"{at}, as in {SKIPS_IN_A_ROW} steps in a row under float16: set "
                "precision='float32' or 'bfloat16', which go on from the last checkpoint, or lower "
                "lr and start anew"
            )

    def spent(self) -> float:
        """Seconds since the first start."""
        return time.monotonic() - self.start

    def end_epoch(self) -> dict:
        """Validate and go to the next epoch; the row of this one, now told and in the history."""
        recipe, done, position = self.recipe, self.done() or self.paused(), self.position()
        results = self.results or [(math.nan,) * 3]  # every step was skipped
        loss, active, random_distance = np.mean(results, axis=0).tolist()
        row = {
            "epoch": self.epoch + 1,
            "loss": loss,
            "active": active,
            "random_distance": random_distance,
            "lr": self.lr,
            "skipped": self.skipped,
            "seconds": self.spent(),
            "epochs": recipe.epochs,
            "passes": self.epoch + self.batch / self.steps,
            "max_minutes": recipe.max_minutes,
            "continues": self.paused(),
        }
        self.epoch, self.batch, self.results, self.skipped = self.epoch + 1, 0, [], 0
        self.history.append(row)
        if recipe.validate and (done or self.epoch % recipe.validate_every == 0):
            if self.leads:
                self._validate(row)
            self.read_clock()
        ends = self.done() or row["continues"]
        row["cut_short"] = ends and row["passes"] < recipe.epochs
        self.stage = max(self.stage + 1, int(self.position()))
        if self.leads:
            _warn_of_collapse(row, of_pairs=not isinstance(self.network.criterion, nn.Module))
            announce(_line(row), f", about {progress.clock(self.seconds_left(position))} left")
        return row

    def _validate(self, row: dict) -> None:
        start = time.monotonic()
        row["map_at_5"] = float(self.recipe.validate(self.evaluated)["map_at_5"])
        self.validation_seconds = max(self.validation_seconds, time.monotonic() - start)
        if row["map_at_5"] > self.best:
            self.best = row["map_at_5"]
            self.best_state = copy.deepcopy(self.evaluated.state_dict())

    def seconds_left(self, position: float) -> float:
        """At the pace so far, and by the limit."""
        left = self.spent() * (self.recipe.epochs / position - 1)
        return max(0.0, min(left, 60 * (self.recipe.max_minutes or math.inf) - self.spent()))

    def finish(self) -> pd.DataFrame:
        """Put the weights to keep into the model and give its history; the first process writes.

        All that was learned is on disk before anything else is done. A session that ends before the
        schedule leaves its checkpoint instead.
        """
        self.optimizer.zero_grad()
        self.model.backbone.requires_grad_(True)
        history = pd.DataFrame(self.history)
        if not self.leads:
            return history
        self.model.load_state_dict(self.best_state or self.evaluated.state_dict())
        if not history["continues"].iloc[-1]:
            data = {"identity": self.identity, "network": self.network.state_dict()}
            _write(data | {"history": self.history}, self.folder / "trained.pt")
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        write_whole(self.folder / "history.csv", history.to_csv(index=False))
        return history

    def save(self) -> None:
        """Write the checkpoint."""
        if not self.leads:
            return
        data = {name: getattr(self, name) for name in SAVED}
        data |= {"identity": self.identity, "spent": self.spent()}
        data["parts"] = [part.state_dict() for part in self.parts]
        _write(data, self.folder / "checkpoint.pt")
        self.last_saved = time.monotonic()

    def resume(self) -> None:
        """Continue from a checkpoint, else start, and say so; ValueError for one of another
        training.
        """
        recipe, precision = self.recipe, self.identity["precision"]
        path = _found(self.folder, "checkpoint.pt")
        if not path:
            if self.leads:
                progress.LOG.info(
                    f"training starts: {len(self.photos):,} photos, "
                    f"{len(self.sampler.batches(0)):,} steps an epoch, {recipe.epochs} epochs, "
                    f"{precision} on {recipe.device}, processes: {recipe.processes}"
                )
            return
        data = _read(path)
        if differing := _differing(data["identity"], self.identity, "precision", "max_minutes"):
            raise ValueError(
                f"{path} is of another training, with other {', '.join(differing)}. Set them back "
                "to go on with it, or give another run_name, or remove (detach) the file"
            )
        self.start -= data["spent"]
        self.session_end += data["spent"]
        for name in SAVED:
            setattr(self, name, data[name])
        for part, state in zip(self.parts, data["parts"]):
            if state:  # a scaler has one under float16 alone
                part.load_state_dict(state)
        if self.leads:
            announce(
                f"resumed in epoch {self.epoch + 1}/{recipe.epochs} after "
                f"{data['spent'] / 60:.1f} minutes, in {precision} "
                f"({data['identity']['precision']} before), from {path}"
            )


def _optimizer(network: _Network, recipe: Recipe) -> torch.optim.Optimizer:
    """Groups of parameters with their `base_lr`: neck and criterion at head_lr, the rest at lr.

    No weight decay on biases, norms, GeM's p, class tokens and position embeddings. With
    layer_decay the backbone's rates fall from its last layer to its first (Clark et al. 2020,
    arXiv:2003.10555).
    """
    model = network.model
    model.requires_grad_(True)  # a training that was stopped may have left the backbone frozen
    one_kernel = {"fused": True} if recipe.optimizer in ("adam", "adamw") else {}
    optimizer = create_optimizer_v2(
        model.backbone,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        layer_decay=None if recipe.layer_decay == 1.0 else recipe.layer_decay,
        **one_kernel,
    )
    head_lr = recipe.head_lr or recipe.lr
    parts = (model.pooling, recipe.lr), (model.neck, head_lr), (network.criterion, head_lr)
    for part, lr in parts:
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


# ------------------------------------------------------------- what is on disk of a training


def _identity(network: _Network, photos: Photos, sampler, recipe: Recipe) -> dict[str, str]:
    """All that decides the outcome, by name; what is too long for a line as its hash."""
    named = {name: value for name, value in vars(recipe).items() if name not in NOT_DECISIVE}
    named |= {f"model {name}": value for name, value in network.model.record.items()}
    settings = vars(sampler).items()  # the others are lists of rows: see batches
    named |= {f"sampler {name}": v for name, v in settings if isinstance(v, int | float)}
    named |= {
        "loss": network.criterion,
        "augmentation": photos.transform,
        "clutter": photos.clutter,
        "data": photos.store.key,
        "device": recipe.device.type,
        "precision": network.dtype,
        "code": VERSION,
    }
    hashed = {
        "photos": [photos.rows, photos.shop, photos.zoom],
        "labels": photos.labels,
        "batches": [*sampler.batches(0), *sampler.batches(recipe.epochs - 1)],
        "first weights": [x.flatten().cpu().numpy() for x in network.state_dict().values()],
    }
    named |= {name: HASH + joblib.hash(value) for name, value in hashed.items()}
    unstable = r" at 0x[0-9a-f]+|^torch\."
    return {name: re.sub(unstable, "", str(value)) for name, value in named.items()}


def _write(data: dict, path: Path) -> None:
    with whole_file(path) as part, open(part, "wb") as file:  # a path would stand in the file
        torch.save(data, file)


def _read(path: Path, **settings) -> dict:
    """What trained.pt or checkpoint.pt holds, on the CPU."""
    data = torch.load(path, map_location="cpu", weights_only=True, **settings)
    if isinstance(data["identity"], str):  # one hash of everything, once
        data["identity"] = {"code": "1"}
    return data


def _differing(theirs: dict[str, str], mine: dict[str, str], *free: str) -> list[str]:
    """What two trainings do not share, in words, but for what is free to differ; code of another
    version may have other names.
    """
    return [
        name if value.startswith(HASH) else f"{name} ({theirs[name]} there, {value} here)"
        for name, value in sorted(mine.items())
        if name not in free and theirs.get(name, value) != value
    ]


def _found(folder: Path, name: str) -> Path | None:
    """A training's file: in its folder, else among attached outputs of an earlier session."""
    own = Path(folder, name).absolute()
    attached = platform.attached("/".join(own.parts[-3:]))  # run, part, name
    return next(filter(Path.is_file, [own, *attached]), None)


def _already_trained(
    network: _Network, photos: Photos, sampler, recipe: Recipe
) -> pd.DataFrame | None:
    """The history of the same training where it has ended, its weights in the network."""
    folder = Path(recipe.folder)
    path = _found(folder, "trained.pt")
    if not path:
        return None
    data = _read(path)
    history = pd.DataFrame(data["history"])
    cut = cut_short(history)
    mine = _identity(network, photos, sampler, recipe)
    if _differing(data["identity"], mine, "processes", "" if cut else "max_minutes"):
        return None
    network.load_state_dict(data["network"])
    network.to(recipe.device).eval()
    if not (folder / path.name).exists():  # this session's outputs need not the other's
        _write(data, folder / path.name)
    announce(f"already trained {cut or f'for {len(history)} epochs'}: {path}; remove it to repeat")
    return history


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


def _cards(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 1


def _processes(network: _Network, photos: Photos, sampler, recipe: Recipe) -> int:
    """What 0 stands for: as many as its checkpoint had, else one, or one a card where a batch was
    seen to take less time so."""
    checkpoint = _found(recipe.folder, "checkpoint.pt")
    if checkpoint:
        return int(_read(checkpoint, mmap=True)["identity"].get("processes", 1))
    cards = _cards(recipe.device)
    if cards == 1:
        return 1
    parts = copy.deepcopy(network), photos, sampler
    alone = _seconds_a_batch(*parts, replace(recipe, processes=1))
    try:
        together = _by_processes(_seconds_a_batch, *parts, replace(recipe, processes=cards))
    except (RuntimeError, ValueError) as error:
        announce(f"training on one card: {cards} failed together ({error})")
        return 1
    faster = cards if together < alone else 1
    announce(
        f"a batch takes {alone:.3f} s on one card, {together:.3f} s on {cards}: training on "
        f"{faster}, as gpus={faster} would"
    )
    return faster


def _seconds_a_batch(network: _Network, photos: Photos, sampler, recipe: Recipe) -> float:
    """Measured in whole steps of training, decoding included."""
    training = _Training(network, photos, sampler, recipe)
    batches = training.begin_epoch() * (WARM_UP + TIMED)  # there may be fewer in an epoch
    for step, (pixels, labels, _) in enumerate(training.loader(batches[: WARM_UP + TIMED])):
        if step == WARM_UP:
            start = time.monotonic()
        training.step(pixels, labels)
    return (time.monotonic() - start) / TIMED


def _by_processes(function, network: _Network, photos: Photos, sampler, recipe: Recipe):
    """function(...) of the first of several processes, its weights in the network."""
    gpus = torch.cuda.device_count()
    if recipe.device.type == "cuda" and recipe.processes > gpus:
        raise ValueError(
            f"processes={recipe.processes} need a GPU each, this machine has {gpus}: "
            f"use processes={gpus}, or for a checkpoint a machine like that it comes from"
        )
    torch.cuda.empty_cache()  # what is free in this process the first one needs
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.pt")
        try:
            torch.save((function, network, photos, sampler, recipe), job)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(NOT_SENT.format(error)) from error
        try:
            spawn(_work, (job,), nprocs=recipe.processes)
        except ProcessException as error:
            message = str(error).strip().splitlines()[-1]
            kind = Diverged if "Diverged: " in message else RuntimeError
            raise kind(f"training process {error.error_index} ended: {message}") from error
        weights, result = torch.load(job, weights_only=False, map_location="cpu")
    network.load_state_dict(weights)
    return result


def _work(rank: int, job: Path) -> None:
    """One of the processes that train together; the first leaves what it trained in job's place."""
    try:
        job_parts = torch.load(job, weights_only=False, map_location="cpu")
    except AttributeError as error:
        raise ValueError(NOT_SENT.format(error)) from error
    function, network, photos, sampler, recipe = job_parts
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather")
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
    progress.attach(on_platform=platform.where() != "local")
    result = function(network, photos, sampler, replace(recipe, device=device))
    if rank == 0:
        torch.save((network.state_dict(), result), job)
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
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, weight_decay=1e-4, fused=True)
    inputs = torch.as_tensor(features, dtype=torch.float32, device=device)
    targets = torch.as_tensor(labels, device=device)
    sampler = ShuffledSampler(np.arange(len(inputs)), batch_size=batch_size, seed=seed)
    schedule = LambdaLR(optimizer, partial(rate, steps=epochs * len(sampler.batches(0))))
    reached = progress.reporter("epochs of the head", epochs)
    for epoch in range(epochs):
        for rows in sampler.batches(epoch):
            embeddings = nn.functional.normalize(model.neck(inputs[rows]), dim=1)
            loss, _ = criterion(embeddings, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        reached(epoch + 1)
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
