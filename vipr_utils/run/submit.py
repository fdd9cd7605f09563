"""Make a submission from a finished run: notebook 06 with that run as its model_run.

vipr submit RUN [--data DIR] [and the options of `vipr run`]
"""

import argparse

from vipr_utils.host import platform
from vipr_utils.run import batch


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as those of `vipr run`."""
    parser = argparse.ArgumentParser("vipr submit", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="name or folder of a run with model.pt; best: by validation")
    parser.add_argument("--data", default="", help="data root, instead of the one found")
    batch.options(parser)
    given = parser.parse_args(arguments)
    given.p += [("model_run", given.run), ("data_root", given.data)]
    return batch.execute([platform.home() / "notebooks" / "06_submission.ipynb"], given)
