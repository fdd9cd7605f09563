"""The embedded default: a generated Products-10K in miniature, at any size.

A brand's line (group) fixes shape, colours, pattern and lettering; its variants (classes) differ in one accent colour,
an icon and a word. Every photo is drawn from a generator seeded by (seed, line or product, photo), so a product looks
the same whatever else is asked for, and the bytes repeat.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vipr_utils.host import platform

VERSION = 2
SIDE = 480  # pixels of the square a product is drawn in, twice the size of most photos
SHAPES = ("box", "can", "bottle", "jar", "pouch")
PATTERNS = ("band", "diagonal", "dots", "waves", "rays", "frame")
ICONS = ("berry", "leaf", "drop", "star", "slice", "bean", "heart", "cone")
SYLLABLES = [
    "KA",
    "LU",
    "MO",
    "RI",
    "TA",
    "VE",
    "ZO",
    "NI",
    "BE",
    "SA",
    "DO",
    "FI",
    "PE",
    "GU",
    "HA",
    "MI",
]
WORDS = [
    "Classic",
    "Mint",
    "Cherry",
    "Lemon",
    "Cocoa",
    "Vanilla",
    "Honey",
    "Ginger",
    "Berry",
    "Mango",
    "Roast",
    "Mild",
] + [
    "Strong",
    "Lime",
    "Peach",
    "Almond",
    "Coffee",
    "Apple",
    "Herbal",
    "Salted",
    "Spicy",
    "Orange",
    "Coconut",
    "Plum",
]
FONTS = (
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_SIMPLEX,
)


def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


# ------------------------------------------------------------------------------------------- lines and products


def line_of(product: int, seed: int) -> tuple[int, int]:
    """(line, variant) of a product: lines of 2 to 5 variants follow each other. Cut into tables of 1,024 lines."""
    block = 0
    while True:
        ends = np.cumsum(_line_lengths(seed, block))
        if product < ends[-1]:
            line = int(np.searchsorted(ends, product, side="right"))
            return block * 1024 + line, product - (int(ends[line - 1]) if line else 0)
        product -= int(ends[-1])
        block += 1


@lru_cache
def _line_lengths(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, block)).integers(2, 6, 1024)


@lru_cache(maxsize=64)
def design(product: int, seed: int) -> dict:
    """What a product looks like: the line's settings, and the variant's accent, icon and word."""
    line, variant = line_of(product, seed)
    rng = np.random.default_rng((seed, 2, line))
    hue, dark = rng.random(), rng.random() < 0.35
    words, icons = rng.permutation(WORDS), rng.permutation(ICONS)
    accents = (rng.random() + np.arange(5) / 5 + rng.uniform(-0.05, 0.05, 5)) % 1
    return {
        "shape": SHAPES[line % len(SHAPES)],
        "brand": "".join(rng.choice(SYLLABLES, rng.integers(2, 4))),
        "ground": rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.5))
        if dark
        else rgb(hue, rng.uniform(0.08, 0.5), 0.96),
        "second": rgb(hue + rng.choice([0.08, 0.5, 0.42]), 0.75, rng.uniform(0.45, 0.8)),
        "ink": (250, 248, 240) if dark else rgb(hue + 0.5, 0.6, 0.22),
        "pattern": str(rng.choice(PATTERNS)),
        "font": int(rng.choice(FONTS)),
        "cap": rgb(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.0, 0.8), rng.uniform(0.25, 0.95)),
        "layout": int(rng.integers(3)),
        "slim": float(rng.uniform(0.0, 1.0)),
        "weight": f"{int(rng.integers(2, 20)) * 50} g",
        "accent": rgb(accents[variant], 0.85, 0.8),
        "icon": str(icons[variant]),
        "word": str(words[variant]),
    }


# ---------------------------------------------------------------------------------------------------- the label


def _text(image, text: str, centre, width: float, height: float, colour, font: int) -> None:
    """Lettering in the middle of a box, as large as fits."""
    (w, h), _ = cv2.getTextSize(text, font, 1.0, 2)
    scale = min(width / w, height / h)
    thick = max(1, round(2.6 * scale))
    (w, h), _ = cv2.getTextSize(text, font, scale, thick)
    at = (round(centre[0] - w / 2), round(centre[1] + h / 2))
    cv2.putText(image, text, at, font, scale, colour, thick, cv2.LINE_AA)


def _icon(image, kind: str, centre, r: float, colour) -> None:
    x, y = (round(c) for c in centre)
    pale = tuple(round(c + (255 - c) * 0.55) for c in colour)
    turn = np.linspace(0, 2 * np.pi, 60)
    polygons = {
        "leaf": np.stack([np.sin(turn) * 0.55, -np.cos(turn) * (1 - 0.3 * np.cos(turn))], 1),
        "drop": np.stack([0.7 * np.sin(turn) * np.sin(turn / 2) * 1.1, -np.cos(turn)], 1),
        "heart": np.stack(
            [
                np.sin(turn) ** 3,
                -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn)) / 16,
            ],
            1,
        ),
        "star": np.stack([np.sin(turn), -np.cos(turn)], 1)
        * (0.72 + 0.28 * np.cos(5 * turn))[:, None],
        "cone": np.array([[-0.8, 0.9], [0.0, -1.0], [0.8, 0.9]]),
    }
    if kind in polygons:
        points = np.round((polygons[kind] * r + (x, y)) * 16).astype(np.int32)
        cv2.fillPoly(image, [points], colour, cv2.LINE_AA, 4)
        cv2.line(
            image,
            (x, round(y - 0.6 * r)),
            (x, round(y + 0.75 * r)),
            pale,
            max(1, round(r / 12)),
            cv2.LINE_AA,
        )
    elif kind == "berry":
        for dx, dy in ((-0.5, 0.3), (0.5, 0.3), (0, -0.4)):
            cv2.circle(
                image,
                (round(x + dx * r), round(y + dy * r)),
                round(0.52 * r),
                colour,
                -1,
                cv2.LINE_AA,
            )
            cv2.circle(
                image,
                (round(x + dx * r - 0.15 * r), round(y + dy * r - 0.15 * r)),
                round(0.14 * r),
                pale,
                -1,
                cv2.LINE_AA,
            )
    elif kind == "slice":
        cv2.circle(image, (x, y), round(r), colour, -1, cv2.LINE_AA)
        cv2.circle(image, (x, y), round(0.8 * r), pale, -1, cv2.LINE_AA)
        for a in np.arange(0, np.pi, np.pi / 4):
            dx, dy = round(0.8 * r * np.cos(a)), round(0.8 * r * np.sin(a))
            cv2.line(
                image,
                (x - dx, y - dy),
                (x + dx, y + dy),
                colour,
                max(1, round(r / 10)),
                cv2.LINE_AA,
            )
    else:  # bean
        cv2.ellipse(
            image, (x, y), (round(0.95 * r), round(0.62 * r)), 35, 0, 360, colour, -1, cv2.LINE_AA
        )
        cv2.ellipse(
            image,
            (x, y),
            (round(0.8 * r), round(0.14 * r)),
            35,
            0,
            360,
            pale,
            max(1, round(r / 10)),
            cv2.LINE_AA,
        )


def _pattern(image, kind: str, colour, accent) -> None:
    h, w = image.shape[:2]
    if kind == "band":
        cv2.rectangle(image, (0, round(0.62 * h)), (w, round(0.8 * h)), colour, -1)
    elif kind == "diagonal":
        for x in range(-h, w, max(8, w // 6)):
            cv2.line(image, (x, h), (x + h, 0), colour, max(2, w // 24), cv2.LINE_AA)
    elif kind == "dots":
        for i, y in enumerate(range(0, h, max(8, h // 9))):
            for x in range((i % 2) * w // 12, w, max(8, w // 6)):
                cv2.circle(image, (x, y), max(2, w // 30), colour, -1, cv2.LINE_AA)
    elif kind == "waves":
        x = np.arange(w)
        for part, tone in ((0.66, colour), (0.8, accent)):
            y = h * part + 0.03 * h * np.sin(x / w * 4 * np.pi + part * 9)
            edge = np.concatenate([np.stack([x, y], 1), [[w, h], [0, h]]])
            cv2.fillPoly(image, [np.round(edge).astype(np.int32)], tone, cv2.LINE_AA)
    elif kind == "rays":
        for a in np.arange(0, 2 * np.pi, np.pi / 8):
            tip = [
                (w / 2 + 2 * h * np.cos(a + d), 0.6 * h + 2 * h * np.sin(a + d)) for d in (0, 0.12)
            ]
            cv2.fillPoly(
                image, [np.round([(w / 2, 0.6 * h), *tip]).astype(np.int32)], colour, cv2.LINE_AA
            )
    else:
        cv2.rectangle(
            image,
            (w // 20, w // 20),
            (w - w // 20, h - w // 20),
            colour,
            max(2, w // 30),
            cv2.LINE_AA,
        )


def label(d: dict, width: int, height: int) -> np.ndarray:
    """The printed face (height, width, 3) of a product."""
    image = np.full((height, width, 3), d["ground"], np.uint8)
    _pattern(image, d["pattern"], d["second"], d["accent"])
    brand, icon, word = ((0.17, 0.48, 0.74), (0.74, 0.26, 0.5), (0.3, 0.66, 0.12))[d["layout"]]
    plate = round(0.085 * height)
    cv2.rectangle(
        image,
        (0, round(brand * height) - plate),
        (width, round(brand * height) + plate),
        d["second"],
        -1,
    )
    _text(
        image,
        d["brand"],
        (width / 2, brand * height),
        0.8 * width,
        0.105 * height,
        (255, 255, 255),
        d["font"],
    )
    r = 0.15 * min(height, 1.3 * width)
    cv2.circle(
        image, (width // 2, round(icon * height)), round(1.3 * r), (252, 250, 244), -1, cv2.LINE_AA
    )
    _icon(image, d["icon"], (width / 2, icon * height), r, d["accent"])
    top, low = round((word - 0.065) * height), round((word + 0.065) * height)
    cv2.rectangle(
        image, (round(0.1 * width), top), (round(0.9 * width), low), d["accent"], -1, cv2.LINE_AA
    )
    _text(
        image,
        d["word"],
        (width / 2, word * height),
        0.66 * width,
        0.075 * height,
        (255, 255, 255),
        cv2.FONT_HERSHEY_DUPLEX,
    )
    _text(
        image,
        d["weight"],
        (0.8 * width, 0.95 * height),
        0.22 * width,
        0.035 * height,
        d["ink"],
        cv2.FONT_HERSHEY_SIMPLEX,
    )
    return image


# --------------------------------------------------------------------------------------------------- the product


@lru_cache(maxsize=256)
def sprite(product: int, seed: int) -> np.ndarray:
    """The product alone, (SIDE, SIDE, 4) uint8 with alpha, lit from the upper left."""
    d = design(product, seed)
    if d["shape"] == "box":
        return _box(d)
    if d["shape"] == "pouch":
        return _pouch(d)
    return _round(d)


def _box(d: dict) -> np.ndarray:
    """A carton seen a little from the right and above: printed front, darker side, lighter top."""
    w, h, deep = (
        round(210 + 110 * d["slim"]),
        round(400 - 60 * d["slim"]),
        round(46 + 22 * d["slim"]),
    )
    x, y, rise = (SIDE - w - deep) // 2, (SIDE - h) // 2 + 16, round(0.45 * deep)
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    front = label(d, w, h)
    side = cv2.convertScaleAbs(cv2.resize(front[:, -w // 8 :], (deep, h)), alpha=0.62)
    top = np.full((rise, w, 3), np.clip(np.array(d["ground"]) * 1.0 + 22, 0, 255), np.uint8)
    corners = [
        (front, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]),
        (
            side,
            [(x + w, y), (x + w + deep, y - rise), (x + w + deep, y + h - rise), (x + w, y + h)],
        ),
        (top, [(x, y), (x + deep, y - rise), (x + w + deep, y - rise), (x + w, y)]),
    ]
    for face, to in corners:
        fh, fw = face.shape[:2]
        matrix = cv2.getPerspectiveTransform(
            np.float32([(0, 0), (fw, 0), (fw, fh), (0, fh)]), np.float32(to)
        )
        full = cv2.warpPerspective(
            np.dstack([face, np.full((fh, fw), 255, np.uint8)]),
            matrix,
            (SIDE, SIDE),
            flags=cv2.INTER_AREA,
        )
        out = np.where(full[..., 3:] > 0, full, out)
    return out


def _profile(d: dict, v: np.ndarray) -> np.ndarray:
    """Radius 0..1 of a round product along its height v in 0 (top) .. 1."""
    if d["shape"] == "can":
        return np.where(v < 0.05, 0.88 + 2.4 * v, np.where(v > 0.96, 1 - 2.5 * (v - 0.96), 1.0))
    if d["shape"] == "jar":
        return np.where(
            v < 0.17, 0.92, np.where(v < 0.25, 0.8, np.minimum(1.0, 0.8 + 2.8 * (v - 0.25)))
        )
    neck = 0.3 + 0.1 * d["slim"]
    slope = np.clip((v - 0.24) / 0.2, 0, 1)
    return np.where(v < 0.09, neck + 0.05, neck + (1 - neck) * slope * slope * (3 - 2 * slope))


def _round(d: dict) -> np.ndarray:
    """A solid of revolution: the label wrapped around it, shaded as a cylinder, a cap or lid on top."""
    half = round({"can": 105, "jar": 125, "bottle": 82}[d["shape"]] * (0.9 + 0.25 * d["slim"]))
    h = round({"can": 340, "jar": 300, "bottle": 440}[d["shape"]] * (1.05 - 0.12 * d["slim"]))
    v, u = np.mgrid[
        0:h, -half : half + 1
    ]  # float64 from here: a float32 sine differs between processors
    v, u = v / h, u / half
    r = _profile(d, v)
    inside = np.clip((r - np.abs(u)) * half + 0.5, 0, 1)  # anti-aliased edge
    s = np.clip(u / r, -0.999, 0.999)
    start, end = {"can": (0.04, 0.97), "jar": (0.3, 0.95), "bottle": (0.45, 0.93)}[d["shape"]]
    tall, wide = round((end - start) * h), round(np.pi * half)
    face = label(d, round(0.56 * wide), tall)
    side = np.full((tall, (wide - face.shape[1]) // 2 + 1, 3), d["ground"], np.uint8)
    paper = np.hstack([side, face, side])
    bend = 0.05 * half * (np.sqrt(1 - s * s) - 1)  # seen a little from above, rings curve down
    across = (np.arcsin(s) / np.pi + 0.5) * (paper.shape[1] - 1)
    down = (v - start) * h + bend
    wrapped = cv2.remap(
        paper,
        across.astype(np.float32),
        down.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    glass = {
        "can": (190, 192, 196),
        "jar": d["accent"],
        "bottle": tuple(round(0.6 * c + 30) for c in d["second"]),
    }[d["shape"]]
    image = np.where(((down >= 0) & (down < tall))[..., None], wrapped, np.uint8(glass)).astype(
        np.float32
    )
    lid = v < {"can": 0.03, "jar": 0.17, "bottle": 0.09}[d["shape"]] - bend / h
    image[lid] = d["cap"] if d["shape"] != "can" else (214, 216, 220)
    if d["shape"] != "can":
        image[lid & (np.sin(s * 60) > 0)] *= 0.88  # the grip of a screw cap
    light = 0.5 + 0.62 * np.sqrt(1 - (0.92 * s + 0.28).clip(-1, 1) ** 2)
    gleam = np.exp(-((s + 0.45) ** 2) / 0.012) * 0.32 + np.exp(-((s - 0.72) ** 2) / 0.006) * 0.12
    image = image * light[..., None] + 255 * gleam[..., None]
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, left = (SIDE - h) // 2, SIDE // 2 - half
    out[top : top + h, left : left + 2 * half + 1] = np.dstack([image.clip(0, 255), inside * 255])
    return out


def _pouch(d: dict) -> np.ndarray:
    """A soft bag: waisted sides, sealed ends, creases."""
    w, h = round(250 + 60 * d["slim"]), 410
    v, u = np.mgrid[0:h, -w // 2 : w // 2]
    v, u = v / h, u / (w / 2)
    r = 0.9 + 0.08 * np.cos(v * 2 * np.pi) + 0.012 * np.sin(v * 70)
    s = np.clip(u / r, -1, 1)
    face = label(d, w, h)
    belly = 1 - 0.1 * np.cos(v * 2 * np.pi)
    image = cv2.remap(
        face,
        ((s * belly * 0.96 + 1) / 2 * (w - 1)).astype(np.float32),
        (v * (h - 1)).astype(np.float32),
        cv2.INTER_LINEAR,
    )
    light = (
        0.72
        + 0.3 * np.sqrt((1 - (s * 0.95 + 0.2).clip(-1, 1) ** 2).clip(0))
        + 0.07 * np.sin(7 * s + 9 * v) * np.sin(5 * v - 2 * s)
    )
    seal = (v < 0.06) | (v > 0.95)
    light = np.where(seal, 0.82 + 0.14 * np.sin(v * h * 1.2), light)
    gleam = 0.22 * np.exp(-((s + 0.5 + 0.1 * np.sin(6 * v)) ** 2) / 0.01) * ~seal
    alpha = np.clip((r - np.abs(u)) * w / 2 + 0.5, 0, 1) * 255
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, left = (SIDE - h) // 2, (SIDE - 2 * (w // 2)) // 2
    out[top : top + h, left : left + image.shape[1]] = np.dstack(
        [(image * light[..., None] + 255 * gleam[..., None]).clip(0, 255), alpha]
    )
    return out


# ------------------------------------------------------------------------------------------------------ photos


def _paste(
    ground: np.ndarray, layer: np.ndarray, *, shadow: float = 0.0, shift=(0, 0)
) -> np.ndarray:
    """A layer with alpha over a ground, float32, with a soft shadow of it first."""
    alpha = layer[..., 3:].astype(np.float32) / 255
    if shadow:
        moved = cv2.warpAffine(
            alpha, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), alpha.shape[1::-1]
        )
        ground = ground * (
            1 - shadow * cv2.GaussianBlur(moved, (0, 0), ground.shape[0] / 28)[..., None]
        )
    return ground * (1 - alpha) + layer[..., :3] * alpha


def _place(
    layer: np.ndarray, size, centre, *, scale: float, angle: float, tilt: np.ndarray
) -> np.ndarray:
    """The sprite on a canvas (h, w): scaled, turned by angle (degrees), its corners moved by tilt (4, 2) of its size."""
    h, w = size
    square = np.float32([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * SIDE / 2
    a = np.deg2rad(angle)
    x, y = ((square + tilt * SIDE) * scale).T
    to = (
        np.stack([x * np.cos(a) - y * np.sin(a), x * np.sin(a) + y * np.cos(a)], 1) + centre
    )  # a BLAS rounds its own way
    matrix = cv2.getPerspectiveTransform(square + SIDE / 2, to.astype(np.float32))
    small = cv2.GaussianBlur(
        layer, (0, 0), max(0.01, 0.35 / scale - 0.2)
    )  # what a lens would not resolve
    return cv2.warpPerspective(small, matrix, (w, h), flags=cv2.INTER_LINEAR)


def shop_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """Catalogue photography: white ground, soft shadow, nearly frontal. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 3, product, photo))
    h = w = image_size
    if rng.random() < 0.5:
        h, w = (
            (image_size, round(image_size * 0.8))
            if rng.random() < 0.7
            else (round(image_size * 0.85), image_size)
        )
    ground = np.full((h, w, 3), rng.uniform(246, 254), np.float32)
    ground -= np.linspace(0, rng.uniform(2, 9), h, dtype=np.float32)[:, None, None]
    scale = min(h, w) / SIDE * rng.uniform(0.88, 1.0)
    tilt = rng.uniform(-0.008, 0.008, (4, 2)).astype(np.float32)
    layer = _place(
        sprite(product, seed),
        (h, w),
        (w / 2, h / 2),
        scale=scale,
        angle=rng.uniform(-2.5, 2.5),
        tilt=tilt,
    )
    image = _paste(ground, layer, shadow=rng.uniform(0.25, 0.45), shift=(h * 0.02, h * 0.025))
    return (image * rng.uniform(0.97, 1.02)).clip(0, 255).astype(np.uint8)


def customer_photo(product: int, photo: int, seed: int, image_size: int) -> np.ndarray:
    """A shopper's snapshot: clutter, perspective, uneven light, blur, something in the way, noise. (H, W, 3) uint8"""
    rng = np.random.default_rng((seed, 4, product, photo))
    long, short = round(image_size * rng.uniform(1.0, 1.35)), image_size
    h, w = (long, short) if rng.random() < 0.6 else (short, long)
    image = _scene(rng, h, w, seed)
    scale = min(h, w) / SIDE * rng.uniform(0.8, 1.2)
    centre = (w * rng.uniform(0.38, 0.62), h * rng.uniform(0.4, 0.6))
    tilt = rng.uniform(-0.09, 0.09, (4, 2)).astype(np.float32)
    angle = float(np.clip(rng.normal(0, 8), -25, 25))
    layer = _place(sprite(product, seed), (h, w), centre, scale=scale, angle=angle, tilt=tilt)
    image = _paste(image, layer, shadow=0.5, shift=rng.uniform(-0.04, 0.04, 2) * h)
    image = _in_the_way(rng, image)
    return _camera(rng, image)


def _scene(rng, h: int, w: int, seed: int) -> np.ndarray:
    """Wood, a shelf with other products, or a plain surface with things on it. (h, w, 3) float32"""
    y, x = np.mgrid[0:h, 0:w]
    kind = rng.choice(["wood", "shelf", "plain"], p=[0.3, 0.45, 0.25])
    if kind == "wood":
        grain = np.sin(
            x / w * rng.uniform(30, 60) + 2.5 * np.sin(y / h * rng.uniform(2, 5)) + rng.random() * 9
        )
        planks = (np.floor(x / w * rng.integers(2, 5)) % 2) * 14
        tone = np.array(
            rgb(rng.uniform(0.05, 0.1), rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.75)), np.float32
        )
        return (tone + (grain * 9 - planks)[..., None]).astype(np.float32)
    tone = np.array(rgb(rng.random(), rng.uniform(0.03, 0.3), rng.uniform(0.35, 0.85)), np.float32)
    slope = (y / h - 0.5) * rng.uniform(-70, 70) + (x / w - 0.5) * rng.uniform(-50, 50)
    image = (tone + slope[..., None]).astype(np.float32)
    others = rng.integers(0, 64, 6)
    spots = [((i + 0.5) * w / 4 + rng.normal(0, 6), h * rng.uniform(0.25, 0.45)) for i in range(4)]
    if kind == "plain":
        spots = [(w * rng.random(), h * rng.random()) for _ in range(2)]
    for other, spot in zip(others, spots):
        blurred = _place(
            sprite(int(other), seed + 7919),
            (h, w),
            spot,
            scale=h / SIDE * rng.uniform(0.45, 0.8),
            angle=rng.normal(0, 3 if kind == "shelf" else 40),
            tilt=np.zeros((4, 2), np.float32),
        )
        image = _paste(image, blurred, shadow=0.3)
    if kind == "shelf":
        board = round(h * rng.uniform(0.72, 0.86))
        image[board : board + h // 14] = rng.uniform(150, 225)
        image[board + h // 14 :] *= 0.55
        for tag in range(0, w, w // 3):
            cv2.rectangle(
                image,
                (tag + 8, board + 3),
                (tag + w // 6, board + h // 14 - 3),
                (245, 240, 200),
                -1,
            )
    return cv2.GaussianBlur(
        0.75 * image + 0.25 * tone, (0, 0), rng.uniform(1.5, 4.0)
    )  # out of focus


def _in_the_way(rng, image: np.ndarray) -> np.ndarray:
    """Sometimes a finger or a price tag covers a part of the edge of the product."""
    h, w = image.shape[:2]
    kind = rng.choice(["nothing", "hand", "tag"], p=[0.5, 0.3, 0.2])
    layer = np.zeros((h, w, 4), np.uint8)
    if kind == "hand":
        skin = rgb(rng.uniform(0.05, 0.08), rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.9))
        left, base, thick = (
            rng.random() < 0.5,
            h * rng.uniform(0.45, 0.8),
            round(h * rng.uniform(0.05, 0.075)),
        )
        for i in range(int(rng.integers(2, 5))):
            y = base + i * thick * 1.75
            reach = w * rng.uniform(0.18, 0.3)
            a, b = ((0, y + thick), (reach, y)) if left else ((w, y + thick), (w - reach, y))
            a, b = (tuple(round(float(c)) for c in p) for p in (a, b))
            cv2.line(layer, a, b, (*(round(0.8 * c) for c in skin), 255), 2 * thick, cv2.LINE_AA)
            cv2.line(
                layer,
                (a[0], a[1] - thick // 3),
                (b[0], b[1] - thick // 3),
                (*skin, 255),
                thick,
                cv2.LINE_AA,
            )
            cv2.circle(
                layer,
                b,
                round(thick * 0.5),
                (*(min(255, round(1.1 * c) + 12) for c in skin), 255),
                -1,
                cv2.LINE_AA,
            )
        layer = cv2.GaussianBlur(layer, (0, 0), 1.2)
    elif kind == "tag":
        tw, th, x, y = (
            round(w * 0.26),
            round(h * 0.1),
            round(w * rng.uniform(0.05, 0.7)),
            round(h * rng.uniform(0.66, 0.86)),
        )
        cv2.rectangle(layer, (x, y), (x + tw, y + th), (250, 232, 120, 255), -1)
        price = f"{rng.integers(1, 30)}.{rng.integers(10, 99)}"
        _text(
            layer,
            price,
            (x + tw / 2, y + th / 2),
            0.7 * tw,
            0.6 * th,
            (20, 20, 20, 255),
            cv2.FONT_HERSHEY_DUPLEX,
        )
    return _paste(image, layer, shadow=0.35 if kind != "nothing" else 0.0, shift=(3, 4))


def _camera(rng, image: np.ndarray) -> np.ndarray:
    """White balance, exposure, a light from one side, blur or shake, noise."""
    h, w = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j].astype(np.float32)
    a = rng.uniform(0, 2 * np.pi)
    light = (
        1
        + rng.uniform(0, 0.3) * (x * np.cos(a) + y * np.sin(a))
        - rng.uniform(0, 0.18) * (x * x + y * y)
    )
    tint = [rng.uniform(0.9, 1.1), 1.0, rng.uniform(0.88, 1.12)]
    image = image * (rng.uniform(0.75, 1.15) * light)[..., None] * np.array(tint, np.float32)
    if rng.random() < 0.3:
        n = int(rng.integers(3, 7))
        kernel = np.zeros((n, n), np.float32)
        cv2.line(kernel, (0, int(rng.integers(n))), (n - 1, int(rng.integers(n))), 1.0)
        image = cv2.filter2D(image, -1, kernel / kernel.sum())
    else:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    image += rng.normal(0, rng.uniform(1.5, 6), (h, w, 1)).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- the data root


def counts(product: int, seed: int) -> tuple[int, int, int]:
    """(shop, customer training, test) photos of a product: a long tail, 1 to 2, 2 to 24 and 2 to 6."""
    rng = np.random.default_rng((seed, 5, product))
    return int(rng.integers(1, 3)), 2 + min(22, int(rng.pareto(0.9) * 2.2)), int(rng.integers(2, 7))


def _product_files(product: int, *, folder: Path, seed: int, image_size: int) -> None:
    """Draw all photos of one product under names that say what they are; `generate` shuffles them."""
    shop, customer, test = counts(product, seed)
    optimized = cv2.useOptimized()
    cv2.setUseOptimized(False)  # its vector code rounds differently on each kind of processor
    try:
        for photo in range(shop + customer + test):
            if photo < shop:
                image, quality = shop_photo(product, photo, seed, image_size), 92
            else:
                image = customer_photo(product, photo, seed, image_size)
                quality = int(np.random.default_rng((seed, 6, product, photo)).integers(55, 88))
            data = cv2.imencode(
                ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
            )[1]
            (folder / f"{product}-{photo}.jpg").write_bytes(data.tobytes())
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

    Drawn into a temporary folder beside it that takes its name when complete; a complete one of the same settings is
    used again. workers: processes that draw; the result does not depend on it. Images are never held in memory.
    Raises FileExistsError for a folder that holds something else.
    """
    folder = Path(folder)
    settings = {"version": VERSION, "products": products, "seed": seed, "image_size": image_size}
    if folder.exists():
        if (folder / "toy.json").is_file() and json.loads(
            (folder / "toy.json").read_text()
        ) == settings:
            return folder
        raise FileExistsError(
            f"{folder.name} exists and is no toy set of {settings}: name another folder or remove it"
        )
    if products < 2 or image_size < 32:
        raise ValueError(
            f"products={products}, image_size={image_size}: a toy set needs 2 products and 32 px"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (part / "drawn").mkdir()
        draw = partial(_product_files, folder=part / "drawn", seed=seed, image_size=image_size)
        if workers:
            with ProcessPoolExecutor(workers) as pool:
                list(pool.map(draw, range(products), chunksize=8))
        else:
            list(map(draw, range(products)))
        _tables(part, products, seed)
        (part / "drawn").rmdir()
        (part / "toy.json").write_text(json.dumps(settings))
        part.chmod(0o755)
        try:
            os.replace(part, folder)
        except OSError:  # another process was faster; its bytes are the same
            if not (folder / "toy.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _tables(part: Path, products: int, seed: int) -> None:
    """Give the photos shuffled numbers, move them to train/ and test/, write both tables."""
    rows = {"train": [], "test": []}
    for product in range(products):
        shop, customer, test = counts(product, seed)
        for photo in range(shop + customer + test):
            split = "train" if photo < shop + customer else "test"
            domain = "shop" if photo < shop else "customer"
            rows[split].append(
                (f"{product}-{photo}.jpg", product, line_of(product, seed)[0], domain)
            )
    for split, listed in rows.items():
        (part / split).mkdir()
        order = np.random.default_rng((seed, 7, len(listed))).permutation(len(listed))
        names = [f"{i + 1}.jpg" for i in range(len(listed))]
        for name, at in zip(names, order):
            os.replace(part / "drawn" / listed[at][0], part / split / name)
        table = pd.DataFrame(
            [listed[at] for at in order], columns=["name", "class", "group", "domain"]
        )
        table.assign(name=names).to_csv(part / f"{split}.csv", index=False, lineterminator="\n")


def data_root_or_toy(
    given: str = "", cache_dir: str = "", *, products: int = 24
) -> tuple[Path, str]:
    """(data root, a line that says which): the one that platform.find_data_root finds, else the toy set, drawn once."""
    root, how = platform.find_data_root(given)
    if root:
        return root, f"data: {root.name} ({how})"
    root = generate(
        platform.cache_folder(cache_dir) / f"toy-v{VERSION}" / f"toy-{products}", products=products
    )
    lines = len({line_of(p, 0)[0] for p in range(products)})
    return root, f"data: toy set, {products} products of {lines} brand lines (generated)"
