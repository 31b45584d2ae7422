"""TFDS sets, read from the ArrayRecord files under the data folder, without TensorFlow."""

import dataclasses
from collections.abc import Callable

import tensorflow_datasets as tfds

from bigjax.data.card import Card
from bigjax.data.decode import Encoded
from bigjax.data.framed import Frame, framed_files
from bigjax.data.images import ImageData
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


def labelled_splits(
    builder: tfds.core.DatasetBuilder, first: Callable[[str], int]
) -> tuple[str, ...]:
    """Returns the held-out splits that have labels: ImageNet's test images, for one, have -1.

    Args:
        builder: the set.
        first: the label of the first record of a split.
    """
    return tuple(
        split
        for split in HELD_OUT
        if split in builder.info.splits
        and builder.info.splits[split].num_examples
        and first(split) >= 0
    )


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
    """Encoded images of a TFDS split; opened anew where unpickled."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, image: str, label: str):
        self.arguments = (builder, split, image, label)
        self.builder, self.split, self.image, self.label = self.arguments
        undecoded = {image: tfds.decode.SkipDecoding()}
        self.source = builder.as_data_source(split=split, decoders=undecoded)

    def __reduce__(self):
        return TfdsImages, self.arguments

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int, channels: int) -> tuple[Encoded, int]:
        """Returns one image and its label."""
        name = f'--dataset=tfds:{self.builder.name}: record {index} of {self.split}'
        try:
            example = self.source[index]
        except Exception as error:  # whatever a parser raises on damaged bytes
            raise UsageError(
                f'{name} in {self.builder.data_path} cannot be read '
                f'({type(error).__name__}: {error})'
            ) from error
        image = Encoded(bytes(example[self.image]), channels=channels, name=name)
        return image, int(example[self.label])


def open_tfds_images(name: str, *, data_dir: str, frame: Frame) -> ImageData:
    """Returns a TFDS image classification set; without a test split a fifth of train is held out.

    Raises:
        UsageError: the set is not there, or has no image or no class label.
    """
    builder = open_builder(name, data_dir=data_dir)
    flag = f'--dataset=tfds:{name}'
    image = feature_of(builder, tfds.features.Image, flag)
    label = feature_of(builder, tfds.features.ClassLabel, flag)
    held_out = labelled_splits(
        builder, lambda split: TfdsImages(builder, split, image, label).open(0, 3)[1]
    )
    splits = chosen_splits(builder, held_out=held_out, percent=20)
    sources = {
        split: TfdsImages(builder, chosen, image, label)
        for split, chosen in zip(('train', 'test'), splits, strict=True)
    }
    sizes = {split: len(part) for split, part in sources.items()}
    if not all(sizes.values()):
        raise UsageError(f'{flag}: a split is empty: {sizes}')
    channels = frame.channels or builder.info.features[image].shape[-1] or 3
    size = (frame.size,) * 2 if frame.size else sources['train'].open(0, channels)[0].size
    shape = (*size, channels)
    key = f'tfds-{builder.info.full_name.replace("/", "-")}'
    records = framed_files(sources, shape, frame, data_dir=data_dir, name=key)
    card = dataclasses.replace(tfds_card(builder, name), sizes=sizes)
    names = tuple(builder.info.features[label].names)
    return ImageData(records['train'], records['test'], names, shape, card)
