"""The generated miniature: the same bytes, the contract's layout, any size."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from vipr_utils.data import audit, catalog, toy


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_same_settings_give_the_same_bytes_whatever_the_number_of_workers(workers, tmp_path):
    first, second, other = (
        toy.generate(tmp_path / name, products=4, image_size=64, seed=seed, workers=some)
        for name, seed, some in (("a", 0, 1), ("b", 0, workers), ("c", 1, 1))
    )
    assert digest(first) == digest(second) != digest(other)


def test_layout_is_that_of_products_10k_with_domains_and_a_long_tail(tmp_path):
    root = toy.generate(tmp_path / "toy", products=24, image_size=48)
    photos, problems = catalog.read(root)
    assert (
        problems.empty
        and set(photos.split) == {"train", "test"}
        and set(photos.domain) == {"shop", "customer"}
    )
    train = photos[photos.split == "train"]
    assert train.product_id.nunique() == 24
    assert set(photos.domain[photos.split == "test"]) == {"customer"}
    assert (train[train.domain == "shop"].groupby("product_id").size() >= 1).all()
    counts = train.product_id.value_counts()
    assert counts.iloc[0] >= 4 * counts.median() / 2 and counts.iloc[-1] <= 5
    groups = photos.groupby("product_id").group.nunique()
    assert (groups == 1).all() and photos.groupby("group").product_id.nunique().max() >= 2
    assert list(pd.read_csv(root / "train.csv").columns) == ["name", "class", "group", "domain"]
    assert not photos.path.duplicated().any() and len(list((root / "train").iterdir())) == len(
        train
    )


def test_photos_of_a_product_differ_and_variants_share_their_line(tmp_path):
    a, b = (toy.customer_photo(0, i, 0, 64) for i in (0, 1))
    assert not np.array_equal(a[:48, :48], b[:48, :48])
    assert a.dtype == np.uint8 and a.std() > 10


def test_shop_photos_stand_on_white_and_customer_photos_do_not():
    shop = [audit.border_whiteness(toy.shop_photo(p, 0, 0, 128)) for p in range(12)]
    customer = [audit.border_whiteness(toy.customer_photo(p, 0, 0, 128)) for p in range(12)]
    assert np.median(shop) > 0.9 and np.median(customer) < 0.2


def test_a_product_far_out_needs_no_other_to_be_drawn():
    """10,000 products are drawn one by one: nothing is held in memory, and the table of counts is
    cheap.
    """
    assert toy.customer_photo(9_999, 0, 0, 64).shape[2] == 3
    assert sum(sum(toy.counts(p, 0)) for p in range(10_000)) > 80_000


def test_complete_set_is_used_again_and_another_is_not_overwritten(tmp_path):
    root = toy.generate(tmp_path / "toy", products=2, image_size=48)
    stamp = (root / "train.csv").stat().st_mtime_ns
    assert toy.generate(root, products=2, image_size=48) == root
    assert (root / "train.csv").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="toy exists and is no toy set of"):
        toy.generate(root, products=3, image_size=48)


def test_interrupted_drawing_leaves_no_half_set(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "_draw", fail)
    with pytest.raises(KeyboardInterrupt):
        toy.generate(tmp_path / "toy", products=2, image_size=48)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="products=1, image_size=64: a toy set needs 2 products and 32 px"
    ):
        toy.generate(tmp_path / "toy", products=1, image_size=64)
