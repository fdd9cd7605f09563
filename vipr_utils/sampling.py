"""Batches of positions 0..N-1. Every sampler is a pure function of (seed, epoch): `batches(epoch)` gives the same
list on every machine and after every restart, whatever ran before."""

from __future__ import annotations

import numpy as np


class ShuffledSampler:
    """Plain shuffled batches; the last one may be short (dropped when it has fewer than two images)."""

    def __init__(self, n: int, *, batch_size: int, seed: int = 0) -> None:
        if n < 2 or batch_size < 2:
            raise ValueError(f"ShuffledSampler needs 2 images and batch_size >= 2, got {n} and {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed

    def batches(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        cut = [order[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)]
        return [b for b in cut if len(b) > 1]


class PKSampler:
    """P products x K images a batch ("m-per-class"); an epoch shows about as many images as there are.

    labels: (N,) int. Each product's images are shuffled and cut into runs of K; a product with fewer than K images
    repeats some (replace=True) or is an error (replace=False). max_images caps a product's images per epoch.
    """

    def __init__(
        self, labels, *, products: int = 8, images: int = 4, seed: int = 0, replace: bool = True, max_images: int = 0
    ) -> None:
        labels = np.asarray(labels)
        order = np.argsort(labels, kind="stable")
        self.rows = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        if products < 2 or images < 2:
            raise ValueError(
                f"PKSampler needs products >= 2 and images >= 2 for its pairs, got {products} and {images}"
            )
        if len(self.rows) < products:
            raise ValueError(
                f"PKSampler needs {products} products in a batch, the data has {len(self.rows)}. Use a smaller batch_size."
            )
        counts = np.array([len(r) for r in self.rows])
        if not replace and (counts < images).any():
            least = counts.argmin()
            raise ValueError(
                f"PKSampler needs {images} images per product, {(counts < images).sum():,} of {len(counts):,} products have "
                f"fewer (smallest: {labels[self.rows[least][0]]} with {counts[least]}). "
                f"Use min_images={images} or replace=True."
            )
        self.products, self.images, self.seed, self.max_images = products, images, seed, max_images

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        runs = [(p, run) for p, rows in enumerate(self.rows) for run in self._runs(rows, rng)]
        rng.shuffle(runs)
        return list(self._batches(runs))

    def _runs(self, rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """One product's images of this epoch in runs of K, the last one filled up with repeats."""
        rows = rng.permutation(rows)[: self.max_images or None]
        fill = -len(rows) % self.images
        rows = np.concatenate([rows, rng.choice(rows, fill, replace=fill > len(rows))])
        return list(rows.reshape(-1, self.images))

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
