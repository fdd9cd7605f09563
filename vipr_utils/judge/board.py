"""What was tried on one task, compared query by query and chosen by validation."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

import numpy as np
import pandas as pd

from vipr_utils.host.files import write_whole
from vipr_utils.judge import metrics, runs
from vipr_utils.judge.task import Retrieval, Task
from vipr_utils.learn import models

TIE = 0.002  # of mAP@5 on validation: what lies closer is the same


@dataclass(frozen=True)
class Entry:
    """One candidate: its Retrieval for each view, the entry it is compared with, what it cost."""

    views: dict[str, Retrieval]
    baseline: str
    cost: dict  # setting, seconds, peak_mb, ms_per_image
    cut_short: str
    record: dict  # of the model: see `models.Embedder`; {} where only embeddings were given


class Board:
    """Candidates on a Task, in the order in which they were tried: the cheaper first.

    folder: where model.pt of the best one so far, by `choose`, is kept, and <backbone>/model.pt of
    the best of each backbone. view: what its figures are of, 'validation' where no test query has a
    label.
    """

    def __init__(self, task: Task, folder: Path | None = None) -> None:
        self.task, self.folder = task, folder
        labelled = (task.views["test"].queries["product_id"] >= 0).any()
        self.view = "test" if labelled or not task.validation else "validation"
        self.entries: dict[str, Entry] = {}
        self.refused: dict[str, str] = {}  # what could not be tried here, and why

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def add(
        self,
        name: str,
        model_or_embeddings,
        *,
        steps=(),
        distance: str = "cosine",
        image_size: int | tuple[int, ...] = 0,
        baseline: str = "",
        cut_short: str = "",
    ) -> None:
        """Score a candidate on every view; a model's time an image is measured as well.

        baseline: the entry it is compared with, query by query. Of its setting the table says the
        pixels of a model, else the steps. Raises ValueError where a step cannot be fitted on this
        gallery.
        """
        embeddings, record, ms = model_or_embeddings, {}, float("nan")
        setting = " + ".join(steps)
        if not isinstance(embeddings, np.ndarray):
            record = model_or_embeddings.record
            embeddings = self.task.embed(model_or_embeddings, image_size=image_size)
            ms = self.task.ms_per_image(model_or_embeddings, image_size=image_size)
            image_size = image_size or record["image_size"]
            setting = f"{image_size} px"
        search = partial(self.task.retrieve, embeddings, steps=steps, distance=distance)
        headline, measured = _measured(partial(search, self.view))
        views = self.task.views if self.view == "test" else []
        others = {view: search(view) for view in views if view != self.view}
        self.enter(
            name,
            {self.view: headline} | others,
            baseline=baseline,
            cost={"setting": setting, "ms_per_image": ms, **measured},
            cut_short=cut_short or self._cut_short(record, baseline),
            record=record,
        )
        if self.folder and record:
            self._keep(name, model_or_embeddings, image_size=image_size, distance=distance)

    def enter(
        self,
        name: str,
        views: dict[str, Retrieval],
        *,
        baseline: str = "",
        cost: dict,
        cut_short: str = "",
        record: dict = MappingProxyType({}),
    ) -> None:
        """Put what was found for each view on the board; see `Entry`."""
        self.entries[name] = Entry(views, baseline, cost, cut_short, record)

    def _keep(self, name: str, model: models.Embedder, **changes) -> None:
        """Save the model of an entry where it is the best of all, or of its backbone."""
        backbone = model.record["name"]
        places = {"": list(self.entries), backbone: self._of_backbones()[backbone]}
        for place, rivals in places.items():
            if self.choose(rivals) == name:
                path = Path(self.folder) / place / "model.pt"
                models.save(model, path, cut_short=self.entries[name].cut_short, **changes)

    def _of_backbones(self) -> dict[str, list[str]]:
        """backbone -> its entries."""
        found = {}
        for name, entry in self.entries.items():
            if entry.record:
                found.setdefault(entry.record["name"], []).append(name)
        return found

    def _cut_short(self, record: dict, baseline: str) -> str:
        """What a network's record says of its training; of embeddings what their baseline says."""
        if record or baseline not in self.entries:
            return record.get("cut_short", "")
        return self.entries[baseline].cut_short

    def choose(self, names=()) -> str:
        """The entry (of these names, else of all) that validation likes best.

        One after the other takes the place of the best so far if its mAP@5 is higher by more than
        TIE: of what is alike the first stays, which is the cheapest. Where nothing was held out it
        is the last, which learned most. Test figures have no part in it.
        """
        names = list(names or self.entries)
        if not self.task.validation:
            return names[-1]
        best = names[0]
        for name in names:
            if self.score(name, "validation") > self.score(best, "validation") + TIE:
                best = name
        return best

    def score(self, name: str, view: str = "") -> float:
        """mAP@5 of an entry on a view; 0 where it was not asked or no answer can be right."""
        found = self.entries[name].views.get(view or self.view)
        return float(np.nan_to_num(found.metrics.get("map_at_5", 0.0))) if found else 0.0

    def difference(self, name: str) -> tuple[float, float, float]:
        """(difference of mAP@5 to the baseline, low, high): paired by query, over products."""
        entry = self.entries[name]
        return metrics.paired_difference(
            entry.views[self.view].average_precision,
            self.entries[entry.baseline].views[self.view].average_precision,
            self.task.views[self.view].queries["product_id"],
            seed=self.task.seed,
        )

    def table(self) -> pd.DataFrame:
        """One row an entry, as numbers: scores of every view, differences, seconds, memory."""
        table = pd.DataFrame(self.rows()).set_index("name").rename_axis(None)
        return table.reindex(columns=table.columns.union(runs.SCORES, sort=False))

    def rows(self) -> list[dict]:
        """The same for run.json."""
        rows = []
        for name, entry in self.entries.items():
            headline = entry.views[self.view]
            precision = metrics.guie_precision_at_k(headline.hits, headline.n_relevant)
            rows.append(
                {
                    "name": name,
                    **{view: self.score(name, view) for view in entry.views if view != self.view},
                    **headline.metrics,
                    **self._gained(name),
                    "mp_at_5": pd.Series(precision).mean(),  # NaN where nothing can be right
                    **entry.cost,
                    "million": entry.record.get("parameters", 0) / 1e6,
                    "cut_short": entry.cut_short,
                }
            )
        return rows

    def _gained(self, name: str) -> dict:
        """The difference of an entry to its baseline."""
        if not self.entries[name].baseline:
            return {"gain": ""}
        difference, low, high = self.difference(name)
        return {
            "difference": difference,
            "difference_low": low,
            "difference_high": high,
            "gain": gain(difference, low, high),
            "verdict": verdict(low, high),
        }

    def save(self, folder: Path, chosen: str) -> None:
        """Write <folder>/average_precision.csv: AP@5 of the chosen entry by query and view, where
        test queries have labels."""
        if self.view != "test":
            return
        per_query = self.task.views["test"].queries[["name", "product_id"]].copy()
        for view, found in self.entries[chosen].views.items():
            if view != "validation":
                per_query[view] = found.average_precision.round(4)
        write_whole(Path(folder) / "average_precision.csv", per_query.to_csv(index=False))

    def save_run(
        self, folder: Path, chosen: str, *, model: dict | None = None, figures=(), **record
    ) -> Path:
        """Write run.json: the chosen entry's metrics on the test, and every entry as one of its
        rows; without test labels neither.

        model: the record behind an entry of embeddings; figures: further ones for its metrics;
        record: notebook, params, trained, see `Task.save_run`.
        """
        entry = self.entries[chosen]
        rows = {row["name"]: row for row in self.rows()} if self.view == "test" else {}
        listed = {"rows": list(rows.values()), "refused": self.refused}
        validation = entry.views.get("validation")
        if self.folder and validation:  # what is kept for each backbone, and how good it is
            record["networks"] = {
                backbone: self.score(self.choose(names), "validation")
                for backbone, names in self._of_backbones().items()
            }
        return self.task.save_run(
            folder,
            metrics=rows.get(chosen, {}) | dict(figures) | listed,
            model=model or entry.record,
            validated=validation and validation.metrics,
            cut_short=entry.cut_short,
            **record,
        )


def _measured(search) -> tuple[Retrieval, dict]:
    """(what the search finds, its seconds and the peak of the memory it took in MiB)."""
    tracemalloc.start()
    began = perf_counter()
    found = search()
    seconds, peak = perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, {"seconds": seconds, "peak_mb": peak / 2**20}


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says: 'helps', 'hurts' or 'does not help'."""
    return "helps" if low > 0 else "hurts" if high < 0 else "does not help"


def gain(difference: float, low: float, high: float) -> str:
    """'+0.123 [+0.100, +0.150]'"""
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
