"""Run notebooks headless: a folder of parameter files, or a sweep, one papermill process per run.

    vipr run params/smoke [more paths] [--only 03] [--output-dir DIR] [-p name=value ...] [--force]
             [--jobs N] [--engine ray] [--dry-run]

The rows of one sweep run side by side, one a GPU or `--jobs`; files run one after the other, in the
order of their names, and so does a row that names another (`model_run`) after it. What runs alone
has all GPUs and cores. With Ray the rows go to its workers, here or on the cluster that
$RAY_ADDRESS names. Every run is checked before the first kernel starts. What was done before with
the same inputs is not done again; what starts from a failed run fails with it. While a run goes on,
and after it failed, its folder holds unfinished.txt, and what an earlier run left there has names
ending in .old: nothing takes it for new. The terminal has a line for each section and epoch,
<run>/log.txt all that notebooks say. --dry-run says what each run would take here, and runs none.
Ctrl-C ends the kernels, saves their notebooks as they are, and leaves the runs unfinished.
Exit code 0: all runs are done; 1: one failed, or could not end here; 2: wrong parameters; 130:
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import joblib
import torch

from vipr_utils.host import platform
from vipr_utils.host.device import cores, memory_gb
from vipr_utils.host.files import locked, write_whole
from vipr_utils.judge import runs
from vipr_utils.run import kernel, plan, report
from vipr_utils.run.params import BadParameters, Run, find_notebook, load_runs, naming, setting

NO_MEMORY = "out of memory: lower batch_size or image_size"
INTERRUPTED = "interrupted: what was saved stays, and trainings go on from their checkpoints"
MEMORY_SIGNS = re.compile(
    r"MemoryError|out of memory|can(no|')t allocate memory|killed by signal: Killed", re.IGNORECASE
)
NOT_CARRIED = [".git", ".venv", ".lanes", "submissions", "tests", "kaggle"]  # to another machine


@dataclass
class Result:
    """What became of a run: status is 'ok', 'skip' or 'FAIL'; error says why it failed, or which
    runs it had to do without.
    """

    run: Run
    status: str
    seconds: float = 0.0
    error: str = ""


# ------------------------------------------------------------------------------- side by side


def run_all(todo: list[Run], *, force: bool = False, jobs: int = 0) -> Iterator[Result]:
    """Run them, `jobs` rows of a sweep at a time (0: see `slots`); results as they come.

    A failed run stops only what names it as its model_run. Results do not depend on `jobs` where
    threads per run are the same: on a CPU a run's share of the cores is its number of threads,
    unless $OMP_NUM_THREADS says it. A generator that is closed interrupts the runs under way.
    """
    free, own, stop = slots(jobs), threading.local(), threading.Event()
    processes = len(free)

    def take_slot() -> None:
        own.slot = free.pop(0)

    def several(wave: list[Run]) -> Iterator[Result]:
        alone = min(len(wave), processes) == 1  # it has the whole machine
        return pool.map(
            lambda run: run_one(run, force=force, slot={} if alone else own.slot, stop=stop), wave
        )

    with ThreadPoolExecutor(processes, initializer=take_slot) as pool:  # each run is a process
        try:
            yield from _in_waves(todo, several)
        finally:  # interrupted, where a run is not over
            stop.set()


def run_on_ray(todo: list[Run], *, force: bool = False, jobs: int = 0) -> Iterator[Result]:
    """`run_all` on Ray's workers: a task a run with its GPU, tried again where a worker is lost.

    $RAY_ADDRESS names a running cluster, which gets the repository and needs its packages, and data
    and output_dir under the same path; without it Ray starts here. Raises BadParameters without
    Ray.
    """
    try:
        import ray
    except ImportError:
        raise BadParameters(
            "--engine ray: Ray is missing: pip install ray, or leave --engine out"
        ) from None
    carried, processes = None, len(slots(jobs))
    if os.environ.get("RAY_ADDRESS"):
        carried = {"working_dir": str(platform.home()), "excludes": NOT_CARRIED}
        processes = None  # as many as the cluster has
    ray.init(num_cpus=processes, runtime_env=carried, log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_on_a_worker)

    def several(wave: list[Run]) -> Iterator[Result]:
        references = [remote.remote(run, force) for run in wave]
        for run, reference in zip(wave, references):
            try:
                yield ray.get(reference)
            except ray.exceptions.RayError as error:
                yield Result(run, "FAIL", error=f"Ray gave the run up: {error}")

    try:
        yield from _in_waves(todo, several)
    finally:
        ray.shutdown()


def _on_a_worker(run: Run, force: bool) -> Result:
    run = replace(run, notebook=find_notebook(run.notebook.stem))  # in the worker's copy
    never = threading.Event()
    return run_one(run, force=force, slot={}, stop=never)  # Ray has set the GPU and threads


def _in_waves(todo: list[Run], run_wave: Callable) -> Iterator[Result]:
    """The results of all; runs that start from a failed one fail."""
    failed = set()
    for wave in waves(todo):
        for run in wave:
            if run.starts_from in failed:
                failed.add(run.name)
                error = f"it starts from {run.starts_from}, which failed"
                runs.set_aside(run.folder(), error)
                yield Result(run, "FAIL", error=error)
        for result in run_wave([run for run in wave if run.name not in failed]):
            if result.status == "FAIL":
                failed.add(result.run.name)
            yield result


def waves(todo: list[Run]) -> list[list[Run]]:
    """Runs that may go side by side: rows of one file, up to a row that names one of them."""
    found, file, names = [], None, set()
    for run in todo:
        if run.file != file or run.starts_from in names:
            file, names = run.file, set()
            found.append([])
        found[-1].append(run)
        names.add(run.name)
    return found


def slots(jobs: int = 0) -> list[dict[str, str]]:
    """Environment of each process that may run at once.

    One a visible GPU, else one for 2 cores and 4 GB, or `jobs`.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        shared = islice(cycle(gpus), jobs or len(gpus))
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in shared]
    n = jobs or max(1, min(cores() // 2, int(memory_gb()[1] / 4)))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n)))
    return [{"OMP_NUM_THREADS": threads}] * n


# ------------------------------------------------------------------------------------ one run


def run_one(run: Run, *, force: bool, slot: dict, stop: threading.Event) -> Result:
    """Execute one notebook, or skip it where it was done before with the same inputs."""
    if stop.is_set():
        return Result(run, "FAIL", error=INTERRUPTED)
    folder = run.folder()
    mark, record, executed = (folder / n for n in ("batch.json", "run.json", "notebook.ipynb"))
    with locked(folder):  # another batch may be at it
        inputs = _inputs(run)
        if not force and mark.is_file() and mark.read_text() == _mark(inputs, record):
            return Result(run, "skip")
        mark.unlink(missing_ok=True)
        runs.set_aside(folder, "This run has begun and not ended.")
        values = run.params | {  # folders in full: the kernel starts in another
            "run_name": run.name,
            "output_dir": str(folder.parent),
            "data_root": str(run.data() or ""),
        }
        started = time.time()
        done = kernel.papermill(run.notebook, executed, values, slot, stop)
        seconds = time.time() - started
        if done.returncode:
            reason = INTERRUPTED if stop.is_set() else _reason(done)
            runs.set_aside(folder, reason)
            return Result(run, "FAIL", seconds, reason)
        runs.settle(folder)
        if record.is_file():
            write_whole(mark, _mark(inputs, record))
        absent = ", ".join(runs.unfinished(folder.parent)) if run.reads_runs else ""
        return Result(run, "ok", seconds, absent and f"without {absent}: not finished")


def _mark(inputs: str, record: Path) -> str:
    """What stands in batch.json when a run of these inputs has left this record."""
    content = record.read_bytes() if record.is_file() else b""
    return json.dumps([inputs, joblib.hash(content)])


def _inputs(run: Run) -> str:
    """A hash of what a run depends on: values, notebook, package, photos, tables, runs, weights.

    Of runs it depends on that of its model, or where it chooses among all, on every one of an
    earlier notebook of the series.
    """
    output_dir = run.folder().parent
    weights = run.values.get("weights", "")
    if weights == "auto":
        weights = os.environ.get("VIPR_WEIGHTS", "")
    places = sorted(Path(__file__).parents[1].rglob("*.py"))
    if weights:
        places.append(platform.home() / Path(weights).expanduser())
    if data := run.data():
        folders = [data / name for name in platform.GALLERIES + platform.QUERIES]
        places += [*sorted(data.glob("*.csv")), *folders]
    if run.reads_runs:
        records = runs.finished(output_dir)[0].items()
        earlier = [f for f, record in records if record["notebook"] < run.notebook.stem]
        places += [folder / "run.json" for folder in earlier]
    elif run.starts_from:
        folder = platform.find_run(run.params["model_run"], output_dir=str(output_dir))
        places.append(folder / "run.json")
    values = run.values | {"output_dir": "", "VIPR_PRECISION": os.environ.get("VIPR_PRECISION")}
    sources = ["".join(cell["source"]) for cell in json.loads(run.notebook.read_bytes())["cells"]]
    return joblib.hash([values, weights, sources, list(map(_state, places))])


def _state(place: Path) -> bytes | list:
    """What is there now: a file's content, or the names, sizes and times of a folder's files."""
    if place.is_file():
        return place.read_bytes()
    files = [(file, file.stat()) for file in sorted(place.rglob("*")) if file.is_file()]
    return [(str(file.relative_to(place)), s.st_size, s.st_mtime_ns) for file, s in files]


# ------------------------------------------------------------------------------------ in words


def _reason(done: subprocess.CompletedProcess) -> str:
    """Why a run failed: the last lines of its error, or that memory was too small."""
    if done.returncode == -9 or re.search("Kernel died|DeadKernelError", done.stdout):
        return f"the kernel was killed, most likely {NO_MEMORY}"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    tail = "\n".join(lines[-8:]) or f"papermill ended with code {done.returncode}"
    return f"{NO_MEMORY}\n{tail}" if MEMORY_SIGNS.search(tail) else tail


def _line(result: Result) -> str:
    """'ok    41 s  03_scratch_siamese', and for a failure the reason below."""
    spent = f"{result.status:4} {result.seconds:5.0f} s  {result.run.name}"
    return "\n     ".join([spent, *result.error.splitlines()])


# ----------------------------------------------------------------------------- command line


def options(parser: argparse.ArgumentParser) -> None:
    """What `run` and `submit` have in common."""
    add = parser.add_argument
    add("--output-dir", default="", help="instead of the notebooks' output_dir")
    add("-p", action="append", default=[], type=setting, metavar="name=value", help="of any run")
    add("--force", action="store_true", help="also run what was done before")
    add("--only", default="", help="beginning of a notebook or run name; several with commas")
    add("--dry-run", action="store_true", help="what each would take here; runs nothing")
    add("--jobs", type=int, default=0, help="rows at once; 0: one a GPU, else 2 cores each")
    add("--engine", choices=["local", "ray"], default="local", help="ray: its workers")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code stands at the head of this file."""
    parser = argparse.ArgumentParser("vipr run", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="parameter files, sweeps, or folders of them")
    options(parser)
    given = parser.parse_args(arguments)
    return execute(given.paths, given)


def execute(paths: list[str], given: argparse.Namespace) -> int:
    """Run, then say in five lines what came of it, the scoreboard in a file; the exit code."""
    values = dict(given.p)
    if given.output_dir:
        values["output_dir"] = str(Path(given.output_dir).resolve())
    engine = run_on_ray if given.engine == "ray" else run_all
    results, going = [], None
    try:
        todo = load_runs(paths, values, given.only)
        for run in todo:
            with naming(run.file):  # no kernel starts before all places are known to be right
                run.folder()
                run.data()
        if given.dry_run:
            table = plan.plan(todo)
            kernel.say(report.planned(table))
            return int(table["refused"].any())
        going = engine(todo, force=given.force, jobs=given.jobs)
        for result in going:
            kernel.say(_line(result))
            results.append(result)
    except BadParameters as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        if going:
            going.close()
        return 130
    folders = [result.run.folder() for result in results if result.status != "FAIL"]
    for output_dir in sorted({folder.parent for folder in folders}):
        table = runs.scoreboard(output_dir).to_csv(index=False)
        write_whole(output_dir / "scoreboard.csv", table)
        for line in report.closing([f for f in folders if f.parent == output_dir]):
            kernel.say(line)
    return int(len(folders) < len(results))
