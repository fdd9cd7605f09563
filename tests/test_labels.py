"""What neighbours say: products, confidence, strangers, clusters and labels that spread."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.semi_supervised import LabelSpreading

from vipr_utils.retrieve import labels
from vipr_utils.retrieve.rerank import unit
from vipr_utils.retrieve.search import top_k


def blobs(of, each, dim=16, noise=0.2, seed=0):
    """(vectors (of * each, dim) of length 1, labels)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(of, dim))
    products = np.repeat(np.arange(of), each)
    x = centres[products] + noise * rng.normal(size=(len(products), dim)) * np.sqrt(dim) / 4
    return unit(x.astype(np.float32)), products


def test_votes_are_those_of_a_plain_loop():
    rng = np.random.default_rng(1)
    products = rng.integers(0, 4, 30)
    scores = -np.sort(-rng.uniform(-0.2, 1, (300, 7)), axis=1)
    ranks = rng.permuted(np.tile(np.arange(30), (300, 1)), axis=1)[:, :7]
    ranks[::5, 4:] = -1
    found = labels.vote(scores, ranks, products, alpha=2.0)
    for q in range(300):
        votes, best = {}, {}
        for score, row in zip(scores[q], ranks[q]):
            if row >= 0:
                votes[products[row]] = votes.get(products[row], 0) + max(score, 0) ** 2
                best.setdefault(products[row], score)
        winner = found.product[q]
        assert votes[winner] == pytest.approx(max(votes.values()))
        assert found.share[q] == pytest.approx(votes[winner] / max(sum(votes.values()), 1e-12))
        assert found.similarity[q] == pytest.approx(best[winner])
        others = max([b for product, b in best.items() if product != winner], default=-1)
        assert found.margin[q] == pytest.approx(best[winner] - others, abs=1e-5)


def test_evidence_is_share_similarity_and_margin_of_lists_counted_by_hand():
    scores = np.array([[0.75, 0.5, 0.25], [0.5, 0.5, 0.25]])
    found = labels.vote(scores, np.array([[0, 1, 2], [2, 0, 1]]), np.array([7, 7, 8]), alpha=1.0)
    assert found.product.tolist() == [7, 7]
    np.testing.assert_allclose(
        found.evidence, [[1.25 / 1.5, 0.75, 0.75 - 0.25], [0.75 / 1.25, 0.5, 0.5 - 0.5]], atol=1e-6
    )


def test_empty_lists_name_no_product():
    found = labels.vote(np.full((2, 3), -np.inf), np.full((2, 3), -1), np.arange(4))
    assert found.product.tolist() == [-1, -1] and found.share.tolist() == [0, 0]
    assert labels.vote(np.zeros((0, 3)), np.zeros((0, 3), int), np.arange(4)).product.shape == (0,)


def test_confidence_is_the_share_that_is_true():
    rng = np.random.default_rng(0)
    evidence = rng.uniform(0, 1, (20_000, 3)) * [1, 0.1, 10]
    true = rng.random(20_000) < 1 / (1 + np.exp(-(evidence @ [3, 20, -0.5] - 1)))
    fitted = labels.Confidence.fit(evidence[:10_000], true[:10_000])
    found = fitted(evidence[10_000:])
    assert labels.calibration_error(found, true[10_000:]) < 0.02
    np.testing.assert_allclose(fitted.coefficients, [3, 20, -0.5], rtol=0.2)
    assert labels.calibration_error(found**3, true[10_000:]) > 0.1


@pytest.mark.parametrize("true, low, high", [([True] * 9, 0.9, 0.99), ([False] * 9, 0.01, 0.1)])
def test_confidence_of_what_is_always_so_stays_short_of_certainty(true, low, high):
    found = labels.Confidence.fit(np.random.default_rng(0).random((9, 3)), true)(np.ones((1, 3)))
    assert low <= found[0] <= high


def test_calibration_error_is_torchmetrics():
    rng = np.random.default_rng(3)
    confidence, right = rng.random(500), rng.random(500) < 0.7
    classification = pytest.importorskip("torchmetrics.classification")
    oracle = classification.BinaryCalibrationError(n_bins=15, norm="l1")
    wanted = oracle(torch.from_numpy(confidence), torch.from_numpy(right.astype(int)))
    assert labels.calibration_error(confidence, right) == pytest.approx(wanted.item(), abs=1e-6)
    assert labels.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_coverage_answers_the_surest_first():
    curve = labels.coverage_curve(np.array([0.2, 0.9, 0.5, 0.7]), np.array([0, 1, 0, 1], bool))
    assert curve["coverage"].tolist() == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(curve["accuracy"], [1, 1, 2 / 3, 0.5])


def test_strangers_are_told_from_products_that_are_there():
    x, products = blobs(40, 12)
    asked, _ = blobs(40, 12, seed=1)
    there = products < 30
    gallery, known = x[there], products[there]
    judge = labels.judge(asked[there][::2], known[::2], gallery, known)
    votes = labels.vote(*top_k(asked[1::2], gallery, 10), known)
    (confidence, found), truly = judge(votes), there[1::2]
    assert found[truly].mean() == pytest.approx(0.95, abs=0.05)
    assert found[~truly].mean() < 0.2
    right = (votes.product == products[1::2])[truly]
    assert labels.calibration_error(confidence[truly], right) < 0.05


def test_clusters_find_planted_products_with_and_without_their_number():
    x, products = blobs(12, 10, noise=0.1)
    for found in (labels.clusters(x, 12), labels.clusters(x)):
        scores = labels.cluster_scores(found, products)
        assert scores["adjusted_rand"] > 0.95 and scores["nmi"] > 0.95
        pairs = np.triu_indices(len(x), 1)
        same = [(a[:, None] == a[None])[pairs] for a in (products, found)]
        assert scores["pairwise_f1"] == pytest.approx(f1_score(*same))
    assert (labels.clusters(x) >= 0).all()


def test_photos_of_no_cluster_are_alone():
    x, _ = blobs(4, 10, noise=0.05)
    lonely = unit(np.random.default_rng(5).normal(size=(2, 16)).astype(np.float32))
    found = labels.clusters(np.concatenate([x, lonely]))
    assert all((found == number).sum() == 1 for number in found[-2:])


@pytest.mark.parametrize("k", [3, 10])
def test_labels_spread_as_scikit_learn_spreads_them(k):
    x, products = blobs(6, 15, noise=0.5)
    known = np.full(len(x), -1)
    known[::15] = products[::15]
    itself = np.arange(len(x))
    scores, ranks = top_k(x, x, k, query_ids=itself, gallery_ids=itself)
    weights = np.zeros((len(x), len(x)))
    np.put_along_axis(weights, ranks, scores.clip(0) ** 3, axis=1)
    weights = np.maximum(weights, weights.T)
    oracle = LabelSpreading(kernel=lambda a, b: weights, alpha=0.9, max_iter=30, tol=0)
    with pytest.warns(UserWarning, match="max_iter"):
        oracle.fit(x, known)
    found = labels.propagate(x, known, k=k, alpha=0.9, rounds=30)
    given = known >= 0
    assert (found[given] == products[given]).all()
    np.testing.assert_array_equal(found[~given], oracle.transduction_[~given])
    assert (found == products).mean() > 0.8


def test_labels_of_any_number_spread_and_what_none_reaches_stays_unknown():
    x = np.zeros((8, 4), np.float32)
    x[:4, :2] = unit(np.random.default_rng(0).random((4, 2)) + 0.5)
    x[4:, 2:] = unit(np.random.default_rng(1).random((4, 2)) + 0.5)
    found = labels.propagate(x, np.array([700, -1, -1, -1, -1, -1, -1, -1]), k=2)
    assert found.tolist() == [700] * 4 + [-1] * 4


def test_few_labels_a_row_are_kept():
    x, products = blobs(30, 6, noise=0.8)
    known = np.where(np.arange(len(x)) % 6 == 0, products, -1)
    few = labels.MOST_LABELS
    whole = labels.propagate(x, known)
    labels.MOST_LABELS = 5
    try:
        assert (labels.propagate(x, known) == whole).mean() > 0.97
    finally:
        labels.MOST_LABELS = few
