"""Texts with labels: message catalogues, the user's CSV files, TFDS sets."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint, stdlib_files
from bigjax.data.csv_labels import (
    check_labels,
    check_seen,
    class_names,
    noticed,
    noticed_held_out,
    noticed_in_both,
    with_plain_labels,
)
from bigjax.data.csv_rows import first_text, read_csv
from bigjax.data.user_files import file_stats, hold_out, named_files, try_instead
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
    """Returns the source of `--dataset`: 'catalogues', 'docstrings', 'csv:FILE' or 'tfds:NAME'."""
    prefix, _, rest = dataset.partition(':')
    if dataset == 'docstrings':
        return docstring_source(data_dir=data_dir)
    if dataset == 'catalogues' or (prefix == 'catalogues' and rest):
        return catalogue_source(rest or 'django', data_dir=data_dir)
    if prefix == 'csv' and rest:
        columns = {'text_column': text_column, 'label_column': label_column}
        if pair_column:
            columns['pair_column'] = pair_column
        return csv_source(rest, test_file, columns)
    if prefix == 'tfds' and rest:
        return tfds_source(rest, data_dir=data_dir, pair_column=pair_column)
    raise UsageError(
        f'--dataset={dataset}: no such source of labelled text; there are catalogues, '
        'docstrings, csv:FILE and tfds:NAME; ' + try_instead(dataset, 'csv', 'catalogues')
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
        names, train, test = built_texts(builder, 'language')
        card = Card(
            name=f'catalogues:{package}',
            description=f'Messages of {package} {version} in {len(names)} languages.',
            license=builder.info.redistribution_info.license,
            citation=builder.info.citation,
            path=str(builder.data_path),
        )
        return names, train, test, card

    return LabelledSource(f'catalogues-{key}', read)


def docstring_source(*, data_dir: str) -> LabelledSource:
    """Returns which module or package of the standard library a docstring is from."""
    root, splits, python, key = stdlib_files()

    def read() -> tuple[list[str], Texts, Texts, Card]:
        from bigjax.data import source_builders as sources

        config = sources.FilesConfig(name=key, root=root, splits=splits)
        about = f'Where in the standard library of {python} a docstring stands.'
        builder, card = sources.prepare(sources.DocstringOrigins, config, about, data_dir=data_dir)
        return *built_texts(builder, 'origin'), dataclasses.replace(card, name='docstrings')

    return LabelledSource(f'docstrings-{key}', read)


def built_texts(builder: Any, label: str) -> tuple[list[str], Texts, Texts]:
    """Returns class names, training and test texts of a TFDS builder of ours.

    Args:
        builder: has been prepared.
        label: the feature, a text, that is the class.
    """
    parts = [list(builder.as_data_source(split=split)) for split in ('train', 'test')]
    names = sorted({row[label].decode() for part in parts for row in part})
    number = {name: index for index, name in enumerate(names)}
    train, test = (
        Texts(
            [f'{builder.data_path} record {row}' for row in range(len(part))],
            [row['text'] for row in part],
            [number[row[label].decode()] for row in part],
        )
        for part in parts
    )
    return names, train, test


def csv_source(path: str, test_path: str, columns: dict[str, str]) -> LabelledSource:
    """Returns a CSV file with a header; a tenth of its texts is held out unless a file is given.

    Args:
        path: the file.
        test_path: a file of held-out texts, or ''.
        columns: names of the columns by knob: text_column, label_column and maybe pair_column.
    """
    files = named_files(f'csv:{path}', path, test_path)
    stats = file_stats(files.values())

    def read() -> tuple[list[str], Texts, Texts, Card]:
        parts = [read_csv(name, columns, flag=flag) for flag, name in files.items()]
        for (flag, _), rows in zip(files.items(), parts, strict=True):
            check_labels(rows, flag)
        notes = [
            note
            for name, rows in zip(files.values(), parts, strict=True)
            for note in noticed(rows, name, pair='pair_column' in columns)
        ]
        parts = [with_plain_labels(rows) for rows in parts]
        if test_path:
            check_seen(parts[1], parts[0], test_path, path)
            notes += noticed_in_both(parts[1], parts[0], test_path, path)
        else:
            parts = list(hold_out(parts[0], first_text, f'csv:{path}', add='rows'))
            notes += noticed_held_out(parts[1], parts[0], path)
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
            path=stats[0][0],
            notes=tuple(notes),
        )
        return names, train, test, card

    return LabelledSource(f'csv-{fingerprint([*columns.items(), *stats])}', read)


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
    held_out = prepared_tfds.labelled_splits(
        builder, lambda split: builder.as_data_source(split=f'{split}[:1]')[0][label]
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
