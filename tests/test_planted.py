"""Silent wrongness, planted as it really happens: the kit has to notice it, and to let the honest
twin pass.

| planted | noticed by | tests |
|---|---|---|
| labels a row off their photos | notebook 01: page and run.json; notebook 09 | here |
| weights of another network, which fit | `models.read_state` | here |
| pixels in another order or normalisation | structure: a model carries its own | here |
| evaluation's transform in training | `Task.training_photos` | here |
| a random transform in validation | structure: `embed` makes its own | here |
| features of other weights, size, precision | the key of the cache | test_embedding: cached_... |
| features of other photos, means, pooling | the key of the cache | here |
| train photos among the test's | notebook 01: page, run.json, leaks.csv | here, test_catalog |
| embeddings or rows of other photos | `Task.rows` | here |
| a whitening fitted on queries | `Task.known` | here, test_task: answers_of_... |
| held-out photos in training | `Task.training_photos` | here |
| a run that held out other photos | `runs.validated`, `Choice.open` | here, test_choice |
| a run of other data | `runs.validated`, `Choice.open` | here, test_runs |
| a checkpoint of another training | `training.fit` | test_training: checkpoint_of_... |
| the toy set for a competition | `find_data_root`, `kaggle collect` | here |
| the toy set for a data_root | `find_data_root` | test_host: a_named_folder_... |

Not noticed: bare arrays in another order handed to `task.ranked` or `search.top_k`, which know no
photos; labels that slipped in a table of some dozens of photos sorted by class, too few to tell;
near copies outside of notebook 01.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import series
import timm
import torch
from shapes import cut

from vipr_utils.data import audit, catalog, toy, transforms
from vipr_utils.data.store import build_store
from vipr_utils.host import platform
from vipr_utils.judge import runs
from vipr_utils.judge.choice import Choice
from vipr_utils.judge.task import Task, View
from vipr_utils.learn import models
from vipr_utils.retrieve import embedding
from vipr_utils.retrieve.search import top_k
from vipr_utils.run import kaggle

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
REFERENCE = ROOT / "submissions" / "reference"


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory):
    """All 24 products of the toy set, at 64 px."""
    return toy.generate(tmp_path_factory.mktemp("whole") / "toy", products=24, image_size=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task(toy_root, cache):
    return Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(cache))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.create("siamese_small", weights="none", embedding_dim=16)


# ------------------------------------------------------------------------ labels, and copies


def cells(*beginnings):
    """The code of the cells of notebook 01 that begin so."""
    page = json.loads((NOTEBOOKS / "01_eda.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    found = [source for start in beginnings for source in sources if source.startswith(start)]
    assert len(found) == len(beginnings)
    return "\n".join(found)


def slips(root, cache):
    """The tables whose labels slipped, by notebook 01; what it shows."""
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=cache, store_px=128)
    names = {"photos": photos[store.readable], "store": store, "np": np, "top_k": top_k}
    shown = []
    names["Markdown"] = shown.append
    exec(cells("known = photos", "tables = known"), names)
    return names["slips"], shown[0]


def copied(root, folder):
    shutil.copytree(root, folder)
    return folder


def slip(root, split, first=0):
    """The class column of a table, from a row on, a row down."""
    table = pd.read_csv(root / f"{split}.csv", dtype=str)
    table.loc[first:, "class"] = np.roll(table["class"][first:], 1)
    table.to_csv(root / f"{split}.csv", index=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_slipped_by_a_row_are_noticed(whole_toy, tmp_path, cache, split):
    root = copied(whole_toy, tmp_path / "toy")
    assert slips(root, cache)[0] == {}
    slip(root, split)
    found, shown = slips(root, cache)
    assert found == {split: -1}
    assert f"LABELS HAVE SLIPPED BY A ROW in {split}: " in shown


def test_labels_that_slipped_from_the_middle_of_the_table_on_are_noticed(
    whole_toy, tmp_path, cache
):
    root = copied(whole_toy, tmp_path / "toy")
    slip(root, "train", first=93)
    assert slips(root, cache)[0] == {"train": -1}


@pytest.mark.parametrize(
    "shape",
    [
        "one_photo_a_product",
        "two_photos_a_product",
        "two_products_and_three_queries",
        "shop_photos_alone",
        "no_labels",
        "folders_with_labels",
        "one_product_of_300_photos",
    ],
)
def test_labels_of_no_honest_shape_are_doubted(whole_toy, tmp_path, cache, shape):
    found, shown = slips(cut(shape, whole_toy, tmp_path / shape), cache)
    assert found == {} and shown.startswith("No table's labels fit its photos better")


@pytest.mark.skipif(
    "VIPR_PLANTED" not in os.environ, reason="packs 5,206 photos: set $VIPR_PLANTED"
)
def test_labels_of_real_photos_are_doubted_where_they_slipped_alone(grocery, tmp_path, cache):
    root = tmp_path / "grocery"
    root.mkdir()
    for split in ("train", "test"):
        (root / split).symlink_to(grocery / split)
        shutil.copy(grocery / f"{split}.csv", root)
    assert slips(root, cache)[0] == {}
    slip(root, "train")  # sorted by class: only the last photo of each is wrong
    assert slips(root, cache)[0] == {"train": -1}


@pytest.mark.parametrize("same", [True, False])
def test_train_photo_among_the_test_photos_is_noticed(whole_toy, tmp_path, cache, same):
    root = copied(whole_toy, tmp_path / "toy")
    train, test = (pd.read_csv(root / f"{split}.csv") for split in ("train", "test"))
    asked = test.iloc[5]
    source = train[(train["class"] == asked["class"]) == same].iloc[0]

    def leaked():
        photos, _ = catalog.read(root)
        store = build_store(photos, cache_dir=cache, store_px=128)
        hashes = pd.DataFrame({"hash": [audit.difference_hash(store[r]) for r in photos.index]})
        names = {"photos": photos, "store": store, "np": np, "audit": audit, "folder": tmp_path}
        exec(cells("exact = audit"), names | {"looks": hashes, "looked_at": photos, "near_bits": 2})
        return pd.read_csv(tmp_path / "leaks.csv"), photos

    assert leaked()[0].empty
    shutil.copy(root / "train" / source["name"], root / "test" / asked["name"])
    found, photos = leaked()
    pair = photos.loc[[found["train"][0], found["test"][0]], "image_id"].tolist()
    assert pair == [f"train/{source['name']}", f"test/{asked['name']}"]
    assert found["same_product"].tolist() == [same]


@pytest.mark.parametrize("slipped", [0, 1])
def test_what_01_doubts_stands_before_the_scores(slipped, tmp_path):
    scored = REFERENCE / "04_pretrained_sweep"
    shutil.copytree(scored, tmp_path / scored.name)
    record = json.loads((scored / "run.json").read_text(encoding="utf-8"))
    record |= {"run": "01_eda", "notebook": "01_eda", "model": None}
    record["metrics"] = {"tables whose labels slipped": slipped, "unreadable files": 0}
    (tmp_path / "01_eda").mkdir()
    (tmp_path / "01_eda" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    names = series.run("09_scoreboard", output_dir=str(tmp_path))
    assert names["doubts"] == ["tables whose labels slipped: 1"] * slipped and names["looked"]


# ----------------------------------------------------------------- networks and what they are shown


@pytest.mark.parametrize("carried", ["its name", "its record"])
def test_weights_of_another_network_are_refused_though_every_tensor_fits(tmp_path, carried):
    theirs = models.create("tf_efficientnet_lite0", weights="none")
    if carried == "its name":  # the same tensors, other padding, other mean and std
        file = tmp_path / "tf_efficientnet_lite0.pth"
        torch.save(theirs.backbone.state_dict(), file)
    else:
        file = models.save(theirs, tmp_path / "model.pt")
    with pytest.raises(models.WeightsError, match="made for 'tf_efficientnet_lite0': take that"):
        models.create("efficientnet_lite0", weights=str(file))
    honest = models.create("tf_efficientnet_lite0", weights=str(file))
    assert honest.record["mean"] == (0.5, 0.5, 0.5)
    nameless = file.rename(tmp_path / "mine.pth") if carried == "its name" else file
    if carried == "its name":
        assert models.create("efficientnet_lite0", weights=str(nameless))


def test_weights_named_after_the_architecture_serve_each_of_its_tags(tmp_path):
    state = models.create("resnet18", weights="none").backbone.state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    for name in ("resnet18", "resnet18.tv_in1k"):
        made = models.create(name, weights=str(tmp_path / "resnet18.pth"))
        assert made.record["weights"]["source"] == "file resnet18.pth"
    torch.save(state, tmp_path / "resnet18.a1_in1k.pth")
    with pytest.raises(models.WeightsError, match="made for 'resnet18.a1_in1k'"):
        models.create("resnet18.tv_in1k", weights=str(tmp_path / "resnet18.a1_in1k.pth"))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "siamese_small"])
def test_network_sees_red_green_blue_normalised_as_its_own_weights_want_it(name, tmp_path):
    """By hand, in numpy: other means, another order of the channels, 0..1 or 0..255 all differ."""
    torch.manual_seed(0)
    model = models.load(models.save(models.create(name, weights="none"), tmp_path / "model.pt"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else transforms
    mean = getattr(config, "mean", None) or config.IMAGENET_MEAN
    std = getattr(config, "std", None) or config.IMAGENET_STD
    mean, std = (np.float32(x)[:, None, None] for x in (mean, std))
    by_hand = {
        "right": (pixels / np.float32(255) - mean) / std,
        "blue, green, red": (pixels[:, ::-1] / np.float32(255) - mean) / std,
        "not normalised": pixels / np.float32(255),
        "0 to 255": (pixels - mean) / std,
        "other mean": (pixels / np.float32(255) - mean - np.float32(0.1)) / std,
    }
    with torch.inference_mode():
        found = model(torch.from_numpy(pixels)).numpy()
        apart = {
            what: np.abs(model(torch.from_numpy(x.copy())).numpy() - found).max()
            for what, x in by_hand.items()
        }
    assert apart.pop("right") < 1e-5 and min(apart.values()) > 1e-4, apart


def test_evaluations_transform_is_refused_in_training(task):
    with pytest.raises(ValueError, match="seen as in evaluation: take transforms.augmentation"):
        task.training_photos(transforms.Evaluation(32))
    photos = task.training_photos(transforms.augmentation("kit", 32))
    first = photos[0][0].clone()
    photos.set_epoch(1)
    assert not torch.equal(first, photos[0][0])


def test_validation_has_nothing_random_in_it_whatever_was_drawn_before(task, network):
    with pytest.raises(TypeError, match="transform"):
        task.embed(network, transform=transforms.augmentation("kit", 32))
    found = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        network.train()  # as it is in the middle of a training
        found.append(task.validate(network, image_size=32))
    assert found[0] == found[1] and network.training


# ------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("other", ["weights", "mean", "pooling", "statistics"])
def test_features_of_another_network_are_never_taken_from_the_cache(
    toy_data, network, tmp_path, other
):
    photos, store = toy_data
    asked = {"image_size": 32, "precision": "float32"}
    embedding.embed(network, store, photos.index[:4], cache_dir=tmp_path, **asked)
    if other == "weights":  # another run's network of the same name and shape
        torch.manual_seed(1)
        network = models.create("siamese_small", weights="none", embedding_dim=16)
    elif other == "mean":
        network.record["mean"] = (0.5, 0.5, 0.5)
    elif other == "statistics":  # a frozen backbone in train mode moves these alone
        next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean += 1
    else:
        state = network.state_dict()
        network = models.create("siamese_small", weights="none", embedding_dim=16, pooling="max")
        network.load_state_dict(state)
    found = embedding.embed(network, store, photos.index[:4], cache_dir=tmp_path, **asked)
    fresh = embedding.embed(network, store, photos.index[:4], **asked)
    np.testing.assert_array_equal(found, fresh)
    assert len(list((tmp_path / "pooled").iterdir())) == 2


def test_features_of_other_photos_are_never_taken_from_the_cache(toy_root, network, tmp_path):
    root = copied(toy_root, tmp_path / "toy")
    found = []
    for _ in range(2):
        photos, _ = catalog.read(root)
        store = build_store(photos, cache_dir=tmp_path, store_px=96)
        asked = {"image_size": 32, "cache_dir": tmp_path}
        found.append(embedding.embed(network, store, photos.index[:2], **asked))
        first, second = (root / photos["path"][row] for row in (0, 1))
        first.write_bytes(second.read_bytes())  # somebody replaced a photo
    assert not np.allclose(found[0][0], found[1][0], atol=1e-3)
    np.testing.assert_array_equal(found[1][0], found[1][1])


# ------------------------------------------------------------------------- rows, queries, held out


def test_gallery_in_another_order_is_searched_by_its_own_embeddings(task, network):
    embeddings = task.embed(network, image_size=32)
    queries, gallery = task.views["test"]
    shuffled = View(queries, gallery.sample(frac=1, random_state=0))
    for steps in ([], ["learned_whitening(8)", "product_votes(5)"]):
        found, other = (task.retrieve(embeddings, v, steps=steps) for v in ("test", shuffled))
        np.testing.assert_allclose(other.average_precision, found.average_precision)
        names = gallery["name"].to_numpy()[found.ranks[:, 0]]
        np.testing.assert_array_equal(shuffled.gallery["name"].to_numpy()[other.ranks[:, 0]], names)


def test_embeddings_and_rows_of_other_photos_are_refused(task, network):
    embeddings = task.embed(network, image_size=32)
    for planted in (embeddings[:-1], np.concatenate([embeddings, embeddings[:1]])):
        with pytest.raises(ValueError, match="not of this task's photos"):
            task.retrieve(planted, "test")
    queries, gallery = task.views["test"]
    foreign = View(queries, gallery.set_index(gallery.index + 10_000))
    with pytest.raises(ValueError, match="or a row asked for is not among them"):
        task.rows(embeddings, foreign.gallery)
    with pytest.raises(KeyError, match="not in index"):
        task.retrieve(embeddings, foreign)
    assert task.retrieve(embeddings, View(queries, gallery)).metrics["n_gallery"] == len(gallery)


def test_no_projection_is_fitted_on_queries_however_their_view_is_named(task, network):
    view = task.views["validation"]
    assert not task.known(view).index.isin(view.queries.index).any()
    embeddings = task.embed(network, image_size=32)
    steps = ["learned_whitening(8)"]
    found, other = (task.retrieve(embeddings, v, steps=steps) for v in ("validation", view))
    np.testing.assert_array_equal(found.scores, other.scores)


@pytest.mark.parametrize("planted", ["validation", "test"])
def test_photos_that_are_asked_for_are_refused_in_training(task, planted):
    transform = transforms.augmentation("kit", 32)
    rows = pd.concat([task.fit, task.views[planted].queries.head(1)])
    with pytest.raises(ValueError, match="held out, or queries, or of other data: take rows of"):
        task.training_photos(transform, rows)
    assert len(task.training_photos(transform, task.fit.head(9))) == 9


# ------------------------------------------------------------------------------------ earlier runs


def finished(folder, network, fingerprint, split):
    folder.mkdir(parents=True)
    models.save(network, folder / "model.pt", image_size=32)
    held_out = {"how": "visits", "split": split, "map_at_5": 0.5}
    record = {"notebook": "03_scratch_siamese", "protocol": "test", "metrics": {}, "model": {}}
    data = {"fingerprint": fingerprint}
    runs.save(
        folder, params={}, seconds=1.0, data=data, validation=held_out, device="cpu", **record
    )


def test_run_of_other_data_or_split_is_told_or_refused_wherever_it_lies(
    task, network, tmp_path, recwarn
):
    data, split = task.photos.attrs["fingerprint"], task.validation.split
    own, elsewhere = tmp_path / "submissions", tmp_path / "elsewhere"
    finished(elsewhere / "honest", network, data, split)
    finished(elsewhere / "other_split", network, data, "0123456789abcdef")
    finished(elsewhere / "other_data", network, "0123456789abcdef", split)

    def opened(run):
        return Choice.open(task, own, backbones=[], model_run=str(elsewhere / run))

    assert list(opened("honest").networks) == ["honest"] and not recwarn.list
    with pytest.raises(ValueError, match="other_split: its model held out other photos"):
        opened("other_split")
    with pytest.warns(UserWarning, match="other_data: its model learned from other photos, val"):
        opened("other_data")


# --------------------------------------------------------------------------------- the toy set


@pytest.fixture
def on_kaggle(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.delenv("VIPR_DATA", raising=False)
    monkeypatch.setattr(platform, "PLATFORM_ROOT", tmp_path)
    return tmp_path / "kaggle" / "input"


@pytest.mark.parametrize("mount", ["competitions/products-10k", "products-10k"])
@pytest.mark.parametrize("holds", ["nothing", "archives", "another table"])
def test_toy_set_never_stands_in_for_a_competition_that_was_attached(on_kaggle, mount, holds):
    folder = on_kaggle / mount
    folder.mkdir(parents=True)
    if holds == "archives":
        (folder / "train.zip").touch()
    elif holds == "another table":
        (folder / "train.csv").write_text("id,price\n1,2\n")
    with pytest.raises(FileNotFoundError, match="a competition is attached .* accept its rules"):
        platform.preflight({})
    (folder / "train").mkdir()
    (folder / "train.csv").write_text("name,class\n1.jpg,1\n")
    assert platform.find_data_root()[0] == folder
    shutil.rmtree(folder)
    assert platform.find_data_root() == (None, "toy")  # a first look, with nothing attached


def test_kernel_that_ran_on_the_toy_set_is_not_collected(tmp_path, monkeypatch):
    monkeypatch.delenv("VIPR_DATA", raising=False)
    monkeypatch.setattr(toy, "generate", lambda folder: folder)
    root, _ = toy.data_root_or_toy("", str(tmp_path))
    prepared = {"run": "06_submission", "notebook": "06_submission", "kit": ""}
    for data, refused in ((root.name, True), ("products-10k", False)):
        record = dict.fromkeys(runs.KEYS, "") | prepared
        record |= {"params": {}, "metrics": {}, "model": {}, "seconds": 1.0}
        record["data"] = {"root": data}
        (tmp_path / "run.json").write_text(json.dumps(record))
        if refused:
            with pytest.raises(kaggle.KaggleError, match="ran on the toy set: join it on kaggle"):
                kaggle._check("vipr-06", prepared, tmp_path)
        else:
            kaggle._check("vipr-06", prepared, tmp_path)


# ------------------------------------------------------------------------------------ determinism


def numbers(task, threads):
    """Embeddings, lists and metrics of a network that is made anew, by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        network = models.create("siamese_small", weights="none", embedding_dim=16)
        embeddings = embedding.embed(network, task.store, task.photos.index, image_size=32)
        steps = ["learned_whitening(8)", "database_augmentation(2)", "alpha_query_expansion(3)"]
        steps += ["k_reciprocal(8, 3)", "product_votes(5)"]
        found = [task.retrieve(embeddings, steps=steps[:n]) for n in range(len(steps) + 1)]
    finally:
        torch.set_num_threads(before)
    return embeddings, found


def test_numbers_repeat_bit_for_bit_and_hang_on_threads_by_rounding_alone(task):
    """Over 1, 2 and 4 threads embeddings of length 1 differ by 1e-6 at most, plain scores as much,
    those behind steps by 1e-4, and mAP@5 by 0.02: two photos of 96 may swap places."""
    embeddings, found = numbers(task, 1)
    again, repeated = numbers(task, 1)
    np.testing.assert_array_equal(embeddings, again)
    for one, other in zip(found, repeated):
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.ranks, other.ranks)
        assert one.metrics == other.metrics
    for threads in (2, 4):
        moved, others = numbers(task, threads)
        np.testing.assert_allclose(moved, embeddings, atol=1e-6)
        for n, (one, other) in enumerate(zip(found, others)):
            np.testing.assert_allclose(other.scores, one.scores, atol=1e-4 if n else 1e-6)
            assert other.metrics["map_at_5"] == pytest.approx(one.metrics["map_at_5"], abs=0.02)
