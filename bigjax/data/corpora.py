"""Where running text comes from: the standard library, the user's files, a TFDS set."""

import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bigjax.data.card import Card
from bigjax.data.user_files import file_stats
from bigjax.experiment import UsageError

SKIPPED_FOLDERS = {'site-packages', 'test', 'tests', 'idle_test', 'lib2to3', '__pycache__'}
SPLITS = ('train', 'validation')
STDLIB_LICENSE = 'Python Software Foundation License Version 2'
STDLIB_CITATION = 'Python Software Foundation. The Python Standard Library.'
# What separates the documents of a set that has them.
SEPARATOR = b'\n\n'


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Running text in two splits, not read until asked for.

    Attributes:
        key: names exactly this text in cache paths.
        card: description, without sizes.
        documents: `documents(split)` yields (where it is from, bytes), in order.
    """

    key: str
    card: Card
    documents: Callable[[str], Iterator[tuple[str, bytes]]]


def open_corpus(dataset: str, *, data_dir: str) -> Corpus:
    """Returns the text named by `--dataset`: 'stdlib', 'files:GLOB' or 'tfds:NAME'.

    Raises:
        UsageError: no such source, or nothing there.
    """
    prefix, _, rest = dataset.partition(':')
    if dataset == 'stdlib':
        return stdlib_corpus(data_dir=data_dir)
    if prefix == 'files' and rest:
        return files_corpus(rest)
    if prefix == 'tfds' and rest:
        return tfds_corpus(rest, data_dir=data_dir)
    raise UsageError(
        f'--dataset={dataset}: no such source of text; there are stdlib, files:GLOB and '
        'tfds:NAME; try --dataset=stdlib'
    )


def stdlib_corpus(*, data_dir: str) -> Corpus:
    """Returns the source of the standard library of the Python that runs this.

    Files are in path order; tests, caches and installed packages are left out. Validation is the
    last tenth, cut at the file boundary nearest 90 % of the bytes.
    """
    root, splits, python, key = stdlib_files()

    def documents(split: str) -> Iterator[tuple[str, bytes]]:
        from bigjax.data import builders

        config = builders.FilesConfig(name=key, root=root, splits=splits)
        builder = builders.build(builders.StdlibText, config, data_dir=data_dir)
        for example in builder.as_data_source(split=split):
            yield example['path'].decode(), example['text']

    card = Card(
        name='stdlib',
        description=f'Source text of the standard library of {python}, '
        f'{sum(map(len, splits.values()))} files.',
        license=STDLIB_LICENSE,
        citation=STDLIB_CITATION,
        path=root,
        unit='tokens',
    )
    return Corpus(f'stdlib-{key}', card, documents)


def stdlib_files() -> tuple[str, dict[str, list[str]], str, str]:
    """Returns root, paths of each split, name of the interpreter, and a key of these very files."""
    root = sysconfig.get_path('stdlib')
    sizes = dict(sorted(python_files(root)))
    boundary = nearest_boundary(list(sizes.values()))
    paths = list(sizes)
    splits = {'train': paths[:boundary], 'validation': paths[boundary:]}
    python = f'{platform.python_implementation()}_{platform.python_version()}'.lower()
    key = f'{python.replace(".", "_")}_{fingerprint(sizes.items())}'
    return root, splits, python, key


def python_files(folder: str, prefix: str = '') -> Iterator[tuple[str, int]]:
    """Yields path below `folder` and size of every Python file that is not a test."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from python_files(entry.path, f'{prefix}{entry.name}/')
        elif entry.name.endswith('.py'):
            yield prefix + entry.name, entry.stat().st_size


def nearest_boundary(sizes: list[int]) -> int:
    """Returns how many of the leading files come nearest to 90 % of the bytes."""
    goal, seen, best = 0.9 * sum(sizes), 0, 0
    nearest = goal
    for number, size in enumerate(sizes, 1):
        seen += size
        if abs(seen - goal) < nearest:
            best, nearest = number, abs(seen - goal)
    return best


def fingerprint(values: Iterable[object]) -> str:
    """Returns ten hexadecimal digits that tell one list of values from another."""
    text = '\n'.join(repr(value) for value in values)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def files_corpus(pattern: str) -> Corpus:
    """Returns the files that match a glob, in path order, joined as they are.

    Validation is the last tenth: cut at the file boundary nearest 90 % of the bytes, or, where
    none leaves between a twentieth and a fifth, at the line end nearest it inside a file.

    Raises:
        UsageError: nothing matches, or what matches is empty.
    """
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    stats = file_stats(paths)
    sizes = [size for _, size, _ in stats]
    if not paths:
        raise UsageError(
            f'--dataset=files:{pattern}: no file matches; try a pattern such as '
            '--dataset="files:texts/**/*.txt"'
        )
    if not sum(sizes):
        raise UsageError(f'--dataset=files:{pattern}: all {len(paths)} files are empty')

    def documents(split: str) -> Iterator[tuple[str, bytes]]:
        train, validation = split_files(paths, sizes)
        for path, start, stop in train if split == 'train' else validation:
            yield path, Path(path).read_bytes()[start:stop]

    card = Card(
        name=f'files:{pattern}',
        description=f'{len(paths)} files, {sum(sizes)} bytes.',
        path=os.path.dirname(os.path.abspath(paths[0])),
        unit='tokens',
    )
    return Corpus(f'files-{fingerprint(stats)}', card, documents)


Piece = tuple[str, int, int | None]


def split_files(paths: list[str], sizes: list[int]) -> tuple[list[Piece], list[Piece]]:
    """Returns (path, first byte, end) of the training and of the validation text."""
    boundary, total = nearest_boundary(sizes), sum(sizes)
    whole: list[Piece] = [(path, 0, None) for path in paths]
    if 0.8 <= sum(sizes[:boundary]) / total <= 0.95:
        return whole[:boundary], whole[boundary:]
    # The file in which 90 % of the bytes are passed is cut at a line end.
    number, before = 0, 0
    while before + sizes[number] < 0.9 * total:
        before += sizes[number]
        number += 1
    goal = int(0.9 * total) - before
    path = paths[number]
    cut = Path(path).read_bytes().find(b'\n', goal) + 1
    if not 0 < cut < sizes[number]:
        cut = goal
    return [*whole[:number], (path, 0, cut)], [(path, cut, None), *whole[number + 1 :]]


def tfds_corpus(name: str, *, data_dir: str) -> Corpus:
    """Returns the text of a prepared TFDS set, its documents set apart by a blank line.

    Validation is the set's own 'validation' or 'test' split, else the last tenth of 'train'.

    Raises:
        UsageError: the set is not there, or has no text.
    """
    from bigjax.data import prepared_tfds

    builder = prepared_tfds.open_builder(name, data_dir=data_dir)
    feature = prepared_tfds.text_feature(builder, f'--dataset=tfds:{name}')
    held_out = ('validation', 'test')
    chosen = prepared_tfds.chosen_splits(builder, held_out=held_out, percent=10)

    def documents(split: str) -> Iterator[tuple[str, bytes]]:
        source = builder.as_data_source(split=chosen[SPLITS.index(split)])
        for number, example in enumerate(source):
            yield f'{builder.data_path} record {number}', example[feature] + SEPARATOR

    card = dataclasses.replace(prepared_tfds.tfds_card(builder, name), unit='tokens')
    return Corpus('tfds-' + builder.info.full_name.replace('/', '-'), card, documents)
