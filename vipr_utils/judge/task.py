"""A retrieval task on somebody's photos: what is learned from, asked, and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import pandas as pd
import torch

from vipr_utils.data import audit, catalog
from vipr_utils.data.store import Photos, Store, open_data
from vipr_utils.host import platform
from vipr_utils.host.device import precision_used, seed_everything, working_device
from vipr_utils.judge import metrics, runs
from vipr_utils.retrieve import pipeline, search
from vipr_utils.retrieve.embedding import embed, embed_at_sizes, with_learned_whitening


@dataclass(frozen=True)
class View:
    """Queries and the gallery they search: rows of the catalog."""

    queries: pd.DataFrame
    gallery: pd.DataFrame


@dataclass(frozen=True)
class Retrieval:
    """Ranked lists of Q queries: scores and ranks (rows of the view's gallery), hits, all (Q, k).

    average_precision (Q,) is AP@5, NaN where nothing relevant is there; metrics as in run.json.
    """

    scores: np.ndarray
    ranks: np.ndarray
    hits: np.ndarray
    n_relevant: np.ndarray
    metrics: dict

    @property
    def average_precision(self) -> np.ndarray:
        return metrics.average_precision_at_k(self.hits, self.n_relevant)


@dataclass(repr=False)
class Task:
    """Somebody's photos under a protocol; shown in a notebook it says what was found.

    views: 'test', 'shop' and 'customer' (the same queries against that part of the gallery, where
    domains are known), and 'validation' (queries held out of train). fit: train photos to learn
    from. Embeddings handed to its methods have a row for each row of `photos`.
    """

    photos: pd.DataFrame
    store: Store
    lost: pd.DataFrame
    protocol: str
    gallery_domain: str
    fit: pd.DataFrame
    views: dict[str, View]
    validation: catalog.Validation | None
    device: torch.device
    precision: str
    cache_dir: Path
    batch_size: int
    seed: int
    started: float = field(default_factory=monotonic)

    @classmethod
    def open(
        cls,
        data_root: str = "",
        *,
        protocol: str = "test",
        gallery_domain: str = "",
        image_size: int = 224,
        holdout: float = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
        cache_dir: str = "",
    ) -> Task:
        """The task on these photos, its store built and its validation photos set aside.

        image_size: the most pixels a side that networks will see; holdout: share of each
        product's train photos to choose by, 0 for none. Raises CatalogError, FileNotFoundError.
        """
        seed_everything(seed)
        photos, store, lost = open_data(data_root, cache_dir, px=image_size or 224)
        train, queries, gallery = catalog.split(
            photos, protocol, seed=seed, gallery_domain=gallery_domain
        )
        views = {"test": View(queries, gallery)}
        if not gallery_domain and {"shop", "customer"} <= set(gallery["domain"]):
            for domain in ("shop", "customer"):
                views[domain] = View(queries, catalog.narrow(gallery, domain))
        cache, fit, validation = platform.cache_folder(cache_dir), train, None
        if holdout:
            layouts = audit.colour_layouts(train, cache_dir=cache)
            validation = catalog.hold_out(
                train, layouts, holdout=holdout, gallery_domain=gallery_domain
            )
            fit = validation.fit
            views["validation"] = View(validation.queries, validation.gallery)
        return cls(
            photos=photos,
            store=store,
            lost=lost,
            protocol=protocol,
            gallery_domain=gallery_domain,
            fit=fit,
            views=views,
            validation=validation,
            device=working_device(device),
            precision=precision,
            cache_dir=cache,
            batch_size=batch_size,
            seed=seed,
        )

    def __str__(self) -> str:
        lines = [self.photos.attrs["said"]]
        if self.validation:
            queries, name = len(self.validation.queries), self.validation.split
            lines.append(
                f"validation: {queries} queries, {self.validation.how} held out, split {name}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "<br>".join(str(self).splitlines()) + self.summary().to_html()

    def __repr__(self) -> str:
        return f"{self}\n{self.summary()}"

    def describe(self) -> str:
        """'protocol test, 97 queries, 205 gallery photos': for captions."""
        view = self.views["test"]
        sizes = f"{len(view.queries):,} queries, {len(view.gallery):,} gallery photos"
        return f"protocol {self.protocol}, {sizes}"

    def summary(self) -> pd.DataFrame:
        """Images and products of each part: what is learned from, each view's sides."""
        parts = {"fit": self.fit}
        for name, view in self.views.items():
            parts[f"{name}: queries"] = view.queries
            parts[f"{name}: gallery"] = view.gallery
        counts = [(len(rows), rows["product_id"].nunique()) for rows in parts.values()]
        return pd.DataFrame(counts, index=list(parts), columns=["images", "products"])

    # ------------------------------------------------------------------------------- training

    def training_photos(self, transform, rows=None, *, clutter: float = 0.0) -> Photos:
        """The photos to fit (or some rows of them) with labels 0..C-1, under a training transform.

        clutter: share of shop photos cut out and laid on other photos, as customers see them.
        """
        rows = self.fit if rows is None else rows
        return Photos(
            self.store,
            rows.index,
            transform,
            labels=catalog.with_labels(rows),
            shop=(rows["domain"] == "shop").to_numpy(),
            clutter=clutter,
            seed=self.seed,
        )

    def validate(
        self, model, *, distance: str = "cosine", image_size: int = 0, products=None
    ) -> dict:
        """Metrics of a model in training on validation (of some products); not cached."""
        view = self.views["validation"]
        if products is not None:
            view = View(
                *(rows[rows["product_id"].isin(products)] for rows in (view.queries, view.gallery))
            )
        sides = [
            embed(
                model,
                self.store,
                rows.index,
                device=self.device,
                batch_size=self.batch_size,
                image_size=image_size,
                precision=self.precision,
            )
            for rows in (view.queries, view.gallery)
        ]
        return self._ranked(view, *sides, (), distance).metrics

    def validator(self, **settings):
        """`validate` with these settings, for `training.fit`; None where nothing is held out."""
        products = settings.get("products")
        if not self.validation:
            return None
        if products is not None and not self.validation.queries["product_id"].isin(products).any():
            return None
        return partial(self.validate, **settings)

    def whitened(self, model, dim: int, *, image_size: int = 0):
        """A copy of the model that ends in a whitening to dim numbers, learned from fit."""
        return with_learned_whitening(
            model,
            self.store,
            self.fit,
            dim,
            device=self.device,
            batch_size=self.batch_size,
            image_size=image_size,
            precision=self.precision,
            cache_dir=self.cache_dir,
        )

    # ----------------------------------------------------------------------------- embeddings

    def embed(
        self,
        model,
        *,
        image_size: int | tuple[int, ...] = 0,
        fit: str = "squash",
        features: bool = False,
        precision: str = "",
    ) -> np.ndarray:
        """(N, D) embeddings of all photos, kept on disk; of several sizes their normalised sum.

        features: the pooled backbone output instead, for a head or a whitening to be learned.
        """
        sizes = image_size if isinstance(image_size, tuple) else (image_size,)
        embedded = partial(
            embed_at_sizes if len(sizes) > 1 else embed,
            model,
            self.store,
            self.photos.index,
            device=self.device,
            batch_size=self.batch_size,
            fit=fit,
            precision=precision or self.precision,
            cache_dir=self.cache_dir,
        )
        if len(sizes) > 1:
            return embedded(image_sizes=sizes)
        return embedded(image_size=sizes[0], features=features)

    def rows(self, embeddings: np.ndarray, table: pd.DataFrame) -> np.ndarray:
        """The embeddings of these rows of the catalog."""
        return embeddings[self.photos.index.get_indexer(table.index)]

    def ms_per_image(self, model, *, image_size: int | tuple[int, ...] = 0) -> float:
        """Milliseconds to embed an image, over 128 of them, decoding and transform included."""
        sizes = image_size if isinstance(image_size, tuple) else (image_size,)
        some, start = self.photos.index[:128], perf_counter()
        for size in sizes:
            embed(
                model,
                self.store,
                some,
                device=self.device,
                batch_size=self.batch_size,
                image_size=size,
                precision=self.precision,
            )
        return (perf_counter() - start) / len(some) * 1000

    # -------------------------------------------------------------------------------- scoring

    def retrieve(
        self, embeddings: np.ndarray, view: str | View = "test", *, steps=(), distance="cosine"
    ) -> Retrieval:
        """The ranked lists of a view after these steps of post-processing (see `pipeline`).

        For the shop and customer views projections are fitted on the whole gallery, as for 'test'.
        Raises ValueError for steps with the manhattan distance: they work by cosine.
        """
        narrowed = view if view in ("shop", "customer") else ""
        asked = self.views[view] if isinstance(view, str) else view
        queries, gallery = (self.rows(embeddings, rows) for rows in (asked.queries, asked.gallery))
        first = pipeline.fitted_first(steps)
        if narrowed and first:
            whole = self.views["test"].gallery
            fitted = _search(
                self.views["test"],
                queries,
                self.rows(embeddings, whole),
                device=self.device,
                cache_dir=self.cache_dir,
            )
            fitted, _ = pipeline.apply(steps[:first], fitted, k=1)
            queries, steps = fitted.queries, steps[first:]
            gallery = fitted.gallery[whole.index.get_indexer(asked.gallery.index)]
        return self._ranked(asked, queries, gallery, steps, distance)

    def evaluate(
        self, model_or_embeddings, *, steps=(), distance="cosine", image_size=0, views=()
    ) -> dict[str, Retrieval]:
        """A Retrieval for each view (or those named), of a model or of embeddings."""
        embeddings = model_or_embeddings
        if not isinstance(embeddings, np.ndarray):
            embeddings = self.embed(model_or_embeddings, image_size=image_size)
        return {
            view: self.retrieve(embeddings, view, steps=steps, distance=distance)
            for view in views or self.views
        }

    def _ranked(self, view: View, queries, gallery, steps, distance: str) -> Retrieval:
        return ranked(
            view,
            queries,
            gallery,
            steps=steps,
            distance=distance,
            seed=self.seed,
            device=self.device,
            cache_dir=self.cache_dir,
        )

    # ------------------------------------------------------------------------------ the record

    def save_run(
        self,
        folder: Path,
        *,
        notebook: str,
        params: dict,
        metrics: dict,
        model: dict,
        validated: dict | None = None,
        trained: bool = False,
        cut_short: str = "",
    ) -> Path:
        """Write <folder>/run.json, see `runs.save`, and split.csv where photos were held out.

        validated: the model's metrics on them.
        """
        if self.validation:
            self.validation.save(folder)
        precision = precision_used(self.precision, self.device)
        if not trained:
            precision.pop("training")
        return runs.save(
            folder,
            notebook=notebook,
            params=params,
            data=catalog.describe_data(self.photos),
            protocol=self.protocol,
            metrics=metrics,
            model=model,
            seconds=monotonic() - self.started,
            device=str(self.device),
            precision=precision,
            validation=self.validation.record(validated) if self.validation and validated else None,
            cut_short=cut_short,
        )


def ranked(
    view: View,
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    steps: list[str] = (),
    distance: str = "cosine",
    seed: int = 0,
    device="cpu",
    cache_dir: Path | None = None,
) -> Retrieval:
    """The scored lists for embeddings (Q, D) and (G, D) of a view's rows, after these steps.

    Raises ValueError for steps with the manhattan distance: they work by cosine.
    """
    if not steps:
        query_ids, gallery_ids = (
            rows["image_id"].to_numpy() for rows in (view.queries, view.gallery)
        )
        scores, ranks = search.top_k(
            queries,
            gallery,
            5,
            distance=distance,
            device=device,
            query_ids=query_ids,
            gallery_ids=gallery_ids,
        )
        return scored(view, scores, ranks, seed=seed)
    if distance == "manhattan":
        raise ValueError(
            f"steps {list(steps)} work by cosine, got distance 'manhattan': "
            "leave the steps or the distance away"
        )
    unsearched = _search(view, queries, gallery, device=device, cache_dir=cache_dir)
    found, seconds = pipeline.apply(list(steps), unsearched)
    return scored(view, found.scores, found.ranks, seconds=seconds, seed=seed)


def _search(view: View, queries, gallery, *, device, cache_dir) -> search.Search:
    """What steps work on; they do not see which products the queries show."""
    labels = [column for column in ("product_id", "group") if column in view.queries]
    return search.Search(
        queries=queries,
        gallery=gallery,
        query_rows=view.queries.drop(columns=labels),
        gallery_rows=view.gallery,
        device=device,
        cache_dir=cache_dir,
    )


def scored(view: View, scores, ranks, *, seconds=(), seed: int = 0) -> Retrieval:
    """A Retrieval of ranked lists (Q, k) for a view's queries; unlabelled ones have no metrics."""
    wanted = view.queries["product_id"].to_numpy()
    there = view.gallery["product_id"].to_numpy()
    itself = view.queries["image_id"].isin(view.gallery["image_id"]).to_numpy()
    hits = metrics.hits_from_ranks(ranks, wanted, there)
    n_relevant = metrics.count_relevant(wanted, there) - itself
    labelled = wanted >= 0
    found = {"n_gallery": len(view.gallery)}
    if labelled.any():
        found |= metrics.summary(hits[labelled], n_relevant[labelled], wanted[labelled], seed=seed)
    if seconds:
        found["steps"] = list(seconds)
    return Retrieval(scores, ranks, hits, n_relevant, found)
