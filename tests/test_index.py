"""The catalogue index: its answers, what joins and leaves, and what a kill at any moment leaves."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from roots import picture

from vipr_utils import __main__ as command
from vipr_utils.judge.choice import Candidate, Choice, Part
from vipr_utils.judge.task import Task
from vipr_utils.learn import models
from vipr_utils.retrieve import export, versions
from vipr_utils.retrieve import index as module
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.index import Index
from vipr_utils.retrieve.rerank import Projection, unit
from vipr_utils.run import index as cli

KILLS = int(os.environ.get("VIPR_KILLS", 4))
DIM = 128


@pytest.fixture(scope="module")
def encoder():
    """Two looks of a small network at random, and a projection behind both."""
    torch.manual_seed(0)
    model = models.create("siamese_small", embedding_dim=DIM)
    rng = np.random.default_rng(0)
    turned = Projection(np.zeros(DIM, np.float32), rng.normal(size=(DIM, 48)).astype(np.float32))
    centred = Projection(rng.normal(size=96).astype(np.float32) / 50)
    looks = (
        Look(model, 32, (0.8, 1.0), projections=(turned,)),
        Look(model, 48, weight=2.0, projections=(turned,)),
    )
    return Encoder(looks, (centred,), store_px=64)


@pytest.fixture
def photos(tmp_path):
    """A table of nine photos of three products, on disk."""
    rows = []
    for i in range(9):
        path = tmp_path / "photos" / f"p{i // 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture(i, 60, 80))
        rows.append([str(path), f"p{i // 3}/{i}.png", f"p{i // 3}"])
    return pd.DataFrame(rows, columns=["path", "photo", "product"])


def drawn(names, seed=0, dim=96):
    """(rows, vectors) of photos with these names, product = their first letter."""
    rows = pd.DataFrame({"photo": names, "product": [name[0] for name in names]})
    rows = rows.assign(group="", domain="", answered=True)
    seeds = [int(hashlib.sha256(f"{seed}{name}".encode()).hexdigest()[:8], 16) for name in names]
    vectors = [np.random.default_rng(seed).normal(size=dim) for seed in seeds]
    return rows, unit(np.array(vectors, np.float32).reshape(-1, dim))


@pytest.fixture(scope="module")
def eight(encoder, tmp_path_factory):
    """The folder of an index of eight photos of the products a to d."""
    rows, vectors = drawn([f"{letter}{i}" for letter in "abcd" for i in (0, 1)])
    return Index.build(tmp_path_factory.mktemp("eight") / "index", encoder, rows, vectors).folder


@pytest.fixture
def made(eight, tmp_path):
    """An index of one's own like it."""
    return Index(shutil.copytree(eight, tmp_path / "index"))


def contents(index: Index) -> dict:
    """photo -> (product, its vector's bytes) of all that it holds."""
    rows, vectors = index.version.rows, index.version.vectors.rows.numpy()
    return {
        photo: (product, vector.tobytes())
        for photo, product, vector in zip(rows["photo"], rows["product"], vectors)
    }


# ----------------------------------------------------------------------------------------- answers


def test_index_answers_as_the_candidate_it_was_made_of(toy_root, tmp_path):
    task = Task(
        str(toy_root), image_size=64, device="cpu", precision="float32", cache_dir=str(tmp_path)
    )
    choice = Choice.open(
        task,
        tmp_path / "none",
        backbones=["tf_efficientnet_lite0", "test_convnext3"],
        weights="none",
    )
    lite, small = choice.networks
    parts = (
        Part(lite, (0.65, 1.0), "learned_whitening(16)", features=True),
        Part(small, (0.8, 0.8), "centring()", weight=2.0),
    )
    candidate = Candidate(parts, ("learned_whitening(8)", "product_votes(3)"))
    wanted = choice.found(candidate, "test")
    built = choice.index(tmp_path / "index", candidate)
    view = task.views["test"]
    paths = [Path(task.photos.attrs["root"], path) for path in view.queries["path"]]
    for index in (built, Index(tmp_path / "index")):
        found = index.search(paths).lists
        names = view.gallery["name"].to_numpy()[wanted.ranks]
        assert (
            found["photo"].to_numpy().reshape(-1, 5) == names
        ).mean() > 0.99  # nearly equal ones
        np.testing.assert_allclose(
            found["similarity"].to_numpy().reshape(-1, 5), wanted.scores, atol=1e-4
        )


def test_every_photo_finds_itself_and_a_loaded_index_answers_the_same(tmp_path, encoder, photos):
    rows, vectors = drawn(["z0"])
    index = Index.build(tmp_path / "index", encoder, rows, vectors)
    assert index.add(photos).empty and len(index) == 10
    paths = [Path(path) for path in photos["path"]]
    index.remove(["z"])
    customers = photos.assign(domain="customer")
    assert index.add(customers).empty and len(index) == 9  # they take the places of their names
    answers, products, problems = index.search(paths, k=3)
    assert problems.empty and list(answers) == ["query", "rank", *module.COLUMNS, "similarity"]
    assert products["product"].tolist() == photos["product"].tolist()
    first = answers[answers["rank"] == 1]
    assert first["photo"].tolist() == photos["photo"].tolist()
    np.testing.assert_allclose(first["similarity"], 1.0, atol=1e-5)
    again = Index(tmp_path / "index").search(paths, k=3)
    pd.testing.assert_frame_equal(answers, again.lists)
    contents_of = [path.read_bytes() for path in paths]
    pd.testing.assert_frame_equal(answers, index.search(contents_of, k=3)[0])


def test_what_is_no_photo_has_a_problem_and_no_answer(made, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    paths = [tmp_path / "text.jpg", Path(photos["path"][0]), tmp_path / "absent.jpg", b""]
    answers, products, problems = made.search(paths, k=2)
    assert products["query"].tolist() == [1] and list(products) == ["query", "product"]
    assert set(answers["query"]) == {1} and problems.index.tolist() == [0, 2, 3]
    assert problems["file"].tolist() == ["text.jpg", "absent.jpg", "photo 4"]
    left_out = made.add(
        pd.DataFrame({"path": map(str, paths[:2]), "photo": ["e1", "e2"], "product": "e"})
    )
    assert left_out["file"].tolist() == [str(paths[0])] and made.products["e"] == 1
    with pytest.raises(ValueError, match="give a photo"):
        made.search([])
    nothing = made.search([b"", b"no photo"])
    assert nothing.lists.empty and nothing.products.empty and len(nothing.problems) == 2


def test_lists_hold_fewer_photos_where_there_are_no_more(made):
    _, query = drawn(["q0"])
    assert len(made.nearest(query, k=50)) == 8


def test_steps_and_rows_that_are_only_known_have_their_part(tmp_path, encoder):
    rows, vectors = drawn(["a0", "b0", "b1", "c0"])
    rows["answered"] = [True, True, False, True]
    query = unit(vectors[2:3] + 0.5 * vectors[:1])  # b1 is nearest and is not answered
    steps = ["product_votes(1)"]
    index = Index.build(tmp_path / "index", encoder, rows, vectors, steps=steps)
    assert index.nearest(query, k=4)["photo"].tolist()[0] == "b0"  # b1 votes for it
    plain = Index.build(tmp_path / "plain", encoder, rows, vectors)
    assert plain.nearest(query, k=4)["photo"].tolist()[0] == "a0"
    assert set(plain.nearest(query, k=4)["photo"]) == {"a0", "b0", "c0"}


@pytest.mark.parametrize("step", ["k_reciprocal(2, 2)", "verify(5)", "learned_whitening(8)"])
def test_steps_that_an_index_cannot_answer_by_are_refused(tmp_path, encoder, step):
    rows, vectors = drawn(["a0", "b0"])
    with pytest.raises(ValueError, match=r"cannot answer by .*product_votes"):
        Index.build(tmp_path / "index", encoder, rows, vectors, steps=[step])
    assert not (tmp_path / "index" / "CURRENT").exists()


# ----------------------------------------------------------------------------------------- updates


def test_other_lists_change_only_by_what_joins_and_leaves(made):
    queries = drawn([f"q{i}" for i in range(20)], seed=5)[1]
    before = made.nearest(queries, k=8)
    made.put(*drawn(["e0", "e1", "b1"], seed=3))
    after = made.nearest(queries, k=8)
    new = {"e0", "e1", "b1"}
    for query in range(20):
        old = [p for p in before["photo"][before["query"] == query] if p not in new]
        now = [p for p in after["photo"][after["query"] == query] if p not in new]
        assert now == old[: len(now)]
    made.remove(["e"])
    assert not made.nearest(queries, k=8)["photo"].str.startswith("e").any()


NAMES = [f"{letter}{i}" for letter in "abcde" for i in range(6)]
CHANGES = some.lists(
    some.one_of(
        some.tuples(
            some.just("put"), some.lists(some.sampled_from(NAMES), min_size=1, unique=True)
        ),
        some.tuples(some.just("remove"), some.sets(some.sampled_from("abcde"), min_size=1)),
        some.just(("reload", None)),
        some.just(("rollback", None)),
    ),
    max_size=12,
)


@settings(max_examples=150 if "VIPR_SOAK" in os.environ else 5, deadline=None)
@given(changes=CHANGES)
def test_any_sequence_of_updates_equals_brute_force(changes, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "index"
    index = Index.build(folder, encoder, *drawn(["a0", "b0", "c0"]))
    held = [contents(index)]
    for step, (change, what) in enumerate(changes):
        now = dict(held[-1])
        if change == "put":
            rows, vectors = drawn(what, seed=step)
            index.put(rows, vectors)
            now |= {n: (n[0], v.tobytes()) for n, v in zip(what, vectors)}
        elif change == "remove":
            left = {n: v for n, v in now.items() if n[0] not in what}
            if not left or what - {n[0] for n in now}:
                with pytest.raises(ValueError, match="not in|no photos"):
                    index.remove(sorted(what))
                left = now
            else:
                assert index.remove(sorted(what)) == len(now) - len(left)
            now = left
        elif change == "reload":
            index = Index(folder)
        elif len(held) > 1 and held[-1] != held[-2]:
            index.rollback()
            held, now = held[:-1], held[-2]
            index.put(
                *drawn(["a5"], seed=step)
            )  # a version of its own, behind the one gone back to
            now = now | {"a5": ("a", drawn(["a5"], seed=step)[1][0].tobytes())}
        assert contents(index) == now
        if now != held[-1]:
            held.append(now)
    query = drawn(["q"], seed=9)[1]
    vectors = np.frombuffer(b"".join(v for _, v in held[-1].values()), np.float32).reshape(-1, 96)
    wanted = [list(held[-1])[i] for i in np.argsort(-(vectors @ query[0]), kind="stable")[:5]]
    assert index.nearest(query)["photo"].tolist() == wanted
    assert contents(Index(folder)) == held[-1]


def test_small_parts_are_merged_and_mostly_empty_ones_written_anew(made):
    for i in range(40):
        made.put(*drawn([f"e{i}"]))
    segments = made.version.state["segments"]
    assert len(segments) <= 7 and sum(s["rows"] - len(s["removed"]) for s in segments) == 48
    made.remove(["e"])
    assert sum(s["rows"] for s in made.version.state["segments"]) <= 16
    assert len(contents(Index(made.folder))) == 8


def test_old_versions_and_their_parts_are_cleared_away(made):
    for i in range(30):
        made.put(*drawn([f"e{i % 3}"], seed=i))
    assert len(made.versions()) == versions.KEPT
    named = set()
    for number in made.versions()["number"]:
        named |= versions._parts(
            json.loads((made.folder / "versions" / f"{number}.json").read_text())
        )
    assert {file.name for file in (made.folder / "parts").iterdir()} == named


def test_folders_of_others_among_its_files_hinder_no_update(made):
    for place in ("parts/theirs", "versions/99.json"):
        (made.folder / place).mkdir()
        (made.folder / place / "note.txt").write_text("mine")
    for n in range(versions.KEPT + 2):
        update(made, n)
    assert (made.folder / "parts" / "theirs" / "note.txt").exists()
    assert contents(Index(made.folder)).keys() == contents(made).keys()


def test_rollback_goes_to_any_version_that_is_there(made):
    first = contents(made)
    made.put(*drawn(["e0"]))
    second = contents(made)
    made.remove(["a", "b"])
    made.rollback()
    assert contents(made) == contents(Index(made.folder)) == second
    made.rollback(1)
    assert contents(made) == first and made.versions()["in_force"].tolist() == [True, False, False]
    made.put(*drawn(["f0"]))
    assert made.version.number == 4 and made.version.state["parent"] == 1
    with pytest.raises(versions.IndexFault, match=r"no version 9, those there are \[1, 2, 3, 4\]"):
        made.rollback(9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"product": None}, "column 'product'"),
        ({"photo": ["x", "x"]}, "'x' is there twice"),
        ({"product": ["a", ""]}, "row 1 has no product"),
        ({"domain": "moon"}, "domain 'moon' is unknown"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(made, photos, change, message):
    before = contents(made)
    table = photos[:2].assign(**{k: v for k, v in change.items() if v is not None})
    table = table.drop(columns=[k for k, v in change.items() if v is None])
    with pytest.raises(ValueError, match=message):
        made.add(table)
    with pytest.raises(ValueError, match=r"\['x', 'y'\] are not in"):
        made.remove(["a", "y", "x"])
    with pytest.raises(ValueError, match="no photos answers nothing"):
        made.remove(list("abcd"))
    assert contents(made) == contents(Index(made.folder)) == before


def test_damage_is_noticed_and_names_the_way_back(made, tmp_path):
    made.put(*drawn(["e0"]))
    with pytest.raises(versions.IndexFault, match="holds no index"):
        Index(tmp_path / "nothing")
    newest = made.folder / "parts" / made.version.state["segments"][-1]["part"]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with pytest.raises(versions.IndexFault, match=r"is damaged: go back to a version"):
        Index(made.folder)
    newest.unlink()
    with pytest.raises(versions.IndexFault, match=r"is absent: go back"):
        Index(made.folder)
    assert command.main(["index", "rollback", str(made.folder)]) == 0
    assert len(Index(made.folder)) == 8
    (made.folder / "versions" / "1.json").write_text("{}")
    with pytest.raises(versions.IndexFault, match="version 1 is damaged"):
        Index(made.folder)
    (made.folder / "CURRENT").write_text("{")
    with pytest.raises(versions.IndexFault, match="CURRENT is damaged"):
        Index(made.folder)


# ------------------------------------------------------------------------------ kills, many at once


def update_for_ever(folder, acknowledged):
    """Add e<n>, remove e<n - 3> ...; acknowledged holds the number of updates that are done."""
    torch.set_num_threads(1)
    index = Index(folder)
    for n in range(acknowledged.value, 10_000):
        update(index, n)
        acknowledged.value = n + 1


def update(index, n):
    if n % 4 == 3:
        index.remove([chr(ord("e") + n // 4)])
    else:
        index.put(*drawn([f"{chr(ord('e') + n // 4)}{n}", f"{chr(ord('e') + n // 4)}x{n}"], seed=n))


def test_kill_at_any_moment_leaves_the_index_of_before_or_after(made):
    processes = multiprocessing.get_context("fork")
    acknowledged = processes.Value("i", 0)
    rng = np.random.default_rng()
    folder, began = shutil.copytree(made.folder, made.folder.with_name("twin")), time.monotonic()
    twin = Index(folder)
    states = [contents(twin)]
    update(twin, 0)
    took = time.monotonic() - began
    states.append(contents(twin))
    for _ in range(KILLS):
        child = processes.Process(target=update_for_ever, args=(made.folder, acknowledged))
        child.start()
        time.sleep(rng.random() * 3 * took)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        done = acknowledged.value
        while len(states) <= done + 1:
            update(twin, len(states) - 1)
            states.append(contents(twin))
        found = contents(Index(made.folder))
        assert found in (states[done], states[done + 1])
        acknowledged.value = states.index(found, done)
    assert acknowledged.value > 0


def test_updates_of_several_processes_and_readers_between_them_lose_nothing(made):
    processes = multiprocessing.get_context("fork")

    def write(letter):
        torch.set_num_threads(1)
        own = Index(made.folder)
        for i in range(10):
            own.put(*drawn([f"{letter}{i}"]))

    writers = [processes.Process(target=write, args=(letter,)) for letter in "xyz"]
    for writer in writers:
        writer.start()
    sizes = []
    while any(writer.is_alive() for writer in writers):
        sizes.append(len(Index(made.folder)))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sizes == sorted(sizes)
    assert set(contents(Index(made.folder))) == {f"{a}{i}" for a in "xyz" for i in range(10)} | set(
        contents(made)
    )


def test_threads_search_while_another_updates(made):
    queries = drawn(["q0", "q1"], seed=4)[1]
    stop, errors = threading.Event(), []

    def ask():
        while not stop.is_set():
            try:
                assert len(made.nearest(queries, k=5)) == 10
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(30):
        made.put(*drawn([f"e{i}"]))
    made.remove(["e"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


# ----------------------------------------------------------------------------------- command line


def test_command_builds_adds_removes_searches_and_goes_back(toy_root, tmp_path, photos, capsys):
    folder = str(tmp_path / "index")

    def vipr(*arguments):
        code = command.main(["index", *map(str, arguments)])
        return code, capsys.readouterr()

    places = ["--runs", tmp_path / "none", "--cache-dir", tmp_path / "cache"]
    code, out = vipr("build", folder, toy_root, "--image-size", 64, *places)
    assert code == 0 and "tf_efficientnet_lite0" in out.out
    before = len(Index(folder))
    code, out = vipr("add", folder, tmp_path / "photos")
    assert code == 0 and f"version 2, {before + 9} photos" in out.out
    code, out = vipr("search", folder, photos["path"][4], tmp_path / "photos" / "p0", "-k", 2)
    lines = out.out.splitlines()
    assert code == 0 and len(lines) == 12 and lines[0].startswith(f"{photos['path'][4]}: ")
    assert lines[1].split()[0] == "1" and lines[1].split()[2:] == ["p1", "p1/4.png"]
    code, out = vipr("search", folder, photos["path"][4], "--json", "-k", 1)
    found = json.loads(out.out)
    assert found["photo"] == photos["path"][4] and found["answers"][0]["product"] == "p1"
    assert 0 <= found["confidence"] <= 1 and found["there"] in (True, False)
    assert vipr("remove", folder, "p1", "p2")[1].out.startswith("6 photos removed")
    assert vipr("rollback", folder)[0] == 0 and len(Index(folder)) == before + 9
    assert "9 photos added" in vipr("versions", folder)[1].out
    for wrong in (
        ["search", folder],
        ["remove", folder, "nothing"],
        ["add", folder, folder],
        ["search", "x", "y"],
    ):
        code, out = vipr(*wrong)
        assert code == 2 and out.err.strip() and not out.out
    faiss = pytest.importorskip("faiss")
    code, out = vipr("export", folder, tmp_path / "rows.faiss")
    assert code == 0 and "finds 100.0%" in out.out
    read = faiss.read_index(str(tmp_path / "rows.faiss"))
    table = pd.read_csv(tmp_path / "rows.csv", dtype=str)
    query = Index(folder).version.vectors.rows.numpy()[:1]
    assert (
        table["photo"][read.search(query, 1)[1][0, 0]] == Index(folder).nearest(query)["photo"][0]
    )
    assert vipr("export", folder, tmp_path / "rows.faiss", "--kind", "ivfpq")[0] == 2


def test_command_serves_exports_and_says_what_is_missing(
    made, photos, tmp_path, capsys, monkeypatch
):
    serving = pytest.importorskip("vipr_utils.run.serve")

    def vipr(*arguments):
        code = command.main(["index", *map(str, arguments)])
        return code, capsys.readouterr()

    (tmp_path / "photos" / "p0" / "broken.png").write_text("no photo")
    code, out = vipr("add", made.folder, tmp_path / "photos")
    assert code == 0 and f"left out: {tmp_path}/photos/p0/broken.png: " in out.out
    code, out = vipr("search", made.folder, tmp_path / "photos" / "p0")
    assert code == 0 and len(out.out.splitlines()) == 3 * 6 + 1  # the broken one has no answers

    served = []
    monkeypatch.setattr(serving, "serve", lambda *given: served.append(given))
    code, out = vipr("serve", made.folder, "--port", 0)
    ((index, opened),) = served
    with opened:
        port = opened.getsockname()[1]
    assert code == 0 and f"http://127.0.0.1:{port}/docs" in out.out and len(index) == 17

    monkeypatch.setattr(export, "onnx", lambda encoder, file: 1e-6)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    run = Path(__file__).resolve().parents[1] / "submissions" / "reference" / "04_pretrained_sweep"
    code, out = vipr("export", made.folder, tmp_path / "m" / "model.onnx", "--run", run)
    assert code == 0 and "at most 1.0e-06 from torch's embeddings" in out.out
    assert "04_pretrained_sweep" in (tmp_path / "m" / "README.md").read_text()
    assert vipr("export", made.folder, tmp_path / "alone" / "model.onnx")[0] == 0
    assert not (tmp_path / "alone").exists()
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    for wanted, packages in (
        (["export", made.folder, "x.onnx"], "onnx onnxruntime onnxscript"),
        (["export", made.folder, "x.faiss"], "faiss-cpu"),
        (["serve", made.folder], "fastapi uvicorn"),
    ):
        code, out = vipr(*wanted)
        assert code == 2 and out.err.strip().endswith(f"pip install {packages}")


def test_answer_says_how_sure_it_is_where_that_is_known():
    assert cli._said({"product": "milk"}) == "milk"
    told = {"product": "milk", "confidence": 0.91, "there": True}
    assert cli._said(told) == "milk, confidence 0.91"
    told["there"] = False
    assert cli._said(told).startswith("not in this catalogue (nearest: milk, confidence 0.91)")


def test_photos_of_a_data_root_join_and_a_folder_without_any_is_refused(toy_root, tmp_path):
    photos, strays = cli.to_add(toy_root)
    assert len(photos) == len(pd.read_csv(toy_root / "train.csv")) and strays.empty
    assert {"photo", "product", "path"} <= set(photos) and Path(photos["path"].iloc[0]).is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no photo of a product"):
        cli.to_add(tmp_path / "empty")


def test_minimal_example_names_five_photos_and_every_shape(toy_root, tmp_path):
    table = pd.read_csv(toy_root / "train.csv").groupby("class").head(2)
    for name, product in table[["name", "class"]].itertuples(index=False):
        (tmp_path / "gallery" / str(product)).mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_root / "train" / name, tmp_path / "gallery" / str(product) / name)
    (tmp_path / "queries").mkdir()
    asked = pd.read_csv(toy_root / "test.csv")["name"][:3]
    for name in asked:
        shutil.copy(toy_root / "test" / name, tmp_path / "queries" / name)
    (tmp_path / "queries" / "text.jpg").write_text("no photo")
    script = Path(__file__).resolve().parents[1] / "examples" / "minimal.py"
    code = (  # whatever $PYTHONPATH is: a lane's holds weights and hides the package
        f"import runpy, sys; sys.path.insert(0, {str(script.parents[1])!r}); del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, script, tmp_path / "gallery", tmp_path / "queries"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"gallery ({len(table)}, 1280) queries (3, 1280)" in done.stdout
    assert "left out: text.jpg" in done.stdout and "ranks (3, 5)" in done.stdout
    for name in asked:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
        assert line.count(",") == 4
