"""Augmentation of images in numpy, a whole batch at a time.

Each function takes the examples and `uniform`, from which alone it draws; see
`bigjax.data.pipeline.train_batches`.
"""

import numpy as np

from bigjax.data.pipeline import Augment, Examples, Uniform


def chain(*steps: Augment) -> Augment:
    """Returns the augmentation that applies `steps` in order."""
    return Chain(steps)


class Chain:
    """Augmentations one after the other; a class so that worker processes can unpickle it."""

    def __init__(self, steps: tuple[Augment, ...]):
        self.steps = steps

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        for step in self.steps:
            examples = step(examples, uniform)
        return examples


def flip(examples: Examples, uniform: Uniform) -> Examples:
    """Mirrors each image left to right with probability 1/2.

    Args:
        examples: 'image' [B, H, W, C], and what else there is.
        uniform: draws one number a row.
    """
    image_BHWC = examples['image']
    mirrored_B = uniform(1)[:, 0] < 0.5
    out_BHWC = image_BHWC.copy()
    out_BHWC[mirrored_B] = image_BHWC[mirrored_B, :, ::-1]
    return {**examples, 'image': out_BHWC}


class Shift:
    """Pads each image with zeros by `pixels` on all sides and crops it back at a random place.

    Krizhevsky, "Convolutional deep belief networks on CIFAR-10", 2010; He et al., 2015, section
    4.2 use 4 pixels on 32 x 32 images.
    """

    def __init__(self, pixels: int):
        self.pixels = pixels

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        image_BHWC = examples['image']
        rows, height, width, _ = image_BHWC.shape
        pad = self.pixels
        padded = np.pad(image_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        # All crops as a view without copying; one gather then takes each row's own.
        crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
        offset_B2 = (uniform(2) * (2 * pad + 1)).astype(np.int64)
        chosen_BCHW = crops[np.arange(rows), offset_B2[:, 0], offset_B2[:, 1]]
        return {**examples, 'image': np.ascontiguousarray(np.moveaxis(chosen_BCHW, 1, -1))}
