"""Batches of positions 0..N-1. Every sampler is a pure function of (seed, epoch): `batches(epoch)` gives the same
list on every machine and after every restart, whatever ran before."""

from __future__ import annotations

import math

import numpy as np

BALANCES = ("", "product", "group")


KINDS = ("shuffled", "shuffled_domains", "products", "balanced", "groups")


def sampler(
    kind: str,
    labels,
    *,
    batch_size: int,
    images: int = 4,
    groups=None,
    shop=None,
    seed: int = 0,
    **limits,
):
    """The sampler of that name. 'shuffled' takes no heed of labels; 'shuffled_domains' shows each shop photo so often that
    they (shop (N,) bool) make an eighth of the images; the others draw P = batch_size / images products:
    'products' as often as they have images, 'balanced' all alike, 'groups' all groups (N,) alike.
    limits: PKSampler's min_images and max_images of a product."""
    if kind not in KINDS:
        raise ValueError(f"batches {kind!r} are unknown: use one of {KINDS}")
    if kind.startswith("shuffled") and (
        limits.get("min_images", 1) > 1 or limits.get("max_images")
    ):
        raise ValueError(
            f"batches {kind!r} take all images: min_images and max_images need one of {KINDS[2:]}"
        )
    if kind == "shuffled":
        return ShuffledSampler(len(labels), batch_size=batch_size, seed=seed)
    if kind == "shuffled_domains":
        its = np.flatnonzero(shop)
        times = max(1, round((len(labels) - len(its)) / (7 * max(1, len(its)))))
        rows = np.concatenate([np.arange(len(labels)), np.repeat(its, times - 1)])
        return ShuffledSampler(rows, batch_size=batch_size, seed=seed)
    if batch_size % images:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of the {images} images that each product brings"
        )
    how = {"balanced": {"balance": "product"}, "groups": {"balance": "group", "groups": groups}}
    return PKSampler(
        labels,
        products=batch_size // images,
        images=images,
        seed=seed,
        **how.get(kind, {}),
        **limits,
    )


class Stages:
    """Batches of one sampler for the first epochs and of another after them, such as 'balanced' for the long tail."""

    def __init__(self, first, then, *, first_epochs: int) -> None:
        self.first, self.then, self.first_epochs = first, then, first_epochs

    def batches(self, epoch: int) -> list[np.ndarray]:
        return (self.first if epoch < self.first_epochs else self.then).batches(epoch)


class ShuffledSampler:
    """Plain shuffled batches of positions (a number of them, or a list that may repeat some); the last batch may be
    short (dropped when it has fewer than two images)."""

    def __init__(self, positions, *, batch_size: int, seed: int = 0) -> None:
        self.positions = np.arange(positions) if np.ndim(positions) == 0 else np.asarray(positions)
        if len(self.positions) < 2 or batch_size < 2:
            raise ValueError(
                f"ShuffledSampler needs 2 images and batch_size >= 2, got {positions} and {batch_size}"
            )
        self.batch_size, self.seed = batch_size, seed

    def batches(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.positions)
        cut = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [b for b in cut if len(b) > 1]


class PKSampler:
    """P products x K images a batch ("m-per-class"); an epoch shows about as many images as there are.

    labels (N,) int. Each product's images are shuffled and cut into runs of K; a product with fewer than K repeats some
    (replace=True) or is an error (replace=False). Products with fewer than min_images are left out; max_images caps
    what a product shows in an epoch (Conde 2022: 4 and 50).
    balance: "" shows products as often as they have images; "product" all alike, "group" all groups (N,) alike and the
    products within (Bai 2020, arXiv:2008.10545: a second stage for the long tail).
    """

    def __init__(
        self,
        labels,
        *,
        products: int = 8,
        images: int = 4,
        seed: int = 0,
        replace: bool = True,
        min_images: int = 1,
        max_images: int = 0,
        balance: str = "",
        groups=None,
    ) -> None:
        labels = np.asarray(labels)
        if products < 2 or images < 2:
            raise ValueError(
                f"PKSampler needs products >= 2 and images >= 2 for its pairs, got {products} and {images}"
            )
        if balance not in BALANCES or (balance == "group" and groups is None):
            raise ValueError(
                f"balance {balance!r}: use one of {BALANCES}; 'group' needs groups, one for each label"
            )
        order = np.argsort(labels, kind="stable")
        rows = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        self.rows = [r for r in rows if len(r) >= min_images]
        if len(self.rows) < products:
            raise ValueError(
                f"PKSampler needs {products} products in a batch, the data has {len(self.rows)}"
                + (f" with {min_images} images or more" if min_images > 1 else "")
                + ". Use a smaller batch_size."
            )
        counts = np.array([len(r) for r in self.rows])
        if not replace and (counts < images).any():
            least = counts.argmin()
            raise ValueError(
                f"PKSampler needs {images} images per product, {(counts < images).sum():,} of {len(counts):,} products "
                f"have fewer (smallest: {labels[self.rows[least][0]]} with {counts[least]}). "
                f"Use min_images={images} or replace=True."
            )
        self.products, self.images, self.seed, self.balance = products, images, seed, balance
        self.max_images = max_images or len(labels)
        self.groups = None if groups is None else np.asarray(groups)[[r[0] for r in self.rows]]

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        streams = [self._runs(rows, rng) for rows in self.rows]
        return list(self._batches([(p, next(streams[p])) for p in self._order(rng)]))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Which product each run of the epoch shows."""
        shown = np.array([min(len(rows), self.max_images) for rows in self.rows])
        runs = -(-shown // self.images)
        if not self.balance:
            return rng.permutation(np.repeat(np.arange(len(runs)), runs))
        products = np.arange(len(runs))
        kinds = (
            [products]
            if self.balance == "product"
            else [products[self.groups == g] for g in np.unique(self.groups)]
        )
        each = math.ceil(runs.sum() / len(kinds))
        drawn = [
            np.concatenate([rng.permutation(kind) for _ in range(-(-each // len(kind)))])[:each]
            for kind in kinds
        ]
        return np.stack(drawn, 1).ravel()  # one of each group in turn

    def _runs(self, rows: np.ndarray, rng: np.random.Generator):
        """One product's images in runs of K without end, each pass over them in a new order."""
        shown = rng.permutation(rows)[: self.max_images]
        while True:
            fill = -len(shown) % self.images
            order = rng.permutation(shown)
            more = rng.choice(order, fill, replace=fill > len(order))
            yield from np.concatenate([order, more]).reshape(-1, self.images)

    def _batches(self, runs: list[tuple[int, np.ndarray]]):
        """Groups of P runs of P different products, in the order given; what cannot fill a batch is left out."""
        waiting = runs
        while waiting:
            batch, seen, rest = [], set(), []
            for i, (product, run) in enumerate(waiting):
                if product in seen:
                    rest.append((product, run))
                    continue
                seen.add(product)
                batch.append(run)
                if len(batch) == self.products:
                    rest += waiting[i + 1 :]
                    break
            if len(batch) < self.products:
                return
            yield np.concatenate(batch)
            waiting = rest
