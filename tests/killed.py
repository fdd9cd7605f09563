"""A small series from photos to submission, killed at random moments: python killed.py WORK KILLS

Each start goes on from what the last one left; where one comes to its end, its weights and its
submission must be those of a series that nobody killed, and the next begins anew. A start that
trains must begin with the batch behind the last one that was saved. Prints a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vipr_utils.data import catalog, store, toy, transforms
from vipr_utils.judge import submission
from vipr_utils.judge.task import Task
from vipr_utils.learn import losses, models, sampling, training

PHASES = ("packing", "training", "embedding", "answering", "ended")


def series(root: Path, place: Path, phase) -> None:
    """Pack, train, embed, answer; `phase` is told which of them is under way."""
    phase.value = 0
    task = Task(str(root), image_size=64, cache_dir=str(place / "cache"), device="cpu")
    phase.value = 1
    torch.manual_seed(0)
    model = models.create("siamese_small", weights="none", embedding_dim=16)
    labels = catalog.with_labels(task.fit)
    photos = task.training_photos(transforms.augmentation("kit", 48))
    sampler = sampling.PKSampler(labels, batch_size=16, images=2)
    training.fit(
        model,
        losses.ArcFace(16, labels.max() + 1),
        photos,
        sampler,
        folder=place,
        epochs=3,
        lr=1e-3,
        validate=task.validator(image_size=48),
        precision="float32",
        checkpoint_minutes=0.001,
    )
    models.save(model, place / "model.pt")
    phase.value = 2
    embeddings = task.embed(model, image_size=48)
    phase.value = 3
    steps = ["centring()", "alpha_query_expansion(3, 3)"]
    found = task.retrieve(embeddings, steps=steps)
    view = task.views["test"]
    submission.write_answers(place / "submission.csv", root, *view, found.ranks)
    phase.value = 4


def watched(root: Path, place: Path, phase) -> None:
    """`series`, in which the first batch after a checkpoint must be the one behind it."""
    saved = place / "checkpoint.pt"
    if saved.is_file():
        data = torch.load(saved, weights_only=True)
        ended = data["batch"] == data["steps"]
        position = (data["epoch"] + 1, 0) if ended else (data["epoch"], data["batch"])
        training._Training.step = first_step(training._Training.step, position)
    series(root, place, phase)


def first_step(step, position: tuple[int, int]):
    """A step that looks first whether it is the one of this (epoch, batch)."""

    def first(self, pixels, labels):
        training._Training.step = step
        assert (self.epoch, self.batch) == position, "it begins with another batch"
        whole = self.sampler.batches(self.stage)[self.batch]
        assert np.array_equal(labels.numpy(), self.photos.labels[whole]), "of other photos"
        step(self, pixels, labels)

    return first


def outcome(place: Path) -> tuple:
    """What a series must come to."""
    state = torch.load(place / "model.pt", weights_only=True)["state"]
    weights = {name: value.numpy().tobytes() for name, value in state.items()}
    return weights, (place / "submission.csv").read_bytes()


def main() -> None:
    work, kills = Path(sys.argv[1]), int(sys.argv[2])
    work.mkdir(parents=True)
    torch.set_num_threads(1)
    store.BLOCK = 32
    root = toy.generate(work / "toy", products=8, image_size=96)
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    phase = fork.Value("i", 0)

    def start(place: Path):
        phase.value = 0
        process = fork.Process(target=partial(watched, root, place, phase))
        process.start()
        return process

    seconds = dict.fromkeys(range(len(PHASES) - 1), 0.0)
    whole = start(work / "whole")
    while whole.is_alive():
        time.sleep(0.005)
        if phase.value in seconds:
            seconds[phase.value] += 0.005
    assert whole.exitcode == 0
    expected, place = outcome(work / "whole"), work / "killed"
    told = dict.fromkeys(PHASES, 0)
    ended, starts = 0, 0
    while sum(told.values()) < kills:
        aim = starts % len(seconds)
        starts += 1
        process = start(place)
        while process.is_alive() and phase.value < aim:
            time.sleep(0.001)
        process.join(rng.random() * seconds[aim])
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            told[PHASES[phase.value]] += 1
        else:
            assert process.exitcode == 0, "a start failed"
            assert outcome(place) == expected, "it came to something else"
            assert not list(place.rglob("*.part")), "temporary files stay"
            shutil.rmtree(place)
            ended += 1
    process = start(place)
    process.join()
    assert process.exitcode == 0 and outcome(place) == expected
    print(json.dumps({"kills": told, "starts": starts + 1, "ended": ended + 1}))


if __name__ == "__main__":
    main()
