"""The one command: what it offers, what it hands on, and `submit`."""

import os
import subprocess
import sys

import pytest
from test_batch import notebook, repo  # noqa: F401

from vipr_utils import __main__ as command
from vipr_utils.run import batch

MODEL = """\
data_root: str = ""  # a folder
output_dir: str = "submissions"  # runs
run_name: str = ""  # of the folder
model_run: str = ""  # an earlier run
"""


@pytest.mark.parametrize("arguments, code", [([], 2), (["sell"], 2), (["--help"], 0)])
def test_without_a_command_those_there_are_get_listed(arguments, code, capsys):
    assert command.main(arguments) == code
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("run", "submit", "score", "board", "kaggle"))


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_answers_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0 and f"vipr {name}" in capsys.readouterr().out


def test_letter_that_the_terminal_lacks_ends_no_command():
    code = "from vipr_utils.__main__ import main; main(['-h']); print('caf\\u00e9 \\u5496')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0 and done.stdout.decode("cp1252").rstrip().endswith("caf\u00e9 ?")


def test_ctrl_c_ends_any_command_with_130(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "main", interrupted)
    assert command.main(["run", "params/smoke"]) == 130


def test_package_is_a_command_too():
    line = [sys.executable, "-m", "vipr_utils", "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: vipr COMMAND")


def test_submit_runs_notebook_06_with_that_model(repo, monkeypatch):  # noqa: F811
    notebook(repo, "06_submission", MODEL)
    (repo / "train.csv").write_text("name,class\n")
    asked = []

    def run_all(todo, **settings):
        asked.append((todo, settings))
        return []

    monkeypatch.setattr(batch, "run_all", run_all)
    arguments = ["submit", "best", "--data", str(repo), "--output-dir", "out"]
    assert command.main(arguments) == 0
    (((run,), _),) = asked
    assert run.name == "06_submission"
    values = {"model_run": "best", "data_root": str(repo), "output_dir": str(repo / "out")}
    assert run.params == values
