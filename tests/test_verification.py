"""Spatial verification: geometry that is known, pictures without any, caches, and lists that stay what they were."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import picture

from vipr_utils.data import audit, catalog, toy
from vipr_utils.retrieve import search, verification


def textured(seed: int, side: int = 320) -> np.ndarray:
    """Rectangles and discs of all sizes and colours, (side, side, 3) uint8: something else for every seed."""
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


def found(image: np.ndarray):
    return features_of([image])[0]


def features_of(pictures: list) -> verification.Features:
    points, descriptors = zip(*[verification.sift(p, px=320) for p in pictures])
    return verification.Features(
        np.cumsum([0, *map(len, points)]), np.concatenate(points), np.concatenate(descriptors)
    )


KNOWN = np.array(
    [[0.8, -0.25, 90], [0.3, 0.75, 20], [2e-4, -3e-4, 1]]
)  # turned, shrunk, seen from the side; in pixels


@pytest.fixture(scope="module")
def warped():
    """(features of a picture, of its view under KNOWN with light, blur and noise, inliers between them)."""
    image = textured(0)
    view = cv2.GaussianBlur(cv2.warpPerspective(image, KNOWN, (320, 320)), (0, 0), 0.8) * 0.7 + 20
    view = (view + np.random.default_rng(0).normal(0, 4, view.shape)).clip(0, 255).astype(np.uint8)
    a, b = found(image), found(view)
    return a, b, verification.inliers(a, b)


def test_known_homography_is_recovered_within_a_pixel(warped):
    a, b, (p, q, matrix) = warped
    corners = np.float32([(100, 60), (220, 60), (220, 240), (100, 240)])[None]
    truth = cv2.perspectiveTransform(corners, KNOWN)[0]
    mine = cv2.perspectiveTransform(corners / 320, matrix)[0] * 320
    assert np.abs(mine - truth).max() < 1.0


def test_matches_that_a_known_homography_explains_are_the_inliers(warped):
    a, b, (p, q, _) = warped
    pairs = verification.match(a[1], b[1])
    start, end = (x[0][pairs[:, i], :2] * 320 for i, x in enumerate((a, b)))
    right = np.linalg.norm(cv2.perspectiveTransform(start[None], KNOWN)[0] - end, axis=1) < 3.2
    assert right.sum() > 60 and right.mean() > 0.6
    assert abs(len(p) - right.sum()) <= 0.05 * right.sum()


def test_unrelated_textured_pictures_have_next_to_no_inliers():
    photos = features_of([textured(seed) for seed in range(6)])
    ranks = np.array([[j for j in range(6) if j != i] for i in range(6)])
    counts = verification.inlier_counts(photos, photos, ranks)
    assert counts.max() <= 8 and np.median(counts) == 0


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
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.astype(np.float32), b))
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
    np.testing.assert_array_equal(verification.match(a, b), want)


@pytest.mark.parametrize(
    "matrix, good",
    [
        (np.eye(3), True),
        ([[0.6, -0.7, 0.5], [0.7, 0.6, 0], [0.3, 0.2, 1]], True),
        ([[-1, 0, 1], [0, 1, 0], [0, 0, 1]], False),  # a mirror
        ([[1, 0, 0], [0, 0.15, 0], [0, 0, 1]], False),  # a line
        ([[0.1, 0, 0], [0, 0.1, 0], [0, 0, 1]], False),  # a speck
        ([[1, 0, 0], [0, 1, 0], [0, -1.5, 1]], False),  # folded over the horizon
    ],
)
def test_homography_that_is_no_view_of_a_flat_thing_is_rejected(matrix, good):
    points = np.random.default_rng(0).random((40, 2)) * 0.9
    assert verification._is_a_view(np.array(matrix, float), points) is good


def test_points_that_no_map_explains_have_no_inliers():
    rng = np.random.default_rng(0)
    a, b = (
        np.c_[rng.random((40, 2)), np.full(40, 0.02), rng.random(40) * 6].astype(np.float32)
        for _ in range(2)
    )
    inside, matrix = verification.homography(a, b)
    assert inside.sum() <= 6 and (matrix is not None) == inside.any()
    assert verification.homography(a, a)[0].all()


def test_match_whose_keypoints_turn_or_grow_otherwise_is_no_inlier():
    rng = np.random.default_rng(0)
    a = np.c_[0.1 + 0.8 * rng.random((40, 2)), np.full(40, 0.02), rng.random(40) * 6].astype(
        np.float32
    )
    b = np.c_[0.2 + 0.5 * np.c_[-a[:, 1], a[:, 0]], 0.5 * a[:, 2], a[:, 3] + np.pi / 2].astype(
        np.float32
    )  # a quarter turn
    assert verification.homography(a, b)[0].all()
    b[:6, 3] += np.deg2rad([25, -25, 35, -35, 180, 400])
    b[6:10, 2] *= [1.9, 1 / 1.9, 2.1, 1 / 2.1]
    assert np.flatnonzero(~verification.homography(a, b)[0]).tolist() == [2, 3, 4, 5, 8, 9]


def test_many_matches_on_one_spot_are_one_place():
    spot, row = np.full((50, 2), 0.51), np.c_[np.linspace(0.01, 0.99, 50), np.full(50, 0.51)]
    assert verification.places(spot, row) == verification.places(row, spot) == 1
    assert verification.places(row, row) == 50
    assert verification.places(row[:0], row[:0]) == 0


# ------------------------------------------------------------------------------------------------------ ranking


def lists(n_queries: int, n_gallery: int, k: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_queries + n_gallery, 8)).astype(np.float32)
    return search.top_k(x[:n_queries], x[n_queries:], k)


def test_right_photo_rises_to_the_top_of_a_list_that_had_it_last():
    pictures = [textured(seed) for seed in range(6)]
    gallery, queries = (
        features_of(pictures),
        features_of([cv2.rotate(pictures[i], cv2.ROTATE_90_CLOCKWISE) for i in (3, 5)]),
    )
    ranks = np.array([[0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 4, 5]])
    scores = np.tile(np.linspace(0.9, 0.4, 6, dtype=np.float32), (2, 1))
    seen = verification.spatial_verification(scores, ranks, queries, gallery)
    assert seen.ranks.tolist() == [[3, 0, 1, 2, 4, 5], [5, 0, 1, 2, 3, 4]]
    assert (seen.probability[:, 0] > 0.99).all() and (seen.probability[:, 1:] < 0.5).all()
    assert (seen.counts[:, 0] > 50).all() and seen.scores.dtype == np.float32
    assert (np.diff(seen.scores) <= 0).all()


def test_flat_pictures_have_no_inliers_and_leave_the_list_untouched():
    flat = features_of([np.full((64, 64, 3), 200, np.uint8)] * 4)
    assert flat.offsets.tolist() == [0] * 5
    scores, ranks = lists(4, 4, 5)
    seen = verification.spatial_verification(scores, ranks, flat, flat)
    np.testing.assert_array_equal(seen.ranks, ranks)
    np.testing.assert_array_equal(seen.scores, scores)
    assert (ranks[:, 4] == -1).all() and np.isneginf(seen.scores[:, 4]).all()
    assert seen.counts.tolist() == [[0, 0, 0, 0, -1]] * 4


def test_counts_that_are_alike_for_all_photos_move_nothing_by_more_than_a_fraction_of_the_lists_spread():
    counts = np.random.default_rng(0).integers(5, 10, (50, 80))
    probability, nats = verification.evidence(counts)
    assert probability.max() < 0.5 and verification.TRUST * np.ptp(nats, axis=1).max() < 0.5
    assert verification.evidence(np.where(np.arange(80) == 7, 120, counts))[0][:, 7].min() > 0.99


def test_evidence_is_the_papers_number_of_false_alarms():
    counts = np.array([[0, 0, 3, 8, 10, -1], [-1] * 6])
    probability, nats = verification.evidence(counts)
    noise = 3 / np.log(2)
    for i, n in enumerate([0, 0, 3, 8, 10]):
        alarms = 5 * np.exp(-n / noise)
        assert probability[0, i] == pytest.approx((n / 10) ** 3 / (1 + alarms))
        assert nats[0, i] == pytest.approx(np.log(1 + 1 / alarms) - np.log(1 + 1 / 5))
    assert nats[0, 0] == 0 and not nats[1].any()


def test_variant_with_half_the_inliers_is_evidence_but_not_verified():
    probability, nats = verification.evidence(np.array([[80, 40, *[0] * 30]]))
    assert probability[0, 0] > 0.99 and probability[0, 1] < 0.2
    assert nats[0, 0] > nats[0, 1] > 10 and nats[0, 2] == 0


def test_only_the_first_of_a_list_are_looked_at_and_the_budget_bounds_them(monkeypatch):
    photos = features_of([textured(seed, 160) for seed in range(5)])
    scores, ranks = lists(5, 5, 5)
    assert (
        (verification.spatial_verification(scores, ranks, photos, photos, depth=2).counts >= 0).sum(
            1
        )
        == 2
    ).all()
    monkeypatch.setattr(verification, "MOST_PAIRS", 15)
    assert (
        (verification.spatial_verification(scores, ranks, photos, photos).counts >= 0).sum(1) == 3
    ).all()


def test_form_is_that_of_the_search_and_runs_repeat(toy_data):
    photos, _ = toy_data
    _, queries, gallery = catalog.split(photos, "test", gallery_domain="shop")
    queries = queries.iloc[:6]
    q, g = (verification.features(t, px=200) for t in (queries, gallery))
    scores, ranks = lists(6, len(gallery), 5)
    one, two = (verification.spatial_verification(scores, ranks, q, g) for _ in range(2))
    assert (one.scores.shape, one.scores.dtype, one.ranks.dtype) == (
        scores.shape,
        scores.dtype,
        ranks.dtype,
    )
    np.testing.assert_array_equal(np.sort(one.ranks), np.sort(ranks))
    for field in ("scores", "ranks", "counts", "probability"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))


@pytest.mark.parametrize("depth, read", [(1, 3 + 2), (4, 3 + 6)])
def test_tables_give_what_their_features_give_and_only_photos_in_the_lists_are_read(
    photos, depth, read, monkeypatch
):
    gallery = photos.iloc[[0, 1, 2, 0, 1, 2]].copy()
    ranks = np.array([[1, 0, 2, 5], [2, 0, 1, -1], [1, 2, 4, 3]])
    scores = np.where(ranks < 0, -np.inf, np.linspace(0.9, 0.6, 4)).astype(np.float32)
    q, g = (verification.features(t, px=96) for t in (photos, gallery))
    want = verification.spatial_verification(scores, ranks, q, g, depth=depth)
    calls, sift = [], verification.sift
    monkeypatch.setattr(verification, "sift", lambda *a, **k: calls.append(1) or sift(*a, **k))
    seen = verification.verify(scores, ranks, photos, gallery, depth=depth, px=96)
    for field in ("scores", "ranks", "counts", "probability"):
        np.testing.assert_array_equal(getattr(seen, field), getattr(want, field))
    assert len(calls) == read and (want.ranks[1, 3], want.counts[1, 3]) == (-1, -1)


def test_a_pair_that_was_counted_is_not_counted_again(photos, tmp_path, monkeypatch):
    scores, how = np.float32([[0.9, 0.8]] * 3), {"px": 96, "cache_dir": tmp_path}
    counted, inliers = [], verification.inliers
    monkeypatch.setattr(verification, "inliers", lambda *a: counted.append(1) or inliers(*a))
    for ranks, new in (([[0, 1], [1, 2], [2, 0]], 6), ([[1, 0], [1, 0], [2, -1]], 1)):
        ranks, counted[:] = np.array(ranks), []
        kept = verification.verify(scores, ranks, photos, photos, **how)
        assert len(counted) == new
        np.testing.assert_array_equal(
            kept.counts, verification.verify(scores, ranks, photos, photos, px=96).counts
        )
    (file,) = tmp_path.glob("features/counts-*.npz")
    file.write_bytes(file.read_bytes()[:40])
    assert (verification.verify(scores, ranks, photos, photos, **how).counts == kept.counts).all()


def test_lists_of_another_gallery_are_refused():
    few = features_of([textured(0, 64)] * 2)
    scores, ranks = lists(2, 9, 5)
    with pytest.raises(ValueError, match=r"do not fit features of 2 queries and 2 gallery photos"):
        verification.spatial_verification(scores, ranks, few, few)


def test_expansion_takes_verified_photos_only():
    rng = np.random.default_rng(0)
    queries, gallery = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rng.normal(size=(2, 8)), rng.normal(size=(5, 8)))
    )
    ranks = np.array([[4, 2, 0, 1, 3], [0, 1, 2, 3, -1]])
    probability = np.array([[0.99, 0.2, 0.95, 0.97, 0.92], [0.89, 0.5, 0.1, 0.1, 0.99]])
    seen = verification.Verified(np.zeros((2, 5)), ranks, np.zeros((2, 5), int), probability)
    out = verification.verified_expansion(queries, gallery, seen, most=3)
    mean = (queries[0] + gallery[4] + gallery[0] + gallery[1]) / 4
    np.testing.assert_allclose(out[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(out[1], queries[1], atol=1e-6)


# -------------------------------------------------------------------------------------------- files and caches


@pytest.fixture
def photos(make_root):
    root = make_root(test=None)
    for i, name in enumerate(("a", "b", "c")):
        cv2.imwrite(str(root / "train" / f"{name}.jpg"), textured(i, 96))
    return catalog.read(root)[0]


def same(a: verification.Features, b: verification.Features) -> bool:
    return all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in ("offsets", "points", "descriptors")
    )


def test_cached_features_equal_fresh_ones_and_are_not_computed_again(photos, tmp_path, monkeypatch):
    fresh = verification.features(photos, px=96)
    assert (
        same(verification.features(photos, px=96, cache_dir=tmp_path), fresh)
        and len(fresh.points) > 50
    )
    monkeypatch.setattr(verification, "sift", lambda *a, **k: pytest.fail("computed again"))
    assert same(verification.features(photos, px=96, cache_dir=tmp_path), fresh)


def test_photos_that_another_table_had_are_not_computed_again(photos, tmp_path, monkeypatch):
    fresh, read = verification.features(photos[::-1], px=96), []
    for rows in (photos[:1], photos[1:2]):
        verification.features(rows, px=96, cache_dir=tmp_path)
    true = verification._features_of
    monkeypatch.setattr(
        verification, "_features_of", lambda path, *a: read.append(path.name) or true(path, *a)
    )
    assert same(verification.features(photos[::-1], px=96, cache_dir=tmp_path), fresh) and read == [
        "c.jpg"
    ]


@pytest.mark.parametrize("change", ["px", "n_keypoints", "rows", "data"])
def test_cached_features_answer_only_the_same_question(photos, tmp_path, change):
    verification.features(photos, px=96, cache_dir=tmp_path)
    other = photos[::-1] if change == "rows" else photos.copy()
    other.attrs = photos.attrs | ({"fingerprint": "other"} if change == "data" else {})
    verification.features(
        other,
        **{"px": 96} | {"px": {"px": 64}, "n_keypoints": {"n_keypoints": 9}}.get(change, {}),
        cache_dir=tmp_path,
    )
    assert len(list((tmp_path / "features").iterdir())) == (
        1 if change == "rows" else 2
    )  # other rows: taken from the first


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_damaged_cache_is_built_anew(photos, tmp_path, damage, monkeypatch):
    fresh = verification.features(photos, px=96, cache_dir=tmp_path)
    (file,) = (tmp_path / "features").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    assert same(verification.features(photos, px=96, cache_dir=tmp_path), fresh)
    monkeypatch.setattr(verification, "sift", lambda *a, **k: pytest.fail("computed again"))
    assert same(verification.features(photos, px=96, cache_dir=tmp_path), fresh)


def test_unreadable_photo_has_no_features_and_its_neighbours_keep_theirs(photos):
    fresh = verification.features(photos, px=96)
    (Path(photos.attrs["root"]) / photos["path"].iloc[1]).write_bytes(b"no photo")
    broken = verification.features(photos, px=96)
    assert len(broken) == 3 and len(broken[1][0]) == 0
    for i in (0, 2):
        np.testing.assert_array_equal(broken[i][1], fresh[i][1])


def test_features_that_would_fill_the_memory_are_refused(photos, monkeypatch):
    monkeypatch.setattr(verification, "MOST_BYTES", 100_000)
    with pytest.raises(
        ValueError,
        match="features of 3 photos with 1,000 keypoints .* smaller depth. or take fewer keypoints",
    ):
        verification.features(photos)


def test_keypoints_are_bounded_and_lie_in_the_picture():
    points, descriptors = verification.sift(textured(0), px=320, n_keypoints=100)
    assert (
        points.shape == (100, 4)
        and descriptors.shape == (100, 128)
        and descriptors.dtype == np.uint8
    )
    assert points[:, :2].min() >= 0 and points[:, :2].max() <= 1
    assert verification.sift(picture(0, 3, 900), px=320)[0].shape[1] == 4  # a strip


def test_customer_photos_of_toy_boxes_find_their_shop_photo():
    firsts = range(0, 100, toy.VARIANTS)  # of each line
    boxes = [p for p in firsts if toy.design(p, 0).shape == "box"][:4]
    gallery = features_of([toy.shop_photo(p, 0, 0, 320) for p in boxes])
    queries = features_of([toy.customer_photo(p, 1, 0, 320) for p in boxes])
    ranks = np.tile(np.arange(4), (4, 1))
    counts = verification.inlier_counts(queries, gallery, ranks)
    assert (counts.argmax(1) == np.arange(4)).mean() >= 0.75


def test_empty_table_has_no_features(photos):
    assert len(verification.features(photos[:0])) == 0


def test_pairs_of_one_product_that_geometry_brings_together_clean_it(make_root, tmp_path):
    names = [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 2)]
    root = make_root("name,class,group\n" + "".join(f"{n}.jpg,{c},0\n" for n, c in names), None)
    views = [
        textured(0),
        *(
            cv2.warpPerspective(textured(0), KNOWN @ np.diag([1, s, 1]), (320, 320))
            for s in (1.0, 0.95)
        ),
    ]
    for (name, _), view in zip(
        names, [*views, textured(1), textured(0)]
    ):  # d is no view of the product, e is of another
        cv2.imwrite(str(root / "train" / f"{name}.jpg"), view)
    rows = catalog.read(root)[0]
    rows.index += 10
    pairs = verification.verified_pairs(rows, px=320, cache_dir=tmp_path / "cache")
    assert sorted(map(tuple, pairs)) == [(10, 11), (10, 12), (11, 12)]
    assert list(audit.clean(rows, audit.linked(rows, pairs))[1].name) == ["d.jpg"]
    assert len(verification.verified_pairs(rows[3:], px=320)) == 0  # one photo each
