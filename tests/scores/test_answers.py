"""Answers: SQuAD's normalization, exact match and F1."""

import pytest

from bigjax.scores.answers import answer_scores, exact_match, normalized, overlap_f1


@pytest.mark.parametrize(
    ('text', 'plain'),
    [
        ('The  Eiffel Tower!', 'eiffel tower'),
        ('an apple, a day', 'apple day'),
        ("O'Neill's", 'oneills'),
        ('theatre another', 'theatre another'),  # articles are words, not parts of them
        ('a', ''),
    ],
)
def test_normalization(text, plain):
    assert normalized(text) == plain


@pytest.mark.parametrize(
    ('answer', 'truths', 'exact', 'f1'),
    [
        ('the tower', ['Tower.'], 1, 1),
        ('big tower', ['tower', 'the big red tower'], 0, 0.8),  # the best of them counts
        ('to be to', ['to to go'], 0, 2 / 3),  # as often as they occur
        ('river', ['tower'], 0, 0),
        ('', [], 1, 1),
        ('tower', [], 0, 0),
        ('', ['tower'], 0, 0),
    ],
)
def test_exact_match_and_f1(answer, truths, exact, f1):
    assert exact_match(answer, truths) == exact
    assert overlap_f1(answer, truths) == pytest.approx(f1)


def test_scores_are_means_over_questions():
    scores = answer_scores([('tower', ['tower']), ('big tower', ['tower'])])
    assert scores == pytest.approx({'exact_match': 0.5, 'f1': (1 + 2 / 3) / 2})
