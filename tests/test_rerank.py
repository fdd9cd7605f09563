"""Every step against a slow loop of its paper's formula."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vipr_utils.retrieve import rerank
from vipr_utils.retrieve.search import Search, top_k


def planted(n_queries=30, n_gallery=90, dim=12, seed=0):
    """Queries and gallery around common centres, so that neighbours mean something; products."""
    rng = np.random.default_rng(seed)
    products = rng.integers(0, 12, n_queries + n_gallery)
    x = rng.normal(size=(12, dim))[products] + 0.9 * rng.normal(size=(len(products), dim))
    x = rerank.unit(x)
    return x[:n_queries], x[n_queries:], products[:n_queries], products[n_queries:]


def table(name: str, size: int) -> pd.DataFrame:
    return pd.DataFrame({"image_id": [f"{name}/{i}.jpg" for i in range(size)]})


def searched(queries, gallery, k: int = 5) -> Search:
    rows = table("test", len(queries)), table("train", len(gallery))
    return Search(queries, gallery, *rows).searched(k)


def raw(projection, x):
    """Before normalisation."""
    return (x - projection.mean) @ projection.matrix


# -------------------------------------------------------------------------------------- projections


def test_whitened_data_has_identity_covariance_before_normalisation():
    x = (
        np.random.default_rng(0).normal(size=(500, 10))
        @ np.random.default_rng(1).normal(size=(10, 10))
        + 5
    )
    for dim in (10, 4):
        white = raw(rerank.fit_whitening(x, dim), x)
        np.testing.assert_allclose(np.cov(white, rowvar=False, bias=True), np.eye(dim), atol=1e-3)
        np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(1, 13)
    ours, theirs = raw(rerank.fit_whitening(x, 5, power=0.0), x), PCA(5).fit_transform(x)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-3)  # a direction has no sign
    white = PCA(5, whiten=True).fit_transform(x) * np.sqrt(200 / 199)  # it divides by N - 1
    ours = raw(rerank.fit_whitening(x, 5), x)
    np.testing.assert_allclose(np.abs(ours), np.abs(white), atol=1e-3)


def test_whitening_refuses_more_directions_than_the_photos_span_and_survives_constant_ones():
    x = np.random.default_rng(0).normal(size=(6, 10))
    with pytest.raises(
        ValueError,
        match=r"6 embeddings of 10 dimensions span 5 directions, got dim=8: use at most 5",
    ):
        rerank.fit_whitening(x, 8)
    flat = np.zeros((50, 4))
    flat[:, 0] = np.arange(50)
    assert np.isfinite(rerank.fit_whitening(flat)(flat)).all()


def test_centring_takes_the_gallerys_mean_from_both_sides():
    queries, gallery, _, _ = planted()
    found = rerank.centring(searched(queries, gallery))
    for x, centred in ((queries, found.queries), (gallery, found.gallery)):
        np.testing.assert_allclose(centred, rerank.unit(x - gallery.mean(0)), atol=1e-5)


def test_learned_whitening_makes_the_scatter_inside_products_round():
    _, x, _, products = planted(n_gallery=400)
    out = raw(rerank.fit_learned_whitening(x, products, shrink=0.0), x)
    within = out - np.stack([out[products == p].mean(0) for p in products])
    np.testing.assert_allclose(within.T @ within / len(x), np.eye(12), atol=2e-3)
    total = np.cov(out, rowvar=False)
    np.testing.assert_allclose(total, np.diag(np.diag(total)), atol=2e-2)
    assert (np.diff(np.diag(total)) <= 1e-6).all()  # the most telling direction first
    with pytest.raises(ValueError, match="no product of 400 has two photos that differ"):
        rerank.fit_learned_whitening(x, np.arange(400))


def test_fewer_photos_than_dimensions_are_whitened_alike_in_what_they_span():
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(30, 90)), rng.normal(size=(5, 90))
    products = np.arange(30) // 3
    whitened = rerank.fit_learned_whitening(x, products, 9)
    # four times each they are no fewer than dimensions, and their covariances are the same
    more = rerank.fit_learned_whitening(np.tile(x, (4, 1)), np.tile(products, 4), 9)
    found, wanted = (raw(p, queries) @ raw(p, x).T for p in (whitened, more))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * abs(wanted).max())


def test_directions_are_no_more_than_photos():
    x = np.random.default_rng(0).normal(size=(30, 90))
    assert rerank.fit_learned_whitening(x, np.arange(30) // 3, 64).matrix.shape == (90, 30)


def test_covariance_in_blocks_is_that_of_all_rows_at_once(monkeypatch):
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 9, 50)
    whole = rerank.fit_learned_whitening(x.astype(np.float64), labels, 4)
    monkeypatch.setattr(rerank, "PAIRS", 7)
    np.testing.assert_allclose(
        rerank._covariance(x - x.mean(0)), np.cov(x, rowvar=False, bias=True), atol=1e-6
    )
    blocks = rerank.fit_learned_whitening(x, labels, 4)
    np.testing.assert_allclose(np.abs(blocks.matrix), np.abs(whole.matrix), atol=1e-4)


def test_copies_of_one_photo_say_nothing_of_what_differs_inside_a_product():
    x = rerank.unit(np.random.default_rng(0).normal(size=(40, 12))).repeat(3, 0)
    with pytest.raises(ValueError, match="no product of 40 has two photos that differ"):
        rerank.fit_learned_whitening(x, np.arange(120) // 3)


def test_embeddings_are_copied_once_by_a_whitening_and_not_where_they_have_length_one(monkeypatch):
    monkeypatch.setattr(rerank, "PAIRS", 1000)
    x = rerank.unit(np.random.default_rng(0).normal(size=(20_000, 128)))
    assert rerank.unit(x) is x
    labels = np.arange(len(x)) // 4
    tracemalloc.start()
    rerank.fit_learned_whitening(x, labels, 16)(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.7 * x.nbytes, f"{peak / x.nbytes:.1f} times its size"


# ---------------------------------------------------------------------------------------- expansion


def slow_expansion(q, gallery, k, alpha):
    similarity = gallery @ q
    best = np.argsort(-similarity, kind="stable")[:k]
    out = q.copy()
    for g in best:
        out = out + max(similarity[g], 0.0) ** alpha * gallery[g]
    return out / np.linalg.norm(out)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_alpha_query_expansion_is_the_papers_sum(alpha):
    queries, gallery, _, _ = planted()
    found = rerank.alpha_query_expansion(searched(queries, gallery, 9), 7, alpha)
    want = [slow_expansion(q, gallery, 7, alpha) for q in queries]
    np.testing.assert_allclose(found.queries, want, atol=1e-5)
    np.testing.assert_array_equal(found.ranks, top_k(found.queries, gallery, 9)[1])


def test_alpha_zero_is_plain_average_expansion():
    queries, gallery, _, _ = planted()
    before = searched(queries, gallery)
    mean = (queries + gallery[before.ranks[:, :4]].sum(1)) / 5
    for found in (
        rerank.alpha_query_expansion(before, 4, alpha=0.0),
        rerank.average_query_expansion(before, 4),
    ):
        np.testing.assert_allclose(found.queries, rerank.unit(mean), atol=1e-6)


def test_places_without_a_photo_expand_nothing():
    queries, gallery, _, _ = planted()
    places = np.full((len(queries), 3), -1)
    empty = replace(searched(queries, gallery), ranks=places, scores=np.full(places.shape, -np.inf))
    found = rerank.alpha_query_expansion(empty, 3, alpha=0.0)
    np.testing.assert_allclose(found.queries, queries, atol=1e-6)


def test_database_augmentation_of_one_changes_nothing():
    queries, gallery, _, _ = planted()
    found = rerank.database_augmentation(searched(queries, gallery), 1)
    np.testing.assert_array_equal(found.gallery, gallery)


def test_database_augmentation_weighs_by_rank():
    queries, gallery, _, _ = planted()
    similarity = gallery @ gallery.T
    np.fill_diagonal(similarity, 2.0)  # itself is first, whatever rounding says
    want = np.zeros_like(gallery)
    for i, row in enumerate(similarity):
        for r, j in enumerate(np.argsort(-row)[:4]):
            want[i] += (4 - r) / 4 * gallery[j]
    found = rerank.database_augmentation(searched(queries, gallery), 4)
    np.testing.assert_allclose(found.gallery, rerank.unit(want), atol=1e-5)


def test_augmentation_of_a_gallery_smaller_than_k_uses_what_is_there():
    queries, gallery = planted()[0], planted()[1][:2]
    found = rerank.database_augmentation(searched(queries, gallery), 4)
    want = rerank.unit(gallery[:1] + 0.75 * gallery[1:])[0]
    np.testing.assert_allclose(found.gallery[0], want, atol=1e-6)


# ------------------------------------------------------------------------------------------ votes


def votes(search: Search, products, k: int, alpha: float) -> list[list[int]]:
    """Each list's rows by the votes of their products, then by score."""
    lists = []
    for ranks, scores in zip(search.ranks.tolist(), search.scores.tolist()):
        gained = dict.fromkeys(products, 0.0)
        for row, score in list(zip(ranks, scores))[:k]:
            if row >= 0:
                gained[products[row]] += max(score, 0.0) ** alpha
        places = [place for place, row in enumerate(ranks) if row >= 0]
        places.sort(key=lambda place: (-gained[products[ranks[place]]], -scores[place]))
        lists.append([ranks[place] for place in places])
    return lists


@pytest.mark.parametrize("k, alpha", [(3, 3.0), (5, 1.0), (5, 0.0), (200, 3.0)])
@pytest.mark.parametrize("chunk", [7, 256])
def test_votes_are_those_of_a_slow_loop_and_places_without_a_photo_have_none(
    k, alpha, chunk, monkeypatch
):
    monkeypatch.setattr(rerank, "CHUNK", chunk)
    queries, gallery, _, products = planted()
    found = searched(queries, gallery, 40)
    found.gallery_rows["product_id"] = products
    ranks, scores = found.ranks.copy(), found.scores.copy()
    ranks[::2, 25:], scores[::2, 25:] = -1, -np.inf  # short lists
    ranks[1, 1], scores[1, 1] = -1, -np.inf  # and a hole
    scores[2:4, 20:] *= -1
    found = replace(found, ranks=ranks, scores=scores)
    ordered = rerank.product_votes(found, k, alpha)
    for row, want in zip(ordered.ranks, votes(found, products, k, alpha)):
        assert row.tolist() == want + [-1] * (40 - len(want))
    known = [dict(zip(*pair)) for pair in zip(ranks.tolist(), scores.tolist())]
    for row, kept, score in zip(ordered.ranks.tolist(), known, ordered.scores.tolist()):
        assert [kept[place] for place in row] == score, "photos keep their scores"
    assert not np.array_equal(ordered.ranks, ranks)


def test_verified_photo_votes_by_its_inliers():
    """Three photos of one product are nearer; one of another has 20 inliers."""
    rows = table("test", 1), table("train", 4).assign(product_id=[7, 7, 7, 8])
    scores, ranks = np.array([[20.4, 0.9, 0.8, 0.7]]), np.array([[3, 0, 1, 2]])
    inliers = np.array([[20, 0, 0, 0]])
    found = Search(np.eye(1, 4), np.eye(4), *rows, scores, ranks, inliers)
    assert rerank.product_votes(found, 4).ranks.tolist() == [[3, 0, 1, 2]]
    plain = replace(found, scores=np.array([[0.4, 0.9, 0.8, 0.7]]), inliers=None)
    assert rerank.product_votes(plain, 4).ranks.tolist() == [[0, 1, 2, 3]]
    other = replace(found, ranks=np.array([[0, 3, 1, 2]]), inliers=np.array([[0, 20, 0, 0]]))
    moved = rerank.product_votes(replace(other, scores=np.array([[0.9, 20.4, 0.8, 0.7]])), 4)
    assert moved.ranks[0, 0] == 3 and moved.inliers[0, 0] == 20, "inliers move with their photo"


def test_expansion_searches_as_deep_as_before_where_not_all_may_be_answered():
    queries, gallery, _, _ = planted()
    rows = table("test", len(queries)), table("train", len(gallery))
    answers = np.arange(len(gallery)) % 3 > 0
    found = Search(queries, gallery, *rows, answers=answers).searched(20)
    again = rerank.alpha_query_expansion(rerank.alpha_query_expansion(found, 4), 4)
    assert again.ranks.shape == found.ranks.shape == (len(queries), 40)


# ------------------------------------------------------------------------------------- k-reciprocal


def reciprocal(near, p, k):
    """The paper's R(p, k), with p in its own list as in the authors' code."""
    return {g for g in near[p][: k + 1] if p in near[g][: k + 1]}


def slow_neighbourhoods(x, k1, k2):
    """Dense neighbourhood vectors (N, N) of Zhong 2017, row by row and set by set."""
    similarity = x @ x.T
    np.fill_diagonal(similarity, 2.0)
    near = np.argsort(-similarity, axis=1, kind="stable").tolist()
    vectors = np.zeros_like(similarity)
    for p in range(len(x)):
        wide = reciprocal(near, p, k1)
        joined = set(wide)
        for c in wide:
            narrow = reciprocal(near, c, round(k1 / 2))
            if len(wide & narrow) >= 2 / 3 * len(narrow) - 1e-9:
                joined |= narrow
        for g in joined:
            vectors[p, g] = np.exp(x[p] @ x[g] - 1)
        vectors[p] /= vectors[p].sum()
    return vectors, np.stack([vectors[near[p][:k2]].mean(0) for p in range(len(x))])


def slow_scores(queries, gallery, vq, vg, weight):
    out = np.zeros((len(queries), len(gallery)))
    for i, v in enumerate(vq):
        for j, w in enumerate(vg):
            jaccard = np.minimum(v, w).sum() / np.maximum(v, w).sum()
            out[i, j] = (1 - weight) * jaccard + weight * queries[i] @ gallery[j]
    return out


@pytest.mark.parametrize("k1, k2, weight", [(9, 4, 0.3), (6, 1, 0.0), (4, 3, 0.8)])
def test_transductive_k_reciprocal_is_the_papers(k1, k2, weight):
    queries, gallery, _, _ = planted()
    everything = np.concatenate([gallery, queries])
    _, vectors = slow_neighbourhoods(everything, k1, k2)
    want = slow_scores(queries, gallery, vectors[len(gallery) :], vectors[: len(gallery)], weight)
    before = searched(queries, gallery, 40)
    found = rerank.transductive_k_reciprocal(before, k1, k2, weight)
    assert (np.sort(found.ranks, 1) == np.sort(before.ranks, 1)).all()
    assert (found.ranks != before.ranks).any()
    np.testing.assert_allclose(found.scores, np.take_along_axis(want, found.ranks, 1), atol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 1e-9).all()


@pytest.mark.parametrize("k1, k2, weight", [(9, 4, 0.3), (6, 1, 0.0), (4, 3, 0.8)])
def test_inductive_k_reciprocal_adds_one_query_to_the_gallery_by_itself(k1, k2, weight):
    queries, gallery, _, _ = planted()
    plain, averaged = slow_neighbourhoods(gallery, k1, k2)
    similarity = gallery @ gallery.T
    np.fill_diagonal(similarity, 2.0)
    near = np.argsort(-similarity, axis=1).tolist()
    vq = []
    for q in queries:
        mine = np.argsort(-(gallery @ q))
        wide = {g for g in mine[:k1] if q @ gallery[g] >= similarity[g, near[g][k1]]}
        joined = set(wide)
        for c in wide:
            narrow = reciprocal(near, c, round(k1 / 2))
            if len(wide & narrow) >= 2 / 3 * len(narrow) - 1e-9:
                joined |= narrow
        v = np.array([np.exp(q @ g - 1) if j in joined else 0 for j, g in enumerate(gallery)])
        v = v / v.sum() if joined else v
        vq.append((v + plain[mine[: k2 - 1]].sum(0)) / k2)
    want = slow_scores(queries, gallery, np.array(vq), averaged, weight)
    before = searched(queries, gallery, 40)
    found = rerank.k_reciprocal(before, k1, k2, weight)
    np.testing.assert_allclose(found.scores, np.take_along_axis(want, found.ranks, 1), atol=1e-5)
    assert (found.ranks != before.ranks).any()


def test_only_the_transductive_variant_looks_at_other_queries():
    queries, gallery, _, _ = planted()
    both = searched(queries, gallery, 30), searched(queries[:1], gallery, 30)
    for step, blind in ((rerank.k_reciprocal, True), (rerank.transductive_k_reciprocal, False)):
        together, alone = (step(search).scores for search in both)
        assert np.allclose(together[:1], alone, atol=1e-6) is blind


def test_weight_one_keeps_the_order_of_plain_search():
    queries, gallery, _, _ = planted()
    before = searched(queries, gallery, 30)
    found = rerank.k_reciprocal(before, weight=1.0)
    assert (found.ranks == before.ranks).all()
    np.testing.assert_allclose(found.scores, before.scores, atol=1e-5)


def test_k_reciprocal_lifts_a_hard_ranking_and_pays_for_chunks_with_nothing(monkeypatch):
    queries, gallery, wanted, there = planted(60, 400)
    before = searched(queries, gallery, 100)
    after = rerank.k_reciprocal(before)
    right = [(there[x.ranks[:, :5]] == wanted[:, None]).mean() for x in (before, after)]
    assert right[1] > right[0]
    monkeypatch.setattr(rerank, "CHUNK", 7)
    monkeypatch.setattr(rerank, "PAIRS", 50)
    np.testing.assert_array_equal(rerank.k_reciprocal(before).ranks, after.ranks)


@pytest.mark.parametrize("step", ["k_reciprocal", "transductive_k_reciprocal"])
def test_k_reciprocal_holds_no_number_for_each_pair_of_photos(step):
    queries, gallery, *_ = planted(2000, 8000, 8)
    search = searched(queries, gallery, 4)
    tracemalloc.start()
    getattr(rerank, step)(search, 4, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(queries) * len(gallery), f"{peak:,} bytes"


def test_k_reciprocal_of_small_galleries_and_short_lists():
    queries, gallery, _, _ = planted(5, 8)
    found = rerank.k_reciprocal(searched(queries, gallery, 12))  # four places are empty
    assert (found.ranks[:, 8:] == -1).all() and np.isneginf(found.scores[:, 8:]).all()
    assert np.isfinite(found.scores[:, :8]).all()
    short = searched(queries, gallery, 5)
    with pytest.raises(
        ValueError, match="needs lists of k1=6 photos, got 5: search deeper or lower k1"
    ):
        rerank.k_reciprocal(short, k1=6)
    for numbers in ({"k1": 0}, {"k2": 0}, {"weight": 1.5}):
        with pytest.raises(
            ValueError,
            match=r"k1 and k2 of at least 1 and a weight in 0..1, got .*: try 20, 6, 0.3",
        ):
            rerank.k_reciprocal(short, **numbers)
