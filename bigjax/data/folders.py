"""Folders of images, one folder a class, read with Pillow."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bigjax.data.card import Card, MappedArray, prepared
from bigjax.data.corpora import fingerprint
from bigjax.data.images import CACHED_BYTES, ImageData
from bigjax.data.pipeline import ArrayRecords, Records
from bigjax.experiment import UsageError

SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm'}
GREY_MODES = {'1', 'L', 'LA', 'I', 'I;16'}
HELD_OUT_FOLDERS = ('test', 'val', 'validation')
# Files looked at to find out whether a set is in colour.
COLOUR_FILES = 256


@dataclasses.dataclass(frozen=True)
class FileImages:
    """Records read from image files when they are asked for.

    Attributes:
        folder: where the paths start; names the set in messages.
        paths: one path a record, below `folder`.
        label: int32 [N].
        shape: (H, W, C) of every image.
        resize: whether images of another size are resized and centre-cropped, or refused.
    """

    folder: str
    paths: Sequence[str]
    label: np.ndarray
    shape: tuple[int, int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices.tolist()):
            image[row] = self.read(self.paths[index])
        return {'image': image, 'label': self.label[indices]}

    def read(self, name: str) -> np.ndarray:
        """Returns one image, uint8 `shape`."""
        height, width, channels = self.shape
        path = os.path.join(self.folder, name)
        try:
            with Image.open(path) as file:
                if not self.resize and file.size != (width, height):
                    raise UsageError(
                        f'--dataset=images:{self.folder}: {name} is {file.width} x '
                        f'{file.height} where {self.paths[0]} is {width} x {height}; '
                        f'try --image_size={min(width, height)}'
                    )
                image = file.convert('L' if channels == 1 else 'RGB')
                if image.size != (width, height):
                    image = ImageOps.fit(image, (width, height))
                return np.asarray(image, np.uint8).reshape(self.shape)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise UsageError(
                f'--dataset=images:{self.folder}: {name} is not a readable image '
                f'({type(error).__name__}); replace or remove it'
            ) from error


def open_folders(folder: str, *, data_dir: str, image_size: int) -> ImageData:
    """Returns the images below `folder`/CLASS, or `folder`/train/CLASS and `folder`/test/CLASS.

    Where there is no train folder, a fifth of each class is held out, chosen by a hash of the
    file names. 'val' and 'validation' are read as 'test'.

    Raises:
        UsageError: no folder, no classes, no images, images of different sizes, or damaged ones.
    """
    splits, names = list_images(folder)
    first = splits['train'][0][0]
    height, width, channels = image_shape(folder, [path for path, _ in splits['train']])
    if image_size:
        height = width = image_size
    records: Mapping[str, Records] = {
        split: FileImages(
            folder,
            tuple(path for path, _ in files),
            np.array([label for _, label in files], np.int32),
            (height, width, channels),
            bool(image_size),
        )
        for split, files in splits.items()
    }
    sizes = {split: len(part) for split, part in records.items()}
    if sum(sizes.values()) * height * width * channels <= CACHED_BYTES:
        stats = [
            (path, label, os.stat(os.path.join(folder, path)).st_mtime_ns)
            for files in splits.values()
            for path, label in files
        ]
        shape = f'{height}x{width}x{channels}'
        key = fingerprint([os.path.abspath(folder), shape, bool(image_size), *stats])
        records = decoded_once(records, data_dir=data_dir, name=f'images/folders-{shape}-{key}')
    card = Card(
        name=f'images:{folder}',
        description=f'{len(names)} folders of images, such as {first}.',
        path=os.path.abspath(folder),
        sizes=sizes,
    )
    return ImageData(records['train'], records['test'], names, (height, width, channels), card)


def list_images(folder: str) -> tuple[dict[str, list[tuple[str, int]]], tuple[str, ...]]:
    """Returns the (path, label) of each split, and the class names."""
    if not os.path.isdir(folder):
        raise UsageError(f'--dataset=images:{folder}: no such folder')
    held_out = [name for name in HELD_OUT_FOLDERS if os.path.isdir(os.path.join(folder, name))]
    if os.path.isdir(os.path.join(folder, 'train')):
        if not held_out:
            raise UsageError(
                f'--dataset=images:{folder}: it has train but none of {", ".join(HELD_OUT_FOLDERS)}'
            )
        classes = subfolders(os.path.join(folder, 'train'))
        parts = {'train': 'train', 'test': held_out[0]}
        strange = set(subfolders(os.path.join(folder, held_out[0]))) - set(classes)
        if strange:
            raise UsageError(
                f'--dataset=images:{folder}: {held_out[0]} has classes that train has not: '
                f'{", ".join(sorted(strange))}'
            )
        splits = {
            split: [
                (f'{part}/{name}/{file}', label)
                for label, name in enumerate(classes)
                for file in image_files(os.path.join(folder, part, name))
            ]
            for split, part in parts.items()
        }
    else:
        classes = subfolders(folder)
        splits = {'train': [], 'test': []}
        for label, name in enumerate(classes):
            found = image_files(os.path.join(folder, name))
            found = sorted(found, key=lambda file: hashlib.sha256(file.encode()).digest())
            fifth = len(found) // 5
            splits['test'] += [(f'{name}/{file}', label) for file in sorted(found[:fifth])]
            splits['train'] += [(f'{name}/{file}', label) for file in sorted(found[fifth:])]
    for split, files in splits.items():
        if not files:
            raise UsageError(
                f'--dataset=images:{folder}: no images for {split}; it must hold a folder for each '
                'class with at least five images, or train/CLASS and test/CLASS'
            )
    return splits, tuple(classes)


def subfolders(folder: str) -> list[str]:
    """Returns the names of the folders in `folder`, sorted."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != '.')


def image_files(folder: str) -> list[str]:
    """Returns the names of the images in `folder`, sorted."""
    if not os.path.isdir(folder):
        return []
    names = (entry.name for entry in os.scandir(folder) if entry.is_file())
    return sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)


def image_shape(folder: str, paths: list[str]) -> tuple[int, int, int]:
    """Returns the shape of the first image; in colour if any of some evenly spaced ones is."""
    channels, sizes = 1, []
    for place in np.unique(np.linspace(0, len(paths) - 1, COLOUR_FILES).astype(np.int64)):
        try:
            with Image.open(os.path.join(folder, paths[place])) as image:
                sizes.append(image.size)
                channels = max(channels, 1 if image.mode in GREY_MODES else 3)
        except (OSError, SyntaxError) as error:
            raise UsageError(
                f'--dataset=images:{folder}: {paths[place]} is not a readable image '
                f'({type(error).__name__}); replace or remove it'
            ) from error
    width, height = sizes[0]
    return height, width, channels


def decoded_once(
    records: Mapping[str, Records], *, data_dir: str, name: str
) -> dict[str, ArrayRecords]:
    """Returns `records` decoded into files under `data_dir` and mapped into memory."""

    def write(made: Path) -> None:
        for split, part in records.items():
            columns: dict[str, np.ndarray] = {}
            for indices in np.array_split(np.arange(len(part)), -(-len(part) // 256)):
                for column, rows in part.take(indices).items():
                    if column not in columns:
                        columns[column] = np.lib.format.open_memmap(
                            made / f'{split}-{column}.npy',
                            'w+',
                            rows.dtype,
                            (len(part), *rows.shape[1:]),
                        )
                    columns[column][indices] = rows

    folder = prepared(data_dir, name, write)
    return {
        split: ArrayRecords(
            {part: MappedArray(folder / f'{split}-{part}.npy') for part in ('image', 'label')}
        )
        for split in records
    }
