"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock

from vipr_utils.host import platform

FULL_DISK = re.compile(  # the last three are torch's words
    "No space left|Disk quota exceeded|over Kaggle's limit|"
    "file write failed|PytorchStreamWriter failed|unexpected pos"
)
ORPHAN_S = 24 * 3600  # age of a temporary file whose writer is of another machine
WAITS_S = (0.1, 0.5, 2.5)  # before a disk that failed is asked again
# also what is no name, and a link to itself
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


def retried(read, path: Path):
    """read(path), asked again after WAITS_S where the disk fails, as network disks do in passing.

    Raises FileNotFoundError at once, OSError with the file and the remedy at the end.
    """
    for wait_s in (*WAITS_S, 0):
        try:
            return read(path)
        except OSError as error:
            if error.errno in ABSENT:
                raise FileNotFoundError(error.errno, error.strerror) from error
            failure = error
            time.sleep(wait_s)
    message = (
        f"{path} cannot be read ({failure.strerror}), asked {len(WAITS_S) + 1} times: see to its "
        "disk or its permissions and run again; what was finished is kept"
    )
    raise OSError(failure.errno, message) from failure


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in here, by a lock on `folder`/.lock that ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, on any error the old
    file stays.

    Raises OSError (no space) with the file, the room left and the remedy; in
    /kaggle/working also when the file would pass the 20 GB that Kaggle keeps. PermissionError where
    Windows holds the old file, because some program has it open.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    part = path.with_name(f".{path.name}.{owner}-{secrets.token_hex(4)}.part")
    try:
        part.touch()
        yield part
        _flush(part, os.O_RDWR)
        if platform.is_kept(path.parent) and platform.room_gb(path.parent) < 0:
            raise OSError(f"over Kaggle's limit of {platform.KEPT_GB} GB in {path.parent}")
        os.replace(part, path)
        with suppress(OSError):  # not every system can: else a power cut may take the name back
            _flush(path.parent, os.O_RDONLY)
    except PermissionError as error:
        message = f"{path} cannot be replaced ({error}): close what has it open, then run again"
        raise PermissionError(error.errno, message) from error
    except Exception as error:
        if not FULL_DISK.search(str(error)):
            raise
        message = (
            f"disk full while writing {path.name} ({platform.room_gb(path.parent):.2f} GB free, "
            f"{error}): the file before it is untouched. Free space in {path.parent} or give "
            "another output_dir or cache_dir"
        )
        raise OSError(errno.ENOSPC, message) from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a `whole_file` at once; text as UTF-8."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _flush(path: Path, mode: int) -> None:
    """Have a file, or the names in a folder, on the disk before it returns."""
    opened = os.open(path, mode)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@cache
def _sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder: once for each process.

    It is that of processes of this machine that are gone, or nobody has touched it for a day.
    """
    for part in folder.glob(".*.part"):
        host, _, process = part.name.rpartition("-")[0].rpartition("-")
        with suppress(OSError):
            ours = host.endswith(f".{socket.gethostname()}") and process.isdigit()
            gone = ours and not psutil.pid_exists(int(process))
            if gone or time.time() - part.stat().st_mtime > ORPHAN_S:
                part.unlink()
