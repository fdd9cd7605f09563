"""The whole series on every shape of catalogue: each notebook ends, and 06 leaves a submission."""

import json
import os

import pandas as pd
import pytest
import series
from shapes import SHAPES, cut

from vipr_utils.judge import plots, submission
from vipr_utils.retrieve import reading
from vipr_utils.run import params

ALIKE = {  # once loaded, as others are
    "folders_with_labels",
    "folders_gallery_and_queries",
    "folder_with_other_files",
    "kaggles_test_table_alone",
}
LONG = {  # left to `make soak`; what is peculiar to them the rest of the suite has too
    "names_with_blanks_and_umlauts",
    "two_photos_a_product",
    "customer_photos_alone",
    "one_product_of_300_photos",
    "no_domain_and_no_group",
    "product_names_in_text",
    "two_products_and_three_queries",
    "one_photo_a_product",
    "no_labels",
}
LEFT_OUT = ALIKE if os.environ.get("VIPR_SOAK") else ALIKE | LONG
SWEEPS = (  # of each notebook, protocol and way of pooling one
    "best-seed0,best_submission-seed0,gordo-rmac,gap_unseen-whitened,"
    "study_scratch-triplet-manhattan-seed0,study_subset-lite0"
)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a mean of nothing, say


@pytest.fixture(autouse=True)
def figures_unrendered(monkeypatch):
    """Half of the time would go into pixels that nobody looks at, and into photos read."""

    def picture(figure, title, caption, alt):
        return plots.Picture(b"", alt)

    monkeypatch.setattr(plots, "_picture", picture)
    monkeypatch.setattr(reading, "available", lambda: False)  # `make smoke` reads


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in LEFT_OUT])
def test_every_notebook_ends_on_every_shape_and_leaves_an_answer_to_every_query(
    shape, toy_root, tmp_path
):
    root = cut(shape, toy_root, tmp_path / "root")
    folders = {"output_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    names = {stem: series.run(stem, data_root=str(root), **folders) for stem in series.STEMS}
    for stem in series.STEMS:
        record = json.loads((tmp_path / stem / "run.json").read_text(encoding="utf-8"))
        assert record["notebook"] == stem
    assert len(submission.validate(tmp_path / "06_submission" / "submission.csv", root))

    seen = names["01_eda"]
    assert seen["found"]["unreadable files"] == len(seen["lost"])
    assert (seen["files"]["width"] >= 96).all(), "sizes are those of the files, not of the store"
    assert set(names["02_augmentation_preview"]["recipes"]) == {"study", "kit", "strong"}


@pytest.mark.long
def test_rows_of_the_sweeps_end(toy_root, tmp_path):
    places = {"data_root": str(toy_root), "output_dir": str(tmp_path), "cache_dir": str(tmp_path)}
    small = {"image_size": 32, "test_size": 32, "epochs": 1, "batch_size": 16, "n_products": 3}
    rows = params.load_runs([series.ROOT / "params" / "sweeps" / "laptop"], only=SWEEPS)
    assert len(rows) == len(SWEEPS.split(","))
    for row in rows:
        series.run(row.notebook.stem, **row.params | small | places)
        record = json.loads((tmp_path / row.name / "run.json").read_text(encoding="utf-8"))
        assert 0 <= record["metrics"]["map_at_5"] <= 1


@pytest.mark.long
def test_files_of_kaggle_t4_end_on_a_small_set(toy_root, tmp_path):
    """At Products-10K's numbers it is `make rehearsal`, at a fiftieth of them `make soak`."""
    places = {"data_root": str(toy_root), "output_dir": str(tmp_path), "cache_dir": str(tmp_path)}
    tiny = {name: value for name, value in series.COMMON.items() if name != "device"}
    tiny |= {"network": "test_resnet", "test_size": 32, "head_epochs": 1, "n_products": 3}
    tiny["readings"] = []  # the toy set's photos take minutes to read
    rows = params.load_runs([series.ROOT / "params" / "kaggle_t4"])
    assert [row.notebook.stem for row in rows] == series.STEMS
    for row in rows:
        series.run(row.notebook.stem, **row.params | tiny | places)
    assert len(submission.validate(tmp_path / "06_submission" / "submission.csv", toy_root))


@pytest.mark.parametrize(
    "shape, used",
    [
        ("one_photo_a_product", ["nearest"]),
        ("two_products_and_three_queries", ["random"]),
        ("no_labels", ["capped", "nearest"]),
        pytest.param("one_product_of_300_photos", ["nearest"], marks=pytest.mark.long),
    ],
)
def test_subset_uses_the_strategies_that_find_products(shape, used, toy_root, tmp_path):
    root = cut(shape, toy_root, tmp_path / "root")
    folders = {"output_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    asked = {"backbone": "siamese_small", "n_products": 2}
    names = series.run("05_subset_finetune", data_root=str(root), **folders, **asked)
    assert list(names["subsets"]) == used


def test_subset_strategies_are_validated_on_the_same_queries_and_gallery(toy_root, tmp_path):
    folders = {"output_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    names = series.run("05_subset_finetune", data_root=str(toy_root), **folders)
    view = names["task"].views["validation"]
    sizes = {(m["n_queries"], m["n_gallery"]) for m in names["validated"].values()}
    assert sizes == {(len(view.queries), len(view.gallery))}
    for strategy, history in names["histories"].items():
        kept = names["validated"][strategy]["map_at_5"]
        assert history["map_at_5"].max() == pytest.approx(kept, abs=1e-6)


def test_labels_taken_out_of_the_test_table_leave_the_submission_the_same(toy_root, tmp_path):
    written = []
    for name in ("known", "blind"):
        root = cut("two_photos_a_product", toy_root, tmp_path / name)
        if name == "blind":
            pd.read_csv(root / "test.csv")[["name"]].to_csv(root / "test.csv", index=False)
        runs, cache = tmp_path / f"{name}-runs", tmp_path / f"{name}-cache"
        for stem in ("04_pretrained_sweep", "06_submission"):
            series.run(stem, data_root=str(root), output_dir=str(runs), cache_dir=str(cache))
        written.append((runs / "06_submission" / "submission.csv").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "shape, stems",
    [
        ("two_photos_a_product", ["04_pretrained_sweep", "06_submission"]),
        pytest.param("two_photos_a_product", series.STEMS[2:], marks=pytest.mark.long),
        pytest.param("no_labels", series.STEMS[2:], marks=pytest.mark.long),
    ],
)
def test_nothing_held_out_leaves_nothing_to_choose_by_and_every_notebook_ends(
    shape, stems, toy_root, tmp_path
):
    root = cut(shape, toy_root, tmp_path / "root")
    for stem in stems:
        series.run(
            stem,
            data_root=str(root),
            output_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
            holdout=0.0,
            choose="none",
            submission_format="classification",
        )
        record = json.loads((tmp_path / stem / "run.json").read_text(encoding="utf-8"))
        assert not record["validation"]
    assert len(submission.validate(tmp_path / "06_submission" / "submission.csv", root))
