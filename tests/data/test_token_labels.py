"""Labelled words: alignment with tokens, texts that are too long, files and their errors."""

import json
import re

import numpy as np
import pytest

from bigjax.data.labelled_words import read_conll, read_jsonl
from bigjax.data.source_code import labelled_lines
from bigjax.data.token_labels import cut_between_words, open_token_labels, whole_texts
from bigjax.experiment import UsageError

WORDS = ['Anna', 'unbelievably', 'met', 'Jean-Pierre', 'in', 'New', 'York', '.', '\u200b']
LABELS = ['B-person', 'O', 'O', 'B-person', 'O', 'B-place', 'I-place', 'O', 'O']


def write_conll(path, texts):
    blocks = ['\n'.join(f'{word} x {label}' for word, label in zip(*text, strict=True))
              for text in texts]  # fmt: skip
    path.write_text('-DOCSTART- -X- O\n\n' + '\n\n'.join(blocks) + '\n', encoding='utf-8')


@pytest.fixture
def data_for(tmp_path):
    texts = [([f'{word}{n % 4}' if word == 'met' else word for word in WORDS], LABELS)
             for n in range(40)]  # fmt: skip
    texts.append((WORDS * 6, LABELS * 6))
    write_conll(tmp_path / 'train.txt', texts)
    write_conll(tmp_path / 'test.txt', texts[-2:])

    def data(tokenizer='wordpiece', seq=64, **options):
        return open_token_labels(
            f'conll:{tmp_path}/train.txt', seq=seq, data_dir=str(tmp_path / 'data'),
            tokenizer=tokenizer, vocab=280, **options,
        )  # fmt: skip

    return data


@pytest.mark.parametrize('tokenizer', ['wordpiece', 'masked_bpe'])
def test_a_label_stands_at_the_first_token_of_its_word(data_for, tokenizer, tmp_path):
    data = data_for(tokenizer, test_file=f'{tmp_path}/test.txt')
    assert data.class_names == ('O', 'B-person', 'B-place', 'I-place')
    batch = data.test.take(np.array([0]))
    tokens, labels = batch['tokens'][0], batch['labels'][0]
    places = np.flatnonzero(labels >= 0)
    assert [data.class_names[label] for label in labels[places]] == LABELS
    ends = [*places[1:], np.flatnonzero(tokens >= 0)[-1]]
    for word, start, end in zip(WORDS[:-1], places, ends, strict=False):
        said = data.tokenizer.decode(tokens[start:end]).replace(' ', '')
        expected = word.replace('met', 'met3')
        assert said == (expected.lower() if tokenizer == 'wordpiece' else expected)
        # Every token is the first of a word, goes on with it, or is special.
        assert (labels[start + 1 : end] == -1).all()
    assert tokens[0] == data.tokenizer.template.begin
    assert labels[0] == -1
    assert labels[tokens == data.tokenizer.template.end] == -1


def test_long_texts_are_cut_between_words_and_scored_whole(data_for, tmp_path):
    data = data_for(seq=24, test_file=f'{tmp_path}/test.txt')
    batch = data.test.take(np.arange(len(data.test)))
    rows = np.flatnonzero(batch['text'] == 1)
    assert len(rows) > 2
    assert len(data.test) == data.card.sizes['test'] + sum(np.bincount(batch['text']) - 1)
    assert 'cut between words' in data.card.notes[0]
    perfect = {'labels': np.maximum(batch['labels'], 0)}
    ((first, _), (long, guess)) = whole_texts([(batch, perfect)], data.class_names)
    assert first == LABELS
    assert long == guess == LABELS * 6
    parts = [({k: v[i : i + 3] for k, v in batch.items()}, {'labels': perfect['labels'][i : i + 3]})
             for i in range(0, len(data.test), 3)]  # fmt: skip
    assert data.score(iter(parts)) == dict.fromkeys(data.score_names, 1.0)
    wrong = {'labels': np.where(batch['labels'] == 1, 0, perfect['labels'])}
    scores = data.score(iter([(batch, wrong)]))
    assert scores['f1_person'] == 0
    assert scores['f1_place'] == scores['precision'] == 1


def test_pieces_begin_with_words_and_cover_all():
    labels = np.array([0, -1, 0, 0, -1, -1, -1, -1, 0, 0])
    for room in range(2, 12):
        pieces = cut_between_words(labels, room)
        assert [start for start, _ in pieces[1:]] == [end for _, end in pieces[:-1]]
        assert (pieces[0][0], pieces[-1][1]) == (0, 10)
        assert all(labels[start] >= 0 for start, _ in pieces)
        assert all(end - start <= max(room, 5) for start, end in pieces)
    assert cut_between_words(labels, 5) == [(0, 3), (3, 8), (8, 10)]


def test_json_lines(tmp_path):
    path = tmp_path / 'a.jsonl'
    rows = [{'words': WORDS, 'labels': LABELS}, {'words': [], 'labels': []}]
    path.write_text('\n'.join(map(json.dumps, rows)))
    assert read_jsonl(str(path), 'flag') == [(f'{path} line 1', WORDS, LABELS)]


@pytest.mark.parametrize(
    ('reader', 'content', 'message'),
    [
        (read_conll, b'', '--dataset=x: the file has no words with labels in it'),
        (read_conll, b'a O\nb\n', "--dataset=x: line 2 has one column, 'b', where a word and its "
         'label are needed'),
        (read_conll, b'a O\nb\xe9 O\n', '--dataset=x: line 2 is not UTF-8; save it as UTF-8'),
        (read_jsonl, b'{"words": ["a"]}', '--dataset=x: line 1 is no object with "words" and '
         '"labels" (KeyError: \'labels\')'),
        (read_jsonl, b'{"words": ["a"], "labels": []}', '--dataset=x: line 1 has not as many '
         'labels as words, in lists'),
    ],
)  # fmt: skip
def test_damaged_files_are_named_by_line(reader, content, message, tmp_path):
    (tmp_path / 'a').write_bytes(content)
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        reader(str(tmp_path / 'a'), '--dataset=x')


def test_labels_that_training_texts_have_not_are_refused(data_for, tmp_path):
    write_conll(tmp_path / 'other.txt', [(['a', 'b', 'c'], ['O', 'B-thing', 'B-thing'])])
    message = (
        f'--test_file={tmp_path}/other.txt: 2 words have labels that the training texts have not: '
        f'B-thing; the first is in {tmp_path}/other.txt line 3; their labels are O, B-person, '
        'B-place, I-place'
    )
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        data_for(test_file=f'{tmp_path}/other.txt')


def test_labels_that_are_held_out_only_are_counted(tmp_path):
    texts = [([f'word{n}', 'other'], [f'B-rare{n}' if n > 19 else 'O', 'O']) for n in range(40)]
    write_conll(tmp_path / 'train.txt', texts)
    data = open_token_labels(f'conll:{tmp_path}/train.txt', seq=16, data_dir=str(tmp_path / 'data'),
                             tokenizer='wordpiece', vocab=280)  # fmt: skip
    held_out = {data.class_names[n] for n in data.test.labels.tokens[:] if n >= 0} - {'O'}
    assert len(data.class_names) == 21
    assert held_out
    assert data.card.notes == (
        f'{len(held_out)} labels stand in held-out texts only and cannot be learnt: '
        f'{", ".join(sorted(held_out))}; add texts, or name another file by --test_file',
    )


def test_names_in_source_are_those_the_parser_sees():
    source = b"""
import os.path as p, sys
from a.b import c  # d()
class A(B.C, metaclass=M):
    def f(self, x=g(1), *rest):
        try:
            raise E.F(os.path.join("\xc3\xa9", h(x)))
        except (K, L.M) as error:
            x.y(1)(2)
"""
    found = {}
    for line in labelled_lines(source):
        kind = ''
        for word, label in zip(line.words, line.labels, strict=True):
            if label.startswith('B'):
                kind = label[2:]
                found.setdefault(kind, []).append(word)
            elif label.startswith('I'):
                assert label[2:] == kind
                found[kind][-1] += word
    assert found == {
        'module': ['os.path', 'sys', 'a.b'],
        'class': ['B.C'],
        'parameter': ['self', 'x', 'rest'],
        'function': ['g', 'os.path.join', 'h', 'x.y'],
        'exception': ['E.F', 'K', 'L.M'],
    }
    assert list(labelled_lines(b'def (')) == []
