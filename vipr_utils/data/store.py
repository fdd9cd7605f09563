"""Photos decoded once and packed into one file, and the loaders that read it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vipr_utils.data import catalog, toy
from vipr_utils.data.transforms import customer_like, zoomed
from vipr_utils.host import platform
from vipr_utils.host.device import cores
from vipr_utils.host.files import locked, whole_file


class BrokenImage(ValueError):
    """A file that cannot be shown as the photo it claims to be: names path and reason."""


def read_image(path: Path | str, *, least_px: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB as a person would see it: EXIF rotation applied, transparency on white,
    16 bit scaled to 8.

    least_px: the decoder may reduce a larger JPEG as long as its shorter side keeps this many
    pixels; 0: full size. Raises BrokenImage for absent, empty, truncated and non-image files and
    ones that pillow holds for a decompression bomb (over 179 megapixels).
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")  # of size and metadata: what matters is an error
            if least_px and picture.format == "JPEG":
                picture.draft(None, (least_px, least_px))
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except Exception as error:  # every decoder has its own ways to fail
        raise BrokenImage(
            f"{path}: no readable image ({type(error).__name__}: {error}); replace or remove it"
        ) from error


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
        full = 65535.0 if grey.max() > 255 else 255.0
        picture = Image.fromarray(np.interp(grey, (0, full), (0, 255)).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


class Store:
    """All photos of a catalog in one file, each decoded once: `store[row]` is (H, W, 3) uint8.

    readable (N,) bool; problems: DataFrame file, problem of those that are not. Raises OSError or
    ValueError for a folder that holds no whole store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = Path(folder), Path(folder).name
        self.images = np.memmap(self.folder / "images.bin", np.uint8, "r")
        self.offsets = np.load(self.folder / "offsets.npy")  # (N + 1,)
        self.problems = pd.read_csv(self.folder / "problems.csv")
        self.readable = np.diff(self.offsets) > 0
        if len(self.images) != self.offsets[-1]:
            raise OSError(f"{folder}/images.bin is not as long as its offsets say")

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)  # another process maps the file itself

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = self.offsets[row : row + 2]
        if start == end:
            raise BrokenImage(
                f"row {row} could not be read when the store was built; leave it out "
                "(store.readable)"
            )
        bgr = cv2.imdecode(self.images[start:end], cv2.IMREAD_COLOR)
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def build_store(catalog: pd.DataFrame, *, cache_dir: Path, store_px: int = 256) -> Store:
    """The Store of a catalog, built once in `cache_dir` and found again by data fingerprint and
    size.

    A photo whose shorter side is up to 1.5 * store_px keeps its JPEG bytes; larger ones are reduced
    to store_px (JPEG, quality 95). Unreadable photos are listed in `problems` and have no record.
    Written whole: the folder appears when it is complete, a damaged one is built anew.
    """
    name = f"{catalog.attrs['fingerprint']}-{len(catalog)}-{store_px}"
    folder = Path(cache_dir) / "stores" / name
    with locked(folder):  # two first runs at once: the second finds what the first has built
        try:
            return Store(folder)
        except (OSError, ValueError):  # absent or damaged
            _build(catalog, folder, store_px)
    return Store(folder)


def _build(catalog: pd.DataFrame, folder: Path, store_px: int) -> None:
    root, paths = Path(catalog.attrs["root"]), catalog["path"]

    def pack(path: str) -> tuple[bytes, str]:
        try:
            return _packed(root / path, store_px), ""
        except BrokenImage as error:
            return b"", str(error).removeprefix(f"{root / path}: ")

    sizes, problems = [0], []
    with (
        whole_file(folder / "images.bin") as part,
        open(part, "wb") as out,
        decoders() as pool,
    ):
        for start in range(0, len(paths), 512):  # a block at a time: no farther ahead of the disk
            for data, problem in pool.map(pack, paths.iloc[start : start + 512]):
                out.write(data)
                sizes.append(len(data))
                problems.append(problem)
    if not any(sizes):
        raise BrokenImage(f"{root}: no photo can be read, the first: {problems[0]}")
    table = pd.DataFrame({"file": paths, "problem": problems})
    with whole_file(folder / "problems.csv") as part:
        table[table["problem"] != ""].to_csv(part, index=False)
    with whole_file(folder / "offsets.npy") as part, open(part, "wb") as file:
        np.save(file, np.cumsum(sizes))


def open_data(
    data_root: str, cache_dir: str, *, px: int = 256
) -> tuple[pd.DataFrame, Store, pd.DataFrame]:
    """(photos, store, lost): the catalog of what can be read, its packed store, and what was left
    out.

    px: the size networks will see; the store keeps `packed_px` of it.

    The data root: the one given, $VIPR_DATA, one attached, else the toy set; attrs["said"] names
    it, and what its photos and labels come from.
    """
    root, said = toy.data_root_or_toy(data_root, cache_dir)
    photos, absent = catalog.read(root)
    folder = platform.cache_folder(cache_dir)
    store = build_store(photos, cache_dir=folder, store_px=packed_px(px))
    lost = pd.concat([absent, store.problems], ignore_index=True)
    photos = photos[store.readable]
    said = f"{said}\n{photos.attrs['form']}"
    photos.attrs["said"] = said + (f"\n{len(lost)} files left out" if len(lost) else "")
    return photos, store, lost


def packed_px(px: int) -> int:
    """Pixels to keep for networks of px: 8/7 of it, room for the study's crop of 224 out of 256."""
    return max(128, round(px * 8 / 7))


def _packed(path: Path, store_px: int) -> bytes:
    """JPEG bytes of a photo at store size: the file's own where it is small, plain, upright."""
    pixels = read_image(path, least_px=2 * store_px)
    with Image.open(path) as picture:
        upright = picture.getexif().get(0x0112, 1) == 1
        plain = picture.format == "JPEG" and picture.mode == "RGB" and upright
        shorter, longest = sorted(picture.size)
    if shorter > 1.5 * store_px or longest > 6 * store_px:
        scale = min(1.0, store_px / min(pixels.shape[:2]))
        size = [min(6 * store_px, round(side * scale)) for side in pixels.shape[1::-1]]
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    elif plain:
        return path.read_bytes()
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@dataclass(eq=False)
class Photos(Dataset):
    """Items (image (3, S, S), label, row) of the catalog rows given.

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]) >> 1)
            image = self.transform(zoomed(photo, self.zoom[i]))
        return torch.as_tensor(image), int(self.labels[i]), row

    def _grounds(self, i: int) -> np.ndarray:
        """Rows of photos to lay item i on: customers' photos, else all but its own."""
        if not self.shop.all():
            return self.rows[~self.shop]
        return np.delete(self.rows, i) if len(self.rows) > 1 else self.rows


def loader(photos: Photos, *, device, batch_size: int = 64, batch_sampler=None, workers: int = -1):
    """A DataLoader in order (batch_size) or by batch_sampler (a list of lists of items).

    workers -1: on a GPU one process per core, at most 8; on a CPU none, as the cores are busy with
    the network, nor for a single batch.
    """
    if batch_sampler is None:
        batch_sampler = BatchSampler(range(len(photos)), batch_size, False)
    on_gpu = torch.device(device).type == "cuda"
    if workers < 0:
        workers = min(cores(), 8) if on_gpu and len(batch_sampler) > 1 else 0
    return DataLoader(
        photos,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # it draws a number: from the global state all would shift
    )
