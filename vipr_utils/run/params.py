"""Parameter files and sweeps: from YAML to runs whose every value was checked.

A parameter file is flat YAML named like its notebook. A sweep names the notebook itself, with
`base` values and either `runs` (a list of value sets, each with its run_name) or `grid` (name: list
of values, all combinations). Types are those that the notebook's parameters cell declares.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from vipr_utils.host import platform
from vipr_utils.retrieve import pipeline

SCALARS = {"str": str, "int": int, "float": float, "bool": bool}
LISTS = {f"list[{element}]" for element in (*SCALARS, "Step", "Stack")}
LITERAL = re.compile(r"Literal\[([\w, ]+)\]")


class BadParameters(ValueError):
    """All that is wrong with the runs asked for, one problem a line."""


@dataclass
class Run:
    """One notebook with one set of values."""

    name: str  # of the run folder
    notebook: Path
    params: dict  # what the file and the command line say, checked
    defaults: dict  # what the notebook says
    file: Path  # where the values come from


# ------------------------------------------------------------------------------------- types


def parameters_of(notebook: Path) -> dict[str, tuple[str, object]]:
    """{name: (type, default)} of the cell tagged `parameters`, in its order, as papermill reads it.

    Raises BadParameters for a type that the kit cannot check.
    """
    from papermill import inspect_notebook

    found = {}
    for name, parameter in inspect_notebook(str(notebook)).items():
        kind = parameter["inferred_type_name"]
        known = kind in SCALARS or kind == "list" or kind in LISTS or LITERAL.fullmatch(kind)
        if not known:
            raise BadParameters(
                f"{notebook.name}: parameter {name} has the type {kind}: write one of "
                f"{', '.join(SCALARS)}, list, {', '.join(sorted(LISTS))} or Literal[...], lists "
                "and Literal in quotes"
            )
        found[name] = kind, ast.literal_eval(parameter["default"])
    return found


def check(name: str, value: object, kind: str) -> object:
    """The value in its parameter's type; an int becomes a float.

    Raises BadParameters with the remedy. Step and Stack are calls: see `pipeline`.
    """
    if kind.startswith("Literal"):
        choices = LITERAL.fullmatch(kind)[1].split(", ")
        if value not in choices:
            raise BadParameters(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        return value
    if kind.startswith("list"):
        return _checked_list(name, value, kind)
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not SCALARS[kind]:
        raise _wrong_type(name, value, kind)
    return value


def _checked_list(name: str, value: object, kind: str) -> list:
    if type(value) is not list:
        raise _wrong_type(name, value, kind)
    element = kind.removeprefix("list").strip("[]")
    if element not in ("Step", "Stack"):
        return [check(name, item, element) for item in value] if element else value
    texts = [check(name, item, "str") for item in value]
    try:
        for stack in [texts] if element == "Step" else map(pipeline.split, texts):
            pipeline.check(stack)
    except ValueError as error:
        raise BadParameters(f"{name}: {error}") from None
    return texts


def _wrong_type(name: str, value: object, kind: str) -> BadParameters:
    remedy = ""
    if kind == "str":
        remedy = '; write "" for an empty one' if value is None else "; put it in quotes"
    if kind == "float" and isinstance(value, str):
        remedy = ": YAML reads 1e-4 as text, write 1.0e-4, with a point and a signed exponent"
    return BadParameters(f"{name}: expected {kind}, got {value!r} ({type(value).__name__}){remedy}")


def _typed(text: str, kind: str) -> object:
    """A command-line value read by the parameter's type; there 1e-4 is a number."""
    if kind == "str" or kind.startswith("Literal"):
        return text
    try:
        return float(text) if kind == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text  # `check` names what is wrong with it


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown parameter; {advice}"


# --------------------------------------------------------------------------------------- runs


def load_runs(
    paths: Iterable[str | Path], overrides: dict[str, str] | None = None, only: str = ""
) -> list[Run]:
    """The runs that files and folders ask for, checked, in the order of the files.

    only: beginnings of notebook or run names, with commas; * stands for anything.
    Raises BadParameters with every problem found, each naming its file and key.
    """
    overrides, problems, found = overrides or {}, [], []
    for file in _files(paths):
        try:
            found += [(file, notebook, values) for notebook, values in _value_sets(file)]
        except BadParameters as error:
            problems.append(f"{file}: {error}")
    chosen = [row for row in found if _is_asked_for(row[1], row[2], only)]
    if not chosen and not problems:
        names = ", ".join(_name(notebook, values) for _, notebook, values in found)
        raise BadParameters(f"--only {only}: none of {names} begins so")
    types = {notebook: parameters_of(notebook) for _, notebook, _ in chosen}
    everywhere = sorted(set().union(*types.values()))
    for name in overrides:
        if name not in everywhere:
            problems.append(f"-p {name}: {_unknown(name, everywhere)}")
    runs = []
    for file, notebook, values in chosen:
        known = types[notebook]
        given = {n: _typed(text, known[n][0]) for n, text in overrides.items() if n in known}
        values, wrong = _checked(values | given, known)
        problems += [f"{file}: {problem}" for problem in wrong]
        defaults = {name: default for name, (_, default) in known.items()}
        runs.append(Run(_name(notebook, values), notebook, values, defaults, file))
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            files = dict.fromkeys(str(run.file) for run in runs if run.name == name)
            problems.append(f"{' and '.join(files)}: run_name: {count} runs are called {name!r}")
    if problems:
        raise BadParameters("\n".join(dict.fromkeys(problems)))
    return runs


def _checked(values: dict, known: dict) -> tuple[dict, list[str]]:
    """(values in their types, what is wrong with the others)."""
    checked, problems = {}, []
    for name, value in values.items():
        try:
            if name not in known:
                raise BadParameters(f"{name}: {_unknown(name, known)}")
            checked[name] = check(name, value, known[name][0])
        except BadParameters as error:
            problems.append(str(error))
    return checked, problems


def _is_asked_for(notebook: Path, values: dict, only: str) -> bool:
    starts = [start.strip() for start in only.split(",") if start.strip()] or [""]
    names = notebook.stem, _name(notebook, values)
    return any(fnmatchcase(name, f"{start}*") for name in names for start in starts)


def _name(notebook: Path, values: dict) -> str:
    return str(values.get("run_name") or notebook.stem)


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadParameters(f"{path}: no such file or folder")
        files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise BadParameters(f"{path}: no *.yaml in it")
        found += files
    return list(dict.fromkeys(found))


def _value_sets(file: Path) -> list[tuple[Path, dict]]:
    """(notebook, values) for each run of a parameter file or a sweep."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise BadParameters(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise BadParameters("expected lines 'name: value'")
    if "notebook" not in content:
        return [(find_notebook(file.stem), content)]
    if wrong := sorted(map(str, set(content) - {"notebook", "base", "runs", "grid"})):
        raise BadParameters(f"{', '.join(wrong)}: a sweep has notebook, base, and runs or grid")
    base, rows, grid = content.get("base") or {}, content.get("runs"), content.get("grid")
    if bool(rows) == bool(grid):
        raise BadParameters("a sweep has either runs or grid")
    for number, row in enumerate(rows := rows or _combinations(file.stem, grid), start=1):
        if not isinstance(row, dict):
            raise BadParameters(f"runs: expected a list of value sets, got {row!r}")
        if not row.get("run_name"):
            raise BadParameters(f"run_name: missing in run {number}")
    notebook = find_notebook(Path(content["notebook"]).stem)
    return [(notebook, base | row) for row in rows]


def _combinations(sweep: str, grid: dict) -> list[dict]:
    """Every combination of the grid's values, each with a run_name made of them."""
    if wrong := [name for name, values in grid.items() if not isinstance(values, list)]:
        raise BadParameters(f"{', '.join(wrong)}: a grid wants a list of values")
    rows = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    for row in rows:
        row["run_name"] = "-".join([sweep, *(_word(n, v) for n, v in row.items())])
    return rows


def _word(name: str, value: object) -> str:
    """A value as a part of a run's name."""
    text = f"{name}_{value}" if isinstance(value, bool) else str(value)
    if name == "seed":
        text = f"seed{value}"
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or f"no_{name}"


def find_notebook(stem: str) -> Path:
    """notebooks/<stem>.ipynb of the checkout or of the working folder."""
    for root in (platform.repository(), Path.cwd()):
        if root and (path := root / "notebooks" / f"{stem}.ipynb").is_file():
            return path
    raise BadParameters(
        f"there is no notebooks/{stem}.ipynb (a parameter file is named like its notebook)"
    )
