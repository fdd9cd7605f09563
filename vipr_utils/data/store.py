"""Photos decoded once and packed into one file, and the loaders that read it."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from vipr_utils.data import catalog, toy
from vipr_utils.data.transforms import customer_like
from vipr_utils.host import platform
from vipr_utils.host.device import cores
from vipr_utils.host.files import locked, whole_file

MAX_PIXELS = 300_000_000  # larger ones are listed, not decoded: 0.9 GB as RGB


class BrokenImage(ValueError):
    """A file that cannot be shown as the photo it claims to be: names path and reason."""


def read_image(path: Path | str, *, least_px: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB as a person would see it: EXIF rotation applied, transparency on white,
    16 bit scaled to 8.

    least_px: the decoder may reduce a larger JPEG as long as its shorter side keeps this many
    pixels; 0: full size. Raises BrokenImage for empty, truncated, non-image files and ones over
    MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            return _decode(file.read(), Path(path), least_px)
    except OSError as error:
        raise BrokenImage(f"{path}: cannot be opened ({error.strerror or error})") from error


def _decode(data: bytes, path: Path, least_px: int) -> np.ndarray:
    if not data:
        raise BrokenImage(f"{path}: empty file; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # size and metadata warnings: the checks here are stricter
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > MAX_PIXELS:
                raise BrokenImage(
                    f"{path}: {picture.width} x {picture.height} is over "
                    f"{MAX_PIXELS // 10**6} megapixels; make it smaller"
                )
            if least_px and picture.format == "JPEG":
                picture.draft("RGB" if picture.mode == "YCbCr" else None, (least_px, least_px))
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"{path}: {error}; make it smaller") from error
    except Exception as error:  # every decoder has its own ways to fail
        raise BrokenImage(
            f"{path}: no readable image ({type(error).__name__}: {error}); replace or remove it"
        ) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in (
        "I",
        "F",
    ):  # 16-bit grey: convert() would clip it
        grey = np.asarray(picture, dtype=np.float64)
        full = 65535.0 if grey.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((grey.clip(0, full) * (255.0 / full)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


class Store:
    """All photos of a catalog in one file, each decoded once: `store[row]` is (H, W, 3) uint8.

    readable (N,) bool; problems: DataFrame file, row, problem of those that are not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = Path(folder), Path(folder).name
        with np.load(self.folder / "index.npz") as index:
            self.offsets = index["offsets"]  # (N + 1,)
        self.problems = pd.DataFrame(
            json.loads((self.folder / "problems.json").read_text()),
            columns=["file", "row", "problem"],
        )
        self.readable = np.diff(self.offsets) > 0
        if (size := (self.folder / "images.bin").stat().st_size) != self.offsets[-1]:
            raise OSError(
                f"{self.folder}/images.bin has {size} bytes, its index says {self.offsets[-1]}"
            )
        self._file = (-1, -1)  # (process, descriptor): opened in the process that reads

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        if start == end:
            raise BrokenImage(
                f"row {row} could not be read when the store was built; leave it out "
                "(store.readable)"
            )
        if self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.folder / "images.bin", os.O_RDONLY))
        data = np.frombuffer(os.pread(self._file[1], end - start, start), np.uint8)
        return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": (-1, -1)}


def build_store(catalog: pd.DataFrame, *, cache_dir: Path, store_px: int = 256) -> Store:
    """The Store of a catalog, built once in `cache_dir` and found again by data fingerprint and
    size.

    A photo whose shorter side is up to 1.5 * store_px keeps its JPEG bytes; larger ones are reduced
    to store_px (JPEG, quality 95). Unreadable photos are listed in `problems` and have no record.
    Written whole: the folder appears when it is complete, a damaged one is built anew.
    """
    folder = (
        Path(cache_dir) / "stores" / f"{catalog.attrs['fingerprint']}-{len(catalog)}-{store_px}"
    )
    with locked(folder):  # two first runs at once: the second finds what the first has built
        try:
            return Store(folder)
        except (OSError, KeyError, ValueError):  # absent or damaged
            _build(catalog, folder, store_px)
    return Store(folder)


def _build(catalog: pd.DataFrame, folder: Path, store_px: int) -> None:
    root, problems, sizes = Path(catalog.attrs["root"]), [], np.zeros(len(catalog) + 1, np.int64)

    def pack(path: str) -> bytes | BrokenImage:
        try:
            return _packed(root / path, store_px)
        except BrokenImage as error:
            return error

    with (
        whole_file(folder / "images.bin") as part,
        open(part, "wb") as out,
        ThreadPoolExecutor(cores()) as pool,
    ):
        for start in range(
            0, len(catalog), 512
        ):  # a block at a time: the pool never runs ahead of the disk
            block = catalog["path"].iloc[start : start + 512]
            for row, (path, result) in enumerate(zip(block, pool.map(pack, block)), start):
                if isinstance(result, BrokenImage):
                    reason = str(result).removeprefix(f"{root / path}: ")
                    problems.append({"file": path, "row": row, "problem": reason})
                else:
                    out.write(result)
                    sizes[row + 1] = len(result)
        out.flush()
    with whole_file(folder / "problems.json") as part:
        part.write_text(json.dumps(problems))
    with whole_file(folder / "index.npz") as part, open(part, "wb") as file:
        np.savez(file, offsets=np.cumsum(sizes))


def open_data(
    data_root: str, cache_dir: str, *, px: int = 256
) -> tuple[pd.DataFrame, Store, pd.DataFrame]:
    """(photos, store, lost): the catalog of what can be read, its packed store, and what was left
    out.

    px: the size networks will see; the store keeps 8/7 of it, room for the study's crop of 224 out
    of 256.

    The data root: the one given, $VIPR_DATA, one attached, else the toy set; attrs["said"] names
    it.
    """
    root, said = toy.data_root_or_toy(data_root, cache_dir)
    photos, absent = catalog.read(root)
    store = build_store(
        photos, cache_dir=platform.cache_folder(cache_dir), store_px=max(128, round(px * 8 / 7))
    )
    lost = pd.concat([absent, store.problems], ignore_index=True)
    photos = photos[store.readable]
    photos.attrs["said"] = "\n".join(
        [said, *photos.attrs["notes"], *([f"{len(lost)} files left out"] if len(lost) else [])]
    )
    return photos, store, lost


def _packed(path: Path, store_px: int) -> bytes:
    """JPEG bytes of a photo at store size: the file's own where it is small, plain, upright."""
    pixels = read_image(path, least_px=2 * store_px)
    with Image.open(path) as picture:
        plain = (
            picture.format == "JPEG"
            and picture.mode == "RGB"
            and picture.getexif().get(0x0112, 1) == 1
        )
        small = min(picture.size) <= 1.5 * store_px
        longest = max(picture.size)
    if plain and small and longest <= 6 * store_px:
        return path.read_bytes()
    scale = store_px / min(pixels.shape[:2])
    if scale < 1 / 1.5 or longest > 6 * store_px:
        scale = min(scale, 1.0)
        size = [max(1, min(6 * store_px, round(side * scale))) for side in pixels.shape[1::-1]]
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    ok, data = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95]
    )
    return data.tobytes()


class Photos(torch.utils.data.Dataset):
    """Items (image (3, S, S), label, row) of the catalog rows given; labels default to -1.

    Random transforms are seeded by (seed, epoch, row): the same photo looks the same in the same
    epoch whatever the order, the number of workers, or where a run was interrupted. shop (N,) bool:
    with probability `clutter` such a photo is made customer_like, on the ground of another of the
    rows.
    """

    def __init__(
        self,
        store: Store,
        rows,
        transform,
        *,
        labels=None,
        seed: int = 0,
        shop=None,
        clutter: float = 0.0,
    ) -> None:
        self.store, self.rows, self.transform = store, np.asarray(rows, np.int64), transform
        self.labels = (
            np.full(len(self.rows), -1, np.int64)
            if labels is None
            else np.asarray(labels, np.int64)
        )
        if len(self.labels) != len(self.rows):
            raise ValueError(f"{len(self.labels)} labels for {len(self.rows)} rows: give one each")
        self.seed, self.epoch = seed, 0
        self.shop, self.clutter = (
            np.zeros(len(self.rows), bool) if shop is None else np.asarray(shop, bool),
            clutter,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        row, photo = int(self.rows[i]), self.store[int(self.rows[i])]
        drawn = np.random.SeedSequence((self.seed, self.epoch, row))
        rng = np.random.default_rng(drawn)
        if self.shop[i] and rng.random() < self.clutter:
            photo = customer_like(photo, self.store[int(rng.choice(self.rows[~self.shop]))], rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]) >> 1)
            image = self.transform(photo)
        return torch.as_tensor(image), int(self.labels[i]), row


def loader(photos: Photos, *, device, batch_size: int = 64, batch_sampler=None, workers: int = -1):
    """A DataLoader in order (batch_size) or by batch_sampler (a list of index lists).

    workers -1: on a GPU one process per core; on a CPU none where the cores are busy with the
    network anyway.
    """
    on_gpu = torch.device(device).type == "cuda"
    if workers < 0:
        workers = min(cores(), 8) if on_gpu else 0
    n_batches = (
        len(batch_sampler) if batch_sampler is not None else math.ceil(len(photos) / batch_size)
    )
    how = {"num_workers": workers if n_batches > 1 else 0, "pin_memory": on_gpu}
    how["generator"] = (
        torch.Generator()
    )  # a loader draws a number; from the global state it would shift all that follows
    if batch_sampler is not None:
        return torch.utils.data.DataLoader(
            photos, batch_sampler=[b.tolist() for b in batch_sampler], **how
        )
    return torch.utils.data.DataLoader(photos, batch_size=batch_size, **how)
