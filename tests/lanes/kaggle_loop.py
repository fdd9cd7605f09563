"""The whole series as it goes to Kaggle and comes home, on one machine: bundled, prepared, pushed
to a fake of Kaggle's service by the official client, executed there, collected, submitted, scored.

    python tests/lanes/kaggle_loop.py WORK

The values are those of params/smoke on the toy set. Every command is a process of its own, as a
user types it; every kernel runs under papermill, offline, in a tree like Kaggle's (`Session`).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kaggle_service import Service, Session  # noqa: E402

from vipr_utils.data import toy  # noqa: E402
from vipr_utils.run import kaggle  # noqa: E402


def vipr(service: Service, home: Path, *arguments: object) -> None:
    """One command in the folder `home`; a failure ends the rehearsal."""
    command, started = [str(argument) for argument in arguments], time.monotonic()
    print("$ vipr", *command, flush=True)
    environment = os.environ | service.environment
    environment |= {"HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = f"import sys; from vipr_utils.run import kaggle; kaggle.POLL_S = {POLL_S}; "
    code += "from vipr_utils.__main__ import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, *command], cwd=home, env=environment, check=True)
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


POLL_S = 0.5  # instead of a minute


def main(work: str) -> None:
    home, sessions = Path(work).resolve() / "home", Path(work).resolve() / "sessions"
    for folder in (home, sessions):
        remove(folder)
        folder.mkdir(parents=True)
    data, smoke = toy.generate(Path(work).resolve() / "toy"), ROOT / "params" / "smoke"
    session = Session(sessions, {kaggle.COMPETITION: data})
    with Service(competitions=[kaggle.COMPETITION], run=session) as service:
        vipr(service, home, "kaggle", "bundle", "--owner", service.owner)
        vipr(service, home, "kaggle", "weights", "--owner", service.owner, smoke)
        vipr(service, home, "kaggle", "prepare", "--owner", service.owner, smoke)
        folders = sorted((home / "kaggle").iterdir())
        kernels = [folder for folder in folders if (folder / kaggle.KERNEL).is_file()]
        vipr(service, home, "kaggle", "push", *folders)
        vipr(service, home, "kaggle", "wait", kernels[-1])
        vipr(service, home, "kaggle", "collect", *kernels)
        vipr(service, home, "kaggle", "submit", "submissions/06_submission")
        vipr(service, home, "score", "submissions/06_submission/submission.csv", data)
        vipr(service, home, "board", "submissions")
    for name, seconds in session.seconds.items():
        print(f"{seconds:6.0f} s  {name}")
    remove(sessions)


def remove(folder: Path) -> None:
    """Also what is read-only."""
    for path in folder.rglob("*") if folder.exists() else []:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
