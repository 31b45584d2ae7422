"""Logits on a mesh: values and gradients of one device, and what is sent for the table's gradient.

Legend: B batch, T positions, C width, V vocabulary.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.mesh import make_mesh
from bigjax.nn.logits import logits

B, T, C, V = 8, 16, 32, 128


def step(x_BTC, table_VC):
    def loss(x_BTC, table_VC):
        logits_BTV = logits(x_BTC, table_VC)
        return jnp.sum(jnp.sin(logits_BTV)), logits_BTV

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x_BTC, table_VC)


def drawn(rows=B, vocabulary=V):
    x_BTC = jax.random.normal(jax.random.key(0), (rows, T, C))
    return x_BTC, jax.random.normal(jax.random.key(1), (vocabulary, C))


@pytest.mark.parametrize(
    'text',
    [
        'data=2,fsdp=2,tensor=2',
        'fsdp=2,context=2,tensor=2',
        'fsdp=2,context=4',
        'data=2,fsdp=2,expert=2',
        'stage=2,fsdp=4',
        'data=2,tensor=4',
    ],
)
def test_on_a_mesh_they_are_those_of_one_device(text):
    want = jax.jit(step)(*drawn())
    with jax.set_mesh(make_mesh(text)):
        got = jax.jit(step)(*drawn())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize('rows', [1, 3, 4])
def test_rows_that_the_mesh_does_not_divide(rows):
    want = jax.jit(step)(*drawn(rows))
    with jax.set_mesh(make_mesh('fsdp=8')):
        got = jax.jit(step)(*drawn(rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(('vocabulary', 'each'), [(18, (2, 16, 9)), (17, (2, 8, 17))])
def test_devices_share_positions_where_they_cannot_share_the_vocabulary(vocabulary, each):
    want = jax.jit(step)(*drawn(vocabulary=vocabulary))
    with jax.set_mesh(make_mesh('data=2,fsdp=2,tensor=2')):
        got = jax.jit(step)(*drawn(vocabulary=vocabulary))
    logits_BTV = got[0][1]
    assert logits_BTV.sharding.shard_shape(logits_BTV.shape) == each
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_the_gradient_is_scattered_along_fsdp_before_others_add_to_it():
    with jax.set_mesh(make_mesh('data=2,fsdp=4')):
        where = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, 'fsdp'))
        x_BTC, table_VC = drawn()
        compiled = jax.jit(lambda *a: step(*a)[1][1], out_shardings=where).lower(
            x_BTC.astype(jnp.bfloat16), jax.device_put(table_VC, where)
        )
        text = compiled.compile().as_text()
    scattered = re.findall(r'= \w+\[([\d,]+)\]\S* reduce-scatter\(', text)
    summed = re.findall(r'= \w+\[([\d,]+)\]\S* all-reduce\(', text)
    assert scattered == [f'{V},{C // 4}']
    assert f'{V},{C // 4}' in summed
    assert f'{V},{C}' not in summed
    # In the type of the computation; the CPU's compiler makes its own of that.
    ops = re.findall(r'reduce_scatter"\(.*?\) -> (tensor<\S+>)', compiled.as_text(), re.DOTALL)
    assert ops == [f'tensor<{V}x{C // 4}xbf16>']
