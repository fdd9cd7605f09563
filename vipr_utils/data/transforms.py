"""From a decoded photo to what a network sees."""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


FITS = ("squash", "crop", "pad")


def eval_transform(
    image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", fit="squash"
) -> T.Compose:
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
    return T.Compose(
        [T.ToImage(), *study_steps(image_size).values(), T.Normalize(list(mean), list(std))]
    )


def train_transform(
    image_size: int,
    *,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    scale=(0.4, 1.0),
    perspective: float = 0.0,
    rotation: float = 15.0,
    flip: float = 0.5,
    jitter: float = 0.3,
    hue: float = 0.0,
    erase: float = 0.0,
) -> T.Compose:
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


strong_transform = partial(
    train_transform, scale=(0.3, 1.0), perspective=0.3, jitter=0.4, hue=0.02, erase=0.3
)


def augmentation(name: str, image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> T.Compose:
    """The training transform of that name: 'kit' (train_transform), 'strong' (for long training), 'study'
    (study_transform) or 'none'."""
    kinds = {
        "kit": train_transform,
        "strong": strong_transform,
        "study": study_transform,
        "none": eval_transform,
    }
    if name not in kinds:
        raise ValueError(f"augmentation {name!r} is unknown: use one of {tuple(kinds)}")
    return kinds[name](image_size, mean=mean, std=std)


def foreground(image: np.ndarray, *, tolerance: int = 18) -> np.ndarray:
    """(H, W) float32 in 0..1: 0 on the even ground that touches the border, 1 on the product, soft at the seam."""
    h, w = image.shape[:2]
    mask = np.zeros((h + 2, w + 2), np.uint8)
    smooth = cv2.medianBlur(image, 3)
    how = (
        cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 4
    )  # against the corner, else it creeps over soft edges
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
    scene = cv2.resize(
        ground[top : top + side, left : left + side], (w, h), interpolation=cv2.INTER_LINEAR
    )
    scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(1, 4)).astype(np.float32)
    corners = np.float32([(0, 0), (w, 0), (w, h), (0, h)])
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.normal(0, 10), rng.uniform(0.6, 1.1))
    moved = cv2.transform(corners[None], turn)[0] + rng.uniform(-0.08, 0.08, (4, 2)) * (w, h)
    matrix = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    alpha = cv2.warpPerspective(foreground(shop), matrix, (w, h))[..., None]
    image = (
        scene * (1 - alpha) + cv2.warpPerspective(shop, matrix, (w, h)).astype(np.float32) * alpha
    )
    x, y = np.meshgrid(
        np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)
    )
    a = rng.uniform(0, 2 * np.pi)
    image *= (rng.uniform(0.7, 1.15) * (1 + rng.uniform(0, 0.3) * (x * np.cos(a) + y * np.sin(a))))[
        ..., None
    ]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2)) + rng.normal(
        0, rng.uniform(1, 6), (h, w, 1)
    )
    data = cv2.imencode(
        ".jpg",
        image.clip(0, 255).astype(np.uint8),
        [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 90))],
    )[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)
