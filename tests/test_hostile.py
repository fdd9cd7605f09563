"""Hostile photos, tables, models and records: a documented error or the right answer, no harm.

Files are made from a seed. VIPR_SOAK=1 tries more of each.
"""

import copy
import csv
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import threading
import zlib
from contextlib import contextmanager
from functools import cache as cache_of
from inspect import signature
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some
from PIL import Image
from roots import picture
from safetensors import numpy as safetensors

from vipr_utils.data import catalog, store
from vipr_utils.data.store import BrokenImage, Packed, build_store, pack, read_image
from vipr_utils.data.tables import CatalogError
from vipr_utils.host import platform
from vipr_utils.judge import runs, submission
from vipr_utils.learn import models, training
from vipr_utils.retrieve import cache, pipeline, versions
from vipr_utils.retrieve.encoder import Encoder, Look
from vipr_utils.retrieve.index import Index
from vipr_utils.run import params

FORGIVEN = (
    "ffd8ffffdb0043000806060789504e470d0a0a0000009f0d4948445200000010000000100802003600909168"
    "3600000802000000909168360000003849444101000211113103327b5b5dda000c0301000211fde83f007bff"
    "d9ffd8ffffdb0043000806060789504e470d0a0a0000009f0d49484452000000100000001008020036009091"
    "683600000038494441549c630d0a64313439351f273d38e63c2e333432ffdb0043017e0909090c0b0cffffff"
    "89504e470d0a1a0a0000000d4948445200000010000000100802000000909168360000003849444101000211"
    "113103327b5b5d3a317dffc0001108001000100301220002110103110103ffda000c030100021103113f007b"
    "ffd9"
)
REFERENCE = Path(__file__).resolve().parents[1] / "submissions" / "reference"
SOAK = bool(os.environ.get("VIPR_SOAK"))
OF_EACH = 100 if SOAK else 12  # truncations and bit flips of each kind of image
CASE_S = 20  # far more than any of these takes
BOMB_MIB = 150  # that refusing a bomb may take

few = settings(
    max_examples=1500 if SOAK else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


fewer = settings(few, max_examples=300 if SOAK else 8)


@contextmanager
def soon(case: object):
    """Fails where what is in here takes longer than CASE_S."""

    def late(*_):
        raise AssertionError(f"{case} still runs after {CASE_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(CASE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ----------------------------------------------------------------------------------------- images


def encoded(kind: str, seed: int = 3, **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, 48, 64)).save(file, kind, **how)
    return file.getvalue()


KINDS = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "lossless": encoded("WEBP", lossless=True),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "lzw": encoded("TIFF", compression="tiff_lzw"),
    "jpeg_in_tiff": encoded("TIFF", compression="jpeg"),
}


def truncated(kind: str) -> dict[str, bytes]:
    """Ends cut off: two in the head, one at the very end, others anywhere."""
    content, rng = KINDS[kind], np.random.default_rng(len(kind))
    ends = {1, 9, len(content) - 1, *rng.integers(2, len(content) - 1, OF_EACH).tolist()}
    return {f"{kind} of {end} bytes": content[:end] for end in sorted(ends)}


def flipped(kind: str) -> dict[str, bytes]:
    """One to four bits turned, half of the time in the head."""
    content, rng = KINDS[kind], np.random.default_rng(len(kind) + 1)
    found = {}
    for number in range(OF_EACH):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            end = min(200, len(content)) if number % 2 else len(content)
            changed[rng.integers(end)] ^= 1 << rng.integers(8)
        found[f"{kind} with flips {number}"] = bytes(changed)
    return found


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def zeros(megabytes: int) -> bytes:
    """Packed a thousandfold."""
    packer = zlib.compressobj(1)
    block = bytes(1_000_000)
    return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()


def tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@cache_of
def bombs() -> dict[str, bytes]:
    """Small files that say, or hold, far more pixels than a photo has."""
    huge = struct.pack(">HH", 65535, 65535)
    jpeg = KINDS["jpeg"]
    size_at = jpeg.index(b"\xff\xc0") + 5
    card = "".join(
        line.ljust(80)
        for line in (
            "SIMPLE  =                    T",
            "BITPIX  =                    8",
            "NAXIS   =                    2",
            "NAXIS1  =                   10",
            "NAXIS2  =                   10",
            "ZCMPTYPE= 'GZIP_1  '",
            "END",
        )
    )
    fits = card.encode().ljust(2880) + gzip.compress(bytes(180_000_000), 1)
    return {
        "png that says 60,000 squared": png(60_000, 60_000, zlib.compress(b"x")),
        "png of two billion bits": png(45_000, 45_000, zeros(20), 1, 0),
        "png that says 2 ** 31": png(2**31 - 1, 2**31 - 1, b""),
        "jpeg": jpeg[:size_at] + huge + jpeg[size_at + 4 :],
        "gif": b"GIF89a" + huge + KINDS["gif"][10:],
        "bmp": KINDS["bmp"][:18] + struct.pack("<ii", 100_000, 100_000) + KINDS["bmp"][26:],
        "bmp upside down": KINDS["bmp"][:18] + struct.pack("<ii", 9, -(2**31)) + bytes(40),
        "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4
        + b"\xff\x3f\0\xff\x3f\0",
        "tiff": tiff(100_000, 100_000),
        "fits that unpacks itself": fits,
        "png of text": KINDS["png"][:33]
        + chunk(b"zTXt", b"a\0\0" + zeros(180))
        + KINDS["png"][33:],
    }  # fmt: skip


@cache_of
def no_photos() -> dict[str, bytes]:
    """What is no photo at all, or of a kind whose decoder starts a program."""
    rng = np.random.default_rng(0)
    return {
        "nothing": b"",
        "zeros": bytes(5000),
        "noise": rng.bytes(5000),
        "text": b"text named .png",
        "page": b"<html><body>404</body></html>",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zip": b"PK\3\4" + bytes(100),
        "pdf": b"%PDF-1.4\n" + bytes(100),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch marker) system\n",
        "head alone": KINDS["jpeg"][:20],
        "two heads": KINDS["png"][:8] + KINDS["jpeg"],
        "pnm": b"P6 64 48 255\n" + bytes(64 * 48 * 3),
    }


TRUNCATED = {name: data for kind in KINDS for name, data in truncated(kind).items()}
FLIPPED = {name: data for kind in KINDS for name, data in flipped(kind).items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TIFF's metadata
def test_truncated_images_are_refused_or_whole():
    wholes = {kind: read_image(kind, content=content) for kind, content in KINDS.items()}
    refused = 0
    for name, content in TRUNCATED.items():
        with soon(name):
            try:
                found = read_image(name, content=content)
            except BrokenImage:
                refused += 1
            else:  # only what follows the pixels is lacking
                assert np.array_equal(found, wholes[name.split()[0]]), name
    assert refused > 0.9 * len(TRUNCATED)


def test_flipped_bits_give_a_photo_or_a_problem_and_a_packed_photo_can_be_shown():
    with soon("all flips"):
        packed = Packed(list(FLIPPED.values()), 64)
    for row, (name, problem) in enumerate(zip(FLIPPED, packed.files["problem"])):
        if packed.readable[row]:
            photo = packed[row]
            assert photo is not None and photo.ndim == 3 and photo.dtype == np.uint8, name
        else:
            assert "no readable image" in problem, name
    assert packed.readable.any() and not packed.readable.all()


def peak_mib(content: bytes, answer) -> None:
    """What a process of its own takes on top of what it began with; answers through a queue."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_image("bomb", content=content)
        said = "read"
    except BaseException as error:
        said = type(error).__name__
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    answer.put((said, took / 1024))


def test_a_file_of_terabytes_is_no_photo(tmp_path):
    (tmp_path / "train").mkdir()
    with open(tmp_path / "train" / "sparse.jpg", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(BrokenImage, match="sparse.jpg: .*over 1 GiB.* replace or remove it"):
        read_image(tmp_path / "train" / "sparse.jpg")
    content, _, facts = store._packed(tmp_path, 256, "train/sparse.jpg")
    assert not content and "over 1 GiB" in facts["problem"]


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_before_they_take_memory(name):
    processes = multiprocessing.get_context("fork")
    answer = processes.Queue()
    process = processes.Process(target=peak_mib, args=(bombs()[name], answer))
    process.start()
    said, took = answer.get(timeout=CASE_S)
    process.join(CASE_S)
    assert said == "BrokenImage" and took < BOMB_MIB


def test_memory_of_a_bomb_that_is_read_would_be_seen():
    answer = multiprocessing.get_context("fork").Queue()
    content = png(13_000, 13_000, zlib.compress(bytes(13_000 * 13_001)), colour=0)
    process = multiprocessing.get_context("fork").Process(target=peak_mib, args=(content, answer))
    process.start()
    said, took = answer.get(timeout=CASE_S)
    process.join(CASE_S)
    assert said == "read" and took > BOMB_MIB


@pytest.mark.parametrize("name", no_photos())
def test_what_is_no_photo_is_refused_whatever_it_is_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = no_photos()[name]
    for ending in (".jpg", ".png", ".tif"):
        with pytest.raises(BrokenImage, match="no readable image"):
            read_image(f"a{ending}", content=content)
        assert pack(content, 64, f"a{ending}")[0] == b""
    with pytest.raises(BrokenImage):
        store.picture_size(content)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TIFF's metadata
def test_root_of_nothing_but_hostile_files_gives_its_photos_and_names_the_others(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.jpg"
    outside.write_bytes(KINDS["jpeg"])
    for folder in ("train", "test"):
        (root / folder).mkdir(parents=True)
    hostile = TRUNCATED | FLIPPED | no_photos()
    for number, content in enumerate(hostile.values()):
        (root / "train" / f"{number}.jpg").write_bytes(content)
    good = {"right.jpg": "jpeg", "png.jpg": "png", "jpeg.gif": "jpeg", "webp.png": "webp"}
    for name, kind in good.items():
        (root / "train" / name).write_bytes(KINDS[kind])
    (root / "train" / "folder.jpg").mkdir()
    os.mkfifo(root / "train" / "pipe.jpg")
    links = {"zero.jpg": "/dev/zero", "itself.jpg": "itself.jpg", "gone.jpg": "nowhere.jpg"}
    for name, target in (links | {"link.jpg": str(outside)}).items():
        (root / "train" / name).symlink_to(target)
    absent = {"folder.jpg", "pipe.jpg", *links}
    names = [*(f"{i}.jpg" for i in range(len(hostile))), *good, "link.jpg", *absent]
    pd.DataFrame({"name": names, "class": 1}).to_csv(root / "train.csv", index=False)
    with soon("the root"):
        photos, problems = catalog.read(root)
        packed = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert set(problems["file"]) == {f"train/{name}" for name in absent}
    assert set(problems["problem"]) == {"absent"}
    readable = dict(zip(photos["name"], packed.readable))
    # people put datasets together by links: a link to a photo is that photo
    assert all(readable[name] for name in [*good, "link.jpg"])
    assert not any(readable[f"{i}.jpg"] for i, name in enumerate(hostile) if name in no_photos())
    assert len(packed.problems) + packed.readable.sum() == len(photos)
    assert all(packed[row].ndim == 3 for row in np.flatnonzero(packed.readable))


# ----------------------------------------------------------------------------------------- tables

# names of products that spreadsheets and readers of tables like to take for something else
PRODUCTS = ["007", "1e5", "NaN", "None", "NA", "inf", "nan", "null", "true", "0x10", "1_000"]
PRODUCTS += ["-0", "+5", "5-10", "2024-01-01", "١٢", "=1+1", "#N/A", "<NA>", "ﬁ", "fi", "a\x85b"]
ENDS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    "../outside.jpg",
    "..",
    "a/../../../outside.jpg",
    "../train/../../outside.jpg",
    "..\\outside.jpg",
    "a\\..\\..\\..\\outside.jpg",
    "C:\\x.jpg",
    "c:x.jpg",
    "Z:/x.jpg",
    "\\\\server\\share\\x.jpg",
    "//server/share/x.jpg",
    "\\x.jpg",
    "p/../a.jpg",
    "a.jpg/..",
    "..\n/outside.jpg",
    "../outside.jpg\0.jpg",
    "a\0.jpg",
    "a\r.jpg",
    "a\x1b[2J.jpg",
    "a\t.jpg",
]
# names like any other, whatever they mean elsewhere: read where there is such a file
ODD = ["CON", "NUL.jpg", "aux.png", "~", "%2e%2e%2foutside.jpg", "..jpg", "...", " a.jpg", "a.jpg "]
ODD += [
    "$HOME.jpg",
    "`id`.jpg",
    "a;b.jpg",
    "-rf.jpg",
    "caf\u00e9.jpg",
    "cafe\u0301.jpg",
    "\U0001f6d2",
]
ODD += [
    "\u202egpj.a",
    "a\u200b.jpg",
    "A.JPG",
    "a.jpg",
    "q?.jpg",
    "*",
    "[a].jpg",
    "{}",
    "{0}.jpg",
    "%s",
]


def quoted(rows: list, end: str = "\n", always: bool = False) -> str:
    file = io.StringIO()
    how = csv.QUOTE_ALL if always else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator=end, quoting=how).writerows(rows)
    return file.getvalue()


def hostile_root(folder: Path, train, test=b"name\nq.jpg\n") -> Path:
    """A root with these tables, and a photo beside it that none of them may reach."""
    root = folder / "root"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True, exist_ok=True)
    (root / "train" / "a.jpg").write_bytes(KINDS["jpeg"])
    (root / "test" / "q.jpg").write_bytes(KINDS["jpeg"])
    (folder / "outside.jpg").write_bytes(KINDS["jpeg"])
    for name, table in (("train.csv", train), ("test.csv", test)):
        content = table if isinstance(table, bytes) else table.encode()
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("always", [False, True], ids=["bare", "quoted"])
def test_products_keep_their_names_in_every_dialect(end, mark, always, tmp_path):
    rows = [["name", "class"], *([f"{i}.jpg", name] for i, name in enumerate(PRODUCTS))]
    root = hostile_root(tmp_path, mark + quoted(rows, ENDS[end], always))
    for i in range(len(PRODUCTS)):
        (root / "train" / f"{i}.jpg").write_bytes(KINDS["jpeg"])
    photos, problems = catalog.read(root)
    train = photos[photos["split"] == "train"]
    assert problems.empty and list(train["product"]) == PRODUCTS
    assert train["product_id"].nunique() == len(PRODUCTS)


def test_digits_of_other_scripts_are_other_products(tmp_path):
    root = hostile_root(tmp_path, "name,class\na.jpg,13\nb.jpg,1٣\n")
    rows = catalog.read_rows(root)[1]
    assert rows["product_id"].nunique() == 2


@cache_of
def malformed() -> dict[str, bytes]:
    """Tables that no reading makes right, by what is wrong."""
    head, row = "name,class\n", "a.jpg,1\n"
    texts = {
        "nothing": "",
        "blanks": " \n\t\n\n",
        "a mark": "\ufeff",
        "header alone": head,
        "no header": row,
        "columns missing": "name\na.jpg\n",
        "column of another case": "Name,Class\na.jpg,1\n",
        "one column by tabs": "name\tclass\na.jpg\t1\n",
        "semicolons": "name;class\na.jpg;1\n",
        "NUL in the header": "name,class\0\na.jpg,1\n",
        "row too long": head + row + "b.jpg,2,3\n",
        "row too short": "name,class,group\na.jpg,1,2\nb.jpg,1\n",
        "row of one": head + row + "b.jpg\n",
        "quote left open": head + '"a.jpg,1\n' + row * 50,
        "quote left open at the end": head + row + 'b.jpg,"1',
        "huge cell": head + "a" * 200_000 + ",1\n",
        "huge quoted cell": head + '"' + "a\n" * 200_000 + '",1\n',
        "huge class": head + "a.jpg," + "1" * 200_000 + "\n",
        "100,000 commas": head + row + "," * 100_000 + "\n",
        "100,000 quotes": head + row + '"' * 100_001 + "\n",
        "name twice": head + row + row,
        "no class": head + "a.jpg,\n",
        "blank class": head + "a.jpg,  \n",
        "class -1": head + "a.jpg,-1\n",
        "no name": head + ",1\n",
        "another domain": "name,class,domain\na.jpg,1,moon\n",
    }
    found = {name: text.encode() for name, text in texts.items()}
    found |= {
        f"name {name!r}": quoted([["name", "class"], [name, "1"]]).encode() for name in OUTSIDE
    }
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7"):
        text = (
            "name,class\nä.jpg,ü\n" if encoding in ("latin-1", "cp1252") else "name,class\n猫,1\n"
        )
        found[encoding] = text.encode(encoding)
    del found["utf-7"]  # is ASCII with odd names
    found["bytes that end early"] = "name,class\na.jpg,ü".encode()[:-1]
    found["a photo"] = KINDS["jpeg"]
    found["a zip"] = b"PK\3\4" + bytes(500)
    found["gzip"] = gzip.compress(b"name,class\na.jpg,1\n")
    return found


# right for queries, which need no class
UNLABELLED = ["columns missing", "NUL in the header", "no class", "blank class", "class -1"]


@pytest.mark.parametrize("name", malformed())
def test_malformed_tables_are_refused_by_name(name, tmp_path):
    for file in ("train.csv", "test.csv"):
        root = hostile_root(tmp_path, "name,class\na.jpg,1\n")
        if file == "test.csv" and name in UNLABELLED:
            continue
        (root / file).write_bytes(malformed()[name])
        with soon(name), pytest.raises(CatalogError, match=file):
            catalog.read(root)
        with soon(name), pytest.raises(CatalogError):
            submission.score(root / file, root)


def test_names_that_mean_something_elsewhere_are_names_here(tmp_path):
    assert len(set(ODD)) == len(ODD)
    root = hostile_root(tmp_path, quoted([["name", "class"], *([name, "1"] for name in ODD)]))
    photos, problems = catalog.read(root)
    assert list(photos["name"]) == ["a.jpg", "q.jpg"]
    assert set(problems["file"]) == {f"train/{name}" for name in ODD} - {"train/a.jpg"}
    for number, name in enumerate(ODD):
        (root / "train" / name).write_bytes(encoded("PNG", number))
    photos, problems = catalog.read(root)
    assert problems.empty and list(photos["name"][:-1]) == ODD
    packed = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert packed.readable.all()
    for row, number in enumerate(range(len(ODD))):  # each is its own file
        apart = np.abs(packed[row].astype(int) - picture(number, 48, 64))
        assert apart.mean() < 8, ODD[number]


@pytest.mark.parametrize("name", [".", "./", "a.jpg/", "a.jpg/.", "a" * 300, "a/" * 3000 + "a"])
def test_names_of_no_file_are_absent(name, tmp_path):
    root = hostile_root(tmp_path, quoted([["name", "class"], ["a.jpg", "1"], [name, "2"]]))
    photos, problems = catalog.read(root)
    assert list(photos["name"]) == ["a.jpg", "q.jpg"]
    assert problems.to_dict("records") == [{"file": f"train/{name}", "problem": "absent"}]


def test_carriage_return_in_a_class_does_not_break_the_submission(tmp_path):
    root = hostile_root(
        tmp_path, 'name,class\na.jpg,"1\r2"\nb.jpg,"x\ny"\n', "name,class\nq.jpg,\n"
    )
    queries, gallery = catalog.read_rows(root)
    for product in gallery["product"]:
        path = submission.write_classification(root / "s.csv", queries.index, [product])
        assert submission.validate(path, root)["class"].tolist() == [product]


# ---------------------------------------------------------------------------------- folders, links


def folder_root(folder: Path) -> Path:
    root = folder / "root"
    for path in ("train/mug/a.jpg", "train/cup/b.jpg", "test/q.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(KINDS["jpeg"])
    return root


def test_links_to_photos_and_folders_outside_are_followed(tmp_path):
    root, outside = folder_root(tmp_path), tmp_path / "elsewhere" / "jar"
    outside.mkdir(parents=True)
    (outside / "c.jpg").write_bytes(KINDS["jpeg"])
    (root / "train" / "jar").symlink_to(outside)
    (root / "train" / "mug" / "d.jpg").symlink_to(outside / "c.jpg")
    photos, problems = catalog.read(root)
    assert problems.empty
    assert {"jar/c.jpg", "mug/d.jpg"} < set(photos["name"])
    (tmp_path / "linked").mkdir()
    for name in ("train", "test"):
        (tmp_path / "linked" / name).symlink_to(root / name)
    assert list(catalog.read(tmp_path / "linked")[0]["name"]) == list(photos["name"])


def test_links_in_a_circle_end_and_no_photo_is_there_twice(tmp_path):
    root = folder_root(tmp_path)
    folders = [root / "train" / f"p{i}" for i in range(8)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:  # more ways through than a walk could ever go
        for target in [*folders, root / "train", root]:
            (folder / f"to_{target.name}").symlink_to(target)
    (root / "train" / "itself").symlink_to("itself")
    with soon("the circle"):
        photos, problems = catalog.read(root)
    assert len(photos) == 3 + 1  # q.jpg is a photo of train too, by way of the root
    files = [os.path.realpath(root / path) for path in photos["path"][photos["split"] == "train"]]
    assert len(set(files)) == len(files)
    assert len(problems) > 60 and set(problems["problem"]) == {"no photo, by its name"}


@pytest.mark.parametrize(
    "name", [b"\xff.jpg", b"caf\xe9.jpg", b"a\nb.jpg", b"a\rb.jpg", b"\x1b.jpg"]
)
def test_file_names_that_no_table_can_hold_are_named_and_left_out(name, tmp_path):
    root = folder_root(tmp_path)
    (root / "train" / "mug" / os.fsdecode(name)).write_bytes(KINDS["jpeg"])
    folder = root / "train" / os.fsdecode(name)
    folder.mkdir()
    (folder / "c.jpg").write_bytes(KINDS["jpeg"])
    photos, problems = catalog.read(root)
    assert list(photos["name"]) == ["cup/b.jpg", "mug/a.jpg", "q.jpg"]
    assert len(problems) == 2
    packed = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert packed.readable.all()


# ------------------------------------------------------------------------------ models and records


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_of_a_stranger_runs(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "siamese_small.pth"
    pickle.loads(pickle.dumps(Planted(marker)))
    assert marker.exists()  # it would
    marker.unlink()
    evil = {"record": Planted(marker), "state": {}, "state_dict": Planted(marker), "identity": {}}
    for legacy in (False, True):
        torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(models.WeightsError, match="no model.pt of this kit"):
            models.load(path)
        with pytest.raises(models.WeightsError, match="cannot be read"):
            models.create("siamese_small", weights=str(path))
        with pytest.raises(pickle.UnpicklingError):
            training._read(path)
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(models.WeightsError):
        models.load(path)
    (tmp_path / "cache").mkdir()
    rows = np.arange(3)
    with open(tmp_path / "cache" / "a.npz", "wb") as file:
        np.savez(file, rows=rows, values=np.array([Planted(marker)] * 3, object))
    found = cache.kept(tmp_path / "cache", rows, lambda part: part * 2.0, block=8)
    assert found == [0, 2, 4] and not marker.exists()


@pytest.mark.parametrize("seed", range(OF_EACH))
def test_damaged_cache_is_computed_anew(seed, tmp_path):
    rows, rng = np.arange(4), np.random.default_rng(seed)
    cache.kept(tmp_path, rows, lambda part: part * 2.0, block=8)
    (file,) = tmp_path.glob("*.npz")
    content = file.read_bytes()
    for trial in range(25):
        changed = bytearray(content)
        for _ in range(3):
            changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(changed[: rng.integers(len(content))] if trial % 3 == 0 else changed)
        found = cache.kept(tmp_path, rows, lambda part: part * 2.0, block=8)
        assert len(found) == 4


def header(tensors: dict, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "nothing": b"",
    "short": b"\1\2",
    "length 2 ** 64 - 1": b"\xff" * 8 + b"{}",
    "length past the end": header({"a": tensor()}, length=10_000),
    "length 0": header({"a": tensor()}, length=0),
    "overlapping": header({"a": tensor(), "b": tensor(offsets=(8, 24))}),
    "a hole": header({"a": tensor(), "b": tensor(offsets=(32, 48))}),
    "past the end": header({"a": tensor(offsets=(0, 1600), shape=(400,))}),
    "backwards": header({"a": tensor(offsets=(16, 0))}),
    "another type": header({"a": tensor("Q99")}),
    "a size that is another": header({"a": tensor(shape=(5,))}),
    "shape that overflows": header({"a": tensor(shape=(2**62, 8))}),
    "shape below nothing": header({"a": tensor(shape=(-4,))}),
    "no tensors": header({"__metadata__": {"a": "b"}}, b""),
    "a list": struct.pack("<Q", 2) + b"[]",
    "nested": struct.pack("<Q", 5000) + b"[" * 5000,
    "no text": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "truncated": safetensors.save({"a": np.zeros(100)})[:-10],
    "other names": safetensors.save({"evil": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors_are_no_weights_and_no_part_of_an_index(name, tmp_path, indexed):
    path = tmp_path / "siamese_small.safetensors"
    path.write_bytes(HEADERS[name])
    with soon(name), pytest.raises(models.WeightsError, match="cannot be read or do not fit"):
        models.create("siamese_small", weights=str(path))
    folder = copied(indexed, tmp_path)
    part = versions.put(folder, HEADERS[name], ".safetensors")
    sign(folder, {"segments": [{"part": part, "rows": 4, "removed": []}]})
    with soon(name), pytest.raises(versions.IndexFault, match="is damaged.*go back to a version"):
        Index(folder)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"record": 3, "state": {}},
        {"record": {"name": "siamese_small"}, "state": {}},
        {"record": {"name": 3, "neck": 0, "pooling": "own", "embedding_dim": 8}, "state": {}},
        {"record": {"name": "x", "neck": 1, "pooling": "own", "embedding_dim": -8}, "state": {}},
        {"record": {"name": "siamese_small", "neck": 1, "pooling": "gem", "embedding_dim": 8}},
    ],
    ids=repr,
)
def test_checkpoint_of_another_shape_is_no_model(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(models.WeightsError, match="no model.pt of this kit"):
        models.load(tmp_path / "model.pt")


def test_truncated_checkpoint_is_no_model(tmp_path):
    whole = models.save(
        models.create("test_vit", weights="none"), tmp_path / "whole.pt"
    ).read_bytes()
    rng = np.random.default_rng(0)
    for end in [0, 4, len(whole) - 1, *rng.integers(5, len(whole), OF_EACH)]:
        (tmp_path / "model.pt").write_bytes(whole[:end])
        with pytest.raises(models.WeightsError, match="no model.pt of this kit"):
            models.load(tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------- index


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """An index of two versions: of four photos, then of five."""
    torch.manual_seed(0)
    model = models.create("test_vit", weights="none")
    rows = pd.DataFrame(
        {"photo": list("abcde"), "product": list("ppqqr"), "group": "", "domain": ""}
    )
    rows["answered"] = True
    dim = model.record["embedding_dim"]
    vectors = np.random.default_rng(0).normal(size=(5, dim)).astype(np.float32)
    encoder = Encoder((Look(model, 32),), store_px=64)
    index = Index.build(tmp_path_factory.mktemp("index") / "index", encoder, rows[:4], vectors[:4])
    index.put(rows[4:], vectors[4:] / np.linalg.norm(vectors[4:]))
    return index


def copied(index: Index, folder: Path) -> Path:
    return Path(shutil.copytree(index.folder, folder / "index"))


def sign(folder: Path, change) -> None:
    """Put a version 2 in force that someone has changed, or written anew, and signed."""
    path = versions.file_of(folder, 2)
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_bytes()) | change).encode()
    path.write_bytes(change)
    versions.switch(folder, 2, hashlib.sha256(change).hexdigest())


CURRENTS = ["", "null", "[]", "3", "{}", "[" * 9000, "\xff", '{"version": [1], "sha256": {}}']
CURRENTS += ['{"version": "../../x", "sha256": "0"}', '{"version": 1e400, "sha256": "0"}']
CURRENTS += ['{"version": "\\u0000", "sha256": "0"}', '{"version": null, "sha256": null}']
CURRENTS += [json.dumps({"version": "a" * 400, "sha256": "0"}), '{"version": 99, "sha256": "0"}']


@pytest.mark.parametrize("content", CURRENTS, ids=range(len(CURRENTS)))
def test_damaged_current_is_a_fault_and_a_version_by_its_number_brings_all_back(
    content, indexed, tmp_path
):
    folder = copied(indexed, tmp_path)
    (folder / "CURRENT").write_text(content)
    with pytest.raises(versions.IndexFault, match="go back to a version"):
        Index(folder)
    with pytest.raises(versions.IndexFault, match="go back to a version"):
        versions.rollback(folder)
    versions.rollback(folder, 1)
    assert len(Index(folder)) == 4
    (folder / "CURRENT").write_text(content)
    table = indexed.version.rows
    again = Index.build(folder, indexed.encoder, table, indexed.version.vectors.rows.numpy())
    assert len(again) == 5 and again.version.number > 2


SEGMENT = {"part": "x", "rows": 1, "removed": []}
SIGNED = {
    "no text": b"\xff",
    "nothing": b"",
    "null": b"null",
    "empty": b"{}",
    "nested": b"[" * 9000,
    "another format": {"format": 99},
    "no segments": {"segments": []},
    "segments 3": {"segments": 3},
    "a part above": {"segments": [SEGMENT | {"part": "../../../etc/passwd"}]},
    "a part elsewhere": {"segments": [SEGMENT | {"part": "/etc/passwd"}]},
    "a part with NUL": {"segments": [SEGMENT | {"part": "\0"}]},
    "a long part": {"segments": [SEGMENT | {"part": "a" * 400}]},
    "part 4": {"segments": [SEGMENT | {"part": 4}]},
    "encoder []": {"encoder": []},
    "looks": {"encoder": {"looks": [{}], "arrays": "x", "store_px": 1}},
}


@pytest.mark.parametrize("name", SIGNED)
def test_version_that_someone_signed_is_a_fault_and_can_be_left(name, indexed, tmp_path):
    folder = copied(indexed, tmp_path)
    sign(folder, SIGNED[name])
    with pytest.raises(versions.IndexFault):
        Index(folder)
    if isinstance(SIGNED[name], bytes):  # says no version before it
        with pytest.raises(versions.IndexFault, match=r"versions \[1, 2\].*go back"):
            versions.rollback(folder)
    versions.rollback(folder, 1)
    assert len(Index(folder)) == 4


def test_files_that_are_no_versions_and_damaged_ones_are_not_gone_back_to(indexed, tmp_path):
    folder = copied(indexed, tmp_path)
    for name in ("1 copy.json", "3 (1).json", "notes.json", "-1.json"):
        (folder / "versions" / name).write_text("{")
    assert versions.numbers(folder) == [1, 2]
    assert Index(folder).versions()["number"].tolist() == [1, 2]
    versions.file_of(folder, 1).write_text("{")
    for number in (0, 1):
        with pytest.raises(versions.IndexFault, match="is damaged"):
            versions.rollback(folder, number)
    assert len(Index(folder)) == 5  # what was in force still is
    assert Index(folder).versions()["number"].tolist() == [2]
    versions.file_of(folder, 2).unlink()
    with pytest.raises(versions.IndexFault, match="go back to a version"):
        versions.rollback(folder)


# ------------------------------------------------------------------------ stores that were attached


def test_damage_that_one_decoder_forgives_and_the_other_does_not_is_packed_anew():
    """A JPEG of 16 x 16 px with stray bytes between its parts, found by fuzzing."""
    content = bytes.fromhex(FORGIVEN)
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is None
    packed = store.Packed([content], 64)
    assert packed.readable.all() and packed[0].shape == (16, 16, 3)


@pytest.mark.parametrize("files", [None, "", "3", "{", "[]", '{"file": 3}', "[" * 9000])
def test_damaged_store_is_built_anew(files, tmp_path):
    root = hostile_root(tmp_path, "name,class\na.jpg,1\n")
    photos, _ = catalog.read(root)
    folder = build_store(photos, cache_dir=tmp_path / "cache", store_px=64).folders[0]
    (block,) = folder.glob("*.safetensors")
    arrays = safetensors.load_file(block)
    safetensors.save_file(arrays, block, None if files is None else {"files": files})
    with pytest.raises(OSError, match="absent or damaged"):
        store.Store(folder)
    with pytest.warns(UserWarning, match="is no whole store"):
        again = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert again.readable.all()


# ------------------------------------------------------------------------- parameters and notebooks


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one notebook, `tiny`."""
    monkeypatch.setattr(platform, "repository", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "tiny.ipynb").write_text(json.dumps(TINY))
    return tmp_path


CELL = {
    "cell_type": "code",
    "id": "a",
    "metadata": {"tags": ["parameters"]},
    "source": 'seed: int = 0\nlr: float = 0.1\nname: str = ""\nsizes: "list[int]" = []\n'
    'kind: "Literal[a, b]" = "a"\nsteps: "list[Step]" = []\nrun_name: str = ""\n',
    "outputs": [],
    "execution_count": None,
}
SPEC = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
TINY = {"cells": [CELL], "metadata": SPEC, "nbformat": 4, "nbformat_minor": 5}
# ten of ten of ten ...: a billion words in all
LAUGHS = f"&a [{', '.join('x' * 10)}]"
for before, after in zip("abcdefgh", "bcdefghi"):
    LAUGHS += f", &{after} [{', '.join([f'*{before}'] * 10)}]"
LAUGHS = f"[{LAUGHS}]"
YAMLS = {
    "a command": "seed: !!python/object/apply:os.system ['touch marker']",
    "an object": "!!python/object/new:os.system ['touch marker']",
    "a module": "seed: !!python/module:antigravity",
    "a name": "seed: !!python/name:os.system",
    "a key 1": "1: 2",
    "a key null": "null: 3",
    "a key list": "[1]: 3",
    "a key date": "2024-01-01: 3",
    "no date": "seed: 2024-13-45",
    "open brackets": "seed: " + "[" * 3000,
    "nested lists": "seed: " + "[" * 3000 + "]" * 3000,
    "nested maps": "seed: " + "{a: " * 3000,
    "400 digits for a float": "lr: 1" + "0" * 400,
    "5,000 digits": "seed: " + "9" * 5000,
    "NUL": "seed: \0",
    "no UTF-8": b"seed: \xff",
    "a billion laughs": f"seed: {LAUGHS}",
    "laughs for a choice": f"kind: {LAUGHS}",
    "laughs in a list": f"sizes: {LAUGHS}",
    "a list in itself": "seed: &a [*a]",
    "a notebook too long": f"notebook: {'a' * 400}\nruns: [{{seed: 1}}]",
    "a notebook with NUL": 'notebook: "a\\0"\nruns: [{seed: 1}]',
    "a notebook elsewhere": "notebook: ../../etc/passwd\nruns: [{seed: 1}]",
    "a row of numbers": "notebook: tiny\nruns: [{1: 2}]",
    "runs that map": "notebook: tiny\nruns: {a: 1}",
    "no base": "notebook: tiny\nbase:\nruns: [{seed: 1}]",
    "two documents": "seed: 1\n---\nseed: 2",
    "a run's name of lists": "run_name: [1]",
    "a merge with nothing": "<<: 3",
    "bytes": "seed: !!binary aGk=",
    "a set": "seed: !!set {a}",
    "a step that runs": 'steps: [\'__import__("os").system("touch marker")\']',
}


@pytest.mark.parametrize("name", YAMLS)
def test_hostile_parameter_files_are_refused_by_name(name, checkout):
    file = checkout / "tiny.yaml"
    content = YAMLS[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with soon(name), pytest.raises(params.BadParameters, match="tiny.yaml: ") as caught:
        params.load_runs([file])
    assert len(str(caught.value)) < 200_000 and not (checkout / "marker").exists()


NOTEBOOKS = {
    "nothing": b"",
    "text": b"hello",
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "nested": b"[" * 9000,
    "no text": b"\xff",
    "of another format": json.dumps(TINY | {"nbformat": 99}).encode(),
    "of format NaN": json.dumps(TINY | {"nbformat": float("nan")}).encode(),
    "cells 3": json.dumps(TINY | {"cells": 3}).encode(),
    "source 3": json.dumps(TINY | {"cells": [CELL | {"source": 3}]}).encode(),
    "metadata []": json.dumps(TINY | {"cells": [CELL | {"metadata": []}]}).encode(),
    "no kernel": json.dumps(TINY | {"metadata": {}}).encode(),
    "a call": json.dumps(
        TINY | {"cells": [CELL | {"source": "a: int = __import__('os').system('touch marker')"}]}
    ).encode(),
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_hostile_notebooks_are_refused_by_name(name, checkout):
    file = checkout / "evil.ipynb"
    file.write_bytes(NOTEBOOKS[name])
    with soon(name), pytest.raises(params.BadParameters, match="evil.ipynb: "):
        params.load_runs([file])
    assert not (checkout / "marker").exists()


def test_folder_with_the_name_of_a_parameter_file_is_refused(checkout):
    (checkout / "some" / "tiny.yaml").mkdir(parents=True)
    with pytest.raises(params.BadParameters, match="tiny.yaml"):
        params.load_runs([checkout / "some"])


RECORD = dict.fromkeys(runs.KEYS, {}) | {
    "run": "x",
    "notebook": "06_submission",
    "data": {"root": "r", "fingerprint": "f"},
    "protocol": "test",
    "metrics": {"map_at_5": 0.5, "n_queries": 3, "n_gallery": 3},
    "model": {"name": "m"},
    "seconds": 1.0,
    "device": "cpu",
    "git": "",
}
RECORDS = {
    "no text": b"\xff",
    "nothing": b"",
    "nested": b"[" * 9000,
    "9,000 digits": b"9" * 9000,
    "a string": json.dumps(" ".join(runs.KEYS)).encode(),
    "a list of the keys": runs.KEYS,
    "of another kit": {"run": "x", "config": {"lr": 3}, "metrics": {"loss": 0.1}},
    "metrics 3": RECORD | {"metrics": 3},
    "metrics null": RECORD | {"metrics": None},
    "data []": RECORD | {"data": []},
    "params null": RECORD | {"params": None},
    "a model of text": RECORD | {"model": "resnet"},
    "rows 3": RECORD | {"metrics": {"rows": 3}},
    "rows of numbers": RECORD | {"metrics": {"rows": [3]}},
    "run 3": RECORD | {"run": 3, "metrics": {"rows": [{"name": "a"}]}},
    "validation 3": RECORD | {"validation": 3},
}


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_records_are_problems_and_leave_the_board_to_the_others(name, tmp_path):
    for folder, content in (("good", RECORD), ("evil", RECORDS[name])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.pt").write_bytes(b"")
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / folder / "run.json").write_bytes(text)
    with pytest.raises(runs.RunError, match=r"evil/run.json .*run the notebook again|lacks"):
        runs.load(tmp_path / "evil")
    board = runs.scoreboard(tmp_path)
    assert len(board) == 1 and len(board.attrs["problems"]) == 1
    assert "0.5" in runs.table(board) and len(runs.ladder(tmp_path, "f")) == 1
    assert runs.validated(tmp_path, "f", "s")[0] == {}


def changed(value, path=()):
    """(path, copies of a record's value with something of another kind at that path)."""
    yield path, ([], {}, "x", 5, True, None, [[1]], {"a": []})
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, below in inner:
        if isinstance(below, (dict, list)):
            yield from changed(below, (*path, key))
        else:
            yield (*path, key), ([], {}, "x", 5, True, None)


@pytest.mark.parametrize(
    "name", ["06_submission", pytest.param("04_pretrained_sweep", marks=pytest.mark.long)]
)
def test_any_value_of_a_record_may_be_of_another_kind(name, tmp_path):
    record = json.loads((REFERENCE / name / "run.json").read_text())
    data, split = record["data"]["fingerprint"], (record.get("validation") or {}).get("split", "")
    folder, refused = tmp_path / name, 0
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    for number, (path, values) in enumerate(changed(record)):
        for value in values if SOAK else values[number % len(values) :][:1]:
            evil = copy.deepcopy(record)
            place = evil
            for key in path[:-1]:
                place = place[key]
            if path:
                place[path[-1]] = value
            (folder / "run.json").write_text(json.dumps(evil if path else value))
            board = runs.scoreboard(tmp_path)
            runs.comparable(runs.over_seeds(board))
            runs.ladder(tmp_path, data)
            runs.validated(tmp_path, data, split)
            refused += len(board.attrs["problems"])
    assert refused > (50 if SOAK else 10)


# ------------------------------------------------------------------------------------- properties

TEXT = some.text(some.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = some.text(some.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\:"))
NAMES = NAMES.filter(lambda name: name.strip(". ") and len(name.encode()) < 200)


@few
@given(rows=some.lists(some.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_table_of_any_text_is_refused_or_read_as_csv_reads_it(rows, tmp_path):
    root = hostile_root(tmp_path, quoted([["name", "class"], *rows]))
    try:
        gallery = catalog.read_rows(root)[1]
    except CatalogError:
        return
    assert list(gallery.index) == [name for name, _ in rows]
    plain = [text.replace("\r", " ").strip() for _, text in rows]
    for product, text in zip(gallery["product"], plain):
        assert (
            product == text or product == text.rstrip("0").rstrip(".") or text.startswith(product)
        )
    ids = gallery.groupby("product")["product_id"].agg(["nunique", "first"])
    assert (ids["nunique"] == 1).all() and ids["first"].is_unique


@few
@given(
    content=some.binary(max_size=200) | TEXT.map(str.encode),
    which=some.sampled_from(["train.csv", "test.csv", "test_kaggletest.csv"]),
)
def test_table_of_any_bytes_is_refused_or_gives_photos_inside_the_root(content, which, tmp_path):
    root = hostile_root(tmp_path, "name,class\na.jpg,1\n")
    (root / "test_kaggletest.csv").unlink(missing_ok=True)
    (root / which).write_bytes(content)
    try:
        photos, _ = catalog.read(root)
    except CatalogError:
        return
    for path in photos["path"]:
        assert (root / path).resolve().is_relative_to(root.resolve())


@fewer
@given(data=some.data())
def test_any_ranking_comes_back_from_its_file_and_scores_as_a_slow_loop_says(data, tmp_path):
    gallery = data.draw(some.lists(NAMES, min_size=5, max_size=8, unique=True))
    queries = data.draw(some.lists(NAMES, min_size=1, max_size=4, unique=True))
    products = data.draw(some.lists(some.sampled_from("abc"), min_size=12, max_size=12))
    label = dict(zip(gallery, products))
    truth = dict(zip(queries, products[::-1]))
    root = hostile_root(
        tmp_path,
        quoted([["name", "class"], *label.items()]),
        quoted([["name", "class"], *truth.items()]),
    )
    lists = [data.draw(some.permutations(gallery))[:5] for _ in queries]
    path = submission.write_ranking(root / "s.csv", queries, lists)
    assert submission.validate(path, root)["id"].tolist() == queries
    found = submission.score(path, root)
    values = []
    for query, names in zip(queries, lists):
        n = min(5, sum(product == truth[query] for product in label.values()))
        hits = [label[name] == truth[query] for name in names]
        if n:
            values.append(sum(hits[i] * sum(hits[: i + 1]) / (i + 1) for i in range(5)) / n)
    assert found["n_excluded"] == len(queries) - len(values)
    if values:
        assert found["map_at_5"] == pytest.approx(np.mean(values))
    classes = [label[names[0]] for names in lists]
    named = submission.write_classification(root / "c.csv", queries, classes)
    right = np.mean([product == truth[query] for product, query in zip(classes, queries)])
    if values:
        counted = submission.score(named, root)["top_1_accuracy"]
        assert counted == pytest.approx(right)


LISTS = [
    ["q.jpg", " ".join(f"{i}.jpg" for i in range(5))],
    ["r.jpg", "4.jpg 3.jpg 2.jpg 1.jpg 0.jpg"],
]


@few
@given(
    at=some.integers(0, 80),
    cut=some.integers(0, 6),
    put=some.sampled_from(["", "\0", '"', ",", "\n", "\r", " ", "%", "%00", "\ufeff", "é", ".jpg"]),
)
def test_edited_submission_is_refused_or_still_answers_every_query(at, cut, put, tmp_path):
    train = quoted([["name", "class"], *([f"{i}.jpg", i] for i in range(6))])
    root = hostile_root(tmp_path, train, "name,class\nq.jpg,1\nr.jpg,2\n")
    text = quoted([["id", "images"], *LISTS])
    (root / "s.csv").write_text(text[:at] + put + text[at + cut :], encoding="utf-8", newline="")
    try:
        table = submission.validate(root / "s.csv", root)
    except submission.SubmissionError:
        return
    assert sorted(table["id"]) == ["q.jpg", "r.jpg"]
    for answer in table["images"]:
        names = answer.split(" ")
        assert len(set(names)) == len(names) == 5
    assert 0 <= submission.score(root / "s.csv", root)["map_at_5"] <= 1


@few
@given(text=TEXT | some.sampled_from(sorted(pipeline.STEPS)).flatmap(
    lambda name: some.text("0123456789.,-+()[]{}*='e_ adimk", max_size=20).map(f"{name}(".__add__)
))  # fmt: skip
def test_any_text_is_a_step_or_refused_with_the_steps_there_are(text):
    try:
        bound = pipeline.check(pipeline.split(text))
    except ValueError:
        return
    for step in bound:
        assert step.func in pipeline.METHODS
        assert all(type(value) in (int, float) and value >= 0 for value in step.keywords.values())


@pytest.mark.parametrize(
    "step",
    [
        "pca({[]: 1})",
        "pca({[]})",
        "pca(" + "-" * 3000 + "1)",
        "pca(" + "-" * 100_000 + "1)",
        "pca(" + "+".join("1" * 20_000) + ")",
        "pca" + ".x" * 20_000,
        "pca" + "()" * 20_000,
        "pca(" + "[" * 150 + "]" * 150 + ")",
        "pca(\0)",
        "pca(\ud800)",
        "pca(-0x" + "f" * 9000 + ")",
        "pca(*[1])",
        "pca(**{'dim': 1})",
    ],
    ids=range(13),
)
def test_steps_that_python_itself_chokes_on_are_refused(step):
    with soon(step[:30]), pytest.raises(ValueError):
        pipeline.check([step])


@few
@given(data=some.data(), name=some.sampled_from(sorted(pipeline.STEPS)))
def test_numbers_of_a_step_come_back_as_they_were_written(data, name):
    function = pipeline.STEPS[name]
    numbers = {}
    for parameter in list(signature(function).parameters.values())[1:]:
        whole = some.integers(0, 10**9)
        kinds = whole if parameter.annotation == "int" else whole | some.floats(0, 1e9)
        numbers[parameter.name] = data.draw(kinds)
    step = f"{name}({', '.join(f'{key}={value!r}' for key, value in numbers.items())})"
    bound = pipeline.bind(step)
    assert bound.func is function and bound.keywords == numbers


VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | TEXT | some.dates(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TYPES = {"seed": int, "lr": float, "name": str, "sizes": list, "kind": str, "run_name": str}


@few
@given(
    value=VALUES, kind=some.sampled_from(["int", "float", "str", "bool", "list[int]", "list[str]"])
)
def test_checked_value_has_its_type(value, kind):
    try:
        found = params.check(value, kind)
    except (ValueError, OverflowError):
        return
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "list":
        assert type(found) is list
        assert all(type(item) is params.SCALARS[inner] for item in found) and found == value
    else:
        assert type(found) is params.SCALARS[outer]
        assert found == value or found != found


@few
@given(content=some.dictionaries(some.sampled_from([*TYPES, "steps"]) | TEXT, VALUES, max_size=3))
def test_parameter_file_of_any_values_is_refused_or_typed(content, checkout):
    assume("notebook" not in content)
    file = checkout / "tiny.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        (run,) = params.load_runs([file])
    except params.BadParameters as error:
        assert "tiny.yaml" in str(error)
        return
    assert set(run.params) == set(content)
    assert all(type(value) is TYPES.get(name, list) for name, value in run.params.items())


def test_there_are_three_hundred_hostile_files_and_more():
    tables = 2 * len(malformed()) + len(ODD) + 12
    assert len(TRUNCATED | FLIPPED | no_photos() | bombs()) >= 250 and tables >= 120
    assert threading.current_thread() is threading.main_thread()  # where alarms are heard
