"""Photos -> the vectors that a catalogue index searches, by all that was fitted for it."""

from dataclasses import dataclass

import numpy as np
import torch

from vipr_utils.learn.models import Embedder
from vipr_utils.retrieve.embedding import embed_zoomed
from vipr_utils.retrieve.rerank import Projection, joined, unit

WHOLE = (1.0, 1.0)


@dataclass(frozen=True)
class Look:
    """One network's look at a photo, the projections fitted behind it, and the weight of its cosine
    among those of the other looks.

    zoom: central shares of each side that are seen, of customers' photos and of shop photos.
    features: the pooled output of the backbone in place of the embedding.
    """

    model: Embedder
    image_size: int
    zoom: tuple[float, float] = WHOLE
    features: bool = False
    weight: float = 1.0
    projections: tuple[Projection, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Looks joined, then projections fitted on what they give together.

    store_px: of the packed photos that it was fitted on, and packs others to (`Store.px`).
    """

    looks: tuple[Look, ...]
    projections: tuple[Projection, ...] = ()
    store_px: int = 352

    def __call__(
        self, store, rows, customer, *, device="cpu", precision="auto", batch_size: int = 64
    ) -> np.ndarray:
        """(N, D) float32 of length 1 for these rows of a store; NaN for one that is unreadable.

        customer (N,) bool, or one for all: whether a customer took the photo.
        """
        parts = []
        for look in self.looks:
            seen = embed_zoomed(
                look.model,
                store,
                rows,
                zoom=look.zoom,
                customer=customer,
                image_size=look.image_size,
                features=look.features,
                device=torch.device(device),
                precision=precision,
                batch_size=batch_size,
            )
            parts.append(unit(projected(unit(seen), look.projections)))
        return self.together(joined(parts, [look.weight for look in self.looks]))

    def together(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) of length 1, behind the projections of all looks joined."""
        return unit(projected(unit(vectors), self.projections))


def projected(vectors: np.ndarray, projections) -> np.ndarray:
    """The vectors (N, D) through one projection after the other."""
    for projection in projections:
        vectors = projection(vectors)
    return vectors
