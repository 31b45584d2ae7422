"""Llama: published sizes, grouped queries, bfloat16, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.experiment import UsageError
from bigjax.models.llama import SIZES, Attention, Llama
from bigjax.nn.rotary import frequencies, rotation

TINY = Llama(
    vocab_size=11, context_length=8, depth=1, heads=4, kv_heads=2, width=16, hidden=24, theta=100.0
)


def count(model):
    tokens_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
    return sum(x.size for x in jax.tree.leaves(variables['params']))


# As the published weights hold (huggingface.co/meta-llama, Llama 3.2 and 3.1).
@pytest.mark.parametrize(
    ('size', 'parameters'),
    [
        ('1B', 1_235_814_400),
        ('3B', 3_212_749_824),
        ('8B', 8_030_261_248),
        ('70B', 70_553_706_496),
        ('405B', 405_853_388_800),
    ],
)
def test_parameters_of_the_published_sizes(size, parameters):
    shape = {name: value for name, value in SIZES[size].items() if name != 'factor'}
    # Scanned, because tracing one layer takes less time than 126.
    assert count(Llama(vocab_size=128_256, context_length=8192, scan=True, **shape)) == parameters


def test_as_many_key_value_heads_as_asked_for():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 8), int))
    attention = shapes['params']['block_0']['attention']
    assert attention['query']['kernel'].shape == (16, 4, 4)
    assert attention['key']['kernel'].shape == attention['value']['kernel'].shape == (16, 2, 4)
    assert TINY.init_cache(3).layers[0][0].shape == (3, 8, 8)
    assert TINY.clone(scan=True).init_cache(3, 5).layers[1].shape == (1, 3, 5, 8)


def test_attention_knows_distances_alone():
    attention = Attention(heads=4, kv_heads=2, dtype=jnp.float32)
    x_BTC = jax.random.normal(jax.random.key(1), (1, 6, 16))
    turned = lambda first, step: rotation(first + step * jnp.arange(6)[None], frequencies(4, 9.0))  # noqa: E731
    variables = attention.init(jax.random.key(0), x_BTC, None, turned(0, 1), None)
    variables = jax.tree.map(lambda x: 20 * x, variables)
    run = lambda *where: attention.apply(variables, x_BTC, None, turned(*where), None)[0]  # noqa: E731
    np.testing.assert_allclose(run(7, 1), run(0, 1), atol=1e-5)
    assert jnp.abs(run(0, 2) - run(0, 1)).max() > 1e-2


def test_tied_and_untied_output():
    tokens_BT = jnp.zeros((1, 8), int)
    tied = jax.eval_shape(TINY.init, jax.random.key(0), tokens_BT)['params']
    untied = jax.eval_shape(TINY.clone(tied=False).init, jax.random.key(0), tokens_BT)['params']
    assert set(untied) - set(tied) == {'output_embedding'}
    assert untied['output_embedding'].shape == (11, 16)


def test_bfloat16_has_float32_parameters_and_logits_near_those_of_float32():
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    variables = jax.jit(TINY.init)(jax.random.key(0), tokens_BT)
    variables = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, variables)
    model = TINY.clone(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    logits_BTV, want_BTV = model.apply(variables, tokens_BT), TINY.apply(variables, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    assert jnp.abs(logits_BTV - want_BTV).max() < 0.05 * jnp.abs(want_BTV).max()


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        (
            {'heads': 3},
            '--heads=3: width 16 must be an even multiple of heads; try --heads=2',
        ),
        (
            {'heads': 16},
            '--heads=16: width 16 must be an even multiple of heads; try --heads=8',
        ),
        ({'kv_heads': 3}, '--kv_heads=3: must divide the 4 heads; try --kv_heads=2'),
    ],
)
def test_heads_that_do_not_fit_are_refused(knobs, message):
    with pytest.raises(UsageError) as error:
        TINY.clone(**knobs)
    assert str(error.value) == message
