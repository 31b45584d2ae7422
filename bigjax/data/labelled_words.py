"""Words with labels, read from CoNLL files, JSON lines and the standard library's source."""

import json
from collections.abc import Callable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint, stdlib_files
from bigjax.data.user_files import file_stats, hold_out, named_files, read_text, try_instead
from bigjax.experiment import UsageError

# Where a text comes from, its words, their labels.
Sentence = tuple[str, list[str], list[str]]
Read = Callable[[], tuple[list[Sentence], list[Sentence], Card]]


def open_sentences(dataset: str, test_file: str, data_dir: str) -> tuple[str, Read]:
    """Returns a key of exactly these texts, and what reads training texts, test texts and card."""
    prefix, _, rest = dataset.partition(':')
    if dataset == 'stdlib':
        return stdlib_sentences(data_dir)
    readers = {'conll': read_conll, 'jsonl': read_jsonl}
    if prefix not in readers or not rest:
        raise UsageError(
            f'--dataset={dataset}: no such source of labelled words; there are stdlib, conll:FILE '
            'and jsonl:FILE; ' + try_instead(dataset, 'conll', 'stdlib')
        )
    files = named_files(dataset, rest, test_file)
    stats = file_stats(files.values())

    def read() -> tuple[list[Sentence], list[Sentence], Card]:
        train, *others = [readers[prefix](path, flag) for flag, path in files.items()]
        if not others:
            train, *others = hold_out(train, lambda text: '\n'.join(text[1]), dataset)
        card = Card(name=dataset, description='Texts with labelled words.', path=stats[0][0])
        return train, others[0], card

    return f'{prefix}-{fingerprint(stats)}', read


def read_conll(path: str, flag: str) -> list[Sentence]:
    """Returns the texts of a CoNLL file: the first column is the word, the last one its label.

    Columns are set apart by spaces or tabs, texts by blank lines; -DOCSTART- lines are passed over.
    """
    found: list[Sentence] = []
    words: list[str] = []
    labels: list[str] = []
    begin = 1
    for number, line in enumerate([*read_text(path, flag).split('\n'), ''], 1):
        columns = line.split()
        if columns and columns[0] != '-DOCSTART-':
            if len(columns) < 2:
                raise UsageError(
                    f'{flag}: line {number} has one column, {columns[0]!r}, where a word and its '
                    'label are needed'
                )
            begin = begin if words else number
            words.append(columns[0])
            labels.append(columns[-1])
        elif words:
            found.append((f'{path} line {begin}', words, labels))
            words, labels = [], []
    return not_empty(found, flag)


def read_jsonl(path: str, flag: str) -> list[Sentence]:
    """Returns the texts of a file with an object a line: {"words": [...], "labels": [...]}."""
    found = []
    for number, line in enumerate(read_text(path, flag).split('\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            words, labels = record['words'], record['labels']
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{flag}: line {number} is no object with "words" and "labels" '
                f'({type(error).__name__}: {error})'
            ) from error
        if not (isinstance(words, list) and isinstance(labels, list) and len(words) == len(labels)):
            raise UsageError(f'{flag}: line {number} has not as many labels as words, in lists')
        if words:
            found.append((f'{path} line {number}', list(map(str, words)), list(map(str, labels))))
    return not_empty(found, flag)


def not_empty(found: list[Sentence], flag: str) -> list[Sentence]:
    """Raises UsageError where a file had no texts."""
    if not found:
        raise UsageError(f'{flag}: the file has no words with labels in it')
    return found


def stdlib_sentences(data_dir: str) -> tuple[str, Read]:
    """Returns lines of the standard library with labelled names, of every fourth file."""
    root, splits, python, key = stdlib_files()

    def read() -> tuple[list[Sentence], list[Sentence], Card]:
        from bigjax.data import source_builders as sources

        config = sources.FilesConfig(name=key, root=root, splits=splits)
        about = f'Names in the source of the standard library of {python}.'
        builder, card = sources.prepare(sources.PythonNames, config, about, data_dir=data_dir)
        train, test = (
            [
                (
                    f'{builder.data_path} {split} record {number}',
                    [word.decode() for word in row['words']],
                    [label.decode() for label in row['labels']],
                )
                for number, row in enumerate(builder.as_data_source(split=split))
            ]
            for split in ('train', 'validation')
        )
        return train, test, card

    return f'stdlib-{key}', read
