"""Where the kit runs: Kaggle, Colab or a machine of yours, its folders, what is met there."""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from vipr_utils.host.device import cores, hardware, memory_gb, tune, working_device

MARKER = "train.csv"  # a data root is a folder that holds one whose header starts with name,class


IMAGE_FOLDERS = {"train", "test", "images", "img"}  # never listed: they may hold 142,000 files


PLATFORM_ROOT = Path(
    os.environ.get("VIPR_PLATFORM_ROOT", "/")
)  # another one holds a rehearsal's /kaggle and /content


KAGGLE_INPUT, KAGGLE_WORKING, KAGGLE_TEMP = (
    PLATFORM_ROOT / "kaggle" / n for n in ("input", "working", "temp")
)


COLAB_CONTENT = PLATFORM_ROOT / "content"


KEPT_GB = 20  # what Kaggle keeps of /kaggle/working; more makes the run fail at its end


SESSION_HOURS = {"kaggle": 12, "colab": 12}


def where() -> str:
    """'kaggle', 'colab' or 'local', from the environment variables that also reach a papermill
    kernel.
    """
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") else "local"


def repository() -> Path | None:
    """The checkout this package runs from, None when it was installed or attached without one."""
    folder = Path(__file__).resolve().parents[2]
    return (
        folder
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir()
        else None
    )


def find_data_root(given: str = "") -> tuple[Path | None, str]:
    """(data root, how it was found): the parameter, $VIPR_DATA, one attached on Kaggle or Colab,
    else (None, 'toy').

    Raises FileNotFoundError when a folder was named and holds no train.csv.
    """
    for value, how in (
        (given, "parameter data_root"),
        (os.environ.get("VIPR_DATA", ""), "$VIPR_DATA"),
    ):
        if value:
            folder = Path(value).expanduser()
            if not folder.is_absolute() and not folder.exists() and repository():
                folder = repository() / folder
            if not (folder / MARKER).is_file():
                what = f"has no {MARKER}" if folder.is_dir() else "does not exist"
                raise FileNotFoundError(
                    f"{how}: {value} {what}. Expected a folder with train.csv (name,class,group), "
                    "test.csv and the image folders train/ and test/; leave it empty for the toy "
                    "set."
                )
            return folder.resolve(), how
    return _attached() or (None, "toy")


def _attached() -> tuple[Path, str] | None:
    """A data root mounted by the platform; one that has its images goes before one that is only
    tables.
    """
    kagglehub = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    drive = COLAB_CONTENT / "drive" / "MyDrive"
    places = {
        "kaggle": {
            KAGGLE_INPUT: 4
        },  # competitions/slug, datasets/owner/slug or slug, and a folder below
        "colab": {
            COLAB_CONTENT: 2,
            drive: 2,
            KAGGLE_INPUT: 4,
            kagglehub: 5,
        },  # datasets/owner/slug/versions/1
    }
    tables_only = None
    for place, depth in places.get(where(), {}).items():
        for folder in _walk(place, depth):
            found = folder, f"attached: {folder.relative_to(place)}"
            if (folder / "train").is_dir():
                return found
            tables_only = tables_only or found
    return tables_only


def attached(name: str) -> list[Path]:
    """Files or folders of this (relative) name in what the platform has mounted: at the root of an
    input, or one below.

    Both mount schemes of datasets, the outputs of notebooks, and models; image folders are not
    listed.
    """
    mounts = ("*", "datasets/*/*", "notebooks/*/*", "models/*/*/*/*/*")
    patterns = (
        [f"{mount}{below}/{glob.escape(name)}" for mount in mounts for below in ("", "/*")]
        if where() != "local"
        else []
    )
    return list(
        dict.fromkeys(found for pattern in patterns for found in sorted(KAGGLE_INPUT.glob(pattern)))
    )


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Data roots at or below `folder`, nearest first; image folders are never listed."""
    level = [folder]
    for _ in range(depth + 1):
        yield from filter(_is_data_root, level)
        level = [child for parent in level for child in _subfolders(parent)]


def _is_data_root(folder: Path) -> bool:
    try:
        with open(folder / MARKER, encoding="utf-8-sig") as file:
            return re.sub(r'[\s"]', "", file.readline(1000)).startswith("name,class")
    except (OSError, UnicodeDecodeError):
        return False


def _subfolders(folder: Path) -> list[Path]:
    """Folders in it but image folders, as far as the first 500 entries tell: more are images by
    another name.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                Path(e)
                for e in islice(entries, 500)
                if e.is_dir() and e.name.lower() not in IMAGE_FOLDERS
            )
    except OSError:
        return []


def cache_folder(given: str = "") -> Path:
    """Scratch that may be lost: the parameter, $VIPR_CACHE, the platform's scratch disk,
    ~/.cache/vipr. Created.
    """
    usual = {"kaggle": KAGGLE_TEMP / "vipr", "colab": COLAB_CONTENT / "vipr_cache"}
    default = usual.get(where(), Path.home() / ".cache" / "vipr")
    folder = Path(given or os.environ.get("VIPR_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_folder(given: str = "submissions") -> Path:
    """Where runs are kept; a relative one lies in /kaggle/working, on Colab in the mounted Drive's
    vipr/ or in /content, elsewhere in the checkout, else in here. Created.
    """
    drive = COLAB_CONTENT / "drive" / "MyDrive"
    kept = {"kaggle": KAGGLE_WORKING, "colab": drive / "vipr" if drive.is_dir() else COLAB_CONTENT}
    folder = kept.get(where(), repository() or Path.cwd()) / Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(output_dir: str, run_name: str) -> Path:
    """<output_dir>/<run_name>/, created. Raises ValueError for no plain folder name."""
    if not run_name or run_name in (".", "..") or set(run_name) & set('/\\:*?"<>|\0\n'):
        raise ValueError(
            f"run_name {run_name!r} is no plain folder name: use letters, digits, '-', '_' and '.'"
        )
    folder = output_folder(output_dir) / run_name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_run(model_run: str, *, output_dir: str = "submissions") -> Path:
    """Folder of an earlier run with a model.pt: by name in output_dir, by its path, or among
    attached notebooks' outputs.
    """
    own = output_folder(output_dir) / model_run
    places = [own, Path(model_run), *attached(f"submissions/{model_run}"), *attached(model_run)]
    return next((folder for folder in places if (folder / "model.pt").is_file()), own)


def room_gb(folder: Path) -> float:
    """GB (1e9 bytes) that may still be written below `folder`: its disk, and in /kaggle/working
    what is left of 20 GB.
    """
    free = shutil.disk_usage(folder).free / 1e9
    return min(free, KEPT_GB - _size_gb(KAGGLE_WORKING)) if is_kept(folder) else free


def is_kept(folder: Path) -> bool:
    return where() == "kaggle" and Path(folder).resolve().is_relative_to(KAGGLE_WORKING.resolve())


def _size_gb(folder: Path) -> float:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files if file.exists()) / 1e9


def git_revision() -> str:
    """Short commit of the checkout, with '+' when files differ from it; '' without git."""
    try:
        return _git("rev-parse", "--short", "HEAD") + (
            "+" if _git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    if not repository():
        raise FileNotFoundError("no checkout")
    options = {
        "cwd": repository(),
        "capture_output": True,
        "text": True,
        "timeout": 10,
        "check": True,
    }
    return subprocess.run(["git", *arguments], **options).stdout.strip()


def preflight(params: dict) -> pd.DataFrame:
    """Set up threads and memory, and say what this notebook will meet here.

    (8 rows) item -> found, to do; what would cost hours is also warned of.

    `params` are the notebook's. The device by a real operation, memory, room for outputs and
    caches, data, weights, and the time that the same parameters took here before, by the run.json
    of that run.
    """
    tune()
    given = {
        "device": "auto",
        "data_root": "",
        "output_dir": "submissions",
        "cache_dir": "",
        "weights": "auto",
    } | params
    try:
        data, how = find_data_root(given["data_root"])
        rows = {
            "data": (f"{data.name}, {how.split(':')[0]}" if data else "toy set (generated)", "")
        }
    except FileNotFoundError as error:
        data, rows = None, {"data": (given["data_root"] or "$VIPR_DATA", str(error))}
    out, cache = output_folder(given["output_dir"]), cache_folder(given["cache_dir"])
    rows |= {"machine": _machine(), "device": _device(given, data), "memory": _memory()}
    rows |= {
        "outputs": _disk(out, 2, "runs may not fit"),
        "cache": _disk(cache, 30 if data else 1, "photos may not fit"),
    }
    if is_kept(cache):
        rows["cache"] = (
            rows["cache"][0],
            f"counts against the {KEPT_GB} GB: leave cache_dir empty",
        )
    rows["weights"] = (_weights(given["weights"]), "")
    rows["time"] = _time(params, data, out)
    for item, (found, todo) in rows.items():
        if todo:
            warnings.warn(f"{item}: {found}: {todo}", stacklevel=2)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["found", "to do"])


def _machine() -> tuple[str, str]:
    return (
        f"{where()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{cores()} cores",
        "",
    )


def _device(given: dict, data: Path | None) -> tuple[str, str]:
    """The device that computes; on a platform, real photos and training on a CPU are hours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = working_device(given["device"])
        except RuntimeError as error:
            return given["device"], str(error)
    if found.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, works", ""
    todo = str(caught[0].message) if caught else ""
    if not todo and data and where() != "local" and given.get("epochs"):
        menu = (
            "Settings > Accelerator > GPU T4 x2"
            if where() == "kaggle"
            else "Runtime > Change runtime type > T4 GPU"
        )
        todo = f"training takes hours without a GPU: choose {menu}"
    return str(found), todo


def _memory() -> tuple[str, str]:
    everything, available = memory_gb()
    todo = "kernels die below 3 GB: close others" if everything and available < 3 else ""
    return f"{available:.0f} of {everything:.0f} GB available", todo


def _disk(folder: Path, needed_gb: float, risk: str) -> tuple[str, str]:
    room, limit = room_gb(folder), f" of {KEPT_GB} GB kept" if is_kept(folder) else ""
    return f"{room:.0f} GB{limit} free", f"{risk}, free {needed_gb} GB" if room < needed_gb else ""


def _weights(weights: str) -> str:
    """Where weights may come from; models.find_weights names the file."""
    if weights != "auto":
        return "random" if weights == "none" else weights
    folders = [p.parent.name for p in attached("SHA256SUMS")]
    folders += (
        [f"$VIPR_WEIGHTS, {Path(os.environ['VIPR_WEIGHTS']).name}"]
        if os.environ.get("VIPR_WEIGHTS")
        else []
    )
    return f"attached: {', '.join(folders)}" if folders else "an installed package, else the hub"


def _time(params: dict, data: Path | None, out: Path) -> tuple[str, str]:
    """What the same parameters took on this hardware before; without that max_minutes, or that
    there is no limit.
    """
    for file in sorted(
        [*out.glob("*/run.json"), *out.glob("reference/*/run.json")],
        key=lambda f: -f.stat().st_mtime,
    ):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = (
                record["data"]["root"] == data.name
                if data
                else record["data"]["root"].startswith("toy")
            )
            if (
                known
                and record["hardware"] == hardware()
                and _settings(record["params"]) == _settings(params)
            ):
                return f"{record['seconds']:.0f} s, as run {record['run']} took here", ""
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # no record of this kit
    if minutes := params.get("max_minutes"):
        return f"training ends after {minutes:g} min, then evaluation", ""
    limit = SESSION_HOURS.get(where()) if data and params.get("epochs") else None
    return (
        "not run here before",
        f"the session ends after {limit} h, done or not: set max_minutes" if limit else "",
    )


def _settings(params: dict) -> dict:
    """Parameters that time hangs on. No two notebooks have the same names: equal ones are of the
    same notebook.
    """
    place = {"output_dir", "cache_dir", "data_root", "run_name", "device"}
    return {name: value for name, value in params.items() if name not in place}
