"""run.json in and out, and the scoreboard of all runs.

`python -m vipr_utils board submissions` prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.host import platform
from vipr_utils.host.device import hardware, versions
from vipr_utils.host.files import whole_file
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
# mAP@5 that the reference study reports on Products-10K, over galleries it does not describe, by the run that repeats it.
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
FOLD = 12  # lines of a table that are still shown open


class RunError(ValueError):
    """A run.json that is missing, half-written or of another shape."""


def save(
    folder: Path,
    *,
    notebook: str,
    params: dict,
    data: dict,
    protocol: str,
    metrics: dict,
    model: dict | None,
    seconds: float,
    device: str,
    precision: dict | None = None,
    validation: dict | None = None,
    cut_short: str = "",
) -> Path:
    """Write <folder>/run.json whole and return its path. NaN becomes null; metrics may hold `rows`, one per system.

    precision: `precision_used`; validation: `catalog.Validation.record`; cut_short: `training.cut_short`.
    Of data_root, output_dir and cache_dir in params only the folder's name is kept: a record may be published.

    Raises TypeError for a value that JSON has no form for, naming where it stands.
    """
    params = {
        k: Path(v).name if k in ("data_root", "output_dir", "cache_dir") else v
        for k, v in params.items()
    }
    record = {
        "run": Path(folder).name,
        "notebook": notebook,
        "params": params,
        "data": data,
        "protocol": protocol,
        "validation": validation,
        "metrics": metrics,
        "cut_short": cut_short,
        "model": model,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "device": device,
        "precision": precision,
        "hardware": hardware(),
        "git": platform.git_revision(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    text = json.dumps(_plain(record, "run"), indent=1, allow_nan=False, ensure_ascii=False)
    with whole_file(Path(folder) / "run.json") as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Path(folder) / "run.json"


def _plain(value, at: str):
    """The value in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{at}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v, f"{at}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(
        f"{at} is a {type(value).__name__}: run.json holds text, numbers, lists and dictionaries; convert it"
    )


def load(folder: Path) -> dict:
    """The record of a run folder. Raises RunError with the remedy when it cannot be used."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RunError(f"{path} does not exist: the run has not finished; run its notebook again")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is no readable JSON ({error}): remove the folder and run the notebook again"
        ) from error
    if not isinstance(record, dict) or (missing := [k for k in KEYS if k not in record]):
        what = f"lacks {', '.join(missing)}" if isinstance(record, dict) else "is no object"
        raise RunError(
            f"{path} {what}: it was written by something else; remove it or run the notebook again"
        )
    return record


def best_on_validation(output_dir: Path, fingerprint: str) -> str:
    """Name of the run whose model has the highest validation mAP@5, of those on the data of this fingerprint.

    Raises RunError where there is none, and where they held out different photos: such scores do not compare.
    """
    models = [
        load(file.parent)
        for file in sorted(Path(output_dir).glob("*/run.json"))
        if file.with_name("model.pt").is_file()
    ]
    records = {
        r["run"]: r
        for r in models
        if r.get("validation") and r["data"].get("fingerprint") == fingerprint
    }
    if not records:
        raise RunError(
            f"no run in {Path(output_dir).name} has a model validated on this data: run notebook 03, 04 or 05 first"
        )
    splits = {name: record["validation"]["split"] for name, record in records.items()}
    if len(set(splits.values())) > 1:
        raise RunError(
            f"runs held out different photos ({splits}): name one as model_run, or run them with the same holdout"
        )
    return max(records, key=lambda name: records[name]["validation"]["map_at_5"] or 0.0)


def scoreboard(output_dir: Path) -> pd.DataFrame:
    """One row a scored run or system, best first; attrs['problems'] lists the run.json that could not be read.

    Also the runs that attached notebooks left, on Kaggle and Colab.
    """
    rows, problems = [], []
    folders = [Path(output_dir), *platform.attached("submissions")]
    for path in [path for folder in folders for path in sorted(folder.glob("*/run.json"))]:
        try:
            rows += _rows(load(path.parent))
        except RunError as error:
            problems.append(str(error))
    table = pd.DataFrame(rows, columns=list(_rows(_EMPTY)[0]))
    table = table.sort_values(
        "map_at_5", ascending=False, kind="stable", na_position="last", ignore_index=True
    )
    table.attrs["problems"] = problems
    return table


_EMPTY = {
    "run": "",
    "notebook": "",
    "params": {},
    "data": {},
    "protocol": "",
    "metrics": {},
    "model": None,
    "seconds": 0.0,
    "device": "",
}


def _rows(record: dict) -> list[dict]:
    """A row for the run's headline, or one for each of its systems."""
    metrics, params, model = record["metrics"] or {}, record["params"], record["model"] or {}
    systems = metrics.get("rows") or [metrics]
    return [
        {
            "run": record["run"] + (f": {m['name']}" if "name" in m else ""),
            "cut_short": m.get("cut_short", record.get("cut_short") or ""),
            "notebook": record["notebook"],
            "model": model.get("name", ""),
            "data": record["data"].get("root", ""),
            "protocol": record["protocol"],
            "gallery": params.get("gallery_domain") or "all",
            **{
                k: m.get(k)
                for k in (
                    "map_at_5",
                    "map_at_5_low",
                    "map_at_5_high",
                    "precision_at_1",
                    "n_queries",
                    "n_gallery",
                )
            },
            "image_size": params.get("image_size"),
            "seed": params.get("seed"),
            "seconds": record["seconds"],
            "hardware": record.get("hardware", record["device"]),
        }
        for m in systems
    ]


def write_runs_csv(output_dir: Path) -> Path:
    """The scoreboard as <output_dir>/runs.csv."""
    path = Path(output_dir) / "runs.csv"
    with whole_file(path) as part:
        scoreboard(output_dir).to_csv(part, index=False)
    return path


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The scoreboard with runs that differ in their seed alone (names ending in -seed0, -seed1, ...) as one row: means of
    the scores and ends of intervals and seconds, and `seeds`, `least`, `most`: how many and the range of mAP@5."""
    scores = ["map_at_5", "map_at_5_low", "map_at_5_high", "precision_at_1"]
    how = {c: "mean" if c in (*scores, "seconds") else "first" for c in table if c != "run"}
    table = table.assign(run=table["run"].str.replace(r"-seed\d+", "", regex=True)).dropna(
        subset="map_at_5"
    )
    extra = {
        "seeds": ("map_at_5", "size"),
        "least": ("map_at_5", "min"),
        "most": ("map_at_5", "max"),
        "cut_short": ("cut_short", "max"),
    }
    named = {c: (c, kind) for c, kind in how.items()} | extra
    merged = table.groupby("run", sort=False, as_index=False).agg(**named)
    return merged.sort_values("map_at_5", ascending=False, kind="stable", ignore_index=True)


def markdown(table: pd.DataFrame) -> str:
    """The scored rows of a scoreboard as a Markdown table, seeds merged, with the interval beside each mAP@5 and what the
    reference study reports for that setting."""
    head = "| run | data, protocol | queries × gallery | mAP@5 [95 %] | seeds | P@1 | time | hardware | the study |"
    lines = [head, "|" + "---|" * 9]
    for row in over_seeds(table).itertuples():
        mark = f" **cut short {row.cut_short}**" if row.cut_short else ""
        seeds = f"{row.seeds}: {row.least:.3f}–{row.most:.3f}" if row.seeds > 1 else "1"
        lines.append(
            f"| {row.run}{mark} | {row.data}, {row.protocol} | {_number(row.n_queries, ',.0f')} × {_number(row.n_gallery, ',.0f')} "
            f"| {row.map_at_5:.3f} [{_number(row.map_at_5_low)}, {_number(row.map_at_5_high)}] | {seeds} "
            f"| {_number(row.precision_at_1)} | {_duration(row.seconds)} | {row.hardware} "
            f"| {_number(STUDY.get(row.run.split(':')[0], math.nan), '.4g')} |"
        )
    return "\n".join(lines)


def tables(output_dir: Path) -> str:
    """All runs of a folder in Markdown: a table for each sweep (the word before the dash of a run's name), one for each
    ablation (a run whose rows hold a difference), the paired differences to the sweeps' baselines, single runs; last the
    paired differences of each folder of runs inside it. Long tables are folded."""
    board, single, folder = scoreboard(output_dir), "single runs", Path(output_dir)
    name = board["run"].str.split(":").str[0]
    ablations = {n: text for n in sorted(name.unique()) if (text := _ablation(folder / n))}
    sweep = (
        name.where(lambda s: s.str.contains("-") | s.isin(list(ablations)), single)
        .str.split("-")
        .str[0]
    )
    parts = [
        (n, markdown(board[sweep == n]))
        for n in sorted(sweep.unique())
        if n not in {single, *ablations}
    ]
    if paired := paired_markdown(against_baselines(output_dir)):
        parts.append(("paired differences to the baseline", paired))
    parts += ablations.items()
    parts += [(single, markdown(board[sweep == single]))] if (sweep == single).any() else []
    for inside in sorted({f.parents[1] for f in folder.glob("*/*-baseline/run.json")}):
        parts.append(
            (
                f"{inside.name}: paired differences to the baseline",
                paired_markdown(against_baselines(inside)),
            )
        )
    return "\n\n".join(
        _folded(n, text) if text.count("\n") > FOLD else f"**{n}**\n\n{text}" for n, text in parts
    )


def _folded(title: str, text: str) -> str:
    rows = sum(line.startswith("|") for line in text.splitlines()) - 2
    return f"<details><summary><b>{title}</b> ({rows} rows)</summary>\n\n{text}\n\n</details>"


def _ablation(folder: Path) -> str:
    """One row a method with its difference to the first, of a run whose rows hold one; '' for other runs."""
    record = load(folder) if (folder / "run.json").is_file() else {"metrics": None}
    rows = (record["metrics"] or {}).get("rows") or [{}]
    if "difference" not in rows[0]:
        return ""
    lines = [
        "| method | setting | mAP@5 [95 %] | difference [95 %] | verdict | ms an image | time | memory |",
        "|" + "---|" * 8,
    ]
    for i, r in enumerate(rows):
        score = f"{r['map_at_5']:.3f} [{r['map_at_5_low']:.3f}, {r['map_at_5_high']:.3f}]"
        gain = f"{r['difference']:+.3f} [{r['difference_low']:+.3f}, {r['difference_high']:+.3f}] | {r['verdict']}"
        cost = f"{_number(r['ms_per_image'] or math.nan, '.1f')} | {_duration(r['seconds'])} | {r['peak_mb']:.0f} MB"
        lines.append(
            f"| {r['name']} | {r['setting']} | {score} | {gain if i else ' | '} | {cost} |"
        )
    head = f"{rows[0]['n_queries']:,} queries × {rows[0]['n_gallery']:,} gallery photos of {record['data'].get('root', '')}"
    return (
        f"{head}, {record['model']['name']}, {_duration(record['seconds'])} in all, {record['hardware']}.\n\n"
        + "\n".join(lines)
    )


def compare(output_dir: Path, baseline: str, others: list[str]) -> pd.DataFrame:
    """Paired differences of mAP@5 to a baseline run, a row for each other run and view: run, view, baseline, map_at_5,
    difference, low, high (95 % over products). Runs need not have searched the same gallery, only answered the same
    queries: their average_precision.csv holds name, product_id and one column of AP@5 for each view.

    Raises RunError where a run has no such file or answered other queries.
    """
    base, rows = _average_precision(Path(output_dir) / baseline), []
    for name in others:
        table = _average_precision(Path(output_dir) / name)
        if not table["name"].equals(base["name"]):
            raise RunError(
                f"{name} and {baseline} answered different queries: compare runs of one protocol, seed and data set"
            )
        for view in [c for c in base if c in table and c not in ("name", "product_id")]:
            difference = metrics.paired_difference(table[view], base[view], base["product_id"])
            scores = {"baseline": base[view].mean(), "map_at_5": table[view].mean()}
            rows.append(
                {"run": name, "view": view}
                | scores
                | dict(zip(("difference", "low", "high"), difference))
            )
    return pd.DataFrame(rows)


def against_baselines(output_dir: Path) -> pd.DataFrame:
    """`compare` for every sweep that has a run named <sweep>-baseline; empty where there is none."""
    tables = []
    for folder in sorted(Path(output_dir).glob("*-baseline")):
        sweep = folder.name.removesuffix("baseline")
        others = sorted(
            f.parent.name
            for f in Path(output_dir).glob(f"{sweep}*/average_precision.csv")
            if f.parent != folder
        )
        tables.append(compare(output_dir, folder.name, others))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def paired_markdown(table: pd.DataFrame) -> str:
    """The rows of `against_baselines` as a Markdown table; '' when there is none."""
    lines = ["| run | gallery | baseline mAP@5 | mAP@5 | difference [95 %] |", "|" + "---|" * 5]
    for row in table.itertuples():
        difference = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        lines.append(
            f"| {row.run} | {row.view} | {row.baseline:.3f} | {row.map_at_5:.3f} | {difference} |"
        )
    return "\n".join(lines) if len(table) else ""


def _average_precision(folder: Path) -> pd.DataFrame:
    if not (path := folder / "average_precision.csv").is_file():
        raise RunError(f"{path} does not exist: run notebook 04 or 06 under that run_name first")
    return pd.read_csv(path, dtype={"name": str})


def _number(value, form: str = ".3f") -> str:
    return "–" if pd.isna(value) else format(value, form)


def _duration(seconds: float) -> str:
    return f"{seconds:.{int(seconds < 10)}f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vipr_utils board", description="the scoreboard of a folder of runs"
    )
    parser.add_argument("output_dir", type=Path)
    given = parser.parse_args(arguments)
    table = scoreboard(given.output_dir)
    print(markdown(table))
    print(*table.attrs["problems"], sep="\n", file=sys.stderr)
    return int(table.empty)
