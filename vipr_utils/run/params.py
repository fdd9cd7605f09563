"""Parameter files and sweeps: from YAML to runs whose every value was checked.

A parameter file is flat YAML named like its notebook. A sweep names the notebook itself, with
`base` values and `runs`, a list of value sets, each with its run_name. Types are those that the
notebook's parameters cell declares.
"""

from __future__ import annotations

import ast
import difflib
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from vipr_utils.host import platform
from vipr_utils.retrieve import pipeline

READERS = ["06_submission", "09_scoreboard"]  # notebooks that take the runs that are there
SCALARS = {"str": str, "int": int, "float": float, "bool": bool}


class BadParameters(ValueError):
    """What is wrong with the runs asked for, with its file and key."""


@dataclass
class Run:
    """One notebook with one set of values."""

    notebook: Path
    params: dict  # what the file and the command line say
    defaults: dict  # what the notebook says
    file: Path  # where the values come from

    @property
    def name(self) -> str:
        """Of the run folder."""
        return str(self.params.get("run_name") or self.notebook.stem)

    @property
    def values(self) -> dict:
        """All parameters, as the kernel will have them."""
        return self.defaults | self.params

    @property
    def starts_from(self) -> str:
        """Name of the run whose model it takes, '' for none."""
        return Path(self.params.get("model_run", "")).name

    @property
    def reads_runs(self) -> bool:
        """Whether it chooses among, or compares, whatever runs have finished by then."""
        if self.starts_from:
            return self.starts_from == "best"
        return self.notebook.stem in READERS

    def folder(self) -> Path:
        """The run folder, created; ValueError for a name that is none."""
        return platform.run_folder(self.values["output_dir"], self.name).resolve()

    def data(self) -> Path | None:
        """The data root, None for the toy set; FileNotFoundError when it holds no data."""
        return platform.find_data_root(self.values.get("data_root", ""))[0]


@contextmanager
def naming(place: object) -> Iterator[None]:
    """What is found wrong in here is a BadParameters that says the place."""
    try:
        yield
    except Exception as error:  # a stranger's file has many ways to be wrong
        raise BadParameters(f"{place}: {error}") from error


# ------------------------------------------------------------------------------------- types


def parameters_of(notebook: Path) -> dict[str, tuple[str, object]]:
    """{name: (type, default)} of the cell tagged `parameters`, in its order, as papermill reads it.

    Types are str, int, float and bool, `Literal[a, b]`, lists of one of these, `list[Step]` and
    `list[Stack]`; lists and literals in quotes. A value of another type is an error.
    """
    try:
        from papermill import inspect_notebook
    except ImportError:
        raise BadParameters("papermill is missing: pip install papermill ipykernel") from None
    with naming(notebook):
        return {
            name: (found["inferred_type_name"], ast.literal_eval(found["default"]))
            for name, found in inspect_notebook(str(notebook)).items()
        }


def check(value: object, kind: str) -> object:
    """The value in its parameter's type; an int becomes a float.

    Raises ValueError with the remedy. Step and Stack are calls: see `pipeline`.
    """
    outer, _, inner = kind.removesuffix("]").partition("[")
    shown = reprlib.repr(value)  # aliases of YAML can make a value of any length
    if outer == "Literal":
        if value not in inner.split(", "):
            raise ValueError(f"expected one of {inner}, got {shown}")
        return value
    if outer == "list" and type(value) is list:
        return _checked_list(value, inner)
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not SCALARS.get(kind):
        advice = _advice(value, kind)
        raise ValueError(f"expected {kind}, got {shown} ({type(value).__name__}){advice}")
    return value


def _checked_list(items: list, kind: str) -> list:
    if kind not in ("Step", "Stack"):
        return [check(item, kind) for item in items]
    texts = [check(item, "str") for item in items]
    for stack in [texts] if kind == "Step" else map(pipeline.split, texts):
        pipeline.check(stack)
    return texts


def _advice(value: object, kind: str) -> str:
    if kind == "str":
        return '; write "" for an empty one' if value is None else "; put it in quotes"
    if kind == "float" and isinstance(value, str):
        return ": YAML reads 1e-4 as text, write 1.0e-4, with a point and a signed exponent"
    return ""


def setting(text: str) -> tuple[str, str]:
    """(name, value) of 'name=value'; ValueError without a '='."""
    name, value = text.split("=", 1)
    return name, value


def _typed(text: str, kind: str) -> object:
    """A command-line value read by the parameter's type; there 1e-4 is a number."""
    if kind == "str" or kind.startswith("Literal"):
        return text
    try:
        return float(text) if kind == "float" else yaml.safe_load(text)
    except Exception:
        return text  # `check` names what is wrong with it


def _require_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown parameter; {advice}")


# --------------------------------------------------------------------------------------- runs


def load_runs(
    paths: Iterable[str | Path], overrides: dict[str, str] | None = None, only: str = ""
) -> list[Run]:
    """The runs that files, folders and notebooks ask for, checked, in the order of the files.

    only: beginnings of notebook or run names, with commas; * stands for anything.
    Raises BadParameters with the file and key of the first problem.
    """
    overrides = overrides or {}
    found = [run for file in _files(paths) for run in _runs_of(file)]
    chosen = [run for run in found if _is_asked_for(run, only)]
    if not chosen:
        names = ", ".join(run.name for run in found)
        raise BadParameters(f"--only {only}: none of {names} begins so")
    types = {run.notebook: parameters_of(run.notebook) for run in chosen}
    everywhere = sorted(set().union(*types.values()))
    for name in overrides:
        with naming(f"-p {name}"):
            _require_known(name, everywhere)
    runs = [_checked(run, types[run.notebook], overrides) for run in chosen]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise BadParameters(f"run_name: {count} runs are called {name!r}")
    return runs


def _checked(run: Run, types: dict, overrides: dict[str, str]) -> Run:
    """The run with the overrides, every value in its type, and the notebook's defaults."""
    given = {n: _typed(text, types[n][0]) for n, text in overrides.items() if n in types}
    values = run.params | given
    for name, value in values.items():
        with naming(f"{run.file}: {name}"):
            _require_known(name, types)
            values[name] = check(value, types[name][0])
    defaults = {name: default for name, (_, default) in types.items()}
    return Run(run.notebook, values, defaults, run.file)


def _is_asked_for(run: Run, only: str) -> bool:
    starts = [f"{start.strip()}*" for start in only.strip(", ").split(",")]
    names = run.notebook.stem, run.name
    return any(fnmatchcase(name, start) for name in names for start in starts)


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found = []
    for path in map(Path, paths):
        files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise BadParameters(f"{path}: no such file, or a folder with no *.yaml in it")
        found += files
    return found


def _runs_of(file: Path) -> list[Run]:
    """The runs of a parameter file or a sweep, values as they stand there; or of a notebook."""
    if file.suffix == ".ipynb":
        return [Run(file, {}, {}, file)]
    with naming(file):
        content = yaml.safe_load(file.read_bytes()) or {}
        if not isinstance(content, dict):
            raise ValueError("expected lines 'name: value'")
        notebook = find_notebook(content.get("notebook", file.stem))
        rows = _rows(content) if "notebook" in content else [content]
    return [Run(notebook, values, {}, file) for values in rows]


def _rows(content: dict) -> list[dict]:
    """The value sets of a sweep."""
    if content.keys() - {"base"} != {"notebook", "runs"}:
        given = ", ".join(map(str, content))
        raise ValueError(f"a sweep has notebook, base and runs, got {given}")
    try:
        return [content.get("base", {}) | row for row in content["runs"]]
    except TypeError:
        raise ValueError("expected runs: a list of value sets, each with its run_name") from None


def find_notebook(stem: str) -> Path:
    """notebooks/<stem>.ipynb of the checkout or of the working folder."""
    for root in (platform.home(), Path.cwd()):
        if (path := root / "notebooks" / f"{stem}.ipynb").is_file():
            return path
    raise BadParameters(
        f"there is no notebooks/{stem}.ipynb (a parameter file is named like its notebook)"
    )
