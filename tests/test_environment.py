"""environment.yml gives conda users what pyproject.toml gives pip users; the bootstrap cell finds
the package anywhere.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stamp
import yaml
from packaging.specifiers import SpecifierSet

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch", "opencv-headless": "opencv-python-headless"}


def requirement(line: str) -> tuple[str, str]:
    name, bounds = re.fullmatch(
        r"([A-Za-z0-9_.-]+?)((?:[<>=!~].*)?)", line.replace(" ", "")
    ).groups()
    return CONDA_NAMES.get(name.lower(), name.lower()), bounds


def test_conda_and_pip_ask_for_the_same_packages_and_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(
        map(requirement, project["dependencies"] + project["optional-dependencies"]["demo"])
    )
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    nested = next(line["pip"] for line in lines if isinstance(line, dict))
    found = dict(
        requirement(line)
        for line in [*lines, *nested]
        if isinstance(line, str) and not line.startswith("-e")
    )
    assert found.pop("python") == project["requires-python"]
    assert found.pop("pip")
    assert found == wanted


@pytest.mark.parametrize("lane", ["kaggle-py312", "colab-py313"])
def test_lane_installs_every_dependency_in_a_version_that_the_project_allows(lane):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tests" / "lanes" / f"{lane}.txt").read_text().splitlines()
    pinned = dict(requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip())
    wanted = project["dependencies"] + [
        d for d in project["optional-dependencies"]["demo"] if "pytorch-model" not in d
    ]
    for name, bounds in map(requirement, wanted):
        version = pinned[name].removeprefix("==")
        assert not version or SpecifierSet(bounds).contains(version), f"{name} {version} {bounds}"


def test_every_line_of_the_environment_says_why():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    for line in lines[lines.index("channels:") + 1 :]:
        if line.strip().startswith("- ") and not line.strip().startswith("- pip:"):
            assert re.search(r"  # \w.{5,}", line), f"{line!r} has no reason"


def test_ci_calls_the_readmes_test_command():
    for file in (".ci/run", ".github/workflows/ci.yml", "README.md"):
        assert "make test" in (ROOT / file).read_text(), file


# ---------------------------------------------------------------------------------- bootstrap cell

STUBS = {
    "__main__.py": "",
    "host/platform.py": "def preflight(params):\n    print(__file__)\n    print(params)\n",
}


def kit(folder):
    (folder / "vipr_utils" / "host").mkdir(parents=True)
    for name, text in STUBS.items():
        (folder / "vipr_utils" / name).write_text(text)
    return folder


def start(tmp_path, cwd=None, git="exit 1"):
    """The bootstrap cell in a Python that has no package installed:

    (folder of the kit found or None, error).
    """
    cwd = cwd or tmp_path / "anywhere" / "at all"
    for folder in (cwd, tmp_path / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\n{git}\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    places = {
        "VIPR_PLATFORM_ROOT": str(tmp_path),
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    code = "seed: int = 0\nseed = 7\n" + stamp.bootstrap()
    done = subprocess.run(
        [sys.executable, "-ISc", code], cwd=cwd, env=places, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode or lines[1] == "{'seed': 7}"  # as given, not as written in the cell
    return (Path(lines[0]).parents[2] if lines else None), done.stderr


@pytest.mark.parametrize(
    "place, cwd",
    [
        ("checkout", "checkout/notebooks"),
        ("checkout", "checkout/notebooks/my/own"),
        ("content/vipr", "content"),
        ("kaggle/input/vipr-kit", ""),
        ("kaggle/input/vipr-kit/vipr", ""),
        ("kaggle/input/datasets/some-one/vipr-kit", ""),
        ("kaggle/input/datasets/some-one/vipr-kit/vipr", ""),
    ],
)
def test_bootstrap_finds_the_package_beside_above_or_attached_from_any_folder(tmp_path, place, cwd):
    (tmp_path / "kaggle/input/competitions/products-10k/train").mkdir(parents=True)  # another input
    folder = kit(tmp_path / place)
    assert start(tmp_path, tmp_path / cwd if cwd else None)[0] == folder


def test_bootstrap_clones_the_tagged_release_once_and_outside_of_the_outputs(tmp_path):
    git = 'echo "$@" >> "$HOME/../asked"; for last; do :; done; mkdir -p "$last"; '
    git += 'cp -r "$HOME/kit/vipr_utils" "$last"'
    kit(tmp_path / "home" / "kit")
    clone = tmp_path / "home" / ".cache" / f"vipr-{stamp.RELEASE}"
    assert start(tmp_path, git=git)[0] == clone and start(tmp_path, git=git)[0] == clone
    asked = (tmp_path / "asked").read_text()
    assert asked == f"clone --quiet --depth=1 --branch={stamp.RELEASE} {stamp.ADDRESS} {clone}\n"


def test_bootstrap_without_package_and_network_says_what_to_attach(tmp_path):
    found, error = start(tmp_path)
    assert not found and error.endswith(
        "ModuleNotFoundError: vipr_utils: attach the ViPR dataset or switch the internet on\n"
    )
