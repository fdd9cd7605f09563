"""usage: vipr COMMAND ..., or python -m vipr_utils COMMAND ...; --help after it says more

run     run notebooks by their parameter files
submit  make a submission from a finished run
score   check a submission and score it
index   a catalogue that lives: build, add, remove, search
page    every query and its answers, as a page to look things up
board   the table of a folder of runs
kaggle  take the kit to Kaggle and its results home
"""

import importlib
import sys

COMMANDS = {  # name -> module with a main
    "run": "run.batch",
    "submit": "run.submit",
    "score": "judge.submission",
    "index": "run.index",
    "page": "judge.page",
    "board": "judge.runs",
    "kaggle": "run.kaggle",
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments to the command named first; 2 for one that is unknown, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a Windows terminal may lack a letter of a name
        stream.reconfigure(errors="replace")
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        try:
            return importlib.import_module(f"vipr_utils.{COMMANDS[name]}").main(rest)
        except KeyboardInterrupt:
            return 130
    print(__doc__)
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
