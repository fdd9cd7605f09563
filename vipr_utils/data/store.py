"""Photos decoded once and packed into a few files, and the loaders that read them."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from safetensors import numpy as safetensors
from safetensors import safe_open
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vipr_utils.data import audit, catalog, toy
from vipr_utils.data.transforms import customer_like, jpeg, shrunk, zoomed
from vipr_utils.host import platform
from vipr_utils.host.device import cores, single_threaded
from vipr_utils.host.files import locked, retried, write_whole
from vipr_utils.host.progress import LOG, reporter

VERSION = 2  # of the packed photos: rises with the code that makes them
BLOCK = 4096  # photos in a file, on disk before the next are packed
LEAST_PX = 352  # of a photo's shorter side: 1.5 * 224, or 224 seen through a zoom of 0.65
SMALL_PX = 200  # networks under this see too little for an enlarged crop to matter
# Groceries encoded anew (500 queries, frozen Lite0, 224 px): mAP@5 moves by -.002 (standard error
# .002) at 41 kB a photo; at 90 by +.002 (.003) and 31 kB
QUALITY = 95
MOST_FILE = 2**30  # bytes
MOST_BYTES = 0.5  # for each pixel of the store's square, of a photo that is kept as it is
PART = 8  # photos of a batch that a thread looks at in one go
AHEAD = 1  # batches that threads load beside the one in use
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"]
SAMPLE = 200  # photos that tell how large a store will be


class BrokenImage(ValueError):
    """A file that cannot be shown as the photo it claims to be: names path and reason."""


def _opened(content: bytes) -> Image.Image:
    """Of the formats that photos come in: other decoders start programs or unpack without bound."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def read_image(path: Path | str, *, least_px: int = 0, content: bytes | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB as a person would see it: EXIF rotation applied, transparency on white,
    16 bit scaled to 8.

    least_px: the decoder may reduce a larger JPEG as long as its shorter side keeps this many
    pixels; 0: full size. content: the file's bytes, where they have been read. Raises BrokenImage
    for absent, empty, truncated and non-image files and ones that pillow holds for a decompression
    bomb (over 179 megapixels), OSError where the disk fails.
    """
    try:
        if content is None:
            content = retried(_content, Path(path))
        with warnings.catch_warnings(), _opened(content) as picture:
            warnings.simplefilter("ignore")  # of size and metadata: what matters is an error
            if least_px and picture.format == "JPEG":
                picture.draft(None, (least_px, least_px))
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except Exception as error:  # every decoder has its own ways to fail
        if getattr(error, "errno", None) and not isinstance(error, FileNotFoundError):
            raise  # the disk's fault, not the photo's
        reason = str(error).partition(" <")[0]  # without the bytes' address
        raise BrokenImage(
            f"{path}: no readable image ({type(error).__name__}: {reason}); replace or remove it"
        ) from error


def _content(path: Path) -> bytes:
    if path.stat().st_size > MOST_FILE:
        raise BrokenImage(
            f"{path}: over {MOST_FILE / 2**30:.0f} GiB, no photo; replace or remove it"
        )
    return path.read_bytes()


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels that a photo's head tells; raises BrokenImage as `read_image`."""
    try:
        with _opened(content) as picture:
            return picture.size
    except Exception as error:
        raise BrokenImage("the body is no readable image: send the photo's own bytes") from error


@contextmanager
def decoders() -> Iterator[ThreadPoolExecutor]:
    """Threads to call `read_image` in.

    Two that silence warnings at once can leave them silent for good: at the end they are as before.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        yield pool


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":  # 16-bit grey: convert() would clip it
        grey = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((grey / (257 if grey.max() > 255 else 1)).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


class Files:
    """files (N rows): file, problem ('' where there is none), bytes packed, width, height and
    sha256 of the file as it came; readable (N,) bool; problems: file, problem of those that are
    not.
    """

    def __init__(self, files: pd.DataFrame) -> None:
        self.files = files
        self.readable = (files["problem"] == "").to_numpy()
        self.problems = files.loc[~self.readable, ["file", "problem"]]


class Store(Files):
    """All photos of a catalog, packed: `store[row]` is (H, W, 3) uint8.

    folders: <fingerprint>-<photos>-v<version>-<pixels of a shorter side>; of several the rows
    follow one another, and the key is that of the first. Raises OSError where they hold no whole
    store.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders, self.key = folders, folders[0].name
        self.px = int(self.key.split("-")[-1])
        blocks = [_block(folder, row) for folder in folders for row in _first_rows(folder)]
        if None in blocks:
            raise OSError(f"block {blocks.index(None)} is absent or damaged")
        self.blocks, tables = zip(*blocks)
        super().__init__(pd.concat(tables, ignore_index=True))
        self._block_of = np.repeat(range(len(tables)), [len(table) for table in tables])
        self._ends = np.concatenate([table["bytes"].cumsum() for table in tables])
        self._starts = self._ends - self.files["bytes"].to_numpy()

    def __reduce__(self) -> tuple:
        return Store, self.folders  # another process maps the files itself

    def __getitem__(self, row: int) -> np.ndarray:
        if not self.readable[row]:
            raise BrokenImage(
                f"row {row} could not be read when the store was built; leave it out "
                "(store.readable)"
            )
        jpegs = self.blocks[self._block_of[row]].get_slice("jpegs")
        photo = jpegs[int(self._starts[row]) : int(self._ends[row])]
        return cv2.imdecode(photo, cv2.IMREAD_COLOR_RGB)

    def layouts(self, rows) -> np.ndarray:
        """(N, 256) uint16: the `audit.colour_layout` of these rows' own files.

        Of the files and not of the packed photos, whose pixels hang on their size: a split by
        visits is the same whatever size a network sees.
        """
        return np.concatenate([block.get_tensor("layouts") for block in self.blocks])[rows]


class Packed(Files):
    """Photos of some files, or of their contents, packed in memory as a `Store` packs them:
    packed[row] is (H, W, 3) uint8.

    files, readable and problems as of a Store; a content is called by its number.
    """

    def __init__(self, sources: list[Path | bytes], store_px: int) -> None:
        def packed(number: int) -> tuple:
            source = sources[number]
            if isinstance(source, bytes):
                return pack(source, store_px, f"photo {number + 1}")
            return _packed(source.parent, store_px, source.name)

        with decoders() as pool:
            self.jpegs, _, facts = zip(*pool.map(packed, range(len(sources))))
        super().__init__(pd.DataFrame(facts))

    def __getitem__(self, row: int) -> np.ndarray:
        return _decoded(self.jpegs[row])


def _decoded(jpeg: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)


def _first_rows(folder: Path) -> range:
    """Those of its blocks."""
    return range(0, int(folder.name.split("-")[-3]), BLOCK)


def _block(folder: Path, first_row: int) -> tuple[safe_open, pd.DataFrame] | None:
    """(BLOCK photos, mapped: jpegs (bytes, one file behind the other) and layouts; their table,
    which lies in the metadata); None where they are absent or damaged.
    """
    try:
        block = safe_open(folder / f"{first_row}.safetensors", "np")
        table = pd.read_json(io.StringIO(block.metadata()["files"]), dtype=False)
        return (block, table) if {"file", "problem", "bytes"} <= set(table) else None
    except Exception:  # damage has many ways to fail
        return None


def build_store(photos: pd.DataFrame, *, cache_dir: Path, store_px: int = LEAST_PX) -> Store:
    """The Store of a catalog at store_px: one that is there (`platform.stores`), else built in
    `cache_dir`.

    A photo whose shorter side is up to 1.5 * store_px keeps its JPEG bytes where they are few;
    others are reduced to store_px (JPEG, quality 95). Unreadable photos are listed in `problems`.
    A disk that fails stops it: what is packed stays, and the next call goes on from there. Raises
    OSError where there is no room.
    """
    data = f"{photos.attrs['fingerprint']}-{len(photos)}-v{VERSION}"
    folder = Path(cache_dir) / "stores" / f"{data}-{store_px}"
    with locked(folder):  # two first runs at once: the second finds what the first has built
        for there in platform.stores(Path(cache_dir), f"{data}-{store_px}"):
            try:
                return Store(there)
            except OSError as error:
                warnings.warn(f"{there} is no whole store ({error}): not used", stacklevel=2)
        _build(photos, folder, store_px)
    return Store(folder)


def _build(photos: pd.DataFrame, folder: Path, store_px: int) -> None:
    """Pack the blocks that the folder does not hold."""
    missing = [row for row in _first_rows(folder) if _block(folder, row) is None]
    with decoders() as pool:
        pack = partial(_packed, Path(photos.attrs["root"]), store_px)
        if len(missing) > 1:
            some = photos["path"].sample(SAMPLE, replace=True, random_state=0)
            size = np.mean([len(jpeg) for jpeg, *_ in pool.map(pack, some)])
            _check_room(folder, size * BLOCK * len(missing) / 1e9)
        reached = reporter(f"blocks of {BLOCK:,} photos packed", len(missing))
        for done, row in enumerate(missing, 1):
            jpegs, layouts, facts = zip(*pool.map(pack, photos["path"].iloc[row : row + BLOCK]))
            arrays = {
                "jpegs": np.frombuffer(b"".join(jpegs), np.uint8),
                "layouts": np.stack(layouts),
            }
            content = safetensors.save(arrays, {"files": pd.DataFrame(facts).to_json()})
            write_whole(folder / f"{row}.safetensors", content)
            reached(done)


def _check_room(folder: Path, needed_gb: float) -> None:
    """Say what the store will take. Raises OSError where there is less room."""
    room_gb = platform.room_gb(folder)
    LOG.info("packing photos: about %.1f GB, with room for %.1f", needed_gb, room_gb)
    if needed_gb > room_gb:
        raise OSError(
            errno.ENOSPC,
            f"the packed photos will take about {needed_gb:.1f} GB (by {SAMPLE} of them), {folder} "
            f"has room for {room_gb:.1f}: free some, or name another cache_dir, or set "
            "publish_store to False where they would be outputs",
        )


def open_data(
    data_root: str, cache_dir: str, *, px: int = 224, seen_px: int = 0, store_dir: str = ""
) -> tuple[pd.DataFrame, Store, pd.DataFrame]:
    """(photos, store, lost): the catalog of what can be read, its packed store, and what was left
    out.

    px, seen_px: see `packed_px`. store_dir: where the store is built, cache_dir where empty.

    The data root: the one given, $VIPR_DATA, one attached, else the toy set; attrs["said"] names
    it, and what its photos and labels come from. Raises BrokenImage where no photo can be read.
    """
    root, said = toy.data_root_or_toy(data_root, cache_dir)
    photos, absent = catalog.read(root)
    folder = platform.cache_folder(store_dir or cache_dir)
    store = build_store(photos, cache_dir=folder, store_px=packed_px(px, seen_px))
    lost = pd.concat([absent, store.problems], ignore_index=True)
    photos = photos[store.readable]
    if photos.empty:
        problem = lost["problem"].iloc[-1]
        raise BrokenImage(f"{root.name}: no photo can be read, the last: {problem}")
    said = f"{said}\n{photos.attrs['form']}"
    photos.attrs["said"] = said + (f"\n{len(lost)} files left out" if len(lost) else "")
    return photos, store, lost


def packed_px(px: int, seen_px: int = 0) -> int:
    """Pixels to keep of a shorter side, for networks that train at px and for whole photos that are
    looked at with seen_px a side (a network's pixels over its zoom).

    Training takes 1.5 * px: a crop of 4/9 of a square is not enlarged. LEAST_PX or more, in steps
    of 32, so that notebooks share a store; small networks take 8/7 of what they look at.
    """
    most = max(px, seen_px)
    if most < SMALL_PX:
        return max(128, round(most * 8 / 7))
    return max(LEAST_PX, 32 * math.ceil(max(1.5 * px, seen_px) / 32))


def _packed(root: Path, store_px: int, path: str) -> tuple[bytes, np.ndarray, dict]:
    """`pack` of a file."""
    try:
        content = retried(_content, root / path)
    except (FileNotFoundError, BrokenImage) as error:
        return _unreadable(path, error)
    return pack(content, store_px, path)


def pack(content: bytes, store_px: int, name: str) -> tuple[bytes, np.ndarray, dict]:
    """(JPEG bytes of a photo at store size, its colour layout, its row of `Store.files`).

    The file's own bytes where it is small, plain, upright; none where it is unreadable.
    """
    try:
        pixels = read_image(name, least_px=2 * store_px, content=content)
        layout = audit.colour_layout(read_image(name, least_px=64, content=content))
    except BrokenImage as error:
        return _unreadable(name, error)
    with _opened(content) as picture:
        width, height = picture.size
        upright = picture.getexif().get(0x0112, 1) == 1
        plain = picture.format == "JPEG" and picture.mode == "RGB" and upright
    facts = {"width": width, "height": height, "sha256": hashlib.sha256(content).hexdigest()}
    small = min(width, height) <= 1.5 * store_px and max(width, height) <= 6 * store_px
    small = small and plain and len(content) <= MOST_BYTES * store_px**2
    if not small or _decoded(content) is None:  # Pillow forgives damage that OpenCV does not
        scale = store_px / min(pixels.shape[:2])
        content = jpeg(shrunk(pixels, scale, most_px=6 * store_px), QUALITY)
    return content, layout, {"file": name, "problem": "", "bytes": len(content)} | facts


def _unreadable(name: str, error: Exception) -> tuple[bytes, np.ndarray, dict]:
    problem = str(error).removeprefix(f"{name}: ")
    return b"", np.zeros(256, np.uint16), {"file": name, "problem": problem, "bytes": 0}


@dataclass(eq=False)
class Photos(Dataset):
    """Items (image (3, S, S) uint8, label, row) of the catalog rows given.

    transform(photo, rng) -> image: what is random in it comes from rng.

    labels (N,) int, shop (N,) bool, or one for all. An item is asked for by its position, or by
    (position, occurrence) where an epoch shows it more than once. Random transforms are seeded by
    (seed, epoch, row, occurrence), whatever the order, the number of workers, or where a run was
    interrupted. With probability `clutter` a shop photo is made customer_like, on the ground of
    another of the rows, a customer's photo where there is one. zoom (N,), or one for all: the
    central share of each side that the transform receives.
    """

    store: Store
    rows: np.ndarray
    transform: Callable
    labels: np.ndarray | int = -1
    seed: int = 0
    shop: np.ndarray | bool = False
    clutter: float = 0.0
    zoom: np.ndarray | float = 1.0
    epoch: int = 0

    def __post_init__(self) -> None:
        self.rows = np.asarray(self.rows, np.int64)
        self.labels = np.broadcast_to(self.labels, self.rows.shape)
        self.shop = np.broadcast_to(self.shop, self.rows.shape)
        self.zoom = np.broadcast_to(self.zoom, self.rows.shape)
        self.grounds = self.rows[~self.shop]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item) -> tuple[torch.Tensor, int, int]:
        i, occurrence = item if np.ndim(item) else (item, 0)
        row = int(self.rows[i])
        photo = self.store[row]
        drawn = np.random.SeedSequence((self.seed, self.epoch, row, int(occurrence)))
        rng = np.random.default_rng(drawn)
        if self.shop[i] and rng.random() < self.clutter:
            photo = customer_like(photo, self.store[rng.choice(self._grounds(i))], rng)
        return self.transform(zoomed(photo, self.zoom[i]), rng), int(self.labels[i]), row

    def _grounds(self, i: int) -> np.ndarray:
        """Rows of photos to lay item i on: customers' photos, else all but its own."""
        if len(self.grounds):
            return self.grounds
        return np.delete(self.rows, i) if len(self.rows) > 1 else self.rows


def loader(photos: Photos, *, device, batch_size: int = 64, batch_sampler=None, workers: int = -1):
    """Batches (images (B, 3, S, S) uint8, channels last; labels; rows) in order (batch_size) or by
    batch_sampler (a list of lists of items), loaded while the one before is used.

    workers: processes. -1: on a GPU one a core, at most 8. 0, and -1 on a CPU: as many threads as
    torch has, in this process.
    """
    if batch_sampler is None:
        batch_sampler = BatchSampler(range(len(photos)), batch_size, False)
    on_gpu = torch.device(device).type == "cuda"
    if workers < 0:
        workers = min(cores(), 8) if on_gpu and len(batch_sampler) > 1 else 0
    if not workers:
        return _in_threads(photos, batch_sampler)
    return DataLoader(
        photos,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_batch,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # it draws a number: from the global state all would shift
        worker_init_fn=_one_thread,
    )


def _in_threads(photos: Photos, batches) -> Iterator[tuple]:
    def looked_at(items) -> tuple:
        return _batch([photos[item] for item in items])

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=single_threaded) as pool:
        coming = deque()
        for batch in batches:
            parts = [batch[i : i + PART] for i in range(0, len(batch), PART)]
            coming.append(pool.map(looked_at, parts))  # begins at once
            if len(coming) > AHEAD:
                yield _joined(coming.popleft())
        while coming:
            yield _joined(coming.popleft())


def _joined(parts) -> tuple:
    return tuple(map(torch.cat, zip(*parts)))


def _batch(items) -> tuple:
    images, labels, rows = zip(*items)
    pixels = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return pixels, torch.tensor(labels), torch.tensor(rows)


def _one_thread(worker: int) -> None:
    """A process a core is enough: OpenCV would start as many threads in each."""
    cv2.setNumThreads(0)
