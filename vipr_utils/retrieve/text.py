"""How much of what is printed on two photos is the same, and lists ordered by that as well.

Words become n-grams of characters, so that a misread letter costs little and neither order nor
language matters; an n-gram of few photos weighs more (tf-idf over the gallery).

Its place is plain search and variants that a word tells apart; beside learned whitening, zooms and
verification nothing sure was gained on the grocery set (RESULTS.md).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from vipr_utils.retrieve.reading import MOST_CHARACTERS, Line, lines
from vipr_utils.retrieve.search import Search

NGRAMS = (3, 3)  # characters
PRICE = re.compile(r"\d+([.,:]\d+)?\s*(kr|kg|g|ml|l|cl|st|%|€|\$|:-)?(/\w+)?", re.I)
OF_PRICE = 0.1  # what a line that is a price, a weight or a number counts of another
LITTLE = 3.0  # length of a photo's tf-idf at which what it says counts half
LEAST = 0.5  # of a query's, in n-grams that one photo alone has, for its list to change
JOINED = 20  # photos that join a list by their text
SAME = 0.75  # of the letters of two words, for them to be shown as the same
CHUNK = 256  # queries worked on at once


def read(search: Search, weight: float, top: int = 0) -> Search:
    """With lists in the order of score + weight * the cosine of what is printed on both photos.

    top 0 reads the whole gallery, and the JOINED photos whose text is most like the query's join
    its list; else photos among the first `top` of some list alone are read. A query on which
    nothing is read keeps its list as it is. Raises ValueError where the extra `text` is not
    installed.
    """
    size = len(search.gallery)
    if top:
        heads = search.ranks[:, :top]
        needed = np.unique(heads[heads >= 0])
    else:
        needed = np.arange(size)
    asked = lines(search.query_rows, cache_dir=search.cache_dir)
    known = lines(search.gallery_rows.iloc[needed], cache_dir=search.cache_dir)
    queries, seen = vectors(asked, known)
    gallery = _spread(needed, np.ones(len(needed)), size) @ seen  # rows that were not read are zero

    if not top:
        near = _nearest(queries, gallery)
        search = _joined(search, near)
    q, at = np.nonzero(search.ranks >= 0)
    alike = _cosines(queries, gallery, q, search.ranks[q, at])
    scores = search.scores.copy()
    scores[q, at] += weight * alike
    return search.sorted_by(scores)


def vectors(
    queries: list[list[Line]], gallery: list[list[Line]]
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """tf-idf of n-grams of both sides, (Q, V) and (G, V): of length 1 where much is printed,
    shorter where it is little, zero where nothing is read or a query says no more than LEAST.

    A line counts by its `evidence`, and two letters on a photo are no sure match: so fruit above a
    shelf's tag keeps its list. LITTLE, LEAST, OF_PRICE and the powers in `evidence` were chosen on
    held-out train photos of the grocery set, where n-grams of 2 to 5 characters differ by 0.01 of
    mAP@5.
    """
    counter = CountVectorizer(analyzer="char_wb", ngram_range=NGRAMS, strip_accents="unicode")
    try:
        counter.fit(line.text for photo in gallery for line in photo)
    except ValueError:  # nothing is printed
        return tuple(sparse.csr_array((len(side), 1)) for side in (queries, gallery))

    known = _counts(gallery, counter)
    asked = _counts(queries, counter)
    weighed = TfidfTransformer(norm=None).fit(known)
    least = LEAST * weighed.idf_.max()
    return _shortened(weighed.transform(asked), least), _shortened(weighed.transform(known), 0.0)


def _shortened(weighed, least: float) -> sparse.csr_array:
    """(N, V) tf-idf with rows of length n / (n + LITTLE), where n is theirs, or 0 up to least."""
    weighed = sparse.csr_array(weighed)
    lengths = np.sqrt(weighed.power(2).sum(axis=1))
    factors = np.where(lengths > least, 1 / (lengths + LITTLE), 0.0)
    return (sparse.diags_array(factors) @ weighed).tocsr()


def _counts(photos: list[list[Line]], counter: CountVectorizer) -> sparse.csr_array:
    """(N, V) of each photo's n-grams, each counted by the evidence of its line.

    The n-grams of every line are counted first, then the lines of a photo are added, weighed.
    """
    printed = [line for photo in photos for line in photo]
    owners = np.repeat(np.arange(len(photos)), [len(photo) for photo in photos])
    weights = np.array([evidence(line) for line in printed])

    words = sparse.csr_array(counter.transform(line.text for line in printed))
    return _spread(owners, weights, len(photos)) @ words


def _spread(rows: np.ndarray, weights: np.ndarray, height: int) -> sparse.csr_array:
    """(height, N): a product with it adds row i of N to row rows[i], times its weight.

    Rows that none of rows (N,) names are zero.
    """
    columns = np.arange(len(rows))
    return sparse.csr_array((weights, (rows, columns)), (height, len(rows)))


def evidence(line: Line) -> float:
    """What a line counts, 0..1: less the less sure it is and the nearer to the photo's border,
    where shelves and other packages are; little if it is a price or a weight, whose tag stands
    under many products.
    """
    left, top, right, bottom = line.box
    across = abs(left + right - 1)  # 0 in the middle, 1 at the border
    down = abs(top + bottom - 1)
    inside = 1 - min(max(across, down), 1.0)
    price = PRICE.fullmatch(line.text.strip())
    kind = OF_PRICE if price else 1.0
    return kind * line.confidence**2 * inside**2


def words(
    queries: pd.DataFrame, gallery: pd.DataFrame, ranks: np.ndarray, *, cache_dir: Path | None
) -> np.ndarray:
    """(Q, k) of what is printed on a query and on each photo of its list, as on the photo: up to
    MOST_CHARACTERS of words with blanks between, '' for none.

    ranks (Q, k): rows of the gallery, -1 for none. Raises ValueError where the extra `text` is not
    installed.
    """
    shown = np.unique(ranks[ranks >= 0])
    known = dict(zip(shown, lines(gallery.iloc[shown], cache_dir=cache_dir)))
    found = [
        [" ".join(shared(asked, known.get(row, [])))[:MOST_CHARACTERS] for row in listed]
        for asked, listed in zip(lines(queries, cache_dir=cache_dir), ranks)
    ]
    return np.array(found, dtype=object).reshape(ranks.shape)


def shared(query: list[Line], photo: list[Line]) -> list[str]:
    """Words on the photo that stand on the query too, a misread letter or two aside."""
    asked = [word.casefold() for line in query for word in _words(line)]
    on_photo = dict.fromkeys(word for line in photo for word in _words(line))
    return [
        word
        for word in on_photo
        if difflib.get_close_matches(word.casefold(), asked, n=1, cutoff=SAME)
    ]


def _words(line: Line) -> list[str]:
    """Of a line that is no price or weight, those of two characters or more."""
    if PRICE.fullmatch(line.text.strip()):
        return []
    return [word for word in line.text.split() if len(word) > 1]


def _cosines(
    queries: sparse.csr_array, gallery: sparse.csr_array, q: np.ndarray, g: np.ndarray
) -> np.ndarray:
    """(M,) of query row q and gallery row g, both (M,).

    Pairs of a query on which nothing is read stay zero, and the others are taken in parts: so what
    is in memory at once does not grow with the lists.
    """
    found = np.zeros(len(q), np.float32)
    worded = np.flatnonzero(np.diff(queries.indptr)[q])
    for part in np.array_split(worded, len(worded) // 2**16 + 1):
        found[part] = queries[q[part]].multiply(gallery[g[part]]).sum(axis=1)
    return found


def _nearest(queries: sparse.csr_array, gallery: sparse.csr_array) -> np.ndarray:
    """(Q, JOINED) gallery rows with the likest text, -1 where no more have any of it.

    Products of sparse rows, CHUNK queries at once: most pairs share no n-gram and are not held.
    """
    near = np.full((queries.shape[0], JOINED), -1)
    for start in range(0, len(near), CHUNK):
        alike = queries[start : start + CHUNK] @ gallery.T
        alike.sort_indices()
        for i in range(alike.shape[0]):
            row = slice(alike.indptr[i], alike.indptr[i + 1])
            order = np.argsort(-alike.data[row], kind="stable")
            best = alike.indices[row][order[:JOINED]]
            near[start + i, : len(best)] = best
    return near


def _joined(search: Search, near: np.ndarray) -> Search:
    """With each list longer by those of near (Q, n) that it lacks, a query's own photo aside.

    One that joins scores by its cosine, at most as the last of the list.
    """
    asked = search.query_rows["image_id"].to_numpy()
    answers = search.gallery_rows["image_id"].to_numpy()
    listed = (near[:, :, None] == search.ranks[:, None]).any(axis=2)
    own = answers[near] == asked[:, None]
    near = np.where(listed | own, -1, near)

    q, at = np.nonzero(near >= 0)
    found = search.gallery[near[q, at]]
    cosines = np.einsum("nd,nd->n", search.queries[q], found)
    scores = np.full(near.shape, -np.inf, np.float32)
    scores[q, at] = np.minimum(cosines, search.scores[q, -1])
    ranks = np.hstack([search.ranks, near])
    scores = np.hstack([search.scores, scores])
    return replace(search, ranks=ranks, scores=scores, inliers=None)
