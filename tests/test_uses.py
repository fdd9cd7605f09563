"""Figures of parts of the queries, of smaller galleries, and of what lists are good for."""

import numpy as np
import pandas as pd
import pytest

from vipr_utils.data import catalog
from vipr_utils.judge import metrics, slices, uses
from vipr_utils.judge.task import Sides, Task, View, scored
from vipr_utils.retrieve import labels
from vipr_utils.retrieve.rerank import unit


@pytest.fixture
def view(toy_data):
    photos, _ = toy_data
    return View(*catalog.split(photos, "test")[1:])


@pytest.fixture
def found(view):
    """Lists at random for a view."""
    rng = np.random.default_rng(0)
    ranks = np.array([rng.permutation(len(view.gallery))[:5] for _ in range(len(view.queries))])
    return scored(view, rng.random(ranks.shape), ranks)


def test_kinds_name_what_a_query_is(view, toy_data):
    _, store = toy_data
    found = slices.kinds(view, store)
    assert found["query by"].tolist() == view.queries["domain"].tolist()
    counts = view.queries["product_id"].map(view.gallery["product_id"].value_counts())
    few = counts[found["photos of the product"].str.startswith("few")]
    many = counts[found["photos of the product"].str.startswith("many")]
    if len(few) and len(many):
        assert few.max() <= many.min()
    line = view.gallery.groupby("group")["product_id"].nunique()
    some = view.queries["group"].map(line) > 1
    assert ((found["other variants of its line"] == "some") == some).all()
    assert (found["shorter side"] == "").all()  # all are of one size


def test_thirds_are_thirds_with_their_range_or_nothing():
    found = slices._thirds(pd.Series(range(1, 91)), "few", "some", "many")
    assert found.value_counts().to_dict() == {
        "few (1 to 30)": 30,
        "some (31 to 60)": 30,
        "many (61 to 90)": 30,
    }
    assert (slices._thirds(pd.Series([5] * 9), "a", "b", "c") == "").all()


def test_blurred_photo_is_less_sharp(toy_data):
    import cv2

    photos, store = toy_data

    class Blurred:
        def __getitem__(self, row):
            return cv2.GaussianBlur(store[row], (0, 0), 3)

    rows = photos[:6]
    assert (slices.sharpness(rows, Blurred()) < 0.5 * slices.sharpness(rows, store)).all()


def test_a_slice_has_the_figures_of_its_queries_alone(view, found, monkeypatch):
    monkeypatch.setattr(slices, "LEAST", 3)
    parts = pd.DataFrame({"half": np.where(np.arange(len(view.queries)) % 2, "odd", "even")})
    parts.loc[:2, "half"] = ""
    table = slices.slices(found, view, parts)
    inside = (parts["half"] == "odd").to_numpy() & (found.n_relevant > 0)
    wanted = metrics.average_precision_at_k(found.hits[inside], found.n_relevant[inside]).mean()
    assert table.loc[("half", "odd"), "map_at_5"] == pytest.approx(wanted)
    assert table.loc[("half", "odd"), "n_queries"] == inside.sum()
    assert set(table.index.get_level_values("part")) == {"odd", "even"}
    assert slices.slices(found, view, parts.assign(half="")).empty
    groups = slices.by_group(found, view)
    assert groups["map_at_5"].is_monotonic_increasing


def test_one_photo_a_product_is_drawn_and_more_find_more(view):
    rng = np.random.default_rng(0)
    products = view.gallery["product_id"].to_numpy()
    centres = rng.normal(size=(products.max() + 1, 24))
    gallery = unit(centres[products] + 2.5 * rng.normal(size=(len(products), 24)))
    queries = unit(centres[view.queries["product_id"]] + rng.normal(size=(len(view.queries), 24)))
    table = slices.photos_a_product(view, queries, gallery, (1, 2, 3), draws=20)
    assert table["precision_at_1"].is_monotonic_increasing
    assert (table["low"] <= table["precision_at_1"]).all()
    sizes = view.queries["product_id"].map(view.gallery["product_id"].value_counts())
    assert (table["n_queries"] == (sizes >= 3).sum()).all()
    # where every photo of a product is the same, one says as much as all
    same = slices.photos_a_product(
        view, unit(centres[view.queries["product_id"]]), unit(centres[products])
    )
    assert (same["precision_at_1"] == 1).all()


def test_prediction_counts_right_products_among_the_surest():
    gallery = np.eye(4, dtype=np.float32)
    queries = unit(np.float32([[1, 0, 0, 0], [0.9, 0.5, 0, 0], [0.6, 0.7, 0, 0], [0, 0, 1, 0.2]]))
    known, wanted = np.array([5, 6, 7, 8]), np.array([5, 5, 5, 7])
    told = uses.predict(None, Sides(queries, gallery), known, wanted, coverage=0.75)
    assert told.right.tolist() == [True, True, False, True]
    assert told.figures["accuracy"] == 0.75 and told.figures["accuracy_at_coverage"] == 1.0
    judge = labels.Judge(labels.Confidence([0, 0, 0], 0), labels.Confidence([0, 0, 0], 0), 0.5)
    same = uses.predict(judge, Sides(queries, gallery), known, wanted)
    assert (same.confidence == 0.5).all() and same.figures["calibration_error"] == 0.25


def test_catalogue_without_some_products_notices_them(toy_root, tmp_path):
    task = Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(task.photos["product_id"].max() + 1, 32))
    x = centres[task.photos["product_id"]] + 0.4 * rng.normal(size=(len(task.photos), 32))
    sides = {view: task.sides(unit(x), view) for view in ("test", "validation")}
    found = uses.strangers(task, "test", sides["test"], sides["validation"], hidden=0.3)
    hidden = round(0.3 * task.known("test")["product_id"].nunique())
    assert found.figures["n_products"] == hidden
    assert found.strange.sum() == found.figures["n_strangers"] > 0
    assert found.figures["auroc"] > 0.85 and found.figures["fpr_at_95"] < 0.6
    noise = {
        name: Sides(*(unit(rng.normal(size=s.shape)) for s in side)) for name, side in sides.items()
    }
    blind = uses.strangers(task, "test", noise["test"], noise["validation"], hidden=0.3)
    assert blind.figures["auroc"] < 0.8
    assert uses.strangers(task, "test", sides["test"], sides["validation"], hidden=1.0) is None


def test_labels_spread_beside_the_nearest_labelled_photo():
    rng = np.random.default_rng(1)
    products = np.repeat(np.arange(10), 8)
    x = unit(rng.normal(size=(10, 16))[products] + 0.5 * rng.normal(size=(80, 16)))
    table = uses.spread(x.astype(np.float32), products, [1, 4, 8])
    assert table.index.tolist() == [1, 4] and table["photos"].tolist() == [70, 40]
    assert (table[["spread", "nearest labelled photo"]] > 0.5).all().all()
