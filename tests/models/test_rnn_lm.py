"""The recurrent language model: causality, decoding, tying, dropout, rules, FLOPs, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_variables import check_rules

from bigjax.experiment import Sample, UsageError
from bigjax.generate import draw, generate_tokens
from bigjax.models.rnn_lm import RULES, RecurrentLM, forward_flops
from bigjax.task import Decoder

V, B, T = 11, 2, 8
CELLS = ['elman', 'lstm', 'gru']
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def make(**kwargs):
    model = RecurrentLM(V, **({'embed': 5, 'features': 8, 'layers': 2} | kwargs))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']
    return model, jax.tree.map(lambda x: 2 * x, params)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('train', 'method'))
def run(model, params, *args, **kwargs):
    """One compiled call; uncompiled, every operation is compiled by itself."""
    return model.apply({'params': params}, *args, **kwargs)


@pytest.mark.parametrize('cell', CELLS)
def test_logits_see_all_tokens_up_to_theirs_and_none_after(cell):
    model, params = make(cell=cell)
    # More rows than tokens of a batch, so that each token can be given a row of its own.
    wide = model.clone(vocab_size=T)
    params |= {'embedding': jax.random.normal(jax.random.key(1), (T, 5))}
    params |= {k: v[..., :T] for k, v in params.items() if k.startswith('output')}

    @jax.jit
    @jax.grad
    def gradient(embedding, t):
        return run(wide, params | {'embedding': embedding}, jnp.arange(T)[None])[0, t].sum()

    for t in (0, 3, T - 1):
        gradient_VE = gradient(params['embedding'], t)
        np.testing.assert_array_equal(jnp.abs(gradient_VE).sum(1) > 0, np.arange(T) <= t)


@pytest.mark.parametrize('cell', CELLS)
def test_decoding_in_pieces_gives_the_same_logits(cell):
    model, params = make(cell=cell)
    want_BTV = run(model, params, TOKENS)
    assert want_BTV.shape == (B, T, V)
    assert want_BTV.dtype == jnp.float32
    cache, parts = model.init_cache(B), []
    for piece_BT in np.split(TOKENS, [3, 4], axis=1):
        logits_BTV, cache = run(model, params, piece_BT, cache, method='decode')
        parts.append(logits_BTV)
    np.testing.assert_allclose(np.concatenate(parts, 1), want_BTV, atol=1e-5)
    assert jax.tree.structure(cache) == jax.tree.structure(model.init_cache(B))


def test_generation_equals_the_unrolled_model():
    model, params = make()
    decoder = Decoder(
        model.init_cache,
        lambda params, tokens, cache: model.apply(
            {'params': params}, tokens, cache, method='decode'
        ),
        2**31 - 1,
    )
    sample = Sample(length=13, temperature=0.7, sample_seed=3)
    text_BT = generate_tokens(decoder, params, TOKENS[:, :3], sample)
    # Tokens that come later change no logits, so one pass over the whole text gives them all.
    logits_BTV = run(model, params, text_BT)
    one = jax.jit(
        lambda n, logits_BV: draw(jax.random.fold_in(jax.random.key(3), n), logits_BV, sample)
    )
    for n in range(sample.length):
        np.testing.assert_array_equal(one(n, logits_BTV[:, 2 + n]), text_BT[:, 3 + n])
    assert text_BT.shape == (B, 16)
    np.testing.assert_array_equal(text_BT[:, :3], TOKENS[:, :3])


def test_tied_output_is_the_embedding():
    model, params = make(embed=8, tied=True)
    assert set(params) == {'embedding', 'recurrent', 'output_bias'}
    untied = model.clone(tied=False)
    same = params | {'output_kernel': params['embedding'].T}
    np.testing.assert_allclose(run(model, params, TOKENS), run(untied, same, TOKENS), atol=1e-5)


def test_tied_output_of_another_width_is_an_error():
    with pytest.raises(UsageError) as error:
        RecurrentLM(V, embed=5, features=8, tied=True)
    assert str(error.value) == '--embed=5: must equal --width=8 with --tied; try --embed=8'


@pytest.mark.parametrize('layers', [1, 2])
def test_dropout_acts_in_training_on_inputs_and_outputs(layers):
    model, params = make(dropout=0.5, layers=layers)
    drawn = lambda seed, train: run(  # noqa: E731
        model, params, TOKENS, train=train, rngs={'dropout': jax.random.key(seed)}
    )
    np.testing.assert_array_equal(drawn(0, False), drawn(1, False))
    whole_BTV = run(model.clone(dropout=0.0), params, TOKENS, train=True)
    np.testing.assert_allclose(drawn(0, False), whole_BTV, atol=1e-6)
    assert not np.allclose(drawn(0, True), drawn(1, True))
    rngs = {'dropout': jax.random.key(0)}
    logit = lambda p: run(model, p, TOKENS, train=True, rngs=rngs)[0, -1, 0]  # noqa: E731
    gradient = jax.jit(jax.grad(logit))(params)
    rows_VE, units_H = gradient['embedding'] != 0, gradient['output_kernel'][:, 0] != 0
    used_V = np.isin(np.arange(V), TOKENS[0])
    # Some features of the tokens read, and some of the last state, had no say; others had.
    assert 0 < rows_VE[used_V].sum() < rows_VE[used_V].size
    assert 0 < units_H.sum() < units_H.size


def test_a_new_model_is_unsure():
    model = RecurrentLM(V, embed=32, features=32, tied=True)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']
    log_BTV = jax.nn.log_softmax(run(model, params, TOKENS))
    assert abs(-log_BTV.mean() - np.log(V)) < 0.1


def test_every_parameter_matches_a_rule_of_its_rank():
    _, params = make(cell='gru')
    check_rules(params, RULES)


def test_flops_count_every_matrix_product():
    sizes = {'vocab_size': V, 'length': 10, 'embed': 5, 'features': 8, 'layers': 2}
    expected = 10 * (2 * 32 * (5 + 8) + 2 * 32 * (8 + 8) + 2 * 8 * V)
    assert forward_flops(**sizes) == expected
    gru = 10 * (2 * 24 * (5 + 8) + 2 * 24 * (8 + 8) + 2 * 8 * V)
    assert forward_flops(**sizes, cell='gru') == gru


def test_bfloat16_has_float32_parameters_and_logits():
    model, params = make(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    logits_BTV = run(model, params, TOKENS)
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = run(model.clone(dtype=jnp.float32), params, TOKENS)
    np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.1)
