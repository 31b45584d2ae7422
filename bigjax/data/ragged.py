"""Sequences of different lengths in one flat array, mapped from a file."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bigjax.data.card import MappedArray


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Texts of different lengths, one after the other.

    Attributes:
        tokens: all of them, integers [n].
        ends: where each text ends in `tokens`, int64 [N].
    """

    tokens: MappedArray | np.ndarray
    ends: MappedArray | np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        """Returns the tokens of each text, int64 [N]."""
        return np.diff(self.ends[:], prepend=0)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Returns where texts begin in `tokens`, int64 [n]."""
        return np.where(indices > 0, self.ends[np.maximum(indices - 1, 0)], 0)

    def one(self, index: int) -> np.ndarray:
        """Returns the tokens of one text."""
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]]

    def rows(self, indices: np.ndarray, length: int) -> np.ndarray:
        """Returns the first `length` tokens of texts, int32 [n, length], -1 past their ends."""
        places = self.starts(indices)[:, None] + np.arange(length)[None]
        inside = places < self.ends[indices][:, None]
        tokens = self.tokens[np.where(inside, places, 0)].astype(np.int32)
        return np.where(inside, tokens, np.int32(-1))


def write_ragged(folder: Path, name: str, texts: Iterable[np.ndarray]) -> None:
    """Writes texts as `read_ragged` reads them: `NAME-tokens.npy` and `NAME-ends.npy`."""
    rows = list(texts)
    # One token more than there is, so that a set of empty texts has something to point at.
    flat = np.concatenate([*rows, np.zeros(1, rows[0].dtype)])
    np.save(folder / f'{name}-tokens.npy', flat)
    np.save(folder / f'{name}-ends.npy', np.cumsum([len(row) for row in rows], dtype=np.int64))


def read_ragged(folder: Path, name: str) -> Ragged:
    """Returns what `write_ragged` wrote."""
    return Ragged(
        MappedArray(folder / f'{name}-tokens.npy'), MappedArray(folder / f'{name}-ends.npy')
    )
