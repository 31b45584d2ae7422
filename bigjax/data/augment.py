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
    out_BHWC = image_BHWC.copy()
    for row in np.nonzero(uniform(1)[:, 0] < 0.5)[0].tolist():
        # Channel by channel: faster than moving pixels of three bytes.
        for channel in range(image_BHWC.shape[-1]):
            out_BHWC[row, ..., channel] = image_BHWC[row, :, ::-1, channel]
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


class Erase:
    """Fills a rectangle of noise into each image with a probability.

    Zhong et al. 2017, "Random erasing data augmentation" (arXiv:1708.04896), RE-R: the rectangle's
    share of the area is uniform in [0.02, 0.4], its aspect log-uniform in [0.3, 1 / 0.3], its place
    uniform, every value in it uniform in 0 .. 255. One that does not fit is drawn again, ten times.
    """

    AREA = (0.02, 0.4)
    ASPECT = 0.3
    ATTEMPTS = 10

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        image_BHWC = examples['image'].copy()
        _, height, width, channels = image_BHWC.shape
        draw_BK = uniform(2 * self.ATTEMPTS + 4)
        least, most = self.AREA
        area_BT = height * width * (least + (most - least) * draw_BK[:, : self.ATTEMPTS])
        aspect_BT = self.ASPECT ** (2 * draw_BK[:, self.ATTEMPTS : -4] - 1)
        high_BT = np.round(np.sqrt(area_BT / aspect_BT)).astype(np.int64)
        wide_BT = np.round(np.sqrt(area_BT * aspect_BT)).astype(np.int64)
        fits_BT = (high_BT > 0) & (high_BT < height) & (wide_BT > 0) & (wide_BT < width)
        first_B = fits_BT.argmax(1)
        erased_B = (draw_BK[:, -4] < self.probability) & fits_BT.any(1)
        for row in np.nonzero(erased_B)[0].tolist():
            high, wide = high_BT[row, first_B[row]], wide_BT[row, first_B[row]]
            top = int(draw_BK[row, -3] * (height - high + 1))
            left = int(draw_BK[row, -2] * (width - wide + 1))
            # One draw of 53 bits names a stream of as much noise as it takes.
            noise = np.random.Generator(np.random.SFC64(int(draw_BK[row, -1] * 2**53)))
            noise_HWC = noise.integers(0, 256, (high, wide, channels), np.uint8)
            image_BHWC[row, top : top + high, left : left + wide] = noise_HWC
        return {**examples, 'image': image_BHWC}
