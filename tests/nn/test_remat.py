"""Remat: what each policy keeps, in bytes as its docstring says, and which products are repeated.

Legend: B rows, T positions, C width, H query heads, K key-value heads, D size of a head, M hidden.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from bigjax.models.llama import Block
from bigjax.nn import remat as policies
from bigjax.nn.rotary import frequencies, rotation
from bigjax.strategy import Remat

B, T, C, H, K, M = 3, 5, 16, 4, 2, 24
D, FLOAT = C // H, 4
NAMES = get_args(Remat)


@pytest.fixture(scope='module')
def block():
    """One block of Llama, and what it is called with."""
    turned = rotation(jnp.arange(T)[None], frequencies(D, 10_000.0, None))
    module = Block(H, K, M, 1e-5, jnp.float32, 'xla')
    x_BTC = jax.random.normal(jax.random.key(0), (B, T, C))

    def run(params, x_BTC):
        x_BTC = policies.name_input(x_BTC)
        return module.apply({'params': params}, x_BTC, None, turned, None, train=True)[0]

    params = jax.eval_shape(module.init, jax.random.key(0), x_BTC, None, turned, None, train=True)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return run, jax.tree.map(draw, params['params']), x_BTC


def checkpointed(run, remat, **options):
    if remat == 'none' and not options:
        return run
    return jax.checkpoint(run, policy=policies.policy(remat, **options))


def kept(run, params, x_BTC):
    """Returns the bytes a token that the backward pass is handed, without parameters."""
    vjp = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], params, x_BTC)
    known = {x.shape for x in jax.tree.leaves(params)}
    made = [x for x in jax.tree.leaves(vjp) if x.shape not in known and x.shape[:1] != (1,)]
    return sum(x.size * x.dtype.itemsize for x in made) / (x_BTC.size / C)


@pytest.mark.parametrize(
    ('remat', 'size'),
    [
        ('full', C * FLOAT),
        ('save_attention', (C + H * D) * FLOAT + 4 * H),
        ('save_qkv', (C + H * D + (H + 2 * K) * D) * FLOAT + 4 * H),
        ('save_out', (C + H * D + (H + 2 * K) * D + C) * FLOAT + 4 * H),
        ('minimal', (C + H * D + (H + 2 * K) * D + C + 2 * M) * FLOAT + 4 * H),
        ('dots_no_batch', (C + (H + 2 * K) * D + C + 2 * M) * FLOAT),
    ],
)
def test_bytes_of_a_token_are_those_of_the_formula(remat, size, block):
    run, *given = block
    assert kept(checkpointed(run, remat), *given) == size


def products(jaxpr):
    """Returns the number of matrix products in a jaxpr and all it calls."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == 'dot_general'
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                total += products(inner) if isinstance(inner, core.Jaxpr) else 0
    return total


@pytest.mark.parametrize(
    ('remat', 'repeated'),
    [
        # Queries, keys, values, scores, means of values, out, gate, up; never the last one, down.
        # XLA's attention needs its scores once more, which have no name.
        ('full', 8),
        ('save_attention', 7),
        ('save_qkv', 4),
        ('save_out', 3),
        ('minimal', 1),
        ('dots_no_batch', 2),
        ('dots', 2),
    ],
)
def test_products_that_are_repeated(remat, repeated, block):
    run, *given = block

    def count(remat):
        gradient = jax.grad(lambda *given: jnp.sum(checkpointed(run, remat)(*given)), (0, 1))
        return products(jax.make_jaxpr(gradient)(*given).jaxpr)

    assert count(remat) - count('none') == repeated


@pytest.mark.parametrize('remat', [name for name in NAMES if name != 'none'])
def test_gradients_are_the_same(remat, block):
    run, *given = block
    gradient = lambda run: jax.grad(lambda *given: jnp.sum(run(*given)), (0, 1))  # noqa: E731
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, gradient(checkpointed(run, remat))(*given), gradient(run)(*given))


@pytest.mark.parametrize('remat', ['minimal', 'dots_no_batch'])
def test_blocks_side_by_side_keep_as_much_each(remat, block):
    run, params, x_BTC = block
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (params, x_BTC))
    one = checkpointed(run, remat, stages=True)
    assert kept(jax.vmap(one), *twice) == kept(checkpointed(run, remat), params, x_BTC)


def test_what_is_offloaded_goes_to_the_hosts_memory(block):
    run, *given = block
    for remat, keeps in (('offload_inputs', 1), ('offload_qkv', 5), ('offload_minimal', 8)):
        gradient = jax.grad(lambda *g, remat=remat: jnp.sum(checkpointed(run, remat)(*g)))
        text = str(jax.make_jaxpr(gradient)(*given))
        assert text.count('<host>') >= keeps
