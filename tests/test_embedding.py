"""Photos to embeddings to scores, on the toy set and, where it is there, on real photos."""

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog, transforms
from vipr_utils.data.store import open_data
from vipr_utils.host import platform
from vipr_utils.host.device import tune
from vipr_utils.judge import task
from vipr_utils.learn import models
from vipr_utils.retrieve import embedding, rerank


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.create("siamese_small", embedding_dim=16)


@pytest.mark.parametrize(("precision", "bits"), [("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_embeddings_are_the_models_own_of_the_eval_transform(toy_data, network, precision, bits):
    """Within the bits of the format: each layer rounds its input, weights and output by up to 2 ** -bits, and independent
    roundings add in squares."""
    photos, store = toy_data
    rows = photos.index[:5]
    found = embedding.embed(network, store, rows, image_size=32, batch_size=2, precision=precision)
    transform = transforms.eval_transform(32)
    with torch.inference_mode():
        expected = network(torch.stack([transform(store[r]) for r in rows])).numpy()
    layers = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in network.modules())
    assert np.linalg.norm(found - expected, axis=1).max() <= max(
        1e-5, (3 * layers) ** 0.5 * 2.0**-bits
    )
    assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_order_and_batch_size_change_nothing(toy_data, network):
    rows = toy_data[0].index[:7].to_numpy()
    one, other = (
        embedding.embed(network, toy_data[1], r, image_size=32, batch_size=b, precision="float32")
        for r, b in ((rows, 7), (rows[::-1], 2))
    )
    np.testing.assert_allclose(one, other[::-1], atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "size", "fit", "interpolation", "rows", "precision"])
def test_cached_embeddings_are_only_used_for_the_same_question(toy_data, network, tmp_path, change):
    rows = toy_data[0].index[:4]
    how = {"image_size": 32, "fit": "squash", "precision": "float32", "cache_dir": tmp_path}
    first = embedding.embed(network, toy_data[1], rows, **how)
    np.testing.assert_array_equal(embedding.embed(network, toy_data[1], rows, **how), first)
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    if change == "weights":
        with torch.no_grad():
            network.neck[0].weight.mul_(1.5)
    elif change == "interpolation":
        network.record["interpolation"] = "bicubic"
    rows = rows[::-1] if change == "rows" else rows
    how |= {
        "size": {"image_size": 48},
        "fit": {"fit": "crop"},
        "precision": {"precision": "bfloat16"},
    }.get(change, {})
    embedding.embed(network, toy_data[1], rows, **how)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def tables(queries, gallery):
    def table(products, split):
        return pd.DataFrame(
            {"product_id": products, "image_id": [f"{split}/{i}" for i in range(len(products))]}
        )

    return table(queries, "test"), table(gallery, "train")


def test_query_without_relevant_image_is_excluded_and_counted():
    queries, gallery = tables([1, 9], [1, 2])
    found = task.retrieve(
        np.eye(2, 4, dtype=np.float32), np.eye(2, 4, dtype=np.float32), queries, gallery
    )
    assert (found.metrics["n_queries"], found.metrics["n_excluded"]) == (1, 1)
    assert found.metrics["map_at_5"] == 1.0


def test_unreadable_query_is_answered_and_counted():
    queries, gallery = tables([1, 2], [1, 2, 2])
    q = np.array([[1, 0], [np.nan, 0]], np.float32)
    found = task.retrieve(q, np.array([[1, 0], [0, 1], [0, 1]], np.float32), queries, gallery)
    assert found.metrics["n_unreadable_queries"] == 1 and (found.ranks[1, :3] >= 0).all()


def test_gallery_with_nan_embeddings_is_refused_with_the_likely_cause():
    queries, gallery = tables([1], [1, 2])
    g = np.array([[1, 0], [np.nan, 0]], np.float32)
    with pytest.raises(
        ValueError,
        match=r"1 of 2 gallery embeddings hold NaN or infinity \(first: row 1\): the model",
    ):
        task.retrieve(np.eye(1, 2, dtype=np.float32), g, queries, gallery)


def test_a_query_in_the_gallery_never_meets_itself():
    _, gallery = tables([], [1, 1, 2])
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = task.retrieve(x, x, gallery, gallery)
    assert found.ranks[0, 0] == 1 and found.ranks[1, 0] == 0
    assert list(found.n_relevant) == [1, 1, 0]


def test_unlabelled_queries_give_lists_and_no_score():
    queries, gallery = tables([-1], [1, 2])
    found = task.retrieve(
        np.eye(1, 2, dtype=np.float32), np.eye(2, dtype=np.float32), queries, gallery
    )
    assert found.ranks.shape == (1, 5) and "map_at_5" not in found.metrics


def test_evaluation_of_several_galleries_embeds_every_photo_once(toy_data, network, monkeypatch):
    photos, store = toy_data
    _, queries, gallery = catalog.split(photos, "test")
    seen, embed = [], embedding.embed
    monkeypatch.setattr(task, "embed", lambda *a, **k: seen.extend(a[2]) or embed(*a, **k))
    shop = gallery[gallery.domain == "shop"]
    found = task.evaluate(
        network, store, {"all": (queries, gallery), "shop": (queries, shop)}, image_size=32
    )
    assert sorted(seen) == list(photos.index)
    q, g = (embed(network, store, t.index, image_size=32) for t in (queries, shop))
    assert found["shop"].metrics == task.retrieve(q, g, queries, shop).metrics
    assert found["all"].metrics["n_gallery"] == len(gallery)


def test_verification_by_name_reads_the_photos_and_finds_the_printed_ones(toy_data):
    photos, _ = toy_data
    queries, gallery = photos[photos.split == "test"], photos[photos.split == "train"]
    drawn = (
        np.random.default_rng(0).normal(size=(len(photos), 8)).astype(np.float32)
    )  # says nothing
    q, g = drawn[: len(queries)], drawn[len(queries) :]
    plain, verified, expanded = (
        task.retrieve(q, g, queries, gallery, steps=steps).metrics["map_at_5"]
        for steps in ([], ["verify:100"], ["centre", "verify:100", "verified_qe:3"])
    )
    assert verified > 1.5 * plain and expanded > plain


def test_learned_whitening_becomes_part_of_the_model_and_of_its_checkpoint(
    toy_data, network, tmp_path
):
    photos, store = toy_data
    rows = photos[photos.split == "train"]
    how = {"image_size": 32, "features": True}
    model = embedding.with_learned_whitening(network, store, rows, 5, image_size=32)
    features = embedding.embed(network, store, rows.index, **how)
    expected = rerank.fit_learned_whitening(features, rows.product_id.to_numpy(), 5)(features)
    found = embedding.embed(model, store, rows.index, image_size=32)
    np.testing.assert_allclose(found, expected, atol=3e-2)
    assert model.record["embedding_dim"] == 5 and network.record["embedding_dim"] == 16
    again = models.load(models.save(model, tmp_path / "model.pt"))
    np.testing.assert_array_equal(embedding.embed(again, store, rows.index, image_size=32), found)


def test_features_are_what_the_neck_receives(toy_data, network):
    rows = toy_data[0].index[:3]
    features = embedding.embed(network, toy_data[1], rows, image_size=32, features=True)
    assert features.shape == (3, 256)
    with torch.inference_mode():
        again = torch.nn.functional.normalize(network.neck(torch.as_tensor(features)), dim=1)
    np.testing.assert_allclose(
        again, embedding.embed(network, toy_data[1], rows, image_size=32), atol=2e-2
    )


# -------------------------------------------------------------------------------------------------- real photos


@pytest.fixture(scope="module")
def frozen(grocery):
    """(queries, gallery, their embeddings) of frozen EfficientNet-Lite0, squashed to 224 px, bilinear."""
    tune()
    photos, store, _ = open_data(str(grocery), "", px=224)
    model = models.create("tf_efficientnet_lite0")
    model.record["interpolation"] = "bilinear"
    _, queries, gallery = catalog.split(photos, "test")
    how = {"image_size": 224, "cache_dir": platform.cache_folder()}
    return (
        queries,
        gallery,
        *(embedding.embed(model, store, t.index, **how) for t in (queries, gallery)),
    )


def test_frozen_backbone_reproduces_the_plain_scripts_score_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    customer = (gallery.domain == "customer").to_numpy()
    found = task.retrieve(q, g[customer], queries, gallery[customer]).metrics
    assert (found["n_queries"], found["n_gallery"]) == (2485, 2640)
    assert found["map_at_5"] == pytest.approx(0.458, abs=0.01)
    assert found["precision_at_1"] == pytest.approx(0.564, abs=0.01)


def test_shop_photos_alone_are_a_harder_gallery_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    shop = (gallery.domain == "shop").to_numpy()
    assert task.retrieve(q, g[shop], queries, gallery[shop]).metrics["precision_at_1"] < 0.35


def test_learned_whitening_lifts_frozen_features_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    found = task.retrieve(q, g, queries, gallery, steps=["learned_whiten:64"]).metrics
    assert found["map_at_5"] == pytest.approx(0.692, abs=0.015)
