"""Texts with labels: message catalogues, the user's CSV files, TFDS sets."""

import collections
import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint
from bigjax.data.csv_rows import Rows, read_csv
from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class Texts:
    """The examples of one split, in order.

    Attributes:
        places: where each comes from, for messages.
        texts: the texts, UTF-8 where nothing else is said.
        labels: index into the class names.
        pairs: a second text each, where examples are pairs of texts.
    """

    places: list[str]
    texts: list[bytes]
    labels: list[int]
    pairs: list[bytes] | None = None


@dataclasses.dataclass(frozen=True)
class LabelledSource:
    """Labelled texts, not read until asked for.

    Attributes:
        key: names exactly these texts in cache paths.
        read: returns the class names, the training and the test texts, and the card.
    """

    key: str
    read: Callable[[], tuple[list[str], Texts, Texts, Card]]


def open_labelled(
    dataset: str,
    *,
    data_dir: str,
    text_column: str,
    label_column: str,
    test_file: str,
    pair_column: str = '',
) -> LabelledSource:
    """Returns the source named by `--dataset`: 'catalogues', 'csv:FILE' or 'tfds:NAME'."""
    prefix, _, rest = dataset.partition(':')
    if dataset == 'catalogues' or (prefix == 'catalogues' and rest):
        return catalogue_source(rest or 'django', data_dir=data_dir)
    if prefix == 'csv' and rest:
        columns = {'text_column': text_column, 'label_column': label_column}
        if pair_column:
            columns['pair_column'] = pair_column
        return csv_source(os.path.expanduser(rest), os.path.expanduser(test_file), columns)
    if prefix == 'tfds' and rest:
        return tfds_source(rest, data_dir=data_dir, pair_column=pair_column)
    raise UsageError(
        f'--dataset={dataset}: no such source of labelled text; there are catalogues, csv:FILE '
        'and tfds:NAME; try --dataset=catalogues'
    )


def catalogue_source(package: str, *, data_dir: str) -> LabelledSource:
    """Returns which language a message of an installed package's catalogues is in."""
    from bigjax.data.catalogues import package_root

    root = package_root(package)
    version = importlib.metadata.version(package)
    key = f'{package}_{version}'.replace('.', '_')

    def read() -> tuple[list[str], Texts, Texts, Card]:
        from bigjax.data import builders

        config = builders.FilesConfig(name=key, root=root)
        builder = builders.build(builders.CatalogueLanguages, config, data_dir=data_dir)
        rows = {split: list(builder.as_data_source(split=split)) for split in ('train', 'test')}
        names = sorted({row['language'].decode() for part in rows.values() for row in part})
        number = {name: label for label, name in enumerate(names)}
        train, test = (
            Texts(
                [f'{builder.data_path} record {row}' for row in range(len(part))],
                [row['text'] for row in part],
                [number[row['language'].decode()] for row in part],
            )
            for part in rows.values()
        )
        card = Card(
            name=f'catalogues:{package}',
            description=f'Messages of {package} {version} in {len(names)} languages.',
            license=builder.info.redistribution_info.license,
            citation=builder.info.citation,
            path=str(builder.data_path),
        )
        return names, train, test, card

    return LabelledSource(f'catalogues-{key}', read)


def csv_source(path: str, test_path: str, columns: dict[str, str]) -> LabelledSource:
    """Returns a CSV file with a header; a tenth of its texts is held out unless a file is given.

    Args:
        path: the file.
        test_path: a file of held-out texts, or ''.
        columns: names of the columns by knob: text_column, label_column and maybe pair_column.
    """
    files = {f'--dataset=csv:{path}': path}
    if test_path:
        files[f'--test_file={test_path}'] = test_path
    for flag, name in files.items():
        if not os.path.isfile(name):
            raise UsageError(f'{flag}: no such file')
    stats = [
        (os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in files.values()
    ]

    def read() -> tuple[list[str], Texts, Texts, Card]:
        parts = [read_csv(name, columns, flag=flag) for flag, name in files.items()]
        for (flag, _), rows in zip(files.items(), parts, strict=True):
            check_labels(rows, flag)
        notes = [
            note
            for name, rows in zip(files.values(), parts, strict=True)
            for note in noticed(rows, name, pair='pair_column' in columns)
        ]
        if test_path:
            check_seen(parts[1], parts[0], test_path, path)
        else:
            parts = list(hold_out(parts[0], path))
        names = class_names(row[1] for rows in parts for _, row in rows)
        number = {name: label for label, name in enumerate(names)}
        train, test = (
            Texts(
                [f'{name} line {line}' for line, _ in rows],
                [row[0].encode() for _, row in rows],
                [number[row[1]] for _, row in rows],
                [row[2].encode() for _, row in rows] if 'pair_column' in columns else None,
            )
            for name, rows in zip((path, test_path or path), parts, strict=True)
        )
        card = Card(
            name=f'csv:{path}',
            description=f'Texts with {len(names)} labels.',
            path=os.path.abspath(path),
            notes=tuple(notes),
        )
        return names, train, test, card

    return LabelledSource(f'csv-{fingerprint([*columns.items(), *stats])}', read)


def check_labels(rows: Rows, flag: str) -> None:
    """Raises UsageError where a row has no label."""
    bad = [line for line, row in rows if not row[1].strip()]
    if bad:
        raise UsageError(
            f'{flag}: {len(bad)} rows have no label, the first is line {bad[0]}; label or remove '
            'them'
        )


def check_seen(test: Rows, train: Rows, test_path: str, path: str) -> None:
    """Raises UsageError where held-out rows have labels that no training row has."""
    seen = {row[1] for _, row in train}
    unseen = [(line, row[1]) for line, row in test if row[1] not in seen]
    if unseen:
        raise UsageError(
            f'--test_file={test_path}: {len(unseen)} rows have labels that {path} has not: '
            f'{", ".join(sorted({label for _, label in unseen}))}; the first is line '
            f'{unseen[0][0]}; its labels are {", ".join(class_names(seen))}'
        )


def noticed(rows: Rows, path: str, *, pair: bool) -> list[str]:
    """Returns what a person should know of the rows of a CSV file, all of which are kept."""
    notes = []
    for place, what in ((0, 'text'), (2, 'second text'))[: 2 if pair else 1]:
        empty = [line for line, row in rows if not row[place].strip()]
        if empty:
            notes.append(
                f'{path}: {len(empty)} of {len(rows)} rows have an empty {what}, the first is '
                f'line {empty[0]}'
            )
    labels = collections.defaultdict(set)
    for _, row in rows:
        labels[row[0], *row[2:]].add(row[1])
    if several := sum(len(found) > 1 for found in labels.values()):
        notes.append(f'{path}: {several} texts stand there with different labels')
    return notes


def class_names(labels: Iterable[str]) -> list[str]:
    """Returns the distinct labels, in numerical order if all are whole numbers."""
    names = set(labels)
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def hold_out(rows: Rows, path: str) -> tuple[Rows, Rows]:
    """Returns the rows that stay and a tenth, chosen by a hash of the text, that does not.

    A text that stands in several rows is on one side only.
    """
    texts = {row[0] for _, row in rows}
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(order) < 2:
        raise UsageError(
            f'--dataset=csv:{path}: it has a single text, which cannot be both learnt from and '
            'tested on; add rows, or name another file by --test_file'
        )
    out = set(order[: max(1, len(order) // 10)])
    kept = [item for item in rows if item[1][0] not in out]
    return kept, [item for item in rows if item[1][0] in out]


def tfds_source(name: str, *, data_dir: str, pair_column: str = '') -> LabelledSource:
    """Returns a TFDS set with a text and a class label; its pairs are the feature `pair_column`.

    The held-out split is the first with labels of 'test' and 'validation', which GLUE's tests, for
    one, have not; else a tenth of the training split.
    """
    import tensorflow_datasets as tfds

    from bigjax.data import prepared_tfds

    flag = f'--dataset=tfds:{name}'
    builder = prepared_tfds.open_builder(name, data_dir=data_dir)
    text = prepared_tfds.text_feature(builder, flag)
    label = prepared_tfds.feature_of(builder, tfds.features.ClassLabel, flag)
    if pair_column and pair_column not in builder.info.features:
        features = ', '.join(builder.info.features)
        raise UsageError(
            f'--pair_column={pair_column}: {name} has no such feature; it has {features}'
        )
    held_out = tuple(
        split
        for split in prepared_tfds.HELD_OUT
        if split in builder.info.splits
        and builder.as_data_source(split=f'{split}[:1]')[0][label] >= 0
    )
    splits = prepared_tfds.chosen_splits(builder, held_out=held_out, percent=10)

    def read() -> tuple[list[str], Texts, Texts, Card]:
        parts = []
        for split in splits:
            rows = list(builder.as_data_source(split=split))
            if bare := sum(row[label] < 0 for row in rows):
                raise UsageError(f'{flag}: {bare} records of {split} have no label')
            parts.append(
                Texts(
                    [f'{builder.data_path} {split} record {row}' for row in range(len(rows))],
                    [row[text] for row in rows],
                    [int(row[label]) for row in rows],
                    [row[pair_column] for row in rows] if pair_column else None,
                )
            )
        names = list(builder.info.features[label].names)
        train, test = parts
        return names, train, test, prepared_tfds.tfds_card(builder, name)

    key = 'tfds-' + builder.info.full_name.replace('/', '-')
    return LabelledSource(key + (f'-{pair_column}' if pair_column else ''), read)
