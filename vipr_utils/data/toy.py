"""The embedded default: a generated Products-10K in miniature, at any size.

A brand's line (group) fixes shape, colours, pattern and name; its variants (classes) differ in
one accent colour, an icon and a word. Every photo is drawn from a generator seeded by (seed, line
or product, photo), so a product looks the same whatever else is asked for, and the bytes repeat.
"""

import colorsys
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd

from vipr_utils.host import platform

VERSION = 3
SIDE = 400  # pixels of the square a product is drawn in
VARIANTS = 4  # products of a brand's line
FONT = cv2.FONT_HERSHEY_DUPLEX
WHITE = (252, 250, 244)  # red, green, blue, 0 to 255, as all colours here
SYLLABLES = "KA LU MO RI TA VE ZO NI BE SA DO FI PE GU HA MI"
WORDS = (
    "Classic Mint Cherry Lemon Cocoa Vanilla Honey Ginger Berry Mango Roast Mild Strong Lime "
    "Peach Almond Coffee Apple Herbal Salted Spicy Orange Coconut Plum"
)


@dataclass(frozen=True)
class Solid:
    """A solid of revolution: its outline is the radius (1: half the width) at some heights.

    Heights and places go from 0, the top, to 1; width and height are in pixels of SIDE. The lid
    ends at lid_end, the label begins at label_start.
    """

    width: int
    height: int
    lid_end: float
    label_start: float
    outline_heights: tuple
    outline_radii: tuple


SOLIDS = {
    "can": Solid(
        width=192,
        height=292,
        lid_end=0.03,
        label_start=0.05,
        outline_heights=(0, 0.05, 0.95, 1),
        outline_radii=(0.88, 1, 1, 0.9),
    ),
    "bottle": Solid(
        width=150,
        height=368,
        lid_end=0.1,
        label_start=0.47,
        outline_heights=(0, 0.1, 0.11, 0.2, 0.3, 0.4),
        outline_radii=(0.4, 0.4, 0.3, 0.36, 0.7, 1),
    ),
    "jar": Solid(
        width=234,
        height=268,
        lid_end=0.16,
        label_start=0.32,
        outline_heights=(0, 0.16, 0.17, 0.22, 0.3),
        outline_radii=(0.9, 0.9, 0.78, 0.82, 1),
    ),
    "tub": Solid(
        width=250,
        height=242,
        lid_end=0.12,
        label_start=0.14,
        outline_heights=(0, 0.12, 0.13, 1),
        outline_radii=(1, 1, 0.94, 0.7),
    ),
}
# Prints on labels and on the ground: above zero is printed; (x, y) from the middle, in widths.
PATTERNS = [
    lambda x, y: np.sin(24 * (x + y)),  # stripes
    lambda x, y: np.sin(20 * x) * np.sin(20 * y) - 0.4,  # dots
    lambda x, y: np.sin(16 * np.arctan2(y, x) + 1),  # rays; no edge where angles round two ways
    lambda x, y: np.sin(22 * y + 2 * np.sin(9 * x)),  # waves
]
# Icons are closed curves: number of points, how sharp they are, radius between them.
ICONS = [
    (1, 4, 0.4),  # drop
    (2, 2, 0.4),  # bean
    (3, 0.7, 0.2),  # clover
    (4, 3, 0.4),  # cross
    (5, 2, 0.35),  # star
    (6, 0.5, 0.5),  # flower
    (11, 1, 0.65),  # sun
]


@dataclass(frozen=True)
class Design:
    """What a product looks like: its line's settings, then what sets the variant apart."""

    shape: str
    brand: str
    places: np.ndarray  # of brand, icon and word, down the label from 0 to 1
    pattern: Callable
    ground: tuple
    second: tuple
    cap: tuple
    body: tuple
    accent: tuple
    icon: np.ndarray
    word: str


def _rgb(hue: float, saturation: float, value: float) -> tuple:
    channels = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return tuple(round(255 * channel) for channel in channels)


@lru_cache
def design(product: int, seed: int) -> Design:
    """The look of a product; all but its last three settings are those of its line."""
    line, variant = divmod(product, VARIANTS)
    rng = np.random.default_rng((seed, 2, line))
    hue, accent_hue = rng.random(2)
    return Design(
        shape=["box", *SOLIDS][line % 5],
        brand="".join(rng.choice(SYLLABLES.split(), rng.integers(2, 4))),
        places=rng.permutation([0.18, 0.5, 0.8]),
        pattern=rng.choice(PATTERNS),
        ground=_rgb(hue, rng.uniform(0.1, 0.6), rng.choice([0.4, 0.95])),
        second=_rgb(hue + rng.uniform(0.2, 0.8), 0.75, rng.uniform(0.45, 0.8)),
        cap=_rgb(rng.random(), 0.7, rng.uniform(0.25, 0.95)),
        body=_rgb(hue, 0.7, 0.35),
        accent=_rgb(accent_hue + variant / VARIANTS, 0.85, 0.8),
        icon=rng.permutation(ICONS)[variant],
        word=rng.permutation(WORDS.split())[variant],
    )


# -------------------------------------------------------------------------------- the label


def _grid(height: int, width: int) -> tuple:
    """(x, y) of the pixels, each (height, width), from the middle and in widths.

    In float64: a float32 sine differs between processors.
    """
    y, x = np.mgrid[:height, :width]
    return x / width - 0.5, (y - height / 2) / width


def _sign(image: np.ndarray, text: str, box, fill) -> None:
    """Draw a filled box (x, y, width, height), white lettering in its middle as large as fits."""
    x, y, width, height = (round(side) for side in box)
    cv2.rectangle(image, (x, y), (x + width, y + height), fill, -1)
    (text_width, text_height), _ = cv2.getTextSize(text, FONT, 1.0, 2)
    scale = min(0.8 * width / text_width, 0.62 * height / text_height)
    left = round(x + (width - scale * text_width) / 2)
    base = round(y + (height + scale * text_height) / 2)
    cv2.putText(image, text, (left, base), FONT, scale, WHITE, round(1 + 2 * scale), cv2.LINE_AA)


def _icon(image: np.ndarray, icon, middle: tuple, size: float, colour) -> None:
    """Draw an icon (see ICONS) on a white disc; middle and size in pixels."""
    points, sharpness, least = icon
    turn = np.linspace(0, 2 * np.pi, 240)
    radius = least + (1 - least) * np.abs(np.cos(points * turn / 2)) ** sharpness
    curve = size * np.stack([radius * np.sin(turn), -radius * np.cos(turn)], 1)
    sixteenths = np.round(16 * (curve + middle)).astype(np.int32)  # of a pixel
    cv2.circle(image, middle, round(1.3 * size), WHITE, -1, cv2.LINE_AA)
    cv2.fillPoly(image, [sixteenths], colour, cv2.LINE_AA, shift=4)


def label(look: Design, width: int, height: int) -> np.ndarray:
    """The printed face (height, width, 3) uint8 of a product."""
    x, y = _grid(height, width)
    printed = np.clip(8 * look.pattern(x, y) + 0.5, 0, 0.7)[..., None]
    image = (printed * look.second + (1 - printed) * look.ground).astype(np.uint8)

    brand, icon, word = look.places * height
    tall = 0.16 * height
    _sign(
        image,
        look.brand,
        (0, brand - tall / 2, width, tall),
        look.second,
    )
    _icon(
        image,
        look.icon,
        (width // 2, round(icon)),
        0.15 * min(height, width),
        look.accent,
    )
    _sign(
        image,
        look.word,
        (0.1 * width, word - tall / 2, 0.8 * width, tall),
        look.accent,
    )
    return image


# ------------------------------------------------------------------------------ the product


@lru_cache
def sprite(product: int, seed: int) -> np.ndarray:
    """The product alone, (SIDE, SIDE, 4) uint8 with alpha, lit from the left."""
    look = design(product, seed)
    return _box(look) if look.shape == "box" else _round(look, SOLIDS[look.shape])


def _warp(image: np.ndarray, corners, size: tuple) -> np.ndarray:
    """The image with its corners, clockwise from the lower left, at these (4, 2) of a canvas."""
    height, width = image.shape[:2]
    own = np.float32([(0, height), (0, 0), (width, 0), (width, height)])
    matrix = cv2.getPerspectiveTransform(own, np.float32(corners))
    return cv2.warpPerspective(image, matrix, size)


def _box(look: Design) -> np.ndarray:
    """A carton seen from the right: printed front, darker side.

    The edge between them is nearest and so the longest; the side repeats the front's right end.
    """
    front = cv2.cvtColor(label(look, 225, 333), cv2.COLOR_RGB2RGBA)
    side = cv2.multiply(front[:, -50:], (0.6, 0.6, 0.6, 1))
    front_corners = [(60, 367), (60, 33), (285, 25), (285, 375)]
    side_corners = [(285, 375), (285, 25), (342, 42), (342, 358)]
    return cv2.max(
        _warp(front, front_corners, (SIDE, SIDE)),
        _warp(side, side_corners, (SIDE, SIDE)),
    )


def _round(look: Design, solid: Solid) -> np.ndarray:
    """A solid of revolution seen a little from above: a paper wrapped around it, with its light.

    A point that is `across` of the radius to the right lies arcsin(across) around the axis.
    """
    x, y = _grid(SIDE, SIDE)
    x, y = x * SIDE / solid.width * 2, y * SIDE / solid.height  # -1 to 1, -0.5 to 0.5
    radius = np.interp(y + 0.5, solid.outline_heights, solid.outline_radii)
    across = np.clip(x / radius, -0.999, 0.999)
    facing = np.sqrt(1 - across**2)  # 1 in the middle, 0 at the edge
    sag = 0.06 * solid.width / solid.height * (1 - facing)  # seen from above, rings hang down

    map_x = (np.arcsin(across) / 2 + 0.5) * solid.width
    map_y = (y + 0.5 + sag) * solid.height
    image = cv2.remap(
        _paper(look, solid),
        np.float32(map_x),
        np.float32(map_y),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )

    # Light from the left, and the window's streak on a polished side.
    light = 0.45 + 0.5 * facing - 0.25 * across
    gleam = np.maximum(0, 80 - 3000 * (across + 0.45) ** 2)
    image = image * light[..., None] + gleam[..., None]

    inside_across = (radius - np.abs(x)) * solid.width / 2  # pixels from the edge
    inside_down = (0.5 - sag - np.abs(y)) * solid.height
    alpha = 255 * np.minimum(inside_across, inside_down)
    return np.dstack([image, alpha]).clip(0, 255).astype(np.uint8)


def _paper(look: Design, solid: Solid) -> np.ndarray:
    """What is seen from the front, unrolled: lid, body and label (height, width, 3) uint8."""
    paper = np.full((solid.height, solid.width, 3), look.cap, np.uint8)
    paper[round(solid.lid_end * solid.height) :] = look.body
    start = round(solid.label_start * solid.height)
    end = round(0.95 * solid.height)
    paper[start:end] = label(look, solid.width, end - start)
    return paper


# ---------------------------------------------------------------------------------- photos


def _put(
    image: np.ndarray,
    product: int,
    seed: int,
    rng,
    *,
    at: tuple,
    size: float,
    turn: float,
    tilt: float,
) -> np.ndarray:
    """The photo (H, W, 3) uint8 with a product in it and its soft shadow.

    at: its middle, in widths and heights of the photo; size: of the photo's shorter side; turn:
    degrees; tilt: how far its corners are moved at random, of its size.
    """
    height, width = image.shape[:2]
    side = size * min(height, width)
    middle = (at[0] * width, at[1] * height)
    moved = side * rng.uniform(-tilt, tilt, (4, 2))
    corners = cv2.boxPoints((middle, (side, side), turn)) + moved

    pixels = (round(side), round(side))
    small = cv2.resize(sprite(product, seed), pixels, interpolation=cv2.INTER_AREA)
    layer = _warp(small, corners, (width, height)).astype(np.float32)
    alpha = layer[..., 3:] / 255

    shift = np.float32([[1, 0, 0.02 * height], [0, 1, 0.025 * height]])
    shadow = cv2.warpAffine(alpha, shift, (width, height))
    shadow = cv2.GaussianBlur(shadow, (0, 0), height / 28)[..., None]
    image = image * (1 - 0.4 * shadow)
    return (image * (1 - alpha) + layer[..., :3] * alpha).astype(np.uint8)


def shop_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """Catalogue photography: white ground, soft shadow, nearly frontal. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 3, product, photo))
    return _put(
        np.full((image_size, image_size, 3), rng.uniform(244, 254)),
        product,
        seed,
        rng,
        at=(0.5, 0.5),
        size=rng.uniform(0.88, 1.0),
        turn=rng.uniform(-2.5, 2.5),
        tilt=0.008,
    )


def customer_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """A shopper's snapshot: clutter, tilt, a price tag in the way, uneven light. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 4, product, photo))
    height, width = rng.permutation([image_size, round(1.25 * image_size)])
    image = _put(
        _clutter(rng, height, width, seed),
        product,
        seed,
        rng,
        at=rng.uniform(0.4, 0.6, 2),
        size=rng.uniform(0.8, 1.2),
        turn=rng.normal(0, 8),
        tilt=0.09,
    )
    if rng.random() < 0.4:
        x = rng.uniform(0.1, 0.7) * width
        y = rng.uniform(0.6, 0.85) * height
        price = f"{rng.uniform(1, 30):.2f}"
        _sign(image, price, (x, y, 0.3 * width, 0.12 * height), (200, 30, 30))
    return _camera(rng, image)


def _clutter(rng, height: int, width: int, seed: int) -> np.ndarray:
    """Other products on a printed ground, out of focus. (height, width, 3) uint8

    Drawn at half the size: the blur hides the rest.
    """
    x, y = _grid(height // 2, width // 2)
    tone = _rgb(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.35, 0.85))
    weave = 10 * rng.choice(PATTERNS)(x, y)
    image = (tone + weave[..., None]).astype(np.uint8)
    for place in range(3):
        image = _put(
            image,
            rng.integers(64),
            seed + 7919,  # nobody's products
            rng,
            at=((place + rng.random()) / 3, rng.uniform(0.25, 0.5)),
            size=rng.uniform(0.5, 0.8),
            turn=rng.normal(0, 10),
            tilt=0.02,
        )
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.8, 2.0))
    return cv2.resize(image, (width, height))


def _camera(rng, image: np.ndarray) -> np.ndarray:
    """What a phone makes of it: a light from one side, exposure, white balance, blur, noise.

    (H, W, 3) uint8
    """
    x, y = _grid(*image.shape[:2])
    light = 1 + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y
    tint = rng.uniform(0.75, 1.15) * rng.uniform(0.92, 1.08, 3)
    image = image * np.float32(light[..., None]) * np.float32(tint)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2.0))
    image += rng.normal(0, rng.uniform(1.5, 6), (*x.shape, 1))
    return image.clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------- the data root


def counts(product: int, seed: int) -> tuple:
    """Photos of a product (shop, customer for training, customer to ask): a long tail.

    1 to 2, 2 to 24 and 2 to 6.
    """
    rng = np.random.default_rng((seed, 5, product))
    shop = rng.integers(1, 3)
    customer = 2 + min(22, int(rng.pareto(0.9) * 2.2))
    return shop, customer, rng.integers(2, 7)


def _photos(products: int, seed: int) -> pd.DataFrame:
    """A row a photo, shuffled: class, group, photo (its number), split, domain, name."""
    kinds = [("train", "shop"), ("train", "customer"), ("test", "customer")]
    rows = []
    for product in range(products):
        for kind, n in zip(kinds, counts(product, seed)):
            rows += [(product, product // VARIANTS, *kind)] * n
    photos = pd.DataFrame(rows, columns=["class", "group", "split", "domain"])
    photos["photo"] = photos.groupby("class").cumcount()
    photos = photos.sample(frac=1, random_state=seed)
    photos["name"] = (photos.groupby("split").cumcount() + 1).astype(str) + ".jpg"
    return photos


def _draw(photos: pd.DataFrame, folder: Path, seed: int, image_size: int) -> None:
    """Draw these photos of one product, rows of `_photos`, as JPEG files below the folder."""
    optimized = cv2.useOptimized()
    cv2.setUseOptimized(False)  # its vector code rounds differently on each kind of processor
    try:
        for product, _, split, domain, photo, name in photos.to_numpy():
            draw = shop_photo if domain == "shop" else customer_photo
            image = draw(product, photo, seed, image_size)
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])
            (folder / split / name).write_bytes(data.tobytes())
    finally:
        cv2.setUseOptimized(optimized)


def generate(
    folder: Path | str,
    *,
    products: int = 24,
    seed: int = 0,
    image_size: int = 256,
    workers: int = 1,
) -> Path:
    """A data root in the Products-10K layout with domains; returns its folder.

    Drawn into a temporary folder beside it that takes its name when complete; a complete one of the
    same settings is used again. Images are never held in memory.

    products: of which VARIANTS share a line. image_size: pixels of the shorter side of a photo.
    workers: processes that draw; the result does not depend on it.
    Raises FileExistsError for a folder that holds something else.
    """
    folder = Path(folder)
    stamp = folder / "toy.json"
    settings = json.dumps(
        {"version": VERSION, "products": products, "seed": seed, "image_size": image_size}
    )
    if stamp.is_file() and stamp.read_text() == settings:
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder.name} exists and is no toy set of {settings}: name another folder or "
            "remove it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as part:
        root = Path(part) / folder.name
        _write(root, products, seed, image_size, workers)
        (root / stamp.name).write_text(settings)
        try:
            os.replace(root, folder)
        except OSError:  # another process was faster; its bytes are the same
            if not stamp.is_file():
                raise
    return folder


def _write(root: Path, products: int, seed: int, image_size: int, workers: int) -> None:
    """Both tables and the photos of a new data root.

    Raises ValueError for one that is too small.
    """
    if products < 2 or image_size < 32:
        raise ValueError(
            f"products={products}, image_size={image_size}: a toy set needs 2 products and 32 px"
        )
    photos = _photos(products, seed)
    for split, rows in photos.groupby("split"):
        (root / split).mkdir(parents=True)
        rows.to_csv(
            root / f"{split}.csv",
            columns=["name", "class", "group", "domain"],
            index=False,
            lineterminator="\n",
        )
    joblib.Parallel(workers)(
        joblib.delayed(_draw)(rows, root, seed, image_size) for _, rows in photos.groupby("class")
    )


def data_root_or_toy(given: str = "", cache_dir: str = "") -> tuple[Path, str]:
    """(data root, a line that says which): the one found (`find_data_root`), else the toy set."""
    root, how = platform.find_data_root(given)
    if root:
        return root, f"data: {root.name} ({how})"
    folder = platform.cache_folder(cache_dir) / f"toy-v{VERSION}/toy-24"
    return generate(folder), "data: toy set, 24 products of 6 brand lines (generated)"
