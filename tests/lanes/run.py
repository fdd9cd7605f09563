"""One lane: the smoke series as on Kaggle or Colab, nbval over what it wrote, the tests.

    make test-kaggle, make test-colab
    python tests/lanes/run.py kaggle WORK WHEELS [notebook ...]     run by the lane's Python

The kit, weights and photos lie read-only in a tree shaped like the platform's, the network is off,
nothing but the image's packages is installed, and everything is called from a folder that has
nothing to do with it.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "tests" / "lanes" / "offline"
PLATFORM = {
    "kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Batch"},
    "colab": {"COLAB_RELEASE_TAG": "release-colab"},
}
MAKE_INPUTS = """
import sys, pathlib
from vipr_utils.data import toy
from vipr_utils.run import kaggle
made, inputs = map(pathlib.Path, sys.argv[1:])
kaggle.bundle(made, owner="some-one")
kaggle.weights(["tf_efficientnet_lite0", "tf_efficientnet_lite2"], made, owner="some-one")
toy.generate(inputs / "competitions" / "products-10k")
"""


def tree(lane: str, work: Path, wheels: Path) -> Path:
    """The platform's folders under `work`, inputs read-only; the folder to call all from."""
    shutil.rmtree(work, ignore_errors=True)
    inputs, made = work / "kaggle" / "input", work / "made"
    kept = work / {"kaggle": "kaggle/working", "colab": "content"}[lane]
    for folder in (inputs / "datasets" / "some-one", kept, work / "some where" / "else"):
        folder.mkdir(parents=True)
    call(
        [sys.executable, "-c", MAKE_INPUTS, made, inputs], PYTHONPATH=f"{ROOT}{os.pathsep}{wheels}"
    )
    with zipfile.ZipFile(made / "vipr-kit" / "vipr.zip") as archive:  # to a folder of its name
        archive.extractall(inputs / "datasets" / "some-one" / "vipr-kit" / "vipr")
    shutil.copytree(made / "vipr-weights", inputs / "datasets" / "some-one" / "vipr-weights")
    for path in inputs.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return work / "some where" / "else"


def call(command: list, cwd: Path = ROOT, **places: str) -> None:
    """Run it; a failure ends the lane."""
    print("+", *(str(part).replace("\n", " ")[:60] for part in command), flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, env=os.environ | places, check=True)


def listing(folder: Path) -> dict:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def main(lane: str, work: str, wheels: str, *chosen: str) -> None:
    work, wheels = Path(work).resolve(), Path(wheels).resolve()
    elsewhere = tree(lane, work, wheels)
    places = PLATFORM[lane] | {
        "VIPR_PLATFORM_ROOT": str(work),
        "PYTHONPATH": str(OFFLINE),
        "MPLBACKEND": "Agg",
    }
    kit = work / "kaggle" / "input" / "datasets" / "some-one" / "vipr-kit" / "vipr"
    before, written = listing(work / "kaggle" / "input"), []
    for notebook in sorted((kit / "notebooks").glob("*.ipynb")):
        if not chosen or notebook.stem[:2] in chosen:
            written.append(work / "ran" / notebook.name)
            written[-1].parent.mkdir(exist_ok=True)
            params = kit / "params" / "smoke" / f"{notebook.stem}.yaml"
            papermill = [
                "papermill",
                notebook,
                written[-1],
                "-f",
                params,
                "-k",
                "python3",
                "--no-progress-bar",
            ]
            call([sys.executable, "-m", *papermill], elsewhere, **places)
    nbval = [
        "--nbval",
        "--nbval-sanitize-with",
        ROOT / "tests" / "nbval.cfg",
        "-p",
        "no:cacheprovider",
    ]
    call(
        [sys.executable, "-m", "pytest", "-q", *nbval, *written],
        elsewhere,
        OMP_NUM_THREADS="1",
        **places,
    )
    assert listing(work / "kaggle" / "input") == before, "an input was written to"
    if not chosen:
        places |= {
            "VIPR_PLATFORM_ROOT": str(work / "empty"),
            "PYTHONPATH": f"{OFFLINE}{os.pathsep}{wheels}",
        }
        call([sys.executable, "-m", "pytest", "-q", "tests"], ROOT, OMP_NUM_THREADS="1", **places)


if __name__ == "__main__":
    main(*sys.argv[1:])
