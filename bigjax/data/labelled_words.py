"""Words with labels, read from CoNLL files, JSON lines and the standard library's source."""

import hashlib
import json
import os
from collections.abc import Callable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint, stdlib_files
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
            'and jsonl:FILE; try --dataset=stdlib'
        )
    files = {f'--dataset={dataset}': os.path.expanduser(rest)}
    if test_file:
        files[f'--test_file={test_file}'] = os.path.expanduser(test_file)
    for flag, path in files.items():
        if not os.path.isfile(path):
            raise UsageError(f'{flag}: no such file')
    stats = [
        (os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in files.values()
    ]

    def read() -> tuple[list[Sentence], list[Sentence], Card]:
        train, *others = [readers[prefix](path, flag) for flag, path in files.items()]
        if others:
            test = others[0]
        else:
            train, test = hold_out(train, dataset)
        card = Card(
            name=dataset, description='Texts with labelled words.', path=os.path.abspath(rest)
        )
        return train, test, card

    return f'{prefix}-{fingerprint(stats)}', read


def hold_out(sentences: list[Sentence], dataset: str) -> tuple[list[Sentence], list[Sentence]]:
    """Returns the texts that stay and a tenth, by a hash of its words, that does not."""

    def digest(sentence: Sentence) -> bytes:
        return hashlib.sha256('\n'.join(sentence[1]).encode()).digest()

    order = sorted({digest(sentence) for sentence in sentences})
    if len(order) < 2:
        raise UsageError(
            f'--dataset={dataset}: it has a single text, which cannot be both learnt from and '
            'tested on; add texts, or name another file by --test_file'
        )
    out = set(order[: max(1, len(order) // 10)])
    kept = [sentence for sentence in sentences if digest(sentence) not in out]
    return kept, [sentence for sentence in sentences if digest(sentence) in out]


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
        from bigjax.data import builders, source_builders

        config = builders.FilesConfig(name=key, root=root, splits=splits)
        builder = builders.build(source_builders.PythonNames, config, data_dir=data_dir)
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
        card = Card(
            name='stdlib',
            description=f'Names in the source of the standard library of {python}.',
            license=source_builders.LICENSE,
            citation=source_builders.CITATION,
            path=str(builder.data_path),
        )
        return train, test, card

    return f'stdlib-{key}', read
