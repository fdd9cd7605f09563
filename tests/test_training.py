"""The loop: it learns, stops in time, and continues after any interruption as if without one."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog, transforms
from vipr_utils.data.store import Photos
from vipr_utils.host import platform, progress
from vipr_utils.host.files import FULL_DISK
from vipr_utils.learn import losses, models, sampling, training

ROOT = Path(__file__).resolve().parents[1]
FEW_SUMS = "test_efficientnet"  # and batch norms; processors are slow in float16


def setting(toy_data, seed=0, network="siamese_small"):
    """(model, criterion, photos, sampler): a small network and a criterion that is trained too."""
    photos, store = toy_data
    train = photos[photos.split == "train"]
    labels = catalog.with_labels(train)
    torch.manual_seed(seed)
    model = models.create(network, weights="none", embedding_dim=16)
    criterion = losses.ArcFace(16, labels.max() + 1)
    data = Photos(store, train.index, transforms.augmentation("kit", 32), labels=labels, seed=seed)
    return model, criterion, data, sampling.PKSampler(labels, batch_size=8, images=2, seed=seed)


def fit(toy_data, folder, network="siamese_small", **how):
    model, *rest = setting(toy_data, network=network)
    how = {"epochs": 2, "lr": 1e-3, "ema_decay": 0.9} | how
    history = training.fit(model, *rest, folder=folder, **how)
    return model, history


def started(model, criterion, photos, sampler, *, folder=Path("unused"), processes=1):
    recipe = training.Recipe(
        epochs=1, lr=0.1, folder=folder, precision="float32", processes=processes
    )
    network = training._Network(model, criterion, torch.float32)
    return training._Training(network, photos, sampler, recipe)


def equal(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ----------------------------------------------------------------------------------------- learning


def test_training_lowers_the_loss_and_writes_its_history(toy_data, tmp_path):
    _, history = fit(toy_data, tmp_path, epochs=12, ema_decay=0.0, precision="float32")
    assert history.loss.iloc[-1] < 0.9 * history.loss.iloc[0]
    assert (tmp_path / "history.csv").is_file() and not (tmp_path / "checkpoint.pt").exists()
    assert list(history.epoch) == list(range(1, 13)) and (history.random_distance > 0.2).all()
    assert training.cut_short(history) == ""


def test_training_is_the_same_for_the_same_seed(toy_data, tmp_path):
    first, second = (fit(toy_data, tmp_path / str(i))[0] for i in range(2))
    assert equal(first, second)


def test_best_validated_epoch_is_kept(toy_data, tmp_path):
    states, scores = [], iter([0.1, 0.9, 0.3])

    def validate(model):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"map_at_5": next(scores)}

    model, history = fit(toy_data, tmp_path, epochs=3, validate=validate, ema_decay=0.0)
    assert list(history.map_at_5) == [0.1, 0.9, 0.3]
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())


class Clock:
    """Time that passes only in steps (10 s) and validations (30 s)."""

    now, seconds_a_step = 1000.0, 10.0

    def monotonic(self):
        return self.now

    def validate(self, model):
        self.now += 30.0
        return {"map_at_5": 0.5}

    def step(self, criterion):
        """The criterion, whose calls take time."""

        def timed(embeddings, labels):
            self.now += self.seconds_a_step
            return criterion(embeddings, labels)

        return timed


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)
    return clock


def timed_fit(toy_data, folder, clock, *, steps=10, criterion=None, **recipe):
    """(model, history, lr of every step) of a training of 10 steps an epoch by the clock."""
    model, _, photos, sampler = setting(toy_data)
    criterion = criterion or losses.criterion("contrastive", "cosine", 16)
    whole, asked, rates = sampler.batches, [], []
    sampler.batches = lambda epoch: asked.append(epoch) or (whole(epoch) * steps)[:steps]
    step = training._Training.step

    def recorded(state, pixels, labels):
        step(state, pixels, labels)
        rates.append((state.lr, any(p.requires_grad for p in model.backbone.parameters())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "step", recorded)
        recipe = {"epochs": 4, "lr": 1.0e-3, "precision": "float32"} | recipe
        history = training.fit(
            model, clock.step(criterion), photos, sampler, folder=folder, **recipe
        )
    return (
        model,
        history,
        rates,
        asked[3:],
    )  # two are for the identity, one for the log's first line


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
def test_a_limit_that_is_not_binding_changes_no_bit(toy_data, tmp_path, clock):
    free, history, *_ = timed_fit(toy_data, tmp_path, clock, ema_decay=0.9, epochs=2)
    assert training.cut_short(history) == ""
    limit = 2 * 10 * 10 / 60 + 0.01  # what the steps take
    fast, history, *_ = timed_fit(
        toy_data, tmp_path, clock, ema_decay=0.9, epochs=2, max_minutes=limit
    )
    assert equal(free, fast) and training.cut_short(history) == ""
    assert list(history.passes) == [1.0, 2.0] and not history.cut_short.any()


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
@pytest.mark.parametrize("minutes", [3.0, 1.0])
def test_the_schedule_fits_into_its_budget_validations_included(toy_data, tmp_path, clock, minutes):
    start = clock.now
    _, history, rates, _ = timed_fit(
        toy_data, tmp_path, clock, max_minutes=minutes, validate=clock.validate
    )
    assert clock.now - start <= 60 * minutes + clock.seconds_a_step + 30 * (minutes == 1.0)
    lr = np.array([rate for rate, _ in rates])
    peak = lr.argmax()
    assert (np.diff(lr[: peak + 1]) > 0).all() and (np.diff(lr[peak:]) < 0).all()
    assert lr[-1] < 0.1 * lr.max()
    passes = len(rates) / 10
    assert history.passes.iloc[-1] == pytest.approx(passes) and passes < 4
    assert list(history.cut_short) == [False] * (len(history) - 1) + [True]
    assert history.map_at_5.iloc[-1] == 0.5


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
def test_a_machine_that_gets_busy_still_brings_the_rate_to_its_end(toy_data, tmp_path, clock):
    whole = losses.criterion("contrastive", "cosine", 16)

    def busy(embeddings, labels):
        clock.now += 40.0 if clock.now > 1100.0 else 0.0
        return whole(embeddings, labels)

    _, history, rates, _ = timed_fit(toy_data, tmp_path, clock, criterion=busy, max_minutes=10.0)
    assert rates[-1][0] < 0.03 * max(rates)[0] and 10 < len(rates) < 25
    assert training.cut_short(history) == (
        f"to {len(rates) / 10:g} of 4 epochs, fitted into 10 minutes"
    )


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
def test_milestones_frozen_epochs_and_the_samplers_stages_follow_the_clock(
    toy_data, tmp_path, clock
):
    recipe = {"milestones": (1, 3), "frozen_epochs": 2, "max_minutes": 200 / 60}
    _, history, rates, asked = timed_fit(toy_data, tmp_path, clock, **recipe)
    assert len(rates) == 20 and len(history) == 2
    position = np.maximum(np.arange(20) / 10, 4 * (np.arange(20) / 20 - 0.05) / 0.95)
    lr, trained = zip(*rates)
    expected = 1e-3 * 0.1 ** ((position >= 1).astype(int) + (position >= 3))
    assert list(lr) == pytest.approx(list(expected))
    assert list(trained) == list(position >= 2) and 10 > sum(trained) > 5
    assert asked == [0, 1]
    recipe["max_minutes"] = 600 / 60
    clock.seconds_a_step = 50.0
    *_, asked = timed_fit(toy_data, tmp_path / "slower", clock, **recipe)
    assert asked == [0, 3]


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
@pytest.mark.long
def test_a_fitted_training_that_was_killed_ends_with_the_same_weights(toy_data, tmp_path, clock):
    plain = losses.criterion("contrastive", "cosine", 16)
    recipe = {"max_minutes": 5.0, "checkpoint_minutes": 1e-9, "frozen_epochs": 1}
    whole, expected, *_ = timed_fit(toy_data, tmp_path / "whole", clock, **recipe)
    steps = iter(range(100))

    def killed(embeddings, labels):
        if next(steps) in (3, 13, 17):
            clock.now += 500.0  # while nothing runs
            raise KeyboardInterrupt
        return plain(embeddings, labels)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            timed_fit(toy_data, tmp_path / "killed", clock, criterion=killed, **recipe)
    again, history, *_ = timed_fit(toy_data, tmp_path / "killed", clock, criterion=killed, **recipe)
    assert equal(whole, again) and training.cut_short(history).startswith("to ")
    pd.testing.assert_frame_equal(history, expected)


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
def test_time_budget_ends_with_the_best_and_marks_history_file_and_line(
    toy_data, tmp_path, clock, capsys
):
    recipe = {"epochs": 10_000, "max_minutes": 5.0}
    model, history, rates, _ = timed_fit(toy_data, tmp_path, clock, **recipe)
    text = training.cut_short(history)
    assert text == training.cut_short(pd.read_csv(tmp_path / "history.csv"))
    assert text == f"to {len(rates) / 10:g} of 10000 epochs, fitted into 5 minutes"
    assert capsys.readouterr().out.endswith(f"CUT SHORT {text}\n")
    assert len(rates) == 30 and clock.now == 1300.0
    assert rates[-1][0] < 1e-4 and not equal(model, setting(toy_data)[0])


def test_time_that_runs_out_in_the_last_step_cuts_nothing_short(toy_data, tmp_path, clock):
    clock.seconds_a_step = 3600.0
    recipe = {"steps": 1, "max_minutes": 1.0}
    *_, history, _, _ = timed_fit(toy_data, tmp_path, clock, epochs=1, **recipe)
    assert training.cut_short(history) == ""
    *_, history, _, _ = timed_fit(toy_data, tmp_path, clock, epochs=2, **recipe)
    assert training.cut_short(history) == "to 1 of 2 epochs, fitted into 1 minutes"


def test_frozen_backbone_keeps_weights_and_statistics(toy_data, tmp_path):
    start = setting(toy_data)[0]
    model, _ = fit(toy_data, tmp_path, frozen_epochs=2, ema_decay=0.0)
    assert equal(model.backbone, start.backbone) and not equal(model.neck, start.neck)
    assert all(p.requires_grad for p in model.backbone.parameters())


def groups(model, criterion, **recipe):
    """The optimiser's group of each parameter."""
    recipe = training.Recipe(
        epochs=1, lr=1.0, folder=Path("unused"), head_lr=2.0, weight_decay=0.5, **recipe
    )
    network = training._Network(model, criterion, torch.float32)
    optimizer = training._optimizer(network, recipe)
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def test_criterion_is_trained_and_norms_have_no_weight_decay(toy_data):
    model, criterion, *_ = setting(toy_data)
    found = groups(model, criterion)
    head, weight = found[id(criterion.centres)], found[id(model.neck[0].weight)]
    assert head["base_lr"] == weight["base_lr"] == 2.0
    assert found[id(model.neck[1].weight)]["weight_decay"] == 0.0
    first = found[id(model.backbone.conv1.weight)]
    assert (first["weight_decay"], first["base_lr"]) == (0.5, 1.0)
    assert len(found) == len(list(model.parameters())) + 1


def test_positions_class_tokens_biases_and_the_poolings_power_have_no_weight_decay():
    model = models.create("vit_tiny_patch16_224", weights="none")
    for layer_decay in (1.0, 0.5):
        found = groups(model, None, layer_decay=layer_decay)
        backbone = model.backbone
        for spared in (backbone.pos_embed, backbone.cls_token, backbone.blocks[0].mlp.fc1.bias):
            assert found[id(spared)]["weight_decay"] == 0.0
        assert found[id(backbone.blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.5
    model = models.create("siamese_small", pooling="gem")
    power = groups(model, None)[id(model.pooling.p)]
    assert (power["weight_decay"], power["base_lr"]) == (0.0, 1.0)


def test_layer_decay_lowers_the_rate_from_the_last_layer_to_the_first():
    model = models.create("vit_tiny_patch16_224", weights="none", embedding_dim=8)
    found = groups(model, None, layer_decay=0.5)
    rates = {key: group["base_lr"] for key, group in found.items()}
    blocks = [rates[id(b.mlp.fc1.weight)] for b in model.backbone.blocks]
    assert all(2 * a == pytest.approx(b) for a, b in zip(blocks, blocks[1:]))
    assert rates[id(model.backbone.norm.weight)] == 1.0 and rates[id(model.neck[0].weight)] == 2.0
    assert len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1 / 6), (5, 1.0), (52.5, 0.5), (99, 0.5 * (1 + np.cos(np.pi * 94 / 95)))],
)
def test_rate_rises_then_falls_by_half_a_cosine(step, expected):
    assert training.rate(step, 100) == pytest.approx(expected)


def test_rates_fall_to_a_tenth_at_each_milestone(toy_data, tmp_path):
    for milestones, expected in (((1, 2), [1e-3, 1e-4, 1e-5]), ((), [1e-3, 1e-3, 1e-3])):
        _, history = fit(toy_data, tmp_path, epochs=3, milestones=milestones)
        assert list(history.lr) == pytest.approx(expected)


def test_head_on_cached_features_separates_what_the_features_can():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 20)
    centres = rng.normal(size=(12, 256))
    features = np.concatenate(
        [centres[labels] + 0.8 * rng.normal(size=(240, 256)), 3 * rng.normal(size=(240, 0))], 1
    )
    torch.manual_seed(0)
    model = models.create("siamese_small", embedding_dim=16)
    backbone = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    criterion = losses.criterion("arcface", "cosine", 16, counts=np.bincount(labels))

    def accuracy():
        embeddings = model.neck.eval()(torch.tensor(features, dtype=torch.float32))
        return criterion(embeddings, torch.tensor(labels))[1]

    untrained = accuracy()
    training.fit_head(model, criterion, features, labels, epochs=8, batch_size=64)
    assert not model.neck.training and accuracy() > 0.95 > untrained
    assert all(torch.equal(v, backbone[k]) for k, v in model.backbone.state_dict().items())


def test_head_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    model = models.create("siamese_small", embedding_dim=4)
    with caplog.at_level("INFO", "vipr"):
        how = {"epochs": 2, "batch_size": 4}
        training.fit_head(model, losses.ArcFace(4, 2), np.eye(8, 256), np.arange(8) % 2, **how)
    assert [line[:26] for line in caplog.messages] == [
        "epochs of the head: 1 of 2",
        "epochs of the head: 2 of 2",
    ]


def test_head_without_a_neck_says_to_make_one():
    with pytest.raises(
        ValueError, match="trains a neck and the model has none: give it an embedding_dim"
    ):
        training.fit_head(
            models.create("siamese_small"),
            losses.ArcFace(4, 2),
            np.zeros((4, 256)),
            np.zeros(4, int),
        )


def test_unknown_settings_of_a_recipe_are_refused(toy_data, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'emma'"):
        fit(toy_data, tmp_path, emma=0.9)


@pytest.mark.filterwarnings("ignore:batches hold", "ignore:only", "ignore:collapse")
@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("counts", [[1, 1], [1] * 24, [20, 1, 1, 1, 1]])
def test_every_loss_trains_on_any_catalogue(toy_data, tmp_path, loss, counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    model = models.create("siamese_small", embedding_dim=16)
    criterion = losses.criterion(loss, "cosine", 16, counts=np.bincount(labels))
    transform = transforms.augmentation("kit", 32)
    rows = np.arange(len(labels)) % 12
    photos = Photos(toy_data[1], rows, transform, labels=labels, shop=True, clutter=0.5)
    batches = sampling.sampler("products", labels, batch_size=32)
    before = model.neck[0].weight.clone()
    history = training.fit(model, criterion, photos, batches, folder=tmp_path, epochs=1, lr=1e-3)
    assert np.isfinite(history.loss).all() and not torch.equal(model.neck[0].weight, before)


def test_no_two_photos_of_an_epoch_are_the_same_pixels(toy_data, tmp_path):
    model, criterion, photos, _ = setting(toy_data)
    labels = np.repeat([0, 1], 2)
    photos = Photos(photos.store, photos.rows[:4], photos.transform, labels=labels)
    sampler = sampling.PKSampler(labels, batch_size=8)
    seen = []
    state = started(model, criterion, photos, sampler, folder=tmp_path)
    state.step = lambda pixels, labels: seen.extend(pixels)
    state.run_epoch()
    assert len(seen) == 8
    assert len({image.numpy().tobytes() for image in seen}) == 8


# -------------------------------------------------------------------------------- several processes


LOSSES = ["contrastive", "arcface"]


def one_of_two(rank, toy_data, folder):
    store = training.distributed.FileStore(str(folder / "store"), 2)
    training.distributed.init_process_group(  # a minute: the other may have failed
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    for loss in LOSSES:
        one_step(toy_data, folder, loss, 2)


def one_step(toy_data, folder, loss, processes):
    """Loss and gradients of one step without batch statistics, written to <folder>/<loss>-*.pt."""
    torch.set_num_threads(1)
    model, criterion, photos, sampler = setting(toy_data)
    if loss == "contrastive":
        criterion = losses.criterion("contrastive", "cosine", 16)
    state = started(model, criterion, photos, sampler, processes=processes)
    rows = state.begin_epoch()[0]
    model.eval()
    pixels, labels = zip(*[photos[item][:2] for item in rows])
    state.optimizer.step = lambda *_, **__: None
    state.step(torch.stack(pixels), torch.tensor(labels))
    learned = [*model.parameters()]
    learned += criterion.parameters() if loss == "arcface" else []
    gradients = [parameter.grad for parameter in learned]
    name = f"{loss}-{processes}-{training._rank()}.pt"
    torch.save({"loss": state.results[0][0], "gradients": gradients}, folder / name)


def test_two_processes_have_the_loss_and_gradients_of_one_with_the_joint_batch(toy_data, tmp_path):
    other = multiprocessing.get_context("spawn").Process(
        target=one_of_two, args=(1, toy_data, tmp_path)
    )
    other.start()
    try:
        one_of_two(0, toy_data, tmp_path)
    finally:
        training.distributed.destroy_process_group()
        other.join()
    for loss in LOSSES:
        one_step(toy_data, tmp_path, loss, 1)
        found = [tmp_path / f"{loss}-{name}.pt" for name in ("1-0", "2-0", "2-1")]
        whole, first, second = (torch.load(path, weights_only=False) for path in found)
        assert first["loss"] == second["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        gradients = [part["gradients"] for part in (whole, first, second)]
        for a, b, c in zip(*gradients, strict=True):
            torch.testing.assert_close(b, c, rtol=0, atol=0)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def not_a_number(embeddings, labels):
    return embeddings.sum() * float("nan"), 0.0


def broken(model):
    raise ZeroDivisionError("no photos to validate on")


@pytest.mark.long
def test_two_processes_fit_into_a_budget_by_the_first_ones_clock_and_the_weights_come_back(
    toy_data, tmp_path, capfd
):
    model, criterion, *rest = setting(toy_data)
    how = {"folder": tmp_path, "epochs": 10_000, "lr": 1e-3, "processes": 2, "frozen_epochs": 5_000}
    start = criterion.centres.detach().clone()
    history = training.fit(model, criterion, *rest, max_minutes=0.05, **how)
    assert training.cut_short(history).endswith("of 10000 epochs, fitted into 0.05 minutes")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["history.csv", "trained.pt"]
    assert not equal(model.backbone, setting(toy_data)[0].backbone) and not model.training
    assert not torch.equal(criterion.centres, start)
    assert capfd.readouterr().out.count("epoch 1/10000") == 1
    assert not training.distributed.is_initialized()


@pytest.mark.long
def test_a_process_that_dies_ends_training_with_its_error(toy_data, tmp_path, monkeypatch):
    model, criterion, *rest = setting(toy_data)
    how = {"folder": tmp_path, "epochs": 6, "lr": 1e-3, "processes": 2}
    with pytest.raises(RuntimeError, match="ended: ZeroDivisionError: no photos to validate on"):
        training.fit(model, criterion, *rest, validate=broken, **how)
    assert [f.name for f in tmp_path.iterdir()] == []

    def diverging(*_, **__):
        raise training.ProcessException("...\ntraining.Diverged: loss is nan in epoch 0", 1, 7)

    monkeypatch.setattr(training, "spawn", diverging)
    with pytest.raises(training.Diverged, match="process 1 ended: .*Diverged: loss is nan in epo"):
        training.fit(model, criterion, *rest, **how)


def test_what_cannot_be_sent_to_other_processes_and_missing_gpus_are_named(toy_data, tmp_path):
    parts = setting(toy_data)
    how = {"folder": tmp_path, "epochs": 1, "lr": 1e-3, "processes": 2}
    with pytest.raises(ValueError, match="validate to other processes by pickle.* or processes=1"):
        training.fit(*parts, validate=lambda model: {}, **how)
    assert [f.name for f in tmp_path.iterdir()] == []
    many = how | {"processes": torch.cuda.device_count() + 2, "device": torch.device("cuda")}
    many["precision"] = "float32"
    with pytest.raises(ValueError, match="need a GPU each, this machine has"):
        training.fit(*parts, **many)


def test_parts_of_a_batch_are_alike_and_what_cannot_be_divided_is_left_out():
    batches = [np.arange(9), np.arange(3), np.arange(4)]
    assert [list(b) for b in training._shares(batches, 2)] == [[0, 1, 2, 3], [0, 1]]


# ---------------------------------------------------------------------------------- what goes wrong


def test_loss_that_is_not_finite_stops_with_the_remedy(toy_data, tmp_path):
    model, _, *rest = setting(toy_data)
    with pytest.raises(
        training.Diverged, match="loss is nan in epoch 0, batch 0: lower lr; the last"
    ):
        training.fit(model, not_a_number, *rest, folder=tmp_path, epochs=1, lr=1e-3)


def test_collapse_is_warned_of_with_what_to_change():
    with pytest.warns(
        UserWarning,
        match="collapse: random pairs lie 0.010 apart .* lower lr, use mining='semi_hard'",
    ):
        training._warn_of_collapse({"random_distance": 0.01, "active": 0.5}, of_pairs=True)
    with pytest.warns(UserWarning, match="only 0.01% of the pairs or triplets are still active"):
        training._warn_of_collapse({"random_distance": 0.9, "active": 0.0001}, of_pairs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training._warn_of_collapse({"random_distance": 0.8, "active": 0.2}, of_pairs=True)
        training._warn_of_collapse({"random_distance": 0.8, "active": 0.0}, of_pairs=False)


def test_full_disk_leaves_the_last_checkpoint_usable(toy_data, tmp_path, monkeypatch):
    state = started(*setting(toy_data), folder=tmp_path)
    state.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(data, file):
        file.write(b"half a checkpoint")
        raise RuntimeError(
            "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file"
        )

    monkeypatch.setattr(training.torch, "save", full)
    with pytest.raises(
        OSError, match="disk full while writing checkpoint.pt .* the file before it is untouched"
    ) as caught:
        state.save()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(
        list(tmp_path.iterdir())
    ) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_on_a_really_full_disk_is_recognised():
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises((OSError, RuntimeError)) as caught,
    ):
        torch.save({"x": torch.zeros(10_000)}, file)
    assert FULL_DISK.search(str(caught.value))


# ----------------------------------------------------------------------------------------- resuming


class Stop(Exception):
    pass


def stop(model):
    raise Stop


def stopped(toy_data, folder, **recipe):
    """A checkpoint after the first of two epochs."""
    with pytest.raises(Stop):
        fit(toy_data, folder, **({"validate": stop, "validate_every": 2} | recipe))
    assert (folder / "checkpoint.pt").is_file()


def test_checkpoint_of_another_training_is_refused_with_all_that_differs(toy_data, tmp_path):
    stopped(toy_data, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    changes = {"lr": 5e-3, "clip_norm": 1.0, "validate_every": 2}
    with pytest.raises(
        ValueError,
        match=r"checkpoint.pt is of another training, with other clip_norm \(0.0 there, 1.0 "
        r"here\), lr \(0.001 there, 0.005 here\). Set them back to go on with it, or give another",
    ):
        fit(toy_data, tmp_path, **changes)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    model, criterion, photos, sampler = setting(toy_data)
    with torch.no_grad():
        criterion.centres.add_(1e-3)
    photos.transform = transforms.augmentation("study", 32)
    photos.labels = photos.labels[::-1].copy()
    sampler.batch_size = 6
    how = {"folder": tmp_path, "epochs": 2, "lr": 1e-3, "ema_decay": 0.9, "validate_every": 2}
    with pytest.raises(ValueError, match="with other augmentation") as caught:
        training.fit(model, criterion, photos, sampler, **how)
    named = str(caught.value)
    for name in (", first weights", ", labels", "degrees=50.0"):
        assert name in named
    assert "hash" not in named and "precision" not in named


@pytest.mark.parametrize(
    "loss, change, named",
    [
        ("triplet", {"distance": "euclidean"}, "distance='cosine', margin=0.2"),
        ("triplet", {"mining": "all"}, "mining='batch_hard'"),
        ("triplet", {"margin": 0.7}, "margin=0.7"),
        ("arcface", {"margin": 0.7}, "margins 0.3 to 0.3 rad"),
        ("arcface+triplet", {"mining": "all"}, "mining='all'"),
        ("adaptive_arcface", {"loss": "arcface"}, "margins 0.3 to 0.3 rad"),
    ],
)
def test_losses_name_what_they_were_set_to(toy_data, loss, change, named):
    model, _, *data = setting(toy_data)
    asked = {"loss": loss, "distance": "cosine", "embedding_dim": 16, "counts": [1, 2, 300]}

    def words(changed):
        return started(model, losses.criterion(**(asked | changed)), *data).identity["loss"]

    one, same, other = words({}), words({}), words(change)
    assert one == same != other and named in one + other and " at 0x" not in one


def test_identity_of_a_training_names_its_kind_of_device(toy_data):
    state = started(*setting(toy_data))
    parts = state.network, state.photos, state.sampler
    there = training._identity(*parts, replace(state.recipe, device=torch.device("cuda", 1)))
    assert training._differing(there, state.identity) == ["device (cuda there, cpu here)"]


def test_checkpoint_of_an_earlier_version_of_the_training_is_refused(toy_data, tmp_path):
    stopped(toy_data, tmp_path)
    data = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(data | {"identity": "0123456789abcdef"}, tmp_path / "checkpoint.pt")
    message = f"with other code \\(1 there, {training.VERSION} here\\)"
    for processes in (0, 1):
        with pytest.raises(ValueError, match=message):
            fit(toy_data, tmp_path, validate_every=2, processes=processes)


def test_what_was_trained_is_whole_on_disk_and_comes_back_at_once(toy_data, tmp_path, capsys):
    model, criterion, photos, sampler = setting(toy_data)
    how = {"folder": tmp_path, "epochs": 2, "lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(pd.DataFrame, "to_csv", no_room)
        training.fit(model, criterion, photos, sampler, **how)
    assert [f.name for f in tmp_path.iterdir()] == ["trained.pt"]
    start = setting(toy_data)
    for part in start[:2]:
        part.to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "step", None)  # no step is taken
        history = training.fit(*start, **how, processes=0, max_minutes=9.0)
    assert equal(start[0], model) and equal(start[1], criterion) and not start[0].training
    assert list(history.epoch) == [1, 2] and history.loss.notna().all()
    assert f"already trained for 2 epochs: {tmp_path}" in capsys.readouterr().out
    another, _ = fit(toy_data, tmp_path, ema_decay=0.0, lr=2e-3)
    again, _ = fit(toy_data, tmp_path, ema_decay=0.0, lr=2e-3)
    assert equal(another, again) and not equal(another, model)


def no_room(*_, **__):
    raise OSError("no room")


def test_training_that_was_cut_short_is_done_again_with_other_minutes(toy_data, tmp_path, clock):
    minutes = {"steps": 2, "epochs": 4, "criterion": not_collapsed}
    for max_minutes, steps in ((0.5, 3), (0.5, 0), (1.0, 6)):
        *_, rates, _ = timed_fit(toy_data, tmp_path, clock, max_minutes=max_minutes, **minutes)
        assert len(rates) == steps


def not_collapsed(embeddings, labels):
    return losses.contrastive(embeddings, labels, margin=2.0)


# ----------------------------------------------------------------------------------------- sessions


@pytest.mark.filterwarnings("ignore:collapse", "ignore:only")
def test_training_over_sessions_ends_with_the_weights_of_one(toy_data, tmp_path, clock):
    def validate(model):
        clock.now += 30.0
        state = model.state_dict()["backbone.conv1.weight"]
        return {"map_at_5": float(state.abs().sum()) % 1}

    recipe = {"max_minutes": 5.0, "validate": validate, "frozen_epochs": 1, "ema_decay": 0.9}
    whole, expected, *_ = timed_fit(toy_data, tmp_path / "whole", clock, **recipe)
    texts, sessions, history = [], 0, None
    while history is None or history.continues.iloc[-1]:
        clock.now += 5000.0  # between two sessions
        start = clock.now
        part, history, *_ = timed_fit(
            toy_data, tmp_path / "parts", clock, session_minutes=80 / 60, **recipe
        )
        texts.append(training.cut_short(history))
        sessions += 1
        pieces = {file.name for file in (tmp_path / "parts").iterdir()}
        last = "checkpoint.pt" if history.continues.iloc[-1] else "trained.pt"
        assert pieces == {"history.csv", last} and not part.training
        assert clock.now - start <= 80 + 30 + 10 and history.map_at_5.iloc[-1] >= 0
    assert sessions > 3 and equal(whole, part)
    pd.testing.assert_frame_equal(history, expected)
    assert texts[0] == "to 0.8 of 4 epochs; continues from its checkpoint"
    assert texts[-1].endswith("fitted into 5 minutes")


@pytest.mark.long
@pytest.mark.parametrize("mount", ["kaggle/input/study", "kaggle/input/notebooks/somebody/study"])
def test_session_finds_what_an_earlier_one_left_among_its_outputs(
    toy_data, tmp_path, capsys, monkeypatch, mount
):
    whole, _ = fit(toy_data, tmp_path / "whole")
    attached = tmp_path / mount / "submissions" / "run" / "part"
    stopped(toy_data, attached, validate_every=1, checkpoint_minutes=1e-9)
    before = (attached / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(platform, "PLATFORM_ROOT", tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    own = tmp_path / "working" / "run" / "part"
    capsys.readouterr()
    resumed, _ = fit(toy_data, own)
    assert f"from {attached / 'checkpoint.pt'}" in capsys.readouterr().out
    assert equal(resumed, whole) and (attached / "checkpoint.pt").read_bytes() == before
    (own / "trained.pt").replace(attached / "trained.pt")
    for place in (attached, own):  # from now on it stands among this session's outputs
        assert equal(fit(toy_data, own)[0], whole)
        assert f"epochs: {place / 'trained.pt'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another training, with other seed .* \(detach\)"):
        fit(toy_data, own, seed=7)


def test_log_tells_of_start_epochs_resume_and_end_with_the_time_left(
    toy_data, tmp_path, clock, caplog
):
    caplog.set_level("INFO", logger="vipr")
    recipe = {"epochs": 2, "session_minutes": 150 / 60, "criterion": not_collapsed}
    for _ in range(3):
        timed_fit(toy_data, tmp_path, clock, **recipe)
    told = [re.sub(r"loss \S+  active \S+", "...", line) for line in caplog.messages]
    told = [line.replace(str(tmp_path), "run") for line in told]
    assert told == [
        "training starts: 44 photos, 10 steps an epoch, 2 epochs, float32 on cpu, processes: 1",
        "epoch 1/2  ...  100 s, about 0:01:40 left",
        "epoch 2/2  ...  150 s; CUT SHORT to 1.5 of 2 epochs; continues from its checkpoint, "
        "about 0:00:50 left",
        "resumed in epoch 2/2 after 2.5 minutes, in float32 (float32 before), from "
        "run/checkpoint.pt",
        "epoch 2/2  ...  200 s, about 0:00:00 left",
        "already trained for 2 epochs: run/trained.pt; remove it to repeat",
    ]


CHILD = """
import pickle, sys, torch
torch.set_num_threads({threads})
sys.path[:0] = [{tests!r}]
from test_training import models, setting, training
toy_data = pickle.load(open({data!r}, "rb"))
model, *rest = setting(toy_data)
training.fit(model, *rest, folder={folder!r}, **{how!r})
models.save(model, {folder!r} + "/model.pt")
"""


@pytest.mark.long  # a kill at the N-th call and sessions that end are tried in every run
def test_run_killed_at_random_steps_ends_with_the_same_weights_bit_for_bit(toy_data, tmp_path):
    import pickle

    (tmp_path / "data.pkl").write_bytes(pickle.dumps(toy_data))
    how = {"epochs": 4, "lr": 1e-3, "ema_decay": 0.9, "checkpoint_minutes": 1e-9}

    def command(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        values = {
            "tests": str(ROOT / "tests"),
            "data": str(tmp_path / "data.pkl"),
            "folder": str(tmp_path / folder),
            "threads": torch.get_num_threads(),
            "how": how,
        }
        return [sys.executable, "-c", CHILD.format(**values)]

    whole, _ = fit(toy_data, tmp_path / "whole", **how)
    rng, kills = np.random.default_rng(int.from_bytes(os.urandom(4), "little")), 0
    for _ in range(5):
        child = subprocess.Popen(
            command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        checkpoint = tmp_path / "killed" / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while child.poll() is None and (
            not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1
    subprocess.run(command("killed"), check=True, cwd=ROOT, capture_output=True)
    assert equal(whole, models.load(tmp_path / "killed" / "model.pt"))


# ----------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_training_in_half_precision_takes_the_first_step_of_float32_within_its_bits(
    toy_data, tmp_path, precision, bits
):
    """Each layer rounds its input, weights and output by up to 2 ** -bits, independent roundings
    add in squares. The logits are off by as much as the embeddings, times the scale; their
    cross-entropy by no more than twice that."""

    def loss(precision):
        model, criterion, photos, sampler = setting(toy_data)
        sampler.batches = lambda epoch, whole=sampler.batches: whole(epoch)[:1]
        how = {"epochs": 1, "lr": 1e-3}
        history = training.fit(
            model, criterion, photos, sampler, folder=tmp_path, precision=precision, **how
        )
        return history.loss[0], model, criterion

    exact, model, criterion = loss("float32")
    layers = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules())
    assert abs(loss(precision)[0] - exact) <= 2 * criterion.scale * (3 * layers) ** 0.5 * 2.0**-bits


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.long
def test_training_in_half_precision_learns(toy_data, tmp_path, precision):
    how = {"network": "test_convnext3", "precision": precision, "ema_decay": 0.0}
    _, history = fit(toy_data, tmp_path, epochs=12, **how)  # a scaler skips its first steps
    assert np.isfinite(history.loss).all() and history.loss.iloc[-1] < 0.9 * history.loss.iloc[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_training_in_half_precision_learns_on_a_gpu(toy_data, tmp_path, precision):
    _, history = fit(toy_data, tmp_path, epochs=4, device=torch.device("cuda"), precision=precision)
    assert np.isfinite(history.loss).all() and history.loss.iloc[-1] < 0.9 * history.loss.iloc[0]
