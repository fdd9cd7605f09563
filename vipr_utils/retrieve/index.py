"""A catalogue index: a folder that answers photos, and that photos and products join and leave.

A version (see `versions`) names its parts: segments of vectors, networks, projections; the rows
that are gone; and the steps that lists go through. So a reader sees it whole, an update that was
killed leaves the one before, and `rollback` goes back to one that is still there.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors import numpy as safetensors

from vipr_utils.data.store import Packed
from vipr_utils.host.files import locked, write_whole
from vipr_utils.host.progress import reporter
from vipr_utils.learn import models
from vipr_utils.retrieve import by_faiss, labels, pipeline, versions
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.rerank import Projection, unit
from vipr_utils.retrieve.search import Prepared, Search, top_k

FORMAT = 1
COLUMNS = ["photo", "product", "group", "domain"]  # of its rows, all text
SEGMENT = 65_536  # rows of the largest part
BLOCK = 4096  # photos that are embedded together


@dataclass(frozen=True)
class Version:
    """What an index holds at one time: as its file says, and in memory.

    rows (G): COLUMNS, answered (bool: whether it may be answered, or is only known), product_id (a
    number for each product), segment and place (where its vector lies); vectors (G, D) of length 1.
    """

    number: int
    sha256: str
    state: dict
    rows: pd.DataFrame
    vectors: Prepared

    @property
    def steps(self) -> list[str]:
        """Of post-processing, on lists."""
        return self.state["steps"]

    @cached_property
    def judge(self) -> labels.Judge | None:
        """What was fitted on validation to say how sure an answer is."""
        found = self.state["judge"]
        if not found:
            return None
        right, there = (labels.Confidence(**found[name]) for name in ("right", "there"))
        return labels.Judge(right, there, found["least"])


class Answers(NamedTuple):
    """lists: query (its position), rank (from 1), COLUMNS and similarity, best first; products: as
    `Index.predict` tells; problems: file, problem of what is no photo, by position."""

    lists: pd.DataFrame
    products: pd.DataFrame
    problems: pd.DataFrame


class Index:
    """An index that is on disk; any number of processes read it, one at a time changes it.

    encoder: from photos to vectors; version: what is in force for this reader, until `reload` or an
    update of its own. Photos are embedded on the CPU in float32: whoever reads it finds the same.
    """

    def __init__(self, folder: Path) -> None:
        """Raises IndexFault where there is none, or a part is damaged."""
        self.folder = Path(folder)
        self._changing = threading.RLock()  # of `version`, by the threads of this process
        self._segments: dict[str, tuple[pd.DataFrame, np.ndarray]] = {}
        with versions.whole_or_fault(self.folder):
            self.version = self._in_force()
            self.encoder = _load_encoder(self.folder, self.version.state["encoder"])

    @classmethod
    def build(
        cls,
        folder: Path,
        encoder: Encoder,
        rows: pd.DataFrame,
        vectors: np.ndarray,
        *,
        steps=(),
        judge: labels.Judge | None = None,
        about: dict | None = None,
    ) -> Index:
        """An index of these rows (N: COLUMNS, answered) and their vectors (N, D), as the encoder
        gave them; one that is there gets them as its next version.

        steps: what reorders a list, see `pipeline.local`. judge: fitted on validation. about: what
        it was made from. Raises ValueError for steps that an index cannot answer by.
        """
        folder, steps = Path(folder), list(steps)
        if pipeline.fitted_first(steps) or not pipeline.local(steps):
            raise ValueError(
                f"an index cannot answer by {steps}: projections belong to its encoder, and other "
                f"steps must be of {[function.__name__ for function in pipeline.LOCAL]}"
            )
        with locked(folder):
            state = {
                "format": FORMAT,
                "encoder": _save_encoder(folder, encoder),
                "steps": steps,
                "judge": asdict(judge) if judge else None,
                "about": about or {},
                "segments": _write_segments(folder, rows, unit(vectors)),
            }
            versions.publish(folder, state, f"built from {len(rows):,} photos")
        return cls(folder)

    # ------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self.version.rows)

    @property
    def products(self) -> pd.Series:
        """Photos of each product."""
        return self.version.rows["product"].value_counts(sort=False).sort_index()

    def reload(self) -> None:
        """Read the version that is in force by now."""
        with self._changing:
            if versions.current(self.folder) != (self.version.number, self.version.sha256):
                self.version = self._in_force()

    def _in_force(self) -> Version:
        """The version that CURRENT names. Old ones may be cleared away while it is read."""
        for _ in range(5):
            number, sha256 = versions.current(self.folder)
            try:
                return self._read(number, sha256)
            except FileNotFoundError as error:
                missing = error
        raise versions.IndexFault(
            f"{self.folder}: {missing.filename} is absent: {versions.ROLL_BACK}"
        )

    def _read(self, number: int, sha256: str) -> Version:
        """With its segments in memory; those of the version before are not read again."""
        content = versions.file_of(self.folder, number).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise versions.IndexFault(
                f"{self.folder}: version {number} is damaged: {versions.ROLL_BACK}"
            )
        state = json.loads(content)
        if state["format"] != FORMAT:
            raise versions.IndexFault(
                f"{self.folder} has format {state['format']}, expected {FORMAT}: build it anew"
            )
        parts = [segment["part"] for segment in state["segments"]]
        self._segments = {
            part: self._segments.get(part) or _read_segment(self.folder, part) for part in parts
        }
        tables, vectors = [], []
        for i, segment in enumerate(state["segments"]):
            rows, values = self._kept(segment)
            tables.append(rows.assign(segment=i, place=rows.index))
            vectors.append(values)
        rows = pd.concat(tables, ignore_index=True)
        rows["product_id"] = pd.factorize(rows["product"])[0]
        return Version(number, sha256, state, rows, Prepared(np.concatenate(vectors), "index"))

    def versions(self) -> pd.DataFrame:
        """Those that can be gone back to: number, created, photos, what, in_force."""
        table = []
        for number in versions.numbers(self.folder):
            with suppress(ValueError, KeyError, TypeError):  # damaged: nobody can go back to it
                state = json.loads(versions.file_of(self.folder, number).read_bytes())
                photos = sum(s["rows"] - len(s["removed"]) for s in state["segments"])
                table.append([number, state["created"], photos, state["what"]])
        found = pd.DataFrame(table, columns=["number", "created", "photos", "what"])
        return found.assign(in_force=found["number"] == versions.current(self.folder)[0])

    # ----------------------------------------------------------------------------------- answers

    def embed(
        self,
        photos: list[Path | bytes],
        customer=True,
    ) -> tuple[np.ndarray, pd.DataFrame]:
        """((N, D), problems: file, problem) of files or their contents; NaN for what is no photo.

        customer (N,) bool, or one for all: whether a customer took it, see `Look.zoom`.
        """
        customer = np.broadcast_to(customer, len(photos))
        vectors, problems = [], []
        reached = reporter("photos embedded", len(photos))
        for start in range(0, len(photos), BLOCK):
            part = photos[start : start + BLOCK]
            packed = Packed(part, self.encoder.store_px)
            rows = np.flatnonzero(packed.readable)
            found = np.full((len(part), self.version.vectors.rows.shape[1]), np.nan, np.float32)
            if len(rows):
                found[rows] = self.encoder(packed, rows, customer[start + rows])
            vectors.append(found)
            problems.append(packed.problems.set_axis(start + packed.problems.index))
            reached(start + len(part))
        return np.concatenate(vectors), pd.concat(problems)

    def search(self, photos: list[Path | bytes], k: int = 5) -> Answers:
        """Answers for photos of customers, files or their contents.

        A photo that cannot be read has a problem and no answer.
        """
        if not photos:
            raise ValueError("nothing to search for: give a photo or more")
        vectors, problems = self.embed(photos)
        asked = np.flatnonzero(~np.isnan(vectors).any(axis=1))
        lists, products = self.nearest(vectors[asked], k), self.predict(vectors[asked])
        for table in (lists, products):
            table["query"] = asked[table["query"]]
        return Answers(lists, products, problems)

    def predict(self, vectors: np.ndarray) -> pd.DataFrame:
        """Of vectors (Q, D) that the encoder gave: query, product, confidence that it is right, and
        there (whether it is in the catalogue at all); the last two are missing where the index was
        built without a `labels.Judge`.
        """
        version = self.version
        lists = top_k(vectors, version.vectors, labels.NEIGHBOURS)
        votes = labels.vote(*lists, version.rows["product_id"].to_numpy())
        names = version.rows.drop_duplicates("product_id").set_index("product_id")["product"]
        found = pd.DataFrame(
            {"query": np.arange(len(vectors)), "product": names[votes.product].array}
        )
        if version.judge:
            found["confidence"], found["there"] = version.judge(votes)
        return found

    def nearest(self, vectors: np.ndarray, k: int = 5) -> pd.DataFrame:
        """`Answers.lists` for vectors (Q, D) of length 1 that the encoder gave."""
        version = self.version  # another thread may replace it
        scores, ranks = _ranked(version, vectors, k)
        query, place = np.nonzero(ranks >= 0)
        table = version.rows[COLUMNS].iloc[ranks[query, place]].reset_index(drop=True)
        table.insert(0, "query", query)
        table.insert(1, "rank", place + 1)
        return table.assign(similarity=scores[query, place])

    # ----------------------------------------------------------------------------------- updates

    def add(self, photos: pd.DataFrame) -> pd.DataFrame:
        """Add photos: path, photo (a name), product; group and domain where they are known.

        A photo whose name is there takes its place. Returns problems (file, problem) of those that
        cannot be read, which are left out. Raises ValueError for a table that cannot be right.
        """
        photos = _checked(photos)
        customer = (photos["domain"] == "customer").to_numpy()
        vectors, problems = self.embed([Path(path) for path in photos["path"]], customer)
        good = np.isfinite(vectors).all(axis=1)
        if good.any():
            self.put(photos[good], vectors[good])
        return problems.assign(file=photos["path"].array[problems.index])

    def put(self, rows: pd.DataFrame, vectors: np.ndarray) -> None:
        """`add` of vectors (N, D) of length 1 that the encoder gave for these rows (N: COLUMNS, and
        answered where not all are)."""
        rows = rows[COLUMNS].assign(answered=rows.get("answered", True))

        def change(segments: list[dict]) -> list[dict]:
            segments = self._without(segments, self.version.rows["photo"].isin(rows["photo"]))
            last, tables, arrays = len(segments), [rows], [vectors]
            # as in a binary counter: parts are merged that are no larger than what follows them
            while last and _alive(segments[last - 1]) <= min(sum(map(len, tables)), SEGMENT // 2):
                last -= 1
                table, values = self._kept(segments[last])
                tables.insert(0, table)
                arrays.insert(0, values)
            merged = pd.concat(tables, ignore_index=True), np.concatenate(arrays)
            return segments[:last] + _write_segments(self.folder, *merged)

        self._update(change, f"{len(rows):,} photos added")

    def remove(self, products: list[str]) -> int:
        """Remove all photos of these products; how many there were.

        Raises ValueError, and changes nothing, for a product that is not there.
        """
        removed = 0

        def change(segments: list[dict]) -> list[dict]:
            nonlocal removed
            rows = self.version.rows
            absent = sorted(set(products) - set(rows["product"]))
            if absent:
                raise ValueError(f"{absent} are not in {self.folder}: see its products")
            gone = rows["product"].isin(products)
            removed = int(gone.sum())
            if removed == len(rows):
                raise ValueError("an index of no photos answers nothing: build another instead")
            return self._without(segments, gone)

        self._update(change, f"{len(products):,} products removed")
        return removed

    def rollback(self, number: int = 0) -> None:
        """Go back to a version, 0 for the one before. Raises IndexFault where it is not there."""
        versions.rollback(self.folder, number)
        self.reload()

    def to_faiss(self, path: Path, kind: str = "flat") -> float:
        """Write its vectors as an index of FAISS, and COLUMNS of their rows to a CSV beside it, for
        those who outgrow a machine; the recall of the 10 nearest, see `by_faiss.export`.
        """
        share = by_faiss.export(self.version.vectors.rows.numpy(), Path(path), kind)
        table = self.version.rows[COLUMNS].to_csv(index=False)
        write_whole(Path(path).with_suffix(".csv"), table)
        return share

    def _update(
        self,
        change: Callable[[list[dict]], list[dict]],
        what: str,
    ) -> None:
        """Replace the newest version by one whose segments change gives."""
        with self._changing, locked(self.folder):
            self.reload()
            segments = []
            for segment in change(self.version.state["segments"]):
                if 2 * _alive(segment) >= segment["rows"]:
                    segments.append(segment)
                elif _alive(segment):
                    segments += _write_segments(self.folder, *self._kept(segment))
            state = self.version.state | {"segments": segments}
            number, sha256, _ = versions.publish(self.folder, state, what)
            self.version = self._read(number, sha256)

    def _without(
        self,
        segments: list[dict],
        gone: pd.Series,
    ) -> list[dict]:
        """Segments without these rows of the version."""
        rows = self.version.rows[gone.to_numpy()]
        places = rows.groupby("segment")["place"].agg(list).to_dict()
        return [
            segment | {"removed": sorted([*segment["removed"], *places.get(i, [])])}
            for i, segment in enumerate(segments)
        ]

    def _kept(self, segment: dict) -> tuple[pd.DataFrame, np.ndarray]:
        """Rows and vectors of a segment that are not removed; rows are called by their place."""
        rows, vectors = self._segments[segment["part"]]
        if not segment["removed"]:
            return rows, vectors
        kept = rows.drop(index=segment["removed"])
        return kept, vectors[kept.index]


# ------------------------------------------------------------------------------------------- lists


def _ranked(
    version: Version,
    vectors: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows of the version), both (Q, k), after its steps."""
    answered = version.rows["answered"].to_numpy()
    if not version.steps and answered.all():
        return top_k(vectors, version.vectors, k)
    unsearched = Search(
        vectors,
        version.vectors.rows.numpy(),
        pd.DataFrame({"image_id": [None] * len(vectors)}),
        version.rows.assign(image_id=version.rows["photo"]),
        answers=None if answered.all() else answered,
    )
    found, _ = pipeline.apply(version.steps, unsearched, k=k)
    return found.scores, np.append(np.flatnonzero(answered), -1)[found.ranks]


def _checked(photos: pd.DataFrame) -> pd.DataFrame:
    """Photos to add with all of COLUMNS, as text. Raises ValueError for what cannot be right."""
    for column in ("path", "photo", "product"):
        if column not in photos:
            raise ValueError(f"photos to add need the column {column!r}, got {list(photos)}")
        empty = photos[column].isna() | (photos[column].astype(str) == "")
        if empty.any():
            raise ValueError(f"photos to add: row {int(np.argmax(empty))} has no {column}")
    if photos["photo"].duplicated().any():
        twice = photos["photo"][photos["photo"].duplicated()].iloc[0]
        raise ValueError(f"photos to add: photo {twice!r} is there twice; names must differ")
    photos = photos.reindex(columns=["path", *COLUMNS], fill_value="").fillna("").astype(str)
    strange = ~photos["domain"].isin(["shop", "customer", ""])
    if strange.any():
        found = photos["domain"][strange].iloc[0]
        raise ValueError(f"domain {found!r} is unknown: use shop, customer or nothing")
    return photos.reset_index(drop=True)


# ---------------------------------------------------------------------------------------- segments


def _alive(segment: dict) -> int:
    """Its rows that are not removed."""
    return segment["rows"] - len(segment["removed"])


def _write_segments(
    folder: Path,
    rows: pd.DataFrame,
    vectors: np.ndarray,
) -> list[dict]:
    """Segments of these rows, each a part."""
    found = []
    for start in range(0, len(rows), SEGMENT):
        part = rows[[*COLUMNS, "answered"]].iloc[start : start + SEGMENT]
        table = part.to_json(orient="split", index=False).encode()
        content = safetensors.save(
            {
                "vectors": np.ascontiguousarray(vectors[start : start + SEGMENT], np.float32),
                "rows": np.frombuffer(table, np.uint8),
            }
        )
        name = versions.put(folder, content, ".safetensors")
        found.append({"part": name, "rows": len(part), "removed": []})
    return found


def _read_segment(folder: Path, name: str) -> tuple[pd.DataFrame, np.ndarray]:
    """(rows, vectors) of a part."""
    found = safetensors.load(versions.whole(folder, name))
    table = json.loads(found["rows"].tobytes())
    return pd.DataFrame(table["data"], columns=table["columns"]), found["vectors"]


def _save_encoder(folder: Path, encoder: Encoder) -> dict:
    """Its parts, and what a version says of it."""
    arrays, looks = _named("joined", encoder.projections), []
    for i, look in enumerate(encoder.looks):
        arrays |= _named(f"look{i}", look.projections)
        content = io.BytesIO()
        models.write(look.model, content)
        looks.append(
            {
                "model": versions.put(folder, content.getvalue(), ".pt"),
                "image_size": look.image_size,
                "zoom": look.zoom,
                "features": look.features,
                "weight": look.weight,
            }
        )
    name = versions.put(folder, safetensors.save(arrays), ".safetensors")
    return {"looks": looks, "arrays": name, "store_px": encoder.store_px}


def _named(
    owner: str,
    projections: tuple[Projection, ...],
) -> dict[str, np.ndarray]:
    """Arrays of projections by name: 'look0.1.mean' is that of its second."""
    found = {}
    for i, projection in enumerate(projections):
        found[f"{owner}.{i}.mean"] = projection.mean
        if projection.matrix is not None:
            found[f"{owner}.{i}.matrix"] = np.ascontiguousarray(projection.matrix)
    return found


def _load_encoder(folder: Path, state: dict) -> Encoder:
    """What `_save_encoder` wrote."""
    arrays = safetensors.load(versions.whole(folder, state["arrays"]))

    def projections(owner: str) -> tuple[Projection, ...]:
        found = []
        while (mean := arrays.get(f"{owner}.{len(found)}.mean")) is not None:
            found.append(Projection(mean, arrays.get(f"{owner}.{len(found)}.matrix")))
        return tuple(found)

    looks = []
    for i, look in enumerate(state["looks"]):
        versions.whole(folder, look["model"])
        model = models.load(folder / "parts" / look["model"])
        looks.append(
            Look(
                model,
                look["image_size"],
                tuple(look["zoom"]),
                look["features"],
                look["weight"],
                projections(f"look{i}"),
            )
        )
    return Encoder(tuple(looks), projections("joined"), state["store_px"])
