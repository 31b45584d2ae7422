import re
import struct

import numpy as np
import pytest

from bigjax.data.catalogues import clean, package_root, read_messages, read_mo
from bigjax.data.classification import open_classification
from bigjax.experiment import UsageError


def write_mo(path, messages):
    """Writes a catalogue as the GNU gettext manual describes it."""
    rows = sorted({'': 'Content-Type: text/plain; charset=UTF-8\n', **messages}.items())
    texts = [[text.encode() for text in column] for column in zip(*rows, strict=True)]
    tables, data, start = [], b'', 28 + 16 * len(rows)
    for column in texts:
        for text in column:
            tables.append(struct.pack('<2I', len(text), start + len(data)))
            data += text + b'\0'
    header = struct.pack('<7I', 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b''.join(tables) + data)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with catalogues in three languages and one regional variant."""
    monkeypatch.setattr('bigjax.data.catalogues.MESSAGES_NEEDED', 20)
    root = tmp_path / 'catalogued'
    words = {'de': 'Nachricht', 'fr': 'Messagerie', 'de_AT': 'Botschaft'}
    for language, word in words.items():
        messages = {f'message of number {n}': f'{word} %(count)s mit {n} Nummer' for n in range(60)}
        messages['same in both'] = 'gleich in beiden'
        messages['one\0many'] = f'{word} im einzelnen\0{word} im mehreren'
        write_mo(root / f'locale/{language}/LC_MESSAGES/some.mo', messages)
    (root / '__init__.py').write_text('')
    info = tmp_path / 'catalogued-1.2.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: catalogued\nVersion: 1.2\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_catalogues(package, tmp_path):
    data = open_classification('catalogues:catalogued', seq=32, data_dir=str(tmp_path / 'data'))
    assert data.class_names == ('de', 'en', 'fr')
    assert data.num_classes == 3
    texts = {}
    for split, records in (('train', data.train), ('test', data.test)):
        batch = records.take(np.arange(len(records)))
        assert batch['tokens'].shape == (len(records), 32)
        assert batch['label'].dtype == batch['tokens'].dtype == np.int32
        texts[split] = [data.tokenizer.decode(row) for row in batch['tokens']]
        german = [
            text for text, label in zip(texts[split], batch['label'], strict=True) if label == 0
        ]
        assert all(text.startswith('Nachricht') for text in german)
    assert not set(texts['train']) & set(texts['test'])
    both = texts['train'] + texts['test']
    assert 'gleich in beiden' not in both
    assert 'Nachricht im mehreren' in both
    assert not any('%' in text for text in both)
    assert data.card.sizes == {'train': len(data.train), 'test': len(data.test)}
    assert data.card.license.startswith('BSD-3-Clause')


def test_all_translations_of_a_message_are_in_one_split(package):
    splits = read_messages(str(package))
    assert splits['train']
    assert splits['test']
    assert not {m.msgid for m in splits['train']} & {m.msgid for m in splits['test']}
    assert all(m.message for part in splits.values() for m in part)


def test_django_has_what_the_default_needs():
    pytest.importorskip('django')
    splits = read_messages(package_root('django'))
    languages = {m.language for m in splits['train']}
    assert len(languages) >= 50
    assert {'en', 'de', 'fr', 'es', 'ru', 'ja', 'zh_Hans'} <= languages
    assert languages == {m.language for m in splits['test']}
    train, test = ({m.text.casefold() for m in splits[s]} for s in ('train', 'test'))
    assert len(train) == len(splits['train']) > 20_000
    assert len(test) == len(splits['test']) > 2_000
    assert not train & test


@pytest.mark.parametrize(
    ('message', 'text'),
    [
        ('Ensure %(max)s <b>digits</b> in&nbsp;total.', 'Ensure digits in total'),
        ('“{name}” was  added\nby %d of %5.2f', 'was added by of'),
        ('50% of it', '50% of it'),
        ('数据库错误。', '数据库错误。'),
    ],
)
def test_cleaning(message, text):
    assert clean(message) == text


def test_damaged_catalogue(tmp_path):
    path = tmp_path / 'a.mo'
    write_mo(path, {'one message': 'eine Nachricht'})
    path.write_bytes(path.read_bytes()[:-5])
    message = f'{path}: damaged message catalogue (message 1 lies past its end)'
    with pytest.raises(UsageError, match=re.escape(message)):
        list(read_mo(path))


def write_csv(path, rows=40, header='text,label'):
    lines = [f'"text, number {n}",{"yes" if n % 3 else "no"}' for n in range(rows)]
    path.write_text('\n'.join([header, *lines, '']), encoding='utf-8')
    return path


def test_csv(tmp_path):
    path = write_csv(tmp_path / 'a.csv')
    arguments = {'seq': 16, 'data_dir': str(tmp_path / 'data')}
    data = open_classification(f'csv:{path}', **arguments)
    assert data.class_names == ('no', 'yes')
    assert data.card.sizes == {'train': 36, 'test': 4}
    rows = [records.take(np.arange(len(records))) for records in (data.train, data.test)]
    for row, label in zip(
        *(np.concatenate([part[name] for part in rows]) for name in ('tokens', 'label')),
        strict=True,
    ):
        number = int(data.tokenizer.decode(row).removeprefix('text, number '))
        assert label == (number % 3 > 0)
    again = open_classification(f'csv:{path}', **{**arguments, 'seq': 5})
    assert data.tokenizer.decode(again.train.take(np.array([0]))['tokens'][0]) == 'text,'
    bpe = open_classification(f'csv:{path}', tokenizer='bpe', vocab=270, **arguments)
    row = bpe.train.take(np.array([3]))['tokens'][0]
    assert bpe.tokenizer.decode(row) == data.tokenizer.decode(rows[0]['tokens'][3])


def test_csv_with_a_test_file_other_columns_and_numbers(tmp_path):
    for name, numbers in (('train', range(12)), ('test', range(2, 5))):
        lines = [f'{n},words {n}' for n in numbers]
        (tmp_path / f'{name}.csv').write_text('\n'.join(['stars,review', *lines]))
    data = open_classification(
        f'csv:{tmp_path}/train.csv',
        seq=16,
        data_dir=str(tmp_path / 'data'),
        text_column='review',
        label_column='stars',
        test_file=f'{tmp_path}/test.csv',
    )
    assert data.class_names == tuple(str(n) for n in range(12))
    assert data.test.take(np.arange(3))['label'].tolist() == [2, 3, 4]


def test_the_same_text_is_never_on_both_sides(tmp_path):
    lines = [f'text {n % 20},{n % 2}' for n in range(200)]
    (tmp_path / 'a.csv').write_text('\n'.join(['text,label', *lines]))
    data = open_classification(f'csv:{tmp_path}/a.csv', seq=16, data_dir=str(tmp_path / 'data'))
    train, test = (
        {row.tobytes() for row in records.take(np.arange(len(records)))['tokens']}
        for records in (data.train, data.test)
    )
    assert len(train) == 18
    assert len(test) == 2
    assert not train & test


@pytest.mark.parametrize(
    ('content', 'options', 'message'),
    [
        (None, {}, '--dataset=csv:{path}: no such file'),
        (
            '',
            {},
            '--dataset=csv:{path}: the file has nothing in it; it needs a header with the columns '
            'text, label, and at least one row',
        ),
        (
            'text,label\n',
            {},
            '--dataset=csv:{path}: the file has a header but no rows; it needs a header with the '
            'columns text, label, and at least one row',
        ),
        (
            'review,stars\na,1\n',
            {},
            "--dataset=csv:{path}: no column 'text'; the columns are review, stars; "
            'try --text_column=review',
        ),
        (
            'text,label\na,1\n',
            {'label_column': 'class'},
            "--dataset=csv:{path}: no column 'class'; the columns are text, label; "
            'try --label_column=label',
        ),
        (
            'text,label\na,1\nb,c,2\n',
            {},
            '--dataset=csv:{path}: line 3 has 3 values where the header has 2; quote values that '
            'hold commas or line ends',
        ),
        (
            'text,label\na,1\nb\u00fc,2\nc\u00fc,2\n',
            {},
            '--dataset=csv:{path}: 2 lines are not UTF-8, the first is line 3; save it as UTF-8',
        ),
        (
            'text,label\na,1\nb,1\n',
            {},
            "--dataset=csv:{path}: all examples have the label '1'; a classifier needs at least "
            'two',
        ),
        (
            'text,label\na,1\na,2\n',
            {},
            '--dataset=csv:{path}: it has a single text, which cannot be both learnt from and '
            'tested on; add rows, or name another file by --test_file',
        ),
        (
            'text,label\na,1\nb,2\n',
            {'test_file': 'none.csv'},
            '--test_file=none.csv: no such file',
        ),
    ],
)
def test_csv_errors(tmp_path, content, options, message):
    path = tmp_path / 'a.csv'
    if content is not None:
        path.write_bytes(content.encode('latin-1'))
    message = message.replace('{path}', str(path))
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_classification(f'csv:{path}', seq=8, data_dir=str(tmp_path / 'data'), **options)


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (
            'tweets',
            '--dataset=tweets: no such source of labelled text; there are catalogues, docstrings, '
            'csv:FILE and tfds:NAME; try --dataset=catalogues',
        ),
        (
            'catalogues:nopackage',
            '--dataset=catalogues: the package nopackage, whose message catalogues it is made of, '
            'is not installed; try pip install nopackage',
        ),
    ],
)
def test_unknown_sources(tmp_path, dataset, message):
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_classification(dataset, seq=8, data_dir=str(tmp_path))
