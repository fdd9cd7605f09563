"""What is printed on photos: reading it, how alike it is, and lists ordered by it."""

import cv2
import numpy as np
import packages
import pandas as pd
import pytest

from vipr_utils.data import catalog
from vipr_utils.host.device import cores
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.task import Task
from vipr_utils.learn import models
from vipr_utils.retrieve import pipeline, reading, text
from vipr_utils.retrieve.reading import Line
from vipr_utils.retrieve.search import Search

MIDDLE = (0.4, 0.4, 0.6, 0.6)
reader = pytest.mark.skipif(not reading.available(), reason="the extra `text` is not installed")


def printed(*words: str, sure: float = 1.0, box=MIDDLE) -> list[Line]:
    return [Line(word, sure, box) for word in words]


def alike(query: list[Line], *gallery: list[Line]) -> np.ndarray:
    """(G,) cosines of a query and photos, of which five others are of something else."""
    others = [printed(word) for word in ("shampoo", "noodles", "bread", "rice", "soap")]
    asked, known = text.vectors([query], [*gallery, *others])
    return (asked @ known.T).toarray()[0, : len(gallery)]


# -------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize(
    "query, near, far",
    [
        ("HAZELNUT", "HAZELNVT", "VANILLA"),  # a misread letter
        ("crème brûlée", "CREME BRULEE", "creamy bread"),
        ("蒙牛全脂纯牛奶", "纯牛奶 蒙牛", "海天酱油"),
        ("oat milk organic", "organic oat milk", "orange juice"),
    ],
)
def test_the_same_words_are_alike_whatever_their_letters_case_order_and_script(query, near, far):
    same, other = alike(printed(query), printed(near), printed(far))
    assert same > 2 * other and same > 0.1


def test_a_word_of_few_photos_weighs_more_than_one_of_many():
    photos = [printed("borabo", word) for word in ("vanilla", "coffee", "lemon", "cherry")]
    found = alike(printed("borabo", "lemon"), *photos)
    assert found.argmax() == 2 and found[2] > 1.5 * np.delete(found, 2).max()


@pytest.mark.parametrize("tag", ["12,90", "500 g", "3:-", "19.90 kr", "45 kr/kg", "20%"])
def test_a_price_or_a_weight_counts_a_tenth(tag):
    assert text.evidence(printed(tag)[0]) == pytest.approx(0.1)
    assert text.evidence(printed(f"{tag} milk")[0]) == 1


def test_a_line_counts_less_at_the_border_and_when_it_is_unsure():
    corner = text.evidence(Line("milk", 1.0, (0.0, 0.4, 0.2, 0.6)))
    unsure = text.evidence(Line("milk", 0.5, MIDDLE))
    assert corner == pytest.approx(0.04) and unsure == pytest.approx(0.25)


@pytest.mark.parametrize(
    "query", [printed("12,90"), printed("ml", sure=0.5), printed("oats", box=(0, 0.9, 0.2, 1))]
)
def test_a_query_with_a_price_or_letters_that_are_unsure_or_aside_alone_says_nothing(query):
    assert alike(query, query) == [0]
    assert alike(printed("oats"), printed("oats"))[0] > 0


def test_a_photo_with_few_letters_is_no_sure_match():
    little, much = alike(printed("milk whole"), printed("milk"), printed("milk whole"))
    assert 0 < little < much < 1


# ------------------------------------------------------------------------------------------- lists


@pytest.fixture
def search(monkeypatch):
    """search(queries, gallery): a Search over 40 random photos, on which these lines are read."""

    def make(queries: dict, gallery: dict, k: int = 10, n: int = 40) -> Search:
        rng = np.random.default_rng(0)
        sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, n, 8))]
        rows = [pd.DataFrame({"image_id": np.arange(n) + first}) for first in (0, 1000)]

        def lines(photos, cache_dir=None):
            words = queries if photos["image_id"].max() < 1000 else gallery
            return [words.get(row, []) for row in photos.index]

        monkeypatch.setattr(text, "lines", lines)
        return Search(*(side.astype(np.float32) for side in sides), *rows).searched(k)

    return make


def test_a_query_on_which_nothing_is_read_keeps_its_list_as_it_is(search):
    gallery = {row: printed("hazelnut") for row in range(0, 40, 2)}
    plain = search({3: printed("hazelnut")}, gallery)
    found = text.read(plain, 0.5)
    others = np.delete(np.arange(40), 3)
    assert (found.ranks[others, :10] == plain.ranks[others]).all()
    assert (found.scores[others, :10] == plain.scores[others]).all()
    assert (found.ranks[3, :10] != plain.ranks[3]).any()


@pytest.mark.parametrize("step", ["read(0.5)", "read(weight=0.5, top=10)"])
@pytest.mark.parametrize("queries, gallery", [({}, {}), ({}, {3: "milk"}), ({3: "milk"}, {})])
def test_nothing_read_on_a_side_changes_nothing(search, step, queries, gallery):
    read = [{row: printed(word) for row, word in side.items()} for side in (queries, gallery)]
    plain = search(*read)
    found = pipeline.bind(step)(plain)
    assert (found.ranks[:, :10] == plain.ranks).all() and (
        found.scores[:, :10] == plain.scores
    ).all()


def test_score_is_the_cosine_and_the_weighed_text(search):
    words = {row: printed(["milk", "bread"][row % 2]) for row in range(40)}
    plain = search(words, words)
    found = text.read(plain, 0.5)
    asked, known = text.vectors(*([[words[row] for row in range(40)]] * 2))
    whole = plain.queries @ plain.gallery.T + 0.5 * (asked @ known.T).toarray()
    for q in range(40):
        listed = found.ranks[q, :5]
        assert found.scores[q, :5] == pytest.approx(whole[q, listed], abs=1e-5)


def test_what_text_alone_finds_joins_the_list_and_the_head_alone_lets_nothing_join(search):
    plain = search({0: printed("hazelnut")}, {})
    absent = int(np.setdiff1d(np.arange(40), plain.ranks[0])[0])
    plain = search({0: printed("hazelnut")}, {absent: printed("hazelnut")})
    assert text.read(plain, 5.0).ranks[0, 0] == absent
    assert absent not in text.read(plain, 5.0, top=10).ranks[0]


def test_a_photo_never_joins_its_own_list(search):
    plain = search({0: printed("hazelnut")}, {5: printed("hazelnut")}, k=3)
    rows = plain.gallery_rows.assign(image_id=plain.gallery_rows["image_id"].replace(1005, 0))
    plain.gallery_rows["image_id"] = rows["image_id"]
    assert 5 not in text.read(plain.searched(3), 5.0).ranks[0]


def test_words_of_both_photos_are_shown_as_the_answer_has_them():
    query = [*printed("Hazelnvt oat"), *printed("12,90"), *printed("a")]
    photo = [*printed("OAT drink"), *printed("HAZELNUT"), *printed("12,90"), *printed("OAT a")]
    assert text.shared(query, photo) == ["OAT", "HAZELNUT"]
    assert text.shared(query, []) == text.shared([], photo) == []
    assert text.shared(printed("全脂牛奶"), printed("酱油", "全脂牛奶")) == ["全脂牛奶"]


def test_words_of_a_list_are_empty_where_it_ends_early(monkeypatch):
    said = {0: "oat milk", 3: "milk", 4: "soap"}
    monkeypatch.setattr(
        text, "lines", lambda rows, cache_dir: [printed(said[row]) for row in rows.index]
    )
    rows = pd.DataFrame(index=range(5))
    found = text.words(rows[:1], rows, np.array([[3, 4, -1]]), cache_dir=None)
    assert found.tolist() == [["milk", "", ""]]


@reader
def test_no_photos_have_no_lines(toy_data):
    assert reading.lines(toy_data[0][:0]) == []


def test_without_the_extra_reading_is_refused_with_what_to_install(monkeypatch, toy_data):
    monkeypatch.setattr(reading, "available", lambda: False)
    with pytest.raises(ValueError, match=r"vipr-utils\[text\]"):
        reading.lines(toy_data[0])


# ----------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Ten drawn packages of two lines, three queries each."""
    root = tmp_path_factory.mktemp("packages")
    return packages.generate(root, products=10, photos=3)


@reader
def test_words_of_drawn_packages_are_read_once_a_photo(shelf, tmp_path, monkeypatch):
    photos, _ = catalog.read(shelf)
    shop = photos[photos["split"] == "train"][:8]
    found = reading.lines(shop, cache_dir=tmp_path)
    words = [{line.text.upper() for line in photo} & set(packages.FLAVOURS) for photo in found]
    assert sum(map(len, words)) >= 7
    for photo in found:
        for line in photo:
            left, top, right, bottom = line.box
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and 0 < line.confidence <= 1
    monkeypatch.setattr(reading, "_timed", lambda path: 1.0)
    assert reading.seconds(photos) == len(photos) / cores()
    assert reading.seconds(photos, cache_dir=tmp_path) == (len(photos) - 8) / cores()
    monkeypatch.setattr(reading, "_read", None)  # nothing is read again
    assert reading.lines(shop, cache_dir=tmp_path) == found
    assert reading.seconds(shop, cache_dir=tmp_path) == 0


@reader
@pytest.mark.long
def test_hostile_pictures_are_read_in_bounded_time(tmp_path):
    page = np.full((1600, 1600, 3), 255, np.uint8)
    for y in range(20, 1600, 22):
        cv2.putText(page, "all of it is text " * 5, (5, y), 0, 0.6, (0, 0, 0), 1)
    package = packages.shop(packages.front(1, "HAZELNUT"))
    pictures = {
        "huge": np.full((6000, 9000, 3), 90, np.uint8),
        "line": np.full((1, 4000, 3), 90, np.uint8),
        "tiny": np.zeros((1, 1, 3), np.uint8),
        "blank": np.full((300, 300, 3), 255, np.uint8),
        "upside down": package[::-1, ::-1],
        "full": page,
    }
    root = tmp_path / "root"
    (root / "train").mkdir(parents=True)
    for name, picture in pictures.items():
        cv2.imwrite(str(root / "train" / f"{name}.png"), picture)
    (root / "train" / "broken.png").write_bytes(b"no picture")
    names = [*pictures, "broken"]
    photos = pd.DataFrame({"path": [f"train/{name}.png" for name in names]})
    photos.attrs = {"root": str(root), "fingerprint": "hostile"}
    found = dict(zip(names, reading.lines(photos)))
    assert not any(found[name] for name in ("huge", "line", "tiny", "blank", "broken"))
    assert len(found["full"]) <= reading.MOST_LINES
    assert any("HAZELNUT" in line.text.upper() for line in found["upside down"])


# ------------------------------------------------------------------------------------------ choice


@reader
@pytest.mark.long
def test_variants_that_differ_by_a_word_are_told_apart_and_the_choice_finds_out(shelf, tmp_path):
    task = Task(str(shelf), image_size=96, device="cpu", cache_dir=str(tmp_path))
    network = models.create("tf_efficientnet_lite0")
    choice = Choice(task, {"lite0": network}, {"lite0": 96})
    best = choice.climb([1.0], ["product_votes(3)"], [], ["read(0.4)", "read(1.6)"])
    assert "reading" in choice.rungs and pipeline.reads(best.steps)
    assert not pipeline.reads(choice.indexable().steps)
    before = choice.found(Candidate((Part("lite0"),)), "test").metrics["precision_at_1"]
    assert choice.found(best, "test").metrics["precision_at_1"] >= max(0.9, before + 0.3)


def test_reading_is_left_where_a_sample_gains_nothing_or_the_time_is_too_short(
    toy_root, tmp_path, monkeypatch
):
    task = Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path))
    choice = Choice(task, {"tiny": models.create("test_resnet", weights="none")}, {"tiny": 32})
    base = Candidate((Part("tiny"),))
    asked = []
    monkeypatch.setattr(reading, "available", lambda: True)
    monkeypatch.setattr(reading, "seconds", lambda photos, cache_dir: 60.0)
    monkeypatch.setattr(
        text, "lines", lambda rows, cache_dir=None: asked.append(len(rows)) or [[]] * len(rows)
    )
    assert choice._worth_reading(base, ["read(0.4)"]) == []
    assert "it gained 0.000" in choice.refused["reading"]
    assert max(asked) <= 10 * 60, "the whole gallery was read"
    choice.max_minutes = 1e-6
    assert choice._worth_reading(base, ["read(0.4)"]) == []
    assert "max_minutes" in choice.refused["reading"]
    monkeypatch.setattr(reading, "available", lambda: False)
    assert choice._worth_reading(base, ["read(0.4)"]) == []
    assert "rapidocr" in choice.refused["reading"]
    assert choice._worth_reading(base, []) == []


@pytest.mark.parametrize("printed_on", [24, 1])
def test_reading_is_kept_where_many_products_gain_and_not_where_one_does(
    printed_on, toy_root, tmp_path, monkeypatch
):
    """Every photo of the first products says its product's name, the others say nothing."""
    task = Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path))
    choice = Choice(task, {"tiny": models.create("test_resnet", weights="none")}, {"tiny": 32})
    monkeypatch.setattr("vipr_utils.judge.choice.READ_FIRST", len(choice.asked) // 2)
    names = [chr(97 + number) * 5 for number in range(24)]
    products = sorted(set(task.photos.product_id[task.photos.product_id >= 0]))
    said = dict(zip(products[:printed_on], names))

    def lines(rows, cache_dir=None):
        found = [said.get(product) for product in task.photos.product_id[rows.index]]
        return [[Line(word, 1.0, (0.4, 0.4, 0.6, 0.6))] if word else [] for word in found]

    monkeypatch.setattr(reading, "available", lambda: True)
    monkeypatch.setattr(reading, "seconds", lambda photos, cache_dir: 1.0)
    monkeypatch.setattr(text, "lines", lines)
    best = choice.climb([1.0], ["product_votes(3)"], [], ["read(0.8)", "read(3.2)"])
    if printed_on == 1:
        assert not pipeline.reads(best.steps) and "reading" not in choice.rungs
        assert "which may be chance" in choice.refused["reading"]
    else:
        assert pipeline.reads(best.steps) and list(choice.rungs)[-1] == "reading"
        assert "reading" not in choice.refused
