"""A task's views, its embeddings and its scores, against what is computed by hand."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog
from vipr_utils.data.store import open_data
from vipr_utils.host import platform
from vipr_utils.host.device import tune
from vipr_utils.judge import metrics
from vipr_utils.judge import task as judge_task
from vipr_utils.judge.task import Task, View, ranked, scored, some_products
from vipr_utils.learn import models
from vipr_utils.retrieve import embedding, rerank, search


@pytest.fixture(scope="module")
def task(toy_root, tmp_path_factory):
    return Task(
        str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )


@pytest.fixture(scope="module")
def network():
    return models.create("siamese_small", weights="none", embedding_dim=16)


def test_views_are_the_test_queries_against_each_domain_and_what_is_held_out(task):
    assert list(task.views) == ["test", "shop", "customer", "validation"]
    whole = task.views["test"].gallery
    narrow = [task.views[domain].gallery for domain in ("shop", "customer")]
    assert sorted([*narrow[0].index, *narrow[1].index]) == sorted(whole.index)
    assert all(
        view.queries.equals(task.views["test"].queries) for view in list(task.views.values())[:3]
    )
    held_out = task.views["validation"].queries
    assert not held_out.index.isin(task.fit.index).any() and len(task.fit) + len(held_out) == len(
        whole
    )


def test_task_says_what_it_found(task):
    said = str(task)
    assert "data: toy" in said and f"{len(task.validation.queries)} queries" in said
    assert task.validation.split in said
    assert task.summary().loc["fit", "images"] == len(task.fit)
    assert task.describe().startswith("protocol test, ")


def test_without_holdout_all_train_photos_are_fitted_and_nothing_validates(toy_root, tmp_path):
    task = Task(str(toy_root), image_size=32, holdout=0, device="cpu", cache_dir=str(tmp_path))
    assert list(task.views) == ["test", "shop", "customer"] and task.validation is None
    assert len(task.fit) == (task.photos["split"] == "train").sum()
    assert task.validator(distance="cosine") is None


def test_one_gallery_domain_leaves_the_other_out_of_every_view(toy_root, tmp_path):
    task = Task(
        str(toy_root), gallery_domain="shop", image_size=32, device="cpu", cache_dir=str(tmp_path)
    )
    assert list(task.views) == ["test", "validation"]
    assert set(task.views["test"].gallery["domain"]) == {"shop"}


def test_evaluation_of_a_model_scores_every_view_as_plain_numpy_does(task, network):
    embeddings = task.embed(network, image_size=32)
    assert embeddings.shape == (len(task.photos), 16)
    found = task.evaluate(network, image_size=32)
    for name, view in task.views.items():
        similarity = task.rows(embeddings, view.queries) @ task.rows(embeddings, view.gallery).T
        first = view.gallery["product_id"].to_numpy()[similarity.argmax(1)]
        right = first == view.queries["product_id"].to_numpy()
        answerable = found[name].n_relevant > 0
        assert found[name].metrics["precision_at_1"] == pytest.approx(right[answerable].mean())
        assert found[name].metrics["n_gallery"] == len(view.gallery)
        assert 0 < found[name].metrics["chance"] < 1


def test_average_precision_is_kept_by_query_and_means_to_the_metric(task, network):
    found = task.evaluate(network, image_size=32)["test"]
    assert np.nanmean(found.average_precision) == pytest.approx(found.metrics["map_at_5"])


def test_projection_is_fitted_on_the_whole_gallery_for_the_views_of_one_domain(task, network):
    embeddings = task.embed(network, image_size=32)
    steps = ["pca(dim=4)"]
    shop = task.retrieve(embeddings, "shop", steps=steps)
    whole = task.rows(embeddings, task.views["test"].gallery).astype(np.float64)
    centred = whole - whole.mean(0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :4]

    def projected(rows):
        moved = (task.rows(embeddings, rows) - whole.mean(0)) @ directions
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)

    view = task.views["shop"]
    similarity = projected(view.queries) @ projected(view.gallery).T
    assert np.allclose(shop.scores[:, 0], similarity.max(1), atol=1e-5)


def test_steps_work_by_cosine_and_refuse_manhattan(task, network):
    with pytest.raises(ValueError, match="work by cosine, got distance 'manhattan'"):
        task.retrieve(task.embed(network), steps=["centring()"], distance="manhattan")


def test_every_search_runs_on_the_device_that_embeds(task, network, monkeypatch):
    searched_on, top_k = [], search.top_k

    def recorded(*arguments, **settings):
        searched_on.append(settings.get("device"))
        return top_k(*arguments, **settings)

    for module in (search, rerank):
        monkeypatch.setattr(module, "top_k", recorded)
    steps = ["database_augmentation(3)", "alpha_query_expansion(3)", "k_reciprocal(8, 3)"]
    for asked in ([], steps, ["transductive_k_reciprocal(8, 3)"]):
        task.evaluate(network, steps=asked, image_size=32)
    task.validate(network, image_size=32)
    assert len(searched_on) > 20 and all(device is task.device for device in searched_on)


def test_labels_of_queries_are_not_there_for_the_steps(task, network):
    embeddings = task.embed(network, image_size=32)
    view = task.views["test"]
    unknown = View(view.queries.assign(product_id=-1), view.gallery)
    steps = ["learned_whitening(dim=8)", "database_augmentation(k=2)"]
    known, blind = (task.retrieve(embeddings, v, steps=steps) for v in (view, unknown))
    assert np.array_equal(known.ranks, blind.ranks) and "map_at_5" not in blind.metrics


def test_photos_that_may_be_known_are_never_queries_of_the_view(task, toy_root, tmp_path):
    held_out = task.validation.queries.index
    train = task.photos.index[task.photos["split"] == "train"]
    assert list(task.known("validation").index) == list(task.fit.index.sort_values())
    for view in ("test", "shop", "customer"):
        known = task.known(view).index
        assert list(known) == sorted(train) and set(held_out) <= set(known), view
    shop = Task(
        str(toy_root), gallery_domain="shop", image_size=32, device="cpu", cache_dir=str(tmp_path)
    )
    assert set(shop.known("validation").index) == set(shop.fit.index)
    assert set(shop.known("test").index) == set(train) > set(shop.views["test"].gallery.index)


@pytest.mark.parametrize(
    "steps",
    [
        ["centring()"],
        ["pca(4)", "alpha_query_expansion(3, 3)"],
        ["learned_whitening(8)", "product_votes(3)"],
        ["database_augmentation(3)", "k_reciprocal(8, 3, 0.3)"],
    ],
)
def test_answers_of_validation_depend_on_the_query_and_the_photos_to_fit_alone(task, steps):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(len(task.photos), 16)).astype(np.float32)
    first = task.views["validation"].queries.index[:3]
    unseen = ~task.photos.index.isin([*task.fit.index, *first])
    other = embeddings.copy()
    other[unseen] = 5 + rng.normal(size=(unseen.sum(), 16))  # of other queries and of the test
    assert unseen.any()
    found, changed = (task.retrieve(x, "validation", steps=steps) for x in (embeddings, other))
    np.testing.assert_array_equal(found.ranks[:3], changed.ranks[:3])
    np.testing.assert_allclose(found.scores[:3], changed.scores[:3], atol=1e-6)
    assert not np.array_equal(found.ranks[3:], changed.ranks[3:])


def test_photos_that_may_not_be_answered_still_help_to_find_those_that_may(task):
    """The query's product is told by a customer's photo; of the shop's none is near."""
    view, rng = task.views["shop"], np.random.default_rng(0)
    embeddings = rerank.unit(rng.normal(size=(len(task.photos), 64)))
    query, shown = view.queries.index[0], view.queries["product_id"].iloc[0]
    known = task.known("shop")
    of_customers = known[(known["product_id"] == shown) & (known["domain"] == "customer")]
    embeddings[task.photos.index.get_indexer(of_customers.index)] = embeddings[
        task.photos.index.get_loc(query)
    ]
    found = task.retrieve(embeddings, "shop", steps=["product_votes(3)"])
    own = (view.gallery["product_id"] == shown).sum()
    products = view.gallery["product_id"].to_numpy()[found.ranks[0]]
    assert (products[: min(own, 5)] == shown).all()
    assert set(view.gallery["domain"].iloc[found.ranks[found.ranks >= 0]]) == {"shop"}
    plain = task.retrieve(embeddings, "shop")
    assert (view.gallery["product_id"].to_numpy()[plain.ranks[0]] != shown).any()


def test_sides_of_a_zoom_are_of_each_photo_as_its_domain_is_seen(task, network):
    asked = {"image_size": 32, "zoom": (0.6, 0.8)}
    found = task.zoomed(network, "test", **asked)
    seen = {share: task.embed(network, image_size=32, zoom=share) for share in (0.6, 0.8)}
    for side, table in zip(found, [task.views["test"].queries, task.known("test")]):
        assert len(side) == len(table)
        for share, domain in ((0.6, "customer"), (0.8, "shop")):
            rows = (table["domain"] == domain).to_numpy()
            np.testing.assert_allclose(
                side[rows], task.rows(seen[share], table[rows]), atol=1e-5, err_msg=domain
            )
    assert set(task.known("test")["domain"]) == {"shop", "customer"}
    features = task.zoomed(network, "test", features=True, **asked)
    assert features.queries.shape[1] > 16 and len(features.known) == len(found.known)


def test_photo_of_unknown_domain_is_zoomed_by_its_role(task, network, monkeypatch):
    view = task.views["validation"]
    queries, gallery = (rows.assign(domain="") for rows in view)
    queries.loc[queries.index[0], "domain"] = "shop"
    gallery.loc[gallery.index[0], "domain"] = "customer"
    monkeypatch.setitem(task.views, "validation", View(queries, gallery))
    monkeypatch.setattr(task, "known", lambda view: gallery)
    found = task.zoomed(network, "validation", zoom=(0.6, 0.8), image_size=32)
    small, large = (task.embed(network, image_size=32, zoom=share) for share in (0.6, 0.8))
    near = {"atol": 1e-5}
    np.testing.assert_allclose(found.queries[0], task.rows(large, queries)[0], **near)
    np.testing.assert_allclose(found.queries[1:], task.rows(small, queries)[1:], **near)
    np.testing.assert_allclose(found.known[0], task.rows(small, gallery)[0], **near)
    np.testing.assert_allclose(found.known[1:], task.rows(large, gallery)[1:], **near)


def test_a_zoom_that_validation_asks_for_is_no_work_on_photos_of_the_test(
    toy_root, tmp_path, monkeypatch
):
    task = Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path / "other"))
    network, passed = models.create("siamese_small", weights="none"), set()
    forward = embedding.embed

    def counted(model, store, rows, **settings):
        passed.update(rows.tolist())
        return forward(model, store, rows, **settings)

    monkeypatch.setattr(embedding, "embed", counted)
    task.zoomed(network, "validation", zoom=(0.8, 1.0), image_size=32)
    view = task.views["validation"]
    assert passed == {*view.queries.index, *view.gallery.index, *task.known("validation").index}
    assert not passed & set(task.views["test"].queries.index)


def test_query_in_its_own_gallery_is_not_its_own_answer():
    rows = pd.DataFrame({"image_id": ["a", "b"], "product_id": [1, 1]})
    view = View(rows.iloc[:1], rows)
    found = scored(view, np.array([[0.9, 0.1]]), np.array([[1, -1, -1, -1, -1]]))
    assert found.n_relevant.tolist() == [1] and found.metrics["map_at_5"] == 1.0


def test_validator_scores_a_model_in_training_and_travels_to_other_processes(task, network):
    validate = task.validator(distance="cosine", image_size=32)
    scores = pickle.loads(pickle.dumps(validate))(network)
    same = task.retrieve(task.embed(network, image_size=32), "validation").metrics
    assert scores["map_at_5"] == pytest.approx(same["map_at_5"])


def test_epochs_are_validated_on_some_products_where_the_gallery_is_large(
    task, network, monkeypatch
):
    whole = task.views["validation"]
    for rows, every in zip(task.epoch_view, whole):
        pd.testing.assert_frame_equal(rows, every)
    every = task.validate(network, image_size=32)
    monkeypatch.setattr(judge_task, "MOST_VALIDATED", 20)
    some = task.epoch_view
    assert 20 <= len(some.queries) + len(some.gallery) < 60
    for rows, every_row in zip(some, whole):
        asked = every_row["product_id"].isin(some.gallery["product_id"])
        assert list(rows.index) == list(every_row.index[asked]), "all photos of its products"
    found = task.validate(network, image_size=32)
    assert (found["n_gallery"], every["n_gallery"]) == (len(some.gallery), len(whole.gallery))
    sizes = f"{len(some.queries)} queries, {len(some.gallery)} gallery photos"
    assert f"epochs validate on {sizes}" in str(task)


def test_products_of_a_sample_are_the_same_everywhere():
    rows = pd.DataFrame({"product_id": np.repeat(np.arange(50), 4)})
    assert sorted(some_products(rows, 20)) == [2, 10, 11, 28, 41]
    assert sorted(some_products(rows, 200)) == sorted(some_products(rows, 10**9)) == list(range(50))


def test_training_photos_carry_labels_from_zero(task):
    photos = task.training_photos(lambda image, rng: torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert np.array_equal(photos.labels, catalog.with_labels(task.fit))
    some = task.fit[task.fit["product_id"].isin(task.fit["product_id"].unique()[:2])]
    assert set(task.training_photos(None, some).labels) == {0, 1}


def test_products_of_one_photo_are_paired_with_their_drawings(task):
    one = task.fit.groupby("product_id").head(1).assign(domain="")
    photos = task.training_photos(None, one)
    assert photos.clutter == 0.5 and photos.shop.all()
    assert task.training_photos(None, one, clutter=0.8).clutter == 0.8
    assert task.training_photos(None).clutter == 0.0
    near = task.training_photos(None, zoom=0.8)
    assert (near.zoom[near.shop] == 1.0).all() and (near.zoom[~near.shop] == 0.8).all()
    two = pd.concat([one, one.iloc[: len(one) // 2]])
    assert task.training_photos(None, two).clutter == 0.0
    known = task.training_photos(None)
    assert (known.shop == (task.fit["domain"] == "shop")).all()


def test_run_is_recorded_with_data_split_and_precision(task, network, tmp_path):
    import json

    found = task.evaluate(network, image_size=32)
    task.save_run(
        tmp_path,
        notebook="00",
        params={},
        metrics=found["test"].metrics,
        model=network.record,
        validated=found["validation"].metrics,
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["validation"]["split"] == task.validation.split
    assert record["validation"]["map_at_5"] == found["validation"].metrics["map_at_5"]
    assert record["metrics"]["definition"] == metrics.DEFINITION
    assert list(record["precision"]) == ["embedding"] and record["protocol"] == "test"


# ----------------------------------------------------------------------- lists of embeddings


def tables(queries, gallery):
    def table(products, split):
        return pd.DataFrame(
            {"product_id": products, "image_id": [f"{split}/{i}" for i in range(len(products))]}
        )

    return table(queries, "test"), table(gallery, "train")


def test_query_without_relevant_image_is_excluded_and_counted():
    queries, gallery = tables([1, 9], [1, 2])
    found = ranked(
        View(queries, gallery), np.eye(2, 4, dtype=np.float32), np.eye(2, 4, dtype=np.float32)
    )
    assert (found.metrics["n_queries"], found.metrics["n_excluded"]) == (1, 1)
    assert found.metrics["map_at_5"] == 1.0


def test_gallery_with_nan_embeddings_is_refused_with_the_likely_cause():
    queries, gallery = tables([1], [1, 2])
    g = np.array([[1, 0], [np.nan, 0]], np.float32)
    with pytest.raises(
        ValueError,
        match=r"1 of 2 gallery embeddings hold NaN or infinity \(first: row 1\): the model",
    ):
        ranked(View(queries, gallery), np.eye(1, 2, dtype=np.float32), g)


def test_a_query_in_the_gallery_never_meets_itself():
    _, gallery = tables([], [1, 1, 2])
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = ranked(View(gallery, gallery), x, x)
    assert found.ranks[0, 0] == 1 and found.ranks[1, 0] == 0
    assert list(found.n_relevant) == [1, 1, 0]


def test_unlabelled_queries_give_lists_and_no_score():
    queries, gallery = tables([-1], [1, 2])
    found = ranked(
        View(queries, gallery), np.eye(1, 2, dtype=np.float32), np.eye(2, dtype=np.float32)
    )
    assert found.ranks.shape == (1, 5) and "map_at_5" not in found.metrics


def test_verification_by_name_reads_the_photos_and_finds_the_printed_ones(toy_data):
    photos, _ = toy_data
    queries, gallery = photos[photos.split == "test"], photos[photos.split == "train"]
    drawn = (
        np.random.default_rng(0).normal(size=(len(photos), 8)).astype(np.float32)
    )  # says nothing
    q, g = drawn[: len(queries)], drawn[len(queries) :]
    plain, verified, expanded = (
        ranked(View(queries, gallery), q, g, steps=steps).metrics["map_at_5"]
        for steps in ([], ["verify(100)"], ["centring()", "verify(100)", "verified_expansion(3)"])
    )
    assert verified > 1.5 * plain and expanded > plain


# ------------------------------------------------------------------------------ real photos


@pytest.fixture(scope="module")
def frozen(grocery):
    """(queries, gallery, their embeddings) of frozen EfficientNet-Lite0, squashed to 224 px,
    bilinear.
    """
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
    found = ranked(View(queries, gallery[customer]), q, g[customer]).metrics
    assert (found["n_queries"], found["n_gallery"]) == (2485, 2640)
    assert found["map_at_5"] == pytest.approx(0.458, abs=0.01)
    assert found["precision_at_1"] == pytest.approx(0.564, abs=0.01)


def test_shop_photos_alone_are_a_harder_gallery_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    shop = (gallery.domain == "shop").to_numpy()
    assert ranked(View(queries, gallery[shop]), q, g[shop]).metrics["precision_at_1"] < 0.35


def test_learned_whitening_lifts_frozen_features_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    found = ranked(View(queries, gallery), q, g, steps=["learned_whitening(dim=64)"]).metrics
    assert found["map_at_5"] == pytest.approx(0.692, abs=0.015)
