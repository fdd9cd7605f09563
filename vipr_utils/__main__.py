"""One command for the kit: `python -m vipr_utils run | score | board | kaggle ...`, also the script `vipr`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # name -> (module with a main, what it does)
    "run": ("vipr_utils.run.batch", "run notebooks by their parameter files"),
    "score": ("vipr_utils.judge.submission", "check a submission and score it"),
    "board": ("vipr_utils.judge.runs", "the table of a folder of runs"),
    "kaggle": ("vipr_utils.run.kaggle", "take the kit to Kaggle and its results home"),
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments to the command named first; 2 for one that is unknown."""
    name, *rest = sys.argv[1:] if arguments is None else arguments
    if name not in COMMANDS:
        lines = [f"  {command:8}{what}" for command, (_, what) in COMMANDS.items()]
        print("usage: python -m vipr_utils COMMAND ...", *lines, sep="\n", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
