"""The MNIST family's own file format, plain or gzipped (yann.lecun.com/exdb/mnist)."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from bigjax.data.card import Card, MappedArray, prepared
from bigjax.data.corpora import fingerprint
from bigjax.data.images import ImageData
from bigjax.data.pipeline import ArrayRecords
from bigjax.experiment import UsageError

NAMES = {'train': 'train', 'test': 't10k'}


def open_idx(folder: str, *, data_dir: str) -> ImageData:
    """Returns the images in `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and the like.

    Raises:
        UsageError: a file is missing, truncated, or not in the format.
    """
    files = {
        (split, part): find(folder, f'{name}-{part}')
        for split, name in NAMES.items()
        for part in ('images-idx3-ubyte', 'labels-idx1-ubyte')
    }
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.values()]

    def write(made: Path) -> None:
        for (split, part), path in files.items():
            array = read_idx(path)
            if part.startswith('labels'):
                np.save(made / f'{split}-label.npy', array.astype(np.int32))
            else:
                np.save(made / f'{split}-image.npy', array[..., None])

    cache = prepared(data_dir, f'images/idx-{fingerprint(stats)}', write)
    splits = {}
    for split in NAMES:
        image, label = (MappedArray(cache / f'{split}-{part}.npy') for part in ('image', 'label'))
        if len(image) != len(label):
            raise UsageError(
                f'--dataset=idx:{folder}: {len(image)} {split} images but {len(label)} labels'
            )
        splits[split] = ArrayRecords({'image': image, 'label': label})
    classes = 1 + max(int(records.arrays['label'][:].max()) for records in splits.values())
    card = Card(
        name=f'idx:{folder}',
        description=f'{image.array.shape[1]} x {image.array.shape[2]} grey images.',
        path=os.path.abspath(folder),
        sizes={split: len(records) for split, records in splits.items()},
    )
    names = tuple(str(number) for number in range(classes))
    return ImageData(splits['train'], splits['test'], names, image.array.shape[1:], card)


def find(folder: str, name: str) -> Path:
    """Returns the file `name` or `name`.gz in `folder`."""
    for path in (Path(folder) / name, Path(folder) / f'{name}.gz'):
        if path.is_file():
            return path
    raise UsageError(
        f'--dataset=idx:{folder}: {name} (or {name}.gz) is not there; name a folder that holds '
        'the four files of the MNIST family, such as /usr/share/datasets/fashion-mnist '
        '(Debian: apt-get install dataset-fashion-mnist)'
    )


def read_idx(path: Path) -> np.ndarray:
    """Returns the array in an idx file of bytes.

    Raises:
        UsageError: the file is damaged; it is named.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise UsageError(f'{path}: damaged gzip file ({error}); copy it again') from error
    if len(data) < 4 or data[:3] != b'\0\0\x08':
        raise UsageError(f'{path}: not an idx file of bytes (it starts with {data[:4].hex()!r})')
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise UsageError(f'{path}: truncated: its header should have {start} bytes')
    shape = struct.unpack_from(f'>{dimensions}I', data, 4)
    expected = start + math.prod(shape)
    if len(data) != expected:
        rows = (len(data) - start) // max(1, math.prod(shape[1:]))
        raise UsageError(
            f'{path}: truncated or damaged: {len(data)} bytes where its header promises '
            f'{expected}; record {rows} of {shape[0]} is the first that is not whole'
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
