"""Generation: which tokens may be drawn, and a cache that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from bigjax.experiment import Sample, UsageError
from bigjax.generate import draw, filter_logits, generate_text, generate_tokens, windows
from bigjax.models.gpt import GPT
from bigjax.task import Decoder

LIMIT = 8
MODEL = GPT(vocab_size=11, context_length=LIMIT, depth=2, heads=2, width=16)
DECODER = Decoder(
    MODEL.init_cache,
    lambda params, tokens_BT, cache: MODEL.apply(
        {'params': params}, tokens_BT, cache, method='decode'
    ),
    LIMIT,
)
PROMPT_BT = np.array([[1, 2, 3], [4, 0, 9]], np.int32)


@pytest.fixture(scope='module')
def params():
    variables = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, LIMIT), jnp.int32))
    # Weights of deviation 0.4 rather than 0.02, so that every layer matters.
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, variables['params'])


# ---- Filters ----

V = 6
quick = settings(max_examples=40, deadline=None)
# Distinct, so that there are no ties; apart enough for float32 to see it.
rows = st.lists(st.integers(-40, 40), min_size=V, max_size=V, unique=True).map(
    lambda row: np.array([row], np.float32) / 8
)


def kept(logits_BV, **filters):
    """Which tokens may be drawn; those that may keep their logit."""
    filtered_BV = np.asarray(filter_logits(jnp.asarray(logits_BV), **filters))
    stays_BV = filtered_BV > -np.inf
    np.testing.assert_array_equal(filtered_BV[stays_BV], logits_BV[stays_BV])
    return stays_BV[0]


def probabilities(logits_BV):
    exp_V = np.exp(np.float64(logits_BV[0]))
    return exp_V / exp_V.sum()


@quick
@given(rows, st.integers(1, V + 2))
def test_top_k_keeps_the_k_likeliest(logits_BV, k):
    stays_V = kept(logits_BV, top_k=k)
    assert stays_V.sum() == min(k, V)
    assert set(np.flatnonzero(stays_V)) == set(np.argsort(-logits_BV[0])[:k])


@quick
@given(rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_BV, p):
    stays_V, probability_V = kept(logits_BV, top_p=p), probabilities(logits_BV)
    order = np.argsort(-probability_V)
    count = stays_V.sum()
    assert set(np.flatnonzero(stays_V)) == set(order[:count])
    reached = np.cumsum(probability_V[order])
    assert reached[count - 1] >= p - 1e-5
    assert count == 1 or reached[count - 2] < p + 1e-5


@quick
@given(rows, st.floats(0.01, 0.99))
def test_min_p_keeps_what_is_likely_enough(logits_BV, p):
    stays_V, probability_V = kept(logits_BV, min_p=p), probabilities(logits_BV)
    share_V = probability_V / probability_V.max()
    assert stays_V[share_V > p * 1.001].all()
    assert not stays_V[share_V < p * 0.999].any()


@quick
@given(rows, st.integers(0, V), st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_filters_together_keep_the_likeliest_and_no_more_than_each(logits_BV, k, p, least):
    stays_V = kept(logits_BV, top_k=k, top_p=p, min_p=least)
    assert stays_V[np.argmax(logits_BV)]
    assert not (stays_V & ~kept(logits_BV, top_k=k)).any()
    assert not (stays_V & ~kept(logits_BV, min_p=least)).any()
    # What top-k left is one again before top-p counts.
    alone_BV = np.where(kept(logits_BV, top_k=k)[None], logits_BV, -np.inf).astype(np.float32)
    assert not (stays_V & ~kept(alone_BV, top_p=p)).any()


def test_filters_that_are_off_change_nothing():
    logits_BV = np.arange(6, dtype=np.float32)[None]
    assert kept(logits_BV, top_k=0, top_p=1.0, min_p=0.0).all()


def test_ties_stay_together():
    assert list(kept(np.array([[1, 3, 3, 0]], np.float32), top_k=1)) == [0, 1, 1, 0]
    assert list(kept(np.array([[1, 3, 3, 0]], np.float32), top_p=0.1)) == [0, 1, 1, 0]


def test_rows_are_filtered_each_by_itself():
    logits_BV = jnp.array([[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    filtered_BV = filter_logits(logits_BV, top_k=1)
    np.testing.assert_array_equal(filtered_BV > -np.inf, [[0, 0, 1], [1, 0, 0]])


# ---- Draws ----


def test_temperature_zero_takes_the_likeliest(key):
    logits_BV = jax.random.normal(key, (64, 5))
    drawn_B = draw(key, logits_BV, Sample(temperature=0.0))
    np.testing.assert_array_equal(drawn_B, np.argmax(logits_BV, -1))
    assert drawn_B.dtype == jnp.int32


def test_draws_are_as_likely_as_the_temperature_says(key):
    logits_V, temperature, n = np.array([0.0, 1.0, 2.0], np.float32), 2.0, 20_000
    drawn_B = draw(key, jnp.tile(logits_V, (n, 1)), Sample(temperature=temperature))
    share_V = np.bincount(drawn_B, minlength=3) / n
    expected_V = probabilities(logits_V[None] / temperature)
    # Five standard deviations of a share.
    np.testing.assert_array_less(np.abs(share_V - expected_V), 5 * 0.5 / np.sqrt(n))


# ---- Stretches ----


@pytest.mark.parametrize(
    ('prompt', 'length', 'limit', 'stretches'),
    [
        (3, 2, 8, [(3, 2)]),
        (3, 6, 8, [(3, 6)]),  # Position 8 is drawn from, and nothing is read after it.
        (3, 7, 8, [(3, 6), (4, 5)]),
        (3, 12, 8, [(3, 6), (4, 5), (4, 5)]),
        (7, 1, 8, [(7, 1)]),
        (8, 1, 8, [(4, 1)]),  # A prompt that fills the model is cut, too.
        (50, 6, 8, [(4, 5), (4, 5)]),
        (1, 5, 2, [(1, 2), (1, 2), (1, 2)]),
        (3, 9, 5, [(3, 3), (2, 4), (2, 4)]),
    ],
)
def test_windows(prompt, length, limit, stretches):
    assert windows(prompt, length, limit) == stretches


@given(st.integers(1, 40), st.integers(1, 60), st.integers(2, 12))
def test_windows_fit_and_suffice(prompt, length, limit):
    stretches = windows(prompt, length, limit)
    assert sum(new for _, new in stretches) >= length
    assert sum(new for _, new in stretches[:-1]) < length
    text = prompt
    for context, new in stretches:
        assert 1 <= context <= text
        assert context + new - 1 <= limit  # The last token drawn is not read.
        text += new
    # After the first, one shape is compiled.
    assert len(set(stretches[1:])) <= 1


# ---- Text ----


def uncached(params, prompt_BT, sample):
    """The same text without a cache: everything in view is read anew for every token."""
    text_BT, key, offset = prompt_BT, jax.random.key(sample.sample_seed), 0

    @jax.jit
    def one(tokens_BT, last, offset):
        logits_BTV = MODEL.apply({'params': params}, tokens_BT, train=False)
        return draw(jax.random.fold_in(key, offset), logits_BTV[:, last], sample)

    for context, new in windows(prompt_BT.shape[1], sample.length, LIMIT):
        first = text_BT.shape[1] - context
        for _ in range(new):
            seen_BT = text_BT[:, first:]
            # Padded behind, which causal attention does not see, to compile once.
            padded_BT = np.pad(seen_BT, ((0, 0), (0, LIMIT - seen_BT.shape[1])))
            token_B = one(padded_BT, seen_BT.shape[1] - 1, offset)
            text_BT = np.concatenate([text_BT, np.asarray(token_B)[:, None]], 1)
            offset += 1
    return text_BT[:, : prompt_BT.shape[1] + sample.length]


@pytest.mark.parametrize(
    'sample',
    [
        Sample(length=6, temperature=0.0),
        Sample(length=20, temperature=0.0),  # Beyond what the model sees, three times.
        Sample(length=20, temperature=1.0, sample_seed=3),
        Sample(length=20, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05),
    ],
)
def test_the_cache_changes_no_token(params, sample):
    text_BT = generate_tokens(DECODER, params, PROMPT_BT, sample)
    assert text_BT.dtype == np.int32
    np.testing.assert_array_equal(text_BT[:, :3], PROMPT_BT)
    np.testing.assert_array_equal(text_BT, uncached(params, PROMPT_BT, sample))


def test_a_prompt_longer_than_the_model_sees(params):
    prompt_BT = np.arange(30, dtype=np.int32).reshape(2, 15) % 11
    sample = Sample(length=7, temperature=0.0)
    text_BT = generate_tokens(DECODER, params, prompt_BT, sample)
    np.testing.assert_array_equal(text_BT, uncached(params, prompt_BT, sample))


@pytest.mark.parametrize('length', [2, 6, 7, 13])
def test_a_longer_text_begins_like_a_shorter_one(params, length):
    sample = Sample(length=20, temperature=1.0)
    long_BT = generate_tokens(DECODER, params, PROMPT_BT, sample)
    short_BT = generate_tokens(
        DECODER, params, PROMPT_BT, dataclasses.replace(sample, length=length)
    )
    assert short_BT.shape == (2, 3 + length)
    np.testing.assert_array_equal(short_BT, long_BT[:, : 3 + length])


def test_the_seed_decides(params):
    text = lambda seed: generate_tokens(  # noqa: E731
        DECODER, params, PROMPT_BT, Sample(length=20, temperature=1.0, sample_seed=seed)
    )
    np.testing.assert_array_equal(text(0), text(0))
    assert (text(0) != text(1)).any()


def test_texts_do_not_depend_on_how_parameters_are_placed(params):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(x):
        last = 'fsdp' if x.shape[-1] % 8 == 0 else None
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), last)))

    sample = Sample(length=20, temperature=0.0)
    with jax.set_mesh(mesh):
        text_BT = generate_tokens(DECODER, jax.tree.map(spread, params), PROMPT_BT, sample)
    np.testing.assert_array_equal(text_BT, generate_tokens(DECODER, params, PROMPT_BT, sample))


class Letters:
    """One token a letter, from a."""

    def encode(self, text):
        return [ord(letter) - ord('a') for letter in text]

    def decode(self, tokens):
        return ''.join(chr(ord('a') + token) for token in tokens)


def test_texts_begin_with_the_prompt(params):
    sample = Sample(prompt='bad', length=5, samples=3, temperature=1.0)
    texts = generate_text(DECODER, Letters(), params, sample)
    assert [text[:3] for text in texts] == ['bad'] * 3
    assert [len(text) for text in texts] == [8] * 3
    assert len(set(texts)) > 1


def test_an_empty_prompt_is_refused(params):
    with pytest.raises(UsageError) as error:
        generate_text(DECODER, Letters(), params, Sample(prompt=''))
    assert str(error.value) == (
        '--prompt=: must hold at least one character; try --prompt="import "'
    )
