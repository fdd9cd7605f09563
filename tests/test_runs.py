import json
import math
from pathlib import Path

import numpy as np
import pytest

from vipr_utils import runs

SCORES = {
    "map_at_5": 0.458,
    "map_at_5_low": 0.441,
    "map_at_5_high": 0.476,
    "precision_at_1": 0.564,
    "n_queries": 20,
    "n_gallery": 30,
}


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
    params = {"data_root": str(tmp_path / "photos"), "output_dir": "submissions", "cache_dir": "", "seed": 0}
    record = runs.load(saved(tmp_path / "first", params=params).parent)
    assert record["params"] == {"data_root": "photos", "output_dir": "submissions", "cache_dir": "", "seed": 0}


def test_readme_shows_the_reference_records_as_they_are():
    root = Path(__file__).resolve().parents[1]
    table = runs.markdown(runs.scoreboard(root / "submissions" / "reference"))
    assert table.count("\n") > 5 and f"{runs.START}\n{table}\n{runs.END}" in (root / "README.md").read_text()


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
    assert json.loads(text)["metrics"] == {"map_at_5": 0.5, "n": 3, "bad": None, "list": [0, 1], "path": "a/b"}
    assert "NaN" not in text


def test_a_value_without_json_form_is_named_by_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"run\.metrics\.rows\[0\]\.f is a function"):
        saved(tmp_path / "r", metrics={"rows": [{"f": lambda: 0}]})
    assert not (tmp_path / "r" / "run.json").exists()


@pytest.mark.parametrize(
    "text, message", [("{", "no readable JSON"), ("[]", "is no object"), ("{}", "lacks run, notebook")]
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
        metrics=SCORES | {"rows": [{"name": "a"} | SCORES, {"name": "b"} | SCORES | {"map_at_5": 0.9}]},
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    table = runs.scoreboard(tmp_path)
    assert table.run.tolist() == ["sweep: b", "sweep: a", "low", "eda"]
    assert len(table.attrs["problems"]) == 1 and "broken" in table.attrs["problems"][0]
    assert runs.write_runs_csv(tmp_path).read_text().count("\n") == 5


def test_markdown_gives_interval_data_sizes_time_and_hardware_and_skips_unscored_runs(tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "eda", metrics={})
    lines = runs.markdown(runs.scoreboard(tmp_path)).splitlines()
    assert len(lines) == 3
    assert "| one | toy, test, all | 20 × 30 | 0.458 [0.441, 0.476] | 0.564 | 61 s |" in lines[2]


def test_the_command_replaces_the_table_between_the_marks_only(tmp_path, capsys):
    saved(tmp_path / "one")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{runs.START}\nold\n{runs.END}\nafter\n")
    assert runs.main([str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "0.458" in text
    assert "0.458" in capsys.readouterr().out
    readme.write_text("no marks")
    with pytest.raises(runs.RunError, match="put both marks"):
        runs.insert(readme, "x")


def test_an_empty_folder_gives_an_empty_scoreboard(tmp_path):
    assert runs.scoreboard(tmp_path).empty
    assert runs.main([str(tmp_path)]) == 1
