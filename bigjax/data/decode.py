"""One encoded image (JPEG, PNG, …): decoded, cut and resized when it is asked for, with Pillow."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bigjax.experiment import UsageError

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
# A JPEG is decoded at a half, a quarter or an eighth where that leaves so many times the pixels.
DRAFT = 2.0

Box = tuple[float, float, float, float]


class Encoded:
    """One image in a file or in memory; its header is read at once, its pixels when needed."""

    def __init__(self, source: str | bytes, *, channels: int, name: str):
        """Opens the image.

        Args:
            source: path, or the bytes of a file.
            channels: 1, 3 or 4, to which it is converted.
            name: flag and place, for messages.

        Raises:
            UsageError: it is not there, or not an image.
        """
        self.mode, self.name = MODES[channels], name
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            self.image = Image.open(io.BytesIO(data))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise self.damaged(error) from error

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image.height, self.image.width

    def pixels(self) -> np.ndarray:
        """Returns the whole image, uint8 [H, W, C]."""
        return self.crop((0, 0, *self.size), self.size)

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Returns the part `box` (top, left, height, width) resized, uint8 [*size, C].

        Once only: a JPEG is decoded no larger than this part of it asks for.
        """
        top, left, height, width = box
        try:
            with self.image as image:
                before = image.size
                image.draft(
                    self.mode,
                    (
                        round(DRAFT * before[0] * size[1] / width),
                        round(DRAFT * before[1] * size[0] / height),
                    ),
                )
                down, across = image.height / before[1], image.width / before[0]
                box = (top * down, left * across, height * down, width * across)
                decoded = image if image.mode == self.mode else image.convert(self.mode)
                return resized(decoded, box, size)
        except (OSError, SyntaxError, EOFError) as error:
            raise self.damaged(error) from error

    def centre(self, size: tuple[int, int], share: float = 1.0) -> np.ndarray:
        """Returns the largest centre crop of the aspect of `size`, times `share`, resized."""
        return self.crop(centre_box(self.size, size, share), size)

    def damaged(self, error: Exception) -> UsageError:
        """Returns the error that names this image."""
        return UsageError(
            f'{self.name} is not a readable image ({type(error).__name__}); replace or remove it'
        )


def centre_box(own: tuple[int, int], size: tuple[int, int], share: float) -> Box:
    """Returns (top, left, height, width) of the centre crop of an image [*own] for [*size]."""
    scale = share * min(own[0] / size[0], own[1] / size[1])
    height, width = scale * size[0], scale * size[1]
    return (own[0] - height) / 2, (own[1] - width) / 2, height, width


def resized(image: Image.Image | np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Returns a part of an image, resized by antialiased bilinear, uint8 [*size, C].

    Args:
        image: a decoded image, or uint8 [H, W, C].
        box: top, left, height, width; fractions of pixels are honoured.
        size: (H, W).
    """
    if isinstance(image, np.ndarray):
        image = pillow(image)
    top, left, height, width = box
    if (top, left, height, width) != (0, 0, *size) or size != (image.height, image.width):
        corners = (left, top, left + width, top + height)
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=corners)
    return np.asarray(image).reshape(*size, -1)


def pillow(image_HWC: np.ndarray) -> Image.Image:
    """Returns uint8 pixels of one, three or four channels as a Pillow image."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
