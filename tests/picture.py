"""Draw the README's picture from the toy set: `make picture`."""

from pathlib import Path

import numpy as np

from vipr_utils.host.device import tune
from vipr_utils.judge import plots
from vipr_utils.judge.task import Task
from vipr_utils.learn import models

ROOT = Path(__file__).resolve().parents[1]
STEPS = ["learned_whitening(dim=64)", "verify(top=20)"]


def main() -> None:
    tune()
    plots.STYLE["figure.dpi"] = 176  # twice as fine as in notebooks
    task = Task(image_size=224, holdout=0, precision="float32")
    embeddings = task.embed(models.create("tf_efficientnet_lite0"), image_size=224)
    found = task.retrieve(embeddings, steps=STEPS)
    ap = np.nan_to_num(found.average_precision)
    rng = np.random.default_rng(5)
    perfect, middling = np.flatnonzero(ap == 1), np.flatnonzero((ap > 0.3) & (ap < 0.8))
    rows = [*rng.choice(perfect, 1), *rng.choice(middling, 1)]
    view = task.views["test"]
    plots.ranked_lists(
        task.store,
        view.queries,
        view.gallery,
        found,
        rows,
        title="A customer's photo, and the catalogue's five best answers (drawn toy set)",
    ).save(ROOT / "docs" / "answers.png")


if __name__ == "__main__":
    main()
