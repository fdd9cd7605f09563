"""Batches of positions 0..N-1.

Every sampler is a pure function of (seed, epoch): `batches(epoch)` gives the same list on every
machine and after every restart, whatever ran before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np
import pandas as pd

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
    min_images: int = 1,
    max_images: int = 0,
):
    """The sampler of that name.

    'shuffled' takes no heed of labels; 'shuffled_domains' shows each shop photo so often that they
    (shop (N,) bool) make an eighth of the images; the others draw P = batch_size / images products:
    'products' as often as they have images, 'balanced' all alike, 'groups' all groups (N,) alike.
    min_images, max_images: of a product, see PKSampler.
    """
    if kind not in KINDS:
        raise ValueError(f"batches {kind!r} are unknown: use one of {KINDS}")
    if kind.startswith("shuffled"):
        if min_images > 1 or max_images:
            raise ValueError(
                f"batches {kind!r} take all images: min_images and max_images need one of "
                f"{KINDS[2:]}"
            )
        rows = np.arange(len(labels)) if kind == "shuffled" else _an_eighth(np.asarray(shop))
        return ShuffledSampler(rows, batch_size=batch_size, seed=seed)
    if batch_size % images:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of the {images} images that each product "
            "brings"
        )
    limits = {"min_images": min_images, "max_images": max_images, "groups": groups}
    balance = {"products": "", "balanced": "product", "groups": "group"}[kind]
    products = batch_size // images
    return PKSampler(labels, products=products, images=images, seed=seed, balance=balance, **limits)


def _an_eighth(shop: np.ndarray) -> np.ndarray:
    """All positions, those of shop photos so often that they are an eighth of all."""
    positions = np.flatnonzero(shop)
    times = max(1, round((len(shop) - len(positions)) / (7 * max(1, len(positions)))))
    return np.concatenate([np.arange(len(shop)), np.repeat(positions, times - 1)])


class Stages:
    """Batches of one sampler for the first epochs and of another after them, such as 'balanced'."""

    def __init__(self, first, then, *, first_epochs: int) -> None:
        self.first, self.then, self.first_epochs = first, then, first_epochs

    def batches(self, epoch: int) -> list[np.ndarray]:
        return (self.first if epoch < self.first_epochs else self.then).batches(epoch)


class ShuffledSampler:
    """Plain shuffled batches of positions (a number of them, or a list that may repeat some).

    The last batch may be short; it is dropped when it has fewer than two images.
    """

    def __init__(self, positions, *, batch_size: int, seed: int = 0) -> None:
        self.positions = np.arange(positions) if np.ndim(positions) == 0 else np.asarray(positions)
        if len(self.positions) < 2 or batch_size < 2:
            raise ValueError(
                "ShuffledSampler needs 2 images and batch_size >= 2, got "
                f"{len(self.positions)} and {batch_size}"
            )
        self.batch_size, self.seed = batch_size, seed

    def batches(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.positions)
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batch for batch in batches if len(batch) > 1]


class PKSampler:
    """P products x K images a batch ("m-per-class"); an epoch shows about as many as there are.

    labels (N,). Each product's images are shuffled and cut into runs of K; a product with fewer
    than K repeats some. Products with fewer than min_images are left out; max_images caps what a
    product shows in an epoch (Conde 2022: 4 and 50).
    balance: "" shows products as often as they have images; "product" all alike, "group" all groups
    (N,) alike and the products within (Bai 2020, arXiv:2008.10545: a second stage for the long
    tail).
    """

    def __init__(
        self,
        labels,
        *,
        products: int = 8,
        images: int = 4,
        seed: int = 0,
        min_images: int = 1,
        max_images: int = 0,
        balance: str = "",
        groups=None,
    ) -> None:
        if products < 2 or images < 2:
            raise ValueError(
                "PKSampler needs products >= 2 and images >= 2 for its pairs, got "
                f"{products} and {images}"
            )
        if balance not in BALANCES or (balance == "group" and groups is None):
            raise ValueError(
                f"balance {balance!r}: use one of {BALANCES}; 'group' needs groups, one each label"
            )
        by_product = pd.Series(labels).groupby(np.asarray(labels)).indices.values()
        self.rows = [rows for rows in by_product if len(rows) >= min_images]
        if len(self.rows) < products:
            enough = f" with {min_images} images or more" if min_images > 1 else ""
            raise ValueError(
                f"PKSampler needs {products} products in a batch, the data has {len(self.rows)}"
                f"{enough}. Use a smaller batch_size."
            )
        self.products, self.images, self.seed, self.balance = products, images, seed, balance
        self.max_images = max_images or len(labels)
        self.groups = np.asarray(groups)[[r[0] for r in self.rows]] if balance == "group" else None

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        runs = [self._runs(rows, rng) for rows in self.rows]
        return list(self._batches(deque((p, next(runs[p])) for p in self._order(rng))))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Which product each run of the epoch shows."""
        shown = np.array([min(len(rows), self.max_images) for rows in self.rows])
        runs = -(-shown // self.images)
        products = np.arange(len(runs))
        if not self.balance:
            return rng.permutation(np.repeat(products, runs))
        pools = [products]
        if self.balance == "group":
            pools = [products[self.groups == group] for group in np.unique(self.groups)]
        length = math.ceil(runs.sum() / len(pools))
        drawn = []
        for pool in pools:
            passes = [rng.permutation(pool) for _ in range(math.ceil(length / len(pool)))]
            drawn.append(np.concatenate(passes)[:length])
        return np.stack(drawn, 1).ravel()  # one of each group in turn

    def _runs(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """One product's images in runs of K without end, each pass over them in a new order."""
        shown = rng.permutation(rows)[: self.max_images]
        while True:
            missing = -len(shown) % self.images
            order = rng.permutation(shown)
            more = rng.choice(order, missing, replace=missing > len(order))
            yield from np.concatenate([order, more]).reshape(-1, self.images)

    def _batches(self, waiting: deque) -> Iterator[np.ndarray]:
        """P runs (product, positions) of P different products each, in the order given.

        What cannot fill a batch is left out.
        """
        while True:
            batch, skipped = {}, []
            while waiting and len(batch) < self.products:
                product, run = waiting.popleft()
                if product in batch:
                    skipped.append((product, run))
                else:
                    batch[product] = run
            if len(batch) < self.products:
                return
            yield np.concatenate(list(batch.values()))
            waiting.extendleft(reversed(skipped))
