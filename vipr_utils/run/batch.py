"""Run notebooks headless: a folder of parameter files, or a sweep, one papermill process per run.

    vipr run params/smoke [more paths] [--only 03] [--output-dir DIR] [-p name=value ...] [--force]
             [--jobs N] [--engine ray [--address HOST:PORT]]

The rows of one sweep run side by side, one a GPU or `--jobs`; files run one after the other, in the
order of their names, and so does a row that names another (`model_run`) after it. With Ray the rows
go to its workers, here or on a cluster. Every run is checked before the first kernel starts. What
was done before with the same inputs is not done again; what starts from a failed run fails with it.
Exit code 0: all runs are done; 1: one failed; 2: wrong parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml

from vipr_utils.host import platform
from vipr_utils.host.device import cores, memory_gb
from vipr_utils.host.files import locked, whole_file
from vipr_utils.judge import runs
from vipr_utils.run.params import BadParameters, Run, find_notebook, load_runs

NO_MEMORY = "out of memory: lower batch_size or image_size"
MEMORY_SIGNS = re.compile(
    r"out of memory|can(no|')t allocate memory|killed by signal: Killed", re.IGNORECASE
)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
COLLECTED = ("*.json", "*.csv", "*.png", "notebook.ipynb")  # of a run on another machine
CARRIED = {"excludes": [".git", ".venv", ".lanes", "submissions", "tests", "kaggle"]}


@dataclass
class Result:
    """What became of a run: status is 'ok', 'skip' or 'FAIL'; error says why it failed."""

    run: Run
    folder: Path
    status: str
    seconds: float = 0.0
    error: str = ""


# ------------------------------------------------------------------------------- side by side


def run_all(
    todo: list[Run],
    *,
    output_dir: str = "",
    force: bool = False,
    jobs: int = 0,
    report: Callable = print,
) -> list[Result]:
    """Run them, `jobs` rows of a sweep at a time (0: see `slots`); `report` gets a line a run.

    A failed run stops only what names it as its model_run. Results do not depend on `jobs` where
    threads per run are the same: on a CPU a run's share of the cores is its number of threads,
    unless $OMP_NUM_THREADS says it.
    """
    places = _places(todo, output_dir)
    free = queue.Queue()
    for slot in slots(jobs):
        free.put(slot)

    def one(run: Run) -> Result:
        slot = free.get()
        try:
            return run_one(run, *places[run.name], force=force, slot=slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(free.qsize()) as pool:  # each run is a process of its own
        return _in_waves(todo, places, lambda wave: pool.map(one, wave), report)


def run_on_ray(
    todo: list[Run],
    *,
    output_dir: str = "",
    force: bool = False,
    jobs: int = 0,
    address: str = "",
    report: Callable = print,
) -> list[Result]:
    """`run_all` on Ray's workers: a task a run with its GPU, tried again where a worker is lost.

    address: of a running cluster, which gets the repository and needs its packages, and the data
    under the same path; empty starts Ray here. Records come back whatever machine made them.
    Raises BadParameters without Ray.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadParameters("--engine ray: Ray is missing: pip install ray, or leave --engine out")
    import ray

    output_dir = output_dir and str(Path(output_dir).expanduser().resolve())
    places = _places(todo, output_dir)
    if address:
        carried = {"working_dir": str(_root()), **CARRIED}
        ray.init(address=address, runtime_env=carried, log_to_driver=False)
    else:
        ray.init(num_cpus=len(slots(jobs)), include_dashboard=False, log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_on_a_worker)

    def several(wave: list[Run]) -> list[Result]:
        references = [remote.remote(run, output_dir, force) for run in wave]
        return [_collected(ray, run, places[run.name][0], r) for run, r in zip(wave, references)]

    try:
        return _in_waves(todo, places, several, report)
    finally:
        ray.shutdown()


def _on_a_worker(run: Run, output_dir: str, force: bool) -> tuple[Result, dict[str, bytes]]:
    """(result, the small files of its run folder by name)."""
    run = replace(run, notebook=find_notebook(run.notebook.stem))  # in the worker's copy
    folder, data = _places([run], output_dir)[run.name]
    result = run_one(run, folder, data, force=force, slot={})  # Ray has set the GPU and threads
    files = [file for pattern in COLLECTED for file in folder.glob(pattern)]
    return result, {file.name: file.read_bytes() for file in files}


def _collected(ray, run: Run, folder: Path, reference) -> Result:
    """The worker's result, its files written into the run folder here."""
    try:
        result, files = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = f"Ray gave the run up: {str(error).splitlines()[0]}"
        return Result(run, folder, "FAIL", error=reason)
    for name, content in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            with whole_file(folder / name) as part:
                part.write_bytes(content)
    return replace(result, run=run, folder=folder)


def _in_waves(todo: list[Run], places: dict, run_wave: Callable, report: Callable) -> list[Result]:
    """The results of all waves, in the order of todo; runs that start from a failed one fail."""
    results: dict[str, Result] = {}
    width = max(len(run.name) for run in todo)
    for wave in waves(todo):
        ready = []
        for run in wave:
            before = results.get(Path(str(run.params.get("model_run", ""))).name)
            if before and before.status == "FAIL":
                reason = f"it starts from {before.run.name}, which failed"
                results[run.name] = Result(run, places[run.name][0], "FAIL", error=reason)
            else:
                ready.append(run)
        results |= {result.run.name: result for result in run_wave(ready)}
        for run in wave:
            report(_line(results[run.name], width))
    return [results[run.name] for run in todo]


def waves(todo: list[Run]) -> list[list[Run]]:
    """Runs that may go side by side: rows of one file, up to a row that names one of them."""
    found: list[list[Run]] = []
    for run in todo:
        named = {Path(value).name for value in run.params.values() if isinstance(value, str)}
        last = found[-1] if found else []
        if last and last[0].file == run.file and not named & {other.name for other in last}:
            last.append(run)
        else:
            found.append([run])
    return found


def slots(jobs: int = 0) -> list[dict[str, str]]:
    """Environment of each process that may run at once.

    One a visible GPU, else one for 2 cores and 4 GB, or `jobs`.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    n = jobs or max(1, min(cores() // 2, int(memory_gb()[1] / 4)))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n)))
    return [{"OMP_NUM_THREADS": threads}] * n


def _places(todo: list[Run], output_dir: str) -> dict[str, tuple[Path, Path | None]]:
    """Run folder and data root by run: a wrong one is known before any kernel starts."""
    places = {}
    for run in todo:
        given = run.defaults | run.params
        out = (
            str(Path(output_dir).expanduser().resolve())
            if output_dir
            else given.get("output_dir", "submissions")
        )
        try:
            folder = platform.run_folder(out, run.name).resolve()
            places[run.name] = folder, platform.find_data_root(given.get("data_root", ""))[0]
        except (ValueError, FileNotFoundError) as error:
            raise BadParameters(f"{run.file}: {error}") from None
    return places


# ------------------------------------------------------------------------------------ one run


def run_one(run: Run, folder: Path, data: Path | None, *, force: bool, slot: dict) -> Result:
    """Execute one notebook, or skip it where it was done before with the same inputs."""
    with locked(folder):  # another batch may be at it
        key, mark, record = _key(run, folder, data), folder / "batch.json", folder / "run.json"
        again = force or run.params.get("model_run") == "best"  # of whatever runs there are by now
        if not again and record.is_file() and _marked(mark) == [key, _sha256(record)]:
            return Result(run, folder, "skip")
        for old in (mark, folder / "notebook.ipynb"):
            old.unlink(missing_ok=True)
        values = dict(run.params)
        if "run_name" in run.defaults:
            values["run_name"] = run.name
        if "output_dir" in run.defaults:
            values["output_dir"] = str(folder.parent)
        if values.get("data_root"):
            values["data_root"] = str(data)  # the kernel's working folder may be another
        started = time.time()
        done = _papermill(run.notebook, folder / "notebook.ipynb", values, slot)
        seconds = time.time() - started
        if done.returncode:
            reason = _reason(done, folder / "notebook.ipynb")
            return Result(run, folder, "FAIL", seconds, reason)
        if record.is_file() and record.stat().st_mtime > started - 2:  # file systems round times
            with whole_file(mark) as part:
                part.write_text(json.dumps([key, _sha256(record)]) + "\n")
        return Result(run, folder, "ok", seconds)


def _papermill(notebook: Path, out: Path, values: dict, slot: dict) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "params.yaml"
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "papermill", notebook, out, "-f", file, "-k", "python3"]
        return subprocess.run(
            [*map(str, command), "--no-progress-bar"],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=_root(),
            env=os.environ | slot,
            preexec_fn=_end_with_parent if LIBC else None,
        )


def _end_with_parent() -> None:
    """No kernel goes on when the process that waits for it was killed."""
    LIBC.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def _root() -> Path:
    return platform.repository() or Path.cwd()


def _marked(mark: Path) -> list | None:
    """[key, sha256 of run.json] when batch last finished here."""
    try:
        return json.loads(mark.read_text())
    except (OSError, ValueError):
        return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _key(run: Run, folder: Path, data: Path | None) -> str:
    """sha256 over what a run depends on: notebook, values, package, tables, runs that it names."""
    values = run.defaults | run.params
    values = {k: v for k, v in values.items() if k not in ("output_dir", "run_name")}
    parts = ["".join(cell["source"]).encode() for cell in _cells(run.notebook)]
    parts.append(json.dumps([values, os.environ.get("VIPR_PRECISION")], sort_keys=True).encode())
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    files += [data / table for table in ("train.csv", "test.csv")] if data else []
    for value in values.values():
        if isinstance(value, str) and 0 < len(value) < 200:
            for path in (_root() / value, folder.parent / value):
                files.append(path / "run.json")
                if path.is_file():  # a checkpoint: too big to read each time
                    parts.append(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    parts += [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def _cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


# ------------------------------------------------------------------------------------ in words


def _reason(done: subprocess.CompletedProcess, executed: Path) -> str:
    """Why a run failed: the last lines of its error, or that memory was too small."""
    died = "Kernel died" in done.stderr or "DeadKernelError" in done.stderr
    if died or done.returncode in (-9, 137, 138):
        return f"the kernel was killed, most likely {NO_MEMORY}"
    outputs = [
        o for c in (_cells(executed) if executed.is_file() else []) for o in c.get("outputs", [])
    ]
    error = next((output for output in outputs if output["output_type"] == "error"), None)
    text = "\n".join(error["traceback"]) if error else done.stderr
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    tail = "\n".join(lines[-8:]) or f"papermill ended with code {done.returncode}"
    if error and (error["ename"].endswith("MemoryError") or MEMORY_SIGNS.search(error["evalue"])):
        return f"{NO_MEMORY}\n{tail}"
    return tail


def _line(result: Result, width: int) -> str:
    """'ok   03_scratch_siamese   41 s   mAP@5 0.312', and for a failure the reason below."""
    spent = "done before" if result.status == "skip" else f"{result.seconds:5.0f} s"
    line = f"{result.status:4} {result.run.name:{width}}  {spent}"
    if result.status == "FAIL":
        return "\n     ".join([line, *result.error.splitlines()])
    if not (result.folder / "batch.json").is_file():  # run.json is absent or an older run's
        return line
    record = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    score = (record.get("metrics") or {}).get("map_at_5")
    if score is not None:
        line += f"   mAP@5 {score:.3f}"
    return line + (f"   CUT SHORT {record['cut_short']}" if record.get("cut_short") else "")


# ----------------------------------------------------------------------------- command line


def options(parser: argparse.ArgumentParser) -> None:
    """What `run` and `submit` have in common."""
    add = parser.add_argument
    add("--output-dir", default="", help="instead of the notebooks' output_dir")
    add("-p", action="append", default=[], metavar="name=value", help="for all that have it")
    add("--force", action="store_true", help="also run what was done before")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code stands at the head of this file."""
    parser = argparse.ArgumentParser("vipr run", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("paths", nargs="+", help="parameter files, sweeps, or folders of them")
    options(parser)
    add("--only", default="", help="beginning of a notebook or run name; several with commas")
    add("--jobs", type=int, default=0, help="rows at once; 0: one a GPU, else 2 cores each")
    add("--engine", choices=["local", "ray"], default="local", help="ray: its workers")
    add("--address", default="", help="of a Ray cluster")
    given = parser.parse_args(arguments)
    try:
        todo = load_runs(given.paths, overrides(parser, given.p), given.only)
        engine = partial(run_on_ray, address=given.address) if given.engine == "ray" else run_all
        return finish(engine, todo, given, jobs=given.jobs)
    except BadParameters as error:
        print(error, file=sys.stderr)
        return 2


def overrides(parser: argparse.ArgumentParser, pairs: list[str]) -> dict[str, str]:
    """The values of `-p name=value`."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        parser.error(f"-p {wrong[0]}: expected name=value")
    if importlib.util.find_spec("papermill") is None:
        parser.error("papermill is missing: pip install papermill ipykernel")
    return dict(pair.split("=", 1) for pair in pairs)


def finish(engine: Callable, todo: list[Run], given: argparse.Namespace, **settings) -> int:
    """Run, then print the table of every output folder and the submissions; the exit code."""
    report = partial(print, flush=True)
    results = engine(
        todo, output_dir=given.output_dir, force=given.force, report=report, **settings
    )
    written = [result for result in results if (result.folder / "run.json").is_file()]
    for folder in dict.fromkeys(result.folder.parent for result in written):
        report("\n" + runs.table(runs.scoreboard(folder)))
    for result in results:
        if result.status != "FAIL" and (result.folder / "submission.csv").is_file():
            report(f"submission: {result.folder / 'submission.csv'}")
    return int(any(result.status == "FAIL" for result in results))
