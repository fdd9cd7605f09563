"""run.json in and out, the ladder of a series and the scoreboard of all runs.

`vipr board submissions` prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.host import platform
from vipr_utils.host.device import hardware, versions
from vipr_utils.host.files import write_whole
from vipr_utils.judge import metrics

KEYS = [
    "run",
    "notebook",
    "params",
    "data",
    "protocol",
    "metrics",
    "model",
    "seconds",
    "versions",
    "device",
    "git",
]
SCORES = ["map_at_5", "map_at_5_low", "map_at_5_high", "precision_at_1"]
COLUMNS = [
    "run",
    "cut_short",
    "model",
    "data",
    "fingerprint",
    "protocol",
    "gallery",
    *SCORES,
    "n_queries",
    "n_gallery",
    "seconds",
    "hardware",
    "finished",
]
TASK = ["data", "fingerprint", "protocol", "gallery", "n_queries", "n_gallery"]  # what compares
TITLE = "{} ({:.6}), protocol {}, gallery {}: {:,.0f} queries × {:,.0f} gallery photos"
RUNGS = {  # of the ladder, and the notebook whose score stands there
    "random ranking": "",
    "from scratch": "03_scratch_siamese",
    "frozen backbone": "",
    "trained": "04_pretrained_sweep",
    "trained on a subset": "05_subset_finetune",
    "post-processed": "07_reranking",
    "submission": "06_submission",
}
LADDER = [*SCORES[:3], "gain", "gain_low", "gain_high", "cut_short", "run"]
# mAP@5 that the reference study reports on Products-10K, over galleries it does not describe, by
# the run that repeats it.
STUDY = {
    "study_scratch-contrastive-cosine": 0.069,
    "study_scratch-contrastive-euclidean": 0.070,
    "study_scratch-contrastive-manhattan": 0.068,
    "study_scratch-triplet-cosine": 0.023,
    "study_scratch-triplet-euclidean": 0.027,
    "study_scratch-triplet-manhattan": 0.033,
    "study_pretrained-resnet101": 0.1225,
    "study_pretrained-resnet50": 0.1163,
    "study_pretrained-efficientnet_b4": 0.1842,
    "study_subset-efficientnet_b1": 0.6366,
    "study_subset-scratch": 0.9704,
}


FOLDERS = {"data_root", "output_dir", "cache_dir"}  # parameters that name places of a machine
RESULTS = ["run.json", "submission.csv", "average_precision.csv", "model.pt"]
UNFINISHED = "unfinished.txt"  # stands in a run folder from the start of a run to its end
OTHER_SPLIT = "its model held out other photos: use the same holdout"


NUMBER = int | float
WORDS = [
    "run",
    "notebook",
    "protocol",
    "device",
    "finished",
    "hardware",
    "cut_short",
    "params.gallery_domain",
    "params.model_run",
    "data.root",
    "data.fingerprint",
    "model.name",
    "validation.split",
]
TABLES = ["params", "data", "metrics", "model", "validation", "networks"]
# What values of a record are, by their keys
KINDS = dict.fromkeys(TABLES, dict) | dict.fromkeys(WORDS, str) | {"metrics.rows": list}
KINDS |= dict.fromkeys(["seconds", "data.n_train", "validation.map_at_5"], NUMBER)
FIGURES = [
    *SCORES,
    "chance",
    "n_queries",
    "n_gallery",
    "difference",
    "difference_low",
    "difference_high",
]


class RunError(ValueError):
    """A run.json that is missing, half-written or of another shape."""


def save(folder: Path, *, params: dict, seconds: float, **figures) -> Path:
    """Write <folder>/run.json whole and return its path. NaN becomes null; of params that are
    folders the name alone is written, for a record may be published.

    figures: notebook, data, protocol, metrics (may hold `rows`, one per system), model, device;
    where there are any precision (`precision_used`), validation (`catalog.Validation.record`) and
    cut_short (`training.cut_short`). Raises TypeError for a value that JSON has no form for.
    """
    record = {
        "run": Path(folder).name,
        "params": params | {name: Path(params[name]).name for name in params.keys() & FOLDERS},
        "validation": None,
        "cut_short": "",
        **figures,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "hardware": hardware(),
        "git": platform.git_revision(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    text = json.dumps(record, default=_plain)
    finite = json.loads(text, parse_constant=lambda name: None)  # null for NaN and infinity
    path = Path(folder) / "run.json"
    write_whole(path, json.dumps(finite, indent=1, ensure_ascii=False) + "\n")
    path.with_name(UNFINISHED).unlink(missing_ok=True)
    return path


def _plain(value):
    """The value in JSON's own types, for what `json` does not know."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(
        "run.json holds text, numbers, lists and dictionaries, "
        f"not the {type(value).__name__} {value!r}: convert it"
    )


def load(folder: Path) -> dict:
    """The record of a run folder. Raises RunError with the remedy when it cannot be used."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RunError(f"{path} does not exist: the run has not finished; run its notebook again")
    remedy = "remove it and run the notebook again"
    try:
        record = json.loads(path.read_bytes())
        record = record if isinstance(record, dict) else {}
        missing = [key for key in KEYS if record.get(key) is None and key != "model"]
        if not missing:
            _check(record)
            _rows(record)
    except Exception as error:
        raise RunError(f"{path} is no readable JSON ({error}): {remedy}") from error
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}, so no run wrote it: {remedy}")
    return record


def _check(record: dict) -> None:
    """Raise TypeError where a value that others rely on is of another kind; None is of any."""
    for place, kind in KINDS.items():
        value = record
        for key in place.split("."):
            value = None if value is None else value.get(key)
        _expect(kind, place, value)
    for name, score in (record.get("networks") or {}).items():
        _expect(NUMBER, name, score)
    for figures in [record["metrics"], *(record["metrics"].get("rows") or [])]:
        for name in FIGURES:
            _expect(NUMBER, name, figures.get(name))
        for name in ("name", "cut_short", "verdict"):
            _expect(str, name, figures.get(name))


def _expect(kind, name: str, value) -> None:
    if isinstance(value, bool) or value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}")


def validated(
    output_dir: Path, fingerprint: str, split: str
) -> tuple[dict[str, Path], dict[str, str]]:
    """(name -> model.pt of finished runs, best mAP@5 on validation first; name -> why not of the
    others): of a run, and of the backbones that it kept beside its best one, <run>/<backbone>.

    They learned from the data of a fingerprint and held out the photos of a split: only then their
    scores compare.
    """
    paths, scores, refused = {}, {}, {}
    for folder, record in finished(output_dir)[0].items():
        held_out = record.get("validation")
        if not (folder / "model.pt").is_file():
            continue
        if record["data"].get("fingerprint") != fingerprint:
            refused[folder.name] = "its model learned from other photos"
        elif not held_out or held_out.get("split") != split:
            refused[folder.name] = OTHER_SPLIT
        else:
            networks = {"": held_out.get("map_at_5")} | (record.get("networks") or {})
            networks.pop((record["model"] or {}).get("name"), None)  # is the run's own
            for backbone, score in networks.items():
                path = folder / backbone / "model.pt"
                if not path.is_file():
                    continue
                name = path.parent.relative_to(folder.parent).as_posix()
                if name in paths:  # a run of an attached notebook has the same name
                    name = f"{folder.parents[1].name}/{name}"
                paths[name], scores[name] = path, score or 0.0
    ranked = sorted(scores, key=scores.get, reverse=True)
    return {name: paths[name] for name in ranked}, refused


def set_aside(folder: Path, why: str) -> None:
    """Call a run unfinished, and rename what a finished one left in its folder (run.json.old), lest
    it be taken for this one's.
    """
    write_whole(folder / UNFINISHED, why + "\n")
    if (folder / "run.json").is_file():
        for name in RESULTS:
            if (folder / name).is_file():
                (folder / name).replace(folder / f"{name}.old")


def settle(folder: Path) -> None:
    """Call a run finished: what was set aside for it goes."""
    for file in [folder / UNFINISHED, *folder.glob("*.old")]:
        file.unlink(missing_ok=True)


def unfinished(output_dir: Path) -> list[str]:
    """Names of the runs that were begun by `vipr run` and failed, were killed, or still go on."""
    return sorted(file.parent.name for file in Path(output_dir).glob(f"*/{UNFINISHED}"))


def finished(output_dir: Path) -> tuple[dict[Path, dict], list[str]]:
    """(records of the runs by folder, why others could not be read), those of attached notebooks
    as well.
    """
    records, problems = {}, []
    for place in [Path(output_dir), *platform.attached("submissions")]:
        for path in sorted(place.glob("*/run.json")):
            try:
                records[path.parent] = load(path.parent)
            except RunError as error:
                problems.append(str(error))
    return records, problems


def scoreboard(output_dir: Path) -> pd.DataFrame:
    """COLUMNS of the runs, one row a scored run or system, best first.

    Also of the runs that attached notebooks left, on Kaggle and Colab. attrs["problems"] lists the
    run.json that could not be read.
    """
    records, problems = finished(output_dir)
    rows = [row for record in records.values() for row in _rows(record)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.sort_values("map_at_5", ascending=False, kind="stable", ignore_index=True)
    table.attrs["problems"] = problems
    return table


def ladder(output_dir: Path, fingerprint: str) -> pd.DataFrame:
    """LADDER of the rungs that finished runs reached on the data of a fingerprint, in RUNGS' order.

    All queries of the protocol test against the whole gallery, so that rungs compare. Of several
    runs of a notebook it is the one that validates best, among equals the newest. gain is over the
    rung before, with its interval (gain_low, gain_high) where both answered the same queries and
    tell query by query, else NaN.
    """
    best, found = {}, {}
    for folder, record in sorted(finished(output_dir)[0].items(), key=lambda run: _merit(run[1])):
        if _on_whole_gallery(record, fingerprint):
            best[record["notebook"]] = folder
    for notebook in sorted(best):
        found = _rungs(best[notebook]) | found
    rungs = {rung: found[rung] for rung in RUNGS if rung in found}
    for before, rung in pairwise(rungs.values()):
        rung["gain"], rung["gain_low"], rung["gain_high"] = _gain(rung, before)
    table = pd.DataFrame.from_dict(rungs, orient="index")
    return table.reindex(columns=LADDER).astype(dict.fromkeys(LADDER[:6], float))


def _merit(record: dict) -> tuple[float, str]:
    """(mAP@5 on validation, when it ended)"""
    return (record.get("validation") or {}).get("map_at_5") or 0.0, record.get("finished", "")


def _on_whole_gallery(record: dict, fingerprint: str) -> bool:
    """Whether a run's score is of all test queries of that data on its whole gallery."""
    data, figures = record["data"], record["metrics"]
    scored = record["protocol"] == "test" and figures.get("map_at_5") is not None
    whole = (figures.get("n_gallery") or 0) >= (
        data.get("n_train") or 1
    )  # more: of photos not there
    return scored and whole and data.get("fingerprint") == fingerprint


def _rungs(folder: Path) -> dict[str, dict]:
    """What a run has to say about each rung: its score, the score of its frozen backbone, chance.

    folder: where AP@5 of each query stands, of the run's headline only.
    """
    record = load(folder)
    headline, name = record["metrics"], record["metrics"].get("name") or ""
    run = {"run": record["run"], "cut_short": record.get("cut_short") or ""}
    unlearned = [] if record["params"].get("model_run") else ["plain search"]
    found = {}
    for row in headline.get("rows") or []:
        frozen = [*unlearned, f"{name.split(',')[0]}, frozen"]
        if row.get("name") in frozen and row.get("map_at_5") is not None:
            found["frozen backbone"] = row | run | {"cut_short": ""}
    for rung, notebook in RUNGS.items():
        if notebook == record["notebook"] and not name.endswith("frozen"):
            found[rung] = headline | run | {"folder": folder}
    if headline.get("chance") is not None:
        found["random ranking"] = {"map_at_5": headline["chance"], "run": "", "cut_short": ""}
    return found


def _gain(rung: dict, before: dict) -> tuple:
    """(difference, low, high) of two rungs: paired by query where both have told, else NaN."""
    if rung["run"] == before["run"] and rung.get("verdict"):  # over its own frozen backbone
        return rung["difference"], rung["difference_low"], rung["difference_high"]
    try:
        pairs = compare(before["folder"], rung["folder"]).set_index("view")
        return tuple(pairs.loc["test", ["difference", "low", "high"]])
    except (RunError, KeyError):  # other queries, or none told
        return rung["map_at_5"] - before["map_at_5"], np.nan, np.nan


def _rows(record: dict) -> list[dict]:
    """A row for the run's headline, or one for each of its systems."""
    scores = record["metrics"]
    shared = {
        "model": (record["model"] or {}).get("name", ""),
        "data": record["data"].get("root", ""),
        "fingerprint": record["data"].get("fingerprint", ""),
        "protocol": record["protocol"],
        "gallery": record["params"].get("gallery_domain") or "all",
        "seconds": record["seconds"],
        "hardware": record.get("hardware", record["device"]),
        "finished": record.get("finished", ""),
    }
    rows = []
    for system in scores.get("rows") or [scores]:
        name = f": {system['name']}" if "name" in system else ""
        cut_short = system.get("cut_short", record.get("cut_short")) or ""
        rows.append(system | shared | {"run": record["run"] + name, "cut_short": cut_short})
    return rows


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The scored rows of a scoreboard, runs that differ in their seed alone as one, best first.

    Such runs have names ending in -seed0, -seed1, ... and are of the same photos, protocol and
    gallery; their row has the means of the scores, ends of intervals and seconds, and `seeds`,
    `least`, `most`: how many and the range of mAP@5.
    """
    scored = table.dropna(subset="map_at_5")
    name = scored["run"].str.replace(r"-seed\d+", "", regex=True)
    runs = scored.groupby([name, "fingerprint", "protocol", "gallery"], sort=False)
    merged = runs.first().assign(
        **runs[[*SCORES, "seconds"]].mean(),
        cut_short=runs["cut_short"].max(),
        seeds=runs.size(),
        least=runs["map_at_5"].min(),
        most=runs["map_at_5"].max(),
    )
    merged = merged.drop(columns="run").reset_index()
    return merged.sort_values("map_at_5", ascending=False, kind="stable", ignore_index=True)


def comparable(board: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) of every task in a scoreboard, the one with most pairs of photos first.

    The rows of a table may be compared: same photos, protocol, gallery and numbers of queries and
    of gallery photos. Seeds are merged, best first; `study` is what the reference study reports for
    a row's setting, left out where it reports none; a training cut short is marked in `run`.
    """
    merged = over_seeds(board).round({"seconds": 0}).astype({"seconds": "Int64"})
    merged["study"] = merged["run"].str.split(":").str[0].map(STUDY)
    marks = [f" (cut short {cut})" if cut else "" for cut in merged["cut_short"]]
    merged["run"] += pd.Series(marks, dtype=str)
    groups = merged.groupby(TASK, dropna=False)
    tables = []
    for task, rows in sorted(groups, key=lambda group: -group[0][-2] * group[0][-1]):
        table = rows[["run", *SCORES, "seeds", "seconds", "hardware", "study"]]
        tables.append((TITLE.format(*task), table.dropna(axis=1, how="all").reset_index(drop=True)))
    return tables


def table(board: pd.DataFrame) -> str:
    """`comparable` in plain text."""
    texts = [
        f"{title}\n{rows.to_string(index=False, float_format='%.3f', na_rep='')}"
        for title, rows in comparable(board)
    ]
    return "\n\n".join(texts)


def compare(folder: Path, run: Path) -> pd.DataFrame:
    """Paired differences of a run's mAP@5 to that of a baseline's run folder, a row for each view.

    Columns: run, view, baseline, map_at_5, difference, low, high (95 % over products). Runs need
    not have searched the same gallery, only answered the same queries: their average_precision.csv
    (or .csv.gz) holds name, product_id and one column of AP@5 for each view.

    Raises RunError where a run has no such file or answered other queries.
    """
    base = _average_precision(folder)
    products = base.index.get_level_values("product_id")
    other = _average_precision(run)
    if not other.index.equals(base.index):
        raise RunError(
            f"{run.name} and {folder.name} answered different queries: "
            "compare runs of one protocol, seed and data set"
        )
    rows = []
    for view in base.columns.intersection(other.columns, sort=False):
        difference = metrics.paired_difference(other[view], base[view], products)
        rows.append([run.name, view, base[view].mean(), other[view].mean(), *difference])
    columns = ["run", "view", "baseline", "map_at_5", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def against_baselines(output_dir: Path) -> pd.DataFrame:
    """`compare` for every sweep that has a run named <sweep>-baseline; empty where none has.

    attrs["problems"] lists what could not be compared.
    """
    tables, problems = [pd.DataFrame()], []
    for folder in sorted(Path(output_dir).glob("*-baseline")):
        sweep = folder.name.removesuffix("baseline")
        for other in sorted(folder.parent.glob(f"{sweep}*/average_precision.csv*")):
            if other.parent == folder or other.suffix == ".old":
                continue
            try:
                tables.append(compare(folder, other.parent))
            except ValueError as error:
                problems.append(str(error))
    table = pd.concat(tables, ignore_index=True)
    table.attrs["problems"] = list(dict.fromkeys(problems))
    return table


def _average_precision(folder: Path) -> pd.DataFrame:
    """AP@5 by view, indexed by the query's name and product."""
    for ending in ("csv", "csv.gz"):
        if (path := folder / f"average_precision.{ending}").is_file():
            return pd.read_csv(path, dtype={"name": str}, index_col=["name", "product_id"])
    raise RunError(
        f"{folder.name}/average_precision.csv does not exist: "
        "run notebook 04 or 06 under that run_name first"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the scoreboard of a folder; 1 when it is empty."""
    parser = argparse.ArgumentParser(
        prog="vipr board",
        description="the scoreboard of a folder of runs",
    )
    parser.add_argument("output_dir", type=Path)
    board = scoreboard(parser.parse_args(arguments).output_dir)
    print(table(board))
    print(*board.attrs["problems"], sep="\n", file=sys.stderr)
    return int(board.empty)
