"""What leaves the kit: ONNX that gives torch's embeddings, a model card that says what is known."""

import json

import numpy as np
import pytest
import torch
import yaml

from vipr_utils.judge import card
from vipr_utils.learn import models
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.rerank import Projection

onnxruntime = pytest.importorskip("onnxruntime")
export = pytest.importorskip("vipr_utils.retrieve.export")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def encoder():
    """A backbone's features whitened and a zoomed look's embedding, joined and projected."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def projection(rows, columns):
        mean = rng.normal(size=rows).astype(np.float32) / 10
        return Projection(mean, rng.normal(size=(rows, columns)).astype(np.float32))

    small = models.create("test_convnext3", weights="none")
    scratch = models.create("siamese_small", embedding_dim=32)
    width = small.record["embedding_dim"]
    looks = (
        Look(small, 64, features=True, projections=(projection(width, 24),)),
        Look(
            scratch, 48, (0.65, 1.0), weight=0.5, projections=(Projection(projection(32, 1).mean),)
        ),
    )
    return Encoder(looks, (projection(56, 16),))


def test_onnx_gives_torchs_embeddings_for_any_batch(encoder, tmp_path):
    path = tmp_path / "model.onnx"
    assert export.onnx(encoder, path) <= 1e-4
    session = onnxruntime.InferenceSession(str(path))
    rng = np.random.default_rng(1)
    views = {
        f"view{i}": rng.integers(0, 256, (5, 3, px, px), np.uint8) for i, px in enumerate((64, 48))
    }
    found = session.run(None, views)[0]
    assert found.shape == (5, 16)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    told = json.loads(session.get_modelmeta().custom_metadata_map["views"])
    assert [view["image_size"] for view in told] == [64, 48]
    assert told[1]["seen_of_customers_photos"] == 0.65 and told[0]["fit"] == "squash"


def test_onnx_that_is_far_from_torch_is_not_left_behind(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_written", lambda network, views, path, about: 0.1)
    with pytest.raises(ValueError, match=r"0.1 away from torch, expected 0.0001"):
        export.onnx(encoder, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_network_is_the_encoder(encoder, toy_data):
    _, store = toy_data
    rows = np.arange(4)
    wanted = encoder(store, rows, True, precision="float32")
    from vipr_utils.data.store import Photos
    from vipr_utils.data.transforms import Evaluation

    views = []
    for look in encoder.looks:
        seen = Evaluation(look.image_size, "squash", look.model.record["interpolation"])
        photos = Photos(store, rows, seen, zoom=look.zoom[0])
        views.append(torch.stack([photos[i][0] for i in range(4)]))
    with torch.inference_mode():
        found = export.Network(encoder).eval()(*views).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


RECORD = {
    "run": "06 | best",
    "protocol": "test",
    "data": {"root": "groceries", "n_train": 2721, "n_test": 2485, "n_products": 81},
    "metrics": {
        "map_at_5": 0.9049,
        "map_at_5_low": 0.876,
        "map_at_5_high": 0.934,
        "precision_at_1": 0.91,
        "n_queries": 2485,
        "n_gallery": 2721,
    },
    "model": {"name": "tf_efficientnet_lite0", "weights": {"source": "package x"}},
    "validation": {"how": "visits"},
    "chosen": {"what": "lite0 + product_votes(3)"},
}


def test_card_says_what_is_known_in_the_hubs_form():
    text = card.card(RECORD)
    front = yaml.safe_load(text.split("---")[1])
    result = front["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 0.9049 and result["dataset"]["name"] == "groceries"
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert "0.905, 95 % over products 0.876 to 0.934" in text and r"06 \| best" in text
    assert "non-commercial" not in text and "licences of the photos" in text


def test_card_of_products_10k_is_not_for_commerce():
    of_10k = RECORD | {"data": RECORD["data"] | {"n_products": 9691}}
    text = card.card(of_10k)
    assert "non-commercial research" in text
    assert yaml.safe_load(text.split("---")[1])["license_name"].endswith("non-commercial")
    with pytest.raises(ValueError, match="no score"):
        card.card(RECORD | {"metrics": {}})
