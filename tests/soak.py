"""The long part of the checks: calls that fail, kills, hostile files, fuzzing, a rehearsal: hours.

    python tests/soak.py                  all parts, one after the other: `make soak`
    python tests/soak.py calls fuzz       these alone

Each part is a program or a test of its own with larger numbers. What it says about itself goes into
benchmarks/soak.json as soon as it has ended, in place of what stood there. Exit code 1 where a part
failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from vipr_utils.host.device import hardware
from vipr_utils.host.files import write_whole

TESTS = Path(__file__).resolve().parent
RECORD = TESTS.parent / "benchmarks" / "soak.json"
KILLS = 50
FUZZ_S = 150  # for each target


def pytest(*arguments: str) -> list[str]:
    return ["-m", "pytest", "-p", "no:cacheprovider", "-s", *arguments]


def program(name: str, *arguments: str) -> list[str]:
    return ["-W", "ignore", str(TESTS / name), *arguments]


def commands(work: str) -> dict[str, tuple[list[str], dict]]:
    """Part -> (what Python is asked to run, variables)."""
    return {
        "calls": (pytest("tests/test_faults.py"), {"VIPR_FAULTS": "1"}),
        "series killed": (program("killed.py", f"{work}/killed", str(KILLS)), {}),
        "index killed": (
            pytest("tests/test_index.py", "-k", "kill_at_any"),
            {"VIPR_KILLS": str(KILLS)},
        ),
        "long": (program("long.py", f"{work}/long"), {}),
        "hostile": (pytest("tests/test_hostile.py"), {"VIPR_SOAK": "1"}),
        "series": (pytest("tests/test_series.py"), {"VIPR_SOAK": "1"}),
        "long tests": (pytest("tests", "-m", "long"), {"VIPR_SOAK": "1"}),
        "planted": (pytest("tests/test_planted.py"), {"VIPR_PLANTED": "1"}),
        "fuzz": (program("fuzz.py", str(FUZZ_S)), {}),
        "mutants": (program("mutants.py"), {}),
        "fiftieth": (["benchmarks/rehearsal.py", f"{work}/fiftieth", "--share", "0.02"], {}),
        "processors": (program("processors.py"), {}),
    }


def told(output: str) -> list[dict]:
    """Lines of JSON in what a part printed."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def run(part: str, command: list[str], variables: dict) -> dict:
    """What the part says, and whether it passed."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VIPR_PRECISION": "float32"} | variables
    environment["PYTHONPATH"] = str(TESTS.parent)
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = {
        "passed": ended.returncode == 0,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "told": told(ended.stdout),
    }
    if counted := re.findall(r"(\d+) (passed|failed|skipped)", ended.stdout):
        found["tests"] = {what: int(number) for number, what in counted}
    print(f"{part}: {'passed' if found['passed'] else ended.stdout[-4000:]}", flush=True)
    return found


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        every = commands(work)
        for part in sys.argv[1:] or every:
            found = run(part, *every[part])
            record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
            write_whole(RECORD, json.dumps(record | {part: found}, indent=1) + "\n")
            failed |= not found["passed"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
