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
    """uint8 (H, W, 3) -> float32 (3, S, S), normalised.

    fit: 'squash' to the square, centre 'crop', or 'pad' with white.
    """
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown: use one of {FITS}")
    mode = InterpolationMode(interpolation)
    square = T.Resize((image_size, image_size), mode, antialias=True)
    steps = {
        "squash": [square],
        "crop": [T.Resize(image_size, mode, antialias=True), T.CenterCrop(image_size)],
        "pad": [_PadToSquare(), square],
    }
    return T.Compose([T.ToImage(), *steps[fit], *_finish(mean, std)])


class _PadToSquare(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        missing_y, missing_x = max(0, width - height), max(0, height - width)
        left, top = missing_x // 2, missing_y // 2
        return T.functional.pad(image, [left, top, missing_x - left, missing_y - top], fill=255)


def _finish(mean, std) -> list:
    return [T.ToDtype(torch.float32, scale=True), T.Normalize(list(mean), list(std))]


def study_steps(image_size: int = 224) -> dict[str, torch.nn.Module]:
    """The reference study's six augmentations by name, in its order.

    Resize is 8/7 of the crop, 256 for 224.
    """
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
    """A training transform for retrieval.

    A crop of `scale` of the area; perspective of every second photo; rotation up to these degrees
    either way; a flip with this probability; jitter of brightness, contrast and saturation, and of
    hue (a variant's only difference at times: little or none); with probability `erase` a patch of
    2 to 25 % of the area blanked.
    """
    smooth = InterpolationMode.BILINEAR
    steps = [T.ToImage(), T.RandomResizedCrop(image_size, scale=scale, antialias=True)]
    if perspective:
        steps.append(T.RandomPerspective(perspective, 0.5, smooth))
    if rotation:
        steps.append(T.RandomRotation(rotation, smooth))
    if flip:
        steps.append(T.RandomHorizontalFlip(flip))
    if jitter:
        steps.append(T.ColorJitter(jitter, jitter, jitter, hue))
    steps += _finish(mean, std)
    if erase:
        steps.append(T.RandomErasing(erase, scale=(0.02, 0.25)))
    return T.Compose(steps)


strong_transform = partial(
    train_transform, scale=(0.3, 1.0), perspective=0.3, jitter=0.4, hue=0.02, erase=0.3
)


def augmentation(name: str, image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> T.Compose:
    """The training transform of that name.

    'kit' (train_transform), 'strong' (for long training), 'study' (study_transform) or 'none'.
    """
    kinds = {
        "kit": train_transform,
        "strong": strong_transform,
        "study": study_transform,
        "none": eval_transform,
    }
    if name not in kinds:
        raise ValueError(f"augmentation {name!r} is unknown: use one of {tuple(kinds)}")
    return kinds[name](image_size, mean=mean, std=std)


def foreground(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0..1: 0 on the even ground that touches the border, 1 on the product.

    Soft at the seam. The ground is what lies within 18 levels of a corner's colour.
    """
    height, width = image.shape[:2]
    mask = np.zeros((height + 2, width + 2), np.uint8)
    smooth, near = cv2.medianBlur(image, 3), (18, 18, 18)
    # against the corner, not the neighbour, else it creeps over soft edges
    flags = cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 4
    for x, y in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)):
        if not mask[y + 1, x + 1]:
            cv2.floodFill(smooth, mask, (x, y), 0, near, near, flags)
    product = cv2.erode(1 - mask[1:-1, 1:-1], np.ones((3, 3), np.uint8))
    return cv2.GaussianBlur(product.astype(np.float32), (0, 0), 1.0)


def customer_like(shop: np.ndarray, ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shop photo as a shopper might take it, (H, W, 3) uint8 of its own size.

    Cut out, tilted, laid on a blurred crop of another photo (`ground`), under uneven light,
    blurred, noisy, compressed.
    """
    height, width = shop.shape[:2]
    scene = _blurred_crop(ground, width, height, rng)
    tilt = _random_view(width, height, rng)
    alpha = cv2.warpPerspective(foreground(shop), tilt, (width, height))[..., None]
    product = cv2.warpPerspective(shop, tilt, (width, height)).astype(np.float32)
    image = scene * (1 - alpha) + product * alpha
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    exposure, slope = rng.uniform(0.7, 1.15), rng.uniform(0, 0.3)
    image *= (exposure * (1 + slope * (x * np.cos(angle) + y * np.sin(angle))))[..., None]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    image += rng.normal(0, rng.uniform(1, 6), (height, width, 1))
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 90))]
    data = cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), quality)[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def _blurred_crop(ground: np.ndarray, width: int, height: int, rng) -> np.ndarray:
    """Half to all of a photo's shorter side, at this size, out of focus."""
    side = int(min(ground.shape[:2]) * rng.uniform(0.5, 1.0))
    top, left = (rng.integers(length - side + 1) for length in ground.shape[:2])
    crop = ground[top : top + side, left : left + side]
    scene = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.GaussianBlur(scene, (0, 0), rng.uniform(1, 4)).astype(np.float32)


def _random_view(width: int, height: int, rng) -> np.ndarray:
    """A homography (3, 3): turned, scaled, each corner moved by up to 8 % of the sides."""
    corners = np.float32([(0, 0), (width, 0), (width, height), (0, height)])
    centre = width / 2, height / 2
    turn = cv2.getRotationMatrix2D(centre, rng.normal(0, 10), rng.uniform(0.6, 1.1))
    moved = cv2.transform(corners[None], turn)[0]
    moved += rng.uniform(-0.08, 0.08, (4, 2)) * (width, height)
    return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
