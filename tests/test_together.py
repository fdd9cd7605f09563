"""Two processes on the same folders, and a disk that is full, read-only or fails in passing."""

import errno
import multiprocessing
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import killed
import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog, store, toy
from vipr_utils.host import files
from vipr_utils.retrieve import cache

SPAWN = multiprocessing.get_context("spawn")  # a fork of what has trained cannot train


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    return toy.generate(tmp_path_factory.mktemp("toy") / "toy", products=4, image_size=64)


def series(root, place):
    torch.set_num_threads(1)
    killed.series(root, place, SimpleNamespace(value=0))


@pytest.mark.long
def test_two_series_on_one_cache_and_one_output_folder_come_to_what_one_does(small_root, tmp_path):
    alone = SPAWN.Process(target=series, args=(small_root, tmp_path / "alone"))
    both = [SPAWN.Process(target=series, args=(small_root, tmp_path / "both")) for _ in range(2)]
    for process in (*both, alone):
        process.start()
    for process in (*both, alone):
        process.join(120)
        assert process.exitcode == 0
    assert killed.outcome(tmp_path / "both") == killed.outcome(tmp_path / "alone")
    assert not list(tmp_path.rglob("*.part"))


# ------------------------------------------------------------------------------- disks that fail


@pytest.fixture
def mounted(tmp_path):
    """mounted(options): a folder that is a small file system in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        asked = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
        if asked.returncode:
            pytest.skip("this machine lets nobody mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


def test_store_that_does_not_fit_is_refused_before_it_is_packed(small_root, mounted, monkeypatch):
    photos, _ = catalog.read(small_root)
    monkeypatch.setattr(store, "BLOCK", 8)
    folder = mounted("size=64k")
    with pytest.raises(OSError, match="has room for .* name another cache_dir") as caught:
        store.build_store(photos, cache_dir=folder, store_px=64)
    assert caught.value.errno == errno.ENOSPC
    assert not list(folder.rglob("*.safetensors"))


def test_full_disk_keeps_what_is_whole_and_goes_on_once_there_is_room(mounted):
    folder, rows = mounted("size=200k"), np.arange(64)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(120_000))
    told = {"block": 16, "compute": lambda some: np.repeat(some[:, None], 200, axis=1)}
    with pytest.raises(OSError, match="disk full while writing .* the file before it is untouched"):
        cache.kept(folder / "features" / "x", rows, **told)
    left = list((folder / "features").rglob("*"))
    kept = [path for path in left if path.suffix == ".npz"]
    assert kept and not [path for path in left if path.suffix == ".part"]
    ballast.unlink()
    asked = []
    found = cache.kept(
        folder / "features" / "x",
        rows,
        block=16,
        compute=lambda some: asked.extend(some) or told["compute"](some),
    )
    assert [row[0] for row in found] == rows.tolist() and len(asked) == 64 - 16 * len(kept)


def test_read_only_folder_is_named_and_nothing_is_lost(mounted, tmp_path):
    folder = mounted("size=200k")
    files.write_whole(folder / "run.json", "old")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with pytest.raises(OSError, match="disk|ead-only"):
        files.write_whole(folder / "run.json", "new")
    assert (folder / "run.json").read_text() == "old"


def test_disk_that_fails_in_passing_leaves_no_fault_behind(small_root, tmp_path, monkeypatch):
    """Every third photo is read on the second attempt."""
    photos, _ = catalog.read(small_root)
    read, asked = Path.read_bytes, {}

    def flaky(path):
        asked[path] = asked.get(path, 0) + 1
        if asked[path] == 1 and len(asked) % 3 == 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(files, "WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Path, "read_bytes", flaky)
    packed = store.build_store(photos, cache_dir=tmp_path / "flaky", store_px=64)
    monkeypatch.undo()
    whole = store.build_store(photos, cache_dir=tmp_path / "whole", store_px=64)
    assert max(asked.values()) == 2 and packed.problems.empty
    pd.testing.assert_frame_equal(packed.files, whole.files)
