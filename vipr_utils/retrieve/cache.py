"""Values that are computed once a row and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.host.files import whole_file
from vipr_utils.host.progress import reporter


def kept(folder: Path | None, rows: np.ndarray, compute: Callable, *, block: int) -> list:
    """The value of each of these rows (N,) of whole numbers; compute(rows) gives an array (N, ...).

    What the folder holds is taken from there; the rest is computed in blocks of so many rows, each
    on disk before the next begins. Files are only added; a damaged one is computed anew.
    Where it takes long LOG hears of it.
    Values are views of what was read or computed: in memory they are once.
    """
    if folder is None:
        return list(compute(rows))
    known = {}
    for file in sorted(folder.glob("*.npz")):
        known.update(_read(file, rows))
    missing = np.setdiff1d(rows, list(known))
    reached = reporter(folder.parent.name, len(missing))
    for start in range(0, len(missing), block):
        part = missing[start : start + block]
        values = compute(part)
        known.update(zip(part.tolist(), values))
        name = hashlib.sha256(part.tobytes()).hexdigest()[:16]
        with whole_file(folder / f"{name}.npz") as path, open(path, "wb") as file:
            np.savez(file, rows=part, values=values)
        reached(start + len(part))
    return [known[row] for row in rows.tolist()]


def absent(folder: Path | None, rows: np.ndarray) -> np.ndarray:
    """Those of the rows (N,) that `kept` would compute."""
    for file in folder.glob("*.npz") if folder else []:
        rows = np.setdiff1d(rows, list(_read(file, rows)))
    return rows


def place(cache_dir: Path | None, kind: str, photos: pd.DataFrame, rules: list) -> Path | None:
    """Folder of what is kept of these photos, one for each content of rules; None without a cache.

    rules: numbers and words that what is computed hangs on, beside the photos.
    """
    if cache_dir is None:
        return None
    told = json.dumps([*rules, photos.attrs["fingerprint"]])
    return Path(cache_dir) / kind / hashlib.sha256(told.encode()).hexdigest()[:24]


def _read(file: Path, rows: np.ndarray) -> dict:
    """row -> value of those of the rows that a file holds; {} where it is damaged."""
    try:
        with np.load(file) as part:  # an array is read when it is asked for
            wanted = np.isin(part["rows"], rows)
            if not wanted.any():
                return {}
            return dict(zip(part["rows"][wanted].tolist(), part["values"][wanted]))
    except Exception:  # a damaged file has many ways to fail
        return {}
