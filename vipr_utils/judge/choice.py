"""What to answer with, chosen on validation: networks, zoom, views joined, steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
import pandas as pd

from vipr_utils.judge import metrics
from vipr_utils.judge.task import Retrieval, Sides, Task
from vipr_utils.retrieve import pipeline, rerank

WHOLE = (1.0, 1.0)


@dataclass(frozen=True)
class Part:
    """One network's look at a photo, and the projection behind it.

    zoom: see `Task.zoomed`; features: the pooled backbone output in place of the embedding.
    """

    network: str
    zoom: tuple[float, float] = WHOLE
    projection: str = ""  # a step that is fitted, such as "learned_whitening(64)"
    features: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """What could answer: the embeddings of its parts joined, then steps."""

    parts: tuple[Part, ...]
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        """'04_pretrained_sweep zoom 1 and 0.8, learned whitening + k-reciprocal'"""
        networks = dict.fromkeys(part.network for part in self.parts)
        seen = [f"{name}{self._zooms(name)}" for name in networks]
        projections = dict.fromkeys(part.projection for part in self.parts if part.projection)
        behind = [pipeline.method(step) for step in [*projections, *self.steps]]
        return " + ".join([" and ".join(seen), *behind])

    def _zooms(self, network: str) -> str:
        zooms = [part.zoom for part in self.parts if part.network == network]
        if zooms == [WHOLE]:
            return ""
        shown = [f"{a:g}" if a == b else f"{a:g}|{b:g}" for a, b in zooms]
        return f" zoom {', '.join(shown)}"

    @property
    def verified(self) -> int:
        """Pairs of photos that are verified for a query."""
        return max([pipeline.verified_pairs(step) for step in self.steps], default=0)


@dataclass
class Choice:
    """Candidates tried on the validation queries of a task, and the best of them.

    networks: name -> Embedder; sizes: name -> pixels. Test queries have no part in it.
    """

    task: Task
    networks: dict
    sizes: dict
    level: float = 0.68
    tried: dict[Candidate, np.ndarray] = field(default_factory=dict)  # AP@5 of each query
    refused: dict[str, str] = field(default_factory=dict)
    _parts: dict[tuple, Sides] = field(default_factory=dict)

    def found(self, candidate: Candidate, view: str) -> Retrieval:
        """Its ranked lists for a view."""
        sides = self.joined(candidate.parts, view)
        return self.task.retrieve(sides, view, steps=list(candidate.steps))

    def joined(self, parts: tuple[Part, ...], view: str) -> Sides:
        """Embeddings whose cosine is the weighted mean of the parts' cosines."""
        looks = [self._look(replace(part, weight=1.0), view) for part in parts]
        scales = [np.sqrt(part.weight) for part in parts]
        if len(parts) == 1:
            return looks[0]
        return Sides(
            *(
                rerank.unit(np.hstack([x * scale for x, scale in zip(side, scales)]))
                for side in zip(*looks)
            )
        )

    def _look(self, part: Part, view: str) -> Sides:
        if (part, view) not in self._parts:
            model, px = self.networks[part.network], self.sizes[part.network]
            sides = self.task.zoomed(
                model, view, zoom=part.zoom, image_size=px, features=part.features
            )
            steps = [part.projection] if part.projection else []
            sides, _ = self.task.projected(sides, view, steps)
            self._parts[part, view] = Sides(*map(rerank.unit, sides))
        return self._parts[part, view]

    def cost(self, candidate: Candidate) -> tuple[int, float]:
        """(pairs verified a query, arithmetic of its forward passes in arbitrary units)."""
        seen = {(part.network, part.zoom[0]) for part in candidate.parts}
        passes = sum(
            self.networks[name].record["parameters"] * self.sizes[name] ** 2 for name, _ in seen
        )
        return candidate.verified, passes

    def score(self, candidate: Candidate) -> float:
        """mAP@5 on validation; tried now if it was not."""
        if candidate not in self.tried:
            found = self.found(candidate, "validation")
            self.tried[candidate] = found.average_precision
        return float(np.nan_to_num(np.nanmean(self.tried[candidate])))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The one with the best mAP@5; of what cannot be told from it the cheapest."""
        scores = {}
        for candidate in dict.fromkeys(candidates):
            try:
                scores[candidate] = self.score(candidate)
            except ValueError as error:
                self.refused[str(candidate)] = str(error)
        best = max(scores, key=scores.get)
        for candidate in sorted(scores, key=self.cost):
            costs = zip(self.cost(candidate), self.cost(best))
            if all(a <= b for a, b in costs) and self.cost(candidate) < self.cost(best):
                if not self.told_apart(best, candidate):
                    return candidate
        return best

    def told_apart(self, better: Candidate, other: Candidate) -> bool:
        products = self.task.views["validation"].queries["product_id"]
        _, low, _ = metrics.paired_difference(
            self.tried[better], self.tried[other], products, level=self.level
        )
        return low > 0
