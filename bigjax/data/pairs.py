"""Texts in pairs, a source and its target: message catalogues, the user's CSV files, TFDS sets."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint
from bigjax.data.csv_rows import Rows, first_text, read_csv
from bigjax.data.user_files import file_stats, hold_out, named_files, try_instead
from bigjax.experiment import UsageError

# Installed packages whose catalogues are read; {} is a language as JupyterLab spells it.
PACKAGES = ('django', 'jupyterlab_language_pack_{}')
JUPYTER = {'zh': 'zh_CN'}
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of texts in two splits.

    Attributes:
        train: (source, target) texts.
        test: held-out ones; no source is in both.
        card: description, without sizes; its notes say what was left out.
    """

    train: list[Pair]
    test: list[Pair]
    card: Card


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Pairs of texts, not read until asked for.

    Attributes:
        key: names exactly these texts in cache paths.
        read: returns them.
    """

    key: str
    read: Callable[[], Pairs]


def open_pairs(
    dataset: str, *, data_dir: str, source_column: str, target_column: str, test_file: str
) -> PairSource:
    """Returns the source named by `--dataset`: 'catalogues:LANG', 'csv:FILE' or 'tfds:NAME'."""
    prefix, _, rest = dataset.partition(':')
    if prefix == 'catalogues' and rest:
        return catalogue_pairs(rest, data_dir=data_dir)
    columns = {'source_column': source_column, 'target_column': target_column}
    if prefix == 'csv' and rest:
        return csv_pairs(rest, test_file, columns)
    if prefix == 'tfds' and rest:
        return tfds_pairs(rest, columns, data_dir=data_dir)
    raise UsageError(
        f'--dataset={dataset}: no such source of pairs; there are catalogues:LANG (such as de), '
        'csv:FILE and tfds:NAME; ' + try_instead(dataset, 'csv', 'catalogues:zh')
    )


def catalogue_pairs(language: str, *, data_dir: str) -> PairSource:
    """Returns messages of Django and, where installed, JupyterLab's language pack, from English."""
    from bigjax.data.catalogues import catalogue_files, package_root

    territory = JUPYTER.get(language, f'{language}_{language.upper()}')
    packages = [package.format(territory) for package in PACKAGES]
    packages = [packages[0], *(p for p in packages[1:] if importlib.util.find_spec(p))]
    files = {p: catalogue_files(package_root(p), language) for p in packages}
    if not files['django']:
        raise UsageError(
            f'--dataset=catalogues:{language}: Django has no messages in it; name a folder of '
            'django/conf/locale; try --dataset=catalogues:zh'
        )
    versions = [f'{p}_{importlib.metadata.version(p)}' for p in packages]
    key = re.sub(r'\W', '_', '-'.join([language, *versions]))

    def read() -> Pairs:
        from bigjax.data import builders
        from bigjax.data.catalogues import read_translations

        paths = [path for part in files.values() for path in part]
        config = builders.CataloguesConfig(name=key, files=paths)
        builder = builders.build(builders.CataloguePairs, config, data_dir=data_dir)
        train, test = (
            [(row['source'].decode(), row['target'].decode()) for row in rows]
            for rows in map(builder.as_data_source, ('train', 'test'))
        )
        card = Card(
            name=f'catalogues:{language}',
            description=f'English messages of {", ".join(versions)} with their translations.',
            license=builder.info.redistribution_info.license,
            citation=builder.info.citation,
            path=str(builder.data_path),
            notes=_noted(read_translations(paths).left_out),
        )
        return Pairs(train, test, card)

    return PairSource(f'catalogues-{key}', read)


def csv_pairs(path: str, test_path: str, columns: dict[str, str]) -> PairSource:
    """Returns two columns of a CSV file; a tenth of its sources is held out unless a file is.

    Args:
        path: the file.
        test_path: a file of held-out pairs, or ''.
        columns: names of the columns by knob: source_column and target_column.
    """
    files = named_files(f'csv:{path}', path, test_path)
    stats = file_stats(files.values())

    def read() -> Pairs:
        left_out = {'empty': 0, 'doubles': 0, 'of the test file': 0}
        parts = []
        for flag, name in files.items():
            parts.append(_usable(read_csv(name, columns, flag=flag), left_out))
            if not parts[-1]:
                both = ' and '.join(columns.values())
                raise UsageError(f'{flag}: no row has text in both {both}')
        if not test_path:
            parts = list(hold_out(parts[0], first_text, f'csv:{path}', add='rows'))
        train, test = parts
        held_out = {row[0] for _, row in test}
        kept = [row for row in train if row[1][0] not in held_out]
        left_out['of the test file'] += len(train) - len(kept)
        if not kept:
            raise UsageError(f'--test_file={test_path}: holds every source of {path}')
        card = Card(
            name=f'csv:{path}',
            description=f'Pairs of {" and ".join(columns.values())}.',
            path=stats[0][0],
            notes=_noted(left_out),
        )
        return Pairs(_texts(kept), _texts(test), card)

    return PairSource(f'csv-{fingerprint([*columns.items(), *stats])}', read)


def _usable(rows: Rows, left_out: dict[str, int]) -> Rows:
    """Returns the rows with two texts in them, none of them twice, and counts the others."""
    seen, usable = set(), []
    for line, texts in rows:
        source, target = (text.strip() for text in texts)
        if not source or not target:
            left_out['empty'] += 1
        elif (source, target) in seen:
            left_out['doubles'] += 1
        else:
            seen.add((source, target))
            usable.append((line, [source, target]))
    return usable


def tfds_pairs(name: str, columns: dict[str, str], *, data_dir: str) -> PairSource:
    """Returns two texts of a TFDS set; of one with translations, `columns` are languages."""
    from bigjax.data import prepared_tfds

    flag = f'--dataset=tfds:{name}'
    builder = prepared_tfds.open_builder(name, data_dir=data_dir)
    for knob, column in columns.items():
        if column not in builder.info.features:
            names = sorted(builder.info.features)
            raise UsageError(
                f'--{knob}={column}: {flag} has no such feature; it has {", ".join(names)}; '
                f'try --{knob}={names[0]}'
            )
    splits = prepared_tfds.chosen_splits(builder, held_out=prepared_tfds.HELD_OUT, percent=10)

    def read() -> Pairs:
        left_out = {'empty': 0, 'doubles': 0, 'of the test split': 0}
        train, test = (
            _usable(
                [(n, [row[c].decode() for c in columns.values()]) for n, row in enumerate(rows)],
                left_out,
            )
            for rows in (builder.as_data_source(split=split) for split in splits)
        )
        held_out = {row[0] for _, row in test}
        kept = [row for row in train if row[1][0] not in held_out]
        left_out['of the test split'] += len(train) - len(kept)
        if not kept or not test:
            raise UsageError(f'{flag}: a split is empty: {len(kept)} and {len(test)} pairs')
        card = dataclasses.replace(prepared_tfds.tfds_card(builder, name), notes=_noted(left_out))
        return Pairs(_texts(kept), _texts(test), card)

    digest = hashlib.sha256('\0'.join(columns.values()).encode()).hexdigest()[:10]
    return PairSource(f'tfds-{builder.info.full_name.replace("/", "-")}-{digest}', read)


def _texts(rows: Rows) -> list[Pair]:
    return [(row[0], row[1]) for _, row in rows]


def _noted(left_out: dict[str, int]) -> tuple[str, ...]:
    return tuple(f'{count} left out: {reason}' for reason, count in left_out.items() if count)
