"""The parts of `make test` that are programs of their own: minutes each, so they start first and
the other tests run beside them. `make smoke` and `make sse4` run one by itself.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif("VIPR_WHOLE" not in os.environ, reason="`make test` sets $VIPR_WHOLE")
@pytest.mark.parametrize("target", ["smoke", "sse4"])
def test_it_passes(target):
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert not done.returncode, done.stderr[-3000:]
