"""What is printed on photos: lines of text, how sure each is, where it stands.

Read by rapidocr (https://github.com/RapidAI/RapidOCR, Apache-2.0) with PP-OCRv6, whose models lie
inside its wheel (extra `text`). Without it nothing can be read, and all else works as it does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import cv2
import joblib
import numpy as np
import pandas as pd

from vipr_utils.data.store import BrokenImage, read_image
from vipr_utils.host.device import cores
from vipr_utils.retrieve.cache import absent, kept, place

VERSION = 1  # of what is cached: rises with the code that reads
PX = 640  # longest side of the picture that is read
ENLARGED = 2.0  # a small photo at most so many times
MOST_LINES = 100  # of a photo, the surest
MOST_CHARACTERS = 100  # of a line
SAMPLE = 16  # photos by which time is estimated
BATCH = 8  # photos that a process is handed at once
FEW = 32  # photos for which no process is started
ABSENT = (
    "nothing is read: text on packages takes part where rapidocr is installed, "
    "pip install 'vipr-utils[text]'"
)


class Line(NamedTuple):
    """A line of text: confidence 0..1, box (left, top, right, bottom) in shares of the photo."""

    text: str
    confidence: float
    box: tuple[float, float, float, float]


def available() -> bool:
    """Whether the extra `text` is installed."""
    return all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime"))


def lines(photos: pd.DataFrame, *, cache_dir: Path | None = None) -> list[list[Line]]:
    """The lines on each of the catalog rows given, from their original files.

    Photos are read by a process a core, up to FEW by this one; one that cannot be opened has none.
    With cache_dir a photo is read once. Raises ValueError where the extra `text` is not installed.
    """
    if not available():
        raise ValueError(ABSENT)
    paths = (Path(photos.attrs["root"]) / photos["path"]).to_dict()

    def read(rows: np.ndarray) -> np.ndarray:
        parts = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        tasks = [joblib.delayed(_read)([paths[row] for row in part]) for part in parts]
        found = joblib.Parallel(cores() if len(rows) > FEW else 1)(tasks)
        return np.array([json.dumps(photo).encode() for part in found for photo in part])

    found = kept(_place(cache_dir, photos), photos.index.to_numpy(), read, block=256)
    return [[Line(text, sure, tuple(box)) for text, sure, box in json.loads(x)] for x in found]


def seconds(photos: pd.DataFrame, *, cache_dir: Path | None = None) -> float:
    """About how long this machine takes to read those of these photos that cache_dir lacks, by
    SAMPLE of them.

    All cores are at work, and that each process starts its engine once is not counted. Raises
    ValueError where the extra `text` is not installed.
    """
    if not available():
        raise ValueError(ABSENT)
    photos = photos.loc[absent(_place(cache_dir, photos), photos.index.to_numpy())]
    if photos.empty:
        return 0.0
    some = photos.sample(min(SAMPLE, len(photos)), random_state=0)
    paths = Path(photos.attrs["root"]) / some["path"]
    took = joblib.Parallel(cores())(joblib.delayed(_timed)(path) for path in paths)
    return sum(took) / len(some) * len(photos) / cores()


def _place(cache_dir: Path | None, photos: pd.DataFrame) -> Path | None:
    release = importlib.metadata.version("rapidocr")
    rules = [VERSION, PX, ENLARGED, MOST_LINES, MOST_CHARACTERS, release, _fast()]
    return place(cache_dir, "text", photos, rules)


def _timed(path: Path) -> float:
    """Seconds that it takes to read a file."""
    _engine()
    began = perf_counter()
    _read([path])
    return perf_counter() - began


def _read(paths: list[Path]) -> list[list[tuple]]:
    """What stands on these files, as the fields of `Line`."""
    engine = _engine()
    found = []
    for path in paths:
        try:
            image = read_image(path, least_px=PX)
        except BrokenImage:
            found.append([])
        else:
            found.append(_lines_of(image, engine))
    return found


def _lines_of(image: np.ndarray, engine) -> list[tuple]:
    scale = min(ENLARGED, PX / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    seen = engine(cv2.cvtColor(cv2.resize(image, size, interpolation=how), cv2.COLOR_RGB2BGR))
    if not seen.txts:
        return []
    corners = np.asarray(seen.boxes) / size  # (lines, 4, 2)
    boxes = np.hstack([corners.min(1), corners.max(1)]).round(4).tolist()
    found = [
        (text[:MOST_CHARACTERS], round(float(sure), 4), box)
        for text, sure, box in zip(seen.txts, seen.scores, boxes)
    ]
    return sorted(found, key=lambda line: -line[1])[:MOST_LINES]


def _fast() -> bool:
    """Whether the extra `fast` is installed."""
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def _engine():
    """The reader of this process, of one thread: on a GPU where onnxruntime has one, else by
    OpenVINO where it is installed (extra `fast`; 126 ms a photo of the grocery set against 453).
    """
    import onnxruntime
    from rapidocr import EngineType, RapidOCR

    on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    engine = EngineType.OPENVINO if _fast() and not on_gpu else EngineType.ONNXRUNTIME
    return RapidOCR(
        params={
            **{f"{stage}.engine_type": engine for stage in ("Det", "Cls", "Rec")},
            "EngineConfig.onnxruntime.use_cuda": on_gpu,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.openvino.inference_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": PX,
            "Global.log_level": "critical",
        }
    )
