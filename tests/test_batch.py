"""Headless runs: parameters are checked before any kernel starts, failures are named, finished work
is not repeated.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from vipr_utils.host import platform
from vipr_utils.judge import runs
from vipr_utils.run import batch, kernel, params, report

PARAMETERS = """\
data_root: str = ""  # a folder
output_dir: str = "submissions"
run_name: str = ""
seed: int = 0
lr: float = 0.001
augment: bool = True
milestones: "list[int]" = [2, 4]
fail: str = ""
model_run: str = ""
"""
# What every notebook does, without the package: a kernel that imports torch takes seconds more.
WORK = """\
import json, os, pathlib
folder = pathlib.Path(output_dir) / (run_name or "tiny")
(folder / "count").open("a").write("x")
if fail == "killed":
    os.kill(os.getpid(), 9)
if fail == "memory":
    raise MemoryError("no room for 9 GiB")
if fail:
    raise ValueError(fail)
params = dict(data_root=data_root, output_dir=output_dir, run_name=run_name)
params |= dict(seed=seed, lr=lr, augment=augment)
record = dict(
    run=folder.name, notebook="tiny", params=params, data={}, protocol="test",
    metrics={"map_at_5": lr * 100},
    model=None, seconds=0.1, versions={}, device="cpu", git="",
)
(folder / "run.json").write_text(json.dumps(record))
(folder / "submission.csv").write_text("id,images\\n")
"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A checkout of one or two notebooks."""
    monkeypatch.setattr(platform, "repository", lambda: tmp_path)
    for name in ("VIPR_DATA", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path, "tiny")
    return tmp_path


@pytest.fixture
def no_kernel(monkeypatch):
    def started(*_):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(kernel, "papermill", started)


def notebook(root, stem, parameters=PARAMETERS, work=WORK):
    cells = [
        {
            "cell_type": "code",
            "metadata": {"tags": tags},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for tags, source in ((["parameters"], parameters), ([], work))
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = root / "notebooks" / f"{stem}.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
        )
    )
    return path


def params_file(root, text, name="tiny"):
    path = root / "params" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------------- parameters


def test_parameters_cell_is_read_with_types_and_defaults(repo):
    found = params.parameters_of(repo / "notebooks" / "tiny.ipynb")
    assert found["lr"] == ("float", 0.001) and found["milestones"] == ("list[int]", [2, 4])
    assert list(found) == [line.split(":")[0] for line in PARAMETERS.splitlines()]


@pytest.mark.parametrize("line", ["seed = 0", "seed: tuple = ()", 'seed: "list[dict]" = []'])
def test_value_of_a_type_that_cannot_be_checked_is_an_error(repo, line):
    notebook(repo, "odd", f"{line}  # a rule")
    with pytest.raises(params.BadParameters, match="seed: expected .*, got "):
        params.load_runs([params_file(repo, "seed: [1]", "odd")])


STEPS = """\
steps: "list[Step]" = []  # of post-processing
stacks: "list[Stack]" = ["pca(8) + verify(20)"]  # alternatives
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ('steps: ["pca(dim=8)", "aqe:5"]', "steps: step 'aqe:5' is unknown: write one as a call"),
        ('steps: ["verify(top=5)", "pca(8)"]', "steps: step 'pca(8)' changes the embeddings"),
        ('steps: "pca(8)"', "steps: expected list[Step], got 'pca(8)' (str)"),
        ("stacks: [3]", "stacks: expected str, got 3 (int)"),
        ('stacks: ["pca(8) + verify(-1)"]', "stacks: step 'verify(-1)': top=-1"),
    ],
)
def test_wrong_steps_are_errors_before_any_kernel_starts(repo, text, message):
    notebook(repo, "stepped", STEPS)
    with pytest.raises(params.BadParameters, match=re.escape(message)):
        params.load_runs([params_file(repo, text, "stepped")])
    (run,) = params.load_runs([params_file(repo, 'steps: ["pca(8)"]', "stepped")])
    assert run.params == {"steps": ["pca(8)"]}


def test_value_outside_the_choices_of_a_literal_is_an_error_that_lists_them(repo):
    path = notebook(
        repo, "choosy", 'precision: "Literal[auto, float32]" = "auto"  # of the network'
    )
    known = params.parameters_of(path)
    assert (
        known == {"precision": ("Literal[auto, float32]", "auto")}
        and params.check("float32", known["precision"][0]) == "float32"
    )
    for wrong in ("half", 32, True):
        with pytest.raises(ValueError, match=f"expected one of auto, float32, got {wrong!r}"):
            params.check(wrong, known["precision"][0])


def test_unknown_parameter_is_an_error_that_names_the_nearest(repo, no_kernel, capsys):
    file = params_file(repo, "sed: 1\n")
    assert batch.main([str(file)]) == 2
    assert f"{file}: sed: unknown parameter; did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1.5", "seed: expected int, got 1.5 (float)"),
        ("seed: true", "seed: expected int, got True (bool)"),
        ("augment: 1", "augment: expected bool, got 1 (int)"),
        ("lr: 1e-4", "lr: expected float, got '1e-4' (str): YAML reads 1e-4 as text, write 1.0e-4"),
        ("lr: 1e5", "with a point and a signed exponent"),
        ("lr: true", "lr: expected float, got True (bool)"),
        ("fail: no", "fail: expected str, got False (bool); put it in quotes"),
        ("fail:", 'fail: expected str, got None (NoneType); write "" for an empty one'),
        ("milestones: 3", "milestones: expected list[int], got 3 (int)"),
        ("milestones: [1, two]", "milestones: expected int, got 'two' (str)"),
        ("- seed", "expected lines 'name: value'"),
        ("seed: [1", "expected ',' or ']'"),
    ],
)
def test_wrong_type_is_an_error_with_the_remedy(repo, no_kernel, text, message):
    with pytest.raises(params.BadParameters, match=re.escape(message)):
        params.load_runs([params_file(repo, text)])


def test_int_is_taken_where_a_float_is_wanted(repo):
    (run,) = params.load_runs([params_file(repo, "lr: 1")])
    assert run.params == {"lr": 1.0} and type(run.params["lr"]) is float


def test_wrong_value_in_any_file_is_found_before_any_kernel_starts(repo, no_kernel, capsys):
    notebook(repo, "other")
    params_file(repo, "seed: 1\n", "other")
    params_file(repo, "seed: 1\nlrr: 1\n")
    assert batch.main(["params"]) == 2
    assert "tiny.yaml: lrr: unknown parameter; did you mean lr?" in capsys.readouterr().err


def test_parameter_file_without_its_notebook_is_an_error(repo):
    with pytest.raises(params.BadParameters, match="absent.yaml: there is no notebooks/absent.ipy"):
        params.load_runs([params_file(repo, "seed: 1\n", "absent")])


def test_notebook_may_stand_in_place_of_a_parameter_file(repo):
    (run,) = params.load_runs([repo / "notebooks" / "tiny.ipynb"], {"seed": "7"})
    assert run.name == "tiny" and run.params == {"seed": 7} and run.values["lr"] == 0.001


def test_override_goes_to_every_notebook_that_has_the_parameter_and_is_read_by_its_type(repo):
    notebook(repo, "other", 'run_name: str = ""\nrate: float = 1.0\n')
    files = [params_file(repo, "seed: 1\n"), params_file(repo, "", "other")]
    first, second = params.load_runs(files, {"seed": "7", "rate": "1e-4", "fail": "123"})
    assert first.params == {"seed": 7, "fail": "123"} and second.params == {"rate": 1e-4}
    with pytest.raises(params.BadParameters, match="-p sead: unknown parameter; did you mean seed"):
        params.load_runs(files, {"sead": "7"})


def test_override_that_is_no_yaml_is_answered_with_the_type(repo, no_kernel, capsys):
    assert batch.main([str(params_file(repo, "")), "-p", "milestones=[1"]) == 2
    assert "milestones: expected list[int], got '[1'" in capsys.readouterr().err


def test_data_root_that_is_none_is_an_error_before_any_kernel_starts(repo, no_kernel, capsys):
    assert batch.main([str(params_file(repo, "")), "-p", "data_root=nowhere"]) == 2
    assert "nowhere has no train.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, message", [("absent", "no such file"), ("notebooks", "no *.yaml in it")]
)
def test_path_without_parameter_files_is_an_error(repo, path, message):
    with pytest.raises(params.BadParameters, match=re.escape(message)):
        params.load_runs([path])


# ---------------------------------------------------------------------------- sweeps and selection


def test_list_of_one_of_these_words_is_checked_word_by_word():
    kind = "list[Literal[contrastive, triplet]]"
    assert params.check(["triplet"], kind) == ["triplet"]
    with pytest.raises(ValueError, match="expected one of contrastive, triplet, got 'arcface'"):
        params.check(["triplet", "arcface"], kind)
    with pytest.raises(ValueError, match="expected list"):
        params.check("triplet", kind)


def test_list_of_runs_takes_the_base_and_its_own_values(repo):
    several = [{"run_name": "a", "seed": 1}, {"run_name": "b"}]
    sweep = params_file(
        repo, yaml.safe_dump({"notebook": "tiny", "base": {"seed": 3}, "runs": several}), "two"
    )
    assert [(r.name, r.params["seed"]) for r in params.load_runs([sweep])] == [("a", 1), ("b", 3)]


@pytest.mark.parametrize(
    "sweep, message",
    [
        ({"notebook": "tiny"}, "a sweep has notebook, base and runs, got notebook"),
        ({"notebook": "tiny", "runs": ["a"]}, "expected runs: a list of value sets"),
        ({"notebook": "tiny", "runs": 3}, "expected runs: a list of value sets"),
        ({"notebook": "tiny", "seeds": [1]}, "base and runs, got notebook, seeds"),
        ({"notebook": "huge", "runs": [{"seed": 1}]}, "there is no notebooks/huge.ipynb"),
        ({"notebook": "tiny", "runs": [{"seed": "x"}]}, "seed: expected int, got 'x'"),
        (
            {"notebook": "tiny", "runs": [{"run_name": "a"}, {"run_name": "a"}]},
            "2 runs are called 'a'",
        ),
    ],
)
def test_malformed_sweep_is_an_error(repo, sweep, message):
    with pytest.raises(params.BadParameters, match=re.escape(message)):
        params.load_runs([params_file(repo, yaml.safe_dump(sweep), "sweep")])


def test_only_takes_runs_by_the_beginning_of_their_name(repo):
    for stem in ("01_a", "02_b", "03_c"):
        notebook(repo, stem)
        params_file(repo, "", stem)
    assert [r.name for r in params.load_runs(["params"])] == [
        "01_a",
        "02_b",
        "03_c",
    ]  # in the order of the files
    assert [r.name for r in params.load_runs(["params"], only="03,01")] == ["01_a", "03_c"]
    assert [r.name for r in params.load_runs(["params"], only="0*_b")] == ["02_b"]
    with pytest.raises(params.BadParameters, match="--only 04: none of 01_a, 02_b, 03_c begins so"):
        params.load_runs(["params"], only="04")


# ----------------------------------------------------------------------------------------- running


def started(folder):
    return len((folder / "count").read_text())


def test_finished_run_is_skipped(repo, capsys):
    file, folder = params_file(repo, "seed: 1\n"), repo / "out" / "tiny"
    asked = [str(file), "--output-dir", "out"]
    assert batch.main(asked) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ok +\d+ s  tiny$", printed, re.MULTILINE)
    assert f"submission: {folder / 'submission.csv'}" in printed
    assert (folder / "notebook.ipynb").is_file() and runs.load(folder)["params"]["seed"] == 1
    assert batch.main(asked) == 0
    assert re.search(r"^skip +0 s  tiny$", capsys.readouterr().out, re.MULTILINE)
    assert started(folder) == 1


DATA = {"root": "shop", "fingerprint": "f", "n_train": 30, "n_test": 20, "n_products": 4}
SCORES = {
    "map_at_5": 0.5,
    "map_at_5_low": 0.4,
    "map_at_5_high": 0.6,
    "chance": 0.02,
    "n_queries": 20,
    "n_gallery": 30,
}


def finish(folder, notebook, **changes):
    """What a notebook leaves: run.json, and 06 its submission."""
    record = {"notebook": notebook, "data": DATA, "protocol": "test", "metrics": SCORES}
    record |= {"params": {}, "model": None, "device": "cpu"} | changes
    runs.save(folder, seconds=0.1, **record)
    if notebook == "06_submission":
        (folder / "submission.csv").write_text("id,images\n")


@pytest.fixture
def fake_kernel(monkeypatch):
    """papermill without a process: writes run.json as a notebook does, and counts."""
    calls = []

    def papermill(path, out, values, slot, stop):
        calls.append(values)
        out.write_text(path.read_text())
        if values.get("fail"):
            return batch.subprocess.CompletedProcess([], 1, "ValueError: broken")
        finish(out.parent, path.stem)
        return batch.subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(kernel, "papermill", papermill)
    return calls


def test_each_thing_that_a_run_hangs_on_makes_it_run_again(repo, fake_kernel, monkeypatch):
    def again():
        before = len(fake_kernel)
        todo = params.load_runs([file], {"data_root": str(data), "output_dir": "out"})
        list(batch.run_all(todo))
        return len(fake_kernel) > before

    file, data = params_file(repo, "seed: 1\n"), repo / "data"
    data.mkdir()
    (data / "train.csv").write_text("name,class\n")
    assert again() and not again()
    assert fake_kernel[0]["data_root"] == str(data) and fake_kernel[0]["run_name"] == "tiny"
    (data / "test.csv").write_text("name\n")
    assert again() and not again()  # other data
    notebook(repo, "tiny", work=WORK + "# changed\n")
    assert again() and not again()  # another notebook
    params_file(repo, "model_run: before\n")
    assert again() and not again()  # other values
    before = repo / "out" / "before"
    before.mkdir()
    (before / "model.pt").touch()
    (before / "run.json").write_text("{}")
    assert again() and not again()  # another model to start from
    (repo / "out" / "tiny" / "run.json").write_text("{}")
    assert again() and not again()  # a result that somebody else wrote
    (repo / "out" / "tiny" / "batch.json").write_text('{"key"')
    assert again() and not again()  # a mark cut short
    (data / "test" / "milk").mkdir(parents=True)
    (data / "test" / "milk" / "a.jpg").write_bytes(b"photo")
    assert again() and not again()  # another photo
    (data / "test" / "milk" / "a.jpg").write_bytes(b"other photo")
    assert again() and not again()  # the same name, other pixels
    monkeypatch.setenv("VIPR_PRECISION", "bfloat16")
    assert again() and not again()  # another precision

    asked = [str(file), "--output-dir", "out", "-p", f"data_root={data}"]
    kernels = len(fake_kernel)
    assert batch.main(asked) == 0 and len(fake_kernel) == kernels
    assert batch.main([*asked, "--force"]) == 0 and len(fake_kernel) == kernels + 1


def test_weights_that_arrive_in_a_folder_make_a_run_run_again(repo, fake_kernel, monkeypatch):
    notebook(repo, "tiny", PARAMETERS + 'weights: str = "auto"  # of a backbone\n')
    (repo / "weights").mkdir()
    asked = [str(params_file(repo, "")), "--output-dir", "out"]
    for kernels, given in ((1, "weights"), (2, "auto"), (3, "auto")):
        if kernels == 3:
            monkeypatch.setenv("VIPR_WEIGHTS", "weights")
        assert batch.main([*asked, "-p", f"weights={given}"]) == 0 and len(fake_kernel) == kernels
        assert batch.main([*asked, "-p", f"weights={given}"]) == 0 and len(fake_kernel) == kernels
    (repo / "weights" / "lite0.safetensors").write_bytes(b"weights")
    assert batch.main(asked) == 0 and len(fake_kernel) == 4


@pytest.mark.parametrize(
    "stem, values, reads",
    [
        ("06_submission", "", True),
        ("06_submission", "model_run: best\n", True),
        ("06_submission", "model_run: some_run\n", False),
        ("09_scoreboard", "", True),
        ("05_subset_finetune", "", False),
    ],
)
def test_what_chooses_among_all_runs_runs_again_when_an_earlier_one_has_finished_since(
    repo, fake_kernel, stem, values, reads
):
    notebook(repo, stem)
    asked = [str(params_file(repo, values, stem)), "--output-dir", "out"]
    assert batch.main(asked) == 0 and len(fake_kernel) == 1
    assert batch.main(asked) == 0 and len(fake_kernel) == 1
    finish(repo / "out" / "other", "04_pretrained_sweep")
    assert batch.main(asked) == 0 and len(fake_kernel) == 1 + reads
    finish(repo / "out" / "later", "09_scoreboard")
    assert batch.main(asked) == 0 and len(fake_kernel) == 1 + reads


# ------------------------------------------------------------------------- failures, the last lines


def test_what_an_earlier_run_left_is_not_taken_for_that_of_a_failed_one(repo, fake_kernel):
    folder = repo / "out" / "tiny"
    finish(folder, "tiny")
    (folder / "model.pt").write_bytes(b"old")
    assert batch.main([str(params_file(repo, "fail: broken\n")), "--output-dir", "out"]) == 1
    assert not (folder / "run.json").exists() and not (folder / "model.pt").exists()
    assert (folder / "model.pt.old").read_bytes() == b"old"
    assert "ValueError: broken" in (folder / "unfinished.txt").read_text()
    assert runs.unfinished(repo / "out") == ["tiny"] and runs.scoreboard(repo / "out").empty
    assert batch.main([str(params_file(repo, "")), "--output-dir", "out"]) == 0
    assert runs.load(folder) and not runs.unfinished(repo / "out")
    assert not list(folder.glob("*.old"))


def test_run_that_fails_after_its_record_was_written_has_not_finished(repo, monkeypatch):
    def papermill(path, out, values, slot, stop):
        finish(out.parent, path.stem)
        return batch.subprocess.CompletedProcess([], 1, "ValueError: in the last cell")

    monkeypatch.setattr(kernel, "papermill", papermill)
    assert batch.main([str(params_file(repo, "")), "--output-dir", "out"]) == 1
    assert runs.scoreboard(repo / "out").empty


def test_submission_says_which_runs_it_had_to_do_without(repo, fake_kernel, capsys):
    notebook(repo, "06_submission")
    finish(repo / "out" / "tiny", "tiny")  # of yesterday
    params_file(repo, "", "06_submission")
    params_file(repo, "fail: broken\n")
    files = [str(repo / "params" / f"{name}.yaml") for name in ("tiny", "06_submission")]
    assert batch.main([*files, "--output-dir", "out"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^ok +\d+ s  06_submission\n +without tiny: not finished$", printed, re.M)
    assert "tiny" not in (repo / "out" / "scoreboard.csv").read_text()


def test_results_of_a_run_are_set_aside_when_the_one_it_starts_from_fails(repo, fake_kernel):
    notebook(repo, "later")
    finish(repo / "out" / "later", "later")
    params_file(repo, "fail: broken\n", "tiny")
    params_file(repo, "model_run: tiny\n", "later")
    files = [str(repo / "params" / f"{name}.yaml") for name in ("tiny", "later")]
    assert batch.main([*files, "--output-dir", "out"]) == 1
    assert runs.unfinished(repo / "out") == ["later", "tiny"]
    assert runs.scoreboard(repo / "out").empty


def test_batch_ends_with_data_ladder_score_submission_and_where_to_look(repo, fake_kernel, capsys):
    finish(repo / "out" / "best", "04_pretrained_sweep", metrics=SCORES | {"map_at_5": 0.7})
    notebook(repo, "06_submission")
    asked = [str(params_file(repo, "", "06_submission")), "--output-dir", "out"]
    for _ in range(2):  # run, skipped
        assert batch.main(asked) == 0
        assert capsys.readouterr().out.splitlines()[1:] == [
            "data: shop, 30 gallery photos of 4 products, 20 queries",
            "ladder: random ranking 0.020, trained 0.700; best: trained",
            "score: mAP@5 0.500 [0.400, 0.600] over 20 queries",
            f"submission: {repo / 'out' / '06_submission' / 'submission.csv'}",
            f"look: {repo / 'out' / '06_submission' / 'notebook.ipynb'}, its pictures beside it; "
            f"all runs in {repo / 'out' / 'scoreboard.csv'}",
        ]
    assert "04_pretrained_sweep" not in (repo / "out" / "scoreboard.csv").read_text()
    assert "best" in (repo / "out" / "scoreboard.csv").read_text()


@pytest.mark.parametrize(
    "metrics, words",
    [
        ({"map_at_5": None, "map_at_5_low": None, "map_at_5_high": None}, "labels unknown"),
        ({"n_gallery": 30}, "labels unknown"),
        ({"top_1_accuracy": 0.25, "n_queries": 8}, "top-1 accuracy 0.250 over 8 queries"),
    ],
)
def test_submission_without_map_is_reported_too(tmp_path, metrics, words):
    finish(tmp_path / "06", "06_submission", metrics=metrics)
    lines = list(report.closing([tmp_path / "06"]))
    assert lines[1:3] == ["ladder: no run has a score on this data", f"score: {words}"]


def test_last_lines_tell_of_a_training_cut_short_and_of_a_batch_without_a_submission(tmp_path):
    finish(tmp_path / "s", "06_submission", cut_short="in epoch 3 of 8")
    assert "its training cut short in epoch 3 of 8" in list(report.closing([tmp_path / "s"]))[2]
    finish(tmp_path / "c", "03_scratch_siamese")
    finish(tmp_path / "n", "09_scoreboard", data={"root": "", "runs": 2})
    lines = list(report.closing([tmp_path / "c", tmp_path / "n"]))
    assert [line.split(":")[0] for line in lines] == ["data", "ladder", "look"]


def test_failing_cell_makes_the_exit_code_1_and_its_error_is_shown_and_the_others_still_run(
    repo, capsys
):
    notebook(repo, "zz_good")
    params_file(repo, 'fail: "no images in the store"\n')
    params_file(repo, "", "zz_good")
    old = platform.run_folder(str(repo / "out"), "tiny") / "submission.csv"
    old.write_text("of an earlier run")
    assert batch.main(["params", "--output-dir", "out"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^FAIL +\d+ s  tiny$", printed, re.MULTILINE) and re.search(
        r"^ok +\d+ s  zz_good$", printed, re.MULTILINE
    )
    assert "ValueError: no images in the store" in printed and "\x1b" not in printed
    kept = json.loads((repo / "out" / "tiny" / "notebook.ipynb").read_text())
    assert any(o.get("ename") == "ValueError" for c in kept["cells"] for o in c.get("outputs", []))
    assert "submission: " in printed and str(old) not in printed


def test_what_starts_from_a_failed_run_fails_with_it_and_is_not_started(repo, capsys):
    notebook(repo, "later")
    params_file(repo, "fail: broken\n", "tiny")
    params_file(repo, "model_run: tiny\n", "later")
    files = [str(repo / "params" / f"{name}.yaml") for name in ("tiny", "later")]
    assert batch.main([*files, "--output-dir", "out"]) == 1
    assert "it starts from tiny, which failed" in capsys.readouterr().out
    assert not (repo / "out" / "later" / "count").exists()


def test_killed_kernel_is_named_as_out_of_memory(repo, capsys):
    assert batch.main([str(params_file(repo, "fail: killed\n")), "--output-dir", "out"]) == 1
    printed = capsys.readouterr().out
    assert (
        "the kernel was killed, most likely out of memory: lower batch_size or image_size"
        in printed
    )


@pytest.mark.parametrize(
    "name, value, memory",
    [
        ("MemoryError", "", True),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 9.00 GiB", True),
        ("_ArrayMemoryError", "Unable to allocate 9 GiB for an array", True),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory",
            True,
        ),
        ("OSError", "[Errno 12] Cannot allocate memory", True),
        ("RuntimeError", "DataLoader worker (pid 8) is killed by signal: Killed.", True),
        ("RuntimeError", "shapes do not fit", False),
    ],
)
def test_memory_errors_are_named_with_the_remedy(name, value, memory):
    done = batch.subprocess.CompletedProcess([], 1, f"Cell In[3], line 9\n\n{name}: {value}\n")
    reason = batch._reason(done)
    assert reason.startswith("out of memory: lower batch_size or image_size\n") == memory
    assert reason.endswith(f"{name}: {value}")


# ------------------------------------------------------------------------------------ side by side


def sweep(root, rows, name="rows"):
    return params_file(root, yaml.safe_dump({"notebook": "tiny", "runs": rows}), name)


def test_rows_of_a_sweep_go_side_by_side_but_files_and_a_row_that_names_another_wait(repo):
    notebook(repo, "zz_next")
    rows = [{"run_name": n} for n in "abc"] + [
        {"run_name": "d", "model_run": "b"},
        {"run_name": "e"},
    ]
    files = [sweep(repo, rows), params_file(repo, "", "tiny"), params_file(repo, "", "zz_next")]
    found = [[r.name for r in wave] for wave in batch.waves(params.load_runs(files))]
    assert found == [["a", "b", "c"], ["d", "e"], ["tiny"], ["zz_next"]]


@pytest.mark.parametrize(
    "named, present, jobs, places",
    [
        (None, 2, 0, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        ("3,5", 8, 0, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]),
        (None, 2, 1, [{"CUDA_VISIBLE_DEVICES": "0"}]),
        (None, 0, 0, [{"OMP_NUM_THREADS": "4"}] * 2),  # 8 cores would do for 4, 9 GB for 2
        (None, 0, 4, [{"OMP_NUM_THREADS": "2"}] * 4),
    ],
)
def test_a_process_gets_a_gpu_of_its_own_or_its_share_of_the_cores(
    monkeypatch, named, present, jobs, places
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    monkeypatch.setattr(batch, "cores", lambda: 8)
    monkeypatch.setattr(batch, "memory_gb", lambda: (16.0, 9.0))
    assert batch.slots(jobs) == places


def test_every_row_runs_once_on_a_free_slot_and_results_keep_their_order(repo, monkeypatch):
    busy, seen, together = set(), [], threading.Barrier(2, timeout=20)

    def papermill(path, out, values, slot, stop):
        gpu = slot["CUDA_VISIBLE_DEVICES"]
        assert gpu not in busy
        busy.add(gpu)
        together.wait()  # passes only when two run at once
        seen.append((values["run_name"], gpu))
        busy.discard(gpu)
        (out.parent / "run.json").write_text("{}")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(kernel, "papermill", papermill)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    rows = sweep(repo, [{"run_name": n} for n in "abcdef"])
    results = list(batch.run_all(params.load_runs([rows], {"output_dir": "out"})))
    assert [result.run.name for result in results] == list("abcdef")
    assert sorted(name for name, _ in seen) == list("abcdef") and {gpu for _, gpu in seen} == {
        "0",
        "1",
    }


@pytest.mark.parametrize(
    "rows, jobs, narrowed", [("a", 0, False), ("ab", 0, True), ("ab", 1, False)]
)
def test_run_that_is_alone_sees_every_gpu(repo, monkeypatch, rows, jobs, narrowed):
    seen = []

    def papermill(path, out, values, slot, stop):
        seen.append("CUDA_VISIBLE_DEVICES" in slot)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(kernel, "papermill", papermill)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    todo = params.load_runs([sweep(repo, [{"run_name": n} for n in rows])], {"output_dir": "out"})
    assert all(result.status == "ok" for result in batch.run_all(todo, jobs=jobs))
    assert seen == [narrowed] * len(rows)


# -------------------------------------------------------------------------------- watched, ended

SLOW = """\
import logging, os, pathlib, time
LOG = logging.getLogger("vipr")
handler = logging.FileHandler(os.environ["VIPR_LOG"])
handler.setFormatter(logging.Formatter("%(asctime)s vipr %(message)s", "%H:%M:%S"))
LOG.addHandler(handler)
LOG.setLevel("INFO")
print("from a cell")
LOG.info("epoch 1/2")
folder = pathlib.Path(output_dir) / run_name
(folder / "begun").touch()
try:
    time.sleep(60 if fail else 0)
finally:
    (folder / "checkpoint").touch()
"""


def with_headings(root):
    path = notebook(root, "tiny", work=SLOW)
    content = json.loads(path.read_text())
    for number, title in enumerate(["# 07 Tiny", "## Data\n\nProse."]):
        cell = {"cell_type": "markdown", "metadata": {}, "source": title, "id": f"said-{number}"}
        content["cells"].insert(2 * number, cell)
    path.write_text(json.dumps(content))
    return path


def test_terminal_has_a_line_a_section_and_logged_event_and_the_log_has_all(repo, capsys):
    with_headings(repo)
    file, log = params_file(repo, ""), repo / "out" / "tiny" / "log.txt"
    asked = [str(file), "--output-dir", "out", "--force"]
    for last_time in ("", " of 0:00:0\\d last time"):
        assert batch.main(asked) == 0
        lines = capsys.readouterr().out.splitlines()
        for line, words in zip(
            lines, (f"begins: tiny.ipynb, log in {log}", "Data, cell 5 of 5", "epoch 1/2")
        ):
            assert re.fullmatch(rf"tiny  0:00:0\d{last_time}  {words}", line), lines
        assert lines[3].startswith("ok")
        assert "from a cell\n" in log.read_text() and " vipr epoch 1/2\n" in log.read_text()


@pytest.mark.skipif(os.name == "nt", reason="a signal to one process is POSIX's")
def test_ctrl_c_ends_every_kernel_saves_what_there_is_and_leaves_no_traceback(repo):
    rows = "ab"  # side by side
    notebook(repo, "tiny", work=SLOW)
    file = sweep(repo, [{"run_name": name, "fail": "slow"} for name in rows])
    command = [sys.executable, "-m", "vipr_utils", "run", str(file), "--output-dir", "out"]
    places = os.environ | {"PYTHONPATH": str(Path(batch.__file__).parents[2])}
    command += ["--jobs", str(len(rows))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def listen() -> None:  # what a shell starts in the background is deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=repo, env=places, preexec_fn=listen, **pipes) as running:
        folders = [repo / "out" / name for name in rows]
        while not all((folder / "begun").exists() for folder in folders):
            assert running.poll() is None
            time.sleep(0.1)
        started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        printed = running.communicate(timeout=60)[0]
    assert running.returncode == 130 and "Traceback" not in printed
    assert not psutil.wait_procs(started, timeout=5)[1]
    for folder in folders:
        assert re.search(rf"^{folder.name}  0:00:\d\d  interrupted$", printed, re.MULTILINE)
        assert (folder / "unfinished.txt").read_text().startswith("interrupted")
        assert (folder / "checkpoint").exists()  # the cell had time to save
        assert "KeyboardInterrupt" in (folder / "notebook.ipynb").read_text()


class Process:
    """One that notes what it hears."""

    pid = 4

    def __init__(self, *children):
        self.started, self.heard = list(children), []

    def children(self, recursive):
        return self.started

    def send_signal(self, number):
        self.heard.append(number)

    def wait(self, timeout):
        self.heard.append(timeout)
        raise subprocess.TimeoutExpired("papermill", timeout)

    def kill(self):
        self.heard.append("kill")


@pytest.mark.parametrize(
    "system, by_papermill, by_kernel",
    [("posix", [20, "kill"], [2, "kill"]), ("nt", [1, 20, "kill"], ["kill"])],
)
def test_kernel_that_does_not_end_in_time_is_killed_and_papermill_may_write_the_notebook(
    monkeypatch, system, by_papermill, by_kernel
):
    deaf = Process()
    papermill = Process(deaf)
    monkeypatch.setattr(kernel.os, "name", system)
    if system == "nt":
        monkeypatch.setattr(kernel.signal, "CTRL_BREAK_EVENT", 1, raising=False)
    monkeypatch.setattr(kernel.psutil, "Process", lambda pid: papermill)
    monkeypatch.setattr(kernel.psutil, "wait_procs", lambda started, timeout: ([], started))
    kernel.end(papermill)
    monkeypatch.undo()
    assert (papermill.heard, deaf.heard) == (by_papermill, by_kernel)


def test_papermill_without_a_kernel_is_killed_at_once(monkeypatch):
    starting = Process()
    monkeypatch.setattr(kernel.psutil, "Process", lambda pid: starting)
    kernel.end(starting)
    assert starting.heard == [0, "kill"]


@pytest.mark.parametrize("system, flags", [("posix", 0), ("nt", 512)])
def test_process_starts_apart_by_the_means_that_the_system_has(
    tmp_path, monkeypatch, system, flags
):
    class Started(Exception):
        pass

    def popen(command, **given):
        asked.update(given)
        raise Started

    asked, source = {}, notebook(tmp_path, "tiny")
    monkeypatch.setattr(kernel, "LIBC", None)  # macOS
    monkeypatch.setattr(kernel.platform, "home", lambda: tmp_path)
    monkeypatch.setattr(kernel.subprocess, "Popen", popen)
    if system == "nt":
        monkeypatch.setattr(kernel.subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(kernel.os, "name", system)
    with pytest.raises(Started):
        kernel.papermill(source, tmp_path / "out.ipynb", {"run_name": "tiny"}, {}, None)
    monkeypatch.undo()
    assert asked["creationflags"] == flags and asked["preexec_fn"] is None
    assert asked["start_new_session"] == (system == "posix")


# A sweep of six: in `lethal` the process that waits for papermill is killed, once.
RAY_WORK = """\
import json, os, pathlib, random, signal
folder = pathlib.Path(output_dir) / run_name
(folder / "count").open("a").write("x")
if fail == "lethal" and (folder / "count").read_text() == "x":
    state = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1]
    worker = int(state.split()[1])
    (folder / "killed").write_text(pathlib.Path(f"/proc/{worker}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)
record = dict(
    run=run_name, notebook="tiny", params=dict(seed=seed), data={}, protocol="test",
    metrics={"map_at_5": random.Random(seed).random()}, model=None, seconds=0.1, versions={},
    device="cpu", git="",
)
(folder / "run.json").write_text(json.dumps(record))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is optional: pip install ray"
)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker by /proc")
def test_sweep_on_ray_survives_a_killed_worker_and_gives_the_numbers_of_the_local_runner(repo):
    notebook(repo, "ray_tiny", work=RAY_WORK)
    rows = [{"run_name": n, "seed": i} for i, n in enumerate("abcdef")]
    rows[2]["fail"] = "lethal"
    file = params_file(repo, yaml.safe_dump({"notebook": "ray_tiny", "runs": rows}), "rows")
    local = yaml.safe_dump({"notebook": "ray_tiny", "runs": [r | {"fail": ""} for r in rows]})
    places = os.environ | {
        "PYTHONPATH": str(Path(batch.__file__).parents[2]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "vipr_utils", "run", "--jobs", "2", "--output-dir"]
    for asked in (
        ["on_ray", str(file), "--engine", "ray"],
        ["here", str(params_file(repo, local, "local"))],
    ):
        done = subprocess.run(
            [*command, *asked], cwd=repo, env=places, capture_output=True, text=True
        )
        assert not done.returncode, done.stdout + done.stderr
    assert (repo / "on_ray" / "c" / "killed").read_text().startswith("ray::")
    assert [started(repo / "on_ray" / n) for n in "abcdef"] == [1, 1, 2, 1, 1, 1]
    numbers = {
        where: [runs.load(repo / where / n)["metrics"] for n in "abcdef"]
        for where in ("on_ray", "here")
    }
    assert (
        numbers["on_ray"] == numbers["here"] and len({m["map_at_5"] for m in numbers["here"]}) == 6
    )


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is here")
def test_ray_that_is_missing_is_an_error_with_the_remedy(repo, no_kernel, capsys):
    assert batch.main([str(params_file(repo, "")), "--engine", "ray"]) == 2
    assert (
        "--engine ray: Ray is missing: pip install ray, or leave --engine out"
        in capsys.readouterr().err
    )
