"""What to answer with, chosen on validation: networks, zoom, views joined, steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic

import numpy as np

from vipr_utils.host import platform
from vipr_utils.judge import runs
from vipr_utils.judge.board import TIE
from vipr_utils.judge.task import Retrieval, Sides, Task
from vipr_utils.learn import models
from vipr_utils.retrieve import pipeline, rerank, verification

WHOLE = (1.0, 1.0)
PROJECTIONS = ("centring()", "learned_whitening(64)", "learned_whitening(128)")
WHITENED = "learned_whitening(128)"  # of several views joined
WEIGHTS = (0.5, 1.0, 2.0)
MOST_NETWORKS = 3


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
        """'04_pretrained_sweep zoom 1, 0.8|1 + learned whitening + k-reciprocal'"""
        networks = {part.network: [] for part in self.parts}
        for part in self.parts:
            networks[part.network].append("{:g}|{:g}".format(*part.zoom))
        seen = [f"{name} zoom {', '.join(zooms)}" for name, zooms in networks.items()]
        projections = dict.fromkeys(part.projection for part in self.parts if part.projection)
        behind = map(pipeline.method, [*projections, *self.steps])
        return " + ".join([" and ".join(seen), *behind])


@dataclass
class Choice:
    """Candidates tried on the validation queries of a task, and the best of them.

    networks: name -> Embedder; sizes: name -> pixels. Test queries have no part in it.
    """

    task: Task
    networks: dict
    sizes: dict
    max_minutes: float = 0.0  # 0 is no limit
    tried: dict[Candidate, float] = field(default_factory=dict)  # mAP@5 on validation
    refused: dict[str, str] = field(default_factory=dict)
    rungs: dict[str, Candidate] = field(default_factory=dict)
    began: float = field(default_factory=monotonic)
    _looks: dict[tuple, Sides] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        task: Task,
        output_dir: Path,
        *,
        backbones: list[str],
        weights: str = "auto",
        image_size: int = 0,
        model_run: str = "",
        most_runs: int = 3,
        max_minutes: float = 0.0,
    ) -> Choice:
        """A Choice among frozen backbones and the finished runs that held out the same photos.

        image_size: pixels of the frozen ones, 0 takes their own; a run's model sees what it was
        tested at. model_run: this run's model alone. most_runs: so many runs, those that validated
        best. Raises WeightsError where no network can be had.
        """
        found = cls(task, {}, {}, max_minutes)
        folders = [platform.find_run(model_run, output_dir=str(output_dir))] if model_run else []
        if task.validation and not model_run:
            data, split = task.photos.attrs["fingerprint"], task.validation.split
            finished, found.refused = runs.validated(output_dir, data, split)
            folders = finished[:most_runs]
        for name in [] if model_run else backbones:
            try:
                network = models.create(name, weights=weights)
            except models.WeightsError as error:
                found.refused[name] = str(error)
                continue
            found._enter(name, network, image_size)
        for folder in folders:
            found._enter(folder.name, models.load(folder / "model.pt"), 0)
        if not found.networks:
            raise models.WeightsError("; ".join(found.refused.values()))
        return found

    def _enter(self, name: str, network: models.Embedder, px: int) -> None:
        self.networks[name], self.sizes[name] = network, px or network.record["image_size"]

    def record(self, rung: str) -> dict:
        """What was chosen, for run.json: networks, their parts, steps, where a training was cut."""
        candidate = self.rungs[rung]
        names = list(dict.fromkeys(part.network for part in candidate.parts))
        cut = [self.networks[name].record.get("cut_short") for name in names]
        return {
            "what": str(candidate),
            "networks": names,
            "image_size": {name: self.sizes[name] for name in names},
            "parts": [asdict(part) for part in candidate.parts],
            "steps": list(candidate.steps),
            "cut_short": "; ".join(filter(None, cut)),
        }

    # ------------------------------------------------------------------------------ candidates

    def found(self, candidate: Candidate, view: str) -> Retrieval:
        """Its ranked lists for a view."""
        sides = self.joined(candidate.parts, view)
        return self.task.retrieve(sides, view, steps=list(candidate.steps))

    def joined(self, parts: tuple[Part, ...], view: str) -> Sides:
        """Embeddings whose cosine is the weighted mean of the parts' cosines."""
        looks = [self._look(replace(part, weight=1.0), view) for part in parts]
        if len(parts) == 1:
            return looks[0]
        scales = [np.sqrt(part.weight) for part in parts]
        sides = [np.hstack([x * scale for x, scale in zip(side, scales)]) for side in zip(*looks)]
        return Sides(*map(rerank.unit, sides))

    def _look(self, part: Part, view: str) -> Sides:
        """A part's embeddings, computed once."""
        if (part, view) not in self._looks:
            model, px = self.networks[part.network], self.sizes[part.network]
            sides = self.task.zoomed(
                model, view, zoom=part.zoom, image_size=px, features=part.features
            )
            steps = [part.projection] if part.projection else []
            sides, _ = self.task.projected(sides, view, steps)
            self._looks[part, view] = Sides(*map(rerank.unit, sides))
        return self._looks[part, view]

    def cost(self, candidate: Candidate) -> tuple[int, float]:
        """(pairs verified a query, parameters times pixels of its forward passes)."""
        passes = {(part.network, part.zoom[0]) for part in candidate.parts}
        million = [self.networks[name].record["parameters"] for name, _ in passes]
        area = [self.sizes[name] ** 2 for name, _ in passes]
        return sum(map(pipeline.verified_pairs, candidate.steps)), float(np.dot(million, area))

    # ---------------------------------------------------------------------------------- scores

    def score(self, candidate: Candidate) -> float:
        """mAP@5 on validation; tried now if it was not."""
        if candidate not in self.tried:
            metrics = self.found(candidate, "validation").metrics
            self.tried[candidate] = float(np.nan_to_num(metrics["map_at_5"]))
        return self.tried[candidate]

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The one with the best mAP@5 on validation; of those within TIE of it the cheapest.

        What cannot be done on this gallery is left out, and noted in `refused`.
        """
        scores = {}
        for candidate in dict.fromkeys(candidates):
            try:
                scores[candidate] = self.score(candidate)
            except ValueError as error:
                self.refused[str(candidate)] = str(error)
        most = max(scores.values())
        alike = [candidate for candidate in scores if scores[candidate] >= most - TIE]
        cheapest = min(map(self.cost, alike))
        return max((c for c in alike if self.cost(c) == cheapest), key=scores.get)

    # ----------------------------------------------------------------------------------- climb

    def climb(self, zooms: list[float], stacks: list[str], verified: list[str]) -> Candidate:
        """The best of what grows from plain search, a rung at a time; `rungs` names them.

        First each network by itself: its projection, then its zoom, then several zooms joined.
        Then networks are joined, steps follow, and verification where its time fits.
        """
        plain = Candidate((Part(next(iter(self.networks))),))
        self._rung("plain search", [plain])
        alone = []
        for name in self.networks:
            if alone and self._minutes_left() < 0:
                self.refused[name] = "max_minutes were used up before it was tried"
            else:
                alone.append(self._network(name, zooms))
        best = self.best(ways["views joined"] for ways in alone)
        for rung, candidate in next(ways for ways in alone if best in ways.values()).items():
            self._rung(rung, [candidate])
        best = self._rung("networks joined", self._teams([ways["views joined"] for ways in alone]))
        best = self._rung("steps", [best, *self._stepped(best, stacks)])
        affordable = [stack for stack in verified if self._affordable(stack)]
        return self._rung("verification", [best, *self._stepped(best, affordable)])

    def _rung(self, name: str, candidates) -> Candidate:
        best = self.best(candidates)
        if best not in self.rungs.values():
            self.rungs[name] = best
        return best

    def _network(self, name: str, zooms: list[float]) -> dict[str, Candidate]:
        """The best that one network gives, by rung."""
        plain = Part(name)
        projected = [replace(plain, projection=step) for step in PROJECTIONS]
        pooled = [replace(part, features=True) for part in projected]
        first = self.best(Candidate((part,)) for part in [plain, *projected, *pooled])
        pairs = dict.fromkeys([WHOLE, *((a, b) for a in zooms for b in (1.0, a))])
        looks = [replace(first.parts[0], zoom=zoom) for zoom in pairs]
        single = self.best(Candidate((look,)) for look in looks)
        ranked = sorted(looks, key=lambda look: -self.score(Candidate((look,))))
        joined = [Candidate(tuple(ranked[:n])) for n in range(2, len(zooms) + 1)]
        whitened = [replace(candidate, steps=(WHITENED,)) for candidate in joined]
        views = self.best([single, *joined, *whitened])
        return {"projection": first, "zoom": single, "views joined": views}

    def _stepped(self, base: Candidate, stacks: list[str]) -> list[Candidate]:
        """The candidate with each stack behind its own steps, and in their place."""
        split = [tuple(pipeline.split(stack)) for stack in stacks]
        steps = dict.fromkeys([*split, *((*base.steps, *stack) for stack in split)])
        return [replace(base, steps=stack) for stack in steps]

    def _teams(self, alone: list[Candidate]) -> list[Candidate]:
        """The best network, and up to two more joined to it, each under several weights."""
        teams = [self.best(alone)]
        rest = [candidate for candidate in alone if candidate != teams[0]]
        while rest and len(teams) < MOST_NETWORKS:
            grown = [
                Candidate(
                    (*teams[-1].parts, *(replace(p, weight=weight) for p in other.parts)), steps
                )
                for other in rest
                for weight in WEIGHTS
                for steps in dict.fromkeys([(), (WHITENED,)])
            ]
            teams.append(self.best(grown))
            joined = {part.network for part in teams[-1].parts}
            rest = [candidate for candidate in rest if candidate.parts[0].network not in joined]
        return teams

    def _affordable(self, stack: str) -> bool:
        """Whether a stack that verifies fits into what is left of max_minutes."""
        top = sum(map(pipeline.verified_pairs, pipeline.split(stack)))
        views = [self.task.views[view] for view in ("validation", "test")]
        needed = sum(verification.seconds(*view, top) for view in views) / 60
        left = self._minutes_left()
        if needed < left:
            return True
        self.refused[stack] = (
            f"it would take about {needed:.0f} minutes, {left:.0f} of max_minutes are left"
        )
        return False

    def _minutes_left(self) -> float:
        """Of max_minutes."""
        limit = self.max_minutes or np.inf
        return limit - (monotonic() - self.began) / 60
