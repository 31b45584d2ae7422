"""Folders of images, one folder a class, read with Pillow."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint
from bigjax.data.decode import Encoded
from bigjax.data.framed import Frame, framed_files
from bigjax.data.images import ImageData
from bigjax.experiment import UsageError

SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm'}
GREY_MODES = {'1', 'L', 'LA', 'I', 'I;16'}
HELD_OUT_FOLDERS = ('test', 'val', 'validation')
# Files looked at to find out whether a set is in colour.
COLOUR_FILES = 256


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files with labels.

    Attributes:
        folder: where the paths start; names the set in messages.
        paths: one path an image, below `folder`.
        label: int32 [N].
    """

    folder: str
    paths: Sequence[str]
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, channels: int) -> tuple[Encoded, int]:
        """Returns one image and its label."""
        path = self.paths[index]
        name = f'--dataset=images:{self.folder}: {path}'
        whole = os.path.join(self.folder, path)
        return Encoded(whole, channels=channels, name=name), int(self.label[index])


def open_folders(folder: str, *, data_dir: str, frame: Frame) -> ImageData:
    """Returns the images below `folder`/CLASS, or `folder`/train/CLASS and `folder`/test/CLASS.

    Where there is no train folder, a fifth of each class is held out, chosen by a hash of the
    file names. 'val' and 'validation' are read as 'test'.

    Raises:
        UsageError: no folder, no classes, no images, images of different sizes, or damaged ones.
    """
    splits, names = list_images(folder)
    first = splits['train'][0][0]
    height, width, channels = image_shape(folder, [path for path, _ in splits['train']])
    size = (frame.size,) * 2 if frame.size else (height, width)
    shape = (*size, frame.channels or channels)
    sources = {
        split: ImageFiles(
            folder,
            tuple(path for path, _ in files),
            np.array([label for _, label in files], np.int32),
        )
        for split, files in splits.items()
    }
    stats = [
        (path, label, os.stat(os.path.join(folder, path)).st_mtime_ns)
        for files in splits.values()
        for path, label in files
    ]
    key = fingerprint([os.path.abspath(folder), *stats])
    records = framed_files(sources, shape, frame, data_dir=data_dir, name=f'folders-{key}')
    sizes = {split: len(part) for split, part in sources.items()}
    card = Card(
        name=f'images:{folder}',
        description=f'{len(names)} folders of images, such as {first}.',
        path=os.path.abspath(folder),
        sizes=sizes,
    )
    return ImageData(records['train'], records['test'], names, shape, card)


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
