"""Files that the user names: are they there, which are they, their text, and what is held out."""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable

from bigjax.experiment import UsageError


def named_files(dataset: str, path: str, test_file: str = '') -> dict[str, str]:
    """Returns the paths of the user's files by the flag that names each, that of training first.

    Args:
        dataset: the value of `--dataset`, for messages.
        path: the file that it names.
        test_file: the value of `--test_file`; '' for none.

    Raises:
        UsageError: one is not there, or cannot be read.
    """
    files = {f'--dataset={dataset}': os.path.expanduser(path)}
    if test_file:
        files[f'--test_file={test_file}'] = os.path.expanduser(test_file)
    for flag, file in files.items():
        if os.path.isdir(file):
            raise UsageError(f'{flag}: is a folder; name a file in it')
        if not os.path.isfile(file):
            folder, name = os.path.split(file)
            readable = os.access(folder or '.', os.R_OK) and os.path.isdir(folder or '.')
            there = os.listdir(folder or '.') if readable else []
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.8)
            way_out = f'; try {flag.removesuffix(name)}{near[0]}' if near else ''
            raise UsageError(f'{flag}: no such file{way_out}')
        if not os.access(file, os.R_OK):
            raise UsageError(f'{flag}: may not be read; change its permissions')
    return files


def try_instead(dataset: str, prefix: str, default: str) -> str:
    """Returns a value of `--dataset` to try: the file it names without a prefix, or a default."""
    is_file = os.path.isfile(os.path.expanduser(dataset))
    return f'try --dataset={prefix}:{dataset}' if is_file else f'try --dataset={default}'


def listed(names: Iterable[str], *, most: int = 20) -> str:
    """Returns names with commas between them, and how many there are beyond `most`."""
    names = list(names)
    more = [f'and {len(names) - most} more'] if len(names) > most else []
    return ', '.join([*names[:most], *more])


def file_stats(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Returns what tells files from what they were before: path, bytes, time of the last change."""
    stats = [(os.path.abspath(path), os.stat(path)) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def hold_out[Item](
    items: list[Item], text: Callable[[Item], str], dataset: str, *, add: str = 'texts'
) -> tuple[list[Item], list[Item]]:
    """Returns the items that stay and those of a tenth of the texts, by a hash, that do not.

    A text that several items have is on one side only.

    Args:
        items: what to part.
        text: the text of an item.
        dataset: the value of `--dataset`, for messages.
        add: what a file that is too small needs more of.

    Raises:
        UsageError: all have the same text.
    """
    digests = [hashlib.sha256(text(item).encode()).digest() for item in items]
    order = sorted(set(digests))
    if len(order) < 2:
        raise UsageError(
            f'--dataset={dataset}: it has a single text, which cannot be both learnt from and '
            f'tested on; add {add}, or name another file by --test_file'
        )
    out = set(order[: max(1, len(order) // 10)])
    parts: tuple[list[Item], list[Item]] = [], []
    for item, digest in zip(items, digests, strict=True):
        parts[digest in out].append(item)
    return parts


def read_text(path: str, flag: str) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        UsageError: it is not, from some line on.
    """
    with open(path, 'rb') as file:
        data = file.read()
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b'\n') + 1
        raise UsageError(f'{flag}: line {line} is not UTF-8; save it as UTF-8') from error
