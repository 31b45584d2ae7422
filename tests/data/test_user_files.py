"""The user's files: found, told apart, read and parted alike by every source of text."""

import os
import re

import pytest

from bigjax.data.labelled_words import open_sentences
from bigjax.data.squad import open_asked
from bigjax.data.user_files import file_stats, hold_out, named_files, read_text
from bigjax.experiment import UsageError


def test_files_are_named_by_flag_and_found_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in ('a.txt', 'b.txt'):
        (tmp_path / name).write_text('text')
    files = named_files('conll:~/a.txt', '~/a.txt', '~/b.txt')
    assert files == {
        '--dataset=conll:~/a.txt': f'{tmp_path}/a.txt',
        '--test_file=~/b.txt': f'{tmp_path}/b.txt',
    }
    for arguments, flag in (
        (('conll:~/c', '~/c'), '--dataset=conll:~/c'),
        (('conll:~/a.txt', '~/a.txt', '~/c'), '--test_file=~/c'),
    ):
        with pytest.raises(UsageError, match=f'^{flag}: no such file$'):
            named_files(*arguments)


def test_a_file_that_is_not_there_may_be_another(tmp_path, monkeypatch):
    (tmp_path / 'reviews.csv').write_text('text')
    monkeypatch.chdir(tmp_path)
    for path, message in (
        ('review.csv', '--dataset=csv:review.csv: no such file; try --dataset=csv:reviews.csv'),
        (f'{tmp_path}/no/reviews.csv', f'--dataset=csv:{tmp_path}/no/reviews.csv: no such file'),
        (f'{tmp_path}', f'--dataset=csv:{tmp_path}: is a folder; name a file in it'),
    ):
        with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
            named_files(f'csv:{path}', path)
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(UsageError, match=r'^--dataset=csv:reviews.csv: may not be read; change it'):
        named_files('csv:reviews.csv', 'reviews.csv')


def test_stats_tell_a_changed_file_from_what_it_was(tmp_path):
    path = tmp_path / 'a'
    seen = []
    for text, time in (('one', 1), ('one', 2), ('three', 2)):
        path.write_text(text)
        os.utime(path, ns=(time, time))
        seen += file_stats([str(path)])
    assert seen == [(str(path), 3, 1), (str(path), 3, 2), (str(path), 5, 2)]


@pytest.mark.parametrize(('texts', 'out'), [(2, 1), (19, 1), (20, 2), (100, 10)])
def test_a_tenth_of_the_texts_is_held_out_whatever_their_order(texts, out):
    items = [(f'text {n % texts}', n) for n in range(3 * texts)]
    kept, held_out = hold_out(items, lambda item: item[0], 'x')
    assert sorted(kept + held_out) == sorted(items)
    assert [item[1] for item in kept] == sorted(item[1] for item in kept)
    sides = [{text for text, _ in part} for part in (kept, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == out
    again = hold_out(items[::-1], lambda item: item[0], 'x')
    assert {text for text, _ in again[1]} == sides[1]


def test_a_single_text_cannot_be_parted():
    message = (
        '^--dataset=csv:a: it has a single text, which cannot be both learnt from and tested on; '
        'add rows, or name another file by --test_file$'
    )
    with pytest.raises(UsageError, match=message):
        hold_out(['a', 'a'], str, 'csv:a', add='rows')


def test_text_is_read_as_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes('\ufeffgrün\n'.encode())
    assert read_text(str(path), 'flag') == 'grün\n'
    path.write_bytes(b'one\ntwo \xe9\n')
    with pytest.raises(UsageError, match=r'^--x=a: line 2 is not UTF-8; save it as UTF-8$'):
        read_text(str(path), '--x=a')


@pytest.mark.parametrize(
    ('opened', 'prefix', 'content'),
    [
        (open_sentences, 'conll', 'a O\n\nb O\n'),
        (
            open_asked,
            'squad',
            '{"data": [{"paragraphs": ['
            '{"context": "a", "qas": [{"question": "q", "answers": []}]}, '
            '{"context": "b", "qas": [{"question": "q", "answers": []}]}]}]}',
        ),
    ],
)
def test_a_card_says_where_a_file_at_home_lies(opened, prefix, content, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a').write_text(content)
    key, read = opened(f'{prefix}:~/a', '', str(tmp_path / 'data'))
    train, test, card = read()
    assert key.startswith(f'{prefix}-')
    assert len(train) == len(test) == 1
    assert card.name == f'{prefix}:~/a'
    assert card.path == str(tmp_path / 'a')
