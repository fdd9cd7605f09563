"""Poolings against loops of their papers' rules, on every kind of backbone; R-MAC's whitening."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vipr_utils.data import transforms
from vipr_utils.data.store import Photos
from vipr_utils.learn import models, pooling
from vipr_utils.learn.pooling import POOLINGS, RMAC, GeM, region_grid
from vipr_utils.retrieve import embedding

NAMES = ["gem", "rmac", "max"]


def pixels(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def maps(height=7, width=7, channels=6):
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------- the formulas


def slow_grid(height, width, scales=3):
    """Tolias 2016, section 4, word by word: sides, counts, even spreading, the 40 % rule."""
    short, long = min(height, width), max(height, width)
    m, best = 1, None
    if long > short:
        for count in range(2, 8):
            overlap = (short - (long - short) / (count - 1)) / short
            if best is None or abs(overlap - 0.4) < best:
                m, best = count, abs(overlap - 0.4)
    regions = []
    for scale in range(1, scales + 1):
        side = int(2 * short / (scale + 1))
        along_long, along_short = scale + m - 1, scale
        rows, columns = (along_long, along_short) if height > width else (along_short, along_long)
        for i in range(rows):
            for j in range(columns):
                top = int(np.floor(i * (height - side) / (rows - 1))) if rows > 1 else 0
                left = int(np.floor(j * (width - side) / (columns - 1))) if columns > 1 else 0
                regions.append((top, left, side))
    return regions


@pytest.mark.parametrize("height, width", [(7, 7), (14, 14), (7, 10), (12, 8), (24, 32), (30, 9)])
def test_region_grid_is_the_published_one(height, width):
    grid = region_grid(height, width)
    assert grid == slow_grid(height, width)
    covered = np.zeros((height, width), bool)
    for top, left, side in grid:
        assert 0 <= top <= height - side and 0 <= left <= width - side
        covered[top : top + side, left : left + side] = True
    assert covered.all() or max(height, width) > 3 * min(height, width)


def test_square_maps_have_fourteen_regions_and_tiny_maps_some():
    assert len(region_grid(7, 7)) == 1 + 4 + 9
    assert region_grid(7, 7)[0] == (0, 0, 7)
    assert all(side >= 1 for _, _, side in region_grid(1, 1))


def test_rmac_is_the_sum_of_whitened_region_maxima():
    x, layer = maps(9, 12), RMAC(6)
    torch.nn.init.normal_(layer.whitening.weight)
    torch.nn.init.normal_(layer.whitening.bias)
    want = torch.zeros(2, 6)
    for top, left, side in slow_grid(9, 12):
        v = torch.stack(
            [
                x[:, c, top : top + side, left : left + side].flatten(1).max(1).values
                for c in range(6)
            ],
            1,
        )
        v = v / v.norm(dim=1, keepdim=True)
        v = v @ layer.whitening.weight.T + layer.whitening.bias
        want = want + v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), want / want.norm(dim=1, keepdim=True))


def test_rmac_of_one_region_is_max_pooling(monkeypatch):
    monkeypatch.setattr(pooling, "SCALES", 1)
    x, maximum = maps(), POOLINGS["max"](6)
    torch.testing.assert_close(RMAC(6)(x), F.normalize(maximum(x), dim=1))
    torch.testing.assert_close(maximum(x), x.flatten(2).max(2).values)


def test_gem_is_the_generalised_mean():
    x = maps().double()
    torch.testing.assert_close(
        GeM(2.5)(maps()).double(), (x**2.5).mean((2, 3)) ** (1 / 2.5), rtol=1e-5, atol=1e-6
    )


# ----------------------------------------------------------------------------------- with backbones


@pytest.mark.parametrize("pooling", NAMES)
@pytest.mark.parametrize(
    "name", ["siamese_small", "mobilenetv2_050", "mobilenetv3_small_050", "convnext_atto"]
)
def test_every_pooling_works_on_every_kind_of_cnn(name, pooling, tmp_path):
    model = models.create(name, weights="none", pooling=pooling, embedding_dim=8)
    x = pixels().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        out = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        again = models.load(models.save(model, tmp_path / "model.pt"))
        torch.testing.assert_close(again(x), out)
    assert (
        again.record["pooling"] == pooling
        and out.shape == (2, 8)
        and half.dtype == out.dtype == torch.float32
    )
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    assert torch.isfinite(half).all() and F.cosine_similarity(half, out).min() > 0.9


@pytest.mark.parametrize("pooling", NAMES)
def test_gradients_reach_the_backbone_and_the_poolings_own_weights(pooling):
    model = models.Embedder("siamese_small", pooling=pooling).train()
    model(pixels())[:, 0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_backbones_with_channels_last_maps_are_pooled_over_positions(monkeypatch):
    model, x = models.create("siamese_small", weights="none", pooling="max"), pixels()
    want, plain = model.features(x), model.backbone.forward_features
    monkeypatch.setattr(
        model.backbone, "forward_features", lambda x: plain(x).permute(0, 2, 3, 1)
    )  # as Swin's in timm
    monkeypatch.setattr(model.backbone, "output_fmt", "NHWC", raising=False)
    torch.testing.assert_close(model.features(x), want)


def test_a_head_that_widens_is_recorded_with_its_own_width():
    model = models.create("mobilenetv3_small_050", weights="none", embedding_dim=8)
    assert model(pixels()).shape == (2, 8)
    assert models.create("mobilenetv3_small_050", weights="none").record["embedding_dim"] == 1024
    assert (
        models.create("mobilenetv3_small_050", weights="none", pooling="max").record[
            "embedding_dim"
        ]
        == 288
    )


def test_unknown_poolings_are_answered_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"pooling 'mean' is unknown: use one of \['own', 'gem', 'rmac', 'max'\]",
    ):
        models.Embedder("siamese_small", pooling="mean")


def test_a_clip_vit_by_timm_name_brings_its_own_transform():
    model = models.create("vit_xsmall_patch16_clip_224", weights="none")
    assert model.record["image_size"] == 224
    assert model.record["mean"] == pytest.approx(
        (0.4815, 0.4578, 0.4082), abs=1e-3
    )  # OpenAI's statistics
    assert model.record["std"] == pytest.approx((0.2686, 0.2613, 0.2758), abs=1e-3)
    assert model.record["interpolation"] == "bicubic"
    with torch.inference_mode():
        out = model(pixels(size=224))
    assert out.shape == (2, model.record["embedding_dim"])
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))


# -------------------------------------------------------------------------------- on the toy photos


@pytest.fixture(scope="module")
def rmac():
    torch.manual_seed(0)
    return models.create("siamese_small", weights="none", pooling="rmac")


def test_fitted_region_whitening_gives_round_regions(toy_data, rmac):
    photos, store = toy_data
    rows = photos.index[:40]
    fitted = embedding.fit_region_whitening(rmac, store, rows, image_size=96, precision="float32")
    assert fitted is rmac
    transform = transforms.Evaluation(96)
    batch = torch.stack([Photos(store, rows, transform)[i][0] for i in range(40)])
    with torch.inference_mode():
        regions = rmac.pooling.whitening(rmac.pooling.regions(rmac.maps(batch))).flatten(0, 1)
    covariance = np.cov(regions.numpy(), rowvar=False)
    alive = np.diag(covariance) > 1e-3
    assert alive.sum() > 100
    np.testing.assert_allclose(np.diag(covariance)[alive], 1, atol=0.1)
    np.testing.assert_allclose(regions.mean(0), 0, atol=0.05)


def test_only_rmac_has_regions_to_whiten(toy_data):
    with pytest.raises(
        ValueError,
        match="pooling is 'own' and has no regions: create the model with pooling='rmac'",
    ):
        embedding.fit_region_whitening(models.create("siamese_small"), toy_data[1], [0])


def test_embedding_at_sizes_is_the_normalised_sum(toy_data, rmac):
    photos, store = toy_data
    rows = photos.index[:5]
    total = sum(embedding.embed(rmac, store, rows, image_size=px) for px in (64, 96))
    out = embedding.embed_at_sizes(rmac, store, rows, image_sizes=(64, 96))
    np.testing.assert_allclose(out, total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-6)
    one = embedding.embed_at_sizes(rmac, store, rows, image_sizes=(64,))
    np.testing.assert_allclose(one, embedding.embed(rmac, store, rows, image_size=64), atol=1e-6)
