"""GPT: published sizes, causality, cached decoding, bfloat16, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.experiment import UsageError
from bigjax.models.gpt import GPT, RULES, SIZES, forward_flops

TINY = GPT(vocab_size=11, context_length=8, depth=2, heads=2, width=8)


def count(model, T=8):
    tokens_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
    return sum(x.size for x in jax.tree.leaves(variables['params']))


@pytest.fixture(scope='module')
def tokens_BT():
    return jax.random.randint(jax.random.key(1), (2, 8), 0, 11)


@pytest.fixture(scope='module')
def variables(tokens_BT):
    # Weights of deviation 1 rather than 0.02, so that every layer matters.
    variables = TINY.init(jax.random.key(0), tokens_BT)
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, variables)


def test_parameters_of_nanogpts_cpu_recipe():
    assert count(GPT(vocab_size=256, context_length=64, depth=4, heads=4, width=128)) == 828_544


# GPT-2 as published (Radford et al. 2019; its own count says 117M and 345M for the first two).
@pytest.mark.parametrize(
    ('size', 'parameters'),
    [
        ('124M', 124_439_808),
        ('355M', 354_823_168),
        ('774M', 774_030_080),
        ('1.5B', 1_557_611_200),
    ],
)
def test_parameters_of_the_published_sizes(size, parameters):
    model = GPT(vocab_size=50_257, context_length=1024, bias=True, **SIZES[size])
    assert count(model) == parameters


@pytest.mark.parametrize('bias', [False, True])
def test_every_parameter_has_a_rule_of_its_rank(bias):
    shapes = jax.eval_shape(TINY.clone(bias=bias).init, jax.random.key(0), jnp.zeros((1, 8), int))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes['params']):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
        assert len(axes) == leaf.ndim, name
        for axis, size in zip(axes, leaf.shape, strict=True):
            if axis is not None:
                assert size == {'vocab': 11, 'embed': 8, 'heads': 2, 'mlp': 32}[axis], name


def test_initial_weights_follow_gpt2():
    model = GPT(vocab_size=300, context_length=64, depth=3, heads=4, width=128)
    params = model.init(jax.random.key(0), jnp.zeros((1, 64), int))['params']
    block, out = params['block_1'], 0.02 / 6**0.5
    for kernel, deviation in [
        (params['embedding'], 0.02),
        (params['position'], 0.02),
        (block['attention']['qkv']['kernel'], 0.02),
        (block['attention']['out']['kernel'], out),
        (block['mlp']['up']['kernel'], 0.02),
        (block['mlp']['down']['kernel'], out),
    ]:
        assert kernel.std() == pytest.approx(deviation, rel=0.05)


def test_a_logit_has_no_gradient_to_later_positions(variables, tokens_BT):
    def logit(table_TC, t):
        # A look-up table of its own for every position tells the positions' gradients apart.
        params = variables['params'] | {'position': table_TC}
        return TINY.apply({'params': params}, tokens_BT)[:, t].sum()

    grad_TTC = jax.vmap(jax.grad(logit), (None, 0))(variables['params']['position'], jnp.arange(8))
    seen_TT = np.any(grad_TTC != 0, axis=2)
    np.testing.assert_array_equal(seen_TT, np.tri(8, dtype=bool))


def test_cached_decoding_equals_the_whole_model_token_for_token(variables, tokens_BT):
    want_BTV = TINY.apply(variables, tokens_BT)
    decode = jax.jit(lambda tokens, cache: TINY.apply(variables, tokens, cache, method='decode'))
    prompt_BTV, cache = decode(tokens_BT[:, :3], TINY.init_cache(2))
    np.testing.assert_allclose(prompt_BTV, want_BTV[:, :3], atol=1e-5)
    for t in range(3, 8):
        logits_B1V, cache = decode(tokens_BT[:, t : t + 1], cache)
        np.testing.assert_allclose(logits_B1V, want_BTV[:, t : t + 1], atol=1e-5)
    np.testing.assert_array_equal(cache.length_B, [8, 8])


def test_rows_of_unequal_length_decode_from_where_each_one_ends(variables, tokens_BT):
    _, cache = TINY.apply(variables, tokens_BT[:, :5], TINY.init_cache(2), method='decode')
    cache = cache._replace(length_B=jnp.array([5, 2]))
    following_BT = jnp.stack([tokens_BT[0, 5:7], tokens_BT[1, 2:4]])
    logits_BTV, _ = TINY.apply(variables, following_BT, cache, method='decode')
    want_BTV = TINY.apply(variables, tokens_BT)
    np.testing.assert_allclose(logits_BTV[0], want_BTV[0, 5:7], atol=1e-5)
    np.testing.assert_allclose(logits_BTV[1], want_BTV[1, 2:4], atol=1e-5)


def test_bfloat16_has_float32_parameters_and_logits_near_those_of_float32(variables, tokens_BT):
    model = TINY.clone(dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), tokens_BT)['params']
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    logits_BTV = model.apply(variables, tokens_BT)
    want_BTV = TINY.apply(variables, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    assert jnp.abs(logits_BTV - want_BTV).max() < 0.05 * jnp.abs(want_BTV).max()
    grads = jax.grad(lambda v: model.apply(v, tokens_BT).std())(variables)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_dropout_acts_in_training_only(variables, tokens_BT):
    model = TINY.clone(dropout=0.5)
    run = lambda key: model.apply(variables, tokens_BT, train=True, rngs={'dropout': key})  # noqa: E731
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(
        model.apply(variables, tokens_BT), TINY.apply(variables, tokens_BT)
    )


def test_flops_of_the_compiled_forward_pass():
    model = GPT(vocab_size=256, context_length=64, depth=2, heads=4, width=128)
    tokens = jnp.zeros((1, 64), int)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    counted = jax.jit(model.apply).lower(variables, tokens).cost_analysis()['flops']
    ours = forward_flops(vocab_size=256, length=64, depth=2, width=128)
    # The compiler counts softmax, norms and GELU as well.
    assert 0.9 * counted < ours < counted


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError) as error:
        GPT(vocab_size=256, context_length=64, heads=3, width=128)
    assert str(error.value) == '--heads=3: width 128 must be a multiple of heads; try --heads=2'


def test_too_many_positions_are_refused():
    with pytest.raises(ValueError, match='9 positions: the model sees 8'):
        TINY.init(jax.random.key(0), jnp.zeros((1, 9), int))
    with pytest.raises(ValueError, match='9 positions: the model sees 8'):
        TINY.init_cache(1, 9)
