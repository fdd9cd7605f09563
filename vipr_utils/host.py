"""Where the kit runs: platform, data and output folders, device, threads, seeds, and files written whole."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
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
import torch

MARKER = "train.csv"  # a data root is a folder that holds one whose header starts with name,class
IMAGE_FOLDERS = {"train", "test", "images", "img"}  # never listed: they may hold 142,000 files
KAGGLE_INPUT, KAGGLE_WORKING, KAGGLE_TEMP = (Path("/kaggle") / name for name in ("input", "working", "temp"))
COLAB_CONTENT = Path("/content")


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
    usual = {"kaggle": KAGGLE_TEMP / "vipr", "colab": Path("/content/vipr_cache")}
    default = usual.get(where(), Path.home() / ".cache" / "vipr")
    folder = Path(given or os.environ.get("VIPR_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_folder(given: str = "submissions") -> Path:
    """Where runs are kept; a relative one lies in /kaggle/working, in the checkout, else in here. Created."""
    base = KAGGLE_WORKING if where() == "kaggle" else repository() or Path.cwd()
    folder = base / Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(output_dir: str, run_name: str) -> Path:
    """<output_dir>/<run_name>/, created. Raises ValueError when the name is no plain folder name."""
    if not run_name or run_name in (".", "..") or set(run_name) & set('/\\:*?"<>|\0\n'):
        raise ValueError(f"run_name {run_name!r} is no plain folder name: use letters, digits, '-', '_' and '.'")
    folder = output_folder(output_dir) / run_name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, on any error the old file stays.

    Raises OSError (no space) with the file, what was written, the room left and the remedy.
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
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # mkstemp gives 0600
        os.replace(part, path)
    except Exception as error:
        if _is_full_disk(error):
            written, free = part.stat().st_size / 2**30, shutil.disk_usage(path.parent).free / 2**30
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {path.name} ({written:.2f} GiB written, {free:.2f} GiB free): the file "
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
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0
    return f"{cores()} cores" + (f", {gigabytes:.0f} GB" if gigabytes else "")


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
