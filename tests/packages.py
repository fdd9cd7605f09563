"""Packages whose lines differ by a word alone: what an embedding cannot tell apart and reading can.

    python tests/packages.py FOLDER        400 queries of 100 products, one shop photo each

A line is a brand's name, a colour and a pattern; its variants differ by the name of a flavour.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

FLAVOURS = ["VANILLA", "COCOA", "LEMON", "GINGER", "MINT", "HAZELNUT", "CHERRY", "COFFEE"]
SYLLABLES = ["bo", "ra", "mi", "lu", "ten", "vo", "sa", "kri", "no", "pel"]
FONT = cv2.FONT_HERSHEY_DUPLEX
HEIGHT, WIDTH = 420, 300  # of a front, in pixels


def front(line: int, word: str) -> np.ndarray:
    """The front of a package, (HEIGHT, WIDTH, 3) uint8."""
    rng = np.random.default_rng(line)
    dark = rng.integers(20, 110, 3).tolist()
    image = np.full((HEIGHT, WIDTH, 3), rng.integers(150, 240, 3), np.uint8)
    for _ in range(6):
        centre = rng.integers(0, (WIDTH, HEIGHT)).tolist()
        colour = rng.integers(120, 230, 3).tolist()
        cv2.circle(image, centre, int(rng.integers(20, 70)), colour, -1, cv2.LINE_AA)
    brand = "".join(rng.choice(SYLLABLES, 3)).capitalize()
    for text, base, share in ((brand, 90, 0.8), (word, 260, 0.75)):
        (width, _), _ = cv2.getTextSize(text, FONT, 1.0, 2)
        scale = min(1.6, share * WIDTH / width)
        left = round((WIDTH - scale * width) / 2)
        if text == word:
            cv2.rectangle(image, (10, base - 60), (WIDTH - 10, base + 25), (250, 250, 250), -1)
        cv2.putText(image, text, (left, base), FONT, scale, dark, 3, cv2.LINE_AA)
    return image


def shop(package: np.ndarray) -> np.ndarray:
    """It on white, straight."""
    return cv2.copyMakeBorder(package, 40, 40, 100, 100, cv2.BORDER_CONSTANT, value=(255,) * 3)


def customer(package: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """It held aslant before something, under some light, a little blurred."""
    side = 480
    ground = rng.integers(90, 200, (5, 5, 1), np.uint8).repeat(3, 2)
    image = cv2.resize(ground, (side, side), interpolation=cv2.INTER_CUBIC)
    scale = rng.uniform(0.8, 1.05)
    corners = np.float32([[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]])
    angle = np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    placed = scale * (corners - corners.mean(0)) @ turn.T + side / 2
    placed = np.float32(placed + rng.uniform(-22, 22, (4, 2)))
    matrix = cv2.getPerspectiveTransform(corners, placed)
    mask = cv2.warpPerspective(np.ones(package.shape[:2], np.uint8), matrix, (side, side))
    warped = cv2.warpPerspective(package, matrix, (side, side), flags=cv2.INTER_AREA)
    image[mask > 0] = warped[mask > 0]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4))
    lit = image * rng.uniform(0.75, 1.1) * rng.uniform(0.95, 1.05, 3)
    lit += rng.normal(0, 5, image.shape)
    return lit.clip(0, 255).astype(np.uint8)


def generate(root: Path, *, products: int = 100, photos: int = 4, variants: int = 5) -> Path:
    """A data root: a shop photo of each product, and customers' photos of it as queries."""
    rows = {"train": [], "test": []}
    for split in rows:
        (root / split).mkdir(parents=True, exist_ok=True)
    for product in range(products):
        line, variant = divmod(product, variants)
        rng = np.random.default_rng((1, line))
        package = front(line, rng.permutation(FLAVOURS)[variant])
        drawn = {"train": [shop(package)], "test": []}
        for photo in range(photos):
            drawn["test"].append(customer(package, np.random.default_rng((2, product, photo))))
        for split, images in drawn.items():
            for i, image in enumerate(images):
                name = f"{product}-{i}.jpg"
                cv2.imwrite(str(root / split / name), image, [cv2.IMWRITE_JPEG_QUALITY, 85])
                domain = "shop" if split == "train" else "customer"
                rows[split].append((name, product, line, domain))
    for split, listed in rows.items():
        table = pd.DataFrame(listed, columns=["name", "class", "group", "domain"])
        table.to_csv(root / f"{split}.csv", index=False)
    return root


if __name__ == "__main__":
    print(generate(Path(sys.argv[1])))
