"""Hours of work in one process, whose memory, threads and open files must stay as they are:
python long.py WORK [EPOCHS EVALUATIONS UPDATES]

Each kind of work is done for a quarter of its number first; what grows from there on to its end is
held against GROWTH_MB, and threads and open files against none. Prints a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import time
from pathlib import Path

import psutil
import torch
from test_index import drawn

from vipr_utils.data import catalog, toy, transforms
from vipr_utils.judge.task import Task
from vipr_utils.learn import losses, models, sampling, training
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.index import Index

GROWTH_MB = 40  # of memory, whatever the number: allocators keep some


def state() -> dict:
    """Of this process."""
    gc.collect()
    process = psutil.Process()
    return {
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "files": process.num_fds(),
    }


def held(name: str, number: int, step) -> dict:
    """What was there after a quarter of the steps and after all."""
    began = time.monotonic()
    for i in range(number // 4):
        step(i)
    before = state()
    for i in range(number // 4, number):
        step(i)
    after = state()
    told = {"work": name, "times": number, "seconds": round(time.monotonic() - began)}
    told |= {"before": before, "after": after}
    print(json.dumps(told), flush=True)
    assert after["memory_mb"] - before["memory_mb"] < GROWTH_MB, "memory grows"
    assert after["threads"] <= before["threads"] and after["files"] <= before["files"]
    return told


def main() -> None:
    work = Path(sys.argv[1])
    epochs, evaluations, updates = map(int, sys.argv[2:] or (30, 200, 2000))
    work.mkdir(parents=True)
    root = toy.generate(work / "toy", products=12, image_size=96)
    task = Task(str(root), image_size=64, cache_dir=str(work / "cache"), device="cpu")
    model = models.create("siamese_small", weights="none", embedding_dim=32)
    labels = catalog.with_labels(task.fit)
    photos = task.training_photos(transforms.augmentation("kit", 48))
    sampler = sampling.PKSampler(labels, batch_size=16, images=2)
    criterion = losses.ArcFace(32, labels.max() + 1)
    recipe = training.Recipe(
        epochs=epochs,
        lr=1e-3,
        folder=work / "run",
        checkpoint_minutes=0.001,
        validate=task.validator(image_size=48),
    )
    network = training._Network(model, criterion, torch.float32)
    under_way = training._Training(network, photos, sampler, recipe)

    def epoch(_) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            under_way.run_epoch()
            under_way.end_epoch()
            under_way.save()

    held("epochs of training", epochs, epoch)
    model.eval()
    steps = ["centring()", "alpha_query_expansion(3, 3)", "product_votes(3)"]

    def evaluation(_) -> None:
        task.evaluate(task.embed(model, image_size=48), steps=steps)

    held("evaluations", evaluations, evaluation)
    torch.manual_seed(0)
    encoder = Encoder((Look(models.create("siamese_small", embedding_dim=8), 32),), (), 64)
    rows, vectors = drawn([f"{letter}{i}" for letter in "abcd" for i in range(50)], dim=64)
    index = Index.build(work / "index", encoder, rows, vectors)

    def update(i: int) -> None:
        if i % 2:
            index.remove(["z"])
        else:
            index.put(*drawn([f"z{i}", f"z{i + 1}"], dim=64))
        index.nearest(vectors[:4])

    held("updates of an index", updates, update)


if __name__ == "__main__":
    main()
