import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tables

from vipr_utils.judge import plots, runs

SCORES = {
    "map_at_5": 0.458,
    "map_at_5_low": 0.441,
    "map_at_5_high": 0.476,
    "precision_at_1": 0.564,
    "n_queries": 20,
    "n_gallery": 30,
}
DATA = {"root": "toy", "fingerprint": "f", "n_train": 30}


def saved(folder, **changes):
    record = {
        "notebook": "06_submission",
        "params": {"seed": 0, "image_size": 64},
        "data": {"root": "toy"},
        "protocol": "test",
        "metrics": SCORES,
        "model": {"name": "lite0"},
        "seconds": 61.25,
        "device": "cpu",
    }
    return runs.save(folder, **(record | changes))


def test_record_names_folders_without_their_place(tmp_path):
    params = {
        "data_root": str(tmp_path / "photos"),
        "output_dir": "submissions",
        "cache_dir": "",
        "seed": 0,
    }
    record = runs.load(saved(tmp_path / "first", params=params).parent)
    assert record["params"] == {
        "data_root": "photos",
        "output_dir": "submissions",
        "cache_dir": "",
        "seed": 0,
    }


def test_results_page_shows_the_reference_records_as_they_are():
    page = (Path(__file__).resolve().parents[1] / "RESULTS.md").read_text(encoding="utf-8")
    made = tables.results()
    assert made.count("\n") > 50 and tables.inserted(page, made) == page, "make results"


def test_a_saved_run_holds_every_key_of_the_contract(tmp_path):
    record = runs.load(saved(tmp_path / "first").parent)
    assert set(runs.KEYS) <= set(record)
    assert record["run"] == "first" and record["metrics"] == SCORES and record["seconds"] == 61.2
    assert record["versions"]["torch"] and record["hardware"]


def test_numpy_values_become_numbers_and_nan_becomes_null(tmp_path):
    metrics = {
        "map_at_5": np.float32(0.5),
        "n": np.int64(3),
        "bad": math.nan,
        "list": np.arange(2),
        "path": Path("a") / "b",
    }
    text = saved(tmp_path / "r", metrics=metrics).read_text()
    assert json.loads(text)["metrics"] == {
        "map_at_5": 0.5,
        "n": 3,
        "bad": None,
        "list": [0, 1],
        "path": "a/b",
    }
    assert "NaN" not in text


def test_a_value_without_json_form_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"holds text, numbers.*, not the function <function"):
        saved(tmp_path / "r", metrics={"rows": [{"f": lambda: 0}]})
    assert not (tmp_path / "r" / "run.json").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no readable JSON"),
        ("3", "lacks run, notebook"),
        ("[]", "lacks run, notebook"),
        ("{}", "lacks run, notebook"),
    ],
)
def test_a_damaged_record_is_named_with_the_remedy(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(runs.RunError, match=message):
        runs.load(tmp_path)


def test_a_missing_record_says_that_the_run_has_not_finished(tmp_path):
    with pytest.raises(runs.RunError, match="has not finished"):
        runs.load(tmp_path)


def test_the_scoreboard_sorts_best_first_expands_systems_and_survives_damage(tmp_path):
    saved(tmp_path / "low", metrics=SCORES | {"map_at_5": 0.1})
    saved(tmp_path / "eda", metrics={"found": 3}, model=None)
    saved(
        tmp_path / "sweep",
        metrics=SCORES
        | {"rows": [{"name": "a"} | SCORES, {"name": "b"} | SCORES | {"map_at_5": 0.9}]},
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    table = runs.scoreboard(tmp_path)
    assert table.run.tolist() == ["sweep: b", "sweep: a", "low", "eda"]
    assert len(table.attrs["problems"]) == 1 and "broken" in table.attrs["problems"][0]


def test_table_gives_interval_data_sizes_time_and_hardware_and_skips_unscored_runs(tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "eda", metrics={})
    board = runs.scoreboard(tmp_path)
    title, *printed = runs.table(board).splitlines()
    assert title.endswith("protocol test, gallery all: 20 queries × 30 gallery photos")
    assert len(printed) == 2
    shown = dict(zip(printed[0].split(), printed[1].split()))
    expected = {"run": "one", "map_at_5": "0.458", "map_at_5_low": "0.441", "seconds": "61"}
    assert expected.items() <= shown.items()


def test_only_what_stands_between_the_marks_is_replaced():
    text = f"before\n{tables.START}\nold\n{tables.END}\nafter\n"
    assert tables.inserted(text, "new") == f"before\n{tables.START}\nnew\n{tables.END}\nafter\n"
    with pytest.raises(ValueError, match="put both marks"):
        tables.inserted("no marks", "new")


def test_the_command_prints_the_table(tmp_path, capsys):
    saved(tmp_path / "one")
    assert runs.main([str(tmp_path)]) == 0
    assert "0.458" in capsys.readouterr().out


def test_an_empty_folder_gives_an_empty_scoreboard(tmp_path):
    assert runs.scoreboard(tmp_path).empty
    assert runs.main([str(tmp_path)]) == 1


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_range(tmp_path):
    for seed, value in enumerate((0.3, 0.5, 0.4)):
        name = f"study_scratch-triplet-cosine-seed{seed}"
        saved(tmp_path / name, metrics=SCORES | {"map_at_5": value}, params={"seed": seed})
    saved(tmp_path / "other")
    merged = runs.over_seeds(runs.scoreboard(tmp_path)).set_index("run")
    row = merged.loc["study_scratch-triplet-cosine"]
    assert row.map_at_5 == pytest.approx(0.4) and (row.seeds, row.least, row.most) == (3, 0.3, 0.5)
    ((_, table),) = runs.comparable(runs.scoreboard(tmp_path))
    assert table.set_index("run").loc[row.name].study == 0.023
    assert "| 0.400, 0.300 to 0.500 over 3 seeds |" in tables.results(tmp_path)


def test_runs_of_other_photos_protocols_or_galleries_are_no_seeds_of_one_another(tmp_path):
    changes = [{}, {"data": DATA | {"fingerprint": "other"}}, {"protocol": "seen"}]
    changes.append({"params": {"gallery_domain": "shop"}})
    for seed, change in enumerate(changes):
        saved(tmp_path / f"a-seed{seed}", **({"data": DATA} | change))
    merged = runs.over_seeds(runs.scoreboard(tmp_path))
    assert merged["seeds"].tolist() == [1, 1, 1, 1]


def test_scoreboard_is_a_table_for_each_task_whose_rows_may_be_compared(tmp_path):
    saved(tmp_path / "a", data=DATA, metrics=SCORES | {"map_at_5": 0.5})
    saved(tmp_path / "b", data=DATA, metrics=SCORES | {"map_at_5": 0.6}, cut_short="in epoch 1")
    saved(tmp_path / "small", data=DATA, metrics=SCORES | {"map_at_5": 0.9, "n_gallery": 3})
    saved(tmp_path / "other", data=DATA | {"fingerprint": "other"})
    saved(tmp_path / "unscored", metrics={})
    tables = dict(runs.comparable(runs.scoreboard(tmp_path)))
    assert [(title, table["run"].tolist()) for title, table in tables.items()] == [
        (
            "toy (f), protocol test, gallery all: 20 queries × 30 gallery photos",
            ["b (cut short in epoch 1)", "a"],
        ),
        ("toy (other), protocol test, gallery all: 20 queries × 30 gallery photos", ["other"]),
        ("toy (f), protocol test, gallery all: 20 queries × 3 gallery photos", ["small"]),
    ]
    assert "study" not in next(iter(tables.values()))
    assert runs.comparable(runs.scoreboard(tmp_path / "nothing")) == []


def answered(folder, values, names=("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
    table = {"name": names, "product_id": [1, 1, 2, 2], "shop": values, "customer": [0.5] * 4}
    folder.mkdir()
    pd.DataFrame(table).to_csv(folder / "average_precision.csv", index=False)


def test_levers_are_compared_with_the_baseline_of_their_sweep_query_by_query(tmp_path):
    answered(tmp_path / "gap-baseline", [0.0, 0.2, 0.4, 0.6])
    answered(tmp_path / "gap-clutter", [0.1, 0.3, 0.6, 0.8])
    table = runs.against_baselines(tmp_path).set_index(["run", "view"])
    row = table.loc["gap-clutter", "shop"]
    assert (
        row.difference == pytest.approx(0.15)
        and row.baseline == pytest.approx(0.3)
        and row.low == pytest.approx(0.1)
    )
    assert row.high == pytest.approx(0.2)
    assert table.loc["gap-clutter", "customer"].difference == 0
    assert runs.against_baselines(tmp_path / "nothing").empty


def test_per_query_scores_are_read_compressed_too(tmp_path):
    answered(tmp_path / "gap-baseline", [0.0, 0.2, 0.4, 0.6])
    answered(tmp_path / "gap-clutter", [0.1, 0.3, 0.6, 0.8])
    plain = runs.against_baselines(tmp_path)
    for file in tmp_path.glob("*/average_precision.csv"):
        file.with_suffix(".csv.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    pd.testing.assert_frame_equal(runs.against_baselines(tmp_path), plain)


def test_paired_differences_stand_beside_each_other_by_gallery(tmp_path):
    answered(tmp_path / "gap-baseline", [0.0, 0.2, 0.4, 0.6])
    answered(tmp_path / "gap-clutter", [0.1, 0.3, 0.6, 0.8])
    pairs = runs.against_baselines(tmp_path)
    pairs = pd.concat([pairs, pairs[pairs["view"] == "shop"].assign(view="test")])
    wide = tables.differences(pairs).set_index("run")
    assert wide.loc["gap-clutter", "shop photos"] == "+0.150 [+0.100, +0.200]"
    assert wide.loc["gap-clutter", "customer photos"] == "+0.000 [+0.000, +0.000]"


def test_runs_of_other_queries_and_runs_without_per_query_scores_are_refused(tmp_path):
    answered(tmp_path / "gap-baseline", [0.0, 0.2, 0.4, 0.6])
    answered(
        tmp_path / "gap-other", [0.0, 0.2, 0.4, 0.6], names=("a.jpg", "b.jpg", "c.jpg", "e.jpg")
    )
    with pytest.raises(
        runs.RunError, match="gap-other and gap-baseline answered different queries"
    ):
        runs.compare(tmp_path / "gap-baseline", tmp_path / "gap-other")
    with pytest.raises(runs.RunError, match="average_precision.csv does not exist"):
        runs.compare(tmp_path / "gap-baseline", tmp_path / "nothing")


def test_baseline_without_results_and_run_of_other_queries_are_skipped_and_named(tmp_path):
    answered(tmp_path / "gap-baseline", [0.0, 0.2, 0.4, 0.6])
    answered(tmp_path / "gap-clutter", [0.1, 0.3, 0.6, 0.8])
    answered(tmp_path / "gap-other", [0.0] * 4, names=("a.jpg", "b.jpg", "c.jpg", "e.jpg"))
    answered(tmp_path / "bai-one", [0.1, 0.3, 0.6, 0.8])
    answered(tmp_path / "bai-two", [0.1, 0.3, 0.6, 0.8])
    (tmp_path / "bai-baseline").mkdir()
    (tmp_path / "bai-baseline" / "average_precision.csv.old").touch()
    (tmp_path / "best-baseline").mkdir()
    table = runs.against_baselines(tmp_path)
    assert set(table["run"]) == {"gap-clutter"}
    first, second = table.attrs["problems"]
    assert "bai-baseline" in first and "does not exist" in first
    assert "gap-other and gap-baseline answered different queries" in second


def test_an_ablation_shows_each_method_with_its_difference():
    plain = SCORES | {
        "name": "plain search",
        "setting": "",
        "difference": 0.0,
        "difference_low": 0.0,
        "difference_high": 0.0,
        "verdict": "does not help",
        "seconds": 0.26,
        "peak_mb": 40.6,
        "ms_per_image": 8.04,
    }
    other = plain | {
        "name": "k",
        "setting": "k:20",
        "difference": 0.072,
        "difference_low": 0.061,
        "difference_high": 0.084,
        "verdict": "helps",
        "ms_per_image": None,
        "seconds": 400.0,
    }
    shown = tables.markdown(tables.ablation({"metrics": {"rows": [plain, other]}}))
    assert "| plain search |  | – | – | 8.0 | 0.3 |" in shown
    assert "| k | k:20 | +0.072 [+0.061, +0.084] | helps | – | 400.0 |" in shown


def test_columns_that_never_vary_are_left_out_and_long_tables_folded():
    table = pd.DataFrame({"a": range(13), "b": 1})
    assert tables.markdown(table).splitlines()[:3] == ["| a |", "| --- |", "| 0 |"]
    assert "<details><summary>13 rows</summary>" in tables.section("T", "All have b 1.", table)
    assert "<details>" not in tables.section("T", "All have b 1.", table.head(12))


# ----------------------------------------------------------- validation, trainings cut short


def validated(folder, score, split, fingerprint="f", **changes):
    data = {"root": "toy", "fingerprint": fingerprint}
    held_out = {"how": "visits", "split": split, "map_at_5": score}
    saved(folder, data=data, validation=held_out, **changes)
    (folder / "model.pt").touch()


def test_runs_that_held_out_the_same_photos_are_taken_best_first_and_the_others_are_told_why(
    tmp_path,
):
    validated(tmp_path / "good", 0.5, "aa")
    validated(tmp_path / "better", 0.6, "aa")
    validated(tmp_path / "elsewhere", 0.9, "aa", fingerprint="other")
    validated(tmp_path / "other_split", 0.9, "bb")
    validated(tmp_path / "no_model", 0.9, "aa")
    (tmp_path / "no_model" / "model.pt").unlink()
    saved(tmp_path / "never_validated", metrics=SCORES | {"map_at_5": 0.99})
    (tmp_path / "never_validated" / "model.pt").touch()
    found, refused = runs.validated(tmp_path, "f", "aa")
    assert list(found.items()) == [(n, tmp_path / n / "model.pt") for n in ("better", "good")]
    assert "other photos" in refused["elsewhere"] and "same holdout" in refused["other_split"]
    assert "never_validated" in refused and "no_model" not in refused
    assert runs.validated(tmp_path, "third", "aa")[0] == {}


def test_backbones_that_a_run_kept_beside_its_best_take_part_by_what_they_validated(
    tmp_path, monkeypatch
):
    kept = {"lite0": 0.4, "lite2": 0.6, "lost": 0.7}
    validated(tmp_path / "own" / "sweep", 0.6, "aa", model={"name": "lite2"}, networks=kept)
    (tmp_path / "own" / "sweep" / "lite0").mkdir()
    (tmp_path / "own" / "sweep" / "lite0" / "model.pt").touch()
    validated(tmp_path / "own" / "other", 0.5, "aa")
    attached = tmp_path / "some-notebook" / "submissions"
    validated(attached / "sweep", 0.7, "aa")
    monkeypatch.setattr(runs.platform, "attached", lambda name: [attached])
    found, _ = runs.validated(tmp_path / "own", "f", "aa")
    assert found == {
        "some-notebook/sweep": attached / "sweep" / "model.pt",
        "sweep": tmp_path / "own" / "sweep" / "model.pt",
        "other": tmp_path / "own" / "other" / "model.pt",
        "sweep/lite0": tmp_path / "own" / "sweep" / "lite0" / "model.pt",
    }
    assert list(found)[0] == "some-notebook/sweep" and list(found)[-1] == "sweep/lite0"


def test_training_cut_short_is_marked_in_record_and_table(tmp_path):
    saved(tmp_path / "sweep-seed0", cut_short="in epoch 3 of 8")
    saved(
        tmp_path / "sweep-seed1",
        metrics=SCORES | {"rows": [SCORES | {"name": "whole", "cut_short": ""}]},
    )
    assert runs.load(tmp_path / "sweep-seed0")["cut_short"] == "in epoch 3 of 8"
    table = runs.scoreboard(tmp_path).set_index("run")
    assert table["cut_short"].to_dict() == {
        "sweep-seed0": "in epoch 3 of 8",
        "sweep-seed1: whole": "",
    }
    assert "in epoch 3 of 8" in runs.table(runs.scoreboard(tmp_path))
    assert "| sweep **(cut short in epoch 3 of 8)** |" in tables.results(tmp_path)


# ------------------------------------------------------------------------------------ the ladder


def stood(folder, notebook, score, *, name="", rows=(), per_query=(), **changes):
    """A finished run of the series on DATA; per_query: AP@5 of its four queries."""
    headline = SCORES | {"map_at_5": score, "name": name, "rows": list(rows), "chance": 0.02}
    record = {"notebook": notebook, "data": DATA, "metrics": headline, "params": {}} | changes
    saved(folder, **record)
    if per_query:
        queries = {"name": list("abcd"), "product_id": [1, 1, 2, 2], "test": per_query}
        pd.DataFrame(queries).to_csv(folder / "average_precision.csv", index=False)


def test_ladder_has_a_rung_for_each_kind_of_run_in_the_order_of_the_series(tmp_path):
    stood(tmp_path / "s", "06_submission", 0.8)
    frozen = SCORES | {"name": "lite0, frozen", "map_at_5": 0.3}
    other = SCORES | {"name": "lite2, frozen", "map_at_5": 0.9}
    stood(tmp_path / "t", "04_pretrained_sweep", 0.5, name="lite0, head", rows=[frozen, other])
    stood(tmp_path / "c", "03_scratch_siamese", 0.1)
    stood(tmp_path / "e", "01_eda", None)
    table = runs.ladder(tmp_path, "f")
    assert table["map_at_5"].to_dict() == {
        "random ranking": 0.02,
        "from scratch": 0.1,
        "frozen backbone": 0.3,
        "trained": 0.5,
        "submission": 0.8,
    }
    assert table["gain"].round(6).tolist()[1:] == [0.08, 0.2, 0.2, 0.3]
    assert (table.loc["trained", "map_at_5_low"], table.loc["trained", "run"]) == (0.441, "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": DATA | {"fingerprint": "other"}},
        {"protocol": "seen"},
        {"metrics": SCORES | {"n_gallery": 12}},
        {"metrics": SCORES | {"map_at_5": None}},
    ],
)
def test_run_that_does_not_compare_stands_on_no_rung(tmp_path, changes):
    stood(tmp_path / "r", "03_scratch_siamese", 0.1, **changes)
    assert runs.ladder(tmp_path, "f").empty


def test_rung_is_of_the_run_that_validates_best_and_then_of_the_newest(tmp_path):
    for name, score, validation in (("a", 0.2, 0.6), ("b", 0.9, 0.5)):
        held_out = {"how": "visits", "split": "s", "map_at_5": validation}
        stood(tmp_path / name, "03_scratch_siamese", score, validation=held_out)
    for name, score, day in (("old", 0.9, "2026-01-02"), ("new", 0.4, "2026-01-03")):
        stood(tmp_path / name, "05_subset_finetune", score)
        record = json.loads((tmp_path / name / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(record | {"finished": day}))
    assert runs.ladder(tmp_path, "f")["run"].tolist() == ["", "a", "new"]


def test_gain_of_a_rung_is_paired_where_both_runs_answered_the_same_queries(tmp_path):
    stood(tmp_path / "t", "04_pretrained_sweep", 0.3, per_query=[0.0, 0.2, 0.4, 0.6])
    stood(tmp_path / "p", "07_reranking", 0.45, per_query=[0.1, 0.3, 0.6, 0.8])
    stood(tmp_path / "s", "06_submission", 0.5)
    table = runs.ladder(tmp_path, "f")[["gain", "gain_low", "gain_high"]].round(6)
    assert table.loc["post-processed"].tolist() == [0.15, 0.1, 0.2]
    assert table.loc["submission"].tolist()[0] == 0.05 and math.isnan(table["gain_low"].iloc[-1])


def test_gain_over_the_frozen_backbone_is_the_one_that_its_own_run_measured(tmp_path):
    plain = SCORES | {"name": "plain search", "map_at_5": 0.3}
    measured = {
        "difference": 0.2,
        "difference_low": 0.1,
        "difference_high": 0.3,
        "verdict": "helps",
    }
    metrics = SCORES | {"map_at_5": 0.5, "name": "best stack", "rows": [plain]} | measured
    stood(tmp_path / "p", "07_reranking", 0.5, metrics=metrics)
    table = runs.ladder(tmp_path, "f")
    assert table.index.tolist() == ["frozen backbone", "post-processed"]
    assert table.iloc[1][["gain", "gain_low", "gain_high"]].tolist() == [0.2, 0.1, 0.3]


def test_rung_of_a_training_cut_short_says_so(tmp_path):
    stood(tmp_path / "c", "03_scratch_siamese", 0.1, cut_short="in epoch 3 of 8")
    table = runs.ladder(tmp_path, "f")
    assert table["cut_short"].tolist() == ["", "in epoch 3 of 8"]
    assert "from scratch (cut short in epoch 3 of 8) 0.100" in plots.ladder(table).alt


def test_ladder_of_no_run_is_a_sentence(tmp_path):
    assert plots.ladder(runs.ladder(tmp_path, "f")).alt.startswith("No score on this data yet")


def test_run_by_hand_after_a_failed_one_is_finished(tmp_path):
    stood(tmp_path / "a", "03_scratch_siamese", 0.1)
    runs.set_aside(tmp_path / "a", "ValueError: broken")
    assert runs.unfinished(tmp_path) == ["a"] and runs.ladder(tmp_path, "f").empty
    stood(tmp_path / "a", "03_scratch_siamese", 0.2)
    assert runs.unfinished(tmp_path) == [] and runs.load(tmp_path / "a")
    runs.settle(tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["run.json"]


def test_table_of_rivals_has_floor_rivals_and_what_is_missed_with_its_reason(tmp_path):
    def rows(what, group, seconds, **kits):
        for name, value in seconds.items():
            row = {"what": what, "group": group, "contestant": name, "seconds": value}
            yield row | {"runs": [value] * 5, "peak_mb": 12} | (kits if name == "kit" else {})

    seconds = {"kit": 0.2, "floor: bare product": 0.16, "FAISS flat": 0.3, "scikit-learn": 1.0}
    asked = {"of_floor": 1.15, "rivals": {"FAISS flat": 1.0, "scikit-learn": 10.0, "absent": 2.0}}
    listed = [*rows("1,000 queries", "search", seconds, **asked)]
    listed += rows("metric", "metrics", {"kit": 0.05}, of_floor=None, rivals={})
    record = {"rows": listed, "hardware": "2 cores, 25 GB", "processor": "AVX512", "threads": 2}
    record |= {"data": "toy", "versions": {"torch": "2.10", "ranx": "not installed"}}
    (tmp_path / "results.json").write_text(json.dumps(record))
    shown = tables.beside_rivals(tmp_path / "results.json")
    rivals = "FAISS flat 1.50; scikit-learn 5.00"
    assert (
        f"| 1,000 queries | 200.0 | bare product | 1.25 | {rivals} | floor, scikit-learn" in shown
    )
    assert "| metric | 50.0 | – | – | – | – |" in shown
    assert "- floor, in search: the k best" in shown and "1,000 queries: 1.25 of 1.15." in shown
    assert "1,000 queries: 5.00 of 10." in shown and "FAISS flat, in search" not in shown
    assert "torch 2.10." in shown and "ranx" not in shown
