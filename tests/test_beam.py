"""Search: exact against all texts there are, greedy with one beam, early without a difference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.beam import beam_search, greedy_search, length_penalty

V, T, END, BEGIN = 4, 4, 2, 0
ROWS = 3


def table(seed):
    """Logits that depend on the row, the position, the token before and the one before that."""
    return np.random.default_rng(seed).normal(size=(ROWS, T, V, V, V)).astype(np.float32) * 2


def make_step(table_RTVVV, beam):
    """A model whose cache holds the row it belongs to and the token before the last one."""
    row_N = jnp.repeat(jnp.arange(ROWS), beam)

    def step(token_N, position, cache):
        logits_NV = table_RTVVV[row_N, position, cache['before'], token_N]
        return logits_NV, {'before': token_N}

    return step, {'before': jnp.zeros(ROWS * beam, jnp.int32)}


@functools.partial(jax.jit, static_argnames=('beam', 'alpha', 'early'))
def search(table_RTVVV, beam, alpha, early=True, real_B=None):
    step, cache = make_step(table_RTVVV, beam)
    return beam_search(step, cache, rows=ROWS, beam=beam, max_length=T, begin=BEGIN, end=END,
                       alpha=alpha, early=early, real_B=real_B)  # fmt: skip


@functools.partial(jax.jit, static_argnames='alpha')
def greedy(table_RTVVV, alpha=0.0, real_B=None):
    step, cache = make_step(table_RTVVV, 1)
    return greedy_search(step, cache, rows=ROWS, max_length=T, begin=BEGIN, end=END, alpha=alpha,
                         real_B=real_B)  # fmt: skip


def log_probability(table_TVVV, text):
    """Of a text with its end; at the last position the end costs what the model says."""
    total, before, last = 0.0, 0, BEGIN
    for position, token in enumerate(text):
        logits_V = np.float64(table_TVVV[position, before, last])
        total += logits_V[token] - np.log(np.exp(logits_V).sum())
        before, last = last, token
    return total


def every_text():
    """All texts of up to T tokens with the end."""
    others = [token for token in range(V) if token != END]
    for length in range(T):
        for body in itertools.product(others, repeat=length):
            yield (*body, END)


def rated(table_TVVV, text, alpha):
    return log_probability(table_TVVV, text) / ((5 + len(text)) / 6) ** alpha


def text_of(tokens_T):
    """The tokens up to the end, behind which there is nothing."""
    text = tuple(int(token) for token in tokens_T if token >= 0)
    assert all(token == -1 for token in tokens_T[len(text) :])
    return text


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.5])
def test_with_beams_for_all_texts_the_best_of_all_is_found(alpha):
    for seed in range(5):
        logits = table(seed)
        found = search(logits, beam=3**3 + 1, alpha=alpha)
        for row in range(ROWS):
            best = max(every_text(), key=lambda text: rated(logits[row], text, alpha))
            assert text_of(found.tokens_BT[row]) == best
            np.testing.assert_allclose(
                found.score_B[row], rated(logits[row], best, alpha), rtol=1e-5
            )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_greedy_is_one_beam(seed):
    one, most_likely = search(table(seed), beam=1, alpha=0.0), greedy(table(seed))
    np.testing.assert_array_equal(one.tokens_BT, most_likely.tokens_BT)
    np.testing.assert_allclose(one.score_B, most_likely.score_B, rtol=1e-5)


def test_greedy_takes_the_likeliest_token():
    logits, found = table(0), greedy(table(0), alpha=0.6)
    for row in range(ROWS):
        text, before, last = [], 0, BEGIN
        while not text or text[-1] != END:
            here_V = logits[row, len(text), before, last]
            text.append(END if len(text) == T - 1 else int(here_V.argmax()))
            before, last = last, text[-1]
        assert text_of(found.tokens_BT[row]) == tuple(text)
        np.testing.assert_allclose(found.score_B[row], rated(logits[row], text, 0.6), rtol=1e-5)


@pytest.mark.parametrize('alpha', [0.0, 1.5])
def test_an_early_end_changes_nothing(alpha):
    for seed in range(60):
        early, late = (search(table(seed), beam=2, alpha=alpha, early=e) for e in (True, False))
        np.testing.assert_array_equal(early.tokens_BT, late.tokens_BT)
        np.testing.assert_array_equal(early.score_B, late.score_B)


def test_what_is_found_has_the_score_it_says():
    for seed in range(5):
        found = search(table(seed), beam=2, alpha=0.6)
        for row in range(ROWS):
            text = text_of(found.tokens_BT[row])
            assert text[-1] == END
            np.testing.assert_allclose(
                found.score_B[row], rated(table(seed)[row], text, 0.6), rtol=1e-5
            )


def steps_taken(**options):
    """How many times the model is asked."""
    counts = []
    logits = np.zeros((ROWS, T, V, V, V), np.float32)
    logits[0, ..., END] = 20  # The first row ends at once, the others never.
    logits[1:, ..., 1] = 20

    def step(token_N, position, cache):
        jax.debug.callback(lambda p: counts.append(int(p)), position)
        plain, _ = make_step(jnp.asarray(logits), len(token_N) // ROWS)
        return plain(token_N, position, cache)

    for search_, extra in ((greedy_search, {}), (beam_search, {'beam': 2})):
        cache = make_step(logits, extra.get('beam', 1))[1]
        found = search_(step, cache, rows=ROWS, max_length=T, begin=BEGIN, end=END, **extra,
                        **options)  # fmt: skip
        assert text_of(found.tokens_BT[0]) == (END,)
    jax.effects_barrier()
    return len(counts)


def test_only_real_rows_are_waited_for():
    assert steps_taken() == 2 * T
    assert steps_taken(real_B=jnp.arange(ROWS) == 0) == 2


def test_the_penalty_is_that_of_the_paper():
    np.testing.assert_allclose(length_penalty(jnp.array([1, 7]), 0.5), [1, 2**0.5], rtol=1e-6)
    assert float(length_penalty(13, 0.0)) == 1


@pytest.mark.parametrize('axis', [0, 1])
def test_caches_follow_their_beams(axis):
    """The logits depend on everything read: with another beam's cache, the score is another."""
    rows, beam, length = 16, 3, 7

    def logits(seen, position, row):
        drawn_V = jnp.sin(seen * jnp.arange(1, V + 1) * 1.7 + position + 0.9 * row)
        return drawn_V - 3.0 * (jnp.arange(V) == END)  # Texts long enough for beams to change.

    def step(token_N, position, cache):
        at = (slice(None), position) if axis == 0 else (position, slice(None))
        cache = {'read': cache['read'].at[at].set(token_N + 1)}
        seen_N = cache['read'].sum(1 - axis)
        row_N = jnp.repeat(jnp.arange(rows), beam)
        return jax.vmap(logits, (0, None, 0))(seen_N, position, row_N), cache

    shape = (rows * beam, length) if axis == 0 else (length, rows * beam)
    found = jax.jit(
        lambda cache: beam_search(step, cache, rows=rows, beam=beam, max_length=length, begin=BEGIN,
                                  end=END, cache_axis=axis)
    )({'read': jnp.zeros(shape, jnp.int32)})  # fmt: skip
    for row in range(rows):
        text, total, seen = text_of(found.tokens_BT[row]), 0.0, BEGIN + 1
        for position, token in enumerate(text):
            total += float(jax.nn.log_softmax(logits(seen, position, row))[token])
            seen += token + 1
        score = total / ((5 + len(text)) / 6) ** 0.6
        np.testing.assert_allclose(found.score_B[row], score, rtol=1e-4)
