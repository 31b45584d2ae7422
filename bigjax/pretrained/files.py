"""Safetensors on disk: what is in them from their headers alone, and any part of a tensor.

A folder as Hugging Face writes it (config.json beside model.safetensors, or beside several files
and model.safetensors.index.json), or a single file.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bigjax.run import UsageError

# The file is mapped, and what was touched of it counts as ours until it is closed: so it is opened
# anew for every so many bytes.
PIECE = 2**20
_BYTES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
      file: the safetensors file.
      shape: its shape.
      dtype: its type as safetensors names it, such as `'BF16'`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a folder or a file, by name; nothing of them is read yet.

    Attributes:
      path: the folder or file.
      config: its config.json; empty for a single file.
      tensors: every tensor.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Stored]

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns part of a tensor in its own type; the file is closed again after it."""
        with safe_open(self.tensors[name].file, framework='numpy') as file:
            part = file.get_slice(name)
            return np.asarray(part[index] if index else file.get_tensor(name))


def open_weights(path: str) -> Weights:
    """Returns what a folder or file holds, by the headers of its safetensors files.

    Raises:
      UsageError: it is not there, is no such folder or file, or is damaged.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        files = _files(path, where)
        config = _json(path, where / 'config.json')
    elif where.is_file():
        files, config = [where], {}
    else:
        raise UsageError(
            f'--pretrained={path}: there is no such folder or file; where a model is not on this '
            f'machine yet, try: hf download NAME --local-dir {path}'
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework='numpy') as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    part = opened.get_slice(name)
                    tensors[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f'--pretrained={path}: {file.name} is no safetensors file or is damaged ({error}); '
                f'fetch it again, or write it with safetensors.torch.save_file'
            ) from error
    return Weights(where, config, tensors)


def _files(path: str, folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, all of which are there."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        found = ', '.join(sorted(file.name for file in folder.iterdir())[:8]) or 'nothing'
        raise UsageError(
            f'--pretrained={path}: holds neither {SINGLE} nor {INDEX} (but {found}); other '
            f'formats are not read: load it with transformers and write it with save_pretrained'
        )
    index = _json(path, folder / INDEX)
    files = [folder / name for name in sorted(set(index.get('weight_map', {}).values()))]
    if absent := [file.name for file in files if not file.exists()]:
        raise UsageError(
            f'--pretrained={path}: {INDEX} names {", ".join(absent)}, which '
            f'{"is" if len(absent) == 1 else "are"} not there; fetch the folder again'
        )
    return files


def _json(path: str, file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text('utf-8'))
    except (OSError, ValueError) as error:
        reason = 'is not there' if isinstance(error, FileNotFoundError) else f'is damaged: {error}'
        raise UsageError(
            f'--pretrained={path}: its {file.name} {reason}; fetch the folder again, or give the '
            f'.safetensors file itself'
        ) from error


def pieces(sizes: tuple[int, ...], wanted: Index, groups: list[int], itemsize: int) -> Iterator:
    """Cuts a block out of an array in runs that a file holds in few bytes, one after the other.

    The array's axes are grouped: `groups[n]` axes in a row are one dimension of a stored tensor.

    Args:
      sizes: size of every axis.
      wanted: the block, a slice of each.
      groups: number of axes of every stored dimension.
      itemsize: bytes of one element in the file.

    Yields:
      (the stored tensor's index, the same block as slices of the axes).
    """
    single, axis = set(), 0
    for count in groups:
        own = range(axis, axis + count)
        partial = [a for a in own if wanted[a].stop - wanted[a].start < sizes[a]]
        # Joined axes are in one run only where all behind the first range are whole.
        single |= set(own[: partial[-1] - axis]) if partial else set()
        axis += count
    steps = [1 if a in single else size for a, size in enumerate(sizes)]
    for a in range(len(sizes)):
        if a not in single:
            row = math.prod(sizes[a + 1 :]) * itemsize
            steps[a] = max(1, PIECE // row)
            if row <= PIECE:
                break

    def blocks(a: int, chosen: Index) -> Iterator[Index]:
        if a == len(sizes):
            yield chosen
            return
        for start in range(wanted[a].start, wanted[a].stop, steps[a]):
            stop = min(start + steps[a], wanted[a].stop)
            yield from blocks(a + 1, (*chosen, slice(start, stop)))

    for block in blocks(0, ()):
        index, axis = [], 0
        for count in groups:
            start, length = 0, 1
            for a in range(axis, axis + count):
                start = start * sizes[a] + block[a].start
                length *= block[a].stop - block[a].start
            # An axis behind one that is cut is whole, so that the first element starts the run.
            index.append(slice(start, start + length))
            axis += count
        yield tuple(index), block


def itemsize(stored: Stored) -> int:
    """Returns the bytes of one element; 0 for a type that no parameter is read from."""
    return _BYTES.get(stored.dtype, 0)
