"""Steps as calls: how they are read, refused, and run one after the other."""

import doctest
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_rerank import planted

from vipr_utils.retrieve import pipeline, rerank, verification
from vipr_utils.retrieve.search import Search, top_k


def table(products, name: str = "train") -> pd.DataFrame:
    ids = [f"{name}/{i}.jpg" for i in range(len(products))]
    return pd.DataFrame({"image_id": ids, "product_id": products})


def searched(steps, queries, gallery, products=None, *, query_rows=None, **sizes):
    """The lists of these steps, and their seconds."""
    gallery_rows = table(np.zeros(len(gallery), int) if products is None else products)
    rows = table(np.full(len(queries), -1), "test") if query_rows is None else query_rows
    return pipeline.apply(steps, Search(queries, gallery, rows, gallery_rows), **sizes)


def test_no_step_is_plain_search():
    queries, gallery, _, _ = planted()
    (found, seconds), want = searched([], queries, gallery), top_k(queries, gallery, 5)
    np.testing.assert_array_equal(found.ranks, want[1])
    np.testing.assert_allclose(found.scores, want[0], atol=1e-6)
    assert [row["step"] for row in seconds] == ["search"]


def test_steps_are_their_functions_one_after_the_other():
    queries, gallery, _, _ = planted()
    rows = table(np.full(len(queries), -1), "test"), table(np.zeros(len(gallery), int))
    want = rerank.whitening(Search(queries, gallery, *rows), 8, power=0.5)
    want = rerank.database_augmentation(want, 3).searched(40)
    want = rerank.alpha_query_expansion(want, 5, alpha=3.0)
    want = rerank.k_reciprocal(want, k1=10, k2=3, weight=0.4)
    steps = [
        "whitening(dim=8, power=0.5)",
        "database_augmentation(3)",
        "alpha_query_expansion(k=5, alpha=3)",
        "k_reciprocal(10, 3, weight=0.4)",
    ]
    found, seconds = searched(steps, queries, gallery, k=9, depth=40)
    np.testing.assert_array_equal(found.ranks, want.ranks[:, :9])
    np.testing.assert_allclose(found.scores, want.scores[:, :9], atol=1e-5)
    assert [row["step"] for row in seconds] == [*steps[:2], "search", *steps[2:]]
    assert all(row["seconds"] >= 0 for row in seconds)


NUMBERS = {
    "centring": "",
    "pca": "6",
    "whitening": "6",
    "learned_whitening": "6",
    "database_augmentation": "3",
    "average_query_expansion": "3",
    "alpha_query_expansion": "3",
    "k_reciprocal": "8, 3",
    "transductive_k_reciprocal": "8, 3",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_query_meets_itself_whatever_the_step_and_k_may_pass_the_gallery(name):
    _, gallery, _, products = planted()
    rows = table(products)
    steps = [f"{name}({NUMBERS[name]})"]
    found, _ = searched(steps, gallery, gallery, products, query_rows=rows, k=95)
    assert found.ranks.shape == (90, 95) and (found.ranks[:, 89:] == -1).all()
    assert not (found.ranks == np.arange(90)[:, None]).any()
    assert all(len(set(row[:89])) == 89 for row in found.ranks.tolist())
    assert (np.diff(found.scores[:, :89], axis=1) <= 0).all()


def test_verification_sorts_the_head_of_the_list_and_its_expansion_searches_again(monkeypatch):
    queries, gallery, _, _ = planted()
    seen = {}

    def inlier_counts(query_rows, gallery_rows, pairs, cache_dir):
        """The last of each list has the most."""
        seen["pairs"], depth = len(pairs), len(pairs) // len(queries)
        return 15 + np.arange(len(pairs)) % depth

    monkeypatch.setattr(verification, "_inlier_counts", inlier_counts)
    found, _ = searched(["verify(top=20)"], queries, gallery, k=3, depth=30)
    assert seen == {"pairs": 20 * len(queries)}
    lists = top_k(queries, gallery, 30)[1]
    np.testing.assert_array_equal(found.ranks, lists[:, 19:16:-1])
    searched(["verify(top=40)"], queries, gallery, depth=30)
    assert seen == {"pairs": 40 * len(queries)}, "lists as long as they are verified"
    found, _ = searched(["verified_expansion(k=2)"], queries, gallery, depth=30)
    again = rerank.unit(queries + gallery[lists[:, -2:]].sum(1))
    np.testing.assert_array_equal(found.ranks, top_k(again, gallery, 5)[1])


def partly(answers, products):
    """(a Search of the planted gallery that may answer these rows, one without the others)."""
    queries, gallery, _, _ = planted()
    rows = table(np.full(len(queries), -1), "test"), table(products)
    found = Search(queries, gallery, *rows, answers=answers)
    may = np.flatnonzero(answers)
    alone = replace(
        found, gallery=gallery[may], gallery_rows=found.gallery_rows.iloc[may], answers=None
    )
    return found, alone


@pytest.mark.parametrize("steps", [[], ["alpha_query_expansion(0, 3)"], ["k_reciprocal(8, 3, 1)"]])
def test_only_what_may_be_answered_comes_out_and_never_twice(steps):
    answers = np.arange(90) % 3 > 0
    found, alone = partly(answers, np.zeros(90, int))
    lists, _ = pipeline.apply(steps, found, k=60)
    want, _ = pipeline.apply([], alone, k=60)
    np.testing.assert_array_equal(lists.ranks, want.ranks)
    np.testing.assert_allclose(lists.scores, want.scores, atol=1e-6)
    assert lists.gallery_rows.equals(want.gallery_rows)


def test_votes_of_what_may_not_be_answered_decide_which_answer_comes_first():
    _, _, asked, products = planted()
    answers = np.arange(90) % 3 > 0
    found, alone = partly(answers, products)
    voted, _ = pipeline.apply(["product_votes(5)"], found)
    for q, row in enumerate(voted.ranks):
        similarity = found.gallery @ found.queries[q]
        nearest = np.argsort(-similarity)
        gained = np.zeros(12)
        np.add.at(gained, products[nearest[:5]], similarity[nearest[:5]].clip(0) ** 3)
        ordered = sorted(nearest[answers[nearest]], key=lambda g: -gained[products[g]])
        assert found.gallery_rows.index[answers][row].tolist() == ordered[:5]
    by_themselves, _ = pipeline.apply(["product_votes(5)"], alone)
    assert not np.array_equal(by_themselves.ranks, voted.ranks)


def test_photos_are_compared_with_what_may_be_answered_alone(monkeypatch):
    compared = []

    def inlier_counts(query_rows, gallery_rows, pairs, cache_dir):
        compared.extend(pairs[:, 1])
        return np.zeros(len(pairs), int)

    monkeypatch.setattr(verification, "_inlier_counts", inlier_counts)
    answers = np.arange(90) % 3 > 0
    _, _, _, products = planted()
    found, _ = partly(answers, products)
    steps = ["product_votes(5)", "verify(7)", "product_votes(3)"]
    lists, seconds = pipeline.apply(steps, found)
    assert [row["step"] for row in seconds] == ["search", steps[0], "narrow", *steps[1:]]
    assert set(compared) <= set(np.flatnonzero(answers)) and len(compared) == 7 * len(found.queries)
    assert lists.ranks.shape == (30, 5) and (lists.ranks >= 0).all()


def test_pairs_that_a_step_verifies_are_its_top_or_the_whole_list():
    assert (
        pipeline.verified_pairs(["verify(20)"]) == pipeline.verified_pairs(["verify(top=20)"]) == 20
    )
    assert pipeline.verified_pairs(["verify(0)"]) == pipeline.DEPTH
    assert pipeline.verified_pairs(["verified_expansion(3)"]) == pipeline.DEPTH
    assert pipeline.verified_pairs(["verify(20)", "verified_expansion(3)"]) == 20
    assert pipeline.verified_pairs(["product_votes(3)"]) == 0


def test_what_was_verified_is_forgotten_once_the_lists_change():
    queries, gallery, _, _ = planted()
    rows = table(np.full(len(queries), -1), "test"), table(np.zeros(len(gallery), int))
    found = Search(queries, gallery, *rows).searched(30)
    marked = replace(found, inliers=np.zeros(found.ranks.shape))
    assert marked.searched(30).inliers is None
    for step in ("k_reciprocal(8, 3)", "alpha_query_expansion(5)"):
        assert pipeline.bind(step)(marked).inliers is None


@pytest.mark.parametrize(
    "step", ["sharpen(64)", "pca", "aqe:5:3", "pca(dim=x)", "import os", "pca(64", "os.system('x')"]
)
def test_what_is_no_step_is_answered_with_those_there_are(step):
    with pytest.raises(ValueError, match=r"is unknown: write one as a call, of centring\(\), pca"):
        pipeline.bind(step)


@pytest.mark.parametrize(
    "step, problem",
    [
        ("pca()", r"missing a required argument: 'dim'; expected pca\(dim: int\)"),
        ("pca(64, 2)", r"too many positional arguments; expected pca\(dim: int\)"),
        ("pca(size=64)", r"expected pca\(dim: int\)"),
        ("pca(-4)", r"dim=-4, expected pca\(dim: int\) with a whole number >= 0"),
        ("pca(5.5)", r"dim=5.5, expected pca\(dim: int\) with a whole number >= 0"),
        ("pca(True)", "dim=True"),
        ("pca('64')", "dim='64'"),
        ("alpha_query_expansion(3, alpha=1e999)", "alpha=inf, .* with a number >= 0"),
    ],
)
def test_wrong_numbers_are_answered_with_the_signature(step, problem):
    with pytest.raises(ValueError, match=problem):
        pipeline.check([step])


def test_steps_that_cannot_be_are_refused_with_the_remedy():
    queries, gallery, _, products = planted()
    steps = ["centring()", "average_query_expansion(5)", "pca(4)"]
    with pytest.raises(
        ValueError,
        match=r"'pca\(4\)' changes the embeddings but stands behind 'average.*put it first",
    ):
        pipeline.check(steps)
    with pytest.raises(ValueError, match="gallery embeddings hold NaN"):
        searched(["whitening(4)"], queries, np.full_like(gallery, np.nan))
    with pytest.raises(ValueError, match="k1 and k2 of at least 1"):
        searched(["k_reciprocal(k1=0)"], queries, gallery)


def test_words_for_tables_and_what_steps_look_at():
    steps = ["centring()", "pca(8)", "database_augmentation(2)", "transductive_k_reciprocal()"]
    assert [pipeline.method(step) for step in steps[1:]] == [
        "PCA",
        "database augmentation",
        "k-reciprocal (transductive)",
    ]
    assert pipeline.fitted_first(steps) == 2 and pipeline.fitted_first(["pca(8)"]) == 1
    assert pipeline.fitted_first([]) == pipeline.fitted_first(steps[2:]) == 0
    assert pipeline.split("a(1) + b(2)") == ["a(1)", "b(2)"] and pipeline.split("") == []
    assert pipeline.transductive(steps) and not pipeline.transductive(steps[:3])


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(pipeline).failed == 0
