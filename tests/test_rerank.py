"""Every step against a slow loop of its paper's formula, and the stack that runs them by name."""

import doctest

import numpy as np
import pytest

from vipr_utils.retrieve import rerank, search


def planted(n_queries=30, n_gallery=90, dim=12, seed=0):
    """Queries and gallery around common centres, so that neighbourhoods mean something; product of each."""
    rng = np.random.default_rng(seed)
    products = rng.integers(0, 12, n_queries + n_gallery)
    x = rng.normal(size=(12, dim))[products] + 0.9 * rng.normal(size=(len(products), dim))
    x = rerank.unit(x)
    return x[:n_queries], x[n_queries:], products[:n_queries], products[n_queries:]


# --------------------------------------------------------------------------------------------------- projections


def test_whitened_data_has_identity_covariance_before_normalisation():
    x = (
        np.random.default_rng(0).normal(size=(500, 10))
        @ np.random.default_rng(1).normal(size=(10, 10))
        + 5
    )
    for dim in (10, 4):
        white = rerank.fit_whitening(x, dim).raw(x)
        np.testing.assert_allclose(np.cov(white, rowvar=False, bias=True), np.eye(dim), atol=1e-3)
        np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(1, 13)
    ours, theirs = rerank.fit_whitening(x, 5, power=0.0).raw(x), PCA(5).fit_transform(x)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-3)  # a direction has no sign
    white = PCA(5, whiten=True).fit_transform(x) * np.sqrt(200 / 199)  # it divides by N - 1
    np.testing.assert_allclose(np.abs(rerank.fit_whitening(x, 5).raw(x)), np.abs(white), atol=1e-3)


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
    centre = rerank.fit_centring(gallery)
    want = queries - gallery.mean(0)
    np.testing.assert_allclose(
        centre(queries), want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(centre.raw(gallery).mean(0), 0, atol=1e-6)


def test_learned_whitening_makes_the_scatter_inside_products_round():
    _, x, _, products = planted(n_gallery=400)
    out = rerank.fit_learned_whitening(x, products, shrink=0.0).raw(x)
    within = out - np.stack([out[products == p].mean(0) for p in products])
    np.testing.assert_allclose(within.T @ within / len(x), np.eye(12), atol=2e-3)
    total = np.cov(out, rowvar=False)
    np.testing.assert_allclose(total, np.diag(np.diag(total)), atol=2e-2)
    assert (np.diff(np.diag(total)) <= 1e-6).all()  # the most telling direction first
    with pytest.raises(ValueError, match="no product of 400 has two photos that differ"):
        rerank.fit_learned_whitening(x, np.arange(400))


# ----------------------------------------------------------------------------------------------------- expansion


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
    lists = search.top_k(queries, gallery, 7)
    out = rerank.alpha_query_expansion(queries, gallery, *lists, alpha=alpha)
    np.testing.assert_allclose(
        out, [slow_expansion(q, gallery, 7, alpha) for q in queries], atol=1e-5
    )


def test_alpha_zero_is_plain_average_expansion():
    queries, gallery, _, _ = planted()
    lists = search.top_k(queries, gallery, 4)
    mean = (queries + gallery[lists[1]].sum(1)) / 5
    out = rerank.alpha_query_expansion(queries, gallery, *lists, alpha=0.0)
    np.testing.assert_allclose(out, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_places_without_a_photo_expand_nothing():
    queries, gallery, _, _ = planted()
    none = np.full((len(queries), 3), -1)
    out = rerank.alpha_query_expansion(
        queries, gallery, np.full(none.shape, -np.inf), none, alpha=0.0
    )
    np.testing.assert_allclose(out, queries, atol=1e-6)


def test_database_augmentation_of_one_changes_nothing():
    _, gallery, _, _ = planted()
    np.testing.assert_array_equal(rerank.database_augmentation(gallery, 1), gallery)


def test_database_augmentation_weighs_by_rank_or_by_similarity():
    _, gallery, _, _ = planted()
    similarity = gallery @ gallery.T
    np.fill_diagonal(similarity, 2.0)  # itself is first, whatever rounding says
    by_rank, by_score = np.zeros_like(gallery), np.zeros_like(gallery)
    for i, row in enumerate(similarity):
        for r, j in enumerate(np.argsort(-row)[:4]):
            by_rank[i] += (4 - r) / 4 * gallery[j]
            by_score[i] += (1.0 if r == 0 else max(row[j], 0) ** 2) * gallery[j]
    np.testing.assert_allclose(
        rerank.database_augmentation(gallery, 4), rerank.unit(by_rank), atol=1e-5
    )
    np.testing.assert_allclose(
        rerank.database_augmentation(gallery, 4, alpha=2.0), rerank.unit(by_score), atol=1e-5
    )


def test_augmentation_of_a_gallery_smaller_than_k_uses_what_is_there():
    gallery = planted()[1][:2]
    out = rerank.database_augmentation(gallery, 4)
    np.testing.assert_allclose(out[0], rerank.unit(gallery[:1] + 0.75 * gallery[1:])[0], atol=1e-6)


# -------------------------------------------------------------------------------------------------- k-reciprocal


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
    lists = search.top_k(queries, gallery, 40)[1]
    scores, ranks = rerank.transductive_k_reciprocal(
        queries, gallery, lists, k1=k1, k2=k2, weight=weight
    )
    assert (np.sort(ranks, 1) == np.sort(lists, 1)).all() and (ranks != lists).any()
    np.testing.assert_allclose(scores, np.take_along_axis(want, ranks, 1), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 1e-9).all()


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
    lists = search.top_k(queries, gallery, 40)[1]
    scores, ranks = rerank.k_reciprocal(queries, gallery, lists, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(scores, np.take_along_axis(want, ranks, 1), atol=1e-5)
    assert (ranks != lists).any()


def test_only_the_transductive_variant_looks_at_other_queries():
    queries, gallery, _, _ = planted()
    lists = search.top_k(queries, gallery, 30)[1]
    for function, blind in ((rerank.k_reciprocal, True), (rerank.transductive_k_reciprocal, False)):
        together, alone = (
            function(queries, gallery, lists),
            function(queries[:1], gallery, lists[:1]),
        )
        assert np.allclose(together[0][:1], alone[0], atol=1e-6) is blind


def test_weight_one_keeps_the_order_of_plain_search():
    queries, gallery, _, _ = planted()
    lists = search.top_k(queries, gallery, 30)
    scores, ranks = rerank.k_reciprocal(queries, gallery, lists[1], weight=1.0)
    assert (ranks == lists[1]).all()
    np.testing.assert_allclose(scores, lists[0], atol=1e-5)


def test_k_reciprocal_lifts_a_hard_ranking_and_pays_for_chunks_with_nothing(monkeypatch):
    queries, gallery, wanted, there = planted(60, 400)
    lists = search.top_k(queries, gallery, 100)[1]
    _, ranks = rerank.k_reciprocal(queries, gallery, lists)
    assert (there[ranks[:, :5]] == wanted[:, None]).mean() > (
        there[lists[:, :5]] == wanted[:, None]
    ).mean()
    monkeypatch.setattr(rerank, "CHUNK", 7)
    np.testing.assert_array_equal(rerank.k_reciprocal(queries, gallery, lists)[1], ranks)


def test_k_reciprocal_of_small_galleries_and_short_lists():
    queries, gallery, _, _ = planted(5, 8)
    lists = search.top_k(queries, gallery, 12)[1]  # four places are empty
    scores, ranks = rerank.k_reciprocal(queries, gallery, lists)
    assert (
        (ranks[:, 8:] == -1).all()
        and np.isneginf(scores[:, 8:]).all()
        and np.isfinite(scores[:, :8]).all()
    )
    with pytest.raises(
        ValueError, match="needs lists of k1=6 photos, got 5: search deeper or lower k1"
    ):
        rerank.k_reciprocal(queries, gallery, lists[:, :5], k1=6)
    for numbers in ({"k1": 0}, {"k2": 0}, {"weight": 1.5}):
        with pytest.raises(
            ValueError,
            match=r"k1 and k2 of at least 1 and a weight in 0..1, got .*: try 20, 6, 0.3",
        ):
            rerank.k_reciprocal(queries, gallery, lists, **numbers)


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(rerank).failed == 0
