"""GPT: published sizes, causality, cached decoding, bfloat16, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_variables import check_rules

from bigjax.experiment import UsageError
from bigjax.models.gpt import GPT, GPT2_SIZES, GPT3_SIZES, RULES

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
    model = GPT(vocab_size=50_257, context_length=1024, bias=True, **GPT2_SIZES[size])
    assert count(model) == parameters


# Brown et al. 2020, table 2.1, which rounds to three digits or fewer.
@pytest.mark.parametrize('size', GPT3_SIZES)
def test_parameters_of_gpt3(size):
    shape = {'vocab_size': 50_257, 'context_length': 2048, 'bias': True, 'scan': True}
    table = float(size[:-1]) * {'M': 1e6, 'B': 1e9}[size[-1]]
    assert count(GPT(**shape, **GPT3_SIZES[size])) == pytest.approx(table, rel=0.02)


@pytest.mark.parametrize('bias', [False, True])
def test_every_parameter_has_a_rule_of_its_rank(bias):
    shapes = jax.eval_shape(TINY.clone(bias=bias).init, jax.random.key(0), jnp.zeros((1, 8), int))
    for name, shape, axes in check_rules(shapes['params'], RULES):
        for axis, size in zip(axes, shape, strict=True):
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


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError) as error:
        GPT(vocab_size=256, context_length=64, heads=3, width=128)
    assert str(error.value) == '--heads=3: width 128 must be a multiple of heads; try --heads=2'
