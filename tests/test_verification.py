"""Spatial verification: geometry that is known, pictures without any, lists, caches."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
from roots import picture

from vipr_utils.data import audit, catalog, toy
from vipr_utils.retrieve import verification
from vipr_utils.retrieve.rerank import unit
from vipr_utils.retrieve.search import Search


def textured(seed: int, side: int = 320) -> np.ndarray:
    """Rectangles and discs of all sizes, (side, side, 3) uint8: another for each seed."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), 128, np.uint8)
    for i in range(250):
        x, y, size = (int(v) for v in (*rng.integers(0, side, 2), rng.integers(4, 30)))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if i % 2:
            cv2.rectangle(image, (x, y), (x + size, y + size * 2 // 3), colour, -1)
        else:
            cv2.circle(image, (x, y), size // 2, colour, -1)
    return image


KNOWN = np.array(
    [[0.8, -0.25, 90], [0.3, 0.75, 20], [2e-4, -3e-4, 1]]
)  # turned, shrunk, seen from the side; in pixels of 320


def view(matrix: np.ndarray, image: np.ndarray) -> np.ndarray:
    return cv2.warpPerspective(image, matrix, image.shape[1::-1])


@pytest.fixture(scope="module")
def warped():
    """(features of a picture, of its view under KNOWN with light, blur and noise)."""
    image = textured(0)
    seen = cv2.GaussianBlur(view(KNOWN, image), (0, 0), 0.8) * 0.7 + 20
    seen = (seen + np.random.default_rng(0).normal(0, 4, seen.shape)).clip(0, 255).astype(np.uint8)
    return verification.sift(image), verification.sift(seen)


def test_known_homography_is_recovered_within_a_pixel(warped):
    a, b = (320 * points for points in verification.inliers(*warped))
    found, _ = cv2.findHomography(a, b)
    corners = np.float32([(100, 60), (220, 60), (220, 240), (100, 240)])[None]
    truth, mine = (cv2.perspectiveTransform(corners, matrix)[0] for matrix in (KNOWN, found))
    assert np.abs(mine - truth).max() < 1.0


def test_matches_that_a_known_homography_explains_are_the_inliers(warped):
    pairs = verification.match(*(x["descriptor"] for x in warped))
    start, end = (x["xy"][pairs[:, i]] * 320 for i, x in enumerate(warped))
    error = np.linalg.norm(cv2.perspectiveTransform(start[None], KNOWN)[0] - end, axis=1)
    right = error < verification.TOLERANCE_PX / 2  # pixels of 640
    assert right.sum() > 60 and right.mean() > 0.6
    assert abs(len(verification.inliers(*warped)[0]) - right.sum()) <= 0.05 * right.sum()


def test_inliers_are_the_same_whatever_random_numbers_opencv_has_drawn(warped):
    cv2.setRNGSeed(1)
    first = verification.inliers(*warped)
    cv2.setRNGSeed(2)
    for one, other in zip(first, verification.inliers(*warped)):
        np.testing.assert_array_equal(one, other)


def test_unrelated_textured_pictures_have_fewer_inliers_than_count():
    photos = [verification.sift(textured(seed)) for seed in range(6)]
    counts = [len(verification.inliers(a, b)[0]) for a, b in permutations(photos, 2)]
    assert max(counts) < verification.LEAST


@pytest.mark.parametrize(
    "matrix, good",
    [
        (np.eye(3), True),
        ([[0.6, -0.7, 0.5], [0.7, 0.6, 0], [0.3, 0.2, 1]], True),
        ([[-1, 0, 1], [0, 1, 0], [0, 0, 1]], False),  # a mirror
        ([[1, 0, 0], [0, 0.01, 0], [0, 0, 1]], False),  # a line
        ([[0.1, 0, 0], [0, 0.1, 0], [0, 0, 1]], False),  # a speck
        ([[12, 0, 0], [0, 12, 0], [0, 0, 1]], False),  # a speck of the query
    ],
)
def test_homography_that_is_no_view_of_a_flat_thing_is_rejected(matrix, good):
    rng = np.random.default_rng(0)
    a = np.zeros(40, verification.KEYPOINT)
    a["descriptor"] = rng.integers(0, 256, (40, 128))
    a["xy"] = rng.random((40, 2)) * 0.9
    b = a.copy()
    b["xy"] = cv2.perspectiveTransform(a["xy"][None], np.array(matrix, float))[0]
    assert len(verification.inliers(a, b)[0]) == 40 * good


def test_match_is_lowes_ratio_test_one_to_one_as_a_slow_loop_says():
    rng = np.random.default_rng(1)
    b = rng.random((30, 128)).astype(np.float32)
    a = np.concatenate(
        [
            b[:12] + 0.1 * rng.random((12, 128)),
            b[:4] + 0.2 * rng.random((4, 128)),
            rng.random((9, 128)),
        ]
    )
    a, b = (x.astype(np.float32) for x in (a, b))
    found = verification.match(a, b)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    best = {}
    for i in range(len(a)):
        distance = [np.linalg.norm(a[i] - row) for row in b]
        j = int(np.argmin(distance))
        if distance[j] < 0.85 * np.partition(distance, 1)[1] and (
            j not in best or distance[j] < best[j][0]
        ):
            best[j] = distance[j], i
    assert len(best) >= 12
    want = [[i, j] for j, (_, i) in sorted(best.items(), key=lambda item: item[1])]
    np.testing.assert_array_equal(found, want)


# ------------------------------------------------------------------------------------------- lists


@pytest.fixture
def photos(make_root):
    """a, b, c: pictures without anything in common; d: a turned."""
    root = make_root("name,class,group\na.jpg,1,0\nb.jpg,2,0\nc.jpg,3,0\nd.jpg,4,0\n", test=None)
    pictures = [textured(i, 128) for i in range(3)]
    pictures.append(cv2.rotate(pictures[0], cv2.ROTATE_90_CLOCKWISE))
    for name, image in zip("abcd", pictures):
        cv2.imwrite(str(root / "train" / f"{name}.png"), image)
        (root / "train" / f"{name}.png").replace(root / "train" / f"{name}.jpg")
    return catalog.read(root)[0]


def listed(queries, gallery, ranks, cache_dir=None) -> Search:
    """A Search that has found these ranks, with falling scores; embeddings that say nothing."""
    ranks = np.array(ranks)
    scores = np.tile(np.linspace(0.9, 0.4, ranks.shape[1], dtype=np.float32), (len(ranks), 1))
    scores[ranks < 0] = -np.inf
    rng = np.random.default_rng(0)
    embeddings = (unit(rng.normal(size=(len(rows), 8))) for rows in (queries, gallery))
    return Search(*embeddings, queries, gallery, scores, ranks, cache_dir=cache_dir)


def test_verified_photo_rises_and_the_rest_of_the_list_stays(photos):
    before = listed(photos[3:], photos, [[1, 2, 0, -1]])
    found = verification.verify(before, top=3)
    assert found.ranks.tolist() == [[0, 1, 2, -1]] and found.scores.dtype == np.float32
    assert found.inliers[0, 0] > 30 and found.inliers[0, 3] == -1
    np.testing.assert_array_equal(found.scores[0, 1:3], before.scores[0, :2])
    assert found.scores[0, 0] == pytest.approx(found.inliers[0, 0] + before.scores[0, 2])


def test_most_inliers_come_first_and_too_few_count_for_nothing(photos, monkeypatch):
    counts = np.array([14, 15, 40, 15])
    monkeypatch.setattr(verification, "_inlier_counts", lambda *a: counts)
    found = verification.verify(listed(photos[:1], photos, [[0, 1, 2, 3]]), top=4)
    assert found.ranks.tolist() == [[2, 1, 3, 0]]
    assert found.inliers.tolist() == [[40, 15, 15, 14]]


def test_order_that_another_step_gave_stays_behind_what_was_verified(photos, monkeypatch):
    monkeypatch.setattr(verification, "_inlier_counts", lambda *a: np.array([3, 20, 0, 20]))
    voted = listed(photos[:1], photos, [[0, 1, 2, 3]])
    voted = replace(voted, scores=np.array([[0.5, 0.4, 0.9, 0.6]], np.float32))
    found = verification.verify(voted, top=4)
    assert found.ranks.tolist() == [[1, 3, 0, 2]] and found.inliers.tolist() == [[20, 20, 3, 0]]
    np.testing.assert_allclose(found.scores, [[20.4, 20.6, 0.5, 0.9]], atol=1e-5)


def test_time_is_what_photos_cost_once_and_what_every_pair_costs(photos, monkeypatch):
    clock = [0.0]

    def features(rows):
        clock[0] += 2.0 * len(rows)
        return [None] * len(rows)

    def inliers(a, b):
        clock[0] += 0.5

    monkeypatch.setattr(verification, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(verification, "features", features)
    monkeypatch.setattr(verification, "inliers", inliers)
    monkeypatch.setattr(verification, "cores", lambda: 1)
    many = photos.iloc[np.arange(400) % len(photos)]
    for n_queries, n_gallery, top, n_photos, n_pairs in (
        (100, 50, 20, 150, 2000),
        (100, 400, 3, 400, 300),  # 300 pairs show 300 photos at most
        (10, 4, 20, 14, 40),
    ):
        found = verification.seconds(many[:n_queries], many[:n_gallery], top)
        assert found == pytest.approx(2.0 * n_photos + 0.5 * n_pairs)


def test_only_the_first_of_a_list_are_looked_at(photos, monkeypatch):
    read, sift = [], verification.sift
    monkeypatch.setattr(verification, "sift", lambda image: read.append(1) or sift(image))
    before = listed(photos[:1], photos, [[3, 1, 2, 0]])
    assert (verification.verify(before, top=2).inliers >= 0).sum() == 2
    assert len(read) == 3, "one query and two of the gallery"
    assert (verification.verify(before, top=0).inliers >= 0).all()


def test_flat_pictures_leave_the_list_untouched(make_root):
    root = make_root(test=None)
    for name in "abc":
        cv2.imwrite(str(root / "train" / f"{name}.jpg"), np.full((64, 64, 3), 200, np.uint8))
    flat = catalog.read(root)[0]
    before = listed(flat, flat, [[1, 2], [0, 2], [1, 0]])
    found = verification.verify(before, top=2)
    np.testing.assert_array_equal(found.ranks, before.ranks)
    np.testing.assert_array_equal(found.scores, before.scores)
    assert not found.inliers.any()


def test_expansion_takes_the_first_verified_photos_only(photos):
    before = listed(photos[:2], photos, [[3, 2, 0, 1], [0, 1, 2, -1]])
    sure = replace(before, inliers=np.array([[50, 36, 34, 40], [14, 14, 0, -1]]))
    found = verification.verified_expansion(sure, k=3)
    mean = sure.queries[0] + sure.gallery[[3, 2, 1]].sum(0)  # 34 is less than 0.7 times 50
    np.testing.assert_allclose(found.queries[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(found.queries[1], sure.queries[1], atol=1e-6)
    one = verification.verified_expansion(sure, k=1).queries[0]
    np.testing.assert_allclose(one, unit(sure.queries + sure.gallery[[3]])[0], atol=1e-6)


# ------------------------------------------------------------------------------- files and caches


def same(one: list, other: list) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_was_computed_is_not_computed_again(photos, tmp_path, monkeypatch):
    fresh, read, sift = verification.features(photos), [], verification.sift
    monkeypatch.setattr(verification, "sift", lambda image: read.append(1) or sift(image))
    for rows, new in ((photos[:1], 1), (photos[::-1], 3), (photos, 0)):
        read.clear()
        found = verification.features(rows, cache_dir=tmp_path)
        assert len(read) == new and same(found, [fresh[row] for row in rows.index])
    assert min(map(len, fresh)) > 50


def test_a_pair_that_was_counted_is_not_counted_again(photos, tmp_path, monkeypatch):
    counted, inliers = [], verification.inliers
    monkeypatch.setattr(verification, "inliers", lambda *a: counted.append(1) or inliers(*a))
    for ranks, new in (([[0, 1], [1, 2], [2, 0]], 6), ([[1, 0], [1, 0], [2, -1]], 1)):
        counted.clear()
        found = verification.verify(listed(photos[:3], photos, ranks, tmp_path), top=2)
        assert len(counted) == new
        want = verification.verify(listed(photos[:3], photos, ranks), top=2)
        np.testing.assert_array_equal(found.inliers, want.inliers)


def test_cached_features_answer_only_the_same_question(photos, tmp_path, monkeypatch):
    verification.features(photos, cache_dir=tmp_path)
    other = photos.copy()
    other.attrs = photos.attrs | {"fingerprint": "other"}
    verification.features(other, cache_dir=tmp_path)
    monkeypatch.setattr(verification, "PX", 64)
    verification.features(photos, cache_dir=tmp_path)
    assert len(list((tmp_path / "local").iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_damaged_cache_is_built_anew(photos, tmp_path, damage, monkeypatch):
    fresh = verification.features(photos, cache_dir=tmp_path)
    (file,) = (tmp_path / "local").glob("*/*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    assert same(verification.features(photos, cache_dir=tmp_path), fresh)
    monkeypatch.setattr(verification, "sift", lambda *a: pytest.fail("computed again"))
    assert same(verification.features(photos, cache_dir=tmp_path), fresh)


def test_unreadable_photo_has_no_features_and_its_neighbours_keep_theirs(photos):
    fresh = verification.features(photos)
    (Path(photos.attrs["root"]) / photos["path"].iloc[1]).write_bytes(b"no photo")
    broken = verification.features(photos)
    assert len(broken[1]) == 0 and same(broken[2:], fresh[2:])


@pytest.mark.parametrize("kept", [True, False])
def test_features_of_few_photos_are_in_memory_at_once_and_counts_are_the_same(
    photos, tmp_path, monkeypatch, kept
):
    pairs = np.array([[q, g] for g in range(4) for q in (3, 0, 1)])
    want = verification._inlier_counts(photos, photos, pairs, None)
    together, features = [], verification.features

    def counted(rows, **settings):
        together.append(len(rows))
        return features(rows, **settings)

    monkeypatch.setattr(verification, "features", counted)
    for most, largest in ((2, 1), (4, 2), (100, 4)):
        together.clear()
        monkeypatch.setattr(verification, "MOST_BYTES", most * verification.PHOTO_BYTES)
        folder = tmp_path / str(most) if kept else None
        found = verification._inlier_counts(photos, photos, pairs, folder)
        np.testing.assert_array_equal(found, want)
        assert max(together) == largest
    assert want.max() > verification.LEAST


def test_disk_that_local_features_take_is_that_of_photos_that_are_not_there_yet(photos, tmp_path):
    assert verification.disk_gb(photos, tmp_path) == 4 * 136 * 1000 / 1e9
    verification.features(photos[:1], cache_dir=tmp_path)
    assert verification.disk_gb(photos, tmp_path) == pytest.approx(3 * 136e-6, rel=0.01)


def test_keypoints_are_bounded_and_lie_in_the_picture(monkeypatch):
    monkeypatch.setattr(verification, "KEYPOINTS", 100)
    found = verification.sift(textured(0))
    assert found.shape == (100,) and found["xy"].min() >= 0 and found["xy"].max() <= 1
    assert verification.sift(picture(0, 3, 900)).ndim == 1  # a strip


def test_customer_photos_of_toy_boxes_find_their_shop_photo():
    firsts = range(0, 100, toy.VARIANTS)  # of each line
    boxes = [p for p in firsts if toy.design(p, 0).shape == "box"][:4]
    gallery = [verification.sift(toy.shop_photo(p, 0, 0, 320)) for p in boxes]
    queries = [verification.sift(toy.customer_photo(p, 1, 0, 320)) for p in boxes]
    counts = np.array([[len(verification.inliers(q, g)[0]) for g in gallery] for q in queries])
    assert (counts.argmax(1) == np.arange(4)).mean() >= 0.75


def test_empty_table_has_no_features(photos):
    assert verification.features(photos[:0]) == []


def test_pairs_of_one_product_that_geometry_brings_together_clean_it(make_root, tmp_path):
    names = [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 2)]
    root = make_root("name,class,group\n" + "".join(f"{n}.jpg,{c},0\n" for n, c in names), None)
    views = [view(KNOWN @ np.diag([1, s, 1]), textured(0)) for s in (1.0, 0.95)]
    for (name, _), image in zip(
        names, [textured(0), *views, textured(1), textured(0)]
    ):  # d is no view of the product, e is of another
        cv2.imwrite(str(root / "train" / f"{name}.jpg"), image)
    rows = catalog.read(root)[0]
    rows.index += 10
    pairs = verification.verified_pairs(rows, cache_dir=tmp_path / "cache")
    assert sorted(map(tuple, pairs)) == [(10, 11), (10, 12), (11, 12)]
    assert list(audit.clean(rows, audit.linked(rows, pairs))[1].name) == ["d.jpg"]
    assert len(verification.verified_pairs(rows[3:])) == 0  # one photo each
