"""Run what computes as other processors would: `make processors`.

A processor's kind is a set of environment variables that switch the wider instructions of torch,
oneDNN, numpy, OpenBLAS and OpenCV off. Each line of `plan` is a run of pytest under one kind,
precision and number of threads. Its table is printed; exit code 1 when a line failed. Lines of one
thread run two at a time.
"""

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__ as NUMPY_DISPATCHES

ROOT = Path(__file__).resolve().parents[1]


def without(*wider: str) -> str:
    """numpy's names of the instruction sets that it would dispatch to and whose name begins so."""
    return " ".join(name for name in NUMPY_DISPATCHES if name.startswith(wider))


KINDS = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": without("AVX512", "X86_V4"),
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENCV_CPU_DISABLE": "AVX512-SKX",
    },
    "sse4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NPY_DISABLE_CPU_FEATURES": without("AVX", "X86_V3", "X86_V4", "FMA", "F16C"),
        "OPENBLAS_CORETYPE": "Nehalem",
        "OPENCV_CPU_DISABLE": "AVX,FP16,AVX2,AVX512-SKX",
    },
}
if platform.machine() not in ("x86_64", "AMD64"):
    KINDS = {"native": {}}

NETWORK = ["embedding", "losses", "pooling", "training"]
COMPUTES = [*NETWORK, "metrics", "models", "processors", "rerank", "search"]
PAGE = "03_scratch_siamese"
SUITES = {
    "tests of networks": [f"tests/test_{name}.py" for name in NETWORK],
    "tests that compute": [f"tests/test_{name}.py" for name in COMPUTES],
    PAGE: ["--nbval", "--nbval-sanitize-with", "tests/nbval.cfg", f"notebooks/{PAGE}.ipynb"],
}
# Left to `make unit`, which runs native with one thread: they take long and say nothing of a
# processor.
ONCE = [
    "killed",
    "real_photos",
    "two_processes",
    "process_that_dies",
    "another_processor",
    "precision_learns",
    "budget",
    "verification_by_name",
    "checkpoint_of",
]


def plan() -> list[tuple[str, str, int, str]]:
    """(kind, precision, threads, suite), lines of one thread first, the longest at the start.

    Native with one thread is `make unit` and `make smoke`; a page is tried on the kind that is
    furthest from it.
    """
    lines = [("sse4", "float32", 1, suite) for suite in ("tests that compute", PAGE)]
    lines += [("avx2", "bfloat16", 1, "tests of networks")]
    lines = [line for line in lines if line[0] in KINDS]
    return [*lines, ("native", "bfloat16", 2, "tests of networks")]


def run(line: tuple[str, str, int, str]) -> tuple[int, str, float]:
    """(exit code, pytest's own summary, seconds)."""
    kind, precision, threads, suite = line
    environment = os.environ | KINDS[kind] | {"VIPR_PROCESSOR": kind, "VIPR_PRECISION": precision}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SUITES[suite]]
    if suite != PAGE:
        command += ["-k", "not " + " and not ".join(ONCE)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [text for text in done.stdout.splitlines() if text.strip()]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return (
        done.returncode,
        lines[-1].strip("= ") if lines else "no output",
        time.monotonic() - start,
    )


def main() -> int:
    lines = plan()
    single = [line for line in lines if line[2] == 1]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(single, pool.map(run, single)))
    for line in lines:
        if line not in results:
            results[line] = run(line)  # one at a time: threads that wait for a core spin
    print("| processor | precision | threads | what | result | time |\n|---|---|---|---|---|---|")
    for (kind, precision, threads, suite), (code, summary, seconds) in results.items():
        result = f"FAILED: {summary}" if code else summary
        print(f"| {kind} | {precision} | {threads} | {suite} | {result} | {seconds:.0f} s |")
    return int(any(code for code, _, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
