"""A folder of parts and versions that are written once, and the version in force.

    CURRENT                 number and SHA-256 of the version in force
    versions/7.json         a version: what it is made of, by name
    parts/<SHA-256>...      what versions are made of

An update adds parts and a version and then replaces CURRENT in one step: a reader sees a version
whole, and an update that was killed leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from vipr_utils.host.files import ABSENT, locked, write_whole

KEPT = 10  # versions to go back to
ROLL_BACK = "go back to a version that is whole (rollback, by number), or build the index anew"


class IndexFault(ValueError):
    """A folder that is no index, or a damaged one: what is wrong and what helps."""


@contextmanager
def whole_or_fault(place: object) -> Iterator[None]:
    """What fails in here is an IndexFault that says the place."""
    try:
        yield
    except IndexFault:
        raise
    except Exception as error:  # damage has many ways to fail
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise  # a disk that fails in passing says nothing of the index
        raise IndexFault(f"{place} is damaged ({error}): {ROLL_BACK}") from error


def file_of(folder: Path, number: int) -> Path:
    return folder / "versions" / f"{number}.json"


def numbers(folder: Path) -> list[int]:
    """Of all versions that are there, ascending."""
    files = (folder / "versions").glob("*.json")
    return sorted(int(file.stem) for file in files if file.stem.isdecimal() and file.is_file())


def current(folder: Path) -> tuple[int, str]:
    """(number, SHA-256) of the version in force."""
    if not (folder / "CURRENT").exists():
        raise IndexFault(f"{folder} holds no index: build one")
    with whole_or_fault(f"{folder}/CURRENT"):
        found = json.loads((folder / "CURRENT").read_bytes())
        return int(found["version"]), found["sha256"]


def switch(folder: Path, number: int, sha256: str) -> None:
    """Put a version in force."""
    write_whole(folder / "CURRENT", json.dumps({"version": number, "sha256": sha256}))


def publish(folder: Path, state: dict, what: str) -> tuple[int, str, dict]:
    """Write the next version and put it in force; (number, SHA-256, state) of it. What no version
    that is kept needs is cleared away. Called by who has locked the folder."""
    try:
        parent = current(folder)[0]
    except IndexFault:  # none there, or damaged: built anew
        parent = 0
    number = max([parent, *numbers(folder)]) + 1
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    state = state | {"version": number, "parent": parent, "created": created, "what": what}
    content = json.dumps(state).encode()
    write_whole(file_of(folder, number), content)
    sha256 = hashlib.sha256(content).hexdigest()
    switch(folder, number, sha256)
    _clear(folder, {number, parent})
    return number, sha256, state


def _clear(folder: Path, needed: set[int]) -> None:
    """Remove versions but the KEPT newest and those needed, and parts that no version names."""
    there = numbers(folder)
    named = set()
    for number in there:
        file = file_of(folder, number)
        try:
            if number in needed | set(there[-KEPT:]):
                named |= _parts(json.loads(file.read_bytes()))
            else:
                file.unlink()
        except OSError:  # a disk that fails in passing: the next update clears
            return
        except Exception:  # damaged: nobody can go back to it
            file.unlink()
    for file in (folder / "parts").iterdir():
        if file.name not in named and file.is_file():  # folders are somebody else's
            file.unlink()


def _parts(state: dict) -> set[str]:
    """Names of the parts of a version."""
    encoder = state["encoder"]
    models_of = {look["model"] for look in encoder["looks"]}
    return models_of | {encoder["arrays"]} | {segment["part"] for segment in state["segments"]}


def put(folder: Path, content: bytes, ending: str) -> str:
    """Write a part; its name. One that is there and whole stays."""
    name = f"{hashlib.sha256(content).hexdigest()}{ending}"
    path = folder / "parts" / name
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)
    return name


def whole(folder: Path, name: str) -> bytes:
    """A part's content. Raises IndexFault where it is not what its name says."""
    content = (folder / "parts" / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != name.partition(".")[0]:
        raise IndexFault(f"{folder}/parts/{name} is damaged: {ROLL_BACK}")
    return content


def rollback(folder: Path, number: int = 0) -> None:
    """Put a version in force that is still there, 0 for the one that the present one was made of.

    Raises IndexFault where there is none of that number.
    """
    with locked(folder):
        there = numbers(folder)
        with whole_or_fault(f"{folder} (versions {there})"):
            if not number:
                number = json.loads(file_of(folder, current(folder)[0]).read_bytes())["parent"]
            if number not in there:
                raise IndexFault(f"{folder} has no version {number}, those there are {there}")
            content = file_of(folder, number).read_bytes()
            _parts(json.loads(content))
        switch(folder, number, hashlib.sha256(content).hexdigest())
