"""Notebooks 01, 02 and 05 on data of every shape: what cannot be done is said and stepped over."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import shapes

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
QUICK = {"epochs": 1, "image_size": 32, "backbone": "siamese_small", "n_products": 2}


def run(stem: str, root: Path, folder: Path, **parameters) -> dict:
    """What the names of a notebook stand for after all of its cells have run on that data."""
    values = {"data_root": str(root), "output_dir": str(folder), "cache_dir": str(folder / "cache")}
    names = {}
    for cell in json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with redirect_stdout(io.StringIO()):
                exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(values, **parameters)
    return names


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_look_at_the_data_runs_on_every_shape(shape, toy_root, tmp_path):
    root = shapes.cut(shape, toy_root, tmp_path / "root")
    names = run("01_eda", root, tmp_path, image_size=32)
    assert names["found"]["unreadable files"] == len(names["lost"])
    assert (names["looks"]["width"] >= 96).all(), "sizes are those of the files, not of the store"


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_preview_of_augmentations_runs_on_every_shape(shape, toy_root, tmp_path):
    root = shapes.cut(shape, toy_root, tmp_path / "root")
    names = run("02_augmentation_preview", root, tmp_path, image_size=32, n_images=4)
    assert set(names["recipes"]) == {"study", "kit", "strong"}


@pytest.mark.parametrize(
    "shape, used",
    [
        ("one_photo_a_product", ["nearest"]),
        ("two_products_and_three_queries", ["random"]),
        ("no_labels", ["capped", "nearest"]),
        ("one_product_of_300_photos", ["nearest"]),
    ],
)
def test_subset_uses_the_strategies_that_find_products(shape, used, toy_root, tmp_path):
    root = shapes.cut(shape, toy_root, tmp_path / "root")
    names = run("05_subset_finetune", root, tmp_path, **QUICK)
    assert list(names["subsets"]) == used


def test_subset_strategies_are_validated_on_the_same_queries_and_gallery(toy_root, tmp_path):
    names = run("05_subset_finetune", toy_root, tmp_path, **QUICK)
    view = names["task"].views["validation"]
    sizes = {(m["n_queries"], m["n_gallery"]) for m in names["validated"].values()}
    assert sizes == {(len(view.queries), len(view.gallery))}
    for strategy, history in names["histories"].items():
        kept = names["validated"][strategy]["map_at_5"]
        assert history["map_at_5"].max() == pytest.approx(kept, abs=1e-6)
