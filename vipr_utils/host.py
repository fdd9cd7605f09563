"""Where the kit runs: platform, data and output folders, device, threads, seeds, and files written whole."""

from __future__ import annotations

import ctypes
import errno
import glob
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MARKER = "train.csv"  # a data root is a folder that holds one whose header starts with name,class
IMAGE_FOLDERS = {"train", "test", "images", "img"}  # never listed: they may hold 142,000 files
PLATFORM_ROOT = Path(os.environ.get("VIPR_PLATFORM_ROOT", "/"))  # another one holds a rehearsal's /kaggle and /content
KAGGLE_INPUT, KAGGLE_WORKING, KAGGLE_TEMP = (PLATFORM_ROOT / "kaggle" / n for n in ("input", "working", "temp"))
COLAB_CONTENT = PLATFORM_ROOT / "content"
KEPT_GB = 20  # what Kaggle keeps of /kaggle/working; more makes the run fail at its end
SESSION_HOURS = {"kaggle": 12, "colab": 12}


def where() -> str:
    """'kaggle', 'colab' or 'local', from the environment variables that also reach a papermill kernel."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") else "local"


def repository() -> Path | None:
    """The checkout this package runs from, None when it was installed or attached without one."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir() else None


# --------------------------------------------------------------------------------------------------- folders


def find_data_root(given: str = "") -> tuple[Path | None, str]:
    """(data root, how it was found): the parameter, $VIPR_DATA, one attached on Kaggle or Colab, else (None, 'toy').

    Raises FileNotFoundError when a folder was named and holds no train.csv.
    """
    for value, how in ((given, "parameter data_root"), (os.environ.get("VIPR_DATA", ""), "$VIPR_DATA")):
        if value:
            folder = Path(value).expanduser()
            if not folder.is_absolute() and not folder.exists() and repository():
                folder = repository() / folder
            if not (folder / MARKER).is_file():
                what = f"has no {MARKER}" if folder.is_dir() else "does not exist"
                raise FileNotFoundError(
                    f"{how}: {value} {what}. Expected a folder with train.csv (name,class,group), test.csv and the "
                    "image folders train/ and test/; leave it empty for the toy set."
                )
            return folder.resolve(), how
    return _attached() or (None, "toy")


def _attached() -> tuple[Path, str] | None:
    """A data root mounted by the platform; one that has its images goes before one that is only tables."""
    kagglehub = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    drive = COLAB_CONTENT / "drive" / "MyDrive"
    places = {
        "kaggle": {KAGGLE_INPUT: 4},  # competitions/slug, datasets/owner/slug or slug, and a folder below
        "colab": {COLAB_CONTENT: 2, drive: 2, KAGGLE_INPUT: 4, kagglehub: 5},  # datasets/owner/slug/versions/1
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
    """Files or folders of this (relative) name in what the platform has mounted: at the root of an input, or one below.

    Both mount schemes of datasets, the outputs of notebooks, and models; image folders are not listed.
    """
    mounts = ("*", "datasets/*/*", "notebooks/*/*", "models/*/*/*/*/*")
    patterns = [f"{mount}{below}/{glob.escape(name)}" for mount in mounts for below in ("", "/*")] if where() != "local" else []
    return list(dict.fromkeys(found for pattern in patterns for found in sorted(KAGGLE_INPUT.glob(pattern))))


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
    """Folders in it but image folders, as far as the first 500 entries tell: more are images by another name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e) for e in islice(entries, 500) if e.is_dir() and e.name.lower() not in IMAGE_FOLDERS)
    except OSError:
        return []


def cache_folder(given: str = "") -> Path:
    """Scratch that may be lost: the parameter, $VIPR_CACHE, the platform's scratch disk, ~/.cache/vipr. Created."""
    usual = {"kaggle": KAGGLE_TEMP / "vipr", "colab": COLAB_CONTENT / "vipr_cache"}
    default = usual.get(where(), Path.home() / ".cache" / "vipr")
    folder = Path(given or os.environ.get("VIPR_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_folder(given: str = "submissions") -> Path:
    """Where runs are kept; a relative one lies in /kaggle/working, on Colab in the mounted Drive's vipr/ or in /content,
    elsewhere in the checkout, else in here. Created."""
    drive = COLAB_CONTENT / "drive" / "MyDrive"
    kept = {"kaggle": KAGGLE_WORKING, "colab": drive / "vipr" if drive.is_dir() else COLAB_CONTENT}
    folder = kept.get(where(), repository() or Path.cwd()) / Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(output_dir: str, run_name: str) -> Path:
    """<output_dir>/<run_name>/, created. Raises ValueError when the name is no plain folder name."""
    if not run_name or run_name in (".", "..") or set(run_name) & set('/\\:*?"<>|\0\n'):
        raise ValueError(f"run_name {run_name!r} is no plain folder name: use letters, digits, '-', '_' and '.'")
    folder = output_folder(output_dir) / run_name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_run(model_run: str, *, output_dir: str = "submissions") -> Path:
    """Folder of an earlier run with a model.pt: by name in output_dir, by its path, or among attached notebooks' outputs."""
    own = output_folder(output_dir) / model_run
    places = [own, Path(model_run), *attached(f"submissions/{model_run}"), *attached(model_run)]
    return next((folder for folder in places if (folder / "model.pt").is_file()), own)


def room_gb(folder: Path) -> float:
    """GB (1e9 bytes) that may still be written below `folder`: its disk, and in /kaggle/working what is left of 20 GB."""
    free = shutil.disk_usage(folder).free / 1e9
    return min(free, KEPT_GB - _size_gb(KAGGLE_WORKING)) if _is_kept(folder) else free


def _is_kept(folder: Path) -> bool:
    return where() == "kaggle" and Path(folder).resolve().is_relative_to(KAGGLE_WORKING.resolve())


def _size_gb(folder: Path) -> float:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files if file.exists()) / 1e9


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in here, by a lock file in `folder` that ends with its process; on Windows no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, on any error the old file stays.

    Raises OSError (no space) with the file, what was written, the room left and the remedy; in /kaggle/working also
    when the file would pass the 20 GB that Kaggle keeps.
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
        if _is_kept(path.parent) and room_gb(path.parent) < 0:  # of what the disk has, not of what is kept
            raise OSError(errno.EDQUOT, "over Kaggle's limit")
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # mkstemp gives 0600
        os.replace(part, path)
    except Exception as error:
        if _is_full_disk(error):
            written, free = part.stat().st_size / 1e9, room_gb(path.parent)
            limit = f", and {KAGGLE_WORKING} keeps {KEPT_GB} GB" if _is_kept(path.parent) else ""
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {path.name} ({written:.2f} GB written, {free:.2f} GB free{limit}): the file "
                f"before it is untouched. Free space in {path.parent} or give another output_dir or cache_dir",
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _is_full_disk(error: BaseException) -> bool:
    """ENOSPC, also where torch's writer hides it in a RuntimeError."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return True
    hidden = isinstance(error, RuntimeError) and any(
        s in str(error) for s in ("No space left", "file write failed", "PytorchStreamWriter failed")
    )
    return hidden or (error.__context__ is not None and _is_full_disk(error.__context__))


# ---------------------------------------------------------------------------------------- device and machine


def device(name: str = "auto") -> torch.device:
    """A device that was seen to work: 'auto' takes CUDA, Apple's MPS, else the CPU; a named one must work.

    `cuda.is_available()` is also true for cards that the installed torch has no kernels for (Kaggle's P100): here
    a real operation runs and the card's capability is held against torch's list.
    Raises RuntimeError when a named device does not work; 'auto' warns and goes on with the CPU.
    """
    if name != "auto":
        if problem := _problem(name):
            raise RuntimeError(f"device {name!r} does not work: {problem}. 'auto' takes what does")
        return torch.device(name)
    if torch.cuda.is_available():
        if not (problem := _problem("cuda")):
            return torch.device("cuda")
        warnings.warn(f"the GPU cannot be used, running on the CPU: {problem}", stacklevel=2)
    if torch.backends.mps.is_available() and not _problem("mps"):
        return torch.device("mps")
    return torch.device("cpu")


def _problem(name: str) -> str:
    """Why this device cannot compute, '' when it can."""
    try:
        dev = torch.device(name)
        if dev.type == "cuda":
            capability, built = torch.cuda.get_device_capability(dev), torch.cuda.get_arch_list()
            if not _has_kernels(capability, built):
                return (
                    f"{torch.cuda.get_device_name(dev)} is sm_{capability[0]}{capability[1]}, torch "
                    f"{torch.__version__} has kernels for {', '.join(built)}. On Kaggle choose Settings > "
                    "Accelerator > GPU T4 x2"
                )
        x = torch.ones(8, 8, device=dev)
        if float((x @ x).sum()) != 512.0:
            return "a small matrix product came out wrong"
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a card of this capability runs what was built: same major for sm_*, PTX (compute_*) also later ones."""
    listed = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in built]
    listed = [(m[1], (int(m[2]), int(m[3]))) for m in listed if m]  # ROCm's gfx* names say nothing here
    return not listed or any(
        oldest <= capability and (kind == "compute" or oldest[0] == capability[0]) for kind, oldest in listed
    )


def tune(threads: int = 0) -> None:
    """Set torch's threads (0: $OMP_NUM_THREADS, else the cores of this process) and keep freed memory.

    glibc gives large blocks back to the system after every step and faults them in again at the next: two thirds
    of the time of a naive CPU loop. Does nothing elsewhere; may be called twice.
    """
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, where a notebook has no widgets
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    torch.set_num_threads(threads or (int(asked) if asked.isdigit() else 0) or cores())
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD first: older glibc refuses more than 32 MiB, and without it the next line makes it worse
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 1 << 26)  # M_TOP_PAD


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def precision(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The format in which networks compute: the one named; 'auto' takes $VIPR_PRECISION, else what pays on this device.

    That is bfloat16 on GPUs from Ampere on, float16 on older ones (T4), float32 on a CPU without units for halves. With
    AMX it is bfloat16, with AVX512-BF16 bfloat16 for embedding alone (EfficientNet-Lite0 at 160 px on an EPYC: 10.8
    against 17.4 ms an image, but 80 against 71 in training). Emulated halves are ten times slower.
    Raises ValueError for another name.
    """
    asked = os.environ.get("VIPR_PRECISION") or "auto" if name == "auto" else name
    if asked not in ("auto", "float32", "bfloat16", "float16"):
        source = "precision" if name != "auto" else "$VIPR_PRECISION"
        raise ValueError(f"{source} {asked!r} is unknown: use 'auto', 'float32', 'bfloat16' or 'float16'")
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    units = ("_is_amx_tile_supported",) if training else ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    pays = device.type == "cpu" and any(getattr(torch.cpu, unit, bool)() for unit in units)
    return torch.bfloat16 if pays else torch.float32


def precision_used(name: str, device: torch.device) -> dict[str, str]:
    """The `precision` entry of run.json: what `precision` gives for embedding and for training."""
    uses = ("embedding", "training")
    return {use: str(precision(name, device, training=use == "training")).removeprefix("torch.") for use in uses}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Layers that gain by it compute in this half precision; with float32 none does."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; what the kit itself draws comes from explicit generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what numbers may hang on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "pandas"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """'Tesla T4' or '2 cores, 24 GB': what a duration was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    gigabytes = memory_gb()[0]
    of = f"{cores()} cores" if cores() > 1 else "1 core"
    return of + (f", {gigabytes:.0f} GB" if gigabytes else "")


def memory_gb() -> tuple[float, float]:
    """(all, available) memory in GB (1e9 bytes); 0 where the system does not say."""
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0.0
    try:
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return everything, int(available[1]) * 1024 / 1e9
    except (OSError, TypeError):
        return everything, everything


def git_revision() -> str:
    """Short commit of the checkout, with '+' when files differ from it; '' without git."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    if not repository():
        raise FileNotFoundError("no checkout")
    options = {"cwd": repository(), "capture_output": True, "text": True, "timeout": 10, "check": True}
    return subprocess.run(["git", *arguments], **options).stdout.strip()


# ------------------------------------------------------------------------------------------------- preflight


def preflight(params: dict) -> pd.DataFrame:
    """What this notebook will meet here: (8 rows) item -> found, to do; what would cost hours is also warned of.

    `params` are the notebook's. The device by a real operation, memory, room for outputs and caches, data, weights, and
    the time that the same parameters took here before, by the run.json of that run.
    """
    given = {"device": "auto", "data_root": "", "output_dir": "submissions", "cache_dir": "", "weights": "auto"} | params
    try:
        data, how = find_data_root(given["data_root"])
        rows = {"data": (f"{data.name}, {how.split(':')[0]}" if data else "toy set (generated)", "")}
    except FileNotFoundError as error:
        data, rows = None, {"data": (given["data_root"] or "$VIPR_DATA", str(error))}
    out, cache = output_folder(given["output_dir"]), cache_folder(given["cache_dir"])
    rows |= {"machine": _machine(), "device": _device(given, data), "memory": _memory()}
    rows |= {"outputs": _disk(out, 2, "runs may not fit"), "cache": _disk(cache, 30 if data else 1, "photos may not fit")}
    if _is_kept(cache):
        rows["cache"] = (rows["cache"][0], f"counts against the {KEPT_GB} GB: leave cache_dir empty")
    rows["weights"] = (_weights(given["weights"]), "")
    rows["time"] = _time(params, data, out)
    for item, (found, todo) in rows.items():
        if todo:
            warnings.warn(f"{item}: {found}: {todo}", stacklevel=2)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["found", "to do"])


def _machine() -> tuple[str, str]:
    return f"{where()}, Python {platform.python_version()}, torch {torch.__version__}, {cores()} cores", ""


def _device(given: dict, data: Path | None) -> tuple[str, str]:
    """The device that computes; on a platform, real photos and training on a CPU are hours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = device(given["device"])
        except RuntimeError as error:
            return given["device"], str(error)
    if found.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, works", ""
    todo = str(caught[0].message) if caught else ""
    if not todo and data and where() != "local" and given.get("epochs"):
        menu = "Settings > Accelerator > GPU T4 x2" if where() == "kaggle" else "Runtime > Change runtime type > T4 GPU"
        todo = f"training takes hours without a GPU: choose {menu}"
    return str(found), todo


def _memory() -> tuple[str, str]:
    everything, available = memory_gb()
    todo = "kernels die below 3 GB: close others" if everything and available < 3 else ""
    return f"{available:.0f} of {everything:.0f} GB available", todo


def _disk(folder: Path, needed_gb: float, risk: str) -> tuple[str, str]:
    room, limit = room_gb(folder), f" of {KEPT_GB} GB kept" if _is_kept(folder) else ""
    return f"{room:.0f} GB{limit} free", f"{risk}, free {needed_gb} GB" if room < needed_gb else ""


def _weights(weights: str) -> str:
    """Where weights may come from; models.find_weights names the file."""
    if weights != "auto":
        return "random" if weights == "none" else weights
    folders = [p.parent.name for p in attached("SHA256SUMS")]
    folders += [f"$VIPR_WEIGHTS, {Path(os.environ['VIPR_WEIGHTS']).name}"] if os.environ.get("VIPR_WEIGHTS") else []
    return f"attached: {', '.join(folders)}" if folders else "an installed package, else the hub"


def _time(params: dict, data: Path | None, out: Path) -> tuple[str, str]:
    """What the same parameters took on this hardware before; without that max_minutes, or that there is no limit."""
    for file in sorted([*out.glob("*/run.json"), *out.glob("reference/*/run.json")], key=lambda f: -f.stat().st_mtime):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = record["data"]["root"] == data.name if data else record["data"]["root"].startswith("toy")
            if known and record["hardware"] == hardware() and _settings(record["params"]) == _settings(params):
                return f"{record['seconds']:.0f} s, as run {record['run']} took here", ""
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # no record of this kit
    if minutes := params.get("max_minutes"):
        return f"training ends after {minutes:g} min, then evaluation", ""
    limit = SESSION_HOURS.get(where()) if data and params.get("epochs") else None
    return "not run here before", f"the session ends after {limit} h, done or not: set max_minutes" if limit else ""


def _settings(params: dict) -> dict:
    """Parameters that time hangs on. No two notebooks have the same names: equal ones are of the same notebook."""
    place = {"output_dir", "cache_dir", "data_root", "run_name", "device"}
    return {name: value for name, value in params.items() if name not in place}
