"""Coverage-guided fuzzing of what strangers' files reach, by atheris (pip install atheris).

    python tests/fuzz.py 150                    each target for so many seconds
    python tests/fuzz.py 600 images steps       these alone

Prints a line of JSON for each target. Exit code 1, with the traceback and the input, where anything
but the documented errors came out, or a process died, hung for 30 seconds or took 4 GB; 2 where
atheris is absent.
"""

import argparse
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

MEMORY = Path("/dev/shm")  # a disk in memory, where there is one
LIMITS = ["-timeout=30", "-rss_limit_mb=4096", "-max_len=4096", "-verbosity=0"]
GALLERY = [f"g{i}.jpg" for i in range(6)]
TRAIN = "name,class,group,domain\n" + "".join(f"{name},{name[1]},0,shop\n" for name in GALLERY)
TEST = "name,class\nq0.jpg,0\nq1.jpg,1\nq2.jpg,9\n"
# words that a file is put together from, beside those that the fuzzer finds in the code
WORDS = [
    "name",
    "class",
    "group",
    "domain",
    "shop",
    "-1",
    "id",
    "images",
    "g0.jpg",
    "q0.jpg",
    "../",
]
WORDS += [
    "pca(",
    "verify(",
    "k1=",
    "[]",
    "{}",
    "{[]:1}",
    "{[]}",
    "--",
    "1+",
    " + ",
    "**",
    "lambda:",
]
TABLES = ["train.csv", "test.csv", "test_kaggletest.csv"]


def data_root(folder: Path) -> Path:
    """Six gallery photos and three queries, too small to be any good."""
    for name, text in (("train.csv", TRAIN), ("test.csv", TEST)):
        (folder / name).write_text(text)
        (folder / Path(name).stem).mkdir()
    for name in (*GALLERY, "q0.jpg", "q1.jpg", "q2.jpg"):
        (folder / ("train" if name[0] == "g" else "test") / name).write_bytes(b"a photo")
    return folder


# --------------------------------------------------------------------------------------- targets
# Each gives (what takes an input, the errors it may answer with, inputs to start from).


def tables(folder: Path):
    """The first byte says which table of a data root the others are."""
    from vipr_utils.data import catalog

    root = data_root(folder)

    def read(content: bytes) -> None:
        table = root / TABLES[content[0] % 3] if content else root / "train.csv"
        before = table.read_bytes() if table.exists() else None
        table.write_bytes(content[1:])
        try:
            photos, _ = catalog.read(root)
            assert all((root / path).resolve().is_relative_to(root) for path in photos["path"])
            assert len(set(photos["image_id"])) == len(photos)
            split_products = photos[photos["product_id"] >= 0].groupby("product_id")["product"]
            assert (split_products.nunique() == 1).all()
        finally:
            if before is None:
                table.unlink()
            else:
                table.write_bytes(before)

    quoted = b'\0\xef\xbb\xbfname,class\r\n"g0.jpg","a\nb"\r\ng1.jpg,007\r\n'
    seeds = [b"\0" + TRAIN.encode(), b"\1" + TEST.encode(), b"\2" + TEST.encode(), quoted]
    return read, catalog.CatalogError, seeds


def submissions(folder: Path):
    """A file beside a data root, validated and scored."""
    from vipr_utils.data import catalog
    from vipr_utils.judge import submission

    root, path = data_root(folder), folder / "submission.csv"
    sides = catalog.read_rows(root)
    catalog.read_rows = lambda _: sides  # they are the same every time

    def score(content: bytes) -> None:
        path.write_bytes(content)
        submission.score(path, root)

    ranked = "id,images\n" + "".join(f"q{i}.jpg,{' '.join(GALLERY[:5])}\n" for i in range(3))
    named = "name,class\nq0.jpg,1\nq1.jpg,2\nq2.jpg,3.0\n"
    return score, submission.SubmissionError, [ranked.encode(), named.encode()]


def steps(_: Path):
    """Steps of post-processing as text."""
    from vipr_utils.retrieve import pipeline

    def check(content: bytes) -> None:
        pipeline.check(pipeline.split(content.decode(errors="surrogateescape")))

    texts = [
        "pca(64) + k_reciprocal(k1=20, k2=6, weight=0.3)",
        "verify(5)",
        "centring()",
        "pca({})",
    ]
    return check, ValueError, [text.encode() for text in texts]


def images(_: Path):
    """The content of a photo, packed as a store packs it; what is packed must be a photo."""
    import cv2
    import numpy as np
    from PIL import Image

    from vipr_utils.data.store import BrokenImage, pack, read_image

    def decode(content: bytes) -> None:
        read_image("photo", content=content)  # raises BrokenImage
        jpeg, _, facts = pack(content, 64, "photo")
        assert jpeg and not facts["problem"], facts
        photo = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert photo is not None and photo.dtype == np.uint8 and photo.shape[2] == 3

    seeds = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, kind)
        seeds.append(file.getvalue())
    return decode, BrokenImage, seeds


TARGETS = {target.__name__: target for target in (tables, submissions, steps, images)}


# ---------------------------------------------------------------------------------------- running


def in_this_process(name: str, seconds: int, folder: Path) -> None:
    """Fuzz a target until the time is up; found.json in the folder says how it went."""
    import atheris

    warnings.simplefilter("ignore")
    corpus, work = folder / "corpus", folder / "work"
    corpus.mkdir()
    work.mkdir()
    with atheris.instrument_imports(include=["vipr_utils"]):
        run, documented, seeds = TARGETS[name](work.resolve())
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    escaped = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS]
    (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    found = {"executions": 0, "documented": 0, "seconds": 0.0, "faults": {}}
    began, told = time.monotonic(), 0.0

    def one(content: bytes) -> None:
        nonlocal told
        found["executions"] += 1
        try:
            run(content)
        except documented:
            found["documented"] += 1
        except Exception as error:
            place = f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}"
            text = "".join(traceback.format_exception(error))
            found["faults"].setdefault(place, f"{text}input: {content!r}")
        found["seconds"] = time.monotonic() - began
        if found["seconds"] - told > 1:
            told = found["seconds"]
            (folder / "found.json").write_text(json.dumps(found))

    limits = [f"-max_total_time={seconds}", f"-dict={folder / 'words'}", *LIMITS]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


def fuzzed(name: str, seconds: int) -> bool:
    """Whether a target answered all that it was given with documented errors."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    command = [sys.executable, __file__, str(seconds), name, "--folder", str(folder)]
    try:
        with open(folder / "log.txt", "wb") as log:
            ended = subprocess.run(command, stdout=log, stderr=log, cwd=folder)
        told = folder / "found.json"
        found = json.loads(told.read_text()) if told.is_file() else {"executions": 0, "faults": {}}
        counted = {
            "target": name,
            "executions": found["executions"],
            "seconds": round(found.get("seconds", 0)),
            "refused as documented": found.get("documented", 0),
            "undocumented errors": len(found["faults"]),
        }
        print(json.dumps(counted), flush=True)
        print(*found["faults"].values(), sep="\n\n", end="")
        if ended.returncode or not found["executions"]:
            log = (folder / "log.txt").read_text(errors="replace")[-3000:]
            print(f"{name}: its process ended with {ended.returncode}:\n{log}")
        return not ended.returncode and not found["faults"] and found["executions"] > 0
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=int, help="for each target")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all without")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install atheris (it runs on Linux)")
        return 2
    if given.folder:
        in_this_process(given.targets[0], given.seconds, given.folder)
        return 0
    answered = [fuzzed(name, given.seconds) for name in given.targets or TARGETS]
    return int(not all(answered))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
