"""Writing a folder as Hugging Face does: config.json, and tensors in one file or several."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bigjax.pretrained.files import INDEX, SINGLE
from bigjax.run import UsageError


def size_in_bytes(flag: str, text: str) -> int:
    """Returns the bytes that `'5GB'` or `'200MB'` says.

    Raises:
      UsageError: it is neither.
    """
    units = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if not number.isdecimal() or not int(number) or unit not in units:
        raise UsageError(
            f'--{flag}={text}: must be a whole number with KB, MB or GB; try --{flag}=5GB'
        )
    return int(number) * units[unit]


class Writer:
    """Writes tensors one by one into a folder, in as many files as `max_bytes` makes necessary.

    What one file holds is kept in memory until it is full.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], max_bytes: int) -> None:
        self._folder, self._total = folder, sum(sizes.values())
        self._shard_of: dict[str, int] = {}
        held, shard = 0, 0
        for name, size in sizes.items():
            if held and held + size > max_bytes:
                held, shard = 0, shard + 1
            held += size
            self._shard_of[name] = shard
        self._count = shard + 1
        self._held: dict[str, np.ndarray] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _name(self, shard: int) -> str:
        if self._count == 1:
            return SINGLE
        return f'model-{shard + 1:05}-of-{self._count:05}.safetensors'

    def add(self, name: str, value: np.ndarray) -> None:
        """Takes the next tensor, in the order of the sizes given before."""
        shard = self._shard_of[name]
        if self._held and self._shard_of[next(iter(self._held))] != shard:
            self._flush()
        self._held[name] = value

    def _flush(self) -> None:
        file = self._folder / self._name(self._shard_of[next(iter(self._held))])
        # Their loaders ask for this entry.
        save_file(self._held, file, metadata={'format': 'pt'})
        self._held = {}

    def finish(self, config: Mapping[str, Any]) -> None:
        """Writes the last file, the index where there are several, and config.json."""
        self._flush()
        if self._count > 1:
            names = {name: self._name(shard) for name, shard in sorted(self._shard_of.items())}
            index = {'metadata': {'total_size': self._total}, 'weight_map': names}
            _write_json(self._folder / INDEX, index)
        described = self._folder / 'config.json'
        _write_json(described, config)
        for shard in range(self._count):  # save_file lets nobody else read.
            (self._folder / self._name(shard)).chmod(described.stat().st_mode)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', 'utf-8')
