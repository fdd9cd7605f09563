"""What to answer with, chosen on validation: networks, zoom, views joined, steps.

Candidates are tried in stages, and each stage starts from the best of the one before: a projection
for each network, its zoom, several zooms joined, several networks joined, what is printed on
packages, steps on the lists, and verification of their heads. So some dozens are tried where all
combinations would be thousands.

The test has no part in it: a candidate is scored on the validation queries of its task, or where
there are thousands on those of some products, and projections are fitted without their photos.
Every photo passes a network once for each zoom, its features are kept on disk, and the latest
projections in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import monotonic

import numpy as np
import pandas as pd

from vipr_utils.host import platform
from vipr_utils.host.progress import LOG
from vipr_utils.judge import runs
from vipr_utils.judge.board import TIE
from vipr_utils.judge.metrics import paired_difference
from vipr_utils.judge.task import Retrieval, Sides, Task, some_products
from vipr_utils.learn import models
from vipr_utils.retrieve import labels, pipeline, reading, rerank, verification
from vipr_utils.retrieve.encoder import WHOLE, Encoder, Look
from vipr_utils.retrieve.index import Index

PROJECTIONS = ("centring()", "learned_whitening(64)", "learned_whitening(128)")
WHITENED = "learned_whitening(128)"  # of several views joined
WEIGHTS = (0.5, 1.0, 2.0)
MOST_NETWORKS = 3
UNTOLD = 0.01  # share of queries that may gain, though none of those to choose by does
READ_FIRST = 60  # queries that tell whether reading the gallery may pay
HEAD = 10  # photos of each of their lists, and of all lists where the gallery is too large to read
MOST_QUERIES = 4000  # of validation that candidates are tried on
MOST_BYTES = 4 * 2**30  # of embeddings that are joined, and of those remembered for the next


@dataclass(frozen=True)
class Part:
    """One network's look at a photo, and the projection behind it."""

    network: str
    zoom: tuple[float, float] = WHOLE  # of customers' photos and of shop photos, see `Task.zoomed`
    projection: str = ""  # a step that is fitted, such as "learned_whitening(64)"
    features: bool = False  # the pooled output of the backbone in place of the embedding
    weight: float = 1.0  # of its cosine among those of the other parts

    @property
    def label(self) -> str:
        """All but its zoom: 'lite0 features learned_whitening(64) weight 0.5'"""
        features = "features" if self.features else ""
        weight = f"weight {self.weight:g}" if self.weight != 1 else ""
        return " ".join(filter(None, [self.network, features, self.projection, weight]))


@dataclass(frozen=True)
class Candidate:
    """What could answer: the embeddings of its parts joined, then steps.

    Two are the same candidate where all their settings are: what was scored once is not again.
    """

    parts: tuple[Part, ...]
    steps: tuple[str, ...] = ()

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of its steps that come first and are fitted on the gallery."""
        return self.steps[: pipeline.fitted_first(self.steps)]

    def __str__(self) -> str:
        """'lite0 pca(8) zoom 1|1, 0.8|1 and lite2 weight 0.5 zoom 1|1 + product_votes(3)'"""
        zooms = {}
        for part in self.parts:
            zooms.setdefault(part.label, []).append("{:g}|{:g}".format(*part.zoom))
        looks = [f"{label} zoom {', '.join(shares)}" for label, shares in zooms.items()]
        return " + ".join([" and ".join(looks), *self.steps])


@dataclass
class Choice:
    """Candidates tried on the validation queries of a task, and the best of them."""

    task: Task
    networks: dict[str, models.Embedder]
    sizes: dict[str, int]  # pixels that each network sees
    max_minutes: float = 0.0  # 0 is no limit
    tried: dict[Candidate, float] = field(default_factory=dict)  # mAP@5 on validation
    refused: dict[str, str] = field(default_factory=dict)  # what could not be tried here, and why
    rungs: dict[str, Candidate] = field(default_factory=dict)  # of the climb, plain search first
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

        Where queries are drawn from photos that runs learned from, these runs know them and
        validate far too well: there one takes part only where no frozen backbone can be had.
        image_size: pixels of the frozen ones, 0 takes their own; a run's network sees what it was
        tested at. model_run: this one alone, '' or 'best' for all, the most_runs networks that
        validated best. Raises WeightsError where no network can be had, ValueError for a model_run
        that learned from what would choose.
        """
        found = cls(task, {}, {}, max_minutes)
        trained, found.refused = _trained(task, output_dir, model_run)
        if model_run not in ("", "best"):
            backbones, most_runs = [], 1

        for name in backbones:
            try:
                found._enter(name, models.create(name, weights=weights), image_size)
            except models.WeightsError as error:
                found.refused[name] = str(error)
        seen = task.validation and task.validation.how == "drawn"
        for name, path in list(trained.items())[:most_runs]:
            if seen and found.networks:
                found.refused[name] = "it learned from the photos that queries are drawn from"
            else:
                found._enter(name, models.load(path), 0)
        if not found.networks:
            raise models.WeightsError("; ".join(found.refused.values()))
        return found

    def _enter(self, name: str, network: models.Embedder, px: int) -> None:
        self.networks[name], self.sizes[name] = network, px or network.record["image_size"]

    # ------------------------------------------------------------------------------ candidates

    def found(self, candidate: Candidate, view: str, *, asked=None) -> Retrieval:
        """Its ranked lists for a view; asked as in `Task.retrieve`."""
        sides = self.joined(candidate.parts, view)
        return self.task.retrieve(sides, view, steps=list(candidate.steps), asked=asked)

    @cached_property
    def asked(self) -> np.ndarray:
        """(Q,) bool: the validation queries that candidates are tried on.

        All, or where there are more the MOST_QUERIES or so of some products.
        """
        queries = self.task.validation.queries
        return queries["product_id"].isin(some_products(queries, MOST_QUERIES)).to_numpy()

    def joined(self, parts: tuple[Part, ...], view: str) -> Sides:
        """Embeddings whose cosine is the weighted mean of the parts' cosines.

        Raises ValueError where those of all photos would take more than MOST_BYTES.
        """
        looks = [self._look(replace(part, weight=1.0), view) for part in parts]
        widths = [look.queries.shape[1] for look in looks]
        if len(looks) > 1 and 4 * sum(widths) * len(self.task.photos) > MOST_BYTES:
            raise ValueError(f"{len(parts)} views of so many photos do not fit in memory together")
        weights = [part.weight for part in parts]
        return Sides(*(rerank.joined(side, weights) for side in zip(*looks)))

    def _look(self, part: Part, view: str) -> Sides:
        """A part's embeddings, L2-normalised; the last ones, up to MOST_BYTES, are remembered."""
        found = self._looks.get((part, view))
        if not found:
            sides = self.task.zoomed(
                self.networks[part.network],
                view,
                zoom=part.zoom,
                image_size=self.sizes[part.network],
                features=part.features,
            )
            sides, _ = self.task.projected(sides, view, pipeline.split(part.projection))
            found = self._looks[part, view] = Sides(*map(rerank.unit, sides))
            while sum(side.nbytes for looks in self._looks.values() for side in looks) > MOST_BYTES:
                del self._looks[next(iter(self._looks))]
        return found

    def vectors(self, candidate: Candidate, view: str) -> Sides:
        """What its steps on lists start from: embeddings of a view behind all projections, of
        length 1."""
        sides, _ = self.task.projected(
            self.joined(candidate.parts, view),
            view,
            candidate.projections,
        )
        return Sides(*map(rerank.unit, sides))

    def recalled(self, folder: Path) -> Candidate | None:
        """What a finished notebook 06 chose, so far as an index can answer by it; None where there
        is none in the folder, or one of its networks takes no part here."""
        try:
            chosen = runs.load(folder)["chosen"]["index"]
        except (runs.RunError, KeyError, TypeError):
            return None
        parts = tuple(Part(**part | {"zoom": tuple(part["zoom"])}) for part in chosen["parts"])
        if not {part.network for part in parts} <= set(self.networks):
            return None
        return Candidate(parts, tuple(chosen["steps"]))

    def encoder(self, candidate: Candidate) -> Encoder:
        """What embeds any photo as the candidate does: its projections fitted on known photos."""
        known = self.task.known("test")
        looks = []
        for part in candidate.parts:
            seen = self._look(replace(part, projection="", weight=1.0), "test").known
            looks.append(
                Look(
                    self.networks[part.network],
                    self.sizes[part.network],
                    part.zoom,
                    part.features,
                    part.weight,
                    pipeline.fitted(pipeline.split(part.projection), seen, known),
                )
            )
        seen = rerank.unit(self.joined(candidate.parts, "test").known)
        return Encoder(
            tuple(looks),
            pipeline.fitted(candidate.projections, seen, known),
            self.task.store.px,
        )

    def index(self, folder: Path, candidate: Candidate, **about) -> Index:
        """The gallery as an index that answers as the candidate does; see `Index.build`."""
        return Index.build(
            folder,
            self.encoder(candidate),
            self.catalogue(),
            self.vectors(candidate, "test").known,
            steps=candidate.steps[len(candidate.projections) :],
            judge=self.judge(candidate),
            about={"what": str(candidate), **about},
        )

    def catalogue(self) -> pd.DataFrame:
        """The known photos as rows of an index."""
        known = self.task.known("test")
        return pd.DataFrame(
            {
                "photo": known["name"],
                "product": known["product"],
                "group": known["group"].astype(str).replace("-1", ""),
                "domain": known["domain"],
                "answered": known.index.isin(self.task.views["test"].gallery.index),
            }
        )

    def judge(self, candidate: Candidate) -> labels.Judge | None:
        """What says how sure it is, fitted on validation; None where nothing was held out, or what
        was drawn instead, on which it would be far too sure."""
        if not self.task.validation or self.task.validation.how == "drawn":
            return None
        queries, known = self.task.validation.queries, self.task.known("validation")
        sides = self.vectors(candidate, "validation")
        return labels.judge(
            sides.queries,
            queries["product_id"].to_numpy(),
            sides.known,
            known["product_id"].to_numpy(),
            device=self.task.device,
        )

    def indexable(self) -> Candidate:
        """The best of those tried that an index can answer by."""
        return self.best(candidate for candidate in self.tried if pipeline.local(candidate.steps))

    def cost(self, candidate: Candidate) -> tuple[int, bool, int]:
        """(pairs verified a query, whether photos are read, parameters times pixels of its forward
        passes)."""
        arithmetic = 0
        for name, _ in {(part.network, part.zoom[0]) for part in candidate.parts}:
            arithmetic += self.networks[name].record["parameters"] * self.sizes[name] ** 2
        return (
            pipeline.verified_pairs(candidate.steps),
            pipeline.reads(candidate.steps),
            arithmetic,
        )

    # ---------------------------------------------------------------------------------- scores

    def score(self, candidate: Candidate) -> float:
        """mAP@5 on the validation queries that are `asked`; tried now if it was not."""
        if candidate not in self.tried:
            metrics = self.found(candidate, "validation", asked=self.asked).metrics
            self.tried[candidate] = np.nan_to_num(metrics["map_at_5"])
        return self.tried[candidate]

    def best(self, candidates: Iterable[Candidate], *, deepest: bool = False) -> Candidate:
        """The one with the best mAP@5 on validation; of those within TIE of it the cheapest, or the
        cheapest of those that verify most.

        Where one of them comes within TIE of the best that was ever tried, the choice is among
        such: so ties of one stage behind the other do not add up. What cannot be done on this
        gallery is left out, and noted in `refused`. Raises ValueError where nothing can be done.
        """
        scores = {}
        for candidate in candidates:
            try:
                scores[candidate] = self.score(candidate)
            except ValueError as error:
                self.refused[str(candidate)] = str(error)
        if not scores:
            raise ValueError(f"nothing can be tried on these photos: {self.refused}")

        most, ever = max(scores.values()), max(self.tried.values())
        least = (ever if most >= ever - TIE else most) - TIE

        def rank(candidate: Candidate) -> tuple:
            pairs, *rest = self.cost(candidate)
            pairs = -pairs if deepest else pairs
            return (
                scores[candidate] < least,
                pairs,
                *rest,
                -scores[candidate],
            )

        return min(scores, key=rank)

    # ----------------------------------------------------------------------------------- climb

    def climb(
        self, zooms: list[float], stacks: list[str], verified: list[str], readings: Iterable = ()
    ) -> Candidate:
        """The best of what grows from plain search, a rung at a time; `rungs` names them.

        First each network by itself: its projection, then its zoom, then several zooms joined.
        Then networks are joined, steps follow, and verification where its time fits. What it stands
        behind was chosen by these very queries and scores too high on them: so where they are too
        few to rule out that it helps (`UNTOLD`) the deepest is taken that is not worse by over TIE.
        Last comes what is printed, where it surely gains over all that. Raises ValueError where no
        photo was held out.
        """
        if not self.task.validation:
            raise ValueError("nothing to choose by: set holdout over 0, or choose='none'")
        self.began = monotonic()
        plain = Candidate((Part(next(iter(self.networks))),))
        self._rung("plain search", [plain])
        alone = []
        for name in self.networks:
            if alone and self._too_long(0):
                self.refused[name] = "max_minutes were used up before it was tried"
            else:
                alone.append(self._network(name, zooms))
        best = self.best(ways["views joined"] for ways in alone)
        for rung, candidate in next(ways for ways in alone if best in ways.values()).items():
            self._rung(rung, [candidate])
        best = self._rung("networks joined", self._teams([ways["views joined"] for ways in alone]))
        joined, best = best, self._rung("steps", [best, *self._stepped(best, stacks)])
        untold = 3 / self.asked.sum() > UNTOLD  # the rule of three
        best = self._rung(
            "verification",
            [best, *self._stepped(best, verified)],
            deepest=untold,
        )
        return self._rung("reading", [best, self._read(joined, best, stacks, list(readings))])

    def _rung(self, name: str, candidates, *, deepest: bool = False) -> Candidate:
        best = self.best(candidates, deepest=deepest)
        if best not in self.rungs.values():
            self.rungs[name] = best
        return best

    def _network(self, name: str, zooms: list[float]) -> dict[str, Candidate]:
        """The best that one network gives, by rung."""
        parts = [Part(name)]
        for step in PROJECTIONS:
            parts.append(Part(name, projection=step))
            parts.append(Part(name, projection=step, features=True))
        first = self.best(Candidate((part,)) for part in parts)

        looks = []  # one for each zoom of customers' photos, or those joined would see the same
        for zoom in zooms:
            shop = dict.fromkeys([1.0, zoom])
            pairs = [Candidate((replace(first.parts[0], zoom=(zoom, other)),)) for other in shop]
            looks.append(self.best(pairs))
        single = self.best([first, *looks])

        looks.sort(key=self.score, reverse=True)
        views = [single]
        for n in range(2, len(zooms) + 1):
            joined = Candidate(tuple(look.parts[0] for look in looks[:n]))
            views += [joined, replace(joined, steps=(WHITENED,))]
        return {"projection": first, "zoom": single, "views joined": self.best(views)}

    def _stepped(self, base: Candidate, stacks: list[str]) -> list[Candidate]:
        """The candidate with each stack that its time allows, behind its own steps and behind its
        projections alone.
        """
        return [
            replace(base, steps=(*own, *pipeline.split(stack)))
            for stack in filter(self._affordable, stacks)
            for own in dict.fromkeys([base.projections, base.steps])
        ]

    def _read(
        self, joined: Candidate, best: Candidate, stacks: list[str], readings: list[str]
    ) -> Candidate:
        """The candidate that reads and validates best: behind the networks joined, with a stack or
        without, or among the steps of the best that does not read.

        That best itself where reading may gain nothing over it; `refused` says so.
        """
        steps = self._worth_reading(best, readings)
        if not steps:
            return best
        behind = self.best(_with_reading(joined, step) for step in steps)
        tried = [_with_reading(base, behind.steps[-1]) for base in self._stepped(joined, stacks)]
        tried += [_with_reading(best, step) for step in steps]
        found = self.best([behind, *tried])
        gain, low, _ = self._gain(found, best, self.asked)
        if low > 0:
            return found
        self.refused["reading"] = f"on validation it gains {gain:.3f}, which may be chance"
        return best

    def _worth_reading(self, best: Candidate, readings: list[str]) -> list[str]:
        """The readings to try: of whole lists, or of their heads where the gallery takes too long.

        A sample decides before the gallery is read: the heads of the lists of READ_FIRST validation
        queries or so, taken evenly. Where it gains no more than TIE over the best there are none,
        nor where reading all heads takes too long. `refused` says why.
        """
        if not readings:
            return []
        if not reading.available():
            self.refused["reading"] = reading.ABSENT
            return []
        heads = [f"read({pipeline.bind(step).keywords['weight']}, {HEAD})" for step in readings]
        task = self.task
        minutes = reading.seconds(task.photos, cache_dir=task.cache_dir) / 60
        queries = len(task.validation.queries) + len(task.views["test"].queries)
        of_heads = minutes * min(1.0, queries * (1 + HEAD) / len(task.photos))
        LOG.info(f"reading: about {minutes:.0f} minutes, {of_heads:.0f} of heads of lists alone")
        if reason := self._too_long(of_heads):
            self.refused["reading"] = reason
            return []

        asked = np.flatnonzero(self.asked)
        some = np.zeros_like(self.asked)
        some[asked[:: -(-len(asked) // READ_FIRST)]] = True
        gain = max(self._gain(_with_reading(best, step), best, some)[0] for step in heads)
        if not gain > TIE:  # nor where no answer can be right
            self.refused["reading"] = f"on {READ_FIRST} validation queries it gained {gain:.3f}"
            return []
        return heads if self._too_long(minutes) else readings

    def _gain(self, candidate: Candidate, base: Candidate, asked: np.ndarray) -> tuple:
        """(difference of mAP@5, low, high) on the validation queries asked (Q,)."""
        found, before = (
            self.found(one, "validation", asked=asked).average_precision
            for one in (candidate, base)
        )
        products = self.task.validation.queries["product_id"][asked]
        return paired_difference(found, before, products)

    def _teams(self, alone: list[Candidate]) -> list[Candidate]:
        """The best network, and up to two more joined to it, each under several weights."""
        teams = [self.best(alone)]
        rest = [candidate for candidate in alone if candidate != teams[0]]
        while rest and len(teams) < MOST_NETWORKS:
            grown = {}
            for other in rest:
                for weight in WEIGHTS:
                    added = tuple(replace(part, weight=weight) for part in other.parts)
                    joined = Candidate((*teams[-1].parts, *added))
                    grown[joined] = other
                    grown[replace(joined, steps=(WHITENED,))] = other
            teams.append(self.best(grown))
            rest.remove(grown[teams[-1]])
        return teams

    def _affordable(self, stack: str) -> bool:
        """Whether what a stack verifies fits into what is left of max_minutes and of the disk.

        LOG hears of the estimate first.
        """
        top = pipeline.verified_pairs(pipeline.split(stack))
        if not top:
            return True
        test = self.task.views["test"]
        queries = pd.concat([test.queries, self.task.validation.queries])
        minutes = verification.seconds(queries, test.gallery, top) / 60
        cache, pairs = self.task.cache_dir, top * len(queries)
        disk, room = verification.disk_gb(self.task.photos, cache), platform.room_gb(cache)
        LOG.info(f"{stack}: {pairs:,} pairs, about {minutes:.0f} minutes, {disk:.2g} GB in {cache}")
        reason = self._too_long(minutes)
        if not reason and disk > room:
            reason = f"its cache_dir {cache} has {room:.2g} GB free, {disk:.2g} GB are needed"
        if reason:
            self.refused[stack] = reason
        return not reason

    def _too_long(self, minutes: float) -> str:
        """Why this is not begun, '' where it fits into what is left of max_minutes."""
        left = max(0.0, (self.max_minutes or np.inf) - (monotonic() - self.began) / 60)
        if minutes < left:
            return ""
        return f"it would take about {minutes:.0f} minutes, {left:.0f} of max_minutes are left"


def _with_reading(base: Candidate, step: str) -> Candidate:
    """The candidate with a step that reads behind its own, but before product votes: these count
    what was read, while what re-ranks lists by embeddings forgets it.
    """
    steps = list(base.steps)
    votes = [own for own in steps[-1:] if pipeline.method(own) == "product votes"]
    steps.insert(len(steps) - len(votes), step)
    return replace(base, steps=tuple(steps))


def _trained(
    task: Task, output_dir: Path, model_run: str
) -> tuple[dict[str, Path], dict[str, str]]:
    """(name -> model.pt of what may take part, best validated first; name -> why not of others).

    model_run: this one alone, '' or 'best' for all. Raises ValueError for one that is named and
    learned from the photos to choose by; warns of one that learned from other data, which may hold
    some of them.
    """
    finished, refused, named = {}, {}, model_run not in ("", "best")
    if named:  # it may lie in another folder
        folder = platform.find_run(model_run, output_dir=str(output_dir))
        output_dir = folder.parent
    if task.validation:
        finished, refused = runs.validated(
            output_dir, task.photos.attrs["fingerprint"], task.validation.split
        )
    if not named:
        return finished, refused

    reason = refused.get(folder.name)
    if reason == runs.OTHER_SPLIT:
        raise ValueError(f"{model_run}: {runs.OTHER_SPLIT}, or set choose to none")
    if reason:
        warnings.warn(f"{model_run}: {reason}, validation may flatter it", stacklevel=2)
    return {folder.name: folder / "model.pt"}, {}
