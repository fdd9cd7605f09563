"""The embedded default: a generated Products-10K in miniature, at any size.

A brand's line (group) fixes shape, colours, pattern and lettering; its variants (classes) differ in
one accent colour, an icon and a word. Every photo is drawn from a generator seeded by (seed, line
or product, photo), so a product looks the same whatever else is asked for, and the bytes repeat.
"""

from __future__ import annotations

import colorsys
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd

from vipr_utils.host import platform

VERSION = 3
SIDE = 480  # pixels of the square a product is drawn in, twice the size of most photos
VARIANTS = 4  # products of a brand's line
SYLLABLES = ("KA", "LU", "MO", "RI", "TA", "VE", "ZO", "NI", "BE", "SA", "DO", "FI")
WORDS = ("Classic", "Mint", "Cherry", "Lemon", "Cocoa", "Honey", "Ginger", "Berry", "Mango", "Mild")
FONTS = (cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX)
WHITE = (252, 250, 244)

# Solids of revolution: half the width and the height (pixels), where the lid ends and the label
# begins (parts of the height), then the outline: heights and the radii there.
ROUND = {
    "can": (115, 350, 0.03, 0.05, (0, 0.05, 0.95, 1), (0.88, 1, 1, 0.9)),
    "bottle": (90, 445, 0.1, 0.47, (0, 0.1, 0.11, 0.2, 0.3, 0.4), (0.4, 0.4, 0.3, 0.36, 0.7, 1)),
    "jar": (140, 320, 0.16, 0.32, (0, 0.16, 0.17, 0.22, 0.3), (0.9, 0.9, 0.78, 0.82, 1)),
    "tub": (150, 290, 0.12, 0.14, (0, 0.12, 0.13, 1), (1, 1, 0.94, 0.7)),
}
# Prints on labels and on the ground: above zero is printed; (x, y) from the middle, in widths.
PATTERNS = {
    "stripes": lambda x, y: np.sin(24 * (x + y)),
    "dots": lambda x, y: np.sin(20 * x) * np.sin(20 * y) - 0.4,
    "rays": lambda x, y: np.sin(16 * np.arctan2(y, x)),
    "waves": lambda x, y: np.sin(22 * y + 2 * np.sin(9 * x)),
    "rings": lambda x, y: np.sin(24 * np.hypot(x, y)),
}
# Icons are closed curves: number of points, how sharp they are, radius between them.
ICONS = {
    "drop": (1, 4, 0.4),
    "bean": (2, 2, 0.4),
    "clover": (3, 0.7, 0.2),
    "gem": (4, 3, 0.4),
    "star": (5, 2, 0.35),
    "flower": (6, 0.5, 0.5),
    "sun": (11, 1, 0.65),
}


def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


# -------------------------------------------------------------------------------- the label


@lru_cache(maxsize=64)
def design(product: int, seed: int) -> SimpleNamespace:
    """What a product looks like: its line's settings, then the variant's accent, icon and word."""
    line, variant = divmod(product, VARIANTS)
    rng = np.random.default_rng((seed, 2, line))
    hue, hue_of_accents = rng.random(2)
    return SimpleNamespace(
        shape=["box", *ROUND][line % 5],
        slim=rng.uniform(0.85, 1.1),
        brand="".join(rng.choice(SYLLABLES, rng.integers(2, 4))),
        font=int(rng.choice(FONTS)),
        pattern=rng.choice(list(PATTERNS)),
        places=rng.permutation([0.18, 0.5, 0.8]),  # of brand, icon and word, down the label
        ground=rgb(hue, rng.uniform(0.1, 0.6), rng.choice([0.4, 0.95])),
        second=rgb(hue + rng.choice([0.08, 0.5, 0.42]), 0.75, rng.uniform(0.45, 0.8)),
        cap=rgb(hue, rng.random(), rng.uniform(0.25, 0.95)),
        accent=rgb(hue_of_accents + variant / VARIANTS, 0.85, 0.8),
        icon=rng.permutation(list(ICONS))[variant],
        word=rng.permutation(WORDS)[variant],
    )


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the pixels, each (height, width), from the middle and in widths.

    In float64: a float32 sine differs between processors.
    """
    y, x = np.mgrid[:height, :width]
    return x / width - 0.5, (y - height / 2) / width


def _sign(image: np.ndarray, text: str, box, fill, font: int = FONTS[0]) -> None:
    """Draw a filled box (x, y, width, height), white lettering in its middle as large as fits."""
    x, y, width, height = (round(side) for side in box)
    cv2.rectangle(image, (x, y), (x + width, y + height), fill, -1)
    (text_width, text_height), _ = cv2.getTextSize(text, font, 1.0, 2)
    scale = min(0.8 * width / text_width, 0.62 * height / text_height)
    left = round(x + (width - scale * text_width) / 2)
    base = round(y + (height + scale * text_height) / 2)
    cv2.putText(image, text, (left, base), font, scale, WHITE, round(1 + 2 * scale), cv2.LINE_AA)


def _icon(kind: str, middle, size: float) -> np.ndarray:
    """Polygon (240, 2) int32 of an icon, in sixteenths of a pixel."""
    points, sharpness, least = ICONS[kind]
    turn = np.linspace(0, 2 * np.pi, 240)
    radius = least + (1 - least) * np.abs(np.cos(points * turn / 2)) ** sharpness
    curve = np.stack([np.sin(turn), -np.cos(turn)], 1) * radius[:, None]
    return np.round((curve * size + middle) * 16).astype(np.int32)


def label(d: SimpleNamespace, width: int, height: int) -> np.ndarray:
    """The printed face (height, width, 3) uint8 of a product."""
    printed = np.clip(8 * PATTERNS[d.pattern](*_grid(height, width)) + 0.5, 0, 0.7)[..., None]
    image = (printed * d.second + (1 - printed) * d.ground).astype(np.uint8)
    brand, icon, word = d.places * height
    tall, middle, size = 0.16 * height, (width // 2, round(icon)), 0.15 * min(height, width)
    _sign(image, d.brand, (0, brand - tall / 2, width, tall), d.second, d.font)
    cv2.circle(image, middle, round(1.3 * size), WHITE, -1, cv2.LINE_AA)
    cv2.fillPoly(image, [_icon(d.icon, middle, size)], d.accent, cv2.LINE_AA, 4)
    _sign(image, d.word, (0.1 * width, word - tall / 2, 0.8 * width, tall), d.accent)
    return image


# ------------------------------------------------------------------------------ the product


@lru_cache(maxsize=256)
def sprite(product: int, seed: int) -> np.ndarray:
    """The product alone, (SIDE, SIDE, 4) uint8 with alpha, lit from the upper left."""
    d = design(product, seed)
    return _box(d) if d.shape == "box" else _round(d)


def _warp(image: np.ndarray, corners, size: tuple[int, int]) -> np.ndarray:
    """The image with its corners, clockwise from the lower left, at these (4, 2) of a canvas."""
    height, width = image.shape[:2]
    own = np.float32([(0, height), (0, 0), (width, 0), (width, height)])
    matrix = cv2.getPerspectiveTransform(own, np.float32(corners))
    return cv2.warpPerspective(image, matrix, size)


def _box(d: SimpleNamespace) -> np.ndarray:
    """A carton seen from the right: printed front, darker side."""
    front = cv2.cvtColor(label(d, 270, 400), cv2.COLOR_RGB2RGBA)
    side = cv2.multiply(front[:, -60:], (0.6, 0.6, 0.6, 1))
    seen = _warp(front, [(70, 440), (70, 40), (340, 30), (340, 450)], (SIDE, SIDE))
    beside = _warp(side, [(340, 450), (340, 30), (410, 50), (410, 430)], (SIDE, SIDE))
    return cv2.max(seen, beside)


def _round(d: SimpleNamespace) -> np.ndarray:
    """A solid of revolution: label wrapped around it, shaded as a cylinder, a lid on top."""
    half, height, lid, start, heights, radii = ROUND[d.shape]
    paper = np.full((height, 2 * half, 3), np.multiply(d.second, 0.6), np.uint8)
    paper[: round(lid * height)] = d.cap
    printed = paper[round(start * height) : round(0.95 * height)]
    printed[:] = label(d, *printed.shape[1::-1])
    x, y = _grid(SIDE, SIDE)
    down = y * SIDE / height + 0.5
    radius = np.interp(down, heights, radii)
    across = np.clip(x * SIDE / half / radius, -0.999, 0.999)
    facing = np.sqrt(1 - across**2)
    down += 0.12 * half / height * (1 - facing)  # seen from above: rings hang down
    map_x, map_y = (np.arcsin(across) / 2 + 0.5) * 2 * half, down * height
    image = cv2.remap(
        paper,
        map_x.astype(np.float32),
        map_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    light = 0.45 + 0.5 * facing - 0.25 * across
    gleam = 80 * np.exp(-((across + 0.45) ** 2) / 0.012)
    image = image * light[..., None] + gleam[..., None]
    inside = np.minimum(radius * half - np.abs(x * SIDE), (0.5 - np.abs(down - 0.5)) * height)
    return np.dstack([image, 255 * inside]).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- photos


def _put(image, product: int, seed: int, rng, *, at, size, turn, tilt) -> np.ndarray:
    """The photo (H, W, 3) float32 with a product in it and its soft shadow.

    at: its middle, in widths and heights of the photo; size: of the photo's shorter side; turn:
    degrees; tilt: how far its corners are moved at random, of its size.
    """
    height, width = image.shape[:2]
    side = size * min(height, width)
    middle, sides = (at[0] * width, at[1] * height), (side * design(product, seed).slim, side)
    corners = cv2.boxPoints((middle, sides, turn)) + rng.uniform(-tilt, tilt, (4, 2)) * side
    blur = max(0.01, 0.35 * SIDE / side - 0.2)  # what a lens would not resolve
    smooth = cv2.GaussianBlur(sprite(product, seed), (0, 0), blur)
    layer = _warp(smooth, corners, (width, height)).astype(np.float32)
    alpha = layer[..., 3:] / 255
    shift = np.float32([[1, 0, 0.02 * height], [0, 1, 0.025 * height]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (width, height)), (0, 0), height / 28)
    image = image * (1 - 0.4 * shadow[..., None])
    return (image * (1 - alpha) + layer[..., :3] * alpha).astype(np.uint8)


def shop_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """Catalogue photography: white ground, soft shadow, nearly frontal. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 3, product, photo))
    height, width = rng.choice([(1, 1), (1, 0.8), (0.85, 1)]) * image_size
    image = np.empty((round(height), round(width), 3), np.float32)
    image[:] = np.linspace(252, rng.uniform(242, 250), len(image))[:, None, None]
    turn, size = rng.uniform(-2.5, 2.5), rng.uniform(0.88, 1.0)
    image = _put(image, product, seed, rng, at=(0.5, 0.5), size=size, turn=turn, tilt=0.008)
    return (image * rng.uniform(0.97, 1.02)).clip(0, 255).astype(np.uint8)


def customer_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """A shopper's snapshot: clutter, tilt, something in the way, uneven light. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 4, product, photo))
    long = round(image_size * rng.uniform(1.0, 1.35))
    image = _clutter(rng, *rng.permutation([long, image_size]), seed)
    at, size = rng.uniform(0.4, 0.6, 2), rng.uniform(0.8, 1.2)
    image = _put(image, product, seed, rng, at=at, size=size, turn=rng.normal(0, 8), tilt=0.09)
    if rng.random() < 0.3:
        x, y = rng.uniform(0.1, 0.7) * image_size, rng.uniform(0.6, 0.85) * image_size
        price = f"{rng.integers(1, 30)}.{rng.integers(10, 99)}"
        _sign(image, price, (x, y, 0.28 * image_size, 0.1 * image_size), (200, 30, 30))
    return _camera(rng, image)


def _clutter(rng, height: int, width: int, seed: int) -> np.ndarray:
    """Other products on a printed ground, out of focus. (height, width, 3) float32"""
    tone = np.float32(rgb(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.35, 0.85)))
    weave = rng.choice(list(PATTERNS.values()))(*_grid(height, width))
    image = tone + 10 * weave[..., None].astype(np.float32)
    for place in range(3):
        at = (place + rng.random()) / 3, rng.uniform(0.25, 0.5)
        other, size, turn = int(rng.integers(64)), rng.uniform(0.5, 0.8), rng.normal(0, 10)
        image = _put(image, other, seed + 7919, rng, at=at, size=size, turn=turn, tilt=0.02)
    return cv2.GaussianBlur(0.75 * image + 0.25 * tone, (0, 0), rng.uniform(1.5, 4.0))


def _camera(rng, image: np.ndarray) -> np.ndarray:
    """Exposure, white balance, a light from one side, blur or shake, noise. (H, W, 3) uint8"""
    x, y = _grid(*image.shape[:2])
    light = 1 + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y
    tint = rng.uniform(0.75, 1.15) * rng.uniform(0.9, 1.1, 3)
    image = image * light[..., None].astype(np.float32) * tint.astype(np.float32)
    blur_x, blur_y = rng.uniform(0.3, 1.4, 2)
    image = cv2.GaussianBlur(image, (0, 0), sigmaX=blur_x, sigmaY=blur_y)
    image += rng.normal(0, rng.uniform(1.5, 6), (*x.shape, 1))
    return image.clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------- the data root


def counts(product: int, seed: int) -> tuple[int, int, int]:
    """Photos of a product (shop, customer for training, customer to ask): a long tail.

    1 to 2, 2 to 24 and 2 to 6.
    """
    rng = np.random.default_rng((seed, 5, product))
    return int(rng.integers(1, 3)), 2 + min(22, int(rng.pareto(0.9) * 2.2)), int(rng.integers(2, 7))


def _photos(products: int, seed: int) -> pd.DataFrame:
    """A row a photo, shuffled: class, group, photo (its number), split, domain, name."""
    rows = []
    for product in range(products):
        shop, customer, test = counts(product, seed)
        kinds = [("train", "shop")] * shop + [("train", "customer")] * customer
        kinds += [("test", "customer")] * test
        for photo, kind in enumerate(kinds):
            rows.append((product, product // VARIANTS, photo, *kind))
    photos = pd.DataFrame(rows, columns=["class", "group", "photo", "split", "domain"])
    photos = photos.sample(frac=1, random_state=seed)
    number = photos.groupby("split").cumcount() + 1
    return photos.assign(name=number.astype(str) + ".jpg")


def _draw(photos: pd.DataFrame, *, folder: Path, seed: int, image_size: int) -> None:
    """Draw these photos of one product."""
    optimized = cv2.useOptimized()
    cv2.setUseOptimized(False)  # its vector code rounds differently on each kind of processor
    try:
        for name, product, photo, split, domain in photos.to_numpy():
            draw, quality = (shop_photo, 92) if domain == "shop" else (customer_photo, 70)
            image = draw(product, photo, seed, image_size)[..., ::-1]
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            (folder / split / name).write_bytes(data.tobytes())
    finally:
        cv2.setUseOptimized(optimized)


def generate(
    folder: Path | str,
    *,
    products: int = 24,
    seed: int = 0,
    image_size: int = 256,
    workers: int = 0,
) -> Path:
    """A data root in the Products-10K layout with domains; returns its folder.

    Drawn into a temporary folder beside it that takes its name when complete; a complete one of the
    same settings is used again. workers: processes that draw; the result does not depend on it.
    Images are never held in memory. Raises FileExistsError for a folder that holds something else.
    """
    folder = Path(folder)
    settings = {"version": VERSION, "products": products, "seed": seed, "image_size": image_size}
    if folder.exists():
        stamp = folder / "toy.json"
        if stamp.is_file() and json.loads(stamp.read_text()) == settings:
            return folder
        raise FileExistsError(
            f"{folder.name} exists and is no toy set of {settings}: name another folder or remove it"
        )
    if products < 2 or image_size < 32:
        raise ValueError(
            f"products={products}, image_size={image_size}: a toy set needs 2 products and 32 px"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as part:
        root = Path(part) / folder.name
        _write(root, products, seed, image_size, workers)
        (root / "toy.json").write_text(json.dumps(settings))
        try:
            os.replace(root, folder)
        except OSError:  # another process was faster; its bytes are the same
            if not (folder / "toy.json").is_file():
                raise
    return folder


def _write(root: Path, products: int, seed: int, image_size: int, workers: int) -> None:
    """Both tables and the photos of a new data root."""
    photos = _photos(products, seed)
    for split, rows in photos.groupby("split"):
        (root / split).mkdir(parents=True)
        columns = rows[["name", "class", "group", "domain"]]
        columns.to_csv(root / f"{split}.csv", index=False, lineterminator="\n")
    draw = partial(_draw, folder=root, seed=seed, image_size=image_size)
    columns = ["name", "class", "photo", "split", "domain"]
    each = [rows[columns] for _, rows in photos.groupby("class")]
    if workers:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(draw, each, chunksize=8))
    else:
        list(map(draw, each))


def data_root_or_toy(
    given: str = "", cache_dir: str = "", *, products: int = 24
) -> tuple[Path, str]:
    """(data root, a line that says which): the one found (`find_data_root`), else the toy set."""
    root, how = platform.find_data_root(given)
    if root:
        return root, f"data: {root.name} ({how})"
    folder = platform.cache_folder(cache_dir) / f"toy-v{VERSION}" / f"toy-{products}"
    lines = -(-products // VARIANTS)
    said = f"data: toy set, {products} products of {lines} brand lines (generated)"
    return generate(folder, products=products), said
