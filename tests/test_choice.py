"""What a choice does with its candidates: on embeddings that are written by hand, then on the toy
set with networks that know nothing."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.judge import choice as choosing
from vipr_utils.judge import runs
from vipr_utils.judge.board import TIE
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.task import Task
from vipr_utils.learn import models
from vipr_utils.retrieve import verification

STACKS = ["product_votes(3)", "alpha_query_expansion(3, 3) + product_votes(3)"]


def network(seed: int = 0):
    torch.manual_seed(seed)
    return models.create("siamese_small", weights="none", embedding_dim=16).eval()


def opened(root, cache_dir, **settings) -> Task:
    settings = {"image_size": 32, "holdout": 0.3, "device": "cpu"} | settings
    return Task(str(root), cache_dir=str(cache_dir), **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task(toy_root, cache):
    return opened(toy_root, cache)


def among(task, **networks) -> Choice:
    return Choice(task, networks, dict.fromkeys(networks, 32))


@pytest.fixture
def choice(task):
    return among(task, a=network(0), b=network(1))


# -------------------------------------------------------------------------------------- embeddings


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right))
    return left @ right.T


def test_cosine_of_joined_parts_is_the_weighted_mean_of_theirs(choice):
    parts = Part("a"), Part("b", weight=2.0), Part("a", zoom=(0.5, 1.0), weight=0.5)
    found, want = choice.joined(parts, "validation"), 0
    for part in parts:
        alone = choice.joined((replace(part, weight=1.0),), "validation")
        want = want + part.weight / 3.5 * cosines(alone.queries, alone.known)
        for side, other in zip(found, alone):
            assert len(side) == len(other)
    np.testing.assert_allclose(found.queries @ found.known.T, want, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.known, axis=1), 1, atol=1e-5)


def test_weight_of_a_part_alone_says_nothing(choice):
    one, other = (choice.joined((Part("a", weight=w),), "validation") for w in (1.0, 2.0))
    np.testing.assert_array_equal(one.queries, other.queries)


def test_embeddings_are_remembered_up_to_a_size_and_are_the_same_when_made_again(
    choice, monkeypatch
):
    parts = [Part("a"), Part("b")]
    first = choice.joined((parts[0],), "validation")
    assert choice.joined((parts[0],), "validation").queries is first.queries
    size = sum(side.nbytes for side in first)
    monkeypatch.setattr(choosing, "MOST_BYTES", 1.5 * size)
    choice.joined((parts[1],), "validation")
    assert list(choice._looks) == [(parts[1], "validation")]
    monkeypatch.setattr(choosing, "MOST_BYTES", 0)
    again = choice.joined((parts[0],), "validation")
    assert not choice._looks
    np.testing.assert_array_equal(again.queries, first.queries)


def test_views_that_do_not_fit_in_memory_together_are_left_out_and_told(choice, monkeypatch):
    alone, both = Candidate((Part("a"),)), Candidate((Part("a"), Part("b")))
    size = sum(side.nbytes for side in choice.joined(alone.parts, "test"))
    monkeypatch.setattr(choosing, "MOST_BYTES", 1.5 * size)
    assert choice.best([both, alone]) == alone
    assert choice.refused == {str(both): "2 views of so many photos do not fit in memory together"}


def test_views_that_would_fit_for_validation_but_not_for_the_test_are_refused_at_once(
    choice, monkeypatch
):
    parts = Part("a"), Part("b")
    joined = [choice.joined(parts, view) for view in ("validation", "test")]
    sizes = [sum(side.nbytes for side in sides) for sides in joined]
    assert sizes[0] < sizes[1] - 1
    monkeypatch.setattr(choosing, "MOST_BYTES", sizes[1] - 1)
    with pytest.raises(ValueError, match="2 views of so many photos do not fit in memory"):
        choice.joined(parts, "validation")


# ------------------------------------------------------------------------------------------ scores


def test_candidates_are_tried_on_whole_products_where_validation_queries_are_many(
    task, monkeypatch
):
    candidate, asked = Candidate((Part("a"),), ("product_votes(3)",)), {}
    for most in (10**6, 5):
        monkeypatch.setattr(choosing, "MOST_QUERIES", most)
        choice = among(task, a=network())
        choice.score(candidate)
        asked[most] = choice.asked
        every = choice.found(candidate, "validation")
        assert len(every.ranks) == len(task.validation.queries)
    assert asked[10**6].all() and 5 <= choice.asked.sum() < len(every.ranks)
    products = task.validation.queries["product_id"]
    assert not set(products[choice.asked]) & set(products[~choice.asked]), "whole products"
    some = choice.found(candidate, "validation", asked=choice.asked)
    np.testing.assert_array_equal(some.ranks, every.ranks[choice.asked])
    assert choice.tried[candidate] == some.metrics["map_at_5"]


def test_candidates_that_differ_have_names_that_differ():
    parts = [
        Part("a"),
        Part("b"),
        Part("a", zoom=(0.8, 1.0)),
        Part("a", zoom=(0.8, 0.8)),
        Part("a", projection="centring()"),
        Part("a", features=True),
        Part("a", features=True, projection="centring()"),
        Part("a", weight=0.5),
    ]
    candidates = [Candidate(some, steps) for n in (1, 2) for some in combinations(parts, n)
                  for steps in [(), ("centring()",), ("product_votes(3)",)]]  # fmt: skip
    assert len(set(map(str, candidates))) == len(candidates)
    looks = [Part("a", zoom=(zoom, 1), projection="pca(8)") for zoom in (1, 0.8)]
    assert str(Candidate((*looks, Part("b", weight=0.5)), ("product_votes(3)",))) == (
        "a pca(8) zoom 1|1, 0.8|1 and b weight 0.5 zoom 1|1 + product_votes(3)"
    )


def scored(task, **scores) -> tuple[Choice, dict[str, Candidate]]:
    """A Choice that has tried these, 'one' the cheapest, and the candidates by name."""
    choice = among(task, small=network())
    part = Part("small")
    candidates = {
        "one": Candidate((part,)),
        "two": Candidate((part, replace(part, zoom=(0.8, 1.0)))),
        "three": Candidate(tuple(replace(part, zoom=(zoom, 1.0)) for zoom in (1.0, 0.8, 0.6))),
        "verified": Candidate((part,), ("verify(20)",)),
    }
    candidates = {name: candidates[name] for name in scores}
    choice.tried = {candidates[name]: score for name, score in scores.items()}
    return choice, candidates


@pytest.mark.parametrize(
    "scores, best",
    [
        ({"one": 0.500, "two": 0.5015}, "one"),
        ({"two": 0.5015, "one": 0.500}, "one"),  # whichever is named first
        ({"one": 0.500, "two": 0.506}, "two"),
        ({"one": 0.490, "two": 0.4985, "three": 0.500}, "two"),
        ({"three": 0.500, "verified": 0.5015}, "three"),  # verified pairs cost most
        ({"one": 0.500, "verified": 0.510}, "verified"),
        ({"one": 0.100, "two": 0.200, "three": 0.190}, "two"),
    ],
)
def test_of_those_within_a_tie_of_the_best_the_cheapest_is_chosen(task, scores, best):
    choice, candidates = scored(task, **scores)
    assert choice.best(candidates.values()) == candidates[best]


def test_where_few_queries_tell_the_deepest_verification_within_a_tie_is_chosen(task):
    choice, candidates = scored(task, one=0.500, verified=0.499)
    deeper = replace(candidates["verified"], steps=("verify(50)",))
    choice.tried[deeper] = 0.4985
    alike = [*candidates.values(), deeper]
    assert choice.best(alike, deepest=True) == deeper
    assert choice.best(alike) == candidates["one"]
    choice.tried[deeper] = choice.tried[candidates["verified"]] = 0.4975
    assert choice.best(alike, deepest=True) == candidates["one"], "it is worse"


@pytest.mark.parametrize("n, deepest", [(299, True), (301, False)])
def test_verification_is_taken_on_a_tie_where_queries_are_too_few_to_rule_out_that_it_helps(
    n, deepest, task, monkeypatch
):
    choice = among(task, a=network())
    monkeypatch.setattr(
        Choice, "score", lambda self, candidate: self.tried.setdefault(candidate, 0.5)
    )
    queries = pd.concat([task.validation.queries] * n)[:n]
    monkeypatch.setattr(Choice, "_affordable", lambda self, stack: True)
    choice.task = SimpleNamespace(validation=SimpleNamespace(queries=queries))
    final = choice.climb([1.0], [], ["verify(5)", "verify(20)"])
    assert final.steps == (("verify(20)",) if deepest else ())


def test_of_those_that_cost_the_same_the_better_one_is_chosen(task):
    choice = among(task, small=network())
    same = [Candidate((Part("small", projection=step),)) for step in ("", "centring()", "pca(8)")]
    choice.tried = dict(zip(same, (0.500, 0.504, 0.502)))
    assert choice.best(same) == same[1]


def test_ties_of_one_stage_behind_the_other_do_not_add_up(task):
    choice, candidates = scored(task, one=0.4975, two=0.4992, three=0.500)
    some = [candidates["one"], candidates["two"]]
    assert choice.best(some) == candidates["two"], "one lies further than TIE from what was tried"
    choice.tried[candidates["three"]] = 0.6
    assert choice.best(some) == candidates["one"], "none comes near it"


def test_cost_is_pairs_to_verify_then_reading_then_passes_of_a_query_through_networks(choice):
    choice.sizes["b"] = 64
    a, b = Part("a"), Part("b")
    half, shop = replace(a, zoom=(0.5, 1.0)), replace(a, zoom=(1.0, 0.5))
    one = choice.cost(Candidate((a,)))
    assert one == (0, False, choice.networks["a"].record["parameters"] * 32**2)
    assert choice.cost(Candidate((b,))) == (0, False, 4 * one[2])
    assert choice.cost(Candidate((a, half))) == (0, False, 2 * one[2])
    assert choice.cost(Candidate((a, shop))) == one, "a query is seen once"
    assert choice.cost(Candidate((a,), ("verify(0)", "product_votes(3)"))) == (100, False, one[2])
    assert choice.cost(Candidate((a,), ("read(0.4)",))) == (0, True, one[2])


def test_what_cannot_be_done_here_is_left_out_and_told(choice):
    here = Candidate((Part("a"),))
    elsewhere = Candidate((Part("a", projection="pca(9999)"),))
    assert choice.best([elsewhere, here]) == here
    assert "use at most" in choice.refused[str(elsewhere)] and elsewhere not in choice.tried
    with pytest.raises(ValueError, match="nothing can be tried on these photos: .*use at most"):
        choice.best([elsewhere])


def test_a_candidate_is_scored_once(choice, monkeypatch):
    candidate, asked = Candidate((Part("a"),)), []
    first = choice.score(candidate)
    monkeypatch.setattr(choice.task, "retrieve", lambda *a, **b: asked.append(1))
    assert choice.score(Candidate((Part("a"),))) == first and not asked


# ------------------------------------------------------------------------------------------- climb


@pytest.fixture(scope="module")
def climbed(task):
    choice = among(task, a=network(0), b=network(1))
    final = choice.climb([1.0, 0.7], STACKS, ["verify(5) + product_votes(3)"])
    return choice, final


def test_climb_starts_with_plain_search_and_ends_with_what_it_returns(climbed):
    choice, final = climbed
    rungs = list(choice.rungs.items())
    assert rungs[0] == ("plain search", Candidate((Part("a"),)))
    assert rungs[-1][1] == final and len(set(choice.rungs.values())) == len(rungs)


def test_no_candidate_that_was_tried_validates_better_than_the_final_one_by_more_than_a_tie(
    climbed,
):
    choice, final = climbed
    assert choice.tried[final] >= max(choice.tried.values()) - TIE
    assert choice.tried[final] > choice.tried[choice.rungs["plain search"]] + TIE
    found = choice.found(final, "validation").metrics
    assert choice.tried[final] == found["map_at_5"]


def test_every_kind_of_candidate_is_tried(climbed):
    tried = list(climbed[0].tried)
    parts = {part for candidate in tried for part in candidate.parts}
    assert {part.projection for part in parts} >= {"", *choosing.PROJECTIONS}
    assert {part.zoom for part in parts} == {(1.0, 1.0), (0.7, 1.0), (0.7, 0.7)}
    assert {part.features for part in parts} == {True, False}
    teams = [c for c in tried if {part.network for part in c.parts} == {"a", "b"}]
    assert {c.parts[-1].weight for c in teams} == set(choosing.WEIGHTS)
    assert any(choosing.WHITENED in c.steps for c in teams)
    assert any(len(c.parts) == 2 and c not in teams for c in tried), "zooms joined"
    stacks = {tuple(step for step in c.steps if step != choosing.WHITENED) for c in tried}
    assert stacks >= {
        (),
        ("product_votes(3)",),
        ("alpha_query_expansion(3, 3)", "product_votes(3)"),
        ("verify(5)", "product_votes(3)"),
    }


def test_steps_are_tried_behind_the_others_and_in_their_place_but_never_without_the_whitening(
    choice,
):
    base = Candidate((Part("a"), Part("b")), ("learned_whitening(128)", "product_votes(3)"))
    found = choice._stepped(base, ["verify(5) + product_votes(3)"])
    assert [candidate.steps for candidate in found] == [
        ("learned_whitening(128)", "verify(5)", "product_votes(3)"),
        ("learned_whitening(128)", "product_votes(3)", "verify(5)", "product_votes(3)"),
    ]
    assert {candidate.parts for candidate in found} == {base.parts}


def test_labels_of_the_test_have_no_part_in_the_choice(climbed, toy_root, task, tmp_path, cache):
    root = tmp_path / toy_root.name
    root.mkdir()
    for part in ("train", "test"):
        (root / part).symlink_to(toy_root / part, target_is_directory=True)
    (root / "train.csv").write_bytes((toy_root / "train.csv").read_bytes())
    pd.read_csv(toy_root / "test.csv")[["name"]].to_csv(root / "test.csv", index=False)
    blind = opened(root, tmp_path / "cache")
    assert (blind.views["test"].queries["product_id"] < 0).all()
    choice, final = climbed
    other = among(blind, **choice.networks)
    assert other.climb([1.0, 0.7], STACKS, ["verify(5) + product_votes(3)"]) == final
    assert other.tried == choice.tried
    np.testing.assert_array_equal(
        other.found(final, "test").ranks, choice.found(final, "test").ranks
    )


@pytest.mark.parametrize("place", ["stacks", "verified"])
def test_verification_that_would_take_longer_than_max_minutes_is_left_out_and_told(
    place, task, monkeypatch
):
    taken = {5: 120.0, 20: 1200.0}  # seconds
    monkeypatch.setattr(verification, "seconds", lambda queries, gallery, top: taken[top])
    monkeypatch.setattr(choosing, "monotonic", lambda: 0.0)
    choice = among(task, a=network())
    choice.max_minutes = 10.0
    stacks = ["verify(5)", "verify(20)"]
    choice.climb([1.0], **{"stacks": [], "verified": [], place: stacks})
    verified = {step for candidate in choice.tried for step in candidate.steps}
    assert "verify(5)" in verified and "verify(20)" not in verified
    assert choice.refused == {
        "verify(20)": "it would take about 20 minutes, 10 of max_minutes are left"
    }
    unlimited = among(task, a=network())
    unlimited.tried = {c: s for c, s in choice.tried.items() if not c.steps}
    assert all(map(unlimited._affordable, stacks))


def test_verification_whose_features_the_disk_has_no_room_for_is_left_out_and_told(
    task, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(task, "cache_dir", tmp_path)  # without what other tests have left
    monkeypatch.setattr(verification, "seconds", lambda queries, gallery, top: 120.0)
    monkeypatch.setattr(choosing.platform, "room_gb", lambda folder: 1e-6)
    choice = among(task, a=network())
    with caplog.at_level("INFO", "vipr"):
        choice.climb([1.0], [], ["verify(7)"])
    assert not any(candidate.steps for candidate in choice.tried)
    assert "has 1e-06 GB free" in choice.refused["verify(7)"]
    assert str(task.cache_dir) in choice.refused["verify(7)"]
    pairs = 7 * sum(len(task.views[view].queries) for view in ("validation", "test"))
    assert f"verify(7): {pairs:,} pairs, about 2 minutes" in caplog.text


def test_networks_whose_turn_comes_too_late_are_left_out_but_the_first_never_is(task):
    choice = among(task, a=network(0), b=network(1))
    choice.max_minutes = 1e-6
    final = choice.climb([1.0], [], ["verify(5)"])
    assert {part.network for part in final.parts} == {"a"}
    assert choice.refused["b"] == "max_minutes were used up before it was tried"
    assert choice.refused["verify(5)"].endswith("minutes, 0 of max_minutes are left")


def test_without_photos_held_out_there_is_no_climb(toy_root, cache):
    choice = among(opened(toy_root, cache, holdout=0), a=network())
    with pytest.raises(ValueError, match="set holdout over 0, or choose='none'"):
        choice.climb([1.0], [], [])


# ------------------------------------------------------------------------------ what takes part


def finished(folder, task, score, seed=0, **changes):
    """A run folder with a model that held out the photos of a task."""
    folder.mkdir(parents=True)
    models.save(network(seed), folder / "model.pt", image_size=48)
    held_out = {"how": "visits", "split": task.validation.split, "map_at_5": score}
    record = {"notebook": "03_scratch_siamese", "protocol": "test", "metrics": {}}
    data = {"fingerprint": task.photos.attrs["fingerprint"]}
    record |= {"data": data, "validation": held_out, "model": {}, "device": "cpu"} | changes
    runs.save(folder, params={}, seconds=1.0, **record)


def test_frozen_networks_and_the_best_runs_of_the_same_split_take_part(task, tmp_path, monkeypatch):
    finished(tmp_path / "good", task, 0.5)
    finished(tmp_path / "better", task, 0.6, seed=1)
    finished(tmp_path / "poor", task, 0.4)
    other = {"how": "visits", "split": "other", "map_at_5": 0.9}
    finished(tmp_path / "other_split", task, 0.9, validation=other)
    finished(tmp_path / "other_data", task, 0.9, data={"fingerprint": "other"})
    create = models.create

    def offline(name, **settings):
        if name == "tf_efficientnet_lite0":
            raise models.WeightsError("no weights")
        return create(name, **settings)

    monkeypatch.setattr(models, "create", offline)
    choice = Choice.open(
        task,
        tmp_path,
        backbones=["tf_efficientnet_lite0", "siamese_small"],
        image_size=40,
        most_runs=2,
        max_minutes=3.0,
    )
    assert choice.sizes == {"siamese_small": 40, "better": 48, "good": 48}
    assert list(choice.networks) == list(choice.sizes) and choice.max_minutes == 3.0
    for name, seed in (("better", 1), ("good", 0)):
        state, want = (x.state_dict() for x in (choice.networks[name], network(seed)))
        assert all(torch.equal(state[tensor], want[tensor]) for tensor in want)
    assert choice.refused["tf_efficientnet_lite0"] == "no weights"
    assert "held out other photos" in choice.refused["other_split"]
    assert "other photos" in choice.refused["other_data"]


def test_runs_that_learned_from_the_photos_of_drawn_queries_take_no_part_beside_a_frozen_network(
    toy_root, cache, tmp_path
):
    task = opened(toy_root, cache, validation="drawn")
    finished(tmp_path / "one", task, 0.9)
    finished(tmp_path / "two", task, 0.8)
    choice = Choice.open(task, tmp_path, backbones=["siamese_small"], weights="none")
    assert list(choice.networks) == ["siamese_small"]
    assert "learned from the photos that queries are drawn from" in choice.refused["one"]
    alone = Choice.open(task, tmp_path, backbones=[])
    assert list(alone.networks) == ["one"] and "two" in alone.refused


def test_a_run_that_is_named_takes_part_alone_whatever_it_held_out(task, tmp_path):
    finished(tmp_path / "one", task, 0.5)
    finished(tmp_path / "named", task, 0.1, data={"fingerprint": "other"})
    every = Choice.open(task, tmp_path, backbones=["siamese_small"], model_run="best")
    assert "siamese_small" in every.networks
    choice = Choice.open(task, tmp_path, backbones=["siamese_small"], model_run="named")
    assert list(choice.networks) == ["named"] and choice.refused == {}
    with pytest.raises(models.WeightsError, match="train a model first"):
        Choice.open(task, tmp_path, backbones=["siamese_small"], model_run="absent")


def test_a_run_that_learned_from_the_photos_to_choose_by_is_refused(task, tmp_path):
    finished(tmp_path / "all", task, 0.9, validation=None)
    with pytest.raises(ValueError, match="all: its model held out other photos.*choose to none"):
        Choice.open(task, tmp_path, backbones=["siamese_small"], model_run="all")


def test_without_any_network_it_is_told_why(task, tmp_path, monkeypatch):
    def offline(name, **settings):
        raise models.WeightsError(f"no weights of {name}")

    monkeypatch.setattr(models, "create", offline)
    with pytest.raises(models.WeightsError, match="no weights of one; no weights of two"):
        Choice.open(task, tmp_path, backbones=["one", "two"], image_size=32)


def test_without_photos_held_out_no_run_takes_part(toy_root, task, cache, tmp_path):
    finished(tmp_path / "run", task, 0.5)
    open_task = opened(toy_root, cache, holdout=0)
    choice = Choice.open(open_task, tmp_path, backbones=["siamese_small"], weights="none")
    assert list(choice.networks) == ["siamese_small"]
