"""A retrieval task on somebody's photos: what is learned from, asked, and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from vipr_utils.data import catalog, drawn
from vipr_utils.data.store import Photos, Store, build_store, open_data
from vipr_utils.data.transforms import Evaluation
from vipr_utils.host import platform
from vipr_utils.host.device import precision_used, seed_everything, working_device
from vipr_utils.judge import metrics, runs
from vipr_utils.retrieve import pipeline, rerank, search
from vipr_utils.retrieve.embedding import (
    embed,
    embed_at_sizes,
    embed_zoomed,
    with_learned_whitening,
)

MOST_VALIDATED = 10_000  # photos that each epoch of a training is validated on
DOMAINS = ("customer", "shop")  # what a query and what a gallery photo of unknown domain counts as


class View(NamedTuple):
    """Queries and the gallery they search: rows of the catalog."""

    queries: pd.DataFrame
    gallery: pd.DataFrame


class Sides(NamedTuple):
    """Embeddings of a view's queries (Q, D) and of the photos that are `Task.known` (M, D), in
    whose number is its gallery."""

    queries: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Retrieval:
    """Ranked lists of Q queries: scores and ranks (rows of the view's gallery), hits, all (Q, k).

    average_precision (Q,) is AP@5, NaN where nothing relevant is there; metrics as in run.json;
    seconds: [{step, seconds}] of post-processing; words (Q, k): what is printed on both photos, see
    `text.words`, where that was asked.
    """

    scores: np.ndarray
    ranks: np.ndarray
    hits: np.ndarray
    n_relevant: np.ndarray
    metrics: dict
    seconds: list[dict] = ()
    words: np.ndarray | None = None

    @property
    def average_precision(self) -> np.ndarray:
        return metrics.average_precision_at_k(self.hits, self.n_relevant)


class Task:
    """Somebody's photos under a protocol; shown in a notebook it says what was found.

    views: 'test', 'shop' and 'customer' (the same queries against that part of the gallery, where
    domains are known), and 'validation' (queries held out of train). fit: train photos to learn
    from; lost: files that could not be read. Embeddings handed to its methods have a row for each
    row of `photos`.
    """

    def __init__(
        self,
        data_root: str = "",
        *,
        protocol: str = "test",
        gallery_domain: str = "",
        image_size: int = 224,
        seen_px: int = 0,
        holdout: float = 0.1,
        validation: str = "auto",
        batch_size: int = 64,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
        cache_dir: str = "",
    ) -> None:
        """Build the store of these photos and set those for validation aside.

        image_size, seen_px: see `packed_px`; holdout: share of each product's train photos to
        choose by, 0 for none. validation: 'auto' draws queries (`drawn.queries`) where hardly a
        product has a second photo, 'drawn' always does. Raises CatalogError, ValueError.
        """
        self.started = monotonic()
        seed_everything(seed)
        self.protocol, self.gallery_domain, self.seed = protocol, gallery_domain, seed
        self.device, self.precision = working_device(device), precision
        self.batch_size, self.cache_dir = batch_size, platform.cache_folder(cache_dir)
        self.photos, self.store, self.lost = open_data(
            data_root, cache_dir, px=image_size, seen_px=seen_px
        )
        self.fit, *sides = catalog.split(
            self.photos, protocol, seed=seed, gallery_domain=gallery_domain
        )
        self.validation = None
        if validation not in ("auto", "drawn"):
            raise ValueError(f"validation {validation!r} is unknown: use 'auto' or 'drawn'")
        if holdout:
            self.validation = self._set_aside(holdout, validation)
            self.fit = self.validation.fit
        self.views = _views(View(*sides), self.validation)

    def _set_aside(self, holdout: float, validation: str) -> catalog.Validation:
        """Queries held out of the photos to fit, else drawn from them."""
        spared = catalog.spares_photos(self.fit, self.gallery_domain)
        if validation == "drawn" or not spared:
            return self._drawn()
        layouts = self.store.layouts(self.fit.index)
        return catalog.hold_out(
            self.fit, layouts, holdout=holdout, gallery_domain=self.gallery_domain
        )

    def _drawn(self) -> catalog.Validation:
        """Queries drawn from photos to fit; all that are drawn of this data join the photos."""
        queries = drawn.queries(
            self.photos, first_row=len(self.store.readable), cache_dir=self.cache_dir
        )
        store = build_store(queries, cache_dir=self.cache_dir, store_px=self.store.px)
        self.store = Store(*self.store.folders, *store.folders)
        attrs = self.photos.attrs
        self.photos = pd.concat([self.photos, queries[list(self.photos)]])
        self.photos.attrs = attrs
        asked = self.photos.loc[queries.index[queries["source"].isin(self.fit["image_id"])]]
        gallery = catalog.narrow(self.fit, self.gallery_domain)
        return catalog.Validation(self.fit, asked, gallery, "drawn")

    def __str__(self) -> str:
        found = self.photos.attrs["said"]
        if not self.validation:
            return found
        queries = f"{len(self.validation.queries)} queries, {self.validation.origin}"
        found = f"{found}\nvalidation: {queries}, split {self.validation.split}"
        some, whole = self.epoch_view, self.views["validation"]
        if len(some.gallery) < len(whole.gallery):
            found += f"\nepochs validate on {sizes(some)}"
        return found

    def _repr_html_(self) -> str:
        return "<br>".join(str(self).splitlines()) + self.summary().to_html()

    def __repr__(self) -> str:
        return f"{self}\n{self.summary()}"

    def describe(self) -> str:
        """'protocol test, 97 queries, 205 gallery photos': for captions."""
        return f"protocol {self.protocol}, {sizes(self.views['test'])}"

    def summary(self) -> pd.DataFrame:
        """Images and products of each part: what is learned from, each view's sides."""
        parts = {"fit": self.fit}
        for name, view in self.views.items():
            parts |= {f"{name}: {side}": rows for side, rows in view._asdict().items()}
        products = pd.concat(parts, names=["part"]).groupby("part", sort=False)["product_id"]
        return products.agg(images="size", products="nunique").rename_axis(None)

    # ------------------------------------------------------------------------------- training

    def training_photos(
        self, transform, rows=None, *, clutter: float = 0.0, zoom: float = 1.0
    ) -> Photos:
        """The photos to fit (or some rows of them) with labels 0..C-1, under a training transform.

        clutter: share of shop photos cut out and laid on other photos, as customers see them; at
        least half where most products have one photo, which is then a pair with its own drawing.
        zoom: central share of each side of customers' photos, 1 is all. A photo of unknown domain
        counts as a shop's. Raises ValueError for rows that are not in fit, and for a transform of
        evaluation.
        """
        rows = self.fit if rows is None else rows
        if not rows.index.isin(self.fit.index).all():
            raise ValueError(
                "some photos to train on are held out, or queries, or of other data: take rows of "
                "task.fit"
            )
        if isinstance(transform, Evaluation):
            raise ValueError(
                "a training photo was to be seen as in evaluation: take transforms.augmentation, "
                "where 'none' changes nothing"
            )
        if (rows["product_id"].value_counts() == 1).mean() > 0.5:
            clutter = max(clutter, 0.5)
        shop = (rows["domain"] != "customer").to_numpy()
        return Photos(
            self.store,
            rows.index,
            transform,
            labels=catalog.with_labels(rows),
            shop=shop,
            clutter=clutter,
            zoom=np.where(shop, 1.0, zoom),
            seed=self.seed,
        )

    def validate(self, model, *, distance: str = "cosine", image_size: int = 0) -> dict:
        """Metrics of a model in training on `epoch_view`; not cached."""
        view = self.epoch_view
        sides = [self._embedded(model, rows, image_size) for rows in view]
        return self._ranked(view, *sides, distance=distance).metrics

    @property
    def epoch_view(self) -> View:
        """The validation of an epoch: whole products, the same on every machine, with about
        MOST_VALIDATED photos where there are more."""
        view = self.views["validation"]
        some = some_products(pd.concat(view), MOST_VALIDATED)
        return View(*(rows[rows["product_id"].isin(some)] for rows in view))

    def validator(self, **settings):
        """`validate` with these settings, for `training.fit`; None where nothing is held out."""
        return partial(self.validate, **settings) if self.validation else None

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

    def embed(self, model, *, image_size: int | tuple[int, ...] = 0, **settings) -> np.ndarray:
        """(N, D) embeddings of all photos, kept on disk; of several sizes their normalised sum.

        settings: fit, zoom, features, precision, as in `embedding.embed`.
        """
        return self._embedded(model, self.photos, image_size, cache_dir=self.cache_dir, **settings)

    def _embedded(self, model, rows: pd.DataFrame, image_size, **settings) -> np.ndarray:
        """(N, D) embeddings of these rows, settings as in `embedding.embed`."""
        settings = {
            "precision": self.precision,
            "device": self.device,
            "batch_size": self.batch_size,
        } | settings
        if isinstance(image_size, tuple):
            return embed_at_sizes(model, self.store, rows.index, image_sizes=image_size, **settings)
        return embed(model, self.store, rows.index, image_size=image_size, **settings)

    def rows(self, embeddings: np.ndarray, table: pd.DataFrame) -> np.ndarray:
        """The embeddings of these rows of the catalog. Raises ValueError where they are not of the
        photos of this task."""
        at = self.photos.index.get_indexer(table.index)
        if len(embeddings) != len(self.photos) or (at < 0).any():
            raise ValueError(
                "these embeddings are not of this task's photos, or a row asked for is not among "
                "them: take task.embed(model), which has a row for each of task.photos"
            )
        return embeddings[at]

    def ms_per_image(self, model, *, image_size: int | tuple[int, ...] = 0) -> float:
        """Milliseconds to embed an image, over 128 of them, decoding and transform included."""
        some, start = self.photos[:128], perf_counter()
        self._embedded(model, some, image_size)
        return (perf_counter() - start) / len(some) * 1000

    # -------------------------------------------------------------------------------- scoring

    def known(self, view: str | View) -> pd.DataFrame:
        """The photos whose products may be known when a view's queries are answered: its gallery,
        and the train photos that a narrowed gallery leaves out."""
        asked, gallery = self._view(view)
        tables = [gallery, self.fit]
        if self.validation and not asked.index.isin(self.validation.queries.index).any():
            tables += [self.views["test"].gallery, self.validation.queries]
        rows = pd.concat(tables).index.unique().sort_values()
        real = self.photos.loc[rows]
        return real[real["split"] != "drawn"]

    def sides(self, embeddings: np.ndarray, view: str | View) -> Sides:
        """The embeddings (N, D) of a view's rows."""
        tables = self._view(view).queries, self.known(view)
        return Sides(*(self.rows(embeddings, table) for table in tables))

    def _view(self, view: str | View) -> View:
        return self.views[view] if isinstance(view, str) else view

    def zoomed(
        self, model, view: str, *, zoom: tuple[float, float], image_size: int = 0, features=False
    ) -> Sides:
        """The embeddings of a view's rows, seen through a zoom for each domain.

        zoom: shares of each side, of customers' photos and of shop photos. Where a domain is
        unknown a query counts as a customer's photo, a gallery photo as the shop's.
        """
        sides = [
            embed_zoomed(
                model,
                self.store,
                rows.index,
                zoom=zoom,
                customer=rows["domain"].replace("", unknown) == "customer",
                image_size=image_size,
                features=features,
                device=self.device,
                batch_size=self.batch_size,
                precision=self.precision,
                cache_dir=self.cache_dir,
            )
            for rows, unknown in zip([self.views[view].queries, self.known(view)], DOMAINS)
        ]
        return Sides(*sides)

    def retrieve(
        self,
        embeddings: np.ndarray | Sides,
        view: str | View = "test",
        *,
        steps=(),
        distance="cosine",
        asked: np.ndarray | None = None,
    ) -> Retrieval:
        """The ranked lists of a view after these steps of post-processing (see `pipeline`).

        asked (Q,) bool: the queries that are answered, None for all. Projections are fitted on the
        photos that are `known`. Raises ValueError for steps with the
        manhattan distance: they work by cosine.
        """
        answered = self._view(view)
        sides = embeddings if isinstance(embeddings, Sides) else self.sides(embeddings, view)
        if asked is not None:
            answered = answered._replace(queries=answered.queries[asked])
            sides = sides._replace(queries=sides.queries[asked])
        if steps and distance == "manhattan":
            raise ValueError(
                f"steps {list(steps)} work by cosine, got distance 'manhattan': "
                "leave the steps or the distance away"
            )
        fitted = pipeline.fitted_first(steps)
        sides, seconds = self.projected(sides, view, steps[:fitted])
        found = self._ranked(
            answered, *sides, references=self.known(view), steps=steps[fitted:], distance=distance
        )
        return replace(found, seconds=[*seconds, *found.seconds])

    def projected(self, sides: Sides, view: str | View, steps) -> tuple[Sides, list[dict]]:
        """(the sides behind projections fitted on the known photos, [{step, seconds}])."""
        if not steps:
            return sides, []
        rows = self.known(view)
        unprojected = search.Search(*map(rerank.unit, sides), rows, rows)
        found, seconds = pipeline.in_turn(zip(steps, pipeline.check(steps)), unprojected)
        return Sides(found.queries, found.gallery), seconds

    def evaluate(
        self, model_or_embeddings, *, steps=(), distance="cosine", image_size=0
    ) -> dict[str, Retrieval]:
        """A Retrieval for each view, of a model or of embeddings."""
        embeddings = model_or_embeddings
        if not isinstance(embeddings, np.ndarray):
            embeddings = self.embed(model_or_embeddings, image_size=image_size)
        return {
            view: self.retrieve(embeddings, view, steps=steps, distance=distance)
            for view in self.views
        }

    def _ranked(self, view: View, queries, gallery, **asked) -> Retrieval:
        return ranked(
            view,
            queries,
            gallery,
            seed=self.seed,
            device=self.device,
            cache_dir=self.cache_dir,
            **asked,
        )

    # ------------------------------------------------------------------------------ the record

    def save_run(
        self, folder: Path, *, validated: dict | None = None, trained: bool = False, **record
    ) -> Path:
        """Write <folder>/run.json, see `runs.save`, and split.csv where photos were held out.

        validated: the model's metrics on them. record: notebook, params, metrics, model, cut_short.
        """
        if self.validation:
            self.validation.save(folder)
        precision = precision_used(self.precision, self.device)
        if not trained:
            precision.pop("training")
        return runs.save(
            folder,
            data=catalog.describe_data(self.photos),
            protocol=self.protocol,
            seconds=monotonic() - self.started,
            device=str(self.device),
            precision=precision,
            validation=self.validation.record(validated) if self.validation and validated else None,
            **record,
        )


def some_products(rows: pd.DataFrame, most: int) -> pd.Index:
    """Products of these rows of a catalog, drawn alike on every machine until they have `most` of
    the rows or just more; all where the rows are no more."""
    counts = rows["product_id"].value_counts().sort_index().sample(frac=1, random_state=0)
    return counts.index[counts.cumsum() - counts < most]


def sizes(view: View) -> str:
    """'2,485 queries, 2,721 gallery photos'"""
    return f"{len(view.queries):,} queries, {len(view.gallery):,} gallery photos"


def _views(test: View, validation: catalog.Validation | None) -> dict[str, View]:
    """What can be asked of these photos, by name; see `Task`."""
    views = {"test": test}
    if {"shop", "customer"} <= set(test.gallery["domain"]):
        for domain in ("shop", "customer"):
            views[domain] = View(test.queries, catalog.narrow(test.gallery, domain))
    if validation:
        views["validation"] = View(validation.queries, validation.gallery)
    return views


def ranked(
    view: View,
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    references: pd.DataFrame | None = None,
    steps: list[str] = (),
    distance: str = "cosine",
    seed: int = 0,
    device="cpu",
    cache_dir: Path | None = None,
) -> Retrieval:
    """The scored lists for embeddings (Q, D) and (G, D) of a view's rows, after these steps.

    references: the rows that (G, D) belong to, where they are more than the view's gallery: steps
    may look at them, though only the view's gallery is answered."""
    references = view.gallery if references is None else references
    if not steps:
        if not references.index.equals(view.gallery.index):
            gallery = gallery[references.index.get_indexer(view.gallery.index)]
        scores, ranks = search.top_k(
            queries,
            gallery,
            5,
            distance=distance,
            device=device,
            query_ids=view.queries["image_id"],
            gallery_ids=view.gallery["image_id"],
        )
        return scored(view, scores, ranks, seed=seed)
    # steps do not see which products the queries show
    unlabelled = view.queries.drop(columns=["product_id", "product", "group"], errors="ignore")
    answers = references.index.isin(view.gallery.index)
    some = None if answers.all() else answers
    unsearched = search.Search(
        queries, gallery, unlabelled, references, answers=some, device=device, cache_dir=cache_dir
    )
    found, seconds = pipeline.apply(list(steps), unsearched)
    rows = np.append(view.gallery.index.get_indexer(found.gallery_rows.index), -1)
    return scored(view, found.scores, rows[found.ranks], seconds=seconds, seed=seed)


def scored(view: View, scores, ranks, *, seconds=(), seed: int = 0) -> Retrieval:
    """A Retrieval of ranked lists (Q, k) for a view's queries; unlabelled ones have no metrics."""
    products = view.queries["product_id"].to_numpy()
    gallery_products = view.gallery["product_id"].to_numpy()
    itself = view.queries["image_id"].isin(view.gallery["image_id"]).to_numpy()
    hits = metrics.hits_from_ranks(ranks, products, gallery_products)
    n_relevant = metrics.count_relevant(products, gallery_products) - itself
    found = {"n_gallery": len(view.gallery)}
    labelled = products >= 0
    if labelled.any():
        found |= metrics.summary(
            hits[labelled], n_relevant[labelled], products[labelled], seed=seed
        )
        found["chance"] = metrics.chance_map_at_k(n_relevant[labelled], len(view.gallery))
    return Retrieval(scores, ranks, hits, n_relevant, found, seconds)
