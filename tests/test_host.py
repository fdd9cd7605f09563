"""Where the kit runs: folders, files written whole, devices, memory."""

import errno
import os
import pickle
import platform as python_platform
import random
import re
import socket
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import torch

from vipr_utils.data import transforms
from vipr_utils.data.store import Photos
from vipr_utils.host import platform, progress
from vipr_utils.host.device import (
    autocast,
    compute_dtype,
    cores,
    hardware,
    precision_used,
    seed_everything,
    tune,
    versions,
    working_device,
)
from vipr_utils.host.files import locked, whole_file, write_whole


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No platform, no data, no cache but what the test makes."""
    for name in (
        "KAGGLE_KERNEL_RUN_TYPE",
        "COLAB_RELEASE_TAG",
        "VIPR_DATA",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "PLATFORM_ROOT", tmp_path)
    monkeypatch.setattr(platform, "KAGGLE_WORKING", tmp_path / "kaggle" / "working")
    monkeypatch.setattr(platform, "COLAB_CONTENT", tmp_path / "content")
    monkeypatch.setattr(platform, "COLAB_DRIVE", tmp_path / "content" / "drive" / "MyDrive")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def data_root(folder, header="name,class,group", images=True):
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text(f"{header}\n1.jpg,0,0\n")
    if images:
        (folder / "train").mkdir()
    return folder


def on_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")


# -------------------------------------------------------------------------------------------- data


def test_platform_is_told_by_environment_variables(monkeypatch):
    assert platform.where() == "local"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-20261101")
    assert platform.where() == "colab"
    on_kaggle(monkeypatch)
    assert platform.where() == "kaggle"


def test_given_folder_wins_over_the_environment_variable_and_that_over_attached_data(
    tmp_path, monkeypatch
):
    given, named = data_root(tmp_path / "given"), data_root(tmp_path / "named")
    attached = data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "products-10k")
    on_kaggle(monkeypatch)
    assert platform.find_data_root() == (attached, f"attached: {attached}")
    monkeypatch.setenv("VIPR_DATA", str(named))
    assert platform.find_data_root() == (named, "$VIPR_DATA")
    assert platform.find_data_root(str(given)) == (given, "parameter data_root")


@pytest.mark.parametrize("exists", [False, True])
def test_a_named_folder_that_is_no_data_root_is_an_error_and_not_the_toy_set(
    tmp_path, monkeypatch, exists
):
    folder = tmp_path / "photos"
    if exists:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match="parameter data_root: .*photos has no train.csv"):
        platform.find_data_root(str(folder))
    monkeypatch.setenv("VIPR_DATA", str(folder))
    with pytest.raises(FileNotFoundError, match=r"\$VIPR_DATA: "):
        platform.find_data_root()


def test_nothing_attached_means_the_toy_set(monkeypatch):
    assert platform.find_data_root() == (None, "toy")
    on_kaggle(monkeypatch)
    assert platform.find_data_root() == (None, "toy")


def test_attached_data_is_not_looked_for_on_a_local_machine():
    data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "products-10k")
    assert platform.find_data_root() == (None, "toy")


@pytest.mark.parametrize(
    "mount",
    [
        "competitions/products-10k",
        "datasets/warcoder/visual-product-recognition",
        "datasets/warcoder/visual-product-recognition/products",
        "products-10k",
    ],
)
def test_both_ways_in_which_kaggle_mounts_data_are_found(monkeypatch, mount):
    on_kaggle(monkeypatch)
    data_root(
        platform.PLATFORM_ROOT / "kaggle" / "input" / "datasets" / "someone" / "houses",
        header="id,price",
    )  # another competition's
    folder = data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / mount)
    assert platform.find_data_root() == (folder, f"attached: {folder}")


@pytest.mark.parametrize("names", [("train", "test"), ("gallery", "queries")])
def test_data_in_folders_alone_is_found_where_it_is_named_and_where_it_is_attached(
    monkeypatch, names
):
    on_kaggle(monkeypatch)
    inputs = platform.PLATFORM_ROOT / "kaggle" / "input"
    (inputs / "weights" / "train").mkdir(parents=True)  # neither products nor queries
    (inputs / "houses" / "train" / "red").mkdir(parents=True)
    (inputs / "houses" / "test").mkdir()
    (inputs / "houses" / "train.csv").write_text("id,price\n")  # another competition's
    assert platform.find_data_root() == (None, "toy")
    for name in names:
        (inputs / "shop" / name / "mug").mkdir(parents=True)
    assert platform.find_data_root() == (inputs / "shop", f"attached: {inputs / 'shop'}")
    assert platform.find_data_root(str(inputs / "shop"))[1] == "parameter data_root"


def test_header_may_have_a_byte_order_mark_quotes_and_blanks(monkeypatch):
    on_kaggle(monkeypatch)
    folder = data_root(
        platform.PLATFORM_ROOT / "kaggle" / "input" / "windows", header='\ufeff"name", "class"'
    )
    assert platform.find_data_root()[0] == folder


def test_image_folders_are_never_listed(monkeypatch):
    on_kaggle(monkeypatch)
    products = platform.PLATFORM_ROOT / "kaggle" / "input" / "competitions" / "products-10k"
    hidden = data_root(products / "train" / "products", images=False)
    listed = []
    sys.addaudithook(
        lambda event, given: listed.extend(given) if event in ("os.scandir", "os.listdir") else None
    )
    with pytest.raises(FileNotFoundError, match="a competition is attached and holds no train.csv"):
        platform.find_data_root()
    assert str(products) in map(str, listed) and str(hidden.parent) not in map(str, listed)


def test_folder_named_like_the_table_is_passed_over(monkeypatch):
    on_kaggle(monkeypatch)
    (platform.PLATFORM_ROOT / "kaggle" / "input" / "houses" / "train.csv").mkdir(
        parents=True
    )  # an unpacked archive
    assert platform.find_data_root() == (None, "toy")


def test_search_ends_at_its_depth(monkeypatch):
    on_kaggle(monkeypatch)
    data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "a" / "b" / "c" / "d" / "e")
    assert platform.find_data_root() == (None, "toy")


def test_tables_with_images_go_before_tables_alone(monkeypatch):
    on_kaggle(monkeypatch)
    tables = data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "a-tables", images=False)
    assert platform.find_data_root()[0] == tables
    whole = data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "datasets" / "owner" / "whole")
    assert platform.find_data_root()[0] == whole


@pytest.mark.parametrize(
    "place",
    [
        "content/products-10k",
        "content/drive/MyDrive/vipr/products-10k",
        "kaggle/input/products-10k",
        "root/.cache/kagglehub/datasets/warcoder/visual-product-recognition/versions/1",
    ],
)
def test_data_on_colab_is_found_in_content_drive_and_the_kagglehub_cache(
    tmp_path, monkeypatch, place
):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    folder = data_root(tmp_path / place)
    assert platform.find_data_root()[0] == folder


@pytest.mark.parametrize(
    "mount",
    [
        "kit",
        "kit/vipr",
        "datasets/me/kit",
        "datasets/me/kit/vipr",
        "notebooks/me/run/deep",
        "models/me/net/pytorch/default/1",
    ],
)
def test_attached_file_is_found_at_the_root_of_an_input_or_one_folder_below(monkeypatch, mount):
    file = (
        platform.PLATFORM_ROOT / "kaggle" / "input" / mount / "submissions" / "04[a]" / "model.pt"
    )
    file.parent.mkdir(parents=True)
    file.touch()
    assert platform.attached("submissions/04[a]") == []  # nothing is attached to a laptop
    on_kaggle(monkeypatch)
    assert (
        platform.attached("submissions/04[a]") == [file.parent]
        and platform.attached("submissions/04") == []
    )
    assert platform.find_run("04[a]") == file.parent  # the output of an earlier notebook
    own = platform.run_folder("submissions", "04[a]")
    (own / "model.pt").touch()
    assert platform.find_run("04[a]") == own and platform.find_run(str(file.parent)) == file.parent


def test_run_that_is_nowhere_is_looked_for_in_the_output_folder(tmp_path):
    assert platform.find_run("05", output_dir=str(tmp_path)) == tmp_path / "05"


# ------------------------------------------------------------------------------- folders and files


def test_relative_output_is_kept_in_kaggle_working_or_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "repository", lambda: tmp_path / "checkout")
    assert platform.output_folder("out") == tmp_path / "checkout" / "out"
    on_kaggle(monkeypatch)
    assert platform.output_folder("out") == tmp_path / "kaggle" / "working" / "out"
    assert platform.output_folder(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()


def test_relative_output_on_colab_is_kept_on_the_mounted_drive(tmp_path, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert platform.output_folder("out") == tmp_path / "content" / "out"
    (tmp_path / "content" / "drive" / "MyDrive").mkdir(parents=True)
    assert (
        platform.output_folder("out") == tmp_path / "content" / "drive" / "MyDrive" / "vipr" / "out"
    )


def test_cache_is_the_parameter_then_the_platforms_scratch(tmp_path, monkeypatch):
    assert platform.cache_folder() == tmp_path / "home" / ".cache" / "vipr"
    on_kaggle(monkeypatch)
    assert platform.cache_folder() == tmp_path / "kaggle" / "temp" / "vipr"
    assert platform.cache_folder(str(tmp_path / "given")) == tmp_path / "given"


def test_run_folder_is_made_below_the_output_folder(tmp_path):
    folder = platform.run_folder(str(tmp_path / "out"), "03_scratch_siamese")
    assert folder == tmp_path / "out" / "03_scratch_siamese" and folder.is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "a\\b", "what?", "two\nlines"])
def test_run_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no plain folder name"):
        platform.run_folder(str(tmp_path), name)
    assert not list(tmp_path.glob("*/run.json"))


def test_whole_file_takes_its_place_only_when_complete(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with whole_file(path) as part:
        part.write_text("complete")
        assert part.parent == path.parent and not path.exists()
    assert path.read_text() == "complete" and list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert (
        path.stat().st_mode == plain.stat().st_mode
    )  # not mkstemp's private mode: others must read results


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt()])
def test_whole_file_keeps_the_old_file_on_any_error(tmp_path, error):
    path = tmp_path / "model.pt"
    path.write_text("old")
    with pytest.raises(type(error)):
        with whole_file(path) as part:
            part.write_text("half of")
            raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(
            "[enforce fail at inline_container.cc:858] . "
            "PytorchStreamWriter failed writing file data/0"
        ),
    ],
)
def test_full_disk_is_named_with_file_room_and_remedy_and_the_old_file_stays(tmp_path, error):
    path = tmp_path / "model.pt"
    path.write_text("old")
    message = r"disk full while writing model\.pt .*GB free.*output_dir or cache_dir"
    with pytest.raises(OSError, match=message) as caught:
        with whole_file(path) as part:
            part.write_text("half of")
            raise error
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_disk_that_fills_up_when_the_file_is_flushed_is_named_too(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full while writing images.bin"):
        with whole_file(tmp_path / "images.bin") as part:
            part.write_bytes(b"1")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def keeps_little(monkeypatch):
    """Kaggle, but 3,000 bytes of /kaggle/working are kept."""
    on_kaggle(monkeypatch)
    monkeypatch.setattr(platform, "KEPT_GB", 3000 / 1e9)
    return platform.output_folder("out")


def test_file_that_would_pass_what_kaggle_keeps_is_refused_and_the_old_one_stays(
    tmp_path, keeps_little
):
    path = keeps_little / "model.pt"
    path.write_bytes(b"x" * 1000)
    assert platform.room_gb(keeps_little) * 1e9 == pytest.approx(2000)
    with whole_file(path) as part:
        part.write_bytes(b"y" * 1900)
    with pytest.raises(
        OSError,
        match=r"disk full while writing model\.pt .*limit of 3e-06 GB in .*output_dir or cache_dir",
    ):
        with whole_file(path) as part:
            part.write_bytes(b"z" * 1200)
    assert path.read_bytes() == b"y" * 1900 and list(keeps_little.iterdir()) == [path]
    with whole_file(platform.cache_folder() / "images.bin") as part:  # scratch has no such limit
        part.write_bytes(b"z" * 9000)


HOLD = "import sys; from pathlib import Path; from vipr_utils.host.files import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"


def test_lock_lets_one_process_in_at_a_time_and_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline().strip() == b"in"
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / "run" / ".lock").acquire(timeout=0.05)
        other.kill()
    with locked(tmp_path / "run"):
        pass


def test_file_that_windows_holds_open_is_named_with_the_remedy(tmp_path, monkeypatch):
    def held(part, path):
        raise PermissionError(13, "The process cannot access the file")

    (tmp_path / "images.bin").write_text("old")
    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(PermissionError, match="images.bin cannot be replaced .*close what has it"):
        with whole_file(tmp_path / "images.bin") as part:
            part.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["images.bin"]


# --------------------------------------------------------------------- Windows and macOS, faked


@pytest.mark.parametrize("name", ["C:", "C:\\runs", "nul", "COM1.txt", "ends. ", "dot.", "bell\a"])
def test_run_name_that_windows_refuses_is_refused_everywhere(tmp_path, name):
    with pytest.raises(ValueError, match="no plain folder name"):
        platform.run_folder(str(tmp_path), name)


def test_process_is_tuned_without_glibc_and_without_its_library(monkeypatch):
    def library(name):
        raise OSError(f"there is no {name} here")

    monkeypatch.setattr("ctypes.CDLL", library)
    for libc in (("", ""), ("musl", "1.2")):  # Windows and macOS, Alpine
        monkeypatch.setattr(python_platform, "libc_ver", lambda libc=libc: libc)
        tune(torch.get_num_threads())


def test_apple_gpu_computes_in_float32_without_a_word(monkeypatch, recwarn):
    monkeypatch.delenv("VIPR_PRECISION", raising=False)
    mps = torch.device("mps")
    for training in (False, True):
        assert compute_dtype("auto", mps, training=training) is torch.float32
    assert not autocast(mps, torch.float32)._enabled and not list(recwarn)


@pytest.mark.parametrize("name", ["kit", "strong", "study", "none"])
def test_photos_can_be_sent_to_worker_processes_that_are_spawned(toy_data, name):
    photos, store = toy_data
    for transform in (transforms.augmentation(name, 32), transforms.Evaluation(32)):
        given = Photos(store, photos.index, transform, clutter=0.5, shop=True)
        sent = pickle.loads(pickle.dumps(given))
        assert torch.equal(sent[3][0], given[3][0])


# -------------------------------------------------------------------------------------- progress


@pytest.fixture
def log():
    """The logger as it is before any notebook began."""
    before = progress.LOG.handlers[:]
    progress.LOG.handlers.clear()
    yield progress.LOG
    for handler in progress.LOG.handlers:
        handler.close()
    progress.LOG.handlers[:] = before


def test_preflight_lets_progress_go_to_the_file_that_is_named_once(tmp_path, monkeypatch, log):
    platform.preflight({})
    assert not log.handlers  # on a laptop without a file: the notebook's own lines are enough
    monkeypatch.setenv("VIPR_LOG", str(tmp_path / "log.txt"))
    for _ in range(2):
        platform.preflight({})
    log.info("epoch 1/2, 3 minutes left")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d vipr epoch 1/2, 3 minutes left", line)


def test_progress_is_shown_on_kaggle_where_no_file_is_named(monkeypatch, capsys, log):
    monkeypatch.delenv("VIPR_LOG", raising=False)
    on_kaggle(monkeypatch)
    platform.preflight({})
    log.info("epoch 1/2")
    assert capsys.readouterr().err.endswith(" vipr epoch 1/2\n")


# --------------------------------------------------------------------------------------- preflight


def test_preflight_says_what_is_here_and_warns_of_nothing_on_a_laptop_with_the_toy_set(recwarn):
    table = platform.preflight({"epochs": 3})
    items = ["data", "device", "memory", "outputs", "cache", "weights"]
    assert list(table.index) == items
    assert table.found["data"] == "toy set (generated)"
    assert re.fullmatch(r"\d+ GB available", table.found["memory"])
    assert not [w for w in recwarn if "session" in str(w.message) or "GPU" in str(w.message)]


def test_preflight_of_real_photos_on_kaggle_without_gpu_and_time_limit_warns_of_both(monkeypatch):
    on_kaggle(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    data_root(platform.PLATFORM_ROOT / "kaggle" / "input" / "products-10k")
    with pytest.warns(UserWarning) as warned:
        platform.preflight({"epochs": 3, "max_minutes": 0.0})
    gpu, limit = "choose Settings > Accelerator > GPU T4 x2", "set max_minutes"
    assert {gpu, limit} <= {
        str(w.message).split(": ")[-1].split("done or not: ")[-1] for w in warned
    }
    with pytest.warns(UserWarning) as warned:
        platform.preflight({"epochs": 3, "max_minutes": 90.0})
    assert not any(limit in str(w.message) for w in warned)


def test_preflight_names_the_p100s_way_out(p100):
    with pytest.warns(UserWarning, match="no kernel image.*Settings > Accelerator > GPU T4 x2"):
        platform.preflight({})


def test_preflight_warns_of_a_full_disk_and_of_photos_that_would_fill_what_is_kept(keeps_little):
    with pytest.warns(UserWarning) as warned:
        platform.preflight({"cache_dir": str(keeps_little / "cache")})
    advice = "0 GB free, {} GB are needed: free some or name another"
    assert any(str(w.message).endswith(f"submissions: {advice.format(2)}") for w in warned)
    assert any(str(w.message).endswith(f"cache: {advice.format(1)}") for w in warned)


def test_preflight_ends_at_a_wrong_data_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no train.csv"):
        platform.preflight({"data_root": str(tmp_path / "nowhere")})


# ------------------------------------------------------------------------------- device and memory


@pytest.fixture
def p100(monkeypatch):
    """A card that says it is available and runs nothing."""

    def ones(*size, device):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\n"
            "CUDA kernel errors might be asynchronously reported at some other API call"
        )

    def accelerator(check_available):
        return torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", ones)


NO_KERNEL = (
    r"device 'cuda' does not work: CUDA error: no kernel image is available for execution on the "
    r"device\. .*Settings > Accelerator > GPU T4 x2$"
)


def test_card_without_kernels_is_passed_over_with_the_menu_entry_that_helps(p100):
    with pytest.warns(UserWarning, match=NO_KERNEL):
        assert working_device() == torch.device("cpu")


def test_card_without_kernels_is_an_error_when_it_was_asked_for(p100):
    with pytest.raises(RuntimeError, match=NO_KERNEL):
        working_device("cuda")


@pytest.mark.parametrize("name", ["cuda", "abacus"])
def test_named_device_that_does_not_exist_is_an_error(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RuntimeError, match=f"device '{name}' does not work"):
        working_device(name)


def test_cpu_can_be_asked_for():
    assert working_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_working_card_is_taken():
    assert working_device().type == "cuda"
    assert hardware() == torch.cuda.get_device_name()


def test_tune_sets_threads_from_argument_variable_or_cores_and_may_be_called_twice(monkeypatch):
    before = torch.get_num_threads()
    try:
        for variable, argument, threads in (
            ("2", 1, 1),
            ("2", 0, 2),
            ("1,4", 0, 1),
            ("", 0, cores()),
        ):
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
            for _ in range(2):
                tune(argument)
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.skipif(python_platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_tuned_process_does_not_fault_the_same_memory_in_again():
    code = """
import resource, sys, torch
from vipr_utils.host.device import tune
if sys.argv[1] == "tuned":
    tune(1)
for step in range(18):
    if step == 8:  # the heap has grown to what the steps need
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(10_000_000).fill_(1.0)  # 40 MB: above what glibc learns to keep by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""
    faults = {}
    for kind in ("naive", "tuned"):
        done = subprocess.run(
            [sys.executable, "-c", code, kind], capture_output=True, text=True, check=True
        )
        faults[kind] = int(done.stdout)
    assert faults["tuned"] < 0.1 * faults["naive"] + 100, faults


def test_older_glibc_that_refuses_a_large_threshold_gets_a_smaller_one(monkeypatch):
    calls = []

    class OldLibc:
        def mallopt(self, option, value):
            calls.append((option, value))
            return int(not (option == -3 and value > 1 << 25))

    monkeypatch.setattr(python_platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: OldLibc())
    tune(torch.get_num_threads())
    assert (-3, 1 << 25) in calls and calls[-1][0] == -2


def test_seed_repeats_python_numpy_and_torch():
    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_run_record_names_versions_and_hardware():
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert list(versions())[0] == "python"
    assert torch.cuda.is_available() or hardware().split(",")[0] == (
        "1 core" if cores() == 1 else f"{cores()} cores"
    )


def test_revision_is_empty_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "repository", lambda: None)
    assert platform.git_revision() == ""
    monkeypatch.setattr(platform, "repository", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert platform.git_revision() == ""


# --------------------------------------------------------------------------------------- precision


def test_precision_is_what_was_asked_for_then_the_environments_then_what_pays(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("VIPR_PRECISION", "bfloat16")
    assert compute_dtype("float32", cpu) is torch.float32
    assert compute_dtype("auto", cpu) is compute_dtype("auto", cpu, training=True) is torch.bfloat16
    monkeypatch.delenv("VIPR_PRECISION")
    for capability, half in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None, c=capability: c
        )
        assert compute_dtype("auto", cuda) is compute_dtype("auto", cuda, training=True) is half


@pytest.mark.parametrize(
    ("amx", "avx512", "embedding", "training"),
    [
        (True, True, "bfloat16", "bfloat16"),
        (False, True, "bfloat16", "float32"),
        (False, False, "float32", "float32"),
    ],
)
def test_precision_on_a_cpu_goes_by_its_units(monkeypatch, amx, avx512, embedding, training):
    monkeypatch.delenv("VIPR_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert precision_used("auto", torch.device("cpu")) == {
        "embedding": embedding,
        "training": training,
    }


def test_unknown_precision_names_where_it_was_set_and_the_known(monkeypatch):
    with pytest.raises(
        ValueError,
        match="precision 'half' is unknown, .*: use 'auto', 'float32', 'bfloat16' or 'float16'",
    ):
        compute_dtype("half", torch.device("cpu"))
    monkeypatch.setenv("VIPR_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"'fp8' is unknown, by parameter or \$VIPR_PRECISION"):
        compute_dtype("auto", torch.device("cpu"))


def test_what_killed_writers_left_is_swept_and_what_others_write_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = {
        f".a.{host}-{gone.pid}-x.part": False,  # its writer has ended
        f".b.{host}-{os.getpid()}-x.part": True,  # its writer lives
        ".c.elsewhere-1-x.part": True,  # of another machine, new
        ".d.elsewhere-1-x.part": False,  # of another machine, two days old
        "e.part": True,  # nobody's temporary file
    }
    for name in names:
        (tmp_path / name).write_text("half")
    two_days = time.time() - 2 * 86400
    os.utime(tmp_path / ".d.elsewhere-1-x.part", (two_days, two_days))
    write_whole(tmp_path / "new", "whole")
    assert {name: (tmp_path / name).is_file() for name in names} == names
    assert (tmp_path / "new").read_text() == "whole"
