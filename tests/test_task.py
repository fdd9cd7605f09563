"""A task's views, its embeddings and its scores, against what is computed by hand."""

import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog
from vipr_utils.data.store import LEAST_PX, open_data
from vipr_utils.data.transforms import Evaluation
from vipr_utils.host import platform
from vipr_utils.host.device import tune
from vipr_utils.judge import metrics, runs
from vipr_utils.judge import task as judge_task
from vipr_utils.judge.task import Task, View, ranked, scored, some_products
from vipr_utils.learn import models
from vipr_utils.retrieve import embedding, pipeline, rerank, search


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
    counts = [len(task.fit), task.fit["product_id"].nunique()]
    assert task.summary().loc["fit"].to_dict() == dict(zip(["images", "products"], counts))
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
    assert judge_task.MOST_VALIDATED == 10_000
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
    assert sorted(some_products(rows[::-1], 20)) == [2, 10, 11, 28, 41], "in any order of rows"
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


# --------------------------------------------------------------------- settings that are handed on


@pytest.fixture
def handed(monkeypatch):
    """handed(module, name, answer): the list of the (arguments, settings) of its calls."""

    def record(module, name, answer=None):
        calls = []
        monkeypatch.setattr(
            module,
            name,
            lambda *arguments, **settings: calls.append((arguments, settings)) or answer,
        )
        return calls

    return record


def test_settings_of_a_task_without_a_word():
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(Task).parameters.items()
    }
    assert defaults == {
        "data_root": "",
        "protocol": "test",
        "gallery_domain": "",
        "image_size": 224,
        "seen_px": 0,
        "holdout": 0.1,
        "validation": "auto",
        "batch_size": 64,
        "seed": 0,
        "device": "auto",
        "precision": "auto",
        "cache_dir": "",
    }


def test_settings_of_a_task_reach_what_reads_and_splits(toy_root, tmp_path, monkeypatch):
    asked = {}
    for module, name in (
        (judge_task, "open_data"),
        (judge_task, "seed_everything"),
        (judge_task, "working_device"),
        (catalog, "split"),
        (catalog, "hold_out"),
        (catalog, "spares_photos"),
    ):
        real = getattr(module, name)

        def noted(*arguments, real=real, name=name, **settings):
            asked[name] = arguments, settings
            return real(*arguments, **settings)

        monkeypatch.setattr(module, name, noted)
    task = Task(
        str(toy_root),
        protocol="test",
        gallery_domain="shop",
        image_size=32,
        seen_px=40,
        holdout=0.3,
        batch_size=3,
        seed=5,
        device="cpu",
        precision="float32",
        cache_dir=str(tmp_path),
    )
    assert asked["open_data"] == ((str(toy_root), str(tmp_path)), {"px": 32, "seen_px": 40})
    assert asked["seed_everything"] == ((5,), {}) and asked["working_device"] == (("cpu",), {})
    assert asked["split"][0][1:] == ("test",)
    assert asked["split"][1] == {"seed": 5, "gallery_domain": "shop"}
    assert asked["hold_out"][1] == {"holdout": 0.3, "gallery_domain": "shop"}
    assert asked["spares_photos"][0][1] == "shop"
    assert (task.seed, task.batch_size, task.precision) == (5, 3, "float32")
    assert (task.protocol, task.gallery_domain, str(task.device)) == ("test", "shop", "cpu")
    assert task.cache_dir == platform.cache_folder(str(tmp_path)) and len(task.lost) == 0


def test_validation_is_drawn_where_it_is_asked_for_and_an_unknown_one_refused(toy_root, tmp_path):
    given = {"image_size": 32, "device": "cpu", "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="validation 'all' is unknown: use 'auto' or 'drawn'"):
        Task(str(toy_root), validation="all", **given)
    plain = Task(str(toy_root), holdout=0, **given)
    task = Task(str(toy_root), validation="drawn", gallery_domain="shop", **given)
    queries = task.validation.queries
    assert set(queries["split"]) == {"drawn"}
    assert len(queries) == len(task.fit) == len(plain.fit) and task.validation.how == "drawn"
    assert task.validation.fit.equals(task.fit) and set(queries["domain"]) == {"customer"}
    assert task.validation.gallery.equals(task.fit[task.fit["domain"] == "shop"])
    assert len(task.photos) > len(plain.photos) and task.photos.attrs == plain.photos.attrs
    assert task.photos.index.is_unique and list(task.photos) == list(plain.photos)
    assert not (task.known("validation")["split"] == "drawn").any()


def test_queries_that_are_drawn_are_packed_as_large_as_the_photos(make_root, tmp_path):
    task = Task(
        str(make_root()),
        image_size=2 * LEAST_PX,
        validation="drawn",
        device="cpu",
        cache_dir=str(tmp_path),
    )
    sizes = {folder.name.split("-")[-1] for folder in task.store.folders}
    assert len(task.store.folders) == 2 and task.store.px > LEAST_PX
    assert sizes == {str(task.store.px)}


def test_queries_that_are_drawn_join_the_photos_and_are_never_known(
    toy_root, tmp_path, network, task
):
    drawn = Task(
        str(toy_root), image_size=32, validation="drawn", device="cpu", cache_dir=str(tmp_path)
    )
    rows = drawn.photos.index[drawn.photos["split"] == "drawn"]
    assert len(rows) and len(drawn.store.readable) == len(drawn.photos)
    assert drawn.store.readable[rows].all() and drawn.store.readable[task.photos.index].all()
    sides = [drawn.training_photos(lambda image, rng: image, drawn.fit[:1])[0][0]]
    assert sides[0].shape == task.training_photos(lambda image, rng: image)[0][0].shape
    for view in ("test", "validation"):
        assert not drawn.known(view).index.isin(rows).any()
    embeddings = drawn.embed(network, image_size=32)
    assert embeddings[: len(task.photos)] == pytest.approx(
        task.embed(network, image_size=32), abs=1e-5
    )


def test_arrays_and_sides_are_evaluated_as_the_model_is(task, network):
    embeddings = task.embed(network, image_size=32)
    by_model, by_array = (task.evaluate(x, image_size=32) for x in (network, embeddings))
    for view in task.views:
        of_sides = task.retrieve(task.sides(embeddings, view), view)
        assert (by_model[view].ranks == by_array[view].ranks).all()
        assert (by_model[view].ranks == of_sides.ranks).all()


@pytest.mark.parametrize("rows", [slice(None, -1), slice(1, None)])
def test_embeddings_of_other_photos_are_refused(task, network, rows):
    embeddings = task.embed(network, image_size=32)
    with pytest.raises(ValueError, match=r"take task\.embed\(model\)"):
        task.rows(embeddings[rows], task.fit)
    elsewhere = task.fit[:2].set_index(pd.Index([10**6, 10**6 + 1]))
    with pytest.raises(ValueError, match="is not among"):
        task.rows(embeddings, elsewhere)


def test_lists_are_scored_with_seed_0_where_none_is_given(task, network):
    view = task.views["test"]
    found = task.retrieve(task.embed(network, image_size=32), "test")
    plain = scored(view, found.scores, found.ranks).metrics
    assert plain == scored(view, found.scores, found.ranks, seed=0).metrics
    assert plain != scored(view, found.scores, found.ranks, seed=1).metrics


def test_precision_in_a_record_is_that_of_the_device(task, network, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        judge_task, "precision_used", lambda *given: asked.append(given) or {"training": "x"}
    )
    task.save_run(tmp_path / "run", notebook="06", params={}, metrics={}, model={})
    assert asked == [(task.precision, task.device)]


def test_a_transform_of_evaluation_trains_nothing(task):
    with pytest.raises(ValueError, match="training photo was to be seen as in evaluation"):
        task.training_photos(Evaluation(32))


def test_a_model_is_timed_and_no_other(task, network):
    assert task.ms_per_image(network, image_size=32) > 0
    with pytest.raises(AttributeError):
        task.ms_per_image(None, image_size=32)


def test_settings_of_embeddings_reach_what_embeds(task, handed):
    machine = {"precision": "auto", "device": task.device, "batch_size": 64}
    calls = handed(judge_task, "embed", "embeddings")
    assert task.embed("model") == "embeddings"
    task.embed("model", image_size=32, zoom=0.8, precision="float32")
    for (model, store, rows), settings in calls:
        assert model == "model" and store is task.store and rows.equals(task.photos.index)
        assert settings["cache_dir"] == task.cache_dir
    assert calls[0][1] == {**machine, "image_size": 0, "cache_dir": task.cache_dir}
    wanted = {**machine, "precision": "float32", "image_size": 32, "zoom": 0.8}
    assert calls[1][1] == {**wanted, "cache_dir": task.cache_dir}
    sizes = handed(judge_task, "embed_at_sizes", "of several sizes")
    assert task.embed("model", image_size=(32, 48)) == "of several sizes"
    arguments, settings = sizes[0]
    assert arguments[:2] == ("model", task.store) and arguments[2].equals(task.photos.index)
    assert settings == {**machine, "image_sizes": (32, 48), "cache_dir": task.cache_dir}


def test_settings_of_zooms_and_whitening_reach_what_embeds(task, handed):
    machine = {
        "precision": "auto",
        "device": task.device,
        "batch_size": 64,
        "cache_dir": task.cache_dir,
    }
    calls = handed(judge_task, "embed_zoomed", "side")
    found = task.zoomed("model", "test", zoom=(0.5, 0.7))
    assert tuple(found) == ("side", "side")
    task.zoomed("model", "test", zoom=(0.5, 0.7), image_size=32, features=True)
    for ((model, store, rows), settings), (size, features) in zip(
        calls, [(0, False), (0, False), (32, True), (32, True)], strict=True
    ):
        assert model == "model" and store is task.store
        assert len(settings.pop("customer")) == len(rows)
        given = {"zoom": (0.5, 0.7), "image_size": size, "features": features}
        assert settings == {**machine, **given}
    whitening = handed(judge_task, "with_learned_whitening", "whitened")
    assert task.whitened("model", 8) == task.whitened("model", 9, image_size=32) == "whitened"
    for (arguments, settings), (dim, size) in zip(whitening, [(8, 0), (9, 32)], strict=True):
        model, store, rows, width = arguments
        assert (model, width) == ("model", dim) and store is task.store and rows.equals(task.fit)
        assert settings == {**machine, "image_size": size}


def test_milliseconds_of_an_image_are_over_128_of_them(task, monkeypatch, handed):
    calls = handed(task, "_embedded")
    monkeypatch.setattr(judge_task, "perf_counter", iter([10.0, 10.5, 20.0, 21.0]).__next__)
    some = min(128, len(task.photos))
    assert task.ms_per_image("model") == pytest.approx(500 / some)
    monkeypatch.setattr(task, "photos", pd.concat([task.photos] * 3))
    assert task.ms_per_image("model", image_size=48) == pytest.approx(1000 / 128)
    sizes = [arguments[2] for arguments, _ in calls]
    assert sizes == [0, 48] and len(calls[1][0][1]) == 128


def test_validation_in_training_hands_on_its_distance_and_size(task, handed):
    embedded = handed(task, "_embedded", "side")
    answer = judge_task.Retrieval(None, None, None, None, {"map_at_5": 0.5})
    lists = handed(task, "_ranked", answer)
    assert task.validate("model") == task.validate("model", distance="manhattan", image_size=48)
    assert [arguments[2] for arguments, _ in embedded] == [0, 0, 48, 48]
    assert all(arguments[0] == "model" and not settings for arguments, settings in embedded)
    for (view, *sides), _ in lists:
        assert sides == ["side", "side"] and view.queries.equals(task.epoch_view.queries)
    assert [settings["distance"] for _, settings in lists] == ["cosine", "manhattan"]


def test_training_photos_carry_their_settings(task, monkeypatch):
    def transform(image, rng):
        return image

    photos = task.training_photos(transform)
    assert photos.transform is transform and photos.store is task.store
    assert (photos.zoom == 1.0).all()
    monkeypatch.setattr(task, "seed", 3)
    assert task.training_photos(transform).seed == 3


def test_evaluation_hands_on_distance_steps_and_size(task, monkeypatch):
    sizes, asked = [], []
    monkeypatch.setattr(task, "embed", lambda model, image_size: sizes.append(image_size) or "e")
    monkeypatch.setattr(task, "retrieve", lambda e, view, **s: asked.append((e, view, s)) or view)
    assert task.evaluate("model") == {view: view for view in task.views}
    task.evaluate("model", steps=["centring()"], distance="euclidean", image_size=48)
    given = [
        {"steps": (), "distance": "cosine"},
        {"steps": ["centring()"], "distance": "euclidean"},
    ]
    assert asked == [("e", view, settings) for settings in given for view in task.views]
    assert sizes == [0, 48]


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_lists_are_of_the_distance_and_the_queries_asked_for(task, distance):
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(len(task.photos), 6)) * 3).astype(np.float32)
    view = task.views["test"]
    found = task.retrieve(embeddings, distance=distance)
    rows = [task.rows(embeddings, table).astype(float) for table in view]
    differences = rows[0][:, None] - rows[1][None]
    order = 2 if distance == "euclidean" else 1
    exact = np.linalg.norm(differences, ord=order, axis=2)
    np.testing.assert_allclose(-found.scores, np.sort(exact, axis=1)[:, :5], rtol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(exact, found.ranks, 1), -found.scores, rtol=1e-4)
    asked = np.arange(len(view.queries)) % 3 == 1
    for steps in ([], ["centring()"]):
        if steps and distance == "manhattan":
            continue
        whole = task.retrieve(embeddings, steps=steps, distance=distance)
        some = task.retrieve(embeddings, steps=steps, distance=distance, asked=asked)
        np.testing.assert_array_equal(some.ranks, whole.ranks[asked])
        np.testing.assert_array_equal(some.n_relevant, whole.n_relevant[asked])


def test_seconds_of_every_step_are_told_in_order(task):
    embeddings = np.random.default_rng(0).normal(size=(len(task.photos), 16)).astype(np.float32)
    steps = ["centring()", "pca(4)", "alpha_query_expansion(3, 3)"]
    found = task.retrieve(embeddings, steps=steps)
    assert [row["step"] for row in found.seconds] == [*steps[:2], "search", steps[2]]
    assert all(0 <= row["seconds"] < 60 for row in found.seconds)
    assert task.retrieve(embeddings).seconds == []


def test_seed_device_and_cache_reach_search_steps_and_score(task, monkeypatch, handed):
    monkeypatch.setattr(task, "seed", 3)
    calls = handed(judge_task, "ranked", "lists")
    assert task._ranked("view", "queries", "gallery", steps=["step"]) == "lists"
    machine = {"device": task.device, "cache_dir": task.cache_dir, "seed": 3}
    assert calls == [(("view", "queries", "gallery"), {**machine, "steps": ["step"]})]


@pytest.mark.parametrize("steps", [[], ["centring()"], ["product_votes(3)"]])
def test_interval_of_lists_is_drawn_with_their_seed(task, steps):
    embeddings = np.random.default_rng(0).normal(size=(len(task.photos), 16)).astype(np.float32)
    view = task.views["test"]
    sides = task.sides(embeddings, "test")
    for seed in (0, 3):
        found = ranked(view, *sides, references=task.known("test"), steps=steps, seed=seed)
        want = metrics.summary(
            found.hits, found.n_relevant, view.queries["product_id"].to_numpy(), seed=seed
        )
        chance = metrics.chance_map_at_k(found.n_relevant, len(view.gallery))
        assert found.metrics == {"n_gallery": len(view.gallery), **want, "chance": chance}
        assert found.words is None  # nobody asked
    unseeded = ranked(view, *sides, references=task.known("test"), steps=steps)
    assert (
        unseeded.metrics["map_at_5_low"]
        == ranked(view, *sides, references=task.known("test"), steps=steps, seed=0).metrics[
            "map_at_5_low"
        ]
    )


def test_device_and_cache_reach_the_steps(task, monkeypatch):
    seen = []
    apply = pipeline.apply
    monkeypatch.setattr(
        pipeline, "apply", lambda steps, found: seen.append(found) or apply(steps, found)
    )
    embeddings = np.random.default_rng(0).normal(size=(len(task.photos), 16)).astype(np.float32)
    task.retrieve(embeddings, "shop", steps=["product_votes(3)"])
    (found,) = seen
    assert found.device is task.device and found.cache_dir == task.cache_dir
    assert not {"product_id", "product", "group"} & set(found.query_rows)
    assert list(found.gallery_rows.index) == list(task.known("shop").index)
    task.retrieve(embeddings, "test", steps=["product_votes(3)"])
    assert seen[1].answers is None


def test_record_of_a_run_holds_what_the_task_knows(task, tmp_path, handed, monkeypatch):
    calls = handed(runs, "save", "path")
    monkeypatch.setattr(judge_task, "monotonic", lambda: task.started + 7)
    assert task.save_run(tmp_path, trained=True, notebook="00") == "path"
    scores = {"map_at_5": 0.5, "map_at_5_low": 0.4, "map_at_5_high": 0.6}
    assert task.save_run(tmp_path, validated=scores) == "path"
    (arguments, trained), (_, plain) = calls
    assert arguments == (tmp_path,) and trained["notebook"] == "00"
    assert set(trained["precision"]) == {"embedding", "training"}
    assert set(plain["precision"]) == {"embedding"}
    for record in (trained, plain):
        assert record["protocol"] == "test" and record["device"] == "cpu"
        assert record["seconds"] == 7 and record["data"] == catalog.describe_data(task.photos)
    assert trained["validation"] is None
    assert plain["validation"] == task.validation.record(scores)
    assert (tmp_path / "split.csv").is_file()


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


@pytest.mark.parametrize("steps", [[], ["centring()"]])
def test_places_without_a_photo_stay_empty_behind_steps_too(steps):
    queries, gallery = tables([1, 2], [1, 2, 2])
    rng = np.random.default_rng(0)
    q, g = (rng.normal(size=(n, 8)).astype(np.float32) for n in (2, 3))
    found = ranked(View(queries, gallery), q, g, steps=steps)
    assert [sorted(row) for row in found.ranks[:, :3].tolist()] == [[0, 1, 2]] * 2
    assert (found.ranks[:, 3:] == -1).all() and not found.hits[:, 3:].any()


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
    """(every other query of every third product, their gallery, embeddings) of frozen
    EfficientNet-Lite0, squashed to 224 px, bilinear.
    """
    tune()
    photos, store, _ = open_data(str(grocery), "", px=224)
    model = models.create("tf_efficientnet_lite0")
    model.record["interpolation"] = "bilinear"
    _, queries, gallery = catalog.split(photos, "test")
    queries, gallery = (side[side["product_id"] % 3 == 0] for side in (queries, gallery))
    queries, how = queries[::2], {"image_size": 224, "cache_dir": platform.cache_folder()}
    return (
        queries,
        gallery,
        *(embedding.embed(model, store, t.index, **how) for t in (queries, gallery)),
    )


@pytest.mark.long
def test_frozen_backbone_reproduces_the_plain_scripts_score_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    customer = (gallery.domain == "customer").to_numpy()
    found = ranked(View(queries, gallery[customer]), q, g[customer]).metrics
    assert (found["n_queries"], found["n_gallery"]) == (421, 891)
    assert found["map_at_5"] == pytest.approx(0.7398, abs=0.01)
    assert found["precision_at_1"] == pytest.approx(0.7886, abs=0.01)


@pytest.mark.long
def test_shop_photos_alone_are_a_harder_gallery_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    shop = (gallery.domain == "shop").to_numpy()
    assert ranked(View(queries, gallery[shop]), q, g[shop]).metrics["precision_at_1"] < 0.6


@pytest.mark.long
def test_learned_whitening_lifts_frozen_features_on_real_photos(frozen):
    queries, gallery, q, g = frozen
    found = ranked(View(queries, gallery), q, g, steps=["learned_whitening(dim=64)"]).metrics
    assert found["map_at_5"] == pytest.approx(0.899, abs=0.015)
