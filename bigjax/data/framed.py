"""Records of images that are brought to one shape: of arrays, and of encoded images."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from bigjax.data.card import MappedArray, prepared
from bigjax.data.decode import Encoded, centre_box, resized
from bigjax.data.pipeline import ArrayRecords, Examples, Records
from bigjax.experiment import UsageError

# Sets whose decoded images take no more than this are decoded once and mapped into memory.
CACHED_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Frame:
    """How images of any size are brought to one shape.

    Attributes:
        size: side to which images are resized; 0 keeps their own, which must be the same for all.
        channels: 1 makes them grey, 3 coloured; 0 keeps what the set has.
        share: how much of the shorter side a centre crop shows.
        whole: whether training images come uncut, for a crop to be drawn; where files are not all
            of one size, 'image' is then an array [B] of `Encoded`.
    """

    size: int = 0
    channels: int = 0
    share: float = 1.0
    whole: bool = False


OWN_SHAPE = Frame()


class Source(Protocol):
    """Encoded images with labels, by number."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def open(self, index: int, channels: int) -> tuple[Encoded, int]:
        """Returns one image and its label."""


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Records decoded when they are asked for.

    Attributes:
        source: what opens them.
        shape: (H, W, C) of every example.
        frame: how they get that shape.
    """

    source: Source
    shape: tuple[int, int, int]
    frame: Frame = OWN_SHAPE

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> Examples:
        """Returns 'image' uint8 [B, H, W, C], or an array [B] of Encoded; and 'label' int32 [B]."""
        opened = [self.source.open(index, self.shape[-1]) for index in indices.tolist()]
        labels = np.array([label for _, label in opened], np.int32)
        if not self.frame.whole:
            return {'image': np.stack([self.framed(image) for image, _ in opened]), 'label': labels}
        rows = np.empty(len(opened), object)
        rows[:] = [image for image, _ in opened]
        return {'image': rows, 'label': labels}

    def framed(self, image: Encoded) -> np.ndarray:
        """Returns the image in `shape`."""
        size = self.shape[:2]
        if not self.frame.size and image.size != size:
            raise UsageError(
                f'{image.name} is {image.size[1]} x {image.size[0]} where the first image is '
                f'{size[1]} x {size[0]}; try --image_size={min(size)}'
            )
        return image.centre(size, self.frame.share)


@dataclasses.dataclass(frozen=True)
class FramedArrays:
    """Records of images that are arrays, cut, resized and coloured when they are asked for.

    Attributes:
        records: 'image' uint8 [B, H, W, C], all of one shape; with C = 1, or the C below.
        shape: (H, W, C) that they get; or (0, 0, C) for their own height and width.
        share: how much of the shorter side a centre crop shows.
    """

    records: Records
    shape: tuple[int, int, int]
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: np.ndarray) -> Examples:
        """Returns 'image' uint8 [B, *shape], and what else there is."""
        examples = self.records.take(indices)
        image_BHWC, size = examples['image'], self.shape[:2]
        if any(size):
            box = centre_box(image_BHWC.shape[1:3], size, self.share)
            image_BHWC = np.stack([resized(image, box, size) for image in image_BHWC])
        if image_BHWC.shape[-1] < self.shape[-1]:
            image_BHWC = np.repeat(image_BHWC, self.shape[-1], -1)
        return {**examples, 'image': image_BHWC}


def framed_arrays(
    records: Mapping[str, Records], shape: tuple[int, int, int], frame: Frame
) -> tuple[dict[str, Records], tuple[int, int, int]]:
    """Returns splits of grey images [B, *shape] in `frame`, and the shape they have there.

    Nothing is wrapped that would come out as it is.
    """
    size = (frame.size,) * 2 if frame.size else shape[:2]
    channels = frame.channels or shape[-1]
    wrapped: dict[str, Records] = {}
    for split, part in records.items():
        whole = frame.whole and split == 'train'
        cut = not whole and (size != shape[:2] or frame.share < 1)
        if cut or channels != shape[-1]:
            part = FramedArrays(part, (*(size if cut else (0, 0)), channels), frame.share)
        wrapped[split] = part
    return wrapped, (*size, channels)


def framed_files(
    sources: Mapping[str, Source],
    shape: tuple[int, int, int],
    frame: Frame,
    *,
    data_dir: str,
    name: str,
) -> dict[str, Records]:
    """Returns the images of each split in `shape`: small sets decoded once, others as needed.

    Where sizes may differ, training images that a crop is still to be drawn from are not decoded
    before it is.
    """
    records: dict[str, EncodedImages] = {}
    for split, source in sources.items():
        own = frame
        if frame.whole:
            late = split == 'train' and frame.size > 0
            share = 1.0 if split == 'train' else frame.share
            own = dataclasses.replace(frame, whole=late, share=share)
        records[split] = EncodedImages(source, shape, own)
    kept = {split: part for split, part in records.items() if not part.frame.whole}
    if sum(map(len, kept.values())) * math.prod(shape) <= CACHED_BYTES:
        parts = [*kept, 'x'.join(map(str, shape)), f'{frame.share:g}', *['whole'] * frame.whole]
        name = f'images/{name}-{"-".join(parts)}'
        return {**records, **decoded_once(kept, data_dir=data_dir, name=name)}
    return dict(records)


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
