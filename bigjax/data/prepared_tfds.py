"""TFDS sets, read from the ArrayRecord files under the data folder, without TensorFlow."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from bigjax.data.card import Card
from bigjax.data.folders import decoded_once
from bigjax.data.images import CACHED_BYTES, ImageData
from bigjax.data.pipeline import Records
from bigjax.experiment import UsageError

HELD_OUT = ('test', 'validation')


def open_builder(name: str, *, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns a TFDS set that is prepared under `data_dir`.

    Nothing is fetched: a training run, on however many hosts, should not start by downloading.

    Raises:
        UsageError: TFDS has no such set, or it is not there as ArrayRecord.
    """
    flag = f'--dataset=tfds:{name}'
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UsageError(
            f'{flag}: TFDS has no set of this name and none is prepared under '
            f'--data_dir={data_dir}; its sets are listed on tensorflow.org/datasets/catalog'
        ) from error
    command = (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        "data_dir='DIR', file_format='array_record').download_and_prepare()\""
    )
    folder = name.split('/')[0].split(':')[0]
    if not builder.info.splits:
        raise UsageError(
            f'{flag}: not prepared under --data_dir={data_dir}; on a machine with a network, '
            f'and TensorFlow if the set asks for it, run\n'
            f'  {command}\nand copy DIR/{folder} to {data_dir}/{folder}'
        )
    if builder.info.file_format != tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        raise UsageError(
            f'{flag}: prepared as {builder.info.file_format.value} in {builder.data_path}, which '
            f'cannot be read by index; prepare it in a folder of its own with\n  {command}\n'
            'and name that folder by --data_dir'
        )
    return builder


def feature_of(builder: tfds.core.DatasetBuilder, kind: type, flag: str) -> str:
    """Returns the name of the first feature of a kind: Image, Text, ClassLabel."""
    for name, feature in builder.info.features.items():
        # Text is a Tensor of strings, and Image a Tensor of bytes: exact kinds only.
        if type(feature) is kind:
            return name
    names = ', '.join(f'{k} ({type(f).__name__})' for k, f in builder.info.features.items())
    raise UsageError(f'{flag}: it has no {kind.__name__} feature; it has {names}')


def text_feature(builder: tfds.core.DatasetBuilder, flag: str) -> str:
    """Returns the name of the set's text."""
    return feature_of(builder, tfds.features.Text, flag)


def chosen_splits(builder: tfds.core.DatasetBuilder, *, held_out: tuple[str, ...], percent: int):
    """Returns the training and the held-out split, the latter cut off 'train' if there is none."""
    own = next((split for split in held_out if split in builder.info.splits), None)
    if own:
        return 'train', own
    return f'train[:{100 - percent}%]', f'train[{100 - percent}%:]'


def tfds_card(builder: tfds.core.DatasetBuilder, name: str) -> Card:
    """Returns the set's own description of itself, without sizes."""
    return Card(
        name=f'tfds:{name}',
        description=' '.join((builder.info.description or '').split())[:200],
        license=builder.info.redistribution_info.license or 'not stated',
        citation=builder.info.citation or '',
        path=str(builder.data_path),
    )


class TfdsImages:
    """Records of a TFDS split, decoded when they are asked for; opened anew where unpickled."""

    def __init__(self, builder, split: str, image: str, label: str, size: int):
        self.arguments = (builder, split, image, label, size)
        self.builder, self.split, self.image, self.label, self.size = self.arguments
        self.source = builder.as_data_source(split=split)

    def __reduce__(self):
        return TfdsImages, self.arguments

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = [self.read(index) for index in indices.tolist()]
        images, labels = zip(*examples, strict=True)
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise UsageError(
                f'--dataset=tfds:{self.builder.name}: its images differ in size '
                f'({" and ".join(map(str, sorted(shapes)[:2]))}); try --image_size=224'
            )
        return {'image': np.stack(images), 'label': np.array(labels, np.int32)}

    def read(self, index: int) -> tuple[np.ndarray, int]:
        try:
            example = self.source[index]
        except Exception as error:  # whatever a decoder raises on damaged bytes
            raise UsageError(
                f'--dataset=tfds:{self.builder.name}: record {index} of {self.split} in '
                f'{self.builder.data_path} cannot be read ({type(error).__name__}: {error})'
            ) from error
        image = example[self.image]
        if self.size and image.shape[:2] != (self.size, self.size):
            from PIL import Image, ImageOps

            grey = image.shape[-1] == 1
            fitted = ImageOps.fit(
                Image.fromarray(image[..., 0] if grey else image), (self.size,) * 2
            )
            image = np.asarray(fitted).reshape(self.size, self.size, -1)
        return image, int(example[self.label])


def open_tfds_images(name: str, *, data_dir: str, image_size: int) -> ImageData:
    """Returns a TFDS image classification set; without a test split a fifth of train is held out.

    Raises:
        UsageError: the set is not there, or has no image or no class label.
    """
    builder = open_builder(name, data_dir=data_dir)
    flag = f'--dataset=tfds:{name}'
    image = feature_of(builder, tfds.features.Image, flag)
    label = feature_of(builder, tfds.features.ClassLabel, flag)
    splits = chosen_splits(builder, held_out=HELD_OUT, percent=20)
    records: Mapping[str, Records] = {
        split: TfdsImages(builder, chosen, image, label, image_size)
        for split, chosen in zip(('train', 'test'), splits, strict=True)
    }
    sizes = {split: len(part) for split, part in records.items()}
    if not all(sizes.values()):
        raise UsageError(f'{flag}: a split is empty: {sizes}')
    shape = records['train'].take(np.zeros(1, np.int64))['image'].shape[1:]
    if sum(sizes.values()) * int(np.prod(shape)) <= CACHED_BYTES:
        key = f'{builder.info.full_name.replace("/", "-")}-{image_size or "own"}'
        records = decoded_once(records, data_dir=data_dir, name=f'images/tfds-{key}')
    card = dataclasses.replace(tfds_card(builder, name), sizes=sizes)
    names = tuple(builder.info.features[label].names)
    return ImageData(records['train'], records['test'], names, shape, card)
