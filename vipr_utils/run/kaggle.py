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
from pathlib import Path

from safetensors.torch import save_file

from vipr_utils.host import platform
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.run.params import BadParameters, Run, load_runs

KIT, WEIGHTS = (
    "vipr-kit",
    "vipr-weights",
)  # slugs of the two datasets; Kaggle wants 6 to 50 characters
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
    folder = Path(folder) / KIT
    with (
        whole_file(folder / "vipr.zip") as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for file in sorted(found for pattern in BUNDLED for found in root.glob(pattern)):
            entry = zipfile.ZipInfo(f"vipr/{file.relative_to(root).as_posix()}")  # dated 1980
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    address = re.search(
        r'^Repository = "(.+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )[1]
    about = f"The ViPR competition kit: notebooks, parameters and package. Source: {address}"
    return _dataset(folder, owner, title="ViPR kit", description=about, licence="MIT")


def weights(names: list[str], folder: Path, *, owner: str) -> Path:
    """Folder with the pretrained weights of each backbone as <name>.safetensors, SHA256SUMS and
    dataset metadata.

    Attached on Kaggle, or named by $VIPR_WEIGHTS, `models.create` finds them; `sha256sum -c
    SHA256SUMS` checks them. Raises models.WeightsError when a backbone's weights cannot be had.
    """
    folder, sums = Path(folder) / WEIGHTS, {}
    for name in names:
        model = models.create(name)
        if not (origin := model.record["weights"])["sha256"]:
            raise models.WeightsError(
                f"{name} starts at random: it has no pretrained weights to carry along"
            )
        # the kit's own names: no architecture's translation of foreign checkpoints touches them
        # again
        state = {
            k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("backbone.")
        }
        path = folder / f"{name.replace('/', '_')}.safetensors"
        with whole_file(path) as part:
            save_file(
                state,
                part,
                metadata={"source": origin["source"], "source_sha256": origin["sha256"]},
            )
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    with whole_file(folder / "SHA256SUMS") as part:
        part.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    about = f"Pretrained weights of {', '.join(names)}; each keeps the licence of its source."
    return _dataset(folder, owner, title="ViPR weights", description=about, licence="other")


def _dataset(folder: Path, owner: str, *, title: str, description: str, licence: str) -> Path:
    metadata = {
        "id": f"{_owner(owner)}/{folder.name}",
        "title": title,
        "licenses": [{"name": licence}],
    }
    return _write(folder / DATASET, metadata | {"description": description}).parent


def _write(path: Path, content: dict) -> Path:
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _owner(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise KaggleError(
            f"owner {name!r} is no Kaggle user name: give --owner NAME or set $KAGGLE_USERNAME"
        )
    return name


# ------------------------------------------------------------------------------------------ kernels


def prepare(run: Run, folder: Path, *, owner: str, **choices) -> Path:
    """Folder of one kernel: the notebook with the run's values in a cell of their own, no outputs.

    choices: those of `kernel_metadata`.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    metadata = kernel_metadata(run, owner=owner, **choices)
    folder = Path(folder) / metadata["id"].split("/")[1]
    notebook = parameterize_notebook(load_notebook_node(str(run.notebook)), run.params)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    _write(folder / metadata["code_file"], notebook)
    return _write(folder / KERNEL, metadata).parent


def kernel_metadata(
    run: Run, *, owner: str, internet: bool = False, data: str = "", upstream: tuple = ()
) -> dict:
    """kernel-metadata.json of a run, everything explicit: private, T4 x2 where the notebook
    computes, its sources.

    Sources: the kit, the weights' dataset where "auto" asks for some and there is no network, the
    competition (or `data`, owner/slug of a dataset), and the kernels of the runs it builds on: its
    model_run, and `upstream`. Raises KaggleError for a name that Kaggle would refuse.
    """
    slug, given = kernel_slug(run.name), run.defaults | run.params
    computes = "device" in run.defaults
    attached = [KIT, *([WEIGHTS] if given.get("weights") == "auto" and not internet else [])]
    before = dict.fromkeys([*filter(None, [given.get("model_run")]), *upstream])
    return {
        "id": f"{_owner(owner)}/{slug}",
        "title": slug.replace("-", " "),  # must give the slug again
        "code_file": f"{run.notebook.stem}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": computes,
        "enable_tpu": False,
        "enable_internet": internet,
        "machine_shape": "NvidiaTeslaT4" if computes else "",
        "dataset_sources": [*(f"{owner}/{name}" for name in attached), *([data] if data else [])],
        "competition_sources": [] if data else [COMPETITION],
        "kernel_sources": [f"{owner}/{kernel_slug(Path(name).name)}" for name in before],
        "model_sources": [],
        "keywords": [],
    }


def kernel_slug(run_name: str) -> str:
    """'vipr-06-submission': lower-case letters, digits, single hyphens, at most 50 characters."""
    slug = "vipr-" + re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not 5 < len(slug) <= 50:
        raise KaggleError(
            f"run_name {run_name!r} gives the kernel {slug!r} of {len(slug)} characters, "
            "6 to 50 are allowed"
        )
    return slug


# ---------------------------------------------------------------------- through the official client


def push(folder: Path) -> str:
    """Upload a prepared folder, a kernel (which then runs) or a dataset (new, or a new version);
    what Kaggle said.
    """
    if (folder / KERNEL).is_file():
        said = client("kernels", "push", "-p", str(folder))
        if "successfully pushed" not in said:  # the client ends with 0 also when Kaggle refuses
            raise KaggleError(f"{folder.name} was not pushed: {said}")
        return said
    if not (folder / DATASET).is_file():
        raise KaggleError(
            f"{folder} has neither {KERNEL} nor {DATASET}: make it with prepare, bundle or weights"
        )
    try:
        client(
            "datasets", "status", json.loads((folder / DATASET).read_text(encoding="utf-8"))["id"]
        )
    except KaggleError:
        return client("datasets", "create", "-p", str(folder))
    return client("datasets", "version", "-p", str(folder), "-m", "new version of the kit")


def collect(folder: Path, output_dir: Path) -> list[Path]:
    """Run folders that a pushed kernel left under submissions/, copied into `output_dir`; [] while
    it still runs.

    Raises KaggleError when the kernel failed, with its status.
    """
    kernel = json.loads((folder / KERNEL).read_text(encoding="utf-8"))["id"]
    status = client("kernels", "status", kernel)
    if not (ended := re.search(r"complete|error|cancel", status, re.IGNORECASE)):
        return []
    if ended[0].lower() != "complete":
        raise KaggleError(f"{kernel} did not finish: {status}")
    with tempfile.TemporaryDirectory() as scratch:
        client("kernels", "output", kernel, "-p", scratch)
        runs = sorted(Path(scratch).glob("submissions/*/run.json"))
        for record in runs:
            shutil.copytree(
                record.parent, Path(output_dir) / record.parent.name, dirs_exist_ok=True
            )
    return [Path(output_dir) / record.parent.name for record in runs]


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
    if done.returncode:
        raise KaggleError(f"kaggle {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """One command; exit code 0, or 2 with what is wrong."""
    parser = argparse.ArgumentParser("vipr kaggle", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["bundle", "weights", "prepare", "push", "collect"])
    parser.add_argument("names", nargs="*", help="backbones, parameter files, or prepared folders")
    parser.add_argument(
        "--owner", default=os.environ.get("KAGGLE_USERNAME", ""), help="Kaggle user name"
    )
    parser.add_argument("--output", default="", help="folder; kaggle, for collect submissions")
    parser.add_argument(
        "--data", default="", help="prepare: owner/slug of a dataset in place of the competition"
    )
    parser.add_argument("--internet", action="store_true", help="prepare: switch the network on")
    parser.add_argument(
        "-p", action="append", default=[], metavar="name=value", help="prepare: as for batch"
    )
    given = parser.parse_args(arguments)
    out = Path(given.output or ("submissions" if given.command == "collect" else "kaggle"))
    try:
        for line in _command(given, out):
            print(line)
    except (KaggleError, models.WeightsError, BadParameters) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _command(given: argparse.Namespace, out: Path) -> list[object]:
    folders = [Path(name) for name in given.names]
    if given.command == "bundle":
        return [bundle(out, owner=given.owner)]
    if given.command == "weights":
        return [weights(given.names, out, owner=given.owner)]
    if given.command == "push":
        return [push(folder) for folder in folders]
    if given.command == "collect":
        return [
            found
            for folder in folders
            for found in collect(folder, out) or [f"{folder.name} still runs"]
        ]
    runs = load_runs(given.names, dict(p.split("=", 1) for p in given.p))
    choices = {"owner": given.owner, "internet": given.internet, "data": given.data}
    others = {
        "09_scoreboard": tuple(run.name for run in runs if run.notebook.stem != "09_scoreboard")
    }
    return [
        prepare(run, out, upstream=others.get(run.notebook.stem, ()), **choices) for run in runs
    ]
