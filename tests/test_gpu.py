"""GPU paths: walked by CUDA tensors that hold no numbers, run for real on the CPU.

For each there is a test marked `gpu`, which does the same where there is a CUDA device.
"""

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deadly import deadly
from test_training import FEW_SUMS, equal, fit, setting
from timm.utils import model_ema
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vipr_utils.data import store as stores
from vipr_utils.judge.task import Task, ranked
from vipr_utils.learn import losses, models, sampling, training
from vipr_utils.retrieve import embedding, rerank, search

pytestmark = pytest.mark.filterwarnings(
    "ignore:User provided device_type:UserWarning", "ignore:Accessing the data pointer:UserWarning"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def on_gpus(cards: int = 1):
    """Marks of a test that needs so many CUDA devices."""
    reason = f"needs {cards} CUDA device{'s' * (cards > 1)}"
    skip = pytest.mark.skipif(torch.cuda.device_count() < cards, reason=reason)
    return lambda test: pytest.mark.gpu(skip(test))


def on_devices():
    """The CPU, and CUDA where it is there."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.parametrize(
        "device", [CPU, pytest.param(CUDA, marks=[pytest.mark.gpu, skip])], ids=["cpu", "cuda"]
    )


# ------------------------------------------------------------------------ the walk without numbers


def zeros(tensor: torch.Tensor, *_, **__) -> np.ndarray:
    """In place of numbers, as numpy gives them out: TypeError off the CPU."""
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def number(tensor: torch.Tensor) -> float:
    """A step that an optimiser counts on the CPU is the first, nothing on a GPU is infinite."""
    return float(tensor.device.type == "cpu")


def checked_index(tensor: torch.Tensor, index) -> None:
    """RuntimeError for a GPU's index into a CPU's tensor, which fake tensors let pass."""
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, torch.Tensor) and part.device not in (CPU, tensor.device):
            raise RuntimeError(f"an index on {part.device} of a tensor on {tensor.device}")


def is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


def moved(module: nn.Module, convert, recurse=True) -> nn.Module:
    """nn.Module._apply without exchanging the insides of tensors, which fake ones cannot."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None and (new := convert(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def backward(loss: torch.Tensor) -> None:
    """Gradients of 0 for all that the loss hangs on: autograd's own engine asks for the GPU."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if leaf := getattr(node, "variable", None) is not None:
            node.variable.grad = torch.zeros_like(node.variable)
        ahead += [] if leaf else [following for following, _ in node.next_functions]


@contextmanager
def walk():
    """CUDA tensors without a GPU; any operation on tensors of two devices raises. What needs
    numbers goes on with zeros, and backward passes are left out.
    """
    get, put = torch.Tensor.__getitem__, torch.Tensor.__setitem__

    def getitem(tensor, index):
        checked_index(tensor, index)
        return get(tensor, slice(0, 1) if is_mask(index) else index)  # one row is masked

    def setitem(tensor, index, value):
        checked_index(tensor, index)
        if is_mask(index):
            index = slice(0, 1)
        elif isinstance(index, tuple):
            index = tuple(slice(0, 1) if is_mask(part) else part for part in index)
        put(tensor, index, value)

    def nonzero(tensor, **_):
        return torch.empty((0, tensor.ndim), dtype=torch.long, device=tensor.device)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("numpy", "__array__"):
            patch.setattr(torch.Tensor, name, zeros)
        for name in ("item", "__float__"):
            patch.setattr(torch.Tensor, name, number)
        patch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
        patch.setattr(torch.Tensor, "tolist", lambda tensor: np.zeros(tensor.shape).tolist())
        patch.setattr(torch.Tensor, "nonzero", nonzero)
        patch.setattr(torch.Tensor, "__getitem__", getitem)
        patch.setattr(torch.Tensor, "__setitem__", setitem)
        patch.setattr(torch.Tensor, "__format__", lambda tensor, how: "0")
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch, "Generator", lambda device=CPU, make=torch.Generator: make())
        patch.setattr(nn.Module, "_apply", moved)
        patch.setattr(model_ema, "deepcopy", another)
        patch.setattr(models, "copy", SimpleNamespace(deepcopy=another))
        # a scaler believes in the device
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        for module in (stores, embedding):
            patch.setattr(module, "loader", blank_batches)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def another(model: nn.Module) -> nn.Module:
    """In place of a copy: torch copies the memory of fake tensors, which is not theirs."""
    made = models.create(model.record["name"], embedding_dim=model.record["embedding_dim"])
    return made.to(next(model.parameters()).device, memory_format=torch.channels_last)


def blank_batches(photos, *, batch_size: int = 8, **_):
    """What a loader gives, on the CPU: (pixels, labels, rows)."""
    for start in range(0, len(photos), batch_size):
        n = min(batch_size, len(photos) - start)
        labels = torch.zeros(n, dtype=torch.long)
        yield torch.zeros(n, 3, 32, 32), labels, labels


def networks(loss: str, toy_data, *, device=CUDA, embedding_dim: int = 16, **recipe):
    """A training under way on that device."""
    model, _, photos, sampler = setting(toy_data)
    if loss == "arcface as given":
        criterion = setting(toy_data)[1]
    else:
        counts = np.bincount(photos.labels)
        criterion = losses.criterion(loss, "cosine", embedding_dim, counts=counts)
    settings = {"epochs": 1, "lr": 1e-3, "folder": Path("unused"), "precision": "float32"}
    recipe = training.Recipe(**(settings | {"device": device} | recipe))
    dtype = getattr(torch, recipe.precision)
    network = training._Network(model, criterion, dtype)
    state = training._Training(network, photos, sampler, recipe)
    state.begin_epoch()
    return state


def one_step(loss, toy_data, **recipe):
    state = networks(loss, toy_data, **recipe)
    pixels, labels, _ = next(blank_batches(range(8)))
    state.step(pixels, labels)
    assert state.batch == 1 and state.skipped == 0
    return state


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.long), "float16"])
def test_walk_through_a_step_of_training_and_its_validation(toy_data, loss, precision):
    with walk():
        state = one_step(
            loss, toy_data, precision=precision, clip_norm=1.0, ema_decay=0.9, optimizer="adam"
        )
        places = {x.device for x in state.network.state_dict().values()}
        assert places == {CUDA} and state.scaler.is_enabled() == (precision == "float16")
        rows = np.arange(12)
        found = embedding.embed(
            state.evaluated, toy_data[1], rows, device=CUDA, precision="float32"
        )
        assert found.shape == (12, 16)
        state._skip(float("inf"), list(state.network.buffers())) if precision == "float16" else None


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_walk_through_embeddings_and_the_head_behind_them(toy_data, precision):
    rows = np.arange(12)
    with walk():
        model = models.create("siamese_small", embedding_dim=16)
        settings = {"device": CUDA, "precision": precision}
        features = embedding.embed(model, toy_data[1], rows, features=True, **settings)
        criterion = losses.ArcFace(16, 2)  # the model stays on the GPU, the loss is on the CPU
        training.fit_head(model, criterion, features, rows % 2, epochs=1, device=CUDA)
        assert {x.device for x in model.state_dict().values()} == {CUDA}
        assert embedding.embed(model, toy_data[1], rows, **settings).shape == (12, 16)


@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_walk_through_a_search(monkeypatch, distance):
    monkeypatch.setattr(search, "QUERY_CHUNK", 3)
    monkeypatch.setattr(search, "GALLERY_CHUNK", 4)
    x = np.ones((10, 4), np.float32)
    with walk():
        scores, ranks = search.top_k(x[:7], x, 5, distance=distance, device=CUDA)
    assert scores.shape == ranks.shape == (7, 5)


@pytest.fixture(scope="module")
def task(toy_root, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("task"))
    settings = {"image_size": 32, "device": "cpu", "precision": "float32"}
    return Task(str(toy_root), cache_dir=cache, **settings)


def test_walk_through_retrieval_and_reranking(task):
    embeddings = np.ones((len(task.photos), 4), np.float32) / 2
    task.device = CUDA
    steps = ["k_reciprocal(k1=4, k2=2)", "alpha_query_expansion(k=2)"]
    with walk():
        for asked in ([], steps[:1], steps):
            found = task.retrieve(embeddings, steps=asked)
            assert found.ranks.shape == (len(task.views["test"].queries), 5)
        view = task.views["validation"]
        sides = [embeddings[: len(rows)] for rows in view]
        assert ranked(view, *sides, device=CUDA).ranks.shape[1] == 5
        unsearched = search.Search(*sides, *view, device=CUDA)
        found = rerank.k_reciprocal(unsearched.searched(6), k1=4, k2=2)
    assert found.ranks.shape == (len(view.queries), 6)


def test_walk_through_a_learned_whitening(task, monkeypatch):
    fitted = rerank.Projection(np.zeros(256, np.float32), np.zeros((256, 8), np.float32))
    monkeypatch.setattr(rerank, "fit_learned_whitening", lambda *_: fitted)
    task.device = CUDA
    with walk():
        model = models.create("siamese_small", embedding_dim=16)
        whitened = task.whitened(model, 8)
        assert {x.device for x in model.state_dict().values()} == {CUDA}  # where it embedded
        assert task.embed(whitened).shape == (len(task.photos), 8)
        assert {x.device for x in whitened.state_dict().values()} == {CUDA}
    task.device = CPU


PLANTED = {
    "a loss with a table on the CPU": "margins",
    "a sum with a mask of the CPU": "mask",
    "an index of the GPU into the CPU": "index",
    "numbers taken from the GPU": "numpy",
}


@pytest.mark.parametrize("what", PLANTED)
def test_walk_stops_at_tensors_of_two_devices(toy_data, what):
    def planted(embeddings, labels):
        loss = embeddings.square().sum()
        if PLANTED[what] == "mask":
            loss = loss + torch.ones(len(labels)).dot(embeddings[:, 0])
        elif PLANTED[what] == "index":
            loss = loss + torch.ones(5)[labels].sum().to(labels.device)
        elif PLANTED[what] == "numpy":
            loss.detach().numpy()
        return loss, 0.0

    with walk():
        state = networks("arcface", toy_data)
        if PLANTED[what] == "margins":
            margins = state.network.criterion._buffers.pop("margins")
            state.network.criterion.margins = margins.cpu()
        else:
            state.network.criterion = None
            state.network.__dict__["criterion"] = planted
            del state.network._modules["criterion"]
        with pytest.raises((RuntimeError, TypeError), match="device|cuda"):
            state.step(*next(blank_batches(range(8)))[:2])


def test_walk_stops_where_a_head_is_fed_from_the_cpu(toy_data, monkeypatch):
    to_device = torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda data, device=None, **kw: to_device(data, **kw))
    with walk(), pytest.raises(RuntimeError, match="on the same device|cpu"):
        model = models.create("siamese_small", embedding_dim=16)
        criterion = losses.ArcFace(16, 2)
        training.fit_head(
            model, criterion, np.ones((8, 256)), np.arange(8) % 2, epochs=1, device=CUDA
        )


@on_gpus()
def test_the_walked_path_on_a_gpu_gives_what_the_cpu_gives(toy_data, task):
    found = {}
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        model, rows = models.create("siamese_small", embedding_dim=16), task.fit.index
        settings = {"device": device, "precision": "float32", "image_size": 32}
        features = embedding.embed(model, task.store, rows, features=True, **settings)
        labels = task.training_photos(None).labels
        criterion = losses.ArcFace(16, labels.max() + 1)
        training.fit_head(model, criterion, features, labels, epochs=1, device=device)
        embeddings = embedding.embed(model, task.store, task.photos.index, **settings)
        task.device = device
        ranked_lists = task.retrieve(embeddings, steps=["k_reciprocal(k1=4, k2=2)"])
        found[device.type] = embeddings, ranked_lists.metrics["map_at_5"]
    assert (found["cpu"][0] * found["cuda"][0]).sum(1).min() > 0.999
    assert abs(found["cpu"][1] - found["cuda"][1]) < 0.05
    task.device = CPU


# ---------------------------------------------------------------------- half precision, for real

HALF = {"network": FEW_SUMS, "precision": "float16", "clip_norm": 1.0, "ema_decay": 0.9}


class Stop(Exception):
    pass


def score(model):
    return {"map_at_5": 0.5}


def stopping():
    """A validation that gives up the second time."""
    scores = iter([{"map_at_5": 0.5}])

    def validate(model):
        for found in scores:
            return found
        raise Stop

    return validate


@pytest.fixture
def small_scale(monkeypatch):
    """Of a scaler that has found its scale: at the usual first one, steps are skipped."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**4))


@on_devices()
@pytest.mark.usefixtures("small_scale")
def test_half_precision_with_clipping_and_average_goes_on_after_a_kill(toy_data, tmp_path, device):
    how = HALF | {"device": device, "epochs": 3}
    whole, expected = fit(toy_data, tmp_path / "whole", validate=score, **how)
    with pytest.raises(Stop):
        fit(toy_data, tmp_path / "killed", validate=stopping(), checkpoint_minutes=1e-9, **how)
    again, history = fit(toy_data, tmp_path / "killed", validate=score, **how)
    assert list(history.skipped) == [0, 0, 0] and np.isfinite(history.loss).all()
    if device.type == "cpu":
        assert equal(whole, again)
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-3)


@on_devices()
@pytest.mark.parametrize("first, then", [("float32", "float16"), ("float16", "float32")])
def test_training_may_go_on_in_another_precision(toy_data, tmp_path, capsys, device, first, then):
    how = {"network": FEW_SUMS, "device": device, "epochs": 3}
    with pytest.raises(Stop):
        fit(toy_data, tmp_path, validate=stopping(), precision=first, **how)
    _, history = fit(toy_data, tmp_path, validate=score, precision=then, **how)
    assert len(history) == 3 and np.isfinite(history.loss).all()
    assert f"in {then} ({first} before)" in capsys.readouterr().out
    data = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert data["identity"]["precision"] == then


def fit_with_infinite_steps(toy_data, folder, steps, **how):
    """Some steps see pixels that are infinite."""
    step, done = training._Training.step, iter(range(1000))

    def planted(state, pixels, labels):
        step(state, pixels * (float("inf") if next(done) in steps else 1.0), labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "step", planted)
        return fit(toy_data, folder, **(HALF | how))


@on_devices()
@pytest.mark.usefixtures("small_scale")
def test_infinite_loss_in_half_precision_skips_a_step_and_leaves_no_trace(
    toy_data, tmp_path, device
):
    how = {"device": device, "epochs": 2}
    model, history = fit_with_infinite_steps(toy_data, tmp_path, {1, 4, 7}, **how)
    steps = len(setting(toy_data)[3].batches(0))
    assert steps == 5 and list(history.skipped) == [2, 1]
    assert np.isfinite(history.loss).all()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@on_devices()
@pytest.mark.usefixtures("small_scale")
def test_infinite_gradients_are_counted_and_ten_in_a_row_stop(
    toy_data, tmp_path, device, monkeypatch
):
    update, infinite = training._Training._update, {1, 4, 7}

    def planted(state, step):
        if step - 1 in infinite:
            next(state.model.parameters()).grad.fill_(float("inf"))
        update(state, step)

    monkeypatch.setattr(training._Training, "_update", planted)
    how = HALF | {"device": device, "epochs": 2}
    model, history = fit(toy_data, tmp_path / "some", **how)
    assert list(history.skipped) == [2, 1]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    infinite |= set(range(99))
    with pytest.raises(training.Diverged, match="a gradient is infinite in epoch 1, batch 4, as"):
        fit(toy_data, tmp_path / "all", **how)


@on_devices()
@pytest.mark.usefixtures("small_scale")
def test_ten_infinite_losses_in_a_row_stop_with_what_to_set(toy_data, tmp_path, device):
    how = {"device": device, "epochs": 4, "checkpoint_minutes": 1e-9}
    message = "in epoch 2, batch 1, as in 10 steps in a row under float16: set precision='float32'"
    with pytest.raises(training.Diverged, match=message):
        fit_with_infinite_steps(toy_data, tmp_path, set(range(2, 99)), **how)
    assert (tmp_path / "checkpoint.pt").is_file()
    _, history = fit(toy_data, tmp_path, **(HALF | how | {"precision": "float32"}))
    assert len(history) == 4 and np.isfinite(history.loss.iloc[-1])
    with pytest.raises(training.Diverged, match="loss is .* in epoch 0, batch 2: lower lr; the"):
        fit_with_infinite_steps(toy_data, tmp_path / "b", {2}, **how | {"precision": "float32"})


@on_devices()
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_of_network_and_loss_together_are_clipped(toy_data, device, precision):
    lengths = {}
    for clip_norm in (0.0, 1e-2):
        how = {"precision": precision, "clip_norm": clip_norm, "device": device}
        state = networks("arcface", toy_data, **how)

        def noted(*_, state=state, clip_norm=clip_norm, **__):
            gradients = [p.grad.norm() for p in state.network.parameters() if p.grad is not None]
            lengths[clip_norm] = float(torch.stack(gradients).norm())
            assert state.network.criterion.centres.grad.norm() > 0

        state.scaler._init_scale = 256.0  # under float16; lengths are those without it
        state.optimizer.step = noted
        pixels, labels, _ = next(iter(state.loader(state.begin_epoch())))
        state.step(pixels, labels)
    assert lengths[0.0] > 0.1 and lengths[1e-2] == pytest.approx(1e-2, rel=1e-3)


# --------------------------------------------------------------- processes, workers, memory format


def by_two(toy_data, folder, device, *, step):
    """A training by two processes whose last batches are ragged: 7 photos a batch, the last 2."""
    model, _, photos, _ = setting(toy_data)
    sampler = sampling.ShuffledSampler(np.arange(44), batch_size=7)
    assert [len(batch) for batch in sampler.batches(0)] == [7] * 6 + [2]
    folder.mkdir(exist_ok=True)
    history = training.fit(
        model,
        partial(deadly, marker=folder / "steps", step=step),
        photos,
        sampler,
        folder=folder,
        epochs=2,
        lr=1e-3,
        precision="float32",
        processes=2,
        checkpoint_minutes=1e-9,
        device=device,
    )
    return model, history


def check_death_of_a_helper(toy_data, tmp_path, device):
    whole, history = by_two(toy_data, tmp_path / "whole", device, step=99)
    assert (
        list(history.passes) == [1.0, 2.0] and (tmp_path / "whole" / "steps").stat().st_size == 12
    )
    with pytest.raises(RuntimeError, match=r"training process \d ended: .*(SIGKILL|peer|closed)"):
        by_two(toy_data, tmp_path / "killed", device, step=9)
    assert (tmp_path / "killed" / "checkpoint.pt").is_file()
    again, history = by_two(toy_data, tmp_path / "killed", device, step=9)
    return whole, again, history


@pytest.mark.long
def test_two_processes_end_with_ragged_batches_and_after_the_death_of_one(
    toy_data, tmp_path, capfd
):
    whole, again, history = check_death_of_a_helper(toy_data, tmp_path, CPU)
    assert equal(whole, again) and list(history.passes) == [1.0, 2.0]
    assert "resumed in epoch 2/2" in capfd.readouterr().out


@on_gpus(2)
def test_two_gpus_end_with_ragged_batches_and_after_the_death_of_one(toy_data, tmp_path):
    whole, again, _ = check_death_of_a_helper(toy_data, tmp_path, torch.device("cuda"))
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-3)


@on_devices()
def test_worker_processes_give_the_pixels_of_none(toy_data, device):
    _, _, photos, sampler = setting(toy_data)
    photos.set_epoch(3)
    batches = sampling.with_occurrences(sampler.batches(3))
    seen = [
        list(stores.loader(photos, batch_sampler=batches, device=device, workers=workers))
        for workers in (0, 2)
    ]
    for one, other in zip(*seen, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) and a.is_pinned() == (device.type == "cuda")


@on_devices()
def test_channels_last_reaches_every_convolution_in_training_and_embedding(toy_data, device):
    state = networks("arcface", toy_data, device=device)
    seen = []

    def noted(module, inputs, output):
        weight = module.weight.is_contiguous(memory_format=torch.channels_last)
        seen.append(weight and inputs[0].is_contiguous(memory_format=torch.channels_last))

    convolutions = [m for m in state.model.backbone.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(noted)
    pixels, labels, _ = next(iter(state.loader(state.begin_epoch())))
    state.step(pixels, labels)
    assert len(seen) == len(convolutions) and all(seen)
    rows = state.photos.rows[:5]
    embedding.embed(state.model, toy_data[1], rows, device=device, precision="float32")
    assert len(seen) == 2 * len(convolutions) and all(seen)


# ------------------------------------------------------------------------- how many cards are used


def test_no_number_of_processes_takes_all_cards_where_they_were_seen_to_be_faster(
    toy_data, tmp_path, monkeypatch, capsys
):
    seconds, asked = {1: 0.5, 2: 0.3}, []

    def measured(function, *parts):
        asked.append(parts[-1].processes)
        return seconds[2] if function is training._seconds_a_batch else function(*parts)

    monkeypatch.setattr(training, "_cards", lambda device: 2)
    monkeypatch.setattr(training, "_seconds_a_batch", lambda *parts: seconds[1])
    monkeypatch.setattr(training, "_by_processes", measured)
    parts = [*setting(toy_data)]
    network = training._Network(*parts[:2], torch.float32)
    recipe = training.Recipe(epochs=1, lr=1e-3, folder=tmp_path, processes=0)
    chosen = partial(training._processes, network, *parts[2:], recipe)
    assert chosen() == 2 and asked == [2]
    line = "a batch takes 0.500 s on one card, 0.300 s on 2: training on 2, as gpus=2 would"
    assert line in capsys.readouterr().out
    seconds[2] = 0.6
    assert chosen() == 1 and "0.600 s on 2: training on 1" in capsys.readouterr().out

    def failing(*_):
        raise RuntimeError("no peer")

    monkeypatch.setattr(training, "_by_processes", failing)
    assert chosen() == 1
    assert "training on one card: 2 failed together (no peer)" in capsys.readouterr().out
    monkeypatch.setattr(training, "_cards", lambda device: 1)
    assert chosen() == 1 and not capsys.readouterr().out


def test_training_asks_how_many_cards_where_no_number_is_given(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_processes", lambda *parts: 1000)  # more than there are
    monkeypatch.setattr(training, "_by_processes", lambda run, *parts: parts[-1].processes)
    how = {"epochs": 1, "lr": 1e-3, "folder": tmp_path}
    assert training.fit(*setting(toy_data), processes=0, **how) == 1000
    assert len(training.fit(*setting(toy_data), processes=1, **how)) == 1


def check_measured(toy_data, tmp_path, capfd, device):
    model, criterion, *rest = setting(toy_data)
    network = training._Network(model, criterion, torch.float32)
    recipe = training.Recipe(epochs=1, lr=1e-3, folder=tmp_path, processes=0, device=device)
    chosen = training._processes(network, *rest, recipe)
    line = r"([\d.]+) s on one card, ([\d.]+) s on 2: training on (\d)"
    one, two, told = map(float, re.search(line, capfd.readouterr().out).groups())
    assert one > 0 < two and told == chosen == 1 + (two < one)
    assert equal(network.model, setting(toy_data)[0]) and not list(tmp_path.iterdir())


@pytest.mark.long
def test_measuring_by_one_and_by_two_processes_changes_nothing(
    toy_data, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(training, "_cards", lambda device: 2)
    check_measured(toy_data, tmp_path, capfd, CPU)


@on_gpus(2)
def test_two_gpus_are_measured_against_one(toy_data, tmp_path, capfd):
    check_measured(toy_data, tmp_path, capfd, torch.device("cuda"))


def test_resumed_training_keeps_the_processes_of_its_checkpoint(toy_data, tmp_path, monkeypatch):
    started = networks("contrastive", toy_data, device=CPU, folder=tmp_path, processes=2)
    started.save()
    monkeypatch.setattr(training, "_cards", lambda device: 1)
    recipe = training.Recipe(epochs=1, lr=1e-3, folder=tmp_path, processes=0)
    assert training._processes(started.network, started.photos, started.sampler, recipe) == 2
