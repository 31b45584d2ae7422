"""Passages: every token once, cut at sentences, and half of the second texts from elsewhere."""

import pickle
import re

import numpy as np
import pytest

from bigjax.data import pipeline
from bigjax.data.passages import NextSentence, Passages, document_lines, open_passages
from bigjax.data.subwords import Template
from bigjax.experiment import UsageError

# Documents of sentences; each token tells its place.
DOCUMENTS = [[5, 3, 9], [1], [4, 4, 4, 4, 4, 4], [30, 2]]
TEMPLATE = Template(900, (901,), 901)


def passages(seq=16, pair=False, documents=DOCUMENTS):
    lengths = [length for document in documents for length in document]
    return Passages(
        tokens=np.arange(sum(lengths)),
        sentences=np.cumsum([0, *lengths[:-1]]),
        documents=np.cumsum([0, *(len(document) for document in documents[:-1])]),
        template=TEMPLATE,
        seq=seq,
        pair=pair,
    )


def texts(row):
    """Returns the texts of a row, between its special tokens."""
    real = row[row >= 0].tolist()
    assert real[0] == 900
    assert real[-1] == 901
    inner = real[1:-1]
    if 901 in inner:
        return inner[: inner.index(901)], inner[inner.index(901) + 1 :]
    return inner, []


def test_every_token_is_in_one_row_and_no_row_in_two_documents():
    records = passages()
    ends = np.cumsum([sum(document) for document in DOCUMENTS])
    rows = records.take(np.arange(len(records)))['tokens']
    assert rows.dtype == np.int32
    seen = [texts(row)[0] for row in rows]
    assert [token for row in seen for token in row] == list(range(ends[-1]))
    assert all(len(set(np.searchsorted(ends, row, side='right'))) == 1 for row in seen)


def pairs(records, steps=40):
    train = pipeline.train_batches(records, batch=50, seed=0, augment=NextSentence(records))
    return [(row, random) for n in range(steps) for row, random in zip(
        train[n]['tokens'], train[n]['random'].tolist(), strict=True)]  # fmt: skip


def test_half_of_the_second_texts_follow_and_the_others_are_from_other_documents():
    records = passages(pair=True)
    ends = np.cumsum([sum(document) for document in DOCUMENTS])
    starts = set(records.sentences.tolist())
    found = pairs(records)
    assert np.mean([random for _, random in found]) == pytest.approx(0.5, abs=0.03)
    for row, random in found:
        first, second = texts(row)
        assert first
        assert second
        assert second == list(range(second[0], second[0] + len(second)))
        of_first, of_second = np.searchsorted(ends, [first[-1], second[0]], side='right')
        if random:
            assert of_first != of_second
            assert second[0] in starts
            assert np.searchsorted(ends, second[-1], side='right') == of_second
        else:
            assert second[0] == first[-1] + 1
            assert of_first == of_second


def test_a_passage_is_cut_where_a_sentence_begins_if_one_does():
    records = passages(pair=True)
    starts = set(records.sentences.tolist())
    cuts = set()
    for row, _ in pairs(records):
        first, _ = texts(row)
        bounds = next(b for b in records.bounds.tolist() if b[0] == first[0])
        inside = [start for start in starts if bounds[0] < start < bounds[1]]
        cuts.add(first[-1] + 1)
        assert first[-1] + 1 in (inside or [sum(bounds) // 2])
    assert len(cuts) > 5


def test_a_single_document_has_second_texts_of_its_own():
    records = passages(pair=True, documents=[[5] * 20])
    assert len({texts(row)[1][0] for row, random in pairs(records, 4) if random}) > 10


def test_worker_processes_can_have_it():
    augment = pickle.loads(pickle.dumps(NextSentence(passages(pair=True))))
    draws = pipeline.Draws(seed=0, step=0, first_row=0, rows=3)
    assert augment({'passage': np.arange(3)}, draws)['tokens'].shape == (3, 16)


def test_empty_lines_belong_to_the_line_before():
    text = b'\n\n one\n\n  \ntwo\nthree'
    assert list(document_lines(text)) == [b'\n\n one\n\n  \n', b'two\n', b'three']
    assert b''.join(document_lines(text)) == text
    assert list(document_lines(b'')) == []


@pytest.mark.parametrize('tokenizer', ['wordpiece', 'masked_bpe'])
def test_files_become_passages(tokenizer, tmp_path):
    for name in range(10):
        lines = [f'file {name} has line {n}\n' for n in range(20)]
        (tmp_path / f'{name}.txt').write_text('\n'.join(lines))
    arguments = {'seq': 24, 'data_dir': str(tmp_path / 'data'), 'pair': False}
    data = open_passages(f'files:{tmp_path}/*.txt', tokenizer=tokenizer, vocab=300, **arguments)
    assert len(data.train.documents) == 9
    assert len(data.train.sentences) == 180
    rows = data.validation.take(np.arange(len(data.validation)))['tokens']
    text = ' '.join(''.join(data.tokenizer.decode(row) for row in rows).split())
    assert text.startswith('file 9 has line 0')
    assert data.card.sizes['train'] == len(data.train.tokens)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tokenizer': 'bytes'}, '--tokenizer=bytes: has no tokens for begin, end and mask; try '),
        ({'tokenizer': 'wordpiece', 'seq': 4}, '--seq=4: must be at least 8; try --seq=128'),
        ({'tokenizer': 'wordpiece', 'dataset': 'x'}, '--dataset=x: no such source of text'),
    ],
)
def test_errors(options, message, tmp_path):
    (tmp_path / 'a.txt').write_text('some words\n' * 40)
    options = {'dataset': f'files:{tmp_path}/a.txt', 'seq': 16, **options}
    with pytest.raises(UsageError, match=f'^{re.escape(message)}'):
        open_passages(**options, data_dir=str(tmp_path / 'data'), vocab=300, pair=True)
