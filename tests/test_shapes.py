"""Whoever brings photos, in whatever shape: they load, validate, and are answered."""

import numpy as np
import pandas as pd
import pytest
from shapes import DRAWN, SHAPES, TEXT, cut, with_tables

from vipr_utils.data import catalog
from vipr_utils.judge import submission
from vipr_utils.judge.task import Task
from vipr_utils.learn import models


@pytest.fixture(scope="module")
def shaped(toy_root, tmp_path_factory):
    """shaped(shape): a data root of that shape, cut once."""
    roots = {}

    def root(shape):
        if shape not in roots:
            roots[shape] = cut(shape, toy_root, tmp_path_factory.mktemp("shapes") / shape)
        return roots[shape]

    return root


def sides(photos):
    return (photos[photos["split"] == split] for split in ("train", "test"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_query_of_every_shape_is_answered_in_both_forms_and_scored(shape, shaped, tmp_path):
    root = shaped(shape)
    photos, _ = catalog.read(root)
    gallery, queries = sides(photos)
    assert list(catalog.read_rows(root)[0].index) == list(queries["name"])
    # the right answers first
    right = queries["product_id"].to_numpy()[:, None] == gallery["product_id"].to_numpy()
    ranks = np.argsort(~right, axis=1, kind="stable")[:, :5]
    ranked = submission.write_ranking(
        tmp_path / "ranked.csv", queries["name"], gallery["name"].to_numpy()[ranks]
    )
    found = submission.score(ranked, root)
    classes = submission.write_classification(
        tmp_path / "named.csv", queries["name"], gallery["product"].to_numpy()[ranks[:, 0]]
    )
    named = submission.score(classes, root)
    if (queries["product_id"] < 0).all():
        assert np.isnan(found["map_at_5"]) and np.isnan(named["top_1_accuracy"])
    else:
        assert found["map_at_5"] == 1 and found["n_queries"] == right.any(1).sum()
        assert named["top_1_accuracy"] == pytest.approx(right.any(1).mean())


@pytest.mark.parametrize(
    ("shape", "form", "product"),
    [
        ("one_photo_a_product", "train: train.csv; test: test.csv", "0"),
        ("kaggles_test_table_alone", "train: train.csv; test: test_kaggletest.csv", "0"),
        ("product_names_in_text", "train: train.csv; test: test.csv", TEXT[0]),
        (
            "folders_with_labels",
            "train: folder train/, a folder a product; test: folder test/, a folder a product",
            "product 0",
        ),
        (
            "folders_gallery_and_queries",
            "train: folder gallery/, a folder a product; test: folder queries/, a folder a product",
            "product 0",
        ),
        (
            "folders_without_labels",
            "train: folder train/, a folder a product; test: folder test/, no labels",
            "product 0",
        ),
    ],
)
def test_form_is_found_out_and_products_keep_the_names_that_came_in(shape, form, product, shaped):
    photos, problems = catalog.read(shaped(shape))
    assert photos.attrs["form"] == form and problems.empty
    assert product in set(photos["product"])
    assert photos["product_id"].dtype == photos["group"].dtype == np.int64
    names = photos[photos["product_id"] >= 0].groupby("product_id")["product"].nunique()
    assert (names == 1).all()
    assert all(photos["path"].map(lambda path: (shaped(shape) / path).is_file()))


def test_numbers_stay_the_numbers_they_are_and_text_is_numbered_in_its_order(make_root):
    train = "name,class,group\na.jpg,7,x\nb.jpg,3.0,\nc.jpg,7,a\n"
    photos, _ = catalog.read(make_root(train, "name,class\nq.jpg,mug\nr.jpg,9\ns.jpg,-1\n"))
    assert list(photos["product_id"]) == [7, 3, 7, 10, 9, -1]
    assert list(photos["product"]) == ["7", "3", "7", "mug", "9", ""]
    assert list(photos["group"]) == [1, -1, 0, -1, -1, -1]
    train = "name,class\na.jpg,7\nb.jpg,007\nc.jpg,mug\n"
    photos, _ = catalog.read(make_root(train, "name,class\nq.jpg,apple\nr.jpg,mug\n"))
    assert list(photos["product_id"]) == [1, 0, 2, 3, 2]
    assert list(photos["product"]) == ["7", "007", "mug", "apple", "mug"]


@pytest.mark.parametrize("shape", ["one_photo_a_product", "product_names_in_text"])
def test_labels_taken_out_of_the_test_table_change_nothing_but_the_labels(
    shape, toy_root, tmp_path
):
    root = cut(shape, toy_root, tmp_path / "root")
    known, _ = catalog.read(root)
    pd.read_csv(root / "test.csv")[["name"]].to_csv(root / "test.csv", index=False)
    blind, _ = catalog.read(root)
    assert blind.attrs == known.attrs
    (train, queries), (same, unlabelled) = sides(known), sides(blind)
    assert train.equals(same) and (unlabelled["product_id"] == -1).all()
    assert queries["image_id"].equals(unlabelled["image_id"])


def test_fingerprint_changes_with_a_query_that_is_another_file(make_root):
    root = make_root()
    before = catalog.read(root)[0].attrs["fingerprint"]
    (root / "test" / "q.jpg").write_bytes(b"another")
    assert catalog.read(root)[0].attrs["fingerprint"] != before


def test_files_that_are_no_photos_are_listed_and_left_out(shaped):
    photos, problems = catalog.read(shaped("folder_with_other_files"))
    assert dict(zip(problems["file"], problems["problem"])) == {
        "train/loose.jpg": "in no folder of a product",
        "test/.DS_Store": "no photo, by its name",
        "test/notes.txt": "no photo, by its name",
    }
    assert photos["name"].str.endswith(".jpg").all()


def test_folders_of_queries_that_name_no_product_are_no_labels(shaped, toy_root, tmp_path):
    root = cut("folders_without_labels", toy_root, tmp_path / "root")
    (root / "test").rename(root / "monday")
    (root / "test").mkdir()
    (root / "monday").rename(root / "test" / "monday")
    photos, _ = catalog.read(root)
    _, queries = sides(photos)
    assert queries["name"].str.startswith("monday/").all() and set(queries["product"]) == {""}


def test_archives_unpacked_into_a_folder_of_their_own_name_are_found(toy_root, tmp_path):
    root = cut("folders_with_labels", toy_root, tmp_path / "root")
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "train")
    photos, _ = catalog.read(root)
    assert photos["path"].iloc[0].startswith("train/train/product ")
    (root / "train" / "product 99").mkdir()  # then `train` is a product beside another
    assert set(next(sides(catalog.read(root)[0]))["product"]) == {"train"}


def test_root_without_queries_says_where_they_may_be(make_root):
    with pytest.raises(catalog.CatalogError, match="no query. Name them in test.csv, or put"):
        catalog.read_rows(make_root(test=None))


# ------------------------------------------------------------------------------------- to choose by


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_queries_to_choose_by_that_a_model_answers(shape, shaped, tmp_path):
    task = Task(str(shaped(shape)), image_size=32, device="cpu", cache_dir=str(tmp_path))
    assert (task.validation.how == "drawn") == (shape in DRAWN)
    network = models.create("siamese_small", weights="none", embedding_dim=16)
    found = task.evaluate(network, image_size=32)
    assert 0 <= found["validation"].metrics["map_at_5"] <= 1
    assert len(found["test"].ranks) == len(catalog.read_rows(shaped(shape))[0])


@pytest.fixture
def task(shaped, tmp_path):
    root = shaped("one_photo_a_product")
    return Task(str(root), image_size=32, device="cpu", cache_dir=str(tmp_path))


def test_drawn_queries_join_the_photos_and_nothing_is_held_out(task):
    queries, gallery = task.views["validation"]
    train, test = sides(task.photos)
    assert task.fit.equals(train) and gallery.equals(train)
    assert set(queries["split"]) == {"drawn"} and set(queries["domain"]) == {"customer"}
    assert (queries["product_id"].value_counts() == 4).all()
    assert queries["product_id"].nunique() == train["product_id"].nunique()
    assert task.photos.index.is_unique and len(task.store.readable) == len(task.photos)
    assert task.store[queries.index[-1]].shape == task.store[train.index[0]].shape
    data = catalog.describe_data(task.photos)
    assert (data["n_train"], data["n_test"]) == (len(train), len(test))
    assert f"validation: {len(queries)} queries, drawn from shop photos, split" in str(task)


def test_drawn_queries_are_the_same_again_whatever_the_protocol_and_the_labels(
    task, toy_root, tmp_path
):
    pictures = {file: file.read_bytes() for file in (tmp_path / "drawn").rglob("*.jpg")}
    root = cut("one_photo_a_product", toy_root, tmp_path / "again")
    pd.read_csv(root / "test.csv")[["name"]].to_csv(root / "test.csv", index=False)
    again = Task(
        str(root), gallery_domain="shop", image_size=32, device="cpu", cache_dir=str(tmp_path / "c")
    )
    assert again.validation.split == task.validation.split
    assert again.store.key == task.store.key
    drawn = {file: file.read_bytes() for file in (tmp_path / "c" / "drawn").rglob("*.jpg")}
    assert len(pictures) == len(task.validation.queries)
    assert sorted(pictures.values()) == sorted(drawn.values())


def test_drawn_validation_can_be_asked_for_and_holdout_0_is_none(toy_root, tmp_path):
    settings = {"image_size": 32, "device": "cpu", "cache_dir": str(tmp_path)}
    task = Task(str(toy_root), protocol="unseen", validation="drawn", **settings)
    queries, gallery = task.views["validation"]
    assert set(queries["product_id"]) <= set(task.fit["product_id"])
    assert gallery.equals(task.fit) and set(gallery["split"]) == {"train"}
    assert Task(str(toy_root), validation="drawn", holdout=0, **settings).validation is None
    with pytest.raises(ValueError, match="validation 'best' is unknown: use 'auto' or 'drawn'"):
        Task(str(toy_root), validation="best", **settings)


@pytest.mark.parametrize(
    ("gallery_domain", "how"), [("", "photos"), ("shop", "photos"), ("customer", "drawn")]
)
def test_no_photo_is_held_out_that_alone_could_answer(gallery_domain, how, toy_root, tmp_path):
    train, test = (pd.read_csv(toy_root / f"{split}.csv") for split in ("train", "test"))
    one_of_each = train.groupby(["class", "domain"]).head(1)
    root = with_tables(tmp_path / "root", toy_root, one_of_each, test)
    settings = {"image_size": 32, "device": "cpu", "cache_dir": str(tmp_path / "cache")}
    task = Task(str(root), gallery_domain=gallery_domain, **settings)
    queries, gallery = task.views["validation"]
    assert task.validation.how == how
    assert queries["product_id"].isin(gallery["product_id"]).all()


def test_drawn_queries_are_spread_over_products_and_bounded(shaped, tmp_path):
    root = shaped("one_product_of_300_photos")
    task = Task(str(root), validation="drawn", image_size=32, device="cpu", cache_dir=str(tmp_path))
    counts = task.validation.queries["product_id"].value_counts()
    assert len(counts) == 5 and counts.max() <= 8 and counts.min() >= 4
    assert "queries, drawn from train photos" in str(task)  # no domain is known


def test_a_model_sees_drawn_queries_as_it_sees_photos(task):
    network = models.create("siamese_small", weights="none", embedding_dim=16)
    embeddings = task.embed(network, image_size=32)
    validated = task.validate(network, image_size=32)
    kept = task.retrieve(embeddings, "validation").metrics
    assert validated["map_at_5"] == pytest.approx(kept["map_at_5"])
    steps = ["verify(top=10)"]
    verified = task.retrieve(embeddings, "validation", steps=steps).metrics["map_at_5"]
    assert verified > kept["map_at_5"]  # it finds the printed shop photo behind the drawn query
