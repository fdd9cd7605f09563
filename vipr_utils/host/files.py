"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vipr_utils.host import platform

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in here, by a lock file in `folder` that ends with its process; on
    Windows no lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, on any error the old
    file stays.

    Raises OSError (no space) with the file, what was written, the room left and the remedy; in
    /kaggle/working also when the file would pass the 20 GB that Kaggle keeps.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if (
            platform.is_kept(path.parent) and platform.room_gb(path.parent) < 0
        ):  # of what the disk has, not of what is kept
            raise OSError(errno.EDQUOT, "over Kaggle's limit")
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # mkstemp gives 0600
        os.replace(part, path)
    except Exception as error:
        if _is_full_disk(error):
            written, free = part.stat().st_size / 1e9, platform.room_gb(path.parent)
            limit = (
                f", and {platform.KAGGLE_WORKING} keeps {platform.KEPT_GB} GB"
                if platform.is_kept(path.parent)
                else ""
            )
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {path.name} ({written:.2f} GB written, {free:.2f} GB "
                f"free{limit}): the file before it is untouched. Free space in {path.parent} or "
                "give another output_dir or cache_dir",
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _is_full_disk(error: BaseException) -> bool:
    """ENOSPC, also where torch's writer hides it in a RuntimeError."""
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        getattr(errno, "EDQUOT", errno.ENOSPC),
    ):
        return True
    hidden = isinstance(error, RuntimeError) and any(
        s in str(error)
        for s in ("No space left", "file write failed", "PytorchStreamWriter failed")
    )
    return hidden or (error.__context__ is not None and _is_full_disk(error.__context__))
