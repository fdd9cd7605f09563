"""environment.yml gives conda users what pyproject.toml gives pip users."""

import re
from pathlib import Path

import pytest
import yaml

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch", "opencv-headless": "opencv-python-headless"}


def requirement(line: str) -> tuple[str, str]:
    name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+?)((?:[<>=!~].*)?)", line.replace(" ", "")).groups()
    return CONDA_NAMES.get(name.lower(), name.lower()), bounds


def test_conda_and_pip_ask_for_the_same_packages_and_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(map(requirement, project["dependencies"] + project["optional-dependencies"]["demo"]))
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    nested = next(line["pip"] for line in lines if isinstance(line, dict))
    found = dict(requirement(line) for line in [*lines, *nested] if isinstance(line, str) and not line.startswith("-e"))
    assert found.pop("python") == project["requires-python"]
    assert found.pop("pip")
    assert found == wanted


def test_every_line_of_the_environment_says_why():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    for line in lines[lines.index("channels:") + 1 :]:
        if line.strip().startswith("- ") and not line.strip().startswith("- pip:"):
            assert re.search(r"  # \w.{5,}", line), f"{line!r} has no reason"


def test_ci_calls_the_readmes_test_command():
    for file in (".ci/run", ".github/workflows/ci.yml", "README.md"):
        assert "make test" in (ROOT / file).read_text(), file
