"""The user's labelled texts: pairs, what is noticed in them, and what is refused."""

import re

import numpy as np
import pytest

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
