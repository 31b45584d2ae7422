"""Masking: how many tokens, which, hidden by what; and that it depends on numbers alone."""

import types

import numpy as np
import pytest

from bigjax.data import pipeline
from bigjax.data.masking import Fixed, Masking, row_draws

BEGIN, END, MASK, FIRST, V, T = 0, 1, 2, 3, 40, 50


def tokenizer():
    """Tokens 3 to 39 are ordinary; the odd ones go on with a word."""
    special = np.arange(V) < FIRST
    return types.SimpleNamespace(
        mask=MASK, special=special, continues=(np.arange(V) % 2 == 1) & ~special
    )


def rows(count, seed=0):
    tokens = np.random.default_rng(seed).integers(FIRST, V, (count, T)).astype(np.int32)
    lengths = np.random.default_rng(seed + 1).integers(3, T + 1, count)
    tokens[:, 0] = BEGIN
    tokens[:, 20] = END
    tokens[np.arange(count), lengths - 1] = END
    return np.where(np.arange(T)[None] < lengths[:, None], tokens, -1).astype(np.int32)


def mask(tokens, **options):
    masking = Masking(tokenizer(), length=T, **options)
    draws = pipeline.Draws(seed=3, step=5, first_row=0, rows=len(tokens))
    return masking, masking({'tokens': tokens, 'random': np.arange(len(tokens))}, draws)


@pytest.mark.parametrize('whole_words', [False, True])
def test_the_statistics_are_those_of_the_paper(whole_words):
    tokens = rows(3000)
    _, out = mask(tokens, whole_words=whole_words)
    ordinary = (tokens >= FIRST).sum(1)
    chosen = (out['targets'] >= 0).sum(1)
    goal = np.minimum(np.maximum(np.rint(0.15 * ordinary), 1), ordinary)
    if whole_words:
        assert (chosen <= goal).all()
        assert chosen.sum() > 0.95 * goal.sum()
    else:
        np.testing.assert_array_equal(chosen, goal)
    real = out['targets'] >= 0
    now = np.take_along_axis(out['tokens'], out['positions'], 1)[real]
    before = out['targets'][real]
    # Of those replaced at random, one in 37 happens to get its own token.
    share = {'mask': (now == MASK).mean(), 'kept': (now == before).mean()}
    assert share['mask'] == pytest.approx(0.8, abs=0.015)
    assert share['kept'] == pytest.approx(0.1 + 0.1 / 37, abs=0.015)
    replaced = now[(now != MASK) & (now != before)]
    assert replaced.min() >= FIRST
    assert np.bincount(replaced, minlength=V)[FIRST:].min() > 0


@pytest.mark.parametrize('whole_words', [False, True])
def test_targets_are_what_stood_there_and_all_else_stays(whole_words):
    tokens = rows(200)
    masking, out = mask(tokens, whole_words=whole_words)
    assert out['positions'].shape == out['targets'].shape == (200, masking.predictions)
    real = out['targets'] >= 0
    np.testing.assert_array_equal(
        out['targets'], np.where(real, np.take_along_axis(tokens, out['positions'], 1), -1)
    )
    changed = tokens.copy()
    for row in range(200):
        places = out['positions'][row][real[row]]
        assert (np.diff(places) > 0).all()
        changed[row, places] = out['tokens'][row, places]
    np.testing.assert_array_equal(out['tokens'], changed)
    # No special token and no padding is ever predicted.
    assert out['targets'][real].min() >= FIRST
    np.testing.assert_array_equal(out['random'], np.arange(200))


def test_a_word_is_predicted_whole_or_not_at_all():
    tokens = rows(300)
    _, out = mask(tokens, whole_words=True)
    chosen = np.zeros(tokens.shape, bool)
    for row in range(300):
        chosen[row, out['positions'][row][out['targets'][row] >= 0]] = True
    goes_on = (tokens[:, 1:] % 2 == 1) & (tokens[:, 1:] >= FIRST) & (tokens[:, :-1] >= FIRST)
    split = goes_on & (chosen[:, 1:] != chosen[:, :-1])
    # Only rows with a word of more tokens than may be predicted are allowed to split one.
    for row in np.flatnonzero(split.any(1)):
        runs = ''.join('x' if go else ' ' for go in goes_on[row]).split()
        limit = max(1, round(0.15 * (tokens[row] >= FIRST).sum()))
        assert max(map(len, runs)) + 1 > limit
    assert (split.any(1)).mean() < 0.5


def test_a_row_without_ordinary_tokens_predicts_nothing():
    tokens = np.full((2, T), -1, np.int32)
    tokens[:, :2] = BEGIN, END
    for whole_words in (False, True):
        _, out = mask(tokens, whole_words=whole_words)
        assert (out['targets'] == -1).all()
        np.testing.assert_array_equal(out['tokens'], tokens)


def test_training_masks_are_drawn_anew_and_evaluation_masks_never_change():
    tokens = rows(12)
    records = pipeline.ArrayRecords({'tokens': tokens})
    masking = Masking(tokenizer(), length=T)
    train = pipeline.train_batches(records, batch=12, seed=0, augment=masking)
    epochs = [train[n] for n in (0, 1)]
    assert not np.array_equal(*(np.sort(e['positions'].sum(1)) for e in epochs))
    np.testing.assert_array_equal(train[1]['tokens'], epochs[1]['tokens'])
    halves = [
        pipeline.train_batches(
            records, batch=12, seed=0, augment=masking, process_index=i, process_count=2
        )[1]['tokens']
        for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), epochs[1]['tokens'])
    fixed = Fixed(records, masking)
    whole = fixed.take(np.arange(12))
    for index in (0, 7, 11):
        alone = fixed.take(np.array([index, 3]))
        for name in ('tokens', 'positions', 'targets'):
            np.testing.assert_array_equal(alone[name][0], whole[name][index])


def test_draws_of_a_row_depend_on_seed_row_and_call_alone():
    a, b = row_draws(0, np.array([4, 9])), row_draws(0, np.array([9]))
    first, second = a(3), a(3)
    np.testing.assert_array_equal(first[1:], b(3))
    assert len(np.unique(np.concatenate([first, second]))) == 12
    assert not np.array_equal(row_draws(1, np.array([9]))(3), first[1:])
