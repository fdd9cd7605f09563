"""The kit on Kaggle: itself as a dataset, notebooks as kernels, their runs brought home.

    vipr kaggle bundle  --owner NAME                        kaggle/vipr-kit/: the dataset, one zip
    vipr kaggle weights --owner NAME params/kaggle_t4       kaggle/vipr-weights/: a file a backbone
    vipr kaggle wheels  --owner NAME                        kaggle/vipr-wheels/: the extra `text`
    vipr kaggle prepare --owner NAME params/kaggle_t4       kaggle/vipr-<run>/: a kernel a file
    vipr kaggle push    kaggle/vipr-*                       upload and run, one after the other
    vipr kaggle wait    kaggle/vipr-06-submission           its status, log and quota, to its end
    vipr kaggle collect kaggle/vipr-06-submission           its run folder, into submissions/
    vipr kaggle submit  submissions/06_submission [--competition products-10k]

`weights` also takes names of backbones. Of a notebook that tries several it leaves out those whose
weights cannot be had, and says so. `wheels` downloads what reads text on packages, for the Python
of Kaggle's image; kernels that are prepared after it and would read have it attached. `push` begins
with the datasets; before anything is pushed it asks for every dataset, kernel and competition that
is attached, and before each kernel it waits for the one before. What a run left comes home whole or
not at all, and only if it is the run that was prepared: the notebook, its parameters, this package.
It replaces an older run of that name.

A session ends after 12 hours. A run that has not finished by then leaves its checkpoint among its
outputs and goes on in a kernel of its own that has them attached (whether a kernel may attach its
own outputs is not documented, so none does): with --session 2, `prepare` of the same file makes
kaggle/vipr-<run>-2, session 3 attaches both before it, and what is prepared later the last one.

push, wait, collect and submit go through the official client (`pip install kaggle`), configured
with an API token; the rest needs no account, weights that are not here a network.
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
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import joblib
from safetensors import torch as safetensors

from vipr_utils.host import platform
from vipr_utils.host.files import whole_file, write_whole
from vipr_utils.judge import runs
from vipr_utils.learn import models
from vipr_utils.run.params import BadParameters, Run, load_runs, setting

KIT, WEIGHTS, WHEELS = "vipr-kit", "vipr-weights", "vipr-wheels"  # slugs of the datasets
# Of the extra `text`, and what it needs that Kaggle's image may lack; the last has no wheel
WHEELS_OF = ["rapidocr>=3.9", "onnxruntime>=1.20", "openvino>=2025.0", "openvino-telemetry"]
WHEELS_OF += ["pyclipper", "shapely>=1.7.1", "omegaconf>=2.3", "colorlog", "flatbuffers"]
WHEELS_OF += ["antlr4-python3-runtime==4.9.3"]
PYTHON = "3.12"  # of Kaggle's image, which runs manylinux_2_28 and older
IMAGE = ["--python-version", PYTHON, "--only-binary=:all:"]
IMAGE += [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "2014")]
COMPETITION = "products-10k"
PACKING = "01_eda"  # the run that leaves packed photos for those after it
KERNEL, DATASET = "kernel-metadata.json", "dataset-metadata.json"
PREPARED = "prepared.json"  # beside them: what the run of a kernel has to be
PACKAGE = "vipr_utils/**/*.py"
BUNDLED = (
    PACKAGE,
    "vipr_utils/**/*.html",
    "params/**/*.yaml",
    "notebooks/*.ipynb",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
# What the client prints of a failure and yet ends with exit code 0
REFUSED = re.compile(
    "(push|creation) error:|could not be added|does not resolve|skipping|cancelled", re.IGNORECASE
)
ACCEPTED = re.compile("successfully pushed|is being created")
PASSING = re.compile(
    r"429 client|rate limited|\b5\d\d server|on kaggle's side|connection|timed out", re.IGNORECASE
)
ASKING = {"status", "files", "output", "logs", "quota"}  # commands that may be tried again
STATUS = re.compile(r'(?:has status "(?:\w+\.)?|^)(\w+)"?$', re.MULTILINE)
GOOD = ["complete", "ready"]
BAD = ["error", "cancel_requested", "cancel_acknowledged", "failed", "deleted"]
TRIES, PAUSE_S, POLL_S = 5, 10.0, 60.0
REMEDIES = {  # where something that a kernel attaches cannot be had
    "datasets": "make it by `vipr kaggle bundle` or weights, and push it first",
    "kernels": "push it first, or prepare without its run",
    "competitions": "join it on kaggle.com and accept its rules",
}


class KaggleError(RuntimeError):
    """What Kaggle or its client would refuse, or did."""


def bundle(folder: Path, *, owner: str) -> Path:
    """Folder of the kit's dataset: `vipr.zip`, which Kaggle unpacks to vipr/, and its metadata.

    The same files give the same bytes. Records of its runs say its `digest`, which stands in
    revision.txt. Raises KaggleError outside of a checkout.
    """
    folder, content = folder / KIT, _content(*BUNDLED)
    content[platform.REVISION] = f"{platform.git_revision()} kit {digest()}".encode()
    with whole_file(folder / "vipr.zip") as part, zipfile.ZipFile(part, "w") as archive:
        for name, data in sorted(content.items()):
            entry = zipfile.ZipInfo(name)  # dated 1980
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return _dataset(folder, owner, title="ViPR kit", licence="MIT")


def _content(*patterns: str) -> dict[str, bytes]:
    """Files of the checkout by their names in it."""
    if not (root := platform.repository()):
        raise KaggleError(
            "bundle and prepare need the repository (pyproject.toml and notebooks/), not an "
            "installed package alone"
        )
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def digest() -> str:
    """12 hexadecimal digits that tell the package's sources from others."""
    return joblib.hash(_content(PACKAGE))[:12]


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
        write_whole(path, safetensors.save(state, metadata=metadata))
        sums += f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    write_whole(folder / "SHA256SUMS", sums)
    about = f"Pretrained weights of {', '.join(names)}; each keeps the licence of its source."
    return _dataset(folder, owner, title="ViPR weights", description=about, licence="other")


def wheels(folder: Path, *, owner: str) -> Path:
    """Folder with the wheels of the extra `text`, a list of them, and dataset metadata.

    Attached on Kaggle, `platform.use_attached_wheels` installs them without a network. Raises
    KaggleError with pip's words where they cannot be had.
    """
    folder = folder / WHEELS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as found:
        *ready, source = WHEELS_OF
        _pip("download", "--dest", found, *IMAGE, *ready)
        _pip("wheel", "--wheel-dir", found, source)
        names = sorted(path.name for path in Path(found).glob("*.whl"))
        for name in names:
            os.replace(Path(found, name), folder / name)
    write_whole(folder / platform.WHEELS, "".join(f"./{name}\n" for name in names))
    for old in folder.glob("*.whl"):
        if old.name not in names:  # nobody installs it
            old.unlink()
    about = "Wheels that read text on packages: " + ", ".join(name.split("-")[0] for name in names)
    return _dataset(folder, owner, title="ViPR wheels", description=about, licence="other")


def _pip(command: str, *arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = run_client([sys.executable, "-m", "pip", command, *quiet, *arguments])
    if done.returncode:
        raise KaggleError(f"pip {command}: {done.stderr.strip()}")


def backbones(run: Run) -> dict[str, str]:
    """Backbones that a run may start from by "auto" -> where their weights are, '' if nowhere.

    Raises WeightsError where it could have none of them.
    """
    names = run.values.get("backbones") or [run.values.get("backbone", "")]
    if run.values.get("weights") != "auto" or not names[0]:
        return {}
    found = {name: models.weights_source(name) for name in names}
    if not any(found.values()):
        raise models.WeightsError(
            f"{run.file}: no weights can be had of {', '.join(names)}, and {run.name} names no "
            "other backbone. Name another, or switch the network on; where a licence has to be "
            "accepted, do so on huggingface.co and log in by `hf auth login`"
        )
    return found


def _dataset(folder: Path, owner: str, *, title: str, licence: str, description: str = "") -> Path:
    metadata = {
        "id": f"{_owner(owner)}/{folder.name}",
        "title": title,
        "description": description,
        "licenses": [{"name": licence}],
    }
    return _write(folder / DATASET, metadata).parent


def _write(path: Path, content: dict) -> Path:
    write_whole(path, json.dumps(content, indent=1))
    return path


def _owner(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise KaggleError(
            f"owner {name!r} is no Kaggle user name: give --owner NAME or set $KAGGLE_USERNAME"
        )
    return name


# ------------------------------------------------------------------------------------------ kernels


def prepare(run: Run, folder: Path, *, session: int = 1, **choices) -> Path:
    """Folder of one kernel: the notebook with the run's values in a cell of their own, no outputs.

    session: above 1 the kernel that goes on where those before it have ended. choices: those of
    `kernel_metadata`.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    metadata = kernel_metadata(run, folder=folder, session=session, **choices)
    prepared = {"run": run.name, "notebook": run.notebook.stem, "kit": digest()}
    prepared |= {name: run.values[name] for name in run.values.keys() - runs.FOLDERS}
    folder = folder / kernel_slug(run.name, session)
    notebook = parameterize_notebook(load_notebook_node(str(run.notebook)), run.params)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    _write(folder / metadata["code_file"], notebook)
    _write(folder / PREPARED, prepared)
    return _write(folder / KERNEL, metadata).parent


def kernel_metadata(
    run: Run, *, owner: str, upstream: Iterable[str] = (), folder: Path = Path(), session: int = 1
) -> dict:
    """kernel-metadata.json of a run, everything explicit: private, T4 x2 where the notebook
    computes, its sources.

    There is no network. Sources: the kit, the weights' dataset where "auto" asks for some, the
    wheels' where `folder` has it and the run would read, the competition, and kernels: of its own
    earlier sessions, of the run that has packed the photos, and of the runs it builds on, which are
    its model_run, and for one that chooses among runs or compares them all `upstream`. Of a run
    that `folder` has several sessions of it is the last.
    """
    slug, computes = kernel_slug(run.name, session), "device" in run.defaults
    datasets = [f"{_owner(owner)}/{KIT}"]
    if run.values.get("weights") == "auto":
        datasets.append(f"{owner}/{WEIGHTS}")
    if run.values.get("readings") and (folder / WHEELS).is_dir():
        datasets.append(f"{owner}/{WHEELS}")
    packing = [name for name in upstream if computes and name == PACKING]
    before = upstream if run.reads_runs else [*packing, *filter(None, [run.starts_from])]
    kernels = [kernel_slug(run.name, earlier) for earlier in range(1, session)]
    kernels += [_last_session(folder, name) for name in before]
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
        "kernel_sources": [f"{owner}/{kernel}" for kernel in kernels],
    }


def _last_session(folder: Path, run_name: str) -> str:
    """Slug of the last session of a run that is prepared in a folder."""
    session = 1
    while (folder / kernel_slug(run_name, session + 1)).is_dir():
        session += 1
    return kernel_slug(run_name, session)


def kernel_slug(run_name: str, session: int = 1) -> str:
    """'vipr-06-submission': lower-case letters, digits, single hyphens; Kaggle takes up to 50.
    Later sessions end in their number.
    """
    slug = "vipr-" + re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    return slug if session == 1 else f"{slug}-{session}"


# ---------------------------------------------------------------------- through the official client


def push(folders: Iterable[Path], *, hours: float = 24.0) -> Iterator[str]:
    """Upload prepared folders, datasets first, and run the kernels among them; what Kaggle said.

    Each waits, for `hours` at most, for the end of the one before. Raises KaggleError when
    something was refused, in part too: a kernel without one of its sources fails. Where one does
    not exist, and is not among the folders, nothing is pushed.
    """
    todo = {}  # name -> section, folder, sources
    for folder in sorted(folders, key=lambda folder: (folder / KERNEL).is_file()):
        metadata = _metadata(folder)
        section = "kernels" if "code_file" in metadata else "datasets"
        sources = [(s, name) for s in REMEDIES for name in metadata.get(f"{s[:-1]}_sources", [])]
        todo[metadata["id"]] = section, folder, sources
    for _, folder, sources in todo.values():
        for section, source in sources:
            if source not in todo:
                yield from _attachable(folder.name, section, source, hours)
    for number, (name, (section, folder, _)) in enumerate(todo.items(), 1):
        yield f"{folder.name}: {_push(section, name, folder)}"
        if number < len(todo):
            yield from settled(section, name, hours=hours)


def _attachable(pushed: str, section: str, source: str, hours: float) -> Iterator[str]:
    try:
        yield from settled(section, source, hours=hours)
    except KaggleError as error:
        raise KaggleError(
            f"nothing was pushed: {pushed} attaches {source} of {section}, which cannot be had: "
            f"{REMEDIES[section]}. {error}"
        ) from None


def _push(section: str, name: str, folder: Path) -> str:
    """What Kaggle said: of a kernel, a new dataset, or a new version of one."""
    command = ["push"] if section == "kernels" else ["create"]
    if section == "datasets":
        with suppress(KaggleError):
            client(section, "status", name)
            command = ["version", "-m", "new version"]
    answer = client(section, *command, "-p", str(folder))
    if REFUSED.search(answer) or not ACCEPTED.search(answer):
        raise KaggleError(f"{folder.name} was not pushed: {answer}")
    return answer


def _metadata(folder: Path) -> dict:
    is_dataset = (folder / DATASET).is_file()
    return _read(folder / (DATASET if is_dataset else KERNEL))


def _read(file: Path) -> dict:
    if not file.is_file():
        raise KaggleError(f"{file} does not exist: make it by vipr kaggle bundle, weights, prepare")
    return json.loads(file.read_bytes())


def settled(section: str, name: str, *, hours: float) -> Iterator[str]:
    """A line for each change of the status of a kernel or dataset, until it is complete or ready;
    of a competition none, where it is there.

    Raises KaggleError when it does not exist, has failed, or goes on after so many hours.
    """
    if section == "competitions":
        client(section, "files", name)
        return
    end, before = time.monotonic() + 3600 * hours, ""
    while before not in GOOD:
        answer = client(section, "status", name)
        status = (STATUS.findall(answer) or ["unknown"])[0].lower()
        if status in BAD:
            raise KaggleError(f"{name} has failed: {answer}")
        if status != before:
            yield f"{time.strftime('%H:%M')} {name}: {status}"
        elif time.monotonic() > end:
            raise KaggleError(f"{name} has not finished in {hours:g} hours: {answer}")
        else:
            time.sleep(POLL_S)
        before = status


def wait(folder: Path, *, hours: float = 24.0) -> Iterator[str]:
    """Lines of a pushed kernel: each change of its status, then the end of its log and the quota.

    Raises KaggleError as `settled` does, after these.
    """
    kernel = _metadata(folder)["id"]
    try:
        yield from settled("kernels", kernel, hours=hours)
    finally:
        with suppress(KaggleError):  # old clients have neither
            yield _tail(client("kernels", "logs", kernel))
            yield client("quota")


def _tail(log: str) -> str:
    """The last lines of a log: plain text, or Kaggle's list of pieces."""
    with suppress(ValueError):
        log = "".join(piece["data"] for piece in json.loads(log))
    return "\n".join(log.splitlines()[-15:])


def collect(folder: Path, output_dir: Path) -> Path:
    """The run folder that a pushed kernel left, in `output_dir` in place of an older one.

    Packed photos stay where they are. Raises KaggleError when the kernel failed or still runs, when
    its run has not finished, and when it is not the run that was prepared: Kaggle gives away the
    outputs of a kernel's latest version, whichever one is asked for.
    """
    kernel, prepared = _metadata(folder)["id"], _read(folder / PREPARED)
    list(settled("kernels", kernel, hours=0))
    run = prepared["run"]
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".collect-") as scratch:
        pattern = f"/{re.escape(run)}/(?!stores/)"
        client("kernels", "output", kernel, "-p", scratch, "--file-pattern", pattern)
        new = next(Path(scratch).glob(f"*/{run}"), Path(scratch, run))
        _check(kernel, prepared, new)
        if (output_dir / run).exists():
            (output_dir / run).replace(Path(scratch, "old"))
        return new.replace(output_dir / run)


def _check(kernel: str, prepared: dict, folder: Path) -> None:
    """Raises KaggleError where a kernel's run is not finished or not what was prepared."""
    try:
        record = runs.load(folder)
    except runs.RunError as error:
        raise KaggleError(
            f"{kernel} left no finished run. Where its session ended too early go on by `prepare "
            f"--session`. {error}"
        ) from None
    ran = {**record["params"], "run": record["run"], "notebook": record["notebook"]}
    ran["kit"] = record["git"].rpartition(" ")[2]
    if record["data"]["root"] == "toy-24":  # see `toy.data_root_or_toy`
        raise KaggleError(f"{kernel} ran on the toy set: {REMEDIES['competitions']}, push again")
    others = [
        f"{name} was prepared as {value!r} and ran as {ran.get(name)!r}"
        for name, value in prepared.items()
        if value != ran.get(name)
    ]
    if others:
        raise KaggleError(
            f"{kernel} ran something else: {'; '.join(others)}. Bundle, prepare and push again"
        )


def submit(folder: Path, competition: str) -> str:
    """Hand the submission of a run folder in to a competition; what Kaggle said.

    Raises KaggleError with its words where it takes none.
    """
    file, message = str(folder / "submission.csv"), f"ViPR {folder.resolve().name}"
    answer = client("competitions", "submit", competition, "-f", file, "-m", message)
    if "successfully submitted" not in answer.lower():
        raise KaggleError(f"{competition} took no submission: {answer}")
    return answer


def client(*arguments: str) -> str:
    """What the official client printed.

    Questions are asked again where the service or the line fails for a moment. Raises KaggleError
    when the client is absent, not configured, or fails.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    if not (program := shutil.which("kaggle", path=path)):
        raise KaggleError(
            "the kaggle client is not installed: pip install kaggle, then create an API token "
            "on kaggle.com"
        )
    for attempt in range(TRIES if ASKING & set(arguments[:2]) else 1):
        time.sleep(attempt * PAUSE_S)
        done = run_client([program, *arguments])
        if not done.returncode:
            return done.stdout.strip()
        answer = f"{done.stdout}{done.stderr}".strip()
        if not PASSING.search(answer):
            break
    raise KaggleError(f"kaggle {' '.join(arguments[:3])}: {answer}")


def run_client(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def main(arguments: list[str] | None = None) -> int:
    """One command; exit code 0, or 2 with what is wrong."""
    parser = argparse.ArgumentParser(
        "vipr kaggle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    commands = ["bundle", "weights", "wheels", "prepare", "push", "wait", "collect", "submit"]
    add("command", choices=commands)
    add("names", nargs="*", type=Path, help="parameter files, backbones, prepared folders or runs")
    add("--owner", default=os.environ.get("KAGGLE_USERNAME", ""), help="Kaggle user name")
    add("--output", type=Path, help="folder; kaggle, for collect submissions")
    add("-p", action="append", default=[], type=setting, metavar="name=value", help="as for run")
    add("--session", type=int, default=1, help="of a run that goes on: 2, 3, ...")
    add("--hours", type=float, default=24.0, help="to wait at most, for each")
    add("--competition", default=COMPETITION, help="to submit to")
    given = parser.parse_intermixed_args(arguments)
    if given.command not in ("bundle", "wheels") and not given.names:
        parser.error(f"{given.command} what? Give names, see vipr kaggle --help")
    try:
        for line in _lines(given, given.output or Path("kaggle")):
            print(line, flush=True)
    except (KaggleError, models.WeightsError, BadParameters, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _lines(given: argparse.Namespace, out: Path) -> Iterator[object]:
    """What the command made or was answered."""
    match given.command:
        case "bundle":
            yield bundle(out, owner=given.owner)
        case "weights":
            yield from _weights(given, out)
        case "wheels":
            yield wheels(out, owner=given.owner)
        case "prepare":
            todo = load_runs(given.names, dict(given.p))
            for run in todo:
                upstream = [other.name for other in todo if other.notebook.stem < run.notebook.stem]
                yield prepare(run, out, owner=given.owner, upstream=upstream, session=given.session)
        case "push":
            yield from push(given.names, hours=given.hours)
        case "wait":
            for folder in given.names:
                yield from wait(folder, hours=given.hours)
        case "collect":
            for folder in given.names:
                yield collect(folder, given.output or Path("submissions"))
        case "submit":
            for folder in given.names:
                yield submit(folder, given.competition)


def _weights(given: argparse.Namespace, out: Path) -> Iterator[object]:
    """The folder, after a line for each backbone that is left out of it."""
    files = [path for path in given.names if path.exists()]
    found = {path.as_posix(): "named" for path in given.names if path not in files}
    for run in load_runs(files, dict(given.p)) if files else []:
        found = backbones(run) | found
    for name in [name for name, source in found.items() if not source]:
        yield f"{name} is left out: its weights cannot be had"
    chosen = [name for name, source in found.items() if source not in ("", "random")]
    yield weights(chosen, out, owner=given.owner)
