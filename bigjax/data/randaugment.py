"""RandAugment: a few of fourteen changes to each image, all of one strength."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from bigjax.data.decode import pillow
from bigjax.data.pipeline import Examples, Uniform

# How far each change goes at the strongest magnitude.
STRONGEST = 10.0
DEGREES = 30.0
SHEAR = 0.3
TRANSLATE = 150 / 331  # of the side
BLEND = 0.9  # share of what contrast, brightness, colour and sharpness take away or add
BITS = 4  # that posterizing takes away

Change = Callable[[Image.Image, float], Image.Image]


class RandAugment:
    """Puts each image through `ops` changes in turn, each drawn uniformly from CHANGES.

    Cubuk et al. 2019, "RandAugment: practical automated data augmentation with a reduced search
    space" (arXiv:1909.13719). All changes have the strength `magnitude` / 10; those that have a
    direction take either by a fair coin. Ranges are those of AutoAugment (Cubuk et al. 2018, table
    6); what moves in from outside is black; rotation and shear are about the centre and take the
    nearest pixel. At magnitude 0 all but autocontrast and equalize leave an image as it is.
    """

    def __init__(self, ops: int, magnitude: float):
        """Takes the changes per image and their strength, 0 to 10."""
        self.ops, self.strength = ops, magnitude / STRONGEST

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        """Returns the examples, changed.

        Args:
            examples: 'image' uint8 [B, H, W, C] with one or three channels, and what else there is.
            uniform: draws two numbers a row and change.
        """
        draw_BK = uniform(2 * self.ops)
        chosen = (draw_BK[:, : self.ops] * len(CHANGES)).astype(np.int64).tolist()
        strength = np.where(draw_BK[:, self.ops :] < 0.5, -self.strength, self.strength).tolist()
        out_BHWC = np.empty_like(examples['image'])
        for row, image_HWC in enumerate(examples['image']):
            image = pillow(image_HWC)
            for change, amount in zip(chosen[row], strength[row], strict=True):
                image = CHANGES[change](image, amount)
            out_BHWC[row] = np.asarray(image).reshape(image_HWC.shape)
        return {**examples, 'image': out_BHWC}


# ---- Each change: an image and a strength in [-1, 1] -> an image of the same size and mode ----


def identity(image: Image.Image, strength: float) -> Image.Image:
    """Changes nothing."""
    return image


def autocontrast(image: Image.Image, strength: float) -> Image.Image:
    """Stretches each channel so that its darkest pixel is 0 and its brightest 255."""
    low_C, high_C = np.array(image.getextrema(), np.float32).reshape(-1, 2).T
    flat_C = high_C == low_C
    scale_C = np.where(flat_C, 1, 255 / np.maximum(high_C - low_C, 1))
    return per_level(image, (LEVELS[:, None] - np.where(flat_C, 0, low_C)) * scale_C)


def equalize(image: Image.Image, strength: float) -> Image.Image:
    """Makes the levels of each channel about equally frequent; as Pillow rounds it."""
    tables = []
    for count in np.array(image.histogram()).reshape(-1, 256):
        step = (count.sum() - count[np.nonzero(count)[0][-1]]) // 255
        below = np.cumsum(count) - count
        tables.append((below + step // 2) // step if step else LEVELS)
    return per_level(image, np.stack(tables, -1))


def solarize(image: Image.Image, strength: float) -> Image.Image:
    """Inverts the levels from a threshold on, the lower the stronger."""
    kept = 256 - 256 * abs(strength) > LEVELS
    return per_level(image, np.where(kept, LEVELS, 255 - LEVELS))


def posterize(image: Image.Image, strength: float) -> Image.Image:
    """Clears the lowest bits of each level."""
    step = 2 ** round(BITS * abs(strength))
    return per_level(image, LEVELS // step * step)


def brightness(image: Image.Image, strength: float) -> Image.Image:
    """Moves levels away from black, or towards it."""
    return per_level(image, LEVELS * (1 + BLEND * strength))


def contrast(image: Image.Image, strength: float) -> Image.Image:
    """Moves levels away from the image's mean grey, or towards it."""
    count = np.array(image.convert('L').histogram())
    mean = np.round((count * LEVELS).sum() / count.sum())
    return per_level(image, mean + (LEVELS - mean) * (1 + BLEND * strength))


def color(image: Image.Image, strength: float) -> Image.Image:
    """Moves pixels away from their own grey, or towards it."""
    if image.mode == 'L':
        return image
    return Image.blend(image.convert('L').convert(image.mode), image, 1 + BLEND * strength)


def sharpness(image: Image.Image, strength: float) -> Image.Image:
    """Moves pixels away from their smoothed neighbourhood, or towards it."""
    return Image.blend(image.filter(ImageFilter.SMOOTH), image, 1 + BLEND * strength)


def rotate(image: Image.Image, strength: float) -> Image.Image:
    """Turns the image about its centre."""
    angle = math.radians(DEGREES * strength)
    return affine(image, math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle))


def shear_x(image: Image.Image, strength: float) -> Image.Image:
    """Slants the image sideways."""
    return affine(image, 1, SHEAR * strength, 0, 1)


def shear_y(image: Image.Image, strength: float) -> Image.Image:
    """Slants the image up or down."""
    return affine(image, 1, 0, SHEAR * strength, 1)


def translate_x(image: Image.Image, strength: float) -> Image.Image:
    """Moves the image sideways by whole pixels."""
    pixels = round(TRANSLATE * strength * image.width)
    return image.crop((pixels, 0, pixels + image.width, image.height))


def translate_y(image: Image.Image, strength: float) -> Image.Image:
    """Moves the image up or down by whole pixels."""
    pixels = round(TRANSLATE * strength * image.height)
    return image.crop((0, pixels, image.width, pixels + image.height))


CHANGES: tuple[Change, ...] = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize, contrast, brightness,
    sharpness, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


# ---- What they are made of ----

LEVELS = np.arange(256)


def per_level(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Looks each pixel up in a table [256] or [256, C], rounded and clipped."""
    table = np.minimum(np.maximum(np.rint(table), 0), 255).astype(np.uint8)
    if image.mode == 'L':  # Faster than Pillow's `point` for a small image.
        return Image.frombytes('L', image.size, image.tobytes().translate(table.tobytes()))
    if table.ndim == 1:
        table = np.repeat(table[:, None], len(image.getbands()), 1)
    return image.point(table.T.ravel().tolist())


def affine(image: Image.Image, a: float, b: float, d: float, e: float) -> Image.Image:
    """Returns the image whose point (x, y), from the centre, is the old (a x + b y, d x + e y)."""
    x, y = image.width / 2, image.height / 2
    matrix = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
