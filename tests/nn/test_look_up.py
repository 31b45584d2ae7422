"""Look-ups on a mesh: rows and gradients of one device, and what is sent for them.

Legend: B batch, T positions, C width, V vocabulary.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import sharding
from bigjax.nn.look_up import look_up
from bigjax.sharding import activation_spec

B, T, C, V = 8, 16, 32, 128
KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_gradient(dtype, rows=B):
    weight_BTC = normal(rows, T, C, seed=1)

    def step(table_VC, tokens_BT):
        def loss(table_VC):
            x_BTC = look_up(table_VC, tokens_BT, dtype)
            return jnp.sum(x_BTC * weight_BTC.astype(dtype)), x_BTC

        return jax.grad(loss, has_aux=True)(table_VC)

    return step


def placed(x, *names):
    mesh = jax.sharding.get_mesh()
    return jax.device_put(x, jax.NamedSharding(mesh, activation_spec(names, x.shape, mesh)))


MESHES = (
    'fsdp=2,tensor=4',
    'data=2,fsdp=2,tensor=2',
    'data=2,context=2,tensor=2',
    'fsdp=2,context=4',
    'data=2,fsdp=2,expert=2',
    'stage=2,fsdp=2,tensor=2',
    'data=8',
)


@pytest.mark.parametrize('text', MESHES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_on_a_mesh_it_is_that_of_one_device(text, dtype):
    table_VC, tokens_BT = normal(V, C), jax.random.randint(jax.random.key(0), (B, T), 0, V)
    step = with_gradient(dtype)
    want = jax.jit(step)(table_VC, tokens_BT)
    with jax.set_mesh(sharding.make_mesh(text)):
        args = placed(table_VC, 'vocab', 'embed'), placed(tokens_BT, 'batch', 'length')
        compiled = jax.jit(step, out_shardings=(args[0].sharding, None)).lower(*args).compile()
        got = compiled(*args)
        whole = activation_spec(('batch', 'sequence', None), got[1].shape, got[1].sharding.mesh)
    assert [x.dtype for x in got] == [jnp.float32, dtype]
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])
    assert got[1].sharding.is_equivalent_to(jax.NamedSharding(got[1].sharding.mesh, whole), 3)
    # Only a device's part of the table, gathered, and of the batch: nothing is laid elsewhere.
    sizes = dict(parts.split('=') for parts in text.split(','))
    size = lambda *axes: int(np.prod([int(sizes.get(axis, 1)) for axis in axes]))  # noqa: E731
    most = max(V // size('tensor') * C, B * T * C // size('data', 'fsdp', 'expert', 'context'))
    found = re.findall(rf'= (.*?) ({KINDS})(?:-start)?\(', compiled.as_text())
    assert {kind for _, kind in found} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    sums = []
    for shapes, kind in found:
        dims = [[int(n) for n in s.split(',') if n] for s in re.findall(r'\w+\[([\d,]*)\]', shapes)]
        assert max(int(np.prod(shape)) for shape in dims) <= most
        sums += [
            shape for shape in dims if kind == 'all-reduce' and shape[:1] == [V // size('tensor')]
        ]
    # The gradient is scattered along FSDP before anyone else adds to it.
    assert all(columns == C // size('fsdp') for _, columns in sums)


@pytest.mark.parametrize('rows', [1, 3])
def test_rows_that_no_mesh_divides_have_rows_and_gradients_too(rows):
    table_VC, tokens_BT = normal(V, C), jax.random.randint(jax.random.key(0), (rows, T), 0, V)
    step = with_gradient(jnp.float32, rows)
    want = jax.jit(step)(table_VC, tokens_BT)
    with jax.set_mesh(sharding.make_mesh('fsdp=2,context=2,tensor=2')):
        got = jax.jit(step)(placed(table_VC, 'vocab', 'embed'), tokens_BT)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize('length', [1, 6])
def test_positions_that_no_mesh_divides(length):
    table_VC, tokens_BT = normal(V, C), jax.random.randint(jax.random.key(0), (B, length), 0, V)
    with jax.set_mesh(sharding.make_mesh('fsdp=2,tensor=4')):
        got = jax.jit(look_up, static_argnums=2)(
            placed(table_VC, 'vocab', 'embed'), tokens_BT, jnp.float32
        )
    np.testing.assert_array_equal(got, table_VC[tokens_BT])


@pytest.mark.parametrize(('text', 'missing'), [('data=8', np.nan), ('fsdp=2,tensor=4', 0.0)])
def test_a_token_that_is_not_there(text, missing):
    tokens_BT = jnp.full((B, T), V).at[0, 0].set(3)
    table_VC = normal(V, C)
    with jax.set_mesh(sharding.make_mesh(text)):
        got = jax.jit(look_up, static_argnums=2)(table_VC, tokens_BT, jnp.float32)
    np.testing.assert_array_equal(got[0, 0], table_VC[3])
    np.testing.assert_array_equal(got[1], np.full((T, C), missing))
