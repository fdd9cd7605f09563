"""Small data roots for the tests, and the real set where it is there."""

import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog, toy
from vipr_utils.data.store import build_store

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS") or 1)
)  # two test processes share the machine
REAL = Path(
    os.environ.get("VIPR_GROCERY")
    or Path(__file__).resolve().parents[2] / "shared" / "data" / "grocery"
)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """Eight products of the toy set at 96 px."""
    return toy.generate(tmp_path_factory.mktemp("toy") / "toy", products=8, image_size=96)


@pytest.fixture(scope="session")
def toy_data(toy_root, tmp_path_factory):
    """(photos, store) of the eight products."""
    photos, _ = catalog.read(toy_root)
    return photos, build_store(photos, cache_dir=tmp_path_factory.mktemp("cache"), store_px=96)


@pytest.fixture(scope="session")
def grocery():
    """The real set: 81 grocery products, 2,721 gallery and 2,485 query photos."""
    if not (REAL / "train.csv").is_file():
        pytest.skip("the grocery set is not here: put it beside the checkout or set $VIPR_GROCERY")
    return REAL


@pytest.fixture
def make_root(tmp_path):
    """make_root(train_csv, test_csv): a data root with a small JPEG for each name in them."""

    def make(
        train: str = "name,class,group\na.jpg,1,0\nb.jpg,1,0\nc.jpg,2,0\n",
        test: str | None = "name,class\nq.jpg,1\n",
    ):
        root = tmp_path / "root"
        for split, text in (("train", train), ("test", test)):
            (root / split).mkdir(parents=True, exist_ok=True)
            if text is None:
                continue
            (root / f"{split}.csv").write_text(text)
            for i, name in enumerate(
                pd.read_csv(root / f"{split}.csv", dtype=str)
                .get("name", pd.Series(dtype=str))
                .dropna()
            ):
                if ".." not in name and not name.startswith("/"):
                    (root / split / name).parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(root / split / name), picture(i))
        return root

    return make


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth random picture (H, W, 3) uint8, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
