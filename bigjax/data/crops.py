"""Random resized crops: training images show parts of themselves, at many scales and aspects."""

import math

import numpy as np

from bigjax.data.decode import resized
from bigjax.data.pipeline import Examples, Uniform

# A part of a drawn area and aspect may not fit into the image; so many are drawn in all.
ATTEMPTS = 10
ASPECTS = (3 / 4, 4 / 3)


class RandomCrop:
    """Cuts a part of random area and aspect out of each image and resizes it (Inception's crop).

    The part's share of the image's area is uniform between `least` and 1, its aspect log-uniform
    between 3/4 and 4/3, its place uniform; one that does not fit is drawn again, and the tenth
    time the largest centre crop of an allowed aspect is taken. Szegedy et al. 2014, "Going deeper
    with convolutions", section 6, with the resampling of what does not fit that torchvision has.
    """

    def __init__(self, size: tuple[int, int], least: float = 0.08):
        self.size, self.least = size, least

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        """Returns the examples with 'image' uint8 [B, *size, C].

        Args:
            examples: 'image' uint8 [B, H, W, C] or [B] of `Encoded`, and what else there is.
            uniform: draws 22 numbers a row.
        """
        images = examples['image']
        own_B2 = (
            np.array([image.size for image in images])
            if images.dtype == object
            else np.tile(images.shape[1:3], (len(images), 1))
        )
        box_B4 = boxes(own_B2, uniform(2 * ATTEMPTS + 2), self.least)
        rows = [
            image.crop(box, self.size) if images.dtype == object else resized(image, box, self.size)
            for image, box in zip(images, map(tuple, box_B4.tolist()), strict=True)
        ]
        return {**examples, 'image': np.stack(rows)}


def boxes(own_B2: np.ndarray, draw_BK: np.ndarray, least: float) -> np.ndarray:
    """Returns the (top, left, height, width) of each row's part, int64 [B, 4].

    Args:
        own_B2: height and width of the images.
        draw_BK: uniform in [0, 1); K = 2 * ATTEMPTS + 2.
        least: smallest share of the area.
    """
    rows = np.arange(len(own_B2))
    area_B1 = own_B2.prod(1, dtype=np.float64)[:, None]
    part_BT = area_B1 * (least + (1 - least) * draw_BK[:, :ATTEMPTS])
    low, high = map(math.log, ASPECTS)
    aspect_BT = np.exp(low + (high - low) * draw_BK[:, ATTEMPTS : 2 * ATTEMPTS])
    sides_BT2 = np.round(np.sqrt(np.stack([part_BT / aspect_BT, part_BT * aspect_BT], -1)))
    fits_BT = ((sides_BT2 >= 1) & (sides_BT2 <= own_B2[:, None])).all(-1)
    sides_B2 = sides_BT2[rows, fits_BT.argmax(1)]

    height_B, width_B = own_B2.T
    largest_B2 = np.stack(
        [
            np.minimum(height_B, np.round(width_B / ASPECTS[0])),
            np.minimum(width_B, np.round(height_B * ASPECTS[1])),
        ],
        -1,
    )
    fits_B1 = fits_BT.any(1)[:, None]
    sides_B2 = np.where(fits_B1, sides_B2, largest_B2).astype(np.int64)
    room_B2 = own_B2 - sides_B2
    drawn_B2 = (draw_BK[:, 2 * ATTEMPTS :] * (room_B2 + 1)).astype(np.int64)
    return np.concatenate([np.where(fits_B1, drawn_B2, room_B2 // 2), sides_B2], 1)
