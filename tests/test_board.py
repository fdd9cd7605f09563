"""A board's rows, differences and choices, on embeddings whose scores are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.judge import metrics, runs
from vipr_utils.judge.board import Board, gain, verdict
from vipr_utils.judge.task import Task
from vipr_utils.learn import models


@pytest.fixture(scope="module")
def task(toy_root, tmp_path_factory):
    return Task(
        str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )


def told(task, noise: float) -> np.ndarray:
    """Embeddings that name the product, and noise."""
    product = np.unique(task.photos["product_id"], return_inverse=True)[1]
    rng = np.random.default_rng(0)
    x = np.eye(product.max() + 1)[product] + noise * rng.normal(
        size=(len(product), product.max() + 1)
    )
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def board(task):
    board = Board(task)
    board.add("poor", told(task, 2.0), baseline="poor")
    board.add("good", told(task, 0.1), baseline="poor")
    return board


def test_best_on_validation_is_chosen_and_test_has_no_part_in_it(task, board):
    assert board.choose() == "good" and board.choose(["poor"]) == "poor"
    entry = board["good"]
    entry.views["test"].metrics["map_at_5"] = 0.0
    assert board.choose() == "good"


def test_among_equals_the_first_is_chosen(task):
    board = Board(task)
    for name in ("first", "second"):
        board.add(name, told(task, 0.1))
    assert board.choose() == "first"


def test_one_that_is_alike_does_not_take_the_place_of_a_cheaper_one(task, monkeypatch):
    scores = {"a": 0.1000, "b": 0.1015, "c": 0.1030, "d": 0.1040}
    board = Board(task)
    board.entries = dict.fromkeys(scores)
    monkeypatch.setattr(board, "score", lambda name, view: scores[name])
    assert board.choose(["a", "b"]) == "a" and board.choose() == "c"


@pytest.mark.parametrize(
    "scores, chosen",
    [
        ({"a": 0.500, "b": 0.5015}, "a"),
        ({"b": 0.5015, "a": 0.500}, "b"),
        ({"a": 0.500, "b": 0.506}, "b"),
        ({"a": 0.490, "b": 0.4985, "c": 0.5}, "b"),
        ({"a": float("nan"), "b": 0.1}, "b"),
    ],
)
def test_of_those_within_a_tie_of_the_best_the_first_is_chosen(task, scores, chosen):
    board, found = Board(task), task.retrieve(told(task, 0.1), "validation")
    for name, score in scores.items():
        views = {"validation": replace(found, metrics={"map_at_5": score})}
        board.enter(name, views, cost={"setting": name})
    assert board.choose() == chosen and board["a"].record == {}
    assert board.score("a", "test") == 0


def test_where_no_test_query_has_a_label_the_figures_are_of_validation(toy_root, tmp_path):
    task = Task(str(toy_root), image_size=32, device="cpu", cache_dir=str(tmp_path))
    view = task.views["test"]
    task.views["test"] = view._replace(queries=view.queries.assign(product_id=-1))
    board = Board(task)
    board.add("poor", told(task, 2.0), baseline="poor")
    board.add("good", told(task, 0.1), baseline="poor")
    assert board.view == "validation" and board.choose() == "good"
    assert board.score("good") == board.score("good", "validation") > 0.9
    assert board.table().loc["good", "verdict"] == "helps"
    board.save(tmp_path, "good")
    board.save_run(tmp_path, "good", notebook="00", params={})
    assert not (tmp_path / "average_precision.csv").exists()
    record = runs.load(tmp_path)
    assert record["metrics"]["rows"] == [] and "map_at_5" not in record["metrics"]
    assert record["validation"]["map_at_5"] == board.score("good")


def test_without_validation_the_last_is_chosen(toy_root, tmp_path):
    task = Task(str(toy_root), holdout=0, image_size=32, device="cpu", cache_dir=str(tmp_path))
    board = Board(task)
    board.add("good", told(task, 0.1))
    board.add("poor", told(task, 2.0))
    assert board.choose() == "poor"


def test_difference_is_paired_by_query_with_an_interval_over_products(task, board):
    ap = [board[name].views["test"].average_precision for name in ("good", "poor")]
    products = task.views["test"].queries["product_id"]
    assert board.difference("good") == metrics.paired_difference(*ap, products)
    assert board.table().loc["good", "gain"] == gain(*board.difference("good"))
    assert board.table().loc["good", "verdict"] == "helps"
    assert board.table().loc["poor", "difference"] == 0


def test_row_holds_the_scores_of_all_views_and_what_it_cost(task, board):
    row = board.rows()[1]
    assert row["name"] == "good" and row["map_at_5"] == board.score("good")
    assert row["validation"] == board.score("good", "validation") > 0.9
    assert row["shop"] == board["good"].views["shop"].metrics["map_at_5"]
    assert row["seconds"] > 0 and row["peak_mb"] > 0


def test_best_model_so_far_is_on_disk_after_each_entry(task, tmp_path):
    board = Board(task, tmp_path)
    networks = {}
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        networks[name] = models.create("siamese_small", weights="none", embedding_dim=8)
        board.add(name, networks[name], image_size=32)
        kept, best = models.load(tmp_path / "model.pt"), networks[board.choose()]
        assert all(
            torch.equal(a, b)
            for a, b in zip(kept.state_dict().values(), best.state_dict().values())
        )
    assert kept.record["image_size"] == 32 and board.table()["ms_per_image"].gt(0).all()


def test_best_model_of_each_backbone_is_kept_with_what_it_validated(task, tmp_path):
    board = Board(task, tmp_path)
    for name in ("test_resnet", "siamese_small"):
        network = models.create(name, weights="none")
        board.add(name, network, image_size=32)
        kept = models.load(tmp_path / name / "model.pt").state_dict()
        assert all(torch.equal(kept[key], value) for key, value in network.state_dict().items())
    board.save_run(tmp_path, board.choose(), notebook="04", params={})
    scores = {name: board.score(name, "validation") for name in ("test_resnet", "siamese_small")}
    assert runs.load(tmp_path)["networks"] == pytest.approx(scores)


def test_ap_of_every_query_is_saved(board, task, tmp_path):
    board.save(tmp_path, "good")
    per_query = pd.read_csv(tmp_path / "average_precision.csv")
    assert list(per_query) == ["name", "product_id", "test", "shop", "customer"]
    assert per_query["test"].mean() == pytest.approx(board.score("good"), abs=1e-3)


def test_record_of_an_entry_of_embeddings_names_the_model_behind_it(board, tmp_path):
    record = {"name": "net", "weights": {"source": "random"}}
    board.save_run(tmp_path, "good", notebook="00", params={}, model=record, figures={"minutes": 3})
    found = runs.load(tmp_path)
    assert found["model"] == record and found["metrics"]["minutes"] == 3
    assert [row["name"] for row in found["metrics"]["rows"]] == ["poor", "good"]
    assert found["validation"]["map_at_5"] == board.score("good", "validation")


def test_words_of_an_interval_and_a_stack():
    assert [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "helps",
        "hurts",
        "does not help",
    ]
    assert gain(0.1, 0.05, 0.15) == "+0.100 [+0.050, +0.150]"


def test_training_cut_short_marks_the_network_and_every_row_made_of_its_embeddings(task, tmp_path):
    network = models.create("siamese_small", weights="none", embedding_dim=8)
    network.record["cut_short"] = "in epoch 3 of 8"
    board = Board(task)
    board.add("network", network, image_size=32)
    board.add("steps", told(task, 0.1), steps=["centring()"], baseline="network")
    board.add("other", told(task, 0.1))
    marks = {row["name"]: row["cut_short"] for row in board.rows()}
    assert marks == {"network": "in epoch 3 of 8", "steps": "in epoch 3 of 8", "other": ""}
    board.save_run(tmp_path, "steps", notebook="07_reranking", params={})
    assert runs.load(tmp_path)["cut_short"] == "in epoch 3 of 8"
