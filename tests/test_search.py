import numpy as np
import pytest
import torch

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


def test_a_gallery_smaller_than_k_is_padded_with_minus_one():
    scores, ranks = search.top_k(vectors(2), vectors(3, seed=1), 5)
    assert (ranks[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    ids = np.array(["a", "b"])
    _, ranks = search.top_k(vectors(2), vectors(2), 2, query_ids=ids, gallery_ids=ids)
    assert ranks.tolist() == [[1, -1], [0, -1]]


def test_nan_embeddings_are_refused_with_row_and_remedy():
    bad = vectors(4)
    bad[2, 5] = np.nan
    with pytest.raises(
        ValueError, match=r"1 of 4 query embeddings hold NaN .*row 2.*learning rate"
    ):
        search.top_k(bad, vectors(5))
    with pytest.raises(ValueError, match="gallery embeddings hold NaN"):
        search.top_k(vectors(5), bad)


def test_unequal_widths_and_empty_galleries_are_refused():
    with pytest.raises(ValueError, match="16 dimensions, the gallery 8"):
        search.top_k(vectors(2), vectors(3, dim=8))
    with pytest.raises(ValueError, match="0 gallery rows"):
        search.top_k(vectors(2), np.zeros((0, 16), np.float32))
    with pytest.raises(ValueError, match="'hamming' is unknown"):
        search.top_k(vectors(2), vectors(3), distance="hamming")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_search_on_a_gpu_equals_the_cpu():
    queries, gallery = vectors(50), vectors(333, seed=1)
    on_gpu = search.top_k(queries, gallery, device="cuda")
    assert (on_gpu[1] == search.top_k(queries, gallery)[1]).all()
