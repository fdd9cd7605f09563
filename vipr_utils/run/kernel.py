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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from vipr_utils.host import platform
from vipr_utils.host.progress import clock

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
CELL = re.compile(r"Executing Cell (\d+)-")  # papermill's words
LOGGED = re.compile(r"\d\d:\d\d:\d\d vipr (.+)")  # by host.progress
POLL_S = 0.3
GRACE_S = 20.0  # for a kernel to save what it has


def papermill(
    notebook: Path, out: Path, values: dict, slot: dict, stop: threading.Event
) -> subprocess.CompletedProcess:
    """Execute a notebook with these values; stderr of what comes back is all that was logged.

    slot: environment variables. What papermill says, cells print and the kit logs goes to log.txt
    beside `out`, and a line a section or logged event to the terminal. Once `stop` is set the
    kernel is interrupted.
    """
    log = out.with_name("log.txt")
    story = Story(values["run_name"], sections(notebook), durations(out))
    log.write_bytes(b"")
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar"]
    command += ["--log-output", "-k", "python3", "-y", yaml.safe_dump(values)]
    say(story.line(f"begins: {notebook.name}, log in {log}{story.last_time()}"))
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
        _follow(process, log, story, stop)
    said = log.read_text(encoding="utf-8", errors="replace")
    return subprocess.CompletedProcess(command, process.returncode, "", said)


def _apart() -> dict:
    """How the process is started: Ctrl-C in the terminal reaches this one alone, which ends it; and
    where the system can do it, no kernel goes on when this one was killed.
    """
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True, "preexec_fn": _end_with_parent if LIBC else None}


def _end_with_parent() -> None:
    LIBC.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def _follow(process: subprocess.Popen, log: Path, story: Story, stop: threading.Event) -> None:
    """Write what the process says to its log, and what the log tells to the terminal."""
    with open(log, "ab", buffering=0) as file, open(log, "rb") as lines:
        pump = threading.Thread(target=shutil.copyfileobj, args=(process.stdout, file), daemon=True)
        pump.start()
        rest, ended = b"", False
        while not ended:
            if stop.wait(POLL_S):
                end(process)
                say(story.line("interrupted"))
            ended = process.poll() is not None
            if ended:
                pump.join(timeout=5)
            *whole, rest = (rest + lines.read()).split(b"\n")
            for line in whole:
                if told := story.told(line.decode(errors="replace").strip()):
                    say(told)


def end(process: subprocess.Popen) -> None:
    """Interrupt what a papermill has started, as Ctrl-C in the notebook would; after GRACE_S, kill.

    A kernel's cell ends with KeyboardInterrupt and papermill writes the notebook as it is. On
    Windows no other process can interrupt a kernel: papermill is ended, and its kernel with it.
    """
    with suppress(psutil.NoSuchProcess):
        papermill = psutil.Process(process.pid)
        started = papermill.children(recursive=True)
        if os.name == "nt":
            process.send_signal(signal.CTRL_BREAK_EVENT)
        for child in [] if os.name == "nt" else started or [papermill]:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        for left in [*started, papermill]:
            with suppress(psutil.NoSuchProcess):
                left.kill()


# ------------------------------------------------------------------------------- in the terminal


def say(line: str) -> None:
    """A line in the terminal, in one piece: runs side by side take turns."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Story:
    """What of a run's log is told in the terminal, each line with its name and the time."""

    name: str
    sections: list[str]  # of each cell
    earlier: list[float]  # seconds that each cell took the last time
    began: float = field(default_factory=time.monotonic)
    section: str = ""

    def line(self, text: str) -> str:
        return f"{self.name}  {clock(time.monotonic() - self.began):>5}  {text}"

    def told(self, line: str) -> str:
        """The terminal's line for one of the log, '' for none."""
        if logged := LOGGED.fullmatch(line):
            return self.line(logged[1])
        cell = CELL.match(line)
        at = int(cell[1]) - 1 if cell else -1
        section = self.sections[at] if 0 <= at < len(self.sections) else ""
        if section in ("", self.section):
            return ""
        self.section = section
        return self.line(f"{section}, {self.left(at)}")

    def left(self, at: int) -> str:
        """'about 2:05 left', by what these cells took the last time, or 'cell 7 of 30'"""
        if len(self.earlier) == len(self.sections):
            return f"about {clock(sum(self.earlier[at:]))} left"
        return f"cell {at + 1} of {len(self.sections)}"

    def last_time(self) -> str:
        return f"; it took {clock(sum(self.earlier))} the last time" if self.earlier else ""


def sections(notebook: Path) -> list[str]:
    """The section heading that each cell stands under, '' for prose, as papermill counts cells."""
    found, heading = [], ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## (.+)", "".join(cell["source"]), re.MULTILINE)
            heading = next(iter(headings), heading)
        found.append(heading if cell["cell_type"] == "code" else "")
        if "parameters" in cell["metadata"].get("tags", []):
            found.append("")  # papermill's own cell with the values
    return found


def durations(executed: Path) -> list[float]:
    """Seconds of each cell of an executed notebook; [] where there is none, or it did not end."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        return [float(cell["metadata"]["papermill"]["duration"]) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return []
