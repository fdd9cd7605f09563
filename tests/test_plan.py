"""What runs would take is told before they run: sums by hand, limits of this machine, no kernel."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from vipr_utils.data import catalog
from vipr_utils.data.store import build_store, packed_px
from vipr_utils.host import platform
from vipr_utils.run import batch, kernel, params, plan, report

CPU = torch.device("cpu")
STAGES = ["store", "training", "embedding", "search", "minutes"]
SECONDS = pd.Series({"store": 0.5, "look": 0.1, "augmented": 0.3, "forward": 0.2, "step": 0.7})
NETWORK = plan.NetworkCost(
    50_000_000, 1000, SECONDS.forward, SECONDS.step, 2e-3
)  # 2 MB of activations an image


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A machine that takes these seconds: 1,000 gallery photos of 100 products, 500 queries."""
    rows = [("train", i % 100) for i in range(1000)] + [("test", 0)] * 500
    photos = pd.DataFrame(rows, columns=["split", "product_id"])
    photos.attrs = {"root": "/shop", "fingerprint": "f"}
    monkeypatch.setattr(plan, "photos_of", lambda root: (photos, None))

    def photo_cost(root, px, augmentation):
        look_s = SECONDS.look if augmentation == "none" else SECONDS.augmented
        return plan.PhotoCost(SECONDS.store, 1e-4, look_s)

    monkeypatch.setattr(plan, "photo_cost", photo_cost)
    monkeypatch.setattr(plan, "network_cost", lambda *asked: NETWORK)
    monkeypatch.setattr(plan, "multiply_s", lambda device: 1e-9)
    monkeypatch.setattr(plan, "memory_gb", lambda: (16.0, 8.0))
    monkeypatch.setattr(platform, "room_gb", lambda folder: 10.0)
    monkeypatch.setattr(plan, "working_device", lambda name: CPU)
    (tmp_path / "train.csv").write_text("name,class\n")
    monkeypatch.setenv("VIPR_DATA", str(tmp_path))
    return tmp_path


def planned(tmp_path, stem, **values):
    values = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out")} | values
    notebook = params.find_notebook(stem)
    defaults = {name: value for name, (_, value) in params.parameters_of(notebook).items()}
    return params.Run(notebook, values, defaults, Path("by hand"))


def test_sums_are_those_of_a_hand(measured):
    pairs = {"losses": ["contrastive", "triplet"], "distances": ["cosine"], "batch_size": 32}
    run = planned(measured, "03_scratch_siamese", **pairs, image_size=48, epochs=3, holdout=0.1)
    row = plan.plan([run]).iloc[0]
    assert row.store == pytest.approx(1500 * 0.5 / 60)
    assert row.training == pytest.approx(2 * 3 * 900 * (0.7 + 0.3) / 60)  # one after the other
    assert row.embedding == pytest.approx(3 * 1500 * (0.2 + 0.1) / 60)  # untrained, and each
    assert row.search == pytest.approx(12 * 1000 * 500 * 1000 * 1e-9 / 60)
    assert row.minutes == pytest.approx(row.store + row.training + row.embedding + row.search)
    assert row["memory GB"] == pytest.approx(plan.KERNEL_GB + (16 * 50e6 + 32 * 2e6) / 1e9)
    assert row["cache GB"] == pytest.approx((1500 * 1e5 + 3 * 1500 * 4000) / 1e9)
    assert row["outputs GB"] == pytest.approx((2 * 4 + 12) * 50e6 / 1e9)
    assert row.refused == ""


def test_on_gpus_photos_are_prepared_meanwhile_and_cards_share_the_work(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(plan, "cores", lambda: 4)
    cuda = torch.device("cuda")
    assert plan.image_s(cuda, 0.7, 0.3) == pytest.approx(0.35)
    assert plan.image_s(cuda, 0.1, 0.8) == pytest.approx(0.2)
    assert plan.image_s(CPU, 0.7, 0.3) == pytest.approx(1.0)


def test_max_minutes_bound_a_training_and_those_that_end_before_a_pass_are_refused(measured):
    def row(minutes):
        one = {"epochs": 4, "n_products": 50, "strategies": ["capped"], "holdout": 0.0}
        return plan.plan(
            [planned(measured, "05_subset_finetune", max_minutes=minutes, **one)]
        ).iloc[0]

    a_pass = 500 * 1.0 / 60  # half of the products
    assert row(0.0).training == pytest.approx(4 * a_pass) and not row(0.0).refused
    assert row(20.0).training == 20 and not row(20.0).refused
    assert row(8.0).refused == "max_minutes 8 end before a pass (8); "


def test_choice_begins_with_another_network_while_max_minutes_last(measured):
    def embedding(minutes):
        some = {"backbones": ["a", "b", "c"], "zooms": [1.0, 0.8], "max_minutes": minutes}
        return plan.plan([planned(measured, "06_submission", **some)]).iloc[0].embedding

    alone = 2 * 1500 * 0.3 / 60
    assert embedding(alone / 2) == pytest.approx(alone)
    assert embedding(1.5 * alone) == pytest.approx(2 * alone)
    assert embedding(0.0) == pytest.approx(3 * alone)


def test_submission_joins_what_runs_before_it_train_and_takes_its_speed_from_there(measured):
    many = {"backbones": ["a", "b"], "most_backbones": 1, "epochs": 2}
    sweep = planned(measured, "04_pretrained_sweep", **many)
    alone = planned(measured, "06_submission", backbones=["c"], max_minutes=0.0)
    table = plan.plan([sweep, alone])
    assert table.embedding.iloc[1] == pytest.approx(2 * 3 * 1500 * 0.3 / 60)  # c and a
    heads = planned(measured, "04_pretrained_sweep", backbones=["a", "b"], most_tuned=1)
    table = plan.plan([heads, alone])
    assert table.embedding.iloc[1] == pytest.approx(3 * 3 * 1500 * 0.3 / 60)  # b has a head


def test_only_the_networks_that_are_tuned_are_trained(measured):
    def training(most):
        run = planned(
            measured, "04_pretrained_sweep", backbones=["a", "b"], most_tuned=most, epochs=2
        )
        return plan.plan([run]).training.iloc[0]

    assert 0 < training(1) == pytest.approx(training(0) / 2)


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"memory_gb": (16.0, 1.0)}, "memory GB: here 1; "),
        ({"where": "kaggle"}, "minutes: here 540; "),
        ({"room": 0.9}, "outputs GB: here 1; "),
    ],
)
def test_run_over_what_there_is_is_refused_and_disks_fill_up(
    measured, monkeypatch, changes, refused
):
    if "memory_gb" in changes:
        monkeypatch.setattr(plan, "memory_gb", lambda: changes["memory_gb"])
    monkeypatch.setattr(platform, "where", lambda: changes.get("where", "local"))
    monkeypatch.setattr(platform, "room_gb", lambda folder: changes.get("room", 10.0))
    trained = {
        "losses": ["triplet"],
        "distances": ["cosine"],
        "epochs": 1 + 40 * ("where" in changes),
    }
    todo = [planned(measured, "03_scratch_siamese", run_name=name, **trained) for name in "ab"]
    found = plan.plan(todo).refused
    assert found.iloc[1] == refused
    assert found.iloc[0] == ("" if "room" in changes else refused)  # 0.8 GB each


def test_store_that_is_there_or_that_an_earlier_run_builds_is_not_counted(measured):
    todo = [planned(measured, "02_augmentation_preview", run_name=n, image_size=224) for n in "ab"]
    assert (plan.plan(todo)["store"] > 0).tolist() == [True, False]
    (measured / "cache" / "stores" / f"f-1500-{packed_px(224)}").mkdir(parents=True)
    assert not plan.plan(todo)["store"].any()


def test_photos_and_networks_are_measured_in_seconds_where_they_are(toy_root):
    pack_s, size, look_s = plan.photo_cost(toy_root, 48, "strong")
    assert 0 < pack_s < 1 and 1e-7 < size < 1e-3 and 0 < look_s < 1
    parameters, dim, forward_s, step_s, activations = plan.network_cost(
        "test_resnet", 48, CPU, True
    )
    network = plan.models.Embedder("test_resnet")
    assert parameters == sum(p.numel() for p in network.parameters())
    assert dim == network(torch.rand(2, 3, 48, 48)).shape[1]
    assert 0 < forward_s < 5 and 0 < step_s < 5 and activations > 2 * 3 * 48**2 / 1e9
    assert plan.network_cost("test_resnet", 48, CPU, False)[3] == 0
    assert plan.network_cost("siamese_90m", 32, CPU, False).dim == 1792
    assert 0 < plan.multiply_s(CPU) < 1e-6


@pytest.mark.long
def test_what_a_step_holds_of_an_image_is_half_as_much_in_half_precision(monkeypatch):
    held = []
    for precision in ("float32", "bfloat16"):
        monkeypatch.setenv("VIPR_PRECISION", precision)
        plan.network_cost.cache_clear()
        held.append(plan.network_cost("vit_tiny_patch16_224", 224, CPU, True).held_gb)
    plan.network_cost.cache_clear()
    assert 0.4 < held[1] / held[0] < 0.7 and 0.02 < held[0] < 0.04


@pytest.mark.parametrize("available, code", [(8.0, 0), (0.5, 1)])
def test_dry_run_prints_a_row_a_run_and_their_sum_and_starts_no_kernel(
    toy_root, tmp_path, monkeypatch, capsys, available, code
):
    def started(*_):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(kernel, "papermill", started)
    monkeypatch.setattr(plan, "memory_gb", lambda: (16.0, available))
    monkeypatch.setattr(plan, "network_cost", lambda *asked: NETWORK)
    asked = ["params/smoke", "--dry-run", "--output-dir", str(tmp_path / "out")]
    values = ["-p", f"data_root={toy_root}", "-p", f"cache_dir={tmp_path / 'cache'}"]
    assert batch.main([*asked, *values]) == code
    first, here, columns, *rows = capsys.readouterr().out.splitlines()
    photos, _ = catalog.read(toy_root)
    assert first.startswith(
        f"{toy_root.name}: {(photos.split == 'train').sum()} gallery photos of 8"
    )
    assert here.startswith("here: ") and columns.split()[:5] == STAGES
    assert [row.split()[0] for row in rows][-2:] == ["08_catalogue_uses", "all"]
    assert ("memory GB: here 0" in rows[0]) == bool(code)


def test_built_store_of_these_photos_is_found_by_the_plan(toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "where", lambda: "local")
    photos, _ = catalog.read(toy_root)
    build_store(photos, cache_dir=tmp_path / "cache", store_px=packed_px(48))
    values = {"data_root": str(toy_root), "image_size": 48}
    small = planned(tmp_path, "02_augmentation_preview", **values)
    large = planned(tmp_path, "02_augmentation_preview", **values | {"image_size": 640})
    assert plan.plan([small])["store"].iloc[0] == 0 < plan.plan([large])["store"].iloc[0]
    assert "minutes inf" in report.planned(plan.plan([small]))
