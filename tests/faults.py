"""Every file that matters, written while its N-th system call fails or kills the process.

    cc -shared -fPIC -O1 -o faults.so tests/faults.c -ldl
    LD_PRELOAD=faults.so python tests/faults.py faults.so WORK STEP [CASE ...]

N counts up until a run passes, by STEP; over 1 calls only kill. After each the files must be those
of before or after, never a third; and the same step, made again without a fault, must give what it
always gives and leave no temporary file. Prints a line of JSON for each case: how many calls
failed, and killed.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from test_index import drawn
from test_page import found as drawn_lists
from test_training import setting

from vipr_utils.data import catalog, store, toy
from vipr_utils.host.files import write_whole
from vipr_utils.judge import page, runs, submission
from vipr_utils.judge.task import View
from vipr_utils.learn import models, training
from vipr_utils.retrieve import cache
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.index import Index

FAIL, FULL, KILL, READ = 1, 2, 3, 4  # as in faults.c
WAYS = {"fails": FAIL, "is full": FULL, "kills": KILL}


class Case(NamedTuple):
    """prepare(folder) makes what was there before, act(folder) is the step, and look(folder) tells
    what is there: an object for each name, those of before and after being right."""

    prepare: Callable
    act: Callable
    look: Callable


def files(folder: Path) -> dict[str, str]:
    """name -> SHA-256 of what it holds, temporary files and locks aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and not path.name.endswith(".part")
    }


def records(folder: Path) -> dict[str, str]:
    """`files`, a run.json without its time and its folder's name."""
    told = files(folder)
    for path in folder.rglob("run.json"):
        record = json.loads(path.read_text())
        del record["finished"], record["run"]
        told[str(path.relative_to(folder))] = json.dumps(record)
    return told


def shown(folder: Path) -> dict[str, object]:
    """A page with all photos that it shows."""
    text = (folder / "page.html").read_text()
    photos = sorted(set(re.findall(r"page_files/[0-9a-f]+/\d+\.jpg", text)))
    content = [text, *((folder / photo).read_bytes().hex() for photo in photos)]
    return {"page": hashlib.sha256("".join(content).encode()).hexdigest()}


def indexed(folder: Path) -> dict[str, object]:
    """What an index holds."""
    version = Index(folder / "index").version
    values = hashlib.sha256(version.vectors.rows.numpy().tobytes()).hexdigest()
    return {"index": (version.number, version.rows["photo"].tolist(), values)}


def small_index(folder: Path) -> None:
    """Of twelve photos, in two versions."""
    torch.manual_seed(0)
    encoder = Encoder((Look(models.create("siamese_small", embedding_dim=8), 32),), (), 64)
    index = Index.build(folder / "index", encoder, *drawn([f"a{i}" for i in range(8)], dim=8))
    index.put(*drawn(["b0", "b1", "c0", "c1"], dim=8))


def cases(root: Path, photos: pd.DataFrame, packed: store.Store) -> dict[str, Case]:
    """By name."""
    view, worse, better = drawn_lists.__wrapped__((photos, packed))
    train = View(*catalog.split(photos, "test")[1:])
    state = {"parts": [torch.arange(50_000.0)], "epoch": 3}
    rows = np.arange(40)

    def trained(folder: Path) -> training._Training:
        """At the end of its one epoch."""
        model, criterion, some, sampler = setting((photos, packed))
        recipe = training.Recipe(epochs=1, lr=0.1, folder=folder, precision="float32")
        network = training._Network(model, criterion, torch.float32)
        under_way = training._Training(network, some, sampler, recipe)
        under_way.resume()
        under_way.start = training.time.monotonic()
        while not under_way.done():
            under_way.run_epoch()
            under_way.end_epoch()
        for row in under_way.history:
            row |= {name: 0.0 for name in row if "second" in name or "minute" in name}
        return under_way

    def write_page(lists, folder: Path) -> None:
        page.INLINE_BYTES = 0
        page.write(folder / "page.html", view, {"run": lists}, packed, title="toy")

    def record(score: float, folder: Path) -> None:
        runs.versions = runs.hardware = dict
        figures = {"notebook": "x", "data": {}, "protocol": "test", "model": {}, "device": "cpu"}
        runs.save(folder, params={}, seconds=1.0, metrics={"map_at_5": score}, **figures)

    def answers(lists, folder: Path) -> None:
        path = folder / "submission.csv"
        submission.write_answers(path, root, train.queries, train.gallery, lists.ranks)

    under_way = []  # trained once, and written by every process that is forked

    def prepare_training(folder: Path) -> None:
        under_way[:] = [trained(folder)]
        under_way[0].save()

    def finish(folder: Path) -> None:
        under_way[0].folder = folder
        under_way[0].finish()

    def remove(folder: Path) -> None:
        index = Index(folder / "index")
        if "c" in index.products:
            index.remove(["c"])

    weights = [models.create("siamese_small", embedding_dim=n) for n in (8, 9)]
    features = {"compute": lambda some: np.outer(some, np.arange(64.0)), "block": 16}
    nothing = Path.is_dir
    return {
        "packed photos": Case(
            nothing, lambda at: store.build_store(photos, cache_dir=at, store_px=64), files
        ),
        "features": Case(nothing, lambda at: cache.kept(at / "x", rows, **features), files),
        "checkpoint": Case(
            lambda at: training._write(state | {"epoch": 2}, at / "checkpoint.pt"),
            lambda at: training._write(state, at / "checkpoint.pt"),
            files,
        ),
        "end of training": Case(prepare_training, finish, files),
        "model": Case(
            lambda at: models.save(weights[0], at / "model.pt"),
            lambda at: models.save(weights[1], at / "model.pt"),
            files,
        ),
        "run.json": Case(partial(record, 0.1), partial(record, 0.2), records),
        "submission": Case(partial(answers, worse), partial(answers, better), files),
        "table of runs": Case(
            lambda at: write_whole(at / "scoreboard.csv", "old\n" * 5000),
            lambda at: write_whole(at / "scoreboard.csv", "new\n" * 5000),
            files,
        ),
        "index: add": Case(
            small_index, lambda at: Index(at / "index").put(*drawn(["d0", "a1"], dim=8)), indexed
        ),
        "index: remove": Case(small_index, remove, indexed),
        "index: rollback": Case(small_index, lambda at: Index(at / "index").rollback(1), indexed),
        "page": Case(partial(write_page, worse), partial(write_page, better), shown),
    }


def forked(step: Callable) -> tuple[int, int]:
    """(exit status of a process that makes the step, calls that it counted); 1 for an OSError."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            step()
            code = 0
        except OSError as error:
            code = 1 if str(error) else 70
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            counted = SHIM.faults_count()
            SHIM.faults_arm(b"", 0, 0)
            os.write(write, str(counted).encode())
            os._exit(code)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = os.read(read, 64)
    os.close(read)
    return status, int(counted or 0)


def tried(case: Case, work: Path, step: int) -> dict:
    """Each N in each way; raises AssertionError for a state that is neither."""
    before, after, at = work / "before", work / "after", work / "at"
    shutil.rmtree(work, ignore_errors=True)
    before.mkdir(parents=True)
    case.prepare(before)
    copied(before, after)
    assert forked(partial(case.act, after))[0] == 0
    states = {}
    for state in (case.look(before), case.look(after)):
        for name in {*case.look(before), *case.look(after)}:
            states.setdefault(name, []).append(state.get(name))
    ways = WAYS if step == 1 else {"kills": KILL}
    told = dict.fromkeys(ways, 0)
    for way, kind in ways.items():
        for n in itertools.count(1, step):
            copied(before, at)

            def faulty(n=n, kind=kind):
                SHIM.faults_arm(f"{at}/".encode(), n, kind)
                case.act(at)

            status, calls = forked(faulty)
            where = f"call {n} {way}, status {status}"
            assert status in ((0, -9) if kind == KILL else (0, 1)), where
            for name, value in case.look(at).items():
                assert value in states.get(name, []), f"{where}: {name} is neither"
            for name, (old, new) in states.items():
                lost = old is not None and new is not None and name not in case.look(at)
                assert not lost, f"{where}: {name} is lost"
            if status == 0:
                assert case.look(at) == case.look(after), where
            assert forked(partial(case.act, at))[0] == 0, f"{where}: not again"
            if "index" not in states:
                assert case.look(at) == case.look(after), f"{where}: not the same again"
            assert not list(at.rglob("*.part")), f"{where}: a temporary file stays"
            if status == 0 and calls < n:  # it came through without a fault
                break
            told[way] += 1
    return told


def copied(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def main() -> None:
    work = Path(sys.argv[2])
    torch.set_num_threads(1)
    store.BLOCK = 16
    work.mkdir(parents=True, exist_ok=True)
    root = toy.generate(work / "toy", products=4, image_size=64)
    photos, _ = catalog.read(root)
    packed = store.build_store(photos, cache_dir=work / "cache", store_px=64)
    every = cases(root, photos, packed)
    for name in sys.argv[4:] or every:
        place = work / re.sub(r"\W+", "_", name)
        print(json.dumps({"case": name, **tried(every[name], place, int(sys.argv[3]))}), flush=True)


if __name__ == "__main__":
    SHIM = ctypes.CDLL(sys.argv[1])
    SHIM.faults_count.restype = ctypes.c_long
    SHIM.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    main()
