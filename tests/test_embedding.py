"""Photos to embeddings to scores, on the toy set and, where it is there, on real photos."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from vipr_utils.data import transforms
from vipr_utils.host import progress
from vipr_utils.learn import models
from vipr_utils.retrieve import embedding, engine, rerank


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.create("siamese_small", embedding_dim=16)


@pytest.mark.parametrize(("precision", "bits"), [("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_embeddings_are_the_models_own_of_the_eval_transform(toy_data, network, precision, bits):
    """Within the bits of the format: each layer rounds its input, weights and output by up to
    2 ** -bits, and independent roundings add in squares."""
    photos, store = toy_data
    rows = photos.index[:5]
    found = embedding.embed(network, store, rows, image_size=32, batch_size=2, precision=precision)
    transform = transforms.Evaluation(32)
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


def test_zoomed_embedding_is_that_of_the_photos_middle_cut_out_by_hand(toy_data, network):
    photos, store = toy_data
    rows = photos.index[:4]
    found = embedding.embed(network, store, rows, image_size=32, zoom=0.5, precision="float32")
    transform, cut = transforms.Evaluation(32), []
    for row in rows:
        height, width = store[row].shape[:2]
        top, left = height // 4, width // 4
        middle = store[row][top : top + height // 2, left : left + width // 2]
        cut.append(transform(np.ascontiguousarray(middle)))
    with torch.inference_mode():
        expected = network(torch.stack(cut)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    whole = embedding.embed(network, store, rows, image_size=32, precision="float32")
    assert not np.allclose(found, whole, atol=1e-3)


@pytest.fixture
def passes(monkeypatch):
    """The rows of every pass through a backbone."""
    seen, forwarded = [], embedding._forwarded

    def counted(model, forward, photos, **settings):
        seen.append(photos.rows.tolist())
        return forwarded(model, forward, photos, **settings)

    monkeypatch.setattr(embedding, "_forwarded", counted)
    return seen


def test_a_photo_passes_the_backbone_once_whatever_rows_are_asked_for(
    toy_data, network, tmp_path, passes
):
    rows = toy_data[0].index[:9].to_numpy()
    plain = embedding.embed(network, toy_data[1], rows, image_size=32)
    passes.clear()
    for asked in (rows[2:6], rows, rows[::-1], rows[3:4]):
        found = embedding.embed(network, toy_data[1], asked, image_size=32, cache_dir=tmp_path)
        expected = plain[[rows.tolist().index(row) for row in asked]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert passes == [rows[2:6].tolist(), [*rows[:2], *rows[6:]]]


def test_another_neck_and_the_features_themselves_come_from_the_same_pass(
    toy_data, network, tmp_path, passes
):
    rows, store = toy_data[0].index[:4].to_numpy(), toy_data[1]
    settings = {"image_size": 32, "cache_dir": tmp_path}
    first = embedding.embed(network, store, rows, **settings)
    with torch.no_grad():
        network.neck[0].weight[0].mul_(3.0)
    second = embedding.embed(network, store, rows, **settings)
    embedding.embed(network, store, rows, features=True, **settings)
    assert len(passes) == 1 and not np.allclose(first, second)
    np.testing.assert_allclose(
        second, embedding.embed(network, store, rows, image_size=32), atol=1e-5
    )


@pytest.mark.parametrize("change", ["weights", "size", "fit", "interpolation", "precision", "zoom"])
def test_cached_features_are_only_used_for_the_same_question(
    toy_data, network, tmp_path, change, passes
):
    asked = {"image_size": 32, "fit": "squash", "precision": "float32", "cache_dir": tmp_path}
    rows = toy_data[0].index[:4]
    embedding.embed(network, toy_data[1], rows, **asked)
    if change == "weights":
        with torch.no_grad():
            next(network.backbone.parameters()).mul_(1.5)
    if change == "interpolation":
        network.record["interpolation"] = "bicubic"
    other = {"size": ("image_size", 48), "fit": ("fit", "crop"), "zoom": ("zoom", 0.8)}
    other["precision"] = "precision", "bfloat16"
    asked.update([other[change]] if change in other else [])
    embedding.embed(network, toy_data[1], rows, **asked)
    assert len(passes) == 2


def test_unreadable_rows_are_nan_and_leave_nothing_in_the_cache(
    toy_data, network, tmp_path, passes
):
    rows, store = toy_data[0].index[:4].to_numpy(), copy.copy(toy_data[1])
    store.readable = store.readable.copy()
    store.readable[rows[:2]] = False
    settings = {"image_size": 32, "cache_dir": tmp_path}
    for asked in (rows[:2], rows):
        found = embedding.embed(network, store, asked, **settings)
        assert found.shape == (len(asked), 16)
        assert np.array_equal(np.isnan(found).all(1), ~store.readable[asked])
    assert passes == [rows[2:].tolist()]


def test_damaged_part_of_the_cache_is_computed_anew(toy_data, network, tmp_path, passes):
    rows, store = toy_data[0].index[:4], toy_data[1]
    first = embedding.embed(network, store, rows, image_size=32, cache_dir=tmp_path)
    (part,) = (tmp_path / "pooled").glob("*/*.npz")
    part.write_bytes(part.read_bytes()[:100])
    again = embedding.embed(network, store, rows, image_size=32, cache_dir=tmp_path)
    assert len(passes) == 2 and np.array_equal(first, again)


def test_what_was_computed_before_a_kill_is_not_computed_again(
    toy_data, network, tmp_path, monkeypatch, passes
):
    rows, store = toy_data[0].index[:7].to_numpy(), toy_data[1]
    monkeypatch.setattr(embedding, "BLOCK", 3)
    counted, done = embedding._forwarded, []

    def killed(*arguments, **settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return counted(*arguments, **settings)

    monkeypatch.setattr(embedding, "_forwarded", killed)
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(network, store, rows, image_size=32, cache_dir=tmp_path)
    monkeypatch.setattr(embedding, "_forwarded", counted)
    passes.clear()
    embedding.embed(network, store, rows, image_size=32, cache_dir=tmp_path)
    assert passes == [rows[6:].tolist()]


def test_several_gpus_share_each_batch_and_the_order_stays(toy_data, network, monkeypatch):
    rows, shared = toy_data[0].index[:7], []
    settings = {"image_size": 32, "batch_size": 3, "precision": "float32"}
    alone = embedding.embed(network, toy_data[1], rows, **settings)
    monkeypatch.setattr(embedding, "_places", lambda device: [device, device])
    features = type(network).features

    def counted(model, pixels):
        shared.append((model is network, len(pixels)))
        return features(model, pixels)

    monkeypatch.setattr(type(network), "features", counted)
    both = embedding.embed(network, toy_data[1], rows, **settings)
    np.testing.assert_allclose(both, alone, atol=1e-6)
    assert shared == [(True, 2), (False, 1)] * 2 + [(True, 1)]


def test_all_gpus_embed_where_the_device_names_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    named = {"cpu": ["cpu"], "cuda:0": ["cuda:0"], "cuda": ["cuda", "cuda:1"]}
    for device, places in named.items():
        assert embedding._places(torch.device(device)) == [torch.device(p) for p in places]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_find_what_one_does(toy_data, network):
    rows = toy_data[0].index[:9]
    settings = {"image_size": 32, "batch_size": 4, "precision": "float32"}
    one, two = (
        embedding.embed(network, toy_data[1], rows, device=torch.device(device), **settings)
        for device in ("cuda:0", "cuda")
    )
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_long_computation_tells_how_far_it_is(toy_data, network, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedding, "BLOCK", 3)
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    with caplog.at_level("INFO", "vipr"):
        embedding.embed(
            network, toy_data[1], toy_data[0].index[:7], image_size=32, cache_dir=tmp_path
        )
    told = [line.partition(",")[0] for line in caplog.messages]
    assert told == ["pooled: 3 of 7", "pooled: 6 of 7", "pooled: 7 of 7"]
    assert all(line.endswith("left") for line in caplog.messages)


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


# -------------------------------------------------------------------------------------- openvino


@pytest.fixture
def compiled(monkeypatch):
    """Stores of any size are embedded by OpenVINO; what was compiled is listed."""
    pytest.importorskip("openvino")
    if engine.LIMIT in os.environ:
        pytest.skip("OpenVINO is not used under a limit on instruction sets")
    made, compiled = [], engine.compiled
    monkeypatch.setattr(engine, "LEAST_PHOTOS", 1)
    monkeypatch.setattr(engine, "compiled", lambda *a: made.append(compiled(*a)) or made[-1])
    return made


@pytest.mark.parametrize(
    "name",
    [
        "siamese_small",
        pytest.param("tf_efficientnet_lite0", marks=pytest.mark.long),
        pytest.param("vit_tiny_patch16_224", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    "precision, apart",
    [("float32", 1e-3), pytest.param("bfloat16", 0.05, marks=pytest.mark.long)],  # minutes by AVX2
)
def test_compiled_network_embeds_as_torch_does(
    toy_data, compiled, monkeypatch, name, precision, apart
):
    torch.manual_seed(0)
    model = models.create(name, weights="none", embedding_dim=16)
    rows = toy_data[0].index[:20]
    size = model.record["image_size"] if name.startswith("vit") else 64
    settings = {"image_size": size, "precision": precision, "batch_size": 7}
    found = embedding.embed(model, toy_data[1], rows, **settings)
    assert len(compiled) == 1 and compiled[0] is not None
    monkeypatch.setattr(engine, "LEAST_PHOTOS", 10**9)
    expected = embedding.embed(model, toy_data[1], rows, **settings)
    np.testing.assert_allclose(found, expected, atol=apart)
    assert len(compiled) == 1


def test_network_is_compiled_once_and_only_where_something_is_computed(
    toy_data, compiled, network, tmp_path, monkeypatch
):
    monkeypatch.setattr(embedding, "BLOCK", 4)
    settings = {"image_size": 32, "precision": "float32", "cache_dir": tmp_path}
    for _ in range(2):
        embedding.embed(network, toy_data[1], toy_data[0].index[:10], **settings)
    assert len(compiled) == 1


def test_openvino_sends_nothing_from_here():
    pytest.importorskip("openvino")
    code = """
from vipr_utils.retrieve import engine
import sys, torch
openvino = engine.without_telemetry()
openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.ones(1, 2))
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_embeds_where_a_network_cannot_be_compiled(toy_data, compiled, network, monkeypatch):
    monkeypatch.setitem(engine.NEAR, torch.float32, -1.0)  # nothing is as near
    with pytest.warns(UserWarning, match="torch embeds, not OpenVINO: embeddings are"):
        found = embedding.embed(network, toy_data[1], [0, 1], image_size=32, precision="float32")
    assert compiled == [None] and np.isfinite(found).all()


def test_half_precision_and_gpus_know_what_pays(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv(engine.LIMIT, raising=False)
    cpu = torch.device("cpu")
    assert engine.pays(cpu, torch.bfloat16, 5000) and not engine.pays(cpu, torch.float16, 5000)
    assert not engine.pays(torch.device("cuda"), torch.float32, 5000)
    assert not engine.pays(cpu, torch.float32, 100)
    monkeypatch.setenv(engine.LIMIT, "AVX2")
    assert not engine.pays(cpu, torch.float32, 5000)
    monkeypatch.delenv(engine.LIMIT)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert not engine.pays(cpu, torch.float32, 5000)
