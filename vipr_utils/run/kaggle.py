"""The kit on Kaggle: itself as a dataset, notebooks as kernels, weights for want of a network.

    vipr kaggle bundle  --owner NAME [--output kaggle]     kaggle/vipr-kit/: the dataset, one zip
    vipr kaggle weights --owner NAME MODEL [MODEL ...]     kaggle/vipr-weights/: a file a model
    vipr kaggle prepare --owner NAME params/kaggle_t4      kaggle/<kernel>/: one a parameter file
    vipr kaggle push    kaggle/vipr-kit kaggle/vipr-06-submission
    vipr kaggle collect kaggle/vipr-06-submission [--output submissions]

Only push and collect need the network and the official `kaggle` client, installed and configured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file

from vipr_utils.host import platform
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.run.params import BadParameters, Run, load_runs, setting

KIT, WEIGHTS = "vipr-kit", "vipr-weights"  # slugs of the two datasets: 6 to 50 characters
COMPETITION = "products-10k"
KERNEL, DATASET = "kernel-metadata.json", "dataset-metadata.json"
BUNDLED = (
    "vipr_utils/**/*.py",
    "params/**/*.yaml",
    "notebooks/*.ipynb",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
REFUSED = re.compile(r"error:|could not be added", re.IGNORECASE)  # printed, with exit code 0


class KaggleError(RuntimeError):
    """What Kaggle or its client would refuse, or did."""


def bundle(folder: Path, *, owner: str) -> Path:
    """Folder of the kit's dataset: `vipr.zip`, which Kaggle unpacks to vipr/, and its metadata.

    The same files give the same bytes. Raises KaggleError outside of a checkout.
    """
    if not (root := platform.repository()):
        raise KaggleError(
            "bundle needs the repository (pyproject.toml and notebooks/), not an installed "
            "package alone"
        )
    folder = folder / KIT
    files = sorted(found for pattern in BUNDLED for found in root.glob(pattern))
    with whole_file(folder / "vipr.zip") as part, zipfile.ZipFile(part, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(f"vipr/{file.relative_to(root).as_posix()}")  # dated 1980
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return _dataset(folder, owner, title="ViPR kit", licence="MIT")


def weights(names: list[str], folder: Path, *, owner: str) -> Path:
    """Folder with the pretrained weights of each backbone as <name>.safetensors, SHA256SUMS and
    dataset metadata.

    Attached on Kaggle, or named by $VIPR_WEIGHTS, `models.create` finds them; `sha256sum -c
    SHA256SUMS` checks them. Raises models.WeightsError when a backbone's weights cannot be had.
    """
    folder, sums = folder / WEIGHTS, ""
    for name in names:
        model = models.create(name)
        if not (origin := model.record["weights"])["sha256"]:
            raise models.WeightsError(
                f"{name} starts at random: it has no pretrained weights to carry along"
            )
        # The kit's own names: no translation of foreign checkpoints touches them again
        state = {f"backbone.{k}": v.contiguous() for k, v in model.backbone.state_dict().items()}
        metadata = {"source": origin["source"], "source_sha256": origin["sha256"]}
        path = folder / f"{name.replace('/', '_')}.safetensors"
        with whole_file(path) as part:
            save_file(state, part, metadata=metadata)
        sums += f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    (folder / "SHA256SUMS").write_text(sums)
    about = f"Pretrained weights of {', '.join(names)}; each keeps the licence of its source."
    return _dataset(folder, owner, title="ViPR weights", description=about, licence="other")


def _dataset(folder: Path, owner: str, *, title: str, licence: str, description: str = "") -> Path:
    metadata = {
        "id": f"{_owner(owner)}/{folder.name}",
        "title": title,
        "description": description,
        "licenses": [{"name": licence}],
    }
    return _write(folder / DATASET, metadata).parent


def _write(path: Path, content: dict) -> Path:
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1))
    return path


def _owner(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise KaggleError(
            f"owner {name!r} is no Kaggle user name: give --owner NAME or set $KAGGLE_USERNAME"
        )
    return name


# ------------------------------------------------------------------------------------------ kernels


def prepare(run: Run, folder: Path, **choices) -> Path:
    """Folder of one kernel: the notebook with the run's values in a cell of their own, no outputs.

    choices: those of `kernel_metadata`.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    metadata = kernel_metadata(run, **choices)
    folder = folder / kernel_slug(run.name)
    notebook = parameterize_notebook(load_notebook_node(str(run.notebook)), run.params)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    _write(folder / metadata["code_file"], notebook)
    return _write(folder / KERNEL, metadata).parent


def kernel_metadata(run: Run, *, owner: str, upstream: Iterable[str] = ()) -> dict:
    """kernel-metadata.json of a run, everything explicit: private, T4 x2 where the notebook
    computes, its sources.

    There is no network. Sources: the kit, the weights' dataset where "auto" asks for some, the
    competition, and the kernels of the runs it builds on: its model_run, and for one that
    chooses among runs or compares them all `upstream`.
    """
    slug, computes = kernel_slug(run.name), "device" in run.defaults
    datasets = [f"{_owner(owner)}/{KIT}"]
    if run.values.get("weights") == "auto":
        datasets.append(f"{owner}/{WEIGHTS}")
    before = upstream if run.reads_runs else filter(None, [run.starts_from])
    return {
        "id": f"{owner}/{slug}",
        "title": slug,
        "code_file": f"{run.notebook.stem}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": computes,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4" if computes else "",
        "dataset_sources": datasets,
        "competition_sources": [COMPETITION],
        "kernel_sources": [f"{owner}/{kernel_slug(name)}" for name in before],
    }


def kernel_slug(run_name: str) -> str:
    """'vipr-06-submission': lower-case letters, digits, single hyphens; Kaggle takes up to 50."""
    return "vipr-" + re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")


# ---------------------------------------------------------------------- through the official client


def push(folder: Path) -> str:
    """Upload a prepared folder, a kernel (which then runs) or a dataset (new, or a new version);
    what Kaggle said.

    Raises KaggleError when it was refused, in part too: a kernel without one of its sources fails.
    """
    is_kernel = (folder / KERNEL).is_file()
    answer = client("kernels", "push", "-p", str(folder)) if is_kernel else _push_dataset(folder)
    if REFUSED.search(answer) or (is_kernel and "successfully pushed" not in answer):
        raise KaggleError(f"{folder.name} was not pushed: {answer}")
    return answer


def _push_dataset(folder: Path) -> str:
    try:
        client("datasets", "status", _id(folder / DATASET))
    except KaggleError:
        return client("datasets", "create", "-p", str(folder))
    return client("datasets", "version", "-p", str(folder), "-m", "new version of the kit")


def _id(metadata: Path) -> str:
    return json.loads(metadata.read_text(encoding="utf-8"))["id"]


def collect(folder: Path, output_dir: Path) -> list[Path]:
    """Run folders that a pushed kernel left under submissions/, copied into `output_dir`.

    Raises KaggleError when the kernel failed or still runs, with its status.
    """
    kernel = _id(folder / KERNEL)
    status = client("kernels", "status", kernel)
    if "complete" not in status.lower():
        raise KaggleError(f"{kernel} has not finished: {status}")
    with tempfile.TemporaryDirectory() as scratch:
        client("kernels", "output", kernel, "-p", scratch)
        records = sorted(Path(scratch).glob("submissions/*/run.json"))
        return [
            shutil.copytree(record.parent, output_dir / record.parent.name, dirs_exist_ok=True)
            for record in records
        ]


def client(*arguments: str) -> str:
    """What the official client printed. Raises KaggleError when it is absent, not configured, or
    fails.
    """
    if not (program := shutil.which("kaggle")):
        raise KaggleError(
            "the kaggle client is not installed: pip install kaggle, then create an API token "
            "on kaggle.com"
        )
    done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
    answer = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise KaggleError(answer)
    return answer


def main(arguments: list[str] | None = None) -> int:
    """One command; exit code 0, or 2 with what is wrong."""
    parser = argparse.ArgumentParser("vipr kaggle", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=["bundle", "weights", "prepare", "push", "collect"])
    add("names", nargs="*", help="backbones, parameter files, or prepared folders")
    add("--owner", default=os.environ.get("KAGGLE_USERNAME", ""), help="Kaggle user name")
    add("--output", type=Path, help="folder; kaggle, for collect submissions")
    add("-p", action="append", default=[], type=setting, metavar="name=value", help="as for run")
    given = parser.parse_args(arguments)
    try:
        for line in _lines(given):
            print(line)
    except (KaggleError, models.WeightsError, BadParameters, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _lines(given: argparse.Namespace) -> Iterator[object]:
    """What the command made or was answered."""
    out = given.output or Path("kaggle")
    if given.command == "bundle":
        yield bundle(out, owner=given.owner)
    elif given.command == "weights":
        yield weights(given.names, out, owner=given.owner)
    elif given.command == "prepare":
        runs = load_runs(given.names, dict(given.p))
        for run in runs:
            upstream = [other.name for other in runs if other.notebook.stem < run.notebook.stem]
            yield prepare(run, out, owner=given.owner, upstream=upstream)
    for folder in map(Path, given.names):
        if given.command == "push":
            yield push(folder)
        elif given.command == "collect":
            yield from collect(folder, given.output or Path("submissions"))
