"""The training loop: mixed precision, schedules, stages, time budget, checkpoints that continue bit for bit.

Everything random is a pure function of (seed, epoch, step): batches come from `sampler.batches(epoch)`, each photo's
augmentation from (seed, epoch, row), dropout from (seed, step). A checkpoint therefore holds no random state, and a
run that was killed anywhere ends with the weights of one that never was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import socket
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from timm.optim import param_groups_layer_decay
from torch import distributed, nn

from vipr_utils.data import store
from vipr_utils.data.store import Photos
from vipr_utils.host.device import autocast, compute_dtype, cores, tune
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.learn.sampling import ShuffledSampler


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


def fit(
    model: models.Embedder,
    criterion,
    photos: Photos,
    sampler,
    *,
    folder: Path,
    epochs: int,
    lr: float,
    device: torch.device = torch.device("cpu"),
    precision: str = "auto",  # see compute_dtype
    head_lr: float = 0.0,  # neck and criterion; 0 takes lr
    layer_decay: float = 1.0,  # the rate of each layer over that of the next; 1 is one rate for the whole backbone
    optimizer: str = "adamw",
    weight_decay: float = 1e-4,
    schedule: str = "cosine",  # cosine (with warm-up), multistep, constant
    warmup: float = 0.05,  # share of all steps
    milestones: tuple[int, ...] = (),  # epochs, for multistep
    gamma: float = 0.1,
    frozen_epochs: int = 0,  # epochs in which only neck and criterion learn
    clip_norm: float = 0.0,
    ema_decay: float = 0.0,
    validate=None,  # model -> dict with map_at_5
    validate_every: int = 1,
    max_minutes: float = 0.0,
    checkpoint_minutes: float = 5.0,
    seed: int = 0,
    progress: bool = True,
    processes: int = 1,
) -> pd.DataFrame:
    """Train `model` in place and return its history, one row an epoch.

    criterion(embeddings, labels) -> (loss, share of active pairs or accuracy); an nn.Module's parameters are trained.
    With `validate` the epoch with the best map_at_5 is kept, else the last. max_minutes counts from the first start,
    over restarts; when it is used up training stops, keeps what it has, and returns: see `cut_short`.
    Raises Diverged when the loss is not finite; the last checkpoint stays.
    """
    dtype = compute_dtype(precision, device, training=True)
    no_matter = ("max_minutes", "checkpoint_minutes", "progress", "processes")
    settings = {
        k: v for k, v in locals().items() if isinstance(v, (int, float, str)) and k not in no_matter
    }
    settings["precision"] = str(dtype)
    settings["milestones"] = list(milestones)
    start, folder = time.monotonic(), Path(folder)
    rates = {
        "lr": lr,
        "head_lr": head_lr or lr,
        "layer_decay": layer_decay,
        "weight_decay": weight_decay,
    }
    state = _State(
        model, criterion, device, dtype, _optimizer(model, criterion, optimizer, **rates), ema_decay
    )
    state.identity = _identity(
        settings, model, photos, [sampler.batches(e) for e in (0, max(0, epochs - 1))]
    )
    state.resume(folder / "checkpoint.pt")
    per_epoch = (
        [len(sampler.batches(e)) for e in range(epochs)]
        if epochs < 50
        else [len(sampler.batches(0))] * epochs
    )
    if epochs and not per_epoch[0]:
        raise ValueError("the sampler gives no batch: use a smaller batch_size or more images")
    last_saved = start
    for epoch in range(state.epoch, epochs):
        batches = sampler.batches(epoch)
        model.train()
        _freeze_backbone(model, epoch < frozen_epochs)
        photos.set_epoch(epoch)
        loader = store.loader(
            photos, batch_sampler=[_share(b) for b in batches[state.batch :]], device=device
        )
        scale, out_of_time = (
            0.0,
            False,
        )  # stay so only if every batch of this epoch was done before a restart
        for pixels, labels, _ in loader:
            done = sum(per_epoch[:epoch]) + state.batch
            scale = rate(
                done,
                sum(per_epoch),
                schedule,
                warmup,
                [sum(per_epoch[:m]) for m in milestones],
                gamma,
            )
            state.step(pixels, labels, scale, seed * 1_000_003 + done, clip_norm)
            now = time.monotonic()
            spent = state.seconds + now - start
            if out_of_time := _agreed(bool(max_minutes) and spent > max_minutes * 60, device):
                break
            if now - last_saved > checkpoint_minutes * 60:
                state.save(folder / "checkpoint.pt", spent)
                last_saved = now
        row = state.end_epoch(epoch, lr * scale, state.seconds + time.monotonic() - start)
        row |= {"epochs": epochs, "cut_short": out_of_time and done + 1 < sum(per_epoch)}
        if validate and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs or out_of_time):
            scores = validate(state.evaluated())
            row |= {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
            state.keep_best(row, folder / "best.pt")
        state.history.append(row)
        _warn_of_collapse(row, of_pairs=not isinstance(criterion, nn.Module))
        if progress:
            print(_line(row, epochs), flush=True)
        if out_of_time:
            break
        state.save(folder / "checkpoint.pt", state.seconds + time.monotonic() - start)
        last_saved = time.monotonic()
    _freeze_backbone(model, False)
    model.load_state_dict(state.final(folder / "best.pt"))
    model.eval()
    if _rank():
        return pd.DataFrame(state.history)
    for file in ("checkpoint.pt", "best.pt"):
        (folder / file).unlink(missing_ok=True)
    history = pd.DataFrame(state.history)
    with whole_file(folder / "history.csv") as part:
        history.to_csv(part, index=False)
    return history


def cut_short(history: pd.DataFrame) -> str:
    """'in epoch 3 of 8' when max_minutes ended this training before its schedule did, '' for a whole one."""
    last = history.iloc[-1]
    return f"in epoch {last.epoch:.0f} of {last.epochs:.0f}" if last.cut_short else ""


EXTRAS = {  # what a recipe may add, with the value when it does not
    "weight_decay": 1e-4,
    "layer_decay": 1.0,
    "ema_decay": 0.0,
    "frozen_epochs": 0,
    "balanced_epochs": 0,
    "min_images": 1,
    "max_images": 0,
    "clutter": 0.0,
    "learned_whitening": 0,
    "pooling": "own",
    "gpus": 1,
}


def extras(given: list[str]) -> SimpleNamespace:
    """EXTRAS with the values given as 'name:value'.

    Raises ValueError for an unknown name or a value of another type.

    >>> extras(["clutter:0.5", "pooling:gem"]).clutter
    0.5
    """
    values = dict(EXTRAS)
    for text in given:
        name, _, value = text.partition(":")
        try:
            values[name] = type(EXTRAS[name])(value)
        except (KeyError, ValueError):
            what = f"extra {text!r} is unknown or has a wrong value: use name:value"
            raise ValueError(
                f"{what} with {', '.join(f'{k} ({type(v).__name__})' for k, v in EXTRAS.items())}"
            ) from None
    return SimpleNamespace(**values)


def fit_together(
    processes: int,
    model,
    criterion,
    photos,
    sampler,
    *,
    device=torch.device("cpu"),
    validate=None,
    **settings,
) -> pd.DataFrame:
    """`fit` by several processes, each on a GPU of its own (or on the CPU), each embedding its share of every batch.

    Embeddings are gathered, so that the loss sees the pairs of the whole batch: same loss and gradients as one process
    (batch statistics are each process's own). This process leads: it alone validates, prints and writes. With processes=1
    this is `fit`. Raises ValueError for more processes than GPUs.
    """
    if processes == 1:
        return fit(model, criterion, photos, sampler, device=device, validate=validate, **settings)
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes need as many GPUs, {torch.cuda.device_count()} are visible: lower it"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    job = (model, criterion, photos, sampler, settings | {"progress": False})
    start = torch.multiprocessing.get_context("spawn").Process
    others = [
        start(target=_help, args=(rank, processes, address, device.type, job))
        for rank in range(1, processes)
    ]
    try:
        for other in others:
            other.start()
        device = _join(0, processes, address, device.type)
        return fit(model, criterion, photos, sampler, device=device, validate=validate, **settings)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for other in filter(lambda o: o.pid, others):
            other.join(10)
            other.kill()


def _help(rank: int, processes: int, address: str, kind: str, job: tuple) -> None:
    tune(max(1, cores() // processes))
    *parts, settings = job
    fit(*parts, device=_join(rank, processes, address, kind), **settings)


def _join(rank: int, processes: int, address: str, kind: str) -> torch.device:
    """Become one of the processes; returns its device. The others wait as long as the leader validates."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    how = {
        "init_method": address,
        "rank": rank,
        "world_size": processes,
        "timeout": timedelta(hours=3),
    }
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", **how)
    return device


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _share(batch: np.ndarray) -> np.ndarray:
    """This process's part of a batch: all parts are of one length, what cannot be divided is left out."""
    n = distributed.get_world_size() if distributed.is_initialized() else 1
    return batch[: len(batch) // n * n].reshape(n, -1)[_rank()]


def _agreed(flag: bool, device: torch.device) -> bool:
    """What the leader says."""
    if not distributed.is_initialized():
        return flag
    said = torch.tensor([flag], dtype=torch.int32, device=device)
    distributed.broadcast(said, 0)
    return bool(said.item())


def _gathered(embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels of the whole batch; gradients flow to this process's own alone."""
    if not distributed.is_initialized():
        return embeddings, labels
    parts = [
        [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        for x in (embeddings, labels)
    ]
    for part, x in zip(parts, (embeddings, labels)):
        distributed.all_gather(part, x.detach().contiguous())
    parts[0][_rank()] = embeddings
    return torch.cat(parts[0]), torch.cat(parts[1])


def _sum_gradients(model: nn.Module, criterion) -> None:
    """Every process has the gradient of the joint loss by its own images: their sum is the whole. The criterion saw all."""
    if not distributed.is_initialized():
        return
    learned = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
    for parameter in [*model.parameters(), *learned]:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
    for parameter in learned:
        parameter.grad /= distributed.get_world_size()


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
    device="cpu",
) -> pd.DataFrame:
    """Train the model's neck and the criterion on cached features (N, C), in place; seconds an epoch.

    features: embedding.embed(..., features=True) of the frozen backbone. The recipe with the best return per GPU hour
    in Kaggle's Universal Image Embedding (2022). Returns loss and accuracy by epoch.
    """
    if isinstance(model.neck, nn.Identity):
        raise ValueError(
            "fit_head trains a neck and the model has none: create it with embedding_dim, for example 512"
        )
    x, y = torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels)
    parameters = [*model.neck.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    sampler, history = ShuffledSampler(len(x), batch_size=batch_size, seed=seed), []
    steps = epochs * len(sampler.batches(0))
    model.neck.train()
    for epoch in range(epochs):
        losses = []
        for rows in sampler.batches(epoch):
            optimizer.param_groups[0]["lr"] = lr * rate(
                len(losses) + epoch * steps // epochs, steps, "cosine", 0.05, [], 0.1
            )
            loss, accuracy = criterion(nn.functional.normalize(model.neck(x[rows]), dim=1), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), accuracy))
        history.append(
            {
                "epoch": epoch + 1,
                "loss": np.mean([v[0] for v in losses]),
                "active": np.mean([v[1] for v in losses]),
            }
        )
    model.neck.eval()
    return pd.DataFrame(history)


def rate(
    step: int, steps: int, schedule: str, warmup: float, milestones: list[int], gamma: float
) -> float:
    """The factor on the learning rate at a step, in (0, 1].

    cosine: linear warm-up over `warmup * steps`, then half a cosine down to 0 (Loshchilov, Hutter 2017,
    arXiv:1608.03983). multistep: gamma to the number of milestones (in steps) passed. constant: 1.
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


class _State:
    """What a checkpoint holds: weights, optimiser, scaler, averages, position, history."""

    def __init__(self, model, criterion, device, dtype, optimizer, ema_decay: float = 0.0) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)
        self.criterion = criterion.to(device) if isinstance(criterion, nn.Module) else criterion
        self.device, self.dtype, self.ema_decay, self.optimizer = (
            device,
            dtype,
            ema_decay,
            optimizer,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.average = copy.deepcopy(model).eval() if ema_decay else None
        self.epoch = self.batch = self.updates = 0
        self.seconds, self.history, self.best = 0.0, [], -1.0
        self.identity, self.sums = "", np.zeros(4)

    def step(self, pixels, labels, scale: float, seed: int, clip_norm: float) -> None:
        """One update by the loss of a whole batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        pixels = pixels.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss, active, embeddings = self._backward(pixels, labels, seed)
        if not math.isfinite(loss):
            raise Diverged(
                f"loss is {loss} in epoch {self.epoch}, batch {self.batch}: lower lr or set clip_norm (1.0 is usual); "
                "the last checkpoint is kept"
            )
        _sum_gradients(self.model, self.criterion)
        self.scaler.unscale_(self.optimizer)
        if clip_norm:
            nn.utils.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g["params"]], clip_norm
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average()
        half = (
            len(embeddings) // 2
        )  # neighbours in a P x K batch are one product: pair across the halves
        apart = (1 - (embeddings[:half] * embeddings[-half:]).sum(1)).mean().item()
        self.sums += np.array([loss, active, apart, 1.0]) * len(labels)
        self.batch += 1

    def _backward(self, pixels, labels, seed: int):
        torch.manual_seed(seed)
        with autocast(self.device, self.dtype):
            embeddings = self.model(pixels)
        loss, active = self.criterion(*_gathered(embeddings, labels))
        self.scaler.scale(loss).backward()
        return loss.item(), active, embeddings.detach()

    def _update_average(self) -> None:
        if self.average is None:
            return
        self.updates += 1
        decay = min(
            self.ema_decay, (1 + self.updates) / (10 + self.updates)
        )  # short memory while young
        for a, b in zip(self.average.state_dict().values(), self.model.state_dict().values()):
            a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)

    def evaluated(self) -> nn.Module:
        return self.average or self.model

    def end_epoch(self, epoch: int, lr: float, seconds: float) -> dict:
        loss, active, apart, _ = (self.sums / max(1.0, self.sums[3])).tolist()
        row = {
            "epoch": epoch + 1,
            "loss": loss,
            "active": active,
            "random_distance": apart,
            "lr": lr,
            "seconds": seconds,
        }
        self.epoch, self.batch, self.sums = epoch + 1, 0, np.zeros(4)
        return row

    def keep_best(self, row: dict, path: Path) -> None:
        value = row.get("map_at_5")
        if value is not None and value > self.best:
            self.best = value
            models.save(self.evaluated(), path)

    def final(self, best: Path) -> dict:
        return (
            models.load(best).state_dict()
            if best.exists() and self.best >= 0
            else self.evaluated().state_dict()
        )

    def save(self, path: Path, seconds: float) -> None:
        if _rank():
            return
        keep = ("epoch", "batch", "updates", "history", "best", "identity")
        data = {k: getattr(self, k) for k in keep} | {
            "seconds": seconds,
            "sums": self.sums.tolist(),
        }
        data |= {k: v.state_dict() for k, v in self._parts().items()}
        with whole_file(path) as part:
            torch.save(data, part)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same settings; one of other settings is left behind."""
        if not path.exists():
            return
        data = torch.load(path, map_location=self.device, weights_only=True)
        if data["identity"] != self.identity:
            return
        for key in ("epoch", "batch", "updates", "history", "best", "seconds"):
            setattr(self, key, data[key])
        self.sums = np.array(data["sums"])
        for key, part in self._parts().items():
            part.load_state_dict(data[key])

    def _parts(self) -> dict:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "average": self.average,
        }
        parts["criterion"] = self.criterion if isinstance(self.criterion, nn.Module) else None
        return {k: v for k, v in parts.items() if v is not None}


def _optimizer(
    model,
    criterion,
    name: str,
    *,
    lr: float,
    head_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
):
    """Backbone, then neck and criterion, each with and without weight decay (none on biases, norms, GeM's p). With
    layer_decay the backbone's rates fall from its last layer to its first (Clark et al. 2020, arXiv:2003.10555)."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if name not in kinds:
        raise ValueError(f"optimizer {name!r} is unknown: use one of {tuple(kinds)}")
    heads = list(model.neck.parameters()) + (
        list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
    )
    layered = set(model.backbone.parameters()) if layer_decay != 1.0 else set()
    body = [p for p in model.parameters() if p not in layered and not any(p is h for h in heads)]
    groups = []
    if layered:
        for group in param_groups_layer_decay(
            model.backbone, weight_decay, layer_decay=layer_decay
        ):
            decay, base = group["weight_decay"], lr * group["lr_scale"]
            groups.append(
                {"params": group["params"], "lr": base, "base_lr": base, "weight_decay": decay}
            )
    for parameters, base in ((body, lr), (heads, head_lr)):
        for decays, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.ndim > 1) == decays]
            if chosen:
                groups.append(
                    {"params": chosen, "lr": base, "base_lr": base, "weight_decay": decay}
                )
    return kinds[name](groups)


def _identity(settings: dict, model, photos, batches: list[list]) -> str:
    """A hash of all that decides the outcome, so that a checkpoint is only continued by the run it belongs to."""
    digest = hashlib.sha256(
        json.dumps([settings, model.record], sort_keys=True, default=str).encode()
    )
    digest.update(np.asarray(photos.rows, dtype=np.int64).tobytes())
    for epoch in batches:
        digest.update(np.concatenate(epoch).astype(np.int64).tobytes())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _freeze_backbone(model, frozen: bool) -> None:
    model.backbone.requires_grad_(not frozen)
    if frozen:
        model.backbone.eval()  # batch statistics stay those of pretraining


def _warn_of_collapse(row: dict, of_pairs: bool) -> None:
    """Warn of embeddings that fell together, or (losses of pairs) of nothing left to learn from."""
    if row["random_distance"] < 0.05:
        warnings.warn(
            f"collapse: random pairs lie {row['random_distance']:.3f} apart (cosine; 1 is usual). Every product looks "
            "alike to the network: lower lr, use mining='semi_hard' or 'all' at first, or a larger margin.",
            stacklevel=3,
        )
    elif of_pairs and row["active"] < 0.001:
        warnings.warn(
            f"only {row['active']:.2%} of the pairs or triplets are still active: the others teach nothing. Use a larger "
            "margin, mining='batch_hard', or more products in a batch.",
            stacklevel=3,
        )


def _line(row: dict, epochs: int) -> str:
    line = f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  active {row['active']:.2f}  {row['seconds']:.0f} s"
    line += f"  mAP@5 {row['map_at_5']:.3f}" if "map_at_5" in row else ""
    return (
        f"{line}\nCUT SHORT: max_minutes was used up before the schedule ended"
        if row["cut_short"]
        else line
    )
