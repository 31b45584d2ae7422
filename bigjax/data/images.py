"""Image classification: digits, the MNIST family's files, folders of images, TFDS sets.

Images stay uint8 up to the device (a quarter of the bytes to gather and to send); the model's
input is `(image - mean) / std` in float32, with `mean` and `std` of the training set.
"""

import dataclasses
import functools
import os

import numpy as np

from bigjax.data.card import Card
from bigjax.data.framed import OWN_SHAPE, Frame, framed_arrays
from bigjax.data.pipeline import ArrayRecords, Records
from bigjax.experiment import UsageError

# The statistics are those of at most so many training images, evenly spaced: arrays, and images
# that must first be decoded.
STATISTICS_IMAGES = 10_000
STATISTICS_DECODED = 1_000


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images in two splits; examples are 'image' uint8 [B, H, W, C], 'label' int32 [B].

    Attributes:
        train: training records; with `Frame.whole`, images that are still to be cropped.
        test: held-out records.
        class_names: the name of each label.
        image_shape: (H, W, C).
        card: description.
    """

    train: Records
    test: Records
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    card: Card

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the training pixels, each float32 [C], in 0 .. 255."""
        size = len(self.train)
        decoded = self.train.take(np.zeros(1, np.int64))['image'].dtype == object
        most = STATISTICS_DECODED if decoded else STATISTICS_IMAGES
        chosen = np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
        total = squares = np.zeros(self.image_shape[-1])
        count = 0
        for part in np.array_split(chosen, -(-len(chosen) // 256)):
            images = self.train.take(part)['image']
            if decoded:
                images = np.stack([image.centre(self.image_shape[:2]) for image in images])
            pixels = images.astype(np.float64)
            total = total + pixels.sum((0, 1, 2))
            squares = squares + (pixels**2).sum((0, 1, 2))
            count += pixels[..., 0].size
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
        return mean.astype(np.float32), std.astype(np.float32)


def open_images(dataset: str, *, data_dir: str, frame: Frame = OWN_SHAPE) -> ImageData:
    """Returns the images named by `--dataset`.

    Args:
        dataset: 'digits', 'tfds:NAME', 'idx:DIR', 'images:DIR', or 'blank:CLASSES' for black
            ones, 224 pixels wide where nothing else is said.
        data_dir: where prepared data is kept.
        frame: how they are brought to one shape.

    Raises:
        UsageError: no such source, nothing there, or damaged files.
    """
    prefix, _, rest = dataset.partition(':')
    data_dir, path = os.path.expanduser(data_dir), os.path.expanduser(rest)
    if dataset == 'digits':
        return framed(open_digits(), frame)
    if prefix == 'blank' and rest:
        from bigjax.data.blank import blank_images

        return blank_images(rest, side=frame.size, channels=frame.channels)
    if prefix == 'idx' and rest:
        from bigjax.data.idx import open_idx

        return framed(open_idx(path, data_dir=data_dir), frame)
    if prefix == 'images' and rest:
        from bigjax.data.folders import open_folders

        return open_folders(path, data_dir=data_dir, frame=frame)
    if prefix == 'tfds' and rest:
        from bigjax.data.prepared_tfds import open_tfds_images

        return open_tfds_images(rest, data_dir=data_dir, frame=frame)
    raise UsageError(
        f'--dataset={dataset}: no such source of images; there are digits, tfds:NAME, idx:DIR and '
        'images:DIR; try --dataset=digits'
    )


def framed(data: ImageData, frame: Frame) -> ImageData:
    """Returns data that is in memory in the frame that is asked for."""
    splits = {'train': data.train, 'test': data.test}
    found, shape = framed_arrays(splits, data.image_shape, frame)
    return dataclasses.replace(data, train=found['train'], test=found['test'], image_shape=shape)


def open_digits() -> ImageData:
    """Returns scikit-learn's 1,797 handwritten digits, 8 x 8; every fifth is a test image."""
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    # 0 .. 16 spread over 0 .. 255, as in every other source.
    image_NHWC = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    label_N = bunch.target.astype(np.int32)
    held_out = np.arange(len(label_N)) % 5 == 4
    train, test = (
        ArrayRecords({'image': image_NHWC[rows], 'label': label_N[rows]})
        for rows in (~held_out, held_out)
    )
    card = Card(
        name='digits',
        description='Handwritten digits, 8 x 8 grey levels; every fifth image is held out.',
        license='CC BY 4.0',
        citation='E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI, 1998.',
        sizes={'train': len(train), 'test': len(test)},
    )
    names = tuple(str(name) for name in bunch.target_names)
    return ImageData(train, test, names, image_NHWC.shape[1:], card)
