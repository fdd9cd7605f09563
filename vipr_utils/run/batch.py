"""Run notebooks headless: a folder of parameter files, or a sweep, one papermill process per run.

    python -m vipr_utils run params/smoke [more paths] [--only 03] [--output-dir DIR] [-p name=value ...] [--force]
                               [--jobs N] [--engine ray [--address HOST:PORT]]

A parameter file is flat YAML named like its notebook. A sweep names the notebook itself, with `base` values and
either `runs` (a list of value sets, each with its run_name) or `grid` (name: list of values, all combinations).
The rows of one sweep run side by side, one a GPU or `--jobs`; files run one after the other, in the order of their names,
and so does a row that names another (`model_run`) after it. With Ray the rows go to its workers, here or on a cluster.
Every run is checked before the first kernel starts. What was done before with the same inputs is not done again.
Exit code 0: all runs are done; 1: one failed; 2: wrong parameters.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import difflib
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from functools import partial
from pathlib import Path

import torch
import yaml

from vipr_utils.host import platform
from vipr_utils.host.device import cores, memory_gb
from vipr_utils.host.files import locked, whole_file
from vipr_utils.judge import runs
from vipr_utils.retrieve import pipeline

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}
LITERAL = re.compile(
    r"Literal\[([\w, ]+)\]"
)  # in quotes in the cell: so neither an import nor papermill stumbles over it
NO_MEMORY = "out of memory: lower batch_size or image_size"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MEMORY_SIGNS = re.compile(
    r"out of memory|can(no|')t allocate memory|killed by signal: Killed", re.IGNORECASE
)


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


@dataclass
class Result:
    """What became of a run: status is 'ok', 'skip' or 'FAIL'; `error` holds the reason of a failure."""

    run: Run
    folder: Path
    status: str
    seconds: float = 0.0
    error: str = ""


# -------------------------------------------------------------------------------------------------- parameters


def parameters_of(notebook_path: Path) -> dict[str, tuple[str, object]]:
    """{name: (type, default)} of the cell tagged `parameters`, in its order. Raises BadParameters for other lines."""
    cells = [
        c for c in _cells(notebook_path) if "parameters" in c.get("metadata", {}).get("tags", [])
    ]
    if len(cells) != 1:
        raise BadParameters(
            f"{notebook_path.name}: {len(cells)} cells are tagged 'parameters', expected one"
        )
    found = {}
    for line in ast.parse("".join(cells[0]["source"])).body:
        try:
            kind = ast.unparse(line.annotation).strip("'")
            if kind.split("[")[0] not in TYPES and not LITERAL.fullmatch(kind):
                raise ValueError(kind)
            found[line.target.id] = (kind, ast.literal_eval(line.value))
        except (AttributeError, ValueError):
            line = f"'{ast.unparse(line)}' is not 'name: type = value' with a type of {', '.join(TYPES)}, \"Literal[...]\""
            raise BadParameters(f"{notebook_path.name}: parameter line {line}") from None
    return found


def check(name: str, value: object, known: dict[str, tuple[str, object]]) -> object:
    """The value in its parameter's type (an int becomes a float). Raises BadParameters with the remedy."""
    if name not in known:
        raise BadParameters(f"{name}: {_unknown(name, known)}")
    kind = known[name][0]
    if choices := LITERAL.fullmatch(kind):
        if value not in choices[1].split(", "):
            raise BadParameters(f"{name}: expected one of {choices[1]}, got {value!r}")
        return value
    if kind in ("list[Step]", "list[Stack]"):
        return _checked_steps(name, kind, value)
    base, _, inner = kind.rstrip("]").partition("[")
    if base == "float" and type(value) is int:
        return float(value)
    if type(value) is TYPES[base]:
        return (
            [check(name, v, {name: (inner, None)}) for v in value]
            if base == "list" and inner
            else value
        )
    hint = ""
    if base == "str":
        hint = "; put it in quotes" if value is not None else '; write "" for an empty one'
    elif base == "float" and isinstance(value, str) and NUMBER.fullmatch(value):
        hint = f": YAML reads it as text, write {_yaml_float(value)}"
    raise BadParameters(f"{name}: expected {kind}, got {value!r} ({type(value).__name__}){hint}")


def _checked_steps(name: str, kind: str, value: object) -> object:
    """The post-processing steps of a list, or of each of its stacks "a(...) + b(...)"."""
    if type(value) is not list or not all(type(text) is str for text in value):
        raise BadParameters(f"{name}: expected a list of calls in quotes, got {value!r}")
    try:
        for stack in [value] if kind == "list[Step]" else map(pipeline.split, value):
            pipeline.check(stack)
    except ValueError as error:
        raise BadParameters(f"{name}: {error}") from None
    return value


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return "unknown parameter" + (
        f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    )


def _yaml_float(text: str) -> str:
    """'1e4' as YAML 1.1 wants it: '1.0e+4', with a point and a signed exponent."""
    mantissa, e, exponent = text.lower().partition("e")
    return (
        mantissa
        + ("" if "." in mantissa else ".0")
        + e
        + ("+" if exponent[:1].isdigit() else "")
        + exponent
    )


def _typed(text: object, kind: str) -> object:
    """A command-line value read by the parameter's type; there 1e-4 is a number."""
    if not isinstance(text, str) or kind == "str" or LITERAL.fullmatch(kind):
        return text
    return float(text) if kind == "float" and NUMBER.fullmatch(text) else yaml.safe_load(text)


# ---------------------------------------------------------------------------------------------- files to runs


def load_runs(
    paths: Iterable[str | Path], overrides: dict | None = None, only: str = ""
) -> list[Run]:
    """The runs that files and folders ask for, checked. `only`: beginnings of notebook or run names, with commas; * stands
    for anything.

    Raises BadParameters with every problem found, each naming its file and key.
    """
    wanted, problems, overrides = [], [], overrides or {}
    for file in _files(paths):
        try:
            wanted += [(file, *found) for found in _value_sets(file)]
        except BadParameters as error:
            problems.append(f"{file}: {error}")
    starts = [s.strip() + "*" for s in only.split(",") if s.strip()] or ["*"]
    chosen = [
        w
        for w in wanted
        if any(fnmatch(name, s) for name in (w[1].stem, _name(w[1], w[2])) for s in starts)
    ]
    if not chosen and not problems:
        raise BadParameters(
            f"--only {only}: none of {', '.join(_name(n, v) for _, n, v in wanted)} begins so"
        )
    known = {n: parameters_of(n) for n in {w[1] for w in chosen}}
    everywhere = {name for parameters in known.values() for name in parameters}
    problems += [
        f"-p {name}: {_unknown(name, sorted(everywhere))}"
        for name in overrides
        if name not in everywhere
    ]
    found = []
    for file, notebook, values in chosen:
        types = known[notebook]
        values = values | {k: _typed(v, types[k][0]) for k, v in overrides.items() if k in types}
        for key, value in values.items():
            try:
                values[key] = check(key, value, types)
            except BadParameters as error:
                problems.append(f"{file}: {error}")
        found.append(
            Run(
                _name(notebook, values),
                notebook,
                values,
                {k: d for k, (_, d) in types.items()},
                file,
            )
        )
    for name, same in itertools.groupby(sorted(found, key=lambda r: r.name), key=lambda r: r.name):
        if len(files := [str(r.file) for r in same]) > 1:
            problems.append(
                f"{' and '.join(dict.fromkeys(files))}: run_name: {len(files)} runs are called {name!r}"
            )
    if problems:
        raise BadParameters("\n".join(dict.fromkeys(problems)))
    return found


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found = []
    for path in map(Path, paths):
        files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            raise BadParameters(
                f"{path}: " + ("no *.yaml in it" if path.is_dir() else "no such file or folder")
            )
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
        return [(_notebook(file.stem), content)]
    if wrong := set(content) - {"notebook", "base", "runs", "grid"}:
        raise BadParameters(
            f"{', '.join(sorted(map(str, wrong)))}: a sweep has notebook, base, and runs or grid"
        )
    base, several, grid = content.get("base") or {}, content.get("runs"), content.get("grid")
    if bool(several) == bool(grid):
        raise BadParameters("a sweep has either runs or grid")
    if grid:
        if wrong := [k for k, v in grid.items() if not isinstance(v, list)]:
            raise BadParameters(f"{', '.join(wrong)}: a grid wants a list of values")
        several = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        several = [
            {"run_name": "-".join([file.stem, *itertools.starmap(_word, v.items())])} | v
            for v in several
        ]
    if wrong := [v for v in several if not isinstance(v, dict)]:
        raise BadParameters(f"runs: expected a list of value sets, got {wrong[0]!r}")
    if unnamed := [i for i, values in enumerate(several, start=1) if not values.get("run_name")]:
        raise BadParameters(f"run_name: missing in run {', '.join(map(str, unnamed))}")
    return [(_notebook(Path(content["notebook"]).stem), base | values) for values in several]


def _word(key: str, value: object) -> str:
    text = (
        f"{key}_{value}"
        if isinstance(value, bool)
        else f"seed{value}"
        if key == "seed"
        else str(value)
    )
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or f"no_{key}"


def _name(notebook: Path, values: dict) -> str:
    return str(values.get("run_name") or notebook.stem)


def _root() -> Path:
    return platform.repository() or Path.cwd()


def _notebook(stem: str) -> Path:
    for root in (_root(), Path.cwd()):
        if (path := root / "notebooks" / f"{stem}.ipynb").is_file():
            return path
    raise BadParameters(
        f"there is no notebooks/{stem}.ipynb (a parameter file is named like its notebook)"
    )


def _cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


# ------------------------------------------------------------------------------------------------------ running


def run_all(
    todo: list[Run],
    *,
    output_dir: str = "",
    force: bool = False,
    jobs: int = 0,
    report: Callable = print,
) -> list[Result]:
    """Run them, `jobs` rows of a sweep at a time (0: see `slots`); `report` gets one line a run, in the order of `todo`.

    A failed run does not stop the others. Results do not depend on `jobs` where threads per run are the same: on a CPU a
    run's share of the cores is its number of threads, unless $OMP_NUM_THREADS says it.
    """
    free, results = queue.Queue(), []
    for slot in (places := slots(jobs)):
        free.put(slot)

    def one(run: Run) -> Result:
        slot, (folder, data) = free.get(), ready[id(run)]
        try:
            with locked(folder):  # another batch may be at it
                return _run(run, folder, data, force, slot)
        finally:
            free.put(slot)

    ready = _ready(todo, output_dir)
    with ThreadPoolExecutor(
        len(places)
    ) as pool:  # threads that wait: each run is a process of its own
        for wave in waves(todo):
            for result in pool.map(one, wave):
                results.append(result)
                report(_line(result, max(len(run.name) for run in todo)))
    return results


def _ready(todo: list[Run], output_dir: str) -> dict[int, tuple[Path, Path | None]]:
    """Run folder and data root of each: a wrong one is known before any kernel starts."""
    ready = {}
    for run in todo:
        given = run.defaults | run.params
        out = (
            output_dir
            and Path(output_dir).expanduser().resolve()
            or given.get("output_dir", "submissions")
        )
        try:
            folder, data = (
                platform.run_folder(str(out), run.name),
                platform.find_data_root(given.get("data_root", ""))[0],
            )
        except (ValueError, FileNotFoundError) as error:
            raise BadParameters(f"{run.file}: {error}") from None
        ready[id(run)] = folder.resolve(), data
    return ready


def waves(todo: list[Run]) -> list[list[Run]]:
    """Runs that may go side by side: rows of one file, up to a row that names one of them as its input."""
    found: list[list[Run]] = []
    for run in todo:
        named = {Path(v).name for v in run.params.values() if isinstance(v, str)}
        together = (
            found and found[-1][0].file == run.file and not named & {r.name for r in found[-1]}
        )
        found[-1].append(run) if together else found.append([run])
    return found


def slots(jobs: int = 0) -> list[dict[str, str]]:
    """Environment of each process that may run at once: one a visible GPU, else one for 2 cores and 4 GB, or `jobs`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    n = jobs or max(1, min(cores() // 2, int(memory_gb()[1] / 4)))
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n)))}] * n


def _run(run: Run, folder: Path, data: Path | None, force: bool, slot: dict[str, str]) -> Result:
    key, mark, written = _key(run, folder, data), folder / "batch.json", folder / "run.json"
    force = (
        force or run.params.get("model_run") == "best"
    )  # that hangs on whatever runs there are by now
    if (
        not force
        and written.is_file()
        and mark.is_file()
        and _marked(mark) == (key, _sha256(written))
    ):
        return Result(run, folder, "skip")
    for old in (mark, folder / "notebook.ipynb"):
        old.unlink(missing_ok=True)
    place = {"run_name": run.name, "output_dir": str(folder.parent)}
    values = run.params | {k: v for k, v in place.items() if k in run.defaults}
    if values.get("data_root"):
        values["data_root"] = str(data)  # the kernel's working folder may be another
    started = time.time()
    done = _papermill(run.notebook, folder / "notebook.ipynb", values, slot)
    seconds = time.time() - started
    if done.returncode:
        return Result(run, folder, "FAIL", seconds, _reason(done, folder / "notebook.ipynb"))
    if written.is_file() and written.stat().st_mtime > started - 2:  # file systems round times
        with whole_file(mark) as part:
            part.write_text(
                json.dumps({"key": key, "run": _sha256(written), "seconds": round(seconds, 1)})
                + "\n"
            )
    return Result(run, folder, "ok", seconds)


def _marked(mark: Path) -> tuple[str, str] | None:
    """(key, sha256 of run.json) when batch last finished here: a run.json written by hand since is not batch's."""
    try:
        found = json.loads(mark.read_text())
        return found["key"], found["run"]
    except (ValueError, KeyError, TypeError):
        return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _papermill(
    notebook: Path, out: Path, values: dict, slot: dict[str, str]
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "params.yaml"
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        command = [
            "papermill",
            str(notebook),
            str(out),
            "-f",
            str(file),
            "-k",
            "python3",
            "--no-progress-bar",
        ]
        command = [sys.executable, "-m", *command]
        kept = {
            "cwd": _root(),
            "env": os.environ | slot,
            "preexec_fn": _end_with_parent if LIBC else None,
        }
        return subprocess.run(command, capture_output=True, text=True, errors="replace", **kept)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    LIBC.prctl(
        1, 9
    )  # PR_SET_PDEATHSIG, SIGKILL: no kernel goes on when the process that waits for it was killed


# ---------------------------------------------------------------------------------------------------------- Ray

COLLECTED = (
    "*.json",
    "*.csv",
    "*.png",
    "notebook.ipynb",
)  # of a run on another machine; checkpoints stay there
CARRIED = {"excludes": [".git", ".venv", ".lanes", "submissions", "tests", "kaggle"]}


def run_on_ray(
    todo: list[Run],
    *,
    output_dir: str = "",
    force: bool = False,
    jobs: int = 0,
    address: str = "",
    report: Callable = print,
) -> list[Result]:
    """The same as `run_all` on Ray's workers: a task a run with its GPU, tried again where a worker is lost.

    address: of a running cluster, which gets the repository and needs its packages, and the data under the same path;
    empty starts Ray here. Records come back whatever machine made them. Raises BadParameters without Ray.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadParameters("--engine ray: Ray is missing: pip install ray, or leave --engine out")
    import ray

    _ready(todo, output_dir)
    output_dir = output_dir and str(Path(output_dir).expanduser().resolve())
    cluster = {"address": address, "runtime_env": {"working_dir": str(_root()), **CARRIED}}
    ray.init(
        log_to_driver=False,
        **cluster if address else {"num_cpus": len(slots(jobs)), "include_dashboard": False},
    )
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_remote)
        results = []
        for wave in waves(todo):
            for run, reference in zip(wave, [task.remote(run, output_dir, force) for run in wave]):
                results.append(_collected(ray, run, reference, output_dir))
                report(_line(results[-1], max(len(run.name) for run in todo)))
    finally:
        ray.shutdown()
    return results


def _remote(run: Run, output_dir: str, force: bool) -> tuple[Result, dict[str, bytes]]:
    """A worker's part: (result, the small files of its run folder by name)."""
    run.notebook = _notebook(run.notebook.stem)  # the worker's copy of the repository
    folder, data = _ready([run], output_dir)[id(run)]
    with locked(folder):
        result = _run(
            run, folder, data, force, {}
        )  # Ray has set CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS
    return result, {f.name: f.read_bytes() for pattern in COLLECTED for f in folder.glob(pattern)}


def _collected(ray, run: Run, reference, output_dir: str) -> Result:
    folder = _ready([run], output_dir)[id(run)][0]
    try:
        result, files = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Result(
            run, folder, "FAIL", 0.0, f"Ray gave the run up: {str(error).splitlines()[0]}"
        )
    for name, content in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            with whole_file(folder / name) as part:
                part.write_bytes(content)
    return Result(run, folder, result.status, result.seconds, result.error)


def _key(run: Run, folder: Path, data: Path | None) -> str:
    """sha256 over what a run hangs on: notebook, values, package, the data's tables, and files or runs it names."""
    values = {
        k: v for k, v in (run.defaults | run.params).items() if k not in ("output_dir", "run_name")
    }
    parts = ["".join(c["source"]).encode() for c in _cells(run.notebook)]
    parts.append(json.dumps([values, os.environ.get("VIPR_PRECISION")], sort_keys=True).encode())
    parts += [f.read_bytes() for f in sorted(Path(__file__).parents[1].rglob("*.py"))]
    parts += (
        [(data / t).read_bytes() for t in ("train.csv", "test.csv") if (data / t).is_file()]
        if data
        else [b"toy"]
    )
    for value in values.values():
        if isinstance(value, str) and 0 < len(value) < 200:
            for path in (_root() / value, folder.parent / value):
                if path.is_file():  # a checkpoint: too big to read each time
                    parts.append(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
                elif (path / "run.json").is_file():
                    parts.append((path / "run.json").read_bytes())
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def _reason(done: subprocess.CompletedProcess, executed: Path) -> str:
    """Why a run failed: the last lines of the failing cell's error, in words where the memory was too small."""
    if (
        done.returncode in (-9, 137, 138)
        or "Kernel died" in done.stderr
        or "DeadKernelError" in done.stderr
    ):
        return f"the kernel was killed, most likely {NO_MEMORY}"
    cells = _cells(executed) if executed.is_file() else []
    errors = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    text = "\n".join([*errors[0]["traceback"]] if errors else [done.stderr])
    tail = "\n".join(
        [s for s in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if s.strip()][-8:]
    )
    if errors and (
        errors[0]["ename"].endswith("MemoryError") or MEMORY_SIGNS.search(errors[0]["evalue"])
    ):
        return f"{NO_MEMORY}\n{tail}"
    return tail or f"papermill ended with code {done.returncode}"


def _line(result: Result, width: int) -> str:
    """'ok   03_scratch_siamese   41 s   mAP@5 0.312', and for a failure the reason below."""
    start = f"{result.status:4} {result.run.name:{width}}  "
    if result.status == "FAIL":
        return f"{start}{result.seconds:5.0f} s\n" + "\n".join(
            "     " + line for line in result.error.splitlines()
        )
    spent = "done before" if result.status == "skip" else f"{result.seconds:5.0f} s"
    if not (result.folder / "batch.json").is_file():  # run.json is absent or an older run's
        return start + spent
    record = json.loads((result.folder / "run.json").read_text())
    score = (record.get("metrics") or {}).get("map_at_5")
    cut = f"   CUT SHORT {record['cut_short']}" if record.get("cut_short") else ""
    return start + spent + (f"   mAP@5 {score:.3f}" if score is not None else "") + cut


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code stands at the head of this file."""
    parser = argparse.ArgumentParser(
        "python -m vipr_utils run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("paths", nargs="+", help="parameter files, sweeps, or folders of them")
    parser.add_argument(
        "--only", default="", help="beginning of a notebook or run name; several with commas"
    )
    parser.add_argument("--output-dir", default="", help="instead of the notebooks' output_dir")
    parser.add_argument(
        "-p",
        action="append",
        default=[],
        metavar="name=value",
        help="for every notebook that has it",
    )
    parser.add_argument("--force", action="store_true", help="also run what was done before")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        help="rows of a sweep at once; 0: one a GPU, else 2 cores each",
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="ray: its workers, here or at --address",
    )
    parser.add_argument("--address", default="", help="of a Ray cluster")
    given = parser.parse_args(arguments)
    if wrong := [p for p in given.p if "=" not in p]:
        parser.error(f"-p {wrong[0]}: expected name=value")
    if importlib.util.find_spec("papermill") is None:
        parser.error("papermill is missing: pip install papermill ipykernel")
    try:
        todo = load_runs(given.paths, dict(p.split("=", 1) for p in given.p), given.only)
        how = {
            "output_dir": given.output_dir,
            "force": given.force,
            "report": partial(print, flush=True),
        }
        if given.engine == "ray":
            results = run_on_ray(todo, jobs=given.jobs, address=given.address, **how)
        else:
            results = run_all(todo, jobs=given.jobs, **how)
    except BadParameters as error:
        print(error, file=sys.stderr)
        return 2
    for folder in dict.fromkeys(
        r.folder.parent for r in results if (r.folder / "run.json").is_file()
    ):
        runs.write_runs_csv(folder)
        print("\n" + runs.markdown(runs.scoreboard(folder)))
    for result in results:
        if result.status != "FAIL" and (file := result.folder / "submission.csv").is_file():
            print(f"submission: {file}")
    return 1 if any(r.status == "FAIL" for r in results) else 0
