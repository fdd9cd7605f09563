"""Run what computes as other processors would: `make processors`.

A processor's kind is a set of environment variables that switch the wider instructions of torch, oneDNN, numpy, OpenBLAS
and OpenCV off. Each line of PLAN is a run of pytest under one kind, precision and number of threads. Its table is printed;
exit code 1 when a line failed. Lines of one thread run two at a time.
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

COMPUTES = ["embedding", "losses", "metrics", "models", "pooling", "processors", "rerank", "search", "training"]
TESTS = [f"tests/test_{name}.py" for name in COMPUTES]
HALVES = ["tests/test_embedding.py", "tests/test_pooling.py", "tests/test_training.py"]
NBVAL = ["--nbval", "--nbval-sanitize-with", "tests/nbval.cfg"]
NOTEBOOKS = [*NBVAL, "notebooks/04_pretrained_sweep.ipynb", "notebooks/05_subset_finetune.ipynb"]
SLOW = "not killed and not real_photos and not by_two_processes"  # run once, by `make unit`


def plan() -> list[tuple[str, str, int, list[str]]]:
    """(kind, precision, threads, arguments of pytest), those that run side by side first."""
    float32 = [(kind, "float32", threads, TESTS) for kind in KINDS for threads in (1, 2)][1:]  # the first is `make unit`
    bfloat16 = [(kind, "bfloat16", threads, HALVES) for kind, threads in zip(KINDS, (2, 1, 1))]
    notebooks = [(kind, "float32", threads, NOTEBOOKS) for kind, threads in zip(KINDS, (2, 1, 1))]
    return sorted(float32 + bfloat16 + notebooks, key=lambda line: line[2])


def run(line: tuple[str, str, int, list[str]]) -> tuple[int, str, float]:
    """(exit code, pytest's own summary, seconds)."""
    kind, precision, threads, arguments = line
    environment = os.environ | KINDS[kind] | {"VIPR_PROCESSOR": kind, "VIPR_PRECISION": precision}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    command += [] if "--nbval" in arguments else ["-k", SLOW]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [text for text in done.stdout.splitlines() if text.strip()]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return done.returncode, lines[-1].strip("= ") if lines else "no output", time.monotonic() - start


def main() -> int:
    lines = plan()
    print("| processor | precision | threads | what | result | time |\n|---|---|---|---|---|---|", flush=True)
    single = [line for line in lines if line[2] == 1]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, single))
    results += [run(line) for line in lines if line[2] > 1]
    for (kind, precision, threads, arguments), (code, summary, seconds) in zip(lines, results):
        what = "notebooks 04, 05" if "--nbval" in arguments else "tests that compute" if arguments is TESTS else "small"
        result = summary if not code else f"FAILED: {summary}"
        print(f"| {kind} | {precision} | {threads} | {what} | {result} | {seconds:.0f} s |")
    return int(any(code for code, _, _ in results))


if __name__ == "__main__":
    sys.exit(main())
