"""What a batch says at its end: data, ladder, score, submission, and where to look."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from vipr_utils.judge import runs

DATA = "data: {root}, {n_train:,} gallery photos of {n_products:,} products, {n_test:,} queries"
SCORE = "mAP@5 {map_at_5:.3f} [{map_at_5_low:.3f}, {map_at_5_high:.3f}] over {n_queries:,} queries"
ACCURACY = "top-1 accuracy {top_1_accuracy:.3f} over {n_queries:,} queries"
LOOK = "look: {}, its pictures beside it; all runs in {}"
SHOWN = ["random ranking", "frozen backbone"]  # of the ladder, with its best rung


def closing(folders: list[Path]) -> Iterator[str]:
    """Five lines on the run folders of a batch, which lie side by side.

    Two more for each further submission, two less where there is none.
    """
    output_dir = folders[0].parent
    records = runs.finished(output_dir)[0]
    submitted = [f for f in folders if f in records and (f / "submission.csv").is_file()]
    described = [f for f in submitted or folders if "n_train" in records.get(f, {}).get("data", {})]
    for folder in described[-1:]:
        data = records[folder]["data"]
        yield DATA.format(**data)
        yield f"ladder: {_ladder(output_dir, data['fingerprint'])}"
    for folder in submitted:
        yield f"score: {_score(records[folder])}"
        yield f"submission: {folder / 'submission.csv'}"
    page = (submitted or folders)[-1] / "notebook.ipynb"
    yield LOOK.format(page, output_dir / "scoreboard.csv")


def planned(table: pd.DataFrame) -> str:
    """A plan (see `plan.plan`) as text.

    What was found, then a row a run, then what they take together: minutes and disks add up, of
    memory the most counts.
    """
    figures = table.select_dtypes("number")
    total = figures.sum()
    peaks = ["memory GB", "GPU GB"]
    total[peaks] = figures[peaks].max()
    together = total.to_frame("all").T.assign(refused="")
    rows = pd.concat([table, together]).astype(table.dtypes)
    return "\n".join([*table.attrs["found"], rows.round(1).to_string()])


def _ladder(output_dir: Path, fingerprint: str) -> str:
    """'random ranking 0.006, frozen backbone 0.414, submission 0.853; best: submission'"""
    scores = runs.ladder(output_dir, fingerprint)["map_at_5"]
    if scores.empty:
        return "no run has a score on this data"
    best = scores.idxmax()
    shown = scores[scores.index.isin([*SHOWN, best])].map("{:.3f}".format)
    return f"{', '.join(shown.index + ' ' + shown)}; best: {best}"


def _score(record: dict) -> str:
    """'mAP@5 0.853 [0.814, 0.891] over 2,485 queries'"""
    known = {name: value for name, value in record["metrics"].items() if value is not None}
    cut = record.get("cut_short")
    for template in (SCORE, ACCURACY):
        try:
            return template.format(**known) + (f", its training cut short {cut}" if cut else "")
        except KeyError:
            continue  # not scored so
    return "labels unknown"
