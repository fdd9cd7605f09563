"""Photos: decoding, the packed store, transforms, loaders."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from vipr_utils import catalog, host, toy

MAX_PIXELS = 300_000_000  # larger ones are listed, not decoded: 0.9 GB as RGB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BrokenImage(ValueError):
    """A file that cannot be shown as the photo it claims to be: names path and reason."""


# ----------------------------------------------------------------------------------------------------- decoding


def read_image(path: Path | str, *, least_px: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB as a person would see it: EXIF rotation applied, transparency on white, 16 bit scaled to 8.

    least_px: the decoder may reduce a larger JPEG as long as its shorter side keeps this many pixels; 0: full size.
    Raises BrokenImage for empty, truncated, non-image files and ones over MAX_PIXELS.
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
            warnings.simplefilter("ignore")  # size and metadata warnings: the checks here are stricter
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > MAX_PIXELS:
                raise BrokenImage(
                    f"{path}: {picture.width} x {picture.height} is over {MAX_PIXELS // 10**6} megapixels; make it smaller"
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
        raise BrokenImage(f"{path}: no readable image ({type(error).__name__}: {error}); replace or remove it") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # 16-bit grey: convert() would clip it
        grey = np.asarray(picture, dtype=np.float64)
        full = 65535.0 if grey.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((grey.clip(0, full) * (255.0 / full)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


# -------------------------------------------------------------------------------------------------------- store


class Store:
    """All photos of a catalog in one file, each decoded once: `store[row]` is (H, W, 3) uint8.

    readable (N,) bool; problems: DataFrame file, row, problem of those that are not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = Path(folder), Path(folder).name
        with np.load(self.folder / "index.npz") as index:
            self.offsets = index["offsets"]  # (N + 1,)
        self.problems = pd.DataFrame(json.loads((self.folder / "problems.json").read_text()), columns=["file", "row", "problem"])
        self.readable = np.diff(self.offsets) > 0
        if (size := (self.folder / "images.bin").stat().st_size) != self.offsets[-1]:
            raise OSError(f"{self.folder}/images.bin has {size} bytes, its index says {self.offsets[-1]}")
        self._file = (-1, -1)  # (process, descriptor): opened in the process that reads

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        if start == end:
            raise BrokenImage(f"row {row} could not be read when the store was built; leave it out (store.readable)")
        if self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.folder / "images.bin", os.O_RDONLY))
        data = np.frombuffer(os.pread(self._file[1], end - start, start), np.uint8)
        return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": (-1, -1)}


def build_store(catalog: pd.DataFrame, *, cache_dir: Path, store_px: int = 256) -> Store:
    """The Store of a catalog, built once in `cache_dir` and found again by data fingerprint and size.

    A photo whose shorter side is up to 1.5 * store_px keeps its JPEG bytes; larger ones are reduced to store_px
    (JPEG, quality 95). Unreadable photos are listed in `problems` and have no record. Written whole: the folder appears
    when it is complete, a damaged one is built anew.
    """
    folder = Path(cache_dir) / "stores" / f"{catalog.attrs['fingerprint']}-{len(catalog)}-{store_px}"
    with host.locked(folder):  # two first runs at once: the second finds what the first has built
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

    with host.whole_file(folder / "images.bin") as part, open(part, "wb") as out, ThreadPoolExecutor(host.cores()) as pool:
        for start in range(0, len(catalog), 512):  # a block at a time: the pool never runs ahead of the disk
            block = catalog["path"].iloc[start : start + 512]
            for row, (path, result) in enumerate(zip(block, pool.map(pack, block)), start):
                if isinstance(result, BrokenImage):
                    reason = str(result).removeprefix(f"{root / path}: ")
                    problems.append({"file": path, "row": row, "problem": reason})
                else:
                    out.write(result)
                    sizes[row + 1] = len(result)
        out.flush()
    with host.whole_file(folder / "problems.json") as part:
        part.write_text(json.dumps(problems))
    with host.whole_file(folder / "index.npz") as part, open(part, "wb") as file:
        np.savez(file, offsets=np.cumsum(sizes))


def open_data(data_root: str, cache_dir: str, *, px: int = 256) -> tuple[pd.DataFrame, Store, pd.DataFrame]:
    """(photos, store, lost): the catalog of what can be read, its packed store, and what was left out.

    px: the size networks will see; the store keeps 8/7 of it, room for the study's crop of 224 out of 256.

    The data root: the one given, $VIPR_DATA, one attached, else the toy set; attrs["said"] names it.
    """
    root, said = toy.data_root_or_toy(data_root, cache_dir)
    photos, absent = catalog.read(root)
    store = build_store(photos, cache_dir=host.cache_folder(cache_dir), store_px=max(128, round(px * 8 / 7)))
    lost = pd.concat([absent, store.problems], ignore_index=True)
    photos = photos[store.readable]
    photos.attrs["said"] = "\n".join([said, *photos.attrs["notes"], *([f"{len(lost)} files left out"] if len(lost) else [])])
    return photos, store, lost


def _packed(path: Path, store_px: int) -> bytes:
    """JPEG bytes of a photo at store size: the file's own where it is a small, plain, upright JPEG."""
    pixels = read_image(path, least_px=2 * store_px)
    with Image.open(path) as picture:
        plain = picture.format == "JPEG" and picture.mode == "RGB" and picture.getexif().get(0x0112, 1) == 1
        small = min(picture.size) <= 1.5 * store_px
        longest = max(picture.size)
    if plain and small and longest <= 6 * store_px:
        return path.read_bytes()
    scale = store_px / min(pixels.shape[:2])
    if scale < 1 / 1.5 or longest > 6 * store_px:
        scale = min(scale, 1.0)
        size = [max(1, min(6 * store_px, round(side * scale))) for side in pixels.shape[1::-1]]
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return data.tobytes()


# --------------------------------------------------------------------------------------------------- transforms

FITS = ("squash", "crop", "pad")


def eval_transform(image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", fit="squash") -> T.Compose:
    """uint8 (H, W, 3) -> float32 (3, S, S), normalised. fit: 'squash' to the square, centre 'crop', or 'pad' with white."""
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown: use one of {FITS}")
    how = {"interpolation": InterpolationMode(interpolation), "antialias": True}
    steps = {
        "squash": [T.Resize((image_size, image_size), **how)],
        "crop": [T.Resize(image_size, **how), T.CenterCrop(image_size)],
        "pad": [_PadToSquare(), T.Resize((image_size, image_size), **how)],
    }[fit]
    return T.Compose([T.ToImage(), *steps, *_finish(mean, std)])


class _PadToSquare(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        side = max(h, w)
        left, top = (side - w) // 2, (side - h) // 2
        return T.functional.pad(x, [left, top, side - w - left, side - h - top], fill=255)


def _finish(mean, std) -> list:
    return [T.ToDtype(torch.float32, scale=True), T.Normalize(list(mean), list(std))]


def study_steps(image_size: int = 224) -> dict[str, torch.nn.Module]:
    """The reference study's six augmentations by name, in its order; Resize is 8/7 of the crop, 256 for 224."""
    large = round(image_size * 8 / 7)
    return {
        "Resize": T.Resize((large, large), antialias=True),
        "RandomResizedCrop": T.RandomResizedCrop(image_size, antialias=True),
        "RandomRotation": T.RandomRotation(50),
        "RandomHorizontalFlip": T.RandomHorizontalFlip(),
        "ColorJitter": T.ColorJitter(0.1, 0.1, 0.1, 0.1),
        "ToTensor": T.ToDtype(torch.float32, scale=True),
    }


def study_transform(image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> T.Compose:
    """The study's training transform: uint8 (H, W, 3) -> float32 (3, S, S)."""
    return T.Compose([T.ToImage(), *study_steps(image_size).values(), T.Normalize(list(mean), list(std))])


def train_transform(
    image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, scale=(0.4, 1.0), perspective: float = 0.0,
    rotation: float = 15.0, flip: float = 0.5, jitter: float = 0.3, hue: float = 0.0, erase: float = 0.0,
) -> T.Compose:  # fmt: skip
    """A training transform for retrieval: crop of `scale` of the area, perspective (every second photo), +-rotation
    degrees, flip with this probability, brightness, contrast and saturation jitter, hue jitter (a variant's only
    difference at times: little or none), and with probability `erase` a patch of 2 to 25 % of the area blanked."""
    smooth = InterpolationMode.BILINEAR
    steps = [T.RandomResizedCrop(image_size, scale=scale, antialias=True)]
    steps += [T.RandomPerspective(perspective, 0.5, smooth)] if perspective else []
    steps += [T.RandomRotation(rotation, smooth)] if rotation else []
    steps += [T.RandomHorizontalFlip(flip)] if flip else []
    steps += [T.ColorJitter(jitter, jitter, jitter, hue)] if jitter else []
    patch = [T.RandomErasing(erase, scale=(0.02, 0.25))] if erase else []
    return T.Compose([T.ToImage(), *steps, *_finish(mean, std), *patch])


strong_transform = partial(train_transform, scale=(0.3, 1.0), perspective=0.3, jitter=0.4, hue=0.02, erase=0.3)


def augmentation(name: str, image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> T.Compose:
    """The training transform of that name: 'kit' (train_transform), 'strong' (for long training), 'study'
    (study_transform) or 'none'."""
    kinds = {"kit": train_transform, "strong": strong_transform, "study": study_transform, "none": eval_transform}
    if name not in kinds:
        raise ValueError(f"augmentation {name!r} is unknown: use one of {tuple(kinds)}")
    return kinds[name](image_size, mean=mean, std=std)


def foreground(image: np.ndarray, *, tolerance: int = 18) -> np.ndarray:
    """(H, W) float32 in 0..1: 0 on the even ground that touches the border, 1 on the product, soft at the seam."""
    h, w = image.shape[:2]
    mask = np.zeros((h + 2, w + 2), np.uint8)
    smooth = cv2.medianBlur(image, 3)
    how = cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 4  # against the corner, else it creeps over soft edges
    for corner in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1)):
        if not mask[corner[1] + 1, corner[0] + 1]:
            cv2.floodFill(smooth, mask, corner, 0, (tolerance,) * 3, (tolerance,) * 3, how)
    product = cv2.erode((mask[1:-1, 1:-1] == 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    return cv2.GaussianBlur(product.astype(np.float32), (0, 0), 1.0)


def customer_like(shop: np.ndarray, ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shop photo as a shopper might take it, (H, W, 3) uint8 of its own size: cut out, tilted, laid on a blurred
    crop of another photo (`ground`), under uneven light, blurred, noisy, compressed."""
    h, w = shop.shape[:2]
    gh, gw = ground.shape[:2]
    side = int(min(gh, gw) * rng.uniform(0.5, 1.0))
    top, left = rng.integers(gh - side + 1), rng.integers(gw - side + 1)
    scene = cv2.resize(ground[top : top + side, left : left + side], (w, h), interpolation=cv2.INTER_LINEAR)
    scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(1, 4)).astype(np.float32)
    corners = np.float32([(0, 0), (w, 0), (w, h), (0, h)])
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.normal(0, 10), rng.uniform(0.6, 1.1))
    moved = cv2.transform(corners[None], turn)[0] + rng.uniform(-0.08, 0.08, (4, 2)) * (w, h)
    matrix = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    alpha = cv2.warpPerspective(foreground(shop), matrix, (w, h))[..., None]
    image = scene * (1 - alpha) + cv2.warpPerspective(shop, matrix, (w, h)).astype(np.float32) * alpha
    x, y = np.meshgrid(np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32))
    a = rng.uniform(0, 2 * np.pi)
    image *= (rng.uniform(0.7, 1.15) * (1 + rng.uniform(0, 0.3) * (x * np.cos(a) + y * np.sin(a))))[..., None]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2)) + rng.normal(0, rng.uniform(1, 6), (h, w, 1))
    data = cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 90))])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


# ------------------------------------------------------------------------------------------------------ loading


class Photos(torch.utils.data.Dataset):
    """Items (image (3, S, S), label, row) of the catalog rows given; labels default to -1.

    Random transforms are seeded by (seed, epoch, row): the same photo looks the same in the same epoch whatever the
    order, the number of workers, or where a run was interrupted.
    shop (N,) bool: with probability `clutter` such a photo is made customer_like, on the ground of another of the rows.
    """

    def __init__(self, store: Store, rows, transform, *, labels=None, seed: int = 0, shop=None, clutter: float = 0.0) -> None:
        self.store, self.rows, self.transform = store, np.asarray(rows, np.int64), transform
        self.labels = np.full(len(self.rows), -1, np.int64) if labels is None else np.asarray(labels, np.int64)
        if len(self.labels) != len(self.rows):
            raise ValueError(f"{len(self.labels)} labels for {len(self.rows)} rows: give one each")
        self.seed, self.epoch = seed, 0
        self.shop, self.clutter = np.zeros(len(self.rows), bool) if shop is None else np.asarray(shop, bool), clutter

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

    workers -1: on a GPU one process per core; on a CPU none where the cores are busy with the network anyway.
    """
    on_gpu = torch.device(device).type == "cuda"
    if workers < 0:
        workers = min(host.cores(), 8) if on_gpu else 0
    n_batches = len(batch_sampler) if batch_sampler is not None else math.ceil(len(photos) / batch_size)
    how = {"num_workers": workers if n_batches > 1 else 0, "pin_memory": on_gpu}
    how["generator"] = torch.Generator()  # a loader draws a number; from the global state it would shift all that follows
    if batch_sampler is not None:
        return torch.utils.data.DataLoader(photos, batch_sampler=[b.tolist() for b in batch_sampler], **how)
    return torch.utils.data.DataLoader(photos, batch_size=batch_size, **how)


# ------------------------------------------------------------------------------------------- what a picture says


def difference_hash(image: np.ndarray) -> np.uint64:
    """64 bits, one per pair of horizontal neighbours of the 9 x 8 grey thumbnail: near duplicates differ in few.
    Source: Krawetz 2013, "Kind of Like That"."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)[0]


def colour_layout(image: np.ndarray) -> np.ndarray:
    """(256,) uint16: how many of 1,024 pixels in each quarter of the picture (H, W, 3) have each of 64 colours.

    64 x 64 pixels are picked evenly and their channels cut to 2 bits. All of it is in whole numbers: any processor finds the
    same. Source: Swain, Ballard 1991, "Color indexing".
    """
    y, x = ((2 * np.arange(64) + 1) * side // 128 for side in image.shape[:2])
    colours = (image[y[:, None], x] >> 6) @ np.array([16, 4, 1], np.uint8)  # (64, 64) of 0..63
    quarters = colours.reshape(2, 32, 2, 32).swapaxes(1, 2).reshape(4, -1)
    return np.concatenate([np.bincount(q, minlength=64) for q in quarters]).astype(np.uint16)


def colour_layouts(photos: pd.DataFrame, *, cache_dir: Path) -> np.ndarray:
    """(N, 256) uint16: the `colour_layout` of each catalog row given, of its file as it came; kept in cache_dir."""
    root = Path(photos.attrs["root"])
    files = hashlib.sha256("\n".join(photos["path"]).encode()).hexdigest()[:16]
    kept = Path(cache_dir) / "layouts" / f"{photos.attrs['fingerprint']}-{files}.npy"
    if kept.is_file():
        return np.load(kept)

    def layout(path: str) -> np.ndarray:
        return colour_layout(read_image(root / path, least_px=64))

    with ThreadPoolExecutor(host.cores()) as pool:
        layouts = np.stack(list(pool.map(layout, photos["path"])))
    with host.whole_file(kept) as part, open(part, "wb") as file:
        np.save(file, layouts)
    return layouts


def border_whiteness(image: np.ndarray, *, width: float = 0.04) -> float:
    """Share of the picture's border (4 % of each side) that is nearly white and nearly grey, in 0..1."""
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA).astype(np.int16)
    w = max(1, round(128 * width))
    border = np.concatenate([side.reshape(-1, 3) for side in (small[:w], small[-w:], small[:, :w], small[:, -w:])])
    return float(((border.min(1) > 225) & (np.ptp(border, axis=1) < 20)).mean())
