"""Notebook 03: its own network, losses and loop, and what it makes of odd catalogues."""

import ast
import json
from pathlib import Path

import pandas as pd
import pytest
import shapes

from vipr_utils.judge import plots
from vipr_utils.judge.board import TIE, Board
from vipr_utils.learn import models
from vipr_utils.run import params

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "03_scratch_siamese.ipynb"
SMALL = {
    "device": "cpu",
    "precision": "float32",
    "image_size": 32,
    "epochs": 1,
    "losses": ["triplet"],
    "distances": ["cosine"],
    "embedding_dim": 16,
    "batch_size": 8,
    "images_per_product": 2,
}
SAME = "03-same"  # the cell that compares what the notebook trains with what the package trains


def run(changes: dict, *, last: str = "", rewrite=("", "")) -> tuple[dict, dict]:
    """(names, what each cell shows by its id) of the code cells up to `last`, with these
    parameters, and a piece of the source rewritten.
    """
    names, shown = {"__name__": "notebook"}, {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown[cell["id"]] = shown_by("".join(cell["source"]).replace(*rewrite), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= changes
        if cell["id"] == last:
            break
    return names, shown


def shown_by(source: str, names: dict):
    """What the cell ends with."""
    tree = ast.parse(source)
    end = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(end.value), "cell", "eval"), names) if end else None


@pytest.fixture(autouse=True)
def figures_unrendered(monkeypatch):
    """A third of the time would go into pixels that nobody looks at."""
    monkeypatch.setattr(
        plots, "_picture", lambda figure, title, caption, alt: plots.Picture(b"", alt)
    )


@pytest.fixture
def small(toy_root, tmp_path):
    folders = {"data_root": str(toy_root), "cache_dir": str(tmp_path / "cache")}
    return SMALL | folders | {"output_dir": str(tmp_path / "out")}


WRONG = {
    "no momentum": ("torch.optim.Adam(", "torch.optim.SGD("),
    "a block without its way around": ("change + self.around(x)", "change"),
    "the farthest stranger": ("torch.inf).amin(2)", "0.0).amax(2)"),
    "the first epoch's photos shifted": ("set_epoch(epoch)", "set_epoch(epoch + 1)"),
    "batch norms that stay in training": ("network.eval()", "network.train()"),
}


@pytest.mark.parametrize("change", WRONG)
def test_notebook_stops_when_its_own_training_differs_from_the_packages(small, change):
    before, after = WRONG[change]
    assert before in NOTEBOOK.read_text(encoding="utf-8")
    with pytest.raises(AssertionError):
        run(small, last=SAME, rewrite=(before, after))


def test_best_pair_on_validation_is_the_runs_model_and_every_pair_has_a_row(small):
    both = {"losses": ["triplet", "contrastive"], "distances": ["cosine", "manhattan"]}
    names, shown = run(small | both)
    folder = Path(small["output_dir"], "03_scratch_siamese")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows = pd.DataFrame(record["metrics"]["rows"]).set_index("name")
    assert list(rows.index) == [
        "triplet, cosine",
        "triplet, manhattan",
        "contrastive, cosine",
        "contrastive, manhattan",
    ]
    alike = rows["validation"] >= rows["validation"].max() - TIE
    best = rows.index[alike][0]
    kept = models.load(folder / "model.pt").record
    assert record["metrics"]["name"] == best == f"{kept['loss']}, {kept['distance']}"
    assert record["metrics"]["map_at_5"] == rows["map_at_5"][best]
    assert record["metrics"]["untrained"] > 0
    assert f"**{record['metrics']['map_at_5']:.3f}**" in shown["03-23"].data


@pytest.mark.long
def test_model_of_the_run_is_the_chosen_pairs_whichever_was_kept_on_the_way(small, monkeypatch):
    monkeypatch.setattr(Board, "choose", lambda board, names=(): list(board.entries)[-2:][0])
    run(small | {"losses": ["triplet", "contrastive"], "distances": ["cosine", "manhattan"]})
    folder = Path(small["output_dir"], "03_scratch_siamese")
    name = json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["name"]
    kept = models.load(folder / "model.pt").record
    assert name == "contrastive, cosine" == f"{kept['loss']}, {kept['distance']}"


def test_wrong_first_answers_are_counted_by_the_line_they_show(small):
    names, shown = run(small, last="03-wrong")
    queries, gallery, result = names["queries"], names["gallery"], names["result"]
    counts = dict.fromkeys(["right product", "same line", "other line"], 0)
    for product, group, first in zip(queries.product_id, queries.group, result.ranks[:, 0]):
        answer = gallery.iloc[first]
        if answer.product_id == product:
            counts["right product"] += 1
        else:
            counts["same line" if answer.group == group else "other line"] += 1
    assert shown["03-answers"]["first answers"].to_dict() == counts
    wrong = counts["same line"] + counts["other line"]
    assert shown["03-wrong"].data.startswith(f"{wrong} of {len(queries)} first answers are wrong")


def test_page_says_what_a_catalogue_without_domains_and_groups_cannot_show(
    small, toy_root, tmp_path
):
    root = shapes.cut("no_domain_and_no_group", toy_root, tmp_path / "data")
    names, shown = run(small | {"data_root": str(root)})
    assert "mAP@5" in shown["03-23"].data
    assert "too few for a map" in shown["03-20"].data
    assert "No query has a known product line" in shown["03-wrong"].data


def test_queries_without_labels_leave_the_scores_to_validation(small, toy_root, tmp_path):
    root = shapes.cut("no_labels", toy_root, tmp_path / "data")
    names, shown = run(small | {"data_root": str(root)})
    assert "of the validation queries" in shown["03-scored"].data
    assert "the validation queries triplet, cosine" in shown["03-23"].data
    record = json.loads((names["folder"] / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"].get("map_at_5") is None and record["validation"]["map_at_5"] > 0


def test_figures_of_a_large_catalogue_are_of_photos_drawn_from_each_side(small):
    names, _ = run(small, rewrite=("2000", "5"), last="03-18")
    assert names["cosines"].shape == (5, 5) and names["looked_at"] == "25 drawn"


def test_losses_and_distances_must_name_a_pair(small):
    with pytest.raises(ValueError, match="name at least one of each"):
        run(small | {"losses": []}, last="03-pairs")


@pytest.mark.parametrize("sweep", ["study_scratch", "laptop/study_scratch"])
def test_sweep_of_the_study_trains_one_pair_a_run_under_the_names_of_its_table(sweep):
    found = params.load_runs([ROOT / "params" / "sweeps" / f"{sweep}.yaml"])
    pairs = {run.name.split("-seed")[0]: run.values for run in found}
    assert len(pairs) == 6
    for name, values in pairs.items():
        (loss,), (distance,) = values["losses"], values["distances"]
        assert name == f"study_scratch-{loss}-{distance}"
