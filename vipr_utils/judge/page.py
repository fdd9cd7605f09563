"""A page to look things up: every query with its ranked list, in one HTML file, without a server.

vipr page RUN [--beside RUN] [--data DIR]

RUN is the folder of a finished 06_submission; with another one beside it the page shows what each
of the two finds. Photos lie in a folder beside the page, or in the file itself where all of it
stays under INLINE_BYTES.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from vipr_utils.data.store import Store
from vipr_utils.data.transforms import jpeg, shrunk
from vipr_utils.host.files import write_whole
from vipr_utils.judge import runs
from vipr_utils.judge.task import Retrieval, Task, View, scored, sizes, some_products

TEMPLATE = Path(__file__).with_suffix(".html")
SIDE = 176  # pixels of a photo's longer side
QUALITY = 72
INLINE_BYTES = 14_000_000  # of JPEG, which take 4/3 of it as text
MOST_PLACED = 6000  # queries whose map is drawn by t-SNE; more by their two main directions


def write(
    path: Path,
    view: View,
    found: dict[str, Retrieval],
    store: Store,
    *,
    title: str,
    ladder: pd.DataFrame | None = None,
    embeddings: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    most: int = 5000,
) -> Path:
    """The page of a view's queries and the lists that one run or two gave them, by name.

    ladder: map_at_5 with map_at_5_low and map_at_5_high, a row a run; embeddings (Q, D) of the
    queries, for the map; confidence (Q,) that a list's product is right. Of more queries than
    `most` those of some products are shown; the figures above them are of all.
    """
    path, figures = Path(path), _figures(view, found)
    if len(view.queries) > most:
        some = some_queries(view.queries, most)
        figures += f"; {some.sum():,} queries are shown"
        view = view._replace(queries=view.queries[some])
        found = {name: _part(result, some) for name, result in found.items()}
        embeddings = None if embeddings is None else embeddings[some]
        confidence = None if confidence is None else confidence[some]
    data = {"title": title, "figures": figures, "ladder": _rungs(ladder)}
    data["confidence"] = None if confidence is None else _numbers(confidence)
    data |= _content(path, view, found, store)
    if embeddings is not None and len(embeddings) > 3:
        x, y = places(embeddings).T
        data["queries"] |= {"x": _numbers(x), "y": _numbers(y)}
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # it ends no element
    write_whole(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text))
    for old in _files(path).glob("[0-9a-f]" * 16):
        if f"/{old.name}/" not in data["queries"]["photo"][0]:
            shutil.rmtree(old)  # photos of the page before
    return path


def _content(
    path: Path,
    view: View,
    found: dict[str, Retrieval],
    store: Store,
) -> dict:
    """Queries, the gallery photos in their lists, and the lists of each run."""
    ranks = [result.ranks[:, :5].ravel() for result in found.values()]
    shown = np.unique(np.concatenate(ranks))
    shown = shown[shown >= 0]
    gallery = view.gallery.iloc[shown]
    rows = [*view.queries.index, *gallery.index]
    photos = [_photo(store[row]) for row in rows]
    addresses = _addresses(path, photos)
    n = len(view.queries)
    return {
        "queries": _table(view.queries, addresses[:n]),
        "gallery": _table(gallery, addresses[n:]),
        "runs": [_lists(name, result, shown) for name, result in found.items()],
    }


def some_queries(
    queries: pd.DataFrame,
    most: int,
) -> np.ndarray:
    """(Q,) bool: `most` of them or fewer, of whole products but for the last."""
    chosen = queries["product_id"].isin(some_products(queries, most)).to_numpy()
    return chosen & (chosen.cumsum() <= most)


def _part(
    found: Retrieval,
    some: np.ndarray,
) -> Retrieval:
    """The lists of some queries."""
    words = found.words
    if words is not None:
        words = words[some]
    return replace(
        found,
        scores=found.scores[some],
        ranks=found.ranks[some],
        hits=found.hits[some],
        n_relevant=found.n_relevant[some],
        words=words,
    )


def _photo(image: np.ndarray) -> bytes:
    """JPEG of a photo (H, W, 3) reduced to SIDE."""
    return jpeg(shrunk(image, SIDE / max(image.shape)), QUALITY)


def _addresses(
    path: Path,
    photos: list[bytes],
) -> list[str]:
    """Of each photo, for the page: the photo itself, or its file in a folder that no page before
    this one looks into."""
    if sum(map(len, photos)) <= INLINE_BYTES:
        return [f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}" for photo in photos]
    folder = _files(path) / hashlib.sha256(b"".join(photos)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(photos):
        (folder / f"{i}.jpg").write_bytes(photo)
    return [f"{folder.parent.name}/{folder.name}/{i}.jpg" for i in range(len(photos))]


def _files(path: Path) -> Path:
    """The folder of a page's photos."""
    return path.with_name(f"{path.stem}_files")


def _table(rows: pd.DataFrame, addresses: list[str]) -> dict[str, list]:
    """Columns of a catalog's rows."""
    product = rows["product"].where(rows["product_id"] >= 0, "")
    group = rows["group"].astype(str).where(rows["group"] >= 0, "")
    return {
        "name": rows["name"].tolist(),
        "product": product.tolist(),
        "group": group.tolist(),
        "domain": rows["domain"].tolist(),
        "photo": addresses,
    }


def _lists(
    name: str,
    found: Retrieval,
    shown: np.ndarray,
) -> dict:
    """A run's lists, as positions in the gallery photos shown."""
    positions = pd.Index(shown).get_indexer(found.ranks[:, :5].ravel()).reshape(-1, 5)
    return {
        "name": name,
        "ranks": positions.tolist(),
        "hits": found.hits[:, :5].astype(int).tolist(),
        "scores": [_numbers(row) for row in found.scores[:, :5]],
        "ap": _numbers(found.average_precision),
        "words": [] if found.words is None else found.words.tolist(),
    }


def _numbers(values) -> list[float | None]:
    """Four digits; None for what is no number."""
    return [round(float(value), 4) if math.isfinite(value) else None for value in values]


def _rungs(ladder: pd.DataFrame | None) -> list[dict]:
    """A row a run: name, map_at_5, low, high."""
    if ladder is None:
        return []
    columns = {"map_at_5": "map_at_5", "map_at_5_low": "low", "map_at_5_high": "high"}
    scores = ladder[list(columns)].rename(columns=columns).astype(float)
    scores = scores.dropna(subset="map_at_5").bfill(axis=1).ffill(axis=1)
    return scores.rename_axis("name").reset_index().to_dict("records")


def _figures(
    view: View,
    found: dict[str, Retrieval],
) -> str:
    """'2,485 queries, 2,721 gallery photos; mAP@5 0.905 [0.876, 0.934]'"""
    said = sizes(view)
    for name, result in found.items():
        figures = result.metrics
        if "map_at_5" in figures:
            value = "{map_at_5:.3f} [{map_at_5_low:.3f}, {map_at_5_high:.3f}]".format(**figures)
            said += f"; {name}: mAP@5 {value}" if len(found) > 1 else f"; mAP@5 {value}"
    return said


def places(embeddings: np.ndarray) -> np.ndarray:
    """(Q, 2) in 0..1: a map on which embeddings (Q, D) that are alike lie together."""
    few = len(embeddings) <= MOST_PLACED
    dim = min(50 if few else 2, *embeddings.shape)
    flat = PCA(dim, random_state=0).fit_transform(embeddings)
    if few:
        perplexity = min(30.0, (len(flat) - 1) / 3)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    low, high = np.quantile(flat, [0.005, 0.995], axis=0)
    return ((flat - low) / np.maximum(high - low, 1e-9)).clip(-0.02, 1.02)


# ---------------------------------------------------------------------------------- a run's lists


def save_lists(
    folder: Path,
    view: View,
    found: Retrieval,
    confidence: np.ndarray | None = None,
) -> None:
    """Write <folder>/lists.csv: query, rank, photo, similarity, and where they are known the
    confidence (Q,) of each query and the words that it shares with the photo."""
    query, place = np.nonzero(found.ranks[:, :5] >= 0)
    table = pd.DataFrame(
        {
            "query": view.queries["name"].to_numpy()[query],
            "rank": place + 1,
            "photo": view.gallery["name"].to_numpy()[found.ranks[query, place]],
            "similarity": found.scores[query, place].round(5),
        }
    )
    if confidence is not None:
        table["confidence"] = confidence[query].round(5)
    if found.words is not None:
        table["words"] = found.words[query, place]
    write_whole(Path(folder) / "lists.csv", table.to_csv(index=False))


def load_lists(
    folder: Path,
    view: View,
) -> tuple[Retrieval, np.ndarray | None]:
    """(the lists that `save_lists` wrote, the confidence) of a view's queries. Raises RunError
    where they are of other photos."""
    file = Path(folder) / "lists.csv"
    if not file.is_file():
        raise runs.RunError(f"{file} does not exist: run notebook 06 into {folder} first")
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    table = table.astype({"rank": int, "similarity": float})
    query = pd.Index(view.queries["name"]).get_indexer(table["query"])
    photo = pd.Index(view.gallery["name"]).get_indexer(table["photo"])
    if (query < 0).any() or (photo < 0).any():
        raise runs.RunError(f"{file} names photos that are not in this data: give its own --data")
    ranks = np.full((len(view.queries), 5), -1)
    scores = np.full(ranks.shape, -np.inf)
    ranks[query, table["rank"] - 1] = photo
    scores[query, table["rank"] - 1] = table["similarity"]
    confidence = None
    if "confidence" in table:
        confidence = np.full(len(view.queries), np.nan)
        confidence[query] = table["confidence"].astype(float)
    words = None
    if "words" in table:
        words = np.full(ranks.shape, "", dtype=object)
        words[query, table["rank"] - 1] = table["words"]
    return replace(scored(view, scores, ranks), words=words), confidence


def main(arguments: list[str] | None = None) -> int:
    """Write RUN/page.html; exit code 2 with what is wrong."""
    parser = argparse.ArgumentParser("vipr page", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished 06_submission")
    add("--beside", type=Path, help="another one, which the page compares it to")
    add("--data", default="", help="data root, instead of the one found")
    add("--cache-dir", default="", help="of packed photos")
    given = parser.parse_args(arguments)
    try:
        print(of_runs(given.run, given.beside, data_root=given.data, cache_dir=given.cache_dir))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def of_runs(
    run: Path,
    beside: Path | None,
    *,
    data_root: str = "",
    cache_dir: str = "",
) -> Path:
    """The page of a run's folder, in it; beside: a run that stands before it in each row."""
    params = runs.load(run)["params"]
    task = Task(
        data_root,
        gallery_domain=params.get("gallery_domain", ""),
        holdout=0,
        device="cpu",
        cache_dir=cache_dir,
    )
    view = task.views["test"]
    folders = [beside, run] if beside else [run]
    embeddings = None
    if (run / "embeddings.npz").is_file():
        with np.load(run / "embeddings.npz") as kept:
            if kept["query_names"].tolist() == view.queries["name"].tolist():
                embeddings = kept["queries"].astype(np.float32)
    found = {}
    for folder in folders:
        name = "/".join(folder.resolve().parts[-2:])  # two runs may be called alike
        found[name], confidence = load_lists(folder, view)
    return write(
        run / "page.html",
        view,
        found,
        task.store,
        title=f"{run.name}, {Path(task.photos.attrs['root']).name}",
        ladder=runs.ladder(run.parent, task.photos.attrs["fingerprint"]),
        embeddings=embeddings,
        confidence=confidence,
    )
