"""WaveNet: causality and reach, decoding, implementations, rules, FLOPs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules, drawn

from bigjax.experiment import Sample, UsageError
from bigjax.generate import draw, generate_tokens
from bigjax.models.wavenet import RULES, WaveNet, forward_flops
from bigjax.task import Decoder

V, B, T = 11, 2, 12
SIZES = {'vocab_size': V, 'width': 6, 'gates': 5, 'skip': 7, 'depth': 2, 'blocks': 1}
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def make(**kwargs):
    model = WaveNet(**SIZES | kwargs)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * x), drawn(shapes)['params'])


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def run(model, params, *args, **kwargs):
    """One compiled call; uncompiled, every operation is compiled by itself."""
    return model.apply({'params': params}, *args, **kwargs)


@pytest.mark.parametrize('kernel_size', [1, 2, 3])
def test_a_logit_sees_the_tokens_of_its_receptive_field_and_no_others(kernel_size):
    # Each token has a row of its own, whose gradient tells whether it was seen.
    model, params = make(vocab_size=T, kernel_size=kernel_size)

    @jax.jit
    @jax.grad
    def gradient(embedding, t):
        return run(model, params | {'embedding': embedding}, jnp.arange(T)[None])[0, t].sum()

    for t in (0, 5, T - 1):
        seen_T = jnp.abs(gradient(params['embedding'], t)).sum(1) > 0
        within = (np.arange(T) <= t) & (np.arange(T) > t - model.receptive_field)
        np.testing.assert_array_equal(seen_T, within)


def test_dilations_double_and_begin_anew():
    model = WaveNet(depth=10, blocks=3)
    assert model.dilations[:3] == (1, 2, 4)
    assert model.dilations[9:11] == (512, 1)
    assert len(model.dilations) == 30
    assert model.receptive_field == 3 * 1023 + 2


def test_decoding_in_pieces_gives_the_same_logits():
    model, params = make(kernel_size=3)
    want_BTV = run(model, params, TOKENS)
    assert (want_BTV.shape, want_BTV.dtype) == ((B, T, V), jnp.float32)
    cache, parts = model.init_cache(B), []
    for piece_BT in np.split(TOKENS, [5, 6, 7], axis=1):
        logits_BTV, cache = run(model, params, piece_BT, cache, method='decode')
        parts.append(logits_BTV)
    np.testing.assert_allclose(np.concatenate(parts, 1), want_BTV, atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, model.init_cache(B))


def test_generation_equals_the_whole_model():
    model, params = make()
    decoder = Decoder(
        model.init_cache,
        lambda params, tokens, cache: model.apply(
            {'params': params}, tokens, cache, method='decode'
        ),
        2**31 - 1,
    )
    sample = Sample(length=9, temperature=0.7, sample_seed=3)
    text_BT = generate_tokens(decoder, params, TOKENS[:, :3], sample)
    # Tokens that come later change no logits, so one pass over the whole text gives them all.
    logits_BTV = run(model, params, text_BT)
    one = jax.jit(
        lambda n, logits_BV: draw(jax.random.fold_in(jax.random.key(3), n), logits_BV, sample)
    )
    for n in range(sample.length):
        np.testing.assert_array_equal(one(n, logits_BTV[:, 2 + n]), text_BT[:, 3 + n])


@pytest.mark.slow
def test_implementations_agree_with_gradients():
    found = {}
    for impl in ('xla', 'tpu'):
        model, params = make(impl=impl, depth=1)

        @jax.jit
        def loss(params, model=model):
            logits_BTV = model.apply({'params': params}, TOKENS)
            return jnp.mean(jnp.square(logits_BTV))

        found[impl] = jax.value_and_grad(loss)(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found['tpu'], found['xla'])


def test_an_implementation_that_there_is_not_is_refused_by_its_flag():
    with pytest.raises(UsageError, match='--conv=gpu: '):
        make(impl='gpu')


def test_every_parameter_matches_a_rule_of_its_rank():
    check_rules(make()[1], RULES)


def test_flops_count_every_matrix_product():
    model, params = make(impl='reference', kernel_size=3)
    counted = matrix_flops(lambda x: model.apply({'params': params}, x), TOKENS[:1])
    assert forward_flops(**SIZES, kernel_size=3, length=T) == counted


def test_a_new_model_is_unsure():
    model = WaveNet(**SIZES | {'width': 32, 'gates': 32, 'skip': 32, 'depth': 1})
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']
    log_BTV = jax.nn.log_softmax(run(model, params, TOKENS))
    assert abs(-log_BTV.mean() - np.log(V)) < 0.7


def test_bfloat16_has_float32_parameters_and_logits():
    model, params = make(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    logits_BTV = run(model, params, TOKENS)
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = run(model.clone(dtype=jnp.float32), params, TOKENS)
    np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.1)
