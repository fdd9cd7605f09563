"""Values that are computed once a row and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import numpy as np

from vipr_utils.host.files import whole_file

LOG = logging.getLogger("vipr")
QUIET_S = 30.0  # between two lines of progress


def kept(folder: Path | None, rows: np.ndarray, compute: Callable, *, block: int) -> np.ndarray:
    """The values (N, ...) of these rows (N,) of whole numbers, of which compute(rows) gives some.

    What the folder holds is taken from there; the rest is computed in blocks of so many rows, each
    on disk before the next begins. Files are only added; a damaged one is computed anew. In memory
    are the values, once, and one block.
    """
    if folder is None or len(rows) == 0:
        return compute(rows)
    distinct, places = np.unique(rows, return_inverse=True)
    missing, found = np.ones(len(distinct), bool), None
    for at, values in _stored(folder, distinct):
        found = _filled(found, len(distinct), at, values)
        missing[at] = False

    todo, began, told = np.flatnonzero(missing), monotonic(), monotonic()
    for start in range(0, len(todo), block):
        at = todo[start : start + block]
        values = compute(distinct[at])
        found = _filled(found, len(distinct), at, values)
        name = hashlib.sha256(distinct[at].tobytes()).hexdigest()[:16]
        with whole_file(folder / f"{name}.npz") as path, open(path, "wb") as file:
            np.savez(file, rows=distinct[at], values=values)
        if monotonic() - told > QUIET_S:
            told = monotonic()
            LOG.info(_progress(folder.parent.name, start + len(at), len(todo), told - began))
    return found if np.array_equal(distinct, rows) else found[places]


def _progress(what: str, done: int, total: int, seconds: float) -> str:
    """'pooled: 8,192 of 196,931 computed, 310 a second, 10 minutes left'"""
    speed = done / seconds
    left = (total - done) / speed / 60
    return f"{what}: {done:,} of {total:,} computed, {speed:.3g} a second, {left:.0f} minutes left"


def _filled(found: np.ndarray | None, size: int, at: np.ndarray, values) -> np.ndarray:
    """found (size, ...), made where it is not there yet, with values at these places."""
    if found is None:
        found = np.empty((size, *values.shape[1:]), values.dtype)
    found[at] = values
    return found


def _stored(folder: Path, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places, values) of those of the rows (sorted) that a file holds, of each file that is
    whole."""
    for file in sorted(folder.glob("*.npz")):
        try:
            with np.load(file) as part:  # an array is read when it is asked for
                at = np.searchsorted(rows, part["rows"]).clip(max=len(rows) - 1)
                wanted = rows[at] == part["rows"]
                if wanted.any():
                    yield at[wanted], part["values"][wanted]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            continue
