"""The part of `make test` that is a program of its own: minutes, so it starts first and the other
tests run beside it. `make smoke` runs it by itself.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif("VIPR_WHOLE" not in os.environ, reason="`make test` sets $VIPR_WHOLE")
def test_smoke_series_passes():
    done = subprocess.run(["make", "smoke"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert not done.returncode, done.stderr[-3000:]
