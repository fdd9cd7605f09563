"""Metrics against hand-typed vectors, a slow loop, torchmetrics and pytorch-metric-learning."""

import doctest
import itertools

import numpy as np
import pytest

from vipr_utils.judge import metrics

# hits at ranks, n, then at k = 5: ours (min(n, k)), by hits found (h), by n, MRR, GUIE mP
VECTORS = [
    ([1], 14, 0.200, 1.000, 1 / 14, 1.0, 0.200),
    ([1, 2, 3, 4, 5], 14, 1.000, 1.000, 5 / 14, 1.0, 1.000),
    ([1, 4, 5], 3, 0.700, 0.700, 0.700, 1.0, 1 / 3),
    ([2], 1, 0.500, 0.500, 0.500, 0.5, 0.000),
    ([1, 3], 2, 5 / 6, 5 / 6, 5 / 6, 1.0, 0.500),
]
HITS = np.array([[rank in v[0] for rank in range(1, 6)] for v in VECTORS])
N = np.array([v[1] for v in VECTORS])
MEASURES = (
    metrics.average_precision_at_k,
    metrics.mrr_at_k,
    metrics.recall_at_k,
    metrics.guie_precision_at_k,
)


def column(i):
    return np.array([v[i] for v in VECTORS])


def random_problem(seed, queries=200, gallery=60, products=25, k=5):
    """Ranks without repeats over a gallery in which some queries' products are missing."""
    rng = np.random.default_rng(seed)
    query_ids, gallery_ids = rng.integers(0, products, queries), rng.integers(0, products, gallery)
    noise = rng.random((queries, gallery))  # the right products tend to come first
    order = np.argsort(noise - 0.5 * (gallery_ids == query_ids[:, None]), axis=1)
    return order[:, :k], query_ids, gallery_ids


def slow_apk(actual, predicted, k):
    """`apk` of benhamner/Metrics, Kaggle's scorer, word for word (None for an empty `actual`)."""
    if not actual:
        return None
    predicted = predicted[:k]
    score, num_hits = 0.0, 0.0
    for i, p in enumerate(predicted):
        if p in actual and p not in predicted[:i]:
            num_hits += 1.0
            score += num_hits / (i + 1.0)
    return score / min(len(actual), k)


def test_docstring_examples_hold():
    result = doctest.testmod(metrics)
    assert result.attempted >= 3 and result.failed == 0


def test_average_precision_divides_by_min_n_k_on_the_hand_checked_vectors():
    np.testing.assert_allclose(metrics.average_precision_at_k(HITS, N), column(2), rtol=1e-12)


def test_reciprocal_rank_matches_the_hand_checked_vectors():
    np.testing.assert_allclose(metrics.mrr_at_k(HITS, N), column(5), rtol=1e-12)
    assert metrics.mrr_at_k([[False] * 5], [3])[0] == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_five_ranks_count_where_no_number_is_asked_for(measure):
    hits = np.eye(7, dtype=bool)  # one hit each, at ranks 1 to 7
    found = measure(hits, [9] * 7)
    np.testing.assert_array_equal(found, measure(hits, [9] * 7, 5))
    assert (found > 0).tolist() == [True] * 5 + [False] * 2


def test_guie_precision_matches_the_hand_checked_vectors():
    np.testing.assert_allclose(metrics.guie_precision_at_k(HITS, N), column(6), rtol=1e-12)


def test_torchmetrics_divides_by_the_hits_found_and_agrees_only_when_all_are_found():
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("torchmetrics.functional.retrieval").retrieval_average_precision
    scores = torch.linspace(1.0, 0.1, 5)  # a score <= 0 would count as wrong there
    theirs = np.array([float(oracle(scores, torch.tensor(row), top_k=5)) for row in HITS])
    np.testing.assert_allclose(theirs, column(3), rtol=1e-6)
    ours = metrics.average_precision_at_k(HITS, N)
    same = np.isclose(ours, theirs)
    np.testing.assert_array_equal(same, HITS.sum(1) == np.minimum(N, 5))
    assert not same.all() and theirs[0] == 1.0 and ours[0] == pytest.approx(0.2)


def test_torchmetrics_agrees_on_random_lists_in_which_everything_is_found():
    torch = pytest.importorskip("torch")
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    rng, scores = np.random.default_rng(0), torch.linspace(1.0, 0.1, 8)
    hits = rng.random((50, 8)) < 0.4
    hits[:, 0] |= ~hits.any(1)
    n, rows = hits.sum(1), [torch.tensor(row) for row in hits]
    for ours, oracle in [
        (
            metrics.average_precision_at_k(hits, n, k=8),
            lambda row: retrieval.retrieval_average_precision(scores, row),
        ),
        (
            metrics.mrr_at_k(hits, n, k=8),
            lambda row: retrieval.retrieval_reciprocal_rank(scores, row),
        ),
        (
            metrics.recall_at_k(hits, n, k=3),
            lambda row: retrieval.retrieval_hit_rate(scores, row, top_k=3),
        ),
    ]:
        np.testing.assert_allclose(ours, [float(oracle(row)) for row in rows], rtol=1e-5)
    shares = [float(retrieval.retrieval_recall(scores, row, top_k=3)) for row in rows]
    assert not np.allclose(metrics.recall_at_k(hits, n, k=3), shares)  # hits / n is another recall


def pml_figure(name, ranks, query_ids, gallery_ids, k):
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch = pytest.importorskip("torch")

    def given_ranks(query, k, reference, ref_includes_query):
        return torch.zeros(ranks[:, :k].shape), torch.as_tensor(ranks[:, :k])

    oracle = calculator.AccuracyCalculator(
        include=(name,),
        k=k,
        device=torch.device("cpu"),
        knn_func=given_ranks,
        kmeans_func=lambda *a: None,
    )
    queries, gallery = np.zeros((len(query_ids), 1)), np.zeros((len(gallery_ids), 1))
    return oracle.get_accuracy(queries, query_ids, gallery, gallery_ids)[name]


def test_pytorch_metric_learning_divides_by_n_on_the_hand_checked_vectors():
    for row, n, expected in zip(HITS, N, column(4), strict=True):
        gallery_ids = np.array([7] * n + [8] * 10)  # n relevant rows, then others
        relevant, others = iter(range(n)), iter(range(n, n + 10))
        ranks = np.array([[next(relevant) if hit else next(others) for hit in row]])
        theirs = pml_figure("mean_average_precision", ranks, np.array([7]), gallery_ids, k=5)
        assert theirs == pytest.approx(expected, rel=1e-6)
        hits = metrics.hits_from_ranks(ranks, [7], gallery_ids)
        (ours,) = metrics.average_precision_at_k(hits, [n])
        assert ours == pytest.approx(theirs * n / min(n, 5))


def test_pytorch_metric_learning_agrees_while_n_is_at_most_k():
    ranks, query_ids, gallery_ids = random_problem(
        3, k=20
    )  # 60 rows of 25 products: n stays below 20
    hits = metrics.hits_from_ranks(ranks, query_ids, gallery_ids)
    n = metrics.count_relevant(query_ids, gallery_ids)
    assert 1 < n.max() <= 20 and (n == 0).any()
    theirs = pml_figure("mean_average_precision", ranks, query_ids, gallery_ids, k=20)
    ours = metrics.average_precision_at_k(hits, n, k=20)
    assert np.nanmean(ours) == pytest.approx(theirs)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_average_precision_equals_kaggles_slow_loop_with_repeats_and_short_lists(k):
    ranks, query_ids, gallery_ids = random_problem(1)
    ranks[::3, 2] = ranks[::3, 0]  # repeated ids
    ranks[::4, 3:] = -1  # short lists
    slow = [
        slow_apk(set(np.flatnonzero(gallery_ids == q)), [r for r in row if r >= 0], k)
        for q, row in zip(query_ids, ranks.tolist(), strict=True)
    ]
    hits = metrics.hits_from_ranks(ranks, query_ids, gallery_ids)
    n = metrics.count_relevant(query_ids, gallery_ids)
    ours = metrics.average_precision_at_k(hits, n, k)
    assert {None, 0, 1} <= set(slow) and (k == 1 or len(set(slow)) > 4)
    np.testing.assert_allclose(ours, [np.nan if s is None else s for s in slow], rtol=1e-12)


def test_a_repeated_gallery_row_scores_once_and_keeps_the_later_rank_empty():
    hits = metrics.hits_from_ranks([[2, 2, 0, 2, 0]], [7], [7, 8, 7])
    assert hits.tolist() == [[True, False, True, False, False]]
    assert metrics.average_precision_at_k(hits, [2])[0] == pytest.approx((1 + 2 / 3) / 2)


def test_rank_minus_one_never_hits_not_even_an_unknown_product():
    assert not metrics.hits_from_ranks([[-1, -1], [-1, 0]], [-1, 7], [-1]).any()
    assert metrics.hits_from_ranks([[-1, -1]], [7], []).tolist() == [[False, False]]


def test_an_unknown_product_matches_nothing_and_counts_nothing():
    assert not metrics.hits_from_ranks([[0, 1]], [-1], [-1, 3]).any()
    counted = metrics.count_relevant([-1, 3, 4], [-1, 3, 3])
    assert isinstance(counted, np.ndarray) and counted.tolist() == [0, 2, 0]


def test_query_without_relevant_image_is_excluded_and_counted():
    hits, n = [[True, False, False, False, False], [False] * 5, [False] * 5], [1, 0, 2]
    for measure in MEASURES:
        np.testing.assert_array_equal(measure(hits, n), [1, np.nan, 0])
    found = metrics.summary(hits, n, [10, 11, 12])
    assert (found["map_at_5"], found["n_queries"], found["n_excluded"], found["n_products"]) == (
        0.5,
        2,
        1,
        2,
    )
    assert found["definition"] == metrics.DEFINITION and "min(n, 5)" in metrics.DEFINITION


def test_summary_holds_the_means_of_the_single_measures_and_the_interval():
    found = metrics.summary(HITS, N, [1, 1, 2, 3, 3], seed=4)
    assert found["map_at_5"] == pytest.approx(column(2).mean())
    assert found["mrr_at_5"] == pytest.approx(0.9)
    assert found["precision_at_1"] == pytest.approx(0.8)
    assert found["recall_at_5"] == 1
    assert found["map_at_5_low"] < found["map_at_5"] < found["map_at_5_high"]
    interval = metrics.bootstrap_interval(column(2), [1, 1, 2, 3, 3], seed=4)
    assert (found["map_at_5_low"], found["map_at_5_high"]) == pytest.approx(interval)


@pytest.mark.filterwarnings("error")
def test_summary_of_nothing_counted_is_nan_without_a_warning():
    for hits, n in [(np.zeros((2, 5), bool), [0, 0]), (np.zeros((0, 5), bool), [])]:
        found = metrics.summary(hits, n, list(range(len(n))))
        assert np.isnan(found["map_at_5"]) and np.isnan(found["map_at_5_low"])
        assert (found["n_queries"], found["n_excluded"]) == (0, len(n))


def test_bootstrap_agrees_with_literally_drawing_products_and_pooling_their_queries():
    rng = np.random.default_rng(0)
    products = np.repeat(np.arange(30), rng.integers(1, 9, 30))
    values = rng.random(30)[products] * rng.random(len(products))
    members = [values[products == p] for p in range(30)]
    slow = [
        np.concatenate([members[p] for p in rng.integers(30, size=30)]).mean() for _ in range(4000)
    ]
    fast = metrics.bootstrap_interval(values, products, n_boot=4000, seed=1)
    np.testing.assert_allclose(fast, np.quantile(slow, [0.025, 0.975]), atol=0.05 * np.ptp(fast))


def test_bootstrap_agrees_with_the_normal_interval_for_independent_queries():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = metrics.bootstrap_interval(values, np.arange(2000), n_boot=2000)
    half = 1.96 * values.std() / np.sqrt(2000)
    np.testing.assert_allclose(
        [low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half
    )


def test_copies_of_a_products_queries_do_not_narrow_the_interval():
    values, products = np.random.default_rng(0).random(40), np.arange(40)
    once = metrics.bootstrap_interval(values, products)
    np.testing.assert_allclose(
        metrics.bootstrap_interval(np.tile(values, 9), np.tile(products, 9)), once
    )
    naive = metrics.bootstrap_interval(np.tile(values, 9), np.arange(360))
    assert 2 < np.ptp(once) / np.ptp(naive) < 4  # pretended independence: sqrt(9) too narrow


def test_bootstrap_repeats_with_its_seed_ignores_nan_and_takes_names_as_products():
    values, products = np.array([0.1, 0.5, np.nan, 0.9, 0.3]), np.array(["a", "b", "b", "c", "c"])
    first = metrics.bootstrap_interval(values, products, seed=3)
    assert first == metrics.bootstrap_interval(values, products, seed=3)
    assert first == metrics.bootstrap_interval(values[[0, 1, 3, 4]], products[[0, 1, 3, 4]], seed=3)
    many = np.random.default_rng(0).random(50)
    assert metrics.bootstrap_interval(many, np.arange(50), seed=3) != metrics.bootstrap_interval(
        many, np.arange(50), seed=4
    )


def test_interval_without_settings_is_that_of_a_thousand_draws_from_seed_0():
    values, products = np.random.default_rng(5).random(60), np.arange(60) // 3
    rng, members = np.random.default_rng(0), values.reshape(20, 3)
    means = [members[rng.integers(20, size=20)].mean() for _ in range(1000)]
    slow = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(metrics.bootstrap_interval(values, products), slow, rtol=1e-12)
    paired = metrics.paired_difference(values, np.zeros(60), products)
    np.testing.assert_allclose(paired[1:], slow, rtol=1e-12)
    hits = np.random.default_rng(6).random((60, 5)) < 0.3
    found = metrics.summary(hits, [5] * 60, products)
    interval = metrics.bootstrap_interval(metrics.average_precision_at_k(hits, [5] * 60), products)
    assert (found["map_at_5_low"], found["map_at_5_high"]) == interval


def test_seed_of_a_run_or_a_difference_is_that_of_its_interval():
    products = np.arange(60) // 3
    hits = np.random.default_rng(6).random((60, 5)) < 0.3
    values = metrics.average_precision_at_k(hits, [5] * 60)
    want = metrics.bootstrap_interval(values, products, seed=3)
    assert want != metrics.bootstrap_interval(values, products)
    assert metrics.paired_difference(values, np.zeros(60), products, seed=3)[1:] == want
    found = metrics.summary(hits, [5] * 60, products, seed=3)
    assert (found["map_at_5_low"], found["map_at_5_high"]) == want


def test_right_and_wrong_answers_of_two_runs_have_a_difference_too():
    found = metrics.paired_difference([True, True, False], [False, True, False], [1, 2, 3])
    assert found[0] == pytest.approx(1 / 3)


def test_one_product_alone_has_no_interval():
    assert np.isnan(metrics.bootstrap_interval([0.2, 0.4], [7, 7])).all()
    assert metrics.bootstrap_interval([0.2, 0.4], [7, 8]) == (0.2, 0.4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "n_gallery, k", [(1, 5), (2, 5), (2, 1), (6, 1), (6, 3), (6, 5), (4, 9), (8, 5)]
)
def test_chance_is_the_mean_over_all_orders_of_the_gallery(n_gallery, k):
    counts = [n for n in (1, 2, 4, n_gallery) if n <= n_gallery]
    means = []
    for n in counts:
        places = itertools.combinations(range(n_gallery), n)  # of the relevant photos
        lists = [[i if i in right else -1 - i for i in range(n_gallery)] for right in places]
        means.append(np.mean([slow_apk(range(n), relabelled(row, n), k) for row in lists]))
    found = metrics.chance_map_at_k([*counts, 0], n_gallery, k)
    assert isinstance(found, float) and found == pytest.approx(np.mean(means), rel=1e-12)
    if k == 5:
        assert metrics.chance_map_at_k(counts, n_gallery) == found
    assert np.isnan(metrics.chance_map_at_k([0, 0], n_gallery, k))


def relabelled(row, n):
    """The relevant of a list, which are not negative, as 0 to n - 1."""
    names = iter(range(n))
    return [next(names) if i >= 0 else i for i in row]


def test_paired_difference_sees_what_two_overlapping_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # hard queries are hard for both runs
    a, b, products = hard + 0.02 + 0.01 * rng.normal(size=300), hard, np.arange(300) // 3
    difference, low, high = metrics.paired_difference(a, b, products)
    assert 0 < low < difference < high
    assert difference == pytest.approx((a - b).mean())
    assert metrics.bootstrap_interval(a, products)[0] < metrics.bootstrap_interval(b, products)[1]
    mirrored = metrics.paired_difference(b, a, products)
    np.testing.assert_allclose(mirrored, [-difference, -high, -low], atol=1e-12)


def test_paired_difference_refuses_runs_that_count_other_queries():
    with pytest.raises(ValueError, match="counts 2 queries and b 1, expected the same queries"):
        metrics.paired_difference([0.1, 0.2], [0.1, np.nan], [1, 2])
    with pytest.raises(ValueError, match="same queries"):
        metrics.paired_difference([0.1, 0.2], [0.1], [1, 2])


@pytest.mark.parametrize(
    "hits, n, k, message",
    [
        ([True] * 5, [5], 5, r"hits has shape \(5,\).*expected .* of shape \(Q, 5\)"),
        ([[True] * 5], [5, 5], 5, r"cannot reshape array of size 2 into shape \(1,\)"),
        ([[True] * 5, [False] * 5], [5], 5, "cannot reshape array of size 1"),
        (
            [[True] * 3],
            [5],
            5,
            r"hits has shape \(1, 3\) .*expected True and False of shape \(Q, 5\) or wider",
        ),
        ([[False] * 5], [-1], 5, "query 0 has 0 hits but n_relevant = -1"),
        ([[0.3, 0, 0, 0, 0]], [1], 5, "type float64, expected True and False .* not scores"),
        ([[1, 0, 0, 0, 0]], [1], 5, "type int64, expected True and False"),
        (
            [[False] * 5, [True, True, False, False, False]],
            [0, 1],
            5,
            "query 1 has 2 hits but n_relevant = 1",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_value_expectation_and_remedy(hits, n, k, message):
    for measure in MEASURES:
        with pytest.raises(ValueError, match=message):
            measure(hits, n, k)


@pytest.mark.parametrize(
    "ranks, query_ids, gallery_ids, message",
    [
        ([[0, 3]], [7], [7, 8, 9], r"ranks run from 0 to 3, expected -1 to 2 for 3 rows"),
        ([[-2, 0]], [7], [7, 8, 9], "ranks run from -2 to 0"),
        ([[0], [1]], [7], [7, 8, 9], "cannot reshape array of size 1"),
    ],
)
def test_ranks_and_ids_that_do_not_fit_are_refused(ranks, query_ids, gallery_ids, message):
    with pytest.raises(ValueError, match=message):
        metrics.hits_from_ranks(ranks, query_ids, gallery_ids)
