"""One command for the kit: `vipr run | submit | score | board | kaggle ...`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # name -> (module with a main, what it does)
    "run": ("run.batch", "run notebooks by their parameter files"),
    "submit": ("run.submit", "make a submission from a finished run"),
    "score": ("judge.submission", "check a submission and score it"),
    "board": ("judge.runs", "the table of a folder of runs"),
    "kaggle": ("run.kaggle", "take the kit to Kaggle and its results home"),
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments to the command named first; 2 for one that is unknown."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return importlib.import_module(f"vipr_utils.{COMMANDS[name][0]}").main(rest)
    print("usage: vipr COMMAND ..., or python -m vipr_utils COMMAND ...; --help after it\n")
    for command, (_, purpose) in COMMANDS.items():
        print(f"  {command:8}{purpose}")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
