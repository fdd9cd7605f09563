"""An index of 142,000 photos: updates, kills and answers over HTTP; writes catalogue.json.

    python benchmarks/catalogue.py                # some minutes; --kills and --seconds for more

Vectors are drawn at random, for time does not hang on what they show; photos are those of the toy
set, embedded by Lite0 as it is.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.data import toy
from vipr_utils.data.store import read_image
from vipr_utils.host.device import hardware
from vipr_utils.host.files import whole_file
from vipr_utils.learn import models
from vipr_utils.retrieve import rerank
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.index import Index

ROWS, DIM, ADDED = 142_000, 512, 1_000
CLIENTS = 16
SERVER = "import sys; from vipr_utils.run import index; sys.exit(index.main(sys.argv[1:]))"
WRITER = """
import sys, numpy as np, pandas as pd, torch
sys.path.insert(0, sys.argv[1])
import catalogue
from vipr_utils.retrieve.index import Index
torch.set_num_threads(1)
index = Index(sys.argv[2])
print("ready", flush=True)
for n in range(int(sys.argv[3]), 10**6):
    catalogue.update(index, n)
    print(n + 1, flush=True)
"""


def drawn(names: list[str], seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """(rows, vectors) of photos by these names; a product is a name's beginning."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((len(names), DIM), np.float32)
    rows = pd.DataFrame({"photo": names, "group": "", "domain": "", "answered": True})
    rows["product"] = rows["photo"].str.partition("/")[0]
    return rows, rerank.unit(vectors)


def update(index: Index, n: int) -> None:
    """The n-th of a sequence: two that add, one that removes what the first of them added."""
    if n % 3 == 2:
        index.remove([f"new{n - 2}"])
    else:
        index.put(*drawn([f"new{n}/{i}" for i in range(20)], seed=n))


def contents(index: Index) -> str:
    """A digest of all that it holds."""
    rows = index.version.rows[["photo", "product"]]
    hashed = pd.util.hash_pandas_object(rows, index=False).to_numpy()
    return f"{len(rows)} {hashed.sum()} {index.version.vectors.rows.double().sum():.6f}"


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def updates(folder: Path, encoder: Encoder) -> dict:
    """Seconds to build, load, add, remove and search."""
    rows, vectors = drawn([f"p{i // 15}/{i}" for i in range(ROWS)], seed=0)
    seconds = {"build": timed(lambda: Index.build(folder, encoder, rows, vectors))}
    index = Index(folder)
    new, new_vectors = drawn([f"q{i // 15}/{i}" for i in range(ADDED)], seed=1)
    seconds["load"] = timed(lambda: Index(folder))
    seconds[f"add {ADDED:,}"] = timed(lambda: index.put(new, new_vectors))
    seconds["remove a product"] = timed(lambda: index.remove(["p7"]))
    seconds["add a photo"] = timed(lambda: index.put(new[:1].assign(photo="one"), new_vectors[:1]))
    index.nearest(new_vectors[:1])
    seconds["search, a vector"] = timed(lambda: index.nearest(new_vectors[:1]))
    return seconds


def kills(folder: Path, encoder: Encoder, times: int) -> dict:
    """A writer is killed at random moments; what it leaves is of before or after."""
    twin = folder.with_name("twin")
    start = drawn([f"p{i // 15}/{i}" for i in range(20_000)], seed=0)
    Index.build(folder, encoder, *start)
    expected = Index.build(twin, encoder, *start)
    states, done, inside, left = [contents(expected)], 0, 0, []
    rng = np.random.default_rng()
    for _ in range(times):
        command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(folder), str(done)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(rng.random() * 0.6)
        os.kill(process.pid, signal.SIGKILL)
        told = process.stdout.read().split()
        process.wait()
        done = int(told[-1]) if told else done
        while len(states) <= done + 1:
            update(expected, len(states) - 1)
            states.append(contents(expected))
        found = contents(Index(folder))
        if found not in states[done : done + 2]:
            left.append(done)
        elif found == states[done + 1]:
            done, inside = done + 1, inside + 1
    return {"kills": times, "updates": done, "after": inside, "neither": len(left)}


def served(folder: Path, encoder: Encoder, seconds: float, photos: list[bytes]) -> dict:
    """CLIENTS that search, and now and then add, for so many seconds."""
    Index.build(folder, encoder, *drawn_for(encoder))
    command = [sys.executable, "-c", SERVER, "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
    took, errors, added = {"search": [], "add": []}, [], []
    ending = time.monotonic() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        turn = 0
        while time.monotonic() < ending:
            name = f"client{number}-{turn}"
            adds = turn % 50 == 49
            path = f"/products?product={name}&photo={name}" if adds else "/search"
            start = time.perf_counter()
            connection.request("POST", path, photos[(number + turn) % len(photos)])
            answer = connection.getresponse()
            answer.read()
            took["add" if adds else "search"].append(time.perf_counter() - start)
            if answer.status != (201 if adds else 200):
                errors.append(answer.status)
            elif adds:
                added.append(name)
            turn += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.terminate()
    process.wait()
    lost = set(added) - set(Index(folder).version.rows["photo"])
    figures = {"clients": CLIENTS, "seconds": seconds, "errors": len(errors), "lost": len(lost)}
    for what, times in took.items():
        if times:
            p50, p99 = np.percentile(times, [50, 99])
            figures[what] = {"requests": len(times), "p50_ms": 1000 * p50, "p99_ms": 1000 * p99}
    return figures


def drawn_for(encoder: Encoder) -> tuple[pd.DataFrame, np.ndarray]:
    """10,000 rows of the encoder's width."""
    width = encoder.looks[0].model.record["embedding_dim"]
    rows, _ = drawn([f"p{i // 15}/{i}" for i in range(10_000)], seed=0)
    vectors = np.random.default_rng(0).standard_normal((len(rows), width), np.float32)
    return rows, rerank.unit(vectors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    small = Encoder((Look(models.create("siamese_small", embedding_dim=DIM), 48),))
    lite = Encoder((Look(models.create("tf_efficientnet_lite0"), 224),))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        root = toy.generate(work / "toy", products=8, image_size=256)
        files = sorted((root / "test").glob("*.jpg"))[:16]
        assert all(read_image(file).size for file in files)
        record = {"hardware": hardware(), "rows": ROWS, "dim": DIM}
        record["updates"] = updates(work / "large", small)
        print(record["updates"], flush=True)
        record["served"] = served(
            work / "served", lite, given.seconds, [file.read_bytes() for file in files]
        )
        print(record["served"], flush=True)
        record["killed"] = kills(work / "killed", small, given.kills)
        print(record["killed"], flush=True)
    with whole_file(Path(__file__).with_suffix(".json")) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    return int(record["killed"]["neither"] or record["served"]["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
