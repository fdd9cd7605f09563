"""The file that gets scored: written whole, refused when wrong, scored alike by its own scorer."""

import csv

import numpy as np
import pandas as pd
import pytest

from vipr_utils.data import catalog
from vipr_utils.judge import metrics, submission
from vipr_utils.judge.submission import SubmissionError
from vipr_utils.judge.task import View, ranked

TRAIN = "name,class,domain\n" + "".join(
    f"g{i}.jpg,{i % 3},{'shop' if i < 3 else 'customer'}\n" for i in range(9)
)
TEST = "name,class\nq0.jpg,0\nq1.jpg,1\nq2.jpg,9\n"
GOOD = (
    "id,images\nq0.jpg,g0.jpg g1.jpg g3.jpg g4.jpg g6.jpg\n"
    "q1.jpg,g0.jpg g2.jpg g3.jpg g4.jpg g5.jpg\n"
    "q2.jpg,g0.jpg g1.jpg g2.jpg g3.jpg g4.jpg\n"
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "test.csv").write_text(TEST)
    return tmp_path


def changed(root, old, new):
    assert old in GOOD
    (root / "submission.csv").write_text(GOOD.replace(old, new))
    return root / "submission.csv"


def independent_map_at_5(path, root, domain=""):
    """mAP@5 from the three files alone, in plain Python: reads nothing of the kit."""

    def rows(file):
        with open(file, newline="") as opened:
            return list(csv.DictReader(opened))

    gallery = {
        r["name"]: r["class"]
        for r in rows(root / "train.csv")
        if not domain or r["domain"] == domain
    }
    wanted = {r["name"]: r["class"] for r in rows(root / "test.csv")}
    values = []
    for row in rows(path):
        n = sum(c == wanted[row["id"]] for c in gallery.values())
        if n == 0:
            continue
        found, total = 0, 0.0
        for rank, name in enumerate(row["images"].split(), 1):
            if gallery[name] == wanted[row["id"]]:
                found += 1
                total += found / rank
        values.append(total / min(n, 5))
    return sum(values) / len(values)


def test_score_is_that_of_an_independent_scorer_and_counts_the_unanswerable_query(root):
    path = changed(root, "q0", "q0")
    scored = submission.score(path, root)
    assert scored["map_at_5"] == pytest.approx(independent_map_at_5(path, root), abs=1e-12)
    assert scored["map_at_5"] == pytest.approx(
        ((1 + 2 / 3 + 3 / 5) / 3 + (2 / 5 * 0 + 1 / 4) / 3) / 2
    )
    assert (scored["n_queries"], scored["n_excluded"], scored["n_gallery"]) == (2, 1, 9)


@pytest.fixture
def many(root):
    """(root, submission): 40 queries of 12 products, one in five of a product without a photo."""
    rng, labels = np.random.default_rng(0), np.arange(40) % 12
    photos = [f"g{i}.jpg,p{i % 10},{'shop' if i % 3 else 'customer'}" for i in range(60)]
    (root / "train.csv").write_text("\n".join(["name,class,domain", *photos, ""]))
    queries = [f"q{i}.jpg,p{label}" for i, label in enumerate(labels)]
    (root / "test.csv").write_text("\n".join(["name,class", *queries, ""]))
    lists = []
    for i, label in enumerate(labels):
        likely = rng.permutation([g for g in range(60) if g % 10 == label or g % 7 == i % 7])
        lists.append([f"g{g}.jpg" for g in likely[:5]])
    path = submission.write_ranking(root / "many.csv", [f"q{i}.jpg" for i in range(40)], lists)
    return root, path, labels, lists


@pytest.mark.parametrize("settings", [{}, {"seed": 3}])
def test_figures_of_a_ranking_are_those_of_its_hits_counted_by_hand(many, settings):
    root, path, labels, lists = many
    hits = [[int(name[1:-4]) % 10 == label for name in row] for label, row in zip(labels, lists)]
    n_relevant = [6 if label < 10 else 0 for label in labels]
    found = submission.score(path, root, **settings)
    want = metrics.summary(hits, n_relevant, labels, seed=settings.get("seed", 0))
    chance = metrics.chance_map_at_k(n_relevant, 60)
    assert found == {**want, "chance": chance, "n_gallery": 60}
    assert (found["n_queries"], found["n_excluded"], found["n_products"]) == (34, 6, 10)
    assert found["map_at_5"] == pytest.approx(independent_map_at_5(path, root), abs=1e-12)


@pytest.mark.parametrize("settings", [{}, {"seed": 3}])
def test_figures_of_classes_are_those_of_right_answers_counted_by_hand(many, settings):
    root, _, labels, lists = many
    first = np.array([int(row[0][1:-4]) % 10 for row in lists])
    path = submission.write_classification(
        root / "c.csv", [f"q{i}.jpg" for i in range(40)], [f"p{i}" for i in first]
    )
    found = submission.score(path, root, **settings)
    right = (first == labels).astype(float)
    low, high = metrics.bootstrap_interval(right, labels, seed=settings.get("seed", 0))
    assert 0.2 < right.mean() < 0.8
    assert found.pop("definition").startswith("top-1 accuracy")
    assert found == {
        "top_1_accuracy": pytest.approx(right.mean()),
        "top_1_accuracy_low": low,
        "top_1_accuracy_high": high,
        "n_queries": 40,
        "n_excluded": 0,
        "n_products": 12,
        "n_gallery": 60,
    }


def test_gallery_of_one_domain_is_answered_with_checked_and_scored(root, capsys):
    queries = rows_of(root, "test", ["q0.jpg", "q1.jpg"])
    gallery = rows_of(root, "train", ["g0.jpg", "g1.jpg"])  # g2, the shop's too, cannot be read
    ranks = np.array([[1, 0, -1, -1, -1], [1, 0, -1, -1, -1]])
    shop = {"gallery_domain": "shop"}
    path = submission.write_answers(root / "s.csv", root, queries, gallery, ranks, **shop)
    lists = pd.read_csv(path, index_col="id")["images"]
    assert set(lists) == {"g1.jpg g0.jpg g2.jpg"}
    assert list(submission.validate(path, root, **shop)["id"]) == ["q0.jpg", "q1.jpg", "q2.jpg"]
    found = submission.score(path, root, **shop)
    assert found["n_gallery"] == 3
    assert found["map_at_5"] == pytest.approx((1 / 2 + 1) / 2)
    assert submission.main([str(path), str(root), "--gallery-domain", "shop"]) == 0
    assert "mAP@5 0.750 [0.500, 1.000] over 2 queries (1 excluded), 3 g" in capsys.readouterr().out


def test_written_file_of_a_real_search_scores_as_the_search_did(toy_data, toy_root, tmp_path):
    photos, _ = toy_data
    _, queries, gallery = catalog.split(photos, "test")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(photos.product_id.max() + 1, 16)).astype(np.float32)
    q, g = (
        centres[t.product_id] + rng.normal(size=(len(t), 16)).astype(np.float32)
        for t in (queries, gallery)
    )
    found = ranked(View(queries, gallery), q, g)
    path = submission.write_ranking(
        tmp_path / "s.csv", queries.name, gallery.name.to_numpy()[found.ranks]
    )
    assert 0.1 < found.metrics["map_at_5"] < 0.99
    for value in (
        submission.score(path, toy_root)["map_at_5"],
        independent_map_at_5(path, toy_root),
    ):
        assert value == pytest.approx(found.metrics["map_at_5"], abs=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" g6.jpg", "", r"row 2 \(q0.jpg\): 4 images, expected 5. Rank the best 5"),
        (" g6.jpg", " g6.jpg g7.jpg", r"row 2 \(q0.jpg\): 6 images, expected 5"),
        (
            " g6.jpg",
            " g0.jpg",
            r"row 2 \(q0.jpg\): g0.jpg is listed more than once. Rank each image once",
        ),
        (" g6.jpg", " h6.jpg", r"row 2 \(q0.jpg\): unknown image 'h6.jpg', not a train photo"),
        (" g6.jpg", "  g6.jpg", r"row 2 \(q0.jpg\): unknown image '', .* exactly one space"),
        ("q2.jpg,g0", "q1.jpg,g0", r"row 4 \(q1.jpg\): this name already has a row above"),
        ("q2.jpg,g0", "q9.jpg,g0", r"row 4 \(q9.jpg\): unknown query, not among the test photos"),
        (
            GOOD[GOOD.index("q2.jpg") :],
            "",
            r"row 4 \(q2.jpg\): no row for this query of the test photos. Answer every query",
        ),
        (
            GOOD[GOOD.index("q1.jpg") :],
            "",
            r"row 3 \(q1.jpg\): no row for this query of the test photos. .* Rows like it: 2.",
        ),
        ("id,images", "id,ranked", r"header 'id,ranked', expected 'id,images' or 'name,class'"),
        (" g6.jpg", ",g6.jpg", r"no readable CSV \(Expected 2 fields in line 2, saw 3"),
        (GOOD, "", r"no readable CSV \(No columns to parse from file\)"),
    ],
)
def test_wrong_file_names_row_query_fault_and_remedy(root, old, new, message):
    path = changed(root, old, new)
    with pytest.raises(SubmissionError, match=message) as refused:
        submission.validate(path, root)
    assert str(refused.value).startswith(str(path))


def test_missing_query_that_is_named_is_the_first_of_the_data_root(root):
    (root / "test.csv").write_text("name,class\nq0.jpg,0\nz.jpg,1\na.jpg,2\n")
    with pytest.raises(SubmissionError, match=r"row 3 \(z.jpg\): no row .* Rows like it: 2"):
        submission.validate(changed(root, GOOD[GOOD.index("q1.jpg") :], ""), root)


def test_image_of_another_domain_is_unknown_to_a_narrowed_gallery(root):
    with pytest.raises(SubmissionError, match="4 images|5 images, expected 3|unknown image"):
        submission.validate(changed(root, "q0", "q0"), root, gallery_domain="shop")
    with pytest.raises(
        SubmissionError, match="gallery_domain 'studio' leaves no photo .*customer.*shop"
    ):
        submission.validate(changed(root, "q0", "q0"), root, gallery_domain="studio")


def test_tables_of_a_data_root_are_read_once_for_a_score(root, monkeypatch):
    listed, splits = catalog.listing.listed, []

    def noted(folder, split, *products):
        splits.append(split)
        return listed(folder, split, *products)

    monkeypatch.setattr(catalog.listing, "listed", noted)
    submission.score(changed(root, "q0", "q0"), root)
    assert sorted(splits) == ["test", "train"]


def test_absent_file_says_which_notebook_writes_it(root):
    with pytest.raises(SubmissionError, match="no such file. Run notebook 06_submission"):
        submission.score(root / "none.csv", root)


def test_lists_for_other_queries_are_not_written_and_an_older_file_stays(tmp_path):
    path = submission.write_ranking(tmp_path / "s.csv", ["q"], [list("abcde")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="argument 2 is longer"):
        submission.write_ranking(path, ["q"], [list("abcde"), list("abcde")])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        submission.write_classification(path, ["q", "r"], [1])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_lines_end_alike_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr("os.linesep", "\r\n")
    path = submission.write_classification(tmp_path / "s.csv", ["q"], [1])
    assert path.read_bytes() == b"name,class\nq,1\n"


def test_blanks_and_percent_signs_of_names_come_back_from_the_file(tmp_path):
    names = ["a b.jpg", "a%20b.jpg", "50% off.jpg", "süß/ü.JPG", "+.jpg"]
    rows = [f"{name},{i}\n" for i, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("name,class\n" + "".join(rows), encoding="utf-8")
    (tmp_path / "test.csv").write_text("name,class\nq 1.jpg,1\n")
    path = submission.write_ranking(tmp_path / "s.csv", ["q 1.jpg"], [names])
    assert "q 1.jpg,a%20b.jpg a%2520b.jpg 50%25%20off.jpg" in path.read_text(encoding="utf-8")
    assert submission.score(path, tmp_path)["map_at_5"] == pytest.approx(1 / 2)


def test_classification_form_is_written_checked_and_scored(root):
    path = submission.write_classification(
        root / "c.csv", ["q0.jpg", "q1.jpg", "q2.jpg"], np.array([0, 2, 1])
    )
    assert pd.read_csv(path).columns.tolist() == ["name", "class"]
    scored = submission.score(path, root)
    assert scored["top_1_accuracy"] == pytest.approx(1 / 3) and "map_at_5" not in scored
    path.write_text(path.read_text().replace("q1.jpg,2", "q1.jpg,77"))
    with pytest.raises(
        SubmissionError, match=r"row 3 \(q1.jpg\): class '77' is no class of the train photos"
    ):
        submission.validate(path, root)
    submission.write_classification(path, ["q0.jpg", "q1.jpg", "q2.jpg"], [0, float("nan"), 1])
    with pytest.raises(SubmissionError, match=r"row 3 \(q1.jpg\): class '' is no class"):
        submission.validate(path, root)


def test_class_of_a_name_that_ends_as_a_number_does_is_taken_as_it_stands(root):
    (root / "train.csv").write_text("name,class\na.jpg,2.0\nb.jpg,2.00\nc.jpg,7\nd.jpg,20\n")
    (root / "test.csv").write_text("name,class\nq.jpg,2.00\nr.jpg,7\ns.jpg,20\n")
    path = submission.write_classification(
        root / "c.csv", ["q.jpg", "r.jpg", "s.jpg"], ["2.00", "7.0", "20"]
    )
    assert submission.score(path, root)["top_1_accuracy"] == 1


def test_unknown_labels_give_no_score(root):
    (root / "test.csv").write_text("name\nq0.jpg\nq1.jpg\nq2.jpg\n")
    path = changed(root, "q0", "q0")
    assert np.isnan(submission.score(path, root)["map_at_5"])
    (root / "test_kaggletest.csv").write_text(
        "name,class,Usage\nq0.jpg,0,Public\nq1.jpg,1,Private\nq2.jpg,9,Public\n"
    )
    assert submission.score(path, root)["map_at_5"] > 0


def test_gallery_smaller_than_five_is_ranked_whole(root):
    (root / "train.csv").write_text("name,class\na.jpg,0\nb.jpg,1\n")
    (root / "test.csv").write_text("name,class\nq.jpg,1\n")
    path = submission.write_ranking(root / "s.csv", ["q.jpg"], [["a.jpg", "b.jpg"]])
    assert submission.score(path, root)["map_at_5"] == pytest.approx(0.5)


def rows_of(root, split, names) -> pd.DataFrame:
    """Catalog rows of these names, as if the others could not be read."""
    queries, gallery = catalog.read_rows(root)
    return {"test": queries, "train": gallery}[split].loc[names].reset_index()


RANKS = np.array([[7, 3, 2, 1, 0], [7, 3, 4, 5, 6]])


def test_query_without_a_readable_photo_is_answered_by_what_others_lists_hold_most_often(root):
    queries = rows_of(root, "test", ["q2.jpg", "q0.jpg"])  # q1 cannot be read
    gallery = rows_of(root, "train", [f"g{i}.jpg" for i in range(8)])
    path = submission.write_answers(root / "s.csv", root, queries, gallery, RANKS)
    lists = pd.read_csv(path, index_col="id")["images"].str.split(" ")
    assert list(lists.index) == ["q0.jpg", "q1.jpg", "q2.jpg"], "in the order of the data root"
    assert lists["q2.jpg"] == [f"g{i}.jpg" for i in RANKS[0]]
    assert lists["q0.jpg"] == [f"g{i}.jpg" for i in RANKS[1]]
    assert set(lists["q1.jpg"][:2]) == {"g7.jpg", "g3.jpg"} and len(set(lists["q1.jpg"])) == 5
    submission.validate(path, root)


def test_first_photo_of_the_gallery_is_as_usual_an_answer_as_any(root):
    queries = rows_of(root, "test", ["q2.jpg", "q0.jpg"])
    gallery = rows_of(root, "train", [f"g{i}.jpg" for i in range(7, -1, -1)])
    gallery.index += 100  # rows of a catalog begin anywhere
    ranks = np.array([[7, 0, 2, 1, 3], [0, 4, 5, 6, -1]])
    path = submission.write_answers(root / "s.csv", root, queries, gallery, ranks)
    assert pd.read_csv(path, index_col="id")["images"]["q1.jpg"].startswith("g7.jpg ")


def test_answers_as_classes_name_the_product_of_the_first_photo_for_every_query(root):
    queries = rows_of(root, "test", ["q2.jpg", "q0.jpg"])
    gallery = rows_of(root, "train", [f"g{i}.jpg" for i in range(8)])
    ranks = np.array([[2, 3, 4, 5, 6], [3, 2, 4, 5, 6]])
    path = submission.write_answers(
        root / "s.csv", root, queries, gallery, ranks, form="classification"
    )
    found = pd.read_csv(path, index_col="name", dtype=str)["class"]
    assert found["q2.jpg"] == "2" and found["q0.jpg"] == "0" and list(found.index)[1] == "q1.jpg"
    submission.validate(path, root)


def test_gallery_of_fewer_than_five_photos_answers_with_all_it_has(root):
    (root / "train.csv").write_text("name,class\na.jpg,0\nb.jpg,1\nc.jpg,1\n")
    queries = rows_of(root, "test", ["q0.jpg", "q1.jpg"])
    gallery = rows_of(root, "train", ["a.jpg", "b.jpg", "c.jpg"])
    ranks = np.array([[1, 0, 2, -1, -1], [2, 1, 0, -1, -1]])
    path = submission.write_answers(root / "s.csv", root, queries, gallery, ranks)
    lists = pd.read_csv(path, index_col="id")["images"]
    assert lists["q0.jpg"] == "b.jpg a.jpg c.jpg" and lists["q1.jpg"] == "c.jpg b.jpg a.jpg"
    assert sorted(lists["q2.jpg"].split(" ")) == ["a.jpg", "b.jpg", "c.jpg"]
    submission.validate(path, root)
    one_list = submission.write_answers(root / "o.csv", root, queries[:1], gallery, ranks[:1, :1])
    assert pd.read_csv(one_list, index_col="id")["images"]["q1.jpg"] == "b.jpg a.jpg c.jpg"


def test_list_that_is_too_short_is_filled_up_with_unreadable_photos_at_last(root):
    """A photo in the gallery under the query's name leaves a place open, one that cannot be read
    another."""
    (root / "train.csv").write_text("name,class\na.jpg,0\nq0.jpg,0\nb.jpg,1\nc.jpg,1\nd.jpg,1\n")
    queries = rows_of(root, "test", ["q0.jpg", "q1.jpg", "q2.jpg"])
    gallery = rows_of(root, "train", ["a.jpg", "q0.jpg", "b.jpg", "c.jpg"])
    ranks = np.array([[3, 2, 0, -1], [3, 2, 1, 0], [3, 2, 1, 0]])
    path = submission.write_answers(root / "s.csv", root, queries, gallery, ranks)
    lists = pd.read_csv(path, index_col="id")["images"]
    assert lists["q0.jpg"] == "c.jpg b.jpg a.jpg q0.jpg d.jpg"
    assert lists["q1.jpg"] == "c.jpg b.jpg q0.jpg a.jpg d.jpg"
    submission.validate(path, root)


def test_command_line_prints_the_score_or_why_not(root, capsys):
    path = changed(root, "q0", "q0")
    assert submission.main([str(path), str(root)]) == 0
    assert capsys.readouterr().out == (
        f"valid: {path}\nmAP@5 0.419 [0.083, 0.756] over 2 queries (1 excluded), 9 gallery images\n"
        f"{metrics.DEFINITION}; interval: 95 % bootstrap over 2 products\n"
    )
    classes = submission.write_classification(
        root / "c.csv", ["q0.jpg", "q1.jpg", "q2.jpg"], [0, 1, 1]
    )
    assert submission.main([str(classes), str(root)]) == 0
    assert "top-1 accuracy 0.667 [0.000, 1.000] over 3 queries (0" in capsys.readouterr().out
    (root / "test.csv").write_text("name\nq0.jpg\nq1.jpg\nq2.jpg\n")
    assert submission.main([str(path), str(root)]) == 0
    assert "mAP@5 unknown: no query has a label" in capsys.readouterr().out
    assert submission.main([str(changed(root, " g6.jpg", "")), str(root)]) == 1
    assert "4 images, expected 5" in capsys.readouterr().err


def test_query_or_image_that_comes_twice_is_refused_before_an_older_file_is_replaced(tmp_path):
    path = submission.write_ranking(tmp_path / "submission.csv", ["q"], [["a", "b"]])
    older = path.read_bytes()
    with pytest.raises(submission.SubmissionError, match="listed twice"):
        submission.write_ranking(path, ["q"], [["a", "a"]])
    with pytest.raises(submission.SubmissionError, match="'q' is answered twice"):
        submission.write_ranking(path, ["q", "q"], [["a"], ["b"]])
    with pytest.raises(submission.SubmissionError, match="'q' is answered twice"):
        submission.write_classification(path, ["q", "q"], [1, 2])
    assert path.read_bytes() == older
