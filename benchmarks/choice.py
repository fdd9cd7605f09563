"""How far a choice on validation was right: every candidate that was tried, on labelled queries.

    python benchmarks/choice.py [folder ...] [--validation drawn] [--output FILE]

A folder is a data root whose queries have labels; none is the toy set. The frozen backbone climbs
as in notebook 06; then all that it tried answers the test queries, which the choice never saw.
Writes, for each data set, what was tried with its mAP@5 on validation and on the test, and by how
much the chosen one falls short of the best: its regret.
"""

import argparse
import json
from pathlib import Path

from vipr_utils.host.device import tune
from vipr_utils.judge.choice import Choice
from vipr_utils.judge.task import Task
from vipr_utils.run.params import parameters_of

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_submission.ipynb"
BACKBONE = "tf_efficientnet_lite0"


def climbed(root: str, validation: str, px: int) -> dict:
    """What was tried on one data set, best on validation first."""
    defaults = {name: default for name, (_, default) in parameters_of(NOTEBOOK).items()}
    zooms = defaults["zooms"]
    task = Task(root, image_size=round(px / min(zooms)), validation=validation)
    choice = Choice.open(task, Path(), backbones=[BACKBONE], image_size=px, most_runs=0)
    chosen = choice.climb(zooms, defaults["stacks"], defaults["verified"])
    rows = []
    for candidate, score in sorted(choice.tried.items(), key=lambda item: -item[1]):
        found = choice.found(candidate, "test").metrics["map_at_5"]
        row = {"candidate": str(candidate), "validation": score, "test": found}
        rows.append(row | {"chosen": candidate == chosen})
    plain = choice.found(choice.rungs["plain search"], "test")
    final = next(row["test"] for row in rows if row["chosen"])
    return {
        "data": Path(task.photos.attrs["root"]).name,
        "validation": task.validation.how,
        "n_validation": len(task.validation.queries),
        "n_queries": len(task.views["test"].queries),
        "n_gallery": len(task.views["test"].gallery),
        "plain": plain.metrics["map_at_5"],
        "chosen": final,
        "best": max(row["test"] for row in rows),
        "regret": max(row["test"] for row in rows) - final,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("roots", nargs="*", default=[""])
    parser.add_argument("--validation", choices=["auto", "drawn"], default="auto")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--output", type=Path, default=Path("choice.json"))
    given = parser.parse_args()
    tune()
    found = []
    for root in given.roots:
        found.append(climbed(root, given.validation, given.image_size))
        print({name: value for name, value in found[-1].items() if name != "rows"}, flush=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
