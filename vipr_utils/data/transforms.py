"""From a decoded photo to what a network sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# of the red, green and blue of ImageNet's photos, in 0..1; what most backbones were trained with
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FITS = ("squash", "crop", "pad")
RECIPES = {
    "kit": {
        "area": (0.4, 1.0),
        "degrees": 15.0,
        "flipped": 0.5,
        "brightness": 0.3,
        "contrast": 0.3,
        "saturation": 0.3,
    },
    "strong": {
        "area": (0.3, 1.0),
        "perspective": 0.3,
        "degrees": 15.0,
        "flipped": 0.5,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.02,
        "blanked": 0.3,
    },
    "study": {
        "squashed": True,
        "area": (0.08, 1.0),
        "degrees": 50.0,
        "flipped": 0.5,
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.1,
        "hue": 0.1,
    },
    "none": {},
}
# of ImageNet's photos, where a patch is blanked
MEAN_COLOUR = np.uint8([124, 116, 104])
# from red, green, blue to three times grey (ITU-R BT.601)
GREY = np.full((3, 3), (0.299, 0.587, 0.114))


def shrunk(photo: np.ndarray, scale: float, *, most_px: float = math.inf) -> np.ndarray:
    """A photo (H, W, 3) uint8 with its sides times the scale where that is under 1; each has a
    pixel at least and most_px at most."""
    scale = min(1.0, scale)
    size = [max(1, min(most_px, round(side * scale))) for side in photo.shape[1::-1]]
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA)


def jpeg(photo: np.ndarray, quality: int) -> bytes:
    """A photo (H, W, 3) uint8 RGB as a file."""
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def normalised(pixels: torch.Tensor, *, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    """uint8 (..., 3, S, S) -> float32 (x / 255 - mean) / std, computed where the pixels are.

    By rows of S * 3 numbers as channels-last photos hold them, which takes a third of the time.
    """
    side = pixels.shape[-1]
    mean, std = torch.tensor([mean, std], device=pixels.device).repeat(1, side)
    rows = pixels.movedim(-3, -1).flatten(-2).float()
    rows = rows.mul_(1 / 255).sub_(mean).div_(std)
    return rows.unflatten(-1, (side, 3)).movedim(-1, -3)


@dataclass(frozen=True)
class Evaluation:
    """A whole photo, uint8 (H, W, 3) -> uint8 (3, S, S).

    fit: how a picture becomes a square. 'squash' shows all of it and changes its shape; 'crop'
    keeps the shape and cuts the longer side's ends off; 'pad' keeps all of it on white.
    interpolation: 'bilinear', 'bicubic' ..., as in the backbone's record.
    Raises ValueError for another fit.
    """

    image_size: int
    fit: str = "squash"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r} is unknown: use one of {FITS}")

    def __call__(self, photo: np.ndarray, rng=None) -> torch.Tensor:
        image, side = _planes(photo), self.image_size
        if self.fit == "pad":  # on white: a centre crop larger than the picture adds 0
            longer = max(photo.shape[:2])
            image = 255 - F.center_crop(255 - image, [longer, longer])
        size = [side] if self.fit == "crop" else [side, side]
        image = F.resize(image, size, InterpolationMode(self.interpolation))
        return F.center_crop(image, [side]) if self.fit == "crop" else image


def _planes(photo: np.ndarray) -> torch.Tensor:
    """(3, H, W) whose pixels lie as in (H, W, 3).

    Resizing is twice as fast in that layout, and networks on a CPU want it.
    """
    return torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)


def zoomed(image: np.ndarray, share: float) -> np.ndarray:
    """The central share of each side of a photo (H, W, 3) uint8, at least a pixel; 1 is all of it.

    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"zoom {share} is no share of a photo's sides: use a number over 0, 1 at most, where 1 "
            "keeps the whole photo"
        )
    if share == 1:
        return image
    sides = np.array(image.shape[:2])
    height, width = kept = np.maximum(1, np.round(sides * share).astype(int))
    top, left = (sides - kept) // 2
    return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Augmentation:
    """A training photo at random, uint8 (H, W, 3) -> uint8 (3, S, S).

    All that is random comes from the rng of the call. The steps are those of torchvision's v2
    transforms, with their distributions, in this order: RandomResizedCrop, then RandomPerspective,
    RandomRotation and RandomHorizontalFlip as one warp, ColorJitter on bytes, RandomErasing. It
    takes a third of their time or less.
    """

    image_size: int

    # resized to a square of 8/7 of the side at first, 256 for 224
    squashed: bool = False

    # share of the photo that a crop of sides 3:4 to 4:3 leaves
    area: tuple[float, float] = (1.0, 1.0)

    # share of half a side by which each corner moves inwards at most, in half of the photos
    perspective: float = 0.0

    # turned by up to this many to either side; corners become black
    degrees: float = 0.0

    # share of the photos that are mirrored
    flipped: float = 0.0

    # each times 1 - this to 1 + this; the hue turned by up to this share of its circle
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    # share of the photos that lose a patch of 2 to 25 % of their area
    blanked: float = 0.0

    def __call__(self, photo: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        side = self.image_size
        if self.squashed:
            photo = _resized(photo, round(side * 8 / 7))
        if self.area != (1.0, 1.0):
            photo = _crop(photo, self.area, (3 / 4, 4 / 3), rng)
        image = _resized(photo, side)
        image = self._warped(image, rng)
        image = self._recoloured(image, rng)
        if rng.random() < self.blanked:
            image = image.copy()
            _crop(image, (0.02, 0.25), (0.3, 1 / 0.3), rng)[:] = MEAN_COLOUR
        return _planes(image)

    def _warped(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A square seen from another side, turned and flipped: one homography, one warp.

        Photos that are only flipped, or not even that, keep their pixels as they are.
        """
        side = len(image)
        view = np.eye(3)
        if self.perspective and rng.random() < 0.5:
            view = self._from_another_side(side, rng)
        if self.degrees:
            angle = rng.uniform(-self.degrees, self.degrees)
            centre = (side - 1) / 2
            turn = cv2.getRotationMatrix2D((centre, centre), angle, 1.0)
            view = np.vstack([turn, [0, 0, 1]]) @ view
        # drawn in any case, so that all that follows stays the same
        flipped = rng.random() < self.flipped
        if (view == np.eye(3)).all():
            return cv2.flip(image, 1) if flipped else image
        if flipped:
            # from right to left
            view[0] = (side - 1) * view[2] - view[0]
        # four channels are warped in half the time of three
        image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
        # what comes from outside is black
        image = cv2.warpPerspective(image, view, (side, side))
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)

    def _from_another_side(self, side: int, rng: np.random.Generator) -> np.ndarray:
        """The homography (3, 3) that moves each corner inwards, by whole pixels."""
        signs = [
            (1, 1),
            (-1, 1),
            (-1, -1),
            (1, -1),
        ]
        inwards = np.float32(signs)
        corners = (1 - inwards) / 2 * (side - 1)
        furthest = int(self.perspective * (side // 2))
        moved = corners + inwards * rng.integers(0, furthest + 1, (4, 2), np.int32)
        return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))

    def _recoloured(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """In other light and colours; each change rounds and clips to 0..255, as one on a photo
        does.
        """
        # all are drawn, whatever is asked for: the others stay the same when one is switched off
        draws = rng.uniform(-1, 1, 4)
        light = 1 + draws[0] * self.brightness
        contrast = 1 + draws[1] * self.contrast
        saturation = 1 + draws[2] * self.saturation
        turn = round(256 * draws[3] * self.hue) % 256
        for step in rng.permutation(4):
            if step == 0 and self.brightness:
                image = cv2.addWeighted(image, light, image, 0, 0)
            elif step == 1 and self.contrast:
                # away from the mean grey, or towards it
                grey = float(GREY[0] @ cv2.mean(image)[:3])
                image = cv2.addWeighted(image, contrast, image, 0, (1 - contrast) * grey)
            elif step == 2 and self.saturation:
                # away from each pixel's grey, or towards it
                image = cv2.transform(image, GREY + saturation * (np.eye(3) - GREY))
            elif step == 3 and self.hue:
                hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
                hsv[:, :, 0] += np.uint8(turn)  # goes round
                image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        return image


def augmentation(name: str, image_size: int) -> Augmentation:
    """The training transform of that name, of RECIPES.

    'kit': crops of 40 % of the area or more, small rotations, flips, and jitter of all but the hue,
    at times a variant's only difference.
    'strong': more of that, perspective, and blanked patches, for long training.
    'study': the reference study's six: resize, crop, rotation, flip, colours, to a tensor. Its crop
    may leave 8 % of the area.
    'none': as in evaluation.
    Raises ValueError for another name.
    """
    if name not in RECIPES:
        raise ValueError(f"augmentation {name!r} is unknown: use one of {tuple(RECIPES)}")
    return Augmentation(image_size, **RECIPES[name])


def _resized(photo: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3), of another shape where the photo is no square.

    Smoothed where that is smaller (antialias), as in evaluation.
    """
    image = F.resize(_planes(photo), [side, side])
    return image.permute(1, 2, 0).contiguous().numpy()


def _crop(image: np.ndarray, area, ratio, rng: np.random.Generator) -> np.ndarray:
    """A view (h, w, 3) of a share of the area, drawn from area[0]..area[1], with sides of a ratio
    from ratio[0] to ratio[1].

    Ten are drawn until one fits in; else it is the middle, as much as the ratios allow. As
    torchvision's RandomResizedCrop draws it.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        wider = np.exp(rng.uniform(*np.log(ratio)))
        w = round((pixels * wider) ** 0.5)
        h = round((pixels / wider) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = rng.integers(height - h + 1)
            left = rng.integers(width - w + 1)
            return image[top : top + h, left : left + w]
    # a photo much longer than it is wide
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    top = (height - h) // 2
    left = (width - w) // 2
    return image[top : top + h, left : left + w]


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
