"""Questions: windows cover every answer, answers come back as text, SQuAD's files and errors."""

import json
import re

import numpy as np
import pytest

from bigjax.data.questions import open_questions, window_starts
from bigjax.data.source_code import questions
from bigjax.data.squad import read_squad
from bigjax.experiment import UsageError

WORDS = [f'word{n}' for n in range(90)]
CONTEXT = ' '.join(WORDS) + '.'


def asked(question, *answers, context=CONTEXT, **more):
    places = [{'text': text, 'answer_start': context.index(text)} for text in answers]
    return {'id': question, 'question': question, 'answers': places, **more}


def write_squad(path, *paragraphs):
    rows = [{'context': context, 'qas': qas} for context, qas in paragraphs]
    path.write_text(json.dumps({'data': [{'paragraphs': rows}]}), encoding='utf-8')


@pytest.fixture
def data_for(tmp_path):
    spans = [WORDS[n : n + 3] for n in range(0, 88, 3)]
    qas = [asked(f'What is number {n}?', ' '.join(span)) for n, span in enumerate(spans)]
    other = 'Naïve text, short.'
    write_squad(tmp_path / 'train.json', (CONTEXT, qas), (other, []))
    short = [asked('What?', 'Naïve text', 'text', context=other), asked('Long ' * 200, 'word89.')]
    write_squad(tmp_path / 'test.json', (other, short[:1]), (CONTEXT, [*short[1:], *qas]))

    def data(tokenizer='wordpiece', seq=48, **options):
        return open_questions(
            f'squad:{tmp_path}/train.json', test_file=f'{tmp_path}/test.json', seq=seq,
            data_dir=str(tmp_path / 'data'), tokenizer=tokenizer, vocab=300, **options,
        )  # fmt: skip

    return data


@pytest.mark.parametrize(('tokenizer', 'seq'), [('wordpiece', 48), ('masked_bpe', 64)])
def test_windows_cover_every_answer_and_give_back_its_text(data_for, tokenizer, seq):
    data = data_for(tokenizer, seq)
    batch = data.test.take(np.arange(len(data.test)))
    template = data.tokenizer.template
    held = set()
    for row in range(len(data.test)):
        tokens, (begin, end) = batch['tokens'][row], batch['text'][row]
        real = int((tokens >= 0).sum())
        assert tokens[0] == template.begin
        assert tokens[real - 1] == template.end
        assert end == real - 1
        assert tuple(tokens[begin - len(template.between) : begin]) == template.between
        first, last = int(batch['start'][row]), int(batch['end'][row])
        question, *_ = data.test.characters(row, begin, begin)
        if first:
            assert begin <= first <= last < end
            _, start, stop = data.test.characters(row, first, last)
            said = data.asked[question].context[start:stop].strip().rstrip('.')
            assert said == data.asked[question].answers[0].rstrip('.')
            held.add(question)
        else:
            assert last == 0
    assert held == set(range(len(data.asked)))
    # Every token of every text is in a window.
    seen = {(int(a), t) for a, s, e in data.test.bounds for t in range(s, e)}
    sizes = np.diff(data.test.contexts.ends[:], prepend=0)
    assert len(seen) == sizes[data.test.asked[:, 0]].sum()


def test_windows_overlap_enough():
    for length in range(1, 40):
        for room in range(4, 12):
            for overlap in range(room // 2):
                starts = list(window_starts(length, room, overlap))
                for size in range(1, min(overlap + 1, length) + 1):
                    for place in range(length - size + 1):
                        assert any(
                            s <= place and place + size <= min(s + room, length) for s in starts
                        )


def predictions(data, chosen):
    """Returns outputs that say what `chosen(row of the batch)` does: start, end, score, none."""
    batch = data.test.take(np.arange(len(data.test)))
    rows = [chosen({k: v[i] for k, v in batch.items()}) for i in range(len(data.test))]
    names = ('start', 'end', 'score', 'none')
    return batch, {k: np.array(v) for k, v in zip(names, zip(*rows, strict=True), strict=True)}


def test_the_best_window_answers(data_for):
    data = data_for()

    def right(row):
        found = row['start'] > 0
        return (row['start'], row['end'], 5.0, 0.0) if found else (row['text'][0],) * 2 + (1.0, 0.0)

    batch, outputs = predictions(data, right)
    parts = [({k: v[i : i + 7] for k, v in batch.items()}, {k: v[i : i + 7] for k, v in
             outputs.items()}) for i in range(0, len(data.test), 7)]  # fmt: skip
    scores = data.score(iter(parts))
    assert scores['exact_match'] == scores['f1'] == 1
    outputs['score'] = -outputs['score']
    assert data.score(iter([(batch, outputs)]))['exact_match'] < 0.5
    shown = data.show({k: v[:1] for k, v in batch.items()}, {k: v[:1] for k, v in outputs.items()})
    assert shown == ['question: What?\nanswer:   Naïve text\ntruth:    Naïve text | text']


def test_no_answer_is_given_where_no_window_has_one(tmp_path):
    none = {'question': 'Why?', 'id': '2', 'answers': [], 'is_impossible': True}
    write_squad(tmp_path / 'a.json', (CONTEXT, [asked('What?', 'word3'), none]), ('x y', []))
    data = open_questions(
        f'squad:{tmp_path}/a.json', test_file=f'{tmp_path}/a.json', seq=48, tokenizer='wordpiece',
        data_dir=str(tmp_path / 'data'), vocab=300,
    )  # fmt: skip
    batch, outputs = predictions(
        data, lambda row: (*([row['start'], row['end']] if row['start'] else [row['text'][0]] * 2),
                           3.0 if row['start'] else 1.0, 2.0)
    )  # fmt: skip
    assert not batch['start'][batch['window'] >= len(data.test) // 2].any()
    assert data.score(iter([(batch, outputs)])) == {'exact_match': 1.0, 'f1': 1.0}
    outputs['none'][:] = 0
    assert data.score(iter([(batch, outputs)])) == {'exact_match': 0.5, 'f1': 0.5}


def test_docstrings_are_asked_about():
    source = b'''
def one():
    """Return the number one, in words."""
class A:
    def two(self):
        """Do something.

        Raises a ValueError if it cannot; returns nothing else.
        """
    def one_more(self):
        """Nothing to say."""
'''
    found = {(q.question, q.answer) for q in questions(source)}
    assert found == {
        ('What does one return?', 'the number one, in words'),
        ('What does two return?', 'nothing else'),
        ('What does two raise?', 'ValueError'),
    }
    assert all(q.context[q.start :].startswith(q.answer) for q in questions(source))
    twice = source + b'\ndef one():\n    """Returns two."""\n'
    assert 'What does one return?' not in {q.question for q in questions(twice)}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[]', '--dataset=x: not in the format of SQuAD after 0 questions (TypeError: '),
        ('{', '--dataset=x: not in the format of SQuAD after 0 questions (JSONDecodeError: '),
        ('{"data": []}', '--dataset=x: the file has no questions in it'),
        (
            json.dumps({'data': [{'paragraphs': [{'context': 'a b', 'qas': [
                {'question': 'q', 'id': '7', 'answers': [{'text': 'b', 'answer_start': 1}]}]}]}]}),
            "--dataset=x: the answer 'b' of question '7' does not stand at character 1 of its text",
        ),
    ],
)  # fmt: skip
def test_damaged_files(content, message, tmp_path):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(UsageError, match=f'^{re.escape(message)}'):
        read_squad(str(tmp_path / 'a.json'), '--dataset=x')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seq': 20}, '--seq=20: must be at least 32 for questions; try --seq=384'),
        ({'overlap': 40}, '--overlap=40: must be at most half of --seq=48; try --overlap=16'),
    ],
)
def test_windows_without_room_are_refused(data_for, options, message):
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        data_for(**options)
