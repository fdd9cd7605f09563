"""Batches of positions 0..N-1.

Every sampler is a pure function of (seed, epoch): `batches(epoch)` gives the same list on every
machine and after every restart, whatever ran before.
"""

import math
import warnings
from collections import deque
from collections.abc import Iterator

import numpy as np
import pandas as pd

KINDS = ("shuffled", "shuffled_domains", "products")


def sampler(
    kind: str,
    labels,
    *,
    batch_size: int,
    shop=None,
    seed: int = 0,
    min_images: int = 1,
    max_images: int = 0,
    balanced_from: int = 0,
):
    """The sampler of that name.

    'shuffled' takes no heed of labels; 'shuffled_domains' shows each shop photo so often that they
    (shop (N,) bool) make an eighth of the images, or once where all are of one domain; 'products'
    is a PKSampler with the settings that come last.
    """
    if kind not in KINDS:
        raise ValueError(f"batches {kind!r} are unknown: use one of {KINDS}")
    if kind == "products":
        return PKSampler(
            labels,
            batch_size=batch_size,
            seed=seed,
            min_images=min_images,
            max_images=max_images,
            balanced_from=balanced_from,
        )
    if min_images > 1 or max_images or balanced_from:
        raise ValueError(
            f"batches {kind!r} take all images: min_images, max_images and balanced epochs need "
            "'products'"
        )
    positions = np.arange(len(labels))
    if kind == "shuffled_domains":
        times = max(1, round((~shop).sum() / (7 * max(1, shop.sum()))))
        positions = np.append(positions, np.repeat(np.flatnonzero(shop), times - 1))
    return ShuffledSampler(positions, batch_size=batch_size, seed=seed)


def with_occurrences(batches: list[np.ndarray]) -> list[np.ndarray]:
    """The batches of an epoch as (B, 2) int: each position, and how often it was shown before."""
    shown = pd.Series(np.concatenate(batches))
    pairs = np.column_stack([shown, shown.groupby(shown).cumcount()])
    return np.split(pairs, np.cumsum([len(batch) for batch in batches[:-1]]))


class ShuffledSampler:
    """Plain shuffled batches of positions, which may repeat some.

    The last batch may be short; it is dropped when it has fewer than two images.
    """

    def __init__(self, positions, *, batch_size: int, seed: int = 0) -> None:
        self.positions, self.batch_size, self.seed = positions, batch_size, seed

    def batches(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.positions)
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batch for batch in batches if len(batch) > 1]


class PKSampler:
    """P products x K images a batch ("m-per-class"); an epoch shows about as many as there are.

    labels (N,); images is K, and P = batch_size / K, or all products where there are fewer (with a
    warning). Each product's images are shuffled and cut into runs of K: one comes twice in a run
    only where the product has fewer than K. Products with fewer than min_images are left out;
    max_images caps what a product shows in an epoch (Conde 2022: 4 and 50).
    Products come as often as they have images, but all alike from epoch balanced_from on, 0 is
    never (Bai 2020, arXiv:2008.10545: a second stage for the long tail), and where one product has
    more runs than there are batches.
    """

    def __init__(
        self,
        labels,
        *,
        batch_size: int,
        images: int = 4,
        seed: int = 0,
        min_images: int = 1,
        max_images: int = 0,
        balanced_from: int = 0,
    ) -> None:
        """Raises ValueError for a batch_size that K does not divide and for less than 2 products.

        images: K, at least 2.
        """
        if batch_size % images or batch_size < 2 * images or images < 2:
            raise ValueError(
                f"batch_size {batch_size} is no multiple of the {images} images that each product "
                "brings (the least are 2 products of 2 images)"
            )
        by_product = pd.Series(labels).groupby(np.asarray(labels)).indices.values()
        self.rows = [rows for rows in by_product if len(rows) >= min_images]
        if len(self.rows) < 2:
            raise ValueError(
                f"batches of products need 2 of them, the data has {len(self.rows)} with "
                f"{min_images} images or more: lower min_images, add photos, or use batches "
                "'shuffled'"
            )
        self.products = min(batch_size // images, len(self.rows))
        if self.products * images < batch_size:
            warnings.warn(
                f"batches hold {self.products * images} images, not {batch_size}: there are "
                f"{self.products} products with {min_images} images or more, {images} of each",
                stacklevel=2,
            )
        self.images, self.seed, self.balanced_from = images, seed, balanced_from or math.inf
        self.max_images = max_images or len(labels)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """P runs of P different products each; what cannot fill a batch is left out."""
        rng = np.random.default_rng((self.seed, epoch))
        runs = [self._runs(rows, rng) for rows in self.rows]
        waiting = deque((product, next(runs[product])) for product in self._order(rng, epoch))
        batches = []
        while True:
            batch, skipped = {}, []
            while waiting and len(batch) < self.products:
                product, run = waiting.popleft()
                if product in batch:
                    skipped.append((product, run))
                else:
                    batch[product] = run
            if len(batch) < self.products:
                return batches
            batches.append(np.concatenate(list(batch.values())))
            waiting.extendleft(reversed(skipped))

    def _order(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        """Which product each run of the epoch shows."""
        shown = np.array([min(len(rows), self.max_images) for rows in self.rows])
        runs = -(-shown // self.images)
        products = np.arange(len(runs))
        outweighed = runs.max() > runs.sum() // self.products
        if epoch < self.balanced_from and not outweighed:
            return rng.permutation(np.repeat(products, runs))
        passes = math.ceil(runs.sum() / len(products))
        order = [rng.permutation(products) for _ in range(passes)]
        return np.concatenate(order)[: runs.sum()]

    def _runs(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """One product's images in runs of K without end, each pass over them in a new order.

        The last run of a pass is filled up from the first.
        """
        shown = rng.permutation(rows)[: self.max_images]
        runs = math.ceil(len(shown) / self.images)
        while True:
            yield from np.resize(rng.permutation(shown), (runs, self.images))
