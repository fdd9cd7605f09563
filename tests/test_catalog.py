"""Tables to catalog: what is refused, what is listed, how protocols split."""

import errno
import os
import re

import numpy as np
import pandas as pd
import pytest

from vipr_utils.data import audit, catalog, tables
from vipr_utils.data.catalog import CatalogError
from vipr_utils.data.store import build_store
from vipr_utils.host import files


def test_catalog_has_a_row_per_photo_with_its_split_and_path(make_root):
    photos, problems = catalog.read(make_root())
    assert list(photos.image_id) == ["train/a.jpg", "train/b.jpg", "train/c.jpg", "test/q.jpg"]
    assert list(photos.product_id) == [1, 1, 2, 1] and list(photos.group) == [0, 0, 0, -1]
    assert problems.empty
    assert catalog.describe_data(photos)["n_train"] == 3


def test_images_in_a_doubled_folder_are_found(make_root):
    root = make_root()
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "train")
    photos, problems = catalog.read(root)
    assert photos.path[0] == "train/train/a.jpg" and problems.empty


def test_root_without_table_and_folders_says_which_there_may_be(tmp_path):
    message = "has no train.csv, and no photos in train/<product>/ or .*Write a train.csv with"
    with pytest.raises(CatalogError, match=message):
        catalog.read(tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "name,group\na.jpg,0\n",
            r"train.csv: expected the columns name, class, found name, group. Rename or add them",
        ),
        ("id,label\na.jpg,0\n", r"expected the columns name, class, found id, label"),
        (
            "name,class\na.jpg,1\na.jpg,2\n",
            r"train.csv, row 3 \(a.jpg\): this name already has a row above. Keep one row",
        ),
        (
            "name,class\na.jpg,1\na.jpg,2\nb.jpg,1\nb.jpg,1\n",
            r"row 3 \(a.jpg\): .* above. Keep one row for each. Rows like it: 2.",
        ),
        (
            "name,class\n../../etc/a.jpg,1\n",
            r"train.csv, row 2 .*: name '../../etc/a.jpg', expected a path inside the image folder",
        ),
        ("name,class\n/etc/a.jpg,1\n", r"name '/etc/a.jpg', expected a path inside"),
        ("name,class\nC:\\a.jpg,1\n", r"name 'C:.*a.jpg', expected a path inside"),
        ("name,class\nb\\..\\..\\a.jpg,1\n", r"expected a path inside the image folder"),
        (
            "name,class\na.jpg,-1\n",
            r"train.csv, row 2 \(a.jpg\): class '-1', expected the name or number of a product",
        ),
        ("name,class\na.jpg,\n", r"train.csv, row 2 \(a.jpg\): class ''.* Correct the table"),
        (
            "name,class,domain\na.jpg,1,studio\n",
            r"row 2 \(a.jpg\): domain 'studio', expected shop, customer or nothing",
        ),
        (
            "name,class\n,1\n",
            r"train.csv, row 2 \(\): name '', expected a path inside the image folder",
        ),
        (
            "name,class\na.jpg,1,2\nb.jpg,1\n",
            r"Expected 2 fields in line 2, saw 3.*quotes around a field with a comma",
        ),
        (
            "name,class,group\na.jpg,1,2\nb.jpg,1\n",
            r"row 3 \(b.jpg\): fewer fields than the header",
        ),
        ('name,class\n"a.jpg,1\n', r"train.csv is no readable CSV \(unexpected end of data\)"),
        ("name,class\n", r"train.csv is no readable CSV \(no rows below a header\)"),
        ("", r"train.csv is no readable CSV \(No columns to parse from file\)"),
    ],
)
def test_table_that_cannot_be_used_names_file_row_and_remedy(tmp_path, train, message):
    (tmp_path / "train.csv").write_text(train)
    with pytest.raises(CatalogError, match=message):
        catalog.read(tmp_path)


def test_table_is_read_with_a_byte_order_mark_quotes_blank_lines_and_columns_of_one_name(tmp_path):
    text = '\ufeffname, class ,,\r\n"a, b.jpg",NA,,\r\n\r\nc.jpg,,1,2\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    table = tables.read_table(tmp_path / "t.csv", ["name", "class"])
    assert table.to_dict("list") == {
        "name": ["a, b.jpg", "c.jpg"],
        "class": ["NA", ""],
        "": ["", "1"],
    }
    (tmp_path / "t.csv").write_bytes("name\nÄpfel.jpg\n".encode("latin-1"))
    with pytest.raises(CatalogError, match="is no readable CSV .*: expected UTF-8 text"):
        tables.read_table(tmp_path / "t.csv")
    with pytest.raises(CatalogError, match="none.csv is no readable CSV .*No such file"):
        tables.read_table(tmp_path / "none.csv")


def test_unknown_groups_and_domains_may_be_empty(make_root):
    train = "name,class,group,domain\na.jpg,1,,\nb.jpg,1,-1,\nc.jpg,2,7,shop\n"
    photos, _ = catalog.read(make_root(train, None))
    assert list(photos.group) == [-1, -1, 7] and list(photos.domain) == ["", "", "shop"]


def test_long_numbers_and_numbers_that_pandas_wrote_as_floats_are_read_exactly(make_root):
    train = "name,class,group\na.jpg,900719925474099301,3.0\nb.jpg,900719925474099302,\n"
    photos, _ = catalog.read(make_root(train, None))
    assert list(photos.product_id) == [900719925474099301, 900719925474099302]
    assert list(photos.group) == [3, -1]


def test_extra_columns_are_left_out(make_root):
    photos, _ = catalog.read(make_root("name,class,group,colour\na.jpg,1,0,red\n", None))
    assert list(photos) == catalog.CATALOG and list(photos.group) == [0]


def test_absent_files_are_listed_and_left_out(make_root):
    root = make_root()
    (root / "train" / "b.jpg").unlink()
    photos, problems = catalog.read(root)
    assert list(photos.name) == ["a.jpg", "c.jpg", "q.jpg"]
    assert problems.to_dict("records") == [{"file": "train/b.jpg", "problem": "absent"}]


def test_names_of_a_table_written_on_windows_are_paths_here_too(make_root):
    root = make_root()
    (root / "train" / "new").mkdir()
    (root / "train" / "b.jpg").rename(root / "train" / "new" / "b.jpg")
    (root / "train.csv").write_text("name,class\na.jpg,1\nnew\\b.jpg,1\n")
    photos, problems = catalog.read(root)
    assert problems.empty and photos.path[1] == "train/new/b.jpg"
    assert photos.name[1] == "new\\b.jpg"


@pytest.mark.parametrize("failures", [2, 99])
def test_disk_that_fails_makes_no_photo_absent(make_root, monkeypatch, failures):
    root, real, left = make_root(), os.stat, [failures]

    def stat(path, *args, **how):
        if str(path).endswith("b.jpg") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **how)

    monkeypatch.setattr(files, "WAITS_S", (0, 0, 0))
    monkeypatch.setattr(os, "stat", stat)
    if failures == 99:
        with pytest.raises(OSError, match="b.jpg cannot be read .*see to its disk"):
            catalog.read(root)
    else:
        assert catalog.read(root)[1].empty


def test_root_without_any_of_its_photos_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("name,class\na.jpg,1\n")
    with pytest.raises(CatalogError, match="none of the photos named in train.csv is there"):
        catalog.read(tmp_path)


@pytest.mark.parametrize("test", ["name\nq.jpg\nr.jpg\n", "name,class\nq.jpg,\nr.jpg,7\n"])
def test_labels_of_kaggles_own_test_table_are_used(make_root, test):
    root = make_root(test=test)
    (root / "test_kaggletest.csv").write_text("name,class,Usage\nr.jpg,2,Public\nq.jpg,1,Private\n")
    photos, _ = catalog.read(root)
    assert dict(zip(photos.name, photos.product_id)) == {
        "a.jpg": 1,
        "b.jpg": 1,
        "c.jpg": 2,
        "q.jpg": 1,
        "r.jpg": 2,
    }


def test_fingerprint_changes_with_a_label_and_with_a_file(make_root):
    root = make_root()
    before = catalog.read(root)[0].attrs["fingerprint"]
    assert catalog.read(root)[0].attrs["fingerprint"] == before
    (root / "train.csv").write_text((root / "train.csv").read_text().replace("c.jpg,2", "c.jpg,3"))
    relabelled = catalog.read(root)[0].attrs["fingerprint"]
    (root / "train" / "c.jpg").write_bytes((root / "train" / "a.jpg").read_bytes())
    assert len({before, relabelled, catalog.read(root)[0].attrs["fingerprint"]}) == 3


# ------------------------------------------------------------------------------- protocols, subsets


def test_empty_test_set_is_refused_by_protocol_test_alone(make_root):
    photos, _ = catalog.read(make_root(test=None))
    with pytest.raises(
        CatalogError,
        match="protocol 'test' has no query: 'test' needs photos in test.csv and test/",
    ):
        catalog.split(photos, "test")
    assert len(catalog.split(photos, "seen")[1]) == 1


def test_header_only_test_table_is_refused(make_root):
    with pytest.raises(CatalogError, match="test.csv is no readable CSV .no rows below a header"):
        catalog.read(make_root(test="name,class\n"))


def test_unknown_protocol_lists_the_known(make_root):
    with pytest.raises(
        ValueError, match=r"protocol 'random' is unknown: use one of \('test', 'seen', 'unseen'\)"
    ):
        catalog.split(catalog.read(make_root())[0], "random")


def photos_of(counts: dict, domains: bool = False) -> pd.DataFrame:
    rows = [(p, i) for p, n in counts.items() for i in range(n)]
    table = pd.DataFrame(rows, columns=["product_id", "i"])
    table["split"], table["group"], table["domain"] = "train", table.product_id // 2, ""
    if domains:
        table["domain"] = np.where(table.i == 0, "shop", "customer")
    table["name"] = [f"{p}-{i}.jpg" for p, i in rows]
    table["image_id"] = "train/" + table["name"]
    return table


def test_seen_keeps_every_product_in_the_gallery_and_no_query_in_it():
    photos = photos_of({1: 10, 2: 5, 3: 2, 4: 1})
    train, queries, gallery = catalog.split(photos, "seen", seed=1)
    assert not set(queries.index) & set(gallery.index) and len(queries) + len(gallery) == len(
        photos
    )
    assert set(gallery.product_id) == {1, 2, 3, 4}
    assert dict(queries.product_id.value_counts()) == {
        1: 2,
        2: 1,
        3: 1,
    }  # the class with one image asks nothing
    assert train.equals(gallery)


def test_seen_asks_with_customer_photos_where_domains_are_known():
    photos = photos_of(dict.fromkeys(range(6), 4), domains=True)
    _, queries, _ = catalog.split(photos, "seen", holdout=0.5)
    assert set(queries.domain) == {"customer"} and len(queries) == 6 * 2


@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_products_of_one_photo_leave_no_query(protocol):
    with pytest.raises(
        CatalogError, match=f"protocol '{protocol}' has no query: .* two train photos"
    ):
        catalog.split(photos_of({1: 1, 2: 1}), protocol)


def test_unseen_trains_on_nothing_of_a_querys_product():
    photos = photos_of(dict.fromkeys(range(20), 6))
    train, queries, gallery = catalog.split(photos, "unseen", seed=3)
    assert not set(train.product_id) & set(queries.product_id)
    assert queries.product_id.nunique() == 4 and set(queries.product_id) <= set(gallery.product_id)
    assert not set(queries.index) & set(gallery.index)


@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_split_is_the_same_for_a_seed_and_another_for_another(protocol):
    photos = photos_of(dict.fromkeys(range(20), 6))
    first, again, other = (catalog.split(photos, protocol, seed=s)[1] for s in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_gallery_domain_narrows_and_says_what_there_is():
    photos = photos_of({1: 3, 2: 3}, domains=True)
    assert set(catalog.split(photos, "seen", gallery_domain="shop")[2].domain) == {"shop"}
    with pytest.raises(CatalogError, match="gallery_domain 'shop' leaves no photo"):
        catalog.split(photos_of({1: 3, 2: 3}), "seen", gallery_domain="shop")
    with pytest.raises(
        CatalogError, match=r"'studio' leaves no photo .*'customer', 'shop'.*: use one"
    ):
        catalog.narrow(photos, "studio")


def test_subset_strategies_choose_what_they_say():
    photos = photos_of({1: 80, 2: 3, 3: 20, 4: 5, 5: 1})
    assert set(catalog.subset(photos, "largest", 2).product_id) == {1, 3}
    capped = catalog.subset(photos, "capped", 10).product_id.value_counts()
    assert dict(capped) == {1: 50, 3: 20, 4: 5}
    assert catalog.subset(photos, "random", 3, seed=1).product_id.nunique() == 3
    with pytest.raises(ValueError, match="strategy 'best' is unknown"):
        catalog.subset(photos, "best", 2)
    assert catalog.subset(photos, "random", 99).product_id.nunique() == 5
    assert catalog.subset(photos, "largest", 99).product_id.nunique() == 5
    with pytest.raises(CatalogError, match="'capped' needs products with 4 photos"):
        catalog.subset(photos_of({1: 2, 2: 2}), "capped", 2)


def test_nearest_subset_takes_the_products_that_queries_look_like():
    photos = photos_of({1: 8, 2: 3, 3: 20, 4: 5})
    assert set(catalog.subset(photos, "nearest", 2, nearest=[2, 4, 4, 2, 4, 3]).product_id) == {
        2,
        4,
    }
    with pytest.raises(
        CatalogError, match="'nearest' needs the product ids ranked first for the queries"
    ):
        catalog.subset(photos, "nearest", 2)


def test_photos_of_one_visit_are_chained_by_the_colours_they_share_within_a_product():
    photos = photos_of({1: 4, 2: 2})
    layouts = np.array([[10, 0, 0], [7, 3, 0], [4, 6, 0], [0, 0, 10], [10, 0, 0], [6, 4, 0]])
    visits = catalog.visits(photos, layouts)  # 7 of 10 shared is alike, 6 of 10 is not
    assert visits[:3].nunique() == 1 and visits[3] != visits[0] and visits[4] != visits[5]


def of_visits(photos, numbers):
    """Layouts in which photos of one number share everything and others nothing."""
    return np.eye(max(numbers) + 1, dtype=np.uint16)[list(numbers)] * 10


@pytest.fixture
def share_as_given(monkeypatch):
    monkeypatch.setattr(catalog, "ENOUGH", 1)


def test_share_held_out_is_doubled_where_queries_are_few_and_never_beyond_the_most():
    for products, queries in ((60, 120), (8, 32), (200, 200)):
        photos = photos_of(dict.fromkeys(range(products), 10))
        held = catalog.hold_out(photos, of_visits(photos, photos.i), holdout=0.1)
        assert held.how == "visits" and len(held.queries) == queries
        assert held.queries.product_id.value_counts().nunique() == 1


def test_held_out_visits_are_whole_and_at_most_half_of_a_product(share_as_given):
    photos = photos_of(dict.fromkeys(range(8), 12) | {8: 6})
    numbers = (photos.i // 3).where(photos.product_id < 8, 0)  # product 8: one visit
    held = catalog.hold_out(photos, of_visits(photos, numbers), holdout=0.1)
    keys = [set(zip(t.product_id, numbers[t.index])) for t in (held.queries, held.gallery)]
    assert (
        held.how == "visits"
        and held.fit.equals(held.gallery)
        and len(held.fit) + len(held.queries) == len(photos)
    )
    assert (
        not keys[0] & keys[1]
        and set(held.queries.product_id) == set(range(8))
        and 8 in set(held.gallery.product_id)
    )
    assert (held.queries.product_id.value_counts() == 3).all()


def test_without_two_visits_single_photos_are_held_out_and_without_two_photos_none_can_be(
    share_as_given,
):
    photos = photos_of({1: 4, 2: 1})
    held = catalog.hold_out(photos, of_visits(photos, [0] * 5))
    assert held.how == "photos" and set(held.queries.product_id) == {1}
    photos = photos_of(dict.fromkeys(range(5), 4))
    numbers = (photos.i // 2).where(photos.product_id < 1, 0)  # one product of five was seen twice
    held = catalog.hold_out(photos, of_visits(photos, numbers))
    assert held.how == "photos" and held.queries.product_id.nunique() == 5
    with pytest.raises(
        CatalogError,
        match="no product has two train photos, .* where there is holdout, set it to 0",
    ):
        catalog.hold_out(photos_of({1: 1, 2: 1}), of_visits(photos, [0, 0]))


def test_a_split_is_named_by_the_photos_it_holds_out_and_written_down(tmp_path, share_as_given):
    photos = photos_of(dict.fromkeys(range(4), 12))
    first = catalog.hold_out(photos, of_visits(photos, photos.i // 3))
    again = catalog.hold_out(photos, of_visits(photos, photos.i // 3))
    other = catalog.hold_out(photos, of_visits(photos, photos.i // 4))
    assert first.split == again.split != other.split and re.fullmatch("[0-9a-f]{16}", first.split)
    first.save(tmp_path)
    table = pd.read_csv(tmp_path / "split.csv")
    assert list(table.image_id) == list(photos.image_id) and set(table.part) == {"fit", "query"}
    record = first.record({"map_at_5": 0.5, "map_at_5_low": 0.4, "map_at_5_high": 0.6})
    assert record == {
        "how": "visits",
        "split": first.split,
        "n_queries": 12,
        "map_at_5": 0.5,
        "low": 0.4,
        "high": 0.6,
    }


# ----------------------------------------------------------------------------- duplicates and leaks


def test_exact_duplicates_are_found_by_content(make_root, tmp_path):
    root = make_root()
    (root / "test" / "q.jpg").write_bytes((root / "train" / "b.jpg").read_bytes())
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=tmp_path)
    pairs = audit.exact_duplicates(photos, store.files["sha256"])
    assert pairs.tolist() == [[3, 1]]
    leaked = audit.leaks(photos, pairs)
    assert leaked.to_dict("records") == [{"train": 1, "test": 3, "same_product": True}]


def test_leaks_go_by_the_rows_own_numbers_where_photos_were_left_out():
    splits, products = ["train", "train", "test"], [1, 2, 2]
    photos = pd.DataFrame({"split": splits, "product_id": products}, index=[3, 7, 9])
    leaked = audit.leaks(photos, np.array([[9, 7], [3, 9], [3, 7]]))
    assert leaked.to_dict("list") == {
        "train": [7, 3],
        "test": [9, 9],
        "same_product": [True, False],
    }


def test_leak_of_a_test_photo_without_label_is_neither_of_the_same_product_nor_of_another():
    photos = pd.DataFrame({"split": ["train", "test"], "product_id": [2, -1]})
    assert audit.leaks(photos, np.array([[0, 1]]))["same_product"].isna().all()


@pytest.mark.parametrize("bits", [0, 2, 4, 7])
def test_near_duplicates_are_those_of_a_slow_loop(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 60, np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, n, replace=False)) for n in range(9)]
    hashes = np.concatenate([hashes, hashes[:9] ^ np.array(flips, np.uint64)])
    slow = [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= bits
    ]
    assert slow and [tuple(map(int, p)) for p in audit.near_duplicates(hashes, bits)] == slow


def test_many_equal_hashes_are_compared_within_memory():
    pairs = audit.near_duplicates(np.zeros(1500, np.uint64), 0)
    assert len(pairs) == 1500 * 1499 // 2


# ----------------------------------------------------------------------------------------- cleaning


def photographed(products):
    return pd.DataFrame({"product_id": products}, index=np.arange(len(products)) * 10 + 7)


def test_cleaning_keeps_the_main_component_of_every_product():
    rows = photographed([1, 1, 1, 1, 2, 2, 2])
    pairs = [(7, 17), (17, 27), (37, 47), (47, 57)]  # 37-47 crosses products
    groups = audit.linked(rows, pairs)
    assert groups[7] == groups[17] == groups[27] != groups[37]
    kept, dropped = audit.clean(rows, groups)
    assert list(kept.index) == [7, 17, 27, 47, 57] and list(dropped.index) == [37, 67]
    assert list(dropped["in_group"]) == [1, 1] and list(dropped["in_main"]) == [3, 2]


def test_a_product_without_a_main_component_is_left_as_it_is():
    rows = photographed([1, 1, 2, 3, 3, 3, 3])
    for pairs in ([], [(37, 47), (57, 67)]):
        kept, dropped = audit.clean(rows, audit.linked(rows, np.array(pairs, int).reshape(-1, 2)))
        assert list(kept.index) == list(rows.index) and dropped.empty


def test_cleaning_by_similarity_finds_a_photo_under_the_wrong_product():
    rng = np.random.default_rng(0)
    products = np.repeat([0, 1, 2], 10)
    x = np.eye(3)[products] + 0.1 * rng.normal(size=(30, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    products[[4, 15]] = [1, 2]  # mislabelled
    rows = photographed(products)
    kept, dropped = audit.clean(rows, audit.similar(rows, x, similarity=0.8))
    assert list(dropped.index) == [47, 157] and len(kept) == 28
