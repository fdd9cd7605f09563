"""From a decoded photo to what a network sees."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

# of the red, green and blue of ImageNet's photos, in 0..1; what most backbones were trained with
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FITS = ("squash", "crop", "pad")


def eval_transform(
    image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", fit="squash"
) -> T.Compose:
    """uint8 (H, W, 3) -> float32 (3, S, S), normalised by (x - mean) / std.

    fit: how a picture becomes a square. 'squash' shows all of it and changes its shape; 'crop'
    keeps the shape and cuts the longer side's ends off; 'pad' keeps all of it on white.
    interpolation: 'bilinear', 'bicubic' ..., as in the backbone's record.
    Raises ValueError for another fit.
    """
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown: use one of {FITS}")
    size = image_size if fit == "crop" else (image_size, image_size)
    steps = [T.Resize(size, InterpolationMode(interpolation)), T.CenterCrop(image_size)]
    if fit == "pad":
        steps.insert(0, T.Lambda(_padded_to_square))
    return T.Compose([T.ToImage(), *steps, *_finish(mean, std)])


def _padded_to_square(image: torch.Tensor) -> torch.Tensor:
    """(3, S, S) with S the longer side: a centre crop larger than the picture adds 0, so white."""
    side = max(image.shape[-2:])
    return 255 - T.functional.center_crop(255 - image, [side, side])


def _finish(mean, std) -> list:
    """The last steps of every transform: uint8 to float32 in 0..1, then normalised."""
    return [T.ToDtype(torch.float32, scale=True), T.Normalize(mean, std)]


def zoomed(image: np.ndarray, share: float) -> np.ndarray:
    """The central share of each side of a photo (H, W, 3) uint8, at least a pixel; 1 is all of it.

    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"zoom {share} is no share of a photo's sides: use a number over 0, 1 at most, where 1 "
            "keeps the whole photo"
        )
    sides = np.array(image.shape[:2])
    height, width = kept = np.maximum(1, np.round(sides * share).astype(int))
    top, left = (sides - kept) // 2
    return image[top : top + height, left : left + width]


def study_steps(image_size: int = 224) -> dict[str, torch.nn.Module]:
    """The reference study's six augmentations by name, in its order.

    Resize is 8/7 of the crop, 256 for 224. Its crop may leave 8 % of the area, and its rotation
    fills the corners with black.
    """
    large = round(image_size * 8 / 7)
    return {
        "Resize": T.Resize((large, large)),
        "RandomResizedCrop": T.RandomResizedCrop(image_size),
        "RandomRotation": T.RandomRotation(50),
        "RandomHorizontalFlip": T.RandomHorizontalFlip(),
        "ColorJitter": T.ColorJitter(0.1, 0.1, 0.1, 0.1),
        "ToTensor": T.ToDtype(torch.float32, scale=True),
    }


def augmentation(name: str, image_size: int, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> T.Compose:
    """The training transform of that name: uint8 (H, W, 3) -> float32 (3, S, S), normalised.

    'kit': crops of 40 % of the area or more, small rotations, flips, and jitter of all but the hue,
    at times a variant's only difference.
    'strong': more of that, perspective, and in three photos of ten a patch of 2 to 25 % of the area
    blanked, for long training.
    'study': `study_steps`.
    'none': as in evaluation.
    Raises ValueError for another name.
    """
    rotation = T.RandomRotation(15, InterpolationMode.BILINEAR)
    flip = T.RandomHorizontalFlip()
    steps = {
        "kit": [
            T.RandomResizedCrop(image_size, scale=(0.4, 1.0)),
            rotation,
            flip,
            T.ColorJitter(0.3, 0.3, 0.3),
        ],
        "strong": [
            T.RandomResizedCrop(image_size, scale=(0.3, 1.0)),
            T.RandomPerspective(0.3),
            rotation,
            flip,
            T.ColorJitter(0.4, 0.4, 0.4, 0.02),
        ],
        "study": study_steps(image_size).values(),
        "none": [T.Resize((image_size, image_size))],
    }
    if name not in steps:
        raise ValueError(f"augmentation {name!r} is unknown: use one of {tuple(steps)}")
    transforms = [T.ToImage(), *steps[name], *_finish(mean, std)]
    if name == "strong":  # last, so that a patch has the mean colour
        transforms.append(T.RandomErasing(0.3, scale=(0.02, 0.25)))
    return T.Compose(transforms)


def foreground(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0..1: 0 on the even ground that touches the border, 1 on the product.

    Soft at the seam. The ground is what lies within 18 levels of a corner's colour and hangs
    together with that corner: white parts inside the product stay. Where that is all of the
    picture, all of it is the product.
    """
    height, width = image.shape[:2]
    mask = np.zeros((height + 2, width + 2), np.uint8)  # with the rim that floodFill asks for
    smooth = cv2.medianBlur(image, 3)
    near = (18, 18, 18)
    # against the corner, not the neighbour, else it creeps over soft edges
    flags = cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE
    for y in (0, height - 1):
        for x in (0, width - 1):
            cv2.floodFill(smooth, mask, (x, y), 0, near, near, flags)
    product = 1 - mask[1:-1, 1:-1]
    product = cv2.erode(product, None)  # the seam's own pixels are mixed with the ground
    if not product.any():
        product[:] = 1
    return cv2.GaussianBlur(product.astype(np.float32), (0, 0), 1.0)


def customer_like(shop: np.ndarray, ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shop photo as a shopper might take it, (H, W, 3) uint8 of its own size.

    Cut out, tilted, laid on a blurred crop of another photo (`ground`), under uneven light,
    blurred, noisy, compressed. Made for a product on an even ground: what `foreground` takes for
    the product is cut out. All that is random comes from rng, in the order of the steps.
    """
    height, width = shop.shape[:2]

    # the product, seen from another side, on another ground
    scene = _blurred_crop(ground, width, height, rng)
    tilt = _random_view(width, height, rng)
    alpha = cv2.warpPerspective(foreground(shop), tilt, (width, height))[..., None]
    product = cv2.warpPerspective(shop, tilt, (width, height)).astype(np.float32)
    image = scene * (1 - alpha) + product * alpha

    # light: exposure, and a slope of up to 30 % in one direction over half the picture
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    exposure = rng.uniform(0.7, 1.15)
    slope = rng.uniform(0, 0.3)
    direction = x * np.cos(angle) + y * np.sin(angle)
    image *= (exposure * (1 + slope * direction))[..., None]

    # camera: out of focus, grain alike in all channels, JPEG
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    image += rng.normal(0, rng.uniform(1, 6), (height, width, 1))
    image = image.clip(0, 255).astype(np.uint8)
    quality = int(rng.integers(50, 90))
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def _blurred_crop(ground: np.ndarray, width: int, height: int, rng) -> np.ndarray:
    """(height, width, 3) float32 in 0..255: a square piece of a photo, out of focus.

    Its side is half to all of the photo's shorter one; stretched to the size asked for.
    """
    side = max(1, int(min(ground.shape[:2]) * rng.uniform(0.5, 1.0)))
    top, left = rng.integers(np.subtract(ground.shape[:2], side - 1))
    crop = ground[top : top + side, left : left + side]
    scene = cv2.resize(crop, (width, height))
    return cv2.GaussianBlur(scene, (0, 0), rng.uniform(1, 4)).astype(np.float32)


def _random_view(width: int, height: int, rng) -> np.ndarray:
    """A homography (3, 3): turned, scaled, each corner moved by up to 8 % of the sides.

    The turn has a standard deviation of 10 degrees: most people hold a camera nearly upright.
    """
    corners = np.float32(
        [
            (0, 0),
            (width, 0),
            (width, height),
            (0, height),
        ]
    )
    centre = width / 2, height / 2
    angle, scale = rng.normal(0, 10), rng.uniform(0.6, 1.1)
    turn = cv2.getRotationMatrix2D(centre, angle, scale)
    moved = cv2.transform(corners[None], turn)[0]
    moved += rng.uniform(-0.08, 0.08, (4, 2)) * (width, height)
    return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
