"""Search by FAISS: the same lists as by torch, or approximate ones and how much they lack."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from vipr_utils.retrieve import by_faiss, search

faiss = pytest.importorskip("faiss")
ROWS = 6_000  # of an index of 155 lists


def clustered(n, of, dim=32, seed=0, noise=1.5):
    """(n, dim) float32 of length 1 about `of` centres."""
    centres = np.random.default_rng(7).standard_normal((of, dim))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, of, n)] + noise * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small(monkeypatch):
    """An index of few rows with short codes, which is built in a second."""
    monkeypatch.setattr(by_faiss, "LEAST_ROWS", 1000)
    monkeypatch.setattr(by_faiss, "CODE", 16)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("k", [1, 5, 400])
def test_faiss_finds_what_torch_finds(distance, k):
    queries, gallery = 3 * clustered(40, 20), 2 * clustered(333, 20, seed=1)
    names = np.array([f"photo {i}" for i in range(333)])
    ids = {"query_ids": names[:40], "gallery_ids": names}
    wanted = search.top_k(queries, gallery, k, distance=distance, **ids)
    found = search.top_k(queries, gallery, k, distance=distance, engine="faiss", **ids)
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-3 if distance == "euclidean" else 1e-5)
    assert (found[1] == wanted[1]).mean() > 0.999  # nearly equal scores may change places
    np.testing.assert_array_equal(found[1] < 0, wanted[1] < 0)
    assert not (found[1] == np.arange(40)[:, None]).any()


@pytest.mark.parametrize("engine", ["faiss", "ivfpq"])
def test_no_queries_and_queries_without_an_id_are_searched_too(small, engine):
    gallery = clustered(1200, 300)
    scores, rows = search.top_k(gallery[:0], gallery, 5, engine=engine)
    assert scores.shape == rows.shape == (0, 5)
    ids = {"query_ids": np.array([None, "a"]), "gallery_ids": np.array([None] * 1199 + ["a"])}
    _, rows = search.top_k(gallery[[0, 1199]], gallery, 5, engine="faiss", **ids)
    assert rows[0, 0] == 0 and 1199 not in rows[1]


def test_environment_asks_for_an_engine(monkeypatch):
    monkeypatch.setenv("VIPR_SEARCH", "faiss")
    asked = []
    monkeypatch.setattr(by_faiss, "exact", lambda *given: asked.append(given) or exact(*given))
    search.top_k(clustered(3, 2), clustered(9, 2), 5)
    assert len(asked) == 1
    search.top_k(clustered(3, 2), clustered(9, 2), 5, engine="torch")
    assert len(asked) == 1


exact = by_faiss.exact


def test_unknown_engine_and_missing_faiss_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"'annoy' is unknown.*VIPR_SEARCH.*'ivfpq'"):
        search.top_k(clustered(3, 2), clustered(9, 2), engine="annoy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        search.top_k(clustered(3, 2), clustered(9, 2), engine="ivfpq")


@pytest.mark.parametrize("dim", [32, pytest.param(97, marks=pytest.mark.long)])
def test_index_finds_most_of_the_nearest_and_says_how_many(dim, small):
    queries, gallery = clustered(120, 300, dim), clustered(ROWS, 300, dim, seed=1)
    with pytest.warns(UserWarning, match=r"approximate: it finds [\d.]+% of the 10 nearest"):
        scores, rows = search.top_k(queries, gallery, 10, engine="ivfpq")
    wanted, nearest = search.top_k(queries, gallery, 10)
    recall = by_faiss.recall(rows, nearest)
    assert recall >= by_faiss.ENOUGH - 0.02
    # scores are of the vectors, not of their codes
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, gallery[rows]), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all() and (scores <= wanted + 1e-6).all()


def test_recall_is_of_what_is_found_not_of_what_is_hoped(small, monkeypatch):
    gallery = clustered(ROWS, 300, seed=1)
    approximate = by_faiss.Index(gallery)
    queries = clustered(100, 300)
    monkeypatch.setattr(by_faiss, "ENOUGH", 0.01)  # four lists are enough
    with pytest.warns(UserWarning, match="4 of 155 lists"):
        approximate.tune(queries, 10)
    found = approximate.search(queries, 10)[1]
    wanted = exact(queries, gallery, 10)[1]
    assert approximate.recall == pytest.approx(
        np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found)])
    )
    assert approximate.recall < 0.95


def test_a_gallery_on_disk_is_searched_where_it_lies(tmp_path, small):
    np.save(tmp_path / "gallery.npy", clustered(ROWS, 300, seed=1))
    gallery = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    queries = clustered(50, 300)
    for engine in ("torch", "faiss"):
        _, rows = search.top_k(queries, gallery, 5, engine=engine)
        np.testing.assert_array_equal(rows, search.top_k(queries, np.array(gallery), 5)[1])
    with pytest.warns(UserWarning, match="approximate"):
        search.top_k(queries, gallery, 5, engine="ivfpq")


def test_a_query_never_meets_itself_in_an_index(small):
    gallery = clustered(ROWS, 300)
    ids = np.arange(ROWS)
    with pytest.warns(UserWarning, match="approximate"):
        _, rows = search.top_k(gallery, gallery, 5, query_ids=ids, gallery_ids=ids, engine="ivfpq")
    assert not (rows == ids[:, None]).any() and (rows >= 0).all()


def test_faiss_is_not_loaded_unless_it_is_asked_for():
    code = (
        "import sys, numpy as np; from vipr_utils.retrieve import search;"
        "search.top_k(np.eye(8), np.eye(8)); sys.exit('faiss' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exported_index_says_what_it_finds_by_itself(tmp_path, small):
    gallery = clustered(ROWS, 300, seed=1)
    assert by_faiss.export(gallery, tmp_path / "flat") == 1.0
    with pytest.warns(UserWarning, match="approximate"):
        told = by_faiss.export(gallery, tmp_path / "codes", "ivfpq")
    read = faiss.read_index(str(tmp_path / "codes"))
    some = gallery[:: ROWS // 200]
    found, wanted = read.search(some, 10)[1], exact(some, gallery, 10)[1]
    assert told == pytest.approx(by_faiss.recall(found, wanted)) and 0.2 < told < 1
    assert (tmp_path / "codes").stat().st_size < 0.5 * (tmp_path / "flat").stat().st_size
    with pytest.raises(ValueError, match="use 'flat' or 'ivfpq'"):
        by_faiss.export(gallery, tmp_path / "x", "hnsw")
