"""One notebook under papermill: started, followed in its log, ended when asked."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from vipr_utils.host import platform
from vipr_utils.host.progress import clock

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# What is told in the terminal: papermill's words for a cell, or an event by host.progress
EVENT = re.compile(rb"^(?:Executing Cell (\d+)-|\d\d:\d\d:\d\d vipr (.*\S))", re.MULTILINE)
POLL_S = 0.3
GRACE_S = 20.0  # for a kernel to save what it has


def papermill(
    notebook: Path, out: Path, values: dict, slot: dict, stop: threading.Event
) -> subprocess.CompletedProcess:
    """Execute a notebook with these values; stdout of what comes back is all that was logged.

    slot: environment variables. What papermill says, cells print and the kit logs goes to log.txt
    beside `out`, and a line a section or logged event to the terminal. Once `stop` is set the
    kernel is interrupted.
    """
    log, took = out.with_name("log.txt"), durations(out)
    log.write_bytes(b"")
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar"]
    command += ["--log-output", "-k", "python3", "-y", yaml.safe_dump(values)]
    began, last_time = time.monotonic(), f"; it took {clock(sum(took))} the last time"

    def tell(text: str) -> None:
        say(f"{values['run_name']}  {clock(time.monotonic() - began)}  {text}")

    tell(f"begins: {notebook.name}, log in {log}" + (last_time if took else ""))
    with subprocess.Popen(
        command,
        bufsize=0,  # a line is in the log when it was said
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=platform.home(),
        env=os.environ | slot | {"VIPR_LOG": str(log), "PYTHONIOENCODING": "utf-8:replace"},
        **_apart(),
    ) as process:
        _follow(process, log, sections(notebook, took), tell, stop)
    said = log.read_text(encoding="utf-8", errors="replace")
    return subprocess.CompletedProcess(command, process.returncode, said)


def _apart() -> dict:
    """How the process is started: Ctrl-C in the terminal reaches this one alone, which ends it; and
    where the system can do it, no kernel goes on when this one was killed.
    """
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True, "preexec_fn": _end_with_parent if LIBC else None}


def _end_with_parent() -> None:
    LIBC.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def _follow(
    process: subprocess.Popen,
    log: Path,
    told: dict[int, str],
    tell: Callable,
    stop: threading.Event,
) -> None:
    """Write what the process says to its log, and tell of its events until it ends.

    told: what to say when a cell begins.
    """
    with open(log, "ab", buffering=0) as file, open(log, "rb") as lines:
        pump = threading.Thread(target=shutil.copyfileobj, args=(process.stdout, file), daemon=True)
        pump.start()
        rest, going = b"", True
        while going:
            if stop.wait(POLL_S):
                end(process)
                tell("interrupted")
            going = process.poll() is None
            if not going:
                pump.join(5)
            whole, _, rest = (rest + lines.read()).rpartition(b"\n")
            for cell, logged in EVENT.findall(whole):
                if text := logged.decode(errors="replace") or told.get(int(cell)):
                    tell(text)


def end(process: subprocess.Popen) -> None:
    """Interrupt what a papermill has started, as Ctrl-C in the notebook would; after GRACE_S, kill.

    A kernel's cell ends with KeyboardInterrupt and papermill writes the notebook as it is. On
    Windows no other process can interrupt a kernel: papermill is ended, and its kernel with it.
    """
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        if os.name == "nt":
            process.send_signal(signal.CTRL_BREAK_EVENT)
        for child in [] if os.name == "nt" else started:
            child.send_signal(signal.SIGINT)
        for left in psutil.wait_procs(started, timeout=GRACE_S)[1]:
            left.kill()
        if not started:
            process.kill()


def say(line: str) -> None:
    """A line in the terminal, in one piece: runs side by side take turns."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def sections(notebook: Path, took: list[float]) -> dict[int, str]:
    """{first cell with code of a section: 'Counts, about 0:02:05 left'}, as papermill counts cells.

    took: seconds of each cell the last time; without it the place is told, 'cell 7 of 30'.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found, at, heading = {}, 0, ""
    for cell in cells:
        at += 1
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## (.+)", "".join(cell["source"]), re.MULTILINE)
            heading = next(iter(headings), heading)
        elif heading:
            left = f"about {clock(sum(took[at - 1 :]))} left"
            found[at] = f"{heading}, {left if took else f'cell {at} of {len(cells) + 1}'}"
            heading = ""
        at += "parameters" in cell["metadata"].get("tags", [])  # papermill's own follows
    return found


def durations(executed: Path) -> list[float]:
    """Seconds of each cell of an executed notebook; [] where there is none, or it did not end."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        return [float(cell["metadata"]["papermill"]["duration"]) for cell in cells]
    return []
