"""Where the kit runs: Kaggle, Colab or a machine of yours, its folders, what is met there."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from itertools import islice
from pathlib import Path

import pandas as pd

from vipr_utils.host import progress
from vipr_utils.host.device import GPU_MENUS, hardware, memory_gb, tune, working_device

MARKER = "train.csv"  # a data root is a folder that holds one whose header starts with name,class
GALLERIES, QUERIES = ("train", "gallery"), ("test", "queries")  # or these folders alone
# Another one holds a rehearsal's /kaggle and /content
PLATFORM_ROOT = Path(os.environ.get("VIPR_PLATFORM_ROOT", "/"))
KAGGLE_WORKING = PLATFORM_ROOT / "kaggle" / "working"
COLAB_CONTENT = PLATFORM_ROOT / "content"
COLAB_DRIVE = COLAB_CONTENT / "drive" / "MyDrive"
REVISION = "revision.txt"  # in a bundle: of what
WHEELS = "wheels.txt"  # beside wheels that are attached: their names
KEPT_GB = 20  # what Kaggle keeps of /kaggle/working; more makes the run fail at its end
# What is attached to a notebook, by both of Kaggle's schemes, or lies one folder below it
MOUNTS = (
    "kaggle/input/*",
    "kaggle/input/*/*",
    "kaggle/input/competitions/*/*",
    "kaggle/input/datasets/*/*",
    "kaggle/input/datasets/*/*/*",
    "kaggle/input/notebooks/*/*",
    "kaggle/input/notebooks/*/*/*",
    "kaggle/input/models/*/*/*/*/*",
    "kaggle/input/models/*/*/*/*/*/*",
)
COLAB_DATA = (  # where data lies on Colab beside these
    "content/*",
    "content/drive/MyDrive/*",
    "content/drive/MyDrive/vipr/*",
    "root/.cache/kagglehub/datasets/*/*/versions/*",
)
# What Windows refuses too, so that a run can go from one machine to another
NO_FOLDER_NAME = r'[/\\:*?"<>|\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)'
DEFAULTS = {
    "device": "auto",
    "data_root": "",
    "output_dir": "submissions",
    "cache_dir": "",
    "weights": "auto",
    "epochs": 0,
    "max_minutes": 0.0,
    "readings": [],
}


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
    return folder if (folder / "pyproject.toml").is_file() else None


def home() -> Path:
    """The checkout, else the working folder: what relative paths start from."""
    return repository() or Path.cwd()


def find_data_root(given: str = "") -> tuple[Path | None, str]:
    """(data root, how it was found): the parameter, $VIPR_DATA, one attached on Kaggle or Colab,
    else (None, 'toy').

    Raises FileNotFoundError when a folder was named and holds neither train.csv nor such folders,
    and when a competition is attached and no data is found: the toy set is not what was asked for.
    """
    how = "parameter data_root" if given else "$VIPR_DATA"
    named = given or os.environ.get("VIPR_DATA", "")
    if not named:
        found = _attached_data()
        if not found and attached("", ("kaggle/input/competitions/*", "kaggle/input/products-10k")):
            raise FileNotFoundError(
                "a competition is attached and holds no train.csv that begins with name,class: "
                "accept its rules and attach it again, name data_root, or detach it for the toy set"
            )
        return found or (None, "toy")
    folder = Path(named).expanduser()
    if not folder.exists():
        folder = home() / folder
    if not (folder / MARKER).is_file() and not any((folder / name).is_dir() for name in GALLERIES):
        raise FileNotFoundError(
            f"{how}: {named} has no {MARKER}. Expected a folder with train.csv (name,class,group), "
            "test.csv and the image folders train/ and test/, or with train/<product>/ and test/ "
            "alone; leave it empty for the toy set."
        )
    return folder.resolve(), how


def _attached_data() -> tuple[Path, str] | None:
    """A data root mounted by the platform; one that has its images goes before one that is only
    tables.
    """
    mounts = MOUNTS + COLAB_DATA
    roots = [table.parent for table in attached(MARKER, mounts) if _lists_products(table)]
    whole = [root for root in roots if (root / "train").is_dir()]
    galleries = [folder for name in GALLERIES for folder in attached(name, mounts)]
    in_folders = [folder.parent for folder in galleries if _holds_products(folder)]
    root = next(iter(whole + roots + in_folders), None)
    return root and (root, f"attached: {root}")


def attached(name: str, mounts: tuple[str, ...] = MOUNTS) -> list[Path]:
    """Files or folders of this (relative) name in what the platform has mounted: at the root of an
    input, or one below.

    Only the folders before a star are listed, never image folders of 142,000 files.
    """
    if where() == "local":
        return []
    return [  # pathlib's glob would list the last folder too, from Python 3.12 on
        Path(path)
        for mount in mounts
        for path in sorted(glob.glob(f"{PLATFORM_ROOT}/{mount}/{glob.escape(name)}"))
    ]


def _lists_products(table: Path) -> bool:
    if not table.is_file():  # Kaggle unpacks a train.csv.zip to a folder of that name
        return False
    with open(table, encoding="utf-8-sig", errors="replace") as file:
        return re.sub(r'[\s"]', "", file.readline(1000)).startswith("name,class")


def _holds_products(gallery: Path) -> bool:
    """Whether it begins with folders and has queries beside it, and no train.csv at all."""
    root = gallery.parent
    if (root / MARKER).exists() or not any((root / name).is_dir() for name in QUERIES):
        return False
    first = islice(os.scandir(gallery), 20)  # pathlib's glob would list all of them
    return any(entry.is_dir() and entry.name[0] != "." for entry in first)


def cache_folder(given: str = "") -> Path:
    """Scratch that may be lost: the parameter, the platform's scratch disk, ~/.cache/vipr.
    Created.
    """
    usual = {
        "kaggle": PLATFORM_ROOT / "kaggle" / "temp" / "vipr",
        "colab": COLAB_CONTENT / "vipr_cache",
    }
    default = usual.get(where(), Path.home() / ".cache" / "vipr")
    folder = Path(given or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_folder(given: str = "submissions") -> Path:
    """Where runs are kept; a relative one lies in /kaggle/working, on Colab in the mounted Drive's
    vipr/ or in /content, elsewhere in the checkout, else in here. Created.
    """
    colab = COLAB_DRIVE / "vipr" if COLAB_DRIVE.is_dir() else COLAB_CONTENT
    kept = {"kaggle": KAGGLE_WORKING, "colab": colab, "local": home()}
    folder = kept[where()] / Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(output_dir: str, run_name: str) -> Path:
    """<output_dir>/<run_name>/, created. Raises ValueError for no plain folder name."""
    if not run_name or re.search(NO_FOLDER_NAME, run_name, re.IGNORECASE):
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


def stores(cache_dir: Path, name: str) -> list[Path]:
    """Folders of packed photos, stores/<name>: in this cache, among the outputs of runs here,
    attached.
    """
    mounts = MOUNTS + COLAB_DATA
    mounts += tuple(f"{mount}/submissions/*" for mount in mounts)
    folders = [cache_dir / "stores", *output_folder().glob("*/stores"), *attached("stores", mounts)]
    return [first.parent for folder in folders for first in folder.glob(f"{name}/0.*")]


def room_gb(folder: Path) -> float:
    """GB (1e9 bytes) that may still be written below `folder`: its disk, and in /kaggle/working
    what is left of 20 GB.
    """
    free = shutil.disk_usage(folder).free / 1e9
    if not is_kept(folder):
        return free
    files = [path for path in KAGGLE_WORKING.rglob("*") if path.is_file()]
    return min(free, KEPT_GB - sum(file.lstat().st_size for file in files) / 1e9)


def is_kept(folder: Path) -> bool:
    return where() == "kaggle" and folder.resolve().is_relative_to(KAGGLE_WORKING.resolve())


def use_attached_wheels(cache_dir: Path) -> None:
    """Make packages importable whose wheels are attached (`vipr kaggle wheels`): installed once in
    cache_dir, without a network, behind what the image has. Warns where pip cannot.
    """
    for listed in attached(WHEELS):
        key = hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
        folder = cache_dir / f"packages-{key}"
        if not folder.is_dir():
            part = Path(tempfile.mkdtemp(dir=cache_dir))
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            command += ["--disable-pip-version-check", "--target", str(part), "-r", str(listed)]
            done = subprocess.run(command, cwd=listed.parent, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(part)
                warnings.warn(f"{listed.parent}: {done.stderr.strip()}", stacklevel=2)
                continue
            try:
                part.replace(folder)
            except OSError:  # another process was first
                shutil.rmtree(part)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def git_revision() -> str:
    """Short commit of the checkout, with '+' when files differ from it; '' without git.

    Of a bundle what stands in its revision.txt.
    """
    bundled = Path(__file__).resolve().parents[2] / REVISION
    if bundled.is_file():
        return bundled.read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(repository()), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def preflight(params: dict) -> pd.DataFrame:
    """Set up threads, memory, the log and attached wheels; what this notebook meets here: (6 rows)
    item -> found.

    `params` are the notebook's. The data, the device by a real operation, memory, room for outputs
    and caches, where weights come from. Warns of what would cost hours. Raises FileNotFoundError
    for a data root and RuntimeError for a device that was named and is none.
    """
    tune()
    progress.attach(on_platform=where() != "local")
    given = DEFAULTS | params
    data, how = find_data_root(given["data_root"])
    device = working_device(given["device"])
    available = memory_gb()[1]
    if given["readings"]:
        use_attached_wheels(cache_folder(given["cache_dir"]))
    carried = [f"attached {sums.parent.name}" for sums in attached("SHA256SUMS")]
    rows = {
        "data": f"{data.name}, {how}" if data else "toy set (generated)",
        "device": f"{device}, {hardware()}",
        "memory": f"{available:.0f} GB available",
        "outputs": _room(output_folder(given["output_dir"]), 2),
        "cache": _room(cache_folder(given["cache_dir"]), 30 if data else 1),
        "weights": ", ".join([given["weights"], *carried]),
    }
    if available < 3:
        warnings.warn("memory: kernels die below 3 GB: close others", stacklevel=2)
    if data and given["epochs"] and where() != "local":  # real photos, in a session
        if device.type == "cpu":
            advice = f"training takes hours without a GPU: choose {GPU_MENUS[where()]}"
            warnings.warn(advice, stacklevel=2)
        if not given["max_minutes"]:
            advice = "the session ends after 12 h, done or not: set max_minutes"
            warnings.warn(advice, stacklevel=2)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["found"])


def _room(folder: Path, needed_gb: float) -> str:
    room = room_gb(folder)
    if room < needed_gb:
        advice = (
            f"{folder}: {room:.0f} GB free, {needed_gb} GB are needed: free some or name another"
        )
        warnings.warn(advice, stacklevel=3)
    return f"{room:.0f} GB free"
