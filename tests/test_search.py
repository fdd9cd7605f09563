import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.host import progress
from vipr_utils.retrieve import search

faiss = pytest.importorskip("faiss")


def vectors(n, dim=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(search, "QUERY_CHUNK", 7)
    monkeypatch.setattr(search, "GALLERY_CHUNK", 64)


@pytest.mark.parametrize(
    "distance, metric", [("cosine", "INNER_PRODUCT"), ("euclidean", "L2"), ("manhattan", "L1")]
)
def test_chunked_search_equals_faiss(distance, metric, small_chunks):
    queries, gallery = vectors(50), vectors(333, seed=1)
    index = faiss.IndexFlat(16, getattr(faiss, f"METRIC_{metric}"))
    index.add(gallery)
    values, want = index.search(queries, 9)
    scores, ranks = search.top_k(queries, gallery, 9, distance=distance)
    assert (ranks == want).all()
    theirs = {"cosine": values, "euclidean": -np.sqrt(values), "manhattan": -values}[distance]
    np.testing.assert_allclose(scores, theirs, atol=1e-4)


def test_a_query_never_meets_itself_but_meets_its_exact_duplicate(small_chunks):
    gallery = vectors(200)
    gallery[150] = gallery[3]  # an exact duplicate with another id
    ids = np.array([f"train/{i}.jpg" for i in range(200)])
    _, ranks = search.top_k(gallery, gallery, 5, query_ids=ids, gallery_ids=ids)
    assert not (ranks == np.arange(200)[:, None]).any()
    assert ranks[3, 0] == 150 and ranks[150, 0] == 3


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_one_query_alone_does_not_meet_itself_either(distance):
    gallery, ids = vectors(70), np.arange(70)
    given = {"query_ids": ids[:1], "gallery_ids": ids, "distance": distance}
    assert 0 not in search.top_k(gallery[:1], gallery, 5, **given)[1]


@pytest.mark.parametrize("queries, rows", [(64, 100), (100, 64), (64, 128)])
def test_numbers_of_queries_and_rows_divide_as_they_like(queries, rows):
    x, gallery = vectors(queries), vectors(rows, seed=1)
    want = np.argsort(-(x @ gallery.T), axis=1)[:, :5]
    np.testing.assert_array_equal(search.top_k(x, gallery)[1], want)


@pytest.mark.parametrize("kinds", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 3, 70])
def test_equal_scores_stand_in_gallery_order_over_all_blocks(small_chunks, kinds, k):
    rng = np.random.default_rng(kinds)
    gallery = np.eye(16, dtype=np.float32)[rng.integers(0, kinds, 300)]  # 5 blocks, few scores
    queries = np.abs(vectors(20, seed=5)).round(1)
    scores, ranks = search.top_k(queries, gallery, k)
    similarity = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1).numpy() @ gallery.T
    want = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert (ranks == want).all()
    assert (scores == np.take_along_axis(similarity, want, axis=1)).all()


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_a_gallery_smaller_than_k_is_padded_with_minus_one(distance):
    scores, ranks = search.top_k(vectors(2), vectors(3, seed=1), 5, distance=distance)
    assert (ranks[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert [sorted(row) for row in ranks[:, :3].tolist()] == [[0, 1, 2]] * 2
    ids = np.array(["a", "b"])
    given = {"query_ids": ids, "gallery_ids": ids, "distance": distance}
    _, ranks = search.top_k(vectors(2), vectors(2), 2, **given)
    assert ranks.tolist() == [[1, -1], [0, -1]]


def test_five_are_found_where_no_number_is_asked_for_as_arrays_of_numpy():
    for found in search.top_k(vectors(2), vectors(9, seed=1)):
        assert isinstance(found, np.ndarray) and found.shape == (2, 5)


def test_ids_of_one_side_alone_leave_out_nothing():
    x, ids = vectors(3), np.array(["a", "b", "c"])
    for given in ({"query_ids": ids}, {"gallery_ids": ids}):
        assert search.top_k(x, x, 1, **given)[1].ravel().tolist() == [0, 1, 2]


@pytest.mark.parametrize("query_ids, gallery_ids", [("ab", "abcde"), ("abc", "abcd")])
def test_ids_of_another_number_than_rows_are_refused(query_ids, gallery_ids):
    ids = {"query_ids": list(query_ids), "gallery_ids": list(gallery_ids)}
    with pytest.raises(ValueError, match="ids do not match: . ids for 3 queries, . for 5 rows"):
        search.top_k(vectors(3), vectors(5), 2, **ids)


def test_embeddings_that_cannot_be_written_are_searched_without_a_warning():
    gallery = vectors(9)
    gallery.flags.writeable = False
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            search.top_k(vectors(2), gallery)
    finally:
        torch.set_warn_always(False)


def test_nan_embeddings_are_refused_with_row_and_remedy():
    bad = vectors(4)
    bad[2, 5] = np.nan
    with pytest.raises(
        ValueError, match=r"1 of 4 query embeddings hold NaN .*row 2.*learning rate"
    ):
        search.top_k(bad, vectors(5))
    with pytest.raises(ValueError, match="gallery embeddings hold NaN"):
        search.top_k(vectors(5), bad)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_embeddings_are_refused_however_they_add_up(value):
    bad = vectors(3)
    bad[1, 2], bad[1, 3] = value, -value
    with pytest.raises(ValueError, match="1 of 3 query embeddings hold NaN or infinity .*row 1"):
        search.top_k(bad, vectors(5))


@pytest.mark.parametrize("distance", ["cosine", "manhattan"])
def test_gallery_passes_once_however_many_blocks_of_queries_meet_it(monkeypatch, distance):
    checked, met = [], []
    lengths, merge = search._lengths, search._merge
    monkeypatch.setattr(search, "_lengths", lambda x, *a: checked.append(len(x)) or lengths(x, *a))
    monkeypatch.setattr(search, "_merge", lambda *a: met.append(a[3]) or merge(*a))
    queries, gallery = vectors(100), vectors(170, seed=1)
    want = search.top_k(queries, gallery, 4, distance=distance)
    monkeypatch.setattr(search, "QUERY_CHUNK", 30)
    monkeypatch.setattr(search, "GALLERY_CHUNK", 80)
    checked.clear(), met.clear()
    found = search.top_k(queries, gallery, 4, distance=distance)
    assert checked == [100, 170] and met == 4 * [0] + 4 * [80] + 4 * [160]
    np.testing.assert_array_equal(found[1], want[1])


def test_vectors_that_are_no_unit_vectors_are_compared_by_cosine_and_left_as_they_are():
    queries, gallery = 3 * vectors(9), vectors(90, seed=1) * np.linspace(0.1, 9, 90)[:, None]
    before = queries.copy(), gallery.copy()
    scores, ranks = search.top_k(queries, gallery)
    want = search.top_k(queries / 3, vectors(90, seed=1))
    np.testing.assert_allclose(scores, want[0], atol=1e-6)
    np.testing.assert_array_equal(ranks, want[1])
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(gallery, before[1])


@pytest.mark.parametrize("length", [1e-7, 0.5, 2.0])
def test_vectors_of_any_one_length_are_compared_by_cosine(length):
    queries, gallery = vectors(9), vectors(90, seed=1)
    scores, ranks = search.top_k(length * queries, length * gallery, 90)
    cosines = queries @ gallery.T
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, ranks, axis=1), scores, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 40, 500])
def test_groups_of_columns_lose_nothing(monkeypatch, k):
    """Lists that grow over many sections, most of which a query gains nothing by."""
    monkeypatch.setattr(search, "GALLERY_CHUNK", 128)
    monkeypatch.setattr(search, "GROUP", 8)
    queries, gallery = vectors(40, dim=8), vectors(3000, dim=8, seed=1).round(1)
    gallery[:20] = 0
    scores, ranks = search.top_k(queries, gallery, k)
    unit = gallery / np.maximum(np.linalg.norm(gallery, axis=1, keepdims=True), 1e-12)
    similarity = queries @ unit.T
    np.testing.assert_allclose(scores, -np.sort(-similarity, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(similarity, ranks, axis=1), scores, atol=1e-6)
    assert all(len(set(row)) == k for row in ranks)


def sides(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(queries, gallery) whose euclidean distances are hard to take by a product of matrices."""
    rng = np.random.default_rng(0)
    if kind == "twenty copies of each":
        return vectors(60, dim=32), np.repeat(vectors(100, dim=32, seed=1), 20, axis=0)
    if kind == "a few places":
        places = np.eye(32, dtype=np.float32)
        return places[rng.integers(0, 3, 60)], places[rng.integers(0, 3, 2000)]
    offset, spread = {
        "unit": (0, 1),
        "far from the origin": (100, 1),
        "collapsed": (1, 1e-4),
        "long": (0, 1000),
    }[kind]
    both = (offset + spread * rng.normal(size=(2060, 32))).astype(np.float32)
    return both[:60], both[60:]


KINDS = ["unit", "far from the origin", "collapsed", "long", "twenty copies of each"]


@pytest.mark.parametrize("kind", [*KINDS, "a few places"])
def test_euclidean_lists_are_those_of_exact_distances(kind):
    queries, gallery = sides(kind)
    exact = np.linalg.norm(queries[:, None].astype(float) - gallery, axis=2)
    scores, ranks = search.top_k(queries, gallery, 5, distance="euclidean")
    found = np.take_along_axis(exact, ranks, axis=1)
    unit = np.finfo(np.float32).eps * exact.max()
    np.testing.assert_allclose(found, np.sort(exact, axis=1)[:, :5], atol=unit)
    np.testing.assert_allclose(-scores, found, atol=4 * unit)
    assert (ranks == np.argsort(exact, axis=1, kind="stable")[:, :5]).mean() > 0.99


def test_only_queries_with_too_many_equals_are_compared_with_all_directly(monkeypatch):
    compared, directly = [], search._directly
    monkeypatch.setattr(
        search, "_directly", lambda q, *a: compared.append(len(q)) or directly(q, *a)
    )
    queries, gallery = vectors(50), vectors(500, seed=1)
    search.top_k(queries, gallery, 5, distance="euclidean")
    assert not compared
    gallery[:20] = queries[7]
    _, ranks = search.top_k(queries, gallery, 5, distance="euclidean")
    assert compared == [1] and ranks[7].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["far from the origin", "collapsed"])
def test_rows_that_lie_together_are_compared_without_their_centre(monkeypatch, kind):
    compared, directly = [], search._directly
    monkeypatch.setattr(
        search, "_directly", lambda q, *a: compared.append(len(q)) or directly(q, *a)
    )
    search.top_k(*sides(kind), 5, distance="euclidean")
    assert sum(compared) <= 1


@pytest.mark.parametrize("share, sure", [(0.9, False), (1.1, True)])
def test_worst_case_of_rounding_decides_which_queries_are_compared_directly(
    monkeypatch, share, sure
):
    """A query of length 3 and rows of length 1: five at 60 degrees, the others farther by a share
    of 4 D 2^-24 (3 + 1)^2, how much squared distances by a product may be wrong."""
    compared, directly = [], search._directly
    monkeypatch.setattr(
        search, "_directly", lambda q, *a: compared.append(len(q)) or directly(q, *a)
    )
    dim = 256
    gap = share * 4 * dim * 2**-24 * (3 + 1) ** 2
    cosines = np.where(np.arange(40) < 5, 0.5, 0.5 - gap / (2 * 3))
    gallery = np.zeros((40, dim))
    gallery[:, 0] = cosines
    gallery[np.arange(40), 1 + np.arange(40)] = np.sqrt(1 - cosines**2)
    queries = np.zeros((2, dim), np.float32)
    queries[:, 0] = 3
    _, ranks = search.top_k(queries, gallery, 5, distance="euclidean")
    assert ranks.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert compared == ([] if sure else [2])


def test_a_query_compared_with_all_directly_does_not_meet_itself_either():
    gallery, ids = vectors(500), np.arange(500)
    gallery[:20] = gallery[7]
    given = {"query_ids": ids[:2], "gallery_ids": ids}
    _, ranks = search.top_k(gallery[:2], gallery, 3, distance="euclidean", **given)
    assert ranks.tolist() == [[1, 2, 3], [0, 2, 3]]


def test_unequal_widths_and_empty_galleries_are_refused():
    with pytest.raises(ValueError, match="k >= 1 and a gallery, got k=0 and 3 gallery rows"):
        search.top_k(vectors(2), vectors(3), 0)
    with pytest.raises(ValueError, match="16 dimensions, the gallery 8"):
        search.top_k(vectors(2), vectors(3, dim=8))
    with pytest.raises(ValueError, match="0 gallery rows"):
        search.top_k(vectors(2), np.zeros((0, 16), np.float32))
    with pytest.raises(ValueError, match="'hamming' is unknown"):
        search.top_k(vectors(2), vectors(3), distance="hamming")


# ------------------------------------------------------------------- what may be answered alone


@pytest.fixture(params=[(60, 40), (60, 3), (3, 40)])
def partly(request):
    """A Search of which some rows may be answered, each query in the gallery as well."""
    n_answers, n_others = request.param
    gallery = vectors(n_answers + n_others, seed=2)
    answers = np.random.default_rng(3).permutation(np.arange(len(gallery)) < n_answers)
    rows = pd.DataFrame({"image_id": [f"train/{i}.jpg" for i in range(len(gallery))]})
    asked = np.arange(0, len(gallery), 4)
    return search.Search(gallery[asked], gallery, rows.iloc[asked], rows, answers=answers)


def order(unsearched, q: int) -> list[int]:
    """All gallery rows but the query's own photo, the nearest first."""
    ids = unsearched.gallery_rows["image_id"].to_numpy()
    itself = unsearched.query_rows["image_id"].to_numpy()[q]
    similarity = unsearched.gallery @ unsearched.queries[q]
    return [row for row in np.argsort(-similarity) if ids[row] != itself]


def test_lists_hold_the_nearest_of_those_that_may_be_answered_and_of_the_others(partly):
    found = partly.searched(10)
    assert found.ranks.shape == found.scores.shape == (len(partly.queries), 20)
    for q, row in enumerate(found.ranks):
        nearest = order(partly, q)
        wanted = [[g for g in nearest if partly.answers[g] == kind][:10] for kind in (True, False)]
        rows = row[row >= 0].tolist()
        assert rows == [g for g in nearest if g in wanted[0] + wanted[1]], "once each, best first"
        assert (row[len(rows) :] == -1).all() and np.isneginf(found.scores[q, len(rows) :]).all()
        similarity = partly.gallery[rows] @ partly.queries[q]
        np.testing.assert_allclose(found.scores[q, : len(rows)], similarity, atol=1e-6)


def test_narrowed_lists_are_those_of_a_gallery_that_never_had_the_others(partly):
    rows = np.flatnonzero(partly.answers)
    alone = replace(
        partly, gallery=partly.gallery[rows], gallery_rows=partly.gallery_rows.iloc[rows]
    )
    want, found = replace(alone, answers=None).searched(10), partly.searched(10).narrowed()
    np.testing.assert_array_equal(found.ranks[:, :10], want.ranks)
    np.testing.assert_allclose(found.scores[:, :10], want.scores, atol=1e-6)
    assert (found.ranks[:, 10:] == -1).all() and found.answers is None
    np.testing.assert_array_equal(found.gallery, want.gallery)
    assert found.gallery_rows.equals(want.gallery_rows)


def test_narrowed_lists_keep_the_order_that_a_step_gave_them(partly):
    found = partly.searched(10)
    shuffled = np.argsort(np.random.default_rng(0).random(found.ranks.shape), axis=1)
    inliers = np.arange(found.ranks.size).reshape(found.ranks.shape)
    listed = replace(found, inliers=inliers).ordered(shuffled)
    narrow = listed.narrowed()
    names = partly.gallery_rows.index
    for before, after, scores, counts, shown in zip(
        listed.ranks, narrow.ranks, narrow.scores, listed.inliers, narrow.inliers
    ):
        may = [i for i, g in enumerate(before) if g >= 0 and partly.answers[g]]
        assert narrow.gallery_rows.index[after[after >= 0]].tolist() == list(names[before[may]])
        assert (after[len(may) :] == -1).all() and np.isneginf(scores[len(may) :]).all()
        assert shown[: len(may)].tolist() == counts[may].tolist()


def test_where_all_may_be_answered_nothing_is_narrowed():
    rows = pd.DataFrame({"image_id": [f"{i}" for i in range(9)]})
    found = search.Search(vectors(2), vectors(9, seed=1), rows[:2], rows).searched(5)
    assert found.narrowed() is found and found.ranks.shape == (2, 5)


def test_sorted_lists_keep_equal_scores_in_order_and_forget_what_was_verified():
    rows = pd.DataFrame({"image_id": [f"{i}" for i in range(300)]})
    found = search.Search(vectors(2), vectors(300, seed=1), rows[:2], rows).searched(300)
    scores = np.tile(np.arange(300) % 3, (2, 1)).astype(float)
    after = replace(found, inliers=np.ones((2, 300), int)).sorted_by(scores)
    assert after.inliers is None
    places = np.concatenate([np.flatnonzero(scores[0] == value) for value in (2, 1, 0)])
    np.testing.assert_array_equal(after.ranks, found.ranks[:, places])
    np.testing.assert_array_equal(after.scores, scores[:, places])


def test_engine_that_is_asked_for_is_the_one_that_searches(monkeypatch):
    asked, nearest = [], search.by_faiss.nearest
    monkeypatch.setattr(
        search.by_faiss, "nearest", lambda *given: asked.append(given[-2:]) or nearest(*given)
    )
    for distance in ("cosine", "euclidean"):
        search.top_k(vectors(2), vectors(9), distance=distance, engine="ivfpq")
    assert asked == [("cosine", "ivfpq"), ("euclidean", "ivfpq")]


def test_search_begins_with_nothing_found():
    rows = pd.DataFrame({"image_id": ["a"]})
    new = search.Search(vectors(1), vectors(1), rows, rows)
    found = (new.scores, new.ranks, new.inliers, new.answers, new.cache_dir)
    assert found == (None,) * 5 and (new.projections, new.device) == ((), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_search_on_a_gpu_equals_the_cpu():
    queries, gallery = vectors(50), vectors(333, seed=1)
    on_gpu = search.top_k(queries, gallery, device="cuda")
    assert (on_gpu[1] == search.top_k(queries, gallery)[1]).all()


def test_long_search_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(search, "GALLERY_CHUNK", 1)
    with caplog.at_level("INFO", "vipr"):
        search.top_k(np.eye(9), np.eye(9), 2)
    told = [line.partition(",")[0] for line in caplog.messages]
    assert told == [f"gallery rows searched: {done} of 9" for done in (4, 8, 9)]


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_gallery_prepared_once_answers_as_its_embeddings_do(distance):
    rng = np.random.default_rng(0)
    queries, rows = (rng.standard_normal((n, 7)).astype(np.float32) for n in (5, 400))
    ids = {"query_ids": np.arange(5), "gallery_ids": np.arange(400)}
    prepared = search.Prepared(rows)
    assert len(prepared.rows) == 400 and np.shares_memory(prepared.rows.numpy(), rows)
    for given in ({}, ids):
        expected = search.top_k(queries, rows, 9, distance=distance, **given)
        found = search.top_k(queries, prepared, 9, distance=distance, **given)
        for one, other in zip(found, expected):
            np.testing.assert_array_equal(one, other)
    rows[3, 3] = np.nan
    with pytest.raises(ValueError, match="1 of 400 gallery embeddings hold NaN"):
        search.Prepared(rows)
