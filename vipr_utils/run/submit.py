"""Make a submission from a finished run: notebook 06 with that run as its model_run.

vipr submit RUN [--data DIR] [--output-dir DIR] [-p name=value ...] [--force]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from vipr_utils.run import batch
from vipr_utils.run.params import BadParameters, load_runs


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as those of `vipr run`."""
    parser = argparse.ArgumentParser("vipr submit", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="name or folder of a run with model.pt; best: by validation")
    parser.add_argument("--data", default="", help="data root, instead of the one found")
    batch.options(parser)
    given = parser.parse_args(arguments)
    values = batch.overrides(parser, given.p) | {"model_run": given.run}
    if given.data:
        values["data_root"] = str(Path(given.data).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "06_submission.yaml"
        file.touch()
        try:
            return batch.finish(batch.run_all, load_runs([file], values), given)
        except BadParameters as error:
            print(error, file=sys.stderr)
            return 2
