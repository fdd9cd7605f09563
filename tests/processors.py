"""Run what computes as other processors would: `make processors`.

A processor's kind is a set of environment variables that switch the wider instructions of torch,
oneDNN, numpy, OpenBLAS and OpenCV off. Each name of RUNS is a run of pytest under one kind,
precision and number of threads; those named are run, without a name all, one after the other. Exit
code 1 when one failed.
"""

import os
import platform
import subprocess
import sys
import time
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
COMPUTES = [*NETWORK, "metrics", "rerank", "search"]
PAGE = "03_scratch_siamese"
SUITES = {
    "tests of networks": [f"tests/test_{name}.py" for name in NETWORK],
    "tests that compute": [f"tests/test_{name}.py" for name in COMPUTES],
    "tests of models and splits": ["tests/test_models.py", "tests/test_processors.py"],
    PAGE: ["--nbval", "--nbval-sanitize-with", "tests/nbval.cfg", f"notebooks/{PAGE}.ipynb"],
}
# Native with one thread is `make unit` and `make smoke`; a page is tried on the kind that is
# furthest from it.
RUNS = {  # name -> kind, precision, threads, suite
    "sse4-page": ("sse4", "float32", 1, PAGE),
    "sse4": ("sse4", "float32", 1, "tests that compute"),
    "sse4-models": ("sse4", "float32", 1, "tests of models and splits"),
    "avx2-bfloat16": ("avx2", "bfloat16", 1, "tests of networks"),
    "bfloat16-two-threads": ("native", "bfloat16", 2, "tests of networks"),
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
    "rates_fall",
    "rate_to_its_end",
    "milestones",
    "whole_on_disk",
    "session",
    "cut_short",
    "best_validated_epoch",
    "log_tells",
    "sends_nothing",
    "weights_come_from",
    "hubs_cache",
]


def run(kind: str, precision: str, threads: int, suite: str) -> int:
    """Exit code of pytest, whose own summary is printed; its output where it failed."""
    environment = os.environ | KINDS[kind] | {"VIPR_PROCESSOR": kind, "VIPR_PRECISION": precision}
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to others
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SUITES[suite]]
    if suite != PAGE:
        command += ["-k", "not " + " and not ".join(ONCE)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    lines = [text for text in done.stdout.splitlines() if text.strip()]
    summary = lines[-1].strip("= ") if lines else "no output"
    seconds = time.monotonic() - start
    print(f"{kind}, {precision}, threads: {threads}, {suite}: {summary}; {seconds:.0f} s in all")
    return done.returncode


def main(names: list[str]) -> int:
    codes = []
    for name in names:
        kind, *rest = RUNS[name]
        if kind in KINDS:
            codes.append(run(kind, *rest))
        else:
            print(f"{name}: not a kind of this processor")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(RUNS)))
