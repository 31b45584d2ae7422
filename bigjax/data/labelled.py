"""Texts with labels: message catalogues, the user's CSV files, TFDS sets."""

import csv
import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint
from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class Texts:
    """The examples of one split, in order.

    Attributes:
        places: where each comes from, for messages.
        texts: the texts, UTF-8 where nothing else is said.
        labels: index into the class names.
    """

    places: list[str]
    texts: list[bytes]
    labels: list[int]


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
    dataset: str, *, data_dir: str, text_column: str, label_column: str, test_file: str
) -> LabelledSource:
    """Returns the source named by `--dataset`: 'catalogues', 'csv:FILE' or 'tfds:NAME'."""
    prefix, _, rest = dataset.partition(':')
    if dataset == 'catalogues' or (prefix == 'catalogues' and rest):
        return catalogue_source(rest or 'django', data_dir=data_dir)
    if prefix == 'csv' and rest:
        return csv_source(
            os.path.expanduser(rest), os.path.expanduser(test_file), text_column, label_column
        )
    if prefix == 'tfds' and rest:
        return tfds_source(rest, data_dir=data_dir)
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


def csv_source(path: str, test_path: str, text_column: str, label_column: str) -> LabelledSource:
    """Returns a CSV file with a header; a tenth of its texts is held out unless a file is given."""
    paths = [path, test_path] if test_path else [path]
    for name in paths:
        if not os.path.isfile(name):
            flag = '--dataset=csv:' if name == path else '--test_file='
            raise UsageError(f'{flag}{name}: no such file')
    stats = [(os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]

    def read() -> tuple[list[str], Texts, Texts, Card]:
        parts = [read_csv(name, [text_column, label_column]) for name in paths]
        names = class_names(row[1] for rows in parts for _, row in rows)
        number = {name: label for label, name in enumerate(names)}
        if len(parts) == 1:
            kept, out = hold_out(parts[0], path)
            parts = [kept, out]
        unseen = {row[1] for _, row in parts[1]} - {row[1] for _, row in parts[0]}
        if test_path and unseen:
            raise UsageError(
                f'--test_file={test_path}: labels that {path} has not: {", ".join(sorted(unseen))}'
            )
        train, test = (
            Texts(
                [f'{path} line {line}' for line, _ in rows],
                [text.encode() for _, (text, _) in rows],
                [number[label] for _, (_, label) in rows],
            )
            for rows in parts
        )
        card = Card(
            name=f'csv:{path}',
            description=f'Texts with {len(names)} labels.',
            path=os.path.abspath(path),
        )
        return names, train, test, card

    return LabelledSource(f'csv-{fingerprint([text_column, label_column, *stats])}', read)


def read_csv(path: str, columns: list[str]) -> list[tuple[int, list[str]]]:
    """Returns line number and the chosen columns of every row of a CSV file with a header.

    Raises:
        UsageError: the file is empty, not UTF-8 or not CSV, or a column or a value is missing.
    """
    flag = f'--dataset=csv:{path}'
    rows = []
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            places = [column_place(header, column, path) for column in columns]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(
                        f'{flag}: line {reader.line_num} has {len(row)} values where the header '
                        f'has {len(header)}; quote values that hold commas or line ends'
                    )
                rows.append((reader.line_num, [row[place] for place in places]))
    except UnicodeDecodeError as error:
        raise UsageError(f'{flag}: {where_not_utf8(path)}; save it as UTF-8') from error
    except csv.Error as error:
        raise UsageError(f'{flag}: line {reader.line_num}: {error}') from error
    if not rows:
        raise UsageError(
            f'{flag}: the file has {"a header but no rows" if header else "nothing in it"}; it '
            f'needs a header with the columns {", ".join(columns)}, and at least one row'
        )
    return rows


def column_place(header: list[str], column: str, path: str) -> int:
    """Returns where a column stands in a CSV header."""
    if not header:
        return 0  # an empty file, reported when it turns out to have no rows
    if column not in header:
        raise UsageError(
            f'--dataset=csv:{path}: no column {column!r}; the columns are {", ".join(header)}'
        )
    return header.index(column)


def where_not_utf8(path: str) -> str:
    """Returns how many lines of a file are not UTF-8, and the first of them."""
    bad = []
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                bad.append(number)
    return f'{len(bad)} lines are not UTF-8, the first is line {bad[0] if bad else "?"}'


def class_names(labels) -> list[str]:
    """Returns the distinct labels, in numerical order if all are whole numbers."""
    names = set(labels)
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def hold_out(rows: list[tuple[int, list[str]]], path: str) -> tuple[list, list]:
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


def tfds_source(name: str, *, data_dir: str) -> LabelledSource:
    """Returns a TFDS set with a text and a class label."""
    import tensorflow_datasets as tfds

    from bigjax.data import prepared_tfds

    flag = f'--dataset=tfds:{name}'
    builder = prepared_tfds.open_builder(name, data_dir=data_dir)
    text = prepared_tfds.text_feature(builder, flag)
    label = prepared_tfds.feature_of(builder, tfds.features.ClassLabel, flag)
    splits = prepared_tfds.chosen_splits(builder, held_out=prepared_tfds.HELD_OUT, percent=10)

    def read() -> tuple[list[str], Texts, Texts, Card]:
        parts = []
        for split in splits:
            rows = list(builder.as_data_source(split=split))
            parts.append(
                Texts(
                    [f'{builder.data_path} {split} record {row}' for row in range(len(rows))],
                    [row[text] for row in rows],
                    [int(row[label]) for row in rows],
                )
            )
        names = list(builder.info.features[label].names)
        train, test = parts
        return names, train, test, prepared_tfds.tfds_card(builder, name)

    return LabelledSource('tfds-' + builder.info.full_name.replace('/', '-'), read)
