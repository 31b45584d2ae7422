"""Labelled texts, the user's and docstrings: pairs, what is noticed in them, what is refused."""

import csv
import email.message
import gzip
import inspect
import re

import numpy as np
import pytest

from bigjax.data import labelled
from bigjax.data.classification import open_classification
from bigjax.experiment import UsageError
from bigjax.report import summary_table


def write(path, rows, header='text,label'):
    path.write_text('\n'.join([header, *rows, '']), encoding='utf-8')
    return path


def open_csv(path, tmp_path, **options):
    options = {'seq': 16, 'tokenizer': 'wordpiece', 'vocab': 200, **options}
    return open_classification(f'csv:{path}', data_dir=str(tmp_path / 'data'), **options)


def test_rows_have_special_tokens_where_the_tokenizer_has_them(tmp_path):
    path = write(tmp_path / 'a.csv', [f'word{n} and more,{n % 2}' for n in range(30)])
    data = open_csv(path, tmp_path)
    row = data.train.take(np.array([3]))['tokens'][0]
    template = data.tokenizer.template
    real = row[row >= 0]
    assert (real[0], real[-1]) == (template.begin, template.end)
    assert data.tokenizer.decode(row).startswith('word')
    short = open_csv(path, tmp_path, seq=8).train.take(np.arange(27))['tokens']
    assert ((short == template.end).sum(1) == 1).all()


def test_pairs_of_texts_have_a_separator_between_them(tmp_path):
    rows = [f'premise {n},hypothesis {n % 7} follows,{"yes" if n % 3 else "no"}' for n in range(40)]
    path = write(tmp_path / 'a.csv', rows, 'a,b,label')
    for tokenizer, middle in (('wordpiece', 1), ('masked_bpe', 2)):
        data = open_csv(path, tmp_path, text_column='a', pair_column='b', tokenizer=tokenizer,
                        vocab=320, seq=64)  # fmt: skip
        end = data.tokenizer.template.end
        for row in data.train.take(np.arange(len(data.train)))['tokens']:
            places = np.flatnonzero(row == end)
            assert len(places) == middle + 1
            first, second = (data.tokenizer.decode(part) for part in (
                row[: places[0]], row[places[0] :]))  # fmt: skip
            assert first.strip().startswith('premise')
            assert second.strip().startswith('hypothesis')
            assert 'premise' not in second
    with pytest.raises(UsageError, match=r'^--pair_column=b: --tokenizer=bytes has no token betw'):
        open_csv(path, tmp_path, text_column='a', pair_column='b', tokenizer='bytes')


def test_what_is_odd_is_kept_counted_and_told(tmp_path):
    rows = [f'text number {n},{n % 2}' for n in range(30)]
    rows[4] = ',1'
    rows[9] = '"  ",0'
    rows[20] = 'text number 7,0'
    rows[21] = '"' + 'many words ' * 30 + '",1'
    path = write(tmp_path / 'a.csv', rows)
    data = open_csv(path, tmp_path)
    assert sum(data.card.sizes.values()) == len(data.train) + len(data.test) == 30
    notes = (
        f'{path}: 2 of 30 rows have an empty text, the first is line 6',
        f'{path}: 1 texts stand there with different labels',
        '1 of 30 texts are cut to --seq=16 tokens',
    )
    assert data.card.notes == notes
    again = open_csv(path, tmp_path)  # from what was prepared
    assert again.card.notes == notes
    summary = ' '.join(summary_table({'data': {'name': 'x', 'notes': notes}}).split())
    for note in notes:
        assert note in summary
    tokens = np.concatenate([part.take(np.arange(len(part)))['tokens']
                             for part in (data.train, data.test)])  # fmt: skip
    assert ((tokens >= 0).sum(1) == 2).sum() == 2  # the empty texts: begin and end


@pytest.mark.parametrize(
    ('rows', 'test_rows', 'message'),
    [
        (['a,1', 'b,', 'c, '], None, '--dataset=csv:{path}: 2 rows have no label, the first is '
         'line 3; label or remove them'),
        (['a,1', 'b,2'], ['c,1', 'd,3', 'e,x'], '--test_file={test}: 2 rows have labels that '
         '{path} has not: 3, x; the first is line 3; its labels are 1, 2'),
        (['a,1', 'b,2'], ['c,1', 'd,'], '--test_file={test}: 1 rows have no label, the first is '
         'line 3; label or remove them'),
        (['a,1', 'b,2'], ['c'], '--test_file={test}: line 2 has 1 values where the header has 2; '
         'quote values that hold commas or line ends'),
        (['a,1', 'b,2'], [], '--test_file={test}: the file has a header but no rows; it needs a '
         'header with the columns text, label, and at least one row'),
        (['a,1', 'b,2'], [f'c,{n}' for n in range(3, 25)], '--test_file={test}: 22 rows have '
         'labels that {path} has not: 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, '
         '3, 4, 5, 6, 7, and 2 more; the first is line 2; its labels are 1, 2'),
        (['a,1', '"b', '', 'c,2', 'd,1,2'], None, "--dataset=csv:{path}: line 6: unexpected end of "
         'data, in a row that begins in line 3; end each quoted value by a quote, and write "" for '
         'a quote inside it'),
        (['a,1', '"b ""c"" d\n\ne",2', '', '"f', 'g",1,1'], None, '--dataset=csv:{path}: line 7 '
         'has 3 values where the header has 2; quote values that hold commas or line ends'),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_file_they_are_in(tmp_path, rows, test_rows, message):
    path, test = tmp_path / 'a.csv', tmp_path / 'b.csv'
    write(path, rows)
    options = {}
    if test_rows is not None:
        write(test, test_rows)
        options['test_file'] = str(test)
    message = message.replace('{path}', str(path)).replace('{test}', str(test))
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_csv(path, tmp_path, **options)


def test_mixed_encodings_are_counted(tmp_path):
    path = tmp_path / 'a.csv'
    lines = [f'größe {n},{n % 2}'.encode('latin-1' if n in (3, 8) else 'utf-8') for n in range(12)]
    path.write_bytes(b'\n'.join([b'text,label', *lines]))
    message = f'--dataset=csv:{path}: 2 lines are not UTF-8, the first is line 5; save it as UTF-8'
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_csv(path, tmp_path)


@pytest.mark.parametrize(
    ('header', 'options', 'message'),
    [
        ('text,label,label', {}, "--dataset=csv:{path}: 2 columns are named 'label'; rename all "
         'but one'),
        ('text,label', {'label_column': 'text'}, '--label_column=text: is --text_column, too; the '
         'columns are text, label; try --label_column=label'),
        ('text,label', {'pair_column': 'b'}, "--dataset=csv:{path}: no column 'b'; the columns are "
         'text, label'),
        ('text, label', {}, "--dataset=csv:{path}: no column 'label'; the columns are text, "
         "' label'; try --label_column=' label'"),
        (',Id,stars,Text', {}, "--dataset=csv:{path}: no column 'text'; the columns are '', Id, "
         'stars, Text; try --text_column=Text'),
        (',id,stars', {}, "--dataset=csv:{path}: no column 'text'; the columns are '', id, stars; "
         'try --text_column=stars'),
        ('text\tlabel', {}, '--dataset=csv:{path}: tabs stand between its columns where commas are '
         'needed; save it with commas'),
        ('text;label', {}, '--dataset=csv:{path}: semicolons stand between its columns where '
         'commas are needed; save it with commas'),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_once(tmp_path, header, options, message):
    path = write(tmp_path / 'a.csv', [], header)
    with pytest.raises(UsageError, match=f'^{re.escape(message.replace("{path}", str(path)))}$'):
        open_csv(path, tmp_path, **options)


@pytest.mark.parametrize(
    ('content', 'what'),
    [
        ('text,label\na,1\n'.encode('utf-16'), 'is UTF-16'),
        ('text,label\na,1\n'.encode('utf-16-le'), 'looks like UTF-16'),
        (b'PK\x03\x04\x14\x00', 'is a workbook or another zip archive'),
        (gzip.compress(b'text,label\na,1\n', mtime=0), 'is compressed by gzip'),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, what):
    path = tmp_path / 'a.csv'
    path.write_bytes(content)
    message = f'--dataset=csv:{path}: it {what}; save it as CSV in UTF-8'
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_csv(path, tmp_path)


def test_labels_are_read_without_the_spaces_around_them(tmp_path):
    rows = [f'text {n},{("good", " good", "Good", "bad ")[n % 4]}' for n in range(40)]
    path = write(tmp_path / 'a.csv', rows)
    data = open_csv(path, tmp_path, test_file=str(path))
    assert data.class_names == ('Good', 'bad', 'good')
    assert np.bincount(data.train.label[:]).tolist() == [10, 10, 20]
    assert data.card.notes == (
        *[
            f'{path}: 20 of 40 rows have spaces around the label, which are left out, the first is '
            'line 3',
            f'{path}: labels that differ in case only are different: Good and good',
        ]
        * 2,
        f'{path}: 40 of 40 rows have a text that {path} has, too, the first is line 2',
    )


def test_labels_that_cannot_be_learnt_are_counted(tmp_path):
    rows = [f'text {n},{"rare" + str(n) if n > 19 else n % 2}' for n in range(40)]
    data = open_csv(path := write(tmp_path / 'a.csv', rows), tmp_path)
    lost = {data.class_names[n] for n in data.test.label[:]}
    lost -= {data.class_names[n] for n in data.train.label[:]}
    assert lost
    assert data.card.notes == (
        f'{path}: {len(lost)} labels stand in held-out rows only and cannot be learnt: '
        f'{", ".join(sorted(lost))}; add rows, or name another file by --test_file',
    )


def test_what_a_wrong_encoding_leaves_is_counted(tmp_path):
    rows = [f'text {n},{n % 2}' for n in range(40)]
    rows[5], rows[7] = 'nul \0 in it,1', 'caf\ufffd,1'
    path = write(tmp_path / 'a.csv', rows)
    assert open_csv(path, tmp_path).card.notes == (
        f'{path}: 2 of 40 rows have characters in the text that a wrong encoding leaves (NUL or '
        'U+FFFD), the first is line 7',
    )


def test_a_text_may_be_longer_than_what_csv_allows(tmp_path):
    limit = csv.field_size_limit()
    rows = [f'text {n},{n % 2}' for n in range(40)]
    rows[3] = f'{"word " * 30000},1'
    data = open_csv(write(tmp_path / 'a.csv', rows), tmp_path)
    assert data.card.notes == ('1 of 40 texts are cut to --seq=16 tokens',)
    assert csv.field_size_limit() == limit


def test_a_file_without_its_prefix_is_recognized(tmp_path):
    path = write(tmp_path / 'a.csv', ['a,1', 'b,2'])
    with pytest.raises(UsageError, match=f'; try --dataset=csv:{path}$'):
        open_classification(str(path), seq=16, data_dir=str(tmp_path))


def test_docstrings_have_the_module_they_are_from(tmp_path):
    opened = labelled.open_labelled(
        'docstrings', data_dir=str(tmp_path), text_column='', label_column='', test_file=''
    )
    names, train, test, card = opened.read()
    assert {'asyncio', 'email', 'tkinter'} <= set(names)
    assert card.name == 'docstrings'
    texts = dict(zip(train.texts + test.texts, train.labels + test.labels, strict=True))
    assert len(texts) == len(train.texts) + len(test.texts) > 2000
    own = inspect.getdoc(email.message.Message.get_payload).encode()
    assert names[texts[own]] == 'email'
