"""Photos to embeddings to scores, on the toy set and, where it is there, on real photos."""

import numpy as np
import pytest
import torch

from vipr_utils.data import transforms
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
