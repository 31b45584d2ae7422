"""What a data set says of itself, and the folder where prepared data is kept."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of a data set, for the start-up summary.

    Attributes:
        name: how the user names it: `digits`, `tfds:fashion_mnist`, `idx:DIR`.
        description: one or two sentences on what it is.
        license: terms of the data, or 'not stated'.
        citation: where it comes from.
        path: where its prepared or original files lie; '' where a package holds them.
        sizes: examples in each split, or tokens for language modelling.
        unit: what `sizes` counts.
        notes: what was noticed in it that a person should know, such as empty texts.
    """

    name: str
    description: str
    license: str = 'not stated'
    citation: str = ''
    path: str = ''
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    unit: str = 'examples'
    notes: tuple[str, ...] = ()


def prepared(data_dir: str | os.PathLike, name: str, write: Callable[[Path], None]) -> Path:
    """Returns the folder `name` under `data_dir`, made by `write(folder)` if it is not there.

    The folder appears whole or not at all, so that a killed or a concurrent run leaves no half of
    it behind.

    Raises:
        UsageError: `data_dir` cannot be written.
    """
    root = Path(data_dir).expanduser()
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.incomplete-') as scratch:
            made = Path(scratch) / 'made'
            made.mkdir()
            write(made)
            try:
                made.rename(folder)
            except OSError:
                # Another process was faster; its folder holds the same.
                if not folder.is_dir():
                    raise
    except OSError as error:
        if not str(error.filename).startswith(str(root)):
            raise
        raise UsageError(
            f'--data_dir={data_dir}: cannot be written ({error.strerror}); '
            'name a folder where prepared data may be kept'
        ) from error
    return folder


def save_json(path: Path, value: object) -> None:
    """Writes `value` as JSON text."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding='utf-8')


def saved_card(
    saved: dict, *, sizes: dict[str, int], notes: Iterable[str] = (), unit: str = 'examples'
) -> Card:
    """Returns a card that was saved as a dict, with what is known of it now; notes are added."""
    notes = (*saved.get('notes', ()), *notes)
    return Card(**{**saved, 'sizes': sizes, 'notes': notes, 'unit': unit})


def load_json(path: Path) -> dict:
    """Reads what `save_json` wrote."""
    return json.loads(path.read_text(encoding='utf-8'))


class MappedArray:
    """An array in an .npy file, mapped into memory; pickling it sends the path, not the data."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.array = np.asarray(np.load(self.path, mmap_mode='r'))

    def __reduce__(self):
        return MappedArray, (self.path,)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[index]
