"""What ranked lists are good for beside the lists: figures of prediction, strangers and labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score, roc_curve

from vipr_utils.data import catalog
from vipr_utils.judge import metrics
from vipr_utils.judge.slices import numbered_in_product
from vipr_utils.judge.task import Sides, Task
from vipr_utils.retrieve import encoder, labels, pipeline, rerank
from vipr_utils.retrieve.search import top_k

WIDTH = 64  # of the whitening behind a frozen network


class Predicted(NamedTuple):
    """Of each query (Q,): confidence, right; the figures of all."""

    confidence: np.ndarray
    right: np.ndarray
    figures: dict


def predict(
    judge: labels.Judge | None,
    sides: Sides,
    known: np.ndarray,
    wanted: np.ndarray,
    *,
    coverage: float = 0.9,
    seed: int = 0,
) -> Predicted:
    """Products by votes of the photos known (M,), against those wanted (Q,).

    Without a judge the winner's share of all votes stands for confidence, which is no probability.
    """
    lists = top_k(sides.queries, sides.known, labels.NEIGHBOURS)
    votes = labels.vote(*lists, known)
    confidence = judge.right(votes.evidence) if judge else votes.share.astype(float)
    right = votes.product == wanted
    order = np.argsort(-confidence, kind="stable")
    surest = order[: max(1, round(coverage * len(right)))]
    low, high = metrics.bootstrap_interval(right[surest], wanted[surest], seed=seed)
    figures = {
        "accuracy": right.mean(),
        "coverage": coverage,
        "accuracy_at_coverage": right[surest].mean(),
        "low": low,
        "high": high,
        "calibration_error": labels.calibration_error(confidence, right),
        "n_queries": len(right),
    }
    return Predicted(confidence, right, figures)


class Strangers(NamedTuple):
    """Of each query (Q,): how probable it is that its product is there, and whether it is not; the
    least probability that is taken for there; the figures of all."""

    there: np.ndarray
    strange: np.ndarray
    least: float
    figures: dict


def strangers(
    task: Task, view: str, asked: Sides, learned: Sides, *, hidden: float = 0.2, seed: int = 0
) -> Strangers | None:
    """Whether a catalogue without a share of its products notices the queries that show them.

    asked, learned: embeddings by a frozen network of the sides of the view and of 'validation'.
    Hidden are the products that protocol `unseen` does not train on. Projection and judge are
    fitted on validation without them. None where too few products are left to fit on or no query
    shows a hidden one.
    """
    queries = task.views[view].queries
    photos = task.known(view)
    secret = catalog.unseen_products(photos, hidden, seed)
    strange = ~_without(secret, queries)
    shown = _without(secret, photos)
    few = photos["product_id"].nunique() - len(secret) < 2
    asked_there = _without(secret, task.validation.queries)
    if few or not asked_there.any() or strange.all() or not strange.any():
        return None
    judge, project = _fitted_without(task, secret, learned)
    votes = labels.vote(
        *top_k(project(asked.queries), project(asked.known[shown]), labels.NEIGHBOURS),
        photos["product_id"].to_numpy()[shown],
    )
    there = judge.there(votes.evidence)
    let_in, kept, _ = roc_curve(~strange, there)
    figures = {
        "auroc": roc_auc_score(~strange, there),
        "fpr_at_95": let_in[np.searchsorted(kept, 0.95)],
        "kept": (there >= judge.least)[~strange].mean(),
        "let_in": (there >= judge.least)[strange].mean(),
        "n_strangers": strange.sum(),
        "n_products": len(secret),
    }
    return Strangers(there, strange, judge.least, figures)


def _without(secret: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """(N,) bool: the rows of other products than these."""
    return ~rows["product_id"].isin(secret).to_numpy()


def _fitted_without(
    task: Task,
    secret: np.ndarray,
    learned: Sides,
):
    """(a Judge, a function of embeddings (N, D)) fitted on validation without these products."""
    queries, photos = task.validation.queries, task.known("validation")
    asked, shown = _without(secret, queries), _without(secret, photos)
    rows, seen = photos[shown], rerank.unit(learned.known[shown])
    most = min(WIDTH, rows["product_id"].nunique() - 1)
    try:
        projections = pipeline.fitted([f"learned_whitening({most})"], seen, rows)
    except ValueError:  # one photo a product: nothing tells what varies inside one
        projections = pipeline.fitted(["centring()"], seen, rows)

    def project(x: np.ndarray) -> np.ndarray:
        return rerank.unit(encoder.projected(rerank.unit(x), projections))

    wanted = queries["product_id"].to_numpy()[asked]
    known = rows["product_id"].to_numpy()
    return labels.judge(project(learned.queries[asked]), wanted, project(seen), known), project


def spread(
    x: np.ndarray, products: np.ndarray, counts: list[int], *, seed: int = 0
) -> pd.DataFrame:
    """How many photos get the right label where so many of each product have one: a row a count;
    spread over the graph of embeddings x (N, D), and taken from the nearest photo that has one.
    """
    nth = numbered_in_product(products, np.random.default_rng(seed))
    table = {}
    for count in counts:
        start = np.where(nth < count, products, -1)
        rest = start < 0
        if rest.any():
            nearest = top_k(x[rest], x[~rest], 1)[1][:, 0]
            table[count] = {
                "spread": (labels.propagate(x, start)[rest] == products[rest]).mean(),
                "nearest labelled photo": (products[~rest][nearest] == products[rest]).mean(),
                "photos": rest.sum(),
            }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("labelled a product")
