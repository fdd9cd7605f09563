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
    log, last_s = out.with_name("log.txt"), duration_s(out)
    log.write_bytes(b"")
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar"]
    command += ["--log-output", "-k", "python3", "-y", yaml.safe_dump(values)]
    began, last_time = time.monotonic(), f" of {clock(last_s)} last time" if last_s else ""

    def tell(text: str) -> None:
        say(f"{values['run_name']}  {clock(time.monotonic() - began)}{last_time}  {text}")

    tell(f"begins: {notebook.name}, log in {log}")
    with subprocess.Popen(
        command,
        bufsize=0,  # a line is in the log when it was said
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=platform.home(),
        env=os.environ | slot | {"VIPR_LOG": str(log), "PYTHONIOENCODING": "utf-8:replace"},
        # apart from this process, so that Ctrl-C in the terminal reaches this one alone
        start_new_session=os.name != "nt",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        preexec_fn=_end_with_parent if LIBC else None,
    ) as process:
        _follow(process, log, sections(notebook), tell, stop)
    said = log.read_text(encoding="utf-8", errors="replace")
    return subprocess.CompletedProcess(command, process.returncode, said)


def _end_with_parent() -> None:
    """No kernel goes on when the process that waits for it was killed."""
    LIBC.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def _follow(
    process: subprocess.Popen,
    log: Path,
    told: dict[int, str],
    tell: Callable,
    stop: threading.Event,
) -> None:
    """Write what the process says to its log, and tell of its events until it ends.

    told: what to say when a cell begins, by its number.
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
    with suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
        started = psutil.Process(process.pid).children(recursive=True)
        for heard in [process] if os.name == "nt" else started:
            heard.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
        for left in psutil.wait_procs(started, timeout=GRACE_S)[1]:
            left.kill()
        process.wait(GRACE_S if started else 0)  # it writes the notebook
    process.kill()


def say(line: str) -> None:
    """A line in the terminal, in one piece: runs side by side take turns."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def sections(notebook: Path) -> dict[int, str]:
    """{cell: 'Counts, cell 9 of 36'} where the code of a section begins, as papermill counts."""
    found, at, heading = {}, 0, ""
    cells = json.loads(notebook.read_bytes())["cells"]
    for cell in cells:
        at += 1
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and heading:
            found[at], heading = f"{heading}, cell {at} of {len(cells) + 1}", ""
        elif text.startswith("## "):
            heading = text[3:].partition("\n")[0]
        at += "parameters" in cell["metadata"].get("tags", [])  # papermill's own follows
    return found


def duration_s(executed: Path) -> float:
    """Seconds that an executed notebook took; 0 where there is none."""
    with suppress(Exception):  # it tells none, or is no notebook
        notebook = json.loads(executed.read_bytes())
        return float(notebook["metadata"]["papermill"]["duration"])
    return 0.0
