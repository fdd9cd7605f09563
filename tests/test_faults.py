"""Files that matter while system calls under them fail, or end the process; see faults.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEP = int(os.environ.get("VIPR_FAULTS", 97))  # 1: every call, minutes
CASES = 12


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """What stands between Python and the C library."""
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, called cc")
    built = tmp_path_factory.mktemp("shim") / "faults.so"
    source = str(HERE / "faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return built


def test_a_call_that_fails_or_kills_leaves_the_file_of_before_or_after(shim, tmp_path):
    machine = {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "faults.py", shim, tmp_path / "work", str(STEP)],
        env=os.environ | machine,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    cases = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == CASES and all(case["kills"] > 0 for case in cases)
    print(told.stdout)
